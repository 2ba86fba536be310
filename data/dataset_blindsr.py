"""H alone: L is made by a random degradation."""

from pathlib import PurePath

import numpy as np

from data.dataset_base import DatasetBase
from data.files import Files
from data.patches import random_window
from utils.utils_blindsr import KAIR, SSL_FORK, add_sharpening, degrade_bsrgan
from utils.utils_image import Array, uint2single

_STRENGTHS = {"bsrgan": KAIR, "bsrgan_light": SSL_FORK}


class DatasetBlindSR(DatasetBase):
    """``blindsr``: a patch of H is flipped, rotated, then degraded; ``lq_patchsize`` keeps a random part of it."""

    def make_images(self, files: Files, rng: np.random.Generator) -> dict[str, Array]:
        opt = self.opt
        images = self.read_H(files)
        if self.is_train:
            window = random_window(images["H"].shape, opt.H_size, rng)
            images = {name: window.cut(img) for name, img in images.items()}
            # KAIR's rule: faces stay upright
            images = self.augment(images, rng, (0, 4) if "face" in PurePath(files.H).name else range(8))
        H = np.ascontiguousarray(uint2single(images["H"]))
        if opt.use_sharp:
            H = add_sharpening(H)
        L, H = degrade_bsrgan(H, opt.scale, rng, _STRENGTHS[opt.degradation_type])
        images["H"] = H
        if self.is_train and opt.lq_patchsize:
            window = random_window(L.shape, opt.lq_patchsize, rng)
            L = window.cut(L)
            images = {name: window.scaled(opt.scale).cut(img) for name, img in images.items()}
        return {**images, "L": L}
