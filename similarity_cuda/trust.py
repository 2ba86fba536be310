"""Built kernels are trusted after they have proved themselves on the device at hand (proof.py).

The proof runs in a process of its own, once for a library and a device, and leaves a mark beside the library: a crash
costs that process only, and the next start reads the mark. A mark of failure is kept as well; another build, GPU or
driver has another mark, and ``python -m similarity_cuda`` proves again.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_SECONDS = 300  # for a proof of a second or two: PyTorch may be on a slow disk, the GPU busy
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE", "SIGTRAP")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mark:
    library: str  # size and time of the file: a rebuilt one has the same name
    device: str
    wrong: str  # "" where nothing is
    errors: list[float]  # of proof.QUANTITIES in float32, where the proof came to its end


class UnprovenError(RuntimeError):
    """A proof could not be made, for want of memory, say: nothing is known of the kernels or remembered."""


def device(kind: str) -> str:
    """What a proof holds for, besides the library: the current GPU's model, its driver and runtime."""
    if kind == "cpp":
        return "the CPU"  # the library's name has its model
    driver = str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())  # the CUDA that it knows
    with contextlib.suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return f"{torch.cuda.get_device_name()} (driver {driver}, CUDA {torch.version.cuda})"


def _path(kind: str, library: Path) -> Path:
    return library.with_suffix(f".{hashlib.sha256(device(kind).encode()).hexdigest()[:8]}.proof")


def _stamp(library: Path) -> str:
    status = library.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


def read(kind: str, library: Path) -> Mark | None:
    """The mark of this very library on this device; None if there is none that can be read."""
    try:
        mark = Mark(**json.loads(_path(kind, library).read_text(encoding="utf-8")))
        return mark if (mark.library, mark.device) == (_stamp(library), device(kind)) else None
    except (OSError, ValueError, TypeError):
        return None


def forget(kind: str, library: Path) -> None:
    """Let the next to ask prove again."""
    _path(kind, library).unlink(missing_ok=True)


def prove(kind: str, library: Path) -> Mark:
    """Prove a library and leave the mark, if the folder can be written. The caller holds the library's lock.

    Raises:
        UnprovenError: see there.
    """
    _logger.info("checking the self-similarity op on %s, once", device(kind))
    wrong, errors = _verdict(kind, library)
    mark = Mark(_stamp(library), device(kind), wrong, errors)
    if can_keep(library):
        path = _path(kind, library)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(mark)), encoding="utf-8")
        os.replace(unfinished, path)
    return mark


def can_keep(library: Path) -> bool:
    """Whether a mark can be left; a library in a folder of others is proved at each start."""
    return os.access(library.parent, os.W_OK)


def _command(kind: str, library: Path) -> list[str]:
    number = str(torch.cuda.current_device()) if kind == "cuda" else "0"
    return [sys.executable, "-m", "similarity_cuda.proof", kind, str(library.resolve()), number]


def _verdict(kind: str, library: Path) -> tuple[str, list[float]]:
    """Run the proof; -> (what is wrong, the errors)."""
    folder = Path(__file__).resolve().parent.parent  # where the child finds this package, and nobody else's
    try:
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])  # for PYTHONSAFEPATH
        done = subprocess.run(
            _command(kind, library),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"they did not end within {_SECONDS:g} seconds", []
    said = next(reversed(done.stderr.strip().splitlines()), "it said nothing")
    if done.returncode == 0:
        with contextlib.suppress(IndexError, ValueError, KeyError, TypeError):
            verdict = json.loads(done.stdout.splitlines()[-1])
            return str(verdict["wrong"]), [float(error) for error in verdict["errors"]]
        return f"their process ended without a verdict: {said}", []
    how = _ending(done.returncode)
    if how in _CRASHES or done.returncode > 255:  # so Windows numbers crashes
        return f"they crash with {how}", []
    raise UnprovenError(f"the kernels could not be proved now, {how}: {said}")


def _ending(status: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"status {status}"
