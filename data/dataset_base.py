"""What all data sets with ground truth share: files, randomness, reading H and its mask, flips, tensors."""

import logging
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data.check import leave_out_unreadable
from data.files import Files, list_files, raise_problems
from utils.utils_error import UserError
from utils.utils_image import (
    Array,
    ImageExtras,
    as_mask,
    augment_img,
    modcrop,
    open_image,
    open_mask,
    read_image,
    single2tensor3,
)
from utils.utils_option import DatasetOptions

logger = logging.getLogger(__name__)


class DatasetBase(Dataset[dict[str, Any]]):
    """Items with tensors ``L`` (C, h, w) and ``H`` (C, scale h, scale w), RGB in [0, 1], ``L_path`` and ``H_path``.

    A mask variant with ``dataroot_H_mask`` adds ``mask`` (1, scale h, scale w) of {0, 1}. In the train phase an item is
    a random patch, flipped and rotated at random; in the test phase it is the whole image, always the same, and the
    item has ``L_extras`` where it has L: what else the file of L holds (utils_image.ImageExtras).

    The key of an item is its index or, from a resumable sampler, ``(index, seed)``: then the seed alone decides every
    random draw, whichever worker makes the item. An index alone draws afresh in the train phase.

    An item with a file that cannot be read is left out of a test set, with a warning. In the train phase, where all
    files are checked before the start and looking at them again would take long, the next item takes its place.

    Raises UserError for missing or empty folders and for images without a partner.
    """

    def __init__(self, dataset_opt: DatasetOptions):
        self.opt = dataset_opt
        self.is_train = dataset_opt.phase == "train"
        self.files, problems = list_files(dataset_opt)
        raise_problems(problems, dataset_opt.phase)
        self._replaced: set[Files] = set()
        if not self.is_train:
            self.files = leave_out_unreadable(self.files, dataset_opt.phase, dataset_opt.n_channels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        seed: Any = None if self.is_train else (self.opt.seed, key)
        index, seed = key if isinstance(key, tuple) else (key, seed)
        for n in range(len(self)):
            files = self.files[(index + n) % len(self)]
            try:
                images, extras = self.make_images(files, np.random.default_rng(seed))
                if files.mask and "mask" in images:
                    images["mask"] = as_mask(images["mask"], files.mask)
            except UserError as error:
                if not self.is_train or n == len(self) - 1:
                    raise
                if files not in self._replaced:  # said once by each worker
                    self._replaced.add(files)
                    logger.warning("%s; the next image takes its place", error)
                continue
            item: dict[str, Any] = {name: single2tensor3(img) for name, img in images.items()}
            if extras:
                item["L_extras"] = extras
            return {**item, "L_path": files.L or files.H, "H_path": files.H}
        raise IndexError(key)

    @abstractmethod
    def make_images(self, files: Files, rng: np.random.Generator) -> tuple[dict[str, Array], ImageExtras | None]:
        """The arrays "L" and "H" of one item, float32 ``(H, W, C)`` in [0, 1], perhaps "mask" as read; L's extras."""

    def read(self, path: str) -> tuple[Array, ImageExtras | None]:
        """An image, uint8 or uint16 ``(H, W, C)``, read-only; in the test phase also what else its file holds.

        In the train phase a raw image is read where it is looked at: cut it before anything else.
        """
        if self.is_train:
            return open_image(path, self.opt.n_channels), None
        return read_image(path, self.opt.n_channels)

    def read_H(self, files: Files) -> tuple[dict[str, Array], ImageExtras | None]:
        """Read "H", uint8 or uint16, and perhaps "mask": ``(H, W, C)``, cut to a multiple of the scale.

        Beside them, in the test phase, the extras of an L that is made of H.
        """
        scale = self.opt.scale
        H, extras = self.read(files.H)
        images = {"H": modcrop(H, scale)}
        if files.mask:
            images["mask"] = modcrop(open_mask(files.mask)[..., None], scale)
        if extras and extras.alpha is not None and not files.L:
            extras = replace(extras, alpha=modcrop(extras.alpha, scale)).resized(1 / scale)
        return images, extras

    def augment(self, images: dict[str, Array], rng: np.random.Generator, upright: bool = False) -> dict[str, Array]:
        """Flip and rotate all images alike; only mirror them left-right where ``upright`` or without ``use_rot``.

        ``mask_augment`` false leaves the mask as it is: the published SSL code did, so that its masks lie askew over
        their images in seven of eight items.
        """
        modes = (0, 4) if upright or not self.opt.use_rot else range(8)
        mode = modes[int(rng.integers(len(modes)))]
        return {
            name: img if name == "mask" and not self.opt.mask_augment else augment_img(img, mode)
            for name, img in images.items()
        }
