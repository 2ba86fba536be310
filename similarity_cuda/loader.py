"""Builds and loads the kernels: on first use, once, safely when many processes start together."""

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_logger = logging.getLogger(__name__)
_SOURCES = {"cpp": ["cpu.cpp"]}
_loaded: dict[str, Exception | None] = {}  # kind -> None where it is loaded, else why it is not


class UnavailableError(RuntimeError):
    """The kernels cannot be had here; the text says why, with the facts of the machine."""


def load(kind: str) -> None:
    """Make the operators of ``kind`` ("cpp") work, building them if they were not built before.

    The built library is kept in ``TORCH_EXTENSIONS_DIR`` (default ``~/.cache/similarity_cuda``) under a name made of
    the sources, PyTorch and the processor.

    Raises:
        UnavailableError: there is no compiler or no ninja, or the build failed. Asked again, it fails at once.
    """
    if kind not in _loaded:
        _loaded[kind] = None
        try:
            _build_and_load(kind)
        except Exception as error:
            _loaded[kind] = error
    reason = _loaded[kind]
    if reason is not None:
        text = " ".join(str(reason).split())
        raise UnavailableError(f"{text[:300]}{' ...' if len(text) > 300 else ''} ({facts()})") from reason


def facts() -> str:
    """What a bug report needs: compiler, ninja, PyTorch, Python, the folder of built libraries."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or "none"
    ninja = "yes" if _ninja() else "no"
    return (
        f"compiler {compiler}, ninja {ninja}, torch {torch.__version__}, python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, cache {_cache()}"
    )


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
    with path.open("w") as file:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_and_load(kind: str) -> None:
    if kind not in _SOURCES:
        raise RuntimeError(f"there are no {kind!r} kernels in this version")
    sources = [Path(__file__).parent / name for name in _SOURCES[kind]]
    compiler_flags, linker_flags = _flags()
    key = hashlib.sha256()
    for part in (*(s.read_bytes() for s in sources), torch.__version__, _processor(), *compiler_flags, *linker_flags):
        key.update(part if isinstance(part, bytes) else str(part).encode())
    name = f"similarity_{kind}_{key.hexdigest()[:16]}"
    cache = _cache()
    library = cache / (name + (".pyd" if os.name == "nt" else ".so"))
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{name}.lock"):
            if not library.is_file():
                _build(name, sources, compiler_flags, linker_flags, library)
    torch.ops.load_library(str(library))


def _build(name: str, sources: list[Path], compiler_flags: list[str], linker_flags: list[str], library: Path) -> None:
    """Build in a folder of its own and move the result into place, so that no half-written library is ever found."""
    if not _ninja():
        raise RuntimeError("ninja is missing: pip install ninja")
    # It warns of a missing GPU when it is imported, which is no news here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    _logger.info("building the self-similarity op, once for this machine: about half a minute")
    logging.getLogger(cpp_extension.__name__).setLevel(
        logging.ERROR
    )  # it warns of a missing GPU, which is no news here
    with tempfile.TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as folder:
        built = cpp_extension.load(
            name,
            [str(source) for source in sources],
            extra_cflags=compiler_flags,
            extra_ldflags=linker_flags,
            build_directory=folder,
            is_python_module=False,
            is_standalone=False,
        )
        result = Path(built) if isinstance(built, str) else next(Path(folder).glob(f"{name}*{library.suffix}"))
        os.replace(result, library)
