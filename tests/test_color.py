"""Colour corrections move colours and low frequencies, nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.color_fix import adain_color_fix, wavelet_color_fix

BOTH = pytest.mark.parametrize("fix", [adain_color_fix, wavelet_color_fix])
# Sums of values near 1 in float32, in another order.
ROUNDING = {"rtol": 0, "atol": 2e-6}


def images(height: int = 40, width: int = 56) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@BOTH
def test_an_image_with_its_own_colours_stays_as_it_is(fix: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.testing.assert_close(fix(images(), images()), images(), **ROUNDING)


@BOTH
def test_a_constant_shift_of_each_channel_is_removed(fix: Callable[[Tensor, Tensor], Tensor]) -> None:
    shift = torch.tensor([0.3, -0.2, 0.05]).view(1, 3, 1, 1)
    torch.testing.assert_close(fix(images() + shift, images()), images(), **ROUNDING)


def test_adain_gives_the_mean_and_deviation_of_the_other_image() -> None:
    # Mean 0.5 and unbiased variance 1/3; wanted 0.25 and 1/12: halved about the mean. Both variances grow by 1e-5.
    E = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 1, 2, 2)
    factor = ((1 / 12 + 1e-5) / (1 / 3 + 1e-5)) ** 0.5
    expected = 0.25 + (E - 0.5) * factor
    torch.testing.assert_close(adain_color_fix(E, E / 2), expected, **ROUNDING)
    assert factor == pytest.approx(0.5, abs=1e-4)


def test_adain_treats_every_image_and_channel_by_itself() -> None:
    E, L_up = images(), images().flip(1, 2) ** 2
    together = adain_color_fix(E, L_up)
    for n in range(2):
        for c in range(3):
            alone = adain_color_fix(E[n : n + 1, c : c + 1], L_up[n : n + 1, c : c + 1])
            torch.testing.assert_close(together[n : n + 1, c : c + 1], alone, **ROUNDING)


def test_adain_of_a_single_pixel_is_the_other_pixel() -> None:
    E, L_up = torch.full((1, 3, 1, 1), 0.9), torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(adain_color_fix(E, L_up), L_up)


def test_wavelets_keep_the_high_frequencies() -> None:
    # Signs that alternate from pixel to pixel: 1 2 1 one pixel apart takes them out entirely, they are all detail.
    row = torch.tensor([0.1, -0.1]).repeat(40)
    detail = row.expand(1, 1, 80, 80)
    inside = (..., slice(32, 48), slice(32, 48))  # further from the border than the reach, 1 + 2 + 4 + 8 + 16 = 31
    fixed = wavelet_color_fix(0.5 + detail, torch.full((1, 1, 80, 80), 0.2))
    torch.testing.assert_close(fixed[inside], (0.2 + detail)[inside], **ROUNDING)


def test_wavelets_take_the_low_frequencies_of_the_other_image() -> None:
    # A ramp is its own mean of 1 2 1 at any distance: no detail in it.
    ramp = torch.linspace(0, 1, 80).expand(1, 1, 80, 80)
    inside = (..., slice(32, 48), slice(32, 48))
    fixed = wavelet_color_fix(torch.full_like(ramp, 0.7), ramp)
    torch.testing.assert_close(fixed[inside], ramp[inside], **ROUNDING)


def test_one_bright_pixel_is_spread_as_the_wavelet_says() -> None:
    # The five dilated kernels, one after the other, by hand: along an axis the polynomial product of (1 + 2 z^k + z^2k)
    # / 4 for k = 1, 2, 4, 8, 16, which is (1 + z + ... + z^31)^2 / 1024, a triangle.
    bright = torch.zeros(1, 1, 101, 101)
    bright[..., 50, 50] = 1
    low = wavelet_color_fix(torch.zeros_like(bright), bright)
    triangle = (32 - (torch.arange(101) - 50).abs()).clamp(min=0) / 1024
    torch.testing.assert_close(low[0, 0], triangle[:, None] * triangle, rtol=1e-5, atol=1e-9)


@BOTH
@pytest.mark.parametrize("size", [(1, 1), (3, 70), (33, 17)])
def test_any_size_can_be_corrected(fix: Callable[[Tensor, Tensor], Tensor], size: tuple[int, int]) -> None:
    E = fix(images(*size), images(*size) / 2)
    assert E.shape == (2, 3, *size)
    assert E.isfinite().all()
