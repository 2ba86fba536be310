"""Training batches in an order that depends on the seed and the step only: not on workers, processes or restarts."""

import logging
import os
import signal
from collections.abc import Generator, Iterator, Sized
from contextlib import closing
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


def _init_worker(_: int) -> None:
    """One thread, no ear for signals."""
    # The workers are the parallelism; OpenCV's and PyTorch's own threads would only fight over the cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole group of processes: the main one ends its step, saves and then
    # sends its workers home; if it dies they notice by themselves.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGBUS"):  # /dev/shm is full: the main process says it, PyTorch's handler would too
        signal.signal(signal.SIGBUS, signal.SIG_DFL)


def training_loader(dataset: Dataset, sampler: EndlessBatchSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader over the sampler's batches that keeps its workers, no more of them than there are cores."""
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
        persistent_workers=num_workers > 0,
    )


def batches(loader: DataLoader) -> Generator[dict[str, Any], None, None]:
    """The loader's batches; what is no fault of the program's is one line here, without the worker's traceback.

    Close the generator (``contextlib.closing``) to send the workers home.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except Exception as error:
        if line := explain(error):
            raise UserError(line) from error
        raise
    finally:
        # Now and not when the garbage is collected: workers are deaf to the SIGTERM that would end them at exit.
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


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
