"""Every published layout loads into every network of its family, and every bad file is one clear line."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.network_msrresnet import MSRResNet1
from models.network_rrdb import RRDB
from models.network_rrdbnet import RRDBNet, RRDBNetBasicSR
from utils.utils_checkpoint import load_network, load_state_dict, save_atomically, save_network
from utils.utils_error import UserError


def family(scale: int = 4) -> list[nn.Module]:
    return [RRDBNet(3, 3, 8, 2, 4, scale), RRDBNetBasicSR(3, 3, 8, 2, 4, scale), RRDB(3, 3, 8, 2, 4, scale)]


def old_esrgan(network: RRDB) -> dict[str, Tensor]:
    """The first release of ESRGAN wraps conv5 as well."""
    return {re.sub(r"conv5\.(?=weight|bias)", "conv5.0.", key): value for key, value in network.state_dict().items()}


@pytest.fixture
def x() -> Tensor:
    return torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [3, 4])
def test_the_rrdb_layouts_load_into_one_another_and_compute_the_same(scale: int, x: Tensor, tmp_path: Path) -> None:
    for source in family(scale):
        torch.save({"params": source.state_dict()}, tmp_path / "source.pth")
        for target in family(scale):
            report = load_network(tmp_path / "source.pth", target)
            assert report.complete
            assert report.loaded == report.total == len(target.state_dict())
            # The same operations on the same numbers.
            torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


def test_the_old_esrgan_layout_loads_into_the_whole_family(x: Tensor, tmp_path: Path) -> None:
    source = RRDB(3, 3, 8, 2, 4)
    torch.save(old_esrgan(source), tmp_path / "old.pth")
    for target in family():
        load_network(tmp_path / "old.pth", target)
        torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_basicsr_and_kair_msrresnet_names_are_one_network(scale: int, x: Tensor, tmp_path: Path) -> None:
    source, target = MSRResNet1(3, 3, 8, 2, scale), MSRResNet1(3, 3, 8, 2, scale)
    renamed = {
        key.replace("recon_trunk", "body").replace("HRconv", "conv_hr"): value
        for key, value in source.state_dict().items()
    }
    assert renamed.keys() != source.state_dict().keys()
    torch.save({"params": renamed}, tmp_path / "basicsr.pth")
    assert load_network(tmp_path / "basicsr.pth", target).complete
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


def test_averaged_weights_are_preferred_and_a_key_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "both.pth"
    torch.save({"params": {"w": torch.zeros(1)}, "params_ema": {"w": torch.ones(1)}, "iter": 5}, path)
    assert load_state_dict(path)["w"].item() == 1
    assert load_state_dict(path, "params")["w"].item() == 0
    with pytest.raises(UserError, match=r"'params_e'.*params, params_ema"):
        load_state_dict(path, "params_e")


def test_bare_prefixed_and_safetensors_weights_are_the_same_weights(tmp_path: Path) -> None:
    weights = {"a.weight": torch.rand(2), "b.bias": torch.rand(3)}
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "ddp.pt")
    torch.save({f"_orig_mod.module.{key}": value for key, value in weights.items()}, tmp_path / "compiled.pth")
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("bare.pth", "ddp.pt", "compiled.pth", "w.safetensors"):
        found = load_state_dict(tmp_path / name)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_asking_bare_weights_for_a_key_says_that_they_are_bare(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="bare"):
        load_state_dict(tmp_path / "bare.pth", "params")


def test_strict_loading_says_how_many_differ_and_the_first_names_and_shapes(tmp_path: Path) -> None:
    save_network(RRDBNet(3, 3, 8, 2, 4), tmp_path / "G.pth")
    with pytest.raises(UserError) as caught:
        load_network(tmp_path / "G.pth", RRDBNet(1, 1, 8, 3, 4))
    said = str(caught.value)
    assert "\n" not in said
    assert "does not fit RRDBNet" in said
    assert "30 missing in the file (RRDB_trunk.2.RDB1.conv1.weight, " in said
    assert "3 of another shape (conv_first.weight: expected 8x1x3x3, found 8x3x3x3" in said


def test_a_failed_strict_load_changes_nothing(tmp_path: Path) -> None:
    save_network(RRDBNet(3, 3, 8, 2, 4), tmp_path / "G.pth")
    target = RRDBNet(3, 3, 8, 3, 4)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(UserError):
        load_network(tmp_path / "G.pth", target)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_loose_loading_goes_by_name_and_shape_and_reports_the_rest(tmp_path: Path, caplog: Any) -> None:
    source, target = RRDBNetBasicSR(3, 3, 8, 2, 4), RRDBNet(1, 1, 8, 3, 4)
    first_before = target.conv_first.weight.clone()
    torch.save(source.state_dict(), tmp_path / "G.pth")
    report = load_network(tmp_path / "G.pth", target, strict=False)
    assert (report.loaded, report.total) == (69, 102)
    assert (len(report.missing), len(report.mismatched)) == (30, 3)
    assert str(report).startswith("loaded 69 of 102 tensors")
    assert "conv_last.bias: expected 1, found 3" in str(report)
    assert str(report) in caplog.text
    assert torch.equal(target.conv_first.weight, first_before)
    assert torch.equal(target.get_parameter("HRconv.weight"), source.get_parameter("conv_hr.weight"))


def test_a_numbered_x2_network_lends_its_tail_to_x4_by_role(tmp_path: Path) -> None:
    source, target = RRDB(3, 3, 8, 1, 4, 2), RRDB(3, 3, 8, 1, 4, 4)
    save_network(source, tmp_path / "x2.pth")
    report = load_network(tmp_path / "x2.pth", target, strict=False)
    assert report.missing == ["model.6.weight", "model.6.bias"]
    assert torch.equal(target.get_parameter("model.10.weight"), source.get_parameter("model.7.weight"))


def test_loading_what_fits_nowhere_is_an_error_even_when_loose(tmp_path: Path) -> None:
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit"):
        load_network(tmp_path / "other.pth", RRDBNet(3, 3, 8, 1, 4), strict=False)


def test_loading_an_optimizer_file_says_so(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    save_atomically(torch.optim.Adam(network.parameters()).state_dict(), tmp_path / "10_optimizerG.pth")
    with pytest.raises(UserError, match="state of an optimizer"):
        load_network(tmp_path / "10_optimizerG.pth", network)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)

    def __init__(self, target: Path) -> None:
        self.target = target


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = Malicious(tmp_path / "trap")
    torch.save({"params": trap}, tmp_path / "zip.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(trap, protocol=2))
    (tmp_path / "new.pth").write_bytes(pickle.dumps(trap, protocol=4))
    for name in ("zip.pth", "old.pth", "new.pth"):
        with pytest.raises(UserError, match=rf"{name}: refused"):
            load_state_dict(tmp_path / name)
    assert not trap.target.exists()


def test_a_whole_pickled_network_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"refused, it holds torch\.nn\.modules\.linear\.Linear"):
        load_state_dict(tmp_path / "whole.pth")


def test_every_bad_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    torch.save({"w": torch.rand(1000)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "truncated.safetensors").write_bytes(b"\x10\x00\x00")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "number.pth")
    torch.save({}, tmp_path / "nothing.pth")
    (tmp_path / "folder.pth").mkdir()
    said = {
        "truncated.pth": "damaged",
        "empty.pth": "empty",
        "page.pth": "no checkpoint",
        "text.pth": "no checkpoint",
        "truncated.safetensors": "damaged",
        "list.pth": "holds a list",
        "number.pth": "found epoch",
        "nothing.pth": "found nothing",
        "folder.pth": "folder",
        "missing.pth": "no such file",
    }
    for name, part in said.items():
        with pytest.raises(UserError, match=part) as caught:
            load_state_dict(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_saved_network_is_a_bare_state_dict_without_wrappers(tmp_path: Path) -> None:
    network = nn.Linear(2, 3)
    save_network(nn.DataParallel(network), tmp_path / "G.pth")
    stored = torch.load(tmp_path / "G.pth", weights_only=True)
    assert list(stored) == ["weight", "bias"]
    assert torch.equal(stored["weight"], network.weight)
    assert load_network(tmp_path / "G.pth", nn.DataParallel(nn.Linear(2, 3))).loaded == 2


def test_a_save_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "G.pth"
    save_atomically({"w": torch.ones(1)}, path)

    def half(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match="No space left"):
        save_atomically({"w": torch.zeros(1)}, path)
    assert load_state_dict(path)["w"].item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["G.pth"]


def test_saving_into_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.*cannot be written"):
        save_atomically({}, tmp_path / "none" / "G.pth")
