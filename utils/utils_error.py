"""How a mistake of the user is reported: one line on standard error, exit status 2, no traceback."""

import argparse
import io
import re
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


class ArgumentParser(argparse.ArgumentParser):
    """A parser for a script's command line whose complaints are one line too; its help keeps the docstring's lines."""

    def __init__(self, description: str | None = None, **settings: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave the process: status 0, 2 after a :class:`UserError`, 130 after Ctrl-C."""
    accept_all_characters()
    try:
        status = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
