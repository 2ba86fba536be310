"""Restore folders of images and, where there is ground truth, measure how well.

python main_test.py --opt options/test_bsrgan.json
python main_test.py --opt options/test_bsrgan.json path.pretrained_netG=experiments/bsrgan_ssl test.tile=256
python main_test.py --model_path experiments/bsrgan_ssl --input testsets/RealSet65 --tile 256
python main_test.py --model_path psnr=experiments/demo_psnr gan_ssl=experiments/demo_gan_ssl --gt testsets/demo

A model is a checkpoint file or a run's folder (then its newest average, {iter}_E.pth). Without --input, L is made from
the ground truth by MATLAB bicubic. Images go to OUTPUT/{model}/{set}/{name}.png, beside them results.csv, results.json
and side_by_side.png; the same command again replaces its own results. OUTPUT is by default the run's folder results/,
or ./results for several models and for checkpoints outside a run.
"""

import argparse
import logging
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.check import check_dataset
from data.select_dataset import define_Dataset
from models.restorer import Restorer, load_restorer, load_restorer_of, run_folder
from utils.utils_error import ArgumentParser, UserError, run
from utils.utils_image import imread_uint, imresize, imsave, tensor2uint
from utils.utils_logger import setup
from utils.utils_metric import METRICS, describe_metrics, mean_metrics, measure
from utils.utils_option import DatasetOptions, parse
from utils.utils_report import check_output, format_table, output_names, side_by_side, write_csv
from utils.utils_run import run_facts, save_json
from utils.utils_tile import check_tile, restore

logger = logging.getLogger(__name__)
_PICTURE_ROWS = 6


@dataclass(frozen=True)
class Job:
    """What to restore with what, and where to."""

    models: list[Restorer]
    sets: list[DatasetOptions]
    output: Path
    tile: int
    tile_overlap: int
    device: torch.device


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--opt", metavar="FILE", help="option file, JSON with // comments")
    parser.add_argument("override", nargs="*", metavar="key.path=value", help="with --opt, e.g. test.tile=256")
    parser.add_argument("--model_path", nargs="+", metavar="[NAME=]PATH", help="checkpoint files or runs' folders")
    parser.add_argument("--input", help="folder or image to restore")
    parser.add_argument("--gt", help="folder or image of ground truth, paired with --input by name")
    parser.add_argument("--scale", type=int, help="needed only where the weights leave it open")
    parser.add_argument("--tile", type=int, help="restore in tiles of this many pixels of L; 0 = whole (default)")
    parser.add_argument("--tile_overlap", type=int, help="overlap of tiles in pixels of L (default 32)")
    parser.add_argument("--output", help="folder for the results")
    parser.add_argument("--param_key", help="which weights of the file; default params_ema, params or all")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default the first GPU, if any")
    args = parser.parse_args(argv)
    alone = [f"--{name}" for name in ("input", "gt", "scale", "tile", "tile_overlap", "output", "param_key")]
    if (args.opt is None) == (args.model_path is None):
        parser.error("give either --opt FILE or --model_path PATH")
    if args.opt and (given := [name for name in alone if getattr(args, name[2:]) is not None]):
        parser.error(f"{', '.join(given)}: with --opt these stand in the file, or as test.tile=256, test.output=DIR")
    if args.model_path and args.override:
        parser.error(f"{args.override[0]}: options are for --opt only")
    if args.model_path and not (args.input or args.gt):
        parser.error("give --input FOLDER, --gt FOLDER or both")
    return args


def _device(name: str | None) -> torch.device:
    gpus = torch.cuda.device_count()
    known = ["cpu", *(f"cuda:{n}" for n in range(gpus)), *(["cuda"] if gpus else [])]
    if name is not None and name not in known:
        raise UserError(f"--device {name}: cannot be had here; use one of {', '.join(known)}")
    return torch.device(name or known[-1])


def _job(args: argparse.Namespace) -> Job:
    device = _device(args.device)
    if args.opt:
        opt = parse(args.opt, is_train=False, overrides=args.override)
        sets = list(opt.test_sets.values())
        if not sets:
            raise UserError(f"{args.opt}: datasets: there is no test set; add datasets.test.dataroot_H")
        if len({data.name for data in sets}) < len(sets):
            raise UserError(f"{args.opt}: datasets: two test sets have one name; give each its own")
        output = Path(opt.test.output) if opt.test.output else opt.task_dir / "results"
        return Job([load_restorer_of(opt, device)], sets, output, opt.test.tile, opt.test.tile_overlap, device)
    tile = args.tile or 0
    tile_overlap = 32 if args.tile_overlap is None else args.tile_overlap
    check_tile(tile, tile_overlap)
    for root in filter(None, (args.input, args.gt)):
        if not Path(root).exists():
            raise UserError(f"{root}: there is no such folder or image")
    models = [load_restorer(spec, args.scale, args.param_key, device) for spec in args.model_path]
    first = models[0]
    of_one_run = run_folder(first.checkpoint) if len(models) == 1 else None
    output = Path(args.output) if args.output else (of_one_run or Path()) / "results"
    source = Path(args.input or args.gt).resolve()
    dataset = DatasetOptions(
        name=(source.parent if source.is_file() else source).name or "images",
        dataset_type="sr" if args.gt else "l",
        dataroot_L=args.input,
        dataroot_H=args.gt,
        phase="test",
        scale=first.scale,
        n_channels=first.n_channels,
    )
    return Job(models, [dataset], output, tile, tile_overlap, device)


def _check_models(models: list[Restorer]) -> None:
    """Several models need one L, and a name each that can be a folder's."""
    labels = [model.label for model in models]
    first = models[0]
    for model in models:
        if (model.scale, model.n_channels) != (first.scale, first.n_channels):
            raise UserError(
                f"{model.label} (scale {model.scale}, {model.n_channels} channels) differs from {first.label} "
                f"(scale {first.scale}, {first.n_channels} channels): models are compared on one L, test these apart"
            )
        if labels.count(model.label) > 1 or model.label in ("bicubic", "ground truth"):
            raise UserError(f"{model.checkpoint}: the name {model.label!r} is taken; write another as NAME=PATH")
        if Path(model.label).name != model.label:
            raise UserError(f"{model.label!r} cannot be the name of a folder; write another as NAME=PATH")


def _restore_set(job: Job, data: DatasetOptions, dataset: Any, names: list[str], sheet: dict[str, Any]) -> list[dict]:
    """Restore and save the images of a set; where there is ground truth, measure them and fill ``sheet``.

    Returns:
        One row an image and model, for the table and the files.
    """
    scale, rows = data.scale, []
    shown = set(np.linspace(0, len(names) - 1, max(1, _PICTURE_ROWS // len(job.sets))).round().astype(int))
    bar = tqdm(names, desc=data.name, unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty())
    for i, name in enumerate(bar):
        item = dataset[i]
        L = item["L"][None].to(job.device)
        bits = 16 if imread_uint(item["L_path"], data.n_channels).dtype == np.uint16 else 8
        H = tensor2uint(item["H"]) if "H" in item else None
        estimates = {} if H is None else {"bicubic": tensor2uint(imresize(L, scale))}
        for model in job.models:
            E = restore(model.netG, L, scale, job.tile, job.tile_overlap)
            path = job.output / model.label / data.name / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            imsave(tensor2uint(E, bits), str(path))
            estimates[model.label] = tensor2uint(E)
        if H is not None:
            values = {label: measure(E, H, scale, job.device) for label, E in estimates.items()}
            rows += [{"set": data.name, "image": name, "model": label, **v} for label, v in values.items()]
            if i in shown:
                captions = {label: f"{v['PSNR']:.2f} dB" for label, v in values.items()}
                sheet[f"{data.name}/{name}"] = {**estimates, "ground truth": H}, captions
        if bar.disable:
            size = f"{L.shape[-1]}x{L.shape[-2]} -> {L.shape[-1] * scale}x{L.shape[-2] * scale}"
            psnr = "".join(f", {row['model']} {row['PSNR']:.2f} dB" for row in rows[-len(estimates) :] if H is not None)
            logger.info("%s %d/%d %s: %s%s", data.name, i + 1, len(names), name, size, psnr)
    return rows


def _report(job: Job, rows: list[dict[str, Any]], sheet: dict[str, Any]) -> None:
    """Tables on the terminal, results.csv, results.json and side_by_side.png."""
    sets: dict[str, Any] = {}
    for data in job.sets:
        of_set = [row for row in rows if row["set"] == data.name]
        if of_set:
            labels = dict.fromkeys(row["model"] for row in of_set)
            means = {label: mean_metrics([row for row in of_set if row["model"] == label]) for label in labels}
            images = len(of_set) // len(labels)
            sets[data.name] = {"images": images, "means": means}
            table = format_table([{"model": k, **v} for k, v in means.items()], {"model": "", **METRICS})
            logger.info("\n%s, x%d, %d images\n\n%s", data.name, data.scale, images, table)
    description = describe_metrics(job.models[0].n_channels, job.models[0].scale)
    facts = run_facts(job.device)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "opencv", "numpy"))
    logger.info("\n%s\n", textwrap.fill(f"{description} {versions}.", 80))
    write_csv(rows, job.output / "results.csv")
    content = {
        "facts": facts,
        "models": {model.label: str(model.checkpoint) for model in job.models},
        "scale": job.models[0].scale,
        "tile": job.tile,
        "tile_overlap": job.tile_overlap,
        "metrics": description,
        "sets": sets,
        "images": rows,
    }
    save_json(content, job.output / "results.json")
    pictures = {name: images for name, (images, _) in sheet.items()}
    captions = {name: words for name, (_, words) in sheet.items()}
    side_by_side(pictures, job.output / "side_by_side.png", captions=captions)
    for name in ("results.csv", "results.json", "side_by_side.png"):
        logger.info("%s", job.output / name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (None = the process's own).

    Raises:
        UserError: a mistake in it or in the files it names; then nothing has been written.
    """
    args = _arguments(argv)
    setup()
    job = _job(args)
    _check_models(job.models)
    prepared = []
    for data in job.sets:
        dataset: Any = define_Dataset(data)
        paths = dataset.paths if data.dataset_type == "l" else [files.L or files.H for files in dataset.files]
        roots = [root for given in (data.dataroot_L, data.dataroot_H) if given for root in np.atleast_1d(given)]
        prepared.append((data, dataset, output_names(paths, roots)))
        check_output(job.output, paths, roots)
        # Without ground truth any size will do.
        check_dataset(data)
    rows: list[dict[str, Any]] = []
    sheet: dict[str, Any] = {}
    try:
        for data, dataset, names in prepared:
            rows += _restore_set(job, data, dataset, names, sheet)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        raise UserError("the memory is too small for whole images: use tiles, --tile 256 or test.tile=256") from error
    except OSError as error:
        raise UserError(f"{job.output}: cannot be written: {error.strerror or error}") from error
    for model in job.models:
        logger.info("restored images: %s", job.output / model.label)
    if rows:
        _report(job, rows, sheet)


if __name__ == "__main__":
    run(main)
