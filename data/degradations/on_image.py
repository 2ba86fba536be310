"""Random degradations of one image on the CPU, with OpenCV and in float32: what data sets and data preparation use.

Images are float32 ``(H, W, C)`` in [0, 1], C 1 or 3. The rarer steps are on_batch.py's, on a batch of one.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from data.degradations import on_batch as batched
from data.degradations.steps import Blur, Camera, Clip, Jpeg, Noise, Poisson, Resize, Step, Thin
from utils.utils_image import Array, imresize_np, single2tensor3, uint2single

Image = NDArray[np.float32]


def apply(img: Image, steps: Sequence[Step], rng: np.random.Generator) -> Image:
    """Apply the steps to ``(H, W, C)``, which is left as it is; noise comes from ``rng``."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    for step in steps:
        img = _apply(img, step, generator)
    return img


def _apply(img: Image, step: Step, generator: torch.Generator) -> Image:
    match step:
        case Blur() if step.is_separable:
            return convolve_separable(img, step.profile())
        case Blur():
            return convolve(img, step.kernel())
        case Thin(every=every):
            return np.ascontiguousarray(convolve_separable(img, step.profile())[::every, ::every])
        case Resize():
            return resize(img, step)
        case Noise():
            return add_gaussian_noise(img, step, generator)
        case Jpeg(quality=quality, codec="libjpeg"):
            return add_jpeg(img, int(quality))
        case Clip(rounded=rounded):
            img = img.clip(0, 1)
            return uint2single(_to_uint(img)) if rounded else img
    tensor = single2tensor3(img)[None]
    match step:
        case Poisson():
            tensor = batched.add_poisson_noise(tensor, [step], generator)
        case Jpeg():
            tensor = batched.jpeg(tensor, [step.quality], step.codec)
        case Camera():
            tensor = batched.photograph(tensor, [step], generator)
    return np.ascontiguousarray(tensor[0].permute(1, 2, 0).numpy())


# -------------------------------------------------------------------------------------------------------------- blur


def convolve(img: Image, kernel: Array) -> Image:
    """Convolve ``(H, W, C)`` with ``(k, k)``, k odd; the border is mirrored, the edge pixel not repeated."""
    # OpenCV correlates: the kernel is turned round. BORDER_REFLECT_101 is what SciPy calls "mirror".
    kernel = kernel[::-1, ::-1].astype(np.float32)
    # What is below a millionth of the peak moves no pixel by a hundredth of a level.
    kernel[np.abs(kernel) < 1e-6 * np.abs(kernel).max()] = 0
    side = len(kernel)
    if kernel.size < _FOURIER_SIZE or np.count_nonzero(kernel) > _FOURIER_TAPS:
        return _with_channels(cv2.filter2D(img, -1, kernel, borderType=cv2.BORDER_REFLECT_101), img)
    height, width = img.shape[:2]
    bordered = cv2.copyMakeBorder(img, *(side // 2,) * 4, cv2.BORDER_REFLECT_101)
    result: Array | None = None
    rows = (_FOURIER_SIZE - 1) // side
    for top in range(0, side, rows):
        stripe = kernel[top : top + rows]
        if not stripe.any():
            continue
        seen = bordered[top : top + height + len(stripe) - 1]
        part = cv2.filter2D(seen, -1, stripe, anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)[:height, :width]
        result = part if result is None else cv2.add(result, part, dst=result)
    assert result is not None
    return _with_channels(np.ascontiguousarray(result), img)


# OpenCV takes the Fourier transform for kernels of 130 numbers and more, though it skips zeros without it and is 1.3 to
# 4 times faster then: larger kernels are given to it in stripes, unless they hold more numbers than these.
_FOURIER_SIZE = 130
_FOURIER_TAPS = 440


def convolve_separable(img: Image, profile: Array) -> Image:
    """:func:`convolve` with the outer product of ``profile`` with itself."""
    blurred = cv2.sepFilter2D(img, -1, profile[::-1], profile[::-1], borderType=cv2.BORDER_REFLECT_101)
    return _with_channels(blurred, img)


def add_sharpening(img: Image, weight: float = 0.5, radius: int = 50, threshold: float = 10) -> Image:
    """Unsharp masking of ``(H, W, C)`` where an image differs from its blur by more than ``threshold`` of 255."""
    side = radius + 1 - radius % 2

    def blur(x: Array) -> Image:
        return _with_channels(cv2.GaussianBlur(x, (side, side), 0), img)

    residual = img - blur(img)
    soft_mask = blur((np.abs(residual) * 255 > threshold).astype(np.float32))
    return soft_mask * (img + weight * residual).clip(0, 1) + (1 - soft_mask) * img


# ----------------------------------------------------------------------------------------------------- other steps


_INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


def resize(img: Image, step: Resize) -> Image:
    """Resize ``(H, W, C)``."""
    if step.filter == "matlab":
        resized = imresize_np(img, step.height / img.shape[0])
    elif step.filter == "window":
        resized = _window_means(img, step.height, step.width)
    elif img.shape[:2] == (step.height, step.width):
        resized = img
    else:
        resized = cv2.resize(img, (step.width, step.height), interpolation=_INTERPOLATIONS[step.filter])
    resized = _with_channels(resized, img)
    # the other filters are means of what is there
    return resized.clip(0, 1) if step.clip and step.filter in ("cubic", "matlab") else resized


def _window_means(img: Image, height: int, width: int) -> Image:
    """PyTorch's "area": the mean of every pixel that a new pixel touches."""
    rows, columns = (_window_matrix(old, new) for old, new in zip(img.shape[:2], (height, width), strict=True))
    img = (rows @ img.reshape(len(img), -1)).reshape(height, *img.shape[1:]).swapaxes(0, 1)
    img = (columns @ img.reshape(len(img), -1)).reshape(width, height, -1).swapaxes(0, 1)
    return np.ascontiguousarray(img)


def _window_matrix(old: int, new: int) -> csr_array:
    """``(new, old)``."""
    start, stop = np.arange(new) * old // new, -(-np.arange(1, new + 1) * old // new)
    count = stop - start
    ends = np.concatenate([[0], count.cumsum()])
    columns = np.arange(ends[-1]) + (start - ends[:-1]).repeat(count)
    return csr_array(((1 / count).astype(np.float32).repeat(count), columns, ends), shape=(new, old))


def add_gaussian_noise(img: Image, step: Noise, generator: torch.Generator) -> Image:
    """Add noise to ``(H, W, C)``; the result lies in [0, 1]."""
    height, width, channels = img.shape
    # torch's generator is twice as fast as NumPy's
    noise = torch.randn(height, width, 1 if step.kind == "gray" else channels, generator=generator).numpy()
    if step.mix is not None:
        noise = _with_channels(cv2.transform(noise, step.matrix(channels).T), img)
    else:
        noise *= np.float32(step.level / 255)
        if step.kind == "gray" and channels > 1:
            noise = cv2.merge([noise] * channels)
    if step.speckle:
        noise *= img
    noise += img
    return np.clip(noise, 0, 1, out=noise)


def add_jpeg(img: Image, quality: int) -> Image:
    """Compress ``(H, W, C)`` in [0, 1] as JPEG."""
    uint, is_rgb = _to_uint(img), img.shape[2] == 3
    if is_rgb:
        uint = cv2.cvtColor(uint, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", uint, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded: Array = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB if is_rgb else cv2.IMREAD_GRAYSCALE))
    return uint2single(decoded.reshape(img.shape))


def _to_uint(img: Image) -> Array:
    """Rounded to 8 bits; below 0 there may be rounding errors only."""
    return _with_channels(cv2.convertScaleAbs(img, alpha=255), img)


def _with_channels(img: Array, like: Image) -> Image:
    """OpenCV drops the channel axis of ``(H, W, 1)``: put it back."""
    return img.reshape(*img.shape[:2], like.shape[2])
