"""Two results of one scene, the better and the worse, to train a ranker."""

import numpy as np

from data.dataset_base import DatasetBase
from data.files import Files
from data.patches import random_window
from utils.utils_image import Array, ImageExtras, uint2single


class DatasetRank(DatasetBase):
    """``rank``: items with tensors ``better`` and ``worse`` (C, h, w), RGB in [0, 1], the same place in both.

    Every two results of a scene make an item, their paths in ``H_path`` and ``L_path``.
    """

    def make_images(self, files: Files, rng: np.random.Generator) -> tuple[dict[str, Array], ImageExtras | None]:
        assert files.L is not None
        images = {"better": self.read(files.H)[0], "worse": self.read(files.L)[0]}
        if self.is_train:
            window = random_window(images["better"].shape, self.opt.H_size, rng)
            images = {name: window.cut(img) for name, img in images.items()}
        images = {name: uint2single(img) for name, img in images.items()}
        return self.augment(images, rng) if self.is_train else images, None
