"""Which network a checkpoint holds: models/network_infer.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.export_ncnn import published_weights
from models.network_infer import infer_netG
from models.select_network import define_G
from tests import golden_archs
from utils.utils_checkpoint import load_network, load_state_dict
from utils.utils_error import UserError

RRDB = {"nf": 8, "nb": 2, "gc": 4}
RES = {"nc": 8, "nb": 3}
SWIN = {
    "img_size": 14,
    "window_size": 7,
    "img_range": 255.0,
    "depths": [2, 1],
    "embed_dim": 12,
    "num_heads": [2, 3],
    "mlp_ratio": 1.5,
    "resi_connection": "1conv",
}
SPSR = {"nf": 4, "nb": 20, "gc": 2}

# (netG, scales whose weights tell their scale, scales that need --scale)
NETWORKS: list[tuple[dict[str, Any], list[int], list[int]]] = [
    ({"net_type": "rrdbnet_basicsr", **RRDB}, [1, 2, 4], []),
    ({"net_type": "rrdbnet", **RRDB}, [4], [2, 3]),
    ({"net_type": "rrdb", "upsample_mode": "upconv", **RRDB}, [4], [2, 3]),
    ({"net_type": "rrdb", "upsample_mode": "pixelshuffle", **RRDB}, [2, 3, 4], []),
    ({"net_type": "rrdb", "upsample_mode": "convtranspose", **RRDB}, [2, 3, 4], []),
    ({"net_type": "msrresnet0", "upsample_mode": "upconv", **RES}, [4], [2, 3]),
    ({"net_type": "msrresnet0", "upsample_mode": "pixelshuffle", **RES}, [2, 3, 4], []),
    ({"net_type": "msrresnet0", "upsample_mode": "convtranspose", **RES}, [2, 3, 4], []),
    ({"net_type": "msrresnet1", **RES}, [2, 3, 4], []),
    ({"net_type": "spsr", "upsample_mode": "upconv", **SPSR}, [4], [2, 3]),
    ({"net_type": "spsr", "upsample_mode": "pixelshuffle", **SPSR}, [3], []),
    ({"net_type": "spsr", "upsample_mode": "convtranspose", **SPSR}, [2], []),
    ({"net_type": "ranksrgan_srresnet", "nf": 8, "nb": 3}, [2, 3, 4], []),
    ({"net_type": "srvgg_compact", "nf": 8, "nc": 3, "act_type": "prelu"}, [1, 2, 3, 4], []),
    ({"net_type": "swinir", "upsampler": "pixelshuffle", **SWIN}, [1, 2, 3, 4, 8], []),
    ({"net_type": "swinir", "upsampler": "pixelshuffledirect", **SWIN}, [1, 2, 3, 4], []),
    ({"net_type": "swinir", "upsampler": "nearest+conv", **SWIN}, [1, 4, 8], [2, 3]),
    ({"net_type": "swinir", "upsampler": None, **SWIN, "resi_connection": "3conv"}, [1], []),
    ({"net_type": "elan", "m_elan": 4, "c_elan": 6, "n_share": 1, "r_expand": 3}, [1, 2, 3, 4], []),
]


def weights(netG: dict[str, Any], scale: int, n_channels: int = 3) -> dict[str, Tensor]:
    return define_G({"scale": scale, "n_channels": n_channels, "netG": netG}).state_dict()


def fixture_weights(name: str) -> dict[str, Tensor]:
    """Tensors of the names and shapes that a published implementation has; no values, no memory."""
    manifest = golden_archs.description(name)["manifest"]
    return {key: torch.empty(shape, device="meta") for key, shape, _ in manifest}


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize(("netG", "scales", "open_scales"), NETWORKS)
def test_every_network_is_told_from_its_weights(netG, scales, open_scales, n_channels):
    for scale in scales:
        expected = {"scale": scale, "n_channels": n_channels, "is_train": False, "netG": netG}
        assert infer_netG(weights(netG, scale, n_channels)) == expected
        assert infer_netG(weights(netG, scale, n_channels), scale) == expected
    for scale in open_scales:
        with pytest.raises(UserError, match="--scale"):
            infer_netG(weights(netG, scale, n_channels))
        assert infer_netG(weights(netG, scale, n_channels), scale)["scale"] == scale


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in golden_archs.names("rrdbnet", "kair_rrdb", "msrresnet", "kair_msrresnet", "spsr", "ranksr")
        if "x1" not in n
    ],
)
def test_published_layouts_are_recognised_and_load(name, tmp_path):
    scale = int(name[name.index("_x") + 2])
    found = fixture_weights(name)
    network = define_G(infer_netG(found, scale))
    torch.save({key: torch.zeros(value.shape) for key, value in found.items()}, tmp_path / "x.pth")
    assert load_network(tmp_path / "x.pth", network).complete


def test_old_esrgan_becomes_rrdbnet_and_loads(tmp_path):
    kair = weights({"net_type": "rrdb", **RRDB}, 4)
    old = {key.replace("conv5.", "conv5.0."): value for key, value in kair.items()}
    found = infer_netG(old)
    assert found["netG"] == {"net_type": "rrdbnet", **RRDB}
    torch.save(old, tmp_path / "old.pth")
    assert load_network(tmp_path / "old.pth", define_G(found)).complete


@pytest.mark.parametrize("scale", [1, 2, 3, 8])
def test_an_exported_rrdbnet_of_any_scale_is_told_from_its_weights(scale, tmp_path):
    """main_export.py writes BasicSR's names, with as many upsamplings as the scale has."""
    network = define_G(
        {"scale": scale, "n_channels": 3, "is_train": False, "netG": {"net_type": "rrdbnet", "nf": 8, "nb": 1, "gc": 4}}
    )
    path = tmp_path / "x.pth"
    torch.save(published_weights(network), path)
    weights = load_state_dict(path)
    options = infer_netG(weights, 3 if scale == 3 else None if scale != 2 else 2)
    assert options["scale"] == scale
    again = define_G(options)
    assert load_network(path, again).complete
    for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_esrgan_plus_is_left_to_spandrel(monkeypatch):
    asked = []

    def described(weights):
        asked.append(len(weights))
        raise UserError("spandrel is asked")

    monkeypatch.setattr("models.network_infer.describe_weights", described)
    rdb = "model.1.sub.0.RDB1"
    weights = {f"{rdb}.conv1.0.weight": torch.zeros(1), f"{rdb}.conv1x1.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="spandrel is asked"):
        infer_netG(weights)


def test_a_scale_that_contradicts_the_weights_is_refused():
    with pytest.raises(UserError, match="scale 2 contradicts the weights, which are made for scale 4"):
        infer_netG(weights({"net_type": "rrdbnet", **RRDB}, 4), scale=2)
    with pytest.raises(UserError, match="made for scale 2 or 3"):
        infer_netG(weights({"net_type": "rrdbnet", **RRDB}, 2), scale=4)


def test_relu_and_leakyrelu_leave_no_trace_and_need_the_options():
    for act_type in ("relu", "leakyrelu"):
        netG = {"net_type": "srvgg_compact", "nf": 8, "nc": 3, "act_type": act_type}
        with pytest.raises(UserError, match="--opt"):
            infer_netG(weights(netG, 4))


@pytest.mark.parametrize(
    "found",
    [
        {"layers.0.residual_group.blocks.0.attn.qkv.weight": torch.zeros(3, 3)},  # SwinIR
        {"conv0.weight": torch.zeros(8, 3, 3, 3), "conv1.weight_orig": torch.zeros(8, 8, 4, 4)},  # a discriminator
        {},
    ],
)
def test_other_networks_are_refused_with_a_few_names_and_the_remedy(found):
    with pytest.raises(UserError, match="--opt") as error:
        infer_netG(found)
    assert all(name in str(error.value) for name in list(found)[:3])


def test_incomplete_weights_are_refused_in_one_line():
    found = weights({"net_type": "rrdbnet", **RRDB}, 4)
    del found["conv_last.weight"]
    with pytest.raises(UserError, match="conv_last"):
        infer_netG(found)
