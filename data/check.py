"""Look at every file of a data set before work starts: better one line now than a crash at iteration 90,000.

Two kinds of trouble. A file that cannot be read (empty, damaged, cut short) is named and left out, and stops nothing:
in the test phase its item is not there, in the train phase another image takes its place. An image that is too small,
has no partner or a partner of another size says that the data set is not what its options say: that ends the program.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from data.files import Files, list_files, quote, raise_problems
from utils.utils_error import UserError
from utils.utils_image import FIRST_OF_SEVERAL, decode, dropped, get_image_paths, image_size, read_file, read_mask
from utils.utils_npy import RAW_SUFFIX
from utils.utils_option import DatasetOptions

logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


class Problems(NamedTuple):
    """A line for each: ``unreadable`` files, and everything ``wrong`` with files that can be read."""

    unreadable: list[str]
    wrong: list[str]


def check_dataset(dataset_opt: DatasetOptions) -> None:
    """Raise one UserError that counts what is wrong and names the first few; only warn of unreadable training images.

    Those of the test phase are not mentioned: the data set has left them out and said so. Raises UserError too where
    not one item is readable.
    """
    problems, lost = _look(dataset_opt)
    raise_problems(problems.wrong, dataset_opt.phase)
    if problems.unreadable and dataset_opt.phase == "train":
        logger.warning("left out, others take their places: %s", quote(problems.unreadable, "train"))
    if dataset_opt.phase == "train":
        for phrase, count in Counter(lost.values()).items():
            logger.warning("%d of the train images %s", count, phrase)


def find_problems(dataset_opt: DatasetOptions) -> Problems:
    """What is the matter with a data set: files that cannot be read, too small ones, partners missing or of wrong size.

    Every file is decoded, since a file cut short has a perfect header; only that of a raw image accounts for all its
    bytes. Raises UserError for missing or empty folders
    and where nothing at all can be read.
    """
    return _look(dataset_opt)[0]


def _look(opt: DatasetOptions) -> tuple[Problems, dict[str, str]]:
    """:func:`find_problems`, and by path what is dropped of images, see utils_image.dropped."""
    missing: list[str] = []
    if opt.dataset_type == "l":
        items = [Files(path, None, None) for path in get_image_paths(opt.dataroot_L)]
    else:
        items, missing = list_files(opt)
    looked = _map(lambda files: _problems_of(files, opt), items, "checking images")
    found = [problems for problems, _ in looked]
    unreadable = [problem for problems in found for problem in problems.unreadable]
    if items and all(problems.unreadable for problems in found):
        raise UserError(f"none of the {opt.phase} images can be read: {quote(unreadable, opt.phase)}")
    wrong = [*missing, *(problem for problems in found for problem in problems.wrong)]
    problems = Problems(list(dict.fromkeys(unreadable)), list(dict.fromkeys(wrong)))  # a file may be in several items
    return problems, {path: phrase for _, lost in looked for path, phrase in lost.items()}


def leave_out_unreadable(items: Sequence[Files], phase: str, n_channels: int) -> list[Files]:
    """The items of which every file can be read; warns of the others. Raises UserError where there are none."""
    found = _map(lambda files: _read(files, n_channels), items, f"reading {phase} images")
    unreadable = list(dict.fromkeys(line for _, lines in found for line in lines))
    readable = [files for files, (_, lines) in zip(items, found, strict=True) if not lines]
    if unreadable and not readable:
        raise UserError(f"none of the {phase} images can be read: {quote(unreadable, phase)}")
    if unreadable:
        logger.warning("left out: %s", quote(unreadable, phase))
    several = sorted({path for seen, _ in found for path, image in seen.items() if FIRST_OF_SEVERAL in image.dropped})
    if several:
        logger.warning("%d of the %s images (%s, ...) %s", len(several), phase, several[0], FIRST_OF_SEVERAL)
    return readable


def _map(function: Callable[[_Item], _Found], items: Sequence[_Item], what: str) -> list[_Found]:
    # OpenCV decodes outside the interpreter lock; a few threads, for each holds a whole image
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=what, disable=len(items) <= 2000))


def _problems_of(files: Files, opt: DatasetOptions) -> tuple[Problems, dict[str, str]]:
    seen, unreadable = _read(files, opt.n_channels)
    H, L, mask = (seen[path].size if path in seen else None for path in files)
    wrong = []
    if H:
        height, width = H
        is_rank = opt.dataset_type == "rank"
        scale = 1 if is_rank else opt.scale  # H and L are of one size
        smallest = opt.H_size if opt.phase == "train" else {"l": 1, "rank": 32}.get(opt.dataset_type, scale)
        if min(H) < smallest:
            what = "H_size" if opt.phase == "train" else "the ranker's" if is_rank else "the scale"
            wrong.append(f"{files.H} ({_size(H)}): smaller than {what} {smallest}")
        if L and (height // scale, width // scale) != L:
            part = "the size" if scale == 1 else f"1/{scale}"
            wrong.append(f"{files.L} ({_size(L)}): not {part} of {files.H} ({_size(H)})")
        if mask and mask != H:
            wrong.append(f"{files.mask} ({_size(mask)}): not the size of {files.H} ({_size(H)})")
    return Problems(unreadable, wrong), {path: image.dropped for path, image in seen.items() if image.dropped}


class _Seen(NamedTuple):
    """What is remembered of a file that can be read."""

    size: tuple[int, int]  # height, width
    dropped: str  # "" for nothing


def _read(files: Files, n_channels: int) -> tuple[dict[str, _Seen], list[str]]:
    """What was seen of each file that can be read, and a line for each that cannot."""
    seen, unreadable = {}, []
    for path in filter(None, files):
        try:
            status = os.stat(path) if os.path.exists(path) else None  # none: an image of an LMDB folder
            stamp = (status.st_mtime_ns, status.st_size) if status else (0, 0)
            seen[path] = _see(path, path == files.mask, n_channels, stamp)
        except UserError as error:
            unreadable.append(str(error))
    return seen, unreadable


@lru_cache(maxsize=1 << 16)
def _see(path: str, is_mask: bool, n_channels: int, _stamp: tuple[int, int]) -> _Seen:
    """Remembered, as long as the file is the same: a test set is looked at when it is built and when it is checked."""
    if is_mask:
        height, width = read_mask(path).shape
        return _Seen((height, width), "")
    if path.lower().endswith(RAW_SUFFIX) and os.path.exists(path):  # its header accounts for every byte
        return _Seen(image_size(path), "")
    data = read_file(path)
    height, width = decode(data, path, n_channels).shape[:2]
    return _Seen((height, width), " and ".join(dropped(data, path)))


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
