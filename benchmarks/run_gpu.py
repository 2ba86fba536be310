"""Everything that waits for a GPU, in one command of at most 8 minutes: checks, tests, times; tables of them.

    python benchmarks/run_gpu.py                              # figures into benchmarks/results/gpu_{name}.json
    python benchmarks/run_gpu.py --seconds 300 --only op tests --json op.json
    python benchmarks/run_gpu.py --tables op.json             # into benchmarks/README.md, on any machine

It needs the repository, requirements.txt, pytest and, for the kernels, nvcc; no network. Each part is a process with a
time limit of its own, so that a crash or a kernel that hangs costs that part alone. Parts run in the order of their
worth; one whose limit exceeds what is left of the time is not run, and the figures say so, as they say why another
failed. The file is written after each part. git ignores folders called results: figures are committed only on purpose.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.utils_error import ArgumentParser, UserError, run
from utils.utils_run import run_facts, save_json, write_atomically

REPOSITORY = Path(__file__).resolve().parent.parent
README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- run_gpu.py --tables writes what follows -->", "<!-- up to here -->"
NOT_MEASURED = "not measured"
TOOLS = "/usr/local/cuda/bin"  # of compute-sanitizer and ncu, where PATH lacks it
OUTPUT_KEPT = 4000  # characters of what a part prints, its end
Figures = dict[str, Any]


# ------------------------------------------------------------------------------- what runs in a process on the GPU


def environment() -> Figures:
    """GPU, driver, PyTorch, CUDA."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    properties = torch.cuda.get_device_properties(0)
    return {
        **run_facts(torch.device("cuda")),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _op_inputs(n: int) -> tuple[Any, Any, Any]:
    """sr, hr and edges of n images, as benchmarks/bench_ssl.py takes them."""
    import bench_ssl
    from skimage import data

    sr, hr = bench_ssl.pairs(data.astronaut(), round(n**0.5))
    return sr.cuda().requires_grad_(), hr.cuda(), bench_ssl.masks(hr)["edges"].cuda()


def op() -> Figures:
    """Milliseconds of the self-similarity loss on edges, forward and backward, in each form."""
    import bench_ssl

    figures: Figures = {}
    try:
        bench_ssl.load_naive()
    except (RuntimeError, OSError) as error:
        figures["naive kernel"] = f"cannot be built: {bench_ssl.loader.told(error)[:200]}"
    for n, forms in ((64, ("cuda", "naive", "boxsum")), (1, ("cuda", "naive", "boxsum", "published"))):
        inputs = _op_inputs(n)
        for form in forms:
            if form == "naive" and figures.get("naive kernel"):
                continue
            try:
                milliseconds, extra, value = bench_ssl.measure_on_gpu(form, bench_ssl.W, [inputs])
            except (RuntimeError, ValueError) as error:  # no kernels, or too little memory
                figures[f"{n} {form}"] = {"why": bench_ssl.loader.told(error)[:200]}
            else:
                figures[f"{n} {form}"] = {"ms": milliseconds, "extra_mib": extra, "loss": value}
            print(f"{n} images of 128 x 128, {form}: {figures[f'{n} {form}']}", flush=True)
    return figures


def degradation() -> Figures:
    """Milliseconds a sample of degrading a batch of 48 on the GPU, and of drawing its steps on the CPU."""
    import bench_data
    import torch
    from skimage import data

    images, figures = bench_data.samples(data.astronaut(), 48), {}
    for name in ("bsrgan", "bsrgan_light", "realesrgan", "realesrgan_light"):
        draw, whole = bench_data.batch_times(images, name, 48, torch.device("cuda"))
        figures[name] = {"ms_a_sample": whole / 48, "of_it_drawing": draw / 48}
        print(name, figures[name], flush=True)
    return figures


def kernels() -> Figures:
    """Each kind of kernel a few times, on sizes off the tiles: what compute-sanitizer and ncu look at."""
    import torch

    from utils.utils_ssl import SelfSimilarityLoss, self_similarity_graph

    torch.manual_seed(0)
    # Of little contrast: else every graph would be a single entry.
    sr, hr = (0.1 * torch.rand(2, 3, 40, 70, device="cuda") for _ in range(2))
    mask = (torch.rand(2, 1, 40, 70, device="cuda") < 0.2).float()
    for border in ("zero", "image"):
        x = sr.clone().requires_grad_()
        loss = SelfSimilarityLoss(1000, 1000, ssl_mode="cuda", search_border=border)(x, hr, mask)
        graph = self_similarity_graph(x, mask, ssl_mode="cuda", search_border=border)
        (loss + graph.square().sum()).backward()
        print(border, loss.item(), x.grad.norm().item() if x.grad is not None else None, flush=True)
    return {}


def op_once() -> Figures:
    """The loss of 64 images, forward and backward, once while it is profiled: for ncu."""
    import torch

    from utils.utils_ssl import SelfSimilarityLoss

    sr, hr, mask = _op_inputs(64)
    loss = SelfSimilarityLoss(1000, 1000, ssl_mode="cuda")
    torch.autograd.grad(loss(sr, hr, mask), sr)
    with torch.cuda.profiler.profile():
        torch.autograd.grad(loss(sr, hr, mask), sr)
        torch.cuda.synchronize()
    return {}


HERE: dict[str, Callable[[], Figures]] = {f.__name__: f for f in (environment, op, degradation, kernels, op_once)}


# ------------------------------------------------------------------------------------- what is read from the others


def written(output: str, folder: Path) -> Figures:
    """The figures that the process wrote."""
    path = folder / "figures.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def counted_tests(output: str, folder: Path) -> Figures:
    """Of pytest's report: how many passed, failed, were skipped; the names of those that failed."""
    path = folder / "tests.xml"
    if not path.exists():
        return {}
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case.get("name") for case in cases if {child.tag for child in case} & {"failure", "error"}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def sanitized(output: str, folder: Path) -> Figures:
    """Of compute-sanitizer: how many errors or hazards it found."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    return {"found": int(next(filter(None, found[-1])))} if found else {}


def profiled(output: str, folder: Path) -> Figures:
    """Of ncu: kernel -> metric -> value, the largest where a kernel ran several times."""
    lines = [line for line in output.split("\n") if line.startswith('"')]
    figures: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines):
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except (KeyError, ValueError, AttributeError):
            continue
        kernel = figures.setdefault(re.sub(r"[<(].*", "", row["Kernel Name"]), {})
        kernel[row["Metric Name"]] = max(value, kernel.get(row["Metric Name"], value))
    return figures


# ------------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Part:
    """A process: ``{folder}`` in its command is an empty folder for what it writes.

    Attributes:
        seconds: its time limit.
        needs: a program besides Python without which it is not run.
        read: (what it printed, the folder) -> its figures.
    """

    name: str
    seconds: float
    command: Sequence[str]
    needs: str | None = None
    read: Callable[[str, Path], Figures] = written


def gpu_tests() -> list[str]:
    """The files of the tests that are skipped where there is no GPU."""
    telling = re.compile(r"WHY_NO_CUDA|reason=\"no GPU here\"|^from tests\.test_ssl import .*\bCUDA\b", re.MULTILINE)
    files = sorted((REPOSITORY / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in files if telling.search(path.read_text(encoding="utf-8"))]


def all_parts() -> list[Part]:
    """In the order of their worth; their limits add up to 8 minutes."""
    python = sys.executable
    figures = "{folder}/figures.json"

    def here(name: str) -> list[str]:
        return [python, "benchmarks/run_gpu.py", "--part", name, "--json", figures]

    def benchmark(name: str, *arguments: str) -> list[str]:
        return [python, f"benchmarks/{name}.py", "--device", "cuda", "--json", figures, *arguments]

    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={folder}/tests.xml"]
    training = "--recipe", "esrgan", "--size", "128", "--batch", "16", "--rounds", "1", "--steps", "5", "--bf16"
    metrics = "gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread"
    ncu = ["ncu", "--csv", "--profile-from-start", "off", "--metrics", metrics]

    def sanitizer(tool: str) -> list[str]:
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", *here("kernels")]

    return [
        Part("environment", 15, here("environment")),
        Part("kernels are right", 80, [python, "-m", "similarity_cuda"]),  # builds them
        Part("op", 80, here("op")),
        Part("tests", 75, [*pytest, *gpu_tests(), "-k", "cuda or gpu"], read=counted_tests),
        Part("training", 80, benchmark("bench_train", *training)),
        Part("inference", 50, benchmark("bench_test")),
        Part("degradation", 30, here("degradation")),
        Part("memcheck", 25, sanitizer("memcheck"), "compute-sanitizer", sanitized),
        Part("racecheck", 25, sanitizer("racecheck"), "compute-sanitizer", sanitized),
        Part("ncu", 20, [*ncu, *here("op_once")], "ncu", profiled),
    ]


def run_part(part: Part) -> Figures:
    """-> ``status`` (ok, failed, timed out, not run), ``seconds``, ``why`` it is not ok, ``figures``, ``output``."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), TOOLS])
    if part.needs and shutil.which(part.needs, path=path) is None:
        return {"status": "not run", "why": f"{part.needs} is not installed"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [argument.replace("{folder}", name) for argument in part.command]
        begin = time.monotonic()
        with open(folder / "output.txt", "w+b") as file:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, "PATH": path},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(part.seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:  # also upon Ctrl-C: what the process has started goes with it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            file.seek(0)
            output = file.read().decode("utf-8", "replace")
        seconds = round(time.monotonic() - begin, 1)
        try:
            figures = part.read(output, folder)
        except (OSError, ValueError, ElementTree.ParseError):  # cut short
            figures = {}
    result: Figures = {"status": "ok", "seconds": seconds, "figures": figures, "output": output[-OUTPUT_KEPT:]}
    if status is None:
        result |= {"status": "timed out", "why": f"not done in {part.seconds:g} s"}
    elif status < 0:
        result |= {"status": "failed", "why": f"killed by {signal.Signals(-status).name}"}
    elif status:
        result |= {"status": "failed", "why": f"exit status {status}: {_last_line(output)}"}
    return result


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.split("\n") if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def run_parts(parts: Sequence[Part], seconds: float, path: Path) -> Figures:
    """Run the parts for which there is time; write what is known into ``path`` after each.

    Raises:
        UserError: the file cannot be written.
    """
    end = time.monotonic() + seconds
    results: Figures = {part.name: {"status": "not run", "why": "not reached"} for part in parts}
    for part in parts:
        print(f"{part.name}: ", end="", flush=True)
        left = end - time.monotonic()
        if part.seconds > left:
            results[part.name] = {"status": "not run", "why": f"{max(left, 0):.0f} s left of {part.seconds:g} s needed"}
        else:
            results[part.name] = run_part(part)
        said = [results[part.name]["status"], results[part.name].get("why"), results[part.name].get("seconds")]
        print(", ".join(str(word) for word in said if word is not None), flush=True)
        save_json({"seconds": seconds, "parts": results}, path)
    return results


# ------------------------------------------------------------------------------------------------------- the tables


class Results:
    """What was measured, by path; what was not says why."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._parts: Mapping[str, Any] = content.get("parts", {})

    def why_not(self, part: str) -> str:
        """NOT_MEASURED, and the reason where one is known."""
        why = self._parts.get(part, {}).get("why")
        return f"{NOT_MEASURED} ({why})" if why else NOT_MEASURED

    def get(self, part: str, *path: str | int) -> Any:
        """A figure of a part, None where it is missing."""
        value: Any = self._parts.get(part, {}).get("figures", {})
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def status(self, part: str) -> str | None:
        return self._parts.get(part, {}).get("status")


def _cells(figures: Sequence[float | None], specs: Sequence[str]) -> str:
    return " | ".join(NOT_MEASURED if x is None else format(x, spec) for x, spec in zip(figures, specs, strict=True))


def _ratio(base: float | None, time_: float | None) -> float | None:
    return base / time_ if base and time_ else None


def tables(content: Mapping[str, Any]) -> str:
    """Markdown of the file of a run; of an empty one every row says that it is not measured."""
    found = Results(content)
    parts = [_about(found), _checks(found), _op_table(found), _training_table(found)]
    return "\n\n".join([*parts, _inference_table(found), _degradation_table(found), _ncu_table(found)])


def _about(found: Results) -> str:
    if not found.get("environment", "gpu"):
        return f"`python benchmarks/run_gpu.py`: {found.why_not('environment')}."
    gpu, memory, driver, cuda, torch, date, commit = (
        found.get("environment", key) for key in ("gpu", "memory_gib", "driver", "cuda", "torch", "date", "git_commit")
    )
    return (
        f"`python benchmarks/run_gpu.py`: {gpu}, {memory} GiB, driver {driver}, CUDA {cuda}, PyTorch {torch}, "
        f"{str(date)[:10]}, commit {str(commit)[:12]}."
    )


def _checks(found: Results) -> str:
    lines = ["| check | result |", "|---|---|"]
    right = found.status("kernels are right")
    said = "right" if right == "ok" else found.why_not("kernels are right")
    lines.append(f"| kernels against float64 (`python -m similarity_cuda`) | {said} |")
    passed, failed, skipped = (found.get("tests", key) for key in ("passed", "failed", "skipped"))
    said = found.why_not("tests") if passed is None else f"{passed} passed, {len(failed)} failed, {skipped} skipped"
    lines.append(f"| tests that need a GPU | {said} |")
    for tool in ("memcheck", "racecheck"):
        count = found.get(tool, "found")
        lines.append(f"| compute-sanitizer, {tool} | {found.why_not(tool) if count is None else f'{count} found'} |")
    return "\n".join(lines)


def _op_table(found: Results) -> str:
    lines = ["| loss on edges, forward and backward | ms | of the naive kernel | extra MiB |", "|---|---|---|---|"]
    titles = {"cuda": "ours (cuda)", "naive": "naive kernel", "boxsum": "boxsum", "published": "published, unfold"}
    for n, what in ((64, "64 images of 128 px"), (1, "1 image of 128 px")):
        for form, title in titles.items():
            if (n, form) != (64, "published"):  # its memory is that of all images' windows
                ms, extra = (found.get("op", f"{n} {form}", key) for key in ("ms", "extra_mib"))
                faster = _ratio(found.get("op", f"{n} naive", "ms"), ms)
                lines.append(f"| {what}, {title} | {_cells([ms, faster, extra], ['.3f', '.1f', '.1f'])} |")
    return "\n".join(lines)


def _training_table(found: Results) -> str:
    lines = ["| ESRGAN-SSL step, batch 16 of 128 px | ms | of the plain step | MiB |", "|---|---|---|---|"]
    forms = found.get("training", "forms") or {form: [] for form in ("plain step", "ours", "+ bf16")}
    base: float | None = None
    for form, runs in forms.items():
        seconds, memory = (
            statistics.median(run[key] for run in runs) if runs else None for key in ("seconds", "memory")
        )
        base = base or seconds
        milliseconds = None if seconds is None else 1000 * seconds
        lines.append(f"| {form} | {_cells([milliseconds, _ratio(base, seconds), memory], ['.1f', '.2f', '.0f'])} |")
    return "\n".join(lines)


def _inference_table(found: Results) -> str:
    lines = ["| 510 x 339, x4, overlap 32 | ms | of the plain loop | extra MiB |", "|---|---|---|---|"]
    base = found.get("inference", "forms", "plain loop", 0, "seconds")
    rows: dict[str, list[Mapping[str, float]]] = {}
    for form in ("plain loop", "ours", "ours, bf16", "ours, fp16"):
        rows[f"{form}, tiles of 256"] = found.get("inference", "forms", form) or []
    for tile in ("64", "128", "384", "whole"):
        of_tile = found.get("inference", "tiles", tile)
        rows[f"ours, {tile if tile == 'whole' else f'tiles of {tile}'}"] = [of_tile] if of_tile else []
    for title, runs in rows.items():
        seconds, extra = (statistics.median(run[key] for run in runs) if runs else None for key in ("seconds", "extra"))
        milliseconds = None if seconds is None else 1000 * seconds
        lines.append(f"| {title} | {_cells([milliseconds, _ratio(base, seconds), extra], ['.1f', '.2f', '.0f'])} |")
    return "\n".join(lines)


def _degradation_table(found: Results) -> str:
    lines = ["| degradation of a batch of 48, 320 px | ms a sample | of it drawing on the CPU |", "|---|---|---|"]
    for name in ("bsrgan", "bsrgan_light", "realesrgan", "realesrgan_light"):
        figures = [found.get("degradation", name, key) for key in ("ms_a_sample", "of_it_drawing")]
        lines.append(f"| {name} | {_cells(figures, ['.3f', '.3f'])} |")
    return "\n".join(lines)


def _ncu_table(found: Results) -> str:
    of_kernels = found.get("ncu") or {}
    lines = ["| kernel, 64 images | \u00b5s | of the GPU's peak | registers |", "|---|---|---|---|"]
    keys = "gpu__time_duration.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed", "launch__registers_per_thread"
    for kernel, metrics in of_kernels.items():
        time_, share, registers = map(metrics.get, keys)
        time_ = None if time_ is None else time_ / 1000
        share = None if share is None else share / 100
        lines.append(f"| {kernel} | {_cells([time_, share, registers], ['.0f', '.0%', '.0f'])} |")
    if not of_kernels:
        lines.append(f"| by ncu | {found.why_not('ncu')} | | |")
    return "\n".join(lines)


def with_tables(readme: str, text: str) -> str:
    """The README with ``text`` in the tables' place.

    Raises:
        UserError: it has no such place.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{README}: the marks are missing between which the GPU's tables stand: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


# ------------------------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    """-> 0 when all that was run is right, else 1."""
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the figures; default benchmarks/results/gpu_NAME.json"
    )
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together (default 480)")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {', '.join(part.name for part in all_parts())}")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="print its tables and put them into the README")
    parser.add_argument("--part", choices=list(HERE), help="run this in this process: what the command itself does")
    args = parser.parse_args(argv)
    if args.tables:
        try:
            text = tables(json.loads(args.tables.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{args.tables}: these are no figures of run_gpu.py: {error}") from error
        write_atomically(with_tables(README.read_text(encoding="utf-8"), text), README)
        print(text)
        return 0
    parts = all_parts()
    if args.only and (unknown := set(args.only) - {part.name for part in parts}):
        parser.error(f"--only {', '.join(sorted(unknown))}: there is no such part")
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no GPU here that PyTorch can use: nothing is measured")
    if args.part:
        figures = HERE[args.part]()
        if args.json:
            save_json(figures, args.json)
        return 0
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name())
    path: Path = args.json or RESULTS / f"gpu_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = run_parts([part for part in parts if not args.only or part.name in args.only], args.seconds, path)
    print(f"\n{path}\npython benchmarks/run_gpu.py --tables {path}")
    return int(any(result["status"] in ("failed", "timed out") for result in results.values()))


if __name__ == "__main__":
    run(main)
