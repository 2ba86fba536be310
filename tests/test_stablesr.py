"""StableSR and the one-step form, on a tiny Stable Diffusion of the real classes; counts and names in full size."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import main_train_dm
from main_test import main as main_test
from models.block_diffusion import ResBlock
from models.model_dm import ModelDM
from models.network_sd_lora import SDLoRA
from models.network_stablesr import SFT, AttentionBlock, StableSR, StructuralEncoder, residual_blocks
from models.select_model import define_Model
from models.select_network import define_G
from models.stable_diffusion import StableDiffusion, load_stable_diffusion
from tests.conftest import REPOSITORY, photograph
from tests.tiny_sd import write_tiny_sd
from utils.utils_checkpoint import load_network, save_network
from utils.utils_error import UserError
from utils.utils_image import imread_uint, imsave
from utils.utils_option import parse, strip_comments

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

STABLESR: dict[str, Any] = {"net_type": "stablesr", "model_channels": 8, "channel_mult": [1, 1, 2], "num_heads": 2}
LORA: dict[str, Any] = {"net_type": "sd_lora", "rank": 2}
BOTH = pytest.mark.parametrize("options", [STABLESR, LORA], ids=["stablesr", "sd_lora"])

# Stable Diffusion 2.1's U-Net; what is left out is diffusers' default.
SD21: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Stable Diffusion."""
    return write_tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@cache
def loaded(sd: Path) -> StableDiffusion:
    return load_stable_diffusion(str(sd))


def base_of(sd: Path) -> StableDiffusion:
    """A copy of what is in the folder, which is read once."""
    return copy.deepcopy(loaded(sd))


def build(sd: Path, options: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if "base_precision" not in more:
            patch.setattr("models.select_network.load_stable_diffusion", lambda name, precision: base_of(sd))
        return define_G({"scale": 4, "is_train": True, "netG": options | {"base": str(sd)} | more})


def moved(network: Any) -> Any:
    """With small random numbers for what starts at zero, so that gradients reach everything."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return network


def inputs(height: int = 8, width: int = 8, n: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, y, L of a forward pass."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 4, height, width, generator=generator) for _ in range(2))
    return x, torch.tensor([3, 700])[:n], y, torch.rand(n, 3, 2 * height, 2 * width, generator=generator)


@cache
def on_meta() -> StableSR:
    """StableSR on the layout of Stable Diffusion 2.1, without memory for its numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        base = StableDiffusion(
            unet=UNet2DConditionModel(**SD21),
            prompt=torch.empty(1, 77, 1024),
            abar=torch.empty(1000),
            predicts_v=False,
            factor=8,
            scaling_factor=0.18215,
        )
        return StableSR(base)


# ------------------------------------------------------------------------------------- the published layout, full size


def test_as_many_parameters_are_trained_and_frozen_as_published() -> None:
    network = on_meta()
    trained = {name: p.numel() for name, p in network.named_parameters()}
    assert sum(n for name, n in trained.items() if name.startswith("structcond_stage_model.")) == 52_494_080
    assert sum(n for name, n in trained.items() if ".spade." in name) == 53_020_160
    assert sum(trained.values()) == 105_514_240
    own = {id(p) for p in network.parameters()}
    assert sum(p.numel() for p in network._unet[0].parameters() if id(p) not in own) == 865_910_724


def test_names_and_shapes_are_the_published_ones() -> None:
    """From the description of the published networks (the modules' numbers, what they do, and their widths)."""
    shapes: dict[str, list[int]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = list(shape), [shape[0]]

    widths = {
        f"input_blocks.{n}": c for c, pair in ((320, (1, 2)), (640, (4, 5)), (1280, (7, 8, 10, 11))) for n in pair
    }
    widths |= {"middle_block": 1280, **{f"output_blocks.{n}": (1280, 1280, 640, 320)[n // 3] for n in range(12)}}
    for name, c in widths.items():
        for i in (0, 2) if name == "middle_block" else (0,):
            spade = f"model.diffusion_model.{name}.{i}.spade"
            layer(f"{spade}.param_free_norm", c)
            layer(f"{spade}.mlp_shared.0", 128, 256, 3, 3)
            layer(f"{spade}.mlp_gamma", c, 128, 3, 3)
            layer(f"{spade}.mlp_beta", c, 128, 3, 3)
    assert len(shapes) == 22 * 8

    def res(name: str, before: int, after: int) -> None:
        layer(f"{name}.in_layers.0", before)
        layer(f"{name}.in_layers.2", after, before, 3, 3)
        layer(f"{name}.emb_layers.1", after, 1024)
        layer(f"{name}.out_layers.0", after)
        layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.skip_connection", after, before, 1, 1)

    def attention(name: str, c: int) -> None:
        layer(f"{name}.norm", c)
        layer(f"{name}.qkv", 3 * c, c, 1)
        layer(f"{name}.proj_out", c, c, 1)

    encoder = "structcond_stage_model"
    layer(f"{encoder}.time_embed.0", 1024, 256)
    layer(f"{encoder}.time_embed.2", 1024, 1024)
    layer(f"{encoder}.input_blocks.0.0", 256, 4, 3, 3)
    for n, before, after in ((1, 256, 256), (2, 256, 256), (4, 256, 256), (5, 256, 256), (7, 256, 512), (8, 512, 512)):
        res(f"{encoder}.input_blocks.{n}.0", before, after)
        attention(f"{encoder}.input_blocks.{n}.1", after)
    for n, c in ((3, 256), (6, 256), (9, 512)):
        layer(f"{encoder}.input_blocks.{n}.0.op", c, c, 3, 3)
    for name in ("input_blocks.10.0", "input_blocks.11.0", "middle_block.0", "middle_block.2"):
        res(f"{encoder}.{name}", 512, 512)
    attention(f"{encoder}.middle_block.1", 512)
    for i, c in enumerate((256, 256, 512, 512)):
        res(f"{encoder}.fea_tran.{i}", c, 256)
    assert len(shapes) == 22 * 8 + 200

    assert {name: list(v.shape) for name, v in on_meta().state_dict().items()} == shapes


def test_the_levels_of_the_features_are_those_of_the_blocks() -> None:
    levels = [block.conv2.level for _, _, block in residual_blocks(on_meta()._unet[0])]
    down, middle, up = levels[:8], levels[8:10], levels[10:]
    assert (down, middle) == ([0, 0, 1, 1, 2, 2, 3, 3], [3, 3])
    assert up == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ its parts


def test_attention_is_the_published_formula() -> None:
    """Heads first in the channels of qkv, and queries and keys scaled by d^(-1/4) each (spec 9.2)."""
    torch.manual_seed(0)
    block = moved(AttentionBlock(8, 2, 4)).double()
    h = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    qkv = block.qkv(block.norm(h).reshape(2, 8, 15))
    heads = []
    for head in range(2):
        q, k, v = qkv[:, 12 * head : 12 * head + 12].split(4, dim=1)
        weight = torch.softmax(torch.einsum("nct,ncs->nts", q * 4**-0.25, k * 4**-0.25), dim=-1)
        heads.append(torch.einsum("nts,ncs->nct", weight, v))
    expected = h + block.proj_out(torch.cat(heads, 1)).reshape(h.shape)
    # float64, another order of summation
    torch.testing.assert_close(block(h, torch.empty(0)), expected, rtol=1e-12, atol=1e-12)


def test_a_residual_block_is_the_published_formula() -> None:
    """That of ResShift scales and shifts by the time; here it is added."""
    torch.manual_seed(0)
    block = moved(ResBlock(8, 16, 32, 4)).double()
    h, embedding = torch.randn(2, 8, 3, 5, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    w = block.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 4, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=padding)

    inner = conv(F.silu(norm(h, "in_layers.0")), "in_layers.2")
    inner = inner + F.linear(F.silu(embedding), w["emb_layers.1.weight"], w["emb_layers.1.bias"])[:, :, None, None]
    inner = conv(F.silu(norm(inner, "out_layers.0")), "out_layers.3")
    expected = conv(h, "skip_connection", 0) + inner
    torch.testing.assert_close(block(h, embedding), expected, rtol=1e-12, atol=1e-12)  # float64


def test_the_features_are_taken_before_each_halving_and_from_the_middle() -> None:
    """With all residual blocks at their start, zero beside the skip, what comes out is known layer by layer."""
    torch.manual_seed(0)
    encoder = StructuralEncoder(4, 8, (1, 1), 2, 4, False)
    y, t = torch.randn(1, 4, 5, 7), torch.tensor([9])
    first = encoder.input_blocks[0][0](y)
    halved = encoder.input_blocks[3][0].op(first)
    for found, expected in zip(encoder(y, t), (first, halved), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)  # adding zeros changes nothing


def test_modulation_is_the_published_formula() -> None:
    torch.manual_seed(0)
    sft = SFT(8, 16, 4).double()
    h, features = torch.randn(2, 8, 3, 5, dtype=torch.float64), torch.randn(2, 16, 3, 5, dtype=torch.float64)
    shared = F.relu(sft.mlp_shared[0](features))
    expected = F.group_norm(h, 4, eps=1e-5) * (1 + sft.mlp_gamma(shared)) + sft.mlp_beta(shared)
    torch.testing.assert_close(sft(h, features), expected, rtol=1e-12, atol=1e-12)  # float64


def test_a_block_adds_the_modulated_convolution_to_its_skip(sd: Path) -> None:
    network = build(sd, STABLESR)
    _, _, resnet = next(residual_blocks(network._unet[0]))
    for p in resnet.conv2.sft.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.constant_(resnet.conv2.sft.mlp_beta.bias, 0.25)  # what is left of the modulation
    h, embedding = torch.randn(1, 8, 6, 6), torch.randn(1, 32)
    with network._shown.while_showing([torch.randn(1, 8, 6, 6)]):
        torch.testing.assert_close(resnet(h, embedding), h + 0.25, rtol=0, atol=0)  # sums of the same two numbers


def test_without_modulation_it_is_the_base(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFT, "forward", lambda self, h, features: h)
    network, base = build(sd, STABLESR), base_of(sd)
    x, t, y, L = inputs()
    expected = base.unet(x, t, base.prompt.expand(2, -1, -1)).sample
    # float32: where a weight lies in memory decides the order of its sums
    torch.testing.assert_close(network(x, t, y, L), expected, rtol=0, atol=1e-5)


def test_the_prompt_is_embedded_as_the_pipeline_of_diffusers_does(sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None, feature_extractor=None)
    expected, _ = pipeline.encode_prompt("", "cpu", 1, do_classifier_free_guidance=False)
    prompt = load_stable_diffusion(str(sd)).prompt
    assert prompt.shape == (1, 7, 16)
    torch.testing.assert_close(prompt, expected, rtol=0, atol=1e-5)  # float32, values of size 1


def test_one_step_takes_the_noise_off_by_the_formula(sd: Path) -> None:
    """LoRA starts at zero, so the noise is what the base sees."""
    network, base = build(sd, LORA), base_of(sd)
    x, t, y, L = inputs()
    noise = base.unet(x, t, base.prompt.expand(2, -1, -1)).sample
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.cumprod(1 - betas, 0)[t].reshape(2, 1, 1, 1)
    expected = (x - (1 - abar).sqrt() * noise) / abar.sqrt()
    # float32, and abar by another formula; values of size 10
    torch.testing.assert_close(network(x, t, y, L), expected, rtol=1e-4, atol=1e-4)


@BOTH
def test_a_base_that_predicts_v_gives_noise(options: dict[str, Any], sd: Path, tmp_path: Path) -> None:
    """v = sqrt(abar) e - sqrt(1 - abar) x0 with x = sqrt(abar) x0 + sqrt(1 - abar) e, solved for e and x0."""
    v_sd = write_tiny_sd(tmp_path / "v", prediction_type="v_prediction")  # the same weights, read as v
    network, as_noise = build(v_sd, options), build(sd, options)
    x, t, y, L = inputs()
    v = StableSR.predict_noise(as_noise, x, t) if options is LORA else as_noise(x, t, y, L)
    signal, noise = as_noise.of_signal_and_noise(t)
    expected = signal * x - noise * v if options is LORA else signal * v + noise * x
    # at t = 700 the way over the noise divides by sqrt(abar) = 0.2
    torch.testing.assert_close(network(x, t, y, L), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- trained, shared, saved


@BOTH
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 13)])
def test_any_size_goes_through(options: dict[str, Any], size: tuple[int, int], sd: Path) -> None:
    x, t, y, L = inputs(*size)
    assert build(sd, options)(x, t, y, L).shape == x.shape


def test_what_is_restored_depends_on_the_time_and_on_the_image(sd: Path) -> None:
    network = moved(build(sd, STABLESR))
    x, t, y, L = inputs()
    with torch.no_grad():
        noise = network(x, t, y, L)
        for other in (network(x, t + 50, y, L), network(x, t, y + 0.5, L)):
            assert (noise - other).abs().amax((1, 2, 3)).min() > 1e-3


@BOTH
def test_only_what_is_trained_is_a_parameter_and_gets_a_gradient(options: dict[str, Any], sd: Path) -> None:
    network = moved(build(sd, options))
    x, t, y, L = inputs()
    network.train()
    assert not network._unet[0].training
    network(x, t, y, L).square().mean().backward()
    own = dict(network.named_parameters())
    assert own.keys() == network.state_dict().keys()
    for name, p in own.items():
        assert p.requires_grad, name
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    frozen = [p for p in network._unet[0].parameters() if id(p) not in {id(q) for q in own.values()}]
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in base_of(sd).unet.parameters())
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@BOTH
def test_a_copy_of_a_compiled_network_computes_by_itself(options: dict[str, Any], sd: Path) -> None:
    network = build(sd, options)
    network.compile(backend="eager")
    assert copy.deepcopy(network)._compiled_call_impl is None  # else it would call the original


@BOTH
def test_a_copy_shares_the_base_and_nothing_that_is_trained(options: dict[str, Any], sd: Path) -> None:
    network = moved(build(sd, options, use_checkpoint=True))
    x, t, y, L = inputs()
    before = network(x, t, y, L)
    average = copy.deepcopy(network).requires_grad_(False)
    # float32: where a weight lies in memory decides the order of its sums; one-step values are of size 10
    torch.testing.assert_close(average(x, t, y, L), before, rtol=0, atol=1e-4)
    own = {id(p) for p in network.parameters()}
    for mine, theirs in zip(network._unet[0].parameters(), average._unet[0].parameters(), strict=True):
        assert (mine is theirs) == (id(mine) not in own)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(0.1)
    assert (average(x, t, y, L) - before).abs().max() > 1e-3
    torch.testing.assert_close(network(x, t, y, L), before, rtol=0, atol=1e-4)
    network(x, t, y, L).sum().backward()  # through checkpoints, which must find the network's own modulation
    assert all(p.grad is None for p in average.parameters())


@BOTH
def test_checkpointing_changes_no_gradient_even_if_the_network_runs_in_between(
    options: dict[str, Any], sd: Path
) -> None:
    x, t, y, L = inputs(5, 7)
    gradients = []
    for use_checkpoint in (False, True):
        network = moved(build(sd, options, use_checkpoint=use_checkpoint))
        loss = network(x, t, y, L).square().mean()
        network(x + 1, t, y - 1, L)
        loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())  # the order of sums


@pytest.mark.parametrize(("options", "precision"), [(STABLESR, "fp16"), (STABLESR, "bf16"), (LORA, "fp16")])
def test_a_base_in_half_precision_is_near_the_full_one(options: dict[str, Any], precision: str, sd: Path) -> None:
    x, t, y, L = inputs()
    t = torch.tensor([3, 100])
    full, half = (moved(build(sd, options, base_precision=p)) for p in ("fp32", precision))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    own = {id(p) for p in half.parameters()}
    kept = [p.numel() for p in half._unet[0].parameters() if id(p) not in own and p.dtype != torch.float32]
    assert sum(kept) > 0.98 * sum(p.numel() for p in half._unet[0].parameters() if id(p) not in own)
    expected, found = full(x, t, y, L), half(x, t, y, L)
    assert found.dtype == torch.float32
    # bf16 has 8 bits, rounded some 30 times on the way: a few percent of the output's size
    assert (found - expected).std() < 0.05 * expected.std()
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


@BOTH
def test_a_checkpoint_holds_the_trained_part_and_restores_it(options: dict[str, Any], sd: Path, tmp_path: Path) -> None:
    network = moved(build(sd, options))
    save_network(network, tmp_path / "1_G.pth")
    trained = sum(p.numel() for p in network.parameters())
    # 4 bytes a number, and at most 600 for the name and the place of each tensor
    assert (tmp_path / "1_G.pth").stat().st_size < 4 * trained + 600 * len(network.state_dict())
    other = build(sd, options)
    assert load_network(tmp_path / "1_G.pth", other).complete
    x, t, y, L = inputs()
    # as above: the order of sums
    torch.testing.assert_close(other(x, t, y, L), network(x, t, y, L), rtol=0, atol=1e-4)


def test_a_published_checkpoint_that_holds_everything_loads(sd: Path, tmp_path: Path) -> None:
    network = moved(build(sd, STABLESR))
    everything = dict(network.state_dict())
    for name in ("model.diffusion_model.input_blocks.1.0.in_layers.0.weight", "first_stage_model.quant_conv.bias"):
        everything[name] = torch.zeros(3)
    everything |= {"betas": torch.zeros(1000), "cond_stage_model.model.logit_scale": torch.zeros(())}
    torch.save({"state_dict": everything, "global_step": 117}, tmp_path / "stablesr.ckpt")
    other = build(sd, STABLESR)
    assert load_network(tmp_path / "stablesr.ckpt", other).complete
    for name, value in other.state_dict().items():
        assert torch.equal(value, everything[name]), name


def test_another_networks_checkpoint_is_refused_in_one_line(sd: Path, tmp_path: Path) -> None:
    torch.save({"conv_first.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"^\S+other.pth does not fit StableSR: 242 missing.*unknown.*conv_first"):
        load_network(tmp_path / "other.pth", build(sd, STABLESR))


def test_lora_files_have_the_names_of_diffusers(sd: Path) -> None:
    """As load_lora_weights reads them, with alpha = rank: what they add to the base is what the network adds."""
    from diffusers import UNet2DConditionModel

    network = moved(build(sd, LORA, target_modules=["to_q", "conv1"]))
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    unet.load_lora_adapter(network.state_dict(), prefix="unet")
    x, t, _, _ = inputs()
    prompt = network.prompt.expand(2, -1, -1)
    plain = UNet2DConditionModel.from_pretrained(sd / "unet")(x, t, prompt).sample
    adapted = unet(x, t, prompt).sample
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(network.predict_noise(x, t), adapted, rtol=0, atol=1e-6)  # one layer in another order


def test_the_weight_of_the_update_is_alpha_by_rank(sd: Path) -> None:
    x, t, y, L = inputs()
    base, one, two = (moved_B(build(sd, LORA, alpha=alpha), move) for alpha, move in ((2, 0), (2, 0.02), (4, 0.01)))
    torch.testing.assert_close(one(x, t, y, L), two(x, t, y, L), rtol=1e-5, atol=1e-4)  # float32, values of size 10
    assert (one(x, t, y, L) - base(x, t, y, L)).abs().max() > 1e-2


def moved_B(network: SDLoRA, value: float) -> SDLoRA:
    with torch.no_grad():
        for name, p in network.named_parameters():
            if ".lora_B." in name:
                p.fill_(value)
    return network


@pytest.mark.parametrize("options", [STABLESR, LORA | {"rank": 8, "alpha": 64}], ids=["stablesr", "sd_lora"])
def test_training_brings_the_loss_of_a_fixed_batch_down(options: dict[str, Any], sd: Path) -> None:
    network = build(sd, options)
    x, t, y, L = inputs(4, 4, n=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(24):
        loss = F.mse_loss(network(x, t, y, L), 0.5 * y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses[::5]


# ------------------------------------------------------------------------------------------------- with the whole frame


def options_of(name: str) -> dict[str, Any]:
    return json.loads(strip_comments((REPOSITORY / "options" / f"{name}.json").read_text(encoding="utf-8")))


def reduced(name: str, root: Path, sd: Path, size: int = 32) -> list[str]:
    """A recipe with its kinds of networks, data and losses, without its size and its precision."""
    folders = [f"path.root={root}", f"datasets.train.dataroot_H={root / 'H'}", "path.pretrained_netG=null"]
    data = [f"datasets.train.H_size={size}", "datasets.train.dataloader_batch_size=2"]
    data.append("datasets.train.dataloader_num_workers=0")
    parts = [f"netG.base={sd}", f"autoencoder.path={sd}", "netG.base_precision=fp32", "autoencoder.precision=fp32"]
    parts += ["netG.model_channels=8", "netG.channel_mult=[1, 1, 2]", "netG.num_heads=2", "diffusion.sample_steps=2"]
    train = ["train.precision=fp32", "train.micro_batch=1", "train.manual_seed=1", "train.G_optimizer_lr=1e-3"]
    train += ["train.checkpoint_print=1", "train.checkpoint_save=1", "train.ssl_mode=boxsum"]  # nothing to compile
    return [*folders, *data, *parts, *train, "train.kernel_size_search=9", "train.kernel_size_window=3"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for folder, size in (("H", (72, 70)), ("L", (9, 13))):
        (tmp_path / folder).mkdir()
        imsave(photograph(*size), str(tmp_path / folder / "0.png"))
    return tmp_path


@pytest.mark.parametrize("name", ["stablesr", "stablesr_ssl"])
def test_a_recipe_trains_goes_on_and_restores(
    name: str, place: Path, sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = REPOSITORY / "options" / f"train_{name}.json"
    arguments = ["main_train_dm", "--opt", str(file), *reduced(f"train_{name}", place, sd, size=64)]
    for iterations in (1, 2):
        monkeypatch.setattr("sys.argv", [*arguments, f"train.iterations={iterations}"])
        main_train_dm.main()

    run = place / name
    log = (run / "train.log").read_text(encoding="utf-8")
    assert "resumed at step 1" in log
    last = next(line for line in log.splitlines() if "step 2/2" in line)
    assert {term for term in ("dm_loss", "G_loss", "ssl") if f" {term} " in last} == (
        {"dm_loss", "G_loss", "ssl"} if name == "stablesr_ssl" else {"dm_loss"}
    )
    weights = {part: torch.load(run / "models" / f"2_{part}.pth", weights_only=True) for part in "GE"}
    trained = sum(value.numel() for value in weights["G"].values())
    assert trained == sum(value.numel() for value in weights["E"].values())
    # the two moments of Adam are as large as what is trained: nothing frozen is saved anywhere
    moments = torch.load(run / "models" / "2_optimizerG.pth", weights_only=True)["state"].values()
    assert sum(v["exp_avg"].numel() for v in moments) == trained

    results = []
    for output in ("one", "two") if name == "stablesr_ssl" else ():
        restore = ["--model_path", str(run), "--input", str(place / "L"), "--output", str(place / output)]
        main_test([*restore, "--tile", "16", "--tile_overlap", "8"])
        [image] = (place / output).rglob("*.png")
        results.append(imread_uint(str(image)))
    if results:
        assert results[0].shape == (36, 52, 3)
        assert (results[0] == results[1]).all()  # a fixed seed


def model_of(name: str, place: Path, sd: Path, *overrides: str) -> ModelDM:
    opt = parse(REPOSITORY / "options" / f"train_{name}.json", overrides=[*reduced(name, place, sd), *overrides])
    torch.manual_seed(0)
    model = define_Model(opt)
    assert isinstance(model, ModelDM)
    return model


def test_the_gradient_of_ssl_reaches_all_that_is_trained_and_nothing_frozen(place: Path, sd: Path) -> None:
    """Through the decoder, the estimate of x0 and the U-Net, blocks of all three being recomputed."""
    only_ssl = ("train.dm_weight=0", "train.G_lossfn_weight=0", "train.micro_batch=null")
    model = model_of("stablesr_ssl", place, sd, *only_ssl)
    moved(model.netG)
    H = torch.from_numpy(photograph(32, 32) / 255).float().permute(2, 0, 1)[None]
    model.feed_data({"L": F.interpolate(H, scale_factor=0.25, mode="area"), "H": H})
    draw = model.draw()
    terms = model.losses(draw._replace(t=torch.full_like(draw.t, 100)))
    assert list(terms) == ["ssl"]
    terms["ssl"].backward()
    for name, p in model.netG.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    network: Any = model.netG
    own = {id(p) for p in network.parameters()}
    frozen = [p for p in network._unet[0].parameters() if id(p) not in own] + list(model.autoencoder.parameters())
    assert all(p.grad is None for p in frozen)


def test_an_autoencoder_of_another_factor_ends_in_one_line(place: Path, sd: Path, tmp_path: Path) -> None:
    other = write_tiny_sd(tmp_path / "other", factor=4)
    for key, line in (("autoencoder.path", "4 times smaller.* 8 times"), ("netG.base", "8 times smaller.* 4 times")):
        with pytest.raises(UserError, match=rf"^autoencoder: .* {line}") as caught:
            model_of("stablesr_ssl", place, sd, f"{key}={other}")
        assert "\n" not in str(caught.value)


def test_an_autoencoder_with_another_scaling_ends_in_one_line(place: Path, sd: Path, tmp_path: Path) -> None:
    config = tmp_path / "other" / "vae" / "config.json"
    shutil.copytree(sd, tmp_path / "other")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.13025}))
    with pytest.raises(UserError, match=r"^autoencoder: .* by 0\.13025, netG's base by 0\.18215") as caught:
        model_of("stablesr_ssl", place, sd, f"autoencoder.path={tmp_path / 'other'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "override", "line"),
    [
        ("stablesr", 'diffusion={"type": "onestep"}', "diffusion.type: stablesr is made for ddpm, not onestep"),
        ("onestep_ssl", 'diffusion={"type": "ddpm"}', "diffusion.type: sd_lora is made for onestep, not ddpm"),
        ("onestep_ssl", "diffusion.timestep=1000", "diffusion.timestep: Stable Diffusion has times 0 to 999, not 1000"),
    ],
)
def test_a_process_that_the_network_is_not_made_for_ends_in_one_line(name: str, override: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse(REPOSITORY / "options" / f"train_{name}.json", overrides=[override])


def test_the_recipe_has_the_figures_of_the_ssl_papers_code() -> None:
    opt = parse(REPOSITORY / "options" / "train_stablesr_ssl.json")
    train, data, net, diffusion = opt.train, opt.train_set, opt.netG, opt.diffusion
    assert data is not None
    assert diffusion is not None
    assert [diffusion[name] for name in ("type", "steps", "beta_start", "beta_end", "color_fix", "sample_steps")] == [
        *("ddpm", 1000, 0.00085, 0.012, "adain", 200)
    ]
    assert (net.net_type, net["model_channels"], net["channel_mult"], net["num_heads"]) == (
        *("stablesr", 256, [1, 1, 2, 2], 4),
    )
    assert (train.G_optimizer_type, train.G_optimizer_lr, train.G_optimizer_wd) == ("adamw", 5e-5, 0.01)
    # null: AdamW's own betas, 0.9 and 0.999
    assert (train.G_optimizer_betas, train.G_scheduler_milestones) == (None, [])
    assert (train.iterations, data.dataloader_batch_size, data.H_size) == (800_000, 48, 512)
    assert data.degradation_type == "stablesr"
    assert (train.dm_weight, train.G_lossfn_type, train.G_lossfn_weight) == (1, "l1", 0.1)
    assert (train.ssl_l1_weight, train.ssl_kl_weight, train.mask_stride) == (0.5, 0.5, 3)
    assert (train.kernel_size_search, train.kernel_size_window, train.sigma) == (25, 9, 0.004)
    assert opt.autoencoder.path == net["base"]


def test_the_option_files_agree() -> None:
    plain, ssl, test = (options_of(name) for name in ("train_stablesr", "train_stablesr_ssl", "test_stablesr"))
    assert test["diffusion"].items() >= ssl["diffusion"].items()
    assert test["netG"].items() <= ssl["netG"].items()
    assert test["autoencoder"].items() <= ssl["autoencoder"].items()
    of_the_image = {"G_lossfn_type", "G_lossfn_weight", "ssl_l1_weight", "ssl_kl_weight", "mask_stride", "sigma"}
    of_the_image |= {"kernel_size_search", "kernel_size_window"}
    for options in (plain, ssl):
        options["train"] = {key: value for key, value in options["train"].items() if key not in of_the_image}
    assert (plain.pop("task"), ssl.pop("task")) == ("stablesr", "stablesr_ssl")
    assert plain == ssl


# -------------------------------------------------------------------------------------------------------- user's errors


def changed(sd: Path, tmp_path: Path, change: Callable[[Path], Any]) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(sd, folder)
    change(folder)
    return folder


def replace(file: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return change


def remove(*parts: str) -> Callable[[Path], Any]:
    return lambda folder: [shutil.rmtree(folder / part) for part in parts]


def without_a_tensor(file: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        weights = load_file(folder / file)
        del weights[min(weights)]
        save_file(weights, folder / file, metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (remove("unet"), "no folder of Stable Diffusion, it lacks unet$"),
        (remove("vae", "scheduler"), "no folder of Stable Diffusion, it lacks vae, scheduler$"),
        (remove("text_encoder"), "its prompt encoder is absent, it lacks text_encoder$"),
        (remove("tokenizer"), "its prompt encoder is absent, it lacks tokenizer$"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "unet cannot be read"),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"x"), "text_encoder cannot be read"),
        (replace("tokenizer/vocab.json", "{", ""), "tokenizer cannot be read"),
        (replace("vae/config.json", "{", ""), "vae cannot be read"),
        (replace("unet/config.json", "UNet2DConditionModel", "UNet2DModel"), "holds a UNet2DModel.*UNet2DCondition"),
        (
            replace("unet/config.json", '"in_channels": 4', '"in_channels": 9'),
            "9 channels to 4.*not one for inpainting",
        ),
        (replace("vae/config.json", '"latent_channels": 4', '"latent_channels": 16'), "its autoencoder makes 16"),
        (replace("unet/config.json", '"num_class_embeds": null', '"num_class_embeds": 7'), "more than time and prompt"),
        (replace("scheduler/scheduler_config.json", '"epsilon"', '"sample"'), "it predicts sample, not noise or v$"),
        (replace("unet/config.json", '"layers_per_block": 1', '"layers_per_block": 2'), "unet cannot be read .*shape"),
        (without_a_tensor("unet/diffusion_pytorch_model.safetensors"), "unet is incomplete: 1 tensors are missing"),
        (without_a_tensor("text_encoder/model.safetensors"), "text_encoder is incomplete: 1 tensors are missing"),
    ],
)
def test_a_base_of_another_kind_ends_in_one_line(
    change: Callable[[Path], Any], line: str, sd: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^netG\.base: .*{line}") as caught:
        load_stable_diffusion(str(changed(sd, tmp_path, change)))
    assert "\n" not in str(caught.value)


def test_parts_of_different_models_end_in_one_line(tmp_path: Path) -> None:
    folder = write_tiny_sd(tmp_path / "sd", cross_attention_dim=24)
    with pytest.raises(UserError, match=r"^netG.base: .*prompt encoder is 16 wide, its U-Net reads 24"):
        load_stable_diffusion(str(folder))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model_zoo/absent/sd", "no such folder, nor a hub's name"),
        ("./absent", "no such folder, nor a hub's name"),
        ("nobody/absent", "no such folder, and it cannot be downloaded .*give its folder$"),
        (__file__, "is a file, expected a folder"),
    ],
)
def test_a_base_that_cannot_be_had_ends_in_one_line(name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the test needs no network
    with pytest.raises(UserError, match=rf"^netG\.base: {re.escape(name)}:? .*{line}") as caught:
        load_stable_diffusion(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (STABLESR | {"channel_mult": [1, 1]}, r"netG: stablesr: channel_mult: 2 levels, the U-Net of base has 3"),
        (STABLESR | {"model_channels": 6}, r"netG: stablesr: model_channels: 6 does not divide by norm_num_groups"),
        (STABLESR | {"num_heads": 3}, r"netG: stablesr: model_channels: 8 does not divide by num_heads, 3"),
        (LORA | {"target_modules": ["to_x"]}, r"netG: sd_lora: .*to_x"),
        ({"net_type": "stablesr"}, r"netG.base: is required and missing"),
    ],
)
def test_options_that_do_not_fit_the_base_end_in_one_line(options: dict[str, Any], line: str, sd: Path) -> None:
    base = {} if "missing" in line else {"base": str(sd)}
    with pytest.raises(UserError, match=line) as caught:
        define_G({"scale": 4, "is_train": True, "netG": options | base})
    assert "\n" not in str(caught.value)


def test_a_missing_package_ends_in_one_line(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, options in (("transformers", STABLESR), ("peft", LORA)):
        with monkeypatch.context() as without:
            without.setitem(__import__("sys").modules, package, None)
            with pytest.raises(UserError, match=rf"{package}.*python -m pip install -r requirements-extra.txt$"):
                define_G({"scale": 4, "is_train": True, "netG": options | {"base": str(sd)}})
