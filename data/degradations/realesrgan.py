"""Real-ESRGAN's degradation: blur, resize, noise and JPEG, all of it twice, drawn from the generator given.

Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data", ICCVW 2021,
https://arxiv.org/abs/2107.10833.

Two things differ from the published code. A whole batch shares its resize factors and kinds of noise there, which a
pool of pairs then mixes; here every sample has draws of its own, and the pool is a choice (select_degradation.py). The
first resize leaves the image up to a pixel of its new size out of place there; here it fills its frame.
"""

from dataclasses import dataclass

import numpy as np

from data.degradations.steps import Blur, Clip, Filter, Jpeg, Noise, Poisson, Resize, Step


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
    second_prob: float = 1.0  # of the second round's blur, resize and noise
    ends_always: bool = True  # the last JPEG and sinc come without the second round too
    rounded: bool = True  # L, to 8 bits


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

STABLE_SR = Strength(
    first=Order(
        kernel_size=(3, 21),
        kernel_prob=_SIX_KERNELS,
        sinc_prob=0.1,
        blur_sigma=(0.2, 1.5),
        betag=(0.5, 2.0),
        betap=(1.0, 1.5),
        blur_prob=1.0,
        resize_prob=(0.2, 0.7, 0.1),
        resize_range=(0.3, 1.5),
        gaussian_prob=0.5,
        gaussian_sigma=(1, 15),
        poisson_scale=(0.05, 2.0),
        gray_prob=0.4,
        jpeg_quality=(60, 95),
    ),
    second=Order(
        kernel_size=(3, 11),
        kernel_prob=_SIX_KERNELS,
        sinc_prob=0.1,
        blur_sigma=(0.2, 1.0),
        betag=(0.5, 2.0),
        betap=(1.0, 1.5),
        blur_prob=0.5,
        resize_prob=(0.3, 0.4, 0.3),
        resize_range=(0.6, 1.2),
        gaussian_prob=0.5,
        gaussian_sigma=(1, 12),
        poisson_scale=(0.05, 1.0),
        gray_prob=0.4,
        jpeg_quality=(60, 100),
    ),
    sinc_prob=0.8,
    sinc_size=(3, 11),
    rounded=False,
)
"""StableSR's (https://arxiv.org/abs/2305.07015), which the SSL paper's code keeps."""

RESSHIFT = Strength(
    first=Order(
        kernel_size=(3, 19),
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
        kernel_size=(3, 13),
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
    sinc_size=(3, 13),
    second_prob=0.5,
)
"""ResShift's (https://arxiv.org/abs/2307.12348)."""

SSL_TEST = Strength(
    first=Order(
        kernel_size=(3, 7),
        kernel_prob=(0.7, 0.3, 0, 0, 0, 0),
        sinc_prob=0.01,
        blur_sigma=(0.1, 0.4),
        betag=(0.1, 0.7),
        betap=(0.1, 0.7),
        blur_prob=1.0,
        resize_prob=(0.1, 0.85, 0.05),
        resize_range=(0.8, 1.1),
        gaussian_prob=0.5,
        gaussian_sigma=(1, 8),
        poisson_scale=(0.05, 0.5),
        gray_prob=0.2,
        jpeg_quality=(87, 95),
    ),
    second=Order(
        kernel_size=(3, 5),
        kernel_prob=(0.7, 0.3, 0, 0, 0, 0),
        sinc_prob=0.01,
        blur_sigma=(0.1, 0.3),
        betag=(0.1, 0.5),
        betap=(0.1, 0.5),
        blur_prob=0.8,
        resize_prob=(0.1, 0.85, 0.05),
        resize_range=(0.8, 1.1),
        gaussian_prob=0.5,
        gaussian_sigma=(0, 5),
        poisson_scale=(0, 0.4),
        gray_prob=0.2,
        jpeg_quality=(90, 95),
    ),
    sinc_prob=0.1,
    sinc_size=(3, 5),
    second_prob=0.2,
    ends_always=False,
)
"""The still milder ones of the SSL paper's blind test images."""


def draw_realesrgan(shape: tuple[int, int, int], sf: int, rng: np.random.Generator, strength: Strength) -> list[Step]:
    """Steps from H of ``shape`` (height, width, channels) to L, smaller by ``sf``: ``H // sf``, ``W // sf``."""
    height, width = shape[:2]
    first, second = strength.first, strength.second
    end = Clip(strength.rounded)

    steps: list[Step] = [draw_kernel(rng, first)] if rng.random() < first.blur_prob else []
    factor, filter_ = draw_factor(rng, first), _draw_filter(rng)
    steps.append(_resize(height * factor, width * factor, filter_))
    steps += [draw_noise(rng, first), draw_jpeg(rng, first)]

    with_second = rng.random() < strength.second_prob
    if with_second:
        steps += [draw_kernel(rng, second)] if rng.random() < second.blur_prob else []
        factor, filter_ = draw_factor(rng, second), _draw_filter(rng)
        steps += [_resize(height / sf * factor, width / sf * factor, filter_), draw_noise(rng, second)]
    elif not strength.ends_always:
        return [*steps, _resize(height // sf, width // sf, filter_), end]

    jpeg, sinc_last = draw_jpeg(rng, second), rng.random() < 0.5
    resize = _resize(height // sf, width // sf, _draw_filter(rng))
    sinc = [draw_final_sinc(rng, strength)] if rng.random() < strength.sinc_prob else []
    return [*steps, *([jpeg, resize, *sinc] if sinc_last else [resize, *sinc, jpeg]), end]


def draw_kernel(rng: np.random.Generator, order: Order) -> Blur:
    """A sinc with ``sinc_prob``, else one of the six kinds."""
    size = _odd_size(rng, order.kernel_size)
    if rng.random() < order.sinc_prob:
        return Blur("sinc", size, cutoff=rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi))
    kind = int(rng.choice(6, p=order.kernel_prob))
    sigma_x = sigma_y = rng.uniform(*order.blur_sigma)
    theta = 0.0
    if kind % 2:  # anisotropic
        sigma_y, theta = rng.uniform(*order.blur_sigma), rng.uniform(-np.pi, np.pi)
    if kind < 2:
        return Blur("gaussian", size, (sigma_x, sigma_y), theta)
    if kind < 4:
        return Blur("generalized", size, (sigma_x, sigma_y), theta, _draw_beta(rng, order.betag))
    return Blur("plateau", size, (sigma_x, sigma_y), theta, _draw_beta(rng, order.betap))


def draw_final_sinc(rng: np.random.Generator, strength: Strength) -> Blur:
    """The last kernel."""
    return Blur("sinc", _odd_size(rng, strength.sinc_size), cutoff=rng.uniform(np.pi / 3, np.pi))


def draw_factor(rng: np.random.Generator, order: Order) -> float:
    """A resize factor: above 1, below 1 or 1."""
    smallest, largest = order.resize_range
    way = rng.choice(3, p=order.resize_prob)
    return (rng.uniform(1, largest), rng.uniform(smallest, 1), 1.0)[way]


def draw_noise(rng: np.random.Generator, order: Order) -> Step:
    """Gaussian or Poisson noise, gray or coloured."""
    is_gaussian, gray = rng.random() < order.gaussian_prob, rng.random() < order.gray_prob
    if is_gaussian:
        return Noise(rng.uniform(*order.gaussian_sigma), "gray" if gray else "colour")
    return Poisson(rng.uniform(*order.poisson_scale), gray)


def draw_jpeg(rng: np.random.Generator, order: Order) -> Jpeg:
    """Any quality in the range."""
    return Jpeg(rng.uniform(*order.jpeg_quality), "diffjpeg")


def _draw_beta(rng: np.random.Generator, beta: tuple[float, float]) -> float:
    """Half of the shapes are below 1, half above."""
    return rng.uniform(beta[0], 1) if rng.random() < 0.5 else rng.uniform(1, beta[1])


def _odd_size(rng: np.random.Generator, size: tuple[int, int]) -> int:
    return int(rng.choice(np.arange(size[0], size[1] + 1, 2)))


def _draw_filter(rng: np.random.Generator) -> Filter:
    return ("window", "linear", "cubic")[rng.integers(3)]


def _resize(height: float, width: float, filter_: Filter) -> Resize:
    return Resize(max(int(height), 1), max(int(width), 1), filter_, clip=False)
