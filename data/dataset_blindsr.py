"""H alone: L is made by a random degradation."""

from pathlib import PurePath

import numpy as np

from data.dataset_base import DatasetBase
from data.files import Files
from data.patches import random_window
from utils import utils_blindsr, utils_realesrgan
from utils.utils_blindsr import add_sharpening, degrade_bsrgan
from utils.utils_image import Array, single2tensor3, uint2single
from utils.utils_realesrgan import degrade_realesrgan

_BSRGAN = {"bsrgan": utils_blindsr.KAIR, "bsrgan_light": utils_blindsr.SSL_FORK}
_REALESRGAN = {"realesrgan": utils_realesrgan.REAL_ESRGAN, "realesrgan_light": utils_realesrgan.SSL_FORK}


class DatasetBlindSR(DatasetBase):
    """``blindsr``: a patch of H is flipped, rotated, then degraded; ``lq_patchsize`` keeps a random part of it.

    ``use_sharp`` makes L of the sharpened H. In KAIR's degradations that is then H itself; in Real-ESRGAN's, where some
    losses compare with the one and some with the other, items have it as ``H_usm`` beside H.
    """

    def make_images(self, files: Files, rng: np.random.Generator) -> dict[str, Array]:
        opt = self.opt
        images = self.read_H(files)
        if self.is_train:
            window = random_window(images["H"].shape, opt.H_size, rng)
            images = {name: window.cut(img) for name, img in images.items()}
            # KAIR's rule: faces stay upright
            images = self.augment(images, rng, (0, 4) if "face" in PurePath(files.H).name else range(8))
        images["H"] = sharp = np.ascontiguousarray(uint2single(images["H"]))
        if opt.use_sharp:
            sharp = add_sharpening(sharp)
        if opt.degradation_type in _BSRGAN:
            L, images["H"] = degrade_bsrgan(sharp, opt.scale, rng, _BSRGAN[opt.degradation_type])
        else:
            batch = single2tensor3(sharp)[None]
            batch = degrade_realesrgan(batch, opt.scale, rng, _REALESRGAN[opt.degradation_type])
            L = batch[0].permute(1, 2, 0).numpy()
            if opt.use_sharp:
                images["H_usm"] = sharp
        if self.is_train and opt.lq_patchsize:
            window = random_window(L.shape, opt.lq_patchsize, rng)
            L = window.cut(L)
            images = {name: window.scaled(opt.scale).cut(img) for name, img in images.items()}
        return {**images, "L": L}
