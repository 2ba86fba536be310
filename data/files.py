"""Which files belong together: an image H, its low-quality partners L and its edge mask, paired by name."""

import csv
import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path, PurePath
from typing import NamedTuple

from utils.utils_error import UserError, check_regular, printable
from utils.utils_image import IMAGE_SUFFIXES, get_image_paths, get_mask_paths
from utils.utils_metric_table import METRICS
from utils.utils_name import cell
from utils.utils_npy import RAW_SUFFIX
from utils.utils_option import DatasetOptions


class Files(NamedTuple):
    """One item of a data set: the path of H and of what was found for it, None where the data set needs none.

    Of two ranked results H is the better and L the worse.
    """

    H: str
    L: str | None
    mask: str | None


def list_files(opt: DatasetOptions) -> tuple[list[Files], list[str]]:
    """The items of a data set in the order of H, and a line for every image that lacks a partner.

    An H with several L (:func:`group_versions`) makes as many items. ``multiLR_oneGT`` goes by L: an H without any is
    no problem there.

    Raises UserError for a folder that is not named, is missing or is empty.
    """
    if opt.dataset_type == "rank":
        return _list_ranked(opt)
    kind = opt.dataset_type.removesuffix("mask")
    if not opt.dataroot_H:
        raise UserError(f"datasets.{opt.phase}.dataroot_H is not set: name the folder of ground-truth images")
    if kind in ("plain", "multiLR_oneGT") and not opt.dataroot_L:
        raise UserError(f'datasets.{opt.phase}.dataroot_L is not set: "{kind}" needs the folder of the inputs')
    H_paths = get_image_paths(opt.dataroot_H)
    L_paths = get_image_paths(opt.dataroot_L) if kind != "blindsr" else []
    mask_paths = get_mask_paths(opt.dataroot_H_mask) if opt.dataset_type.endswith("mask") else []
    problems: list[str] = []
    versions = group_versions(H_paths, L_paths, opt.scale)
    if kind == "multiLR_oneGT":
        Hs = _partners(list(versions), H_paths, opt.scale, "image in dataroot_H", problems, shared=True)
        pairs = zip(versions.values(), Hs, strict=True)
        return [Files(H, L, None) for of_one_H, H in pairs if H for L in of_one_H], problems
    Ls = _partners(H_paths, list(versions), opt.scale, "image in dataroot_L", problems)
    masks = _partners(H_paths, mask_paths, opt.scale, "mask in dataroot_H_mask", problems)
    complete = [
        Files(H, version, mask)
        for H, L, mask in zip(H_paths, Ls, masks, strict=True)
        if (L or not L_paths) and (mask or not mask_paths)
        for version in (versions[L] if L else [None])
    ]
    return complete, problems


def group_files(roots: Iterable[str]) -> list[list[str]]:
    """Folders, each by itself, and files of one folder together where they stand together, as wildcards give them."""
    groups: list[list[str]] = []
    last = None
    for root in roots:
        folder = os.path.dirname(root) if os.path.isfile(root) else None
        if folder is None or folder != last:
            groups.append([])
        if root not in groups[-1][-1:]:
            groups[-1].append(root)
        last = folder
    return groups


def group_versions(H_paths: Sequence[str], L_paths: Sequence[str], scale: int) -> dict[str, list[str]]:
    """Several L of one H: ``0801+00.png``, ``0801+01.png``, ... stand together under ``0801.png``.

    The names are cut at the first "+", as those of the SSL paper's blind test sets, but only where that gives the name
    of an H and the whole name is none. All other paths stand alone, under themselves.
    """
    stems = {_bare_stem(PurePath(H).stem, scale) for H in H_paths}
    versions = defaultdict(list)
    for path in L_paths:
        name = PurePath(path)
        H_stem = name.stem.split("+", 1)[0]
        is_version = (
            "+" in name.stem and _bare_stem(H_stem, scale) in stems and _bare_stem(name.stem, scale) not in stems
        )
        versions[str(name.with_name(f"{H_stem}.png")) if is_version else path].append(path)
    return dict(versions)


def _partners(
    paths: Sequence[str],
    candidates: Sequence[str],
    scale: int,
    what: str,
    problems: list[str],
    shared: bool = False,
) -> list[str | None]:
    """The partner of each path among ``candidates``, None and a line in ``problems`` where there is not just one.

    Nor is there where it is closer to another path, whose partner it is: ``H/b/1.png`` has none if only ``L/a/1.png``
    is there. ``shared`` partners may be those of several.
    """
    partners: list[str | None] = [None] * len(paths)
    if not candidates:
        return partners
    found = find_partners(paths, candidates, scale)
    claims = defaultdict(list)  # partner -> how close those are whose only one it is, the closest last, and which
    for path, of_its_name in zip(paths, found, strict=True):
        if len(of_its_name) == 1 and not shared:
            claims[of_its_name[0]].append((_closeness(path, of_its_name[0]), path))
    closest = {partner: sorted(of_partner)[-2:] for partner, of_partner in claims.items()}
    for i, (path, of_its_name) in enumerate(zip(paths, found, strict=True)):
        if len(of_its_name) != 1:
            several = f"several ({of_its_name[0]}, {of_its_name[1]})" if of_its_name else "no"
            problems.append(f"{path}: {several} {what} of its name")
            continue
        partner = of_its_name[0]
        best = closest.get(partner, [])
        rivals = [other for close, other in best if other != path and close == best[-1][0]]
        if rivals:
            problems.append(f"{path}: no {what} of its name but {partner}, which fits {rivals[0]} as well or better")
        else:
            partners[i] = partner
    return partners


def _closeness(path: str, other: str) -> tuple[bool, int]:
    return PurePath(path).stem == PurePath(other).stem, _common_folders(path, other)


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
    stem = unicodedata.normalize("NFC", stem)  # macOS writes accents apart
    return re.sub(ending, "", stem, flags=re.IGNORECASE) or stem


def _common_folders(path: str, other: str) -> int:
    common = 0
    for a, b in zip(reversed(PurePath(path).parts[:-1]), reversed(PurePath(other).parts[:-1]), strict=False):
        if a != b:
            break
        common += 1
    return common


# ------------------------------------------------------------------------------------------- ranked results of a scene

_Ranked = list[tuple[float, str]]  # the results of one scene: how bad each is, and its path, the best first


def _list_ranked(opt: DatasetOptions) -> tuple[list[Files], list[str]]:
    """Every two results of one scene that differ in quality, and a line for every image that is not there."""
    problems: list[str] = []
    scenes = _ranked_by_table(opt, problems) if opt.rank_csv else _ranked_by_folder(opt, problems)
    pairs = [(one, other) for ranked in scenes for one, other in combinations(ranked, 2) if one[0] < other[0]]
    if not pairs and not problems:
        raise UserError(f"{opt.rank_csv}: no image has results of two models that differ in {opt.rank_metric}")
    return [Files(better, worse, None) for (_, better), (_, worse) in pairs], problems


def _ranked_by_folder(opt: DatasetOptions, problems: list[str]) -> list[_Ranked]:
    """The order of the folders is each scene's."""
    first, *others = opt.dataroot_ranked or []
    best = get_image_paths(first)
    found = [_partners(best, get_image_paths(folder), opt.scale, f"image in {folder}", problems) for folder in others]
    scenes = [[path for path in scene if path] for scene in zip(best, *found, strict=True)]
    return [[*enumerate(scene)] for scene in scenes if len(scene) > len(others)]


def _ranked_by_table(opt: DatasetOptions, problems: list[str]) -> list[_Ranked]:
    """The order of a metric is each scene's; a row without a value has no place in it.

    Raises UserError for a table that cannot be read, lacks a column or has a value that is no number.
    """
    table, column, more_is_better = Path(opt.rank_csv or ""), opt.rank_metric, opt.rank_higher_better
    check_regular(table)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: cannot be read as a CSV file ({error})") from error
    if absent := [name for name in ("image", "model", column) if rows and name not in rows[0]]:
        raise UserError(f"{table}: has no column {absent[0]}; it has {', '.join(filter(None, rows[0]))}")
    if more_is_better is None:
        if column not in METRICS:
            raise UserError(f"datasets.{opt.phase}.rank_higher_better: is required for {column}: is more of it better?")
        more_is_better = METRICS[column].higher_better

    @lru_cache
    def names_in(folder: Path) -> dict[str, Path]:
        """Images by the names that the table shows."""
        return {
            cell(printable(path.relative_to(folder).with_suffix("").as_posix())): path for path in folder.rglob("*.png")
        }

    scenes: dict[tuple[str, str], _Ranked] = defaultdict(list)
    for row in rows:
        image, model, value, set_name = row["image"], row["model"], row[column], row.get("set") or ""
        folder = table.parent / (model or "").removeprefix("'") / set_name.removeprefix("'")
        if not (image and model and value and folder.is_dir()):  # main_test.py measures bicubic, but saves no images
            continue
        path = folder / (image if image.lower().endswith((*IMAGE_SUFFIXES, RAW_SUFFIX)) else f"{image}.png")
        if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(table.parent)):
            raise UserError(f"{table}: {path} lies outside of the table's folder; write names below it")
        if not path.is_file():
            path = names_in(folder).get(image, path)
        if not path.is_file():
            problems.append(f"{path}: is not there, but in {table}")
            continue
        try:
            badness = -float(value) if more_is_better else float(value)
        except ValueError:
            badness = math.nan
        if math.isnan(badness):
            raise UserError(f"{table}: {column} of {image} by {model} is {value!r}, not a number")
        scenes[set_name, image].append((badness, str(path)))
    return [sorted(ranked) for ranked in scenes.values()]


def raise_problems(problems: Sequence[str], phase: str) -> None:
    """Raise one UserError that counts ``problems`` and quotes the first five; return where there are none."""
    if problems:
        raise UserError(quote(problems, phase))


def quote(problems: Sequence[str], phase: str) -> str:
    """One line: how many there are, and the first five."""
    more = f"; ... and {len(problems) - 5} more" if len(problems) > 5 else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return printable(f"{count} with the {phase} images: {'; '.join(problems[:5])}{more}")
