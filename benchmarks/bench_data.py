"""Time of random degradations for one training sample, against KAIR's structure, in one run on one thread; of reading.

    python benchmarks/bench_data.py                                     # a photograph that scikit-image brings
    python benchmarks/bench_data.py --image testsets/Set5/butterfly.png --samples 100
    python benchmarks/bench_data.py --device cuda                       # the batched form as well
    python benchmarks/bench_data.py --reading                           # items a second from PNG and from raw files

KAIR's code does not run on today's SciPy. What it does to an image is written here from its description: convolution
by SciPy in float64, anisotropic kernels point by point, MATLAB's bicubic row by row, noise of NumPy's samplers. Both
forms get the same samples and the same steps, in turn; times are processor times, in which other work shows less. The
ratio is of the means, for a data loader waits for the sum of all its samples.

Reading: training items of the data sets, the same crops from each form of the files in turn. An image of 2K is the
photograph mirrored up to that size, so that PNG has as much to compress in it.
"""

import argparse
import datetime
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import scipy
import torch
from scipy import ndimage, stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset_base import DatasetBase
from data.degradations.on_batch import apply_batch
from data.degradations.on_image import apply
from data.degradations.select_degradation import DEGRADATIONS
from data.degradations.steps import Blur, Jpeg, Noise, Resize, Step, Thin, shift_pixel
from data.loader import EndlessBatchSampler, training_loader
from data.preparation.steps import matlab_bicubic
from data.select_dataset import define_Dataset
from utils.utils_error import run
from utils.utils_image import imread_uint, imresize_np, imsave, single2tensor3, uint2single
from utils.utils_option import DatasetOptions

SIDE, SCALE = 320, 4  # KAIR's H_size
CV2_FILTERS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


def samples(image: np.ndarray, n: int) -> list[np.ndarray]:
    """n crops (SIDE, SIDE, 3) at random places, float32 in [0, 1]."""
    rng = np.random.default_rng(0)
    corners = [[int(rng.integers(side - SIDE, endpoint=True)) for side in image.shape[:2]] for _ in range(n)]
    return [np.ascontiguousarray(uint2single(image[y : y + SIDE, x : x + SIDE])) for y, x in corners]


# ------------------------------------------------------------------------------------------------ KAIR's structure


def point_by_point(step: Blur) -> np.ndarray:
    """The anisotropic Gaussian, a density evaluated for each pixel of the kernel."""
    assert step.sigma is not None
    turn = np.array([[np.cos(step.theta), -np.sin(step.theta)], [np.sin(step.theta), np.cos(step.theta)]])
    covariance = turn @ np.diag(np.square(step.sigma)) @ turn.T
    kernel = np.zeros((step.size, step.size))
    centre = (step.size - 1) / 2
    for y in range(step.size):
        for x in range(step.size):
            kernel[y, x] = stats.multivariate_normal.pdf([x - centre, y - centre], mean=[0, 0], cov=covariance)
    return kernel / kernel.sum()


def isotropic(size: int, std: float) -> np.ndarray:
    """MATLAB's fspecial."""
    x, y = np.meshgrid(np.arange(size) - (size - 1) / 2, np.arange(size) - (size - 1) / 2)
    kernel = np.exp(-(x * x + y * y) / (2 * std * std))
    return kernel / kernel.sum()


def halve(img: np.ndarray) -> np.ndarray:
    """MATLAB's bicubic, antialiased: a product for each new row and channel, then for each new column."""
    weights, taps = np.zeros(8), (np.arange(8) - 3.5) / 2
    x = np.abs(taps)
    weights = np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) / 2
    for _ in range(2):
        padded = np.pad(img, ((3, 3), (0, 0), (0, 0)), mode="symmetric")
        half = np.zeros((img.shape[0] // 2, *img.shape[1:]), img.dtype)
        for i in range(len(half)):
            for channel in range(img.shape[2]):
                half[i, :, channel] = padded[2 * i : 2 * i + 8, :, channel].T @ weights
        img = half.swapaxes(0, 1)
    return img


def published_noise(img: np.ndarray, step: Noise) -> np.ndarray:
    height, width, channels = img.shape
    if step.mix is not None:
        covariance = np.array(step.mix).T @ np.array(step.mix)
        noise = np.random.multivariate_normal(np.zeros(channels), covariance, (height, width))
    else:
        shape = (height, width, 1) if step.kind == "gray" else img.shape
        noise = np.random.normal(0, step.level / 255, shape)
    return np.clip(img + noise.astype(np.float32), 0, 1)


def published(img: np.ndarray, steps: Sequence[Step]) -> np.ndarray:
    """The steps of BSRGAN on (H, W, 3), as KAIR does them."""
    img = img.copy()
    for step in steps:
        match step:
            case Blur(size=size, sigma=(std, _)):
                kernel = isotropic(size, std) if step.is_separable else point_by_point(step)
                img = ndimage.convolve(img, kernel[..., None], mode="mirror")
            case Thin(size=size, sigma=std, every=every):
                kernel = shift_pixel(isotropic(size, std), every)
                img = ndimage.convolve(img, (kernel / kernel.sum())[..., None], mode="mirror")[::every, ::every]
                img = np.clip(img, 0, 1)
            case Resize(filter="matlab"):
                img = np.clip(halve(img), 0, 1)
            case Resize(height=height, width=width, filter=filter_):
                img = np.clip(cv2.resize(img, (width, height), interpolation=CV2_FILTERS[filter_]), 0, 1)
            case Noise():
                img = published_noise(img, step)
            case Jpeg(quality=quality):
                uint = cv2.cvtColor((img.clip(0, 1) * 255).round().astype(np.uint8), cv2.COLOR_RGB2BGR)
                encoded = cv2.imencode(".jpg", uint, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
                decoded = cv2.cvtColor(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)
                img = (decoded / 255).astype(np.float32)
    return img


# ---------------------------------------------------------------------------------------------------------- timing


def milliseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1000 * (time.process_time() - start)


def ours(name: str, seed: int, img: np.ndarray) -> list[Step]:
    """Draw and apply; -> what was drawn."""
    rng = np.random.default_rng(seed)
    steps = DEGRADATIONS[name]((SIDE, SIDE, 3), SCALE, rng)
    apply(img, steps, rng)
    return steps


def cpu_rows(images: list[np.ndarray], names: Sequence[str]) -> None:
    print(f"{'degradation':<18}{'form':<12}{'median ms':>10}{'mean ms':>10}{'faster':>9}")
    for name in names:
        times: dict[str, list[float]] = {"published": [], "ours": []}
        for seed, img in enumerate(images):
            steps = ours(name, seed, img)  # to warm up
            if name in ("bsrgan", "bsrgan_light"):
                times["published"].append(milliseconds(partial(published, img, steps)))
            times["ours"].append(milliseconds(partial(ours, name, seed, img)))
        means = {form: statistics.mean(values) for form, values in times.items() if values}
        for form, mean in means.items():
            ratio = f"{means['published'] / mean:.1f}x" if "published" in means else "-"
            print(f"{name:<18}{form:<12}{statistics.median(times[form]):>10.2f}{mean:>10.2f}{ratio:>9}")


def agreement(images: list[np.ndarray]) -> float:
    """The mean difference of both forms without noise, in levels: they are one degradation."""
    differences = []
    for i, img in enumerate(images):
        rng = np.random.default_rng(i)
        steps = [s for s in DEGRADATIONS["bsrgan"]((SIDE, SIDE, 3), SCALE, rng) if not isinstance(s, (Noise, Jpeg))]
        differences.append(255 * np.abs(published(img, steps) - apply(img, steps, rng)).mean())
    return max(differences)


def batch_times(images: list[np.ndarray], name: str, n: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of drawing the steps for a batch of n samples, and of drawing and applying them."""
    batch = torch.stack([single2tensor3(images[i % len(images)]) for i in range(n)]).to(device)
    drawn, times = [], []
    for seed in range(8):
        rng, generator = np.random.default_rng(seed), torch.Generator(device).manual_seed(seed)
        start = time.perf_counter()
        plans = [DEGRADATIONS[name]((SIDE, SIDE, 3), SCALE, rng) for _ in range(n)]
        drawn.append(time.perf_counter() - start)
        apply_batch(batch, plans, generator)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    draw, whole = (1000 * statistics.median(x[2:]) for x in (drawn, times))  # the first build their plans
    return draw, whole


def batch_rows(images: list[np.ndarray], names: Sequence[str], device: torch.device) -> None:
    print(f"\nbatched on {device}\n{'degradation':<18}{'batch':>6}{'draw ms':>10}{'ms a batch':>12}{'ms a sample':>13}")
    for name in names:
        for n in (16, 48):
            draw, whole = batch_times(images, name, n, device)
            print(f"{name:<18}{n:>6}{draw:>10.2f}{whole:>12.1f}{whole / n:>13.3f}")


# --------------------------------------------------------------------------------------------------------- reading

PATCH, PIECE, WHOLE = 128, 512, (1356, 2040)
BATCH = 16


def training_sets(image: np.ndarray, folder: Path) -> dict[str, dict[str, DatasetBase]]:
    """Kind of item -> form of the files -> data set; the files are written, PNG as main_prepare_data.py does."""
    sides = zip(WHOLE, image.shape[:2], strict=True)
    whole = np.pad(image, (*((0, max(0, most - side)) for most, side in sides), (0, 0)), mode="symmetric")
    whole = np.ascontiguousarray(whole[: WHOLE[0], : WHOLE[1]])
    corners = [(y, x) for y in (0, WHOLE[0] - PIECE) for x in (0, PIECE, 2 * PIECE, WHOLE[1] - PIECE)]
    pieces = [np.ascontiguousarray(whole[y : y + PIECE, x : x + PIECE]) for y, x in corners]
    sets: dict[str, dict[str, DatasetBase]] = {"sr": {}, "plain": {}, "blindsr": {}}
    for name, images in ((f"pieces of {PIECE}", pieces), ("whole 2K images", [whole, whole[::-1].copy()])):
        for suffix in ("png", "npy"):
            root = folder / name / suffix
            for i, H in enumerate(images):
                for role, img in (("H", H), ("L", matlab_bicubic(H, 1 / SCALE))):
                    (root / role).mkdir(parents=True, exist_ok=True)
                    imsave(img, str(root / role / f"{i}.{suffix}"), png_level=3)
            for kind, of_kind in sets.items():
                opt = DatasetOptions(
                    dataset_type=kind,  # type: ignore[arg-type]
                    dataroot_H=str(root / "H"),
                    dataroot_L=str(root / "L") if kind == "plain" else None,
                    H_size=PATCH,
                    scale=SCALE,
                )
                dataset = define_Dataset(opt)
                assert isinstance(dataset, DatasetBase)
                of_kind[f"{name}, {suffix}"] = dataset
    return sets


def degradation_alone(kind: str, image: np.ndarray, seed: int) -> None:
    """What an item costs without any file: L of a patch that is in memory."""
    rng = np.random.default_rng(seed)
    H = np.ascontiguousarray(uint2single(image[:PATCH, :PATCH]))
    if kind == "sr":
        imresize_np(H, 1 / SCALE)
    elif kind == "blindsr":
        apply(H, DEGRADATIONS["bsrgan"](H.shape, SCALE, rng), rng)


def reading_rows(image: np.ndarray, n: int) -> None:
    print(f"{'item':<9}{'files':<24}{'median ms':>10}{'mean ms':>10}{'a second':>10}{'of PNG':>9}")
    with tempfile.TemporaryDirectory() as folder:
        sets = training_sets(image, Path(folder))
        for kind, of_kind in sets.items():
            calls: dict[str, Callable[[int], object]] = {
                form: lambda seed, data=dataset: data[seed % len(data), (0, seed)]  # type: ignore[misc]
                for form, dataset in of_kind.items()
            }
            if kind != "plain":
                calls["L of a patch in memory"] = partial(degradation_alone, kind, image)
            times: dict[str, list[float]] = {form: [] for form in calls}
            for seed in range(-4, n):  # the first ones warm up
                for form, call in calls.items():
                    took = milliseconds(partial(call, abs(seed)))
                    times[form] += [took] * (seed >= 0)
            for form, spent in times.items():
                mean = statistics.mean(spent)
                ratio = statistics.mean(times[png]) / mean if (png := form.replace("npy", "png")) != form else 0
                figures = f"{statistics.median(spent):>10.2f}{mean:>10.2f}{1000 / mean:>10.0f}"
                print(f"{kind:<9}{form:<24}{figures}{f'{ratio:.1f}x' if ratio else '-':>9}")
        print(f"\nthe loader's own, processor ms an image of batches of {BATCH} from raw pieces")
        for kind in ("sr", "blindsr"):
            print(f"{kind:<9}{loader_overhead(sets[kind][f'pieces of {PIECE}, npy'], max(4, n // BATCH))}")


def loader_overhead(dataset: DatasetBase, n: int) -> str:
    """Drawing an order and making batches, in this process; what a batch of another process costs this one."""
    sampler = EndlessBatchSampler(len(dataset), BATCH, seed=0)
    orders, alone = iter(sampler), iter(training_loader(dataset, sampler, 0, pin_memory=False))
    batched, items = [], []
    for _ in range(n):
        batched.append(milliseconds(partial(next, alone)))
        keys = next(orders)
        items.append(milliseconds(lambda keys=keys: [dataset[key] for key in keys]))  # type: ignore[misc]
    loader = iter(training_loader(dataset, sampler, 1, pin_memory=False))
    next(loader)  # starts the process
    fetched = [milliseconds(partial(next, loader)) for _ in range(n)]
    own = (statistics.median(batched) - statistics.median(items)) / BATCH
    return f"{own:.3f} over its items; {statistics.median(fetched) / BATCH:.3f} in training's process, 1 worker"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="a photograph of at least 320 x 320 pixels; default: scikit-image's astronaut")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--device", default="cpu", help="cuda: the batched form there as well")
    parser.add_argument("--reading", action="store_true", help="what training items cost, instead of degradations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if args.image:
        image = imread_uint(args.image)
    else:
        from skimage import data

        image = data.astronaut()
    versions = (
        f"NumPy {np.__version__}, SciPy {scipy.__version__}, OpenCV {cv2.__version__}, PyTorch {torch.__version__}"
    )
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {versions}")
    if args.reading:
        print(f"{args.samples} items of {PATCH} x {PATCH} pixels, x{SCALE}, one thread, processor time\n")
        reading_rows(image, args.samples)
        return
    images = samples(image, args.samples)
    print(f"{args.samples} samples of {SIDE} x {SIDE} pixels, x{SCALE}, one thread, processor time\n")
    cpu_rows(images, ("bsrgan", "bsrgan_light", "bsrgan_plus", "realesrgan", "realesrgan_light", "resshift"))
    print(f"\nbsrgan without noise and JPEG, both forms: they differ by {agreement(images[:20]):.4f} levels at most")
    if args.device != "cpu":
        device = torch.device(args.device)
        print(torch.cuda.get_device_name(device))
        batch_rows(images, ("bsrgan", "bsrgan_light", "realesrgan", "realesrgan_light"), device)


if __name__ == "__main__":
    run(main)
