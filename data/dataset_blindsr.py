"""H alone: L is made by a random degradation."""

from pathlib import PurePath

import numpy as np

from data.dataset_base import DatasetBase
from data.degradations.on_image import add_sharpening, apply
from data.degradations.select_degradation import degradation_of, sharp_name
from data.files import Files
from data.patches import random_window
from utils.utils_image import Array, ImageExtras, uint2single


class DatasetBlindSR(DatasetBase):
    """``blindsr``: a patch of H is flipped, rotated, then degraded; ``lq_patchsize`` keeps a random part of it.

    ``use_sharp`` makes L of the sharpened H. In KAIR's degradations that is then H itself; in Real-ESRGAN's, where some
    losses compare with the one and some with the other, items have it as ``H_usm`` beside H. In the train phase with
    ``degradation_device`` gpu items have no L: select_degradation.Degrader makes it, and H_usm, and cuts.
    """

    def make_images(self, files: Files, rng: np.random.Generator) -> tuple[dict[str, Array], ImageExtras | None]:
        opt = self.opt
        images, extras = self.read_H(files)
        if self.is_train:
            window = random_window(images["H"].shape, opt.H_size, rng)
            images = {name: window.cut(img) for name, img in images.items()}
            # KAIR's rule: faces stay upright
            images = self.augment(images, rng, upright="face" in PurePath(files.H).name)
        images["H"] = sharp = np.ascontiguousarray(uint2single(images["H"]))
        if self.is_train and opt.degradation_device == "gpu":
            return images, extras
        if opt.use_sharp:
            sharp = add_sharpening(sharp)
            images[sharp_name(opt.degradation_type)] = sharp
        height, width, channels = sharp.shape
        L = apply(sharp, degradation_of(opt)((height, width, channels), opt.scale, rng), rng)
        if self.is_train and opt.lq_patchsize:
            window = random_window(L.shape, opt.lq_patchsize, rng)
            L = window.cut(L)
            images = {name: window.scaled(opt.scale).cut(img) for name, img in images.items()}
        return {**images, "L": L}, extras
