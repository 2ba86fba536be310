"""What all data sets with ground truth share: files, randomness, reading H and its mask, flips, tensors."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data.files import Files, list_files, raise_problems
from utils.utils_image import Array, augment_img, imread_uint, modcrop, read_mask, single2tensor3
from utils.utils_option import DatasetOptions


class DatasetBase(Dataset[dict[str, Any]]):
    """Items with tensors ``L`` (C, h, w) and ``H`` (C, scale h, scale w), RGB in [0, 1], ``L_path`` and ``H_path``.

    A mask variant with ``dataroot_H_mask`` adds ``mask`` (1, scale h, scale w) of {0, 1}. In the train phase an item is
    a random patch, flipped and rotated at random; in the test phase it is the whole image, always the same.

    The key of an item is its index or, from a resumable sampler, ``(index, seed)``: then the seed alone decides every
    random draw, whichever worker makes the item. An index alone draws afresh in the train phase.

    Raises UserError for missing or empty folders and for images without a partner.
    """

    def __init__(self, dataset_opt: DatasetOptions):
        self.opt = dataset_opt
        self.is_train = dataset_opt.phase == "train"
        self.files, problems = list_files(dataset_opt)
        raise_problems(problems, dataset_opt.phase)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(key, tuple):
            index, rng = key[0], np.random.default_rng(key[1])
        else:
            index, rng = key, np.random.default_rng(None if self.is_train else (self.opt.seed, key))
        files = self.files[index]
        images = self.make_images(files, rng)
        tensors = {name: single2tensor3(img) for name, img in images.items()}
        return {**tensors, "L_path": files.L or files.H, "H_path": files.H}

    @abstractmethod
    def make_images(self, files: Files, rng: np.random.Generator) -> dict[str, Array]:
        """The arrays "L", "H" and perhaps "mask" of one item: float32 ``(H, W, C)`` in [0, 1]."""

    def read_H(self, files: Files) -> dict[str, Array]:
        """Read "H", uint8 or uint16, and perhaps "mask", float32: ``(H, W, C)``, cut to a multiple of the scale."""
        images = {"H": modcrop(imread_uint(files.H, self.opt.n_channels), self.opt.scale)}
        if files.mask:
            images["mask"] = modcrop(read_mask(files.mask)[..., None], self.opt.scale)
        return images

    def augment(
        self, images: dict[str, Array], rng: np.random.Generator, modes: Sequence[int] = range(8)
    ) -> dict[str, Array]:
        """Flip and rotate all images alike.

        ``mask_augment`` false leaves the mask as it is: the published SSL code did, so that its masks lie askew over
        their images in seven of eight items.
        """
        mode = modes[int(rng.integers(len(modes)))]
        return {
            name: img if name == "mask" and not self.opt.mask_augment else augment_img(img, mode)
            for name, img in images.items()
        }
