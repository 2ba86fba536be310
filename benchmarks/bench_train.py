"""Time and memory of a step of GAN training with SSL, against the plain step of KAIR-style trainers, change by change.

    python benchmarks/bench_train.py                          # the figures of benchmarks/README.md, about ten minutes
    python benchmarks/bench_train.py --bf16 --compile         # also what only pays where the processor can do it
    python benchmarks/bench_train.py --device cuda --recipe esrgan

The plain step is written here from its description: Adam without more, a mean of E over a loop, each of netD's losses
by itself, a number read from the device for each term. Every form takes the same networks, batch and losses, the
self-similarity loss among them; VGG19 has drawn weights. Each is measured in a process of its own, the forms in turn.
On the CPU times are processor times of one thread, in which other work shows less; on a GPU the wall's.
"""

import argparse
import copy
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

if "--device" not in sys.argv:  # of the CPU one thread; before torch, and for the processes that are started here
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn
from torchvision.models import vgg19

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from memory import forget_peak, peak

from data.select_dataset import define_Dataset
from models.loss import PerceptualLoss
from models.model_gan import ModelGAN
from models.precision import set_up, training_layout
from utils.utils_error import run
from utils.utils_image import imsave
from utils.utils_option import Options, parse

RECIPES: dict[str, dict[str, Any]] = {
    # That of BSRGAN with a small generator.
    "bsrgan": {
        "netG": {"net_type": "rrdbnet", "nf": 64, "nb": 4, "gc": 32},
        "netD": {"net_type": "discriminator_unet", "base_nc": 64},
        "train": {"gan_type": "lsgan", "D_lossfn_weight": 1.0, "G_lossfn_weight": 1.0},
    },
    "esrgan": {
        "netG": {"net_type": "rrdbnet", "nf": 64, "nb": 23, "gc": 32},
        "netD": {"net_type": "discriminator_vgg_128", "base_nc": 64},
        "train": {"gan_type": "ragan", "D_lossfn_weight": 0.005, "G_lossfn_weight": 0.01},
    },
}
LAYERS, WEIGHTS = [2, 7, 16, 25, 34], [0.1, 0.1, 1.0, 1.0, 1.0]

PLAIN = "plain step"
FORMS: dict[str, tuple[str, ...]] = {  # a + adds to the form above it
    PLAIN: ("train.channels_last=false",),
    "ours": ("train.channels_last=false",),
    "+ channels_last": ("train.channels_last=true",),
    "+ D_once": ("train.channels_last=true", "train.D_once=true"),
    "+ bf16": ("train.channels_last=true", "train.D_once=true", "train.precision=bf16"),
    "bf16 without D_once": ("train.channels_last=true", "train.precision=bf16"),
    "+ compile": ("train.channels_last=true", "train.D_once=true", "train.precision=bf16", "train.compile=true"),
}


class Measured(NamedTuple):
    seconds: float  # of one step
    memory: float  # MiB: on a CPU beyond what stood before the step, on a GPU all of it
    parts: dict[str, float]  # seconds, exclusive


class Case(NamedTuple):
    """What is trained."""

    recipe: str
    batch: int
    size: int
    device: str
    steps: int

    def options(self, folder: Path, *more: str) -> Options:
        """The options of a run on images of noise in ``folder``."""
        recipe = RECIPES[self.recipe]
        torch.manual_seed(0)
        (folder / "H").mkdir(exist_ok=True)
        image = nn.functional.interpolate(torch.rand(1, 3, 64, 64), size=(512, 512), mode="bicubic").clamp(0, 1)
        imsave((255 * image[0].permute(1, 2, 0)).round().byte().numpy(), str(folder / "H" / "0.png"))
        train = {
            "ssl_l1_weight": 500,
            "ssl_kl_weight": 500,
            "iterations": 10,
            **recipe["train"],
        }
        content = {
            "task": "bench",
            "model": "gan",
            "netG": recipe["netG"],
            "netD": recipe["netD"],
            "datasets": {
                "train": {
                    "dataset_type": "blindsr",
                    "dataroot_H": str(folder / "H"),
                    "H_size": self.size,
                    "dataloader_batch_size": self.batch,
                }
            },
            "train": train,
        }
        path = folder / "bench.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return parse(str(path), overrides=more)

    def now(self) -> float:
        """Seconds: the processor's, or the wall's once the GPU is done."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


# ---------------------------------------------------------------------------------------------------- the plain step


def plain_step(model: ModelGAN) -> Callable[[dict[str, Tensor]], None]:
    """The usual step, with the networks and losses of ``model``."""
    netG, netD, train = model.netG, model.netD, model.opt.train
    netE = copy.deepcopy(netG).eval()
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-4) for net in (netG, netD)]
    perceptual, ssl = model.perceptual, model.ssl
    assert perceptual is not None
    assert ssl is not None
    log = {}

    def step(batch: dict[str, Tensor]) -> None:
        L, H = (batch[name].to(model.device) for name in ("L", "H"))
        for p in netD.parameters():
            p.requires_grad = False
        optimizers[0].zero_grad()
        E = netG(L)
        l1, features = train.G_lossfn_weight * model.pixel(E, H), perceptual(E, H)
        pred_real = netD(H).detach() if model.gan.needs_real else None
        adversarial = train.D_lossfn_weight * model.gan.generator(netD(E), pred_real)
        similarity, _, _ = ssl.parts(E, H)
        loss = l1 + features + adversarial + similarity
        loss.backward()
        torch.nn.utils.clip_grad_norm_(netG.parameters(), float("inf"))
        optimizers[0].step()

        for p in netD.parameters():
            p.requires_grad = True
        optimizers[1].zero_grad()
        if model.gan.needs_real:
            pred_fake = netD(E.detach()).detach()
            pred_real = netD(H)
            l_real = 0.5 * model.gan.towards(pred_real - pred_fake.mean(0, keepdim=True), real=True)
            l_real.backward()
            pred_fake = netD(E.detach())
            l_fake = 0.5 * model.gan.towards(pred_fake - pred_real.detach().mean(0, keepdim=True), real=False)
        else:
            pred_real = netD(H)
            l_real = model.gan.towards(pred_real, real=True)
            l_real.backward()
            pred_fake = netD(E.detach().clone())
            l_fake = model.gan.towards(pred_fake, real=False)
        l_fake.backward()
        optimizers[1].step()
        terms = (l1, features, adversarial, similarity, l_real, l_fake, pred_real.mean(), pred_fake.mean())
        for i, value in enumerate(terms):
            log[i] = value.item()
        for mine, theirs in zip(netE.parameters(), netG.parameters(), strict=True):
            mine.data.mul_(train.E_decay).add_(theirs.data, alpha=1 - train.E_decay)

    return step


# -------------------------------------------------------------------------------------------------- what takes how long


class Split:
    """Seconds in parts of a step, of each those that are in no other part."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}
        self.open: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self.now()
        self.open.append(0.0)
        yield
        whole = self.now() - begin
        within = self.open.pop()
        self.seconds[name] = self.seconds.get(name, 0.0) + whole - within
        if self.open:
            self.open[-1] += whole

    def watch(self, of: Any, method: str, name: Callable[..., str]) -> None:
        """Count a method's time to the part that ``name`` makes of its arguments."""
        original = getattr(of, method)

        def watched(*args: Any, **named: Any) -> Any:
            with self.part(name(*args)):
                return original(*args, **named)

        setattr(of, method, watched)


def split_of(model: ModelGAN, now: Callable[[], float]) -> Split:
    """The parts of our step."""
    split = Split(now)
    split.watch(model, "call", lambda net, *_: "G" if net is model.netG else "D")
    split.watch(model, "backward", lambda name, _: "gradients of G's losses" if name == "G" else "D")
    split.watch(model.perceptual, "forward", lambda *_: "VGG19")
    split.watch(model.ssl, "parts", lambda *_: "SSL with its gradient")
    split.watch(model, "_tell_apart", lambda *_: "D")
    split.watch(model, "fidelity_terms", lambda *_: "other losses")
    split.watch(model, "update", lambda *_: "optimizers, log")
    split.watch(model, "update_E", lambda *_: "average E")
    split.watch(model, "feed_data", lambda *_: "data to the device")
    return split


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(form: str, case: Case) -> Measured:
    """Some steps of one form, after one that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        opt = case.options(Path(folder), *FORMS[form])
        device = torch.device(case.device)
        set_up(opt.train)
        torch.manual_seed(0)
        model = ModelGAN(opt, device)
        train = opt.train.model_copy(update={"F_lossfn_weight": 1.0})  # only now: published weights are not at hand
        model.opt = opt.model_copy(update={"train": train})
        model.perceptual = PerceptualLoss(LAYERS, WEIGHTS, features=vgg19(weights=None).features).to(device)
        model.perceptual.to(memory_format=training_layout(device, opt.train))
        dataset = define_Dataset(opt.datasets["train"])
        begin = time.process_time()
        items: list[Any] = [dataset[(0, (0, i))] for i in range(case.batch)]  # type: ignore[index]
        reading = time.process_time() - begin
        batch = {name: torch.stack([item[name] for item in items]) for name in ("L", "H")}

        def ours(batch: dict[str, Tensor]) -> None:
            model.feed_data(batch)
            model.optimize_parameters(1)

        step = plain_step(model) if form == PLAIN else ours
        for _ in range(3 if case.device != "cpu" or "compile" in form else 1):
            step(batch)
        times = []
        if case.device == "cpu":
            forget_peak()
        before = peak()
        for _ in range(case.steps):
            begin = case.now()
            step(batch)
            times.append(case.now() - begin)
        memory = peak() - before if case.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        parts: dict[str, float] = {}
        if form != PLAIN:
            split = split_of(model, case.now)
            for _ in range(case.steps):
                step(batch)
            parts = {name: seconds / case.steps for name, seconds in split.seconds.items()}
            parts["reading and degrading, one process"] = reading
        return Measured(statistics.median(times), memory, parts)


def tables(results: dict[str, list[Measured]], case: Case) -> str:
    """Markdown: the forms, and the parts of two of them."""
    medians = {form: statistics.median(run.seconds for run in runs) for form, runs in results.items()}
    lines = ["| form | s a step | images/s | of the plain step | MiB |", "|---|---|---|---|---|"]
    for form, seconds in medians.items():
        memory = statistics.median(run.memory for run in results[form])
        speed = medians[PLAIN] / seconds
        lines.append(f"| {form} | {seconds:.3f} | {case.batch / seconds:.2f} | {speed:.2f} times | {memory:.0f} |")
    shown = [form for form in results if form != PLAIN and form in ("ours", "bf16 without D_once", "+ D_once")]
    parts = {form: results[form][-1].parts for form in shown}
    lines += ["", "| part, ms | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    for part in parts[shown[0]]:
        values = " | ".join(f"{1000 * parts[form].get(part, 0.0):.1f}" for form in shown)
        lines.append(f"| {part} | {values} |")
    return "\n".join(lines)


def chart(results: dict[str, list[Measured]], path: Path) -> None:
    """Bars of seconds a step, by part where there are parts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.5 * len(results) + 1.6), layout="constrained")
    names = [
        name
        for name in next(runs for form, runs in results.items() if form != PLAIN)[-1].parts
        if "reading" not in name
    ]
    for row, runs in enumerate(results.values()):
        seconds = statistics.median(run.seconds for run in runs)
        parts, left = runs[-1].parts, 0.0
        total = sum(parts.get(name, 0.0) for name in names)
        if not total:
            axes.barh(row, seconds, color="0.75", label="the plain step, as a whole")
        for i, name in enumerate(names if total else []):
            width = seconds * parts.get(name, 0.0) / total
            axes.barh(row, width, left=left, color=f"C{i}", label=name if row == 1 else None)
            left += width
        axes.text(seconds, row, f" {seconds:.2f} s", va="center")
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds a step")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(RECIPES), default="bsrgan")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="side of the patches of H; esrgan takes 128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each form in each round")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="also in bf16: very slow on processors that lack it")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile: minutes more")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--chart", type=Path, help="draw them into this PNG")
    args = parser.parse_args()
    case = Case(args.recipe, args.batch, args.size, args.device, args.steps)
    forms = [f for f in FORMS if (args.bf16 or "bf16" not in f) and (args.compile or "compile" not in f)]
    facts = f"{datetime.date.today()}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    where = "one thread, processor time" if args.device == "cpu" else "wall time"
    print(f"{facts}\n{args.recipe}, batch {args.batch} of {args.size} px, x4, {where}\n", flush=True)
    results: dict[str, list[Measured]] = {form: [] for form in forms}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as process:
        for _ in range(args.rounds):
            for form in forms:
                results[form].append(process.apply(measure, (form, case)))
    print(tables(results, case))
    if args.json:
        figures = {form: [run._asdict() for run in runs] for form, runs in results.items()}
        args.json.write_text(
            json.dumps({"facts": facts, **case._asdict(), "forms": figures}, indent=1), encoding="utf-8"
        )
    if args.chart:
        chart(results, args.chart)


if __name__ == "__main__":
    run(main)
