"""What a test has restored so far: a manifest beside the images, by which the same command goes on.

``restored.jsonl`` in the folder of the results has a line for each image, which is on the disk before the image is put
in place: what made it, of what, and the SHA-256 of its file. What was killed at any moment so leaves images that are
whole and known; an image that no line knows somebody else has put there or changed.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from evaluation.report import RESULTS
from models.restorer import Restorer
from models.sampler import DiffusionSampler
from utils.utils_checkpoint import DamagedError, Fingerprint
from utils.utils_error import UserError
from utils.utils_image import imread_uint, write_file
from utils.utils_name import output_path
from utils.utils_run import write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "restored.jsonl"
LOCK = "test.lock"

# ------------------------------------------------------------------------------------------------ what makes an image


def made_by(model: Restorer, device: torch.device, **settings: Any) -> dict[str, str]:
    """All that decides what ``model`` makes of an L, as short texts; equal where its images are.

    Weights count by their values, options as they were resolved, the program by its code.

    Args:
        settings: what else is chosen: tiles, precision.
    """
    weights, netG = hashlib.sha256(), model.netG
    for name, value in chain(netG.named_parameters(), netG.named_buffers()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    options: dict[str, Any] = {**model.options, **settings}
    if isinstance(netG, DiffusionSampler):
        options |= {"timesteps": list(netG.timesteps), "seed": netG.seed}
    return {
        "weights": weights.hexdigest(),
        "options": hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest(),
        "program": _program(),
        "libraries": f"torch {torch.__version__}, opencv {cv2.__version__}, numpy {np.__version__}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


@cache
def _program() -> str:
    """By the code from files to restored images: git's commit says nothing of changes that are not committed."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    rooms = (sorted((root / room).rglob("*.py")) for room in ("data", "models", "utils"))
    for path in chain(*rooms, [root / "evaluation" / "run.py"]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def digest_of(item: Mapping[str, Any]) -> str:
    """SHA-256 of what a data set's item gives to restoring: the pixels of L, and what else of its file is kept."""
    L, extras = item["L"].numpy(), item["L_extras"]
    digest = hashlib.sha256(f"{L.dtype} {L.shape} {extras.bits} {extras.icc!r} {extras.cicp!r}".encode())
    for array in (L, *(() if extras.alpha is None else (extras.alpha,))):
        digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- manifest


class Place(NamedTuple):
    """Of a restored image in the folder for the results."""

    label: str  # of the model
    set_name: str
    name: str

    @property
    def path(self) -> str:
        """Below the folder."""
        return "/".join((*self[:2], f"{self.name}.png"))


@dataclass(frozen=True)
class Line:
    """What the manifest says of an image."""

    image: str  # its path in the folder
    by: dict[str, str]  # of made_by
    L: str  # of digest_of
    size: int  # bytes of its file
    sha256: str
    finite: bool  # whether it is what the model made, without NaN

    @property
    def file(self) -> Fingerprint:
        """By which its file is known."""
        return Fingerprint(self.size, self.sha256)


class Manifest:
    """The manifest of a folder of results in which no other process works; its images are written through it.

    Args:
        folder: where the results go; it exists.
        places: of all images that will be there.
        made: label -> :func:`made_by`, of each model.
        overwrite: restore all of them, and replace what others have put there.
        check: called before an image is written; raises where another process has taken the folder over.

    Raises:
        UserError: the manifest cannot be read, or there is an image of somebody else and ``overwrite`` is false.
    """

    def __init__(
        self,
        folder: Path,
        places: Sequence[Place],
        made: Mapping[str, dict[str, str]],
        overwrite: bool,
        check: Callable[[], None],
    ) -> None:
        self.folder, self.images = folder, [place.path for place in places]
        self._made, self._check = made, check
        self._path = output_path(folder, MANIFEST)
        self._lines: dict[str, list[Line]] = {}
        self._in_place: dict[str, Fingerprint] = {}
        self._lock = threading.Lock()
        with suppress(FileNotFoundError):
            for text in self._path.read_bytes().split(b"\n"):
                if line := _parse(text):
                    self._lines.setdefault(line.image, []).append(line)
        foreign = [] if overwrite else [path for path in map(self._look, self.images) if path]
        if foreign:
            others = f" (nor are {len(foreign) - 1} others)" if len(foreign) > 1 else ""
            raise UserError(
                f"{foreign[0]} is not as this program wrote it, or was here before {MANIFEST}{others}: move it away, "
                f"give another folder for the results, or --overwrite"
            )
        self._remove_parts()

    def _look(self, image: str) -> Path | None:
        """Take up the file of an image, if there is one; its path where it is somebody else's."""
        path = output_path(self.folder, image)
        if not path.exists():
            return None
        for line in reversed(self._lines.get(image, [])):
            with suppress(DamagedError):
                line.file.check(path)
                self._in_place[image] = line.file
                return None
        if not _is_damaged(path):
            return path
        logger.warning("%s is damaged: it is restored again", path)
        return None

    def _remove_parts(self) -> None:
        """Remove what a process that was killed has written of a file."""
        of_folder = {self.folder: {MANIFEST, *RESULTS}}
        for path in map(self.folder.joinpath, self.images):
            of_folder.setdefault(path.parent, set()).add(path.name)
        for folder, names in of_folder.items():
            for part in folder.glob("*.part"):
                match = re.fullmatch(r"(.+)\.\d+\.part", part.name)
                if match and names & {match[1], match[1].removeprefix(".")}:
                    part.unlink(missing_ok=True)

    def find(self, place: Place, L: str) -> Line | None:
        """The line of an image that is in place, made by the same of the same; None where it is to be restored.

        Args:
            L: what it is made of, :func:`digest_of`.
        """
        lines, wanted = self._lines.get(place.path, []), (self._in_place.get(place.path), self._made[place.label], L)
        return next((line for line in lines if (line.file, line.by, line.L) == wanted), None)

    def put(self, place: Place, L: str, content: bytes, finite: bool) -> None:
        """Write an image's file, whole or not at all, and before that its line; threads may, each its own image.

        Args:
            L: as for :meth:`find`.
            content: of the file.
            finite: see :class:`Line`.
        """
        image, path = place.path, output_path(self.folder, place.path)
        sha256 = hashlib.sha256(content).hexdigest()
        line = Line(image, self._made[place.label], L, len(content), sha256, finite)
        self._check()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self._path.open("a+b", buffering=0) as file:
            # In one piece, on a line of its own even after half a line of a process that was killed.
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(begin + _text(line))
            os.fsync(file.fileno())
        write_file(content, str(path))
        with self._lock:
            self._lines.setdefault(image, []).append(line)
            self._in_place[image] = line.file

    def tidy(self) -> None:
        """Once all images are in place: leave a line for each, in their order, after those of other images.

        Raises:
            UserError: the manifest cannot be written.
        """
        own = set(self.images)
        others = [line for image, lines in self._lines.items() if image not in own for line in lines]
        theirs = ([line for line in self._lines[image] if line.file == self._in_place[image]] for image in self.images)
        self._check()
        write_atomically(b"".join(map(_text, chain(others, (lines[-1] for lines in theirs)))).decode(), self._path)


def _text(line: Line) -> bytes:
    return json.dumps(asdict(line)).encode("ascii") + b"\n"


def _parse(text: bytes) -> Line | None:
    """None for what is no line: the last one of a process that was killed may be half a line."""
    try:
        line = Line(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    return line if isinstance(line.image, str) else None


def _is_damaged(path: Path) -> bool:
    """Whether a file is what a disk that failed has left of a PNG, and nobody's work."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return False
    if head.strip(b"\0") not in (b"", b"\x89PNG\r\n\x1a\n"):
        return False
    try:
        imread_uint(str(path))
    except UserError:
        return True
    return False
