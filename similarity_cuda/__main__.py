"""Builds, checks and times the kernels here: what to paste into a bug report.

    python -m similarity_cuda

Each kind of kernel is compared, in float32, with a float64 computation straight
from the formula: distances and their gradient, the fused loss and its gradient,
for both search borders. Errors are relative to the largest number of the right
result. The time is that of the fused loss, forward and backward, for one image
of 128 x 128 pixels of which about 15 % are masked, search 25, window 9.

Exit status: 0 if all that can be had here is right, 1 if something is wrong.
"""

import argparse
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from similarity_cuda import UnavailableError, load, loader

_DEVICES = {"cpp": "cpu", "cuda": "cuda"}
_SEARCH, _WINDOW, _SIGMA, _L1, _KL = 25, 9, 0.004, 1000.0, 1000.0
_EPS = 1e-10
# Float32 gives 5e-7 and less on the CPU; where two graphs have nearly equal entries, rounding picks the sign of L1's
# gradient, which moves it by more. Images shifted by one pixel give 6e-2, another window or border 2e-1.
_TOLERANCE = 1e-4
_COLUMNS = 80


def _distances(img: Tensor, mask: Tensor, zero: bool) -> Tensor:
    """The specification: mean squared difference of windows, (M, k, k), for the mask entries equal to 1.

    Windows are cut from the search area around each pixel. With ``zero`` what lies outside of the search area is 0.
    """
    r, f = _SEARCH // 2, _WINDOW // 2
    image, row, column = (mask[:, 0] == 1).nonzero(as_tuple=True)
    margin = r if zero else r + f
    padded = F.pad(img, (margin,) * 4, mode="reflect")
    side = 2 * margin + 1
    areas = padded.unfold(2, side, 1).unfold(3, side, 1)[image, :, row, column]
    windows = F.pad(areas, (f,) * 4 if zero else (0,) * 4).unfold(2, _WINDOW, 1).unfold(3, _WINDOW, 1)
    return (windows - windows[:, :, r : r + 1, r : r + 1]).square().mean((1, 4, 5))


def _loss(sr: Tensor, hr: Tensor, mask: Tensor, zero: bool) -> Tensor:
    """The specification of the loss: L1 and KL between the normalised graphs, means over all entries."""
    similarities = [(_distances(img, mask, zero) / -_SIGMA).exp().flatten(1) for img in (sr, hr)]
    x, y = (s / (s.sum(1, keepdim=True) + _EPS) for s in similarities)
    l1 = (x - y).abs().mean()
    x, y = x.clamp(min=_EPS), y.clamp(min=_EPS)
    return _L1 * l1 + _KL * (y * (y.log() - x.log())).mean()


def _images(n: int, side: int, masked: float) -> tuple[Tensor, Tensor, Tensor]:
    """Generated sr, hr (n, 3, side, side) with waves and fine texture, and a mask; float64 on the CPU."""
    rng = torch.Generator().manual_seed(0)
    at = torch.arange(side, dtype=torch.float64)
    phase = torch.arange(3 * n, dtype=torch.float64).reshape(n, 3, 1, 1)
    hr = 0.5 + 0.25 * torch.sin(0.3 * at[:, None] + 0.2 * at + phase)
    hr, sr = (hr + s * torch.randn(hr.shape, generator=rng, dtype=torch.float64) for s in (0.02, 0.04))
    mask = (torch.rand(n, 1, side, side, generator=rng) < masked).double()
    return sr, hr, mask


def _error(ours: Tensor, right: Tensor) -> float:
    """Largest difference over the largest number of the right result; a NaN stays one."""
    return ((ours.cpu().double() - right).abs().max() / right.abs().max()).item()


def _fused(sr: Tensor, hr: Tensor, mask: Tensor, zero: bool) -> Tensor:
    settings = (_SEARCH, _WINDOW, zero, _SIGMA, True, _L1, _KL, True)
    return torch.ops.similarity.loss(sr, hr, mask, *settings)[0]


def _errors(device: str) -> list[float]:
    """Largest errors over both search borders of: distances, their gradient, the loss, its gradient."""
    sr, hr, mask = _images(3, 40, 0.004)
    mask[1] = 0  # an image without masked pixels between two with some, corners among them
    mask[0, 0, 0, 0] = mask[2, 0, -1, -1] = 1
    pixels = [index.to(device) for index in (mask[:, 0] == 1).nonzero(as_tuple=True)]
    worst = torch.zeros(4, dtype=torch.float64)
    for zero in (True, False):
        exact, x = sr.clone().requires_grad_(), sr.float().to(device).requires_grad_()
        right = _distances(exact, mask, zero)
        ours = torch.ops.similarity.distances(x, *pixels, _SEARCH, _WINDOW, zero)
        upstream = torch.rand(right.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (right_gradient,) = torch.autograd.grad(right, exact, upstream)
        (gradient,) = torch.autograd.grad(ours, x, upstream.to(ours))
        right_loss = _loss(exact, hr, mask, zero)
        loss = _fused(x, hr.to(x), mask.to(x), zero)
        (right_slope,) = torch.autograd.grad(right_loss, exact)
        (slope,) = torch.autograd.grad(loss, x)
        pairs = ((ours, right), (gradient, right_gradient), (loss, right_loss), (slope, right_slope))
        found = [_error(a.detach(), b.detach()) for a, b in pairs]
        worst = torch.maximum(worst, torch.tensor(found, dtype=torch.float64))
    return worst.tolist()


def _milliseconds(device: str) -> float:
    """Median time of the loss, forward and backward."""
    sr, hr, mask = (x.float().to(device) for x in _images(1, 128, 0.15))
    sr.requires_grad_()
    times = []
    for _ in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.autograd.grad(_fused(sr, hr, mask, True), sr)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[3:])


def _load(kind: str) -> str:
    """Load the kernels; -> how: the seconds that building them took, or "cached"."""

    def libraries() -> set:
        return set(loader._cache().glob(f"similarity_{kind}_*"))

    before, begin = libraries(), time.perf_counter()
    load(kind)
    return f"{time.perf_counter() - begin:.0f} s" if libraries() - before else "cached"


def reason(error: BaseException) -> str:
    """One line of an error: of a compiler's long report, the line that says what failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if re.search(r"error:|not found|cannot find", line, re.IGNORECASE)), lines[0])


def _row(kind: str) -> tuple[str, bool]:
    """-> (a line of the table, whether nothing is wrong)."""
    device = _DEVICES[kind]
    if device == "cuda" and not torch.cuda.is_available():
        return f"{kind:<6}not here: torch sees no GPU (torch.cuda.is_available() is False)", True
    try:
        how = _load(kind)
    except UnavailableError as error:
        return f"{kind:<6}not here: {reason(error.__cause__ or error)}", True
    try:
        errors, milliseconds = _errors(device), _milliseconds(device)
    except RuntimeError as error:  # what a kernel that cannot run raises
        return f"{kind:<6}FAILED: {reason(error)}", False
    right = all(error < _TOLERANCE for error in errors)  # false for NaN
    figures = "".join(f"{error:>11.1e}" for error in errors)
    return f"{kind:<6}{how:>8}{figures}{milliseconds:>10.2f}  {'ok' if right else 'WRONG'}", right


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the environment; -> the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m similarity_cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    print(f"{'kind':<6}{'build':>8}{'distances':>11}{'gradient':>11}{'loss':>11}{'gradient':>11}{'ms':>10}")
    all_right = True
    for kind in _DEVICES:
        line, right = _row(kind)
        print(textwrap.shorten(line, _COLUMNS, placeholder=" ...") if len(line) > _COLUMNS else line, flush=True)
        all_right &= right
    print(f"\nlargest relative errors in float32; all must be below {_TOLERANCE:.0e}\n")
    print(textwrap.fill(loader.facts(), _COLUMNS, break_on_hyphens=False))
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
