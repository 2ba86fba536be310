"""The frame of a script that torchrun may start. It imports no torch, so that a slip in the options is told at once."""

import os
from collections.abc import Callable

from utils import utils_error


def run(main: Callable[[], int | None]) -> None:
    """:func:`utils.utils_error.run` for processes that train together: the first to fail speaks, all leave."""

    def together() -> int | None:
        try:
            return main()
        except (Exception, KeyboardInterrupt) as error:
            if "RANK" in os.environ:
                from utils.utils_dist import leave_together  # with torch: only where there may be others

                leave_together(error)
            raise

    utils_error.run(together)
