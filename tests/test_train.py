"""Training: resuming, repeating, stopping, failing; and each step's arithmetic by hand."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from data import dataset_blindsr as blindsr
from evaluation.metrics import Measurer
from models.loss import color_loss
from models.model_base import ModelBase, ModelSR
from models.model_gan import ModelGAN
from tests.conftest import REPOSITORY, photograph
from tests.test_option import KAIR
from tests.training import SSL, Workplace, assert_same, tree
from training.checkpoints import Checkpoints
from training.loop import _StopSignals
from training.validate import best_by, validate, validation_measurer
from utils.utils_checkpoint import unwrap
from utils.utils_error import UserError, run
from utils.utils_image import imread_uint, imsave
from utils.utils_option import parse
from utils.utils_option_sections import OptimizerName
from utils.utils_resume import newest_generator, saved_steps
from utils.utils_ssl import SelfSimilarityLoss, edge_mask

GAN = ("model=gan", *SSL)
LAST = (*GAN, "train.channels_last=true")
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
SPAWN = (  # what Windows and macOS do anyway
    "import torch.multiprocessing as m; m.set_start_method('spawn', force=True); "
    "import {} as script; from utils.utils_error import run; run(script.main)"
)


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def script(work: Workplace, *overrides: str, name: str = "main_train_psnr.py", **kwargs):
    """Start a training script in a process of its own."""
    command = [sys.executable, name, "--opt", work.file(), *overrides]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


# ------------------------------------------------------------------------------------------------ resume and repeat


@pytest.mark.parametrize("model", [("model=plain",), GAN, LAST], ids=["plain", "gan_ssl", "gan_ssl_channels_last"])
def test_steps_before_and_after_a_restart_equal_the_uninterrupted_run(work: Workplace, model) -> None:
    work.run(*model, "task=whole")
    work.run(*model, "task=parts", "train.iterations=2")
    random.seed(99), np.random.seed(99), torch.manual_seed(99)  # nothing of the process survives a restart
    work.run(*model, "task=parts")
    whole, parts = work.saved(4, "whole"), work.saved(4, "parts")
    expected = {"G", "E", "optimizerG"} | ({"D", "optimizerD"} if "model=gan" in model else set())
    assert set(whole) == expected
    assert_same(whole, parts)
    assert "resumed at step 2" in work.log("parts")


def test_an_incomplete_newest_checkpoint_is_passed_over(work: Workplace) -> None:
    work.run(*GAN, "task=whole", "train.iterations=6")
    work.run(*GAN)
    (work.folder() / "models" / "4_optimizerD.pth").unlink()
    work.run(*GAN, "train.iterations=6")
    assert "checkpoint 4 cannot be used (no 4_optimizerD.pth)" in work.log()
    assert "resumed at step 2" in work.log()
    for step in (4, 6):
        assert_same(work.saved(step, "whole"), work.saved(step))


def test_a_damaged_newest_checkpoint_is_passed_over(work: Workplace) -> None:
    work.run("task=whole", "train.iterations=6")
    work.run()
    newest = work.folder() / "models" / "4_optimizerG.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    work.run("train.iterations=6")
    assert "checkpoint 4 cannot be used" in work.log()
    assert_same(work.saved(6, "whole"), work.saved(6))


def forget_manifests(folder: Path) -> None:
    """Make a run's folder one of a version that wrote no manifests."""
    (folder / "run.json").unlink()
    for path in (folder / "models").glob("*_state.json"):
        state = json.loads(path.read_text())
        old = {key: state[key] for key in ("best_score", "best_step", "step", "seed") if key in state}
        path.write_text(json.dumps(old, indent=2))


def test_a_set_of_before_manifests_is_complete_without_its_state_and_keeps_seed_and_best(work: Workplace) -> None:
    work.run("train.checkpoint_test=2", "train.manual_seed=null")
    forget_manifests(work.folder())
    before = json.loads((work.folder() / "models" / "4_state.json").read_text())
    (work.folder() / "models" / "4_state.json").unlink()
    work.run("train.checkpoint_test=1000", "train.manual_seed=null", "train.iterations=5", "datasets.test=null")
    after = json.loads((work.folder() / "models" / "5_state.json").read_text())
    assert "checkpoint 4 is of before there were manifests" in work.log()
    assert "resumed at step 4" in work.log()
    assert after["seed"] == before["seed"]
    assert "best_step" in after


def test_checkpoints_of_another_kind_of_run_are_not_written_over(work: Workplace) -> None:
    work.run("train.iterations=2")
    before = tree(work.root / "runs")
    with pytest.raises(UserError, match=r"cannot go on from.*2_D\.pth.*choose another task"):
        work.run("model=gan")
    assert tree(work.root / "runs") == before


def test_weights_alone_that_no_run_has_begun_with_are_not_written_over(work: Workplace) -> None:
    (work.folder() / "models").mkdir(parents=True)
    torch.save({}, work.folder() / "models" / "2_G.pth")
    before = tree(work.root / "runs")
    with pytest.raises(UserError, match=r"cannot go on from \(no 2_optimizerG\.pth\); choose another task"):
        work.run("train.iterations=2", "train.E_decay=0")
    assert tree(work.root / "runs") == before


def test_a_run_that_was_begun_without_an_average_goes_on_with_one(work: Workplace, caplog) -> None:
    work.run("train.iterations=2", "train.E_decay=0", "datasets.test=null")
    with caplog.at_level("INFO"):
        work.run("train.iterations=3", "train.E_decay=0.75", "datasets.test=null")
    assert "resumed at step 2" in work.log()
    assert "step 2 was saved without an average E: it begins as a copy of G" in work.log()
    before, after = work.saved(2)["G"], work.saved(3)
    for name, E in after["E"].items():
        torch.testing.assert_close(E, 0.75 * before[name] + 0.25 * after["G"][name])  # float32


def test_kairs_own_checkpoints_without_an_average_are_gone_on_with(work: Workplace) -> None:
    work.run("train.iterations=2", "train.E_decay=0", "datasets.test=null")
    forget_manifests(work.folder())
    start = work.saved(2)["G"]
    work.run("train.iterations=3", "datasets.test=null")
    assert "resumed at step 2" in work.log()
    assert_same(work.saved(2)["G"], start)


def test_the_number_of_workers_changes_nothing(work: Workplace) -> None:
    work.run("task=none", "train.iterations=3")
    work.run("task=two", "train.iterations=3", "datasets.train.dataloader_num_workers=2")
    assert_same(work.saved(3, "none"), work.saved(3, "two"))


def test_a_seed_makes_a_run_repeatable_and_another_seed_another_run(work: Workplace) -> None:
    for task, seed in (("a", 5), ("b", 5), ("c", 6)):
        work.run(f"task={task}", f"train.manual_seed={seed}", "train.iterations=2")
    assert_same(work.saved(2, "a"), work.saved(2, "b"))
    weight = "body.0.weight"
    assert not torch.equal(work.saved(2, "a")["G"][weight], work.saved(2, "c")["G"][weight])


def test_without_a_seed_a_fresh_one_is_drawn_logged_and_kept(work: Workplace) -> None:
    work.run("train.manual_seed=null", "train.iterations=2")
    work.run("train.manual_seed=null", "train.iterations=4")
    seeds = re.findall(r"seed (\d+)", work.log())
    assert len(seeds) == 2
    assert seeds[0] == seeds[1]
    facts = next((work.folder() / "options").glob("*_facts.txt"))
    assert json.loads(facts.read_text())["seed"] == int(seeds[0])
    work.run(f"train.manual_seed={seeds[0]}", "task=again")
    assert_same(work.saved(4), work.saved(4, "again"))


def test_settings_of_the_optimizer_are_those_of_the_options_after_a_restart(work: Workplace) -> None:
    work.run("train.iterations=2")
    work.run("train.iterations=3", "train.G_optimizer_wd=0.5", "train.G_optimizer_betas=[0.5, 0.6]")
    group = work.saved(3)["optimizerG"]["param_groups"][0]
    assert group["weight_decay"] == 0.5
    assert tuple(group["betas"]) == (0.5, 0.6)


@pytest.mark.parametrize("name", [name for name in get_args(OptimizerName) if name != "adam"])
def test_every_optimizer_moves_its_network_and_goes_on_where_it_was(work: Workplace, name: str) -> None:
    if name != "adamw":
        pytest.importorskip("timm", reason="timm is not installed: pip install -r requirements-extra.txt")
    options = (*GAN, f"train.G_optimizer_type={name}", f"train.D_optimizer_type={name}")
    work.run(*options, "task=whole")
    work.run(*options, "train.iterations=2")
    work.run(*options)
    assert_same(work.saved(4), work.saved(4, "whole"))
    for net in "GD":
        assert not all(map(torch.equal, work.saved(2)[net].values(), work.saved(4)[net].values()))


OF_TIMM = [name for name in get_args(OptimizerName) if name not in ("adam", "adamw")]


@pytest.mark.parametrize("name", OF_TIMM)
def test_what_the_options_say_reaches_timms_optimizers(work: Workplace, name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install -r requirements-extra.txt")
    betas = [0.8, 0.85, 0.9][: 3 if name == "adan" else 2]
    options = (f"train.G_optimizer_type={name}", f"train.G_optimizer_betas={betas}", "train.G_optimizer_wd=0.25")
    (group,) = work.model(*options).optimizers["G"].param_groups
    assert (group["lr"], group["weight_decay"], list(group["betas"])) == (1e-3, 0.25, betas)


@pytest.mark.parametrize(("before", "after"), [("adam", "adan"), ("lion", "adam"), ("nadamw", "radamw")])
def test_a_run_goes_on_with_the_optimizer_it_began_with(work: Workplace, before: str, after: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install -r requirements-extra.txt")
    work.run(f"train.G_optimizer_type={before}", "train.iterations=2")
    with pytest.raises(UserError, match=rf"2_optimizerG.pth: does not fit .* \(it is of {before}, not {after}\)"):
        work.run(f"train.G_optimizer_type={after}")


def test_adam_and_adamw_go_on_from_each_other(work: Workplace) -> None:
    work.run("train.iterations=2", "train.G_optimizer_type=adamw")
    work.run("train.iterations=3", "train.G_optimizer_type=adam")
    assert work.saved(3)["optimizerG"]["state"][0]["step"] == 3


def test_an_older_checkpoint_of_adan_brings_its_own_step_count(work: Workplace) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install -r requirements-extra.txt")
    work.run("train.G_optimizer_type=adan")
    model = work.model("train.G_optimizer_type=adan")
    for step in (4, 2):
        model.load(work.folder() / "models", step)
        assert model.optimizers["G"].param_groups[0]["step"] == step


def test_moments_of_another_network_are_refused_of_every_optimizer(work: Workplace) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install -r requirements-extra.txt")
    work.run("train.G_optimizer_type=lion", "train.iterations=2")
    path = work.folder() / "models" / "2_optimizerG.pth"
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:1]
    torch.save(state, path)
    forget_manifests(work.folder())
    with pytest.raises(UserError, match=r"2_optimizerG.pth: does not fit this run's optimizer \(exp_avg of a weight"):
        work.run("train.G_optimizer_type=lion")


def test_an_optimizer_without_its_library_is_one_line(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(UserError, match=r"train\.D_optimizer_type: lion needs the package timm; python -m pip install"):
        work.model("model=gan", "train.D_optimizer_type=lion")


def test_a_finished_run_says_so_and_writes_nothing_until_iterations_is_raised(work: Workplace, caplog) -> None:
    work.run("train.iterations=2")
    before = tree(work.root / "runs")
    caplog.clear()
    work.run("train.iterations=2")
    assert "run has reached step 2 already; to go on raise train.iterations" in caplog.text
    assert tree(work.root / "runs") == before
    work.run("train.iterations=3")
    assert "resumed at step 2" in work.log()
    assert set(work.saved(3)) == {"G", "E", "optimizerG"}


def test_saved_options_can_be_given_again_and_changed(work: Workplace) -> None:
    work.run(*GAN, "train.iterations=2")
    saved = next(p for p in (work.folder() / "options").glob("*.json"))
    work.options = json.loads(saved.read_text())
    work.run("task=again")
    assert_same(work.saved(2), work.saved(2, "again"))
    work.run("task=other", "train.manual_seed=3", "scale=2")
    assert "done at step 2" in work.log("other")


# ---------------------------------------------------------------------------------------------------- what is written


def test_a_run_leaves_kairs_files_a_log_a_grid_and_a_board(work: Workplace) -> None:
    work.run(*GAN, "train.checkpoint_test=2")
    files = {str(p.relative_to(work.folder())) for p in work.folder().rglob("*") if p.is_file()}
    names = {re.sub(r"\d{8}_\d{6}", "TIME", f.replace(os.sep, "/")) for f in files}
    board = {n for n in names if n.startswith("tensorboard/")}
    models = {f"models/{s}_{n}.pth" for s in (2, 4) for n in ("G", "E", "D", "optimizerG", "optimizerD")}
    assert len(board) == 1
    assert names - board == {
        *models,
        *(f"models/{s}_{n}.safetensors" for s in (2, 4) for n in ("G", "E")),
        *(f"models/{s}_state.json" for s in (2, 4)),
        *(f"images/test_{s:08d}.png" for s in (2, 4)),
        "options/TIME.json",
        "options/TIME_facts.txt",
        "run.json",
        "train.log",
    }
    # One row an image, L, E and H side by side; the wider of the two images sets the width.
    assert imread_uint(str(work.folder() / "images" / "test_00000002.png")).shape == (2 * 40, 3 * 48, 3)
    log = work.log()
    for word in (
        "G_loss",
        "D_loss",
        "ssl_l1",
        "ssl_kl",
        "l_d_real",
        "l_d_fake",
        "D_real",
        "D_fake",
        "G_grad",
        "D_grad",
    ):
        assert word in log
    for word in ("data ", "step ", "lr ", "PSNR", "SSIM", "batch 2 = 1 x 2 patches of 32 px", "done at step 4"):
        assert word in log


def test_only_the_newest_and_the_best_checkpoint_are_kept(work: Workplace, monkeypatch) -> None:
    scores = iter([20.0, 30.0, 25.0, 24.0])
    monkeypatch.setattr("training.loop.validate", lambda *a: {"psnr": next(scores), "ssim": 0.5})
    each = ("train.checkpoint_save=1", "train.checkpoint_test=1", "train.checkpoint_keep=1")
    work.run(*each, "train.iterations=3")
    assert sorted({p.name.split("_")[0] for p in (work.folder() / "models").iterdir()}) == ["2", "3"]
    work.run(*each)  # the best one is remembered over a restart
    assert sorted({p.name.split("_")[0] for p in (work.folder() / "models").iterdir()}) == ["2", "4"]


def test_averages_of_before_go_with_their_step_when_there_are_none_any_more(work: Workplace) -> None:
    keep = ("train.checkpoint_keep=1", "train.checkpoint_save=1", "datasets.test=null")
    work.run(*keep, "train.iterations=2")
    work.run(*keep, "train.E_decay=0")
    assert sorted(path.name for path in (work.folder() / "models").iterdir()) == [
        "4_G.pth",
        "4_G.safetensors",
        "4_optimizerG.pth",
        "4_state.json",
    ]


def test_the_newest_generator_is_of_the_newest_step_in_any_folder(tmp_path) -> None:
    assert newest_generator(tmp_path) is None
    for name in ("9_E", "9_G", "10_G", "100_D", "0200_G", "x_G"):
        (tmp_path / f"{name}.pth").touch()
    assert newest_generator(tmp_path) == tmp_path / "10_G.pth"
    (tmp_path / "models").mkdir()
    for name in ("20_E", "20_G"):
        (tmp_path / "models" / f"{name}.pth").touch()
    assert newest_generator(tmp_path) == tmp_path / "models" / "20_E.pth"
    assert newest_generator(tmp_path, "G") == tmp_path / "models" / "20_G.pth"


@pytest.mark.parametrize("wrong", ['"x"', "NaN", "-1", "1e999", "[1]", "true", "99999999999999999999", '{"a": 1}'])
def test_a_state_with_wrong_numbers_is_left_out_in_a_line_each(work: Workplace, wrong: str, caplog) -> None:
    models = work.folder() / "models"
    models.mkdir(parents=True)
    torch.save({}, models / "2_G.pth")
    (models / "2_state.json").write_text(f'{{"step": 2, "seed": {wrong}, "best_score": {wrong}, "best_step": {wrong}}}')
    checkpoints = Checkpoints(models, None)
    with caplog.at_level("WARNING"):
        assert checkpoints.seed() is None
        checkpoints.seed()
    said = [message.split(" cannot")[0] for message in caplog.messages]
    assert len(said) == len({*said})
    assert "2_state.json: seed" in said
    assert all("\n" not in message and len(message) < 120 for message in caplog.messages)


def test_a_perfect_score_stays_the_best_over_a_restart(work: Workplace, monkeypatch) -> None:
    scores = iter([float("inf"), 30.0, float("nan")])
    monkeypatch.setattr("training.loop.validate", lambda *a: {"psnr": next(scores), "ssim": 1.0})
    each = ("train.checkpoint_save=1", "train.checkpoint_test=1", "train.checkpoint_keep=1")
    for last in (1, 2, 3):
        work.run(*each, f"train.iterations={last}")
    assert sorted({p.name.split("_")[0] for p in (work.folder() / "models").iterdir()}) == ["1", "3"]


def test_one_perfect_image_does_not_make_the_mean_infinite(work: Workplace, caplog) -> None:
    model = work.model()
    truths = [torch.from_numpy(photograph(40, 40, seed)).permute(2, 0, 1) / 255 for seed in range(3)]
    items = [{"L": H[:, ::4, ::4], "H": H} for H in truths]
    answers = iter([truths[0], truths[1] * 0.9, truths[2] * 0.9, *truths, truths[0] * torch.nan, *truths[1:]])
    model.test = lambda: setattr(model, "E", next(answers)[None])  # type: ignore[attr-defined]
    measurer = Measurer(["psnr", "ssim"], border=4, device="cpu")

    def validated() -> dict[str, float]:
        with caplog.at_level("INFO"):
            return validate(model, items, measurer, work.root / "grid.png", 0, torch.device("cpu"))  # type: ignore[arg-type]

    assert 15 < validated()["psnr"] < 40
    assert "1 of 3 images: PSNR is infinite, not in the mean" in caplog.messages
    assert validated() == {"psnr": math.inf, "ssim": 1.0}
    assert all(math.isnan(value) for value in validated().values())  # of an estimate that is NaN


def test_validation_measures_what_the_options_name_and_shows_the_board_its_images(work: Workplace) -> None:
    work.run("train.iterations=2", "train.checkpoint_test=2", 'test.validation=["ssg", "stlpips"]')
    said = re.search(r"step 2 test: (.*)", work.log())
    assert said
    assert re.fullmatch(r"SSG [\d.]+, ST-LPIPS [\d.]+", said[1])
    events = EventAccumulator(str(work.folder() / "tensorboard"))
    events.Reload()
    assert {"val/test/ssg", "val/test/stlpips"} <= {*events.Tags()["scalars"]}
    assert events.Tags()["images"] == ["val/test"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "psnr"),
        (["model=gan"], "ssg"),
        (["model=gan", 'test.validation=["psnr", "stlpips", "ssg"]'], "stlpips"),
        (["model=gan", 'test.validation=["ssim"]'], "ssim"),
        (["model=gan", "train.checkpoint_best_by=psnr"], "psnr"),
    ],
)
def test_the_best_of_a_gan_is_not_the_nearest_to_its_psnr_start(
    work: Workplace, overrides: list[str], expected: str
) -> None:
    assert best_by(parse(work.file(), overrides=overrides)) == expected


def test_a_rankers_best_is_by_its_share_of_pairs_whatever_is_validated(tmp_path: Path) -> None:
    options = {"task": "t", "model": "ranker", "netR": {"net_type": "ranker_vgg12"}, "test": {"validation": ["ssg"]}}
    options["datasets"] = {"train": {"dataset_type": "rank", "dataroot_ranked": ["a", "b"], "H_size": 32}}
    (tmp_path / "o.json").write_text(json.dumps(options))
    metric = best_by(parse(str(tmp_path / "o.json")))
    assert Checkpoints(tmp_path, keep=1, metric=metric)._is_better(0.9, 0.5)


def test_of_a_distance_the_least_is_the_best(work: Workplace, monkeypatch) -> None:
    scores = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr("training.loop.validate", lambda *a: {"ssg": next(scores)})
    each = ("train.checkpoint_save=1", "train.checkpoint_test=1", "train.checkpoint_keep=1")
    work.run(*each, "train.iterations=3", "train.checkpoint_best_by=ssg")
    assert sorted({p.name.split("_")[0] for p in (work.folder() / "models").iterdir()}) == ["2", "3"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('test.validation=["fid"]', "test.validation: fid is of whole sets, main_test.py measures it"),
        ("train.checkpoint_best_by=fid", "test.validation: fid is of whole sets"),
        ("train.checkpoint_best_by=snr", "train.checkpoint_best_by"),
    ],
)
def test_metrics_that_training_cannot_go_by_end_it_before_it_begins(
    work: Workplace, override: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        work.run(override)
    assert not work.folder().exists()


def test_validation_without_memory_names_smaller_tiles_after_the_step_is_saved(work: Workplace, monkeypatch) -> None:
    def fails(*_args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("models.model_base.ModelSR.test", fails)
    with pytest.raises(UserError, match=r"validation: the memory .* whole images; .* test\.tile=256"):
        work.run("train.iterations=3", "train.checkpoint_test=2", "train.checkpoint_save=100")
    assert saved_steps(work.folder() / "models") == [2]


def no_memory(*_args):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def no_place(*_args):
    raise UserError("images/x.png cannot be written")


@pytest.mark.parametrize(
    ("where", "fails", "told"),
    [
        ("evaluation.metrics.Measurer.measure", no_memory, "validation: the memory"),
        ("models.model_base.ModelSR.feed_data", None, "validation: the memory"),
        ("training.validate.imsave", no_place, "cannot be written"),
    ],
)
def test_whatever_fails_in_a_validation_the_step_is_saved_first(
    work: Workplace, monkeypatch, where: str, fails, told: str
) -> None:
    if fails is None:  # of batches of validation alone, which say what they need
        whole = ModelSR.feed_data
        fails = lambda self, data, **how: no_memory() if how else whole(self, data)  # noqa: E731
    monkeypatch.setattr(where, fails)
    with pytest.raises(UserError, match=told):
        work.run("train.iterations=3", "train.checkpoint_test=2", "train.checkpoint_save=100")
    assert saved_steps(work.folder() / "models") == [2]


def test_metrics_that_one_process_lacks_are_left_out_in_all(work: Workplace, monkeypatch) -> None:
    monkeypatch.setattr("utils.utils_dist.gathered", lambda own: [own, {"stlpips": "no weights there"}])
    opt = parse(work.file(), overrides=['test.validation=["psnr", "stlpips"]'])
    assert validation_measurer(opt, torch.device("cpu")).names == ["psnr"]
    opt = parse(work.file(), overrides=['test.validation=["psnr"]', "train.checkpoint_best_by=stlpips"])
    with pytest.raises(UserError, match="stlpips cannot be had: no weights there"):
        validation_measurer(opt, torch.device("cpu"))


@pytest.mark.parametrize("layouts", [("false", "true"), ("true", "false")])
def test_a_run_goes_on_in_another_memory_layout_with_the_same_moments(work: Workplace, layouts) -> None:
    work.options["netG"] = {"net_type": "rrdbnet", "nf": 8, "nb": 1, "gc": 4}
    same = (f"train.channels_last={layouts[0]}", "datasets.test=null", "task=same")
    work.run("train.iterations=4", *same)
    other = ("datasets.test=null", "task=other")
    work.run("train.iterations=2", f"train.channels_last={layouts[0]}", *other)
    work.run("train.iterations=4", f"train.channels_last={layouts[1]}", *other)
    moments = [
        [state["exp_avg_sq"] for state in work.saved(4, task)["optimizerG"]["state"].values()]
        for task in ("same", "other")
    ]
    for a, b in zip(*moments, strict=True):
        # Convolutions add in another order; scrambled, the moments of two steps in four were off by a fifth and more.
        assert (a - b).abs().sum() < 0.01 * a.abs().sum()


def test_an_optimizer_file_of_something_else_is_one_line(work: Workplace) -> None:
    work.run("train.iterations=2", "datasets.test=null")
    forget_manifests(work.folder())
    path = work.folder() / "models" / "2_optimizerG.pth"
    good = torch.load(path, weights_only=True)
    turned = {**good["state"], 0: {**good["state"][0], "exp_avg": torch.zeros(3, 3)}}
    lacking = {**good["state"], 0: {"step": good["state"][0]["step"]}}
    others: list[Any] = [[1, 2], "text", {}, {**good, "param_groups": 3}, {**good, "state": []}, {"w": torch.ones(2)}]
    for content in (*others, {**good, "state": turned}, {**good, "state": lacking}):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"2_optimizerG\.pth: does not fit this run's optimizer") as caught:
            work.run("train.iterations=3", "datasets.test=null")
        assert "\n" not in str(caught.value)


def test_leftovers_of_a_later_step_do_not_push_out_what_is_saved_now(work: Workplace) -> None:
    work.run("train.checkpoint_keep=1", "train.iterations=2", "datasets.test=null")
    shutil.copy(work.folder() / "models" / "2_G.pth", work.folder() / "models" / "9_G.pth")
    work.run("train.checkpoint_keep=1", "train.iterations=3", "datasets.test=null")
    assert set(work.saved(3)) == {"G", "E", "optimizerG"}
    assert set(work.saved(2)) == set()


def test_a_perfect_score_does_not_break_the_next_run(work: Workplace, monkeypatch) -> None:
    monkeypatch.setattr("training.loop.validate", lambda *a: {"psnr": float("inf"), "ssim": 1.0})
    work.run("train.iterations=2")
    work.run("train.iterations=3")  # JSON has no infinity: the state holds null
    assert "done at step 3" in work.log()


def test_images_without_ground_truth_are_shown_and_not_measured(work: Workplace) -> None:
    only_L = ["datasets.test=null", "datasets.test_real.dataset_type=l"]
    work.run(*only_L, f"datasets.test_real.dataroot_L={work.root / 'T'}", "train.iterations=2")
    assert "PSNR" not in work.log()
    grid = imread_uint(str(work.folder() / "images" / "test_real_00000002.png"))
    assert grid.shape == (160 + 160, 2 * 192, 3)  # L and E; at most 192 pixels a side


# -------------------------------------------------------------------------------------------------- broken numbers


def test_a_loss_that_is_not_finite_is_named_and_nothing_is_saved(work: Workplace, monkeypatch) -> None:
    work.run("train.iterations=2")
    before = tree(work.folder() / "models")
    calls = iter([False, True])

    class Breaks(nn.L1Loss):
        def forward(self, E, H):
            return super().forward(E, H) * (float("nan") if next(calls) else 1.0)

    monkeypatch.setattr("models.model_base.pixel_loss", lambda *a: Breaks())
    with pytest.raises(UserError, match="step 4: G_loss is nan") as error:
        work.run("train.checkpoint_save=2")
    assert "\n" not in str(error.value)
    assert tree(work.folder() / "models") == before


def test_bad_steps_are_left_out_named_and_counted_until_too_many_come_in_a_row(work: Workplace, monkeypatch) -> None:
    class Breaks(nn.L1Loss):
        steps = 0

        def forward(self, E, H):
            Breaks.steps += 1
            return super().forward(E, H) * (math.nan if Breaks.steps in (2, 4, 5, 8, 9, 10) else 1)

    monkeypatch.setattr("models.model_base.pixel_loss", lambda *a: Breaks())
    options = ("train.skip_bad_steps=3", "train.checkpoint_save=4", "train.checkpoint_print=3", "datasets.test=null")
    work.run(*options, "train.iterations=6")
    log = work.log()
    assert re.search(
        r"step 2: G_loss is nan, the step is left out \(1 in a row, .* at 3; 1 in all\); images: \S+/H/", log
    )
    assert re.search(r"step 5: G_loss is nan, the step is left out \(2 in a row, .* at 3; 3 in all\)", log)
    assert re.search(r"step 6/6 .* \| G_loss 0\.\d+ bad_steps 3 G_grad \S+$", log, re.MULTILINE)
    assert "bad steps left out since step 0: 3" in log
    # What is due at step 4 waits for a sound one: weights that make losses nan may be what is wrong.
    assert {p.name.partition("_")[0] for p in (work.folder() / "models").iterdir()} == {"6"}
    before = tree(work.folder() / "models")
    with pytest.raises(UserError, match=r"step 10: G_loss is nan, bad step 3 of 3 in a row .*; images: \S+/H/"):
        work.run(*options, "train.iterations=12")
    assert tree(work.folder() / "models") == before


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were(work: Workplace) -> None:
    model = work.model()
    before = [p.clone() for p in model.netG.parameters()]
    weight = next(model.netG.parameters())
    term = (weight * 0).sum().sqrt()  # 0, with an infinite slope times 0
    model.backward("G", {"G_loss": term})
    with pytest.raises(UserError, match="G_grad is nan"):
        model.update(7)
    assert all(torch.equal(a, b) for a, b in zip(before, model.netG.parameters(), strict=True))


@pytest.mark.parametrize("lr", ["1e20", "1e30"])
def test_a_wild_learning_rate_never_costs_the_good_checkpoint(work: Workplace, lr: str) -> None:
    work.run("train.iterations=2")
    good = tree(work.folder() / "models")
    with pytest.raises(UserError, match=r"step [345]: .* (is|are) (nan|inf|not finite)"):
        work.run(f"train.G_optimizer_lr={lr}", "train.checkpoint_save=3", "train.checkpoint_keep=1")
    assert tree(work.folder() / "models") == good
    work.run("train.iterations=3")  # and a sane rate goes on from it
    assert "done at step 3" in work.log()


def test_weights_that_are_not_finite_are_not_saved(work: Workplace, tmp_path: Path) -> None:
    model = work.model()
    with torch.no_grad():
        next(model.netG.parameters())[0] = float("inf")
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="weights or output of netG are not finite"):
        model.save(tmp_path / "models", 1)
    assert list((tmp_path / "models").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another process")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_whole_group_saves_and_the_run_can_go_on(work: Workplace, number: signal.Signals) -> None:
    # Spawned workers start with Python's own handlers; Ctrl-C in a terminal reaches them too.
    endless = ("train.iterations=null", "train.checkpoint_save=1000000", "datasets.test=null")
    start = (
        f"import torch.multiprocessing as m; m.set_start_method('spawn', force=True); import {'main_train_psnr'} as s"
    )
    code = f"{start}; from utils.utils_error import run; run(s.main)"
    command = [sys.executable, "-c", code, "--opt", work.file(), *endless, "datasets.train.dataloader_num_workers=1"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2 "):
            break
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    step = int(re.search(r"stopped by a signal at step (\d+)", out)[1])
    assert set(work.saved(step)) == {"G", "E", "optimizerG"}
    work.run(f"train.iterations={step + 1}")
    assert f"resumed at step {step}" in work.log()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_schedulers_warning_makes_its_sigterm_no_second_signal_and_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert stop.received == signal.SIGUSR1
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------------- mistakes of the user


def test_a_mistake_is_one_line_and_status_2_of_the_script(work: Workplace) -> None:
    process = script(work, "datasets.train.dataroot_H=/nowhere")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert re.fullmatch(r"error: datasets\.train\.dataroot_H: there is no /nowhere; put .*=FOLDER\n", err)
    assert out == ""
    assert not (work.root / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["datasets.test.dataroot_H=/nowhere"], r"datasets\.test\.dataroot_H: there is no /nowhere"),
        (["datasets.train.dataroot_L=/nowhere"], r"datasets\.train\.dataroot_L: there is no /nowhere"),
        (["datasets.train.dataroot_H="], r"dataroot_H is not set"),
        (["datasets.train.dataroot_H={root}/empty"], r"empty"),
        (["datasets.train.dataroot_H={root}/o.json"], r"o\.json"),
        (["path.pretrained_netG=zoo/G.pth"], r"path\.pretrained_netG: there is no file zoo/G.pth.*random weights"),
        (
            ["path.pretrained_netG=zoo/BSRNet.pth"],
            r"no file zoo/BSRNet\.pth; fetch it: python main_dow\w+\.py --models BSRN",
        ),
        (["path.pretrained_netG=zoo/spsr"], r"no file zoo/spsr; get it from https://"),
        (["path.pretrained_netD=zoo/D.pth", "model=gan"], r"path\.pretrained_netD: there is no file"),
        (["path.pretrained_netE=zoo/E.pth"], r"path\.pretrained_netE: there is no file"),
        (["path.pretrained_netG={root}/bad.pth"], r"bad\.pth: .*damaged"),
        (["path.pretrained_netG={root}/other.pth"], r"other\.pth does not fit SRVGGNetCompact"),
        (["train.F_lossfn_weight=1", "path.pretrained_netF=zoo/vgg.pth"], r"path\.pretrained_netF: there is no file"),
        (["train.F_lossfn_weight=1", "path.pretrained_netF={root}/other.pth"], r"not the weights of VGG19"),
        (["train.ssl_l1_weight=1", "train.ssl_mode=cuda"], r"train\.ssl_mode: "),
        (["datasets.train.H_size=64"], r"[0-9] problems.*smaller than H_size 64"),
        (["path.root={root}/o.json"], r"path\.root: .*cannot be written"),
        (["task=" + "x" * 300], r"task: .*at most 200 characters"),
    ],
)
def test_what_is_missing_stops_in_one_line_before_anything_is_written(work, overrides, named) -> None:
    (work.root / "empty").mkdir()
    (work.root / "bad.pth").write_bytes(b"PK nonsense")
    torch.save({"weight": torch.zeros(3)}, work.root / "other.pth")
    with pytest.raises(UserError, match=named) as error:
        work.run(*[o.replace("{root}", str(work.root)) for o in overrides])
    assert "\n" not in str(error.value)
    assert not (work.root / "runs").exists()


def test_weights_of_the_perceptual_loss_that_cannot_be_had_stop_at_once(work: Workplace, monkeypatch) -> None:
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(work.root / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"VGG19.*no network.*path\.pretrained_netF"):
        work.run("train.F_lossfn_weight=1")
    assert not (work.root / "runs").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused(work: Workplace, monkeypatch) -> None:
    monkeypatch.setattr("utils.utils_dist.world_size", lambda: 2)
    with pytest.raises(UserError, match=r"dataloader_batch_size: 3 cannot be shared by 2 processes"):
        work.run("datasets.train.dataloader_batch_size=3")
    assert not (work.root / "runs").exists()


def test_an_image_too_small_is_listed_by_name_and_size(work: Workplace) -> None:
    imsave(photograph(20, 24), str(work.root / "H" / "small.png"))
    with pytest.raises(UserError, match="1 problem with the train images") as error:
        work.run()
    assert "small.png (24x20)" in str(error.value)
    assert not (work.root / "runs").exists()


def test_images_that_cannot_be_read_are_named_and_others_take_their_place(work: Workplace, caplog) -> None:
    data = (work.root / "H" / "0.png").read_bytes()
    (work.root / "H" / "cut.png").write_bytes(data[: len(data) // 2])
    (work.root / "H" / "text.jpg").write_text("not an image")
    work.run()
    for word in ("cut.png", "text.jpg"):
        assert word in caplog.text
    assert "done at step 4" in caplog.text


def test_an_image_that_breaks_while_training_is_one_line_from_a_worker_too(work: Workplace, monkeypatch) -> None:
    monkeypatch.setattr("training.loop._make_run_folder", lambda *a: _break_images(work))
    work.options["path"]["root"] = str(work.root / "runs")
    with pytest.raises(UserError) as error:
        work.run("datasets.train.dataloader_num_workers=1")
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    assert ".png" in str(error.value)


class Worker(blindsr.DatasetBlindSR):
    """A data set whose reading process meets ``trouble``."""

    trouble: Callable[[], None]

    def __getitem__(self, key):
        if torch.utils.data.get_worker_info():
            type(self).trouble()
        return super().__getitem__(key)


def fail(error: Exception) -> Callable[[], None]:
    def trouble() -> None:
        raise error

    return trouble


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is inherited by a fork")
@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            r"reads images was stopped \(killed\).*num_workers",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"/dev/shm is too small.*--shm-size=8g.*num_workers=0"),
        (lambda: os._exit(3), r"a process that reads images was stopped \(it ended unexpectedly\)"),
        (fail(MemoryError("Unable to allocate 3 TiB")), r"out of memory \(Unable to allocate 3 TiB\); take smaller"),
        (fail(cv2.error("error: (-4:Insufficient memory) Failed to allocate 9 bytes")), "out of memory"),
        (fail(OSError(5, "Input/output error", "a.png")), r"Input/output error: 'a\.png'"),
        (fail(RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")), r"/dev/shm is too"),
    ],
    ids=["killed", "bus_error", "ended", "memory", "opencv_memory", "disk", "shared_memory"],
)
def test_trouble_of_a_reading_process_is_one_line(work: Workplace, monkeypatch, capsys, trouble, named) -> None:
    monkeypatch.setattr(Worker, "trouble", staticmethod(trouble), raising=False)
    monkeypatch.setattr("data.select_dataset.DatasetBlindSR", Worker)
    with pytest.raises(SystemExit, match="2"):
        run(lambda: work.run("datasets.train.dataloader_num_workers=1", "datasets.test=null"))
    assert re.fullmatch(rf"error: .*{named}.*\n", capsys.readouterr().err)


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is inherited by a fork")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_are_killed_cost_a_restart_of_them_and_nothing_else(
    work: Workplace, monkeypatch, workers: int
) -> None:
    whole = ModelBase.update

    def killed_in_a_step(self: ModelBase, current_step: int) -> bool:
        if current_step == 2:
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
        return whole(self, current_step)

    # More steps than there can be batches that were handed over before.
    last = ("train.iterations=12", "train.checkpoint_save=12", "datasets.test=null")
    work.run(*last, "task=whole")
    monkeypatch.setattr(ModelBase, "update", killed_in_a_step)
    work.run(*last, f"datasets.train.dataloader_num_workers={workers}")
    assert len(re.findall(r"reads images .*; all start anew \(1 of at most 3 times in a row\)", work.log())) == 1
    assert_same(work.saved(12, "whole"), work.saved(12))


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is inherited by a fork")
@pytest.mark.parametrize("times", [3, 4])
def test_a_worker_may_die_three_times_in_a_row_at_one_image(work: Workplace, monkeypatch, times: int) -> None:
    deaths = work.root / "deaths"
    deaths.write_bytes(b"")

    def trouble() -> None:
        if deaths.stat().st_size < times:
            with deaths.open("ab") as file:
                file.write(b".")
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Worker, "trouble", staticmethod(trouble), raising=False)
    work.run("task=whole", "datasets.test=null")
    monkeypatch.setattr("data.select_dataset.DatasetBlindSR", Worker)
    one = ("datasets.train.dataloader_num_workers=1", "datasets.test=null")
    if times > 3:
        with pytest.raises(UserError, match=r"reads images was stopped \(killed\)"):
            work.run(*one)
    else:
        work.run(*one)
        assert_same(work.saved(4, "whole"), work.saved(4))
    assert work.log().count("start anew (") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is inherited by a fork")
def test_a_fault_of_the_program_in_a_reading_process_shows_its_traceback(work: Workplace, monkeypatch) -> None:
    monkeypatch.setattr(Worker, "trouble", staticmethod(fail(ZeroDivisionError("a fault"))), raising=False)
    monkeypatch.setattr("data.select_dataset.DatasetBlindSR", Worker)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        work.run("datasets.train.dataloader_num_workers=1", "datasets.test=null")


@pytest.mark.parametrize("name", ["models", "images", "options", "tensorboard", "train.log"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_stands_in_the_way_of_a_runs_files_stops_it_before_anything_is_built(
    work: Workplace, monkeypatch, name: str, kind: str
) -> None:
    if (kind == "file") == (name == "train.log"):
        pytest.skip("that is what it should be")
    if kind == "link" and os.name == "nt":
        pytest.skip("Windows asks for a privilege to make one")
    monkeypatch.setattr("training.loop.define_Model", None)
    work.folder().mkdir(parents=True)
    path = work.folder() / name
    if kind == "link":
        path.symlink_to(work.root / "nowhere")
    elif kind == "file":
        path.write_text("")
    else:
        path.mkdir()
    before = sorted(work.folder().rglob("*"))
    with pytest.raises(UserError, match=rf"{name} is not a (file|folder) that can be written; move it away"):
        work.run()
    assert sorted(work.folder().rglob("*")) == before


def test_a_batch_that_no_machine_can_hold_is_refused(work: Workplace) -> None:
    with pytest.raises(UserError, match=r"dataloader_batch_size, H_size: 1000000000 patches of 32 px need 11,444 GiB"):
        work.run("datasets.train.dataloader_batch_size=1000000000")
    assert not (work.root / "runs").exists()


def _break_images(work: Workplace) -> None:
    (work.folder() / "models").mkdir(parents=True)
    for path in (work.root / "H").iterdir():
        path.write_bytes(b"")


# ------------------------------------------------------------------------------------------------ one step, by hand


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in unwrap(network).parameters()]


def changed(before: list[torch.Tensor], network: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def gradient_norm(network: nn.Module) -> float:
    return torch.stack([p.grad.norm() for p in network.parameters()]).norm().item()


def step(model, batch, number: int) -> None:
    model.update_learning_rate(number)
    model.feed_data(batch)
    model.optimize_parameters(number)


def test_the_first_steps_train_the_discriminator_alone(work: Workplace) -> None:
    model, batch = work.model(*GAN, "train.D_init_iters=2"), work.batch()
    assert isinstance(model, ModelGAN)
    before = weights(model.netG)
    for number in (1, 2):
        before_D = weights(model.netD)
        step(model, batch, number)
        assert changed(before_D, model.netD)
        assert not changed(before, model.netG)
        assert not changed(before, model.netE)
        assert "G_loss" not in model.current_log()
    step(model, batch, 3)
    assert changed(before, model.netG)
    assert changed(before, model.netE)


def test_the_generator_steps_once_in_d_update_ratio_steps(work: Workplace) -> None:
    model, batch = work.model(*GAN, "train.D_update_ratio=3"), work.batch()
    moved, logged = [], []
    for number in range(1, 7):
        before, before_D = weights(model.netG), weights(model.netD)
        step(model, batch, number)
        moved.append(changed(before, model.netG))
        logged.append("G_loss" in model.current_log())
        assert changed(before_D, model.netD)
    assert moved == logged == [False, False, True, False, False, True]


def test_the_generators_step_leaves_no_gradient_in_the_discriminator(work: Workplace) -> None:
    with_D = work.model("model=gan", "train.D_lossfn_weight=1", seed=3)
    without = work.model("model=gan", "train.D_lossfn_weight=0", seed=3)
    batch = work.batch()
    step(with_D, batch, 1), step(without, batch, 1)
    assert not changed(weights(work.model("model=gan", seed=3).netD), without.netD)
    # D's own step, recomputed from the same start on the same E, gives the gradients that the step left.
    fresh = work.model("model=gan", "train.D_lossfn_weight=1", seed=3)
    fresh.feed_data(batch)
    with torch.no_grad():
        E = fresh.netG(fresh.L)
    fresh.netD(E)  # the generator's look at D turns the power iteration of the spectral norm on by one
    real, fake = fresh.netD(fresh.H), fresh.netD(E)
    sum(fresh.gan.discriminator(real, fake)).backward()
    for a, b in zip(fresh.netD.parameters(), with_D.netD.parameters(), strict=True):
        # The two sum the same terms, in another order: float32 noise.
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["gan", "ragan", "ragan_basicsr", "lsgan", "wgan", "softplusgan"])
def test_every_gan_type_does_a_step(work: Workplace, kind: str) -> None:
    model = work.model("model=gan", f"train.gan_type={kind}")
    before = weights(model.netG)
    step(model, work.batch(), 1)
    assert changed(before, model.netG)


@pytest.mark.parametrize("kind", ["l1", "l2", "l2sum", "charbonnier", "ssim"])
def test_every_pixel_loss_does_a_step_and_is_weighted(work: Workplace, kind: str) -> None:
    batch = work.batch()
    logs = []
    for weight in (1.0, 0.25):
        model = work.model(f"train.G_lossfn_type={kind}", f"train.G_lossfn_weight={weight}")
        before = weights(model.netG)
        step(model, batch, 1)
        assert changed(before, model.netG)
        logs.append(model.current_log()["G_loss"])
    assert logs[0] > 0
    assert logs[1] == pytest.approx(0.25 * logs[0], rel=1e-6)  # float32 rounding


def test_each_term_is_its_weight_times_its_loss(work: Workplace) -> None:
    weighted = ("train.G_lossfn_weight=3", "train.D_lossfn_weight=0.7", "train.color_weight=2")
    model, batch = work.model(*GAN, *weighted), work.batch()
    model.feed_data(batch)
    with torch.no_grad():
        E = model.netG(model.L)
        D_loss = (model.netD(E) - 1).square().mean()  # lsgan
    terms = {name: t.item() for name, t in (model.fidelity_terms(E) | model.shown).items()}
    assert terms["G_loss"] == pytest.approx(3 * (E - batch["H"]).abs().mean().item(), rel=1e-6)  # float32 rounding
    assert terms["color"] == pytest.approx(2 * color_loss(E, batch["H"]).item(), rel=1e-6)
    assert model.ssl is not None
    model.ssl.l1_weight = model.ssl.kl_weight = 1.0
    _, l1, kl = model.ssl.parts(E, batch["H"])
    assert terms["ssl"] == pytest.approx(50 * (l1 + kl).item(), rel=1e-6)
    assert model.shown["ssl_l1"].item() == pytest.approx(50 * l1.item(), rel=1e-6)
    model = work.model(*GAN, *weighted)
    step(model, batch, 1)
    assert model.current_log()["D_loss"] == pytest.approx(0.7 * D_loss.item(), rel=1e-5)


def test_every_option_of_the_self_similarity_loss_reaches_it(work: Workplace) -> None:
    changed = {
        "ssl_l1_weight": 3.0,
        "ssl_kl_weight": 4.0,
        "kernel_size_search": 7,
        "kernel_size_window": 5,
        "sigma": 0.5,
        "generalization": False,
        "mask_stride": 2,
        "mask_threshold": 11.0,
        "ssl_mode": "boxsum",
        "search_border": "image",
    }
    ssl = work.model(*GAN, *(f"train.{name}={json.dumps(value)}" for name, value in changed.items())).ssl
    assert ssl is not None
    theirs = {"ssl_l1_weight": "l1_weight", "ssl_kl_weight": "kl_weight", "mask_threshold": "threshold"}
    assert {name: getattr(ssl, theirs.get(name, name)) for name in changed} == changed


def test_clipping_limits_what_the_optimizer_sees(work: Workplace) -> None:
    batch, seen = work.batch(), {}
    for clip in ("null", "0", "1e-3"):
        model = work.model(f"train.G_optimizer_clipgrad={clip}", "train.G_lossfn_type=l2sum")
        step(model, batch, 1)
        seen[clip] = (gradient_norm(model.netG), model.current_log()["G_grad"])
    assert seen["null"][0] == pytest.approx(seen["null"][1], rel=1e-5)  # the order of a float32 sum
    assert seen["0"] == seen["null"]
    assert seen["1e-3"][0] == pytest.approx(1e-3, rel=1e-3)  # torch divides by the norm + 1e-6
    assert seen["1e-3"][1] == pytest.approx(seen["null"][1])  # logged before clipping
    assert seen["null"][0] > 1


def test_clipping_the_discriminator_is_its_own_option(work: Workplace) -> None:
    model = work.model("model=gan", "train.D_optimizer_clipgrad=1e-4")
    step(model, work.batch(), 1)
    norms = {
        s: torch.stack([p.grad.norm() for p in n.parameters()]).norm().item()
        for s, n in model.networks.items()
        if s != "E"
    }
    assert norms["D"] == pytest.approx(1e-4, rel=0.02)  # torch divides by the norm + 1e-6
    assert norms["G"] > 1e-3


def test_the_average_is_the_one_computed_by_hand(work: Workplace) -> None:
    model, batch = work.model("train.E_decay=0.9"), work.batch()
    expected = weights(model.netG)  # without a file of its own E starts as a copy of G
    for number in range(1, 5):
        step(model, batch, number)
        expected = [0.9 * e + 0.1 * g for e, g in zip(expected, weights(model.netG), strict=True)]
    for e, mine in zip(expected, model.netE.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), e, rtol=1e-6, atol=1e-7)  # lerp rounds in another order


def test_the_average_takes_over_running_statistics(work: Workplace) -> None:
    work.options["netG"] = {"net_type": "msrresnet0", "nc": 8, "nb": 1, "act_mode": "BR"}
    model = work.model()
    step(model, work.batch(), 1)
    pairs = list(zip(model.netG.named_buffers(), model.netE.buffers(), strict=True))
    assert pairs
    assert all(torch.equal(mine, e) for (_, mine), e in pairs)
    assert any(name.endswith("running_mean") and bool(mine.any()) for (name, mine), _ in pairs)


def test_without_an_average_the_generator_itself_is_tested_and_saved(work: Workplace) -> None:
    work.run("train.E_decay=0", "train.iterations=2")
    assert set(work.saved(2)) == {"G", "optimizerG"}
    assert "PSNR" in work.log()


def test_a_pretrained_generator_starts_the_average_too(work: Workplace) -> None:
    work.run("task=first", "train.iterations=2")
    start = work.folder("first") / "models" / "2_G.pth"
    model = work.model(f"path.pretrained_netG={start}", seed=9)
    assert_same(dict(unwrap(model.netG).state_dict()), torch.load(start, weights_only=True))
    assert_same(dict(model.netE.state_dict()), torch.load(start, weights_only=True))


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("model", [("model=plain",), GAN], ids=["plain", "gan"])
def test_a_run_that_goes_on_needs_none_of_the_files_it_started_from(work: Workplace, model, damaged: bool) -> None:
    work.run(*model, "task=first", "train.iterations=2")
    shutil.copytree(work.folder("first") / "models", work.root / "start")
    starts = [f"path.pretrained_net{net}={work.root}/start/2_{net}.pth" for net in ("GDE" if len(model) > 1 else "GE")]
    work.run(*model, *starts, "train.iterations=2")
    work.run(*model, *starts, "task=here")
    if damaged:
        for path in (work.root / "start").iterdir():
            path.write_bytes(path.read_bytes()[:500])
    else:
        (work.root / "start").rename(work.root / "gone")
    work.run(*model, *starts)
    assert_same(work.saved(4), work.saved(4, "here"))
    log = work.log()
    for start in starts:
        key, _, path = start.partition("=")
        assert log.count(f"{key}: {path} is gone, and not needed: step 2 of the run has all weights") == (not damaged)


def cut_off_in_its_first_save(work: Workplace) -> None:
    work.run("task=first", "train.iterations=2")
    models = work.folder() / "models"
    models.mkdir(parents=True)
    Checkpoints(models, None).begin(0)
    shutil.copy(work.folder("first") / "models" / "2_G.pth", models)


def test_a_start_file_is_read_again_where_the_first_save_was_cut_off(work: Workplace) -> None:
    cut_off_in_its_first_save(work)
    start = work.folder("first") / "models" / "2_G.pth"
    for task in ("run", "new"):
        work.run(f"path.pretrained_netG={start}", f"task={task}", "train.iterations=2")
    assert_same(work.saved(2), work.saved(2, "new"))


def test_a_start_file_is_needed_where_there_is_no_complete_checkpoint(work: Workplace) -> None:
    cut_off_in_its_first_save(work)
    before = tree(work.folder() / "models")
    with pytest.raises(UserError, match=r"path\.pretrained_netG: there is no file zoo/G\.pth; put it there, or begin"):
        work.run("path.pretrained_netG=zoo/G.pth")
    assert tree(work.folder() / "models") == before


def test_channels_last_changes_the_layout_of_every_network_and_not_what_is_learned(work: Workplace) -> None:
    models = [work.model(*GAN, f"train.channels_last={last}") for last in ("false", "true")]
    for model in models:
        for number in range(2):
            model.feed_data(work.batch(*GAN, number=number))
            model.optimize_parameters(number + 1)
    for first, last in zip(models[0].networks.values(), models[1].networks.values(), strict=True):
        for a, b in zip(first.parameters(), last.parameters(), strict=True):
            assert b.dim() < 4 or b.is_contiguous(memory_format=torch.channels_last)
            # Convolutions add in another order; Adam turns rounding of gradients near 0 into steps of up to 1e-3 each.
            assert (a - b).abs().max() <= 4e-3
            assert (a - b).abs().mean() < 1e-5


def test_an_output_in_channels_last_has_the_loss_and_the_gradients_of_its_contiguous_copy(work: Workplace) -> None:
    """RRDBNet ends in a convolution, so its output has that layout; the small network above ends in a pixel shuffle."""
    rrdb = ("netG.net_type=rrdbnet", "netG.nf=8", "netG.nb=1", "netG.gc=4")
    settings = ("train.G_lossfn_weight=0", "train.channels_last=true", *rrdb, *SSL)
    work.options["netG"] = {}
    logs, gradients, images = [], [], []
    for mode in ("pytorch", "auto"):
        model = work.model(*settings, f"train.ssl_mode={mode}")
        model.feed_data(work.batch(*settings))
        model.optimize_parameters(1)
        assert not model.E.is_contiguous()
        assert model.E.is_contiguous(memory_format=torch.channels_last)
        logs.append(model.current_log())
        gradients.append([p.grad for p in unwrap(model.netG).parameters()])
        images.append((model.E.detach().contiguous(), model.H))
    specified = SelfSimilarityLoss(50, 50, 9, 3, ssl_mode="pytorch")(*images[0])
    assert sum(logs[0][name] for name in ("ssl_l1", "ssl_kl")) == pytest.approx(specified.item(), rel=1e-5)
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    # Float32; where two graphs are nearly equal, rounding picks the sign of L1's gradient. A misread layout is off by
    # more than a quarter.
    for right, ours in zip(*gradients, strict=True):
        assert (ours - right).norm() <= 1e-3 * right.norm()


def test_a_milestone_acts_from_its_step_on(work: Workplace) -> None:
    rates = ("train.G_optimizer_lr=1e-3", "train.G_scheduler_milestones=[5, 3, 5]", "train.G_scheduler_gamma=0.1")
    model = work.model("model=gan", *rates, "train.D_scheduler_milestones=[2]", "train.D_scheduler_gamma=0.5")
    seen = {"G": [], "D": []}
    for number in range(1, 7):
        model.update_learning_rate(number)
        for name, optimizer in model.optimizers.items():
            seen[name].append(optimizer.param_groups[0]["lr"])
    assert seen["G"] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-6, 1e-6])
    assert seen["D"] == pytest.approx([1e-3, *[5e-4] * 5])
    # KAIR's own class, stepped to the same number, agrees.
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 3, 5], 0.1)
    optimizer.step()
    for number in range(1, 7):
        scheduler.step()
        assert scheduler.get_last_lr()[0] == pytest.approx(seen["G"][number - 1])


# -------------------------------------------------------------------------------------------------- kinds of runs


def test_a_kair_style_file_trains(work: Workplace) -> None:
    text = KAIR["train_msrresnet_gan"].replace('"superresolution" ', json.dumps(str(work.root / "runs")))
    text = text.replace("trainsets/trainH", str(work.root / "H")).replace("testsets/set5", str(work.root / "T"))
    (work.root / "kair.json").write_text(text, encoding="utf-8")
    work.file = lambda: str(work.root / "kair.json")  # type: ignore[method-assign]
    small = ("netG.nc=8", "netG.nb=1", "netD.net_type=discriminator_patchgan", "netD.base_nc=4", "netD.n_layers=1")
    fast = ("datasets.train.H_size=32", "datasets.train.dataloader_batch_size=2", "train.F_lossfn_weight=0")
    work.run(*small, *fast, "train.iterations=2", "datasets.train.dataloader_num_workers=0")
    assert set(work.saved(2, "msrresnet_gan")) == {"G", "E", "D", "optimizerG", "optimizerD"}


def test_masks_from_files_train_and_equal_those_made_on_line(work: Workplace) -> None:
    (work.root / "M").mkdir()
    for path in (work.root / "H").iterdir():
        image = torch.from_numpy(imread_uint(str(path))).permute(2, 0, 1)[None] / 255
        imsave((edge_mask(image)[0, 0].numpy() * 255).astype(np.uint8), str(work.root / "M" / path.name))
    mask = ("datasets.train.dataset_type=srmask", f"datasets.train.dataroot_H_mask={work.root / 'M'}")
    work.run(*GAN, *mask, "train.iterations=2")
    assert "ssl_kl" in work.log()
    batch = work.batch(*mask)
    on_line = edge_mask(batch["H"])
    # The mask of a patch mirrors at the patch's border, the mask of a file saw the pixels beyond.
    assert torch.equal(batch["mask"][..., 1:-1, 1:-1], on_line[..., 1:-1, 1:-1])
    assert on_line.any()


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_images_train_gray_and_colour(tmp_path: Path, channels: int) -> None:
    work = Workplace(tmp_path, channels=1)
    work.run(*GAN, f"n_channels={channels}", "train.iterations=2", "train.checkpoint_test=1")
    assert "PSNR" in work.log()
    assert work.saved(2)["G"]["body.0.weight"].shape[1] == channels


def test_the_similarity_loss_alone_trains_where_nothing_is_an_edge(work: Workplace) -> None:
    for path in (work.root / "H").iterdir():
        imsave(np.full((48, 48, 3), 128, np.uint8), str(path))
    alone = ("train.G_lossfn_weight=0", *SSL, "datasets.train.dataset_type=sr", "train.iterations=2")
    work.run(*alone, "datasets.test=null")
    assert re.search(r"ssl 0 .*ssl_kl 0 ssl_l1 0", work.log())


def test_batches_larger_than_the_set_work(work: Workplace) -> None:
    work.run("datasets.train.dataloader_batch_size=8", "train.iterations=2", "datasets.test=null")
    assert "3 images, batch 8" in work.log()


def test_overrides_stand_on_either_side_of_opt(work: Workplace) -> None:
    from training.loop import training_options

    opt = training_options(None, ["plain"], ["task=a", "--opt", work.file(), "scale=2"])
    assert (opt.task, opt.scale) == ("a", 2)


def test_a_file_for_another_script_is_told_which(work: Workplace) -> None:
    from training.loop import training_options

    with pytest.raises(UserError, match=r"train it with main_train_gan\.py"):
        training_options(None, ["plain"], ["--opt", work.file(), "model=gan"])


def test_keys_without_meaning_are_named_once(work: Workplace) -> None:
    work.options["merge_bn"] = False
    process = script(work, "train.iterations=1", "datasets.test=null")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out.count("merge_bn") == 1
    assert "\r" not in out + err  # no progress bar where there is no terminal


def test_a_gans_numbers_are_two_rows_of_a_terminal_and_a_line_of_the_log_in_one_order(work: Workplace, capsys) -> None:
    work.run(*GAN, "train.D_init_iters=2")
    said = capsys.readouterr().out.splitlines()
    starts = [number for number, line in enumerate(said) if re.match(r"step \d/4 ", line)]
    rows = [said[number + 1].split()[::2] for number in starts]
    assert rows == [["D_real", "D_fake"]] * 2 + [["G_loss", "ssl", "D_loss", "D_real", "D_fake"]] * 2
    assert all(len(said[number]) <= 80 and len(said[number + 1]) <= 80 for number in starts)
    names = [line.partition(" | ")[2].split()[::2] for line in work.log().splitlines() if " | " in line]
    details = ["D_fake", "D_grad", "D_real", "G_grad", "l_d_fake", "l_d_real", "ssl_kl", "ssl_l1"]
    of_D = [name for name in details if "G" not in name and "ssl" not in name]
    assert names == [of_D] * 2 + [["G_loss", "ssl", "D_loss", *details]] * 2
