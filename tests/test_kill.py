"""A run that is killed at any moment, again and again: the same command goes on, and ends as the undisturbed run."""

import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.training import SSL, Workplace, assert_same
from utils.utils_resume import newest_generator

STEPS = 6
RUN = (f"train.iterations={STEPS}", "train.checkpoint_save=1")
PLAIN = (*RUN, "datasets.test=null", "train.checkpoint_keep=1")
GAN = (*RUN, "model=gan", *SSL, "train.checkpoint_test=2")
SLOW = 0.003  # seconds that a disk takes for each thing asked of it, that more kills meet it


def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(SLOW)
        result = function(*arguments, **named)
        time.sleep(SLOW)
        return result

    return slow


def start(work: Workplace, *overrides: str) -> int:
    """The run in a fork of this process, by its number."""
    gc.collect()  # what owns threads, which a fork has not
    gc.freeze()
    pid = os.fork()
    gc.unfreeze()
    if pid == 0:
        _train(work, overrides)
    return pid


def _train(work: Workplace, overrides: tuple[str, ...]) -> NoReturn:
    status = 1
    try:
        with (work.root / "said").open("a") as said:
            sys.stdout = sys.stderr = said
            for module, name in (
                (os, "fsync"),
                (os, "replace"),
                (os, "unlink"),
                (Path, "replace"),
                (Path, "write_text"),
            ):
                setattr(module, name, slowed(getattr(module, name)))
            work.run(*overrides)
            status = 0
    finally:
        os._exit(status)


def ended(pid: int, seconds: float) -> bool:
    """Whether it has come to its end within so many seconds; else it is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="forks this process, which macOS and Windows cannot")
@pytest.mark.parametrize(
    ("run", "kills"),
    [
        (PLAIN, 2),
        pytest.param(PLAIN, 50, marks=pytest.mark.long),
        pytest.param(GAN, 50, marks=pytest.mark.long),
    ],
    ids=["plain-2", "plain-50", "gan-50"],
)
def test_a_run_that_is_killed_at_any_moment_goes_on_and_ends_as_the_undisturbed_one(
    tmp_path: Path, run: tuple[str, ...], kills: int
) -> None:
    work = Workplace(tmp_path)
    work.run(*run, "task=whole")  # here, so that forks need not import what it needs
    began = time.monotonic()
    assert ended(start(work, *run, "task=timed"), 100)
    takes = time.monotonic() - began
    whole = {step: work.saved(step, "whole") for step in range(1, STEPS + 1)}
    assert whole[STEPS]
    moments, share = random.Random(kills), (0.1, 1) if kills > 10 else (0.4, 0.7)  # few kills: where most is saved
    number = killed = resumed = 0
    while killed < kills or not resumed:
        task, before = f"killed{number}", killed
        while not ended(start(work, *run, f"task={task}"), moments.uniform(*share) * takes):
            killed, takes = killed + 1, 1.1 * takes  # other programs may have slowed it
            assert killed < 10 * kills + 20, (work.root / "said").read_text()
            newest_generator(work.folder(task))  # raises where weights are there, and none is whole
        resumed += work.log(task).count("resumed at step")
        for step, saved in whole.items():
            if saved:
                assert_same(saved, work.saved(step, task))
        assert not [*work.folder(task).rglob("*.part")]
        number += 1
        takes *= 0.7 if killed == before else 1  # or it is faster by now
        assert number < 10 * kills + 20
