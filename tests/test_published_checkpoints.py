"""Checkpoints in their authors' layouts, made from the golden lists of names, through main_test.py and spandrel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from main_test import main
from models.network_infer import infer_netG
from models.select_network import define_G
from tests import golden_archs
from utils.utils_checkpoint import save_network
from utils.utils_error import UserError

Weights = dict[str, Tensor]


def bare(weights: Weights) -> Any:
    return weights


def averaged(weights: Weights) -> Any:
    """BasicSR's file: the average is what counts; the other weights must not be taken."""
    return {"params": {key: torch.zeros_like(value) for key, value in weights.items()}, "params_ema": weights}


def params(weights: Weights) -> Any:
    return {"params": weights}


def of_wrapped_network(weights: Weights) -> Any:
    return {f"module.{key}": value for key, value in weights.items()}


# fixture -> how its authors store such a network
LAYOUTS: dict[str, Callable[[Weights], Any]] = {
    "rrdbnet_x4_small": averaged,
    "rrdbnet_x2_small": averaged,
    "rrdbnet_x1_small": averaged,
    "rrdbnet_bsrgan_layout_x4_small": bare,
    "rrdbnet_bsrgan_layout_x2_small": bare,
    "rrdbnet_bebygan_x4_small": of_wrapped_network,
    "kair_rrdb_x4_upconv_small": bare,
    "kair_rrdb_x3_upconv_small": bare,
    "msrresnet_x4_small": params,
    "kair_msrresnet0_x4_upconv_small": bare,
    "kair_msrresnet1_x4_small": bare,
    "ranksrgan_srresnet_x4_small": bare,
    "ranksrgan_srresnet_x3_small": bare,
    "spsrnet_x4_small": bare,
    "srvgg_compact_prelu_small": params,
    "kair_swinir_x4_not_multiple": params,
    "kair_swinir_realsr_x4": averaged,
    "kair_swinir_light_x2": params,
    "elan_x4_small_padded": bare,
}


def published_weights(name: str) -> Weights:
    """All tensors of the fixture's list: drawn by its rule, the constants as the network computes them."""
    golden = golden_archs.description(name)
    weights = golden_archs.values(golden)
    if golden["fill"]["kept_keys"]:
        shapes = {key: torch.empty(shape, device="meta") for key, shape, _ in golden["manifest"]}
        constants = define_G(infer_netG(shapes, int(name[name.index("_x") + 2]) if "_x" in name else None)).state_dict()
        weights = {key: weights.get(key, constants[key]) for key, _, _ in golden["manifest"]}
    return weights


def golden_image(name: str) -> np.ndarray:
    stored = golden_archs.arrays(name)
    return stored["output_sr" if "output_sr" in stored else "output"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_checkpoint_gives_the_golden_image(name: str, tmp_path: Path) -> None:
    (x,) = golden_archs.inputs(golden_archs.description(name))
    expected = golden_image(name)[0]
    scale = expected.shape[-1] // x.shape[-1]
    torch.save(LAYOUTS[name](published_weights(name)), tmp_path / "published.pth")
    # 16 bits: the finest that image files carry.
    levels = (x[0].numpy()[::-1].transpose(1, 2, 0) * 65535).round().astype(np.uint16)
    cv2.imwrite(str(tmp_path / "L.png"), levels)

    command = ["--model_path", str(tmp_path / "published.pth"), "--input", str(tmp_path / "L.png")]
    main([*command, "--scale", str(scale), "--output", str(tmp_path / "results")])

    (image,) = (tmp_path / "results").rglob("L.png")
    found = cv2.imread(str(image), cv2.IMREAD_UNCHANGED)
    assert found.dtype == np.uint16
    E = found[..., ::-1].transpose(2, 0, 1) / 65535
    # Half a level is lost in each file, and the input's is amplified: random weights make outputs of up to 78, from
    # inputs of 1. Seen: 3e-5 at most of the largest output.
    tolerance = 1 / 65535 + 1e-4 * np.abs(expected).max()
    assert np.abs(E - expected.clip(0, 1)).max() < tolerance
    assert ((expected > tolerance) & (expected < 1 - tolerance)).sum() > 30  # what clipping leaves to compare


SPANDREL = [name for name in LAYOUTS if "swinir" in name or name.startswith("srvgg")]


@pytest.mark.parametrize("name", SPANDREL)
def test_spandrel_gives_the_golden_image_of_what_we_save(name: str, tmp_path: Path) -> None:
    spandrel = pytest.importorskip("spandrel", reason="needs requirements-extra.txt")
    weights = published_weights(name)
    expected = torch.from_numpy(golden_image(name))
    (x,) = golden_archs.inputs(golden_archs.description(name))
    network = define_G(infer_netG(weights, expected.shape[-1] // x.shape[-1]))
    network.load_state_dict(weights)
    save_network(network, tmp_path / "ours.pth")
    with torch.no_grad():
        E = spandrel.ModelLoader(device="cpu").load_from_file(tmp_path / "ours.pth")(x)
    # spandrel clamps to [0, 1]; the bound is the fixtures' own for float32 outputs.
    assert (E - expected.clamp(0, 1)).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("netG", [{"net_type": net_type} for net_type in ("rrdbnet", "rrdbnet_basicsr")])
def test_spandrel_computes_the_same_with_our_rrdbnets(netG: dict[str, Any], tmp_path: Path) -> None:
    """Of the published width: spandrel takes the growth of 32 for granted, which the small fixtures lack."""
    spandrel = pytest.importorskip("spandrel", reason="needs requirements-extra.txt")
    torch.manual_seed(0)
    network = define_G({"scale": 4, "n_channels": 3, "netG": {**netG, "nf": 64, "nb": 1, "gc": 32}}).eval()
    save_network(network, tmp_path / "ours.pth")
    x = torch.rand(1, 3, 6, 7)
    with torch.no_grad():
        found, expected = spandrel.ModelLoader(device="cpu").load_from_file(tmp_path / "ours.pth")(x), network(x)
    # One network, computed twice in float32; random weights give outputs of up to about 0.1.
    assert torch.allclose(found, expected.clamp(0, 1), atol=1e-6)
    assert expected.clamp(0, 1).std() > 1e-3


def test_a_checkpoint_of_another_network_is_one_line_with_what_was_expected_and_found(tmp_path: Path) -> None:
    torch.save(published_weights("msrresnet_x4_small"), tmp_path / "msrresnet.pth")
    options = tmp_path / "test.json"
    options.write_text(
        '{"task": "t", "scale": 4, "netG": {"net_type": "rrdbnet", "nf": 8, "nb": 1, "gc": 4},'
        f' "path": {{"root": "{tmp_path}", "pretrained_netG": "{tmp_path}/msrresnet.pth"}},'
        f' "datasets": {{"test": {{"dataset_type": "l", "dataroot_L": "{tmp_path}"}}}}}}'
    )
    with pytest.raises(UserError) as error:
        main(["--opt", str(options)])
    message = str(error.value)
    assert "\n" not in message
    assert "msrresnet.pth" in message
    assert "RRDBNet" in message
    assert "conv_first.weight: expected 8x3x3x3, found 16x3x3x3" in message
