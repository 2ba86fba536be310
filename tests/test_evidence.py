"""benchmarks/evidence: the artifact measure, the intervals, the choice of weights, resuming, the report."""

import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY, photograph
from utils.utils_error import UserError
from utils.utils_image import imsave
from utils.utils_option import parse

pytest.importorskip("fcntl", reason="the experiment runs on Linux and macOS")
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from evidence import collect, plan, report, run
from evidence.measures import (
    artifact_shares,
    at_equal_psnr,
    choose_weight,
    difference,
    lattice_share,
    local_error,
)
from evidence.run import State, plan_of, run_stage

# --------------------------------------------------------------------------------------------------------- artifacts


def test_the_local_error_is_the_mean_over_a_window_and_rgb():
    H = np.zeros((20, 24, 3), np.uint8)
    E = H.copy()
    E[10, 12] = (30, 0, 0)
    error = local_error(E, H, border=2)
    assert error.shape == (20 - 4 - 6, 24 - 4 - 6)
    # One pixel of 49, one channel of three; the windows that hold it are the 7 x 7 around it.
    np.testing.assert_allclose(error[error > 1e-6], 900 / 3 / 49, rtol=1e-9)
    assert (error > 1e-6).sum() == 49
    assert error[10 - 5, 12 - 5] > 0


def test_the_border_is_not_counted():
    H = np.zeros((24, 24, 3), np.uint8)
    E = H.copy()
    E[:4] = 255
    assert local_error(E, H, border=4).max() == 0


def test_artifacts_are_the_share_of_pixels_that_became_much_worse():
    rng = np.random.default_rng(0)
    H = np.full((208, 208, 3), 128, np.uint8)
    psnr = (H + rng.integers(-3, 4, H.shape)).astype(np.uint8)
    worse = psnr.astype(float)
    worse[:, 104:] += rng.choice([-20, 20], (208, 104, 3))  # adds about 400 to the squared error of the right half
    E = worse.astype(np.uint8)
    shares = artifact_shares(E, psnr, H)
    # Windows lie on both sides of the edge: one column of windows in 194 is a half of one per cent.
    assert shares["artifacts"] == pytest.approx(50, abs=2)
    assert shares["artifacts_25"] >= shares["artifacts"] >= shares["artifacts_400"]
    assert artifact_shares(psnr, psnr, H) == {"artifacts": 0, "artifacts_25": 0, "artifacts_400": 0}
    # What was bad already and stays so is no artifact, and better is none either.
    assert artifact_shares(E, E, H)["artifacts"] == artifact_shares(psnr, E, H)["artifacts"] == 0


def test_a_lattice_is_found_where_it_is_and_no_other_structure_is_taken_for_one():
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.normal(128, 300, (136, 264)), (0, 0), 4) + rng.normal(0, 2, (136, 264))
    every_fourth = 6.0 * (np.arange(264) % 4 == 0)

    def share(x: np.ndarray) -> float:
        return lattice_share(np.repeat(np.clip(x, 0, 255).astype(np.uint8)[..., None], 3, 2))

    assert share(picture) == 0
    assert share(picture + 6.0 * (np.arange(264) % 5 == 0)) == 0  # another period
    assert share(picture + every_fourth) == 100
    assert share(picture + every_fourth[:136, None]) == 100
    half = picture.copy()
    half[:, 132:] += every_fourth[132:]
    assert share(half) == 50
    assert share(np.full((136, 264), 128.0) + 0.9 * every_fourth / 6) == 0  # below what 8 bits show as a level
    assert math.isnan(share(picture[:70]))


# ---------------------------------------------------------------------------------------------------------- intervals


def test_a_difference_is_that_of_the_pairs():
    without = np.array([[1.0, 5.0, 3.0], [2.0, 6.0, 4.0]])
    change = np.array([[-0.5, 0.1, -0.2], [-0.3, 0.3, -0.2]])
    d = difference(without, without + change, higher_better=False)
    assert d.mean == pytest.approx(change.mean())
    assert d.seeds == pytest.approx([-0.2, -0.2 / 3])
    assert d.improved == pytest.approx(100 * 2 / 3)
    assert (d.best, d.worst) == (0, 1)
    assert d.low <= d.mean <= d.high
    up = difference(without, without + change, higher_better=True)
    assert (up.best, up.worst) == (1, 0)


def test_pairing_makes_the_interval_narrow():
    rng = np.random.default_rng(1)
    without = np.repeat(rng.normal(25, 4, (1, 100)), 3, 0)  # images differ much, each gains a little
    with_ssl = without + rng.normal(0.1, 0.02, without.shape)
    paired = difference(without, with_ssl, higher_better=True)
    torn = difference(without, with_ssl[:, rng.permutation(100)], higher_better=True)
    assert paired.verdict(True) == "better"
    assert paired.verdict(False) == "worse"
    assert torn.verdict(True) == "undecided"
    assert torn.high - torn.low > 20 * (paired.high - paired.low)


@pytest.mark.parametrize(
    ("spread_of_seeds", "low", "high"),
    # 200 experiments: 95 % plus or minus 3 standard deviations is 90 to 100. Where only seeds differ three of them give
    # far less, as the docstring warns: the bootstrap of three equal values in a row has no width left.
    [(0.0, 0.90, 1.0), (1.0, 0.6, 0.9)],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(spread_of_seeds, low, high):
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        images = rng.normal(0, 1, (1, 60))
        seeds = rng.normal(0, spread_of_seeds, (3, 1))
        change = 0.3 + images + seeds + rng.normal(0, 0.5, (3, 60))
        d = difference(np.zeros_like(change), change, higher_better=True, draws=500)
        inside += d.low <= 0.3 <= d.high
    assert low <= inside / 200 <= high


def test_images_without_a_value_are_left_out_in_both_runs():
    without = np.array([[1.0, np.nan, 3.0]])
    d = difference(without, np.array([[2.0, 9.0, 5.0]]), higher_better=True)
    assert d.mean == pytest.approx(1.5)
    assert (d.best, d.worst) == (2, 0)
    with pytest.raises(ValueError, match="no image"):
        difference(np.full((1, 2), np.nan), np.zeros((1, 2)), higher_better=True)


def test_curves_are_compared_where_both_have_a_psnr():
    without = [(30.0, 0.30), (28.0, 0.20), (26.0, 0.10)]  # 0.05 a dB
    with_ssl = [(29.0, 0.23), (27.0, 0.13)]  # 0.02 below it
    equal = at_equal_psnr(without, with_ssl)
    assert (equal.low, equal.high) == (27, 29)
    assert equal.without == pytest.approx(0.20)
    assert equal.with_ssl == pytest.approx(0.18)
    assert at_equal_psnr(without, [(25.0, 0.1), (24.0, 0.1)]) is None


# --------------------------------------------------------------------------------------------------------- the weight


def test_the_weight_is_the_best_of_those_that_cost_little():
    def of(psnr, distance):
        return {"psnr": psnr, "stlpips_vgg": distance, "ssg": 0.0}

    control = of(25.0, 0.30)
    assert choose_weight({0: control, 50: of(24.95, 0.29), 100: of(24.8, 0.27), 200: of(24.5, 0.20)}) == 100
    assert choose_weight({0: control, 50: of(24.95, 0.26), 100: of(24.8, 0.27), 200: of(24.8, 0.28)}) == 50
    assert choose_weight({0: control, 100: of(24.2, 0.1), 50: of(24.5, 0.2), 200: of(24.0, 0.1)}) == 50


def test_the_terms_of_a_log_are_those_of_its_last_report():
    log = (
        "26-11-28 step 1/9 11% eta 0:00:01 lr 1.00e-04 data 0.013s step 2.3s | G_loss 0.9 stlpips 0.9 ssl 0.9\n"
        "26-11-28 step 9/9 100% eta 0:00:01 lr 1.00e-04 data 0.013s step 2.3s | "
        "G_loss 0.04 stlpips 1.2e-01 ssl 0.3 D_loss 0.03 l_d_real 0.7 ssl_l1 0.2 ssl_kl 0.1 G_grad 1.5\n"
    )
    assert collect.terms(log) == {"G_loss": 0.04, "stlpips": 0.12, "ssl": 0.3, "D_loss": 0.03}
    assert collect.terms("") == {}


# ----------------------------------------------------------------------------------------------------------- the plan


def make_data(root: Path, side: int = 64) -> Path:
    for number, (name, count) in enumerate({"BSD400": 3, "BSD100": 3, "Set5": 2, "Set14": 2}.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            size = 200 if name == "BSD400" else side
            imsave(photograph(size, size, 10 * number + i), str(root / name / f"{name}_{i}.png"))
    return root


def make_plan(root: Path, name: str = "bicubic", seeds: tuple[int, ...] = (0, 1, 2)) -> plan.Plan:
    images = [path for path in sorted((root / "Set5").glob("*.png"))]
    sets = {"Set14": images, "Set5": images}
    return plan.Plan(plan.SETTINGS[name], root / "work", root / "BSD400", sets, seeds, "fp32")


def jobs_of(made: plan.Plan, title: str, weight: float | None = None) -> list[plan.Job]:
    return next(stage.jobs for stage in made.stages(weight) if stage.title == title)


@pytest.mark.parametrize("name", plan.SETTINGS)
def test_runs_with_and_without_ssl_differ_in_nothing_else(tmp_path, name):
    made = make_plan(make_data(tmp_path), name)
    runs = jobs_of(made, "runs", made.setting.weights[1])
    assert len(runs) == 6
    for seed in made.seeds:
        control, ours = ({*run.command} for run in runs_of(runs, seed))
        differing = {override.partition("=")[0] for override in control ^ ours}
        assert differing == {"task", "train.ssl_l1_weight", "train.ssl_kl_weight"}


def runs_of(runs: list[plan.Job], seed: int) -> list[plan.Job]:
    return sorted((run for run in runs if f"train.manual_seed={seed}" in run.command), key=lambda run: len(run.command))


@pytest.mark.parametrize("name", plan.SETTINGS)
def test_every_training_command_is_accepted(tmp_path, name):
    made = make_plan(make_data(tmp_path), name)
    made.raw.mkdir(parents=True)
    for title in ("PSNR model", "weights tried", "runs"):
        for job in jobs_of(made, title):
            script, _, file, *overrides = job.command
            opt = parse(file, overrides=overrides)
            assert opt.model == {"main_train_psnr.py": "plain", "main_train_dm.py": "dm"}.get(script, "gan")
            assert opt.train.iterations == job.units
            assert opt.task_dir / "models" == job.models
            assert (opt.train.kernel_size_search, opt.train.kernel_size_window, opt.train.sigma) == (25, 9, 0.004)
            assert opt.datasets["train"].H_size >= 96
            kind = "blindsr" if name == "blind" else "sr"
            assert opt.datasets["train"].dataset_type == kind


def test_the_short_runs_are_the_beginning_of_the_whole_ones(tmp_path):
    made = make_plan(make_data(tmp_path))
    tried = {job.models: job for job in jobs_of(made, "weights tried")}
    first = [job for job in jobs_of(made, "runs", made.setting.weights[1]) if job.models in tried]
    assert len(first) == 2
    for job in first:
        assert {*job.command} ^ {*tried[job.models].command} == {"train.iterations=3000", "train.iterations=750"}
        assert job.units_left() == 3000 - 750
    train = plan.options("gan")["train"]
    assert "G_scheduler_milestones" not in train
    assert train.get("G_scheduler_type") != "CosineAnnealingLR"


def test_nothing_is_chosen_on_a_test_set(tmp_path):
    made = make_plan(make_data(tmp_path))
    assert "Set14" not in made.tested
    with pytest.raises(UserError, match="two sets are called Set5"):
        plan_of_arguments(tmp_path, test=[tmp_path / "Set5"])
    with pytest.raises(UserError, match="two sets are called Set14"):
        plan_of_arguments(tmp_path, test=[tmp_path / "Set14"])


@pytest.mark.parametrize(("names", "message"), [(("a.png", "a.bmp"), "rename one"), (("=a.png",), "rename it")])
def test_images_whose_results_could_not_be_found_again_are_refused(tmp_path, names, message):
    (make_data(tmp_path) / "mine").mkdir()
    for name in names:
        imsave(photograph(48, 48), str(tmp_path / "mine" / name))
    with pytest.raises(UserError, match=message):
        plan_of_arguments(tmp_path, test=[tmp_path / "mine"])


def plan_of_arguments(data: Path, test: list[Path]) -> plan.Plan:
    from argparse import Namespace

    demo = data / "work" / "demo" / "testsets" / "demo"
    demo.mkdir(parents=True, exist_ok=True)
    imsave(photograph(48, 48), str(demo / "0.png"))
    return plan_of("bicubic", Namespace(data=data, work=data / "work", test=test, seeds=[0], scale_down=1), "fp32")


# ----------------------------------------------------------------------------------------------------------- resuming


def fake(name: str, code: str, units: float = 10.0) -> plan.Job:
    return plan.Job(name, ("-c", code), "gan", units)


def test_what_is_done_is_not_done_again(tmp_path):
    job = fake("a", f"open({str(tmp_path / 'ran')!r}, 'a').write('x')")
    for _ in range(2):
        run_stage(plan.Stage("", [job]), State(tmp_path / "state.json"), 2, tmp_path / "logs")
    assert (tmp_path / "ran").read_text() == "x"
    state = State(tmp_path / "state.json")
    assert state.done(job)
    assert state.seconds_left(job) == 0
    other = fake("a", job.command[1] + " # another command under this name")
    assert not state.done(other)
    # What is left is estimated from what jobs of the kind took here.
    assert state.seconds_left(other) == pytest.approx(state.cpu)


def test_a_failure_is_told_with_the_last_line_and_made_up_for_next_time(tmp_path):
    flag = tmp_path / "flag"
    code = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(flag)!r}).exists() else 'no flag')"
    jobs = [fake("good", "print(1)"), fake("bad", code)]
    with pytest.raises(UserError, match=r"bad failed \(status 1\): no flag"):
        run_stage(plan.Stage("", jobs), State(tmp_path / "state.json"), 1, tmp_path / "logs")
    state = State(tmp_path / "state.json")
    assert state.done(jobs[0])
    assert not state.done(jobs[1])
    flag.touch()
    run_stage(plan.Stage("", jobs), state, 1, tmp_path / "logs")
    assert State(tmp_path / "state.json").done(jobs[1])


TRAINER = """
import pathlib, signal, sys, time
models = pathlib.Path({models!r})
step = max([0, *(int(path.name[:-6]) for path in models.glob("*_G.pth"))])
signal.signal(signal.SIGTERM, lambda *_: ((models / f"{{step}}_G.pth").touch(), sys.exit(143)))
(models / "started").touch()
while step < 4 or not pathlib.Path({go!r}).exists():
    step = min(step + 1, 4)
    time.sleep(0.02)
(models / "10_G.pth").touch()
"""


def test_an_interrupted_run_saves_and_goes_on(tmp_path):
    models, go = tmp_path / "models", tmp_path / "go"
    models.mkdir()
    job = plan.Job("a", ("-c", TRAINER.format(models=str(models), go=str(go))), "gan", 10.0, models)
    stage = plan.Stage("", [job])

    def interrupt_once_it_runs():
        while not (models / "started").exists():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_once_it_runs)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, State(tmp_path / "state.json"), 1, tmp_path / "logs")
    thread.join()
    state = State(tmp_path / "state.json")
    assert not state.done(job)
    saved = job.units - job.units_left()
    assert saved <= 4  # it was stopped, by its own SIGTERM, and its checkpoint counts
    assert list(models.glob("*_G.pth"))
    go.touch()
    run_stage(stage, state, 1, tmp_path / "logs")
    assert State(tmp_path / "state.json").done(job)
    assert job.units_left() == 0


# --------------------------------------------------------------------------------------------------------- the report


def made_up_results(folder: Path, base: str, gain: float, images: int = 12) -> None:
    """With SSL everything is better by ``gain`` at every image, or worse where it is negative."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = ["set,image,model,psnr,stlpips_vgg,artifacts"]
    for image in range(images):
        rows.append(f"Set5,i{image},bicubic,24,0.5,")
        rows.append(f"Set5,i{image},psnr,27,0.4,")
        for seed in (0, 1):
            psnr, distance = 26 + rng.normal(), 0.3 + 0.1 * rng.random()
            rows.append(f"Set5,i{image},{base}_s{seed},{psnr},{distance},5.0")
            rows.append(f"Set5,i{image},{base}_ssl_s{seed},{psnr + gain},{distance - gain / 10},5.0")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    curve = ["model,psnr,ssg,stlpips_vgg", "psnr,27,1.2,0.4"]
    for seed in (0, 1):
        for step, psnr in ((10, 26.5), (20, 26.0)):
            curve.append(f"{base}_s{seed}_{step},{psnr},{psnr - 25},{(psnr - 25) / 10}")
            curve.append(f"{base}_ssl_s{seed}_{step},{psnr},{psnr - 25 - gain},{(psnr - 25) / 10}")
    (folder / "curve.csv").write_text("\n".join(curve) + "\n")
    means = {"psnr": 25.0, "ssg": 1.0, "stlpips_vgg": 0.3}
    tried = [{"weight": w, **means, "terms": {"stlpips": 0.2, **({"ssl": w / 500} if w else {})}} for w in (0, 50)]
    facts = {
        "setting": folder.name,
        "base": base,
        "seeds": [0, 1],
        "steps": {"psnr": 40, base: 20},
        "sets": {"Set5": images, "demo": 3},
        "measured": {"Set5": images, "demo": 0},
        "trained": {"git_commit": ["f" * 40, "e" * 40 + "-dirty"], "torch": ["2.0"]},
    }
    facts |= {"curve_set": "Set5", "choosing_set": "Set14", "scale_down": 1, "precision": "fp32"}
    facts |= {"choice": {"chosen": 50, "seed": 0, "steps": 5, "tried": tried}, "ms": {"fp32": 10.0, "bf16": 12.0}}
    facts |= {"lattice_of_H": {"Set5": 3.25}}
    facts |= {"processor": "a processor", "processes": 2, "wall_seconds": 7200, "cpu_seconds": 14000}
    facts |= {"git_commit": "0123456789abcdef", "date": "2026-11-28T00:00:00"}
    (folder / "facts.json").write_text(json.dumps(facts))


def write_report(root: Path, monkeypatch) -> str:
    arguments = ["report.py", "--results", str(root / "results"), "--output", str(root / "docs" / "evidence.md")]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    return (root / "docs" / "evidence.md").read_text(encoding="utf-8")


def test_the_report_says_what_the_numbers_say(tmp_path, monkeypatch):
    made_up_results(tmp_path / "results" / "bicubic", "gan", gain=0.5)
    made_up_results(tmp_path / "results" / "resshift", "resshift", gain=-0.5)
    text = write_report(tmp_path, monkeypatch)
    summary = text[text.index("## Summary") : text.index("## Bicubic")]
    ours, missing, blind, dm, _ = summary.strip().split("\n")[2:]
    assert missing.endswith("demo: not measured yet.")
    assert ours.endswith("With SSL better: PSNR, ST-LPIPS-VGG; worse: none; undecided: artifacts (% > 100).")
    assert blind.endswith("not run yet.")
    assert dm.endswith("With SSL better: none; worse: PSNR, ST-LPIPS-VGG; undecided: artifacts (% > 100).")
    table = text[text.index("### Set5, 12 images") :]
    assert "| PSNR \u2191 | 24.00 | 27.00 |" in table
    assert "| +0.50 | +0.50 to +0.50 | better | +0.50, +0.50 | 100 % |" in table
    assert "SSG at equal PSNR" in table
    assert "a lattice in 3.2 % of the blocks" in table
    assert "| 50 | 25.00 | 1.000 | 0.3000 | 0.50 |" in text  # 50 / 500 over 0.2
    assert "trained at commit ffffffffff, eeeeeeeeee-dirty, collected at 0123456789, 2026-11-28" in text
    for name in ("bicubic", "resshift"):
        assert (tmp_path / "docs" / f"evidence_{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("cost", [0.2, 0.3])
def test_the_report_says_where_every_weight_cost_more_than_was_allowed(tmp_path, monkeypatch, cost):
    made_up_results(tmp_path / "results" / "bicubic", "gan", gain=0.5)
    file = tmp_path / "results" / "bicubic" / "facts.json"
    facts = json.loads(file.read_text())
    facts["choice"]["tried"][1]["psnr"] -= cost
    file.write_text(json.dumps(facts))
    assert ("All cost more than 0.25 dB" in write_report(tmp_path, monkeypatch)) == (cost > 0.25)


def test_of_few_images_the_report_gives_no_verdict(tmp_path, monkeypatch):
    made_up_results(tmp_path / "results" / "bicubic", "gan", gain=0.5, images=9)
    text = write_report(tmp_path, monkeypatch)
    assert "Set5 (9 images). Too few images for a verdict; the table shows each seed." in text
    assert "| +0.50 | +0.50 to +0.50 | - | +0.50, +0.50 | 100 % |" in text
    assert "| better |" not in text


def test_the_report_without_results_claims_nothing(tmp_path, monkeypatch):
    text = write_report(tmp_path, monkeypatch)
    assert text.count("ot run yet") == 6
    assert "| PSNR" not in text


# -------------------------------------------------------------------------------------------------------- end to end


def test_a_result_that_is_missing_is_passed_over_only_where_that_is_asked_for(tmp_path):
    made = make_plan(make_data(tmp_path))
    with pytest.raises(FileNotFoundError):
        collect._tested(made, "trials", "Set14")
    assert collect._tested(made, "trials", "Set14", so_far=True) == []
    # Nor do results count that were measured when there were fewer seeds.
    file = made.results("curve", 0) / "results.csv"
    file.parent.mkdir(parents=True)
    for seeds in ((0,), (0, 1, 2)):
        models = [f"gan{kind}_s{seed}_500" for kind in ("", "_ssl") for seed in seeds]
        file.write_text("\n".join(["image,model,psnr", "a,psnr,25", *(f"a,{model},24" for model in models)]) + "\n")
        rows = collect._tested(made, "curve", "Set5", so_far=True)
        assert [row["model"] for row in rows] == (["psnr", *models] if seeds == made.seeds else [])


def run_main(monkeypatch, *arguments: str) -> None:
    """The command line; it leaves the signals as they were."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_tiny_experiment_runs_from_photographs_to_the_report(tmp_path, monkeypatch):
    data, work = make_data(tmp_path / "data"), tmp_path / "work"

    def small_photographs(_trainsets: Path, testsets: Path) -> None:
        (testsets / "demo").mkdir(parents=True, exist_ok=True)
        imsave(photograph(64, 72), str(testsets / "demo" / "a.png"))

    monkeypatch.setattr(run, "prepare_demo", small_photographs)
    monkeypatch.setitem(plan.SETTINGS, "bicubic", plan.SETTINGS["bicubic"]._replace(weights=(50,)))
    arguments = ["--data", str(data), "--work", str(work), "--seeds", "0", "--scale_down", "1500"]
    arguments += ["--settings", "bicubic"]
    run_main(monkeypatch, *arguments)
    results = tmp_path / "work" / "results" / "bicubic"
    assert {path.name for path in results.iterdir()} == {"images.csv", "curve.csv", "facts.json", "demo.png"}
    rows = collect.read_rows(results / "images.csv")
    assert {row["model"] for row in rows} == {"bicubic", "psnr", "gan_s0", "gan_ssl_s0"}
    ours = [row for row in rows if row["model"] == "gan_ssl_s0" and row["set"] == "BSD100"]
    assert ours
    assert all(np.isfinite([*map(row.get, (*plan.METRICS, "artifacts"))]).all() for row in ours)
    assert str(tmp_path) not in (results / "facts.json").read_text()
    assert json.loads((results / "facts.json").read_text())["trained"]["torch"] == [torch.__version__]

    for file in (work / "bicubic" / "tests" / "test_Set5").rglob("results.csv"):
        file.unlink()
    run_main(monkeypatch, *arguments, "--so_far")
    assert json.loads((results / "facts.json").read_text())["measured"]["Set5"] == 0
    assert {row["set"] for row in collect.read_rows(results / "images.csv")} == {"BSD100", "demo"}
    (tmp_path / "results").symlink_to(tmp_path / "work" / "results")
    text = write_report(tmp_path, monkeypatch)
    assert "its numbers mean nothing" in text
    assert "### Set5\n\nNot measured yet." in text
    assert "### BSD100, 2 images" in text
