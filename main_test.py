"""Restore folders of images and, where there is ground truth, measure how well.

python main_test.py --opt options/test_bsrgan.json
python main_test.py --opt options/test_bsrgan.json path.pretrained_netG=experiments/bsrgan_ssl test.tile=256
python main_test.py --model_path experiments/bsrgan_ssl --input testsets/RealSet65 --tile 256
python main_test.py --model_path psnr=experiments/demo_psnr gan_ssl=experiments/demo_gan_ssl --gt testsets/demo
python main_test.py --model_path gan=A.pth gan_ssl=B.pth --gt testsets/Set5 testsets/Set14 - \\
    --input - - testsets/RealSet65 --metrics paper

A model is a checkpoint file or a run's folder (then its newest step, of that the average {iter}_E.pth if there is one).
Without --input, L is made from the ground truth by MATLAB bicubic. Several sets are given in order, - where one has no
--gt or no --input; several files of one folder (photos/*.png) are one set, called as their folder. Models X and X_ssl
are compared as without and with SSL. --all_steps tests each checkpoint of a run, RUN_{step}, and the report draws
their means over the steps. Images go to OUTPUT/{model}/{set}/{name}.png, beside them results.csv,
results.json, results.md, report.html (to compare by eye, in any browser) and side_by_side.png. OUTPUT is by default the
run's folder results/, or ./results for several models and for checkpoints outside a run.

A test that was interrupted goes on with the same command: images are restored again only where weights, options, the
image they are made of or the program have changed since, or where they are gone. They are measured anew, with the same
numbers. Images in OUTPUT that somebody has edited end the test before it begins; --overwrite replaces them.
"""

import argparse
from collections.abc import Sequence
from typing import Literal, get_args

from utils.utils_error import ArgumentParser, run
from utils.utils_metric_table import GROUPS, METRICS, choose
from utils.utils_option import parse
from utils.utils_option_networks import Precision


def _tile(text: str) -> int | Literal["auto"]:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor auto") from None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--opt", metavar="FILE", help="option file, JSON with // comments")
    parser.add_argument("override", nargs="*", metavar="key.path=value", help="with --opt, e.g. test.tile=256")
    parser.add_argument("--model_path", nargs="+", metavar="[NAME=]PATH", help="checkpoint files or runs' folders")
    parser.add_argument("--all_steps", action="store_true", help="every checkpoint of runs' folders, as curves")
    parser.add_argument("--input", nargs="+", help="folders or images to restore; - for a set that has only --gt")
    parser.add_argument("--gt", nargs="+", help="folders or images of ground truth, paired with --input; - for none")
    parser.add_argument("--scale", type=int, help="needed only where the weights leave it open")
    parser.add_argument(
        "--tile",
        type=_tile,
        metavar="N",
        help="restore in tiles of this many pixels of L; 0 = whole (default), auto = whole if the memory is enough",
    )
    parser.add_argument("--tile_overlap", type=int, help="overlap of tiles in pixels of L (default 32)")
    parser.add_argument("--steps", type=int, help="diffusion models: steps of sampling (default as they were trained)")
    parser.add_argument("--seed", type=int, help="diffusion models: seed of the noise (default as they were trained)")
    parser.add_argument("--metrics", nargs="+", help=f"of {', '.join(METRICS)}; or {', '.join(GROUPS)}")
    parser.add_argument("--precision", choices=get_args(Precision), help="what networks compute in (default fp32)")
    parser.add_argument("--report_images", type=int, help="images in report.html; 0 = no such file (default 30)")
    parser.add_argument("--output", help="folder for the results")
    parser.add_argument("--param_key", help="which weights of the file; default an average, else params, else all")
    parser.add_argument(
        "--overwrite", action="store_true", help="restore also what is there, and replace edited images"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default the first GPU, if any")
    args = parser.parse_args(argv)
    alone = [f"--{name}" for name in ("input", "gt", "scale", "tile", "tile_overlap", "output", "param_key")]
    alone += ["--steps", "--seed", "--metrics", "--report_images", "--precision"]
    if (args.opt is None) == (args.model_path is None):
        parser.error("give either --opt FILE or --model_path PATH")
    if args.opt and (given := [name for name in alone if getattr(args, name[2:]) is not None]):
        parser.error(f"{', '.join(given)}: with --opt these stand in the file, or as test.tile=256, diffusion.seed=1")
    if args.opt and args.all_steps:
        parser.error("--all_steps: is for --model_path RUN")
    if args.model_path and args.override:
        parser.error(f"{args.override[0]}: options are for --opt only")
    if args.report_images is not None and args.report_images < 0:
        parser.error(f"--report_images {args.report_images}: must be 0 or more")
    if args.model_path and not (args.input or args.gt):
        parser.error("give --input FOLDER, --gt FOLDER or both")
    if args.metrics:
        args.metrics = choose(args.metrics)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (None = the process's own).

    Raises:
        UserError: a mistake in it or in the files it names; then nothing has been written.
    """
    args = _arguments(argv)
    opt = parse(args.opt, is_train=False, overrides=args.override) if args.opt else None
    from evaluation.restored import LOCK
    from evaluation.run import job_of, test  # with torch and all models: once the options are right
    from training.lock import FolderLock
    from utils.utils_logger import setup

    setup()
    job = job_of(args, opt)
    with FolderLock(job.output / LOCK, other="folder for the results") as lock:
        test(job, lock)


if __name__ == "__main__":
    run(main)
