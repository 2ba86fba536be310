"""The command line of the scripts that train. It imports no torch: a slip in it is told at once."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from utils.utils_error import ArgumentParser, UserError
from utils.utils_option import Options, parse


class Command(NamedTuple):
    """What the command line of a script that trains asks for."""

    opt: Options
    dry_run: bool


def training_command(description: str | None, models: Sequence[str], argv: Sequence[str] | None = None) -> Command:
    """The command line ``--opt FILE [--dry_run] [key.path=value ...]`` of a script that trains ``models``.

    Raises:
        UserError: the options are wrong, or they are for another script.
    """
    parser = ArgumentParser(description)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file, JSON with // comments")
    parser.add_argument("override", nargs="*", metavar="key.path=value", help="e.g. train.iterations=1000")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="only 20 steps that save nothing: size and gradient of each loss, memory, time, SSL's weight",
    )
    for kair in ("--launcher", "--local_rank", "--local-rank", "--dist"):
        parser.add_argument(kair, help=argparse.SUPPRESS)  # torchrun's variables tell all of it
    arguments = parser.parse_intermixed_args(argv)  # overrides may stand before --opt and after it
    opt = parse(arguments.opt, is_train=True, overrides=arguments.override)
    if opt.model not in models:
        scripts = {"plain": "main_train_psnr.py", "dm": "main_train_dm.py", "ranker": "main_train_ranker.py"}
        script = scripts.get(opt.model, "main_train_gan.py")
        raise UserError(f"{arguments.opt}: model is {opt.model!r}: train it with {script}")
    return Command(opt, arguments.dry_run)


def training_options(description: str | None, models: Sequence[str], argv: Sequence[str] | None = None) -> Options:
    """The options of :func:`training_command`."""
    return training_command(description, models, argv).opt
