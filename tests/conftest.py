"""Shared by all tests: the repository on the path, few threads, small generated images."""

import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
torch.set_num_threads(1)  # on networks this small, threads would mostly wait for each other


@pytest.fixture
def golden() -> Callable[[str], Any]:
    """Numbers of the published implementations; those made from photographs need ``../shared/golden``."""
    from tests.golden_numbers import golden

    return golden


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As where a script runs the tests in the background: what they stop by Ctrl-C would go on for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # by nohup


def photograph(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """A generated (height, width, channels) uint8 image with flat areas, gradients, edges and texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    image = np.empty((height, width, channels))
    for c in range(channels):
        fy, fx, phase = rng.uniform(0.02, 0.12), rng.uniform(0.02, 0.12), rng.uniform(0, 6)
        image[..., c] = 0.5 + 0.25 * np.sin(fy * y + fx * x + phase)
    for _ in range(6):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, 0.3 * min(height, width) + 5)
        image[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = rng.uniform(0.1, 0.9, channels)
    stripes = (x + y).astype(int) % 6 < 3
    image[: height // 3] = np.where(stripes[: height // 3, :, None], image[: height // 3], 0.6 * image[: height // 3])
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Names that are not UTF-8 in what a test logged would end the process that sends its report (pytest-xdist)."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report
