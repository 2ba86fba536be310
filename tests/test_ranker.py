"""Training a ranker: its pairs, by folders and by a metric, its step, its runs, and the use of what it saves."""

import csv
import importlib
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.select_dataset import define_Dataset
from main_test import main as main_test
from models.model_ranker import ModelRanker
from models.select_network import define_G
from tests.conftest import REPOSITORY, photograph
from tests.training import Workplace, assert_same
from utils.utils_error import UserError
from utils.utils_image import imread_uint, imsave, single2tensor3, uint2single
from utils.utils_option import parse
from utils.utils_resume import saved_steps

SIZE = 48
KINDS = {"sharp": 0.0, "soft": 0.8, "blurred": 2.0}  # deviation of the blur, the best first
TRAIN, TEST = "datasets.train.", "datasets.test."


class Results(Workplace):
    """Folders ``train`` and ``test`` with scenes in three qualities, and a small ranker's options."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        for phase, count in (("train", 5), ("test", 3)):
            for kind, deviation in KINDS.items():
                (root / phase / kind).mkdir(parents=True)
                for i in range(count):
                    image = photograph(SIZE + 8, SIZE + 4 * i, seed=20 * count + i)
                    image = cv2.GaussianBlur(image, (0, 0), deviation) if deviation else image
                    imsave(image, str(root / phase / kind / f"{i}.png"))
        del self.options["netG"], self.options["netD"]
        self.options |= {"model": "ranker", "netR": {"net_type": "ranker_vgg12", "base_nc": 4}}
        self.options["datasets"] = {phase: self.data(phase) for phase in ("train", "test")}
        self.options["datasets"]["train"] |= {"H_size": SIZE, "dataloader_num_workers": 0, "dataloader_batch_size": 4}

    def data(self, phase: str) -> dict[str, object]:
        folders = [str(self.root / phase / kind) for kind in KINDS]
        return {"dataset_type": "rank", "dataroot_ranked": folders}

    def pairs(self, phase: str, *overrides: str, depth: int = 2) -> list[tuple[str, str]]:
        """(better, worse) of each item: the last ``depth`` parts of their paths, as ``sharp/0``."""
        dataset = define_Dataset(parse(self.file(), overrides=overrides).datasets[phase])
        names = [[Path(p).with_suffix("").parts[-depth:] for p in files[:2]] for files in dataset.files]  # type: ignore[attr-defined]
        return [("/".join(better), "/".join(worse)) for better, worse in names]

    def table(self, text: str) -> tuple[str, ...]:
        """Overrides for a test set by a CSV file with this text beside the images."""
        (self.root / "test" / "results.csv").write_text(text, encoding="utf-8")
        return (f"{TEST}dataroot_ranked=null", f"{TEST}rank_csv={self.root / 'test' / 'results.csv'}")


@pytest.fixture
def work(tmp_path: Path) -> Results:
    return Results(tmp_path)


# --------------------------------------------------------------------------------------------------------------- pairs


def test_every_two_results_of_a_scene_make_a_pair_in_the_order_of_the_folders(work: Results) -> None:
    order = [("sharp", "soft"), ("sharp", "blurred"), ("soft", "blurred")]
    assert work.pairs("test") == [(f"{better}/{i}", f"{worse}/{i}") for i in range(3) for better, worse in order]


def test_both_images_of_a_pair_are_cut_and_turned_alike(work: Results) -> None:
    """The worse one is the other's negative: added up they are white, or they show different places."""
    negative = work.root / "train" / "negative"
    negative.mkdir()
    for path in (work.root / "train" / "sharp").iterdir():
        imsave(255 - imread_uint(str(path)), str(negative / path.name))
    folders = f'{TRAIN}dataroot_ranked=["{work.root / "train" / "sharp"}", "{negative}"]'
    dataset = define_Dataset(parse(work.file(), overrides=[folders, f"{TRAIN}H_size=32"]).datasets["train"])
    patches = set()
    for seed in range(20):
        item = dataset[(1, seed)]  # type: ignore[index]
        assert item["better"].shape == (3, 32, 32)
        # Each is a uint8 divided by 255 in float32: rounding of 1 ulp.
        torch.testing.assert_close(item["better"] + item["worse"], torch.ones(3, 32, 32), rtol=0, atol=1e-6)
        patches.add(item["better"].numpy().tobytes())
    assert len(patches) > 15  # they are random all the same


def test_a_test_pair_is_two_whole_images(work: Results) -> None:
    item = define_Dataset(parse(work.file()).datasets["test"])[4]
    for name, kind in (("better", "sharp"), ("worse", "blurred")):
        image = imread_uint(str(work.root / "test" / kind / "1.png"))
        torch.testing.assert_close(item[name], single2tensor3(uint2single(image)), rtol=0, atol=0)


def test_a_metric_gives_each_scene_its_own_order(work: Results) -> None:
    table = work.table(
        "set,image,model,niqe,mine\n"
        ",0,bicubic,9,9\n"  # which main_test.py does not save
        ",0,sharp,3.5,1\n,0,soft,2.5,2\n,0,blurred,4.5,0\n"
        ",1,sharp,3,5\n,1,soft,3,5\n,1,blurred,2,7\n"  # two are equal: no pair
        ",2.png,sharp,,1\n,2.png,soft,5,2\n,2.png,blurred,inf,3\n"  # one was not measured
    )
    lower = [
        *(("soft/0", "sharp/0"), ("soft/0", "blurred/0"), ("sharp/0", "blurred/0")),
        *(("blurred/1", "sharp/1"), ("blurred/1", "soft/1")),
        ("soft/2", "blurred/2"),
    ]
    assert work.pairs("test", *table) == lower
    reverse = work.pairs("test", *table, f"{TEST}rank_higher_better=true")
    assert {(worse, better) for better, worse in reverse} == set(lower)
    mine = work.pairs("test", *table, f"{TEST}rank_metric=mine", f"{TEST}rank_higher_better=true")
    assert mine[:3] == [("soft/0", "sharp/0"), ("soft/0", "blurred/0"), ("sharp/0", "blurred/0")]
    assert len(mine) == 3 + 2 + 3


def test_the_table_that_main_test_writes_is_one(work: Results) -> None:
    (work.root / "models").mkdir()
    for n, name in enumerate("ab"):
        torch.manual_seed(n)
        netG = define_G({"scale": 4, "netG": {"net_type": "srvgg_compact", "nf": 4, "nc": 1}})
        torch.save(netG.state_dict(), work.root / "models" / f"{name}.pth")
    models = [f"{name}={work.root / 'models' / name}.pth" for name in "ab"]
    out = work.root / "out"
    main_test(["--model_path", *models, "--gt", str(work.root / "H"), "--metrics", "psnr", "--output", str(out)])
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        psnr = {(row["image"], row["model"]): float(row["psnr"]) for row in csv.DictReader(file)}
    table = (f"{TEST}dataroot_ranked=null", f"{TEST}rank_csv={out / 'results.csv'}", f"{TEST}rank_metric=psnr")
    expected = []
    for image in ("0", "1", "2"):
        better, worse = sorted("ab", key=lambda model: -psnr[image, model])
        expected.append((f"{better}/H/{image}", f"{worse}/H/{image}"))
    assert work.pairs("test", *table, depth=3) == expected


# ------------------------------------------------------------------------------------------------------------ the step


def test_a_step_asks_for_a_lower_score_of_the_better_image(work: Results) -> None:
    model = work.model()
    assert isinstance(model, ModelRanker)
    batch = work.batch()
    model.feed_data(batch)
    with torch.no_grad():
        score = model.netR(torch.cat([batch["better"], batch["worse"]])).flatten()
    better, worse = score[:2], score[2:]
    model.feed_data(batch)
    model.optimize_parameters(1)
    log = model.current_log()
    # The same operations on the same numbers; float32 through another route of means.
    assert log["rank_loss"] == pytest.approx((better - worse + 0.5).clamp_min(0).mean().item(), abs=1e-5)
    assert log["in_order"] == (better < worse).float().mean().item()
    assert log["score_better"] == pytest.approx(better.mean().item(), abs=1e-5)
    assert log["score_worse"] == pytest.approx(worse.mean().item(), abs=1e-5)


def test_a_test_of_a_pair_uses_the_running_statistics_and_leaves_them(work: Results) -> None:
    model = work.model()
    assert isinstance(model, ModelRanker)
    data = {name: image[:1] for name, image in work.batch().items()}
    before = {name: value.clone() for name, value in model.netR.state_dict().items()}
    model.feed_data(data)
    right = model.test()
    assert model.netR.training
    assert_same(before, dict(model.netR.state_dict()))
    model.netR.eval()
    with torch.no_grad():
        assert right.tolist() == [float(model.netR(data["better"]) < model.netR(data["worse"]))]


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_ranker_learns_to_tell_blurred_images_from_sharp_ones(work: Results) -> None:
    work.run("train.iterations=40", "train.checkpoint_test=40", "train.checkpoint_save=40", "train.R_optimizer_lr=2e-3")
    log = work.log()
    shares = [float(value) for value in re.findall(r" in_order (\S+)", log)]
    losses = [float(value) for value in re.findall(r" rank_loss (\S+)", log)]
    assert losses[0] > 0.3  # untrained, about the margin
    # Seen: 1, 0.02 and 100 %; by chance they would be 0.5, 0.5 and 50 %.
    assert np.mean(shares[-10:]) > 0.95
    assert np.mean(losses[-10:]) < 0.1
    found = re.search(r"step 40 test: (\S+) % of the pairs in order", log)  # of other scenes, whole
    assert found
    assert float(found[1]) > 85


def test_a_resumed_run_equals_the_uninterrupted_one_in_every_bit(work: Results) -> None:
    work.run("task=whole", "train.iterations=4", "train.checkpoint_save=4")
    work.run("task=parts", "train.iterations=2")
    torch.manual_seed(99)  # nothing of the process survives a restart
    work.run("task=parts", "train.iterations=4")
    whole = work.saved(4, "whole")
    assert set(whole) == {"R", "optimizerR"}
    assert_same(whole, work.saved(4, "parts"))
    assert "resumed at step 2" in work.log("parts")
    assert "15 pairs of images, batch 4" in work.log("parts")


def test_the_checkpoint_that_orders_best_is_kept(work: Results) -> None:
    often = ("train.checkpoint_test=1", "train.checkpoint_save=1", "train.checkpoint_keep=1")
    shares = iter((0.5, 0.75, 0.25, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.loop.validate_ranker", lambda *a: next(shares))
        work.run(*often)
    assert saved_steps(work.folder() / "models") == [4, 2]


def test_the_learning_rate_is_the_rankers(work: Results) -> None:
    work.run("train.R_optimizer_lr=4e-3", "train.R_scheduler_milestones=[3]", "train.R_scheduler_gamma=0.25")
    assert re.findall(r" lr (\S+) ", work.log()) == ["4.00e-03", "4.00e-03", "1.00e-03", "1.00e-03"]


def test_a_trained_ranker_serves_the_gan_recipe(work: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both option files as they stand, reduced; the second is given what the first saved."""
    place = [f"path.root={work.root / 'runs'}", "netR.base_nc=4", "train.iterations=1", "train.checkpoint_print=1"]
    place += [f"{TRAIN}dataloader_num_workers=0", f"{TRAIN}dataloader_batch_size=2"]
    folders = str([str(work.root / "train" / kind) for kind in KINDS]).replace("'", '"')
    ranker = [f"{TRAIN}dataroot_ranked={folders}", f"{TRAIN}H_size={SIZE}"]
    saved = work.root / "runs" / "ranker" / "models" / "1_R.pth"
    imsave(photograph(128, 128), str(work.root / "H" / "large.png"))
    generator = [f"path.pretrained_netR={saved}", "path.pretrained_netG=null", "train.F_lossfn_weight=0"]
    generator += [f"{TRAIN}dataroot_H={work.root / 'H' / 'large.png'}", f"{TRAIN}H_size=128"]
    generator += ["netG.nf=4", "netG.nb=1", "netD.base_nc=1", "netD.input_size=128"]
    for script, name, more in (("ranker", "ranker", ranker), ("gan", "ranksrgan", generator)):
        file = REPOSITORY / "options" / f"train_{name}.json"
        monkeypatch.setattr(sys, "argv", ["main", "--opt", str(file), *place, *more])
        importlib.import_module(f"main_train_{script}").main()
    tensors = len(torch.load(saved, weights_only=True))
    assert f"loaded {tensors} of {tensors} tensors from {saved}" in work.log("ranksrgan")
    assert re.search(r" rank 0\.0\d+", work.log("ranksrgan"))


def test_a_ranker_can_start_from_another(work: Results) -> None:
    work.run("train.iterations=2")
    first = work.folder() / "models" / "2_R.pth"
    again = work.model(f"path.pretrained_netR={first}")
    assert isinstance(again, ModelRanker)
    assert_same(dict(again.netR.state_dict()), torch.load(first, weights_only=True))


# ------------------------------------------------------------------------------------------------------------ mistakes


def ranked(*folders: str) -> str:
    return f"{TRAIN}dataroot_ranked=[{', '.join(f'{chr(34)}{folder}{chr(34)}' for folder in folders)}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([ranked("{train}/sharp")], r"dataroot_ranked: takes two folders or more, the best first"),
        ([ranked("{train}/sharp", "{train}/sharp/")], r"dataroot_ranked: takes two folders or more, .* each once"),
        ([ranked("{train}/sharp", "{train}/none")], r"datasets\.train\.dataroot_ranked: there is no .*none; put"),
        ([ranked("{train}/sharp", "{root}/odd")], r"4 problems with the train images: .*no image in .*odd of its name"),
        ([ranked("{train}/sharp", "{root}/large")], r"5 problems .*\(96x96\): not the size of .*sharp"),
        ([f"{TRAIN}dataroot_ranked=null"], r"datasets\.train\.dataroot_ranked: give either this, .* or rank_csv"),
        ([f"{TRAIN}rank_csv=x.csv"], r"datasets\.train\.dataroot_ranked: give either this, .* or rank_csv"),
        ([f"{TRAIN}H_size=52"], r"2 problems with the train images: .*sharp/0\.png \(48x56\): smaller than H_size 52"),
        ([f"{TRAIN}H_size=24"], r"datasets\.train\.H_size: .* at least 32 pixels, not 24"),
        ([f"{TRAIN}dataset_type=sr"], r"datasets\.train\.dataset_type: model ranker learns from rank, not sr"),
        ([f"{TEST}dataset_type=sr"], r"datasets\.test\.dataset_type: model ranker learns from rank, not sr"),
        ([f"{TRAIN}degradation_device=gpu"], r"degradation_device: gpu, and pair_pool, are for dataset_type blindsr"),
        (["netR=null"], "netR: is required for model ranker"),
        (["train.R_optimizer_betas=[1, 0.9]"], r"train\.R_optimizer_betas: each must lie"),
        (["model=plain"], "netG: is required and missing"),
        (["model=plain", "netG.net_type=rrdb"], r"datasets\.\w+\.dataset_type: rank is for model ranker, not plain"),
        (["path.pretrained_netR=x.pth"], r"x\.pth: no such file"),
    ],
)
def test_a_mistake_is_one_line(work: Results, overrides: list[str], message: str) -> None:
    for folder, names, size in (("odd", "059", SIZE), ("large", "01234", 96)):
        (work.root / folder).mkdir()
        for name in names:
            imsave(photograph(size, size), str(work.root / folder / f"{name}.png"))
    places = {"train": str(work.root / "train"), "root": str(work.root)}
    for key, place in places.items():
        overrides = [text.replace(f"{{{key}}}", place) for text in overrides]
    with pytest.raises(UserError, match=message) as error:
        work.run(*overrides)
    assert "\n" not in str(error.value)
    assert not (work.root / "runs").exists()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("image,model,niqe\n0,sharp,1\n0,sofd,2\n", [], "no image has results of two models that differ in niqe"),
        (
            "image,model,niqe\n0,sharp,1\n7,soft,2\n",
            [],
            r"1 problem with the test images: .*7\.png: is not there, but in",
        ),
        ("image,model,piqe\n0,sharp,1\n0,soft,2\n", [], "has no column niqe; it has image, model, piqe"),
        ("image,model,niqe\n0,sharp,1\n0,soft,good\n", [], "niqe of 0 by soft is 'good', not a number"),
        (
            "image,model,mine\n0,sharp,1\n0,soft,2\n",
            [f"{TEST}rank_metric=mine"],
            "rank_higher_better: is required for mine",
        ),
        ("image,model,niqe\n", [f"{TEST}rank_csv=none.csv"], r"datasets\.test\.rank_csv: there is no none\.csv; put"),
        ("image,model,niqe\n", [f"{TEST}rank_csv={{root}}/test/sharp/0.png"], "0.png: cannot be read as a CSV file"),
    ],
)
def test_a_mistake_in_a_table_is_one_line(work: Results, text: str, overrides: list[str], message: str) -> None:
    overrides = [override.replace("{root}", str(work.root)) for override in overrides]
    with pytest.raises(UserError, match=message) as error:
        work.run(*work.table(text), *overrides)
    assert "\n" not in str(error.value)
    assert not (work.root / "runs").exists()


def test_rankers_and_generators_keep_out_of_each_others_runs(work: Results) -> None:
    work.run("train.iterations=2")
    (work.root / "plain").mkdir()
    plain = Workplace(work.root / "plain")
    plain.options["path"]["root"] = str(work.root / "runs")
    with pytest.raises(UserError, match=r"holds checkpoints that this run cannot go on from \(no 2_G\.pth"):
        plain.run()
    with pytest.raises(UserError, match="holds no generator"):
        main_test(["--model_path", str(work.folder()), "--input", str(work.root / "T")])
    with pytest.raises(UserError, match="a ranker restores no images"):
        main_test(["--opt", work.file()])
