"""Processes and the sampler: models/diffusion.py, models/sampler.py and the tiles that are blended."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.autoencoder import PixelSpace
from models.diffusion import DDPM, OneStep, Process, ResShift
from models.sampler import DiffusionSampler, enlarge
from utils.utils_error import UserError
from utils.utils_tile import blend_tiles, restore

PROCESSES: dict[str, Process] = {
    "resshift_4": ResShift(4, 0.2),
    "resshift_15": ResShift(15, 0.04),
    "ddpm": DDPM(1000, 0.00085, 0.012),
    "onestep": OneStep(7),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("process", "sqrt_eta", "variance"),
    [
        (ResShift(4, 0.2), "0.1 0.520096 0.761382 0.99", "0 0.038521 0.577119 0.947297"),
        (
            ResShift(15, 0.04),
            "0.02 0.117165 0.176305 0.233629 0.291574 0.351009 0.412356 0.475858 0.541672 0.609910 0.680658 0.753985 "
            "0.829951 0.908606 0.99",
            "0 0.001553 0.030660 0.053529 0.078156 0.105413 0.135730 0.169415 0.206732 0.247927 0.293244 0.342927 "
            "0.397223 0.456386 0.520675",
        ),
    ],
    ids=["T=4", "T=15"],
)
def test_resshifts_schedule_is_the_published_one(process: ResShift, sqrt_eta: str, variance: str) -> None:
    # The published figures have six decimals.
    assert process.sqrt_eta.tolist() == pytest.approx([float(v) for v in sqrt_eta.split()], abs=5e-7)
    variances = [process.posterior_variance(t, t - 1) for t in range(len(process.times))]
    assert variances == pytest.approx([float(v) for v in variance.split()], abs=6e-7)


def test_ddpms_schedule_is_stable_diffusions() -> None:
    ddpm = DDPM(1000, 0.00085, 0.012)
    # By hand: the first beta is beta_start. Published: how an error of the noise is amplified, sqrt(1 / abar - 1).
    assert ddpm.abar[0].item() == pytest.approx(1 - 0.00085, rel=1e-12)
    amplified = (1 / ddpm.abar - 1).sqrt()[[0, 100, 200, 500, 800, 999]]
    assert amplified.tolist() == pytest.approx([0.03, 0.34, 0.57, 1.62, 5.11, 14.61], abs=5e-3)
    assert ddpm.abar[999].item() == pytest.approx(0.00466, abs=5e-6)


def test_ddpm_equals_the_scheduler_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, variance_type="fixed_small"
    )
    ours = DDPM()
    x, output, noise = (normal(1, 3, 4, 4, seed=seed) for seed in range(3))
    for t in (999, 500, 1):
        time = torch.tensor([t])
        assert torch.allclose(
            ours.q_sample(x, x, time, noise), theirs.add_noise(x, noise, time), atol=1e-5
        )  # they: float32 products of 1000 factors
        variance = theirs._get_variance(t).item()
        assert ours.posterior_variance(t, t - 1) == pytest.approx(variance, rel=1e-3)
        mean = ours.step(ours.x0_of(output, x, time), x, t, t - 1, torch.zeros_like(x))
        again = theirs.step(output, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
        again = again - variance**0.5 * normal(1, 3, 4, 4, seed=5)
        assert torch.allclose(mean, again, atol=1e-4)


def test_times_are_spread_evenly_from_the_last_to_the_first() -> None:
    ddpm = DDPM()
    assert ddpm.timesteps() == list(range(999, -1, -1))
    # A stride of 999 / 199 = 5.02, rounded, as improved diffusion spaces 200 steps.
    assert ddpm.timesteps(200)[:4] == [999, 994, 989, 984]
    assert ddpm.timesteps(200)[-3:] == [10, 5, 0]
    assert len(set(ddpm.timesteps(200))) == 200
    assert ddpm.timesteps(1) == [999]
    assert ResShift(15, 0.04).timesteps(4) == [14, 9, 5, 0]
    assert OneStep(7).timesteps() == [7]


@pytest.mark.parametrize("steps", [0, 5, -1])
def test_more_steps_than_there_are_or_none_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=f"{steps} sampling steps.*give 1 to 4"):
        ResShift(4, 0.2).timesteps(steps)


# ------------------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("name", ["resshift_4", "resshift_15", "ddpm"])
def test_the_marginal_has_the_mean_and_the_deviation_of_its_formula(name: str) -> None:
    process, n = PROCESSES[name], 200_000
    x0, y = torch.full((n, 1, 1, 1), 0.7), torch.full((n, 1, 1, 1), -0.4)
    for t in (0, len(process.times) // 2, len(process.times) - 1):
        x_t = process.q_sample(x0, y, torch.full((n,), t), normal(n, 1, 1, 1, seed=t))
        if isinstance(process, ResShift):
            eta = process.sqrt_eta[t].item() ** 2
            mean, deviation = 0.7 + eta * (-0.4 - 0.7), 2 * math.sqrt(eta)
        else:
            abar = math.prod(1 - b for b in (torch.linspace(0.00085**0.5, 0.012**0.5, 1000)[: t + 1] ** 2).tolist())
            mean, deviation = math.sqrt(abar) * 0.7, math.sqrt(1 - abar)
        # Five standard errors of a mean and of a deviation of n samples; abar above is a float32 sum's.
        assert x_t.mean().item() == pytest.approx(mean, abs=5 * deviation / math.sqrt(n) + 1e-4)
        assert x_t.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n) + 1e-4)


@pytest.mark.parametrize("name", ["resshift_4", "resshift_15", "ddpm"])
@pytest.mark.parametrize("share", [0.0, 0.75])
def test_a_step_with_the_true_x0_leads_from_one_marginal_to_an_earlier_one(name: str, share: float) -> None:
    process, n = PROCESSES[name], 200_000
    x0, y = torch.full((n, 1, 1, 1), 0.7), torch.full((n, 1, 1, 1), -0.4)
    t, stride = len(process.times) - 1, max(1, int(share * len(process.times)))
    x_t = process.q_sample(x0, y, torch.full((n,), t), normal(n, 1, 1, 1, seed=1))
    stepped = process.step(x0, x_t, t, t - stride, normal(n, 1, 1, 1, seed=2))
    direct = process.q_sample(x0, y, torch.full((n,), t - stride), normal(n, 1, 1, 1, seed=3))
    deviation = direct.std().item()
    # Seven standard errors of the difference of two samples.
    assert stepped.mean().item() == pytest.approx(direct.mean().item(), abs=7 * deviation * math.sqrt(2 / n))
    assert stepped.std().item() == pytest.approx(deviation, rel=7 / math.sqrt(n))


@pytest.mark.parametrize("name", PROCESSES)
def test_the_estimate_of_x0_undoes_the_noise_where_the_output_is_the_target(name: str) -> None:
    process = PROCESSES[name]
    x0, y, noise = (normal(len(process.times), 2, 3, 3, seed=seed) for seed in range(3))
    x_t = process.q_sample(x0, y, process.times, noise) if name != "onestep" else y
    estimate = process.x0_of(process.target(x0, noise), x_t, process.times)
    # sqrt(1 / abar) is up to 15: so many float32 roundings at values up to 5.
    torch.testing.assert_close(estimate, x0, atol=1e-4, rtol=0)


def test_the_networks_input_has_about_unit_size() -> None:
    process = ResShift(15, 0.04)
    x0, y = normal(15, 1, 100, 100, seed=1), normal(15, 1, 100, 100, seed=2)
    y = x0 + 0.1 * y
    shown = process.scale_input(process.q_sample(x0, y, process.times, normal(15, 1, 100, 100)), process.times)
    # 10,000 pixels an image; the residual adds 0.01 to the variance at most.
    assert shown.std(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 15, abs=0.05)


# ------------------------------------------------------------------------------------------------------------- sampling


class Knows(nn.Module):
    """A network that answers with what the process's target would be for a given x0."""

    size_multiple = 1
    L_ratio = None

    def __init__(self, process: Process, x0: Tensor) -> None:
        super().__init__()
        self.process, self.x0, self.channels = process, x0, x0.shape[1]
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor, L: Tensor) -> Tensor:
        self.calls.append(int(t[0]))
        if isinstance(self.process, DDPM):  # the noise by which x differs from x0
            abar = self.process.abar[t].to(x).reshape(-1, 1, 1, 1)
            return (x - abar.sqrt() * self.x0) / (1 - abar).sqrt()
        return self.x0.expand_as(x)


@pytest.mark.parametrize(("name", "steps"), [("resshift_4", None), ("resshift_15", 4), ("ddpm", 20), ("onestep", None)])
def test_a_network_that_knows_x0_makes_the_sampler_return_it(name: str, steps: int | None) -> None:
    process, H = PROCESSES[name], torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(1))
    network = Knows(process, 2 * H - 1)
    sampler = DiffusionSampler(network, process, PixelSpace(3), 4, steps)
    E = restore(sampler, torch.rand(2, 3, 5, 7), 4)
    # The last step returns x0 itself; DDPM divides by sqrt(abar), float32 rounding.
    torch.testing.assert_close(E, H, atol=1e-5, rtol=0)
    assert network.calls == process.timesteps(steps)


class Local(nn.Module):
    """A small convolution of x, y and L, which sees one pixel in each direction."""

    def __init__(self, channels: int = 3, factor: int = 1, scale: int = 4, multiple: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.channels, self.size_multiple, self.L_ratio = channels, multiple, factor / scale
        self.net = nn.Conv2d(2 * channels + 3, channels, 3, padding=1)
        self.sizes: set[tuple[int, int]] = set()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, L: Tensor) -> Tensor:
        self.sizes.add((x.shape[-2], x.shape[-1]))
        assert x.shape == y.shape
        assert (L.shape[-2], L.shape[-1]) == (x.shape[-2] * self.L_ratio, x.shape[-1] * self.L_ratio)
        L = F.interpolate(L, x.shape[-2:], mode="nearest")
        return y + 0.1 * self.net(torch.cat([x, y, L], 1))


class Folds(nn.Module):
    """A tiny stand-in for an autoencoder: means of squares of ``factor`` pixels, in ``channels`` channels."""

    def __init__(self, factor: int, channels: int) -> None:
        super().__init__()
        self.factor, self.channels = factor, channels

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(image, self.factor)[:, [c % 3 for c in range(self.channels)]]

    def decode(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent[:, :3], scale_factor=self.factor)


@pytest.mark.parametrize(("factor", "channels", "multiple"), [(1, 3, 8), (4, 3, 16), (8, 4, 8)])
@pytest.mark.parametrize("size", [(130, 97), (1, 1), (5, 9)])
def test_any_size_is_restored_with_any_autoencoder(factor: int, channels: int, multiple: int, size) -> None:
    network = Local(channels, factor, 4, multiple)
    sampler = DiffusionSampler(network, ResShift(4, 0.2), Folds(factor, channels), 4, steps=2)
    L = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    for tile in (0, 40):
        E = restore(sampler, L, 4, tile, 8)
        assert E.shape == (1, 3, 4 * size[0], 4 * size[1])
        assert E.isfinite().all()
    assert all(side % multiple == 0 for side in itertools.chain(*network.sizes))


@pytest.mark.parametrize(("factor", "channels"), [(1, 3), (4, 3), (8, 4)])
def test_tiles_equal_the_whole_image_where_the_network_sees_too_little_to_notice(factor: int, channels: int) -> None:
    network = Local(channels, factor)
    with torch.no_grad():  # the middle of the kernel alone
        middle = network.net.weight[:, :, 1, 1].clone()
        network.net.weight.zero_()
        network.net.weight[:, :, 1, 1] = middle
    sampler = DiffusionSampler(network, ResShift(4, 0.2), Folds(factor, channels), 4)
    L = torch.rand(1, 3, 50, 37, generator=torch.Generator().manual_seed(0))
    whole, tiled = restore(sampler, L, 4), restore(sampler, L, 4, 16, 6)
    # Weighted means of equal numbers, four steps of them: float32 rounding.
    torch.testing.assert_close(tiled, whole, atol=2e-5, rtol=0)
    assert max(itertools.chain(*network.sizes)) > 16 * 4 // factor  # and the tiles were tiles
    assert (16 * 4 // factor, 16 * 4 // factor) in network.sizes


def test_tiles_meet_without_a_seam() -> None:
    image = torch.zeros(1, 1, 40, 64)

    def number(piece: Tensor) -> Tensor:  # each piece has a grey value of its own
        number.count += 1
        return torch.full_like(piece, float(number.count % 2))

    number.count = 0
    blended = blend_tiles(number, [image], 24, 12)
    assert number.count > 4
    jump = (blended[..., 1:] - blended[..., :-1]).abs().max()
    # A seam would be a jump of 1. Between middles 12 apart, with deviations of 2.4, the share goes from one to the
    # other as a logistic curve of slope 12 / 2.4^2 = 2.1: half of it at most from one pixel to the next.
    assert 0 < jump < 0.5


def test_pieces_in_half_precision_are_blended_in_single() -> None:
    image = torch.rand(1, 1, 40, 64, generator=torch.Generator().manual_seed(0)).half()
    blended = blend_tiles(lambda piece: piece, [image], 24, 12)
    # A corner weighs 1.4e-11 of its middle, which is 0 in half precision; sums of equal numbers round in float32.
    torch.testing.assert_close(blended, image.float(), atol=1e-6, rtol=1e-6)


def test_the_middle_of_a_piece_is_its_own_and_weights_are_a_gaussian_of_a_tenth_of_its_side() -> None:
    image, number = torch.zeros(1, 1, 16, 24), iter((0.0, 1.0))
    blended = blend_tiles(lambda piece: torch.full_like(piece, next(number)), [image], 16, 8)
    # Two pieces, [0, 16) and [8, 24), with middles at 7.5 and 15.5 and deviations of 1.6; at pixel 10:
    left, right = (math.exp(-0.5 * ((10 - middle) / 1.6) ** 2) for middle in (7.5, 15.5))
    assert blended[0, 0, 3, 10].item() == pytest.approx(right / (left + right), rel=1e-5)  # float32
    assert blended[0, 0, 3, 7].item() == 0
    assert blended[0, 0, 3, 16].item() == 1


def sampler(seed: int = 0, steps: int | None = None, color_fix: str = "none") -> DiffusionSampler:
    return DiffusionSampler(Local(), ResShift(4, 0.2), PixelSpace(3), 4, steps, seed, color_fix)


def test_a_seed_makes_a_result_and_what_was_restored_before_changes_nothing() -> None:
    L = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    model = sampler(seed=3)
    first = restore(model, L, 4)
    torch.rand(10), restore(model, L[:1, :, :5], 4)
    assert torch.equal(restore(model, L, 4), first)
    # Alone, or second in a batch: convolutions of another shape, float32 rounding.
    torch.testing.assert_close(restore(model, L[1:], 4), first[1:], atol=1e-5, rtol=0)
    assert not torch.equal(restore(sampler(seed=4), L, 4), first)


def test_sampling_leaves_the_random_numbers_of_training_alone() -> None:
    model, before = sampler(), torch.get_rng_state()
    restore(model, torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("color_fix", ["adain", "wavelet"])
def test_the_colours_of_L_come_back(color_fix: str) -> None:
    L = 0.3 + 0.4 * torch.rand(1, 3, 24, 30, generator=torch.Generator().manual_seed(0))
    means = [restore(sampler(color_fix=fix), L, 4).mean((2, 3)) for fix in ("none", color_fix)]
    shifted, fixed = ((mean - enlarge(L, 4).mean((2, 3))).abs().max().item() for mean in means)
    assert fixed < 0.1 * shifted


@pytest.mark.parametrize(
    ("network", "autoencoder", "message"),
    [
        (Local(3, 4), Folds(4, 4), "has 4 channels, netG takes 3"),
        (Local(3, 4), Folds(8, 3), "8 times smaller than E, netG takes 4 times smaller ones at scale 4"),
    ],
)
def test_an_autoencoder_of_another_kind_is_refused_in_one_line(network, autoencoder, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        DiffusionSampler(network, ResShift(4, 0.2), autoencoder, 4)
    assert "\n" not in str(error.value)


def test_auto_tiles_are_chosen_for_diffusion_too(monkeypatch) -> None:
    L = torch.rand(1, 3, 80, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(restore(sampler(), L, 4, "auto", 8), restore(sampler(), L, 4))
    monkeypatch.setattr("utils.utils_tile._free_memory", lambda: 0.0)
    assert torch.equal(restore(sampler(), L, 4, "auto", 8), restore(sampler(), L, 4, 32, 8))


def test_tiles_that_would_not_get_on_are_refused() -> None:
    with pytest.raises(UserError, match="tile"):
        restore(sampler(), torch.rand(1, 3, 64, 64), 4, 16, 16)
