"""Compiles CUDA kernels as C++ and runs them on the CPU, for tests. How a driver looks: tests/cuda_on_cpu.h."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from similarity_cuda import loader

_TESTS = Path(__file__).resolve().parent
_FLAGS = ["-std=c++17", "-O1", "-I", str(_TESTS), "-I", str(_TESTS.parent), "-x", "c++"]
_LIBRARY = ["-shared", "-fPIC", "-fvisibility=hidden"]  # hidden: the same kernel in two libraries stays two
_PROGRAM = ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_SECONDS = 300


class KernelError(Exception):
    """What the shim or a sanitizer reports."""


class _Argument(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char * 8),
        ("integer", ctypes.c_int64),
        ("real", ctypes.c_double),
        ("array", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    )


def build(source: str, sanitize: bool = False) -> Callable[..., None]:
    """Compile a driver, or take it from the cache, and return what calls its exported functions.

    The result is called as ``driver(name, *arguments, seed=0)``. Arguments are contiguous arrays, changed in place,
    numbers, or None for a null pointer. Another seed is another order of blocks, warps and lanes. Errors of the shim
    are raised as `KernelError`.

    Args:
        source: text of the driver, which includes "cuda_on_cpu.h"; paths are relative to tests/ and the repository.
        sanitize: run each call in a program of its own, under the address sanitizer and the sanitizer of undefined
            behaviour. Then reading or writing outside of an array or of shared memory is a `KernelError` too.

    Skips the test where there is no compiler for it.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(f"tests/cuda_on_cpu.h cannot switch stacks on {platform.system()} {platform.machine()}")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ or set CXX")
    flags = [*_FLAGS, *(_PROGRAM if sanitize else _LIBRARY)]
    version = _run(compiler, "--version")
    if "clang" not in version:
        flags.append("-fno-extern-tls-init")  # g++ would call an initialiser of shared memory, which has none
    if sanitize:
        _skip_without_sanitizers(compiler, flags)
    everything = _run(compiler, *flags, "-E", "-P", "-", text=source)
    key = hashlib.sha256("\0".join((version, *flags, everything)).encode()).hexdigest()[:16]
    built = loader._cache() / "tests" / key
    if not built.is_file():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            file = Path(folder) / "driver"
            _run(compiler, *flags, "-", "-o", str(file), text=source)
            file.replace(built)  # at once: another process may be building the same
    if sanitize:
        return functools.partial(_call_program, built)
    return functools.partial(_call_library, ctypes.CDLL(str(built)))


def _call_library(library: ctypes.CDLL, name: str, *arguments: Any, seed: int = 0) -> None:
    library.cuda_on_cpu_call.restype = ctypes.c_char_p
    packed = (_Argument * len(arguments))(*map(_pack, arguments))
    message = library.cuda_on_cpu_call(name.encode(), packed, ctypes.c_size_t(len(arguments)), ctypes.c_uint64(seed))
    if message is not None:
        raise KernelError(message.decode())


def _call_program(program: Path, name: str, *arguments: Any, seed: int = 0) -> None:
    packed = [_pack(argument) for argument in arguments]
    with tempfile.NamedTemporaryFile() as file:
        for p in packed:
            file.write(bytes(p) + ctypes.string_at(p.array or 0, p.bytes))
        file.flush()
        # Leaks would be those of the driver, and looking for them needs ptrace, which containers often forbid.
        options = {
            "ASAN_OPTIONS": "abort_on_error=1:print_legend=0:detect_leaks=0",
            "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
        }
        _run(program, name, str(seed), file.name, environment=os.environ | options)
        file.seek(0)
        for p in packed:
            file.seek(ctypes.sizeof(p), os.SEEK_CUR)
            if p.bytes:
                ctypes.memmove(p.array, file.read(p.bytes), p.bytes)


def _pack(argument: Any) -> _Argument:
    if argument is None:
        return _Argument(b"none")
    if isinstance(argument, np.ndarray):
        if not (argument.flags.c_contiguous and argument.flags.writeable):
            raise ValueError(f"array of shape {argument.shape}: it must be contiguous and writeable")
        return _Argument(argument.dtype.str[1:].encode(), 0, 0.0, argument.ctypes.data, argument.nbytes)
    if isinstance(argument, (int, np.integer)):
        return _Argument(b"int", int(argument))
    return _Argument(b"float", 0, float(argument))


def _run(program: str | Path, *arguments: str, text: str = "", environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        [program, *arguments], input=text, capture_output=True, text=True, env=environment, timeout=_SECONDS
    )
    if result.returncode != 0:
        raise KernelError(f"{program} ended with status {result.returncode}\n{result.stderr}")
    return result.stdout


def _skip_without_sanitizers(compiler: str, flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = "#include <sanitizer/asan_interface.h>\nint main() {}"
        try:
            _run(compiler, *flags, "-", "-o", str(Path(folder) / "nothing"), text=source)
        except KernelError as error:
            pytest.skip(f"no address sanitizer here: {error}")
