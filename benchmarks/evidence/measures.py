"""What the experiment measures beyond main_test.py: artifacts against the PSNR model, differences with their intervals,
curves compared at equal PSNR."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Numbers = NDArray[np.float64]

DRAWS = 4000  # of the bootstrap
FEWEST = 10  # images, for a verdict: a 95 % interval of five was seen to hold the truth in 82 to 87 %
PRICE = 0.25  # dB, what SSL may cost where its weight is chosen
WINDOW = 7  # px, the side of the box that an error is averaged over
# Squared levels of 255. Noise of 10 levels on top of the PSNR model's picture raises the local error by 100: on a flat
# area it is plainly seen, while most of the fine texture of a GAN stays below. 5 and 20 levels are reported too.
THRESHOLDS = {"artifacts": 100.0, "artifacts_25": 25.0, "artifacts_400": 400.0}
BLOCK, LATTICE = 64, 3.0  # px, side of what a lattice is looked for in; times the energy beside it


def local_error(E: Picture, H: Picture, border: int = 4) -> Numbers:
    """``e(x)``: the mean of ``(E - H)^2`` over RGB and the WINDOW x WINDOW pixels around x.

    Args:
        E, H: (height, width, 3), uint8.
        border: pixels left out at each side, as main_test.py does.

    Returns:
        (height - 2 border - 6, width - 2 border - 6), squared levels: the windows that lie inside the border.
    """
    inside = slice(border, -border or None)
    squared = ((E.astype(np.float64) - H) ** 2)[inside, inside].mean(2)
    half = WINDOW // 2
    return cv2.blur(squared, (WINDOW, WINDOW))[half:-half, half:-half]


def artifact_shares(E: Picture, psnr: Picture, H: Picture, border: int = 4) -> dict[str, float]:
    """The share of pixels, in per cent, where ``e_E(x) > e_psnr(x) + threshold``, for each of THRESHOLDS."""
    grown = local_error(E, H, border) - local_error(psnr, H, border)
    return {name: 100 * float((grown > threshold).mean()) for name, threshold in THRESHOLDS.items()}


def lattice_share(E: Picture, period: int = 4, border: int = 4) -> float:
    """The share of blocks, in per cent, that a lattice of ``period`` pixels shows in; NaN where none fits.

    Of BLOCK x BLOCK pixels of luma under Hann's window: along the rows or the columns the frequency 1 / period has more
    than LATTICE times the mean energy of its neighbours (3 and 4 steps of the spectrum away, at both sides), and an
    amplitude of a level of 255 or more. A network that enlarges by ``period`` makes it where its steps between the
    pixels of L are unequal.

    Args:
        E: (height, width, 3), uint8.
        border: pixels left out at each side.
    """
    luma = cv2.cvtColor(E, cv2.COLOR_RGB2GRAY).astype(np.float64)[border : -border or None, border : -border or None]
    rows, columns = (side // BLOCK for side in luma.shape)
    if not rows * columns:
        return float("nan")
    inside = luma[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    blocks = inside.swapaxes(1, 2).reshape(-1, BLOCK, BLOCK)
    window = np.outer(np.hanning(BLOCK), np.hanning(BLOCK))
    spectrum = np.abs(np.fft.fft2((blocks - blocks.mean((1, 2), keepdims=True)) * window)) ** 2
    at, found = BLOCK // period, np.zeros(len(blocks), bool)
    for energy in (spectrum, spectrum.swapaxes(1, 2)):
        along = energy[:, :, [-1, 0, 1]].mean(2)  # of frequencies that hardly change across
        beside = along[:, [at - 4, at - 3, at + 3, at + 4]].mean(1)
        found |= (along[:, at] > LATTICE * beside) & (np.sqrt(energy[:, at, 0]) >= window.sum() / 2)
    return 100 * float(found.mean())


class Difference(NamedTuple):
    """What SSL added to a metric, over images and seeds."""

    mean: float
    low: float  # the 95 % interval
    high: float
    seeds: list[float]  # the mean difference of each seed
    improved: float  # share of images that are better, their mean over seeds taken, in per cent
    best: int  # the image that gains most, its mean over seeds taken
    worst: int  # that loses most

    def verdict(self, higher_better: bool) -> str:
        """``better`` or ``worse`` where the interval excludes 0, else ``undecided``."""
        if self.low <= 0 <= self.high:
            return "undecided"
        return "better" if (self.mean > 0) == higher_better else "worse"


def difference(without: Numbers, with_ssl: Numbers, higher_better: bool, draws: int = DRAWS) -> Difference:
    """The paired bootstrap: seeds and images are drawn again, each with replacement, all pairs of both kept together.

    Of a drawn image all seeds are taken, of a drawn seed all images: pairs that share either are not counted as if they
    were independent. S seeds drawn from themselves show (S - 1) / S of the variance between seeds, two thirds with
    three, so the interval is too narrow where seeds matter more than images do. Of made-up experiments with three
    seeds and 60 images it held the truth in 96 % where seeds do not matter, in 80 % where they matter most. So it is
    with few images: of five drawn from themselves four fifths of the variance are left.

    Args:
        without, with_ssl: (seeds, images), the metric of the two runs of each seed; NaN where an image has no value.

    Raises:
        ValueError: the shapes differ, or nothing is left to compare.
    """
    if without.shape != with_ssl.shape or without.ndim != 2:
        raise ValueError(f"pairs of (seeds, images) are compared, not {without.shape} and {with_ssl.shape}")
    change = with_ssl - without
    measured = np.isfinite(change).all(0)
    if not measured.any():
        raise ValueError("no image has a value for all seeds")
    change, places = change[:, measured], np.flatnonzero(measured)
    n_seeds, n_images = change.shape
    rng = np.random.default_rng(0)
    seeds, images = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in (n_seeds, n_images))  # shares drawn
    means = np.einsum("ds,si,di->d", seeds, change, images, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    gain = change.mean(0) if higher_better else -change.mean(0)
    return Difference(
        float(change.mean()),
        float(low),
        float(high),
        change.mean(1).tolist(),
        100 * float((gain > 0).mean()),
        int(places[gain.argmax()]),
        int(places[gain.argmin()]),
    )


class AtEqualPSNR(NamedTuple):
    """Two curves where both have values."""

    low: float  # dB, the common range
    high: float
    without: float  # the metric's mean over that range
    with_ssl: float


def at_equal_psnr(
    without: Sequence[tuple[float, float]], with_ssl: Sequence[tuple[float, float]]
) -> AtEqualPSNR | None:
    """Compare two curves of (PSNR, metric): each interpolated linearly, averaged over the PSNR that both reach.

    Points of one curve are joined in the order of their PSNR, not of the steps. None where the ranges have nothing in
    common.
    """
    curves = [np.array(sorted(curve)) for curve in (without, with_ssl)]
    low, high = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    if not low < high:
        return None
    grid = np.linspace(low, high, 101)
    return AtEqualPSNR(float(low), float(high), *(float(np.interp(grid, *c.T).mean()) for c in curves))


def choose_weight(trials: Mapping[float, Mapping[str, float]], price: float = PRICE) -> float:
    """The weight of SSL, from the means over Set14 at the end of the short runs; key 0 is the run without.

    Of the weights that cost at most ``price`` dB against weight 0, the one with the least ST-LPIPS-VGG; the smallest
    weight where all cost more. Written down before any test set was looked at.
    """
    tried = [weight for weight in trials if weight > 0]
    cheap = [weight for weight in tried if trials[weight]["psnr"] >= trials[0]["psnr"] - price]
    return min(cheap, key=lambda weight: trials[weight]["stlpips_vgg"]) if cheap else min(tried)
