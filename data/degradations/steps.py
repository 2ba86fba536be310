"""The steps that random degradations are made of, with all their figures; their kernels.

A degradation is drawn first and applied then. What is drawn (bsrgan.py, realesrgan.py) is a list of these steps,
made without looking at an image. It can be applied to one image on the CPU (on_image.py) or to a batch on a GPU
(on_batch.py), and it is the record of what was done. Kernels are float64 and sum to 1.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import j1

from utils.utils_image import Array

Filter = Literal["linear", "cubic", "area", "window", "matlab"]
Codec = Literal["libjpeg", "diffjpeg"]


@dataclass(frozen=True)
class Step:
    """One step. Angles are in radians, lengths in pixels, noise levels of 255."""

    def record(self) -> dict[str, Any]:
        """The name of the step and its figures, for JSON."""
        return {"step": type(self).__name__.lower(), **{k: v for k, v in asdict(self).items() if v is not None}}


@dataclass(frozen=True)
class Blur(Step):
    """Convolution with a kernel of one of four shapes; the border is mirrored, the edge pixel not repeated."""

    shape: Literal["gaussian", "generalized", "plateau", "sinc"]
    size: int  # odd
    sigma: tuple[float, float] | None = None  # along theta and across; not of the sinc
    theta: float = 0.0
    beta: float | None = None  # of the generalized Gaussian and the plateau
    cutoff: float | None = None  # of the sinc, in (0, pi]

    @property
    def is_separable(self) -> bool:
        """Whether the kernel is the outer product of :meth:`profile` with itself."""
        return self.shape == "gaussian" and self.sigma is not None and self.sigma[0] == self.sigma[1]

    def profile(self) -> Array:
        """``(size,)`` of a separable kernel."""
        assert self.sigma is not None
        return gaussian_profile(self.size, self.sigma[0])

    def kernel(self) -> Array:
        """``(size, size)``."""
        if self.shape == "sinc":
            assert self.cutoff is not None
            return low_pass_kernel(self.size, self.cutoff)
        assert self.sigma is not None
        shape = plateau if self.shape == "plateau" else generalized_gaussian
        return shape(self.size, *self.sigma, self.theta, 1.0 if self.beta is None else self.beta)


@dataclass(frozen=True)
class Thin(Step):
    """Gaussian blur, then every ``every``-th pixel; the kernel is shifted so that the image keeps its place."""

    size: int  # odd
    sigma: float
    every: int

    def profile(self) -> Array:
        """``(size,)``: the kernel is its outer product with itself."""
        profile = shift_pixel(gaussian_profile(self.size, self.sigma)[:, None], self.every)[:, 0]
        return profile / profile.sum()


@dataclass(frozen=True)
class Resize(Step):
    """Resize to ``height`` x ``width``.

    linear, cubic: two and four pixels, cubic with a = -3/4, no antialiasing; OpenCV and PyTorch agree.
    area: OpenCV's means over the area of the new pixel, where it is larger. window: PyTorch's, over whole pixels.
    matlab: ``imresize``, bicubic and antialiased.
    """

    height: int
    width: int
    filter: Filter
    clip: bool  # to [0, 1] afterwards


@dataclass(frozen=True)
class Noise(Step):
    """Gaussian noise, the same in all channels (gray), independent, or mixed from independent ones by ``mix``."""

    level: float  # standard deviation; of mixed noise it is in ``mix``
    kind: Literal["gray", "colour", "mixed"]
    mix: tuple[tuple[float, ...], ...] | None = None  # (channels, channels): noise = white noise @ mix
    speckle: bool = False  # multiplied by the image

    def matrix(self, channels: int) -> Array:
        """``(channels, channels)``: noise = white noise @ matrix."""
        if self.mix is not None:
            return np.array(self.mix)
        if self.kind == "colour":
            return np.eye(channels) * self.level / 255
        matrix = np.zeros((channels, channels))
        matrix[0] = self.level / 255
        return matrix


@dataclass(frozen=True)
class Poisson(Step):
    """Shot noise times ``scale``; white stands for ``photons``, None: as many as make the image's gray levels."""

    scale: float
    gray: bool  # the noise of the luma, the same in all channels
    photons: float | None = None


@dataclass(frozen=True)
class Jpeg(Step):
    """JPEG, colours at half the resolution.

    libjpeg: the codec that everybody's files come from. diffjpeg: Real-ESRGAN's, with fractions of a quality, black
    beyond the image's edge, blocks of colour and nothing rounded after decoding.
    """

    quality: float
    codec: Codec


@dataclass(frozen=True)
class Camera(Step):
    """The image as a camera would have taken it: back to its sensor's mosaic, sensor noise, and developed again."""

    shot: float  # variance of the noise at the white level of the sensor, for a mean of 1
    read: float  # variance of the noise in the dark
    red_gain: float  # white balance
    blue_gain: float
    exposure: float  # factor of the development
    cameras: tuple[float, ...]  # weights of the colour matrices of on_batch.XYZ_TO_CAMERA


@dataclass(frozen=True)
class Clip(Step):
    """Values below 0 and above 1 are cut off, and the others rounded to 8 bits if asked to."""

    rounded: bool


# ----------------------------------------------------------------------------------------------------------- kernels


def gaussian_profile(size: int, std: float) -> Array:
    """The ``(size,)`` Gaussian whose outer product with itself is MATLAB's ``fspecial('gaussian', size, std)``."""
    x = np.arange(size) - (size - 1) / 2
    profile = np.exp(-(x**2) / (2 * std**2))
    return profile / profile.sum()


def anisotropic_gaussian(size: int, theta: float, l1: float, l2: float) -> Array:
    """A ``(size, size)`` Gaussian of variance ``l1`` along the angle ``theta`` (x to y), ``l2`` across."""
    kernel = np.exp(-0.5 * elliptic_distance(size, theta, l1, l2))
    return kernel / kernel.sum()


def generalized_gaussian(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Array:
    """``exp(-q^beta / 2)``, q the squared distance in units of sigma, ``(size, size)``; a Gaussian for ``beta`` 1.

    ``theta`` turns x to y. Section 3.1 of the Real-ESRGAN paper.
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
