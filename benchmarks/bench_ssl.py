"""Time and memory of the self-similarity loss, forward and backward, against the published algorithm, in one run.

    python benchmarks/bench_ssl.py                                            # a photograph that scikit-image brings
    python benchmarks/bench_ssl.py --image testsets/Set5/butterfly.png        # the figures of benchmarks/README.md

The published algorithm is written here from its description: unfold every search area of the image, select the masked
ones, unfold every window of those. Each form runs in a process of its own, several times; medians are printed. Extra
memory is the process's peak above what it held before the first call.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.utils_image import imread_uint, imresize_np
from utils.utils_ssl import SelfSimilarityLoss, edge_mask

K, W, SIGMA = 25, 9, 0.004


def published_graph(img: Tensor, mask: Tensor) -> Tensor:
    """The graph of one image (1, C, H, W) as the published PyTorch path computes it: (M, K * K)."""
    c, r, f = img.shape[1], K // 2, W // 2
    areas = F.unfold(F.pad(img, (r, r, r, r), mode="reflect"), K)  # (1, C * K * K, H * W): before the masking
    areas = areas[0].T[mask.flatten() == 1].reshape(-1, c, K, K)
    windows = F.unfold(F.pad(areas, (f, f, f, f)), W)  # (M, C * W * W, K * K)
    centre = windows[:, :, K * K // 2].unsqueeze(2)
    similarity = torch.exp(-((windows - centre) ** 2).sum(1) / (c * W * W) / SIGMA)
    return similarity / (similarity.sum(1, keepdim=True) + 1e-10)


def published_loss(sr: Tensor, hr: Tensor, mask: Tensor) -> Tensor:
    x, y = published_graph(sr, mask), published_graph(hr, mask)
    l1 = F.l1_loss(x, y)
    x, y = x.clamp(min=1e-10), y.clamp(min=1e-10)
    return 1000 * l1 + 1000 * (y * (y.log() - x.log())).mean()


def _measure(form: str, hr: np.ndarray, sr: np.ndarray, repeats: int, threads: int, out) -> None:
    torch.set_num_threads(threads)
    target, output = (torch.from_numpy(x).permute(2, 0, 1)[None].contiguous() for x in (hr, sr))
    mask = edge_mask(target)
    loss = published_loss if form == "published" else SelfSimilarityLoss(1000, 1000, K, W, SIGMA, ssl_mode=form)
    warm_up = torch.rand(1, 3, K, K, requires_grad=True)
    loss(warm_up, torch.rand(1, 3, K, K), F.pad(torch.ones(1, 1, 1, 1), (K // 2,) * 4)).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, value, gradient = [], 0.0, 0.0
    for _ in range(repeats):
        x = output.clone().requires_grad_()
        begin = time.perf_counter()
        total = loss(x, target, mask)
        total.backward()
        times.append(time.perf_counter() - begin)
        assert x.grad is not None
        value, gradient = total.item(), x.grad.abs().sum().item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kilo = 1024 if platform.system() == "Linux" else 1  # macOS counts bytes
    out.send((statistics.median(times), (peak - before) * kilo / 2**20, int(mask.sum()), value, gradient))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="ground truth; default: scikit-image's astronaut")
    parser.add_argument("--crop", type=int, default=128, help="side of the crop from the middle, in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each fast form (the published one: 2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    if args.image:
        image = imread_uint(args.image, 3)
    else:
        from skimage import data

        image = data.astronaut()
    top, left = ((s - args.crop) // 2 for s in image.shape[:2])
    hr = (image[top : top + args.crop, left : left + args.crop] / 255).astype(np.float32)
    sr = imresize_np(imresize_np(hr, 1 / 4), 4).astype(np.float32)

    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {args.threads} threads")
    context = multiprocessing.get_context("spawn")
    results = {}
    for form, repeats in (("published", 2), ("boxsum", args.repeats), ("cpp", 3 * args.repeats)):
        receive, send = context.Pipe(False)
        process = context.Process(target=_measure, args=(form, hr, sr, repeats, args.threads, send))
        process.start()
        results[form] = receive.recv()
        process.join()
    base_time, base_memory = results["published"][:2]
    print(f"{args.image or 'astronaut'}: {args.crop} x {args.crop}, {results['published'][2]} masked pixels, {K}/{W}")
    print(f"{'form':<12}{'seconds':>10}{'faster':>9}{'extra MiB':>11}{'less':>8}{'loss':>12}{'|gradient|':>12}")
    for form, (seconds, memory, _, value, gradient) in results.items():
        print(
            f"{form:<12}{seconds:>10.3f}{base_time / seconds:>8.1f}x{memory:>11.0f}{base_memory / memory:>7.1f}x"
            f"{value:>12.6f}{gradient:>12.4f}"
        )


if __name__ == "__main__":
    main()
