"""What is in a folder of images: a report for people, and whether anything is the matter."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from data.files import find_partners, group_versions, list_files
from data.preparation.alignment import find_shifts, unlikeness_of_shifts
from data.preparation.duplicates import equal_images, near_duplicates, thumbnail
from data.preparation.run import run_all
from utils.utils_error import UserError, printable
from utils.utils_image import (
    IMAGE_SUFFIXES,
    Array,
    decode,
    dropped,
    exif_orientation,
    get_image_paths,
    get_mask_paths,
    imread_uint,
    read_file,
    read_header,
    read_mask,
    walk,
)
from utils.utils_lmdb import is_lmdb
from utils.utils_npy import RAW_SUFFIX
from utils.utils_option import DatasetOptions, Options
from utils.utils_tiff import TiffFacts

_WIDTH = 80
_SHOWN = 10  # names of one kind; of what is wrong all


class Folders(NamedTuple):
    """A data set: folders of H, perhaps of L and edge masks, as ``dataroot_H``, ``dataroot_L``, ``dataroot_H_mask``."""

    title: str
    H: Sequence[str]
    L: Sequence[str] = ()
    mask: Sequence[str] = ()
    scale: int = 4  # of L
    smallest: int = 0  # images with a shorter side below this are named
    is_train: bool = True
    only_with_L: bool = False  # of H those that have an L; else one without is trouble


def folders_of(opt: Options) -> list[Folders]:
    """The data sets of options for training."""

    def several(root: str | list[str] | None) -> list[str]:
        return [root] if isinstance(root, str) else root or []

    found = []
    for name, data in opt.datasets.items():
        is_train = data.phase == "train"
        has_mask = data.dataset_type.endswith("mask")
        images = {"l": data.dataroot_L, "rank": data.dataroot_ranked or os.path.dirname(data.rank_csv or "")}
        found.append(
            Folders(
                f"datasets.{name}",
                several(images.get(data.dataset_type, data.dataroot_H)),
                several(None if data.dataset_type in ("l", "blindsr", "blindsrmask") else data.dataroot_L),
                several(data.dataroot_H_mask if has_mask else None),
                data.scale,
                data.H_size if is_train else 0,
                is_train,
                data.dataset_type == "multiLR_oneGT",
            )
        )
    return found


@dataclass
class Facts:
    """What is known of one file; ``problem`` where it cannot be read."""

    path: str
    file_size: int = 0
    problem: str | None = None
    size: tuple[int, int] = (0, 0)  # height, width
    kind: str = ""
    notes: list[str] = field(default_factory=list)
    digest: bytes = b""
    thumbnail: Array | None = None
    edges: float = 0.0  # of a mask: the share of its pixels


def report(sets: Sequence[Folders], workers: int) -> int:
    """Print what is in training and test sets; returns 1 where something is the matter, else 0.

    Raises UserError for a folder that is missing or empty.
    """
    trouble = 0
    facts_of: dict[str, list[Facts]] = {}
    for folders in sets:
        title = folders.title
        facts_of[title] = facts = _gather(get_image_paths(folders.H), False, workers)
        trouble += _print(title, _describe(folders.H, facts, folders.smallest))
        L = _gather(get_image_paths(folders.L), False, workers)
        mask = _gather(get_mask_paths(folders.mask), True, workers)
        if L:
            trouble += _print(f"{title}: L", _describe(folders.L, L, 0))
        if mask:
            trouble += _print(f"{title}: edge masks", _describe_masks(folders.mask, mask))
        if L or mask:
            trouble += _print(f"{title}: partners", _describe_partners(folders, facts, L, mask, workers))
    train = [facts for folders in sets if folders.is_train for facts in facts_of[folders.title]]
    test = [facts for folders in sets if not folders.is_train for facts in facts_of[folders.title]]
    if train and test:
        trouble += _print("training and test images", _describe_twins(train, test))
    print(
        f"\n{trouble} kind{'s' if trouble > 1 else ''} of trouble, marked with !"
        if trouble
        else "\nnothing is the matter"
    )
    return 1 if trouble else 0


def _print(title: str, lines: Iterator["_Line"]) -> int:
    """Print a section; returns how many of its lines are trouble."""
    title = printable(title)
    print(f"\n{title}\n{'-' * min(len(title), _WIDTH)}")
    trouble = 0
    for label, text, names, is_trouble in lines:
        trouble += is_trouble
        print(f"{'!' if is_trouble else ' '} {label:<18}{printable(text)}".rstrip())
        shown = len(names) if is_trouble else _SHOWN
        for name in names[:shown]:
            print(f"      {printable(name)}")
        if len(names) > shown:
            print(f"      ... and {len(names) - shown} more")
    return trouble


class _Line(NamedTuple):
    label: str
    text: str
    names: Sequence[str] = ()
    is_trouble: bool = False


# ----------------------------------------------------------------------------------------------------------- reading


def _gather(paths: Sequence[str], are_masks: bool, workers: int) -> list[Facts]:
    return list(run_all(partial(_facts, are_masks), paths, workers, "reading"))


def _facts(is_mask: bool, path: str) -> Facts:
    """Read one file; in a worker."""
    facts = Facts(path)
    try:
        if is_mask:
            mask = read_mask(path)
            facts.size, facts.edges = (mask.shape[0], mask.shape[1]), float(mask.mean())
            return facts
        data = read_file(path)
        facts.file_size = data.size
        img = decode(data, path, None)
    except UserError as error:
        facts.problem = str(error)
        return facts
    facts.size = (img.shape[0], img.shape[1])
    facts.kind = f"{8 * img.itemsize}-bit {'gray' if img.shape[2] == 1 else 'RGB'}"
    facts.notes = list(_notes(data, path))
    facts.digest = hashlib.sha1(repr((img.shape, img.dtype)).encode() + img.tobytes()).digest()
    facts.thumbnail = thumbnail(img)
    return facts


def _notes(data: Array, path: str) -> Iterator[str]:
    """What was done to make an RGB or gray image of the file."""
    header = read_header(data, path)
    if header is None:
        return
    if exif_orientation(header) != 1:
        yield "turned as their EXIF data say"
    yield from dropped(data, path)
    if header.is_cmyk if isinstance(header, TiffFacts) else header.mode == "CMYK":
        yield "CMYK, made RGB"


# -------------------------------------------------------------------------------------------------------- describing


def _describe(roots: Sequence[str], facts: Sequence[Facts], smallest: int) -> Iterator[_Line]:
    good = [f for f in facts if not f.problem]
    pixels = sum(f.size[0] * f.size[1] for f in good)
    total = sum(f.file_size for f in facts)
    yield _Line("folders", "", roots)
    yield _Line("images", f"{len(facts)}, {pixels / 1e6:,.1f} megapixels, {total / 2**20:,.1f} MiB")
    formats = Counter(PurePath(f.path).suffix.lower()[1:] for f in facts)
    yield _Line("formats", _counts(formats))
    yield _Line("pixels", _counts(Counter(f.kind for f in good)))
    for note, count in Counter(note for f in good for note in f.notes).items():
        yield _Line("", f"{count} {note}", [f.path for f in good if note in f.notes])
    yield _Line("sizes", _counts(Counter(_size(f.size) for f in good), most=5))
    yield _Line("shorter side", "", list(_histogram([min(f.size) for f in good])))
    if bad := [f.problem for f in facts if f.problem]:
        yield _Line("cannot be read", str(len(bad)), bad, True)
    if small := [f"{f.path} ({_size(f.size)})" for f in good if min(f.size) < smallest]:
        yield _Line("too small", f"{len(small)} below {smallest}", small, True)
    if equal := equal_images([f.digest for f in good]):
        names = [" = ".join(good[i].path for i in group) for group in equal]
        yield _Line("equal pixels", f"{len(equal)} groups", names, True)
    below = [walk(root, IMAGE_SUFFIXES, RAW_SUFFIX) for root in roots if os.path.isdir(root) and not is_lmdb(root)]
    if others := sum((found.others for found in below), Counter()):
        yield _Line("not read", f"files of other kinds: {_counts(others)}")
    if closed := [line for found in below for line in found.closed]:
        yield _Line("cannot be opened", str(len(closed)), closed, True)


def _describe_masks(roots: Sequence[str], facts: Sequence[Facts]) -> Iterator[_Line]:
    good = [f for f in facts if not f.problem]
    yield _Line("folders", "", roots)
    yield _Line("masks", str(len(facts)))
    if good:
        shares = np.array([f.edges for f in good])
        text = f"{shares.mean():.1%} of the pixels, {shares.min():.1%} to {shares.max():.1%} an image"
        yield _Line("edges", text)
        if empty := [f.path for f in good if f.edges == 0]:
            yield _Line("", f"{len(empty)} without any edge: they do not count in the loss", empty)
    if bad := [f.problem for f in facts if f.problem]:
        yield _Line("cannot be read", str(len(bad)), bad, True)


def _describe_partners(
    folders: Folders, H: Sequence[Facts], L: Sequence[Facts], mask: Sequence[Facts], workers: int
) -> Iterator[_Line]:
    scale = folders.scale
    with_L = "multiLR_oneGT" if folders.only_with_L else "plain"
    kind = (with_L if L else "blindsr") + ("mask" if mask else "")
    opt = DatasetOptions(
        dataset_type=kind,  # type: ignore[arg-type]
        dataroot_H=list(folders.H),
        dataroot_L=list(folders.L) or None,
        dataroot_H_mask=list(folders.mask) or None,
        scale=scale,
    )
    items, missing = list_files(opt)
    size = {f.path: f.size for f in (*H, *L, *mask) if not f.problem}
    yield _Line("complete", f"{len(items)} of {len(H)} H" + (", several L an H" if len(items) > len(H) else ""))
    if missing:
        yield _Line("incomplete", str(len(missing)), missing, True)
    if alone := [path for facts in (L, mask) for path in _without_H(facts, H, scale)]:
        yield _Line("without H", str(len(alone)), alone, True)
    wrong = []
    for item in items:
        if item.H not in size:
            continue
        height, width = size[item.H]
        for path, expected in ((item.L, (height // scale, width // scale)), (item.mask, (height, width))):
            if path in size and size[path] != expected:
                wrong.append(f"{path} ({_size(size[path])}), not {_size(expected)}")
    if wrong:
        yield _Line("of another size", str(len(wrong)), wrong, True)
    pairs = [
        (item.H, item.L)
        for item in items
        if item.H in size and item.L in size and size[item.L] == tuple(side // scale for side in size[item.H])
    ]
    yield from _describe_shifts(pairs, scale, workers)


def _describe_shifts(pairs: Sequence[tuple[str, str]], scale: int, workers: int) -> Iterator[_Line]:
    found = run_all(partial(_unlikeness, scale), pairs, workers, "comparing L with H")
    common, single = find_shifts(list(found))
    if common != (0, 0) and len(pairs) >= 5:  # of fewer, chance may have degraded all alike
        text = f"all L, by about {_shift(common)} of H: not made as MATLAB's bicubic is"
        yield _Line("shifted alike", text)
    if single:
        names = [f"{pairs[i][1]} ({_shift(shift)})" for i, shift in single.items()]
        text = f"{len(single)} of {len(pairs)} L, in pixels of H; cut pairs by subimages --L"
        yield _Line("shifted", text, names, True)


def _unlikeness(scale: int, pair: tuple[str, str]) -> Array:
    """In a worker."""
    H, L = (imread_uint(path, None) for path in pair)
    return unlikeness_of_shifts(H, L, scale)


def _shift(shift: tuple[int, int]) -> str:
    down, right = shift
    parts = [f"{abs(down)} {'down' if down > 0 else 'up'}"] * bool(down)
    return ", ".join([*parts, *[f"{abs(right)} {'right' if right > 0 else 'left'}"] * bool(right)])


def _without_H(facts: Sequence[Facts], H: Sequence[Facts], scale: int) -> list[str]:
    H_paths = [f.path for f in H]
    versions = group_versions(H_paths, [f.path for f in facts], scale)
    found = find_partners(list(versions), H_paths, scale)
    return [path for name, partners in zip(versions, found, strict=True) if not partners for path in versions[name]]


def _describe_twins(train: Sequence[Facts], test: Sequence[Facts]) -> Iterator[_Line]:
    known, others = ([f for f in facts if f.thumbnail is not None] for facts in (train, test))
    yield _Line("compared", f"{len(known)} with {len(others)} whole images; pieces of a test image are not found")
    by_digest = {f.digest: f.path for f in known}
    if equal := [f"{f.path} = {by_digest[f.digest]}" for f in others if f.digest in by_digest]:
        yield _Line("equal pixels", f"{len(equal)} test images that are in the training set", equal, True)
    images = [[f.thumbnail for f in facts if f.thumbnail is not None] for facts in (known, others)]
    names = [
        f"{others[twin.test].path} ~ {known[twin.train].path}"
        f" (correlation {twin.correlation:.2f}{', turned' if twin.turned else ''})"
        for twin in near_duplicates(*images)
        if others[twin.test].digest != known[twin.train].digest
    ]
    if names:
        yield _Line("look the same", f"{len(names)} times, a test and a training image", names, True)


def _histogram(sides: Sequence[int]) -> Iterator[str]:
    """A line and a bar for each range of shorter sides that occurs between the least and the greatest."""
    edges = [0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 1 << 30]
    counts = [sum(low <= side < high for side in sides) for low, high in pairwise(edges)]
    filled = np.flatnonzero(counts)
    for i in range(filled[0], filled[-1] + 1) if len(filled) else ():
        label = f"{edges[i]} to {edges[i + 1] - 1}" if edges[i + 1] < 1 << 30 else f"{edges[i]} or more"
        bar = "#" * round(40 * counts[i] / max(counts))
        yield f"{label:>12}  {counts[i]:>7}  {bar}".rstrip()


def _counts(counter: Counter[str], most: int = 8) -> str:
    common = [f"{count} {what}" for what, count in counter.most_common(most)]
    rest = len(counter) - most
    return ", ".join(common) + (f" and {rest} more" if rest > 0 else "")


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
