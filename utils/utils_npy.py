"""Raw images: NumPy's own files, ``numpy.save`` of uint8 or uint16, of which a crop reads its rows alone.

``(H, W, C)`` of 1 or 3 channels, or gray ``(H, W)``, in C order. Files come from anywhere: the header is read first and
has to account for every byte of the file; nothing is unpickled.
"""

import os
from functools import lru_cache
from io import BytesIO
from math import prod
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from utils.utils_error import UserError, check_regular

Array = NDArray[Any]
RAW_SUFFIX = ".npy"


class NpyFacts(NamedTuple):
    """What the header of a raw image says."""

    shape: tuple[int, int, int]  # height, width, channels
    dtype: np.dtype[Any]
    offset: int  # of the first pixel, in bytes


def is_npy(data: NDArray[np.uint8]) -> bool:
    """Whether a file's bytes begin as those of ``numpy.save``."""
    return data[: len(npy.MAGIC_PREFIX)].tobytes() == npy.MAGIC_PREFIX


def npy_facts(path: str) -> NpyFacts:
    """The header of a raw image. Raises UserError for a file that is none, or has not the bytes that it tells of."""
    return _mapped(path)[0]


def map_npy(path: str) -> Array:
    """A raw image ``(H, W, C)``, mapped into memory, read-only: what is not looked at is not read.

    The file is closed when the last view of it is gone. Raises UserError as :func:`npy_facts`.
    """
    facts, mapped = _mapped(path, with_pixels=True)
    assert mapped is not None
    return mapped.reshape(facts.shape)


def _mapped(path: str, with_pixels: bool = False) -> tuple[NpyFacts, Array | None]:
    check_regular(path)
    try:
        with open(path, "rb") as file:
            facts = _facts(file, os.fstat(file.fileno()).st_size, path)
            if not with_pixels:
                return facts, None
            return facts, np.asarray(np.memmap(file, facts.dtype, "r", facts.offset, facts.shape))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def decode_npy(data: NDArray[np.uint8], path: str) -> Array:
    """A raw image ``(H, W, C)`` of a file's bytes, a view; ``path`` is for messages. Errors as :func:`npy_facts`."""
    facts = _facts(BytesIO(data[: 1 << 17].tobytes()), data.size, path)
    return data[facts.offset :].view(facts.dtype).reshape(facts.shape)


def encode_npy(img: Array) -> bytes:
    """The file of an image ``(H, W, C)``, or ``(H, W)``, which becomes ``(H, W, 1)``; uint8 or uint16."""
    file = BytesIO()
    npy.write_array(file, np.ascontiguousarray(img if img.ndim == 3 else img[..., None]), (1, 0), allow_pickle=False)
    return file.getvalue()


@lru_cache
def npy_size(shape: tuple[int, int, int], dtype: np.dtype[Any]) -> int:
    """Bytes of the file that :func:`encode_npy` makes."""
    header = BytesIO()
    npy.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": npy.dtype_to_descr(dtype)})
    return header.tell() + prod(shape) * dtype.itemsize


def _facts(file: IO[bytes], size: int, path: str) -> NpyFacts:
    """Read the header of a file of ``size`` bytes."""
    bad = UserError(f"{path} cannot be read: it is damaged, cut short or no file of numpy.save; make it again")
    try:
        if npy.read_magic(file) != (1, 0):  # headers above 64 KiB, or names of fields
            raise bad
        shape, is_fortran, dtype = npy.read_array_header_1_0(file)
    except (OSError, UserError):
        raise
    except Exception as error:  # NumPy meets a damaged header with whatever its parser stumbled over
        raise bad from error
    remedy = "raw images are uint8 or uint16, (H, W, 3), (H, W, 1) or (H, W), in C order"
    if dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path} holds {str(dtype)[:40]} values: {remedy}")
    if is_fortran:
        raise UserError(f"{path} is in Fortran order: {remedy}; save numpy.ascontiguousarray of it")
    if len(shape) not in (2, 3) or min(shape) < 1 or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise UserError(f"{path} has the shape {str(shape)[:40]}: {remedy}")
    height, width, channels = *map(int, shape[:2]), int(shape[2]) if len(shape) == 3 else 1
    offset = file.tell()
    if size != offset + height * width * channels * dtype.itemsize:
        raise UserError(
            f"{path} has {size:,} bytes, which are not {width}x{height} pixels: it is cut short; make it again"
        )
    return NpyFacts((height, width, channels), dtype, offset)
