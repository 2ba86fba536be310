"""Random degradations by name: of one image for files and data sets, of batches on the training device.

The names are those of the option ``degradation_type``; what each draws is in bsrgan and realesrgan.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.degradations import bsrgan, on_batch, on_image, realesrgan
from data.degradations.bsrgan import draw_bsrgan, draw_bsrgan_plus
from data.degradations.realesrgan import draw_realesrgan
from data.degradations.steps import Step
from utils import utils_dist
from utils.utils_checkpoint import Fingerprint, load_checkpoint_file, save_atomically
from utils.utils_image import Array, modcrop, single2uint, uint2single
from utils.utils_option import DatasetOptions

logger = logging.getLogger(__name__)

Draw = Callable[[tuple[int, int, int], int, np.random.Generator], list[Step]]
"""From the shape (height, width, channels) of H, the scale and a generator to steps."""


def _draw_blind_test(shape: tuple[int, int, int], sf: int, rng: np.random.Generator) -> list[Step]:
    """The SSL paper's blind test images: 0.6 of them by Real-ESRGAN, the others by BSRGAN, all mildly."""
    if rng.random() < 0.6:
        return draw_realesrgan(shape, sf, rng, realesrgan.SSL_TEST)
    return draw_bsrgan(shape, sf, rng, bsrgan.SSL_TEST)


_BSRGAN = {
    "bsrgan": (draw_bsrgan, bsrgan.KAIR),
    "bsrgan_light": (draw_bsrgan, bsrgan.SSL_FORK),
    "bsrgan_plus": (draw_bsrgan_plus, bsrgan.KAIR),
}
_REALESRGAN = {
    "realesrgan": realesrgan.REAL_ESRGAN,
    "realesrgan_light": realesrgan.SSL_FORK,
    "stablesr": realesrgan.STABLE_SR,
    "resshift": realesrgan.RESSHIFT,
}
DEGRADATIONS: dict[str, Draw] = {
    **{name: partial(draw, strength=strength) for name, (draw, strength) in _BSRGAN.items()},
    **{name: partial(draw_realesrgan, strength=strength) for name, strength in _REALESRGAN.items()},
    "blind_test": _draw_blind_test,
}
"""What each ``degradation_type`` draws."""


def degradation_of(opt: DatasetOptions) -> Draw:
    """What a data set draws."""
    if opt.degradation_type not in _BSRGAN:
        return DEGRADATIONS[opt.degradation_type]
    draw, strength = _BSRGAN[opt.degradation_type]
    shuffle_prob = strength.shuffle_prob if opt.shuffle_prob is None else opt.shuffle_prob
    return partial(draw, strength=replace(strength, camera_prob=opt.camera_prob, shuffle_prob=shuffle_prob))


def sharp_name(degradation_type: str) -> str:
    """What ``use_sharp`` makes of H sharpened: "H" itself, as in KAIR, or "H_usm" beside it, as in Real-ESRGAN."""
    return "H" if degradation_type in _BSRGAN else "H_usm"


def degrade_image(
    H: Array, degradation_type: str, scale: int, seed: int, name: str = ""
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Degrade one image to a file's L, and say how.

    Args:
        H: ``(H, W, C)`` RGB or gray, uint8, uint16, or float32 in [0, 1]; cut to a multiple of ``scale``.
        degradation_type: a name of :data:`DEGRADATIONS`.
        scale: how much smaller L is.
        seed: of all images together, 0 or more.
        name: of this image, which with the seed decides every draw, whatever else is degraded.

    Returns:
        L ``(H // scale, W // scale, C)`` uint8, and what was done to H, for JSON.

    Raises:
        ValueError: the type is unknown or H smaller than ``scale``.
    """
    if degradation_type not in DEGRADATIONS:
        raise ValueError(f"degradation_type must be one of {', '.join(DEGRADATIONS)}, not {degradation_type}")
    if min(H.shape[:2]) < scale:
        raise ValueError(f"an image of {H.shape[1]} x {H.shape[0]} pixels cannot be made {scale} times smaller")
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()  # names that are not UTF-8
    rng = np.random.default_rng((seed, int.from_bytes(digest, "big")))
    img = np.ascontiguousarray(modcrop(H if H.dtype == np.float32 else uint2single(H), scale))
    steps = DEGRADATIONS[degradation_type]((img.shape[0], img.shape[1], img.shape[2]), scale, rng)
    L = single2uint(on_image.apply(img, steps, rng))
    record = {"degradation_type": degradation_type, "scale": scale, "seed": seed, "name": name}
    return L, {**record, "steps": [step.record() for step in steps]}


class Degrader:
    """Makes L of a batch's H, and H_usm with ``use_sharp``, on the training device; then perhaps mixes batches.

    The draws follow from torch's default generator, each image having its own. ``pair_pool`` keeps that many pairs:
    once they are there, each new pair takes the place of an old one at random, which is given out in its stead. What
    is in the pool depends on all steps before; so it is saved with the checkpoints, by each process its own.

    Args:
        opt: of the training set.
        device: where to degrade.
    """

    def __init__(self, opt: DatasetOptions, device: torch.device) -> None:
        self.opt, self.device = opt, device
        self.draw = degradation_of(opt)
        self.pool: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add L to a batch with ``H`` (N, C, h, w) in [0, 1] and perhaps ``mask`` (N, 1, h, w); all on the device.

        ``lq_patchsize`` keeps a random part of each pair, aligned. With a pool the paths, no longer true, are left out.
        """
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**63)))
        given = (name for name in ("H", "mask") if name in batch)
        images: dict[str, Tensor] = {name: batch[name].to(self.device, non_blocking=True) for name in given}
        H = images["H"]
        if self.opt.use_sharp:
            H = on_batch.sharpen(H)
            images[sharp_name(self.opt.degradation_type)] = H
        channels, height, width = H.shape[1:]
        plans = [self.draw((height, width, channels), self.opt.scale, rng) for _ in H]
        images["L"] = on_batch.apply_batch(H, plans, generator)
        if self.opt.lq_patchsize:
            images = self._cut(images, self.opt.lq_patchsize, rng)
        if self.opt.pair_pool:
            return self._exchanged(images)
        return {**batch, **images}

    def _cut(self, images: dict[str, Tensor], side: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """A window of L for each image, and the same place of the others."""
        batch, _, height, width = images["L"].shape
        tops, lefts = (rng.integers(length - side, size=batch, endpoint=True) for length in (height, width))

        def cut(img: Tensor, scale: int) -> Tensor:
            places = (scale * np.stack([tops, lefts], axis=1)).tolist()
            windows = [
                one[:, y : y + scale * side, x : x + scale * side] for one, (y, x) in zip(img, places, strict=True)
            ]
            return torch.stack(windows)

        return {name: cut(img, 1 if name == "L" else self.opt.scale) for name, img in images.items()}

    def _exchanged(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """The images themselves while the pool is filled, then old ones for which they are left there."""
        batch = len(images["L"])
        if self.pool and _form(self.pool) != _form(images):
            logger.warning("the options make other pairs than those of the pool: it is filled anew")
            self.pool = {}
        kept = len(self.pool["L"]) if self.pool else 0
        if kept < self.opt.pair_pool:
            self.pool = {name: torch.cat([self.pool[name], new]) if kept else new for name, new in images.items()}
            return images
        index = torch.randperm(kept)[:batch].to(self.device)
        old = {name: self.pool[name][index] for name in images}
        for name, new in images.items():
            self.pool[name][index] = new
        return old

    def save(self, folder: Path, step: int) -> dict[str, Fingerprint]:
        """Write this process's pool into the folder of a checkpoint; -> what was written, by the file's name."""
        if not self.opt.pair_pool:
            return {}
        name = _pool_name(step)
        return {name: save_atomically({key: pairs.cpu() for key, pairs in self.pool.items()}, folder / name)}

    def load(self, folder: Path, step: int, expected: Mapping[str, Fingerprint]) -> None:
        """Go on with the pool of a checkpoint; where it has none for this number of processes it is filled anew.

        Args:
            expected: the files of the checkpoint.

        Raises:
            DamagedError: the file is missing, cannot be read or is not what was written.
        """
        self.pool = {}
        if not self.opt.pair_pool:
            return
        count = sum(bool(re.fullmatch(rf"{step}_pool\d+\.pth", name)) for name in expected)
        if count != utils_dist.world_size():
            found = f"pools of {count} processes, not of {utils_dist.world_size()}" if count else "no pool"
            logger.warning(
                "checkpoint %d has %s: it is filled anew, the run differs from an undisturbed one", step, found
            )
            return
        name = _pool_name(step)
        content = load_checkpoint_file(folder / name, expected[name])
        self.pool = {name: pairs[: self.opt.pair_pool].to(self.device) for name, pairs in content.items()}


def _pool_name(step: int) -> str:
    return f"{step}_pool{utils_dist.rank()}.pth"


def _form(images: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(batch.shape[1:]) for name, batch in images.items()}
