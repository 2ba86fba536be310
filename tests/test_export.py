"""Generators for other programs: every format restores there as the network does here."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from main_export import FORMATS, main
from models import export as export_module
from models.network_rrdbnet import RRDBNetBasicSR
from models.network_srvgg import SRVGGNetCompact
from models.restorer import Restorer, load_restorer
from models.sampler import DiffusionSampler
from models.select_network import define_G
from tests.conftest import photograph
from tests.test_ncnn import by_ncnn, published
from tests.training import Workplace
from utils.utils_checkpoint import load_state_dict, save_network
from utils.utils_error import UserError
from utils.utils_image import uint2tensor4

COMPACT = {"net_type": "srvgg_compact", "nf": 8, "nc": 2}
RRDB = {"nf": 8, "nb": 1, "gc": 32}  # spandrel knows no other growth
SWINIR = {"net_type": "swinir", "depths": [2], "num_heads": [2], "embed_dim": 8, "window_size": 4, "img_size": 8}


def checkpoint(folder: Path, scale: int = 4, **netG: Any) -> Path:
    """A file of random weights that make an image of middle grays."""
    torch.manual_seed(0)
    network = define_G({"scale": scale, "n_channels": 3, "is_train": False, "netG": netG or COMPACT})
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if netG and len(weight) == 3 and weight.ndim == 1 and not name.startswith("body"):
                weight.fill_(0.5)
    path = folder / "net.pth"
    save_network(network, path)
    return path


def run(path: Path | str, *arguments: str) -> Path:
    """The folder of the files."""
    folder = (Path(path).parent if isinstance(path, Path) else Path(path.partition("=")[2]).parent) / "out"
    main(["--model_path", str(path), "--output", str(folder), *arguments])
    return folder


def image(height: int = 13, width: int = 18) -> Tensor:
    """Of a size that no window and no fold divides, and on which nothing was traced or checked."""
    return uint2tensor4(photograph(height, width, 5))


def here(path: Path, L: Tensor, scale: int | None = None) -> Tensor:
    netG = load_restorer(str(path), scale, None, torch.device("cpu")).netG
    with torch.no_grad():
        return netG(L)


def assert_same_image(one: Tensor, other: Tensor) -> None:
    """Both in float32: sums in another order differ in the last digits."""
    assert one.std() > 0.003  # there is something to compare
    torch.testing.assert_close(one.clamp(0, 1), other.clamp(0, 1), rtol=0, atol=1e-5)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- safetensors and pth


@pytest.mark.parametrize(
    ("scale", "netG"),
    [
        (4, COMPACT),
        (4, {"net_type": "rrdbnet", **RRDB}),
        (2, {"net_type": "rrdbnet", **RRDB}),
        (2, {"net_type": "rrdbnet_basicsr", **RRDB}),
        (4, {"net_type": "rrdb", **RRDB}),
        (2, SWINIR),
    ],
)
def test_spandrel_restores_by_both_files_as_we_do(scale: int, netG: dict[str, Any], tmp_path: Path) -> None:
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed: it reads what is exported")
    path = checkpoint(tmp_path, scale, **netG)
    folder = run(path, "--format", "safetensors", "pth", "--scale", str(scale))
    L = image(16, 20)  # spandrel fills up other sizes in its own way
    for suffix in ("safetensors", "pth"):
        found = spandrel.ModelLoader("cpu").load_from_file(folder / f"{scale}x_net.{suffix}")
        with torch.no_grad():
            assert_same_image(found(L), here(path, L, scale))


def test_pth_files_of_rrdbnet_have_basicsrs_layout(tmp_path: Path) -> None:
    folder = run(checkpoint(tmp_path, net_type="rrdb", **RRDB), "--format", "pth")
    content = torch.load(folder / "4x_net.pth", weights_only=True)
    assert [*content] == ["params_ema"]
    assert content["params_ema"].keys() == RRDBNetBasicSR(nf=8, nb=1).state_dict().keys()


@pytest.mark.parametrize(
    ("scale", "netG", "expected"),
    [
        (3, {"net_type": "rrdbnet", **RRDB}, "spandrel takes it for x2: "),
        (4, {"net_type": "msrresnet0", "nc": 8, "nb": 1}, "spandrel does not know this network: "),
    ],
)
def test_what_spandrel_would_misread_is_said(
    scale: int, netG: dict[str, Any], expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("spandrel", reason="spandrel is not installed: it is what would misread")
    caplog.set_level("INFO")
    run(checkpoint(tmp_path, scale, **netG), "--format", "pth", "--scale", str(scale))
    (said,) = [message for message in caplog.messages if ".pth: for this program; " in message]
    assert expected in said
    assert said.endswith("take --format onnx instead")


def test_a_run_is_exported_with_what_is_known_of_it(tmp_path: Path) -> None:
    work = Workplace(tmp_path)
    more = ("path.license=CC-BY-4.0", "netG.act_type=leakyrelu", "train.iqa_weights.stlpips=0.2")
    work.run("train.iterations=2", "train.checkpoint_test=2", *more)
    main(["--model_path", str(work.folder()), "--format", "safetensors"])
    folder = work.folder() / "export"
    assert names(folder) == ["4x_run.json", "4x_run.md", "4x_run.safetensors"]
    with safe_open(folder / "4x_run.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["task"], header["step"], header["license"], header["precision"]) == (
        "run",
        "2",
        "CC-BY-4.0",
        "float32",
    )
    assert_same_image(here(folder / "4x_run.safetensors", image()), here(work.folder(), image()))
    card = (folder / "4x_run.md").read_text(encoding="utf-8")
    psnr = json.loads(header["validation"])["test"]["psnr"]
    for words in ("Licence of the weights: CC-BY-4.0", "Task run, step 2", f"| test | {psnr:.4g} |", "H_size 32"):
        assert words in card
    assert re.search(r"weights of losses: G_lossfn_weight 1.0, stlpips 0.2$", card, re.MULTILINE)  # and no diffusion's
    assert str(tmp_path) not in card
    entry = json.loads((folder / "4x_run.json").read_text(encoding="utf-8"))
    assert entry["resources"][0]["size"] == (folder / "4x_run.safetensors").stat().st_size
    told = {name: entry[name] for name in ("license", "architecture", "scale", "inputChannels", "trainingIterations")}
    assert told == {
        "license": "CC-BY-4.0",
        "architecture": "compact",
        "scale": 4,
        "inputChannels": 3,
        "trainingIterations": 2,
    }


# -------------------------------------------------------------------------------------------------------------- ncnn


@pytest.mark.parametrize(
    ("scale", "netG"),
    [
        (2, COMPACT),
        (2, {"net_type": "rrdbnet", **RRDB}),
        (3, {"net_type": "rrdbnet", **RRDB}),
        (4, {"net_type": "rrdb", **RRDB}),
        (8, {"net_type": "rrdbnet", **RRDB}),
    ],
)
def test_ncnn_restores_by_the_files_as_we_do(scale: int, netG: dict[str, Any], tmp_path: Path) -> None:
    path = checkpoint(tmp_path, scale, **netG)
    folder = run(path, "--format", "ncnn", "--precision", "fp32", "--scale", str(scale))
    shown = photograph(13, 18, 5)
    theirs = by_ncnn(folder / f"{scale}x_net_fp32.param", shown).astype(int)
    ours = here(path, uint2tensor4(shown), scale)[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy().astype(int)
    # A sum in another order moves a value across the edge between two levels now and then.
    assert abs(theirs - ours).max() <= 1
    assert (theirs != ours).mean() < 1e-3


@pytest.mark.parametrize("name", ["realesr-animevideov3-x4", "realesrgan-x4plus-anime"])
def test_the_published_files_are_written_anew_to_the_byte(name: str, tmp_path: Path) -> None:
    path = published(name)
    main(["--model_path", f"4x={path}", "--format", "ncnn", "--output", str(tmp_path)])
    assert (tmp_path / "4x.bin").read_bytes() == path.with_suffix(".bin").read_bytes()

    def layers(file: Path) -> list[tuple[str, ...]]:
        """Kind, numbers of inputs and outputs, settings: all but names."""
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()[2:]]
        return sorted((kind, n, m, *rest[int(n) + int(m) :]) for kind, _, n, m, *rest in lines)

    assert layers(tmp_path / "4x.param") == layers(path)


def test_networks_that_no_ncnn_file_can_hold_here_are_one_line(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 2, net_type="rrdbnet_basicsr", **RRDB)  # folds its input
    with pytest.raises(UserError, match=r"net\.pth: ncnn files are written of .*; take --format onnx"):
        run(path, "--format", "pth", "ncnn")
    assert names(tmp_path / "out") == []


# -------------------------------------------------------------------------------------------------------------- onnx


@pytest.fixture
def onnxruntime() -> Any:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: PyTorch exports with it")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it reads what is exported")


@pytest.mark.parametrize(
    ("scale", "netG"),
    [
        (2, SWINIR),
        (2, {"net_type": "elan", "m_elan": 1, "c_elan": 6}),
    ],
)
def test_onnxruntime_restores_any_number_of_images_of_any_size_as_we_do(
    scale: int, netG: dict[str, Any], tmp_path: Path, onnxruntime: Any
) -> None:
    path = checkpoint(tmp_path, scale, **netG)
    file = run(path, "--format", "onnx") / f"{scale}x_net.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [x.shape for x in session.get_inputs()] == [["N", 3, "H", "W"]]
    assert session.get_modelmeta().custom_metadata_map["format"] == "self-similarity/1"
    for L in (image(), image(32, 48).repeat(2, 1, 1, 1), image(3, 2)):
        (E,) = session.run(None, {"input": L.numpy()})
        assert_same_image(torch.from_numpy(E), here(path, L))


def test_a_file_for_one_size_takes_this_size_alone(tmp_path: Path, onnxruntime: Any) -> None:
    path = checkpoint(tmp_path)
    session = onnxruntime.InferenceSession(str(run(path, "--format", "onnx", "--size", "13", "18") / "4x_net.onnx"))
    assert [x.shape for x in session.get_inputs()] == [[1, 3, 13, 18]]
    (E,) = session.run(None, {"input": image().numpy()})
    assert_same_image(torch.from_numpy(E), here(path, image()))


def test_a_file_for_a_size_beyond_the_test_photograph_is_tried_at_it(tmp_path: Path, onnxruntime: Any) -> None:
    assert (run(checkpoint(tmp_path), "--format", "onnx", "--size", "460", "8") / "4x_net.onnx").is_file()


# ----------------------------------------------------------------------------------------------------- torchscript


@pytest.mark.parametrize(
    ("scale", "netG"),
    [
        (4, COMPACT),
        (4, {"net_type": "rrdbnet", **RRDB}),
        (2, {"net_type": "rrdbnet_basicsr", **RRDB}),
        (4, {"net_type": "msrresnet1", "nc": 8, "nb": 1}),
    ],
)
def test_torchscript_restores_as_we_do_at_any_size(scale: int, netG: dict[str, Any], tmp_path: Path) -> None:
    path = checkpoint(tmp_path, scale, **netG)
    extra = {"header.json": ""}
    found = torch.jit.load(str(run(path, "--format", "torchscript") / f"{scale}x_net.pt"), _extra_files=extra)
    with torch.no_grad():
        assert_same_image(found(image()), here(path, image()))
    network = json.loads(json.loads(extra["header.json"])["network"])
    assert network["netG"]["net_type"] == netG["net_type"]


@pytest.mark.parametrize("netG", [SWINIR, {"net_type": "elan", "m_elan": 2, "c_elan": 12}])
def test_torchscript_of_a_network_that_it_fixes_to_a_size_says_how_it_goes(
    netG: dict[str, Any], tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, 2, **netG)
    with pytest.raises(UserError, match=r"cannot be a TorchScript file: .*; --size H W makes a file for images of one"):
        run(path, "--format", "torchscript")
    found = torch.jit.load(str(run(path, "--format", "torchscript", "--size", "13", "18") / "2x_net.pt"))
    with torch.no_grad():
        assert_same_image(found(image()), here(path, image()))


# --------------------------------------------------------------------------------------------------- half precision


def test_bf16_halves_the_weights_where_a_program_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = checkpoint(tmp_path)
    folder = run(path, "--format", "safetensors", "pth", "torchscript", "--precision", "bf16")
    for suffix in ("safetensors", "pth"):
        weights = load_state_dict(folder / f"4x_net_bf16.{suffix}")
        assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    E = torch.jit.load(str(folder / "4x_net_bf16.pt"))(image())
    assert E.dtype == torch.float32
    costs = [float(m.partition("PSNR to fp32 ")[2].split()[0]) for m in caplog.messages if "PSNR to fp32" in m]
    assert len(costs) == 3
    assert all(40 < cost < 90 for cost in costs)  # 8 bits: 2^-9 of rounding is 54 dB
    for format in ("onnx", "ncnn"):
        with pytest.raises(UserError, match=f"--format {format}: no program runs such a file in bf16"):
            run(path, "--format", format, "--precision", "bf16", "--overwrite")


def test_half_precision_says_what_it_costs(tmp_path: Path, onnxruntime: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = checkpoint(tmp_path)
    folder = run(path, "--format", *FORMATS, "--precision", "fp16")
    files = ["4x_net.param", *(f"4x_net_fp16.{suffix}" for suffix in ("onnx", "pt", "pth", "safetensors"))]
    told = [message for message in caplog.messages if "PSNR to fp32" in message]
    assert sorted(Path(message.partition(":")[0]).name for message in told) == files
    costs = [float(message.partition("PSNR to fp32 ")[2].split()[0]) for message in told]
    # Weights of 11 bits and images of values about 1: 2^-12 of rounding is 72 dB, less where errors average out.
    assert all(60 < cost < 130 for cost in costs)
    weights = load_state_dict(folder / "4x_net_fp16.pth")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    (E,) = onnxruntime.InferenceSession(str(folder / "4x_net_fp16.onnx")).run(None, {"input": image().numpy()})
    assert E.dtype == np.float32
    assert (folder / "4x_net_fp16.onnx").read_bytes().count(weights["body.2.weight"].numpy().tobytes()) == 1


def test_half_precision_that_ruins_the_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path)
    with monkeypatch.context() as strict:
        strict.setattr(export_module, "_FAITHFUL", 200.0)
        with pytest.raises(UserError, match=r"half precision is too coarse for this network: [0-9.]+ dB to fp32"):
            run(path, "--format", "pth", "--precision", "fp16")
    weights = load_state_dict(path)
    weights["body.0.weight"] *= 1e7  # beyond what float16 holds
    torch.save(weights, path)
    with pytest.raises(UserError, match="is not finite; give --precision fp32"):
        run(path, "--format", "pth", "--precision", "fp16")
    assert names(tmp_path / "out") == []


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    folder = run(path, "--format", "pth")
    (folder / "4x_net.md").write_text("mine")
    with pytest.raises(
        UserError, match=r"4x_net\.md, .*4x_net\.json: is there already; give --overwrite or another --output"
    ):
        run(path, "--format", "safetensors")
    assert names(folder) == ["4x_net.json", "4x_net.md", "4x_net.pth"]
    run(path, "--format", "safetensors", "--overwrite")
    assert (folder / "4x_net.md").read_text().startswith("# 4x_net")
    assert run(f"4x_mine={path}", "--format", "pth").joinpath("4x_mine.pth").is_file()


def test_a_file_that_restores_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ncnn", reason="ncnn is not installed: it finds that out")
    half = SRVGGNetCompact(nf=8, nc=2)
    monkeypatch.setattr(export_module, "published_weights", lambda netG: half.state_dict())
    with pytest.raises(UserError, match="ncnn restores otherwise by it: differs by up to"):
        run(checkpoint(tmp_path), "--format", "ncnn")
    assert names(tmp_path / "out") == []


def test_where_a_program_is_missing_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = importlib.util.find_spec
    missing = ("ncnn", "spandrel")
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name in missing else found(name))
    run(checkpoint(tmp_path), "--format", "ncnn", "pth")
    for name in missing:
        assert any(f"not checked: {name} is not installed (pip install -r " in message for message in caplog.messages)


def test_a_diffusion_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = DiffusionSampler.__new__(DiffusionSampler)
    model = Restorer("x", tmp_path / "x.pth", sampler, 4, 3, {})
    monkeypatch.setattr(export_module, "load_restorer", lambda *_: model)
    with pytest.raises(UserError, match=r"x\.pth: is a diffusion model; .*restore with main_test\.py"):
        run(tmp_path / "x.pth", "--format", "onnx")
