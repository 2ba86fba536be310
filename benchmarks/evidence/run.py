"""Train and test without the self-similarity loss and with it, alike in everything else: does it help?

    python benchmarks/evidence/run.py --data ../shared/data --seeds 0 1 2
    python benchmarks/evidence/run.py --data ../shared/data --seeds 0 1 2 --settings blind --test DIV2K100
    python benchmarks/evidence/run.py --data ../shared/data --dry_run
    python benchmarks/evidence/report.py

DATA holds the folders BSD400 (training), Set14 (on which the weight of SSL is chosen), BSD100 and Set5 (tests); the
test set demo is made of scikit-image's photographs. A setting takes about two hours on two cores. It may be stopped
at any moment: the same command goes on. What is trained lies in the work folder; what the report needs, a few small
files for each setting, in benchmarks/evidence/results. Linux and macOS.
"""

import argparse
import fcntl
import importlib.util
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from data.preparation.demo import prepare_demo
from evaluation.report import format_table
from evidence import collect
from evidence.measures import choose_weight
from evidence.plan import CHOOSING, ROOT, SECONDS, SETTINGS, Job, Plan, Stage
from training.progress import duration
from utils.utils_error import ArgumentParser, UserError, printable, run
from utils.utils_image import get_image_paths
from utils.utils_logger import setup
from utils.utils_name import cell, output_names
from utils.utils_run import run_facts, save_json

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------- running


class State:
    """What is done, and the processor time it took: ``state.json`` of a folder, written after each job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = collect.read_json(path) if path.exists() else {}
        self.jobs: dict[str, dict[str, Any]] = content.get("jobs", {})
        self.wall: float = content.get("wall", 0.0)
        self._mark = time.monotonic()

    def done(self, job: Job) -> bool:
        """With this very command: with more seeds, say, tests are made again."""
        return self.jobs.get(job.name, {}).get("done") == job.digest

    def ended(self, job: Job, seconds: float, begun: float, done: bool) -> None:
        """A job's process has ended; ``begun`` is what was left of its units before."""
        entry = self.jobs.setdefault(job.name, {"kind": job.kind, "cpu": 0.0, "units": 0.0})
        entry["cpu"] += seconds
        entry["units"] += begun if done else max(0.0, begun - job.units_left())
        entry["done"] = job.digest if done else None
        now = time.monotonic()
        self.wall, self._mark = self.wall + now - self._mark, now
        save_json({"wall": self.wall, "jobs": self.jobs}, self.path)

    def seconds_left(self, job: Job) -> float:
        """CPU-seconds, by what jobs of its kind took here, or by :data:`SECONDS`."""
        if self.done(job):
            return 0.0
        alike = [entry for entry in self.jobs.values() if entry["kind"] == job.kind and entry["units"] > 0]
        units = sum(entry["units"] for entry in alike)
        rate = sum(entry["cpu"] for entry in alike) / units if units else SECONDS[job.kind]
        return rate * job.units_left()

    @property
    def cpu(self) -> float:
        """CPU-seconds so far."""
        return sum(entry["cpu"] for entry in self.jobs.values())


class _Child(NamedTuple):
    """A job at work."""

    process: subprocess.Popen[bytes]
    job: Job
    begun: float  # what was left of its units


def _start(job: Job, environment: Mapping[str, str], logs: Path, lock: int | None) -> _Child:
    with (logs / f"{job.name}.log").open("ab") as log:
        # A session of its own: Ctrl-C comes to this process alone, which passes it on once.
        process = subprocess.Popen(
            [sys.executable, *job.command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    return _Child(process, job, job.units_left())


def run_stage(stage: Stage, state: State, processes: int, logs: Path, lock: int | None = None) -> None:
    """Run the jobs of a stage that are not done, ``processes`` at a time; what they print goes to ``logs``/name.log.

    A job that has the machine for itself by the plan gets ``processes`` threads, another one.

    Raises:
        UserError: a job failed; those beside it were stopped, and go on next time.
        KeyboardInterrupt: by Ctrl-C or SIGTERM, after the jobs have saved.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in stage.jobs if not state.done(job)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, processes // max(1, len(stage.jobs))))}
    running: dict[int, _Child] = {}
    failed = ""
    stopping = False
    while running or (waiting and not stopping):
        try:
            while waiting and len(running) < processes and not stopping:
                child = _start(waiting.pop(0), environment, logs, lock)
                running[child.process.pid] = child
            pid, status, usage = os.wait4(-1, 0)
            if pid not in running:
                continue
            process, job, begun = running.pop(pid)
            # Popen must know: else it asks for children that were dropped, and takes the end of another from wait4.
            code = process.returncode = os.waitstatus_to_exitcode(status)
            state.ended(job, usage.ru_utime + usage.ru_stime, begun, code == 0)
        except KeyboardInterrupt:
            stopping = True
            _stop(running)
            continue
        except ChildProcessError:  # a signal came between the end of a child and its being told: next time it is asked
            break
        if code == 0:
            logger.info("done: %s, %.0f CPU-seconds", job.name, state.jobs[job.name]["cpu"])
        elif not stopping:
            failed = f"{job.name} failed (status {code}): {_last_line(logs / f'{job.name}.log')}"
            stopping = True
            _stop(running)
    if failed:
        raise UserError(failed)
    if stopping:
        raise KeyboardInterrupt


def _stop(running: Iterable[int]) -> None:
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing") + f" (all of it: {log})"


def _stop_once(_number: int, _frame: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _locked(work: Path) -> IO[str]:
    """The work folder for this process and its children: also where this one was killed and they live on."""
    file = (work / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{work}: another run, or what one has started, works there; wait for it or end it") from None
    return file


# ------------------------------------------------------------------------------------------------------- planning


def precision_here(path: Path) -> dict[str, Any]:
    """The faster precision here, measured once: convolutions like the generator's, forward and backward, one thread."""
    if path.exists():
        return collect.read_json(path)
    torch.set_num_threads(1)
    net = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))).to(memory_format=torch.channels_last)
    x = torch.rand(4, 32, 96, 96).to(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(9):
        for name, of_name in times.items():
            begin = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                net(x).float().square().mean().backward()
            of_name.append(time.process_time() - begin)
    ms = {name: 1000 * sorted(of_name)[len(of_name) // 2] for name, of_name in times.items()}
    chosen = "bf16" if ms["bf16"] < 0.9 * ms["fp32"] else "fp32"
    facts = {"precision": chosen, "ms": ms, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    save_json(facts, path)
    return facts


def _images(folder: Path, part: int) -> list[Path]:
    """The images of a folder, without those of its subfolders; of a small run the first ``part``-th, at least two."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; --data holds BSD400, BSD100, Set5, Set14")
    images = [Path(path) for path in get_image_paths(str(folder)) if Path(path).parent == folder]
    if not images:
        raise UserError(f"{folder}: no images there; those of subfolders are not taken")
    names = output_names([*map(str, images)], [str(folder)])
    if odd := [name for name in names if cell(printable(name)) != name]:
        raise UserError(f"{folder}: the table of results would change the name of {odd[0]}; rename it")
    return images[: max(2, len(images) // part)]


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of BSD400, BSD100, Set5 and Set14")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default all")
    parser.add_argument("--test", type=Path, nargs="+", default=[], metavar="FOLDER", help="more test sets")
    parser.add_argument("--work", type=Path, help="folder for what is trained (default experiments/evidence)")
    parser.add_argument("--results", type=Path, help="folder for the results (default benchmarks/evidence/results)")
    parser.add_argument("--processes", type=int, default=2, help="children at a time, one thread each (default 2)")
    parser.add_argument("--scale_down", type=int, default=1, metavar="N", help="an N-th of steps and images: a trial")
    parser.add_argument("--so_far", action="store_true", help="write the results of what is measured, run nothing")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, train nothing")
    args = parser.parse_args()
    if min(args.processes, args.scale_down) < 1:
        parser.error("--processes, --scale_down: must be 1 or more")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds: each once")
    name = "evidence" if args.scale_down == 1 else f"evidence_{args.scale_down}th"
    args.work = (args.work or ROOT / "experiments" / name).resolve()
    args.data = args.data.resolve()  # children run in the repository
    if args.results is None:  # numbers of a trial never stand beside real ones
        args.results = args.work / "results" if args.scale_down > 1 else collect.RESULTS
    return args


def plan_of(name: str, args: argparse.Namespace, precision: str) -> Plan:
    """The plan of a setting.

    Raises:
        UserError: a folder is missing, or two sets have one name.
    """
    folders = [args.data / "BSD100", args.data / "Set5", args.work / "demo" / "testsets" / "demo", *args.test]
    sets: dict[str, list[Path]] = {CHOOSING: _images((args.data / CHOOSING).resolve(), args.scale_down)}
    for folder in folders:
        folder = folder.resolve()
        if folder.name in sets:
            raise UserError(f"{folder}: two sets are called {folder.name}; rename one")
        sets[folder.name] = _images(folder, args.scale_down)
    photographs = args.data / "BSD400"
    _images(photographs, 1)
    return Plan(SETTINGS[name], args.work, photographs, sets, tuple(args.seeds), precision, args.scale_down)


def print_plan(plan: Plan, state: State, weight: float | None, processes: int) -> None:
    """A line for each stage: jobs, those that are done, and what is left."""
    rows, left = [], 0.0
    for stage in plan.stages(weight):
        seconds = sum(state.seconds_left(job) for job in stage.jobs)
        left += seconds
        what = {"steps": sum(job.units for job in stage.jobs if job.models)}
        jobs = {"jobs": len(stage.jobs), "done": sum(map(state.done, stage.jobs))}
        rows.append({"stage": stage.title, **jobs, **what, "CPU-s left": seconds})
    columns = {"stage": "", "jobs": "d", "done": "d", "steps": ".0f", "CPU-s left": ".0f"}
    chosen = "not chosen yet" if weight is None else f"{weight:g}"
    logger.info(
        "\n%s: seeds %s, %s, weight of SSL %s\n\n%s\n\nabout %s left with %d processes, of CPU time alone; %.0f "
        "CPU-seconds were spent\n",
        plan.setting.name,
        " ".join(map(str, plan.seeds)),
        plan.precision,
        chosen,
        format_table(rows, columns),
        duration(left / processes),
        processes,
        state.cpu,
    )


def run_setting(plan: Plan, args: argparse.Namespace, facts: dict[str, Any], lock: int) -> None:
    """All stages, then the result files."""
    state, logs = State(plan.folder / "state.json"), plan.folder / "logs"
    weight = collect.chosen(plan)
    if args.so_far and weight is None:
        raise UserError(f"{plan.folder}: nothing is measured yet; without --so_far the same command goes on")
    for number in range(0 if args.so_far else len(plan.stages())):
        stage = plan.stages(weight)[number]
        if any(not state.done(job) for job in stage.jobs):
            print_plan(plan, state, weight, args.processes)
            logger.info("%s: %s", plan.setting.name, stage.title)
        run_stage(stage, state, args.processes, logs, lock)
        if stage.title == "weights tested" and weight is None:
            weight = choose_weight(collect.trial_means(plan))
            collect.choose(plan, weight)
            logger.info("weight of SSL: %g", weight)
    assert weight is not None
    time_taken = {"cpu_seconds": state.cpu, "wall_seconds": state.wall, "processes": args.processes}
    sets = {name: len(images) for name, images in plan.tested.items()}
    about = {"seeds": plan.seeds, "scale_down": plan.scale_down, "sets": sets, **time_taken, **facts}
    collect.collect(plan, weight, about, args.results / plan.setting.name, args.so_far)
    logger.info("%s: results in %s", plan.setting.name, args.results / plan.setting.name)


def _machine() -> dict[str, Any]:
    """What the numbers depend on; without the command line, which names folders of this machine."""
    facts: dict[str, Any] = {name: value for name, value in run_facts().items() if name != "command"}
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").split("\n")
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return facts | {"processor": model, "cores": os.cpu_count()}


def main() -> None:
    args = _arguments()
    setup()
    for library in ("pyiqa", "diffusers"):
        if importlib.util.find_spec(library) is None:  # told now, not by a test hours later
            raise UserError(f"{library} is not installed: python -m pip install -r requirements-extra.txt")
    args.work.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_once)
    with _locked(args.work) as lock:
        try:
            prepare_demo(args.work / "demo" / "trainsets", args.work / "demo" / "testsets")
            precision = precision_here(args.work / "precision.json")
            plans = [plan_of(name, args, precision["precision"]) for name in args.settings]
            for plan in plans:
                plan.folder.mkdir(exist_ok=True)
                print_plan(plan, State(plan.folder / "state.json"), collect.chosen(plan), args.processes)
            if args.dry_run:
                return
            for plan in plans:
                run_setting(plan, args, {**precision, **_machine()}, lock.fileno())
        except KeyboardInterrupt:
            logger.info("stopped; the same command goes on")
            raise


if __name__ == "__main__":
    run(main)
