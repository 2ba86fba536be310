"""The training loop, one for all scripts: it builds the data sets and the model that the options name, and trains."""

import gc
import logging
import os
import random
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.check import check_dataset
from data.degradations.select_degradation import Degrader
from data.loader import STOP_SIGNALS, EndlessBatchSampler, ahead, batches, training_loader
from data.select_dataset import define_Dataset
from evaluation.metrics import Measurer
from models.model_base import ModelBase, ModelSR
from models.model_ranker import ModelRanker
from models.precision import set_up
from models.published import how_to_get
from models.select_model import define_Model
from training.checkpoints import Checkpoints, Validation
from training.command_line import training_options
from training.dry_run import rehearse
from training.failure import told_in_one_line
from training.lock import FolderLock, remove_parts
from training.progress import Progress
from training.validate import ValidationError, best_by, validate, validate_ranker, validation_measurer
from utils import utils_dist
from utils.utils_checkpoint import Fingerprint
from utils.utils_error import UserError
from utils.utils_logger import close_file, setup
from utils.utils_metric_table import METRICS
from utils.utils_name import output_path, safe_name
from utils.utils_option import DatasetOptions, Options, is_read, patch_size
from utils.utils_resume import saved_steps
from utils.utils_run import run_facts, save_json, unused_gpu

__all__ = ["train", "training_options"]

logger = logging.getLogger(__name__)


def train(opt: Options, dry_run: bool = False) -> None:
    """Train to ``train.iterations``, going on from the newest complete checkpoint of the run if there is one.

    Nothing is written before the options, the paths, the networks and the images have been checked. Ctrl-C, SIGTERM,
    SIGHUP or SIGUSR1 ends the run after the step at hand, with a checkpoint and the status 128 + the signal's number.

    Args:
        opt: resolved options.
        dry_run: from the same checkpoint only :func:`training.dry_run.rehearse`; nothing is written.

    Raises:
        UserError: data or checkpoints are missing or unusable, another process works in the run's folder, or a loss is
            not finite.
    """
    device = utils_dist.init(opt.gpu_ids)
    setup(quiet=utils_dist.rank() > 0)
    stopped_by = 0
    try:
        if dry_run:
            _rehearse(opt, device)
        else:
            with _StopSignals() as stop, FolderLock(opt.task_dir / "run.lock") as lock:
                utils_dist.before_leaving(lock.release)
                run = _prepare(opt, device, lock)
                if run is not None:
                    _loop(run, stop)
            stopped_by = utils_dist.highest(stop.received, device)  # and none leaves while another still works
        # The distributed wrappers go before the group: their C++ side holds it, and as the last holder waits for its
        # threads with Python's lock in hand, for which these wait (seen to hang with PyTorch 2.6).
        run = None
        gc.collect()
        utils_dist.close()  # only here: a process that fails tells the others first, utils_launch.run
    finally:
        close_file()
    if stopped_by:
        sys.exit(128 + stopped_by)


@dataclass
class _Run:
    """What the loop works with."""

    opt: Options
    device: torch.device
    seed: int
    step: int  # done already
    model: ModelBase
    loader: DataLoader
    degrade: Degrader | None  # where the data set gives H alone
    test_sets: Mapping[str, Dataset]
    measurer: Measurer | None  # of the test sets; None where there are none, of a ranker, and in a dry run
    checkpoints: Checkpoints
    lock: FolderLock | None  # of the run's folder, held by the first process; None in a dry run


def _prepare(opt: Options, device: torch.device, lock: FolderLock | None) -> _Run | None:
    """Check and build everything, then make the run's folder; None where the run is at its end already.

    A dry run has no lock, no folder and no end.
    """
    data, rank, world_size = opt.train_set, utils_dist.rank(), utils_dist.world_size()
    assert data is not None
    if data.dataloader_batch_size % world_size:
        raise UserError(
            f"datasets.train.dataloader_batch_size: {data.dataloader_batch_size} cannot be shared by {world_size} "
            f"processes; it counts the patches of all of them together"
        )
    if rank == 0 and lock is not None:
        _check_run_folder(opt.task_dir)
        if opt.task_dir.exists():
            lock.take()
    checkpoints = Checkpoints(
        opt.task_dir / "models",
        opt.train.checkpoint_keep,
        opt.train.checkpoint_keep_every,
        opt.train.checkpoint_keep_best,
        best_by(opt),
    )
    gone = _check_paths(opt)
    if gone and not saved_steps(checkpoints.folder):
        raise UserError(next(iter(gone.values())))
    if opt.unused:
        logger.info("accepted, but without meaning here: %s", ", ".join(opt.unused))
    _check_memory(data, world_size)
    seed = opt.train.manual_seed
    if seed is None:
        before = checkpoints.seed()
        seed = utils_dist.from_main(random.randrange(10000) if before is None else before, device)
    set_up(opt.train)
    train_set = define_Dataset(data)
    test_sets = {name: define_Dataset(d) for name, d in opt.test_sets.items()}
    measures = bool(test_sets) and opt.model != "ranker" and lock is not None
    measurer = validation_measurer(opt, device) if measures else None
    # A run that goes on has all weights: what it once began with may have been moved, replaced or damaged since.
    goes_on = utils_dist.highest(len(saved_steps(checkpoints.folder)), device) > 0
    model = _model(opt, _starts(opt) if goes_on else gone, seed, device)
    degrade = Degrader(data, device) if data.degradation_device == "gpu" else None
    step = checkpoints.resume(model, degrade)
    lowest = -utils_dist.highest(-step, device)
    if 0 < lowest < step:  # another process could not read its part of that one
        step = checkpoints.resume(model, degrade, upto=lowest)
    if goes_on and not utils_dist.highest(step, device):  # a first save was cut off
        del model
        model = _model(opt, gone, seed, device)
    for key, problem in gone.items():
        if not step:
            raise UserError(problem)
        logger.info("path.%s: %s is gone, and not needed: step %d of the run has all weights", key, opt.path[key], step)
    counts = {f"the number of items in {name}": len(d) for name, d in {"train": train_set, **test_sets}.items()}
    _check_agreement({"the step of the newest checkpoint": step, **counts}, device)
    if opt.train.iterations is not None and step >= opt.train.iterations and lock is not None:
        logger.info("%s has reached step %d already; to go on raise train.iterations, or change task", opt.task, step)
        return None
    if rank == 0:
        for d in opt.datasets.values():
            check_dataset(d)
    utils_dist.highest(0, device)  # all have come through
    if rank == 0 and lock is not None:
        _make_run_folder(opt, seed, lock)
        checkpoints.begin(step)

    images, batch = len(train_set), data.dataloader_batch_size
    logger.info("%s on %s: %s", opt.task, device, model.describe())
    if why := unused_gpu():
        logger.warning("%s", why)
    kind = "pairs of images" if opt.model == "ranker" else "images"
    logger.info(
        f"{images} {kind}, batch {batch} = {world_size} x {batch // world_size} patches of {patch_size(data)} px, "
        f"seed {seed}, {f'resumed at step {step}' if step else 'from the start'}"
    )
    sampler = EndlessBatchSampler(images, batch, seed, data.dataloader_shuffle, step, rank, world_size)
    loader = training_loader(train_set, sampler, data.dataloader_num_workers, pin_memory=device.type == "cuda")
    return _Run(opt, device, seed, step, model, loader, degrade, test_sets, measurer, checkpoints, lock)


def _starts(opt: Options) -> list[str]:
    """The options of ``path`` that name weights to begin with, and nothing that is needed besides."""
    named = ["pretrained_netD", "pretrained_netE"]
    if opt.netG and opt.netG.net_type != "spandrel":  # which is built from it
        named.append("pretrained_netG")
    return [*named, "pretrained_netR"] if opt.model == "ranker" else named


def _model(opt: Options, without: Iterable[str], seed: int, device: torch.device) -> ModelBase:
    """The model with weights drawn by ``seed``, of those that ``path`` names all but ``without``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = define_Model(opt.model_copy(update={"path": opt.path.model_copy(update=dict.fromkeys(without))}), device)
    model.opt = opt  # what is saved of a run that goes on tells of the same options
    return model


def _rehearse(opt: Options, device: torch.device) -> None:
    """A dry run: the steps of the run that would begin or go on, nothing written."""
    run = _prepare(opt, device, lock=None)
    assert run is not None
    with closing(ahead(batches(run.loader), device)) as loaded, told_in_one_line(run.model, run.step + 1):
        fed = map(run.degrade, loaded) if run.degrade else loaded
        rehearse(opt, run.model, fed, run.step, partial(_reseed, run.seed), device)


def _reseed(seed: int, step: int) -> None:
    """Each step has draws of its own: no generator states need be saved for a resumed run to equal the other."""
    torch.manual_seed(hash((seed, step, utils_dist.rank())) % 2**63)


def _loop(run: _Run, stop: "_StopSignals") -> None:
    """The steps, with logs, validation and checkpoints at their times."""
    is_main = utils_dist.rank() == 0
    board = run.opt.task_dir / "tensorboard" if is_main else None
    with (
        closing(Progress(run.step, run.opt.train.iterations, board, is_main)) as progress,
        closing(ahead(batches(run.loader), run.device)) as loaded,
    ):
        step = _steps(run, loaded, stop, progress)
    if run.model.bad_steps:
        logger.info("bad steps left out since step %d: %d", run.step, run.model.bad_steps)
    if run.opt.train.iterations is None or step < run.opt.train.iterations:
        logger.info("stopped by a signal at step %d; the same command goes on from there", step)
    else:
        logger.info("done at step %d", step)


def _steps(run: _Run, loaded: Iterable[dict[str, object]], stop: "_StopSignals", progress: Progress) -> int:
    """-> the last step that was done."""
    model, device, step, train = run.model, run.device, run.step, run.opt.train
    is_due = False
    for batch in loaded:
        step += 1
        progress.data_arrived()
        _reseed(run.seed, step)
        model.update_learning_rate(step)
        with told_in_one_line(model, step):
            model.feed_data(run.degrade(batch) if run.degrade else batch)
            model.optimize_parameters(step)
        progress.step_done(model.current_log())

        stopping = bool(utils_dist.highest(stop.received, device))
        finished = step == train.iterations
        if finished or step % train.checkpoint_print == 0 or step == run.step + 1:
            means = utils_dist.total(progress.means(), device)
            means = {name: value / utils_dist.world_size() for name, value in means.items()}
            if model.bad_steps:
                means["bad_steps"] = model.bad_steps  # the same ones in all processes
            progress.report(means, model.current_learning_rate(), device)
        validation: Validation = {}
        failed: ValidationError | None = None
        if run.test_sets and not stopping and (finished or step % train.checkpoint_test == 0):
            try:
                validation = _validate(run, step, progress)
            except ValidationError as error:  # say an image too large for the memory: nothing learned is lost by it
                failed = error
        # Not in the midst of bad steps: perhaps the weights are what is bad, and the last checkpoint is the good one.
        is_due = is_due or failed is not None or step % train.checkpoint_save == 0
        if finished or stopping or (is_due and not model.bad_in_a_row):
            _save(run, step, validation)
            is_due = False
            progress.pause_over()
        if failed:
            raise failed
        if finished or stopping:
            break
    return step


def _save(run: _Run, step: int, validation: Validation) -> None:
    """A checkpoint, written by the first process; each writes its own pool of pairs before."""
    assert run.lock is not None
    run.lock.check()
    pools: dict[str, Fingerprint] = {}
    if run.degrade:
        with utils_dist.undisturbed():
            own = run.degrade.save(run.checkpoints.folder, step)
        for pool in utils_dist.gathered(own):
            pools |= pool
    if utils_dist.rank() == 0:
        with utils_dist.undisturbed():
            run.checkpoints.save(run.model, step, run.seed, validation, pools)


def _validate(run: _Run, step: int, progress: Progress) -> Validation:
    """Validate on every set; -> by its name what ``test.validation`` lists, or a ranker's share of pairs in order."""
    validation: dict[str, Mapping[str, float]] = {}
    for name, test_set in run.test_sets.items():
        if isinstance(run.model, ModelRanker):
            in_order = validate_ranker(run.model, test_set, run.device)
            progress.scalars(f"val/{name}", {"in_order": in_order})
            logger.info("step %d %s: %.2f %% of the pairs in order", step, name, 100 * in_order)
            validation[name] = {"in_order": in_order}
            continue
        assert isinstance(run.model, ModelSR)
        assert run.measurer is not None
        grid = output_path(run.opt.task_dir / "images", f"{safe_name(name)}_{step:08d}.png")
        result = validate(run.model, test_set, run.measurer, grid, run.opt.test.images, run.device)
        progress.scalars(f"val/{name}", result)
        if grid.exists():
            progress.image(f"val/{name}", grid)
        if result:
            logger.info("step %d %s: %s", step, name, ", ".join(METRICS[m].titled(v) for m, v in result.items()))
        validation[name] = result
    progress.pause_over()
    return validation


def _check_paths(opt: Options) -> dict[str, str]:
    """Missing folders and files fail at once, before anything is built.

    Returns:
        Of the missing files that only start a run: option of ``path`` -> what to say where there is nothing to resume.
    """
    images = "(png, jpg, bmp, tif, webp and others; subfolders are read)"
    what = {
        "dataroot_H": f"your ground-truth images {images}",
        "dataroot_L": f"your low-quality images {images}",
        "dataroot_H_mask": "your edge masks (.mat or .png)",
        "dataroot_ranked": f"results of one method {images}",
        "rank_csv": "results.csv of main_test.py and the images beside it",
    }
    for name, data in opt.datasets.items():
        for key, content in what.items():
            roots = data[key] if isinstance(data[key], list) else [data[key]] if data[key] else []
            for root in roots:
                if not os.path.exists(root):
                    key_path = f"datasets.{name}.{key}"
                    raise UserError(f"{key_path}: there is no {root}; put {content} there, or set {key_path}=FOLDER")
    gone = {}
    for key, needed in is_read(opt)["path"].items():
        path = opt.path[key]
        if not path or not needed or os.path.isfile(path):
            continue
        problem = f"path.{key}: there is no file {path}; {how_to_get(Path(path).name) or 'put it there'}"
        if key == "pretrained_netG" and opt.netG and opt.netG.net_type == "spandrel":
            raise UserError(f"{problem}: the network is built from it")
        if key == "pretrained_netF":
            raise UserError(f"{problem}, or set path.{key}=null: torch's own cache")
        if key == "pretrained_netR" and opt.model != "ranker":
            raise UserError(f"{problem}, or set train.rank_weight=0")
        if key == "pretrained_netR":  # of the ranker's own training
            problem = f"path.{key}: {path}: no such file; put it there"
        start = "a copy of netG" if key == "pretrained_netE" else "random weights"
        gone[key] = f"{problem}, or begin a new run with {start}: path.{key}=null"
    return gone


_FOLDERS = ("models", "images", "options", "tensorboard")
_LOG = "train.log"


def _check_run_folder(task_dir: Path) -> None:
    """What stands in the way of the run's files stops it before anything is built."""
    there = next(path for path in (task_dir, *task_dir.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"path.root: {task_dir} cannot be written (because of {there}); set path.root=FOLDER")
    for name in (*_FOLDERS, _LOG):
        path = task_dir / name
        is_right = path.is_file() if name == _LOG else path.is_dir()
        if os.path.lexists(path) and not (is_right and os.access(path, os.W_OK)):
            kind = "file" if name == _LOG else "folder"
            raise UserError(f"{path} is not a {kind} that can be written; move it away, or choose another task")


def _check_memory(data: DatasetOptions, world_size: int) -> None:
    """Refuse a batch that the whole machine cannot hold: where memory runs out, systems kill without a word."""
    patches = data.dataloader_batch_size // world_size
    needed = 4 * data.n_channels * patch_size(data) ** 2 * patches  # bytes of H alone, float32
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows cannot say it
        return
    if needed > memory:
        raise UserError(
            f"datasets.train.dataloader_batch_size, H_size: {patches} patches of {patch_size(data)} px need "
            f"{needed / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f}"
        )


def _check_agreement(facts: Mapping[str, int], device: torch.device) -> None:
    """What every process read for itself must be the same: with other weights or images they would train nonsense."""
    for what, value in facts.items():
        highest, lowest = utils_dist.highest(value, device), -utils_dist.highest(-value, device)
        if highest != lowest:
            raise UserError(
                f"{what} is {lowest} for one process and {highest} for another; all of them need the same files, so "
                f"keep path.root and the images on storage that all machines share"
            )


def _make_run_folder(opt: Options, seed: int, lock: FolderLock) -> None:
    """root/task/{models,images,options,tensorboard}, the resolved options and what they were run with."""
    try:
        if not lock.is_held:  # there was no folder to lock when this process looked into it
            opt.task_dir.parent.mkdir(parents=True, exist_ok=True)
            opt.task_dir.mkdir()
            lock.take()
        remove_parts([opt.task_dir, *(opt.task_dir / name for name in _FOLDERS)])
        for name in _FOLDERS:
            (opt.task_dir / name).mkdir(parents=True, exist_ok=True)
        setup(opt.task_dir / _LOG)
    except FileExistsError:
        raise UserError(
            f"{opt.task_dir}: another process has just begun this run; choose another task, or start again when it has "
            f"ended"
        ) from None
    except OSError as error:
        raise UserError(
            f"path.root: {opt.task_dir} cannot be written ({error.strerror}); set path.root=FOLDER"
        ) from error
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    # Without what is filled in, so that the file can be given again and changed on the command line.
    content = opt.model_dump(exclude={"unused", "is_train"})
    for data in content["datasets"].values():
        for filled_in in ("phase", "scale", "n_channels", "seed"):
            del data[filled_in]
    save_json(content, opt.task_dir / "options" / f"{stamp}.json")
    save_json({**run_facts(), "seed": seed}, opt.task_dir / "options" / f"{stamp}_facts.txt")


class _StopSignals:
    """A signal to stop is remembered until the loop looks; a second Ctrl-C or SIGTERM ends the run at once.

    SIGHUP and SIGUSR1 are warnings, which a scheduler sends before its SIGTERM: they make no signal a second one.
    """

    def __init__(self) -> None:
        self.received = 0
        self._urged = False

    def _handle(self, number: int, _frame: object) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            if self._urged:
                raise KeyboardInterrupt
            self._urged = True
        self.received = self.received or number

    def __enter__(self) -> "_StopSignals":
        self._restore = ExitStack()
        with suppress(ValueError):  # only the main thread may; elsewhere signals are somebody else's
            for number in STOP_SIGNALS:
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup: the run is to outlive its terminal
                self._restore.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()
