"""The particular GAN systems, SPSR, RankSRGAN, LDL and BebyGAN, in tiny training runs."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.loss_systems import artifact_loss
from models.model_spsr import ModelSPSR
from models.network_ranksrgan import RankerVGG12
from tests.training import SSL, Workplace, assert_same
from utils.utils_checkpoint import unwrap
from utils.utils_error import UserError

SPSR = {"net_type": "spsr", "nf": 4, "nb": 20, "gc": 4}
SPSR_TERMS = ("train.gradient_weight=0.01", "train.branch_weight=0.5", "train.gradient_D_lossfn_weight=0.1")
RANKED = ("netR.net_type=ranker_vgg12", "netR.base_nc=2", "train.rank_weight=0.03")
BEBY = ("train.best_buddy_weight=1", "train.back_projection_weight=1", "train.region_aware=true")
BICUBIC = "datasets.train.dataset_type=sr"


class Systems(Workplace):
    """With a ranker's file."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        torch.manual_seed(4)
        ranker = RankerVGG12(base_nc=2)
        for layer in ranker.modules():
            if isinstance(layer, nn.BatchNorm2d):  # as after training; untrained, both modes would be nearly one
                layer.running_mean.uniform_(-0.5, 0.5), layer.running_var.uniform_(0.2, 2)
        torch.save(ranker.state_dict(), root / "ranker.pth")
        self.ranked = (*RANKED, f"path.pretrained_netR={root / 'ranker.pth'}")

    def system(self, name: str) -> tuple[dict[str, Any], tuple[str, ...], set[str]]:
        """Its generator, its options, and the terms that it must log beyond those of a GAN."""
        return {
            "spsr": (SPSR, ("model=spsr", *SPSR_TERMS, *SSL), {"gradient", "branch", "D_grad_loss", "D_grad_real"}),
            "ranksrgan": (
                {"net_type": "ranksrgan_srresnet", "nf": 8, "nb": 1},
                ("model=gan", "train.gan_type=gan", *self.ranked),
                {"rank"},
            ),
            "ldl": (
                {"net_type": "rrdbnet", "nf": 8, "nb": 1, "gc": 4},
                ("model=gan", "train.gan_type=ragan_basicsr", "train.ldl_weight=1", "train.E_decay=0.9"),
                {"ldl"},
            ),
            "bebygan": (
                {"net_type": "rrdb", "nf": 8, "nb": 1, "gc": 4},
                ("model=gan", "train.gan_type=ragan_basicsr", "train.G_lossfn_weight=0", *BEBY, BICUBIC),
                {"best_buddy", "back_projection"},
            ),
        }[name]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systems:
    # SPSR has 20 blocks or more, each of 15 convolutions; what is tested here is not in them.
    monkeypatch.setattr("models.network_spsr._rrdb", lambda nc, gc: nn.Conv2d(nc, nc, 3, 1, 1))
    return Systems(tmp_path)


@pytest.fixture
def spsr(work: Systems) -> Systems:
    work.options["netG"] = SPSR
    return work


def step(model: Any, batch: dict[str, torch.Tensor], number: int = 1) -> dict[str, float]:
    """One training step; -> its log."""
    model.update_learning_rate(number)
    model.feed_data(batch)
    model.optimize_parameters(number)
    return model.current_log()


def noise(size: int, count: int = 2) -> dict[str, torch.Tensor]:
    """A batch without images."""
    rng = torch.Generator().manual_seed(1)
    return {key: torch.rand(count, 3, s, s, generator=rng) for key, s in (("L", size // 4), ("H", size))}


# -------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["spsr", "ranksrgan", "ldl", "bebygan"])
def test_a_system_trains_logs_its_terms_and_resumes_in_every_bit(work: Systems, name: str) -> None:
    work.options["netG"], options, terms = work.system(name)
    work.run(*options, "task=whole", "train.iterations=3", "train.checkpoint_save=3")
    work.run(*options, "task=parts", "train.iterations=2", "datasets.test=null")
    torch.manual_seed(99)  # nothing of the process survives a restart
    work.run(*options, "task=parts", "train.iterations=3")
    whole = work.saved(3, "whole")
    discriminators = {"D", "D_grad"} if name == "spsr" else {"D"}
    assert set(whole) == {"G", "E", *discriminators, *(f"optimizer{n}" for n in {"G"} | discriminators)}
    assert_same(whole, work.saved(3, "parts"))
    assert "resumed at step 2" in work.log("parts")
    log = work.log("whole")
    for term in {"D_loss", "l_d_real", "D_fake"} | terms:
        values = [float(value) for value in re.findall(rf" {term} (\S+)", log)]
        assert len(values) == 3, term  # one a step
        assert all(map(math.isfinite, values))
        assert any(values), term
    assert re.search(r"step 3 test: PSNR \d", log)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.ldl_weight=1", "train.E_decay=0"], r"train\.ldl_weight: .*set train\.E_decay"),
        (["train.best_buddy_weight=1", "datasets.train.H_size=8"], r"train\.best_buddy_weight: .*12 pixels, not 8"),
        (["train.branch_weight=1"], r"train\.branch_weight: srvgg_compact has no gradient branch"),
        (["train.gradient_D_lossfn_weight=1"], r"train\.gradient_D_lossfn_weight: model gan .*use model spsr"),
        (["model=spsr", "netD=null"], "netD: is required for model spsr"),
        (["train.rank_weight=1"], "netR: is required for train.rank_weight"),
        (RANKED, r"path\.pretrained_netR: is required for train.rank_weight"),
        ([*RANKED, "path.pretrained_netR=x.pth"], r"x\.pth.*no such file|no file x\.pth"),
        ([*RANKED, "path.pretrained_netR=x.pth", "datasets.train.H_size=24"], "at least 32 pixels, not 24"),
        (["netR.net_type=ranker_vgg12", "netR.base_mc=2"], r"netR\.base_mc: unknown key; did you mean 'base_nc'"),
        (["netR.net_type=ranker_vgg12", "netR.in_nc=1"], "in_nc: 1 contradicts n_channels 3"),
    ],
)
def test_a_mistake_is_one_line(work: Systems, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        work.run("model=gan", *overrides)
    assert "\n" not in str(error.value)
    assert not (work.root / "runs").exists()


# --------------------------------------------------------------------------------------------------------------- SPSR


@pytest.mark.parametrize("model", ["plain", "gan"])
def test_spsrs_network_trains_under_other_models_too(spsr: Systems, model: str) -> None:
    spsr.run(f"model={model}", "train.iterations=1", "train.branch_weight=0.5")
    assert re.search(r"G_loss \S+ branch 0\.\d", spsr.log())
    assert "PSNR" in spsr.log()


def test_spsrs_terms_are_those_worked_out_by_hand(spsr: Systems) -> None:
    def by_hand(image: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(image, (1, 1, 1, 1))
        v = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        h = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        return (v**2 + h**2 + 1e-6).sqrt()

    batch = noise(32)
    model = spsr.model("model=spsr", *SPSR_TERMS, seed=3)
    with torch.no_grad():
        out = model.netG(batch["L"])
        real, fake = by_hand(batch["H"]), by_hand(out.E)
        expected = {
            "gradient": 0.01 * (fake - real).square().mean(),
            "branch": 0.5 * (out.gradient - real).abs().mean(),
            "D_grad_loss": 0.1 * (spsr.model("model=spsr", seed=3).netD_grad(fake) - 1).square().mean(),  # lsgan
        }
    log = step(model, batch)
    for name, value in expected.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-4), name  # float32, the sums in another order


def test_the_second_discriminator_learns_to_tell_gradient_maps_apart(spsr: Systems) -> None:
    alone = ("train.D_init_iters=100", "train.D_optimizer_lr=3e-3")  # against a generator that stands still
    model, batch = spsr.model("model=spsr", *SPSR_TERMS, *alone), spsr.batch()
    logs = [step(model, batch, number) for number in range(1, 31)]
    # Who cannot tell them apart gets 0.5 at best: 0.25 for each.
    assert logs[-1]["l_d_grad_real"] + logs[-1]["l_d_grad_fake"] < 0.3
    assert logs[-1]["D_grad_real"] > logs[-1]["D_grad_fake"] + 0.3
    assert "G_loss" not in logs[-1]


@pytest.mark.parametrize("weight", ["D_lossfn_weight", "gradient_D_lossfn_weight"])
def test_either_discriminator_alone_moves_the_generator(spsr: Systems, weight: str) -> None:
    off = [f"train.{name}=0" for name in ("G_lossfn_weight", "D_lossfn_weight", "gradient_D_lossfn_weight")]
    log = step(spsr.model("model=spsr", *off, f"train.{weight}=1"), noise(32))
    assert log["G_grad"] > 0


def test_a_discriminator_of_weight_0_is_not_trained(spsr: Systems) -> None:
    model = spsr.model("model=spsr", "train.gradient_D_lossfn_weight=0")
    before = [p.clone() for p in model.netD_grad.parameters()]
    log = step(model, noise(32))
    assert all(torch.equal(a, b) for a, b in zip(before, model.netD_grad.parameters(), strict=True))
    assert not any("D_grad_" in name for name in log)


def test_the_two_discriminators_have_one_architecture_and_schedule_but_not_one_set_of_weights(spsr: Systems) -> None:
    rates = ("train.D_optimizer_lr=1e-3", "train.D_scheduler_milestones=[2]", "train.D_optimizer_betas=[0.5, 0.6]")
    model = spsr.model("model=spsr", *rates)
    assert isinstance(model, ModelSPSR)
    first, second = model.netD.state_dict(), model.netD_grad.state_dict()
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}
    assert not torch.equal(first["conv0.weight"], second["conv0.weight"])
    for number, rate in ((1, 1e-3), (2, 5e-4)):
        model.update_learning_rate(number)
        groups = [model.optimizers[name].param_groups[0] for name in ("D", "D_grad")]
        assert [group["lr"] for group in groups] == [rate, rate]
        assert [tuple(group["betas"]) for group in groups] == [(0.5, 0.6)] * 2


def test_the_gradient_map_of_H_is_computed_once_a_step(spsr: Systems) -> None:
    model, batch = spsr.model("model=spsr", *SPSR_TERMS), noise(32)
    seen: list[torch.Tensor] = []
    model.gradient_map.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for number in (1, 2):
        step(model, batch, number)
    assert sum(image is batch["H"] for image in seen) == 2
    other = {key: 1 - value for key, value in batch.items()}
    model.feed_data(other)
    assert torch.equal(model.gradient_H, model.gradient_map(other["H"]))  # not that of the batch before


def test_spsr_steps_against_the_published_kind_of_discriminator(spsr: Systems) -> None:
    spsr.options["netD"] = {"net_type": "discriminator_vgg_style", "input_size": 128, "base_nc": 2}
    model = spsr.model("model=spsr", *SPSR_TERMS, "datasets.train.H_size=128", "train.gan_type=ragan_basicsr")
    assert all(math.isfinite(value) for value in step(model, noise(128)).values())


def test_a_broken_second_discriminator_is_not_saved(spsr: Systems, tmp_path: Path) -> None:
    model = spsr.model("model=spsr")
    with torch.no_grad():
        next(model.netD_grad.parameters())[0] = float("inf")
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match=r"netD_grad are not finite.*train\.D_optimizer_lr"):
        model.save(tmp_path / "models", 1)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks are wrapped as for several processes; there is one."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    monkeypatch.setattr("models.model_base.utils_dist.world_size", lambda: 2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("weight", [0.5, 0], ids=["branch", "no_branch"])
def test_spsr_trains_in_the_distributed_wrapper(spsr: Systems, process_group: None, weight: float) -> None:
    options = (f"train.branch_weight={weight}", "model=spsr", "train.gradient_D_lossfn_weight=0.1")
    batch = noise(32)
    wrapped = spsr.model(*options, seed=3)
    assert all(unwrap(wrapped.networks[name]) is not wrapped.networks[name] for name in ("G", "D", "D_grad"))
    for number in (1, 2):  # a parameter without a gradient would end the second step
        log = step(wrapped, batch, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.model_base.utils_dist.world_size", lambda: 1)
        alone = spsr.model(*options, seed=3)
    for number in (1, 2):
        expected = step(alone, batch, number)
    assert log == pytest.approx(expected, rel=1e-5)  # the wrapper may sum gradients in another order


# ---------------------------------------------------------------------------------------------------------- RankSRGAN


def test_the_rank_term_reaches_the_generator_unless_the_published_behaviour_is_asked_for(work: Systems) -> None:
    batch = noise(32)
    for published in (False, True):
        model = work.model(*work.ranked, f"train.rank_published={str(published).lower()}")
        ranker = model.rank.ranker
        before = {name: value.clone() for name, value in ranker.state_dict().items()}
        model.feed_data(batch)
        E = model.netG(model.L)
        rank = model.fidelity_terms(E)["rank"]
        assert ranker.training == published
        assert rank.requires_grad != published
        if not published:
            gradients = torch.autograd.grad(rank, list(model.netG.parameters()))
            assert all(bool(gradient.any()) for gradient in gradients)
            expected = 0.03 * torch.sigmoid(ranker(E)).sum()
            assert rank.item() == pytest.approx(expected.item(), rel=1e-6)  # float32
        log = step(model, batch)
        assert log["rank"] > 0
        drifted = any(not torch.equal(before[name], value) for name, value in ranker.state_dict().items())
        assert drifted == published  # its running statistics; the weights never move
        assert all(torch.equal(before[n], p) for n, p in ranker.named_parameters())
        assert "rank" not in model.optimizers


def test_every_tensor_of_the_ranker_is_loaded(work: Systems, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = work.model(*work.ranked)
    file = torch.load(work.root / "ranker.pth", weights_only=True)
    assert f"loaded {len(file)} of {len(file)} tensors from {work.root / 'ranker.pth'}" in caplog.text
    assert_same(dict(model.rank.ranker.state_dict()), file)


def test_a_file_of_another_network_is_no_ranker(work: Systems) -> None:
    torch.save(work.model().netG.state_dict(), work.root / "ranker.pth")
    with pytest.raises(UserError, match=r"ranker\.pth does not fit RankerVGG12: .*missing") as error:
        work.model(*work.ranked)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- LDL and BebyGAN


def test_the_artifact_map_compares_with_the_averaged_generator(work: Systems) -> None:
    model, batch = work.model("train.ldl_weight=2"), noise(32)
    with torch.no_grad():
        for p in model.netE.parameters():
            p.mul_(0.9)
    model.feed_data(batch)
    E = model.netG(model.L)
    term = model.fidelity_terms(E)["ldl"].item()
    with torch.no_grad():
        assert term == pytest.approx(2 * artifact_loss(E, batch["H"], model.netE(batch["L"])).item(), rel=1e-6)
        assert term != pytest.approx(2 * artifact_loss(E, batch["H"], E).item(), rel=1e-3)
    assert all(p.grad is None for p in model.netE.parameters())


def test_the_discriminator_sees_neither_image_where_H_is_flat(work: Systems) -> None:
    model, batch = work.model("model=gan", "train.region_aware=true"), noise(32)
    batch["H"][..., 16:] = 0.5
    seen: list[torch.Tensor] = []
    model.netD.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    step(model, batch)
    assert len(seen) == 3  # E in the generator's step, H and E in its own
    for image in seen:
        assert not image[..., 21:].any()  # the window of 11 pixels reaches 5 over the edge
        assert bool((image[..., :16] != 0).any())
    assert torch.equal(seen[1][..., :16], batch["H"][..., :16])
