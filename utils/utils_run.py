"""What makes a run repeatable, and writing files that are never half written."""

import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from utils.utils_error import UserError

# ------------------------------------------------------------------------------------------------------------- facts


def run_facts(device: torch.device | None = None) -> dict[str, str]:
    """What a result depends on besides options and data: code, libraries, hardware, command, date.

    Args:
        device: where it ran; None = the first GPU, or the CPU where there is none.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{platform.machine()} CPU",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def unused_gpu() -> str | None:
    """Why this PyTorch sees no GPU where NVIDIA's driver is installed; None where it sees one, or was told not to."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    why = "newer than the driver can serve" if torch.version.cuda else "built without CUDA"
    return f"PyTorch {torch.__version__} sees no GPU though NVIDIA's driver is here: is it {why}? see pytorch.org"


@cache  # a process goes on with the code that it began with, whatever is checked out meanwhile
def _git_commit() -> str:
    """The commit of this project, with ``-dirty`` where files differ from it; "unknown" outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # else git would name the commit of a repository around this folder
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ----------------------------------------------------------------------------------------------------------- writing


def write_atomically(text: str, path: Path) -> None:
    """Write a UTF-8 text file; at every moment the old file or the new one is there, whole.

    What UTF-8 lacks, as in file names of other encodings, is written as ``\\udce9``.

    Raises:
        UserError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave the new name without content
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Have the names of what was written in a folder on the disk before others are removed, where the system can."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems refuse it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_json(content: Any, path: Path) -> None:
    """Write ``content`` by :func:`write_atomically` as :func:`to_json` has it."""
    write_atomically(to_json(content, indent=2) + "\n", path)


def to_json(content: Any, **layout: Any) -> str:
    """``content`` as JSON, laid out as ``json.dumps`` is told; numbers that JSON lacks (NaN, infinity) become null."""
    return json.dumps(_finite(content), allow_nan=False, default=str, **layout)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
