"""The networks of SPSR, RankSRGAN and BasicSR's discriminators compute what the published ones compute."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.network_discriminator import DiscriminatorUNet, DiscriminatorUNetSmall, DiscriminatorVGGStyle, VGGStages
from models.network_ranksrgan import RankerVGG12, RankSRGANSRResNet
from models.network_spsr import GradientMap, SPSRNet
from tests import golden_archs
from tests.golden_numbers import Tensors
from utils.utils_checkpoint import load_network, save_network

# The fixtures' own bound for float32; a correct network is near 1e-6, known mistakes move outputs by 5e-5 to 0.7.
FLOAT32 = 1e-4
# Our sum of squares over a map in another order than the reference's float64 sum.
FLOAT64_FROM_FLOAT32_WEIGHTS = 1e-6

# By prefix of the fixture: the class, what the published class takes and ours does not, and ours on top.
CLASSES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "spsrnet": (SPSRNet, {}),
    "ranksrgan_srresnet": (RankSRGANSRResNet, {}),
    "ranker_vgg12_296": (RankerVGG12, {}),
    "vgg_style_discriminator": (DiscriminatorVGGStyle, {}),
    "discriminator_vgg_192": (DiscriminatorVGGStyle, {"input_size": 192}),
    "discriminator_vgg_296": (DiscriminatorVGGStyle, {"input_size": 296}),
    "discriminator_sn_vgg_192": (DiscriminatorVGGStyle, {"input_size": 192, "norm_type": "spectral"}),
    "unet_discriminator_sn": (DiscriminatorUNet, {}),
    "unet_discriminator_sn_v1": (DiscriminatorUNetSmall, {}),
}
IN_NC = ("in_nc", "num_in_ch", "in_chl")
BASE_NC = ("nf", "num_feat")
ONE_FORM = ("norm_type", "mode")  # of SPSRNet, always None and "CNA"


def build(name: str, golden: dict[str, Any]) -> nn.Module:
    cls, added = CLASSES[max((p for p in CLASSES if name.startswith(p)), key=len)]
    width = "nf" if cls in (SPSRNet, RankSRGANSRResNet) else "base_nc"
    arguments = {}
    for key, value in golden["constructor"].items():
        if key not in ONE_FORM:
            arguments["in_nc" if key in IN_NC else width if key in BASE_NC else key] = value
    return cls(**arguments, **added)


def check_manifest(network: nn.Module, golden: dict[str, Any]) -> None:
    found = [[key, list(value.shape)] for key, value in network.state_dict().items()]
    assert found == [[key, shape] for key, shape, _ in golden["manifest"]]
    assert sum(p.numel() for p in network.parameters()) == golden["parameters"]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == golden["trainable_parameters"]


def named_outputs(output: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output}
    return dict(zip(("output_branch", "output_sr", "output_gradient"), output, strict=True))


@pytest.mark.parametrize("name", golden_archs.names(*CLASSES))
def test_a_network_computes_the_golden_numbers(name: str) -> None:
    golden, stored = golden_archs.description(name), golden_archs.arrays(name)
    network = build(name, golden)
    check_manifest(network, golden)
    golden_archs.fill(network, golden)
    (x,) = golden_archs.inputs(golden)
    state = copy.deepcopy(network.state_dict())

    network.eval()
    x.requires_grad_("input_gradient" in stored)
    outputs = named_outputs(network(x))
    assert outputs.keys() == golden["outputs"].keys()
    for key, output in outputs.items():
        assert golden_archs.relative_error(output, stored[key]) < FLOAT32
    if x.requires_grad:
        (gradient,) = torch.autograd.grad(outputs["output"].sum(), x)
        if gradient.shape != stored["input_gradient"].shape:
            gradient = gradient[:, :, 3::8, 5::8]
        errors = golden_archs.relative_errors(gradient, stored["input_gradient"])
        # A LeakyReLU whose input lies within a rounding of zero may take its other slope, on another machine or in
        # float64; that changes the gradient of the pixels it sees. discriminator_vgg_296 has one such unit and
        # ranker_vgg12_296 another: 0.3 % and 0.7 % of their pixels move by up to 0.025, and giving that one unit its
        # other slope brings all of them to 1e-6. A wrong network moves nearly all pixels.
        assert (errors > FLOAT32).double().mean() < 0.02
        assert errors.max() < 0.05
    for module in golden["fill"]["spectral_norm_modules"]:
        weight, u, v = (state[f"{module}.weight_{part}"].double() for part in ("orig", "u", "v"))
        sigma = float(u @ weight.flatten(1) @ v)
        assert sigma == pytest.approx(float(stored[f"sigma/{module}"]), rel=FLOAT64_FROM_FLOAT32_WEIGHTS)
    if "train_probe" in golden:
        network.load_state_dict(state)
        network.train()
        with torch.no_grad():
            assert golden_archs.relative_error(network(x), stored["output_train"]) < FLOAT32
        after = network.state_dict()
        for key in stored:
            if key.startswith("after_one_train_forward/"):
                assert golden_archs.relative_error(after[key.partition("/")[2]], stored[key]) < FLOAT32


@pytest.mark.parametrize("name", golden_archs.names(*CLASSES, full=True))
def test_a_network_of_published_size_has_the_published_keys(name: str) -> None:
    golden = golden_archs.description(name)
    with torch.device("meta"):
        check_manifest(build(name, golden), golden)


# ------------------------------------------------------------------------------------------------------- generators


def small_spsr(**changed: Any) -> SPSRNet:
    return SPSRNet(**{"nf": 4, "nb": 20, "gc": 2, **changed})


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_spsr_enlarges_odd_sizes_and_estimates_their_gradient(scale: int, n_channels: int) -> None:
    network = small_spsr(in_nc=n_channels, out_nc=n_channels, upscale=scale)
    output = network(torch.rand(1, n_channels, 7, 9))
    assert output.gradient.shape == output.E.shape == (1, n_channels, 7 * scale, 9 * scale)
    assert output.gradient_L.shape == (1, n_channels, 7, 9)
    (output.gradient.sum() + output.E.sum()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("upsample_mode", ["pixelshuffle", "convtranspose"])
def test_spsr_enlarges_in_every_upsampling_mode(upsample_mode: str) -> None:
    output = small_spsr(upscale=3, upsample_mode=upsample_mode)(torch.rand(1, 3, 5, 4))
    assert output.gradient.shape == output.E.shape == (1, 3, 15, 12)


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_srresnet_enlarges_odd_sizes_by_the_scale(scale: int, n_channels: int) -> None:
    network = RankSRGANSRResNet(n_channels, n_channels, nf=8, nb=2, upscale=scale)
    output = network(torch.rand(2, n_channels, 7, 9))
    assert output.shape == (2, n_channels, 7 * scale, 9 * scale)
    output.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_srresnet_starts_with_small_residuals_and_the_default_long_convolution() -> None:
    torch.manual_seed(0)
    network = RankSRGANSRResNet(nf=16, nb=2)
    is_scaled = {
        key.removesuffix(".bias"): not value.any() for key, value in network.state_dict().items() if "bias" in key
    }
    assert [name for name, scaled in is_scaled.items() if not scaled] == ["LRconv"]
    # Kaiming's deviation for 16 x 9 inputs, times 0.1; 2304 draws scatter by 1.5 %.
    assert float(network.recon_trunk[1].conv2.weight.detach().std()) == pytest.approx(0.1 * (2 / 144) ** 0.5, rel=0.1)


@pytest.mark.parametrize("network", [small_spsr(), RankSRGANSRResNet(nf=8, nb=2)])
def test_a_generator_in_double_precision_agrees_with_itself(network: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 3, 6, 8)
    with torch.no_grad():
        single = named_outputs(network(x))
        double = named_outputs(network.double()(x.double()))
    for key in single:
        assert double[key].dtype == torch.float64
        # Sums of a few hundred float32 products of order 1.
        torch.testing.assert_close(single[key], double[key].float(), atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_neither_output_nor_gradients() -> None:
    torch.manual_seed(0)
    plain = small_spsr(upscale=2)
    saving = small_spsr(upscale=2, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 6, 6)
    gradients = []
    for network in (plain, saving):
        output = network(x)
        (output.gradient.square().sum() + output.E.square().sum()).backward()
        gradients.append([output.E.detach()] + [p.grad for p in network.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_checkpointing_keeps_what_lies_between_blocks_only() -> None:
    def kept_bytes(network: SPSRNet) -> int:
        kept: dict[int, int] = {}  # the same tensor is kept by more than one operation

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        x = torch.rand(1, 3, 16, 16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = network(x)
        del outputs
        return sum(kept.values())

    torch.manual_seed(0)
    assert kept_bytes(small_spsr(use_checkpoint=True)) < 0.5 * kept_bytes(small_spsr())


def test_growth_channels_of_spsr_are_honoured() -> None:
    state = small_spsr(gc=3).state_dict()
    assert state["model.1.sub.0.RDB1.conv1.0.weight"].shape == (3, 4, 3, 3)
    assert state["b_block_1.RDB1.conv1.0.weight"].shape == (3, 8, 3, 3)


def test_the_layer_under_two_names_stays_one_layer() -> None:
    network = copy.deepcopy(small_spsr())
    last = [layer for layer in network.model.children() if isinstance(layer, nn.Conv2d)][-1]
    assert last.weight is network.HR_conv0_new[0].weight


def test_a_checkpoint_of_spsr_and_of_the_ranker_loads_whole(tmp_path: Path) -> None:
    for network, other in ((small_spsr(), small_spsr()), (RankerVGG12(base_nc=2), RankerVGG12(base_nc=2))):
        save_network(network, tmp_path / "saved.pth")
        assert load_network(tmp_path / "saved.pth", other).complete
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nb": 19}, "nb 19: .* expected 20 or more"),
        ({"upscale": 5}, "scale 5"),
        ({"upsample_mode": "nearest"}, "upsample_mode 'nearest'"),
    ],
)
def test_an_spsr_network_that_cannot_be_built_says_why(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small_spsr(**changed)


# ----------------------------------------------------------------------------------------------------- gradient map


def test_the_gradient_map_is_the_length_of_central_differences() -> None:
    image = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    padded = torch.zeros(2, 3, 7, 8, dtype=torch.float64)
    padded[..., 1:-1, 1:-1] = image
    v = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    h = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    # The same few operations in float64.
    torch.testing.assert_close(GradientMap().double()(image), (v**2 + h**2 + 1e-6).sqrt(), atol=1e-14, rtol=1e-12)


def test_the_gradient_map_has_a_finite_gradient_where_the_image_is_flat() -> None:
    image = torch.full((1, 1, 5, 5), 0.5, dtype=torch.float64, requires_grad=True)
    GradientMap().double()(image).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad[0, 0, 2, 2] == 0
    assert torch.autograd.gradcheck(
        GradientMap().double(), torch.rand(1, 2, 4, 5, dtype=torch.float64).requires_grad_()
    )


def test_the_gradient_map_has_the_published_numbers() -> None:
    stored = Tensors("losses/spsr_gradient.npz")
    image = stored["image"].requires_grad_()
    found = GradientMap().double()(image)
    (vjp,) = torch.autograd.grad(found, image, stored["cotangent"])
    # Float64 from the same float32 image.
    torch.testing.assert_close(found.detach(), stored["gradient_map"], rtol=1e-12, atol=0)
    torch.testing.assert_close(vjp, stored["vjp"], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------ discriminators and ranker


@pytest.mark.parametrize("norm_type", ["batch", "spectral"])
@pytest.mark.parametrize("input_size", [128, 192, 256, 296])
def test_a_vgg_style_discriminator_of_any_width_takes_its_size_only(input_size: int, norm_type: str) -> None:
    network = DiscriminatorVGGStyle(1, 2, input_size, norm_type)
    output = network(torch.rand(2, 1, input_size, input_size))
    assert output.shape == (2, 1)
    output.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    for wrong in ((input_size, input_size - 8), (64, 64)):
        with pytest.raises(
            ValueError, match=f"expected {input_size} x {input_size} pixels, got {wrong[0]} x {wrong[1]}"
        ):
            network(torch.rand(2, 1, *wrong))


def test_a_vgg_style_discriminator_of_another_size_or_norm_is_not_built() -> None:
    with pytest.raises(ValueError, match="input_size 96: expected 128, 192, 256, 296"):
        DiscriminatorVGGStyle(input_size=96)
    with pytest.raises(ValueError, match="norm_type 'instance': expected batch or spectral"):
        VGGStages(3, 4, 5, "instance")


def test_the_skips_of_the_unet_can_be_left_out_with_the_same_weights() -> None:
    torch.manual_seed(0)
    with_skips, without = (
        DiscriminatorUNet(base_nc=4).eval(),
        DiscriminatorUNet(base_nc=4, skip_connection=False).eval(),
    )
    without.load_state_dict(with_skips.state_dict())
    x = torch.rand(1, 3, 16, 24)
    assert without(x).shape == with_skips(x).shape == (1, 1, 16, 24)
    assert not torch.allclose(without(x), with_skips(x))


@pytest.mark.parametrize("size", [(25, 25), (2, 3), (8, 11)])
def test_the_small_unet_gives_one_logit_a_pixel_of_any_size(size: tuple[int, int]) -> None:
    network = DiscriminatorUNetSmall(1, 4)
    output = network(torch.rand(2, 1, *size))
    assert output.shape == (2, 1, *size)
    output.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_ranker_scores_each_image_by_itself_at_any_size() -> None:
    torch.manual_seed(0)
    ranker = RankerVGG12(base_nc=4).eval()
    for size in ((32, 32), (40, 70), (96, 96)):
        images = torch.rand(3, 3, *size, requires_grad=True)
        scores = ranker(images)
        assert scores.shape == (3, 1)
        # Another batch may take another order of summation.
        torch.testing.assert_close(scores[1:2], ranker(images[1:2]), atol=1e-6, rtol=1e-5)
        (gradient,) = torch.autograd.grad(scores[0].sum(), images)
        assert gradient[0].abs().max() > 0
        assert gradient[1:].abs().max() == 0


@pytest.mark.parametrize("size", [(31, 64), (64, 16)])
def test_an_image_too_small_for_the_ranker_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"expected 32 x 32 pixels or more, got {size[0]} x {size[1]}"):
        RankerVGG12(base_nc=2)(torch.rand(1, 3, *size))


def test_a_discriminator_in_double_precision_agrees_with_itself() -> None:
    torch.manual_seed(0)
    for network, side in (
        (DiscriminatorVGGStyle(base_nc=2), 128),
        (DiscriminatorUNet(base_nc=2), 16),
        (RankerVGG12(base_nc=2), 32),
    ):
        x = torch.rand(2, 3, side, side)
        with torch.no_grad():
            for _ in range(10):  # until the vectors of spectral norm have left their random start
                network(x)
            single = network.eval()(x)
            double = network.double()(x.double())
        # Sums of a few hundred float32 products of order 1.
        torch.testing.assert_close(single, double.float(), atol=1e-5, rtol=1e-4)
