"""BSRGAN's degradation on the CPU: blur, shrink, noise and JPEG in random order, every draw from the generator given.

Zhang et al., "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", ICCV 2021,
https://arxiv.org/abs/2103.14006, as KAIR's ``utils_blindsr.degradation_bsrgan`` has it, without the camera pipeline:
KAIR never switches it on. Images are float32 ``(H, W, C)`` in [0, 1]; Gaussian kernels are float64 and sum to 1.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.utils_image import Array, imresize_np, modcrop, single2uint, uint2single

Image = NDArray[np.float32]

_INTERPOLATIONS = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)


@dataclass(frozen=True)
class Strength:
    """How strong the degradation is. A pair ``(base, slope)`` means ``base + slope * sf`` at the scale factor sf."""

    anisotropic_prob: float  # the blur is anisotropic with this probability, else isotropic
    anisotropic_variance: tuple[float, float]  # both variances are uniform in [0, base + slope * sf], pixels squared
    isotropic_std: tuple[float, float]  # uniform in [0, base + slope * sf], pixels
    blur_size: tuple[int, int]  # odd kernel sides 2 k + 3, k uniform between these two, both included
    shrink_factor: tuple[float, float]  # "downsample 2" divides the size by uniform [1, base + slope * sf]
    shrink_blur_std: float  # or blurs with a std uniform in [0.1, this * sf] and takes every sf-th pixel
    shrink_blur_size: tuple[int, int]  # k of that blur's side 2 k + 3
    noise_level: tuple[int, int]  # Gaussian noise, of 255, both included
    jpeg_quality: tuple[int, int]  # both included


KAIR = Strength(
    anisotropic_prob=0.5,
    anisotropic_variance=(4.0, 1.0),
    isotropic_std=(2.0, 0.2),
    blur_size=(2, 11),
    shrink_factor=(0.0, 2.0),
    shrink_blur_std=0.6,
    shrink_blur_size=(11, 11),
    noise_level=(2, 25),
    jpeg_quality=(30, 95),
)
"""The figures of KAIR and BSRGAN."""

SSL_FORK = Strength(
    anisotropic_prob=0.3,
    anisotropic_variance=(0.2, 0.2),
    isotropic_std=(0.2, 0.2),
    blur_size=(0, 3),
    shrink_factor=(1 / 0.85, 0.0),
    shrink_blur_std=0.25,
    shrink_blur_size=(0, 3),
    noise_level=(1, 12),
    jpeg_quality=(75, 95),
)
"""The milder figures with which the models of the SSL paper (https://arxiv.org/abs/2408.05713) were trained."""


def degrade_bsrgan(img: Image, sf: int, rng: np.random.Generator, strength: Strength) -> tuple[Image, Image]:
    """Degrade ``(H, W, C)`` in [0, 1]: returns L, smaller by ``sf``, and H, ``img`` cut to a multiple of sf."""
    H = modcrop(img, sf)
    L = H
    if sf == 4 and rng.random() < 0.25:
        L, sf = _halve(L, rng), 2
    height, width = L.shape[:2]
    for step in _shuffled_steps(rng):
        if step == "blur":
            L = add_blur(L, sf, rng, strength)
        elif step == "shrink":
            height, width = L.shape[:2]
            L = _shrink(L, sf, rng, strength)
        elif step == "resize":  # to the final size, whatever the step before has made of it
            L = _resize(L, height // sf, width // sf, rng)
        elif step == "noise":
            L = add_gaussian_noise(L, rng, strength.noise_level)
        elif rng.random() < 0.9:
            L = add_jpeg(L, rng, strength.jpeg_quality)
    return add_jpeg(L, rng, strength.jpeg_quality), H


def _shuffled_steps(rng: np.random.Generator) -> list[str]:
    """The steps in random order, "resize" and "shrink" exchanged where needed: "resize" comes later."""
    steps = ["blur", "blur", "shrink", "resize", "noise", "jpeg"]
    order = [steps[i] for i in rng.permutation(len(steps))]
    shrink, resize = order.index("shrink"), order.index("resize")
    if shrink > resize:
        order[shrink], order[resize] = "resize", "shrink"
    return order


# ------------------------------------------------------------------------------------------------------------- steps


def add_blur(img: Image, sf: int, rng: np.random.Generator, strength: Strength) -> Image:
    """Blur ``(H, W, C)`` with a random Gaussian, isotropic or not."""
    if rng.random() < strength.anisotropic_prob:
        base, slope = strength.anisotropic_variance
        l1, l2 = rng.uniform(0, base + slope * sf, 2)
        kernel = anisotropic_gaussian(_odd_size(rng, strength.blur_size), rng.uniform(0, np.pi), l1, l2)
        return convolve(img, kernel)
    base, slope = strength.isotropic_std
    profile = gaussian_profile(_odd_size(rng, strength.blur_size), rng.uniform(0, base + slope * sf))
    return _convolve_separable(img, profile)


def _halve(img: Image, rng: np.random.Generator) -> Image:
    height, width = img.shape[:2]
    if rng.random() < 0.5:
        return _resize(img, height // 2, width // 2, rng)
    return imresize_np(img, 1 / 2).clip(0, 1)


def _shrink(img: Image, sf: int, rng: np.random.Generator, strength: Strength) -> Image:
    """KAIR's "downsample 2": a plain resize by a random factor, or a shifted Gaussian and every sf-th pixel."""
    if rng.random() < 0.75:
        base, slope = strength.shrink_factor
        factor = rng.uniform(1, base + slope * sf)
        height, width = img.shape[:2]
        return _resize(img, int(height / factor), int(width / factor), rng)
    profile = gaussian_profile(
        _odd_size(rng, strength.shrink_blur_size), rng.uniform(0.1, strength.shrink_blur_std * sf)
    )
    profile = shift_pixel(profile[:, None], sf)[:, 0]  # so that the pixels kept are centred on those they stand for
    return _convolve_separable(img, profile / profile.sum())[::sf, ::sf].clip(0, 1)


def _resize(img: Image, height: int, width: int, rng: np.random.Generator) -> Image:
    interpolation = _INTERPOLATIONS[rng.integers(len(_INTERPOLATIONS))]
    resized = cv2.resize(img, (max(width, 1), max(height, 1)), interpolation=interpolation)
    return _with_channels(resized, img).clip(0, 1)


def add_gaussian_noise(img: Image, rng: np.random.Generator, level: tuple[int, int]) -> Image:
    """Add Gaussian noise to ``(H, W, C)``: independent per channel (40 %), gray (40 %) or correlated (20 %)."""
    std = rng.integers(*level, endpoint=True) / 255
    kind = rng.random()
    height, width, channels = img.shape
    if kind < 0.4:
        noise = rng.standard_normal((height, width, 1), np.float32) * np.float32(std)
    elif kind < 0.8:
        noise = rng.standard_normal(img.shape, np.float32) * np.float32(std)
    else:
        noise = rng.standard_normal(img.shape, np.float32) @ _noise_correlation(channels, level[1] / 255, rng)
    return (img + noise).clip(0, 1)


def _noise_correlation(channels: int, std: float, rng: np.random.Generator) -> Image:
    """A matrix that turns white noise into noise of the covariance ``|std^2 U^T D U|`` with U and D at random."""
    basis = np.linalg.svd(rng.random((channels, channels)))[0]
    covariance = np.abs(std**2 * basis.T @ np.diag(rng.random(channels)) @ basis)
    # The absolute values can make it indefinite; numpy's sampler, which KAIR calls, then takes |eigenvalues| too.
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return (np.sqrt(np.abs(eigenvalues))[:, None] * eigenvectors.T).astype(np.float32)


def add_jpeg(img: Image, rng: np.random.Generator, quality: tuple[int, int]) -> Image:
    """Compress ``(H, W, C)`` as JPEG with an integer quality uniform in ``quality``, both ends included."""
    uint = single2uint(img)
    is_rgb = img.shape[2] == 3
    if is_rgb:
        uint = cv2.cvtColor(uint, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", uint, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(*quality, endpoint=True))])[1]
    decoded: Array = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR if is_rgb else cv2.IMREAD_GRAYSCALE))
    return uint2single(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB) if is_rgb else decoded[..., None])


def add_sharpening(img: Image, weight: float = 0.5, radius: int = 50, threshold: float = 10) -> Image:
    """Unsharp masking of ``(H, W, C)`` where an image differs from its blur by more than ``threshold`` of 255."""
    side = radius + 1 - radius % 2

    def blur(x: Array) -> Image:
        return _with_channels(cv2.GaussianBlur(x, (side, side), 0), img)

    residual = img - blur(img)
    soft_mask = blur((np.abs(residual) * 255 > threshold).astype(np.float32))
    return soft_mask * (img + weight * residual).clip(0, 1) + (1 - soft_mask) * img


# ----------------------------------------------------------------------------------------------------------- kernels


def _odd_size(rng: np.random.Generator, k: tuple[int, int]) -> int:
    return 2 * int(rng.integers(*k, endpoint=True)) + 3


def gaussian_profile(size: int, std: float) -> Array:
    """The ``(size,)`` Gaussian whose outer product with itself is MATLAB's ``fspecial('gaussian', size, std)``."""
    x = np.arange(size) - (size - 1) / 2
    profile = np.exp(-(x**2) / (2 * std**2))
    return profile / profile.sum()


def anisotropic_gaussian(size: int, theta: float, l1: float, l2: float) -> Array:
    """A ``(size, size)`` Gaussian of variance ``l1`` along the angle ``theta`` (radians, x to y), ``l2`` across."""
    kernel = np.exp(-0.5 * elliptic_distance(size, theta, l1, l2))
    return kernel / kernel.sum()


def elliptic_distance(size: int, theta: float, l1: float, l2: float) -> Array:
    """``(size, size)``: ``x^T S^-1 x`` from the centre, S the covariance of :func:`anisotropic_gaussian`."""
    x = np.arange(size) - (size - 1) / 2
    along = np.cos(theta) * x + np.sin(theta) * x[:, None]
    across = np.cos(theta) * x[:, None] - np.sin(theta) * x
    return along**2 / l1 + across**2 / l2


def shift_pixel(x: Array, sf: int, upper_left: bool = True) -> Array:
    """Shift ``(H, W[, C])`` by ``(sf - 1) / 2`` pixels, linearly interpolated, the border repeated.

    An image that is thinned to every sf-th pixel keeps its place when its blur kernel is shifted to the upper left.
    """
    shift = (sf - 1) / 2 if upper_left else -(sf - 1) / 2
    for axis in (0, 1):
        last = x.shape[axis] - 1
        position = (np.arange(last + 1) + shift).clip(0, last)
        before = position.astype(np.int64)
        share = (position - before).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        x = x.take(before, axis) * (1 - share) + x.take((before + 1).clip(max=last), axis) * share
    return x


def convolve(img: Image, kernel: Array) -> Image:
    """Convolve ``(H, W, C)`` with ``(k, k)``, k odd; the border is mirrored, the edge pixel not repeated."""
    # OpenCV correlates: the kernel is turned round. BORDER_REFLECT_101 is what SciPy calls "mirror".
    blurred = cv2.filter2D(img, -1, kernel[::-1, ::-1], borderType=cv2.BORDER_REFLECT_101)
    return _with_channels(blurred, img)


def _convolve_separable(img: Image, profile: Array) -> Image:
    """:func:`convolve` with the outer product of ``profile`` with itself."""
    blurred = cv2.sepFilter2D(img, -1, profile[::-1], profile[::-1], borderType=cv2.BORDER_REFLECT_101)
    return _with_channels(blurred, img)


def _with_channels(img: Array, like: Image) -> Image:
    """OpenCV drops the channel axis of ``(H, W, 1)``: put it back."""
    return img.reshape(*img.shape[:2], like.shape[2])
