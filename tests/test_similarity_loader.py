"""The loader of the op among threads and processes, and what it leaves of their environment."""

import errno
import os
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from similarity_cuda import UnavailableError, loader, trust


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def outcome() -> str:
    try:
        loader.load("cpp")
    except UnavailableError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_threads_that_ask_during_a_build_wait_and_hear_how_it_ended(monkeypatch, fails):
    builds, begun, may_end = [], threading.Event(), threading.Event()

    def build(kind: str) -> None:
        builds.append(kind)
        begun.set()
        assert may_end.wait(60)
        if fails:
            raise RuntimeError("the compiler gave up")

    monkeypatch.setattr(loader, "_build_and_load", build)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(outcome)
        assert begun.wait(60)
        others = [pool.submit(outcome) for _ in range(3)]
        with pytest.raises(TimeoutError):
            others[0].result(timeout=0.1)
        may_end.set()
        outcomes = [task.result(timeout=60) for task in (first, *others)]
    assert builds == ["cpp"]
    assert len(set(outcomes)) == 1
    assert ("the compiler gave up" in outcomes[0]) == fails == (outcomes[0] != "loaded")


def test_a_broken_compiler_fails_in_every_thread_with_its_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(lambda _: outcome(), range(4)))
    assert len(set(outcomes)) == 1
    assert "compiler none" in outcomes[0]


def test_of_a_compilers_report_the_line_that_says_what_failed_is_told(monkeypatch):
    report = "Error building extension 'similarity_cpp': [1/2] c++ " + "-I/a/long/folder " * 40
    report += "\n/home/cpu.cpp:12:10: fatal error: omp.h: No such file or directory\nninja: build stopped"

    def fails(kind: str) -> None:
        raise RuntimeError(report)

    monkeypatch.setattr(loader, "_build_and_load", fails)
    with pytest.raises(
        loader.UnavailableError, match=r"^/home/cpu\.cpp:12:10: fatal error: omp\.h: No such file .* \("
    ):
        loader.load("cpp")


def test_a_build_that_is_interrupted_is_tried_again(monkeypatch):
    def interrupted(kind: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loader, "_build_and_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loader.load("cpp")
    monkeypatch.setattr(loader, "_build_and_load", lambda kind: None)
    assert outcome() == "loaded"


@pytest.mark.parametrize("given", [None, "8.6+PTX"])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_a_build_adds_one_variable_and_leaves_the_environment_of_other_threads(monkeypatch, tmp_path, given, fails):
    monkeypatch.setattr(loader, "_ninja", lambda: True)
    monkeypatch.setattr(loader, "_toolkit", lambda: tmp_path)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 + device, 0))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if given:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    before, during = dict(os.environ), {}

    def compiler(name: str, sources: list[str], build_directory: str, **_: object) -> str:
        during.update(os.environ)
        monkeypatch.setenv("OF_ANOTHER_THREAD", "1")
        if fails:
            raise RuntimeError("the compiler gave up")
        built = Path(build_directory, f"{name}.so")
        built.touch()
        return str(built)

    monkeypatch.setattr(cpp_extension, "load", compiler)
    library = tmp_path / "library.so"
    if fails:
        with pytest.raises(RuntimeError, match="gave up"):
            loader._build("op", [Path("kernels.cu")], [], [], library)
    else:
        loader._build("op", [Path("kernels.cu")], [], [], library)
    assert library.is_file() != fails
    assert during == before | {"TORCH_CUDA_ARCH_LIST": given or "8.0;9.0"}
    assert dict(os.environ) == before | {"OF_ANOTHER_THREAD": "1"}


@pytest.mark.parametrize(
    ("given", "capability", "fits"),
    [
        ("", (8, 6), True),
        ("8.0;9.0", (9, 0), True),
        ("8.0", (8, 6), True),  # a GPU runs what was built for an earlier one of its generation
        ("8.6", (8, 0), False),
        ("8.0 8.6", (9, 0), False),
        ("8.0+PTX", (9, 0), True),  # which its driver compiles
        ("9.0+PTX", (8, 6), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),  # features of exactly that GPU
        ("10.0f", (10, 3), True),
        ("Hopper", (8, 6), True),  # PyTorch knows names
    ],
)
def test_a_list_of_architectures_without_this_gpu_is_refused_before_building(monkeypatch, given, capability, fits):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    builds = []
    monkeypatch.setattr(loader, "_build", lambda name, *_: builds.append("cuda"))
    monkeypatch.setattr(trust, "read", lambda *_: trust.Mark("", "", "", []))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    if fits:
        loader.load("cuda")
    else:
        named = re.escape(f"TORCH_CUDA_ARCH_LIST {given!r} does not name this GPU, A GPU: add ")
        with pytest.raises(UnavailableError, match=named + r"\d+\.\d to it, or unset it"):
            loader.load("cuda")
    assert builds == ["cuda"] * fits


def test_on_windows_a_process_waits_as_long_as_another_builds(monkeypatch):
    attempts, slept = [], []

    def locking(file: int, mode: str, count: int) -> None:
        attempts.append((file, mode, count))
        if len(attempts) < 300:
            raise PermissionError(errno.EACCES, "Permission denied")

    module = types.ModuleType("msvcrt")
    vars(module).update(locking=locking, LK_NBLCK="do not wait")
    monkeypatch.setitem(sys.modules, "msvcrt", module)
    monkeypatch.setattr(loader.time, "sleep", slept.append)
    loader._wait_for_windows(7)
    assert attempts == [(7, "do not wait", 1)] * 300
    assert sum(slept) > 60


def test_on_windows_a_lock_that_cannot_be_had_at_all_is_an_error(monkeypatch):
    def locking(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    module = types.ModuleType("msvcrt")
    vars(module).update(locking=locking, LK_NBLCK=1)
    monkeypatch.setitem(sys.modules, "msvcrt", module)
    with pytest.raises(OSError, match="Invalid argument"):
        loader._wait_for_windows(7)
