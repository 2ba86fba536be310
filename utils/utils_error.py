"""How a mistake of the user is reported: one line on standard error, exit status 2, no traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what is wrong, where, and the remedy."""


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
