"""One step of preparation over a folder of images: in parallel, resumable, never half written, one bad image no end.

A step (``steps.py``) says which files it makes of an image, and makes them. Here it is run over all images:

* A file appears under its name when it is whole; what is there already is skipped. So a preparation that was stopped,
  or killed, is finished by the same command, with the same result.
* ``prepared.json`` in the output folder says by what command and settings it was filled; a folder filled by others is
  not touched.
* An image that cannot be read or used is named at the end, and the exit status is 1; the others are done.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import cv2
import torch
from tqdm import tqdm

from data.preparation.arguments import Arguments
from utils.utils_error import UserError, printable
from utils.utils_image import Array, dropped, get_image_paths, imsave, read_file, save_mask
from utils.utils_name import check_output, output_names, output_path
from utils.utils_run import save_json, write_atomically

SETTINGS = "prepared.json"
RECORDS = "manifest.jsonl"
ALONE = 3.0  # seconds after which the main process asks for help
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")

# What one odd image can provoke; anything else, a full disk above all, concerns every image and ends the program.
IMAGE_ERRORS = (UserError, ValueError, MemoryError, cv2.error)


class Product(NamedTuple):
    """A file that a step has made: its name below the output folder, its content, perhaps a line for the manifest."""

    name: str
    image: Array
    record: dict[str, Any] | None = None


class PreparationStep(Arguments, ABC):
    """What is done to each image: a frozen dataclass, whose fields are all that the result depends on."""

    keeps_records: ClassVar[bool] = False  # every product has a record, collected in manifest.jsonl

    @property
    def is_raw(self) -> bool:
        """Whether the files are raw: large, and :meth:`room` knows beforehand how large."""
        return False

    def room(self, path: str, name: str, wanted: Sequence[str]) -> int:
        """Bytes that those of :meth:`outputs` that are ``wanted`` will take; only of a step that :attr:`is_raw`."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    def also_read(self) -> Sequence[str]:
        """Folders that are read besides the input."""
        return ()

    def folders(self, names: Sequence[str]) -> list[str]:
        """A file in each folder below the output folder that :meth:`outputs` will name, of images so called."""
        return list({name.rpartition("/")[0]: name for name in names}.values())

    @abstractmethod
    def outputs(self, path: str, name: str) -> list[str]:
        """The files to make of the image ``path``, whose own name is ``name``; reads its header at most."""

    def endings(self) -> Sequence[str]:
        """What may be put behind an image's name, where it can make the name of another image."""
        return ()

    def left_out(self, path: str, name: str) -> str:
        """What an image is too small for, though not bad: goes on after "3 images"; "" for nothing."""
        return ""

    @abstractmethod
    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        """Make those of :meth:`outputs` that are ``wanted``."""


@dataclass
class Outcome:
    """What became of one image."""

    path: str
    written: int = 0
    finished: int = 0  # files that were there before
    stale: bool = False  # ... though the image is newer than they are
    problem: str | None = None
    dropped: str = ""  # what the files lack that the image has, see utils_image.dropped
    left_out: str = ""  # see PreparationStep.left_out
    records: list[dict[str, Any]] = field(default_factory=list)


# -------------------------------------------------------------------------------------------------------- the command


def prepare(step: PreparationStep, inputs: Sequence[str], output: Path, workers: int, dry_run: bool) -> int:
    """Apply ``step`` to every image below ``inputs``; returns the exit status, 1 where some images are bad.

    Raises:
        UserError: nothing can be done: no images, an output folder filled by something else, a full disk.
    """
    paths = get_image_paths(list(inputs))
    names = output_names(paths, inputs)
    read, roots = [*paths, *get_image_paths(step.also_read())], [*inputs, *step.also_read()]
    check_output(output, read, roots, [SETTINGS, RECORDS, *step.folders(names)])
    check_settings(step.command, step.settings(), inputs, output)
    journal = _Journal(output / RECORDS) if step.keeps_records else None
    images = _images(paths, names, journal)
    _check_names(step, images)
    if step.is_raw:
        _check_room(step, images, output, workers)
    if dry_run:
        return _dry_run(step, images, output)
    claim(step.command, step.settings(), inputs, output)
    tally = Tally(step.command, output)
    for outcome in run_all(partial(_apply, step, output), images, workers, step.command):
        tally.add(outcome)
        if journal:
            journal.add(outcome.records)
    if journal:
        journal.finish()
    return tally.report()


class _Image(NamedTuple):
    """An image to prepare: its path, its own name, and which of its products have a record (None: they need none)."""

    path: str
    name: str
    recorded: frozenset[str] | None


def _images(paths: Sequence[str], names: Sequence[str], journal: "_Journal | None") -> list[_Image]:
    images = []
    for path, name in zip(paths, names, strict=True):
        recorded = None if journal is None else frozenset(journal.files_of(name + Path(path).suffix))
        images.append(_Image(path, name, recorded))
    return images


def _check_names(step: PreparationStep, images: Sequence[_Image]) -> None:
    """Raise UserError where two images would become one file: ``scan.png`` with the ending S, and ``scanS.png``."""
    of_name = {image.name: image for image in images}
    for image in images if step.endings() else ():
        for ending in step.endings():
            other = of_name.get(image.name + ending)
            if other is None or other is image:
                continue
            try:
                both = {*step.outputs(image.path, image.name)} & {*step.outputs(other.path, other.name)}
            except IMAGE_ERRORS:  # nothing is made of it; named when it is its turn
                continue
            if both:
                raise UserError(f"{image.path} and {other.path} would both become {min(both)}: rename one of them")


def _check_room(step: PreparationStep, images: Sequence["_Image"], output: Path, workers: int) -> None:
    """Say how many bytes will be written. Raises UserError where the disk has not so many."""
    needed = sum(run_all(partial(_room, step, output), images, workers, f"{step.command}: sizes"))
    place = next(folder for folder in (output, *output.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    line = f"{step.command}: {_size(needed)} to write, {_size(free)} free on the disk of {printable(str(output))}"
    if needed > free:
        raise UserError(f"{line}; give an --output on a larger disk, or make PNG, which take less")
    print(line, flush=True)


def _room(step: PreparationStep, output: Path, image: "_Image") -> int:
    """Bytes of what is missing of one image, 0 for one that is bad; in a worker."""
    try:
        wanted, _ = _missing(step, output, image)
        return step.room(image.path, image.name, wanted) if wanted else 0
    except IMAGE_ERRORS:  # named when it is its turn
        return 0


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB ({size:,} bytes)"


def _apply(step: PreparationStep, output: Path, image: _Image) -> Outcome:
    """Make what is missing of one image; in a worker."""
    path, name, _ = image
    outcome = Outcome(path)
    try:
        wanted, present = _missing(step, output, image)
        outcome.left_out = step.left_out(path, name)
        outcome.finished, outcome.stale = len(present), _is_newer(path, present)
        products = step.make(path, name, wanted) if wanted else iter(())
        product = next(products, None)
        outcome.dropped = " and ".join(dropped(read_file(path), path)) if product else ""
    except IMAGE_ERRORS as error:
        outcome.problem = one_line(path, error)
        return outcome
    while product is not None:
        _save(product.image, output_path(output, product.name))
        outcome.written += 1
        if product.record is not None:
            outcome.records.append({"file": product.name, "H": name + Path(path).suffix, **product.record})
        try:
            product = next(products, None)
        except IMAGE_ERRORS as error:
            outcome.problem = one_line(path, error)
            return outcome
    return outcome


def _missing(step: PreparationStep, output: Path, image: _Image) -> tuple[list[str], list[Path]]:
    """The files of an image that are still to make, and those that are there."""
    wanted, present = [], []
    for file in step.outputs(image.path, image.name):
        if (output / file).exists() and (image.recorded is None or file in image.recorded):
            present.append(output / file)
        else:
            wanted.append(file)
    return wanted, present


def _is_newer(path: str, products: Sequence[Path]) -> bool:
    """Whether an image has changed after files were made of it, as far as the clock tells."""
    if not products or not os.path.exists(path):  # an image of an LMDB folder has no time of its own
        return False
    return os.path.getmtime(path) > min(product.stat().st_mtime for product in products)


def _save(image: Array, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror or error}") from error
    if path.suffix == ".mat":
        save_mask(image, str(path))
    else:
        imsave(image, str(path), png_level=3)


def one_line(path: str, error: Exception) -> str:
    """What is the matter with an image, its path included."""
    text, name = printable(" ".join(str(error).split())) or type(error).__name__, printable(path)
    return text if name in text else f"{name}: {text}"


def _dry_run(step: PreparationStep, images: Sequence[_Image], output: Path) -> int:
    """Say what would be made; returns 1 where headers are bad."""
    tally, shown = Tally(step.command, output), 0
    for image in images:
        path = image.path
        try:
            wanted, present = _missing(step, output, image)
            left_out = step.left_out(path, image.name)
        except IMAGE_ERRORS as error:
            tally.add(Outcome(path, problem=one_line(path, error)))
            continue
        tally.add(Outcome(path, len(wanted), len(present), _is_newer(path, present), left_out=left_out))
        if wanted and shown < 10:
            shown += 1
            more = f" ... {wanted[-1]} ({len(wanted)} files)" if len(wanted) > 1 else ""
            print(printable(f"{path} -> {wanted[0]}{more}"))
    return tally.report(would=True)


# ----------------------------------------------------------------------------------------------- whose folder it is


def check_settings(command: str, settings: Mapping[str, Any], inputs: Sequence[str], output: Path) -> None:
    """Raise UserError where ``output`` was filled by something other than this command with these settings."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder")
    try:
        before = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(output.iterdir()):
            raise UserError(
                f"{output}: holds files that were not prepared by this program; give a new folder or empty it"
            ) from None
        return
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{output / SETTINGS}: cannot be read ({error}); give a new folder") from error
    if not (isinstance(before, dict) and isinstance(before.get("settings"), dict)):
        raise UserError(f"{output / SETTINGS}: holds no settings; give a new folder")
    now = _description(command, settings, inputs)
    if command == "multiscale":  # made before there was a choice, when it always enlarged
        before["settings"].setdefault("enlarge", True)
    if before == now:
        return
    if before.get("command") != command:
        difference = f"{before.get('command')}, not {command}"
    else:
        old = {"input": before.get("input"), **before["settings"]}
        new = {"input": now["input"], **now["settings"]}
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        difference = f"{key} {_shown(old.get(key))}, not {_shown(new.get(key))}"
    raise UserError(
        f"{output}: was prepared with {difference}; give another --output, or remove that folder to make it anew"
    )


def claim(command: str, settings: Mapping[str, Any], inputs: Sequence[str], output: Path) -> None:
    """Make the folder, write down what it is filled by, and clear away what a killed process left half written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for leftover in output.rglob("*.part"):
            leftover.unlink()
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); give another --output") from error
    save_json(_description(command, settings, inputs), output / SETTINGS)


def _description(command: str, settings: Mapping[str, Any], inputs: Sequence[str]) -> dict[str, Any]:
    # through JSON and back: tuples become lists, as in the file
    content = {"command": command, "input": [str(Path(i).resolve()) for i in inputs], "settings": dict(settings)}
    description: dict[str, Any] = json.loads(json.dumps(content))
    return description


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --------------------------------------------------------------------------------------------------------- processes


def run_all(work: Callable[[_Item], _Made], items: Sequence[_Item], workers: int, label: str) -> Iterator[_Made]:
    """``work`` of every item, in order, by so many processes, beside a progress bar or, in a log, some lines.

    Ctrl-C lets the items at hand be finished. Raises UserError where a process has died.
    """
    left = deque(items)
    with _Progress(len(items), label) as progress:
        threads, began = torch.get_num_threads(), time.monotonic()
        torch.set_num_threads(1)  # as in a worker: what an image becomes does not depend on the number of processes
        try:
            # Small folders are done before processes would have started.
            while left and (workers == 1 or time.monotonic() - began < ALONE):
                yield progress.count(work(left.popleft()))
        finally:
            torch.set_num_threads(threads)
        if not left:
            return
        kinds = multiprocessing.get_all_start_methods()
        # No fork: the parent's threads and open LMDB folders would be copied in whatever state they are.
        context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
        if "forkserver" in kinds:
            context.set_forkserver_preload([__name__])
        pool = ProcessPoolExecutor(min(workers, len(left)), context, _start_worker)
        try:
            waiting: deque = deque()
            for item in left:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 4 * workers:  # no further ahead: results may be whole files
                    yield progress.count(waiting.popleft().result())
            while waiting:
                yield progress.count(waiting.popleft().result())
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, for want of memory perhaps; the same command with fewer --workers goes on"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # The processes are the parallelism.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole group; the main process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A main process that is killed cannot send its workers home: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Progress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, total: int, label: str) -> None:
        self._bar = tqdm(total=total, desc=label, unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self._total, self._label, self._done, self._said = total, label, 0, time.monotonic()

    def count(self, result: _Made) -> _Made:
        self._bar.update()
        self._done += 1
        if self._bar.disable and time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            print(f"{self._label}: {self._done} of {self._total} images", file=sys.stderr, flush=True)
        return result

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


# ----------------------------------------------------------------------------------------------------------- results


class Tally:
    """Counts outcomes and reports them."""

    def __init__(self, command: str, output: Path) -> None:
        self._command, self._output = command, output
        self._images = self._written = self._finished = 0
        self._stale: list[str] = []
        self._problems: list[str] = []
        self._remarks: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        self._images += 1
        self._written += outcome.written
        self._finished += outcome.finished
        if outcome.stale:
            self._stale.append(outcome.path)
        if outcome.problem:
            self._problems.append(outcome.problem)
        self._remarks.update(filter(None, (outcome.dropped, outcome.left_out)))

    def report(self, would: bool = False) -> int:
        """Print the result, bad images on standard error; returns the exit status."""
        for problem in self._problems:
            print(f"bad: {problem}", file=sys.stderr)
        for phrase, count in self._remarks.items():
            print(f"{_count(count, 'image')} {phrase}", file=sys.stderr)
        if self._stale:
            more = f" and {len(self._stale) - 1} more" if len(self._stale) > 1 else ""
            remedy = "remove those to have them made anew"
            print(printable(f"{self._stale[0]}{more}: changed after files were made of it; {remedy}"), file=sys.stderr)
        parts = [f"{'would write' if would else 'wrote'} {_count(self._written, 'file')}"]
        if self._finished:
            parts.append(f"{self._finished} were finished before")
        if self._problems:
            parts.append(f"{_count(len(self._problems), 'bad image')} left out")
        print(f"{self._command}: {_count(self._images, 'image')}, {', '.join(parts)}: {printable(str(self._output))}")
        return 1 if self._problems else 0


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


class _Journal:
    """``manifest.jsonl``: a line of JSON for each file made, ``"file"``, of the image ``"H"``.

    Appended to while at work, sorted at the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, Mapping[str, Any]] = {}
        self._files: dict[str, set[str]] = defaultdict(set)
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                # the last line, cut short, or somebody's; its file is made again
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    self._remember(json.loads(line))

    def _remember(self, record: Mapping[str, Any]) -> None:
        self._records[record["file"]] = record
        self._files[record["H"]].add(record["file"])

    def files_of(self, image: str) -> set[str]:
        """The files made of an image that have a line."""
        return self._files[image]

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        if records:
            for record in records:
                self._remember(record)
            with self._path.open("a", encoding="utf-8", newline="") as file:
                # a line that was cut short ends here
                file.write("".join(f"\n{json.dumps(record)}" for record in records) + "\n")

    def finish(self) -> None:
        lines = [json.dumps(self._records[name]) for name in sorted(self._records)]
        write_atomically("".join(f"{line}\n" for line in lines), self._path)
