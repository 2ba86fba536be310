"""Write docs/evidence.md and its figures from the result files of benchmarks/evidence/run.py; no checkpoint is needed.

python benchmarks/evidence/report.py
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import matplotlib.figure
import numpy as np

from evidence import collect, plan
from evidence.measures import BLOCK, DRAWS, FEWEST, LATTICE, PRICE, THRESHOLDS, WINDOW, at_equal_psnr, difference
from evidence.plan import ROOT
from utils.utils_error import ArgumentParser, run
from utils.utils_metric_table import METRICS
from utils.utils_run import write_atomically

TITLES = {
    "bicubic": "Bicubic degradation, GAN",
    "blind": "Blind degradation, GAN",
    "resshift": "ResShift in pixels, bicubic degradation",
}
ARTIFACTS = {name: f"artifacts (% > {threshold:g})" for name, threshold in THRESHOLDS.items()}

HEAD = """# Does the self-similarity loss help?

Written by `python benchmarks/evidence/report.py` from the files in `benchmarks/evidence/results`; sentences about
results come from the numbers.

```
python benchmarks/evidence/run.py --data DATA --seeds 0 1 2
python benchmarks/evidence/report.py
```

DATA holds the folders BSD400 (training), Set14, BSD100 and Set5 ([where they are had](../testsets/README.md)). A
setting took two to three hours on two cores; interrupted, the same command goes on.

Each setting is trained without SSL and with it. Both begin with the same weights (the GANs' generator with the PSNR
model's, one for all seeds of a setting) and see the same patches in the same order with the same draws; the weight of
SSL is the only difference. Small generators, short training: this shows what the loss changes under these conditions,
and is no comparison with published models.

The weight of SSL was chosen on {choosing} alone, after a quarter of the steps, with the first seed: of the values
tried the one with the least ST-LPIPS-VGG among those that cost at most {price:g} dB against the control, the smallest
where all cost more. Nothing was chosen on the sets that follow.

What came before. The generator was first one that shuffles pixels (msrresnet1, 232,963 weights), with ST-LPIPS at a
weight of 1. After 750 steps its pictures showed a lattice of 4 pixels, with SSL more than without, though SSG and
ST-LPIPS-VGG were better with it (two images of Set14: SSG 1.48 against 1.70, ST-LPIPS-VGG 0.251 against 0.275, PSNR
20.6 against 21.0 dB); with ST-LPIPS at 0.2 it was fainter and still there: SSL does not forbid a pattern that repeats.
ESRGAN's network, which enlarges by nearest neighbours and convolves, was taken instead, and ST-LPIPS at 0.2, before
anything was measured on a test set. The eye hardly finds a lattice in its pictures after 750 steps, but it can be
measured; the last row of the tables does. That measure was added after those runs, and nothing was chosen by it.

How to read the tables. Differences are with SSL minus without. The interval holds 95 % of {draws:,} means of the
paired bootstrap: seeds and images are drawn again with replacement, both runs of a pair kept together. Seeds are
few: three, drawn again from themselves, reproduce two thirds of the variance between seeds, so the interval is too
narrow where seeds matter more than images do; the differences of the single seeds stand beside it. The same holds
of images: with five, such intervals were seen to hold the truth in 82 to 87 % of made-up experiments (with 60 in 95
%), so of fewer than {fewest} images no verdict is given. Intervals are not corrected for their number: of twenty
metrics without any effect one is expected to look like one. "better" and "worse" mean that the interval excludes 0,
"undecided" that it does not. Images better, largest gain and largest loss are of the mean over seeds.

The artifact measure: e(x) is the mean of (E - H)² over RGB and the {window} x {window} pixels around x, in squared
levels of 255, inside a border of 4 pixels; artifacts are the share of pixels, in per cent, where e of a model exceeds
e of the PSNR model by more than 100, as it does where noise of 10 levels is added. 25 and 400 (5 and 20 levels) stand
beside it. A lattice is counted in blocks of {block} x {block} pixels of luma whose spectrum has, along rows or columns,
at a period of 4 pixels {lattice:g} times the mean energy of the neighbouring frequencies and an amplitude of at least
one level. ST-LPIPS on AlexNet is what the GANs are trained with; ST-LPIPS-VGG is the network that was not trained with.
PIQE sees E alone, and no truth.

By eye, in the pictures below, the largest gains and losses of the demo's photographs: with SSL the GANs draw edges with
more contrast, under blind degradation with colour fringes, and ResShift, whose short training leaves noise, leaves more
of it. What the psnr model has lost, letters or cells, comes back in neither.
"""


def _number(value: float, spec: str) -> str:
    return "-" if math.isnan(value) else format(value, spec).replace("-", "\u2212")


def _metrics(rows: list[collect.Row]) -> dict[str, tuple[str, bool, str]]:
    """Name -> title, whether more is better, format, of the columns that there are."""
    titles = {name: (METRICS[name].title, METRICS[name].higher_better, METRICS[name].spec) for name in plan.METRICS}
    titles |= {name: (title, False, ".2f") for name, title in ARTIFACTS.items()}
    titles["lattice"] = "lattice (% of blocks)", False, ".1f"
    return {name: of_name for name, of_name in titles.items() if any(name in row for row in rows)}


def _set(rows: list[collect.Row], facts: dict[str, Any], name: str) -> tuple[list[str], dict[str, list[str]]]:
    """The table of a test set; verdict -> titles of metrics."""
    base, seeds = facts["base"], facts["seeds"]
    images = len({row["image"] for row in rows})
    columns = ["metric", "bicubic", "psnr", base, f"{base} + SSL", "difference", "95 % interval", ""]
    columns += [f"seeds {', '.join(map(str, seeds))}", "images better", "largest gain", "largest loss"]
    of_all = "" if images == facts["sets"][name] else f" of {facts['sets'][name]}; the others are not measured yet"
    lines = [f"### {name}, {images} images{of_all}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for metric, (title, higher_better, spec) in _metrics(rows).items():
        names, without, with_ssl = collect.pairs(rows, base, seeds, metric)
        try:
            d = difference(without, with_ssl, higher_better)
        except ValueError:  # no image has this metric
            continue
        change = (with_ssl - without).mean(0)
        verdict = d.verdict(higher_better) if images >= FEWEST else "-"
        if verdict in verdicts:
            verdicts[verdict].append(title)
        signed = f"+{spec}"
        means = [collect.mean([row for row in rows if row["model"] == model], metric) for model in ("bicubic", "psnr")]
        measured = np.isfinite(change)
        means += [float(values[:, measured].mean()) for values in (without, with_ssl)]
        arrow = "\u2191" if higher_better else "\u2193"
        ends = [f"{names[at]} ({_number(change[at], signed)})" for at in (d.best, d.worst)]
        cells = [f"{title} {arrow}", *(_number(value, spec) for value in means), _number(d.mean, signed)]
        cells += [f"{_number(d.low, signed)} to {_number(d.high, signed)}", verdict]
        cells += [", ".join(_number(value, signed) for value in d.seeds), f"{d.improved:.0f} %", *ends]
        lines.append(f"| {' | '.join(cells)} |")
    if (of_H := facts["lattice_of_H"][name]) is not None:  # None: all images are too small
        lines += ["", f"The ground truth itself has a lattice in {of_H:.1f} % of the blocks: structure of its own."]
    return lines, verdicts


def _curves(curve: list[collect.Row], facts: dict[str, Any], path: Path) -> list[str]:
    """The trade-off figure, and what it says at equal PSNR."""
    if not curve:
        return ["Not measured yet."]
    base, seeds = facts["base"], facts["seeds"]
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    of_model = {row["model"]: row for row in curve}
    steps = sorted({int(model.rpartition("_")[2]) for model in of_model if model != "psnr"})
    lines = [f"Checkpoints on {facts['curve_set']}, every {steps[0]} steps, means over images and seeds:", ""]
    lines += [f"![Trade-off]({path.name})", ""]
    for axis, metric in zip(figure.subplots(1, 2), ("ssg", "stlpips_vgg"), strict=True):
        points = {}
        for label, colour in ((base, "#0f6fb8"), (f"{base}_ssl", "#d1495b")):
            at = [[of_model[f"{label}_s{seed}_{step}"] for seed in seeds] for step in steps]
            at = ([[of_model["psnr"]]] if base == "gan" else []) + at  # where these runs start
            points[label] = [(collect.mean(its, "psnr"), collect.mean(its, metric)) for its in at]
            axis.plot(*zip(*points[label], strict=True), "o-", ms=3, lw=1, color=colour, label=label)
        axis.set(xlabel="PSNR, dB", ylabel=METRICS[metric].title)
        axis.legend()
        equal = at_equal_psnr(points[base], points[f"{base}_ssl"])
        title, spec = METRICS[metric].title, METRICS[metric].spec
        if equal is None:
            lines.append(f"- {title}: the two curves have no PSNR in common, so they cannot be compared at equal PSNR.")
            continue
        side = "below" if equal.with_ssl < equal.without else "not below"
        lines.append(
            f"- {title} at equal PSNR, from {equal.low:.2f} to {equal.high:.2f} dB: {equal.without:{spec}} without "
            f"SSL, {equal.with_ssl:{spec}} with it; lower is better, and on average the curve with SSL lies {side} "
            f"the other."
        )
    figure.savefig(path, dpi=110)
    return lines


def _trials(facts: dict[str, Any]) -> list[str]:
    choice = facts["choice"]
    lines = [
        f"Weights tried on {facts['choosing_set']} (seed {choice['seed']}, {choice['steps']} steps); chosen: "
        f"**{choice['chosen']:g}** for L1 and KL each. Last column: SSL's sum over the largest other term, end of log.",
        "",
        "| weight | PSNR | SSG | ST-LPIPS-VGG | SSL / largest other |",
        "|---|---|---|---|---|",
    ]
    for tried in choice["tried"]:
        others = [value for name, value in tried["terms"].items() if name != "ssl"]
        ratio = tried["terms"].get("ssl", 0.0) / max(others) if others else math.nan
        numbers = (f"{tried[name]:{METRICS[name].spec}}" for name in plan.CURVE_METRICS)
        lines.append(f"| {tried['weight']:g} | {' | '.join(numbers)} | {_number(ratio, '.2f')} |")
    control, *others = choice["tried"]  # the control's weight is 0
    if all(control["psnr"] - tried["psnr"] > PRICE for tried in others):
        lines += ["", f"All cost more than {PRICE:g} dB, so the smallest was taken; smaller ones were not tried."]
    return lines


def _short(commit: str) -> str:
    """Ten digits, and whether files differed from it."""
    return commit[:10] + "-dirty" * commit.endswith("-dirty")


def _setting(name: str, folder: Path, output: Path) -> tuple[list[str], list[str]]:
    """The lines of a setting; those of the summary."""
    title = f"## {TITLES[name]}"
    if not (folder / "facts.json").exists():
        return [title, "", "Not run yet."], [f"- {TITLES[name]}: not run yet."]
    facts = collect.read_json(folder / "facts.json")
    rows, curve = (collect.read_rows(folder / file) for file in ("images.csv", "curve.csv"))
    lines = [title, ""]
    if facts["scale_down"] > 1:
        lines += [f"**A trial with 1/{facts['scale_down']} of the steps and images: its numbers mean nothing.**", ""]
    steps = ", ".join(f"{count} steps {what}" for what, count in facts["steps"].items())
    hours = f"{facts['wall_seconds'] / 3600:.1f} hours, {facts['cpu_seconds'] / 3600:.1f} CPU-hours"
    ms = " against ".join(f"{ms:.0f} ms in {name}" for name, ms in facts["ms"].items())
    lines += [
        f"{steps}; seeds {', '.join(map(str, facts['seeds']))}; {facts['precision']} (convolutions took {ms}). "
        f"{facts['processor']}, {facts['processes']} processes of one thread, {hours}; PyTorch "
        f"{', '.join(facts['trained']['torch'])}; trained at commit "
        f"{', '.join(map(_short, facts['trained']['git_commit']))}, collected at {_short(facts['git_commit'])}, "
        f"{facts['date'][:10]}.",
    ]
    lines += ["", *_trials(facts)]
    summary = []
    for of_set, count in facts["measured"].items():
        if not count:
            lines += ["", f"### {of_set}", "", "Not measured yet."]
            summary.append(f"- {TITLES[name]}, {of_set}: not measured yet.")
            continue
        table, verdicts = _set([row for row in rows if row["set"] == of_set], facts, of_set)
        lines += ["", *table]
        told = "; ".join(f"{verdict}: {', '.join(titles) or 'none'}" for verdict, titles in verdicts.items())
        told = f"With SSL {told}." if count >= FEWEST else "Too few images for a verdict; the table shows each seed."
        part = "" if count == facts["sets"][of_set] else f" of {facts['sets'][of_set]}"
        summary.append(f"- {TITLES[name]}, {of_set} ({count}{part} images). {told}")
    figure = output.parent / f"evidence_{name}.png"
    lines += ["", "### The trade-off", "", *_curves(curve, facts, figure)]
    if (folder / "demo.png").exists():
        picture = Path(os.path.relpath(folder.resolve(), output.parent.resolve()))
        lines += [
            "",
            "The demo's photographs (public domain) with the largest gain and loss of ST-LPIPS-VGG, first seed, at the "
            "place where SSL lowers, or raises, the local error most:",
            "",
            f"![Largest gain and loss]({(picture / 'demo.png').as_posix()})",
        ]
    return lines, summary


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--results", type=Path, default=collect.RESULTS, help="folder of the result files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "evidence.md", help="the document")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    parts, summaries = [], []
    for name in plan.SETTINGS:
        lines, summary = _setting(name, args.results / name, args.output)
        parts += ["", *lines]
        summaries += summary
    head = HEAD.format(
        choosing=plan.CHOOSING, price=PRICE, draws=DRAWS, window=WINDOW, block=BLOCK, lattice=LATTICE, fewest=FEWEST
    )
    write_atomically("\n".join([head, "## Summary", "", *summaries, *parts]) + "\n", args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    run(main)
