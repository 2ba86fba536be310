"""Validation while training: metrics over a set, and a grid of images to look at; of a ranker, pairs in order."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.loader import one_by_one
from evaluation.metrics import Measurer
from models.model_base import ModelSR
from models.model_ranker import ModelRanker
from utils import utils_dist
from utils.utils_error import UserError
from utils.utils_image import imsave, tensor2uint
from utils.utils_metric_table import METRICS, choose
from utils.utils_option import Options
from utils.utils_tile import enough_memory, tile_remedy

Picture = NDArray[np.uint8]
logger = logging.getLogger(__name__)


class ValidationError(UserError):
    """Of one process or several, raised in all of them: they can still save together what was learned."""


def validate(
    model: ModelSR, test_set: Dataset, measurer: Measurer, grid: Path, images: int, device: torch.device
) -> dict[str, float]:
    """Mean of each metric of a model over a set, of 8-bit images as in main_test.py; the processes share the images.

    Infinite values, PSNR of images that equal H, are left out of a mean and counted in the log, unless all are such; an
    estimate that is not finite makes every mean NaN. A metric that has no value for any image is left out.

    Args:
        model: what restores.
        test_set: items with L and H; those without H have the metrics of E alone, or are for the grid only.
        measurer: what measures.
        grid: PNG to write, one row an image: L (pixels repeated), E and H where there is one.
        images: rows of the grid.

    Raises:
        ValidationError: the memory is too small, an image cannot be read or the grid not be written.
    """
    with _told_by_all(tile_remedy(model.opt.test.tile, "test.tile=")):
        sums, rows = _own_share(model, test_set, measurer, images)
        if rows:
            imsave(_stack(rows), str(grid))
    sums = utils_dist.total(sums, device)
    means = {}
    for name in measurer.names:
        total, finite, infinite = (sums[f"{name} {of}"] for of in ("sum", "finite", "infinite"))
        if infinite:
            what = METRICS[name].title
            logger.info("%d of %d images: %s is infinite, not in the mean", infinite, finite + infinite, what)
        if finite or infinite:
            means[name] = total / finite if finite else math.inf
    return means


@contextmanager
def _told_by_all(remedy: str) -> Iterator[None]:
    """This process's share of a validation: what goes wrong with one of them is raised in all, after all are done.

    Raises:
        ValidationError: an image or a file, or too little memory, for which there is ``remedy``.
    """
    problem = ""
    try:
        with enough_memory(f"validation: {remedy}"):
            yield
    except UserError as error:
        problem = str(error)
    if problems := [text for text in utils_dist.gathered(problem) if text]:
        raise ValidationError(problems[0])


def _own_share(
    model: ModelSR, test_set: Dataset, measurer: Measurer, images: int
) -> tuple[dict[str, float], list[Picture]]:
    """Sums and counts of each metric over this process's images; rows of the grid."""
    sums = {f"{name} {of}": 0.0 for name in measurer.names for of in ("sum", "finite", "infinite")}
    rows: list[Picture] = []
    for batch in one_by_one(test_set, utils_dist.rank(), utils_dist.world_size()):
        model.feed_data(batch, need_H="H" in batch)
        model.test()
        visuals = model.current_visuals()
        shown = {name: tensor2uint(image.nan_to_num()) for name, image in visuals.items()}
        sound = 1.0 if visuals["E"].isfinite().all() else math.nan
        for name, value in measurer.measure({"E": shown["E"]}, shown.get("H")).values["E"].items():
            if math.isfinite(value):
                sums[f"{name} sum"] += sound * value
            if not math.isnan(value):
                sums[f"{name} {'finite' if math.isfinite(value) else 'infinite'}"] += 1
        if utils_dist.rank() == 0 and len(rows) < images:
            rows.append(_row(shown))
    return sums, rows


def best_by(opt: Options) -> str:
    """The metric that says which checkpoints are best, as ``train.checkpoint_best_by`` describes it."""
    if opt.model == "ranker":
        return "psnr"  # stands for the share of pairs in order: of both more is better
    validated = choose(opt.test.validation)
    perceptual = ["stlpips_vgg", "stlpips", "ssg"] if opt.model in ("gan", "spsr") else []
    wanted = [name for name in (*perceptual, "psnr", *validated) if name in validated]
    return opt.train.checkpoint_best_by or next(iter(wanted), "psnr")


def validation_measurer(opt: Options, device: torch.device) -> Measurer:
    """What measures while training: ``test.validation`` and what the best are chosen by.

    Raises:
        UserError: a metric is of whole sets, or the one that the best are chosen by cannot be had here.
    """
    best = best_by(opt)
    names = choose([*opt.test.validation, best])
    if of_sets := [name for name in names if METRICS[name].needs == "set"]:
        raise UserError(f"test.validation: {of_sets[0]} is of whole sets, main_test.py measures it; leave it out")
    measurer = Measurer(names, opt.scale, device)
    for of_one in utils_dist.gathered(measurer.missing):  # weights in one machine's cache alone, say
        measurer.leave_out(of_one)
    if best in measurer.missing:
        raise UserError(f"train.checkpoint_best_by: {best} cannot be had: {measurer.missing[best]}")
    return measurer


def validate_ranker(model: ModelRanker, test_set: Dataset, device: torch.device) -> float:
    """The share of a set's pairs that a ranker puts in order; the processes share the pairs.

    Args:
        model: what orders.
        test_set: items with better and worse.

    Raises:
        ValidationError: the memory is too small, or an image cannot be read.
    """
    sums = {"in_order": 0.0, "count": 0.0}
    with _told_by_all("the memory is too small for the images of datasets.test: make them smaller"):
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
