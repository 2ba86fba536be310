"""``python -m similarity_cuda``: the table and the exit status that a bug report shows."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import similarity_cuda.__main__ as report
from similarity_cuda import UnavailableError, load, loader, proof, trust
from tests.conftest import REPOSITORY
from tests.test_similarity_trust import WRONG
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
    ("program", "said"),
    [
        (WRONG, "loss off by 1.0e-03 of its largest number"),
        ("import os; os.abort()", "they crash with SIGABRT"),
    ],
    ids=["wrong numbers", "crash"],
)
def test_report_proves_again_and_says_what_is_wrong(monkeypatch, capsys, tmp_path, program, said):
    library = tmp_path / "similarity_cpp_0.so"
    shutil.copy(loader.build("cpp"), library)
    monkeypatch.setattr(loader, "build", lambda kind: library)
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(proof, "DEVICES", {"cpp": "cpu"})
    monkeypatch.setattr(report, "_milliseconds", lambda device: 0.0)
    trust.prove("cpp", library)  # a good mark, from before
    monkeypatch.setattr(
        trust, "_command", lambda kind, library: [sys.executable, "-c", program, kind, str(library), "0"]
    )
    assert report.main([]) == 1
    # A logger of another test may write to the same stream.
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("checking")]
    assert lines[1].startswith("cpp   WRONG: the built kernels fail their proof on the CPU: ")
    assert said in " ".join(map(str.strip, lines))
    assert max(map(len, lines)) <= 80


def test_the_formula_of_the_proof_gives_the_published_loss():
    gt, sr, mask = published_pair()
    published = 1000 * 1.019350012864e-04 + 1000 * 6.786220051409e-06
    # The published figures have 13 digits.
    of_sr, of_gt = (proof.distances(img, mask, 25, 9, zero=True) for img in (sr, gt))
    assert proof.loss(of_sr, of_gt, sigma=0.004, generalization=True).item() == pytest.approx(published, rel=1e-11)
