"""Restore the images of test sets by one or several models, measure and report them: what main_test.py does.

The networks run one image after the other; meanwhile a thread reads the next one, and others save and measure those
before. Files and tables are the same to the byte as if all came in turn, and as if an interrupted test had not been:
what is measured is what the images on the disk hold.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from data.check import check_dataset
from data.dataset_base import DatasetBase
from data.dataset_l import DatasetL
from data.files import group_files
from data.select_dataset import define_Dataset
from evaluation.metrics import Measurer, Picture
from evaluation.report import RESULTS, Entry, Report
from evaluation.restored import LOCK, MANIFEST, Line, Manifest, Place, digest_of, made_by
from evaluation.threads import Threads
from models.precision import autocast, faster_layout, in_float32, warn_if_slow
from models.restorer import Restorer, Step, load_restorer, load_restorer_of, run_folder, set_sampling, steps_of
from utils.utils_error import UserError, printable
from utils.utils_image import Array, ImageExtras, imread_uint, imresize, single2uint, tensor2uint, uint2single
from utils.utils_name import check_output, folded, output_names, output_path, safe_name
from utils.utils_option import DatasetOptions, Options, TestOptions
from utils.utils_png import encode_png
from utils.utils_run import run_facts, unused_gpu
from utils.utils_tile import Tile, check_tile, enough_memory, restore, tile_remedy

logger = logging.getLogger(__name__)
_FILES = (*RESULTS, MANIFEST, LOCK)  # beside the models' folders
_MOST_FINISHERS = 4  # threads that save and measure: each holds an image, and what its metrics take


@dataclass(frozen=True)
class Job:
    """What to restore with what, and where to."""

    models: list[Restorer]
    sets: list[DatasetOptions]
    output: Path
    tile: Tile
    tile_overlap: int
    metrics: Sequence[str]
    report_images: int
    device: torch.device
    tile_setting: str  # how another tile is asked for
    precision: str
    overwrite: bool  # restore also what is there
    steps: Sequence[Step] = ()  # where the models are the checkpoints of runs


class Lock(Protocol):
    """What keeps other processes out of a folder: ``training.lock.FolderLock``."""

    def take(self) -> None: ...
    def check(self) -> None: ...


def _device(name: str | None) -> torch.device:
    gpus = torch.cuda.device_count()
    known = ["cpu", *(f"cuda:{n}" for n in range(gpus)), *(["cuda"] if gpus else [])]
    if name is not None and name not in known:
        raise UserError(f"--device {name}: cannot be had here; use one of {', '.join(known)}")
    if name is None and (why := unused_gpu()):
        logger.warning("%s", why)
    return torch.device(name or known[-1])


def job_of(args: Namespace, opt: Options | None) -> Job:
    """The job that the command line of main_test.py asks for; ``opt`` are the options of its --opt FILE.

    Raises:
        UserError: models or sets are missing or unusable.
    """
    device = _device(args.device)
    if opt:
        sets = list(opt.test_sets.values())
        if not sets:
            raise UserError(f"{args.opt}: datasets: there is no test set; add datasets.test.dataroot_H")
        sets = [data.model_copy(update={"name": safe_name(data.name)}) for data in sets]
        if len({folded(data.name) for data in sets}) < len(sets):
            raise UserError(f"{args.opt}: datasets: two test sets have one name; give each its own")
        output = Path(opt.test.output) if opt.test.output else opt.task_dir / "results"
        test = opt.test
        models = [load_restorer_of(opt, device)]
        more = test.metrics, test.report_images, device, "test.tile=", test.precision, args.overwrite
        return Job(models, sets, output, test.tile, test.tile_overlap, *more)
    tile = args.tile or 0
    tile_overlap = 32 if args.tile_overlap is None else args.tile_overlap
    check_tile(tile, tile_overlap)
    pairs = _pairs(args.input, args.gt)
    steps = [step for spec in args.model_path for step in steps_of(spec)] if args.all_steps else []
    specs = [step.spec for step in steps] or args.model_path
    models = [load_restorer(spec, args.scale, args.param_key, device, args.steps) for spec in specs]
    set_sampling(models, args.steps, args.seed)
    first = models[0]
    of_one_run = run_folder(first.checkpoint) if len({step.run for step in steps} or models) == 1 else None
    output = Path(args.output) if args.output else (of_one_run or Path()) / "results"
    sets = [
        DatasetOptions(
            name=name,
            dataset_type="sr" if gt else "l",
            dataroot_L=input_ or None,
            dataroot_H=gt or None,
            phase="test",
            scale=first.scale,
            n_channels=first.n_channels,
        )
        for name, (input_, gt) in pairs.items()
    ]
    defaults = TestOptions()
    metrics = args.metrics or defaults.metrics
    report_images = defaults.report_images if args.report_images is None else args.report_images
    more = metrics, report_images, device, "--tile ", args.precision or defaults.precision, args.overwrite
    return Job(models, sets, output, tile, tile_overlap, *more, steps)


def _pairs(inputs: list[str] | None, gts: list[str] | None) -> dict[str, tuple[list[str], list[str]]]:
    """Set name -> (input, ground truth), either of them empty where its place holds "-" or the list is not given.

    Files of one folder that stand together, as a wildcard gives them, are one set.
    """
    groups = {"--input": group_files(inputs or []), "--gt": group_files(gts or [])}
    sets = max(map(len, groups.values()))
    for what, given in groups.items():
        if given and len(given) < sets:
            raise UserError(
                f"{what}: {len(given)} for {sets} test sets; they are paired in order, write - where a set has none "
                f"(several files of one folder are one set)"
            )
    pairs: dict[str, tuple[list[str], list[str]]] = {}
    for pair in zip(*(given or [["-"]] * sets for given in groups.values()), strict=True):
        input_, gt = ([root for root in roots if root != "-"] for roots in pair)
        roots = [Path(root) for root in input_ + gt]
        if not roots:
            raise UserError("--input, --gt: a test set has - for both; name a folder for one of them")
        for root in roots:
            if not root.exists():
                raise UserError(f"{root}: there is no such folder or image")
        # Of an image the folder that it was named in, though it may be a link to a file elsewhere.
        folder = (roots[0] if roots[0].is_dir() else roots[0].parent).resolve()
        name = safe_name(folder.name or "images")
        taken = {folded(other) for other in pairs}
        names = chain([name, safe_name(f"{folder.parent.name}_{name}")], (f"{name}_{n}" for n in count(2)))
        pairs[next(name for name in names if folded(name) not in taken)] = input_, gt
    return pairs


def _check_models(models: list[Restorer]) -> None:
    """Several models need one L, and a name each that can be a folder's."""
    labels = [folded(model.label) for model in models]
    first = models[0]
    for model in models:
        if (model.scale, model.n_channels) != (first.scale, first.n_channels):
            raise UserError(
                f"{model.label} (scale {model.scale}, {model.n_channels} channels) differs from {first.label} "
                f"(scale {first.scale}, {first.n_channels} channels): models are compared on one L, test these apart"
            )
        label = folded(model.label)
        if labels.count(label) > 1 or label in ("bicubic", "ground truth", *_FILES):
            raise UserError(f"{model.checkpoint}: the name {model.label!r} is taken; write another as NAME=PATH")
        if safe_name(model.label) != model.label:
            raise UserError(f"{model.label!r} cannot be the name of a folder; write another as NAME=PATH")


class _Read(NamedTuple):
    """An image to be restored, or that is restored already."""

    item: dict[str, Any]
    digest: str
    there: dict[str, Line]  # label -> what is there, made by the same of the same
    E: dict[str, Array]  # label -> its pixels, where somebody looks


class _Restored(NamedTuple):
    """What the models have made of an image."""

    name: str
    size: str
    digest: str
    there: int  # by how many models it was restored already
    E: dict[str, Array]  # label -> uint8 or uint16, as it is saved; of those that were not there
    extras: ImageExtras
    estimates: dict[str, Picture]  # label -> uint8, as it is measured and shown; none where nobody looks
    H: Picture | None
    broken: list[str]  # labels of estimates that were not finite


class _Finished(NamedTuple):
    """What is left of it once it is saved and measured."""

    name: str
    size: str
    there: int
    broken: list[str]
    entry: Entry
    lost_profile: bool


def _as_measured(saved: Array) -> Picture:
    """What is measured and shown of a saved image: its 8 bits; of 16 the nearest, which are E's as 257 is odd.

    In one order in memory, whether the image was made or read: the last digits of sums depend on it.
    """
    return np.ascontiguousarray(saved if saved.dtype == np.uint8 else single2uint(uint2single(saved)))


def _read(
    job: Job,
    data: DatasetOptions,
    dataset: DatasetBase | DatasetL,
    name: str,
    report: Report,
    index: int,
    manifest: Manifest,
) -> _Read:
    """Read an image, and what there is of it already."""
    item = dataset[index]
    digest = digest_of(item)
    places = {model.label: Place(model.label, data.name, name) for model in job.models}
    there = {label: line for label, place in places.items() if (line := manifest.find(place, digest))}
    E = {}
    if report.shows(data.name, index, "H" in item):
        for label in there:
            E[label] = imread_uint(str(output_path(job.output, places[label].path)), data.n_channels)
    return _Read(item, digest, there, {label: x[..., 0] if data.n_channels == 1 else x for label, x in E.items()})


def _restore(job: Job, data: DatasetOptions, read: _Read, name: str, report: Report, index: int) -> _Restored:
    """Restore an image by all models that have not."""
    item, scale, extras = read.item, data.scale, read.item["L_extras"]
    L = item["L"][None].to(job.device)
    H = tensor2uint(item["H"]) if "H" in item else None
    shown = report.shows(data.name, index, H is not None)
    estimates = {"bicubic": tensor2uint(imresize(L, scale))} if shown else {}
    restored, broken = {}, []
    for model in job.models:
        if line := read.there.get(model.label):
            is_finite = line.finite
        else:
            with enough_memory(f"{item['L_path']}: {tile_remedy(job.tile, job.tile_setting)}"):
                with autocast(job.device, job.precision):
                    E = restore(model.netG, L, scale, job.tile, job.tile_overlap)
                E = in_float32(E)
            is_finite = bool(E.isfinite().all())
            restored[model.label] = tensor2uint(E if is_finite else E.nan_to_num(), extras.bits)
        if not is_finite:
            broken.append(model.label)
        if shown:
            estimates[model.label] = _as_measured((restored | read.E)[model.label])
    size = f"{L.shape[-1]}x{L.shape[-2]} -> {L.shape[-1] * scale}x{L.shape[-2] * scale}"
    return _Restored(name, size, read.digest, len(read.there), restored, extras, estimates, H, broken)


def _save(data: DatasetOptions, restored: _Restored, manifest: Manifest) -> bool:
    """Write what the models made; whether the image's colour profile is lost."""
    extras = restored.extras.fitting(data.n_channels)
    lost_profile = (restored.extras.icc, restored.extras.cicp) != (extras.icc, extras.cicp)
    if restored.E:
        extras = extras.resized(data.scale)
    for label, E in restored.E.items():
        pixels = E if extras.alpha is None else np.dstack([E, extras.alpha])
        content = encode_png(pixels, icc=extras.icc, cicp=extras.cicp)
        manifest.put(Place(label, data.name, restored.name), restored.digest, content, label not in restored.broken)
    return lost_profile


def _restore_set(
    job: Job,
    data: DatasetOptions,
    dataset: DatasetBase | DatasetL,
    names: list[str],
    report: Report,
    manifest: Manifest,
    reader: Threads,
    finisher: Threads,
) -> None:
    """Restore, save and report the images of a set: networks here, reading ahead and what comes after in threads."""

    def finish(index: int, restored: _Restored) -> _Finished:
        lost_profile = _save(data, restored, manifest)
        examined = restored.name, restored.estimates, restored.H, restored.broken
        entry = report.examine(data.name, index, *examined)
        return _Finished(restored.name, restored.size, restored.there, restored.broken, entry, lost_profile)

    def restored_images() -> Iterator[Callable[[], _Finished]]:
        reads = reader.in_order(
            partial(_read, job, data, dataset, name, report, i, manifest) for i, name in enumerate(names)
        )
        for i, (read, name) in enumerate(zip(reads, names, strict=True)):
            yield partial(finish, i, _restore(job, data, read, name, report, i))

    lost_profiles = there = 0
    finished = finisher.in_order(restored_images())
    silent = not sys.stderr.isatty()
    bar = tqdm(finished, desc=data.name, total=len(names), unit="image", dynamic_ncols=True, disable=silent)
    for i, image in enumerate(bar, 1):
        name = printable(image.name)
        for label in image.broken:
            logger.warning("%s: what %s makes of it is not finite (NaN): no numbers of it", name, label)
        report.add(image.entry)
        lost_profiles += image.lost_profile
        there += image.there
        if bar.disable:
            psnr = "".join(f", {label} {v['psnr']:.2f} dB" for label, v in image.entry.values.items() if "psnr" in v)
            known = ", was there" if image.there == len(job.models) else ""
            logger.info("%s %d/%d %s: %s%s%s", data.name, i, len(names), name, image.size, known, psnr)
    report.end_set(data.name, data.dataset_type != "l")
    if there:
        logger.info(
            "%s: %d of %d restored images were there already, made of the same by the same weights and options",
            data.name,
            there,
            len(names) * len(job.models),
        )
    if lost_profiles:
        logger.warning(
            "%s: %d of %d images have a colour profile that is not for %s; it is not kept",
            data.name,
            lost_profiles,
            len(names),
            "gray" if data.n_channels == 1 else "RGB",
        )


def test(job: Job, lock: Lock) -> None:
    """Restore, save and report every set; images that an earlier call has restored by the same are measured alone.

    Args:
        lock: of the folder for the results; taken once all is checked, for the caller to release.

    Raises:
        UserError: images are missing or unusable, the results cannot be written, somebody else has put images there
            or works there, or memory is too small.
    """
    _check_models(job.models)
    warn_if_slow(job.device, job.precision)
    for model in job.models:
        model.netG.to(memory_format=faster_layout(job.device, job.precision))
    prepared: list[tuple[DatasetOptions, DatasetBase | DatasetL, list[str]]] = []
    for data in job.sets:
        dataset = define_Dataset(data)
        paths = [files.L or files.H for files in dataset.files]
        roots = [root for given in (data.dataroot_L, data.dataroot_H) if given for root in np.atleast_1d(given)]
        names = output_names(paths, roots)
        prepared.append((data, dataset, names))
        restored = [Place(model.label, data.name, name).path for model in job.models for name in names]
        inputs = [path for files in dataset.files for path in files if path]
        check_output(job.output, inputs, roots, [*_FILES, *restored])
        # Without ground truth any size will do.
        check_dataset(data)
    counts = {data.name: len(names) for data, _, names in prepared}
    first = job.models[0]
    report = Report(Measurer(job.metrics, first.scale, job.device), counts, job.report_images)
    whole = "" if job.tile else f" or restore in tiles, {job.tile_setting}256,"
    cores = torch.get_num_threads()
    finishers = min(cores, _MOST_FINISHERS)
    places = [Place(m.label, data.name, name) for data, _, names in prepared for m in job.models for name in names]
    try:
        job.output.mkdir(parents=True, exist_ok=True)
        lock.take()
        made = {
            model.label: made_by(model, job.device, tile=job.tile, overlap=job.tile_overlap, precision=job.precision)
            for model in job.models
        }
        manifest = Manifest(job.output, places, made, job.overwrite, lock.check)
        with (
            enough_memory(f"the memory is too small for whole images: choose fewer metrics,{whole} or cut the images"),
            Threads(1) as reader,
            Threads(finishers, cores // finishers) as finisher,
        ):
            for data, dataset, names in prepared:
                _restore_set(job, data, dataset, names, report, manifest, reader, finisher)
        manifest.tidy()
    except OSError as error:
        raise UserError(f"{job.output}: cannot be written: {error.strerror or error}") from error
    for model in job.models:
        logger.info("restored images: %s", job.output / model.label)
    about = {
        "models": {model.label: str(model.checkpoint) for model in job.models},
        "scale": first.scale,
        "tile": job.tile,
        "tile_overlap": job.tile_overlap,
        "precision": job.precision,
    }
    if job.steps:
        about["steps"] = {step.label: {"run": step.run, "step": step.step} for step in job.steps}
    report.write(job.output, run_facts(job.device), about, first.n_channels)
