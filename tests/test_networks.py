"""Every network computes what the published one computes, under the published names."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from models.network_discriminator import (
    DiscriminatorPatchGAN,
    DiscriminatorUNet,
    DiscriminatorVGG,
    DiscriminatorVGG128SN,
)
from models.network_feature import VGGFeatureExtractor
from models.network_msrresnet import MSRResNet0, MSRResNet1
from models.network_rrdb import RRDB
from models.network_rrdbnet import RRDBNet, RRDBNetBasicSR
from models.network_srvgg import SRVGGNetCompact
from models.select_network import define_D, define_G, init_weights
from tests import golden_archs
from utils.utils_error import UserError

# The fixtures' own bound for float32; a correct network is near 1e-6, known mistakes move outputs by 5e-5 to 0.7.
FLOAT32 = 1e-4
# Our sum of squares over a map in another order than the reference's float64 sum.
FLOAT64_FROM_FLOAT32_WEIGHTS = 1e-6

RENAMED = {
    "num_in_ch": "in_nc",
    "num_out_ch": "out_nc",
    "input_nc": "in_nc",
    "ndf": "base_nc",
    "ac_type": "act_mode",
}
CLASSES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "kair_rrdbnet": (RRDBNet, {}),
    "rrdbnet_bsrgan": (RRDBNet, {}),
    "rrdbnet_bebygan": (RRDBNet, {}),
    "rrdbnet_x": (RRDBNetBasicSR, {"num_feat": "nf", "num_block": "nb", "num_grow_ch": "gc", "scale": "sf"}),
    "kair_rrdb_": (RRDB, {"nc": "nf"}),
    "kair_msrresnet0": (MSRResNet0, {}),
    "kair_msrresnet1": (MSRResNet1, {}),
    "srvgg_compact": (SRVGGNetCompact, {"num_feat": "nf", "num_conv": "nc"}),
    "kair_discriminator_unet": (DiscriminatorUNet, {}),
    "kair_discriminator_patchgan": (DiscriminatorPatchGAN, {}),
    "kair_discriminator_vgg_128_sn": (DiscriminatorVGG128SN, {}),
    "kair_discriminator_vgg": (DiscriminatorVGG, {}),
}


def build(name: str, golden: dict[str, Any]) -> nn.Module:
    prefix = max((p for p in CLASSES if name.startswith(p)), key=len)
    cls, renamed = CLASSES[prefix]
    arguments = {renamed.get(k, RENAMED.get(k, k)): v for k, v in golden["constructor"].items()}
    if cls is DiscriminatorVGG:
        arguments["input_size"] = int(name.split("_")[3])
    return cls(**arguments)


def check_manifest(network: nn.Module, golden: dict[str, Any]) -> None:
    found = [[key, list(value.shape)] for key, value in network.state_dict().items()]
    assert found == [[key, shape] for key, shape, _ in golden["manifest"]]
    assert sum(p.numel() for p in network.parameters()) == golden["parameters"]


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
    output = network(x)
    assert golden_archs.relative_error(output, stored["output"]) < FLOAT32
    if x.requires_grad:
        (gradient,) = torch.autograd.grad(output.sum(), x)
        if gradient.shape != stored["input_gradient"].shape:
            gradient = gradient[:, :, 3::8, 5::8]
        errors = golden_archs.relative_errors(gradient, stored["input_gradient"])
        # A LeakyReLU whose input lies within a rounding of zero may take its other slope, on another machine or in
        # float64; that changes the gradient of the pixels it sees. discriminator_vgg_192 has two: 0.5 % of its pixels
        # move by up to 0.007 while the median error stays at 2e-7. A wrong network moves nearly all of them.
        assert (errors > FLOAT32).double().mean() < 0.02
        assert errors.max() < 0.02
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


def generator_options(net_type: str, scale: int, n_channels: int, **changed: Any) -> SimpleNamespace:
    net = SimpleNamespace(
        **{
            "net_type": net_type,
            "in_nc": n_channels,
            "out_nc": n_channels,
            "nf": 8,
            "nc": 8,
            "nb": 2,
            "gc": 4,
            "use_checkpoint": False,
            "act_mode": "R",
            "upsample_mode": "upconv",
            "act_type": "prelu",
            "init_type": "orthogonal",
            "init_bn_type": "uniform",
            "init_gain": 0.2,
            **changed,
        }
    )
    return SimpleNamespace(scale=scale, n_channels=n_channels, is_train=True, netG=net, netD=None)


GENERATORS = ["rrdbnet", "rrdbnet_basicsr", "rrdb", "msrresnet0", "msrresnet1", "srvgg_compact"]


@pytest.mark.parametrize("net_type", GENERATORS)
@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_every_generator_enlarges_odd_sizes_by_the_scale(net_type: str, n_channels: int, scale: int) -> None:
    network = define_G(generator_options(net_type, scale, n_channels))
    output = network(torch.rand(2, n_channels, 7, 9))
    assert output.shape == (2, n_channels, 7 * scale, 9 * scale)
    output.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("act_mode", ["BR", "IL"])
@pytest.mark.parametrize("net_type", ["rrdb", "msrresnet0"])
def test_norms_of_act_mode_work_in_every_upsampling_mode(net_type: str, act_mode: str) -> None:
    for mode in ("upconv", "pixelshuffle", "convtranspose"):
        network = define_G(generator_options(net_type, 2, 3, act_mode=act_mode, upsample_mode=mode))
        assert network(torch.rand(1, 3, 6, 5)).shape == (1, 3, 12, 10)


def test_growth_channels_of_rrdb_are_honoured() -> None:
    assert RRDB(nf=8, nb=1, gc=4).state_dict()["model.1.sub.0.RDB1.conv1.0.weight"].shape == (4, 8, 3, 3)


def test_checkpointing_changes_neither_output_nor_gradients() -> None:
    torch.manual_seed(0)
    plain = RRDBNet(nf=8, nb=2, gc=4, sf=2)
    saving = RRDBNet(nf=8, nb=2, gc=4, sf=2, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 8, 8)
    gradients = []
    for network in (plain, saving):
        output = network(x)
        output.square().sum().backward()
        gradients.append([output.detach()] + [p.grad for p in network.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_msrresnet1_warns_that_it_has_one_form() -> None:
    with pytest.warns(UserWarning, match="no effect"):
        MSRResNet1(nc=4, nb=1, upsample_mode="pixelshuffle")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"net_type": "rrdbnet", "scale": 5}, "scale 5"),
        ({"net_type": "rrdb", "act_mode": "X"}, "unknown letter 'X'"),
        ({"net_type": "rrdb", "upsample_mode": "nearest"}, "upsample_mode 'nearest'"),
        ({"net_type": "srvgg_compact", "act_type": "gelu"}, "act_type 'gelu'"),
        ({"net_type": "srvgg_compact", "out_nc": 1}, "in_nc 3 must equal out_nc 1"),
        ({"net_type": "msrresnet1", "out_nc": 1}, "in_nc 3 must equal out_nc 1"),
        ({"net_type": "rdbnet"}, "netG.net_type: 'rdbnet'"),
        ({"net_type": "rrdbnet", "init_type": "orthogonol"}, "init_type: 'orthogonol'"),
    ],
)
def test_a_generator_that_cannot_be_built_says_why(changed: dict[str, Any], said: str) -> None:
    changed = dict(changed)
    opt = generator_options(changed.pop("net_type"), changed.pop("scale", 4), 3, **changed)
    with pytest.raises(UserError, match=said):
        define_G(opt)


def discriminator_options(net_type: str, **changed: Any) -> SimpleNamespace:
    net = SimpleNamespace(
        **{
            "net_type": net_type,
            "in_nc": 3,
            "base_nc": 4,
            "n_layers": 3,
            "norm_type": "spectral",
            "skip_connection": True,
            "act_mode": "BL",
            "init_type": "orthogonal",
            "init_bn_type": "uniform",
            "init_gain": 0.2,
            **changed,
        }
    )
    return SimpleNamespace(scale=4, n_channels=3, is_train=True, netG=None, netD=net)


@pytest.mark.parametrize("norm_type", ["none", "batch", "instance", "spectral", "batchspectral", "instancespectral"])
def test_patchgan_takes_every_norm_type(norm_type: str) -> None:
    network = define_D(discriminator_options("discriminator_patchgan", norm_type=norm_type))
    # Kernel 4, padding 2: 64 -> 33 -> 17 -> 9 by stride 2, then 10 and 11.
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 1, 11, 11)
    assert ("model.child0.0.weight_u" in network.state_dict()) == norm_type.endswith("spectral")


@pytest.mark.parametrize(
    ("net_type", "size", "wrong"),
    [
        ("discriminator_vgg_96", 96, (96, 88)),
        ("discriminator_vgg_128", 128, (96, 96)),
        ("discriminator_vgg_192", 192, (128, 128)),
        ("discriminator_vgg_128_SN", 128, (192, 192)),
        ("discriminator_unet", 32, (36, 32)),
    ],
)
def test_a_discriminator_of_any_width_takes_its_size_only(net_type: str, size: int, wrong: tuple[int, int]) -> None:
    network = define_D(discriminator_options(net_type))
    assert network(torch.rand(2, 3, size, size)).shape[:2] == (2, 1)
    with pytest.raises(ValueError, match=f"expected .* got {wrong[0]} x {wrong[1]}"):
        network(torch.rand(2, 3, *wrong))


@pytest.mark.parametrize("changed", [{"net_type": "discriminator"}, {"norm_type": "layer"}])
def test_a_discriminator_that_cannot_be_built_says_why(changed: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"netD.*(unknown|no discriminator|norm_type 'layer')"):
        define_D(discriminator_options(**{"net_type": "discriminator_patchgan", **changed}))


def test_orthogonal_initialisation_reaches_the_weights_under_spectral_norm() -> None:
    network = define_D(discriminator_options("discriminator_unet"))
    weight = network.state_dict()["conv7.weight_orig"].flatten(1)
    # Orthogonal rows of length 0.2; float32 products of 36 terms.
    torch.testing.assert_close(weight @ weight.T, 0.04 * torch.eye(4), atol=1e-6, rtol=0)
    assert network.state_dict()["conv0.bias"].abs().sum() == 0


@pytest.mark.parametrize(
    ("init_type", "largest"),
    [
        ("normal", 1.0),
        ("uniform", 0.2),
        ("xavier_normal", 1.0),
        # sqrt(6 / (fan in + fan out)) and sqrt(6 / fan in), the fan of this convolution being 8 x 3 x 3.
        ("xavier_uniform", (6 / 144) ** 0.5),
        ("kaiming_normal", 1.0),
        ("kaiming_uniform", (6 / 72) ** 0.5),
        ("orthogonal", 1.0),
    ],
)
def test_each_init_type_keeps_its_bounds_and_zeroes_biases(init_type: str, largest: float) -> None:
    layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8))
    before = layers[0].weight.clone()
    init_weights(layers, init_type, "uniform", gain=1.0)
    assert 0 < layers[0].weight.abs().max() <= largest
    assert not torch.equal(layers[0].weight, before)
    assert layers[0].bias.abs().max() == layers[1].bias.abs().max() == layers[2].bias.abs().max() == 0
    assert layers[1].weight.min() >= 0.1
    init_weights(layers, init_type, "constant", gain=1.0)
    assert torch.equal(layers[1].weight, torch.ones(8))


def test_default_initialisation_and_testing_leave_the_network_alone() -> None:
    for init_type, is_train in (("default", True), ("orthogonal", False)):
        opt = generator_options("msrresnet1", 2, 3, init_type=init_type)
        opt.is_train = is_train
        torch.manual_seed(0)
        found = define_G(opt).state_dict()
        torch.manual_seed(0)
        expected = MSRResNet1(nc=8, nb=2, upscale=2).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def small_vgg() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(True), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2)
    )


def test_features_of_a_convolution_are_those_before_the_relu() -> None:
    layers = small_vgg()
    x = torch.rand(1, 3, 6, 6)
    normal = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    first = layers[0](normal)
    conv, relu, deeper = VGGFeatureExtractor([0, 1, 2], features=layers)(x)
    torch.testing.assert_close(conv, first)
    assert conv.min() < 0
    torch.testing.assert_close(relu, first.clamp(min=0))
    torch.testing.assert_close(deeper, layers[2](first.clamp(min=0)))


def test_the_extractor_is_frozen_but_lets_gradients_through() -> None:
    vgg = VGGFeatureExtractor(2, features=small_vgg())
    assert not vgg.train().training
    assert not any(p.requires_grad for p in vgg.parameters())
    x = torch.rand(1, 3, 6, 6, requires_grad=True)
    vgg(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_one_channel_is_seen_as_gray_and_a_wider_range_is_brought_back() -> None:
    vgg = VGGFeatureExtractor(2, features=small_vgg())
    gray = torch.rand(1, 1, 6, 6)
    torch.testing.assert_close(vgg(gray)[0], vgg(gray.repeat(1, 3, 1, 1))[0])
    signed = VGGFeatureExtractor(2, use_range_norm=True, features=small_vgg())
    # x * 2 - 1 and back loses a float32 rounding.
    torch.testing.assert_close(signed(gray * 2 - 1), vgg(gray), atol=1e-5, rtol=1e-5)


def test_vgg19_weights_are_taken_from_a_file_of_either_form(tmp_path: Any) -> None:
    from torchvision.models import vgg19

    with torch.device("meta"):
        features = vgg19(weights=None).features
    weights = {key: torch.rand(value.shape) for key, value in features[:3].state_dict().items()}
    torch.save(weights, tmp_path / "features.pth")
    torch.save({f"features.{key}": value for key, value in weights.items()}, tmp_path / "whole.pth")
    x = torch.rand(1, 3, 8, 8)
    outputs = [VGGFeatureExtractor(2, weights_path=str(tmp_path / f))(x)[0] for f in ("features.pth", "whole.pth")]
    assert outputs[0].shape == (1, 64, 8, 8)
    assert torch.equal(outputs[0], outputs[1])


def test_vgg19_weights_that_cannot_be_had_are_one_line_with_remedies(tmp_path: Any, monkeypatch: Any) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as caught:
        VGGFeatureExtractor(34)
    said = str(caught.value)
    assert "\n" not in said
    for part in ("no route", str(tmp_path / "checkpoints" / "vgg19-dcbb9e9d.pth"), "path.pretrained_netF", "weight=0"):
        assert part in said


def test_a_file_of_other_weights_is_no_vgg19(tmp_path: Any) -> None:
    torch.save({"conv_first.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: these are not the weights of VGG19"):
        VGGFeatureExtractor(2, weights_path=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"none\.pth: no such file; set path\.pretrained_netF"):
        VGGFeatureExtractor(2, weights_path=str(tmp_path / "none.pth"))


def test_a_layer_that_vgg19_lacks_is_named() -> None:
    with pytest.raises(UserError, match="F_feature_layer: 37 is no layer"):
        VGGFeatureExtractor([2, 37])


def test_a_network_beyond_the_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(**_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9663676416 bytes")

    monkeypatch.setattr("models.select_network.RRDBNet", allocate)
    with pytest.raises(UserError, match="netG: rrdbnet: too large for the memory of this machine"):
        define_G({"netG": {"net_type": "rrdbnet"}})


def test_windows_without_a_common_multiple_are_one_line() -> None:
    net = {"net_type": "elan", "m_elan": 1, "c_elan": 3, "window_sizes": [61, 59, 53]}
    with pytest.raises(UserError, match=r"netG: elan: window_sizes .* of less than 190747 pixels"):
        define_G({"netG": net})
