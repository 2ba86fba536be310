"""ResShift's network computes what the published one computes, under the published names, at any size that divides."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.network_infer import infer_netG
from models.network_resshift import UNetModelSwin
from models.network_swinir import SwinIR
from models.select_network import define_G
from tests import golden_archs
from tests.test_networks import FLOAT32, check_manifest
from tests.test_networks_transformer import shift_mask
from utils.utils_checkpoint import load_network, save_network
from utils.utils_error import UserError
from utils.utils_option import NetworkOptions, network_options, parse

# What the fixtures' constructors say beside, and what alone is built here.
FIXED = {"conv_resample": True, "dims": 2, "use_fp16": False, "resblock_updown": False}
# Two float32 orders of the same sums, through a few layers.
REORDERED = {"rtol": 1e-4, "atol": 1e-5}
SMALL: dict[str, Any] = {
    "image_size": 16,
    "model_channels": 32,
    "attention_resolutions": [16, 8],
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 2],
    "num_head_channels": 16,
    "swin_embed_dim": 32,
    "window_size": 4,
    "mlp_ratio": 2.0,
    "lq_size": 16,
}


def of_golden(golden: dict[str, Any], **changed: Any) -> UNetModelSwin:
    arguments = dict(golden["constructor"])
    for name, value in FIXED.items():
        assert arguments.pop(name) == value
    return UNetModelSwin(**{**arguments, **changed})


def small(**changed: Any) -> UNetModelSwin:
    torch.manual_seed(0)
    network = UNetModelSwin(**{**SMALL, **changed})
    for parameter in network.parameters():  # its residual blocks start at zero, and would hide what is in them
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def shown(height: int = 16, width: int = 16, ratio: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2, 3, height, width, generator=generator)
    return x, torch.tensor([3, 11]), y, torch.rand(2, 3, ratio * height, ratio * width, generator=generator)


@pytest.mark.parametrize("name", golden_archs.names("resshift_unet_swin"))
def test_the_network_computes_the_golden_numbers(name: str) -> None:
    golden, expected = golden_archs.description(name), golden_archs.arrays(name)["output"]
    network = of_golden(golden).eval()
    check_manifest(network, golden)
    golden_archs.fill(network, golden)
    x, L = golden_archs.inputs(golden)
    with torch.no_grad():
        found = network(x, torch.tensor(golden["timesteps"]), None, L)
    assert golden_archs.relative_error(found, expected) < FLOAT32


def test_the_network_of_published_size_has_the_published_keys() -> None:
    golden = golden_archs.description("resshift_unet_swin_full")
    with torch.device("meta"):
        check_manifest(of_golden(golden), golden)
        by_default = define_G({"scale": 4, "netG": {"net_type": "resshift_unet_swin"}})
    check_manifest(by_default, golden)
    assert by_default.size_multiple == 64  # windows of 8 on maps that are 8 times smaller
    assert by_default.L_ratio == 1


def test_published_configurations_are_options() -> None:
    for name in golden_archs.names("resshift") + golden_archs.names("resshift", full=True):
        constructor = golden_archs.description(name)["constructor"]
        dropout = float(constructor["dropout"])
        netG = {**constructor, "net_type": "resshift_unet_swin", "dropout": dropout, "patch_norm": False}
        options = network_options({"scale": 4, "netG": netG})
        assert isinstance(options, NetworkOptions)
        assert options.netG is not None
        assert constructor.items() <= options.netG.model_dump().items()


def test_shifted_windows_are_masked_as_published_or_right() -> None:
    key = "input_blocks.1.1.blocks.1.attn_mask"
    right = shift_mask(16, 16, window=4, shift=2)
    torch.testing.assert_close(small(mask_quirk=False).state_dict()[key], right)
    # By the book of the published code: bands of rows, each window transposed, pairs of unequal bands forbidden.
    bands = torch.arange(16).ge(12).int() + torch.arange(16).ge(14).int()
    windows = bands[:, None].expand(16, 16).reshape(4, 4, 4, 4).transpose(1, 2)  # row, column of windows, pixels
    numbers = windows.transpose(-1, -2).flatten(2).flatten(0, 1)
    published = torch.where(numbers[:, :, None] == numbers[:, None], 0.0, -100.0)
    torch.testing.assert_close(small().state_dict()[key], published)
    assert published[:12].count_nonzero() == 0  # all but the last row of windows
    assert not torch.equal(published, right)


def test_the_right_masks_keep_ends_of_the_image_apart() -> None:
    # In a shifted block the first row reaches the last one only through a window that is rolled around the image.
    for mask_quirk, seen in ((True, True), (False, False)):
        swin = small(mask_quirk=mask_quirk).input_blocks[1][1]
        block = swin.blocks[1]
        block.norm1 = block.norm2 = nn.Identity()  # they look at the whole image
        x = torch.randn(1, 32, 16, 16, requires_grad=True)
        block(x)[..., 0, :].square().sum().backward()
        # What is masked has a weight of exp(-100), about 4e-44.
        assert bool((x.grad[..., -1, :].abs() > 1e-30).any()) is seen


@pytest.mark.parametrize("size", [(8, 8), (24, 8), (16, 40)])
def test_any_size_that_divides_is_taken(size: tuple[int, int]) -> None:
    network = small()
    assert network.size_multiple == 8  # windows of 4 on maps that are half as large
    assert network(*shown(*size)).shape == (2, 3, *size)


def test_masks_follow_the_size_of_the_input() -> None:
    # An image of half the training size in a network of that training size computes the same.
    large, little = small(image_size=32, attention_resolutions=[32, 16], lq_size=32), small()
    little.load_state_dict(large.state_dict(), strict=False)
    torch.testing.assert_close(large(*shown()), little(*shown()), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(12, 16), (16, 20)])
def test_a_size_that_does_not_divide_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"x is {size[0]} x {size[1]}: its sides must divide by 8"):
        small()(*shown(*size))


def test_levels_without_attention_need_no_multiple_of_their_windows() -> None:
    network = small(attention_resolutions=[16], window_size=8)  # the bottom, 8 x 8, is one window
    assert network.size_multiple == 16
    assert not any(".1.patch_embed." in name for name in network.state_dict() if name.startswith("input_blocks.3."))


def test_a_level_smaller_than_the_window_has_one_window_and_no_shift() -> None:
    network = small(window_size=16)
    assert not any(name.endswith("attn_mask") for name in network.state_dict())
    assert network.state_dict()["middle_block.1.blocks.0.attn.relative_position_index"].shape == (64, 64)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_a_larger_L_is_reduced_to_the_state(ratio: int) -> None:
    network = small(lq_size=16 * ratio)
    assert network.L_ratio == ratio
    x, t, y, L = shown(ratio=ratio)
    L.requires_grad_()
    output = network(x, t, y, L)
    assert output.shape == x.shape
    output.square().sum().backward()
    assert L.grad.flatten(1).any(dim=1).all()


def test_without_cond_lq_L_is_not_looked_at() -> None:
    network = small(cond_lq=False)
    assert network.L_ratio is None
    x, t, y, _ = shown()
    assert network(x, t, y, None).shape == x.shape


def test_every_weight_is_trained_and_the_time_matters() -> None:
    network = small()
    x, t, y, L = shown()
    network(x, t, y, L).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())
    assert not torch.allclose(network(x, t, y, L), network(x, t + 1, y, L), **REORDERED)


def test_residual_blocks_start_as_their_skips() -> None:
    options = {"scale": 4, "is_train": True, "netG": {"net_type": "resshift_unet_swin", **SMALL}}
    network = define_G(options)
    ends = [p for name, p in network.named_parameters() if ".out_layers.3." in name]
    assert len(ends) == 2 * (3 + 2 + 5)
    assert not any(p.any() for p in ends)
    assert network.out[2].weight.any()  # the last convolution does not start at zero


def test_checkpointing_changes_neither_output_nor_gradients_and_stores_less() -> None:
    found, stored = [], []
    for use_checkpoint in (False, True):
        network, sizes = small(use_checkpoint=use_checkpoint), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            output = network(*shown())
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), list(network.parameters()))])
        stored.append(sum(sizes))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    assert stored[1] < stored[0] / 2


def test_dropout_is_for_training() -> None:
    network, without = small(dropout=0.5), small()
    torch.testing.assert_close(network.eval()(*shown()), without(*shown()), rtol=0, atol=0)
    assert not torch.allclose(network.train()(*shown()), without(*shown()), **REORDERED)


def test_mixed_precision_stays_near() -> None:
    network = small().eval()
    expected = network(*shown())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(*shown())
    # bfloat16 keeps 8 bits; 2^-9 in each of some fifty layers adds up to a few hundredths of the output's deviation.
    assert (found.float() - expected).std() < 0.05 * expected.std()


def test_channels_last_computes_the_same() -> None:
    network = small().eval()
    expected = network(*shown())
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(*shown()), expected, **REORDERED)


def test_the_network_compiles_without_a_break() -> None:
    network = small(channel_mult=[1, 1], num_res_blocks=[1, 1]).eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*shown()), network(*shown()), **REORDERED)


def test_a_checkpoint_trained_at_another_size_loads_strictly(tmp_path: Path) -> None:
    trained, network = small(image_size=32, attention_resolutions=[32, 16], lq_size=32), small()
    nn.init.normal_(network.out[2].weight)
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "resshift.pth")
    assert load_network(tmp_path / "resshift.pth", network).complete
    torch.testing.assert_close(network(*shown()), trained(*shown()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lq_size": 32, "use_scale_shift_norm": False},
        {"attention_resolutions": [8], "num_res_blocks": [2, 1]},
        {"window_size": 16},
        {"cond_lq": False, "swin_depth": 4},
    ],
)
def test_weights_tell_their_network(changed: dict[str, Any], tmp_path: Path) -> None:
    network = small(**changed)
    save_network(network, tmp_path / "resshift.pth")
    options = infer_netG(network.state_dict())
    found = define_G(options)
    assert load_network(tmp_path / "resshift.pth", found).complete
    assert (found.L_ratio, found.size_multiple) == (network.L_ratio, network.size_multiple)
    assert options["scale"] == (2 if changed.get("lq_size") == 32 else 4)
    torch.testing.assert_close(
        found(*shown(ratio=int(network.L_ratio or 1))), network(*shown(ratio=int(network.L_ratio or 1)))
    )


def test_published_weights_tell_the_published_network() -> None:
    golden = golden_archs.description("resshift_unet_swin_full")
    state = {key: torch.empty(shape, device="meta") for key, shape, _ in golden["manifest"]}
    found, published = infer_netG(state)["netG"], network_options({"netG": {"net_type": "resshift_unet_swin"}}).netG
    assert published is not None
    assert found.items() <= published.model_dump().items()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"out_channels": 4}, "out_channels 4 must be in_channels, 3"),
        ({"num_res_blocks": [1]}, "num_res_blocks names 1 levels, channel_mult 2"),
        ({"image_size": 15}, "image_size 15 must divide by 2"),
        ({"model_channels": 40}, "model_channels 40 must divide by 32"),
        ({"swin_embed_dim": 40}, "swin_embed_dim 40 must divide by 32"),
        ({"num_head_channels": 20}, "swin_embed_dim 32 must divide by num_head_channels 20"),
        ({"lq_size": 48}, "lq_size 48 must be image_size 16 times 1, 2, 4"),
        ({"lq_size": 8}, "lq_size 8 must be image_size 16 times 1, 2, 4"),
        ({"window_size": 6}, "window_size 6 does not divide a level's side, 16"),
        ({"resblock_updown": True}, "netG.resblock_updown"),
    ],
)
def test_wrong_options_end_in_one_line(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        define_G({"scale": 4, "netG": {"net_type": "resshift_unet_swin", **SMALL, **changed}})
    assert "\n" not in str(caught.value)


def test_gray_images_are_refused_with_an_L_of_three_channels(tmp_path: Path) -> None:
    content = {"task": "gray", "model": "dm", "n_channels": 1, "diffusion": {"type": "resshift"}}
    file = tmp_path / "gray.json"
    file.write_text(json.dumps({**content, "netG": {"net_type": "resshift_unet_swin"}}))
    with pytest.raises(UserError, match="n_channels: resshift_unet_swin looks at an RGB image, 3 channels, not 1"):
        parse(file, is_train=False)
    assert parse(file, is_train=False, overrides=["netG.cond_lq=false"]).n_channels == 1


def test_swinir_is_not_taken_for_it() -> None:
    network = SwinIR(img_size=8, window_size=4, depths=(2,), embed_dim=12, num_heads=(2,), upscale=2)
    assert infer_netG(network.state_dict())["netG"]["net_type"] == "swinir"
