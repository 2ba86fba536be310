"""From what main_test.py left to the result files of a setting: small, and all that the report needs."""

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from evaluation.report import write_csv
from evidence.measures import WINDOW, Picture, artifact_shares, lattice_share, local_error
from evidence.plan import CHOOSING, CURVE, CURVE_METRICS, HERE, Plan, chunks
from utils.utils_image import imread_uint
from utils.utils_run import save_json

RESULTS = HERE / "results"
CROP = 96  # px, side of what is shown
CROPS_BY = "stlpips_vgg"  # whose largest gain and loss are shown

Row = dict[str, Any]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[Row]:
    """A CSV file; empty fields are NaN, what looks like a number is one but for names."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {k: v if k in ("set", "image", "model") else float(v or "nan") for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def _tested(plan: Plan, what: str, name: str, so_far: bool = False) -> list[Row]:
    """The rows of all chunks of a set; where it is of results ``so_far``, of those measured with all these seeds."""
    files = [plan.results(what, number) / "results.csv" for number in range(len(chunks(plan.sets[name])))]
    of_chunks = [read_rows(file) for file in files if file.exists() or not so_far]
    if so_far:
        of_chunks = [rows for rows in of_chunks if {*plan.seeds} <= _seeds(rows)]
    return [{**row, "set": name} for rows in of_chunks for row in rows]


def _seeds(rows: Iterable[Row]) -> set[int]:
    """Those of the runs that rows are of: ``gan_s0``, ``gan_ssl_s0_500``."""
    return {int(match[1]) for row in rows if (match := re.search(r"_s(\d+)(_\d+)?$", row["model"]))}


def _rounded(rows: Iterable[Row]) -> list[Row]:
    """Six figures: more would only make the files long."""
    return [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def mean(rows: Iterable[Row], metric: str) -> float:
    """Over the rows that have a finite value."""
    values = [row[metric] for row in rows if math.isfinite(row[metric])]
    return sum(values) / len(values) if values else math.nan


# -------------------------------------------------------------------------------------------------- the weight of SSL


def trial_means(plan: Plan) -> dict[float, dict[str, float]]:
    """Weight -> metric -> mean over the choosing set; 0 = without SSL."""
    rows = _tested(plan, "trials", CHOOSING)
    weights = (0.0, *plan.setting.weights)
    of_weight = {weight: [row for row in rows if row["model"] == f"w{weight:g}"] for weight in weights}
    return {weight: {name: mean(its, name) for name in CURVE_METRICS} for weight, its in of_weight.items()}


def terms(log: str) -> dict[str, float]:
    """The weighted losses of E in the last report of a run's train.log."""
    reports = re.findall(r"^.*\bstep \d+\S* .*\| (.*)$", log, re.MULTILINE)
    pairs = re.findall(r"(\w+) (-?[\d.]+(?:e[+-]?\d+)?)", reports[-1]) if reports else []
    of_E = ("G_loss", "stlpips", "D_loss", "dm_loss", "ssl")
    return {name: float(value) for name, value in pairs if name in of_E}


def chosen(plan: Plan) -> float | None:
    """The weight, once it has been chosen, with this first seed."""
    path = plan.folder / "choice.json"
    choice = read_json(path) if path.exists() else {}
    return choice["chosen"] if choice.get("seed") == plan.seeds[0] else None


def choose(plan: Plan, weight: float) -> None:
    """Write the choice down, with all that was tried."""
    tried = []
    for w, means in trial_means(plan).items():
        run = plan.folder / plan.run(w, plan.seeds[0])
        tried.append({"weight": w, **means, "terms": terms((run / "train.log").read_text(encoding="utf-8"))})
    save_json(
        {"chosen": weight, "seed": plan.seeds[0], "steps": plan.trial, "tried": tried}, plan.folder / "choice.json"
    )


# ------------------------------------------------------------------------------------------------------- all results


def collect(plan: Plan, weight: float, about: Mapping[str, Any], output: Path, so_far: bool = False) -> None:
    """Write images.csv, curve.csv, facts.json and demo.png to ``output``, pictures of the sets to the work folder.

    Args:
        so_far: leave out what has not been measured; else all must be there.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows, lattice_of_H, measured = [], {}, {}
    for name in plan.tested:
        of_set = _tested(plan, f"test_{name}", name, so_far)
        measured[name] = len({row["image"] for row in of_set})
        lattice_of_H[name] = _add_artifacts(plan, name, of_set)
        rows += of_set
    write_csv(_rounded(rows), output / "images.csv")
    points: dict[str, list[Row]] = {}
    for row in _tested(plan, "curve", CURVE, so_far):
        if row["model"] != "bicubic":
            points.setdefault(row["model"], []).append(row)
    curve = [{"model": model, **{name: mean(its, name) for name in CURVE_METRICS}} for model, its in points.items()]
    write_csv(_rounded(curve), output / "curve.csv")
    base = plan.setting.base
    content = {
        "setting": plan.setting.name,
        "base": base,
        "steps": {"psnr": plan.steps("psnr"), base: plan.total},
        "curve_set": CURVE,
        "choosing_set": CHOOSING,
        "choice": read_json(plan.folder / "choice.json"),
        "lattice_of_H": lattice_of_H,
        "measured": measured,
        "trained": _trained_with(plan, weight),
        **about,
    }
    save_json(content, output / "facts.json")
    for name in plan.tested:
        # Photographs of the data sets belong to others and are not committed; the demo's are in the public domain.
        path = output / "demo.png" if name == "demo" else plan.folder / f"crops_{name}.png"
        path.unlink(missing_ok=True)
        _draw_crops(plan, name, [row for row in rows if row["set"] == name], path)


def _trained_with(plan: Plan, weight: float) -> dict[str, list[str]]:
    """Commits of this project and versions of PyTorch; a run that was interrupted may have several."""
    runs = [plan.folder / plan.run(w, seed) for w in (0.0, weight) for seed in plan.seeds]
    files = [path for run in (plan.psnr.parents[1], *runs) for path in (run / "options").glob("*_facts.txt")]
    facts = [read_json(path) for path in sorted(files, key=lambda path: path.name)]
    return {name: list(dict.fromkeys(of_start[name] for of_start in facts)) for name in ("git_commit", "torch")}


def _pictures(plan: Plan, name: str, image: str, models: Iterable[str]) -> list[Picture]:
    """H, cut as the data set cuts it, then what the models made of it."""
    number = next(number for number, its in enumerate(chunks(plan.sets[name])) if image in [path.stem for path in its])
    folder = plan.results(f"test_{name}", number)
    made = [imread_uint(str(folder / model / name / f"{image}.png"), 3) for model in models]
    H = imread_uint(str(next(path for path in plan.sets[name] if path.stem == image)), 3)
    return [H[: made[0].shape[0], : made[0].shape[1]], *made]


def _add_artifacts(plan: Plan, name: str, rows: list[Row]) -> float:
    """Add what is measured in the pictures; returns the mean lattice of the ground truth."""
    of_H: dict[str, float] = {}
    for row in rows:
        if row["model"] == "bicubic":  # of it no picture is kept
            continue
        H, psnr, E = _pictures(plan, name, row["image"], ("psnr", row["model"]))
        row["lattice"] = lattice_share(E)
        if row["model"] == "psnr":  # once an image; it is what the others are compared with
            of_H[row["image"]] = lattice_share(H)
        else:
            row |= artifact_shares(E, psnr, H)
    return mean([{"lattice": value} for value in of_H.values()], "lattice")


def pairs(rows: list[Row], base: str, seeds: Iterable[int], metric: str) -> tuple[list[str], Any, Any]:
    """Images; (seeds, images) of the metric without SSL, and with it."""
    names = list(dict.fromkeys(row["image"] for row in rows))
    values = {(row["model"], row["image"]): row.get(metric, math.nan) for row in rows}
    without, with_ssl = (
        np.array([[values.get((f"{label}_s{seed}", image), math.nan) for image in names] for seed in seeds])
        for label in (base, f"{base}_ssl")
    )
    return names, without, with_ssl


def _draw_crops(plan: Plan, name: str, rows: list[Row], path: Path) -> None:
    """The images of the largest gain and loss, first seed, where SSL lowers, or raises, the local error most."""
    base, seed = plan.setting.base, plan.seeds[0]
    names, without, with_ssl = pairs(rows, base, plan.seeds, CROPS_BY)
    change = (with_ssl - without).mean(0)
    if not np.isfinite(change).any():
        return
    labels = ("H", "psnr", base, f"{base} + SSL")
    figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, len(labels))
    for line, (title, index) in enumerate({"gain": np.nanargmin(change), "loss": np.nanargmax(change)}.items()):
        image = names[index]
        shown = _pictures(plan, name, image, ("psnr", f"{base}_s{seed}", f"{base}_ssl_s{seed}"))
        H, _, without_ssl, ours = shown
        grown = local_error(ours, H, 0) - local_error(without_ssl, H, 0)
        y, x = np.unravel_index((-grown if title == "gain" else grown).argmax(), grown.shape)
        top, left = (
            int(np.clip(at + WINDOW // 2 - CROP // 2, 0, max(0, side - CROP)))
            for at, side in zip((y, x), H.shape, strict=False)
        )
        for axis, label, picture in zip(axes[line], labels, shown, strict=True):
            axis.imshow(picture[top : top + CROP, left : left + CROP], interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=label)
        axes[line][0].set_ylabel(f"largest {title}\n{image}")
    figure.savefig(path, dpi=110)
