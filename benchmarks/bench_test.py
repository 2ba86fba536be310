"""Time and memory of restoring an image in tiles, against the loop that test scripts have, in one run on one thread.

    python benchmarks/bench_test.py                 # the figures of benchmarks/README.md, about three minutes
    python benchmarks/bench_test.py --bf16 --rounds 1 --width 200 --height 150 --tile 64
    python benchmarks/bench_test.py --device cuda                                   # wall times, half precision too
    python benchmarks/bench_test.py --memory        # what main_test.py takes at most, by image and tile

The plain loop is written here from its description, KAIR's and SwinIR's: full tiles, the last of a row shifted back,
means where tiles overlap. All forms restore one image with one network, RRDBNet x4 with 4 blocks of 32 features and
drawn weights, in turn; each time in a process of its own (Linux) after a small image to warm up. Times are processor
times, in which other work shows less, medians of the rounds; extra memory is the process's peak above what it held. On
a GPU times are the wall's, and extra memory is what PyTorch's allocator gave at most above what was held.
"""

import argparse
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
from models.precision import autocast, faster_layout
from utils.utils_error import run
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
    E = L.new_zeros(*L.shape[:2], height * SCALE, width * SCALE)
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


FORMS: dict[str, tuple[Callable[[nn.Module, Tensor, int], Tensor], str]] = {
    "plain loop": (plain, "fp32"),
    "ours": (ours, "fp32"),
    "ours, bf16": (ours, "bf16"),
    "ours, fp16": (ours, "fp16"),
}


def measure(form: str, height: int, width: int, tile: int, name: str) -> Measured:
    """Restore an image of noise once on the device ``name``."""
    restore_, precision = FORMS[form]
    device = torch.device(name)
    torch.manual_seed(0)
    netG = RRDBNet(nf=32, nb=4, gc=16, sf=SCALE).eval().to(device)
    if restore_ is ours:
        netG.to(memory_format=faster_layout(device, precision))
    L = torch.rand(1, 3, height, width, device=device)
    shapes: list[torch.Size] = []
    netG.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    with autocast(device, precision):
        restore_(netG, L[..., :48, :48], 64)
        if name == "cuda":  # the first call with tiles of this shape looks for algorithms
            restore_(netG, L, tile)
        shapes.clear()
        before, begin = start(device)
        restore_(netG, L, tile)
        seconds, extra = stop(device, before, begin)
    pixels = sum(shape[0] * shape[2] * shape[3] for shape in shapes)
    return Measured(seconds, extra, len(shapes), pixels)


def start(device: torch.device) -> tuple[float, float]:
    """Memory in MiB and time in seconds, as :func:`stop` takes them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20, time.perf_counter()
    forget_peak()
    return peak(), time.process_time()


def stop(device: torch.device, before: float, begin: float) -> tuple[float, float]:
    """Seconds and extra MiB since :func:`start`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 2**20 - before
    return time.process_time() - begin, peak() - before


# ------------------------------------------------------------------------------------------------ all of main_test.py

SIZES = (255, 170), (510, 340), (765, 510)  # of L
TILES = "64", "128", "256", "0", "auto"


def peak_of_test(folder: Path, arguments: list[str]) -> float:
    """MiB that main_test.py takes at most above what it held after a small image."""

    small = "--input", str(folder / "L" / "48x48.png"), "--gt", str(folder / "H" / "48x48.png")
    command = "--model_path", str(folder / "net.pth"), "--output", str(folder / "results"), "--overwrite"
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
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        imsave(noise, str(folder / "L" / f"{width}x{height}.png"))
        imsave(noise.repeat(SCALE, 0).repeat(SCALE, 1), str(folder / "H" / f"{width}x{height}.png"))
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--memory", action="store_true", help="the peak memory of main_test.py instead")
    args = parser.parse_args()
    if args.memory:
        with tempfile.TemporaryDirectory() as folder:
            memory_rows(Path(folder))
        return
    precisions = {"fp32"} | ({"bf16"} if args.bf16 else set()) | ({"bf16", "fp16"} if args.device == "cuda" else set())
    size, forms = (args.height, args.width), [form for form, (_, needed) in FORMS.items() if needed in precisions]
    print(f"{datetime.date.today()}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    where = "one thread, processor time" if args.device == "cpu" else "wall time"
    print(f"{args.width} x {args.height}, x{SCALE}, overlap {OVERLAP}, {where}\n")
    method = "fork" if args.device == "cpu" else "spawn"  # a GPU is not for forked processes
    with multiprocessing.get_context(method).Pool(1, maxtasksperchild=1) as process:
        rounds = [
            {form: process.apply(measure, (form, *size, args.tile, args.device)) for form in forms}
            for _ in range(args.rounds)
        ]
        print(f"| tiles of {args.tile} | s an image | images/s | faster | network pixels / L's | extra MiB |")
        print("|---|---|---|---|---|---|")
        first = statistics.median(measured["plain loop"].seconds for measured in rounds)
        for form in forms:
            runs = [measured[form] for measured in rounds]
            seconds, extra = (statistics.median(getattr(run, what) for run in runs) for what in ("seconds", "extra"))
            share = runs[0].pixels / (args.width * args.height)
            print(f"| {form} | {seconds:.3g} | {1 / seconds:.3g} | {first / seconds:.2f} | {share:.2f} | {extra:.0f} |")
        print("\n| ours, tile | s an image | calls | network pixels / L's | extra MiB |\n|---|---|---|---|---|")
        of_tiles = {}
        for tile in (64, 128, 256, 384, 0):
            run = of_tiles[tile] = process.apply(measure, ("ours", *size, tile, args.device))
            share = run.pixels / (args.width * args.height)
            print(f"| {tile or 'whole'} | {run.seconds:.3g} | {run.calls} | {share:.2f} | {run.extra:.0f} |")
    if args.json:
        forms_json = {form: [measured[form]._asdict() for measured in rounds] for form in forms}
        tiles_json = {tile or "whole": run._asdict() for tile, run in of_tiles.items()}
        args.json.write_text(json.dumps({"forms": forms_json, "tiles": tiles_json}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main)
