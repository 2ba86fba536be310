"""Whether built kernels compute what they should, on small inputs of every kind; run in a process of its own.

    python -m similarity_cuda.proof KIND LIBRARY GPU_NUMBER

The reference is a float64 computation on the CPU, straight from the formula. Compared are the distances and their
gradient, the fused loss and its gradient: both search borders, both precisions, every layout in memory, one to three
channels, several images of which one has no masked pixels, sizes off the tiles, more pixels than are taken at a time,
empty and full masks; and that a second run gives the same bits. An error is relative to the largest number of the right
result. The last line that is printed is JSON, read by trust.py: what is wrong first ("" if nothing is), and the largest
errors in float32.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import similarity_cuda  # noqa: F401  declares the operators

DEVICES = {"cpp": "cpu", "cuda": "cuda"}
QUANTITIES = ("distances", "gradient of the distances", "loss", "gradient of the loss")
# Float32 gives 5e-7 and less on the CPU; where two graphs have nearly equal entries, rounding picks the sign of L1's
# gradient, which moves it by more. Images shifted by one pixel give 6e-2, another window or border 2e-1. Float64 gives
# 1e-11 where exp() has multiplied its rounding by 1 / sigma.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_L1, _KL = 1000.0, 1000.0
_EPS = 1e-10


def distances(img: Tensor, mask: Tensor, search: int, window: int, zero: bool) -> Tensor:
    """The specification: mean squared difference of windows, (M, k, k), for the mask entries equal to 1.

    Windows are cut from the search area around each pixel. With ``zero`` what lies outside of the search area is 0.
    """
    r, f = search // 2, window // 2
    image, row, column = (mask[:, 0] == 1).nonzero(as_tuple=True)
    margin = r if zero else r + f
    padded = F.pad(img, (margin,) * 4, mode="reflect")
    side = 2 * margin + 1
    areas = padded.unfold(2, side, 1).unfold(3, side, 1)[image, :, row, column]
    windows = F.pad(areas, (f,) * 4 if zero else (0,) * 4).unfold(2, window, 1).unfold(3, window, 1)
    return (windows - windows[:, :, r : r + 1, r : r + 1]).square().mean((1, 4, 5))


def loss(of_sr: Tensor, of_hr: Tensor, sigma: float, generalization: bool) -> Tensor:
    """The specification of the loss, from distances: L1 and KL between the graphs, means over all entries."""
    x, y = ((d / -sigma).exp().flatten(1) for d in (of_sr, of_hr))
    if generalization:
        x, y = (s / (s.sum(1, keepdim=True) + _EPS) for s in (x, y))
    l1 = (x - y).abs().mean()
    x, y = x.clamp(min=_EPS), y.clamp(min=_EPS)
    return _L1 * l1 + _KL * (y * (y.log() - x.log())).mean()


def images(shape: tuple[int, ...], masked: float) -> tuple[Tensor, Tensor, Tensor]:
    """Generated sr, hr (N, C, H, W) with waves and fine texture, and a mask; float64 on the CPU."""
    n, channels, height, width = shape
    rng = torch.Generator().manual_seed(0)
    y, x = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    phase = torch.arange(n * channels, dtype=torch.float64).reshape(n, channels, 1, 1)
    hr = 0.5 + 0.25 * torch.sin(0.3 * y[:, None] + 0.2 * x + phase)
    hr, sr = (hr + s * torch.randn(hr.shape, generator=rng, dtype=torch.float64) for s in (0.02, 0.04))
    mask = (torch.rand(n, 1, height, width, generator=rng) < masked).double()
    return sr, hr, mask


def _strided(x: Tensor) -> Tensor:
    """Every second pixel of a larger image."""
    larger = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    larger[..., ::2, ::2] = x
    return larger[..., ::2, ::2]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": _strided,
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    search: int
    window: int
    masked: float  # share of the pixels
    zero: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    empty: bool = False  # else the first and the last pixel are masked too
    sigma: float = 0.004
    generalization: bool = True
    may_not_fit: bool = False  # GPUs with little shared memory refuse it, and are right in all else

    def __str__(self) -> str:
        size, precision = " x ".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        border = "zero" if self.zero else "image"
        return f"{size} {self.layout} {precision}, search {self.search}, window {self.window}, search_border {border}"


def cases() -> Iterator[Case]:
    """Small inputs of every kind."""
    small = Case((2, 3, 19, 21), 7, 5, 0.2)
    for zero in (True, False):
        for layout in LAYOUTS:
            yield replace(small, zero=zero, layout=layout)
        yield replace(small, zero=zero, dtype=torch.float64)
        yield Case((3, 3, 40, 37), 25, 9, 0.004, zero)  # the published sizes
    yield Case((2, 3, 72, 71), 3, 3, 1.0, sigma=0.1)  # a full mask, more than 8192 pixels
    yield Case((1, 1, 17, 150), 9, 3, 0.3)  # a grey image, wider than a tile
    yield Case((3, 2, 12, 11), 5, 1, 1.0, generalization=False, sigma=0.1)
    yield Case((1, 1, 50, 48), 85, 3, 0.0, may_not_fit=True)  # as much shared memory as must be asked for
    yield replace(small, masked=0.0, empty=True)


def worst_errors(case: Case, device: str, ops: Any) -> list[float]:
    """Errors of QUANTITIES; infinite where results differ in shape or from one run to the next.

    ops: has ``distances`` and ``loss`` of the package's docstring.
    """
    sr, hr, mask = images(case.shape, case.masked)
    if not case.empty:
        mask[0, 0, 0, 0] = mask[-1, 0, -1, -1] = 1
    if len(mask) > 2:
        mask[1] = 0  # an image without masked pixels between two with some
    pixels = [index.to(device) for index in (mask[:, 0] == 1).nonzero(as_tuple=True)]
    exact = sr.clone().requires_grad_()
    right = distances(exact, mask, case.search, case.window, case.zero)
    of_hr = distances(hr, mask, case.search, case.window, case.zero)
    # (k, M, k) in memory: a gradient that is not contiguous
    upstream = torch.rand(case.search, len(right), case.search, generator=torch.Generator().manual_seed(1)).double()
    upstream = upstream.transpose(0, 1)
    right_loss = loss(right, of_hr, case.sigma, case.generalization) if len(right) else 0 * exact.sum()
    (right_gradient,) = torch.autograd.grad(right, exact, upstream, retain_graph=True)
    (right_slope,) = torch.autograd.grad(right_loss, exact)

    arrange = LAYOUTS[case.layout]
    x, y = (arrange(img.to(device, case.dtype)) for img in (sr, hr))
    x.requires_grad_()
    place = (case.search, case.window, case.zero)
    settings = (*place, case.sigma, case.generalization, _L1, _KL, True)

    def run() -> list[Tensor]:
        ours = ops.distances(x, *pixels, *place)
        (gradient,) = torch.autograd.grad(ours, x, upstream.to(ours))
        ours_loss = ops.loss(x, y, mask.to(device, case.dtype), *settings)[0]
        (slope,) = torch.autograd.grad(ours_loss, x)
        return [t.detach().cpu().double() for t in (ours, gradient, ours_loss, slope)]

    found = zip(run(), run(), (right, right_gradient, right_loss, right_slope), strict=True)
    return [_error(one, other, expected.detach()) for one, other, expected in found]


def _error(one: Tensor, other: Tensor, right: Tensor) -> float:
    """Largest difference over the largest number of the right result; a NaN stays one."""
    if one.shape != right.shape or not torch.equal(one.nan_to_num(), other.nan_to_num()):
        return float("inf")
    if not right.numel():
        return 0.0
    largest = right.abs().max().item()
    return (one - right).abs().max().item() / (largest or 1.0)


def check(device: str, ops: Any = None) -> tuple[str, list[float]]:
    """-> (what is wrong first, "" if nothing is; if nothing is, the largest errors of QUANTITIES in float32)."""
    ops = ops or SimpleNamespace(distances=torch.ops.similarity.distances, loss=torch.ops.similarity.loss)
    largest = [0.0] * len(QUANTITIES)
    for case in cases():
        try:
            errors = worst_errors(case, device, ops)
        except RuntimeError as refusal:
            if case.may_not_fit and "too large for ssl_mode" in str(refusal):
                continue
            raise
        for quantity, error in zip(QUANTITIES, errors, strict=True):
            if not error < TOLERANCE[case.dtype]:  # it may be NaN
                return f"{quantity} off by {error:.1e} of its largest number ({case})", []
        if case.dtype == torch.float32:
            largest = [max(pair) for pair in zip(largest, errors, strict=True)]
    return "", largest


def main(kind: str, library: str, number: str) -> None:
    """Print the verdict on a library. A kernel that cannot run is wrong; of a full or taken device nothing is said."""
    if kind == "cuda":
        torch.cuda.set_device(int(number))
    try:
        torch.ops.load_library(library)
        wrong, errors = check(DEVICES[kind])
    except (OSError, RuntimeError) as error:
        line = next(iter(str(error).splitlines()), repr(error))
        if "out of memory" in line or "busy or unavailable" in line:
            sys.exit(line)
        wrong, errors = line, []
    print(json.dumps({"wrong": wrong, "errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
