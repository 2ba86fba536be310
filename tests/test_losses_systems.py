"""The losses of LDL, BebyGAN, SPSR and RankSRGAN have the published values and gradients, also on generated images."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import loss_systems
from models.loss import CharbonnierLoss, GANLoss, pixel_loss
from models.loss_systems import (
    RankLoss,
    artifact_loss,
    artifact_map,
    back_projection_loss,
    best_buddy_loss,
    flat_mask,
    local_variance,
    margin_ranking_loss,
)
from models.network_ranksrgan import RankerVGG12
from models.network_spsr import GradientMap
from tests.conftest import photograph
from tests.golden_numbers import Tensors, golden
from utils.utils_image import imresize, uint2tensor4

# float64 on both sides: only the order of summation differs.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}
# Figures written down with eleven or more digits, computed in float64.
DIGITS = {"rel": 1e-9, "abs": 0.0}


def value_and_gradient(loss: Callable[[Tensor], Tensor], E: Tensor) -> tuple[Tensor, Tensor]:
    E = E.clone().requires_grad_()
    value = loss(E)
    (gradient,) = torch.autograd.grad(value, E)
    return value.detach(), gradient


def waves() -> tuple[Tensor, Tensor, Tensor]:
    """H, E and the averaged generator's output of the conformance figures, (1, 3, 24, 24) in float64."""
    c, y, x = (torch.arange(n, dtype=torch.float64) for n in (3, 24, 24))
    c, y = c[:, None, None], y[:, None]
    H = 0.5 + 0.25 * torch.sin(0.3 * y + 0.2 * x + c)
    return H[None], (H + 0.02 * torch.cos(0.5 * x - 0.4 * y))[None], (H + 0.01 * torch.sin(0.7 * x + 0.1 * y))[None]


def photographs(height: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A generated H with edges and texture, and an E that is a little off everywhere; (2, 3, height, width)."""
    H = torch.cat([uint2tensor4(photograph(height, width, seed)) for seed in (1, 2)]).to(dtype)
    noise = torch.randn(H.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return H, H + 0.02 * noise


# ---------------------------------------------------------------------------------------------------------------- LDL


@pytest.mark.parametrize("window", [7, 3])
def test_artifact_maps_have_the_published_numbers(window: int) -> None:
    ldl = Tensors("losses/ldl.npz")
    E, H, E_ema = ldl["output"], ldl["gt"], ldl["ema"]
    residual = (H - E).abs().sum(1, keepdim=True)
    torch.testing.assert_close(local_variance(residual, window), ldl[f"local_weights_k{window}"], **FLOAT64)
    # No output is closer to H than H itself, so this is the map before anything is set to 0.
    torch.testing.assert_close(artifact_map(E, H, H, window), ldl[f"artifact_map_k{window}"], **FLOAT64)
    torch.testing.assert_close(artifact_map(E, H, E_ema, window), ldl[f"refined_map_k{window}"], **FLOAT64)


def test_the_artifact_loss_has_the_published_value_and_gradient() -> None:
    ldl = Tensors("losses/ldl.npz")
    value, gradient = value_and_gradient(lambda E: artifact_loss(E, ldl["gt"], ldl["ema"]), ldl["output"])
    torch.testing.assert_close(value, ldl["ldl_loss_k7"], **FLOAT64)
    torch.testing.assert_close(gradient, ldl["ldl_loss_k7_grad"], **FLOAT64)


def test_the_artifact_map_of_waves_has_the_published_figures() -> None:
    H, E, E_ema = waves()
    found = artifact_map(E, H, E_ema)
    assert found.sum().item() == pytest.approx(3.1972524587e-02, **DIGITS)
    assert found.max().item() == pytest.approx(7.6216807153e-05, **DIGITS)
    assert found.count_nonzero() == 453
    assert artifact_loss(E, H, E_ema).item() == pytest.approx(8.3698872174e-07, **DIGITS)


def test_the_artifact_map_is_zero_where_E_is_closer_than_the_averaged_output() -> None:
    H, E = photographs(16, 20)
    E_ema = H + 0.015
    closer = (E - H).abs().sum(1, keepdim=True) < (E_ema - H).abs().sum(1, keepdim=True)
    assert closer.any()
    assert not closer.all()
    assert torch.equal(artifact_map(E, H, E_ema) == 0, closer)


def test_the_artifact_loss_has_the_gradient_of_its_formula_through_the_map_too() -> None:
    H, E = (image[:1, :2] for image in photographs(6, 7))
    # Scaled up: the loss is of the order of 1e-6, below what gradcheck tolerates.
    assert torch.autograd.gradcheck(lambda E: 1e6 * artifact_loss(E, H, H, window=3), E.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 0.125])
def test_a_constant_residual_gives_no_artifact_and_no_nan(offset: float, dtype: torch.dtype) -> None:
    H = torch.full((1, 3, 8, 8), 0.5, dtype=dtype)
    value, gradient = value_and_gradient(lambda E: artifact_loss(E, H, H), H + offset)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


# ------------------------------------------------------------------------------------------------------------ BebyGAN


@pytest.mark.parametrize(
    ("case", "arguments"),
    [("default", {}), ("alpha0.5_beta2", {"alpha": 0.5, "beta": 2.0}), ("l1", {"norm": "l1"})],
)
def test_the_best_buddy_loss_has_the_published_value_and_gradient(case: str, arguments: dict) -> None:
    bebygan = Tensors("losses/bebygan.npz")
    value, gradient = value_and_gradient(lambda E: best_buddy_loss(E, bebygan["gt"], **arguments), bebygan["output"])
    torch.testing.assert_close(value, bebygan[f"{case}/loss"], **FLOAT64)
    # Each entry is the sign of a difference over the number of entries: one other choice of a buddy shows.
    torch.testing.assert_close(gradient, bebygan[f"{case}/grad"], **FLOAT64)
    in_float32 = best_buddy_loss(bebygan["output"].float(), bebygan["gt"].float(), **arguments)
    # The same buddies are chosen; a mean of 13,824 float32 differences remains.
    torch.testing.assert_close(in_float32.double(), bebygan[f"{case}/loss"], rtol=1e-6, atol=0)


def test_the_best_buddy_loss_of_waves_has_the_published_figure() -> None:
    H, E, _ = waves()
    assert best_buddy_loss(E, H).item() == pytest.approx(1.2383314457e-02, **DIGITS)


def squared(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b[None]).square().sum(-1)


def absolute(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b[None]).abs().sum(-1)


@pytest.mark.parametrize(("norm", "distance"), [("l2", squared), ("l1", absolute)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0)])
def test_best_buddies_are_those_of_a_plain_search(
    norm: str, distance: Callable[[Tensor, Tensor], Tensor], alpha: float, beta: float
) -> None:
    H, E = photographs(26, 31)  # two rows and one column are left over
    # Some patches have their buddies in the smaller images.
    for s, at in ((0.5, (0, 0)), (0.25, (15, 15))):
        small = F.interpolate(H, scale_factor=s, mode="bicubic", align_corners=False)
        E[..., at[0] : at[0] + small.shape[2], at[1] : at[1] + small.shape[3]] = small + 0.001

    def patches(image: Tensor) -> Tensor:
        rows, columns = image.shape[1] // 3, image.shape[2] // 3
        return torch.stack(
            [image[:, 3 * r : 3 * r + 3, 3 * c : 3 * c + 3].flatten() for r in range(rows) for c in range(columns)]
        )

    expected = []
    for e, h in zip(E, H, strict=True):
        shrunk = [F.interpolate(h[None], scale_factor=s, mode="bicubic", align_corners=False)[0] for s in (0.5, 0.25)]
        candidates = torch.cat([patches(image) for image in (h, *shrunk)])
        p = patches(e)
        best = (alpha * distance(p, candidates) + beta * distance(patches(h), candidates)).argmin(1)
        expected.append((p - candidates[best]).abs())
    torch.testing.assert_close(best_buddy_loss(E, H, alpha, beta, norm), torch.stack(expected).mean(), **FLOAT64)


def test_a_search_in_pieces_finds_the_same_buddies(monkeypatch: pytest.MonkeyPatch) -> None:
    H, E = photographs(36, 36)
    whole = value_and_gradient(lambda E: best_buddy_loss(E, H), E)
    monkeypatch.setattr(loss_systems, "_SCORES", 5 * 2 * (144 + 36 + 9))  # five rows; 144 is no multiple of five
    assert all(map(torch.equal, value_and_gradient(lambda E: best_buddy_loss(E, H), E), whole))


def test_best_buddies_of_the_ground_truth_are_itself() -> None:
    H, _ = photographs(24, 24, torch.float32)
    assert best_buddy_loss(H, H) == 0


@pytest.mark.parametrize("scale", [4, 2])
def test_the_back_projection_loss_has_the_published_value_and_gradient(scale: int) -> None:
    bebygan = Tensors("losses/bebygan.npz")
    E, L = bebygan["output"], bebygan[f"back_projection_x{scale}/lq"]
    value, gradient = value_and_gradient(lambda E: back_projection_loss(E, L), E)
    # The published filter runs in float32, with weights rounded to it.
    torch.testing.assert_close(value, bebygan[f"back_projection_x{scale}/loss"], rtol=0, atol=1e-6)
    # Weights of at most 1/864 (x4: 0.0748 over 864 entries, x2: 0.29 over 3,456), each to float32's 1e-7 or so.
    torch.testing.assert_close(gradient, bebygan[f"back_projection_x{scale}/grad"], rtol=0, atol=1e-9)


def test_the_back_projection_of_waves_has_the_published_figures() -> None:
    _, E, _ = waves()
    shrunk = imresize(E, 1 / 4)
    # The figures were computed in float32.
    for found, figure in ((shrunk.mean(), 0.4973661381), (shrunk[0, 0, 0, 0], 0.6703742146)):
        assert found.item() == pytest.approx(figure, abs=1e-6)
    assert shrunk[0, 2, 5, 5].item() == pytest.approx(0.5445508957, abs=1e-6)
    assert back_projection_loss(E, shrunk - 0.125).item() == pytest.approx(0.125, rel=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_image_that_shrinks_to_L_has_no_back_projection_loss(scale: int) -> None:
    H, E = photographs(7 * scale, 9 * scale)
    L = imresize(H, 1 / scale)
    assert L.shape[-2:] == (7, 9)
    assert back_projection_loss(H, L) == 0
    assert torch.autograd.gradcheck(lambda E: back_projection_loss(E, L), E.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(("window", "threshold"), [(11, 0.025), (7, 0.05)])
def test_flat_masks_equal_the_published_ones(window: int, threshold: float) -> None:
    bebygan = Tensors("losses/bebygan.npz")
    expected = bebygan[f"region/mask_k{window}_t{threshold}"]
    for image in (bebygan["region/image"], bebygan["region/image"].float()):
        assert torch.equal(flat_mask(image, window, threshold), expected.to(image.dtype))


def test_the_flat_mask_of_an_enlarged_image_equals_the_published_one() -> None:
    bebygan = Tensors("losses/bebygan.npz")
    image = bebygan["region/image"][:1, :, :40, :40]
    enlarged = F.interpolate(image, scale_factor=2, mode="bicubic", align_corners=False)
    assert torch.equal(flat_mask(enlarged), bebygan["region/mask_k11_t0.025_scale2"])


def test_waves_are_flat_where_they_are_low() -> None:
    H, _, _ = waves()
    assert flat_mask(H).count_nonzero() == 0
    assert flat_mask(0.5 + 0.1 * (H - 0.5)).count_nonzero() == 576


@pytest.mark.parametrize("channels", [1, 3])
def test_flat_is_what_no_window_across_an_edge_sees(channels: int) -> None:
    H = torch.full((2, channels, 16, 30), 0.2)
    H[..., 15:] = 0.8
    expected = torch.ones(2, 1, 16, 30)
    expected[..., 15 - 5 : 15 + 5] = 0  # a window of 11 reaches 5 pixels to each side
    assert torch.equal(flat_mask(H), expected)


@pytest.mark.parametrize(("channel", "share"), [(0, 0.2989), (1, 0.587), (2, 0.114)])
def test_flatness_weighs_the_colours_as_luma(channel: int, share: float) -> None:
    # The standard deviation of 55 low and 66 high pixels is half their difference (0.49999 of it).
    for luma_step, any_edge in ((0.048, False), (0.052, True)):
        H = torch.full((1, 3, 16, 30), 0.2)
        H[:, channel, :, 15:] += luma_step / share
        assert bool((flat_mask(H) == 0).any()) == any_edge


# --------------------------------------------------------------------------------------------------------------- SPSR


def test_the_gradient_map_of_waves_has_the_published_figures() -> None:
    H, _, _ = waves()
    found = GradientMap().double()(H)
    assert found.mean().item() == pytest.approx(0.1762030959, **DIGITS)
    assert found[0, 0, 0, 0].item() == pytest.approx(0.7946530629, **DIGITS)
    assert found[0, 0, 12, 12].item() == pytest.approx(0.1709575270, **DIGITS)


def test_the_gradient_map_of_a_ramp_is_known() -> None:
    ramp = torch.arange(6.0, dtype=torch.float64).expand(1, 1, 5, 6) / 10
    inside = GradientMap().double()(ramp)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, (0.2**2 + 1e-6) ** 0.5), **FLOAT64)


# ---------------------------------------------------------------------------------------------------------- RankSRGAN


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_rank_loss_has_the_published_value_and_gradient(case: str) -> None:
    said = golden("losses/losses_basicsr.json")["rank_loss"][case]
    rank = Tensors("losses/rank_loss.npz")
    loss = RankLoss(nn.Identity(), said["R_bias"])  # a ranker that reads the scores off the image
    value, gradient = value_and_gradient(lambda E: said["loss_weight"] * loss(E), rank[f"{case}/scores"])
    torch.testing.assert_close(value, rank[f"{case}/loss"], **FLOAT64)
    torch.testing.assert_close(gradient, rank[f"{case}/grad_wrt_scores"], **FLOAT64)


def test_the_rank_loss_sums_sigmoids_over_the_batch() -> None:
    scores = torch.tensor([[0.5], [0.5], [0.5]])
    assert RankLoss(nn.Identity(), bias=0.5)(scores).item() == 1.5


def small_ranker() -> RankerVGG12:
    torch.manual_seed(0)
    return RankerVGG12(base_nc=4).train()


def state(ranker: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ranker.state_dict().items()}


def test_the_rank_loss_moves_the_image_and_leaves_the_ranker_alone() -> None:
    ranker = small_ranker()
    loss, before = RankLoss(ranker), state(ranker)
    images = torch.rand(3, 3, 32, 32)
    value, gradient = value_and_gradient(loss, images)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(p.grad is None for p in ranker.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ranker.state_dict().items())
    # In evaluation mode no image has a say in another's score; float32.
    torch.testing.assert_close(value, torch.stack([loss(image[None]) for image in images]).sum(), rtol=1e-6, atol=0)


def test_the_published_rank_loss_has_no_gradient_and_its_ranker_drifts() -> None:
    ranker = small_ranker()
    loss, before = RankLoss(ranker, published=True), state(ranker)
    E = torch.rand(2, 3, 64, 64, requires_grad=True)
    value = loss(E)
    assert not value.requires_grad
    changed = {name for name, tensor in ranker.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("running" in name or "num_batches" in name for name in changed)
    # The batch has a say in each image's score; float32 would differ by 1e-6.
    alone = torch.stack([loss(image[None]) for image in E]).sum()
    assert abs(value - alone) > 1e-4


@pytest.mark.parametrize(
    ("metrics", "expected"),
    # Scores 1.0 and 0.8: 0.2 apart, ordered as the metrics, against them, and of metrics that are equal.
    [((5.0, 3.0), 0.5 - 0.2), ((3.0, 5.0), 0.5 + 0.2), ((4.0, 4.0), 0.5)],
)
def test_a_ranker_is_asked_for_the_order_of_the_metrics(metrics: tuple[float, float], expected: float) -> None:
    score1, score2 = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.8]])
    loss = margin_ranking_loss(score1, score2, *(torch.tensor([[metric]]) for metric in metrics))
    assert loss.item() == pytest.approx(expected, abs=1e-6)  # float32
    loss.backward()
    assert score1.grad is not None
    assert score1.grad.item() == np.sign(metrics[1] - metrics[0])


def test_scores_that_are_apart_enough_are_left_alone() -> None:
    loss = margin_ranking_loss(torch.tensor([[1.0]]), torch.tensor([[0.2]]), torch.tensor([[5.0]]), torch.ones(1, 1))
    assert loss == 0


# ---------------------------------------------------------------------------------------------------------- precision

COMPARISONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda E, H: artifact_loss(E, H, E_ema=H),
    best_buddy_loss,
    lambda E, H: best_buddy_loss(E, H, norm="l1"),
    lambda E, H: back_projection_loss(E, H[..., ::2, ::2]),
    lambda E, H: flat_mask(H) * E,
]


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_autocast_changes_nothing(comparison: Callable[[Tensor, Tensor], Tensor]) -> None:
    H, E = photographs(24, 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = comparison(E, H)
    assert torch.equal(inside, comparison(E, H))


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_half_precision_is_computed_in_float32(comparison: Callable[[Tensor, Tensor], Tensor]) -> None:
    H, E = (image.bfloat16() for image in photographs(24, 24, torch.float32))
    assert torch.equal(comparison(E, H).float(), comparison(E.float(), H.float()))


def test_rank_losses_are_summed_in_float32() -> None:
    assert RankLoss(nn.Identity())(torch.zeros(1, 1, dtype=torch.bfloat16)).dtype == torch.float32


# ------------------------------------------------------------------- what BasicSR's recipes take from models/loss.py


@pytest.mark.parametrize("logits", [0, 1])
@pytest.mark.parametrize("labels", [0, 1])
@pytest.mark.parametrize(
    ("theirs", "ours"), [("vanilla", "gan"), ("lsgan", "lsgan"), ("wgan", "wgan"), ("wgan_softplus", "softplusgan")]
)
def test_gan_losses_equal_basicsrs(theirs: str, ours: str, labels: int, logits: int) -> None:
    gan = Tensors("losses/gan_basicsr.npz")
    said = golden("losses/losses_basicsr.json")["gan_basicsr"]
    values = said["label_and_weight_sets"][labels]
    weight = values.pop("loss_weight")  # of the generator alone
    loss = GANLoss(ours, **values)
    real, fake = gan[f"real_{logits}"], gan[f"fake_{logits}"]
    terms: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        f"logits_fake_{logits}/target_real/gen": (fake, lambda x: weight * loss.generator(x)),
        f"logits_real_{logits}/target_real/disc": (real, lambda x: loss.discriminator(x, fake)[0]),
        f"logits_fake_{logits}/target_fake/disc": (fake, lambda x: loss.discriminator(real, x)[1]),
    }
    for name, (at, term) in terms.items():
        value, gradient = value_and_gradient(term, at)
        torch.testing.assert_close(value, gan[f"{theirs}/labels{labels}/{name}/value"], **FLOAT64)
        torch.testing.assert_close(gradient, gan[f"{theirs}/labels{labels}/{name}/grad"], **FLOAT64)


@pytest.mark.parametrize(
    ("theirs", "loss"),
    [
        ("l1/mean", pixel_loss("l1")),
        ("mse/mean", pixel_loss("l2")),
        ("mse/sum", pixel_loss("l2sum")),
        ("charbonnier_eps1e-12/mean", CharbonnierLoss(1e-12)),
        ("charbonnier_eps1e-6/mean", CharbonnierLoss(1e-6)),
    ],
)
def test_pixel_losses_equal_basicsrs(theirs: str, loss: nn.Module) -> None:
    pixel = Tensors("losses/pixel_basicsr.npz")
    value, gradient = value_and_gradient(lambda E: 0.7 * loss(E, pixel["target"]), pixel["pred"])
    torch.testing.assert_close(value, pixel[f"{theirs}/weight_none/value"], **FLOAT64)
    torch.testing.assert_close(gradient, pixel[f"{theirs}/weight_none/grad"], **FLOAT64)
