"""Whether L lies where H does: pairs that were cut apart can be shifted by a few pixels, and nothing else shows it."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.utils_image import Array

_SIDE = 1024  # pixels of H that are looked at, in the middle
_MARGIN = 4  # pixels of L at the border, where filter and shift would reach beyond H
_SMALLEST = 24  # pixels of L; in less, chance makes some shift fit best
_BLIND = 0.1  # so unlike H, an L does not tell where it lies
_CLEAN = 1e-3  # unlikeness of MATLAB's reduction to itself, rounded to 8 bits: 0.0006 at most

# Seen on Set5, Set14 and pieces of BSD100, scales 2 to 4. A clean L, shifted by a pixel of H, fits 38 times better
# elsewhere, with JPEG of quality 95 or noise of 3 levels 2.6 times at least, and what is unlike is 0.003 in most. L in
# place, whatever the filter, noise or JPEG, and the blind degradations fit 1.05 times better elsewhere at most. Every
# 4th pixel of a blurred H lies 1.5 pixels off and fits up to 9 times better elsewhere, though not as well as that.
_BETTER, _BETTER_IN_ALL, _ALIKE = 2.5, 1.2, 5e-3


class Shifts(NamedTuple):
    """Shifts (down, right) in pixels of H: ``common`` to all pairs, and of single ones beside it, by index.

    L shows at its origin what H shows so much further down and right.
    """

    common: tuple[int, int]
    single: dict[int, tuple[int, int]]


def find_shifts(unlikeness: Sequence[Array]) -> Shifts:
    """Which of the pairs are shifted, from the :func:`unlikeness_of_shifts` of each.

    A common shift of up to half a pixel of L is a way of making L; single pairs are compared with that, give or take a
    pixel, for it may lie between two.
    """
    if not unlikeness:
        return Shifts((0, 0), {})
    maps = np.maximum(np.stack(unlikeness), 1e-9)
    scale = maps.shape[1] // 2
    typical = np.median(maps, axis=0)
    common = _argmin(typical)
    is_small = max(abs(n - scale) for n in common) <= scale // 2
    if (
        not is_small
        or not _CLEAN < typical[common] < _BLIND
        or typical[scale, scale] < _BETTER_IN_ALL * typical[common]
    ):
        common = (scale, scale)
    single = {}
    for i, values in enumerate(maps):
        best = _argmin(values)
        expected = values[common]
        if common != (scale, scale):
            around = tuple(slice(max(0, n - 1), n + 2) for n in common)
            expected = values[around].min()
        if values[best] < _ALIKE and expected >= _BETTER * values[best]:
            single[i] = (best[0] - scale, best[1] - scale)
    return Shifts((common[0] - scale, common[1] - scale), single)


def _argmin(values: Array) -> tuple[int, int]:
    row, column = np.unravel_index(int(values.argmin()), values.shape)
    return int(row), int(column)


def unlikeness_of_shifts(H: Array, L: Array, scale: int) -> NDArray[np.float64]:
    """How little L is like MATLAB's bicubic reduction of H, shifted by up to ``scale`` pixels of H.

    Unlikeness is 1 - correlation^2 of the gray values, from 0 to 1: brightness and contrast do not count.

    Args:
        H: (H, W, C), uint8 or uint16.
        L: (H // scale, W // scale, C).

    Returns:
        (2 scale + 1, 2 scale + 1), the shifts down and right from -scale to scale; all 1 where L is too small to tell.
    """
    gray_H, gray_L = _gray(H), _gray(L)
    rows, columns = (min(side, max(_SIDE // scale, _SMALLEST)) for side in gray_L.shape)
    unlikeness = np.ones((2 * scale + 1, 2 * scale + 1))
    if min(rows, columns) < _SMALLEST:
        return unlikeness
    top, left = (gray_L.shape[0] - rows) // 2, (gray_L.shape[1] - columns) // 2
    gray_H = gray_H[scale * top : scale * (top + rows), scale * left : scale * (left + columns)]
    inside = gray_L[top : top + rows, left : left + columns][_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    smooth = _smoothed(gray_H, scale)
    for down in range(2 * scale + 1):
        for right in range(2 * scale + 1):
            y, x = scale * (_MARGIN - 1) + down, scale * (_MARGIN - 1) + right
            moved = smooth[y::scale, x::scale][: inside.shape[0], : inside.shape[1]]
            unlikeness[down, right] = _unlikeness(inside, moved)
    return unlikeness


def _gray(img: Array) -> NDArray[np.float32]:
    img = img.astype(np.float32)
    return np.asarray(cv2.cvtColor(img, cv2.COLOR_RGB2GRAY) if img.shape[2] == 3 else img[..., 0], np.float32)


def _smoothed(gray: NDArray[np.float32], scale: int) -> NDArray[np.float32]:
    """Every ``scale``-th pixel of it, from any origin on, is MATLAB's bicubic reduction from that origin."""
    reach = 3 * scale
    x = np.abs((np.arange(-reach, reach + 1) - (scale - 1) / 2) / scale)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel = np.where(x <= 1, near, np.where(x < 2, far, 0))
    return np.asarray(cv2.sepFilter2D(gray, cv2.CV_32F, kernel, kernel), np.float32)


def _unlikeness(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    power = float(a @ a) * float(b @ b)
    return max(0.0, 1 - float(a @ b) ** 2 / power) if power > 0 else 1.0
