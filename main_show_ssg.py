"""Draw what the self-similarity loss sees, or how a training run went, as one PNG.

python main_show_ssg.py testsets/demo/camera.png --pixel 120 200
python main_show_ssg.py HR.png --pixel 120 200 --other restored.png       # two images, and where they differ
python main_show_ssg.py HR.png --other restored.png                       # the pixel that differs most
python main_show_ssg.py --run experiments/demo_gan_ssl                    # training curves and validation images

The first image is the ground truth: its edges are the mask. X counts columns, Y rows, both from 0.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.utils_error import ArgumentParser, UserError, printable, run
from utils.utils_name import output_path


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="the image, usually the ground truth")
    parser.add_argument("--pixel", nargs=2, type=int, metavar=("X", "Y"), help="column and row; default: a telling one")
    parser.add_argument(
        "--other", metavar="IMAGE", help="another version of it, of the same size or as main_test.py cuts it"
    )
    parser.add_argument("--run", metavar="FOLDER", help="a run's folder, instead of an image")
    parser.add_argument(
        "--output", metavar="PNG", help="default ./IMAGE_ssg_X_Y.png, or curves.png in the run's folder"
    )
    args = parser.parse_args(argv)
    if (args.image is None) == (args.run is None):
        parser.error("give either an IMAGE or --run FOLDER")
    if args.run and (args.pixel or args.other):
        parser.error("--pixel, --other: are for an IMAGE, not for --run")
    if args.output and Path(args.output).suffix.lower() != ".png":
        parser.error(f"--output {args.output}: name a .png file")
    for path in filter(None, (args.image, args.other)):
        if not Path(path).is_file():
            raise UserError(f"{path}: there is no such image")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (None = the process's own).

    Raises:
        UserError: a mistake in it or in the files it names; then nothing has been written.
    """
    args = _arguments(argv)
    from evaluation.figure import figure_of_images, training_figure  # with torch: once the command line is right
    from utils.utils_logger import setup

    setup()
    if args.run:
        output = Path(args.output or Path(args.run) / "curves.png")
        output = output_path(output.parent, output.name, inputs=[*(Path(args.run) / "images").glob("*.png")])
        training_figure(Path(args.run), output)
    else:
        output = figure_of_images([Path(path) for path in (args.image, args.other) if path], args.pixel, args.output)
    print(printable(str(output)))


if __name__ == "__main__":
    run(main)
