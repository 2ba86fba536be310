"""Learned metrics as losses and as columns: against the authors' package, and in the training of any model."""

import importlib
import socket
import sys
import types
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.metrics import METRICS, Measurer
from models.loss_metric import LearnedMetric, metric_loss
from models.model_base import ModelSR
from models.network_stlpips import STLPIPS, Backbone
from tests.conftest import photograph
from tests.test_model_dm import NETG, RESSHIFT
from tests.training import Workplace, assert_same
from utils.utils_error import UserError
from utils.utils_image import uint2tensor4
from utils.utils_option_sections import IQAWeights

BACKBONES = get_args(Backbone)
LEARNED = [name for name, metric in METRICS.items() if metric.is_loss]
ALONE = ("train.G_lossfn_weight=0", "train.iqa_weights.stlpips=2")


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No connection can be made, and torch's cache is empty: its folder."""

    def refused(*_args: Any, **_kwargs: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def random_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet and VGG16 with random weights wherever trained ones are asked for: those are downloads."""
    import torchvision

    dists = pytest.importorskip("torchmetrics.functional.image.dists")
    for name in ("alexnet", "vgg16"):
        network = getattr(torchvision.models, name)
        monkeypatch.setattr(torchvision.models, name, lambda weights=None, network=network: network())
    monkeypatch.setattr(dists, "vgg16", torchvision.models.vgg16)


def images(height: int = 60, width: int = 68) -> tuple[Tensor, Tensor]:
    """E and H, two of each."""
    H = torch.cat([uint2tensor4(photograph(height, width, seed)) for seed in range(2)])
    noise = torch.rand(H.shape, generator=torch.Generator().manual_seed(0))
    return (0.8 * H + 0.2 * noise), H


# ----------------------------------------------------------------------------------------------------------- ST-LPIPS


def authors_own(backbone: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The network of the package, which imports without need what it does not install."""
    for name, content in (("IPython", "embed"), ("torchsummary", "summary")):
        stand_in = types.ModuleType(name)
        setattr(stand_in, content, None)
        monkeypatch.setitem(sys.modules, name, stand_in)
    stlpips: Any = importlib.import_module("stlpips_pytorch.stlpips")
    return stlpips.LPIPS(net=backbone, variant="shift_tolerant", verbose=False)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_distances_and_gradients_are_those_of_the_authors_package(backbone, monkeypatch) -> None:
    E, H = images()
    results = []
    for network, range_of_theirs in (
        (STLPIPS(backbone), {}),
        (authors_own(backbone, monkeypatch), {"normalize": True}),
    ):
        estimate = E.clone().requires_grad_()
        distances = network(estimate, H, **range_of_theirs).flatten()
        distances.sum().backward()
        results.append((distances.detach(), estimate.grad))
    # float32 in another order, of distances around 0.1 and gradients around 1e-4.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_are_those_of_finite_differences(backbone) -> None:
    network = STLPIPS(backbone).double()
    E, H = (image[:1, :, :24, :24].double() for image in images())
    E.requires_grad_()
    network(E, H).sum().backward()
    assert E.grad is not None
    with torch.no_grad():
        # Along the gradient, where the difference is largest; a few ReLU and maxima change sides on the way.
        direction = E.grad / E.grad.norm()
        difference = (network(E + 1e-5 * direction, H) - network(E - 1e-5 * direction, H)) / 2e-5
    assert difference.item() == pytest.approx(E.grad.norm().item(), rel=1e-3)


@pytest.mark.parametrize("name", ["stlpips", "stlpips_vgg"])
def test_a_few_steps_of_descent_bring_the_distance_down(name) -> None:
    metric, (E, H) = LearnedMetric(name), images(40, 40)
    E.requires_grad_()
    descent = torch.optim.Adam([E], 0.01)
    values = []
    for _ in range(8):
        loss = metric(E, H).mean()
        values.append(loss.item())
        descent.zero_grad()
        loss.backward()
        descent.step()
    assert values[-1] < 0.7 * values[0], values
    assert E.grad is not None
    assert E.grad.isfinite().all()


def test_images_in_which_nothing_is_seen_have_finite_gradients() -> None:
    for backbone in BACKBONES:
        network = STLPIPS(backbone)
        for parameter in network.features.parameters():
            parameter.data.zero_()  # all features are 0
        E = torch.zeros(1, 3, 24, 24, requires_grad=True)
        network(E, torch.ones(1, 3, 24, 24)).sum().backward()
        assert E.grad is not None
        assert E.grad.isfinite().all()


def test_weights_that_do_not_fit_or_are_not_installed_are_one_line(monkeypatch) -> None:
    import models.network_stlpips as room

    monkeypatch.setattr(room, "load_checkpoint_file", lambda path: {"net.slice1.0.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"alex_shift_tolerant\.pth: these are not the weights of ST-LPIPS"):
        STLPIPS()
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for asked in (lambda: metric_loss("stlpips", torch.device("cpu")), lambda: Measurer(["stlpips"], 4, "cpu")):
        with pytest.raises(UserError, match=r"stlpips-pytorch, which is not installed; .*-r requirements\.txt"):
            asked()


# ------------------------------------------------------------------------------------------------- all learned metrics


def test_the_options_name_them_all() -> None:
    assert sorted(IQAWeights.model_fields) == sorted(LEARNED)


@pytest.mark.parametrize("name", LEARNED)
def test_a_metric_is_a_fixed_yardstick(name, random_backbones) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    metric = LearnedMetric(name)
    assert torch.equal(torch.get_rng_state(), before)
    metric.train()
    assert not any(module.training for module in metric.modules())
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    E, H = images()
    values = metric(E, H)
    assert values.shape == (2,)
    assert (values > 0).all()
    torch.testing.assert_close(metric(H, H), torch.zeros(2), rtol=0, atol=1e-6)  # DISTS: 1 - a sum of float32
    # Gray is RGB of equal channels, E may leave [0, 1], and inside autocast all stays float32.
    gray = H[:, :1]
    assert torch.equal(metric(1.2 * gray, gray), metric(1.2 * gray.expand_as(H), gray.expand_as(H)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric(E, H), values)


@pytest.mark.parametrize("name", [name for name in LEARNED if METRICS[name].smallest > 1])
def test_the_table_knows_the_smallest_side(name, random_backbones) -> None:
    metric, side = LearnedMetric(name), METRICS[name].smallest
    assert metric(torch.rand(1, 3, side, 40), torch.rand(1, 3, side, 40)).isfinite().all()
    with pytest.raises(RuntimeError):
        metric(torch.rand(1, 3, 40, side - 1), torch.rand(1, 3, 40, side - 1))


@pytest.mark.parametrize(("name", "theirs"), [("lpips", "alex"), ("lpips_vgg", "vgg")])
def test_torchmetrics_lpips_is_pyiqas_of_the_same_weights(name, theirs, random_backbones) -> None:
    arch = pytest.importorskip("pyiqa.archs.lpips_arch")
    torch.manual_seed(0)
    ours, other = LearnedMetric(name), arch.LPIPS(net=theirs, pretrained=False)
    for key, value in ours.network.state_dict().items():
        if key.endswith("bias"):
            value += 0.1  # else random features die out layer by layer
    loaded = other.load_state_dict(ours.network.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"scaling_layer.shift", "scaling_layer.scale"}
    E, H = images()
    # Their 1e-8 stands under the root that normalises features, pyiqa's 1e-10 behind it.
    torch.testing.assert_close(ours(E, H), other(E, H).flatten(), rtol=1e-4, atol=0)


def test_torchmetrics_dists_is_pyiqas_of_the_same_weights(random_backbones) -> None:
    arch = pytest.importorskip("pyiqa.archs.dists_arch")
    torch.manual_seed(0)
    ours, other = LearnedMetric("dists"), arch.DISTS(pretrained=False)
    other.load_state_dict(ours.network.state_dict())
    E, H = images()
    torch.testing.assert_close(ours(E, H), other(E, H).flatten(), rtol=1e-6, atol=1e-7)  # the same operations


def test_the_inception_of_pytorch_fid_is_pyiqas_of_the_same_weights(monkeypatch) -> None:
    ours = pytest.importorskip("pytorch_fid.inception")
    theirs = pytest.importorskip("pyiqa.archs.inception")
    monkeypatch.setattr(theirs, "load_pretrained_network", lambda network, url: None)
    torch.manual_seed(0)
    other = theirs.InceptionV3().eval()
    weights = {f"{name}.{key}": value for name, block in inception_blocks(other) for key, value in block}
    monkeypatch.setattr(ours, "load_state_dict_from_url", lambda url, progress: weights)
    monkeypatch.setattr("evaluation.metrics._online", lambda: False)
    network = Measurer(["fid"], 4, "cpu")._networks["fid"]
    assert not network.training
    image = torch.rand(1, 3, 299, 299)
    with torch.no_grad():
        expected = other(image, resize_input=False, normalize_input=True)[0]
        assert torch.equal(network(image)[0], expected)


def inception_blocks(network: nn.Module) -> Any:
    """(torchvision's name, its state) of each part of pyiqa's Inception, which keeps them in blocks without names."""
    names = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    names += [f"Mixed_{part}" for part in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")]
    parts = [part for block in network.blocks for part in block if part.state_dict()]  # type: ignore[union-attr]
    for name, part in (*zip(names, parts, strict=True), ("fc", network.fc)):
        yield name, part.state_dict().items()


# ------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("channels", [3, 1])
def test_columns_are_the_distances_inside_the_border_and_need_no_download(channels, no_network, monkeypatch) -> None:
    for extra in ("torchmetrics", "pyiqa", "huggingface_hub", "IPython", "torchsummary", "stlpips_pytorch.stlpips"):
        monkeypatch.setitem(sys.modules, extra, None)
    H = photograph(50, 60, channels=channels).squeeze()
    E = np.roll(H, 1, 0)
    values = Measurer(["stlpips", "stlpips_vgg"], 4, "cpu").measure({"E": E, "H": H}, H).values
    inside = [uint2tensor4(np.ascontiguousarray(x[4:-4, 4:-4])) for x in (E, H)]
    for name in ("stlpips", "stlpips_vgg"):
        assert values["E"][name] == pytest.approx(LearnedMetric(name)(*inside).item(), rel=1e-6)  # float32
        assert values["H"][name] == 0
    assert not no_network.exists()
    small = Measurer(["stlpips"], 4, "cpu").measure({"E": E[:28]}, H[:28]).values["E"]
    assert np.isnan(small["stlpips"])


# ------------------------------------------------------------------------------------------------------------ training


def kind_of(work: Workplace, model: str) -> tuple[str, ...]:
    """Options of a model whose only loss of E is the metric."""
    if model == "dm":
        del work.options["netD"], work.options["train"]["gan_type"], work.options["train"]["D_lossfn_weight"]
        work.options |= {"model": "dm", "netG": NETG, "diffusion": RESSHIFT}
        return (*ALONE, "train.dm_weight=0")
    return (f"model={model}", *ALONE)


@pytest.mark.parametrize("model", ["plain", "gan", "dm"])
def test_it_trains_any_model_alone_without_a_download(work: Workplace, model, no_network) -> None:
    kind = kind_of(work, model)
    built = work.model(*kind)
    assert isinstance(built, ModelSR)
    built.feed_data(work.batch(*kind))
    built.optimize_parameters(1)
    expected = 2 * LearnedMetric("stlpips")(built.E, built.H).mean()
    assert built.current_log()["stlpips"] == pytest.approx(expected.item(), rel=1e-6)  # float32
    assert built.current_log()["G_grad"] > 0
    assert not no_network.exists()


def test_precision_bf16_leaves_it_in_float32(work: Workplace) -> None:
    model = work.model(*ALONE, "train.precision=bf16")
    assert isinstance(model, ModelSR)
    model.feed_data(work.batch())
    model.optimize_parameters(1)
    expected = 2 * LearnedMetric("stlpips")(model.E.detach(), model.H).mean()
    # bf16 would be off by 1 / 256.
    assert model.current_log()["stlpips"] == pytest.approx(expected.item(), rel=1e-6)
    assert {p.dtype for p in model.metrics["stlpips"].parameters()} == {torch.float32}


def test_a_resumed_run_equals_the_uninterrupted_one_and_saves_nothing_of_it(work: Workplace) -> None:
    loss = ("model=gan", "train.iqa_weights.stlpips=1", "datasets.test=null")
    work.run(*loss, "task=whole")
    work.run(*loss, "task=parts", "train.iterations=2")
    work.run(*loss, "task=parts")
    assert set(work.saved(4, "whole")) == {"G", "E", "D", "optimizerG", "optimizerD"}
    assert_same(work.saved(4, "whole"), work.saved(4, "parts"))
    work.run("model=gan", "datasets.test=null", "task=without")
    for network in ("G", "D"):
        assert work.saved(4, "whole")[network].keys() == work.saved(4, "without")[network].keys()
    # The same draws: the same first weights and batches.
    first = [work.log(task).split(" | ")[1].split()[1] for task in ("whole", "without")]
    assert first[0] == first[1]


def test_in_pieces_the_gradient_is_that_of_the_batch(work: Workplace) -> None:
    gradients = []
    for pieces in ("null", "1"):
        model = work.model(*ALONE, f"train.micro_batch={pieces}")
        model.feed_data(work.batch())
        model.optimize_parameters(1)
        gradients.append(torch.cat([p.grad.flatten() for p in model.networks["G"].parameters() if p.grad is not None]))
    # The sum of two float32 gradients in another order.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6 * gradients[0].abs().max().item())


def test_lpips_weight_is_another_name(work: Workplace, random_backbones) -> None:
    logs = []
    for name in ("lpips_weight", "iqa_weights.lpips_vgg"):
        model = work.model("model=gan", f"train.{name}=0.5")
        model.feed_data(work.batch())
        torch.manual_seed(1)
        model.metrics["lpips_vgg"] = metric_loss("lpips_vgg", torch.device("cpu"))  # type: ignore[attr-defined]
        model.optimize_parameters(1)
        logs.append(model.current_log())
    assert logs[0] == logs[1]
    assert logs[0]["lpips_vgg"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.iqa_weights.stlpisp=1"], r"train\.iqa_weights\.stlpisp: unknown key; did you mean 'stlpips'\?"),
        (["train.iqa_weights.ssim=1"], r"ssim: unknown key; valid are: dists, lpips, lpips_vgg, stlpips, stlpips_vgg"),
        (["train.iqa_weights.stlpips=-1"], r"train\.iqa_weights\.stlpips: must be greater than or equal to 0, not -1"),
        (
            ["train.iqa_weights.stlpips=1", "datasets.train.H_size=20"],
            r"stlpips: needs patches of at least 21 pix.* 20",
        ),
        (["train.iqa_weights.lpips_vgg=1", "train.lpips_weight=1"], r"lpips_weight: is another name .*; remove one"),
        (["train.iqa_weights=1"], r"train\.iqa_weights: must be a section"),
    ],
)
def test_options_that_are_wrong_are_one_line(work: Workplace, overrides, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        work.run(*overrides)
    assert "\n" not in str(error.value)
    assert not (work.root / "runs").exists()


def test_a_library_or_weights_that_cannot_be_had_are_one_line(work: Workplace, no_network, monkeypatch) -> None:
    pytest.importorskip("torchmetrics")
    for name in ("lpips", "dists"):
        match = rf"train\.iqa_weights\.{name}: its weights are not in the cache and cannot be fetched .*set it to 0"
        with pytest.raises(UserError, match=match):
            work.model(f"train.iqa_weights.{name}=1")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(UserError, match=r"lpips_vgg: needs torchmetrics, .*pip install -r requirements-extra\.txt"):
        work.model("train.lpips_weight=1")


def test_a_loss_waits_for_sockets_as_losses_do_and_a_column_as_columns_do(monkeypatch) -> None:
    pytest.importorskip("torchmetrics")
    limits: list[float | None] = []
    network = torch.nn.Identity()
    monkeypatch.setattr(
        "models.loss_metric._network", lambda name: limits.append(socket.getdefaulttimeout()) or (network, network)
    )
    monkeypatch.setattr("evaluation.metrics._online", lambda: False)
    metric_loss("lpips", torch.device("cpu"))
    Measurer(["lpips"], 4, "cpu")
    assert limits == [30, 3]
