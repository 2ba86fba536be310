"""Pairs: H with a given L, or with its MATLAB bicubic reduction."""

import numpy as np

from data.dataset_base import DatasetBase
from data.files import Files
from data.patches import Window, random_window
from utils.utils_image import Array, ImageExtras, imresize_np, uint2single


class DatasetSR(DatasetBase):
    """``sr``, ``plain``, ``multiLR_oneGT``: L from ``dataroot_L``; ``sr`` without it: by MATLAB bicubic, unrounded."""

    def make_images(self, files: Files, rng: np.random.Generator) -> tuple[dict[str, Array], ImageExtras | None]:
        images, extras = self.read_H(files)
        scale = self.opt.scale
        height, width = (side // scale for side in images["H"].shape[:2])
        window = Window(0, 0, height, width)
        if self.is_train:
            window = random_window((height, width), self.opt.H_size // scale, rng)
        if files.L:
            L, extras = self.read(files.L)
            L = uint2single(window.cut(L))
        else:
            L = imresize_np(images["H"], 1 / scale, window=window, as_single=True)
        images = {name: window.scaled(scale).cut(img) for name, img in images.items()}
        images |= {"L": L, "H": uint2single(images["H"])}
        return self.augment(images, rng) if self.is_train else images, extras
