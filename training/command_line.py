"""The command line of the scripts that train. It imports no torch: a slip in it is told at once."""

import argparse
from collections.abc import Sequence

from utils.utils_error import ArgumentParser, UserError
from utils.utils_option import Options, parse


def training_options(description: str | None, models: Sequence[str], argv: Sequence[str] | None = None) -> Options:
    """Options from the command line, ``--opt FILE [key.path=value ...]``, for a script that trains ``models``.

    Raises:
        UserError: the options are wrong, or they are for another script.
    """
    parser = ArgumentParser(description)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file, JSON with // comments")
    parser.add_argument("override", nargs="*", metavar="key.path=value", help="e.g. train.iterations=1000")
    for kair in ("--launcher", "--local_rank", "--local-rank", "--dist"):
        parser.add_argument(kair, help=argparse.SUPPRESS)  # torchrun's variables tell all of it
    arguments = parser.parse_intermixed_args(argv)  # overrides may stand before --opt and after it
    opt = parse(arguments.opt, is_train=True, overrides=arguments.override)
    if opt.model not in models:
        scripts = {"plain": "main_train_psnr.py", "dm": "main_train_dm.py", "ranker": "main_train_ranker.py"}
        script = scripts.get(opt.model, "main_train_gan.py")
        raise UserError(f"{arguments.opt}: model is {opt.model!r}: train it with {script}")
    return opt
