"""Validation while training: PSNR and SSIM over a set, and a grid of images to look at; of a ranker, pairs in order."""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.loader import one_by_one
from models.model_base import ModelSR
from models.model_ranker import ModelRanker
from utils import utils_dist
from utils.utils_image import calculate_psnr, calculate_ssim, imsave, tensor2uint
from utils.utils_tile import enough_memory, tile_remedy

Picture = NDArray[np.uint8]
logger = logging.getLogger(__name__)


def validate(
    model: ModelSR, test_set: Dataset, scale: int, grid: Path, images: int, device: torch.device
) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of a model over a set: RGB, 8 bit, border = scale; the processes share the images.

    Images that equal H, of infinite PSNR, are left out of its mean and counted in the log, unless all are such; an
    estimate that is not finite makes both means NaN.

    Args:
        model: what restores.
        test_set: items with L and H; items without H, or too small for SSIM, are restored for the grid only.
        grid: PNG to write, one row an image: L (pixels repeated), E and H where there is one.
        images: rows of the grid.

    Raises:
        UserError: the memory is too small.
    """
    sums = {"psnr": 0.0, "finite": 0.0, "ssim": 0.0, "count": 0.0}
    rows: list[Picture] = []
    smallest = 2 * scale + 11  # the border on both sides and SSIM's window
    for batch in one_by_one(test_set, utils_dist.rank(), utils_dist.world_size()):
        model.feed_data(batch, need_H="H" in batch)
        with enough_memory(f"validation: {tile_remedy(model.opt.test.tile, 'test.tile=')}"):
            model.test()
        visuals = model.current_visuals()
        shown = {name: tensor2uint(image.nan_to_num()) for name, image in visuals.items()}
        if "H" in shown and min(shown["H"].shape[:2]) >= smallest:
            sound = 1.0 if visuals["E"].isfinite().all() else math.nan
            psnr = calculate_psnr(shown["E"], shown["H"], border=scale)
            if math.isfinite(psnr):
                sums["psnr"] += sound * psnr
                sums["finite"] += 1
            sums["ssim"] += sound * calculate_ssim(shown["E"], shown["H"], border=scale)
            sums["count"] += 1
        if utils_dist.rank() == 0 and len(rows) < images:
            rows.append(_row(shown))
    sums = utils_dist.total(sums, device)
    if rows:
        imsave(_stack(rows), str(grid))
    count, finite = sums["count"], sums["finite"]
    if not count:
        return {}
    if equal := round(count - finite):
        logger.info("%d of %d images equal the ground truth (infinite PSNR): not in the mean", equal, count)
    return {"psnr": sums["psnr"] / finite if finite else math.inf, "ssim": sums["ssim"] / count}


def validate_ranker(model: ModelRanker, test_set: Dataset, device: torch.device) -> float:
    """The share of a set's pairs that a ranker puts in order; the processes share the pairs.

    Args:
        model: what orders.
        test_set: items with better and worse.
    """
    sums = {"in_order": 0.0, "count": 0.0}
    for batch in one_by_one(test_set, utils_dist.rank(), utils_dist.world_size()):
        model.feed_data(batch)
        sums["in_order"] += model.test().sum().item()
        sums["count"] += 1
    sums = utils_dist.total(sums, device)
    return sums["in_order"] / sums["count"]


def _row(shown: dict[str, Picture], size: int = 192) -> Picture:
    """Images side by side: the middle of each, at most ``size`` pixels a side, L with its pixels repeated."""
    scale = shown["E"].shape[0] // shown["L"].shape[0]
    shown = {**shown, "L": shown["L"].repeat(scale, 0).repeat(scale, 1)}
    crops = []
    for image in shown.values():
        top, left = (max(0, (side - size) // 2) for side in image.shape[:2])
        crops.append(image[top : top + size, left : left + size])
    return np.concatenate(crops, axis=1)


def _stack(rows: list[Picture]) -> Picture:
    width = max(row.shape[1] for row in rows)
    filled = [np.pad(r, [(0, 0), (0, width - r.shape[1])] + [(0, 0)] * (r.ndim - 2)) for r in rows]
    return np.concatenate(filled, axis=0)
