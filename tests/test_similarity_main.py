"""``python -m similarity_cuda``: the table and the exit status that a bug report shows."""

import os
import subprocess
import sys

import pytest
import torch

import similarity_cuda.__main__ as report
from similarity_cuda import UnavailableError, load
from tests.conftest import REPOSITORY
from tests.test_ssl import published_pair

try:
    load("cpp")
    WHY_NO_CPP = None
except UnavailableError as error:
    WHY_NO_CPP = str(error)
needs_cpp = pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")


def run(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "similarity_cuda"]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)


@needs_cpp
def test_report_shows_right_kernels_and_the_environment_in_80_columns():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert rows["cpp"].endswith(" ok")
    assert rows["cuda"].endswith(" ok") or "not here:" in rows["cuda"]
    assert torch.__version__ in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_report_without_a_compiler_gives_the_reason_in_one_line(tmp_path):
    # No GPU either, because its kernels would be built for minutes in the empty folder.
    done = run(CXX="/nonexistent", TORCH_EXTENSIONS_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("cpp "))
    assert row.startswith("cpp   not here: ")
    assert "/nonexistent" in row
    assert len(row) <= 80
    assert "Traceback" not in done.stderr


@needs_cpp
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("distances", lambda x: 1.001 * x),
        ("distances", lambda x: x + 0.001 * (x - x.detach())),  # the gradient alone
        ("loss", lambda x: 1.001 * x),
        ("loss", lambda x: x + 0.001 * (x - x.detach())),
        ("loss", lambda x: x * float("nan")),
    ],
    ids=["distances", "their gradient", "loss", "its gradient", "no number"],
)
def test_report_calls_wrong_numbers_and_wrong_gradients_wrong(monkeypatch, capsys, kernel, fault):
    right = getattr(torch.ops.similarity, kernel)

    def wrong(*arguments):
        results = right(*arguments)
        return fault(results) if kernel == "distances" else (fault(results[0]), *results[1:])

    monkeypatch.setattr(torch.ops.similarity, kernel, wrong)
    monkeypatch.setattr(report, "_DEVICES", {"cpp": "cpu"})
    monkeypatch.setattr(report, "_milliseconds", lambda device: 0.0)
    assert report.main([]) == 1
    row = capsys.readouterr().out.splitlines()[1]
    assert row.endswith(" WRONG")
    errors = [float(figure) for figure in row.split()[2:6]]
    bad = [not error < 1e-4 for error in errors]
    assert any(bad[:2]) == (kernel == "distances")
    assert any(bad[2:]) == (kernel == "loss")


@needs_cpp
def test_report_shows_the_message_of_a_kernel_that_fails(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch.ops.similarity, "distances", broken)
    monkeypatch.setattr(report, "_DEVICES", {"cpp": "cpu"})
    assert report.main([]) == 1
    assert "FAILED: CUDA error: no kernel image is available" in capsys.readouterr().out


def test_the_formula_of_the_report_gives_the_published_loss():
    gt, sr, mask = published_pair()
    published = 1000 * 1.019350012864e-04 + 1000 * 6.786220051409e-06
    # The published figures have 13 digits.
    assert report._loss(sr, gt, mask, zero=True).item() == pytest.approx(published, rel=1e-11)
