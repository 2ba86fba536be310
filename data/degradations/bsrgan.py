"""BSRGAN's degradation as KAIR has it: blur, shrink, noise and JPEG in random order, drawn from the generator given.

Zhang et al., "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", ICCV 2021,
https://arxiv.org/abs/2103.14006; KAIR's ``utils_blindsr.degradation_bsrgan`` and ``degradation_bsrgan_plus``. KAIR has
a place for a camera pipeline and brings none; ours (on_batch.py) is off unless ``camera_prob`` is set.
"""

from dataclasses import dataclass

import numpy as np

from data.degradations.steps import Blur, Camera, Filter, Jpeg, Noise, Poisson, Resize, Step, Thin
from utils.utils_image import Array

_FILTERS: tuple[Filter, ...] = ("linear", "cubic", "area")


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
    shrink_multiplies: bool = False  # "downsample 2" multiplies the size by uniform [base + slope * sf, 1] instead
    camera_prob: float = 0.0  # KAIR asks for 0.25, of nothing
    shuffle_prob: float = 0.1  # plus: how often all steps are shuffled, not only the noises among themselves


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

SSL_TEST = Strength(
    anisotropic_prob=0.3,
    anisotropic_variance=(1.0, 0.0),
    isotropic_std=(1.0, 0.0),
    blur_size=(0, 4),
    shrink_factor=(0.75, 0.0),
    shrink_multiplies=True,
    shrink_blur_std=0.25,
    shrink_blur_size=(0, 4),
    noise_level=(1, 10),
    jpeg_quality=(85, 95),
)
"""The still milder ones of its blind test images."""


def draw_bsrgan(shape: tuple[int, int, int], sf: int, rng: np.random.Generator, strength: Strength) -> list[Step]:
    """Steps from H of ``shape`` (height, width, channels), multiples of ``sf``, to L, smaller by ``sf``."""
    height, width, channels = shape
    steps: list[Step] = []
    if sf == 4 and rng.random() < 0.25:
        height, width, sf = height // 2, width // 2, 2
        steps.append(Resize(height, width, _draw_filter(rng) if rng.random() < 0.5 else "matlab", clip=True))
    for step in _shuffled_steps(rng):
        if step == "blur":
            steps.append(draw_blur(rng, sf, strength))
        elif step == "shrink":
            steps.append(_draw_shrink(height, width, sf, rng, strength))
        elif step == "resize":  # to the final size, whatever the step before has made of it
            steps.append(Resize(height // sf, width // sf, _draw_filter(rng), clip=True))
        elif step == "noise":
            steps.append(draw_noise(rng, channels, strength.noise_level))
        elif step == "jpeg":
            steps += [draw_jpeg(rng, strength.jpeg_quality)] if rng.random() < 0.9 else []
        elif channels == 3 and rng.random() < strength.camera_prob:
            steps.append(draw_camera(rng))
    return [*steps, draw_jpeg(rng, strength.jpeg_quality)]


def _shuffled_steps(rng: np.random.Generator) -> list[str]:
    """The steps in random order, "resize" and "shrink" exchanged where needed: "resize" comes later."""
    steps = ["blur", "blur", "shrink", "resize", "noise", "jpeg", "camera"]
    order = [steps[i] for i in rng.permutation(len(steps))]
    shrink, resize = order.index("shrink"), order.index("resize")
    if shrink > resize:
        order[shrink], order[resize] = "resize", "shrink"
    return order


def draw_bsrgan_plus(shape: tuple[int, int, int], sf: int, rng: np.random.Generator, strength: Strength) -> list[Step]:
    """As :func:`draw_bsrgan`, KAIR's "plus": two rounds of blur, resize and noises, with JPEG between them and last."""
    height, width, channels = shape
    goal = height // sf, width // sf
    steps: list[Step] = []
    for step in _plus_steps(rng, strength.shuffle_prob):
        if step == "blur":
            steps.append(draw_blur(rng, sf, strength))
        elif step == "resize":
            factor = _draw_plus_factor(rng, sf)
            height, width = max(int(factor * height), 1), max(int(factor * width), 1)
            steps.append(Resize(height, width, _draw_filter(rng), clip=True))
        elif step == "noise":
            steps.append(draw_noise(rng, channels, strength.noise_level))
        elif step == "poisson" and rng.random() < 0.1:
            steps.append(Poisson(1.0, gray=rng.random() < 0.5, photons=10 ** rng.uniform(2, 4)))
        elif step == "speckle" and rng.random() < 0.1:
            steps.append(draw_noise(rng, channels, strength.noise_level, speckle=True))
        elif step == "camera" and channels == 3 and rng.random() < strength.camera_prob:
            steps.append(draw_camera(rng))
        elif step == "jpeg":
            steps.append(draw_jpeg(rng, strength.jpeg_quality))
    return [*steps, Resize(*goal, _draw_filter(rng), clip=True), draw_jpeg(rng, strength.jpeg_quality)]


def _plus_steps(rng: np.random.Generator, shuffle_prob: float) -> list[str]:
    noises = ["noise", "poisson", "speckle", "camera"]
    order = ["blur", "resize", *rng.permutation(noises), "jpeg", "blur", "resize", *rng.permutation(noises)]
    return [str(step) for step in (rng.permutation(order) if rng.random() < shuffle_prob else order)]


def _draw_plus_factor(rng: np.random.Generator, sf: int) -> float:
    """Larger (20 %), smaller (70 %) or as it is."""
    way = rng.random()
    return rng.uniform(1, 2) if way < 0.2 else rng.uniform(0.5 / sf, 1) if way < 0.9 else 1.0


# ------------------------------------------------------------------------------------------------------------- steps


def draw_blur(rng: np.random.Generator, sf: int, strength: Strength) -> Blur:
    """A Gaussian, isotropic or not."""
    size = _odd_size(rng, strength.blur_size)
    if rng.random() < strength.anisotropic_prob:
        base, slope = strength.anisotropic_variance
        l1, l2 = np.sqrt(rng.uniform(0, base + slope * sf, 2))
        return Blur("gaussian", size, (float(l1), float(l2)), rng.uniform(0, np.pi))
    base, slope = strength.isotropic_std
    std = rng.uniform(0, base + slope * sf)
    return Blur("gaussian", size, (std, std))


def _draw_shrink(height: int, width: int, sf: int, rng: np.random.Generator, strength: Strength) -> Step:
    """KAIR's "downsample 2": a plain resize by a random factor, or a shifted Gaussian and every sf-th pixel."""
    if rng.random() < 0.75:
        base, slope = strength.shrink_factor
        factor = 1 + (base + slope * sf - 1) * rng.random()
        height, width = (int(n * factor if strength.shrink_multiplies else n / factor) for n in (height, width))
        return Resize(max(height, 1), max(width, 1), _draw_filter(rng), clip=True)
    return Thin(_odd_size(rng, strength.shrink_blur_size), rng.uniform(0.1, strength.shrink_blur_std * sf), sf)


def draw_noise(rng: np.random.Generator, channels: int, level: tuple[int, int], speckle: bool = False) -> Noise:
    """Gaussian noise: gray (40 %), independent in the channels (40 %) or correlated (20 %)."""
    std, kind = float(rng.integers(*level, endpoint=True)), rng.random()
    if kind < 0.8:
        return Noise(std, "gray" if kind < 0.4 else "colour", speckle=speckle)
    mix = _noise_correlation(channels, level[1] / 255, rng)  # of the largest level, as published
    return Noise(float(level[1]), "mixed", tuple(map(tuple, mix.tolist())), speckle)


def _noise_correlation(channels: int, std: float, rng: np.random.Generator) -> Array:
    """A matrix that turns white noise into noise of the covariance ``|std^2 U^T D U|`` with U and D at random."""
    basis = np.linalg.svd(rng.random((channels, channels)))[0]
    covariance = np.abs(std**2 * basis.T @ np.diag(rng.random(channels)) @ basis)
    # The absolute values can make it indefinite; numpy's sampler, which KAIR calls, then takes |eigenvalues| too.
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return np.sqrt(np.abs(eigenvalues))[:, None] * eigenvectors.T


def draw_jpeg(rng: np.random.Generator, quality: tuple[int, int]) -> Jpeg:
    """A whole quality, both ends included."""
    return Jpeg(int(rng.integers(*quality, endpoint=True)), "libjpeg")


def draw_camera(rng: np.random.Generator) -> Camera:
    """Gains and exposure as in the paper's section on noise, sensor noise as in Brooks et al., CVPR 2019."""
    log_shot = rng.uniform(np.log(1e-4), np.log(0.012))
    weights = rng.random(4)
    return Camera(
        shot=float(np.exp(log_shot)),
        read=float(np.exp(2.18 * log_shot + 1.20 + 0.26 * rng.standard_normal())),
        red_gain=rng.uniform(1.2, 2.4),
        blue_gain=rng.uniform(1.2, 2.4),
        exposure=2 ** rng.uniform(-0.1, 0.3),
        cameras=tuple((weights / weights.sum()).tolist()),
    )


def _draw_filter(rng: np.random.Generator) -> Filter:
    return _FILTERS[rng.integers(len(_FILTERS))]


def _odd_size(rng: np.random.Generator, k: tuple[int, int]) -> int:
    return 2 * int(rng.integers(*k, endpoint=True)) + 3
