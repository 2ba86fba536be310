"""SwinIR and ELAN compute what the published ones compute, under the published names, at any size."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network_elan import ELAN
from models.network_swinir import SwinIR, extend
from models.select_network import define_G
from tests import golden_archs
from tests.test_networks import FLOAT32, check_manifest
from utils.utils_checkpoint import load_network
from utils.utils_error import UserError

FIXTURES = ("swinir", "kair_swinir", "elan")
# Two float32 orders of the same sums, through a few layers.
REORDERED = {"rtol": 1e-4, "atol": 1e-5}


def build(name: str, golden: dict[str, Any]) -> nn.Module:
    arguments = dict(golden["constructor"])
    if name.startswith("elan"):
        assert arguments.pop("rgb_mean") == [0.4488, 0.4371, 0.404]
        return ELAN(**arguments)
    return SwinIR(**arguments, padding="mirror" if name.startswith("swinir") else "reflect")


def swinir(**changed: Any) -> SwinIR:
    small = {"img_size": 8, "window_size": 4, "depths": (2, 2), "embed_dim": 12, "num_heads": (2, 3)}
    return SwinIR(**{**small, "upscale": 2, "drop_path_rate": 0.0, **changed})


def elan(**changed: Any) -> ELAN:
    return ELAN(**{"scale": 2, "window_sizes": (2, 4, 8), "m_elan": 4, "c_elan": 12, **changed})


BOTH = pytest.mark.parametrize("small", [swinir, elan])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", golden_archs.names(*FIXTURES))
def test_a_network_computes_the_golden_numbers(name: str) -> None:
    golden, expected = golden_archs.description(name), golden_archs.arrays(name)["output"]
    network = build(name, golden).eval()
    check_manifest(network, golden)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == golden["trainable_parameters"]
    golden_archs.fill(network, golden)
    (x,) = golden_archs.inputs(golden)
    with torch.no_grad():
        assert golden_archs.relative_error(network(x), expected) < FLOAT32
        exact = network.double()(x.double())
    assert exact.dtype == torch.float64
    # In float64 nothing is left but the distance of the reference's own float32 output from its float64 one; the two
    # float64 results differ by 1e-10 or less.
    moved = float((exact - torch.from_numpy(expected)).abs().max())
    assert moved == pytest.approx(golden["float32_vs_float64_max_abs_difference"]["output"], rel=1e-3)


@pytest.mark.parametrize("name", golden_archs.names(*FIXTURES, full=True))
def test_a_network_of_published_size_has_the_published_keys(name: str) -> None:
    golden = golden_archs.description(name)
    with torch.device("meta"):
        check_manifest(build(name, golden), golden)


SCALES = (1, 2, 3, 4)
GENERATORS: list[tuple[Callable[..., nn.Module], int, dict[str, Any]]] = [
    *((swinir, scale, {"upsampler": "pixelshuffle"}) for scale in SCALES),
    *((swinir, scale, {"upsampler": "pixelshuffledirect"}) for scale in SCALES),
    *((swinir, scale, {"upsampler": "nearest+conv"}) for scale in SCALES),
    (swinir, 1, {"upsampler": None}),
    (swinir, 2, {"padding": "mirror", "resi_connection": "3conv"}),
    *((elan, scale, {}) for scale in SCALES),
    (elan, 2, {"n_share": 1}),
]


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize(("small", "scale", "changed"), GENERATORS)
def test_every_generator_enlarges_by_the_scale_and_trains_every_weight(
    small: Callable[..., nn.Module], scale: int, changed: dict[str, Any], n_channels: int
) -> None:
    names = ("upscale", "in_chans") if small is swinir else ("scale", "colors")
    network = small(**dict(zip(names, (scale, n_channels), strict=True)), **changed)
    output = network(torch.rand(2, n_channels, 3, 10))
    assert output.shape == (2, n_channels, 3 * scale, 10 * scale)
    output.square().sum().backward()
    trained = [p for p in network.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (17, 8)])
@pytest.mark.parametrize("network", [swinir(), swinir(padding="mirror"), elan()])
def test_any_size_is_enlarged(network: nn.Module, size: tuple[int, int]) -> None:
    assert network(torch.rand(1, 3, *size)).shape == (1, 3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize(
    ("repeat_edge", "expected"),
    [(False, [0, 1, 2, 1, 0, 1, 2, 1]), (True, [0, 1, 2, 2, 1, 0, 0, 1])],
)
def test_extending_mirrors_to_and_fro(repeat_edge: bool, expected: list[float]) -> None:
    column = torch.arange(3.0).view(1, 1, 3, 1)
    assert extend(column, 8, 1, repeat_edge).flatten().tolist() == expected
    assert extend(column.mT, 1, 8, repeat_edge).flatten().tolist() == expected


@BOTH
def test_padding_reflects_up_to_the_next_multiple_of_the_window(small: Callable[..., nn.Module]) -> None:
    network, x = small().eval(), torch.rand(1, 3, 11, 14)
    bottom, right = -11 % network.size_multiple, -14 % network.size_multiple
    whole = network(F.pad(x, (0, right, 0, bottom), mode="reflect"))
    torch.testing.assert_close(network(x), whole[..., :22, :28], rtol=0, atol=0)


def test_mirror_padding_adds_a_window_even_where_the_size_fits() -> None:
    mirroring, x = swinir(padding="mirror").eval(), torch.rand(1, 3, 8, 9)
    reflecting = swinir().eval()
    reflecting.load_state_dict(mirroring.state_dict())
    higher = torch.cat((x, x.flip(2)[:, :, :4]), dim=2)
    whole = reflecting(torch.cat((higher, higher.flip(3)[..., :3]), dim=3))
    torch.testing.assert_close(mirroring(x), whole[..., :16, :18], rtol=0, atol=0)


def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """The mask by the book: number the nine regions of the rolled image, forbid pairs of unequal numbers."""
    bands = [torch.arange(n).ge(n - window).int() + torch.arange(n).ge(n - shift).int() for n in (height, width)]
    regions = 3 * bands[0][:, None] + bands[1]
    numbers = regions.view(height // window, window, width // window, window).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.where(numbers[:, :, None] == numbers[:, None], 0.0, -100.0)


@pytest.mark.parametrize("size", [(4, 4), (4, 12), (16, 8)])
def test_masks_follow_the_size_of_the_input(size: tuple[int, int]) -> None:
    network, seen = swinir().eval(), []
    shifted = network.get_submodule("layers.1.residual_group.blocks.1.attn")
    shifted.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    network(torch.rand(1, 3, *size))
    torch.testing.assert_close(seen[0], shift_mask(*size, 4, 2))


def test_the_masks_that_are_saved_are_those_of_img_size() -> None:
    network = swinir(img_size=21, window_size=7)
    masks = {key: value for key, value in network.state_dict().items() if key.endswith("attn_mask")}
    assert [key.split(".")[1:5:3] for key in masks] == [["0", "1"], ["1", "1"]]
    for mask in masks.values():
        torch.testing.assert_close(mask, shift_mask(21, 21, 7, 3))


def test_a_mask_is_made_once_for_all_blocks() -> None:
    network, seen = swinir(depths=(4, 4)).eval(), []
    for block in network.modules():
        if hasattr(block, "relative_position_index"):
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    network(torch.rand(1, 3, 12, 8))
    assert [mask is None for mask in seen] == [True, False] * 4
    assert len({id(mask) for mask in seen if mask is not None}) == 1


def test_weights_trained_at_another_size_load_and_compute_the_same() -> None:
    trained, network = swinir(img_size=16).eval(), copy.deepcopy(swinir(img_size=8)).eval()
    own_masks = {key: value.clone() for key, value in network.state_dict().items() if key.endswith("attn_mask")}
    network.load_state_dict(trained.state_dict())
    x = torch.rand(1, 3, 9, 12)
    torch.testing.assert_close(network(x), trained(x), rtol=0, atol=0)
    for key, mask in own_masks.items():
        torch.testing.assert_close(network.state_dict()[key], mask, rtol=0, atol=0)


def test_a_checkpoint_trained_at_another_size_loads_strictly(tmp_path: Path) -> None:
    trained, network = swinir(img_size=16).eval(), swinir(img_size=8).eval()
    torch.save({"params": trained.state_dict()}, tmp_path / "swinir.pth")
    assert load_network(tmp_path / "swinir.pth", network).complete
    x = torch.rand(1, 3, 9, 12)
    torch.testing.assert_close(network(x), trained(x), rtol=0, atol=0)


def test_a_checkpoint_of_another_window_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(swinir(img_size=16, window_size=8).state_dict(), tmp_path / "swinir.pth")
    with pytest.raises(UserError, match=r"does not fit SwinIR: .*relative_position_bias_table"):
        load_network(tmp_path / "swinir.pth", swinir(img_size=16))


# What KAIR's option files for SwinIR write under netG.
KAIR_NETG = {
    "net_type": "swinir",
    "upscale": 2,
    "in_chans": 3,
    "img_size": 48,
    "window_size": 8,
    "img_range": 1.0,
    "depths": [6, 6, 6, 6],
    "embed_dim": 60,
    "num_heads": [6, 6, 6, 6],
    "mlp_ratio": 2,
    "upsampler": "pixelshuffledirect",
    "resi_connection": "1conv",
    "init_type": "default",
}


def test_kairs_options_build_the_published_networks() -> None:
    network = define_G({"scale": 2, "n_channels": 3, "is_train": True, "netG": KAIR_NETG})
    assert isinstance(network, SwinIR)
    assert sum(p.numel() for p in network.parameters()) == 910_152  # the paper's lightweight SwinIR, x2
    network = define_G(
        {"scale": 1, "n_channels": 1, "netG": {**KAIR_NETG, "upscale": 1, "in_chans": 1, "upsampler": None}}
    )
    assert network(torch.rand(1, 1, 9, 9)).shape == (1, 1, 9, 9)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"upscale": 4}, "netG.upscale: 4 contradicts scale 2"),
        ({"in_chans": 1}, "netG.in_chans: 1 contradicts n_channels 3"),
        ({"upsampler": "nearest"}, "netG.upsampler: .*nearest"),
        ({"img_size": 50}, "netG: swinir: img_size 50"),
        ({"net_type": "elan", "colors": 1}, "netG.colors: 1 contradicts n_channels 3"),
    ],
)
def test_wrong_options_end_in_one_line(changed: dict[str, Any], said: str) -> None:
    netG = {**KAIR_NETG, **changed} if "colors" not in changed else changed
    with pytest.raises(UserError, match=said):
        define_G({"scale": 2, "n_channels": 3, "netG": netG})


def test_weights_of_another_window_are_refused() -> None:
    with pytest.raises(RuntimeError, match="relative_position_bias_table"):
        swinir(img_size=16).load_state_dict(swinir(img_size=16, window_size=8).state_dict())


def test_blocks_do_not_shift_where_the_training_size_is_one_window() -> None:
    network = swinir(img_size=4)
    assert not any(key.endswith("attn_mask") for key in network.state_dict())
    # Without a shift nothing but convolutions passes from window to window; without these, windows stand alone.
    x = torch.rand(1, 12, 8, 8).permute(0, 2, 3, 1)
    block = network.get_submodule("layers.0.residual_group.blocks.1")
    apart = torch.cat([block(x[:, :4], None), block(x[:, 4:], None)], dim=1)
    torch.testing.assert_close(block(x, None), apart, **REORDERED)


@pytest.mark.parametrize(
    "build_network",
    [
        lambda saving: swinir(drop_path_rate=0.5, use_checkpoint=saving),
        lambda saving: elan(use_checkpoint=saving),
        lambda saving: elan(n_share=1, use_checkpoint=saving),
    ],
)
def test_checkpointing_changes_neither_output_nor_gradients(build_network: Callable[[bool], nn.Module]) -> None:
    plain, saving = build_network(False), build_network(True)
    saving.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 8, 12)
    found = []
    for network in (plain, saving):
        torch.manual_seed(1)  # the same residuals are skipped
        output = network(x)
        trained = [p for p in network.parameters() if p.requires_grad]
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), trained)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "build_network",
    [
        lambda saving: swinir(depths=(4, 4), upsampler="pixelshuffledirect", use_checkpoint=saving),
        lambda saving: elan(use_checkpoint=saving),
    ],
)
def test_checkpointing_stores_less(build_network: Callable[[bool], nn.Module]) -> None:
    stored = {}
    for saving in (False, True):
        network, sizes = build_network(saving), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            network(torch.rand(1, 3, 16, 16))
        stored[saving] = sum(sizes)
    assert stored[True] < stored[False] / 2


def test_drop_path_skips_residuals_in_training_only() -> None:
    # Rates rise from 0 at the first block to the rate itself at the last: of two blocks, the second is always skipped.
    network = swinir(depths=(1, 1), drop_path_rate=1.0)
    skipped = copy.deepcopy(network)
    for layer in ("attn.proj", "mlp.fc2"):
        for p in skipped.get_submodule(f"layers.1.residual_group.blocks.0.{layer}").parameters():
            nn.init.zeros_(p)
    x = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(network.train()(x), skipped.eval()(x), **REORDERED)
    assert not torch.allclose(network.eval()(x), skipped(x), **REORDERED)


@BOTH
def test_channels_last_computes_the_same(small: Callable[..., nn.Module]) -> None:
    network, x = small().eval(), torch.rand(2, 3, 9, 14)
    expected = network(x)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), expected, **REORDERED)


@BOTH
def test_mixed_precision_stays_near(small: Callable[..., nn.Module]) -> None:
    network, x = small().eval(), torch.rand(1, 3, 16, 16)
    expected = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(x)
    # bfloat16 keeps 8 bits, and the output leaves through a convolution of 64 x 9 or 12 x 9 products.
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)


@BOTH
@pytest.mark.parametrize("n_channels", [1, 3])
def test_the_mean_of_div2k_comes_back_where_the_network_adds_nothing(
    small: Callable[..., nn.Module], n_channels: int
) -> None:
    network = small(**{"in_chans" if small is swinir else "colors": n_channels})
    for p in network.parameters():
        nn.init.zeros_(p)
    expected = [0.4488, 0.4371, 0.4040] if n_channels == 3 else [0.0]
    assert network(torch.rand(1, n_channels, 8, 8))[0, :, 3, 5].tolist() == pytest.approx(expected)


def test_the_fixed_kernels_of_elan_look_at_the_neighbours() -> None:
    shift_conv = elan(c_elan=12).get_submodule("body.0.modules_lfe.lfe_0.conv0.shift_conv")
    x = torch.rand(1, 12, 4, 4)
    seen = F.conv2d(x, shift_conv.weight, padding=1, groups=12)[0, :, 1, 1]
    right, left, below, above, here = x[0, 0:2, 1, 2], x[0, 2:4, 1, 0], x[0, 4:6, 2, 1], x[0, 6:8, 0, 1], x[0, 8:, 1, 1]
    torch.testing.assert_close(seen, torch.cat((right, left, below, above, here)))


@pytest.mark.parametrize(
    ("build_network", "said"),
    [
        (lambda: swinir(img_size=10), "img_size 10 must be a multiple of window_size 4"),
        (lambda: swinir(num_heads=(2,)), "num_heads has 1 entries and depths 2"),
        (lambda: swinir(num_heads=(2, 5)), "embed_dim 12 must divide by num_heads 5"),
        (lambda: swinir(padding="reflection"), "padding 'reflection'"),
        (lambda: swinir(resi_connection="2conv"), "resi_connection '2conv'"),
        (lambda: swinir(upsampler="nearest"), "upsampler 'nearest'"),
        (lambda: swinir(upsampler=None), "without an upsampler the scale is 1, not 2"),
        (lambda: swinir(upscale=5), "scale 5"),
        (lambda: swinir(ape=True)(torch.rand(1, 3, 8, 9)), "ape takes padded inputs of 8 x 8 pixels only, got 8 x 12"),
        (lambda: swinir(img_size=12, ape=True)(torch.rand(1, 3, 9, 16)), "got 12 x 16"),
        (lambda: elan(c_elan=10), "c_elan 10 must divide by the number of window_sizes, 3"),
        (lambda: elan(n_share=2), r"m_elan 4 must divide by 1 \+ n_share, 3"),
    ],
)
def test_a_network_that_cannot_be_built_says_why(build_network: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_network()


@pytest.mark.parametrize("network", [swinir(depths=(2,), num_heads=(2,)), elan(m_elan=2)])
def test_a_network_compiles_without_a_break(network: nn.Module) -> None:
    x = torch.rand(1, 3, 9, 14)
    compiled = torch.compile(network.eval(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), **REORDERED)
