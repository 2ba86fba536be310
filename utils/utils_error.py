"""How a mistake of the user is reported: one line on standard error, exit status 2, no traceback."""

import argparse
import os
import stat
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what is wrong, where, and the remedy."""


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


def run(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave the process: status 0, 2 after a :class:`UserError`, 130 after Ctrl-C."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
