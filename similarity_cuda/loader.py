"""Builds, proves and loads the kernels: on first use, once, safely when many processes start together."""

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from similarity_cuda import trust

_logger = logging.getLogger(__name__)
_SOURCES = {"cpp": ["cpu.cpp"], "cuda": ["cuda.cpp", "kernels.cu"]}
_loaded: dict[str, Exception | None] = {}  # kind -> None where it is loaded, else why it is not
_loading = threading.Lock()


class UnavailableError(RuntimeError):
    """The kernels cannot be had here; the text says why, with the facts of the machine."""


class WrongError(UnavailableError):
    """The kernels were built, but failed their proof on this device: what was off, and how to report it."""


def load(kind: str) -> None:
    """Make the operators of ``kind`` work, building them if they were not built before: "cpp" (CPU) or "cuda" (GPUs).

    The built library is kept in ``TORCH_EXTENSIONS_DIR`` (default ``~/.cache/similarity_cuda``) under a name made of
    the sources, PyTorch and the processor or the GPUs. GPUs' architectures are those at hand, or
    ``TORCH_CUDA_ARCH_LIST``. It is used after it has proved itself on the device at hand, which is the current GPU
    (``similarity_cuda/trust.py``); only the process that builds it has loaded it before, since PyTorch's builder does.

    Raises:
        UnavailableError: no GPU, compiler, CUDA toolkit or ninja, or the build failed. Asked again, it fails at once.
            Threads that ask meanwhile wait for the end of the build.
        WrongError: what was built computes wrong numbers here, or crashes.
    """
    if kind not in _loaded:
        with _loading:
            if kind not in _loaded:
                _loaded[kind] = _attempt(kind)
    reason = _loaded[kind]
    if isinstance(reason, WrongError):
        raise WrongError(str(reason)) from reason
    if reason is not None:
        text = told(reason)
        raise UnavailableError(f"{text[:300]}{' ...' if len(text) > 300 else ''} ({facts()})") from reason


def told(error: BaseException) -> str:
    """One line of an error: of a compiler's long report, the line that says what failed."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if re.search(r"error:|not found|cannot find", line, re.IGNORECASE)), lines[0])


def failed_proof(kind: str) -> bool:
    """Whether the last :func:`load` of ``kind`` ended in WrongError."""
    return isinstance(_loaded.get(kind), WrongError)


def _attempt(kind: str) -> Exception | None:
    """-> None, or why the kernels of ``kind`` could not be loaded."""
    try:
        if kind == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA GPU")
        _build_and_load(kind)
    except Exception as error:
        return error
    return None


def facts() -> str:
    """What a bug report needs: compilers, ninja, PyTorch, Python, the folder of built libraries."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or "none"
    toolkit = _toolkit()
    nvcc = f"{toolkit / 'bin' / 'nvcc'} {_nvcc_version(toolkit)}" if toolkit else "none"
    ninja = "yes" if _ninja() else "no"
    return (
        f"compiler {compiler}, nvcc {nvcc}, ninja {ninja}, torch {torch.__version__} for CUDA {torch.version.cuda}, "
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}, cache {_cache()}"
    )


def _toolkit() -> Path | None:
    """The folder of the CUDA toolkit: ``CUDA_HOME``, or where nvcc is (which may be a link or a script elsewhere)."""
    nvcc = shutil.which("nvcc")
    folders = [
        *(Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
        *([Path(nvcc).resolve().parent.parent] if nvcc else []),
        Path("/usr/local/cuda"),
    ]
    return next((folder for folder in folders if (folder / "include" / "cuda_runtime.h").is_file()), None)


def _nvcc_version(toolkit: Path) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [str(toolkit / "bin" / "nvcc"), "--version"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        return text.partition("release ")[2].partition(",")[0]
    return "of unknown version"


def _cache() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "similarity_cuda")


def _ninja() -> bool:
    """Whether ninja can be run; pip puts it beside python, which need not be on the PATH."""
    if shutil.which("ninja"):
        return True
    if importlib.util.find_spec("ninja") is None:
        return False
    import ninja

    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    return shutil.which("ninja") is not None


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return platform.processor() + platform.machine()


def _flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags. No -ffast-math: NaN must stay NaN."""
    if os.name == "nt":
        return ["/O2", "/openmp", "/arch:AVX2"], []
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
    if sys.platform == "darwin":
        return flags, []  # Apple's compiler has no OpenMP: one thread
    # The very OpenMP library that PyTorch brought: a second one would have a thread pool of its own.
    libraries = [
        *Path(torch.__file__).parent.glob("lib/libgomp*"),
        *Path(torch.__file__).parent.glob("../torch.libs/*gomp*"),
    ]
    return [*flags, "-fopenmp"], [str(libraries[0])] if libraries else ["-fopenmp"]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process builds while the others wait; the system drops the lock of a process that dies."""
    with path.open("a") as file:
        if sys.platform == "win32":
            _wait_for_windows(file.fileno())
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_for_windows(file: int) -> None:
    """Lock a file however long it takes: the lock that waits by itself (LK_LOCK) gives up after 10 seconds."""
    import msvcrt

    while True:
        try:
            return msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError:  # another process has it
            time.sleep(0.5)


def _architectures() -> str:
    """The GPU architectures to build for, as ``TORCH_CUDA_ARCH_LIST`` names them."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    found = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    return given or ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def _check_architectures() -> None:
    """Before minutes of building: does ``TORCH_CUDA_ARCH_LIST`` name the GPU at hand? Words (Hopper) are let pass."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    listed = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name) for name in given.replace(";", " ").split()]
    if not listed or not all(listed) or not torch.cuda.is_available():  # without a GPU: built for another machine
        return
    here = torch.cuda.get_device_capability()
    for match in listed:
        assert match is not None
        major, minor, exact, with_ptx = int(match[1]), int(match[2]), match[3] == "a", bool(match[4])
        if here == (major, minor) or (not exact and (here[0] == major or with_ptx) and here > (major, minor)):
            return
    raise RuntimeError(
        f"TORCH_CUDA_ARCH_LIST {given!r} does not name this GPU, {torch.cuda.get_device_name()}: "
        f"add {here[0]}.{here[1]} to it, or unset it"
    )


def _build_and_load(kind: str) -> None:
    library = build(kind)
    mark = trust.read(kind, library)
    if mark is None:
        with _locked(library.with_suffix(".lock")) if trust.can_keep(library) else contextlib.nullcontext():
            mark = trust.read(kind, library) or trust.prove(kind, library)
    if mark.wrong:
        raise WrongError(
            f"the built kernels fail their proof on {mark.device}: {mark.wrong}; please report what "
            "`python -m similarity_cuda` prints, which proves them again"
        )
    torch.ops.load_library(str(library))


def build(kind: str) -> Path:
    """-> the library of ``kind``, built if it was not there."""
    if kind == "cuda":
        _check_architectures()
    folder = Path(__file__).parent
    headers = sorted([*folder.glob("*.h"), *folder.glob("*.cuh")])
    sources = [folder / name for name in _SOURCES[kind]]
    compiler_flags, linker_flags = _flags()
    target = _processor()
    if kind == "cuda":
        compiler_flags, linker_flags = ["/O2" if os.name == "nt" else "-O3"], []
        target = f"{_toolkit()} {_architectures()}"
    key = hashlib.sha256()
    contents = (file.read_bytes() for file in [*headers, *sources])
    for part in (*contents, torch.__version__, target, *compiler_flags, *linker_flags):
        key.update(part if isinstance(part, bytes) else str(part).encode())
    name = f"similarity_{kind}_{key.hexdigest()[:16]}"
    cache = _cache()
    library = cache / (name + (".pyd" if os.name == "nt" else ".so"))
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not library.is_file():
                _build(name, sources, compiler_flags, linker_flags, library)
    return library


def _build(name: str, sources: list[Path], compiler_flags: list[str], linker_flags: list[str], library: Path) -> None:
    """Build in a folder of its own and move the result into place, so that no half-written library is ever found."""
    if not _ninja():
        raise RuntimeError("ninja is missing: pip install ninja")
    # It warns of a missing GPU when it is imported, which is no news here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    with_cuda = any(source.suffix == ".cu" for source in sources)
    choose_architectures = with_cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST")
    if with_cuda:
        toolkit = _toolkit()
        if toolkit is None:
            raise RuntimeError("there is no CUDA toolkit (nvcc): install the one of PyTorch's CUDA, or set CUDA_HOME")
        cpp_extension.CUDA_HOME = str(toolkit)  # PyTorch takes nvcc's folder as it stands
    _logger.info("building the self-similarity op, once for this machine: about a minute")
    with tempfile.TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as folder:
        if choose_architectures:
            os.environ["TORCH_CUDA_ARCH_LIST"] = _architectures()
        try:
            built = cpp_extension.load(
                name,
                [str(source) for source in sources],
                extra_cflags=compiler_flags,
                extra_cuda_cflags=["-O3", "--threads=0"],
                extra_ldflags=linker_flags,
                build_directory=folder,
                with_cuda=with_cuda,
                is_python_module=False,
                is_standalone=False,
            )
        finally:
            if choose_architectures:
                del os.environ["TORCH_CUDA_ARCH_LIST"]
        result = Path(built) if isinstance(built, str) else next(Path(folder).glob(f"{name}*{library.suffix}"))
        os.replace(result, library)
