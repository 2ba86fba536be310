"""Which files belong together: an image H, its low-quality partner L and its edge mask, paired by name."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from utils.utils_error import UserError
from utils.utils_image import get_image_paths, get_mask_paths
from utils.utils_option import DatasetOptions


class Files(NamedTuple):
    """One item of a data set: the path of H and of what was found for it, None where the data set needs none."""

    H: str
    L: str | None
    mask: str | None


def list_files(opt: DatasetOptions) -> tuple[list[Files], list[str]]:
    """The items of a data set in the order of H, and a line for every image that lacks a partner.

    Raises UserError for a folder that is not named, is missing or is empty.
    """
    kind = opt.dataset_type.removesuffix("mask")
    if not opt.dataroot_H:
        raise UserError(f"datasets.{opt.phase}.dataroot_H is not set: name the folder of ground-truth images")
    if kind == "plain" and not opt.dataroot_L:
        raise UserError(f'datasets.{opt.phase}.dataroot_L is not set: "plain" needs the folder of the inputs')
    H_paths = get_image_paths(opt.dataroot_H)
    L_paths = get_image_paths(opt.dataroot_L) if kind != "blindsr" else []
    mask_paths = get_mask_paths(opt.dataroot_H_mask) if opt.dataset_type.endswith("mask") else []
    problems: list[str] = []
    Ls = _partners(H_paths, L_paths, opt.scale, "image in dataroot_L", problems)
    masks = _partners(H_paths, mask_paths, opt.scale, "mask in dataroot_H_mask", problems)
    complete = [
        Files(H, L, mask)
        for H, L, mask in zip(H_paths, Ls, masks, strict=True)
        if (L or not L_paths) and (mask or not mask_paths)
    ]
    return complete, problems


def _partners(
    paths: Sequence[str], candidates: Sequence[str], scale: int, what: str, problems: list[str]
) -> list[str | None]:
    """The partner of each path among ``candidates``, None and a line in ``problems`` where there is not just one."""
    partners: list[str | None] = [None] * len(paths)
    if not candidates:
        return partners
    for i, found in enumerate(find_partners(paths, candidates, scale)):
        if len(found) == 1:
            partners[i] = found[0]
        else:
            problems.append(f"{paths[i]}: {f'several ({found[0]}, {found[1]})' if found else 'no'} {what} of its name")
    return partners


def find_partners(paths: Sequence[str], candidates: Sequence[str], scale: int) -> list[list[str]]:
    """For each path the candidates of its name, best match only: one is the partner, several are a tie.

    The same stem wins, then the same stem without endings such as ``x4``, ``_LRBI_x4``, ``_SRF_4_LR``, ``_HR``. Among
    namesakes those win that share the most of the innermost folder names: ``H/a/1.png`` goes with ``L/a/1.png``.
    """
    by_stem, by_bare_stem = defaultdict(list), defaultdict(list)
    for candidate in candidates:
        stem = PurePath(candidate).stem
        by_stem[stem].append(candidate)
        by_bare_stem[_bare_stem(stem, scale)].append(candidate)
    partners = []
    for path in paths:
        stem = PurePath(path).stem
        found = by_stem.get(stem) or by_bare_stem.get(_bare_stem(stem, scale), [])
        nearness = [_common_folders(path, candidate) for candidate in found]
        partners.append([c for c, near in zip(found, nearness, strict=True) if near == max(nearness)])
    return partners


def _bare_stem(stem: str, scale: int) -> str:
    """The stem without the endings with which data sets mark role and scale; "x4" only where the scale is 4."""
    ending = rf"(?:[ _.-]*x{scale}[mwd]?|[ _.-]+(?:SRF[_-]?{scale}|LR(?:BI|BD|DN)?|HR|LQ|HQ|GT|bicubic))+$"
    return re.sub(ending, "", stem, flags=re.IGNORECASE) or stem


def _common_folders(path: str, other: str) -> int:
    common = 0
    for a, b in zip(reversed(PurePath(path).parts[:-1]), reversed(PurePath(other).parts[:-1]), strict=False):
        if a != b:
            break
        common += 1
    return common


def raise_problems(problems: Sequence[str], phase: str) -> None:
    """Raise one UserError that counts ``problems`` and quotes the first five; return where there are none."""
    if not problems:
        return
    more = f"; ... and {len(problems) - 5} more" if len(problems) > 5 else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UserError(f"{count} with the {phase} images: {'; '.join(problems[:5])}{more}")
