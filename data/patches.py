"""Windows of an image: L, H and mask are cut at the same place."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.utils_image import Array


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, scale: int) -> "Window":
        """The same place in an image that is ``scale`` times larger."""
        return Window(*(scale * side for side in self))

    def cut(self, img: Array) -> Array:
        """The window of ``(H, W, C)``, a view."""
        return img[self.top : self.top + self.height, self.left : self.left + self.width]


def random_window(shape: Sequence[int], side: int, rng: np.random.Generator) -> Window:
    """A square window of ``side`` pixels, each place in an image of ``shape`` (H, W, ...) equally likely."""
    height, width = shape[:2]
    top, left = rng.integers(height - side, endpoint=True), rng.integers(width - side, endpoint=True)
    return Window(int(top), int(left), side, side)
