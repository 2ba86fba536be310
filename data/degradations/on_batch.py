"""Random degradations of a batch in torch, on the device of the images, each image with steps of its own.

Images are float32 ``(N, C, H, W)`` in [0, 1]. As they are shrunk by factors of their own they are kept at the top left
of a common canvas, ``sizes`` ``(N, 2)`` saying how large each is; what lies beyond never reaches an image. Where
``sizes`` is None all of the canvas is image.
"""

from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional as F

from data.degradations.steps import Blur, Camera, Clip, Codec, Filter, Jpeg, Noise, Poisson, Resize, Step, Thin
from utils.utils_image import Array, imresize


@torch.no_grad()
def apply_batch(img: Tensor, plans: Sequence[Sequence[Step]], generator: torch.Generator) -> Tensor:
    """Apply to each of ``(N, C, H, W)`` its own steps, which must all end in one size, ``(N, C, h, w)``.

    Noise comes from ``generator``, of the device of the images.
    """
    canvas, sizes = img, np.tile(img.shape[-2:], (len(img), 1))
    waiting = [deque(plan) for plan in plans]
    # Images do not wait for each other: what most of them need next is done for these, all at once.
    while heads := Counter(_kind(steps[0]) for steps in waiting if steps):
        kind = heads.most_common(1)[0][0]
        members = [i for i, steps in enumerate(waiting) if steps and _kind(steps[0]) == kind]
        steps = [waiting[i].popleft() for i in members]
        height, width = sizes[members].max(axis=0)
        if len(members) == len(img):
            canvas, sizes = _apply(canvas[..., :height, :width], sizes, steps, generator)
            continue
        index = torch.tensor(members, device=img.device)
        part, sizes[members] = _apply(canvas[index, :, :height, :width], sizes[members], steps, generator)
        missing = [max(there - here, 0) for here, there in zip(canvas.shape[-2:], part.shape[-2:], strict=True)]
        canvas = F.pad(canvas, (0, missing[1], 0, missing[0])) if any(missing) else canvas
        # not in place: the canvas may be the caller's images
        canvas = canvas.clone() if canvas is img else canvas
        canvas[index, :, : part.shape[-2], : part.shape[-1]] = part
    height, width = sizes[0]
    return canvas[..., :height, :width].contiguous()


def _kind(step: Step) -> tuple[Any, ...]:
    """Steps of one kind can be applied together."""
    if isinstance(step, Resize):
        return Resize, step.filter, step.clip  # of blind_test some are clipped
    if isinstance(step, Thin):
        return Thin, step.every
    return type(step), step.codec if isinstance(step, Jpeg) else None


def _apply(img: Tensor, sizes: Array, steps: list[Any], generator: torch.Generator) -> tuple[Tensor, Array]:
    """Apply steps of one kind to ``(N, C, H, W)``; -> the images and their sizes."""
    first = steps[0]
    if isinstance(first, Blur):
        return filter2d(img, [step.kernel() for step in steps], sizes), sizes
    if isinstance(first, Thin):
        profiles = [step.profile()[::-1] for step in steps]  # a convolution
        img = filter2d(img, [np.outer(profile, profile) for profile in profiles], sizes)
        return img[..., :: first.every, :: first.every].clamp(0, 1), -(-sizes // first.every)
    if isinstance(first, Resize):
        goals = np.array([(step.height, step.width) for step in steps])
        img = resize(img, sizes, goals, first.filter)
        return (img.clamp(0, 1) if first.clip else img), goals
    if isinstance(first, Noise):
        return add_gaussian_noise(img, steps, generator), sizes
    if isinstance(first, Poisson):
        return add_poisson_noise(img, steps, generator, sizes), sizes
    if isinstance(first, Jpeg):
        return jpeg(img, [step.quality for step in steps], first.codec, sizes), sizes
    if isinstance(first, Camera):
        return photograph(img, steps, generator, sizes), sizes
    img = img.clamp(0, 1)
    rounded = torch.tensor([cast(Clip, step).rounded for step in steps], device=img.device)[:, None, None, None]
    return torch.where(rounded, (img * 255).round() / 255, img), sizes


# ------------------------------------------------------------------------------------------------------------ places


def _sides(img: Tensor, sizes: Array | None) -> tuple[Tensor, Tensor]:
    """The heights and the widths, (N, 1) on the device."""
    if sizes is None:
        sizes = np.tile(img.shape[-2:], (len(img), 1))
    height, width = torch.from_numpy(np.asarray(sizes, np.int64)).to(img.device).split(1, dim=1)
    return height, width


def _mirrored(size: Tensor, start: int, stop: int) -> Tensor:
    """Where the pixels from ``start`` to ``stop`` are found, (N, stop - start): mirrored, the edge not repeated."""
    period = (2 * (size - 1)).clamp(min=1)
    position = torch.arange(start, stop, device=size.device) % period
    return torch.minimum(position, period - position)


def _repeated(size: Tensor, stop: int) -> Tensor:
    """As :func:`_mirrored`, from 0 on, the edge repeated."""
    return torch.minimum(torch.arange(stop, device=size.device), size - 1)


def _take(img: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels of ``(N, C, H, W)`` at ``rows`` (N, h) and ``columns`` (N, w): ``(N, C, h, w)``."""
    channels, width = img.shape[1], img.shape[3]
    img = img.gather(2, rows[:, None, :, None].expand(len(img), channels, -1, width))
    return img.gather(3, columns[:, None, None].expand(len(img), channels, img.shape[2], -1))


def _inside(img: Tensor, sizes: Array | None) -> Tensor:
    """(N, 1, H, W): whether a pixel of the canvas belongs to the image."""
    height, width = _sides(img, sizes)
    rows = torch.arange(img.shape[-2], device=img.device) < height
    columns = torch.arange(img.shape[-1], device=img.device) < width
    return (rows[:, :, None] & columns[:, None])[:, None]


def _per_image(values: Sequence[float] | Array, img: Tensor) -> Tensor:
    """``(N,)`` to ``(N, 1, 1, 1)`` beside ``img``."""
    return torch.tensor(np.asarray(values)).to(img)[:, None, None, None]


# -------------------------------------------------------------------------------------------------------------- blur


def filter2d(img: Tensor, kernels: Sequence[Array], sizes: Array | None = None) -> Tensor:
    """Correlate each of ``(N, C, H, W)`` with its ``(k, k)``, k odd; the border is mirrored, the edge not repeated."""
    side = max(len(kernel) for kernel in kernels)
    padded = np.stack([np.pad(kernel, (side - len(kernel)) // 2) for kernel in kernels])
    weights = torch.from_numpy(padded).to(img)[:, None]
    rows, columns = _sides(img, sizes)
    height, width = img.shape[-2:]
    reach = side // 2
    img = _take(img, _mirrored(rows, -reach, height + reach), _mirrored(columns, -reach, width + reach))
    # By Fourier transform: the time does not depend on the kernels' sizes.
    shape = [next_fast_len(n, real=True) for n in img.shape[-2:]]
    spectrum = torch.fft.rfft2(img, shape) * torch.fft.rfft2(weights, shape).conj()
    return torch.fft.irfft2(spectrum, shape)[..., :height, :width].contiguous()


def sharpen(img: Tensor, weight: float = 0.5, radius: int = 50, threshold: float = 10) -> Tensor:
    """Unsharp masking of ``(N, C, H, W)``: on_image.add_sharpening on the device."""
    side = radius + 1 - radius % 2
    x = torch.arange(side, dtype=torch.float64) - side // 2
    profile = torch.exp(-(x**2) / (2 * (0.3 * ((side - 1) / 2 - 1) + 0.8) ** 2))  # OpenCV's width for a size
    profile = (profile / profile.sum()).to(img)

    def matrix(n: int) -> Tensor:
        """(n, n): the blur of one axis."""
        taps = _mirrored(torch.tensor([[n]]), -(side // 2), n + side // 2)[0].unfold(0, side, 1).to(img.device)
        return torch.stack([torch.zeros(n).to(img).index_add(0, row, profile) for row in taps])

    rows, columns = matrix(img.shape[-2]), matrix(img.shape[-1])
    residual = img - rows @ img @ columns.T
    soft_mask = rows @ (residual.abs() * 255 > threshold).to(img) @ columns.T
    return soft_mask * (img + weight * residual).clamp(0, 1) + (1 - soft_mask) * img


# ------------------------------------------------------------------------------------------------------------ resize


def resize(img: Tensor, sizes: Array, goals: Array, filter_: Filter) -> Tensor:
    """Resize each of ``(N, C, H, W)`` from its size to its goal, both ``(N, 2)``: a matrix for either axis."""
    batch, channels = img.shape[:2]
    if filter_ == "matlab":
        return imresize(img, float(goals[0, 0] / sizes[0, 0]))  # KAIR's first step: all are of one size, and to half
    # OpenCV takes the area only of what shrinks both ways
    shrinks = np.logical_and.reduce(goals <= sizes, axis=1)
    rows, columns = (_axis(img, sizes[:, i], goals[:, i], img.shape[2 + i], filter_, shrinks) for i in (0, 1))
    img = img.reshape(batch, -1, img.shape[3]) @ columns.mT  # (N, C H, w)
    img = img.view(batch, channels, -1, columns.shape[1]).mT.reshape(batch, -1, rows.shape[2])  # (N, C w, H)
    return (img @ rows.mT).view(batch, channels, columns.shape[1], rows.shape[1]).mT


def _axis(like: Tensor, size: Array, goal: Array, length: int, filter_: Filter, shrinks: Array) -> Tensor:
    """``(N, largest goal, length)``: new pixels from old ones; rows beyond a goal are whatever they are."""
    scale = 1 / (goal / size)[:, None]  # as OpenCV rounds it
    new = np.arange(goal.max())
    last = (size - 1)[:, None, None]
    if filter_ in ("area", "window"):
        start, stop = new * scale, (new + 1) * scale
        if filter_ == "window":
            # whole numbers: of the quotient, for the product could be a rounding error above one
            start, stop = new * size[:, None] // goal[:, None], -(-(new + 1) * size[:, None] // goal[:, None])
        lower, upper = (torch.from_numpy(x.astype(np.float32)).to(like.device)[..., None] for x in (start, stop))
        old = torch.arange(length, device=like.device)
        weights = (torch.minimum(old + 1, upper) - torch.maximum(old, lower)).clamp(min=0) / (upper - lower)
        if filter_ == "window" or shrinks.all():
            return weights
    before: Array
    share: Array
    if filter_ == "area":
        before = np.floor(new * scale)
        # in float32 as in OpenCV, where a share of a rounding error less than 1 is 1, and then counts as 0
        share = np.maximum((new + 1) - (before + 1) * (goal / size)[:, None], 0).astype(np.float32)
    else:
        position = (new + 0.5) * scale - 0.5
        before, share = np.floor(position), position - np.floor(position)
    share -= np.floor(share)
    taps = [1 - share, share]
    if filter_ == "cubic":
        before -= 1
        taps = [_cubic(share + 1), _cubic(share), _cubic(1 - share), _cubic(2 - share)]
    places = (before[..., None] + np.arange(len(taps))).clip(0, last)
    index = torch.from_numpy(places.astype(np.int64)).to(like.device)
    values = torch.from_numpy(np.stack(taps, axis=-1)).to(like)
    old = torch.arange(length, device=like.device)
    # a sum of comparisons: adding at indices would sum in any order on a GPU
    linear = sum(
        (values[..., t, None] * (index[..., t, None] == old) for t in range(1, len(taps))),
        start=(values[..., 0, None] * (index[..., 0, None] == old)),
    )
    if filter_ != "area":
        return linear
    return torch.where(torch.from_numpy(shrinks).to(like.device)[:, None, None], weights, linear)


def _cubic(x: Array) -> Array:
    """Keys' cubic with a = -3/4 for x >= 0."""
    inner = (1.25 * x - 2.25) * x * x + 1
    outer = -0.75 * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, inner, outer)


# ------------------------------------------------------------------------------------------------------------- noise


def add_gaussian_noise(img: Tensor, steps: Sequence[Noise], generator: torch.Generator) -> Tensor:
    """Add noise to ``(N, C, H, W)``; the result lies in [0, 1]."""
    mix = torch.from_numpy(np.stack([step.matrix(img.shape[1]) for step in steps])).to(img)
    white = torch.randn(img.shape, generator=generator, device=img.device, dtype=img.dtype)
    noise = torch.einsum("nkhw,nkc->nchw", white, mix)
    if any(step.speckle for step in steps):
        noise = torch.where(_per_image([step.speckle for step in steps], img) > 0, noise * img, noise)
    return (img + noise).clamp_(0, 1)


# ITU-R BT.601 as in MATLAB's rgb2gray, which the published code uses for gray noise
_LUMA = (0.2989, 0.587, 0.114)


def add_poisson_noise(
    img: Tensor, steps: Sequence[Poisson], generator: torch.Generator, sizes: Array | None = None
) -> Tensor:
    """Add shot noise to ``(N, C, H, W)``; the result lies in [0, 1].

    Where ``photons`` is None, white stands for as many as the image has distinct 8-bit values, rounded up to a power
    of 2.
    """
    photons = _per_image([step.photons or 0.0 for step in steps], img)
    gray = torch.tensor([step.gray for step in steps])

    def noise(source: Tensor) -> Tensor:
        levels = (source.clamp(0, 1) * 255).round()
        white = photons
        if any(step.photons is None for step in steps):
            seen = torch.zeros(len(img), 257, device=img.device)  # the last is for what lies beyond the image
            bins = torch.where(_inside(img, sizes), levels, 256).long().flatten(1)
            distinct = seen.scatter_(1, bins, 1.0)[:, :256].sum(dim=1)
            white = torch.where(photons > 0, photons, 2 ** distinct.log2().ceil()[:, None, None, None])
        expected = levels / 255
        return torch.poisson(expected * white, generator) / white - expected

    def gray_noise() -> Tensor:
        luma = (img * img.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True) if img.shape[1] == 3 else img
        return noise(luma)

    # neither is made for nobody
    if gray.all():
        added = gray_noise()
    elif not gray.any():
        added = noise(img)
    else:
        added = torch.where(gray.to(img.device)[:, None, None, None], gray_noise(), noise(img))
    return (img + _per_image([step.scale for step in steps], img) * added).clamp_(0, 1)


# -------------------------------------------------------------------------------------------------------------- JPEG

# ITU-T T.81, tables K.1 and K.2
_LUMA_TABLE = np.array(
    [
        (16, 11, 10, 16, 24, 40, 51, 61),
        (12, 12, 14, 19, 26, 58, 60, 55),
        (14, 13, 16, 24, 40, 57, 69, 56),
        (14, 17, 22, 29, 51, 87, 80, 62),
        (18, 22, 37, 56, 68, 109, 103, 77),
        (24, 35, 55, 64, 81, 104, 113, 92),
        (49, 64, 78, 87, 103, 121, 120, 101),
        (72, 92, 95, 98, 112, 100, 103, 99),
    ]
)
_CHROMA_TABLE = np.full((8, 8), 99)
_CHROMA_TABLE[:4, :4] = [(17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99)]

_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg(img: Tensor, qualities: Sequence[float], codec: Codec, sizes: Array | None = None) -> Tensor:
    """What JPEG leaves of ``(N, C, H, W)`` in [0, 1] at these qualities, above 0 and up to 100; see steps.Jpeg."""
    height, width = img.shape[-2:]
    quality = np.asarray(qualities, np.float64)[:, None, None]
    # black fills up to multiples of 16, or what the edge shows
    planes = F.pad(255 * img.clamp(0, 1), (0, -width % 16, 0, -height % 16))
    rows, columns = _sides(img, sizes)
    if codec == "diffjpeg":
        if sizes is not None:
            planes *= _inside(planes, sizes)
        decoded = _diffjpeg(planes, np.where(quality < 50, 50 / quality, 2 - quality / 50))
    else:
        planes = _take(planes, _repeated(rows, planes.shape[-2]), _repeated(columns, planes.shape[-1]))
        decoded = _libjpeg(planes.round_(), np.where(quality < 50, 5000 // quality, 200 - 2 * quality), rows, columns)
    return decoded[..., :height, :width].clamp_(0, 255) / 255


def _diffjpeg(planes: Tensor, factor: Array) -> Tensor:
    """Real-ESRGAN's. Its table of the luma is transposed; so are images, at random."""
    if planes.shape[1] == 1:
        return _quantized(planes - 128, _LUMA_TABLE.T * factor) + 128
    # The chroma of the format is shifted by 128, and then all planes by -128, before the transform.
    y, chroma = _mix(planes, _YCBCR).split((1, 2), dim=1)
    chroma = _quantized(F.avg_pool2d(chroma, 2), _CHROMA_TABLE * factor)
    y = _quantized(y - 128, _LUMA_TABLE.T * factor) + 128
    return _mix(torch.cat([y, F.interpolate(chroma, scale_factor=2)], dim=1), _RGB)


def _libjpeg(planes: Tensor, percent: Array, rows: Tensor, columns: Tensor) -> Tensor:
    """libjpeg's, in its whole numbers."""

    def coded(values: Tensor, table: Array) -> Tensor:
        return _coded(values - 128, np.floor((table * percent + 50) / 100).clip(1, 255)).add_(128).clamp_(0, 255)

    if planes.shape[1] == 1:
        return coded(planes, _LUMA_TABLE)
    half = planes.new_tensor(_WHOLE_HALVES)[:, None, None]
    y, chroma = ((_mix(planes, _WHOLE_YCBCR) + half) / 65536).floor_().split((1, 2), dim=1)
    # means of four, halves up and down by turns
    bias = (1 + torch.arange(chroma.shape[-1] // 2, device=planes.device) % 2) / 4
    chroma = (F.avg_pool2d(chroma, 2) + bias).floor_()
    # Columns are repeated before the means are taken, rows after; both again once decoded.
    below, beside = (_repeated((side + 1) // 2, n) for side, n in zip((rows, columns), chroma.shape[2:], strict=True))
    chroma = coded(_take(chroma, below, torch.arange(chroma.shape[3], device=below.device)[None]), _CHROMA_TABLE)
    chroma = _take(chroma, below, beside)
    chroma = _twice(_twice(chroma.mT, 0, 0, 1).mT, 8, 7, 16)
    added = ((_mix(chroma - 128, _WHOLE_RGB) + 32768) / 65536).floor_()
    return (coded(y, _LUMA_TABLE) + added).clamp_(0, 255)


# of 65536, as libjpeg rounds them (jccolor.c, jdcolor.c); float32 holds the sums
_WHOLE_YCBCR = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
_WHOLE_HALVES = (32768, 128 * 65536 + 32767, 128 * 65536 + 32767)
_WHOLE_RGB = ((0, 91881), (-22554, -46802), (116130, 0))  # what the chroma adds to the luma
# libjpeg's accurate transform (jfdctint.c, jidctint.c), its sums multiplied out: 8192 sqrt(8) times the DCT-II, rounded
_A, _B = (11363, 9633, 6437, 2260), (9633, -2259, -11362, -6436)
_C, _D = (6437, -11362, 2261, 9633), (2260, -6436, 9633, -11363)
_WHOLE_DCT = np.array(
    [
        (8192,) * 8,
        _A + tuple(-x for x in reversed(_A)),
        (10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703),
        _B + tuple(-x for x in reversed(_B)),
        (8192, -8192, -8192, 8192) * 2,
        _C + tuple(-x for x in reversed(_C)),
        (4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433),
        _D + tuple(-x for x in reversed(_D)),
    ]
)


def _coded(planes: Tensor, steps: Array) -> Tensor:
    """``(N, C, H, W)`` with 8 x 8 blocks transformed, rounded to multiples of ``steps`` (N, 8, 8) and put back."""
    batch, channels, height, width = planes.shape
    dct = torch.from_numpy(_WHOLE_DCT).to(planes)

    def descaled(sums: Tensor, bits: int) -> Tensor:
        return (sums * 2.0**-bits).add_(0.5).floor_()

    step = torch.from_numpy(steps).to(planes)[:, None]
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4).reshape(batch, -1, 8, 8)
    eighths = descaled((descaled(blocks @ dct.T, 11).mT.contiguous() @ dct.T).mT, 15)
    levels = (eighths.abs() / (8 * step)).add_(0.5).floor_().copysign_(eighths)
    columns = descaled((levels * step).mT.contiguous() @ dct, 11)
    blocks = descaled(columns.mT.contiguous() @ dct, 18)
    return blocks.view(batch, channels, height // 8, width // 8, 8, 8).transpose(3, 4).reshape(planes.shape)


def _twice(planes: Tensor, before: int, after: int, divisor: int) -> Tensor:
    """Twice as wide: 3 parts of the nearer pixel and 1 of the other, plus before or after, divided and cut off."""
    near = 3 * planes
    left = torch.cat([planes[..., :1], planes[..., :-1]], dim=-1)
    right = torch.cat([planes[..., 1:], planes[..., -1:]], dim=-1)
    both = torch.stack([near + left + before, near + right + after], dim=-1).flatten(-2)
    return (both / divisor).floor_()


def _mix(img: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Multiply the channels of ``(N, C, H, W)`` by a matrix."""
    return torch.einsum("ij,njhw->nihw", torch.tensor(matrix, dtype=img.dtype, device=img.device), img)


def _quantized(planes: Tensor, steps: Array) -> Tensor:
    """:func:`_coded` with nothing rounded but the coefficients."""
    batch, channels, height, width = planes.shape
    # both axes at once, a block being a row: one large product instead of many small ones
    dct = torch.from_numpy(_dct_matrix()).to(planes)
    step = torch.from_numpy(steps.reshape(batch, 1, 64)).to(planes)
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4).reshape(batch, -1, 64)
    coefficients = (blocks @ dct.T).div_(step).round_().mul_(step)
    blocks = (coefficients @ dct).view(batch, channels, height // 8, width // 8, 8, 8)
    return blocks.transpose(3, 4).reshape(planes.shape)


@lru_cache
def _dct_matrix() -> Array:
    """The orthonormal DCT-II of 8 x 8 points, ``(64, 64)``, rows are frequencies."""
    k = np.arange(8)
    matrix = np.cos((2 * k + 1) * k[:, None] * np.pi / 16) / 2
    matrix[0] /= np.sqrt(2)
    return np.kron(matrix, matrix)


# ------------------------------------------------------------------------------------------------------------ camera

# From CIE XYZ to the raw colours of four cameras, the colour matrices of Brooks et al., CVPR 2019,
# https://arxiv.org/abs/1811.11127, and from linear sRGB to XYZ (IEC 61966-2-1).
XYZ_TO_CAMERA = np.array(
    [
        ((1.0234, -0.2969, -0.2266), (-0.5625, 1.6328, -0.0469), (-0.0703, 0.2188, 0.6406)),
        ((0.4913, -0.0541, -0.0202), (-0.6130, 1.3513, 0.2906), (-0.1564, 0.2151, 0.7183)),
        ((0.8380, -0.2630, -0.0639), (-0.2887, 1.0725, 0.2496), (-0.0627, 0.1427, 0.5438)),
        ((0.6596, -0.2079, -0.0562), (-0.4782, 1.3016, 0.1933), (-0.0970, 0.1581, 0.5181)),
    ]
)
_SRGB_TO_XYZ = np.array(
    [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)]
)


def photograph(img: Tensor, steps: Sequence[Camera], generator: torch.Generator, sizes: Array | None = None) -> Tensor:
    """What cameras make of the scenes ``(N, 3, H, W)``: to the sensor, its noise, and back; the result is in [0, 1].

    Back from sRGB: tone curve, gamma 2.2, colours of the camera, exposure and white balance, Bayer mosaic (Brooks et
    al., CVPR 2019). Then shot and read noise, and forward: demosaicing by Malvar et al., ICASSP 2004, and the rest.
    """
    to_camera = np.stack([np.tensordot(step.cameras, XYZ_TO_CAMERA, 1) @ _SRGB_TO_XYZ for step in steps])
    to_camera /= to_camera.sum(axis=2, keepdims=True)  # white stays white
    gains = np.array([(step.red_gain, 1.0, step.blue_gain) for step in steps]) * [[step.exposure] for step in steps]
    gain = torch.from_numpy(gains).to(img)[:, :, None, None]

    def coloured(x: Tensor, matrices: Array) -> Tensor:
        return torch.einsum("nij,njhw->nihw", torch.from_numpy(matrices).to(x), x)

    x = 0.5 - torch.sin(torch.asin((1 - 2 * img).clamp(-1, 1)) / 3)  # the inverse of the tone curve below
    x = coloured(x.clamp(min=0) ** 2.2, to_camera) / gain
    x = _mosaic(x)
    shot, read = _per_image([step.shot for step in steps], img), _per_image([step.read for step in steps], img)
    white = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    x = x + white * (shot * x.clamp(min=0) + read).sqrt()

    x = _demosaic(x, *_sides(img, sizes)) * gain
    x = coloured(x, np.linalg.inv(to_camera)).clamp(0, 1) ** (1 / 2.2)
    return (3 - 2 * x) * x * x


def _bayer(like: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a pixel stands in a row of red and in a column of red; green where only one is true."""
    height, width = like.shape[-2:]
    rows = torch.arange(height, device=like.device) % 2 == 0
    return rows[:, None].expand(height, width), (torch.arange(width, device=like.device) % 2 == 0).expand(height, width)


def _mosaic(img: Tensor) -> Tensor:
    """``(N, 3, H, W)`` to the one colour that each pixel of the sensor sees, ``(N, 1, H, W)``."""
    red_row, red_column = _bayer(img)
    red, green, blue = img.split(1, dim=1)
    return torch.where(red_row & red_column, red, torch.where(red_row | red_column, green, blue))


# Green at red and blue; red or blue beside it in the row, beside it in the column, and at the corners. In eighths.
_MALVAR = np.array(
    [
        [(0, 0, -1, 0, 0), (0, 0, 2, 0, 0), (-1, 2, 4, 2, -1), (0, 0, 2, 0, 0), (0, 0, -1, 0, 0)],
        [(0, 0, 0.5, 0, 0), (0, -1, 0, -1, 0), (-1, 4, 5, 4, -1), (0, -1, 0, -1, 0), (0, 0, 0.5, 0, 0)],
        [(0, 0, -1, 0, 0), (0, -1, 4, -1, 0), (0.5, 0, 5, 0, 0.5), (0, -1, 4, -1, 0), (0, 0, -1, 0, 0)],
        [(0, 0, -1.5, 0, 0), (0, 2, 0, 2, 0), (-1.5, 0, 6, 0, -1.5), (0, 2, 0, 2, 0), (0, 0, -1.5, 0, 0)],
    ]
)


def _demosaic(raw: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``(N, 1, H, W)`` to ``(N, 3, H, W)``."""
    height, width = raw.shape[-2:]
    # mirrored at the edge, every colour stays where that colour is
    padded = _take(raw, _mirrored(rows, -2, height + 2), _mirrored(columns, -2, width + 2))
    green, in_row, in_column, corner = F.conv2d(padded, torch.from_numpy(_MALVAR / 8)[:, None].to(raw)).split(1, dim=1)
    red_row, red_column = _bayer(raw)
    is_green = red_row != red_column
    green = torch.where(is_green, raw, green)
    red = torch.where(is_green, torch.where(red_row, in_row, in_column), torch.where(red_row, raw, corner))
    blue = torch.where(is_green, torch.where(red_row, in_column, in_row), torch.where(red_row, corner, raw))
    return torch.cat([red, green, blue], dim=1)
