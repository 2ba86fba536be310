"""Several processes, one GPU (or CPU) each: ``torchrun --nproc_per_node=2 main_train_gan.py --opt ...``.

Without torchrun everything here is a no-op of a world of one, so that no caller has to ask.

Processes that train together end together (utils_launch.run). The first that fails says so in the store where they met,
which torchrun keeps, and is the only one that prints. A thread in each of the others looks there: a process that waits
in a collective for one that is gone cannot look itself, and with NCCL it would wait for hours.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils import utils_error
from utils.utils_error import UserError

T = TypeVar("T")

JOIN_LIMIT = timedelta(minutes=5)  # for all to start and meet
WORK_LIMIT = timedelta(hours=3)  # of one waiting for another: the first looks at every training image
_LOOK: Final = 0.3  # seconds between two looks for a failure
_GRACE: Final = 3.0  # seconds in which a process may leave by itself, files closed, once another has failed


class Place(NamedTuple):
    """What torchrun tells each process by environment variables."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    port: int = 0


def place() -> Place:
    """Which of how many this process is, by its environment.

    Raises:
        UserError: some of the variables are missing or no such numbers.
    """
    needed = ["RANK", "WORLD_SIZE"]
    given = [name for name in (*needed, "LOCAL_RANK") if os.environ.get(name)]
    if not given:
        return Place()  # MASTER_ADDR and MASTER_PORT alone are left over from something else
    if os.environ.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(
            f"{', '.join(given)} set in the environment, but not {', '.join(missing)}: start several processes with "
            f"torchrun, which sets them all; for a single one unset {', '.join(given)}"
        )
    world_size = _number("WORLD_SIZE", 1, 10**6)
    rank = _number("RANK", 0, world_size - 1)
    local_world_size = _number("LOCAL_WORLD_SIZE", 1, world_size) if os.environ.get("LOCAL_WORLD_SIZE") else None
    # Without it, as with Kubernetes' PyTorchJob, each process has a machine of its own.
    local_rank = _number("LOCAL_RANK", 0, (local_world_size or world_size) - 1) if "LOCAL_RANK" in given else 0
    port = _number("MASTER_PORT", 1, 65535) if world_size > 1 else 0
    return Place(
        rank, world_size, local_rank, local_world_size or local_rank + 1, os.environ.get("MASTER_ADDR", ""), port
    )


def _number(name: str, lowest: int, highest: int) -> int:
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdigit() and lowest <= int(text[:20]) <= highest):
        raise UserError(
            f"{name}={text[:40]} in the environment: a whole number from {lowest} to {highest} is needed; start with "
            f"torchrun, which sets it, or unset RANK, WORLD_SIZE and LOCAL_RANK for a single process"
        )
    return int(text)


class _Meeting:
    """The store where the processes meet and where the first to fail says so."""

    def __init__(self, here: Place, patience: timedelta) -> None:
        self.place = here
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._status: int | None = None  # to leave with, once it is known that one has failed
        self._knows = threading.Event()
        self.writing = threading.Lock()  # held while files are written that must not be cut short
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_host = here.rank == 0 and not agent
        _check_address(here, is_host, patience)
        self.store = self._connect(is_host, patience)  # kept by the first process where torchrun does not
        # A connection of its own: on the other one NCCL may wait, and whoever comes next waits too.
        self._news = dist.PrefixStore("news", self._connect(False, patience))

    def _connect(self, is_host: bool, patience: timedelta) -> dist.Store:
        here, found = self.place, list[dist.Store | Exception]()

        def connect() -> None:
            try:
                store = dist.TCPStore(here.address, here.port, here.world_size, is_host, patience, False, True)
                # torchrun keeps its store when it starts the processes anew.
                found.append(dist.PrefixStore(f"train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store))
            except Exception as error:
                found.append(error)

        # In a thread: where another program listens and is silent, PyTorch waits for ever.
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(patience.total_seconds())
        result = found[0] if found else TimeoutError(f"no answer within {_words(patience)}")
        if isinstance(result, Exception):
            reason = (str(result).splitlines() or [type(result).__name__])[0]
            raise UserError(
                f"MASTER_ADDR, MASTER_PORT: the processes cannot meet at {here.address}:{here.port} ({reason}); is "
                f"another program there? choose another port"
            )
        return result

    def join(self, device: torch.device) -> None:
        """Wait until all are here, each with a device of its own; from then on notice when one fails."""
        here = self.place
        self._news.set(f"device/{here.rank}", _device_name(device))
        if self._news.add(f"joined/{here.rank}", 1) > 1:
            raise UserError(f"RANK={here.rank} is the number of two processes at {here.address}:{here.port}")
        self._news.add("joined", 1)
        self._watcher.start()
        end = time.monotonic() + JOIN_LIMIT.total_seconds()
        while (came := self._news.add("joined", 0)) < here.world_size:
            if self.failure() is not None:
                raise _AnotherFailedError
            if time.monotonic() > end:
                raise UserError(
                    f"WORLD_SIZE={here.world_size}, but {came} came to {here.address}:{here.port} within "
                    f"{_words(JOIN_LIMIT)}"
                )
            time.sleep(0.05)
        names = [self._news.get(f"device/{rank}").decode() for rank in range(here.world_size)]
        mine = names[here.rank]
        if len({name.partition(" ")[0] for name in names}) > 1:
            raise UserError(f"some processes have a GPU and some have none: {', '.join(names)}")
        if mine != "cpu" and names.index(mine) < here.rank:
            raise UserError(
                f"gpu_ids, LOCAL_RANK: processes {names.index(mine)} and {here.rank} are on one GPU ({mine}); each "
                f"needs its own"
            )

    def failure(self) -> int | None:
        """The status with which all leave, once one has failed."""
        # From then on the store is left alone: it may go with the process that keeps it.
        if self._status is None and self._news.check(["failed"]):
            self._know(int(self._news.get("failed")))
        return self._status

    def fail(self, status: int) -> tuple[int, bool]:
        """Tell the others; -> the status to leave with, and whether this process was the first to fail."""
        first = self._status is None and self._news.add("failures", 1) == 1
        if first:
            self._news.set("failed", str(status))
            self._know(status)
        elif self._status is None:
            self._know(int(self._news.get("failed")))
        return self._status or status, first

    def _know(self, status: int) -> None:
        self._status = status
        self._knows.set()
        self._news.set(f"know/{self.place.rank}", "")

    def wait_until_all_know(self) -> None:
        """So that no one is left to wonder why a connection broke; not for those that are no more."""
        keys = [f"know/{rank}" for rank in range(self.place.world_size)]
        end = time.monotonic() + 5
        with suppress(RuntimeError):  # the store went with the process that kept it
            while not self._news.check(keys) and time.monotonic() < end:
                time.sleep(0.05)

    def wait_for_news(self) -> None:
        """Wait a moment: what broke a connection has been told before, unless a process was killed."""
        self._knows.wait(_GRACE)

    def _watch(self) -> None:
        status, lost = None, None
        while status is None and not self._closed.wait(_LOOK):
            try:
                status = self.failure()
            except RuntimeError:  # the process that kept the store is gone
                status, lost = 2, self.lost()
                self._knows.set()
        if status is not None and not self._closed.wait(_GRACE):
            with self.writing:
                if lost:
                    utils_error.tell(lost)
                _leave(status)

    def lost(self) -> UserError:
        """What is to be said of a process that said nothing."""
        return UserError(
            f"another of the {self.place.world_size} processes has ended without a word: was it killed, as systems do "
            f"when memory runs out?"
        )

    def close(self) -> None:
        self._closed.set()

    def end(self) -> None:
        """Close, and wait for the thread: Python's own end aborts one that is in the store just then."""
        self.close()
        if self._watcher.is_alive():
            self._watcher.join(_GRACE)


class _AnotherFailedError(Exception):
    """Another process has failed and says why."""


_meeting: _Meeting | None = None


def _check_address(here: Place, is_host: bool, patience: timedelta) -> None:
    """What PyTorch's store would say in many lines, or after waiting without a word."""
    try:
        socket.getaddrinfo(here.address, here.port)
    except (OSError, UnicodeError) as error:
        raise UserError(f"MASTER_ADDR={here.address}: no machine of this name is known here") from error
    if is_host:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", here.port))
            except OSError as error:
                raise UserError(
                    f"MASTER_PORT={here.port}: cannot be used ({error.strerror}); choose another port"
                ) from error
        return
    end = time.monotonic() + patience.total_seconds()
    while True:
        try:
            socket.create_connection((here.address, here.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"MASTER_ADDR, MASTER_PORT: no process 0 at {here.address}:{here.port} within "
                    f"{_words(patience)} ({error.strerror or error}); is it running, and the port open?"
                ) from error
            time.sleep(0.2)


def _words(limit: timedelta) -> str:
    seconds = limit.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


def _device_name(device: torch.device) -> str:
    """``cpu``, or what tells one GPU from all others: processes that see one card each all call it number 0."""
    if device.type == "cpu":
        return "cpu"
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"cuda {uuid or f'{device.index} of {socket.gethostname()}'}"


def _device(here: Place, gpu_ids: Sequence[int] | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # KAIR's files list four GPUs; on a machine with fewer the first that exist serve.
    ids = [i for i in gpu_ids if i < count] if gpu_ids else list(range(count))
    if len(ids) < here.local_world_size:
        raise UserError(
            f"gpu_ids: {here.local_world_size} processes want a GPU each, {len(ids)} of {count} may be used"
        )
    device = torch.device("cuda", ids[here.local_rank])
    torch.cuda.set_device(device)
    return device


def init(gpu_ids: Sequence[int] | None = None) -> torch.device:
    """Join the other processes, if torchrun started this one, and choose this process's device.

    Args:
        gpu_ids: GPUs to use, the first for local rank 0 and so on; None = by local rank.

    Raises:
        UserError: there is no such GPU, or the processes cannot meet.
    """
    global _meeting
    here = place()
    if here.world_size == 1 or dist.is_initialized():
        return _device(here, gpu_ids)
    _meeting = _Meeting(here, JOIN_LIMIT)
    device = _device(here, gpu_ids)
    _meeting.join(device)
    # Gloo, too, where PyTorch for CUDA was built without NCCL: on Windows.
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    _meeting.store.set_timeout(WORK_LIMIT)
    dist.init_process_group(
        backend, store=_meeting.store, rank=here.rank, world_size=here.world_size, timeout=WORK_LIMIT
    )
    return device


def close() -> None:
    """Leave the group."""
    global _meeting
    if dist.is_initialized():
        dist.destroy_process_group()
    if _meeting is not None:
        _meeting.end()
        _meeting = None


def leave_together(error: BaseException) -> None:
    """Tell the others and leave the process; return where there are no others."""
    meeting = _meeting
    if meeting is None:  # it failed before it met them, as they may have
        try:
            here = place()
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            meeting = _Meeting(here, timedelta(seconds=5)) if here.world_size > 1 and agent else None
        except UserError:
            return
    if meeting is None:
        return
    try:
        if _is_broken_connection(error):
            meeting.wait_for_news()
            error = meeting.lost()
        meeting.close()  # from here on this process leaves by itself
        status, first = meeting.fail(utils_error.status_of(error))
    except RuntimeError:  # the store went with the process that kept it
        status, first = utils_error.status_of(error), not isinstance(error, _AnotherFailedError)
    if first:
        utils_error.tell(error)
        _tell_torchrun(error)
        meeting.wait_until_all_know()
    # Not through Python's own end, where the threads of a broken group were seen to hang.
    _leave(status)


def _is_broken_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _tell_torchrun(error: BaseException) -> None:
    """The line that torchrun's own report of failed processes shows, instead of how it could be had."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        line = utils_error.explain(error) or f"{type(error).__name__}: {error}"
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)


_farewell: Callable[[], None] | None = None


def before_leaving(call: Callable[[], None]) -> None:
    """Have this called where the process must leave without coming back to its caller; the last one counts."""
    global _farewell
    _farewell = call


def _leave(status: int) -> None:
    with suppress(Exception):
        if _farewell is not None:
            _farewell()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


@contextmanager
def undisturbed() -> Iterator[None]:
    """While files are written: another's failure waits until they are whole."""
    if _meeting is None:
        yield
        return
    with _meeting.writing:
        yield


def rank() -> int:
    """This process's number; 0 writes files and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum each value over all processes; every process must pass the same names."""
    if world_size() == 1:
        return dict(values)
    tensor = torch.tensor(list(values.values()), dtype=torch.float64 if device.type == "cpu" else torch.float32)
    tensor = tensor.to(device)
    dist.all_reduce(tensor)
    return dict(zip(values, tensor.tolist(), strict=True))


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place, for which the host does not wait where the values are on a GPU."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order; every process waits for the others here."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: int, device: torch.device) -> int:
    """The main process's value, for all."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.broadcast(tensor, 0)
    return int(tensor.item())


def highest(value: int, device: torch.device) -> int:
    """The largest of the processes' values; every process waits for the others here."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())
