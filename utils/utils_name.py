"""Names come from strangers' folders, archives and options: how they are shown, and where files may be written.

A name that cannot be trusted is made one folder's or file's name (:func:`safe_name`) before it becomes part of a path;
:func:`output_path` is the only way from names to a file that this program writes beside others.
"""

import os
import re
import unicodedata
from collections.abc import Collection
from pathlib import Path

from utils.utils_error import UserError, printable

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
