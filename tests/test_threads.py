"""Work in threads, with the results and errors of doing it in order: evaluation/threads.py."""

import threading
import time
from functools import partial

import pytest
import torch

from evaluation.threads import Threads


def test_results_come_in_the_order_of_the_calls():
    first_may_end = threading.Event()

    def call(i: int) -> int:
        if i == 1:
            first_may_end.set()  # only then the first one ends
        return i if i or first_may_end.wait(60) else -1

    with Threads(2) as threads:
        assert [*threads.in_order(partial(call, i) for i in range(7))] == [*range(7)]


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_is_drawn_than_a_call_for_each_thread_and_one(count):
    drawn: list[int] = []

    def calls():
        for i in range(20):
            drawn.append(i)
            yield partial(int, i)

    with Threads(count) as threads:
        for i in threads.in_order(calls()):
            assert len(drawn) <= i + count + 1
    assert len(drawn) == 20


def raises(error: Exception) -> int:
    raise error


@pytest.mark.parametrize("where", ["in a call", "in drawing the next"])
def test_an_error_comes_after_the_results_before_it_and_the_first_one_counts(where):
    def calls():
        yield from (partial(int, i) for i in range(3))
        if where == "in drawing the next":
            raise ValueError("first")
        yield partial(raises, ValueError("first"))
        yield partial(raises, ValueError("second"))

    with Threads(3) as threads:
        results = threads.in_order(calls())
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="first"):
            next(results)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_ends_the_calls_that_are_at_work(error):
    ends, started = [], threading.Semaphore(0)

    def takes_a_minute() -> None:
        started.release()
        try:
            for _ in range(6000):
                time.sleep(0.01)
            ends.append("finished")
        except KeyboardInterrupt:
            ends.append("interrupted")
            raise

    def work_until_it_fails(threads: Threads) -> None:
        for _ in threads.in_order([lambda: None, takes_a_minute, takes_a_minute]):
            for _ in range(2):
                assert started.acquire(timeout=60)
            raise error

    with pytest.raises(error), Threads(2) as threads:
        work_until_it_fails(threads)
    assert ends == ["interrupted"] * 2


def test_pytorch_has_its_threads_in_each_and_the_main_thread_keeps_its_own():
    before = torch.get_num_threads()
    with Threads(2, torch_threads=3) as threads:
        assert [*threads.in_order([torch.get_num_threads] * 3)] == [3] * 3
        assert torch.get_num_threads() == before
