"""From a folder of images to one LMDB folder."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data.preparation.run import IMAGE_ERRORS, SETTINGS, Outcome, Tally, check_settings, claim, one_line, run_all
from utils.utils_error import UserError, printable
from utils.utils_image import decode, get_image_paths, get_mask_paths, read_file, read_mask
from utils.utils_lmdb import META, import_lmdb
from utils.utils_name import check_output, output_names
from utils.utils_run import write_atomically

_UNFINISHED = "meta_info.unfinished"
_MAX_KEY = 511  # bytes, LMDB's limit


def pack_lmdb(inputs: Sequence[str], output: Path, are_masks: bool, workers: int, dry_run: bool) -> int:
    """Put images, or edge masks as PNG, into an LMDB folder ``X.lmdb`` (utils_lmdb.py); returns the exit status.

    The files go in as they are, each decoded once to see that it is sound. What is in already is skipped;
    ``meta_info.txt`` comes last, so that a folder with half of the images is not taken for whole.

    Raises UserError where nothing can be done, as :func:`data.preparation.run.prepare`.
    """
    if output.suffix != ".lmdb":
        raise UserError(f"--output {output}: the name of an LMDB folder ends in .lmdb")
    import_lmdb()  # before anything is written
    paths = (get_mask_paths if are_masks else get_image_paths)(list(inputs))
    # Keys stand in meta_info.txt, a line each, and other programs read them as UTF-8.
    names = [printable(name) for name in output_names(paths, inputs)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"several images would have the key {twice[0]} in {output}; rename one")
    check_output(output, paths, inputs, [SETTINGS, META, _UNFINISHED, "data.mdb", "lock.mdb"])
    settings = {"masks": are_masks}
    check_settings("lmdb", settings, inputs, output)
    tally = Tally("lmdb", output)
    meta = _MetaInfo(output)
    if dry_run:
        for path, name in zip(paths, names, strict=True):
            tally.add(Outcome(path, written=int(name not in meta), finished=int(name in meta)))
        return tally.report(would=True)
    claim("lmdb", settings, inputs, output)
    size = 2 * sum(os.path.getsize(path) for path in paths if os.path.exists(path)) + (64 << 20)
    with _writing(str(output), size) as writer:
        new = []
        for path, name in zip(paths, names, strict=True):
            if name in writer and name in meta:
                tally.add(Outcome(path, finished=1))
            else:
                new.append((path, name))
        for packed in run_all(partial(_pack, are_masks), new, workers, "lmdb"):
            tally.add(Outcome(packed.path, written=int(not packed.problem), problem=packed.problem))
            if not packed.problem:
                writer.put(packed.name, packed.content)
                meta.add(packed.name, packed.suffix, packed.shape)
    meta.finish()
    return tally.report()


class _Packed(NamedTuple):
    path: str
    name: str
    suffix: str
    content: bytes = b""
    shape: tuple[int, ...] = ()
    problem: str | None = None


def _pack(is_mask: bool, image: tuple[str, str]) -> _Packed:
    """Read and look at one file; in a worker."""
    path, name = image
    suffix = ".png" if is_mask else Path(path).suffix
    try:
        if len(name.encode()) > _MAX_KEY:
            raise UserError(f"{path}: LMDB takes names of {_MAX_KEY} bytes at most; rename it")
        if is_mask:
            mask = (255 * read_mask(path)).astype(np.uint8)
            return _Packed(path, name, suffix, cv2.imencode(".png", mask)[1].tobytes(), (*mask.shape, 1))
        content = read_file(path)
        return _Packed(path, name, suffix, content.tobytes(), decode(content, path, None).shape)
    except IMAGE_ERRORS as error:
        return _Packed(path, name, suffix, problem=one_line(path, error))


class _MetaInfo:
    """``meta_info.txt``, written last; until then its lines are collected in ``meta_info.unfinished``."""

    def __init__(self, folder: Path) -> None:
        self._path, self._unfinished = folder / META, folder / _UNFINISHED
        self._lines: dict[str, str] = {}
        for path in (self._path, self._unfinished):
            for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
                if line.endswith(") 1"):  # the last one may be cut short
                    self._lines[os.path.splitext(line.rsplit(" (", 1)[0])[0]] = line

    def __contains__(self, name: str) -> bool:
        return name in self._lines

    def add(self, name: str, suffix: str, shape: Sequence[int]) -> None:
        """``shape`` = (height, width, channels)."""
        self._lines[name] = f"{name}{suffix} ({','.join(map(str, shape))}) 1"
        with self._unfinished.open("a", encoding="utf-8", newline="") as file:
            file.write(f"\n{self._lines[name]}\n")  # after a line that was cut short, on a new one

    def finish(self) -> None:
        write_atomically("".join(f"{self._lines[name]}\n" for name in sorted(self._lines)), self._path)
        self._unfinished.unlink(missing_ok=True)


class _Writer:
    """What :func:`_writing` hands out: :meth:`put` keys in any order."""

    def __init__(self, folder: str, size: int) -> None:
        self._lmdb = import_lmdb()
        # Windows makes the file this large at once, and it does not shrink; elsewhere it grows as it is filled.
        self._env = self._lmdb.open(folder, map_size=max(size, 1 << 20))
        with self._env.begin() as transaction:
            self._keys = {bytes(key).decode() for key in transaction.cursor().iternext(values=False)}
        self._waiting: dict[str, bytes] = {}
        self._bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def put(self, key: str, value: bytes) -> None:
        self._waiting[key] = value
        self._bytes += len(value)
        if self._bytes > 64 << 20:
            self.commit()

    def commit(self) -> None:
        """Make all that was put survive a crash."""
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, value in self._waiting.items():
                        transaction.put(key.encode(), value)
                break
            except self._lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
        self._keys.update(self._waiting)
        self._waiting.clear()
        self._bytes = 0

    def close(self) -> None:
        self._env.close()


@contextmanager
def _writing(folder: str, size: int) -> Iterator[_Writer]:
    """Open ``folder`` for :class:`_Writer`, about ``size`` bytes to come; what was put is committed, come what may."""
    try:
        writer = _Writer(folder, size)
        try:
            yield writer
        finally:
            writer.commit()
            writer.close()
    except import_lmdb().Error as error:  # the file is damaged, or the disk is full
        raise UserError(f"{folder}: cannot be written as LMDB ({error}); see to the disk, or remove it") from error
