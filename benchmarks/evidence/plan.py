"""What the experiment consists of: its settings, and for each the jobs, which are command lines of the program's own
scripts. Nothing is run here."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.utils_image import image_size
from utils.utils_option import strip_comments
from utils.utils_resume import saved_steps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent  # of the repository
METRICS = ("psnr", "ssim", "ssg", "stlpips_vgg", "stlpips", "gmsd", "fsim", "piqe")
CURVE_METRICS = ("psnr", "ssg", "stlpips_vgg")
CHOOSING, CURVE = "Set14", "Set5"  # the sets that the weight is chosen on, and that checkpoints are compared on


class Setting(NamedTuple):
    """One comparison, without SSL against with it; the unit that is run, and reported, by itself."""

    name: str
    base: str  # the option file; also the name of the run without SSL
    script: str
    # Of SSL's L1 and KL each. By --dry_run at the start of training SSL's gradient is as large as the largest other's
    # at the last, and its sum about as large as the largest other term at the first.
    weights: tuple[float, ...]
    psnr: str = "bicubic"  # the setting whose PSNR model the artifacts are measured against
    data: tuple[str, ...] = ()  # overrides


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("bicubic", "gan", "main_train_gan.py", (35, 70, 140)),
        Setting(
            "blind",
            "gan",
            "main_train_gan.py",
            (35, 70, 140),
            psnr="blind",
            data=("datasets.train.dataset_type=blindsr", "datasets.train.degradation_type=bsrgan_light"),
        ),
        Setting("resshift", "resshift", "main_train_dm.py", (3, 6, 12)),
    )
}

# CPU-seconds of a unit before there are own figures: steps, and restored and measured megapixels. Measured with
# one thread on two busy cores of an AMD EPYC with AVX-512, bf16.
SECONDS = {"psnr": 0.16, "gan": 0.44, "resshift": 0.30, "test": 18.0, "curve": 15.0, "prepare": 0.01}


@dataclass(frozen=True)
class Job:
    """A child process: the same command again goes on, or does it again where it was short."""

    name: str
    command: tuple[str, ...]  # behind the interpreter
    kind: str  # whose seconds a unit are alike
    units: float
    models: Path | None = None  # of a training run: where its checkpoints are
    start: float = 0.0  # units that an earlier job has done

    @property
    def digest(self) -> str:
        """By which the state knows the command again."""
        return hashlib.sha256("\0".join(self.command).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def units_left(self) -> float:
        """What its checkpoints do not hold yet."""
        done = max([self.start, *(saved_steps(self.models) if self.models else [])])
        return max(0.0, self.units - done)


class Stage(NamedTuple):
    """Jobs that need nothing of each other."""

    title: str
    jobs: list[Job]


def options(name: str) -> dict:
    """An option file of this folder."""
    return json.loads(strip_comments((HERE / f"{name}.json").read_text(encoding="utf-8")))


def chunks(images: list[Path], size: int = 10) -> list[list[Path]]:
    """What is tested at once: little is lost where a test is stopped, and every core has work."""
    count = math.ceil(len(images) / size)
    return [images[start::count] for start in range(count)]


@dataclass(frozen=True)
class Plan:
    """All jobs of a setting."""

    setting: Setting
    work: Path
    photographs: Path  # for training
    sets: dict[str, list[Path]]  # name -> images of H; CHOOSING among them
    seeds: tuple[int, ...]
    precision: str
    scale_down: int = 1

    @property
    def folder(self) -> Path:
        """All of this setting but the PSNR model, which another may have made."""
        return self.work / self.setting.name

    def steps(self, name: str, key: str = "iterations") -> int:
        """A number of steps of an option file, in a small run a part of it."""
        return max(1, options(name)["train"][key] // self.scale_down)

    @property
    def total(self) -> int:
        """Steps of each run."""
        return self.steps(self.setting.base)

    @property
    def trial(self) -> int:
        """Steps after which the weight is chosen: a quarter."""
        return max(1, self.total // 4)

    @property
    def curve_steps(self) -> list[int]:
        """Steps of the checkpoints that make the curve: every second one that is saved."""
        apart = 2 * self.steps(self.setting.base, "checkpoint_save")
        return list(range(apart, self.total + 1, apart))

    @property
    def tested(self) -> dict[str, list[Path]]:
        """The test sets: those that nothing was chosen on."""
        return {name: images for name, images in self.sets.items() if name != CHOOSING}

    @property
    def raw(self) -> Path:
        """The training pieces, of all settings."""
        return self.work / "BSD400"

    def run(self, weight: float, seed: int) -> str:
        """The task of a run; weight 0 is the control."""
        return f"{self.setting.base}{f'_ssl{weight:g}' if weight else ''}_s{seed}"

    def checkpoint(self, weight: float, seed: int, step: int) -> Path:
        """The averaged generator."""
        return self.folder / self.run(weight, seed) / "models" / f"{step}_E.pth"

    @property
    def psnr(self) -> Path:
        """The generator that the GAN stage starts from and artifacts are measured against."""
        return self.work / self.setting.psnr / "psnr" / "models" / f"{self.steps('psnr')}_E.pth"

    def low(self, name: str) -> Path | None:
        """The folder of prepared L; None where main_test.py makes L by bicubic."""
        return self.work / "L" / name if self.setting.data else None

    # ------------------------------------------------------------------------------------------------------- jobs

    def stages(self, weight: float | None = None) -> list[Stage]:
        """In order; ``weight`` is the chosen one, None before: then the last stages are there to be counted only."""
        chosen, first = weight or self.setting.weights[0], self.seeds[0]
        tried = (0.0, *self.setting.weights)
        trials = [(w, first, self.trial) for w in tried]
        runs = [(w, seed, self.total) for w in (0.0, chosen) for seed in self.seeds]
        # Those of the first seed, begun already, go last: the longest first keep two cores busy to the end.
        runs.sort(key=lambda run: run[1] == first)
        models = {"psnr": self.psnr}
        at_trial = models | {f"w{w:g}": self.checkpoint(w, first, self.trial) for w in tried}
        at_end = models | {
            f"{self.label(w)}_s{seed}": self.checkpoint(w, seed, self.total) for seed in self.seeds for w in (0, chosen)
        }
        of_curve = models | {
            f"{self.label(w)}_s{seed}_{step}": self.checkpoint(w, seed, step)
            for seed in self.seeds
            for w in (0, chosen)
            for step in self.curve_steps
        }
        final = [job for name in self.tested for job in self._tests(f"test_{name}", name, at_end, METRICS)]
        curve = self._tests("curve", CURVE, of_curve, CURVE_METRICS)
        return [
            Stage("prepare", self._prepare()),
            Stage("PSNR model", [self._train_psnr()]),
            Stage("weights tried", [self._train("trial", *run) for run in trials]),
            Stage("weights tested", self._tests("trials", CHOOSING, at_trial, CURVE_METRICS)),
            Stage("runs", [self._train("run", *run, start=self.trial if run[1] == first else 0) for run in runs]),
            Stage("tests", curve + final),  # the longest first
        ]

    def label(self, weight: float) -> str:
        """``gan`` and ``gan_ssl``: without SSL, and with it whatever its weight."""
        return self.setting.base + "_ssl" * (weight > 0)

    def _prepare(self) -> list[Job]:
        cut = ("subimages", "--format", "npy", "--size", "192", "--step", "145", "--workers", "1")
        files = ("--input", str(self.photographs), "--output", str(self.raw))
        jobs = [Job("pieces", ("main_prepare_data.py", *cut, *files), "prepare", 400)]
        if not self.setting.data:
            return jobs
        for name, images in self.sets.items():
            blind = ("lr-blind", "--type", "bsrgan_light", "--seed", "0", "--workers", "1")
            L = ("--input", *map(str, images), "--output", str(self.work / "L" / name))
            jobs.append(Job(f"L_{name}", ("main_prepare_data.py", *blind, *L), "prepare", len(images)))
        return jobs

    def _train_psnr(self) -> Job:
        models, steps = self.psnr.parent, self.steps("psnr")
        task = (f"path.root={self.work / self.setting.psnr}", "task=psnr", f"train.iterations={steps}")
        milestones = [m // self.scale_down for m in options("psnr")["train"]["G_scheduler_milestones"]]
        schedule = f"train.G_scheduler_milestones={milestones}"
        return Job("psnr", self._command("main_train_psnr.py", "psnr", *task, schedule), "psnr", steps, models)

    def _train(self, what: str, weight: float, seed: int, steps: int, start: int = 0) -> Job:
        base, name = self.setting.base, self.run(weight, seed)
        overrides = [f"path.root={self.folder}", f"task={name}", f"train.iterations={steps}"]
        overrides += [f"train.manual_seed={seed}", f"train.checkpoint_save={self.steps(base, 'checkpoint_save')}"]
        if base == "gan":
            overrides.append(f"path.pretrained_netG={self.psnr}")
        if weight:
            overrides += [f"train.ssl_l1_weight={weight:g}", f"train.ssl_kl_weight={weight:g}"]
        models = self.checkpoint(weight, seed, steps).parent
        command = self._command(self.setting.script, base, *overrides)
        return Job(f"{what}_{name}", command, base, steps, models, start)

    def _command(self, script: str, file: str, *overrides: str) -> tuple[str, ...]:
        general = (f"datasets.train.dataroot_H={self.raw}", f"train.precision={self.precision}", *self.setting.data)
        return (script, "--opt", str(HERE / f"{file}.json"), *general, *overrides)

    def _tests(self, what: str, name: str, models: dict[str, Path], metrics: tuple[str, ...]) -> list[Job]:
        jobs = []
        for number, images in enumerate(chunks(self.sets[name])):
            command = ["main_test.py", "--model_path", *(f"{label}={path}" for label, path in models.items())]
            command += ["--gt", *map(str, images)]
            if low := self.low(name):
                command += ["--input", *(str(low / f"{path.stem}.png") for path in images)]
            output = str(self.results(what, number))
            command += ["--metrics", *metrics, "--report_images", "0", "--output", output]
            pixels = sum(math.prod(image_size(str(path))) for path in images) / 1e6 * (1 + len(models))
            kind = "test" if metrics == METRICS else "curve"
            jobs.append(Job(f"{what}_{number:02d}", tuple(command), kind, pixels))
        return jobs

    def results(self, what: str, number: int) -> Path:
        """What main_test.py writes of a chunk."""
        return self.folder / "tests" / what / f"{number:02d}"
