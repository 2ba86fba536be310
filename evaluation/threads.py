"""Work that threads do behind the main one's back, with the results and the errors of doing it in order."""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

_T = TypeVar("_T")


class Threads:
    """A few threads that make calls, for a ``with`` statement that leaves none of them at work.

    An error, or Ctrl-C, that leaves the ``with`` statement ends their calls too, where Ctrl-C would end them in the
    main thread.

    Args:
        count: how many.
        torch_threads: how many PyTorch uses within each of them; on the CPU they would fight for the cores.
    """

    def __init__(self, count: int, torch_threads: int = 1) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(torch_threads,))
        self._at_work: set[int] = set()
        self._is_over = False
        self._lock = threading.Lock()

    def __enter__(self) -> "Threads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            self._pool.shutdown(wait=False, cancel_futures=True)
            with self._lock:
                self._is_over = True
                for thread in self._at_work:
                    # What CPython does to the main thread upon Ctrl-C, done to another one.
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt)
                    )
        self._pool.shutdown()

    def in_order(self, calls: Iterable[Callable[[], _T]]) -> Iterator[_T]:
        """The results of calls, in their order, each made while the next ones are drawn and made.

        One call more than there are threads is drawn before the first result is given, which bounds what the calls
        hold. An error comes where it would without threads: after the results of the calls before.
        """
        pending: deque[Future[_T]] = deque()
        drawn, failed = iter(calls), None
        while not failed:
            try:
                pending.append(self._pool.submit(self._make, next(drawn)))
            except StopIteration:
                break
            except Exception as error:
                failed = error
            if len(pending) > self._count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failed:
            raise failed

    def _make(self, call: Callable[[], _T]) -> _T:
        thread = threading.get_ident()
        with self._lock:
            if self._is_over:  # drawn from the queue at the last moment
                raise KeyboardInterrupt
            self._at_work.add(thread)
        try:
            return call()
        finally:
            with self._lock:
                self._at_work.discard(thread)
