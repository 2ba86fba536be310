"""Diffusion training: its step by hand, precision and pieces, resuming, several processes, the command lines."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import main_train_dm
from main_test import main as main_test
from models.model_dm import Draw, ModelDM
from models.sampler import enlarge
from tests.conftest import REPOSITORY, photograph
from tests.test_dist import torchrun
from tests.tiny_sd import write_tiny_sd
from tests.training import SSL, Workplace, assert_same
from training.loop import training_options
from utils.utils_error import UserError
from utils.utils_image import imread_uint, imsave
from utils.utils_option import parse, strip_comments

pytest.importorskip("diffusers")

RECIPES = [f"train_{name}" for name in ("resshift", "resshift_ssl", "resshift_pixel_ssl", "resshift_demo")]
RECIPES += [f"train_{name}" for name in ("onestep", "onestep_ssl", "onestep_pixel_ssl")]
NETG = {
    "net_type": "unet2d",
    "patch": 2,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "mid_attention": False,
    "norm_num_groups": 4,
}
RESSHIFT = {"type": "resshift", "steps": 4, "min_noise_level": 0.2}
DDPM = ('diffusion={"type": "ddpm", "sample_steps": 3}', "netG.residual=false")
ONESTEP = ('diffusion={"type": "onestep"}',)
BOXSUM = (*SSL, "train.ssl_mode=boxsum")  # nothing to compile in a test
TERMS = ("train.G_lossfn_weight=0.1", *BOXSUM)


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    place = Workplace(tmp_path)
    del place.options["netD"], place.options["train"]["gan_type"], place.options["train"]["D_lossfn_weight"]
    place.options |= {"model": "dm", "netG": dict(NETG), "diffusion": dict(RESSHIFT)}
    place.options["train"] |= {"G_lossfn_weight": 0}
    return place


def model_of(work: Workplace, *overrides: str) -> ModelDM:
    model = work.model(*overrides)
    assert isinstance(model, ModelDM)
    return model


def fed(work: Workplace, *overrides: str) -> ModelDM:
    """A model with a batch of two."""
    model = model_of(work, *overrides)
    model.feed_data(work.batch(*overrides))
    return model


def gradients(model: ModelDM) -> list[Tensor]:
    found = [p.grad for p in model.netG.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


class Encoder(nn.Module):
    """A stand-in for a trained autoencoder: frozen convolutions, a latent ``factor`` times smaller."""

    def __init__(self, factor: int = 4, channels: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.factor, self.channels = factor, channels
            self.down = nn.Conv2d(3, channels, factor, factor)
            self.up = nn.ConvTranspose2d(channels, 3, factor, factor)
        self.requires_grad_(False)
        self.decoded = 0

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        latent = self.down(image)
        return latent if noise is None else latent + 0.1 * noise

    def decode(self, latent: Tensor) -> Tensor:
        self.decoded += 1
        return self.up(latent)


def use_encoder(monkeypatch: pytest.MonkeyPatch, factor: int = 4, channels: int = 3) -> None:
    """Every latent model gets the stand-in."""
    monkeypatch.setattr("models.model_dm.define_autoencoder", lambda opt: Encoder(factor, channels))
    monkeypatch.setattr("models.sampler.define_autoencoder", lambda opt: Encoder(factor, channels))


LATENT = ("autoencoder.type=vq", "autoencoder.path=there")


# -------------------------------------------------------------------------------------------------- one step, by hand


@pytest.mark.parametrize(("kind", "iterations"), [((), 60), (DDPM, 60), (ONESTEP, 160)])
def test_training_on_one_batch_brings_the_loss_near_zero(work: Workplace, kind, iterations: int) -> None:
    wide = ("netG.block_out_channels=[64]", "netG.patch=4", "train.G_optimizer_lr=3e-3", "datasets.train.H_size=16")
    cosine = (f"train.iterations={iterations}", "train.G_scheduler_type=CosineAnnealingLR")
    model = fed(work, *kind, *wide, *cosine)
    draw = model.draw()
    model.draw = lambda: draw  # type: ignore[method-assign]
    losses = []
    for step in range(1, iterations + 1):
        model.update_learning_rate(step)
        model.optimize_parameters(step)
        losses.append(model.current_log()["dm_loss"])
    assert losses[-1] < 0.02 * losses[0], losses[::10]


def test_the_diffusion_loss_is_the_squared_error_of_the_prediction(work: Workplace) -> None:
    model = fed(work, "train.dm_weight=3")
    n, _, h, w = model.H.shape
    t, noise = torch.tensor([0, 3]), torch.randn(n, 3, h, w)
    terms = model.losses(Draw(t, noise, noise, noise))
    assert set(terms) == {"dm_loss"}
    # Untrained, the network returns y: the error is y - x0, in [-1, 1], whatever x_t is.
    expected = 3 * (2 * enlarge(model.L, 4) - 2 * model.H).square().mean().item()
    assert terms["dm_loss"].item() == pytest.approx(expected, rel=1e-5)  # float32


def test_the_network_sees_the_scaled_state_its_time_the_enlarged_L_and_L(work: Workplace) -> None:
    model = fed(work)
    seen: list[Tensor] = []
    netG = model.netG

    def spy(x: Tensor, t: Tensor, y: Tensor, L: Tensor) -> Tensor:
        seen.extend((x, t, y, L))
        return netG(x, t, y, L)

    model.netG = spy  # type: ignore[assignment]
    t, noise = torch.tensor([1, 3]), torch.randn(2, 3, 32, 32)
    model.losses(Draw(t, noise, noise, noise))
    x0, y = 2 * model.H - 1, 2 * enlarge(model.L, 4) - 1
    for i, sqrt_eta in enumerate((0.520096, 0.99)):  # of the published table
        x_t = x0[i] + sqrt_eta**2 * (y[i] - x0[i]) + 2 * sqrt_eta * noise[i]
        # The table has six decimals, and noise up to 4 times 2.
        torch.testing.assert_close(seen[0][i], x_t / math.sqrt(1 + 4 * sqrt_eta**2), atol=2e-5, rtol=0)
    assert seen[1] is t
    assert torch.equal(seen[2], y)
    assert torch.equal(seen[3], 2 * model.L - 1)


@pytest.mark.parametrize("kind", [(), DDPM, ONESTEP], ids=["resshift", "ddpm", "onestep"])
def test_all_losses_are_zero_where_the_prediction_is_right(work: Workplace, kind) -> None:
    # Image losses compare E with H in [0, 1] both; the published StableSR code had E in [-1, 1].
    model = fed(work, *kind, *TERMS)
    draw = model.draw()
    x0 = 2 * model.H - 1
    model.netG = lambda x, t, y, L: model.process.target(x0, draw.noise)  # type: ignore[assignment]
    terms = model.losses(draw)
    assert set(terms) == {"dm_loss", "G_loss", "ssl"}
    torch.testing.assert_close(model.E, model.H, atol=1e-5, rtol=0)  # times up to 15 float32 roundings with DDPM
    for name, term in terms.items():
        assert term.item() == pytest.approx(0, abs=1e-3), name  # SSL's weights are 50; KL of equal graphs rounds


@pytest.mark.parametrize("published", [False, True])
def test_each_image_loss_is_its_weight_times_its_loss_on_E(work: Workplace, published: bool) -> None:
    model = fed(work, *TERMS, "train.dm_weight=0", f"train.range_published={str(published).lower()}")
    terms = model.losses(model.draw())
    assert set(terms) == {"G_loss", "ssl"}
    E = enlarge(model.L, 4)  # what the untrained network returns
    E = 2 * E - 1 if published else E
    assert terms["G_loss"].item() == pytest.approx(0.1 * (E - model.H).abs().mean().item(), rel=1e-5)  # float32
    assert model.ssl is not None
    assert terms["ssl"].item() == pytest.approx(model.ssl(E, model.H).item(), rel=1e-3)  # exponentials of float32 E


def test_ssl_reaches_what_is_trained_and_nothing_frozen(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    use_encoder(monkeypatch)
    model = model_of(work, *LATENT, *BOXSUM, "train.dm_weight=0", "netG.residual=false")
    model.feed_data(work.batch())
    before = [p.clone() for p in model.autoencoder.parameters()]
    weights = [p.detach().clone() for p in model.netG.parameters()]
    model.optimize_parameters(1)
    assert all(g.abs().sum() > 0 for g in gradients(model))
    assert all(not torch.equal(a, b) for a, b in zip(weights, model.netG.parameters(), strict=True))
    for now, then in zip(model.autoencoder.parameters(), before, strict=True):
        assert now.grad is None
        assert torch.equal(now, then)


def test_without_image_losses_nothing_is_decoded(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    use_encoder(monkeypatch)
    model = fed(work, *LATENT)
    model.optimize_parameters(1)
    assert model.autoencoder.decoded == 0
    model = fed(work, *LATENT, *BOXSUM)
    model.optimize_parameters(1)
    assert model.autoencoder.decoded == 1


@pytest.mark.parametrize(("factor", "channels"), [(4, 3), (8, 4)])
def test_a_latent_model_trains_and_restores(work: Workplace, monkeypatch, factor: int, channels: int) -> None:
    use_encoder(monkeypatch, factor, channels)
    work.run(*LATENT, *TERMS, f"netG.channels={channels}", "train.iterations=2", "train.checkpoint_test=2")
    assert "PSNR" in work.log()
    saved = work.saved(2)["G"]
    assert all(name.startswith("unet.") for name in saved)  # the autoencoder is not in there
    assert "ResShift of 4 steps in Encoder" in work.log()


def test_the_posteriors_noise_is_handed_in_in_training_and_absent_in_sampling(work: Workplace, monkeypatch) -> None:
    use_encoder(monkeypatch)
    model = fed(work, *LATENT)
    seen = []
    encode = model.autoencoder.encode
    model.autoencoder.encode = lambda image, noise=None: (seen.append(noise), encode(image, noise))[1]
    draw = model.draw()
    assert draw.noise.shape == (2, 3, 8, 8)
    model.losses(draw)
    model.test()
    assert seen[0] is draw.noise_H
    assert seen[1] is draw.noise_L
    assert seen[2] is None


def test_times_are_drawn_from_all_and_noise_is_normal(work: Workplace) -> None:
    model = fed(work)
    torch.manual_seed(0)
    draws = [model.draw() for _ in range(100)]
    counts = torch.cat([d.t for d in draws]).bincount(minlength=4)
    assert counts.min() > 25  # of 200 draws from 4: 50 +- 6
    noise = torch.stack([d.noise for d in draws])
    assert noise.mean().abs() < 0.01  # 600,000 samples
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(draws[0].noise, draws[0].noise_H)


# ----------------------------------------------------------------------------------------------- pieces and precision


@pytest.mark.parametrize("size", [1, 2])
def test_pieces_give_the_gradient_and_the_log_of_the_whole_batch(work: Workplace, size: int) -> None:
    three = ("datasets.train.dataloader_batch_size=3", *TERMS, "netG.residual=false")
    items = [work.batch(*three, number=i) for i in range(2)]
    batch = {name: torch.cat([item[name] for item in items])[:3] for name in items[0]}
    batch["H"][0] = batch["H"][0].mean()  # no edges: SSL's mean is over pixels, not over images
    results = []
    for micro in ("null", str(size)):
        model = model_of(work, *three, f"train.micro_batch={micro}")
        model.feed_data(batch)
        torch.manual_seed(3)
        model.optimize_parameters(1)
        results.append((gradients(model), model.current_log()))
    (whole, log), (pieces, log_pieces) = results
    assert log.keys() == log_pieces.keys() == {"dm_loss", "G_loss", "ssl", "ssl_l1", "ssl_kl", "G_grad"}
    # The same sums in another order, float32; SSL's gradient has the largest entries.
    largest = max(g.abs().max().item() for g in whole)
    assert largest > 0.01
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * largest)
    for name, value in log.items():
        assert log_pieces[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_weights_and_losses_stay_in_float32(work: Workplace, precision: str) -> None:
    model = fed(work, *TERMS, f"train.precision={precision}", "netG.residual=false")
    assert model.ssl is not None
    if precision == "fp16":  # from the default factor, 2^16, it would take some steps down to where nothing overflows
        model.scalers["G"] = torch.amp.GradScaler("cpu", init_scale=64.0)
    kinds, inside = [], []
    parts = model.ssl.parts
    model.ssl.parts = lambda E, H, mask: (kinds.append(E.dtype), parts(E, H, mask))[1]  # type: ignore[method-assign]
    convolution = next(m for m in model.netG.modules() if isinstance(m, nn.Conv2d))
    convolution.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    draw = model.draw()
    model.draw = lambda: draw  # type: ignore[method-assign]
    model.optimize_parameters(1)
    half = model.current_log()
    assert kinds == [torch.float32]
    assert inside == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert all(p.dtype == torch.float32 for p in model.netG.parameters())
    whole = fed(work, *TERMS, "netG.residual=false")
    whole.draw = lambda: draw  # type: ignore[method-assign]
    whole.optimize_parameters(1)
    for name, value in whole.current_log().items():
        assert half[name] == pytest.approx(value, rel=0.05), name  # bfloat16 has 8 bits
        assert half[name] != value


def test_a_gradient_beyond_half_precision_is_left_out_and_the_factor_halved(work: Workplace) -> None:
    model = fed(work, "train.precision=fp16", "netG.residual=false")
    model.scalers["G"] = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = [p.detach().clone() for p in model.netG.parameters()]
    model.optimize_parameters(1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.netG.parameters(), strict=True))
    assert model.scalers["G"].get_scale() == 2.0**99
    model.scalers["G"] = torch.amp.GradScaler("cpu", init_scale=1.0)
    term = (next(model.netG.parameters()) * 0).sum().sqrt()  # 0, with an infinite slope
    model.backward("G", {"dm_loss": term})
    with pytest.raises(UserError, match="G_grad is nan"):  # no factor helps that
        model.update(2)


def test_the_scaler_is_saved_and_another_precision_goes_on_without_it(work: Workplace) -> None:
    half = ("train.precision=fp16", "datasets.test=null")
    work.run(*half, "task=whole")
    work.run(*half, "task=parts", "train.iterations=2")
    assert work.saved(2, "parts")["optimizerG"]["scaler"]["_growth_tracker"] == 2
    work.run(*half, "task=parts")
    assert_same(work.saved(4, "whole"), work.saved(4, "parts"))
    work.run("task=parts", "train.iterations=5", "datasets.test=null")
    assert "scaler" not in work.saved(5, "parts")["optimizerG"]
    work.run(*half, "task=parts", "train.iterations=6")
    assert "resumed at step 5" in work.log("parts")


# ------------------------------------------------------------------------------------------- learning rate, averages


def test_the_learning_rate_warms_up_and_follows_half_a_cosine(work: Workplace) -> None:
    model = model_of(
        work,
        *("train.iterations=20", "train.G_optimizer_lr=1e-3", "train.G_scheduler_type=CosineAnnealingLR"),
        *("train.G_scheduler_warmup=4", "train.G_scheduler_eta_min=2e-4"),
    )
    rates = []
    for step in range(1, 21):
        model.update_learning_rate(step)
        rates.append(model.current_learning_rate())
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[11] == pytest.approx(6e-4)  # the middle between 4 and 20
    assert rates[19] == pytest.approx(2e-4)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16, 2e-4)
    optimizer.step()
    for rate in rates[4:]:
        scheduler.step()
        assert scheduler.get_last_lr()[0] == pytest.approx(rate)


def test_a_warm_up_goes_before_milestones_too(work: Workplace) -> None:
    model = model_of(work, "train.G_scheduler_warmup=2", "train.G_scheduler_milestones=[4]")
    rates = []
    for step in range(1, 5):
        model.update_learning_rate(step)
        rates.append(model.current_learning_rate())
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


def test_validation_samples_with_the_average(work: Workplace) -> None:
    model = fed(work, "train.E_decay=0.9")
    model.test()
    assert model.netE is not None
    with torch.no_grad():
        for p in model.netG.parameters():
            p.add_(1)
    first = model.E
    model.test()
    assert torch.equal(model.E, first)
    with torch.no_grad():
        for p in model.netE.parameters():
            p.add_(1)
    model.test()
    assert not torch.equal(model.E, first)


def test_weights_that_make_no_finite_image_are_not_saved(work: Workplace, tmp_path: Path) -> None:
    model = model_of(work, "netG.residual=false")
    with torch.no_grad():
        for p in model.netG.parameters():
            p.mul_(1e30)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="weights or output of netG are not finite"):
        model.save(tmp_path / "models", 1)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("kind", [TERMS, (*DDPM, *TERMS), ONESTEP], ids=["resshift_ssl", "ddpm_ssl", "onestep"])
def test_steps_before_and_after_a_restart_equal_the_uninterrupted_run(work: Workplace, kind) -> None:
    validate = ("train.checkpoint_test=3",)  # sampling in between changes nothing
    work.run(*kind, *validate, "task=whole")
    work.run(*kind, *validate, "task=parts", "train.iterations=2")
    torch.manual_seed(99)
    work.run(*kind, *validate, "task=parts")
    assert set(work.saved(4, "whole")) == {"G", "E", "optimizerG"}
    assert_same(work.saved(4, "whole"), work.saved(4, "parts"))
    assert "resumed at step 2" in work.log("parts")


def test_two_processes_train_with_pieces_and_ssl(work: Workplace) -> None:
    four = ("datasets.train.dataloader_batch_size=4", "train.micro_batch=1", "train.iterations=2", "datasets.test=null")
    result = torchrun("main_train_dm.py", work, *TERMS, *four)
    assert result.returncode == 0, result.stderr
    assert "batch 4 = 2 x 2 patches" in work.log()
    assert "done at step 2" in work.log()
    assert all(bool(value.isfinite().all()) for value in work.saved(2)["G"].values())


def test_a_run_is_restored_by_the_same_command_as_any_other(work: Workplace, capsys) -> None:
    work.run(*TERMS, "train.iterations=2", "task=dm", "train.G_optimizer_lr=0.01", "datasets.test=null")
    L = work.root / "L"
    L.mkdir()
    for i, size in enumerate(((130, 97), (9, 12), (20, 21))):
        imsave(photograph(*size, i), str(L / f"{i}.png"))

    def restored(name: str, *more: str, source: Path = L) -> dict[str, np.ndarray]:
        out = work.root / name
        main_test(["--model_path", str(work.folder("dm")), "--input", str(source), "--output", str(out), *more])
        return {path.name: imread_uint(str(path)) for path in sorted(out.rglob("*.png"))}

    first = restored("first")
    assert {name: image.shape for name, image in first.items()} == {
        "0.png": (520, 388, 3),
        "1.png": (36, 48, 3),
        "2.png": (80, 84, 3),
    }
    same = restored("same")
    assert all(np.array_equal(first[name], same[name]) for name in first)
    alone = restored("alone", source=L / "2.png")  # an image's place in the folder is nothing to it
    assert np.array_equal(alone["2.png"], first["2.png"])
    for name, more in {"seed": ("--seed", "1"), "steps": ("--steps", "1"), "tiles": ("--tile", "16")}.items():
        other = restored(name, *more, *(("--tile_overlap", "8") if name == "tiles" else ()), source=L / "2.png")
        assert not np.array_equal(other["2.png"], first["2.png"]), name


def test_a_run_is_measured_beside_others_and_by_its_option_file(work: Workplace, capsys) -> None:
    work.run("train.iterations=1", "datasets.test=null")
    plain = [
        *("model=plain", 'netG={"net_type": "srvgg_compact", "nf": 8, "nc": 1}', "task=plain", "train.iterations=1"),
        *("train.G_lossfn_weight=1", "diffusion=null", "datasets.test=null"),
    ]
    work.run(*plain)
    H = str(work.root / "T")
    paths = [str(work.folder()), str(work.folder("plain"))]
    main_test(["--model_path", *paths, "--gt", H, "--output", str(work.root / "out"), "--steps", "2"])
    out = capsys.readouterr().out
    assert re.search(r"^run +\d", out, re.M)
    assert re.search(r"^plain +\d", out, re.M)
    main_test(["--opt", work.file(), "diffusion.sample_steps=2", f"path.pretrained_netG={work.folder()}"])
    images = [work.root / "out" / "run" / "T", work.folder() / "results" / "run" / "test"]
    one, other = ([imread_uint(str(path)) for path in sorted(folder.glob("*.png"))] for folder in images)
    assert len(one) == 2
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "5"), "5 sampling steps: this process has 4; give 1 to 4"),
        (("--steps", "0"), "0 sampling steps"),
        (("--tile", "16", "--tile_overlap", "16"), "tile"),
    ],
)
def test_sampling_that_cannot_be_is_one_line(work: Workplace, more: tuple[str, ...], message: str) -> None:
    work.run("train.iterations=1", "datasets.test=null")
    with pytest.raises(UserError, match=message):
        main_test(["--model_path", str(work.folder()), "--gt", str(work.root / "T"), *more])


def test_steps_are_for_diffusion_models(work: Workplace) -> None:
    network = ("model=plain", 'netG={"net_type": "srvgg_compact", "nf": 8, "nc": 1}', "diffusion=null")
    work.run(*network, "train.G_lossfn_weight=1", "train.iterations=1", "datasets.test=null")
    with pytest.raises(UserError, match=r"--steps, --seed: are for diffusion models"):
        main_test(["--model_path", str(work.folder()), "--gt", str(work.root / "T"), "--steps", "2"])


# ------------------------------------------------------------------------------------------------- mistakes of the user


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["diffusion=null"], r"diffusion: is required for model dm"),
        (["diffusion.type=reshift"], r"diffusion\.type: 'reshift' is not a process.*did you mean 'resshift'"),
        (["diffusion.kapa=1"], r"diffusion\.kapa: unknown key; did you mean 'kappa'"),
        (["diffusion.sample_steps=9"], r"diffusion\.sample_steps: 9 must not exceed.* 4"),
        (["model=plain"], r"netG\.net_type: unet2d is no network for model plain; .*unet2d"),
        (["netG.net_type=srvgg_compact", "netG.patch=null"], r"netG"),
        (["autoencoder.type=vq"], r"autoencoder\.path: None: .*vq and kl need one"),
        (["autoencoder.path=x"], r"autoencoder\.path: x: type pixel has none"),
        (["netG.channels=4"], r"autoencoder: PixelSpace has 3 channels, netG takes 4"),
        (["n_channels=1"], r"autoencoder: PixelSpace has 1 channels, netG takes 3"),
        (["datasets.train.H_size=44", "netG.patch=8"], r"H_size: netG takes patches divisible by 8, not 44"),
        (["diffusion.type=ddpm", "diffusion.min_noise_level=1"], r"diffusion\.min_noise_level: unknown key"),
        (['diffusion={"type": "ddpm"}'], r"netG\.residual: .*predicts noise"),
        (["train.dm_weight=0"], r"train\.dm_weight: .*nothing to train"),
        (["train.ldl_weight=1"], r"train\.ldl_weight: model dm has no such loss"),
        (["train.rank_weight=1"], r"train\.rank_weight: model dm has no such loss"),
        (["train.G_lossfn_type=l2sum", "train.micro_batch=1"], r"train\.micro_batch: l2sum is a sum"),
        (
            ["train.G_scheduler_type=CosineAnnealingLR", "train.iterations=null"],
            r"train\.iterations: is required for Cosine",
        ),
        (["train.G_scheduler_type=CosineAnnealingLR", "train.G_scheduler_warmup=4"], r"train\.G_scheduler_warmup: 4"),
        (["netG.block_out_channels=[6]"], r"netG: unet2d: block_out_channels: 6 does not divide"),
        (["netG.mid_attention=true"], r"netG: unet2d: attention_head_dim 32 does not divide 8 features"),
        (["netG.attention=[true, false]"], r"netG: unet2d: attention names 2 levels"),
    ],
)
def test_options_that_do_not_fit_are_one_line_before_anything_is_written(work: Workplace, overrides, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        work.run(*overrides)
    assert "\n" not in str(error.value)
    assert not (work.root / "runs").exists()


def test_a_file_for_another_script_is_told_this_one(work: Workplace) -> None:
    with pytest.raises(UserError, match=r"model is 'dm': train it with main_train_dm\.py"):
        training_options(None, ["gan", "spsr"], ["--opt", work.file()])


def test_without_diffusers_the_remedy_is_named(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"unet2d needs the package diffusers; pip install -r requirements-extra\.txt"):
        model_of(work)


# --------------------------------------------------------------------------------------------------------- option files


def options_of(name: str) -> dict[str, Any]:
    return json.loads(strip_comments((REPOSITORY / "options" / f"{name}.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["resshift", "onestep"])
def test_a_recipe_with_ssl_differs_in_ssl_alone(name: str) -> None:
    plain, ssl = options_of(f"train_{name}"), options_of(f"train_{name}_ssl")
    weights = {name: ssl["train"].pop(name) for name in ("ssl_l1_weight", "ssl_kl_weight", "mask_stride", "sigma")}
    assert (weights["mask_stride"], weights["sigma"]) == (3, 0.004)
    assert weights["ssl_l1_weight"] == weights["ssl_kl_weight"] > 0
    assert (ssl["train"].pop("kernel_size_search"), ssl["train"].pop("kernel_size_window")) == (25, 9)
    assert (plain.pop("task"), ssl.pop("task")) == (name, f"{name}_ssl")
    assert plain == ssl


@pytest.mark.parametrize("name", ["resshift", "resshift_ssl", "stablesr", "stablesr_ssl"])
def test_the_published_diffusion_recipes_keep_images_upright(name: str) -> None:
    data = parse(REPOSITORY / "options" / f"train_{name}.json").train_set
    assert data is not None
    assert not data.use_rot


def test_resshifts_recipe_has_the_journals_figures() -> None:
    opt = parse(REPOSITORY / "options" / "train_resshift_ssl.json")
    diffusion, train, data = opt.diffusion, opt.train, opt.train_set
    assert data is not None
    assert diffusion is not None
    figures = [diffusion[name] for name in ("type", "steps", "min_noise_level", "kappa", "etas_end", "power")]
    assert figures == ["resshift", 4, 0.2, 2.0, 0.99, 0.3]
    assert (train.G_optimizer_type, train.G_optimizer_lr, train.G_optimizer_wd) == ("adamw", 5e-5, 0)
    assert (train.G_scheduler_warmup, train.G_scheduler_eta_min, train.iterations) == (5000, 2e-5, 400_000)
    assert (data.dataloader_batch_size, train.micro_batch, data.H_size) == (96, 12, 256)
    assert (train.E_decay, train.precision, train.manual_seed) == (0.999, "fp16", 123456)
    assert (train.dm_weight, train.lpips_weight, train.G_lossfn_weight) == (1, 1, 0)
    assert (opt.autoencoder.type, opt.autoencoder.precision, data.degradation_type) == ("vq", "fp16", "resshift")
    tested = options_of("test_resshift")
    assert tested["diffusion"].items() >= options_of("train_resshift")["diffusion"].items()
    assert tested["autoencoder"]["path"] == options_of("train_resshift")["autoencoder"]["path"]


TINY_UNET2D = ("block_out_channels=[8, 8]", "norm_num_groups=4", "layers_per_block=1", "attention_head_dim=4")
TINY_RESSHIFT = ("image_size=8", "lq_size=8", "model_channels=32", "channel_mult=[1]", "num_res_blocks=[1]")
TINY_RESSHIFT += ("attention_resolutions=[8]", "swin_embed_dim=32", "swin_depth=1", "window_size=4")


def write_tiny_vq(folder: Path) -> Path:
    from diffusers import VQModel

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    VQModel(block_out_channels=(4, 4, 4), norm_num_groups=2, num_vq_embeddings=16, **levels).save_pretrained(folder)
    return folder


def reduced(opt: Any, work: Workplace) -> list[str]:
    """Overrides that leave a recipe its process, its kinds of networks and losses, and take its size and downloads."""
    result = [f"path.root={work.root}", f"datasets.train.dataroot_H={work.root / 'H'}", "datasets.train.H_size=32"]
    result += ["datasets.train.dataloader_batch_size=2", "datasets.train.dataloader_num_workers=0"]
    result += ["datasets.test=null", "train.lpips_weight=0", "train.precision=fp32", "train.G_scheduler_warmup=0"]
    result.append("train.G_scheduler_eta_min=1e-5")  # else the cosine ends at a rate of 0
    result += ["train.checkpoint_print=1", "train.checkpoint_save=1", "autoencoder.precision=fp32"]
    if opt.train.micro_batch:
        result.append("train.micro_batch=1")
    if opt.train.ssl_l1_weight:
        result += ["train.ssl_mode=boxsum", "train.kernel_size_search=5", "train.kernel_size_window=3"]
    match opt.netG.net_type:
        case "unet2d":
            result += [f"netG.{text}" for text in (*TINY_UNET2D, f"attention={json.dumps(opt.netG.attention[-2:])}")]
        case "resshift_unet_swin":
            result += [f"netG.{text}" for text in TINY_RESSHIFT]
            result.append(f"autoencoder.path={write_tiny_vq(work.root / 'vq')}")
        case "sd_lora":
            sd = write_tiny_sd(work.root / "sd")
            result += [f"netG.base={sd}", f"autoencoder.path={sd}", "netG.base_precision=fp32", "netG.rank=2"]
    return result


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_goes_on_and_restores(work: Workplace, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = REPOSITORY / "options" / f"{name}.json"
    opt: Any = parse(file)
    assert f"//   python main_train_dm.py --opt options/{name}.json" in file.read_text(encoding="utf-8").split("\n")
    assert opt.task == name.removeprefix("train_")
    assert opt.unused == []
    if opt.netG.net_type == "sd_lora":
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    changes = reduced(opt, work)
    for iterations in (1, 2):
        argv = ["main_train_dm", "--opt", str(file), *changes, f"train.iterations={iterations}"]
        monkeypatch.setattr(sys, "argv", argv)
        main_train_dm.main()
    run = work.root / opt.task
    expected = {"G", "optimizerG"} | ({"E"} if opt.train.E_decay else set())
    assert {path.stem.partition("_")[2] for path in (run / "models").glob("2_*.pth")} == expected
    log = (run / "train.log").read_text(encoding="utf-8")
    assert "resumed at step 1" in log
    losses = next(line for line in log.splitlines() if "step 2/2" in line)
    weights = {"dm_loss": "dm_weight", "G_loss": "G_lossfn_weight", "ssl": "ssl_l1_weight"}
    assert {term for term in weights if f" {term} " in losses} == {t for t, w in weights.items() if opt.train[w] > 0}
    first, last = (torch.load(run / "models" / f"{step}_G.pth", weights_only=True) for step in (1, 2))
    assert any(not torch.equal(first[key], last[key]) for key in first)
    main_test(["--model_path", str(run), "--gt", str(work.root / "T" / "0.png")])
    assert len(list((run / "results" / opt.task).rglob("*.png"))) == 1
