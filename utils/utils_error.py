"""How a mistake of the user is reported: one line on standard error, exit status 2, no traceback."""

import argparse
import errno
import io
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, NoReturn


def printable(text: str, keep: str = "") -> str:
    """``text`` with what must not reach a terminal or a table as it is written out: ``\\n``, ``\\x1b``, ``\\udce9``.

    Those are control characters, line separators, what changes the direction of writing or cannot be seen, and the
    surrogates by which Python reads file names that are not UTF-8. The characters of ``keep`` stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_hidden(c) else c.encode("unicode_escape").decode() for c in text)


def _is_hidden(character: str) -> bool:
    # joiners are part of words and emoji
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def accept_all_characters() -> None:
    """Standard output and error write what their encoding lacks as ``\\xe9`` instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what is wrong, where, and the remedy.

    The names of files in it are shown :func:`printable`.
    """

    def __str__(self) -> str:
        return printable(re.sub(r"\s*\n\s*", " ", super().__str__()))


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise UserError for a pipe, a socket or a device: to open one can wait for ever, to read one need not end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # who opens it will say what is the matter
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{os.fspath(path)} is no file but a pipe, a socket or a device; name a file")


class ArgumentParser(argparse.ArgumentParser):
    """A parser for a script's command line whose complaints are one line too; its help keeps the docstring's lines."""

    def __init__(self, description: str | None = None, **settings: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":  # torchrun starts many; one of them answers
            super().print_help(file)


# What PyTorch, OpenCV, cuDNN and cuBLAS say where memory is short: no class of exception is common to them.
_NO_MEMORY = re.compile("allocate|out of memory|not enough memory|insufficient memory|ALLOC_FAILED", re.IGNORECASE)
_FAULTS_OF_A_PROGRAM = (None, errno.EBADF, errno.EINVAL, errno.EPIPE)


def tells_of_memory(error: BaseException) -> bool:
    """Whether NumPy, PyTorch, OpenCV or a library of theirs has found too little memory."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def explain(error: BaseException) -> str | None:
    """The one line for a mistake of the user or a want of the machine; None where the fault is the program's."""
    text = " ".join(str(error).split())
    kind, message = _in_worker(error) or (type(error).__name__, text)
    if isinstance(error, UserError):
        return message
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):  # it died without a traceback
        text = f"{text} {error.__cause__ or error.__context__ or ''}"
        if "bus error" in text.lower():
            return _NO_SHARED_MEMORY
        how = text.partition("killed by signal: ")[2].partition(".")[0].lower() or "it ended unexpectedly"
        return (
            f"a process that reads images was stopped ({how}), as systems do when memory runs out; lower "
            f"datasets.train.dataloader_num_workers or dataloader_batch_size"
        )
    if "shared memory" in message or "file </torch_" in message:
        return _NO_SHARED_MEMORY
    if kind == "MemoryError" or _NO_MEMORY.search(message):
        message = re.sub(r"^\[enforce fail [^]]*\] (err == 0)?\.? ?", "", message)
        detail = f" ({'. '.join(message.split('. ')[:2])[:200]})" if message else ""
        return f"out of memory{detail}; take smaller batches, patches or tiles, or a smaller network"
    if isinstance(error, OSError):
        if message != text:  # from a worker, whose traceback says no more than this
            return message
        if error.errno not in _FAULTS_OF_A_PROGRAM:
            return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return None


_NO_SHARED_MEMORY = (
    "/dev/shm is too small for the batches of the reading processes; give the container more (docker run "
    "--shm-size=8g) or set datasets.train.dataloader_num_workers=0"
)


def _in_worker(error: BaseException) -> tuple[str, str] | None:
    """Class and text of an exception that a DataLoader's worker has sent with its traceback; None where none has."""
    text = str(error.args[0]) if error.args else ""  # a UserError shows its lines as one
    first, _, rest = text.strip().partition("\n")
    raised = re.findall(r"^(?:\w+\.)*(\w+)(?:: (.*))?$", rest, re.MULTILINE)  # lines of a traceback are indented
    return raised[-1] if raised and " in DataLoader worker process " in first else None


def status_of(error: BaseException) -> int:
    """The status to leave with: 2 after what the user can mend, 130 after Ctrl-C, 1 after a fault of the program."""
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if explain(error) else 1


def tell(error: BaseException) -> None:
    """One line on standard error; of a fault of the program its traceback."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif line := explain(error):
        print(f"error: {line}", file=sys.stderr)
    else:
        sys.excepthook(type(error), error, error.__traceback__)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave the process: status 0, 2 after a :class:`UserError`, 130 after Ctrl-C.

    Want of memory, space or permission is told as a :class:`UserError` is (:func:`explain`).
    """
    accept_all_characters()
    try:
        status = main()
    except (Exception, KeyboardInterrupt) as error:
        tell(error)
        status = status_of(error)
    sys.exit(status)
