"""Trained models in the folder layout of diffusers: where one is, on this disk or downloaded by its hub name."""

import re
from collections.abc import Sequence
from pathlib import Path

from utils.utils_error import UserError


def model_folder(name: str, key: str, patterns: Sequence[str]) -> Path:
    """The folder of a model: ``name`` itself, or the hub client's copy of it, downloaded the first time.

    Args:
        name: a folder, or ``owner/model`` of the hub.
        key: the option that names it, for the error.
        patterns: which files are needed, as in ``vae/*``.

    Raises:
        UserError: neither a folder nor to be had from the hub.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{key}: {name} is a file, expected a folder in the layout of diffusers")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"{key}: {name}: no such folder, nor a hub's name (owner/model)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{key}: {name}: no such folder, and downloading it needs huggingface_hub; "
            "python -m pip install -r requirements-extra.txt"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # what the client raises changes from version to version
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{key}: {name}: no such folder, and it cannot be downloaded ({reason}); download it elsewhere and give "
            "its folder"
        ) from error
