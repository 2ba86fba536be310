"""Files that say which network they hold: written by training, used without the run's folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.card import card_of, network_of
from models.restorer import load_restorer
from tests.conftest import REPOSITORY
from tests.training import Workplace
from utils.utils_error import UserError
from utils.utils_option import parse

ELAN = [
    "netG.net_type=elan",
    "netG.m_elan=4",
    "netG.c_elan=12",
    "netG.n_share=1",
    "netG.window_sizes=[2, 4]",
    "netG.img_range=1.0",
]


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def restored(path: Path) -> np.ndarray:
    restorer = load_restorer(str(path), None, None, torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        return restorer.netG(torch.rand(1, 3, 8, 8)).numpy()


def test_a_file_taken_out_of_its_run_restores_as_within_it(work: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    work.run(*ELAN, "train.iterations=2")
    models, alone = work.folder() / "models", work.root / "alone"
    alone.mkdir()
    for name in ("2_E.safetensors", "2_E.pth"):
        shutil.copy(models / name, alone / name)
    expected = restored(models / "2_E.pth")
    assert np.array_equal(restored(alone / "2_E.safetensors"), expected)
    caplog.clear()
    with caplog.at_level("INFO"):  # the weights alone do not tell the windows
        assert not np.array_equal(restored(alone / "2_E.pth"), expected)
    told = [message for message in caplog.messages if "do not say all" in message]
    assert len(told) == 1
    assert "netG.window_sizes [4, 8, 16], netG.img_range 255.0 as published" in told[0]


def test_the_header_says_what_it_takes_to_use_the_file(work: Workplace) -> None:
    work.run("train.checkpoint_test=2", "train.checkpoint_save=2", "train.iterations=2", "path.license=CC-BY-4.0")
    models = work.folder() / "models"
    average, current = header(models / "2_E.safetensors"), header(models / "2_G.safetensors")
    network = json.loads(average["network"])
    assert (network["scale"], network["n_channels"], network["netG"]["net_type"]) == (4, 3, "srvgg_compact")
    assert (average["task"], average["step"], average["license"]) == ("run", "2", "CC-BY-4.0")
    assert {*json.loads(average["validation"])["test"]} == {"psnr", "ssim", "ssg"}
    assert "validation" not in current  # the average was validated
    assert average["options_sha256"] == current["options_sha256"]
    assert len(average["options_sha256"]) == 64


def test_files_of_both_kinds_hold_the_same_weights_and_stand_in_the_manifest(work: Workplace) -> None:
    work.run("train.iterations=2", "train.channels_last=true")
    models = work.folder() / "models"
    for name in ("2_G", "2_E"):
        one, other = torch.load(models / f"{name}.pth", weights_only=True), load_file(models / f"{name}.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
        assert f"{name}.safetensors" in json.loads((models / "2_state.json").read_text())["files"]


def test_old_ones_go_with_their_step_and_none_are_written_where_none_are_wanted(work: Workplace) -> None:
    work.run("train.iterations=4", "train.checkpoint_keep=1")
    models = work.folder() / "models"
    assert sorted(path.name for path in models.glob("*.safetensors")) == ["4_E.safetensors", "4_G.safetensors"]
    work.run("task=without", "train.iterations=2", "train.checkpoint_safetensors=false")
    assert not [*(work.folder("without") / "models").glob("*.safetensors")]


def test_a_start_that_was_trained_with_other_options_is_one_line(
    work: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    work.run(*ELAN, "train.iterations=2")
    start = f"path.pretrained_netG={work.folder() / 'models' / '2_E.safetensors'}"
    work.model(*ELAN, start)
    with pytest.raises(UserError, match=r"netG\.window_sizes is \[4, 2\], .* was trained with \[2, 4\];"):
        work.model(*ELAN, start, "netG.window_sizes=[4, 2]")
    work.model(*ELAN, start, "netG.window_sizes=[4, 2]", "train.G_param_strict=false")
    assert "was trained with [2, 4]" in caplog.text


def test_a_diffusion_models_file_says_its_process_too() -> None:
    opt = parse(REPOSITORY / "options" / "train_resshift_pixel_ssl.json")
    assert network_of(opt)["diffusion"]["type"] == "resshift"
    assert {*network_of(parse(REPOSITORY / "options" / "train_bsrgan_ssl.json"))} == {"scale", "n_channels", "netG"}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"format": "self-similarity/9", "network": "{}"}, "in the format self-similarity/9, known is"),
        ({"format": "self-similarity/1", "network": "{"}, "does not say which network it is"),
        ({"format": "self-similarity/1", "network": "[" * 100_000}, "does not say which network it is"),
        ({"format": "self-similarity/1", "network": '{"scale": 4}'}, "does not say which network it is"),
        ({"format": "self-similarity/1", "network": '"x"'}, "does not say which network it is"),
    ],
)
def test_a_header_that_makes_no_sense_is_one_line(tmp_path: Path, said: dict[str, str], expected: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, said)
    with pytest.raises(UserError, match=expected):
        card_of(path)


def test_files_of_others_are_told_from_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    assert card_of(path) is None
    assert card_of(tmp_path / "missing.safetensors") is None
