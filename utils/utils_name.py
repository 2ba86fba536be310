"""Names come from strangers' folders, archives and options: how they are shown, and where files may be written.

A name that cannot be trusted is made one folder's or file's name (:func:`safe_name`) before it becomes part of a path;
:func:`output_path` is the only way from names to a file that this program writes beside others.
"""

import os
import re
import sys
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

from utils.utils_error import UserError, printable
from utils.utils_lmdb import split_path

# What Windows keeps for devices, with any suffix.
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(?=\.|$)", re.IGNORECASE)


def safe_name(name: str) -> str:
    """``name`` as the name of one folder or file that is right on every system and stays where it is put.

    A name that is right already is returned as it is. Separators, drive letters' colons, wildcards and characters that
    cannot be shown become "_"; ``..``, ``CON``, spaces and dots at the end are changed too. Never empty.
    """
    name = re.sub(r'[<>:"/\\|?*]', "_", name)
    name = "".join(c if printable(c) == c else "_" for c in name)
    name = re.sub(r"^\s+", "", re.sub(r"[\s.]+$", lambda end: "_" * len(end[0]), name))
    return f"_{name}" if not name or _DEVICES.match(name) else name


def folded(name: str) -> str:
    """Equal for names that some file systems take for one: they differ in case or in how accents are written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def output_path(folder: Path, *names: str, inputs: Collection[str | Path] = ()) -> Path:
    """``folder/names[0]/names[1]/...``, a file to write.

    A name may hold ``/`` between sub-folders, but must not lead out of ``folder``; nor may links that are there.

    Args:
        folder: where the results go; it may be a link.
        inputs: files that must not be met, under whatever name.

    Raises:
        UserError: the file would lie outside of ``folder``, or is one of the ``inputs``.
    """
    parts = [part for name in names for part in name.split("/")]
    remedy = "rename that, or give another folder for the results"
    if any(part in ("", ".", "..") or "\0" in part or Path(part).name != part for part in parts):
        raise UserError(f"{'/'.join(names)!r} cannot be the name of a file in {folder}: {remedy}")
    path = folder.joinpath(*parts)
    home, place = os.path.realpath(folder), os.path.realpath(path)
    if not Path(place).is_relative_to(home):
        raise UserError(f"{path} leads out of {folder}, to {place}: remove that link, or give another folder")
    if inputs and os.path.exists(path) and any(os.path.exists(i) and os.path.samefile(i, path) for i in inputs):
        raise UserError(f"{path} is one of the inputs: name another file for the results")
    return path


def cell(text: str) -> str:
    """``text`` for a table that a spreadsheet may open: what would be a formula there gets a ``'`` in front."""
    first = unicodedata.normalize("NFKC", text[:1])  # full-width signs count too
    return f"'{text}" if first in tuple("=+-@\t\r\n") else text


def output_names(paths: Sequence[str], roots: Sequence[str]) -> list[str]:
    """For each image the name of its result, ``sub/folder/stem``: its path below the root that holds it.

    Files of a folder keep their names. The keys of LMDB folders, which can hold anything, are made names of files.

    Raises:
        UserError: two images would have results of one name.
    """
    order = {root: i for i, root in reversed([*enumerate(map(Path, roots))])}
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path in map(Path, paths):
        root = min((p for p in (path, *path.parents) if p in order), key=order.__getitem__)
        parts = (path.relative_to(root) if path != root else Path(path.name)).with_suffix("").parts
        if split_path(path):
            parts = tuple(safe_name(part) for part in parts)
        name = "/".join(parts)
        key = folded(name) if sys.platform in ("win32", "darwin") else name
        if key in taken:
            raise UserError(f"{path} and {taken[key]}: both would be saved as {name}.png; rename one")
        names[name] = taken[key] = str(path)
    return list(names)


def check_output(output: Path, inputs: Sequence[str], roots: Sequence[str], names: Sequence[str] = ()) -> None:
    """Results must stay clear of the input images, now and when the same command runs again.

    Folders are compared as the system knows them: links, mounts and spelling do not hide that two are one.

    Args:
        output: the folder for the results.
        inputs: the images, below the folders or files ``roots``.
        names: of files that will be written below ``output``, as far as they are known.

    Raises:
        UserError: ``output`` is no folder, holds one of the ``inputs`` or lies in one of the folders ``roots``, or one
            of the ``names`` leads out of it.
    """
    remedy = "give another folder for the results"
    for parent in [output.absolute(), *output.absolute().parents]:
        if os.path.lexists(parent) and not parent.is_dir():
            raise UserError(f"{output}: {parent} is a {'link to nowhere' if parent.is_symlink() else 'file'}; {remedy}")
    folder = output.resolve()
    identities: dict[Path, tuple[int, int] | None] = {}

    def identity(place: Path) -> tuple[int, int] | None:
        if place not in identities:
            try:
                status = place.stat()
                identities[place] = (status.st_dev, status.st_ino)
            except OSError:  # not there yet, or an image of an LMDB folder
                identities[place] = None
        return identities[place]

    here = identity(folder)
    folder_of = {path: Path((split_path(path) or (os.path.dirname(path), ""))[0]).resolve() for path in inputs}
    for path, its_folder in folder_of.items():
        parents = (its_folder, *its_folder.parents)
        if folder in parents or (here and here in map(identity, parents)):
            raise UserError(f"{output}: holds the input image {path}; {remedy}")
    above = [place for place in map(identity, folder.parents) if place]
    for root in roots:
        place = Path(root).resolve()
        if place in folder.parents or identity(place) in above:
            raise UserError(f"{output}: lies among the input images in {root}; {remedy}")
    holding = {identity(its_folder): path for path, its_folder in folder_of.items()}
    for folder in dict.fromkeys(output_path(output, name).parent for name in names):
        if (met := identity(folder)) and met in holding:
            raise UserError(f"{folder}: holds the input image {holding[met]}; {remedy}")
