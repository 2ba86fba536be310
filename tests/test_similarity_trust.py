"""Built kernels prove themselves in a process of their own before they are trusted."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from similarity_cuda import UnavailableError, WrongError, loader, proof, trust
from tests.conftest import REPOSITORY
from utils import utils_ssl

try:
    loader.load("cpp")
    WHY_NO_CPP = None
except UnavailableError as error:
    WHY_NO_CPP = str(error)
needs_cpp = pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")

RIGHT = 'print(\'some other line\'); print(\'{"wrong": "", "errors": [1e-7]}\')'
CRASHES = "import os; os.abort()"
ILLEGAL = "import ctypes; ctypes.string_at(0)"
HANGS = "import time; time.sleep(60)"
SILENT = "import sys; sys.exit(0)"
FULL = "import sys; sys.exit('CUDA out of memory')"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
REAL = "import sys; from similarity_cuda import proof; proof.main(*sys.argv[1:])"
# The real proof of the real library, but for one number.
WRONG = """
import sys, torch, types
from similarity_cuda import proof
check, right = proof.check, torch.ops.similarity
def loss(*arguments):
    results = right.loss(*arguments)
    return 1.001 * results[0], *results[1:]
proof.check = lambda device: check(device, types.SimpleNamespace(distances=right.distances, loss=loss))
proof.main(*sys.argv[1:])
"""


@pytest.fixture
def library(monkeypatch, tmp_path) -> Path:
    """A file in the place of a built library, which "loads"; nothing is loaded yet."""
    library = tmp_path / "similarity_cpp_0.so"
    library.write_bytes(b"kernels")
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(loader, "build", lambda kind: library)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(utils_ssl, "_said", set())
    return library


@pytest.fixture
def proofs(monkeypatch) -> Callable[[str], list[str]]:
    """Set the program of the proof; -> the list of those that ran."""

    def set_program(program: str) -> list[str]:
        ran: list[str] = []

        def command(kind: str, library: Path) -> list[str]:
            ran.append(kind)
            return [sys.executable, "-c", program, kind, str(library), "0"]

        monkeypatch.setattr(trust, "_command", command)
        return ran

    return set_program


def starts_again(monkeypatch) -> None:
    monkeypatch.setattr(loader, "_loaded", {})


def test_a_library_is_proved_once_and_its_mark_is_read_after(monkeypatch, library, proofs):
    ran = proofs(RIGHT)
    for _ in range(3):
        starts_again(monkeypatch)
        loader.load("cpp")
    assert ran == ["cpp"]
    mark = trust.read("cpp", library)
    assert (mark.wrong, mark.errors) == ("", [1e-7])
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".lock", ".proof"}


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (CRASHES, "they crash with SIGABRT"),
        (ILLEGAL, "they crash with SIGSEGV"),
        (HANGS, "they did not end within 0.5 seconds"),
        (SILENT, "their process ended without a verdict: it said nothing"),
        (REAL, "Could not load this library: "),  # a file of seven letters
    ],
    ids=["crashes", "illegal address", "hangs", "says nothing", "cannot be loaded"],
)
def test_a_library_that_fails_its_proof_is_not_loaded_and_that_is_remembered(
    monkeypatch, caplog, library, proofs, program, said
):
    monkeypatch.setattr(trust, "_SECONDS", 0.5 if program == HANGS else 300)
    ran = proofs(program)
    for _ in range(2):
        starts_again(monkeypatch)
        monkeypatch.setattr(utils_ssl, "_said", set())
        caplog.clear()
        loss = utils_ssl.SelfSimilarityLoss(1, 1)
        for _ in range(2):
            assert loss.prepare("cpu") == "boxsum"
        (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
        assert "ssl_mode auto takes boxsum (not cpp: the built kernels fail their proof on the CPU: " in record.message
        assert said in record.message
        assert "; please report what `python -m similarity_cuda` prints" in record.message
        with pytest.raises(ValueError, match="ssl_mode 'cpp' cannot be had here") as caught:
            utils_ssl.SelfSimilarityLoss(1, 1, ssl_mode="cpp").prepare("cpu")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert ran == ["cpp"]


@pytest.mark.parametrize(
    ("program", "said"),
    [(FULL, "status 1: CUDA out of memory"), (KILLED, "SIGKILL"), ("import no_such", "status 1: ModuleNotFoundError")],
    ids=["full", "killed", "no PyTorch there"],
)
def test_a_proof_that_could_not_be_made_is_not_remembered(monkeypatch, library, proofs, program, said):
    proofs(program)
    with pytest.raises(UnavailableError, match=f"the kernels could not be proved now, {said}") as caught:
        loader.load("cpp")
    assert not isinstance(caught.value, WrongError)
    starts_again(monkeypatch)
    proofs(RIGHT)
    loader.load("cpp")


def test_a_library_in_a_folder_of_others_is_proved_at_each_start(monkeypatch, library, proofs):
    monkeypatch.setattr(trust, "can_keep", lambda library: False)
    ran = proofs(RIGHT)
    for _ in range(2):
        starts_again(monkeypatch)
        loader.load("cpp")
    assert ran == ["cpp"] * 2
    assert list(library.parent.iterdir()) == [library]


@pytest.mark.parametrize("change", ["library", "driver", "damage", "forget"])
def test_a_stale_mark_is_not_trusted(monkeypatch, library, proofs, change):
    proofs(CRASHES)
    with pytest.raises(WrongError):
        loader.load("cpp")
    (mark,) = library.parent.glob("*.proof")
    if change == "library":
        os.utime(library, ns=(0, 0))  # another file of the same name
    elif change == "driver":
        monkeypatch.setattr(trust, "device", lambda kind: "another driver")
    elif change == "damage":
        mark.write_text(mark.read_text()[:-5])
    else:
        trust.forget("cpp", library)
    starts_again(monkeypatch)
    ran = proofs(RIGHT)
    loader.load("cpp")
    assert ran == ["cpp"]


def test_processes_that_start_together_prove_once(library):
    program = f"""
import pathlib, sys, torch
from similarity_cuda import loader, trust
library = pathlib.Path({str(library)!r})
loader.build = lambda kind: library
torch.ops.load_library = lambda path: None
proof = "import pathlib, time; pathlib.Path(r'{library}.log').open('a').write('proved '); time.sleep(1); " + {RIGHT!r}
trust._command = lambda *_: [sys.executable, "-c", proof]
print("ready", flush=True)
sys.stdin.readline()
loader.load("cpp")
print("loaded")
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    children = [subprocess.Popen([sys.executable, "-c", program], **pipes) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:  # none has begun before all are ready
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.communicate(timeout=120)[0] for child in children] == ["loaded\n"] * 2
    assert Path(f"{library}.log").read_text() == "proved "


@needs_cpp
def test_wrong_numbers_of_a_real_library_are_found_by_the_child(proofs):
    proofs(WRONG)
    wrong, errors = trust._verdict("cpp", loader.build("cpp"))
    assert wrong.startswith("loss off by 1.0e-03 of its largest number (2 x 3 x 19 x 21 contiguous float32, search 7, ")
    assert errors == []


@needs_cpp
def test_the_real_library_passes_the_real_proof():
    wrong, errors = trust._verdict("cpp", loader.build("cpp"))
    assert wrong == ""
    assert len(errors) == len(proof.QUANTITIES)
    assert 0 < max(errors) < 1e-5  # float32 sums of 243 squares, and their exponential


SMALL = proof.Case((1, 3, 9, 8), 5, 3, 0.2)


def faulty(fault: Callable, of: str) -> SimpleNamespace:
    """The operators; ``fault(result, img)`` changes that of ``distances``, or the first of ``loss``."""
    right = torch.ops.similarity

    def distances(img, *arguments):
        result = right.distances(img, *arguments)
        return fault(result, img) if of == "distances" else result

    def loss(sr, *arguments):
        first, *others = right.loss(sr, *arguments)
        return (fault(first, sr) if of == "loss" else first, *others)

    return SimpleNamespace(distances=distances, loss=loss)


def differs_each_time(result, img, calls=[0]):  # noqa: B006
    calls[0] += 1
    return result * (1 + 1e-6 * calls[0])


@needs_cpp
@pytest.mark.parametrize("of", ["distances", "loss"])
@pytest.mark.parametrize(
    ("fault", "case", "said"),
    [
        (lambda x, _: 1.001 * x, SMALL, "off by 1.0e-03"),
        (lambda x, _: x + 0.001 * (x - x.detach()), SMALL, "gradient of the"),
        (lambda x, _: x * float("nan"), SMALL, "off by nan"),
        (differs_each_time, SMALL, "off by inf"),
        (
            lambda x, img: x if img.is_contiguous() else 1.01 * x,
            replace(SMALL, layout="channels_last"),
            "channels_last",
        ),
        (lambda x, img: x * (1 + 1e-6 * (img.dtype == torch.float64)), replace(SMALL, dtype=torch.float64), "float64"),
    ],
    ids=["value", "gradient alone", "no number", "differs each time", "of one layout", "of one precision"],
)
def test_the_proof_finds_a_fault(monkeypatch, of, fault, case, said):
    monkeypatch.setattr(proof, "cases", lambda: [SMALL, case])
    assert proof.check("cpu", faulty(lambda x, _: x, of))[0] == ""
    wrong, errors = proof.check("cpu", faulty(fault, of))
    assert of in wrong
    assert said in wrong
    assert errors == []


def test_the_proof_has_every_kind_of_input():
    cases = list(proof.cases())
    assert {case.zero for case in cases} == {True, False}
    assert {case.dtype for case in cases} == {torch.float32, torch.float64}
    assert {case.layout for case in cases} == set(proof.LAYOUTS)
    assert {case.shape[1] for case in cases} >= {1, 2, 3}
    assert {1.0} <= {case.masked for case in cases}
    assert any(case.empty for case in cases)
    assert {(case.search, case.window) for case in cases if case.zero} & {
        (case.search, case.window) for case in cases if not case.zero
    } >= {(25, 9)}
    assert any(case.shape[0] > 2 for case in cases)  # an image without masked pixels between two with some
    x = torch.rand(2, 3, 4, 5)
    strides = {layout: arrange(x).stride() for layout, arrange in proof.LAYOUTS.items()}
    assert len(set(strides.values())) == len(strides)
    assert all(torch.equal(arrange(x), x) for arrange in proof.LAYOUTS.values())


@needs_cpp
@pytest.mark.parametrize(("search", "is_right"), [(85, True), (25, False)])
def test_a_gpu_may_refuse_the_largest_search_area_of_the_proof_and_no_other(search, is_right):
    right = torch.ops.similarity

    def distances(img, image, row, column, k, *settings):
        if k == search:
            raise RuntimeError(f"kernel_size_search {k} is too large for ssl_mode cuda: take a smaller one")
        return right.distances(img, image, row, column, k, *settings)

    ops = SimpleNamespace(distances=distances, loss=right.loss)
    if is_right:
        assert proof.check("cpu", ops)[0] == ""
    else:
        with pytest.raises(RuntimeError, match="kernel_size_search 25"):
            proof.check("cpu", ops)
