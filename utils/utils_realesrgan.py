"""Real-ESRGAN's degradation: blur, resize, noise and JPEG, all of it twice, in torch on the device of the images.

Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data", ICCVW 2021,
https://arxiv.org/abs/2107.10833. Images are float32 ``(N, C, H, W)`` in [0, 1], C 1 or 3; kernels are float64 and sum
to 1. The draws come from the generator given, so that a seed decides a sample.

Three things differ from the published code. A whole batch is degraded there at once and shares its resize factors and
kinds of noise; a pool of 180 pairs then mixes the batches. :func:`degrade_realesrgan` of one image at a time needs no
pool: every sample of a batch has draws of its own, and there is no pool whose content a checkpoint would have to hold.
Gray Gaussian noise is one field for all images there, and one for each here. The first resize leaves the image up to a
pixel of its new size out of place there; here it fills its frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.fft import next_fast_len
from scipy.special import j1
from torch import Tensor
from torch.nn import functional as F

from utils.utils_blindsr import elliptic_distance
from utils.utils_image import Array


@dataclass(frozen=True)
class Order:
    """How strong one round of blur, resize, noise and JPEG is. Pairs are ranges; draws in them are uniform."""

    kernel_size: tuple[int, int]  # odd sides, both included
    kernel_prob: tuple[float, ...]  # Gaussian, generalised Gaussian and plateau, each isotropic and anisotropic
    sinc_prob: float  # the kernel is a sinc instead
    blur_sigma: tuple[float, float]  # pixels
    betag: tuple[float, float]  # shape of the generalised Gaussians
    betap: tuple[float, float]  # shape of the plateaus
    blur_prob: float
    resize_prob: tuple[float, float, float]  # up, down, keep
    resize_range: tuple[float, float]  # smallest and largest factor
    gaussian_prob: float  # Gaussian noise, else Poisson noise
    gaussian_sigma: tuple[float, float]  # of 255
    poisson_scale: tuple[float, float]  # times the noise of as many photons as make the image's gray levels
    gray_prob: float  # the noise is the same in all channels
    jpeg_quality: tuple[float, float]


@dataclass(frozen=True)
class Strength:
    """Both rounds, and the sinc filter (ringing, overshoot) at their end."""

    first: Order
    second: Order
    sinc_prob: float
    sinc_size: tuple[int, int]  # odd sides, both included


_SIX_KERNELS = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)

REAL_ESRGAN = Strength(
    first=Order(
        kernel_size=(7, 21),
        kernel_prob=_SIX_KERNELS,
        sinc_prob=0.1,
        blur_sigma=(0.2, 3.0),
        betag=(0.5, 4.0),
        betap=(1.0, 2.0),
        blur_prob=1.0,
        resize_prob=(0.2, 0.7, 0.1),
        resize_range=(0.15, 1.5),
        gaussian_prob=0.5,
        gaussian_sigma=(1, 30),
        poisson_scale=(0.05, 3.0),
        gray_prob=0.4,
        jpeg_quality=(30, 95),
    ),
    second=Order(
        kernel_size=(7, 21),
        kernel_prob=_SIX_KERNELS,
        sinc_prob=0.1,
        blur_sigma=(0.2, 1.5),
        betag=(0.5, 4.0),
        betap=(1.0, 2.0),
        blur_prob=0.8,
        resize_prob=(0.3, 0.4, 0.3),
        resize_range=(0.3, 1.2),
        gaussian_prob=0.5,
        gaussian_sigma=(1, 25),
        poisson_scale=(0.05, 2.5),
        gray_prob=0.4,
        jpeg_quality=(30, 95),
    ),
    sinc_prob=0.8,
    sinc_size=(7, 21),
)
"""The figures of Real-ESRGAN's published option file, ``train_realesrgan_x4plus.yml``."""

SSL_FORK = Strength(
    first=Order(
        kernel_size=(3, 7),
        kernel_prob=(0.7, 0.3, 0, 0, 0, 0),
        sinc_prob=0.01,
        blur_sigma=(0.1, 0.6),
        betag=(0.1, 2.0),
        betap=(0.1, 1.0),
        blur_prob=1.0,
        resize_prob=(0.1, 0.85, 0.05),
        resize_range=(0.9, 1.1),
        gaussian_prob=0.5,
        gaussian_sigma=(1, 8),
        poisson_scale=(0.05, 0.5),
        gray_prob=0.2,
        jpeg_quality=(85, 95),
    ),
    second=Order(
        kernel_size=(3, 5),
        kernel_prob=(0.7, 0.3, 0, 0, 0, 0),
        sinc_prob=0.01,
        blur_sigma=(0.1, 0.4),
        betag=(0.1, 2.0),
        betap=(0.1, 1.0),
        blur_prob=0.8,
        resize_prob=(0.1, 0.85, 0.05),
        resize_range=(0.9, 1.1),
        gaussian_prob=0.5,
        gaussian_sigma=(0, 4),
        poisson_scale=(0, 0.3),
        gray_prob=0.2,
        jpeg_quality=(87, 95),
    ),
    sinc_prob=0.1,
    sinc_size=(3, 5),
)
"""The milder figures with which the models of the SSL paper (https://arxiv.org/abs/2408.05713) were trained."""


def degrade_realesrgan(img: Tensor, sf: int, rng: np.random.Generator, strength: Strength) -> Tensor:
    """Degrade ``(N, C, H, W)`` in [0, 1] to L, ``(N, C, H // sf, W // sf)``, rounded to 8 bits.

    Kernels, noise levels, gray or colour and JPEG quality are drawn for each image; resize factors and filters, the
    kind of noise and the order of the last two steps once for all N, which must keep one size. ``rng`` decides all.
    """
    # Noise is drawn on the device of the images.
    noise = torch.Generator(img.device).manual_seed(int(rng.integers(2**63)))
    batch, _, height, width = img.shape
    first, second = strength.first, strength.second

    L = add_blur(img, rng, first)
    factor = draw_factor(rng, first)
    L = _resize(L, height * factor, width * factor, rng)
    L = add_noise(L, rng, first, noise)
    L = jpeg(L, rng.uniform(*first.jpeg_quality, batch))

    L = add_blur(L, rng, second)
    factor = draw_factor(rng, second)
    L = _resize(L, height / sf * factor, width / sf * factor, rng)
    L = add_noise(L, rng, second, noise)
    quality = rng.uniform(*second.jpeg_quality, batch)
    sinc_last = rng.random() < 0.5
    if sinc_last:
        L = jpeg(L, quality)
    L = _resize(L, height // sf, width // sf, rng)
    L = filter2d(L, [draw_final_sinc(rng, strength) for _ in range(batch)])
    if not sinc_last:
        L = jpeg(L.clamp(0, 1), quality)
    return (L.clamp(0, 1) * 255).round() / 255


# ------------------------------------------------------------------------------------------------------------- draws


def draw_kernel(rng: np.random.Generator, order: Order) -> Array:
    """A blur kernel ``(k, k)``: a sinc with ``sinc_prob``, else one of the six kinds."""
    size = _odd_size(rng, order.kernel_size)
    if rng.random() < order.sinc_prob:
        return low_pass_kernel(size, rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi))
    kind = int(rng.choice(6, p=order.kernel_prob))
    sigma_x = sigma_y = rng.uniform(*order.blur_sigma)
    theta = 0.0
    if kind % 2:  # anisotropic
        sigma_y, theta = rng.uniform(*order.blur_sigma), rng.uniform(-np.pi, np.pi)
    if kind < 2:
        return generalized_gaussian(size, sigma_x, sigma_y, theta, 1.0)
    if kind < 4:
        return generalized_gaussian(size, sigma_x, sigma_y, theta, _draw_beta(rng, order.betag))
    return plateau(size, sigma_x, sigma_y, theta, _draw_beta(rng, order.betap))


def draw_final_sinc(rng: np.random.Generator, strength: Strength) -> Array:
    """The last kernel ``(k, k)``: a sinc with ``sinc_prob``, else a single 1, which changes nothing."""
    if rng.random() < strength.sinc_prob:
        return low_pass_kernel(_odd_size(rng, strength.sinc_size), rng.uniform(np.pi / 3, np.pi))
    return np.ones((1, 1))


def draw_factor(rng: np.random.Generator, order: Order) -> float:
    """A resize factor: above 1, below 1 or 1."""
    smallest, largest = order.resize_range
    way = rng.choice(3, p=order.resize_prob)
    return (rng.uniform(1, largest), rng.uniform(smallest, 1), 1.0)[way]


def _draw_beta(rng: np.random.Generator, beta: tuple[float, float]) -> float:
    """Half of the shapes are below 1, half above."""
    return rng.uniform(beta[0], 1) if rng.random() < 0.5 else rng.uniform(1, beta[1])


def _odd_size(rng: np.random.Generator, size: tuple[int, int]) -> int:
    return int(rng.choice(np.arange(size[0], size[1] + 1, 2)))


# ----------------------------------------------------------------------------------------------------------- kernels


def generalized_gaussian(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Array:
    """``exp(-q^beta / 2)``, q the squared distance in units of sigma, ``(size, size)``; a Gaussian for ``beta`` 1.

    ``theta`` turns x to y, in radians. Section 3.1 of the paper.
    """
    kernel = np.exp(-0.5 * elliptic_distance(size, theta, sigma_x**2, sigma_y**2) ** beta)
    return kernel / kernel.sum()


def plateau(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Array:
    """``1 / (1 + q^beta)``, ``(size, size)``, otherwise as :func:`generalized_gaussian`."""
    kernel = 1 / (1 + elliptic_distance(size, theta, sigma_x**2, sigma_y**2) ** beta)
    return kernel / kernel.sum()


def low_pass_kernel(size: int, cutoff: float) -> Array:
    """The circular sinc ``cutoff J1(cutoff r) / (2 pi r)``, ``(size, size)``; ``cutoff`` in (0, pi] radians a pixel."""
    x = np.arange(size) - (size - 1) / 2
    r = np.hypot(x, x[:, None])
    r[r == 0] = 1  # replaced by its limit below
    kernel = cutoff * j1(cutoff * r) / (2 * np.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    return kernel / kernel.sum()


# ------------------------------------------------------------------------------------------------------------- steps


def add_blur(img: Tensor, rng: np.random.Generator, order: Order) -> Tensor:
    """Blur ``(N, C, H, W)`` with a random kernel for each image, or, unless ``blur_prob`` says so, none of them."""
    if rng.random() >= order.blur_prob:
        return img
    return filter2d(img, [draw_kernel(rng, order) for _ in img])


def filter2d(img: Tensor, kernels: list[Array]) -> Tensor:
    """Correlate each of ``(N, C, H, W)`` with its ``(k, k)``, k odd; the border is mirrored, the edge not repeated."""
    side = max(len(kernel) for kernel in kernels)
    if side == 1:
        return img
    padded = np.stack([np.pad(kernel, (side - len(kernel)) // 2) for kernel in kernels])
    weights = torch.from_numpy(padded).to(img)[:, None]
    height, width = img.shape[-2:]
    for dim in (-2, -1):
        img = img.index_select(dim, _mirrored(img.shape[dim], side // 2).to(img.device))
    # By Fourier transform: on a CPU many times faster than conv2d for the larger kernels.
    shape = [next_fast_len(n, real=True) for n in img.shape[-2:]]
    spectrum = torch.fft.rfft2(img, shape) * torch.fft.rfft2(weights, shape).conj()
    return torch.fft.irfft2(spectrum, shape)[..., :height, :width].contiguous()


def _mirrored(n: int, pad: int) -> Tensor:
    """Indices of ``n`` pixels with ``pad`` mirrored ones at both ends, however small the image is."""
    index = np.pad(np.arange(n), pad, mode="reflect")
    return torch.from_numpy(index)


def _resize(img: Tensor, height: float, width: float, rng: np.random.Generator) -> Tensor:
    mode = ("area", "bilinear", "bicubic")[rng.integers(3)]
    size = max(int(height), 1), max(int(width), 1)
    return F.interpolate(img, size, mode=mode) if size != img.shape[-2:] else img


def add_noise(img: Tensor, rng: np.random.Generator, order: Order, generator: torch.Generator) -> Tensor:
    """Add Gaussian or Poisson noise to ``(N, C, H, W)``, gray or coloured; the result lies in [0, 1]."""
    batch = len(img)
    gaussian = rng.random() < order.gaussian_prob
    strength = rng.uniform(*(order.gaussian_sigma if gaussian else order.poisson_scale), batch)
    gray = rng.random(batch) < order.gray_prob
    noise = gaussian_noise if gaussian else poisson_noise
    return (img + noise(img, strength, gray, generator)).clamp(0, 1)


def gaussian_noise(img: Tensor, sigma: Array, gray: Array, generator: torch.Generator) -> Tensor:
    """Gaussian noise for ``(N, C, H, W)`` with the standard deviations ``sigma`` (N,), of 255."""

    def of(channels: int) -> Tensor:
        shape = (len(img), channels, *img.shape[-2:])
        return torch.randn(shape, generator=generator, device=img.device, dtype=img.dtype)

    return _per_image(sigma / 255, img) * _gray_or_colour(of, gray, img)


def poisson_noise(img: Tensor, scale: Array, gray: Array, generator: torch.Generator) -> Tensor:
    """Shot noise for ``(N, C, H, W)``, multiplied by ``scale`` (N,).

    White stands for as many photons as the image has distinct 8-bit values, rounded up to a power of 2.
    """

    def of(channels: int) -> Tensor:
        source = _luma(img) if channels < img.shape[1] else img
        levels = (source.clamp(0, 1) * 255).round()
        # one histogram for all: image n has the bins from 256 n on
        bins = levels.long() + 256 * torch.arange(len(img), device=img.device)[:, None, None, None]
        distinct = (torch.bincount(bins.flatten(), minlength=256 * len(img)).view(-1, 256) > 0).sum(dim=1)
        photons = 2 ** distinct.to(img).log2().ceil()[:, None, None, None]
        expected = levels / 255
        return torch.poisson(expected * photons, generator) / photons - expected

    return _per_image(scale, img) * _gray_or_colour(of, gray, img)


# ITU-R BT.601 as in MATLAB's rgb2gray, which the published code uses for gray noise
_LUMA = (0.2989, 0.587, 0.114)


def _luma(img: Tensor) -> Tensor:
    """``(N, 3, H, W)`` to ``(N, 1, H, W)``."""
    return (img * img.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def _gray_or_colour(noise: Callable[[int], Tensor], gray: Array, img: Tensor) -> Tensor:
    """``noise`` of one channel for the gray images, of all channels for the others; neither is made for nobody."""
    if gray.all():
        return noise(1)
    coloured = noise(img.shape[1])
    if not gray.any():
        return coloured
    return torch.where(torch.from_numpy(gray).to(img.device)[:, None, None, None], noise(1), coloured)


def _per_image(values: Array, img: Tensor) -> Tensor:
    """``(N,)`` to ``(N, 1, 1, 1)`` beside ``img``."""
    return torch.from_numpy(values).to(img)[:, None, None, None]


# -------------------------------------------------------------------------------------------------------------- JPEG

# ITU-T T.81, tables K.1 and K.2: K.1 is transposed, as in the published code. Images are transposed at random anyway.
_LUMA_TABLE = (
    (16, 12, 14, 14, 18, 24, 49, 72),
    (11, 12, 13, 17, 22, 35, 64, 92),
    (10, 14, 16, 22, 37, 55, 78, 95),
    (16, 19, 24, 29, 56, 64, 87, 98),
    (24, 26, 40, 51, 68, 81, 103, 112),
    (40, 58, 57, 87, 109, 104, 121, 100),
    (51, 60, 69, 80, 103, 113, 120, 103),
    (61, 55, 56, 62, 77, 92, 101, 99),
)
_CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg(img: Tensor, quality: Array) -> Tensor:
    """What JPEG leaves of ``(N, C, H, W)`` in [0, 1] at the qualities (N,), above 0 and below 100.

    The published code's: colours have half the resolution, black fills up to multiples of 16, nothing is rounded after
    decoding.
    """
    height, width = img.shape[-2:]
    factor = _per_image(np.where(quality < 50, 50 / quality, 2 - quality / 50), img)
    planes = 255 * F.pad(img, (0, -width % 16, 0, -height % 16))
    if img.shape[1] == 3:
        # The chroma of the format is shifted by 128, and then all planes by -128, before the transform.
        y, chroma = _mix(planes, _YCBCR).split((1, 2), dim=1)
        chroma = _quantized(F.avg_pool2d(chroma, 2), factor, _CHROMA_TABLE)
        y = _quantized(y - 128, factor, _LUMA_TABLE) + 128
        planes = _mix(torch.cat([y, F.interpolate(chroma, scale_factor=2)], dim=1), _RGB)
    else:
        planes = _quantized(planes - 128, factor, _LUMA_TABLE) + 128
    return planes[..., :height, :width].clamp(0, 255) / 255


def _mix(img: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Multiply the channels of ``(N, 3, H, W)`` by a matrix."""
    return torch.einsum("ij,njhw->nihw", img.new_tensor(matrix), img)


def _quantized(planes: Tensor, factor: Tensor, table: tuple[tuple[int, ...], ...]) -> Tensor:
    """``(N, C, H, W)`` after 8 x 8 blocks were transformed, rounded to multiples of table x factor, and put back."""
    batch, channels, height, width = planes.shape
    dct = torch.from_numpy(_dct_matrix()).to(planes)
    step = planes.new_tensor(table) * factor[..., None, None]  # (N, 1, 1, 1, 8, 8)
    blocks = planes.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    coefficients = dct @ blocks @ dct.T
    blocks = dct.T @ ((coefficients / step).round() * step) @ dct
    return blocks.transpose(3, 4).reshape(planes.shape)


@lru_cache
def _dct_matrix() -> Array:
    """The orthonormal DCT-II of 8 points, rows are frequencies."""
    k = np.arange(8)
    matrix = np.cos((2 * k + 1) * k[:, None] * np.pi / 16) / 2
    matrix[0] /= np.sqrt(2)
    return matrix
