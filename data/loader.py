"""Training batches in an order that depends on the seed and the step only: not on workers, processes or restarts."""

import logging
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sized
from contextlib import closing, contextmanager, suppress
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from utils.utils_error import UserError, explain

logger = logging.getLogger(__name__)

SampleKey = tuple[int, tuple[int, int]]  # which image, and the seed of this sample's random draws


class EndlessBatchSampler(Sampler[list[SampleKey]]):
    """Batches from ``start_step`` on, without end; each epoch is a permutation of its own.

    Sample number n of the run (n = step * batch_size + place) is image ``order[n % size]`` of epoch ``n // size``, and
    draws its crop, flip and degradation from the seed ``(seed, n)``. So a resumed run sees what the uninterrupted one
    would have seen, and the order is the same for any number of workers.

    Args:
        size: images in the set.
        batch_size: samples of one step over all processes, a multiple of ``world_size``.
        seed: of the run.
        shuffle: False = in the set's own order.
        start_step: steps already done.
        rank, world_size: this process takes its contiguous share of each batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.start_step, self.rank, self.world_size = start_step, rank, world_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        share = self.batch_size // self.world_size
        first = self.start_step * self.batch_size + self.rank * share
        epoch, order = -1, np.arange(self.size)
        while True:
            batch = []
            for n in range(first, first + share):
                if n // self.size != epoch and self.shuffle:
                    epoch = n // self.size
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
                batch.append((int(order[n % self.size]), (self.seed, n)))
            yield batch
            first += self.batch_size


# To end a run in good order; Windows has neither of the last two.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def _init_worker(_: int) -> None:
    """One thread, no ear for signals."""
    # The workers are the parallelism; OpenCV's and PyTorch's own threads would only fight over the cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's signals reach the whole group of processes: the main one ends its step, saves and then
    # sends its workers home; if it dies they notice by themselves.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGBUS"):  # /dev/shm is full: the main process says it, PyTorch's handler would too
        signal.signal(signal.SIGBUS, signal.SIG_DFL)


def training_loader(dataset: Dataset, sampler: EndlessBatchSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader over the sampler's batches, whose workers stay to the end, no more of them than there are cores."""
    cores = os.cpu_count() or 1
    if num_workers > cores:
        logger.info("dataloader_num_workers: %d asked, %d started, one for each core", num_workers, cores)
        num_workers = cores
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
    )


RESTARTS = 3  # of the workers in a row, without a batch between them


def batches(loader: DataLoader) -> Generator[dict[str, Any], None, None]:
    """The batches of a :func:`training_loader`; what is no fault of the program's is one line here.

    Where a worker has died all of them are started anew, up to :data:`RESTARTS` times in a row, and go on with the
    batch that is due: the batches are those that would have come. Close the generator (``contextlib.closing``) to send
    the workers home.

    Raises:
        UserError: they keep dying, or one met trouble with its images, memory or disk.
    """
    sampler = loader.batch_sampler
    assert isinstance(sampler, EndlessBatchSampler)
    news = _NewsOfWorkers()
    iterator: Iterator[dict[str, Any]] | None = None
    restarts = 0
    try:
        while True:
            try:
                if iterator is None:
                    with _deaf_children():
                        iterator = iter(loader)
                    news.hold_back()
                with news.let_through():
                    batch = next(iterator)
            except Exception as error:
                died = loader.num_workers > 0 and _how_one_died(error)
                line = died or explain(error)
                if died and restarts < RESTARTS:
                    restarts += 1
                    logger.warning("%s; all start anew (%d of at most %d times in a row)", died, restarts, RESTARTS)
                    _send_home(iterator)
                    iterator = None
                    continue
                if line:
                    raise UserError(line) from error
                raise
            restarts = 0
            sampler.start_step += 1  # where the next iterator begins
            yield batch
    finally:
        # Now and not when the garbage is collected: workers are deaf to the SIGTERM that would end them at exit.
        _send_home(iterator)
        news.close()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Signals wait meanwhile; processes that are started do not hear them at all, Python's tracker of resources too."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send_home(iterator: Iterator[Any] | None) -> None:
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def _how_one_died(error: Exception) -> str | None:
    """What is to be said of a worker that has ended; None where it has sent an exception, which names its process."""
    if " in DataLoader worker process " in str(error):
        return None
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return explain(error)
    # Its last batch is there, but not who would hand over the memory that holds it.
    is_lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    return "a process that reads images has ended without a word" if is_lost else None


class _NewsOfWorkers:
    """PyTorch's handler of SIGCHLD raises where a worker has died, wherever the main thread is: in a step, in a save.

    Here it may only while a batch is waited for; what came before is heard then.
    """

    def __init__(self) -> None:
        self._theirs: Callable[[int, Any], Any] | None = None
        self._came = self._may_raise = False

    def hold_back(self) -> None:
        """To be called when workers have been started, with which PyTorch sets its handler."""
        with suppress(AttributeError, ValueError):  # Windows has no such signal; other threads set no handlers
            theirs = signal.getsignal(signal.SIGCHLD)
            if callable(theirs) and theirs != self._handle:
                signal.signal(signal.SIGCHLD, self._handle)
                self._theirs = theirs

    def close(self) -> None:
        if self._theirs is not None:
            signal.signal(signal.SIGCHLD, self._theirs)

    def _handle(self, number: int, frame: Any) -> None:
        self._came = True
        if self._may_raise:
            self._tell(number, frame)

    def _tell(self, number: int, frame: Any) -> None:
        self._came = False
        if self._theirs is not None:
            self._theirs(number, frame)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        self._may_raise = True
        try:
            if self._came:
                self._tell(signal.SIGCHLD, None)
            yield
        finally:
            self._may_raise = False


def ahead(loaded: Generator[dict[str, Any], None, None], device: torch.device) -> Generator[dict[str, Any], None, None]:
    """The batches with their tensors on the device. On a GPU the next one is copied while this one is computed with.

    It takes pinned memory, and one batch more than is used. Closing it closes ``loaded``.
    """
    with closing(loaded):
        if device.type != "cuda":
            yield from loaded
            return
        copying = torch.cuda.Stream(device)
        last: tuple[dict[str, Any], torch.cuda.Event] | None = None
        for batch in loaded:
            with torch.cuda.stream(copying):
                copied = {
                    name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                    for name, value in batch.items()
                }
                arrived = copying.record_event()
            if last is not None:
                yield _arrived(*last, device)
            last = copied, arrived
        if last is not None:
            yield _arrived(*last, device)


def _arrived(batch: dict[str, Any], event: torch.cuda.Event, device: torch.device) -> dict[str, Any]:
    """A batch for use on the device's own stream, which waits for the copies."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(event)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(stream)  # its memory belongs to the other stream and must not go back too early
    return batch


def one_by_one(dataset: Dataset, rank: int, world_size: int) -> DataLoader:
    """One image at a time, read by this process; several processes share the images."""
    assert isinstance(dataset, Sized)
    shared = range(rank, len(dataset), world_size)
    return DataLoader(dataset, batch_size=1, sampler=shared, collate_fn=_batch_of_one)


def _batch_of_one(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch without L_extras, which are for saving a result and no tensors."""
    return default_collate([{name: value for name, value in item.items() if name != "L_extras"} for item in items])
