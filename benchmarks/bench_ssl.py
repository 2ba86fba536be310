"""Time and memory of the self-similarity loss, forward and backward, against the published algorithm, in one run.

    python benchmarks/bench_ssl.py                                            # a photograph that scikit-image brings
    python benchmarks/bench_ssl.py --image testsets/Set5/butterfly.png        # the figures of benchmarks/README.md
    python benchmarks/bench_ssl.py --device cuda                              # the GPU rows alone

On the CPU the published algorithm is written here from its description: unfold every search area of the image, select
the masked ones, unfold every window of those. On a GPU it is benchmarks/naive.cu. Medians after a call to warm up
(of the slow published form one call). On the CPU each row runs in a process of its own; extra memory is the process's
peak above what it held before (Linux). On a GPU the inputs take turns, so that none waits in the cache, and extra
memory is what PyTorch's allocator gave at most.
"""

import argparse
import datetime
import functools
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from memory import forget_peak, peak

from similarity_cuda import loader
from utils.utils_error import run
from utils.utils_image import imread_uint, imresize_np
from utils.utils_ssl import SelfSimilarityLoss, edge_mask, mask_stride_pattern, self_similarity_graph

K, W, SIGMA = 25, 9, 0.004  # the size and the setting of every recipe
WIDE = 25  # the other window
CROP, BATCH = 128, 64
PUBLISHED_PIXELS = 4000  # the published form takes 2.4 MiB a pixel: 10 GiB here
MIB = 2**20


# ------------------------------------------------------------------------------------------------------------- inputs


def pairs(image: np.ndarray, n: int) -> tuple[Tensor, Tensor]:
    """sr, hr (n * n, 3, CROP, CROP): n x n crops spread over the image, the middle one for n = 1; sr = hr / 4 * 4."""
    spaces = [size - CROP for size in image.shape[:2]]
    tops, lefts = ([s // 2] if n == 1 else [s * i // (n - 1) for i in range(n)] for s in spaces)
    hr = [(image[y : y + CROP, x : x + CROP] / 255).astype(np.float32) for y in tops for x in lefts]
    sr = [imresize_np(imresize_np(crop, 1 / 4), 4).astype(np.float32) for crop in hr]
    output, target = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).contiguous() for x in (sr, hr))
    return output, target


def masks(hr: Tensor) -> dict[str, Tensor]:
    """The masks of the table, by name."""
    edges = edge_mask(hr)
    one = torch.zeros_like(edges)
    one[0, 0, CROP // 2, CROP // 2] = 1
    stride = mask_stride_pattern(CROP, CROP, 3).to(edges)
    return {"edges": edges, "stride 3": edges * stride, "all": torch.ones_like(edges), "one pixel": one}


# ------------------------------------------------------------------------------------------ the published algorithm


def published_graph(img: Tensor, mask: Tensor) -> Tensor:
    """The graph of one image (1, C, H, W) as the published PyTorch path computes it: (M, K * K)."""
    c, r, f = img.shape[1], K // 2, W // 2
    areas = F.unfold(F.pad(img, (r, r, r, r), mode="reflect"), K)  # (1, C * K * K, H * W): before the masking
    areas = areas[0].T[mask.flatten() == 1].reshape(-1, c, K, K)
    windows = F.unfold(F.pad(areas, (f, f, f, f)), W)  # (M, C * W * W, K * K)
    centre = windows[:, :, K * K // 2].unsqueeze(2)
    similarity = torch.exp(-((windows - centre) ** 2).sum(1) / (c * W * W) / SIGMA)
    return similarity / (similarity.sum(1, keepdim=True) + 1e-10)


class _NaiveDistances(torch.autograd.Function):
    """benchmarks/naive.cu: sums of squared differences of one extended image (C, H + 2r, W + 2r), (M, K * K)."""

    @staticmethod
    def forward(ctx, padded: Tensor, row: Tensor, column: Tensor) -> Tensor:
        ctx.save_for_backward(padded, row, column)
        return torch.ops.similarity_naive.forward(padded, row, column, K, W)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return torch.ops.similarity_naive.backward(grad.contiguous(), *ctx.saved_tensors, K, W), None, None


def naive_graph(img: Tensor, mask: Tensor) -> Tensor:
    """The graph of one image (1, C, H, W) as the published CUDA path computes it: (M, K * K)."""
    padded = F.pad(img, (K // 2,) * 4, mode="reflect")[0]
    row, column = (mask[0, 0] == 1).nonzero(as_tuple=True)
    similarity = torch.exp(-_NaiveDistances.apply(padded, row, column) / (img.shape[1] * W * W) / SIGMA)
    return similarity / (similarity.sum(1, keepdim=True) + 1e-10)


def published_loss(graph: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss over such a graph: images one by one, their graphs joined."""

    def loss(sr: Tensor, hr: Tensor, mask: Tensor) -> Tensor:
        x, y = (torch.cat([graph(a[i : i + 1], mask[i : i + 1]) for i in range(len(a))]) for a in (sr, hr))
        l1 = F.l1_loss(x, y)
        x, y = x.clamp(min=1e-10), y.clamp(min=1e-10)
        return 1000 * l1 + 1000 * (y * (y.log() - x.log())).mean()

    return loss


def load_naive() -> None:
    from torch.utils import cpp_extension

    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # of ninja, where pip put it
    cpp_extension.CUDA_HOME = str(loader._toolkit() or "")  # wherever nvcc is
    source = Path(__file__).with_name("naive.cu")  # takes a minute or two, once
    cpp_extension.load("similarity_naive", [str(source)], extra_cuda_cflags=["-O3"], is_python_module=False)


def loss_of(form: str, window: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if form == "published":
        return published_loss(published_graph)
    if form == "naive":
        return published_loss(naive_graph)
    return SelfSimilarityLoss(1000, 1000, K, window, SIGMA, ssl_mode=form)


# ---------------------------------------------------------------------------------------------------------------- CPU


def _seconds(call: Callable[[], object], budget: float) -> float:
    """Median seconds of one to 30 calls, until the budget (in seconds) is spent."""
    times: list[float] = []
    while len(times) < 30 and sum(times) < budget:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _measure_on_cpu(form: str, window: int, sr: Tensor, hr: Tensor, mask: Tensor, threads: int, out) -> None:
    torch.set_num_threads(threads)
    loss = loss_of(form, window)
    tiny = torch.rand(1, 3, K, K, requires_grad=True)
    loss(tiny, torch.rand(1, 3, K, K), F.pad(torch.ones(1, 1, 1, 1), (K // 2,) * 4)).backward()  # libraries, threads
    x = sr.clone().requires_grad_()
    pixels = int(mask.sum())
    upstream = torch.rand(pixels, K * K)

    def loss_and_gradient() -> tuple[float, Tensor]:
        total = loss(x, hr, mask)
        return total.item(), torch.autograd.grad(total, x)[0]

    def graph_and_gradient() -> None:
        if form == "published":
            graph = published_graph(x, mask)
        else:
            graph = self_similarity_graph(x, mask, K, window, SIGMA, ssl_mode=form)
        torch.autograd.grad(graph, x, upstream)

    forget_peak()
    before = peak()
    value, gradient = loss_and_gradient()
    extra = peak() - before
    seconds = _seconds(loss_and_gradient, 2)
    out.send((seconds, extra, _seconds(graph_and_gradient, 1), value, gradient.numpy()))


def cpu_rows(image: np.ndarray, threads: int) -> None:
    sr, hr = pairs(image, 1)
    print(f"\nCPU, {threads} threads, one image of {CROP} x {CROP}, search {K}, float32\n")
    print(
        f"{'mask':<10}{'pixels':>7}  {'form':<10}{'window':>6}{'loss ms':>11}{'faster':>9}{'extra MiB':>11}{'less':>9}"
        f"{'graph ms':>11}{f'{WIDE}/{W}':>7}{'loss':>9}"
    )
    context = multiprocessing.get_context("spawn")
    disagreement = 0.0
    for name, mask in masks(hr).items():
        pixels = int(mask.sum())
        forms = [("boxsum", W), ("cpp", W)]
        if pixels <= PUBLISHED_PIXELS:
            forms.insert(0, ("published", W))
        if name != "one pixel":
            forms += [("boxsum", WIDE), ("cpp", WIDE)]
        results: dict = {}
        for form, window in forms:
            receive, send = context.Pipe(False)
            process = context.Process(
                target=_measure_on_cpu, args=(form, window, sr, hr, mask, threads, send), daemon=True
            )
            process.start()
            send.close()  # so that a process that dies ends the wait
            results[form, window] = receive.recv()
            process.join()
            seconds, extra, graph, value, gradient = results[form, window]
            base, narrow = results.get(("published", W)) if window == W else None, results.get((form, W))
            faster = f"{base[0] / seconds:.1f}x" if base else "-"
            less = f"{base[1] / extra:.1f}x" if base and extra >= 1 else "-"  # pages are counted too coarsely for less
            ratio = f"{seconds / narrow[0]:.2f}" if narrow and window != W else ""
            print(
                f"{name:<10}{pixels:>7}  {form:<10}{window:>6}{1000 * seconds:>11.2f}{faster:>9}{extra:>11.1f}{less:>9}"
                f"{1000 * graph:>11.2f}{ratio:>7}{value:>9.4f}",
                flush=True,
            )
            _, _, _, right, right_gradient = next(r for (_, size), r in results.items() if size == window)
            error = np.abs(gradient - right_gradient).max() / np.abs(right_gradient).max()
            disagreement = max(disagreement, error, abs(value / right - 1))
    print(
        f"\nfaster, less: than the published form with the same mask. {WIDE}/{W}: time of the loss, window {WIDE} to\n"
        f"window {W}. The published form is left out for window {WIDE} (about {(WIDE / W) ** 2:.1f} times its time "
        "and\n"
        f"memory) and for all pixels (about {CROP * CROP * 2.4 / 1024:.0f} GiB). All forms agree in loss and\n"
        f"gradient, to {disagreement:.0e} of the largest number."
    )


# ---------------------------------------------------------------------------------------------------------------- GPU


def least_work(mask: Tensor, channels: int, window: int) -> tuple[float, float]:
    """A model of the least that loss and gradient need: (float32 instructions, bytes).

    Counted for box sums; a direct sum takes C w^2 = 243 subtractions and as many squares for each masked pixel and
    offset. Let P be the number of positions that some window around a masked pixel covers, and
    E_d(x) = sum over channels of (I(x) - I(x + d))^2. Then D_p(d) is the box sum of E_d around p, and D_p(-d) that of
    the same E_d around p - d: half as many fields as offsets serve all. An instruction is one of one lane: an addition,
    a multiplication, or both at once. For each position and pair of offsets:

        E_d                      2 C      C subtractions, C squares added up
        its box sums             4        running sums along rows and columns add one and subtract one each
      these for SR and for GT; then for the gradient with respect to SR, with G = dL / dD:
        G_d(p) + G_-d(p + d)     1        both offsets send their gradient to the same E_d
        box sums of that         4        = dL / dE_d =: V
        times 2 (I(x) - I(x+d))  2 C + 2  V I(x + d) added up at x and V I(x) at x + d; V itself at both, for the end

    2 (2 C + 4) + 2 C + 7 = 33 together for C = 3. For each masked pixel and offset 20 more: scale, exponential, sum and
    normalisation of both graphs (8), difference and its absolute value summed (2), logarithms from the exponents (2),
    clamps (2), KL (2), gradient before and after the normalisation (4).

    It is a model, not a proof: windows that leave the search area are counted as whole, no position is computed twice
    by neighbouring blocks, loads and indices are free, and nothing is gained where masked pixels are few.

    Bytes: SR, GT and the mask are read once and the gradient is written once; no graph leaves the chip.
    """
    n, _, h, w = mask.shape
    covered = float(F.max_pool2d(mask, window, 1, window // 2).sum())
    pairs_of_offsets = (K * K - 1) / 2
    instructions = covered * pairs_of_offsets * (2 * (2 * channels + 4) + 2 * channels + 7)
    instructions += float(mask.sum()) * K * K * 20
    return instructions, 4.0 * n * h * w * (3 * channels + 1)


def _milliseconds(calls: list[Callable[[], object]], budget: float = 1000) -> float:
    """Median milliseconds on the GPU of calls that take turns, after one round to warm up: 5 rounds to 50 calls."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    first = 1000 * (time.perf_counter() - begin) / len(calls)
    count = int(min(50, max(5, budget / max(first, 1e-3))))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for i, (start, end) in enumerate(marks):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def ceilings() -> tuple[float, float]:
    """Measured float32 instructions per second (a matrix product, TF32 off) and bytes per second (a copy)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    n = 8192
    a, b, c = (torch.rand(n, n, device="cuda") for _ in range(3))
    product = _milliseconds([lambda: torch.mm(a, b, out=c)])
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = _milliseconds([lambda: target.copy_(source)])
    return n**3 / product * 1000, 2 * 4 * source.numel() / copy * 1000


def measure_on_gpu(form: str, window: int, sets: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float, float]:
    """-> (milliseconds of loss forward + backward, extra MiB, loss)."""
    loss = loss_of(form, window)

    def loss_and_gradient(sr: Tensor, hr: Tensor, mask: Tensor) -> Tensor:
        total = loss(sr, hr, mask)
        torch.autograd.grad(total, sr)
        return total.detach()

    value = loss_and_gradient(*sets[0]).item()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loss_and_gradient(*sets[0])
    extra = (torch.cuda.max_memory_allocated() - held) / MIB
    return _milliseconds([functools.partial(loss_and_gradient, *s) for s in sets]), extra, value


def kernel_times(sets: list[tuple[Tensor, Tensor, Tensor]]) -> str:
    """A table of the kernels of one call of the op with the published window, those of a percent or more."""
    loss = loss_of("cuda", W)

    def call() -> None:
        torch.autograd.grad(loss(*sets[0]), sets[0][0])

    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times = [(event.self_device_time_total / 1000, event.count, event.key) for event in profile.key_averages()]
    total = sum(time for time, _, _ in times)
    rows = [
        f"{t:>9.3f}{t / total:>6.0%}{n:>7}  {key[:70]}" for t, n, key in sorted(times, reverse=True) if t > total / 100
    ]
    return "\n".join([f"{'ms':>9}{'':>6}{'calls':>7}  kernel", *rows])


def gpu_rows(image: np.ndarray) -> None:
    sr, hr = pairs(image, round(BATCH**0.5))
    turned: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: x.flip(3),
        lambda x: x.flip(2),
        lambda x: x.transpose(2, 3),
    ]
    print(f"\n{torch.cuda.get_device_name()}, {BATCH} images of {CROP} x {CROP}, search {K}, float32\n")
    forms = [("boxsum", W), ("cuda", W), ("boxsum", WIDE), ("cuda", WIDE)]
    try:
        load_naive()
        forms.insert(0, ("naive", W))
    except (RuntimeError, OSError) as error:
        print(f"the naive kernel cannot be built here: {loader.told(error)}\n")
    print(
        f"{'mask':<9}{'pixels':>8}  {'form':<8}{'window':>6}{'ms':>11}{'faster':>9}{'extra MiB':>11}{'graphs':>8}"
        f"{'over least':>12}{f'{WIDE}/{W}':>7}{'loss':>9}"
    )
    instructions_per_second, bytes_per_second = ceilings()
    floors, kernels = [], []
    for name, mask in masks(hr).items():
        if name == "one pixel":
            continue
        pixels = int(mask.sum())
        sets = [
            (t(sr).contiguous().cuda().requires_grad_(), t(hr).contiguous().cuda(), t(mask).contiguous().cuda())
            for t in turned
        ]
        least = {}
        for window in (W, WIDE):
            instructions, traffic = least_work(mask, hr.shape[1], window)
            arithmetic, transport = 1000 * instructions / instructions_per_second, 1000 * traffic / bytes_per_second
            least[window] = max(arithmetic, transport)
            floors.append(
                f"{name:<9}{window:>6}{instructions / 1e9:>18.2f}{arithmetic:>9.3f}"
                f"{traffic / MIB:>10.1f}{transport:>9.3f}"
            )
        times: dict[tuple[str, int], float] = {}
        for form, window in forms:
            row = f"{name:<9}{pixels:>8}  {form:<8}{window:>6}"
            try:
                milliseconds, extra, value = measure_on_gpu(form, window, sets)
            except (RuntimeError, ValueError) as error:  # no kernels, or too little memory: the other rows still count
                print(f"{row}  {loader.told(error)[:70]}", flush=True)
                continue
            times[form, window] = milliseconds
            if (form, window) == ("cuda", W):
                kernels.append(f"{name}:\n{kernel_times(sets)}")
            faster = f"{times['naive', W] / milliseconds:.1f}x" if ("naive", W) in times and window == W else "-"
            ratio = f"{milliseconds / times[form, W]:.2f}" if window != W and (form, W) in times else ""
            print(
                f"{row}{milliseconds:>11.3f}{faster:>9}{extra:>11.1f}{extra * MIB / (4 * pixels * K * K):>8.2f}"
                f"{milliseconds / least[window]:>11.1f}x{ratio:>7}{value:>9.4f}",
                flush=True,
            )
    print(
        "\nfaster: than the naive kernel. graphs: extra memory in graphs of pixels x k^2 float32. over least:\n"
        "time of the row over the greater of the two least times below. Measured here, a second: "
        f"{instructions_per_second / 1e12:.1f}e12\nfloat32 instructions (matrix product, TF32 off) and "
        f"{bytes_per_second / 1e12:.2f}e12 bytes (copy, read and written).\n"
    )
    print(f"{'mask':<9}{'window':>6}{'1e9 instructions':>18}{'ms':>9}{'MiB':>10}{'ms':>9}")
    print("\n".join(floors))
    print("\nThe kernels of one call of cuda, window " + str(W) + "\n\n" + "\n\n".join(kernels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="ground truth, at least 128 x 128; default: scikit-image's astronaut")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="rows of this device only; default: all")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    if args.image:
        image = imread_uint(args.image, 3)
    else:
        from skimage import data

        image = data.astronaut()
    if min(image.shape[:2]) < CROP:
        parser.error(f"{args.image} has {image.shape[0]} x {image.shape[1]} pixels, fewer than {CROP} x {CROP}")

    print(f"{datetime.date.today()}, {Path(args.image).name if args.image else 'astronaut'}")
    print(textwrap.fill(loader.facts(), 98, break_on_hyphens=False))
    if args.device != "cuda":
        cpu_rows(image, args.threads)
    if args.device != "cpu":
        if torch.cuda.is_available():
            gpu_rows(image)
        else:
            print("\nno GPU here: the GPU rows are not measured")


if __name__ == "__main__":
    run(main)
