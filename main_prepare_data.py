"""Prepare data sets: every step from a folder of photographs to what training and testing read.

The data of the SSL paper and its blind test set, for example:

python main_prepare_data.py multiscale --enlarge --input DF2K_HR OST --output trainsets/multiscale
python main_prepare_data.py subimages --input trainsets/multiscale --output trainsets/trainH
python main_prepare_data.py masks --input trainsets/trainH --output trainsets/trainH_mask
python main_prepare_data.py lr-bicubic --input trainsets/trainH --output trainsets/trainH_x4
python main_prepare_data.py subimages --format npy --input trainsets/multiscale --output trainsets/trainH_raw
python main_prepare_data.py subimages --input HR --L LR_x4 --scale 4 --size 480 --step 240 --output trainsets/pairs
python main_prepare_data.py modcrop --input DIV2K_valid_HR --output testsets/DIV2K100
python main_prepare_data.py lr-blind --type blind_test --versions 30 --input testsets/DIV2K100 --output DIV2K100_blind
python main_prepare_data.py check --opt options/train_bsrgan_ssl.json

Folders are read with their sub-folders, which the output repeats; hidden ones are left out. What is finished is
skipped: after an interruption the same command goes on. A folder filled by another command, or with other settings, is
left alone. Images that cannot be read are named and left out; the exit status is then 1. It is 2 where nothing could be
done.
"""

import inspect
import os
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from data.preparation.arguments import COMMANDS, PRESETS, Arguments, Multiscale, Subimages, at_least
from utils.utils_error import ArgumentParser, UserError, run
from utils.utils_option import parse


def _command(commands: Any, name: str, text: str, example: str) -> Any:
    """A subcommand with ``text`` as its help, of which the list of commands shows the first line."""
    description = f"{text}\n\npython main_prepare_data.py {name} {example}"
    parser = commands.add_parser(name, help=text.partition("\n")[0], description=description)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = f"processes (default: one for each core, here {cores})"
    parser.add_argument("--workers", type=at_least(1, 1024), default=cores, metavar="N", help=workers)
    return parser


def _files(parser: Any) -> None:
    """From folders of images to one folder."""
    parser.add_argument("--input", nargs="+", required=True, metavar="DIR", help="folders of images, or single ones")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on with")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="say what would be done, write nothing")


def _options(parser: Any, step: type[Arguments]) -> None:
    """An argument for each field of the step that has a help text; one that is not given is not in the result."""
    if step is Subimages:
        text = "low-quality images, to be cut together with --input: pieces go to OUTPUT/H and OUTPUT/L"
        parser.add_argument("--L", nargs="+", default=[], metavar="DIR", help=text)
        parser.add_argument("--scale", type=at_least(1, 64), metavar="N", help="of L (default 4)")
    if step is Multiscale:
        parser.add_argument("--preset", choices=PRESETS, default="ssl", help="whose figures (default ssl)")
    for f in fields(step):  # type: ignore[arg-type]
        if f.metadata:
            metavar = {} if f.metadata.keys() & {"choices", "action"} else {"metavar": "N"}
            kind = {**metavar, **f.metadata}
            if f.default is not MISSING and f.default is not False:
                default = f.default if not isinstance(f.default, tuple) else " ".join(f"{x:.3g}" for x in f.default)
                kind["help"] += f" (default {default})"
            parser.add_argument(f"--{f.name}", default=SUPPRESS, required=f.default is MISSING, **kind)


def _arguments(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="small train and test sets from scikit-image's photographs")
    demo.add_argument("--trainsets", type=Path, default=Path("trainsets"), help="folder for the training set")
    demo.add_argument("--testsets", type=Path, default=Path("testsets"), help="folder for the test set")

    for step in COMMANDS:
        command = _command(commands, step.command, inspect.getdoc(step) or "", step.example)
        _files(command)
        _options(command, step)

    text = "one LMDB folder that reads like a folder of images\n\nThe files as they are, in BasicSR's and KAIR's form."
    lmdb = _command(commands, "lmdb", text, "--input DF2K_OST --output DF2K_OST.lmdb")
    _files(lmdb)
    lmdb.add_argument("--masks", action="store_true", help="the input is edge masks (.mat or .png)")

    text = """a report on data sets, status 1 where something is the matter

Files that cannot be read, sizes, partners, equal images, and test images that
are in the training set too. For the data sets of an option file: --opt FILE."""
    check = _command(commands, "check", text, "--H DF2K_OST --H_mask DF2K_OST_mask --test Set5 Set14")
    check.add_argument("--opt", metavar="FILE", help="an option file for training, instead of folders")
    check.add_argument("--H", nargs="+", default=[], metavar="DIR", help="ground truth to train on")
    check.add_argument("--L", nargs="+", default=[], metavar="DIR", help="its low-quality images")
    check.add_argument("--H_mask", nargs="+", default=[], metavar="DIR", help="its edge masks")
    check.add_argument("--scale", type=at_least(1, 64), default=4, metavar="N", help="of L (default 4)")
    check.add_argument("--H_size", type=at_least(0), default=0, metavar="N", help="name images with a side below this")
    check.add_argument("--test", nargs="+", default=[], metavar="DIR", help="ground truth of test sets, a set each")
    args = parser.parse_args(argv)
    if args.command == "subimages" and args.scale and not args.L:
        raise UserError("--scale: is for pairs; name their low-quality images by --L")
    if args.command == "check" and bool(args.opt) == bool(args.H or args.test):
        raise UserError("check: give either --opt FILE or folders, --H DIR, --test DIR or both")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None = the process's own); returns the exit status.

    Raises:
        UserError: nothing can be done.
    """
    args = _arguments(argv)
    # What reads images takes seconds to import: each command does it here, once its arguments are right.
    if args.command == "demo":
        from data.preparation.demo import prepare_demo

        prepare_demo(args.trainsets, args.testsets)
        return 0
    if args.command == "lmdb":
        from data.preparation.pack import pack_lmdb

        return pack_lmdb(args.input, args.output, args.masks, args.workers, args.dry_run)
    if args.command == "check":
        return _check(args)
    from data.preparation.run import prepare
    from data.preparation.steps import step_of

    return prepare(step_of(args), args.input, args.output, args.workers, args.dry_run)


def _check(args: Namespace) -> int:
    opt = parse(args.opt, is_train=True) if args.opt else None
    from data.files import group_files
    from data.preparation.survey import Folders, folders_of, report

    if opt:
        return report(folders_of(opt), args.workers)
    sets = [Folders("training set", args.H, args.L, args.H_mask, args.scale, args.H_size)] if args.H else []
    for roots in group_files(args.test):
        folder = roots[0] if len(roots) == 1 else os.path.dirname(roots[0])
        sets.append(Folders(f"test set {folder}", roots, is_train=False))
    return report(sets, args.workers)


if __name__ == "__main__":
    run(main)
