"""Every published layout loads into every network of its family, and every bad file is one clear line."""

import argparse
import collections
import functools
import os
import pickle
import re
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.network_msrresnet import MSRResNet1
from models.network_rrdb import RRDB
from models.network_rrdbnet import RRDBNet, RRDBNetBasicSR
from utils.utils_checkpoint import load_checkpoint_file, load_network, load_state_dict, save_atomically, save_network
from utils.utils_error import UserError
from utils.utils_pickle import HARMLESS


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


@pytest.mark.parametrize(
    "key",
    ["model_ema", "ema", "ema_state_dict", "state_dict_ema", "params-ema", "netG_ema", "G_ema", "modelEMA", "swa"],
)
def test_an_average_under_any_name_is_preferred_and_the_choice_is_said_once(key: str, tmp_path: Path, caplog) -> None:
    path = tmp_path / "both.pth"
    weights = [{"w": torch.full((1,), float(n))} for n in range(3)]
    torch.save({"model": weights[0], key: weights[1], "netD_ema": weights[2], "iter": 5}, path)
    with caplog.at_level("INFO"):
        assert all(load_state_dict(path)["w"].item() == 1 for _ in range(2))
    assert caplog.messages == [
        f"{path}: takes the average {key!r} and leaves model, netD_ema; --param_key names another"
    ]
    assert load_state_dict(path, "model")["w"].item() == 0


def test_an_average_that_lies_deeper_or_beside_the_plain_weights_is_found(tmp_path: Path) -> None:
    plain, average = {"a.w": torch.zeros(1), "b": torch.zeros(1)}, {"a.w": torch.ones(1), "b": torch.ones(1)}
    both = {f"online_model.{key}": value for key, value in plain.items()}
    both |= {f"ema_model.{key}": value for key, value in average.items()}
    files = {
        "shadow": {"model": plain, "ema": {"decay": 0.999, "shadow": average}},
        "ema_pytorch": {"model": plain, "ema": {**both, "initted": torch.tensor(True), "step": torch.tensor(3)}},
        "swa_utils": {"n_averaged": torch.tensor(5), **{f"module.{key}": value for key, value in average.items()}},
        "lightning": {
            "pytorch-lightning_version": "2.5",
            "state_dict": {
                **{f"net_g.{key}": value for key, value in plain.items()},
                **{f"net_g_ema.module.{key}": value for key, value in average.items()},
                "lpips.w": torch.zeros(3),
            },
        },
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        found = load_state_dict(tmp_path / f"{name}.pth")
        assert found.keys() == average.keys(), name
        assert all(value.item() == 1 for value in found.values()), name
    assert load_state_dict(tmp_path / "lightning.pth", "net_g")["b"].item() == 0


def test_a_lightning_module_gives_its_generator(tmp_path: Path) -> None:
    source = RRDBNet(3, 3, 8, 1, 4)
    for prefix in ("model.", "net_g._orig_mod."):
        weights = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
        content = {"state_dict": {**weights, "loss.w": torch.zeros(1)}, "pytorch-lightning_version": "2.5"}
        torch.save(content, tmp_path / "lightning.ckpt")
        assert load_network(tmp_path / "lightning.ckpt", RRDBNet(3, 3, 8, 1, 4)).complete


def test_a_network_whose_own_names_begin_with_model_keeps_them(tmp_path: Path) -> None:
    network = nn.ModuleDict({"model": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    save_network(network, tmp_path / "D.pth")
    assert load_network(tmp_path / "D.pth", network).complete


def test_the_only_weights_are_taken_whatever_their_key_is(tmp_path: Path) -> None:
    torch.save({"student": {"w": torch.ones(1)}, "epoch": 3, "config": {"lr": 0.1}}, tmp_path / "G.pth")
    assert load_state_dict(tmp_path / "G.pth")["w"].item() == 1


def test_bare_prefixed_and_safetensors_weights_are_the_same_weights(tmp_path: Path) -> None:
    weights = {"a.weight": torch.rand(2), "b.bias": torch.rand(3)}
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "ddp.pt")
    torch.save({f"_orig_mod.module.{key}": value for key, value in weights.items()}, tmp_path / "compiled.pth")
    save_file(weights, tmp_path / "w.safetensors")
    save_file(weights, tmp_path / "renamed.pth")
    torch.save(weights, tmp_path / "renamed.safetensors")
    for name in ("bare.pth", "ddp.pt", "compiled.pth", "w.safetensors", "renamed.pth", "renamed.safetensors"):
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


class Calls:
    """Pickled as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("how", [{}, LEGACY, {"pickle_protocol": 4}, {**LEGACY, "pickle_protocol": 4}])
def test_code_in_a_checkpoint_is_refused_and_not_run(how: dict[str, Any], tmp_path: Path) -> None:
    trap = Malicious(tmp_path / "trap")
    make = f"__import__('os').mkdir({str(trap.target)!r})"
    hidden = (
        trap,
        Calls(eval, make),
        Calls(exec, make),
        Calls(map, os.mkdir, [str(trap.target)]),
        Calls(functools.partial, os.mkdir, str(trap.target)),
        Calls(collections.defaultdict, os.getcwd),
        Calls(np.load, str(trap.target)),
        Calls(torch.load, str(trap.target)),
        Calls(getattr, torch.nn.Linear, "__init__"),
    )
    for content in hidden:
        torch.save({"params": {"w": torch.zeros(1)}, "more": content}, tmp_path / "x.pth", **how)
        with pytest.raises(UserError, match=r"x\.pth: refused, it holds"):
            load_state_dict(tmp_path / "x.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(trap, protocol=2))
    (tmp_path / "new.pth").write_bytes(pickle.dumps(trap, protocol=4))
    for name in ("old.pth", "new.pth"):
        with pytest.raises(UserError, match=rf"{name}: refused, it holds (posix|nt)\.mkdir"):
            load_state_dict(tmp_path / name)
    assert not trap.target.exists()


def test_arrays_that_lie_about_their_size_or_hold_pointers_are_not_built(tmp_path: Path) -> None:
    array, scalar = np.ones(2), np.float64(1)
    (rebuild, arguments, state), (make, (kind, _)) = array.__reduce__(), scalar.__reduce__()
    lies = (
        (1, (10**12,), *state[2:]),  # more numbers than bytes
        (1, (-1, -2), *state[2:]),
        (1, (1,), np.dtype(object), False, state[4]),  # an address made of bytes
        (1, (2,), np.dtype([("a", "f8")]), False, state[4]),
    )

    class Lie:
        def __init__(self, *call: Any) -> None:
            self.call = call

        def __reduce__(self) -> Any:
            return self.call

    for lie in (*(Lie(rebuild, arguments, state) for state in lies), Lie(make, (np.dtype(object), b"12345678"))):
        torch.save({"params": {"w": lie}}, tmp_path / "x.pth")
        with pytest.raises(UserError):
            load_state_dict(tmp_path / "x.pth")
    assert kind == np.float64


BESIDE = {
    "numpy number": np.float64(30.1),
    "numpy integer": np.int64(3),
    "numpy text": np.str_("x4"),
    "array": np.arange(6.0).reshape(2, 3),
    "empty array": np.zeros(0),
    "array of objects": np.array([1, "a", None], dtype=object),
    "dtype": np.dtype("f4"),
    "type": np.float32,
    "random state": np.random.RandomState(0).get_state(),
    "path": Path("a") / "b",
    "windows path": PureWindowsPath("c:/x"),
    "time": datetime(2026, 1, 2, tzinfo=timezone.utc),
    "duration": timedelta(3),
    "defaultdict": collections.defaultdict(list, x=[1]),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], 3),
    "namespace": argparse.Namespace(lr=1e-4, root=Path("x")),
    "simple namespace": SimpleNamespace(a=1),
    "sets": [frozenset([1]), {2}],
    "bytes": [b"", b"abc"],
    "others": [range(3), slice(2), 1j, Decimal("1.5"), torch.float16, torch.device("cpu"), torch.Size([2])],
}


@pytest.mark.parametrize("how", [{}, LEGACY])
def test_weights_load_whatever_harmless_stands_beside_them(how: dict[str, Any], tmp_path: Path) -> None:
    weights = {"w": torch.rand(3)}
    for name, value in BESIDE.items():
        torch.save({"params": weights, "more": {"value": value}}, tmp_path / "x.pth", **how)
        assert torch.equal(load_state_dict(tmp_path / "x.pth")["w"], weights["w"]), name
    torch.save({"params": weights, **BESIDE}, tmp_path / "x.pth", **how)
    content = load_checkpoint_file(tmp_path / "x.pth")
    assert content["numpy number"] == 30.1
    assert np.array_equal(content["array"], BESIDE["array"])
    assert content["defaultdict"] == {"x": [1]}


def test_both_spellings_of_numpy_are_read_and_arrays_become_tensors(tmp_path: Path) -> None:
    arrays = {"w": np.arange(3.0, dtype=">f4"), "scale": np.array(2.0), "F": np.asfortranarray(np.eye(2, 3))}
    torch.save({"params": arrays, "iter": np.int64(5)}, tmp_path / "x.pth", **LEGACY)
    content = (tmp_path / "x.pth").read_bytes()
    spellings = {
        content.replace(old, new) for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core."))
    }
    for spelling in (content, *spellings):
        (tmp_path / "x.pth").write_bytes(spelling)
        found = load_state_dict(tmp_path / "x.pth")
        assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in arrays.items()}


def test_the_allowed_names_are_stand_ins_of_this_project_and_allowed_here_alone(tmp_path: Path) -> None:
    # A class of another library in the list could do anything when it is built.
    assert {base.__module__ for cls in HARMLESS for base in cls.__bases__} == {"utils.utils_pickle"}
    before = torch.serialization.get_safe_globals()
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pth")
    load_state_dict(tmp_path / "x.pth")
    assert {*torch.serialization.get_safe_globals()} == {*before}


@pytest.mark.parametrize("how", [{}, LEGACY])
def test_other_pickles_are_named_with_a_command_that_mends_them(how: dict[str, Any], tmp_path: Path) -> None:
    weights = {"w": torch.rand(3)}
    torch.save({"params": weights, "psnr": np.float64(30)}, tmp_path / "4.pth", pickle_protocol=4, **how)
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "whole.pth", **how)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": np.ones(3)}, protocol=2))
    said = {
        "4.pth": "written in pickle protocol 4",
        "whole.pth": r"refused, it holds torch\.nn\.modules\.linear\.Linear: a whole pickled network",
        "plain.pkl": "a plain pickle",
    }
    for name, words in said.items():
        with pytest.raises(UserError, match=words) as caught:
            load_state_dict(tmp_path / name)
        command = re.search(r'python -c "(.*)"', str(caught.value))
        assert command, str(caught.value)
        exec(command[1])
        assert load_state_dict(tmp_path / f"{Path(name).stem}_again.pth")


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
