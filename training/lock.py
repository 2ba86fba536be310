"""One run, one folder: the lock of the process that writes into it, and what dead ones have left there."""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

from utils.utils_error import UserError

logger = logging.getLogger(__name__)

BEAT = 15.0  # seconds between two signs of life
LIMIT = 180.0  # without one for so long, a process that cannot be asked for counts as dead


class FolderLock:
    """A file that one process at a time can create; it names its owner, and the owner touches it every :data:`BEAT`.

    It is taken over from an owner that is dead: on the same system where its number is gone or another process's, else
    where there was no sign of life for :data:`LIMIT`, or where the owner is an earlier attempt of the same job of SLURM
    or torchrun. It needs nothing of the file system but that a file is created by one process alone.

    Args:
        path: of the lock.
        other: what to choose another of, for the remedy where the folder is another process's.
    """

    def __init__(self, path: Path, other: str = "task") -> None:
        self.path, self.other = path, other
        self._text = ""  # of the lock that is ours
        self._released = threading.Event()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether this process has taken it and not released it."""
        return bool(self._text)

    def take(self) -> None:
        """Become the owner, until :meth:`release` or the end of the process.

        Raises:
            UserError: another process is the owner and not known to be dead, or the file cannot be written.
        """
        text = json.dumps(_identity())
        while not self._create(text):
            other = self._read()
            if other is None:  # released at this moment
                continue
            owner = _parse(other)
            what = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
            why = self._why_dead(owner)
            if why is None:
                raise UserError(
                    f"{self.path.parent}: {what} works in this folder since {owner.get('since', 'a moment ago')}; end "
                    f"it or choose another {self.other}; where it is gone and cannot be asked for, wait "
                    f"{LIMIT / 60:g} minutes or remove {self.path.name}"
                )
            self._remove(other)
            logger.warning("%s: taken over from %s: %s", self.path, what, why)
        self._text, self._released = text, threading.Event()
        threading.Thread(target=self._beat, args=(text, self._released), daemon=True).start()

    def check(self) -> None:
        """To be called before anything is written over.

        Raises:
            UserError: another process has become the owner, taking this one for dead.
        """
        if self._text and self._read() not in (self._text, None):
            self._text = ""
            raise UserError(
                f"{self.path}: another process took this one for dead and works in the folder now: this one stops and "
                f"writes nothing more"
            )
        if self._text:
            self._create(self._text)  # removed by hand

    def release(self) -> None:
        """Remove the lock if it is this process's."""
        text, self._text = self._text, ""
        self._released.set()
        if text and self._read() == text:
            with suppress(OSError):
                self.path.unlink()

    def _create(self, text: str) -> bool:
        """Whether the file was not there before."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                try:
                    file.write(text)
                    file.flush()
                except OSError:
                    self.path.unlink(missing_ok=True)
                    raise
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        return True

    def _read(self) -> str | None:
        """The lock's text; "" where it is still empty after a while, None where there is no lock."""
        for _ in range(20):
            try:
                text = self.path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                return None
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from error
            if text:
                break
            time.sleep(0.05)  # its owner is about to write it
        return text

    def _remove(self, dead: str) -> None:
        """Remove the lock of a dead process, and never one that was created since."""
        with FolderLock(self.path.with_name(f"{self.path.name}.over")) as right:
            right.take()
            if self._read() == dead:
                self.path.unlink()

    def _why_dead(self, owner: Mapping[str, object]) -> str | None:
        """None where it is alive or may be."""
        pid, attempt = owner.get("pid"), owner.get("attempt")
        if owner.get("system") == _system() and isinstance(pid, int):
            started = _started(pid)
            if started == "":
                return "that process is gone"
            if started and owner.get("started"):
                return None if started == owner["started"] else "that number is now another process's"
        job = _job()
        if job and owner.get("job") == job[0] and isinstance(attempt, str) and attempt < job[1]:
            return "it is an earlier attempt of this job"
        age = self._age()
        return f"no sign of life for {age / 60:.0f} minutes" if age > LIMIT else None

    def _age(self) -> float:
        """Seconds since the last sign of life by the clock of the file system, which need not be this machine's."""
        probe = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except OSError:
            return 0.0
        finally:
            with suppress(OSError):
                probe.unlink()

    def _beat(self, text: str, released: threading.Event) -> None:
        while not released.wait(BEAT):
            with suppress(OSError, UserError):
                if self._read() == text:
                    os.utime(self.path)


def _identity() -> dict[str, object]:
    job, attempt = _job() or ("", "")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().isoformat(sep=" ", timespec="seconds"),
        "started": _started(os.getpid()),
        "system": _system(),
        "job": job,
        "attempt": attempt,
        "token": uuid.uuid4().hex,  # two locks of one process are two
    }


def _parse(text: str) -> dict[str, object]:
    with suppress(ValueError, RecursionError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}


def _system() -> str:
    """Where numbers of processes mean something: a machine since it was started, in it a container."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(facts)


def _started(pid: int) -> str | None:
    """When a process of this system began, in its own count; "" = there is none, None = it cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # one that has ended, but was not asked for its status yet
    except (OSError, IndexError):
        if os.name == "nt":  # there, a signal 0 ends a process
            return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except OSError:
        pass
    return None


def _job() -> tuple[str, str] | None:
    """Which job of SLURM or torchrun this is part of, and its attempt, in the order of the alphabet.

    The next attempt starts when the last has ended.
    """
    get = os.environ.get
    elastic = get("TORCHELASTIC_RUN_ID", "none")
    job = f"{get('SLURM_JOB_ID', '')} {'' if elastic == 'none' else elastic}"
    numbers = [get("SLURM_RESTART_COUNT", "0"), get("TORCHELASTIC_RESTART_COUNT", "0")]
    if not job.strip() or not all(number.isdecimal() for number in numbers):
        return None
    return job, " ".join(number.zfill(9) for number in numbers)


def remove_parts(folders: Iterable[Path]) -> None:
    """Remove the half-written files, ``.{name}.{pid}.part``, of processes that are no more; the folders are locked."""
    for folder in folders:
        for path in folder.glob(".*.part"):
            pid = re.fullmatch(r"\..+\.(\d+)\.part", path.name)
            if pid and int(pid[1]) != os.getpid() and (_started(int(pid[1])) == "" or os.name == "nt"):
                with suppress(OSError):  # Windows cannot say whether it lives, but keeps the files of those that do
                    path.unlink()
                    logger.info("removed %s, which a process that is no more has left", path)
