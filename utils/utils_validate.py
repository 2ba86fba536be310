"""Validation while training: PSNR and SSIM over a set, and a grid of images to look at; of a ranker, pairs in order."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from utils import utils_dist
from utils.utils_image import calculate_psnr, calculate_ssim, imsave, tensor2uint
from utils.utils_loader import one_by_one

logger = logging.getLogger(__name__)


def validate(
    model: Any, test_set: Dataset, scale: int, grid: Path, images: int, device: torch.device
) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of a model over a set: RGB, 8 bit, border = scale; the processes share the images.

    Args:
        model: a ``models.model_base.ModelSR``.
        test_set: items with L and H; items without H, or too small for SSIM, are restored for the grid only.
        grid: PNG to write, one row an image: L (pixels repeated), E and H where there is one.
        images: rows of the grid.
    """
    sums = {"psnr": 0.0, "ssim": 0.0, "count": 0.0}
    rows: list[np.ndarray] = []
    smallest = 2 * scale + 11  # the border on both sides and SSIM's window
    for batch in one_by_one(test_set, utils_dist.rank(), utils_dist.world_size()):
        model.feed_data(batch, need_H="H" in batch)
        model.test()
        shown = {name: tensor2uint(image) for name, image in model.current_visuals().items()}
        if "H" in shown and min(shown["H"].shape[:2]) >= smallest:
            sums["psnr"] += calculate_psnr(shown["E"], shown["H"], border=scale)
            sums["ssim"] += calculate_ssim(shown["E"], shown["H"], border=scale)
            sums["count"] += 1
        if utils_dist.rank() == 0 and len(rows) < images:
            rows.append(_row(shown))
    sums = utils_dist.total(sums, device)
    if rows:
        imsave(_stack(rows), str(grid))
    count = sums.pop("count")
    return {name: value / count for name, value in sums.items()} if count else {}


def validate_ranker(model: Any, test_set: Dataset, device: torch.device) -> float:
    """The share of a set's pairs that a ranker puts in order; the processes share the pairs.

    Args:
        model: a ``models.model_ranker.ModelRanker``.
        test_set: items with better and worse.
    """
    sums = {"in_order": 0.0, "count": 0.0}
    for batch in one_by_one(test_set, utils_dist.rank(), utils_dist.world_size()):
        model.feed_data(batch)
        sums["in_order"] += model.test().sum().item()
        sums["count"] += 1
    sums = utils_dist.total(sums, device)
    return sums["in_order"] / sums["count"]


def _row(shown: dict[str, np.ndarray], size: int = 192) -> np.ndarray:
    """Images side by side: the middle of each, at most ``size`` pixels a side, L with its pixels repeated."""
    scale = shown["E"].shape[0] // shown["L"].shape[0]
    shown = {**shown, "L": shown["L"].repeat(scale, 0).repeat(scale, 1)}
    crops = []
    for image in shown.values():
        top, left = (max(0, (side - size) // 2) for side in image.shape[:2])
        crops.append(image[top : top + size, left : left + size])
    return np.concatenate(crops, axis=1)


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    width = max(row.shape[1] for row in rows)
    filled = [np.pad(r, [(0, 0), (0, width - r.shape[1])] + [(0, 0)] * (r.ndim - 2)) for r in rows]
    return np.concatenate(filled, axis=0)
