"""Many images in one file: an LMDB folder, BasicSR's and KAIR's form, that reads like a folder of images.

``X.lmdb`` holds ``data.mdb``, whose keys are the images' names without suffix (``sub/0001``) and whose values are whole
encoded files, and ``meta_info.txt``, a line ``sub/0001.png (height,width,channels) 1`` for each. Elsewhere in this
project such an image has the path ``X.lmdb/sub/0001.png``.
"""

import os
import threading
from typing import Any

from utils.utils_error import UserError, check_regular

META = "meta_info.txt"
MAX_FILE = 1 << 32  # bytes of an image's file; the largest images that are read have 2 GiB
_open: dict[str, Any] = {}  # this process's, by folder
_opening = threading.Lock()  # LMDB opens a folder once a process


def import_lmdb() -> Any:
    """The package, or a UserError that says how to get it."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(
            "LMDB folders need the package lmdb: python -m pip install -r requirements.txt, or name a plain folder"
        ) from error
    return lmdb


def is_lmdb(folder: str) -> bool:
    """Whether a folder is called as an LMDB folder is."""
    return folder.rstrip("/" + os.sep).endswith(".lmdb")


def split_path(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """``X.lmdb/sub/0001.png`` to ``("X.lmdb", "sub/0001")``; None for any other path."""
    path = os.fspath(path).replace(os.sep, "/")
    folder, found, name = path.partition(".lmdb/")
    return (f"{folder}.lmdb", os.path.splitext(name)[0]) if found else None


def list_lmdb(folder: str) -> list[str]:
    """The paths of all images of an LMDB folder, in the order of their keys.

    Raises UserError for a folder without ``meta_info.txt``: it is written last, so the packing was cut short.
    """
    for name in (META, "data.mdb"):
        check_regular(os.path.join(folder, name))
    try:
        with open(os.path.join(folder, META), encoding="utf-8", errors="surrogateescape") as file:
            names = [line.rsplit(" (", 1)[0] for line in file.read().split("\n") if line]
    except OSError as error:
        raise UserError(
            f"{folder} has no {META}, so it is not finished: run the command that makes it again "
            f"(main_prepare_data.py lmdb), or remove it"
        ) from error
    return [f"{folder}/{name}" for name in names]


def read_lmdb(folder: str, key: str) -> bytes:
    """The encoded file of ``key``, as it was stored. Raises UserError where there is none."""
    lmdb = import_lmdb()
    with _opening:
        env = _open.get(folder)
        if env is None:
            try:
                # Without locks and read-ahead: many processes read at random places, none writes.
                env = lmdb.open(folder, readonly=True, create=False, lock=False, readahead=False, meminit=False)
            except lmdb.Error as error:
                raise UserError(f"{folder} cannot be opened as LMDB ({error}): pack it again") from error
            _open[folder] = env
    try:
        with env.begin(buffers=True) as transaction:
            value = transaction.get(key.encode(errors="surrogateescape"))
            if value is None:
                raise UserError(f"{folder} holds nothing under the key {key!r}, though {META} names it: pack it again")
            if len(value) > MAX_FILE:
                raise UserError(f"{folder}: {key!r} has {len(value) / 2**30:,.0f} GiB, more than images may have")
            return bytes(value)
    except lmdb.Error as error:
        raise UserError(f"{folder}: {key!r} cannot be read ({error}): pack it again") from error


def close_all() -> None:
    """Close what :func:`read_lmdb` holds open; it opens again by itself."""
    while _open:
        _open.popitem()[1].close()


def _begin_anew() -> None:
    """A forked worker must not use what its parent has opened, and could not open it a second time."""
    global _opening
    _opening = threading.Lock()  # the parent's may be held by a thread that is not here
    close_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
