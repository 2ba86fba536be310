"""Where a run's words go: the terminal, beside a progress bar, and a file."""

import copy
import logging
import logging.handlers
import sys
from pathlib import Path

from tqdm import tqdm

from utils.utils_error import accept_all_characters, printable

logger = logging.getLogger(__name__)


class _Formatter(logging.Formatter):
    """Keeps the control characters of file names from terminal and file; tables have lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


class _TerminalFormatter(_Formatter):
    """Takes what a record says for the terminal, ``extra={"terminal": text}``, where that is not what files get."""

    def format(self, record: logging.LogRecord) -> str:
        if text := getattr(record, "terminal", None):
            record = copy.copy(record)
            record.msg, record.args = text, None
        return super().format(record)


class _TerminalHandler(logging.Handler):
    """Prints above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


class _RunFileHandler(logging.FileHandler):
    """The log file of the run at hand."""


def setup(log_file: Path | None = None, quiet: bool = False) -> None:
    """Send the log to the terminal (unless quiet: processes other than the first) and, from now on, to a file."""
    accept_all_characters()
    root = logging.getLogger()
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    if not quiet and not any(isinstance(h, _TerminalHandler) for h in root.handlers):
        terminal = _TerminalHandler()
        terminal.setFormatter(_TerminalFormatter("%(message)s"))
        root.addHandler(terminal)
    if not quiet and log_file is None and not any(isinstance(h, logging.handlers.MemoryHandler) for h in root.handlers):
        # What is said before a run has its folder (what was resumed, loaded, ignored) belongs into its file too.
        root.addHandler(logging.handlers.MemoryHandler(10000, flushLevel=logging.CRITICAL, flushOnClose=False))
    if log_file is not None:
        early = [h for h in root.handlers if isinstance(h, logging.handlers.MemoryHandler)]
        records = [record for handler in early for record in handler.buffer]
        close_file()
        file = _RunFileHandler(log_file, encoding="utf-8")
        file.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(file)
        for record in records:
            file.handle(record)


def close_file() -> None:
    """Stop writing to the file of :func:`setup`: what comes next belongs to another run."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, (_RunFileHandler, logging.handlers.MemoryHandler))]:
        root.removeHandler(handler)
        handler.close()
