"""Builds, proves and times the kernels here: what to paste into a bug report.

    python -m similarity_cuda

Each kind of kernel proves itself again, whatever it did before: small inputs of
every kind are compared with a float64 computation straight from the formula
(similarity_cuda/proof.py), in a process of its own. Shown are the largest errors
in float32 of the distances and their gradient, the fused loss and its gradient,
relative to the largest number of the right result. The time is that of the fused
loss, forward and backward, for one image of 128 x 128 pixels of which about 15 %
are masked, search 25, window 9.

Exit status: 0 if all that can be had here is right, 1 if something is wrong.
"""

import argparse
import contextlib
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence

import torch

from similarity_cuda import UnavailableError, WrongError, load, loader, proof, trust

_SETTINGS = (25, 9, True, 0.004, True, 1000.0, 1000.0, True)  # of the timed loss, as published
_COLUMNS = 80


def _milliseconds(device: str) -> float:
    """Median time of the loss, forward and backward."""
    sr, hr, mask = (x.float().to(device) for x in proof.images((1, 3, 128, 128), 0.15))
    sr.requires_grad_()
    times = []
    for _ in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.autograd.grad(torch.ops.similarity.loss(sr, hr, mask, *_SETTINGS)[0], sr)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[3:])


def _load(kind: str) -> tuple[str, list[float]]:
    """Build, prove and load the kernels; -> (the seconds that building them took, or "cached"; the errors)."""

    def libraries() -> set:
        return set(loader._cache().glob(f"similarity_{kind}_*.*"))

    before, begin = libraries(), time.perf_counter()
    try:
        library = loader.build(kind)
    except Exception as error:
        raise UnavailableError(loader.told(error)) from error
    how = f"{time.perf_counter() - begin:.0f} s" if libraries() - before else "cached"
    with contextlib.suppress(OSError):  # in a folder of others, its mark stands
        trust.forget(kind, library)
    load(kind)
    mark = trust.read(kind, library)
    return how, mark.errors if mark else []


def _row(kind: str) -> tuple[str, bool]:
    """-> (a line of the table, whether nothing is wrong)."""
    device = proof.DEVICES[kind]
    if device == "cuda" and not torch.cuda.is_available():
        return f"{kind:<6}not here: torch sees no GPU (torch.cuda.is_available() is False)", True
    try:
        how, errors = _load(kind)
    except WrongError as error:
        return f"{kind:<6}WRONG: {error}", False
    except UnavailableError as error:
        return f"{kind:<6}not here: {loader.told(error.__cause__ or error)}", True
    figures = "".join(f"{error:>11.1e}" for error in errors)
    return f"{kind:<6}{how:>8}{figures}{_milliseconds(device):>10.2f}  ok", True


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the environment; -> the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m similarity_cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    print(f"{'kind':<6}{'build':>8}{'distances':>11}{'gradient':>11}{'loss':>11}{'gradient':>11}{'ms':>10}")
    all_right = True
    for kind in proof.DEVICES:
        line, right = _row(kind)
        print(textwrap.fill(line, _COLUMNS, subsequent_indent=" " * 6) if len(line) > _COLUMNS else line, flush=True)
        all_right &= right
    print(f"\nlargest relative errors in float32; all must be below {proof.TOLERANCE[torch.float32]:.0e}\n")
    print(textwrap.fill(loader.facts(), _COLUMNS, break_on_hyphens=False))
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
