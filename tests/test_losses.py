"""Each loss equals the published one, value and gradient; hand-computed twins need no fixtures."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.loss import CharbonnierLoss, GANLoss, PerceptualLoss, SSIMLoss, color_loss, pixel_loss, ssim
from tests.golden_numbers import Tensors, golden
from utils.utils_error import UserError

# float64 on both sides, from the same float32 inputs: only the order of summation differs.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize("gan_type", ["gan", "ragan", "lsgan", "wgan", "softplusgan"])
def test_gan_losses_equal_kairs_training_step(gan_type: str) -> None:
    stored = Tensors("losses/gan_kair.npz")
    weight = golden("losses/losses_kair.json")["gan_kair"]["D_lossfn_weight"]
    loss = GANLoss(gan_type)
    for i in (0, 1):
        step = f"step_{gan_type}/logits_{i}"
        real, fake = leaf(stored[f"real_{i}"]), leaf(stored[f"fake_{i}"])
        g_loss = weight * loss.generator(fake, real)
        torch.testing.assert_close(g_loss, stored[f"{step}/D_loss"], **FLOAT64)
        g_loss.backward()
        torch.testing.assert_close(fake.grad, stored[f"{step}/grad_D_loss_wrt_fake"], **FLOAT64)
        assert real.grad is None
        real, fake = leaf(real.detach()), leaf(fake.detach())
        sum(loss.discriminator(real, fake)).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(real.grad, stored[f"{step}/grad_l_d_real_wrt_real"], **FLOAT64)
        torch.testing.assert_close(fake.grad, stored[f"{step}/grad_l_d_fake_wrt_fake"], **FLOAT64)


@pytest.mark.parametrize("gan_type", ["gan", "lsgan", "wgan", "softplusgan"])
def test_labels_enter_gan_losses_as_in_kair(gan_type: str) -> None:
    stored = Tensors("losses/gan_kair.npz")
    labels = golden("losses/losses_kair.json")["gan_kair"]["label_sets"]
    for j, values in enumerate(labels):
        loss = GANLoss(gan_type, **values)
        for i in (0, 1):
            real, fake = leaf(stored[f"real_{i}"]), leaf(stored[f"fake_{i}"])
            for name, logits, value in (
                (f"logits_fake_{i}/target_real", fake, loss.generator(fake)),
                (f"logits_real_{i}/target_real", real, loss.discriminator(real, fake)[0]),
                (f"logits_fake_{i}/target_fake", fake, loss.discriminator(real, fake)[1]),
            ):
                key = f"{gan_type}/labels{j}/{name}"
                torch.testing.assert_close(value, stored[f"{key}/value"], **FLOAT64)
                (gradient,) = torch.autograd.grad(value, logits)
                torch.testing.assert_close(gradient, stored[f"{key}/grad"], **FLOAT64)


def test_ragan_basicsr_equals_the_training_step_of_basicsr() -> None:
    stored = Tensors("losses/gan_basicsr.npz")
    weight = golden("losses/losses_basicsr.json")["gan_basicsr"]["relativistic_loss_weight"]
    loss = GANLoss("ragan_basicsr")
    for i in (0, 1):
        step = f"relativistic_vanilla/logits_{i}"
        real, fake = leaf(stored[f"real_{i}"]), leaf(stored[f"fake_{i}"])
        g_loss = weight * loss.generator(fake, real)
        torch.testing.assert_close(g_loss, stored[f"{step}/l_g_gan"], **FLOAT64)
        (gradient,) = torch.autograd.grad(g_loss, fake)
        torch.testing.assert_close(gradient, stored[f"{step}/grad_l_g_gan_wrt_fake"], **FLOAT64)
        for side, logits, value in zip(("real", "fake"), (real, fake), loss.discriminator(real, fake), strict=True):
            torch.testing.assert_close(value, stored[f"{step}/l_d_{side}"], **FLOAT64)
            (gradient,) = torch.autograd.grad(value, logits)
            torch.testing.assert_close(gradient, stored[f"{step}/grad_l_d_{side}_wrt_{side}"], **FLOAT64)


# ln(1 + e^-1) and ln(1 + e^1), the cross entropies of a logit of 1 judged real and fake.
NEAR, FAR = math.log1p(math.exp(-1)), math.log1p(math.exp(1))


@pytest.mark.parametrize(
    ("gan_type", "generator", "real", "fake"),
    [
        ("gan", NEAR, NEAR, FAR),
        ("lsgan", 0.0, 0.0, 1.0),
        ("wgan", -1.0, -1.0, 1.0),
        ("softplusgan", NEAR, NEAR, FAR),
        # Equal logits: every difference from the mean is 0, whose cross entropy is ln 2.
        ("ragan", math.log(2), math.log(2) / 2, math.log(2) / 2),
        ("ragan_basicsr", math.log(2), math.log(2) / 2, math.log(2) / 2),
    ],
)
def test_gan_losses_of_logits_of_one_are_those_of_the_formula(
    gan_type: str, generator: float, real: float, fake: float
) -> None:
    loss, ones = GANLoss(gan_type.upper()), torch.ones(2, 1)
    l_real, l_fake = loss.discriminator(ones, ones)
    assert loss.generator(ones, ones).item() == pytest.approx(generator, abs=1e-6)  # float32
    assert l_real.item() == pytest.approx(real, abs=1e-6)
    assert l_fake.item() == pytest.approx(fake, abs=1e-6)


def test_the_two_relativistic_forms_agree_on_vectors_and_differ_on_maps() -> None:
    torch.manual_seed(0)
    kair, basicsr = GANLoss("ragan"), GANLoss("ragan_basicsr")
    assert kair.needs_real
    vector, other = torch.randn(4, 1), torch.randn(4, 1)
    torch.testing.assert_close(kair.generator(vector, other), basicsr.generator(vector, other))
    image, other = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    assert abs(kair.generator(image, other) - basicsr.generator(image, other)) > 1e-3


def test_gan_loss_says_what_it_misses() -> None:
    with pytest.raises(UserError, match="gan_type: 'lsgna' is unknown"):
        GANLoss("lsgna")
    with pytest.raises(ValueError, match="pred_real is missing"):
        GANLoss("ragan").generator(torch.zeros(1, 1))


@pytest.mark.parametrize(("name", "loss"), [("default", CharbonnierLoss()), ("eps1e-3", CharbonnierLoss(1e-3))])
def test_charbonnier_equals_kairs(name: str, loss: nn.Module) -> None:
    stored = Tensors("losses/pixel_kair.npz")
    E = leaf(stored["pred"])
    value = loss(E, stored["target"])
    torch.testing.assert_close(value, stored[f"charbonnier_{name}/value"], **FLOAT64)
    value.backward()
    torch.testing.assert_close(E.grad, stored[f"charbonnier_{name}/grad"], **FLOAT64)


@pytest.mark.parametrize("window", [7, 11])
@pytest.mark.parametrize("colour", ["rgb", "gray"])
def test_ssim_equals_kairs(window: int, colour: str) -> None:
    stored = Tensors("losses/pixel_kair.npz")
    channels = slice(0, 3 if colour == "rgb" else 1)
    case = f"ssim_{colour}_window{window}"
    E, H = leaf(stored["ssim_img2"][:, channels]), stored["ssim_img1"][:, channels]
    each = ssim(E, H, window)
    torch.testing.assert_close(each, stored[f"{case}_averageFalse/value"], **FLOAT64)
    torch.testing.assert_close(each.mean(), stored[f"{case}_averageTrue/value"], **FLOAT64)
    (gradient,) = torch.autograd.grad(SSIMLoss(window)(E, H), E)
    # The loss is 1 - SSIM, KAIR's is SSIM.
    torch.testing.assert_close(gradient, -stored[f"{case}_averageTrue/grad_wrt_img2"], **FLOAT64)


def test_ssim_loss_falls_to_zero_as_images_grow_alike() -> None:
    torch.manual_seed(0)
    H, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    losses = [SSIMLoss()(H + t * (noise - H), H).item() for t in (1.0, 0.5, 0.1, 0.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0.0, abs=1e-6)  # float32


def test_ssim_in_autocast_is_that_of_float32() -> None:
    torch.manual_seed(0)
    E, H = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim(E, H)
    assert torch.equal(inside, ssim(E, H))


@pytest.mark.parametrize(
    ("kind", "expected"),
    # Differences 0 and 2 on four entries each.
    [("l1", 1.0), ("l2", 2.0), ("l2sum", 16.0), ("charbonnier", 1.0)],
)
def test_pixel_losses_of_a_known_difference(kind: str, expected: float) -> None:
    E = torch.zeros(1, 2, 2, 2)
    H = torch.stack((torch.zeros(2, 2), torch.full((2, 2), 2.0)))[None]
    # sqrt(1e-9) = 3.2e-5 on half of the entries is what Charbonnier adds.
    assert pixel_loss(kind)(E, H).item() == pytest.approx(expected, abs=2e-5)


def test_a_pixel_loss_that_is_unknown_is_named() -> None:
    assert isinstance(pixel_loss("ssim"), SSIMLoss)
    assert pixel_loss("charbonnier", 1e-3).eps == 1e-3
    with pytest.raises(UserError, match="G_lossfn_type: 'l3'"):
        pixel_loss("l3")


def doubling() -> nn.Sequential:
    """Layers whose features are known: twice the image, then its ReLU, then minus twice that."""
    layers = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1, bias=False))
    for layer, factor in ((layers[0], 2.0), (layers[2], -2.0)):
        layer.weight.data = factor * torch.eye(3).view(3, 3, 1, 1)
    return layers


@pytest.mark.parametrize(
    ("lossfn_type", "expected"),
    # E = 1, H = 0.5: distances 1 (layer 0) and 2 (layer 2), weighted by 0.1 and 1.
    [("l1", 0.1 * 1 + 2), ("l2", 0.1 * 1 + 4)],
)
def test_perceptual_loss_sums_weighted_mean_distances(lossfn_type: str, expected: float) -> None:
    loss = PerceptualLoss([0, 2], [0.1, 1.0], lossfn_type, use_input_norm=False, features=doubling())
    E, H = leaf(torch.ones(2, 3, 4, 4)), leaf(torch.full((2, 3, 4, 4), 0.5))
    value = loss(E, H)
    assert value.item() == pytest.approx(expected, rel=1e-6)  # float32
    value.backward()
    assert E.grad is not None
    assert E.grad.abs().min() > 0
    assert H.grad is None


def test_perceptual_loss_takes_one_layer_and_weight_and_one_channel() -> None:
    loss = PerceptualLoss(0, 1.0, use_input_norm=False, features=doubling())
    assert loss(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"feature_layer": [0, 2], "weights": [1.0]}, "F_weights: expected one for each of the 2 layers"),
        ({"feature_layer": [0], "weights": [1.0], "lossfn_type": "l3"}, "F_lossfn_type: 'l3'"),
    ],
)
def test_perceptual_loss_names_the_option_that_is_wrong(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PerceptualLoss(**arguments, features=doubling())


# ----------------------------------------------------------------------------------------------------------- colours


def test_a_tint_is_its_own_size_as_a_colour_loss() -> None:
    H = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tint = torch.tensor([0.1, -0.04, 0.01], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(color_loss(H + tint, H).item(), 0.05, **FLOAT64)
    assert color_loss(H, H) == 0


def test_texture_is_no_colour() -> None:
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    checkers = ((rows + columns) % 2 - 0.5).expand(1, 3, -1, -1)
    assert color_loss(0.5 + 0.2 * checkers, torch.full((1, 3, 48, 48), 0.5)).item() < 1e-7  # float32 near 0.5


def test_tints_of_two_areas_do_not_cancel_in_the_colour_loss() -> None:
    H = torch.full((1, 3, 32, 64), 0.5)
    E = H.clone()
    E[..., :32] += 0.1
    E[..., 32:] -= 0.1
    # 7 places along the width; the middle one of them sees both halves.
    assert color_loss(E, H).item() == pytest.approx(0.1 * 6 / 7, rel=1e-5)  # float32


def test_the_colour_loss_pulls_all_pixels_of_an_area_alike() -> None:
    E = leaf(torch.full((1, 1, 16, 16), 0.6))
    color_loss(E, torch.full((1, 1, 16, 16), 0.5)).backward()
    assert E.grad is not None
    torch.testing.assert_close(E.grad, torch.full_like(E, 1 / 256))


def test_the_colour_loss_of_half_precision_is_taken_in_float32() -> None:
    H = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    E = (H + 0.003).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = color_loss(E, H)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, color_loss(E.float(), H))


@pytest.mark.parametrize("length", [16, 17, 23, 24, 31])
def test_every_pixel_counts_in_the_colour_loss(length: int) -> None:
    E = leaf(torch.full((1, 1, length, 40), 0.6, dtype=torch.float64))
    color_loss(E, torch.full((1, 1, length, 40), 0.5, dtype=torch.float64)).backward()
    assert E.grad is not None
    assert (E.grad > 0).all()


@pytest.mark.parametrize("size", [(5, 40), (40, 5), (3, 3)])
def test_the_colour_loss_takes_images_smaller_than_its_areas(size: tuple[int, int]) -> None:
    H = torch.zeros(1, 3, *size)
    assert color_loss(H + 0.25, H).item() == pytest.approx(0.25)
