"""Time and memory of restoring an image in tiles, against the loop that test scripts have, in one run on one thread.

    python benchmarks/bench_test.py                 # the figures of benchmarks/README.md, about three minutes
    python benchmarks/bench_test.py --bf16 --rounds 1 --width 200 --height 150 --tile 64
    python benchmarks/bench_test.py --memory        # what main_test.py takes at most, by image and tile

The plain loop is written here from its description, KAIR's and SwinIR's: full tiles, the last of a row shifted back,
means where tiles overlap. All forms restore one image with one network, RRDBNet x4 with 4 blocks of 32 features and
drawn weights, in turn; each time in a process of its own (Linux) after a small image to warm up. Times are processor
times, in which other work shows less, medians of the rounds; extra memory is the process's peak above what it held.
"""

import argparse
import contextlib
import datetime
import io
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

# Before torch: a forked process cannot use threads that its parent has started.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from memory import forget_peak, peak

from main_test import main as test
from models.network_rrdbnet import RRDBNet
from utils.utils_image import imsave
from utils.utils_tile import restore

SCALE, OVERLAP = 4, 32


class Measured(NamedTuple):
    seconds: float
    extra: float  # MiB
    calls: int  # of the network
    pixels: int  # of L that went through it


@torch.inference_mode()
def plain(netG: nn.Module, L: Tensor, tile: int) -> Tensor:
    """The usual loop."""
    height, width = L.shape[-2:]
    tile = min(tile, height, width)
    tops, lefts = ([*range(0, size - tile, tile - OVERLAP), size - tile] for size in (height, width))
    E = torch.zeros(*L.shape[:2], height * SCALE, width * SCALE)
    count = torch.zeros_like(E)
    for y in tops:
        for x in lefts:
            piece = netG(L[..., y : y + tile, x : x + tile])
            place = ..., slice(y * SCALE, (y + tile) * SCALE), slice(x * SCALE, (x + tile) * SCALE)
            E[place].add_(piece)
            count[place].add_(torch.ones_like(piece))
    return E.div_(count)


def ours(netG: nn.Module, L: Tensor, tile: int) -> Tensor:
    return restore(netG, L, SCALE, tile, OVERLAP)


FORMS: dict[str, tuple[Callable[[nn.Module, Tensor, int], Tensor], bool]] = {
    "plain loop": (plain, False),
    "ours": (ours, False),
    "ours, bf16": (ours, True),
}


def measure(form: str, height: int, width: int, tile: int) -> Measured:
    """Restore an image of noise once; a bf16 form under autocast, its network in channels_last."""
    restore_, low = FORMS[form]
    torch.manual_seed(0)
    netG = RRDBNet(nf=32, nb=4, gc=16, sf=SCALE).eval()
    if low:
        netG.to(memory_format=torch.channels_last)
    L = torch.rand(1, 3, height, width)
    shapes: list[torch.Size] = []
    netG.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
        restore_(netG, L[..., :48, :48], 64)
        shapes.clear()
        forget_peak()
        before, begin = peak(), time.process_time()
        restore_(netG, L, tile)
    pixels = sum(shape[0] * shape[2] * shape[3] for shape in shapes)
    return Measured(time.process_time() - begin, peak() - before, len(shapes), pixels)


# ------------------------------------------------------------------------------------------------ all of main_test.py

SIZES = (255, 170), (510, 340), (765, 510)  # of L
TILES = "64", "128", "256", "0", "auto"


def peak_of_test(folder: Path, arguments: list[str]) -> float:
    """MiB that main_test.py takes at most above what it held after a small image."""

    small = "--input", str(folder / "L" / "48x48.png"), "--gt", str(folder / "H" / "48x48.png")
    command = "--model_path", str(folder / "net.pth"), "--output", str(folder / "results")
    with contextlib.redirect_stdout(io.StringIO()):
        test([*command, *small])
        forget_peak()
        before = peak()
        test([*command, *arguments])
    return peak() - before


def memory_rows(folder: Path) -> None:
    torch.manual_seed(0)
    # Of one block: the maps at the size of E, which take the most, are those of any RRDBNet with 32 features.
    torch.save(RRDBNet(nf=32, nb=1, gc=16, sf=SCALE).state_dict(), folder / "net.pth")
    rng = np.random.default_rng(0)
    for kind in "LH":
        (folder / kind).mkdir()
    for width, height in [(48, 48), *SIZES]:
        L = rng.integers(0, 256, (height, width, 3), np.uint8)
        imsave(L, str(folder / "L" / f"{width}x{height}.png"))
        imsave(L.repeat(SCALE, 0).repeat(SCALE, 1), str(folder / "H" / f"{width}x{height}.png"))
    titles = [{"0": "whole"}.get(tile, tile) for tile in TILES]
    print(f"| MiB at most, tile | {' | '.join(titles)} | 128, measured |\n|---|{'---|' * (len(TILES) + 1)}")
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as process:
        for width, height in SIZES:
            L, H = (str(folder / kind / f"{width}x{height}.png") for kind in "LH")
            runs = [["--input", L, "--report_images", "0", "--tile", tile] for tile in TILES]
            runs.append(["--input", L, "--gt", H, "--tile", "128"])
            peaks = [process.apply(peak_of_test, (folder, run)) for run in runs]
            print(f"| {width} x {height} | {' | '.join(f'{mib:.0f}' for mib in peaks)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=510)
    parser.add_argument("--height", type=int, default=339)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="also in bf16: very slow on processors that lack it")
    parser.add_argument("--memory", action="store_true", help="the peak memory of main_test.py instead")
    args = parser.parse_args()
    if args.memory:
        with tempfile.TemporaryDirectory() as folder:
            memory_rows(Path(folder))
        return
    size, forms = (args.height, args.width), [form for form, (_, low) in FORMS.items() if args.bf16 or not low]
    print(f"{datetime.date.today()}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    print(f"{args.width} x {args.height}, x{SCALE}, overlap {OVERLAP}, one thread, processor time\n")
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as process:
        rounds = [
            {form: process.apply(measure, (form, *size, args.tile)) for form in forms} for _ in range(args.rounds)
        ]
        print(f"| tiles of {args.tile} | s an image | images/s | faster | network pixels / L's | extra MiB |")
        print("|---|---|---|---|---|---|")
        first = statistics.median(measured["plain loop"].seconds for measured in rounds)
        for form in forms:
            runs = [measured[form] for measured in rounds]
            seconds, extra = (statistics.median(getattr(run, what) for run in runs) for what in ("seconds", "extra"))
            share = runs[0].pixels / (args.width * args.height)
            print(f"| {form} | {seconds:.2f} | {1 / seconds:.3f} | {first / seconds:.2f} | {share:.2f} | {extra:.0f} |")
        print("\n| ours, tile | s an image | calls | network pixels / L's | extra MiB |\n|---|---|---|---|---|")
        for tile in (64, 128, 256, 384, 0):
            run = process.apply(measure, ("ours", *size, tile))
            share = run.pixels / (args.width * args.height)
            print(f"| {tile or 'whole'} | {run.seconds:.2f} | {run.calls} | {share:.2f} | {run.extra:.0f} |")


if __name__ == "__main__":
    main()
