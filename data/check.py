"""Look at every file of a data set before training starts: better one line now than a crash at iteration 90,000."""

import os
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from data.files import Files, list_files, raise_problems
from utils.utils_error import UserError
from utils.utils_image import Array, get_image_paths, imread_uint, read_mask
from utils.utils_option import DatasetOptions


def check_dataset(dataset_opt: DatasetOptions) -> None:
    """Raise one UserError that counts what :func:`find_problems` finds and names the first few; return if nothing."""
    raise_problems(find_problems(dataset_opt), dataset_opt.phase)


def find_problems(dataset_opt: DatasetOptions) -> list[str]:
    """A line for every image that is unreadable, too small, without a partner or of another size than its partner.

    Every file is decoded, since a file cut short has a perfect header. Raises UserError for missing or empty folders.
    """
    opt = dataset_opt
    if opt.dataset_type == "l":
        problems: list[str] = []
        pairs = [Files(path, None, None) for path in get_image_paths(opt.dataroot_L)]
    else:
        pairs, problems = list_files(opt)
    # OpenCV decodes outside the interpreter lock; a few threads, for each holds a whole image
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda files: _problems_of(files, opt), pairs)
        progress = tqdm(found, total=len(pairs), desc="checking images", disable=len(pairs) <= 2000)
        return problems + [problem for some in progress for problem in some]


def _problems_of(files: Files, opt: DatasetOptions) -> list[str]:
    problems = []
    try:
        H = imread_uint(files.H, opt.n_channels)
    except UserError as error:
        return [str(error)]
    height, width = H.shape[:2]
    smallest = opt.H_size if opt.phase == "train" else 1 if opt.dataset_type == "l" else opt.scale
    if min(height, width) < smallest:
        what = "H_size" if opt.phase == "train" else "the scale"
        problems.append(f"{files.H} ({_size(H)}): smaller than {what} {smallest}")
    try:
        if files.L:
            L = imread_uint(files.L, opt.n_channels)
            if L.shape[:2] != (height // opt.scale, width // opt.scale):
                problems.append(f"{files.L} ({_size(L)}): not 1/{opt.scale} of {files.H} ({_size(H)})")
    except UserError as error:
        problems.append(str(error))
    try:
        if files.mask:
            mask = read_mask(files.mask)
            if mask.shape != (height, width):
                problems.append(f"{files.mask} ({_size(mask)}): not the size of {files.H} ({_size(H)})")
    except UserError as error:
        problems.append(str(error))
    return problems


def _size(img: Array) -> str:
    return f"{img.shape[1]}x{img.shape[0]}"
