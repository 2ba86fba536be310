"""The peak of a process's memory (Linux)."""

from pathlib import Path


def peak() -> float:
    """The process's peak of resident memory in MiB, since the last :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """The peak is what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
