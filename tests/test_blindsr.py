"""The BSRGAN degradation: golden kernels of KAIR, and the laws its random draws obey."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from data.degradations import bsrgan as blindsr
from data.degradations import on_image, steps
from data.degradations.steps import Blur, Camera, Jpeg, Noise, Poisson, Resize, Thin
from tests.conftest import photograph
from tests.golden_numbers import figures
from utils.utils_image import imresize_np, uint2single

STRENGTHS = [blindsr.KAIR, blindsr.SSL_FORK]
ANISOTROPIC = [(15, 0.5, 6.0, 1.5), (21, 2.2, 3.0, 3.0), (7, 0.0, 0.8, 0.2), (12, 1.0, 4.0, 1.0)]


def degrade(img, sf, seed, strength, draw=blindsr.draw_bsrgan):
    rng = np.random.default_rng(seed)
    return on_image.apply(img, draw(img.shape, sf, rng, strength), rng)


def photo(height=64, width=80, channels=3, blur=1.5):
    """A made image: blurred noise in shades of one colour, for JPEG halves the resolution of colours at random."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((height, width)), blur)
    shades = 0.2 + 0.6 * (noise - noise.min()) / np.ptp(noise)
    return (shades[..., None] * np.linspace(1, 0.7, channels)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize(("size", "std"), [(7, 0.8), (15, 2.0), (25, 1.6), (3, 0.3)])
def test_gaussian_profile_is_the_root_of_fspecial(golden, size, std):
    profile = steps.gaussian_profile(size, std)
    # float64 rounding; fspecial also zeroes what is below 2e-16 of the peak
    np.testing.assert_allclose(
        np.outer(profile, profile),
        golden("image/kair_blindsr.npz")[f"fspecial_gaussian_{size}_{std}"],
        atol=1e-15,
    )


@pytest.mark.parametrize("case", range(4))
def test_anisotropic_gaussian_equals_kairs(golden, case):
    kernel = steps.anisotropic_gaussian(*ANISOTROPIC[case])
    np.testing.assert_allclose(
        kernel, golden("image/kair_blindsr.npz")[f"anisotropic_gaussian_{case}"], atol=1e-15
    )  # float64 rounding


@pytest.mark.parametrize("upper_left", [True, False])
@pytest.mark.parametrize("sf", [2, 3, 4])
def test_shifted_kernels_equal_kairs(golden, sf, upper_left):
    z = golden("image/kair_blindsr.npz")
    kernel = steps.shift_pixel(z["anisotropic_gaussian_0"], sf, upper_left)
    np.testing.assert_allclose(kernel, z[f"shift_pixel_kernel_sf{sf}_upperleft{upper_left}"], atol=1e-15)


@pytest.mark.parametrize("upper_left", [True, False])
@pytest.mark.parametrize("sf", [2, 3, 4])
def test_shifted_images_equal_kairs(golden, sf, upper_left):
    z = golden("image/kair_blindsr.npz")
    # KAIR shifts images in place, and the stored ones have been shifted twice; they are float32
    twice = steps.shift_pixel(steps.shift_pixel(z["shift_input_image"], sf, upper_left), sf, upper_left)
    np.testing.assert_allclose(twice, z[f"shift_pixel_image_sf{sf}_upperleft{upper_left}"], atol=2e-7)


def test_sharpening_equals_kairs(golden):
    z = golden("image/kair_blindsr.npz")
    img = uint2single(z["degradation_input_uint8"])
    # the same OpenCV calls; another build may sum in another order
    np.testing.assert_allclose(on_image.add_sharpening(img), z["add_sharpening"], atol=2e-6)
    sharpened = on_image.add_sharpening(img, weight=1.0, radius=15, threshold=5)
    np.testing.assert_allclose(sharpened, z["add_sharpening_w1_r15_t5"], atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({}, [0.512469483, 0.220540258, 0.423130542, 0.758985937]),
        ({"weight": 1.0, "radius": 15, "threshold": 5}, [0.513384367, 0.232741356, 0.458121717, 0.694847405]),
    ],
)
def test_sharpening_of_a_made_image_has_the_values_recorded_when_kairs_were_met(settings, recorded):
    sharp = on_image.add_sharpening(uint2single(photograph(44, 52, 3)), **settings)
    assert figures(sharp) == pytest.approx(recorded, rel=1e-5)  # as above: float32, another OpenCV


# ----------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(("size", "theta", "l1", "l2"), ANISOTROPIC)
def test_anisotropic_gaussian_sums_to_one_and_leans_along_theta(size, theta, l1, l2):
    kernel = steps.anisotropic_gaussian(size, theta, l1, l2)
    assert kernel.sum() == pytest.approx(1)
    x = np.arange(size) - (size - 1) / 2
    along = np.cos(theta) * x + np.sin(theta) * x[:, None]
    across = np.cos(theta) * x[:, None] - np.sin(theta) * x
    # sampled and cut off at the window: the variances are met within a tenth, the small 0.2 only by order
    assert (kernel * along**2).sum() == pytest.approx(l1, rel=0.1)
    assert (kernel * across**2).sum() == pytest.approx(l2, rel=0.3)


def test_gaussians_of_vanishing_width_are_a_single_point():
    assert steps.gaussian_profile(5, 1e-9).tolist() == [0, 0, 1, 0, 0]
    assert steps.anisotropic_gaussian(3, 0.3, 1e-17, 1e-17).ravel().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_shift_pixel_moves_a_ramp_by_half_the_gap_and_repeats_the_border():
    ramp = np.arange(8.0)[None].repeat(5, axis=0)
    assert steps.shift_pixel(ramp, 4)[0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7, 7]
    assert steps.shift_pixel(ramp, 4, upper_left=False)[0].tolist() == [0, 0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    np.testing.assert_array_equal(steps.shift_pixel(ramp, 1), ramp)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [3, 9, 25])
def test_convolution_is_scipys_with_a_mirrored_border(size, channels):
    img = photo(channels=channels)
    kernel = np.random.default_rng(1).random((size, size))  # not symmetric: turning it round shows
    kernel /= kernel.sum()
    expected = ndimage.convolve(img.astype(np.float64), kernel[..., None], mode="mirror")
    # float32, by Fourier transform for large kernels
    np.testing.assert_allclose(on_image.convolve(img, kernel), expected, atol=2e-6)
    profile = kernel.sum(axis=0)
    outer = on_image.convolve(img, np.outer(profile, profile))
    np.testing.assert_allclose(on_image.convolve_separable(img, profile), outer, atol=2e-6)


# ------------------------------------------------------------------------------------------------- the random draws


@pytest.mark.parametrize("draw", [blindsr.draw_bsrgan, blindsr.draw_bsrgan_plus])
@pytest.mark.parametrize("strength", [*STRENGTHS, replace(blindsr.KAIR, camera_prob=1.0, shuffle_prob=0.5)])
@pytest.mark.parametrize(("sf", "channels"), [(2, 3), (3, 3), (4, 3), (4, 1)])
def test_degrading_gives_an_L_smaller_by_the_scale(strength, sf, channels, draw):
    img = photo(48, 72, channels)
    for seed in range(12):
        L = degrade(img, sf, seed, strength, draw)
        assert L.shape == (48 // sf, 72 // sf, channels)
        assert L.dtype == np.float32
        assert L.min() >= 0
        assert L.max() <= 1
        np.testing.assert_allclose(255 * L, (255 * L).round(), atol=2e-5)  # JPEG is the last; float32


def test_the_generator_decides_everything_and_the_input_is_left_alone():
    img = photo()
    before = img.copy()
    first, again, other = (degrade(img, 4, seed, blindsr.KAIR) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(img, before)


def test_the_published_ssl_degradation_is_milder_than_kairs():
    img = photo(128, 128, blur=3)
    reference = imresize_np(img, 1 / 4)

    def mean_error(strength):
        Ls = (degrade(img, 4, seed, strength) for seed in range(40))
        return np.mean([np.abs(L - reference).mean() for L in Ls])

    assert mean_error(blindsr.SSL_FORK) < 0.75 * mean_error(blindsr.KAIR)


def test_degrading_does_not_shift_the_image():
    img = photo(128, 128, blur=4)
    Ls = [degrade(img, 4, seed, blindsr.SSL_FORK) for seed in range(60)]
    L = np.mean(Ls, axis=0)[4:-4, 4:-4]
    reference = imresize_np(img, 1 / 4)

    def error(shift):
        return np.abs(L - ndimage.shift(reference, (*shift, 0))[4:-4, 4:-4]).mean()

    # a quarter pixel of L, one pixel of H, makes it worse in every direction: by a fifth, noise and blur being there
    assert error((0, 0)) < 0.9 * min(error(shift) for shift in ((0.25, 0), (-0.25, 0), (0, 0.25), (0, -0.25)))


def test_steps_come_in_every_order_that_keeps_resize_behind_shrink():
    rng = np.random.default_rng(0)
    orders = [blindsr._shuffled_steps(rng) for _ in range(3000)]
    assert all(order.index("shrink") < order.index("resize") for order in orders)
    assert all(Counter(order)["blur"] == 2 and len(order) == 7 for order in orders)
    # noise is first in one of seven: 429 of 3000, standard deviation 19
    assert abs(sum(order[0] == "noise" for order in orders) - 429) < 95


@pytest.mark.parametrize("strength", STRENGTHS)
def test_noise_has_the_three_kinds_in_their_shares_and_no_more_than_its_level(strength):
    gray = np.full((32, 32, 3), 0.5, np.float32)
    rng, generator, kinds, stds = np.random.default_rng(0), torch.Generator().manual_seed(0), Counter(), []
    for _ in range(600):
        step = blindsr.draw_noise(rng, 3, strength.noise_level)
        noise = on_image.add_gaussian_noise(gray, step, generator) - gray
        correlation = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
        # 1024 pixels: independent channels stay below 0.15 (5 sigma); "correlated" noise can be weakly so
        kinds["gray" if correlation > 0.9999 else "colour" if abs(correlation) < 0.15 else "correlated"] += 1
        stds.append(noise.std())
    assert abs(kinds["gray"] - 240) < 60  # standard deviation 12
    assert abs(kinds["colour"] - 240) < 90  # some of the correlated ones look independent
    low, high = strength.noise_level
    # clipping and a sample of 1024: 15 %
    assert max(stds) < 1.15 * high / 255
    assert np.median(stds) == pytest.approx((low + high) / 2 / 255, rel=0.25)


def test_correlated_noise_has_the_covariance_of_numpys_sampler():
    # same draws, so the same basis and the same diagonal
    correlate = blindsr._noise_correlation(3, 0.1, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    basis = np.linalg.svd(rng.random((3, 3)))[0]
    covariance = np.abs(0.01 * basis.T @ np.diag(rng.random(3)) @ basis)
    sample = np.random.default_rng(0).multivariate_normal(np.zeros(3), covariance, 100_000, check_valid="ignore")
    # 1e5 draws: entries of 0.01 are met within 0.01 * sqrt(2 / 1e5) * 5 sigma
    np.testing.assert_allclose(correlate.T @ correlate, np.cov(sample.T), atol=2.5e-4)


def test_jpeg_quality_bounds_its_error():
    img = photo()
    coarse = np.abs(on_image.add_jpeg(img, 10) - img).mean()
    fine = np.abs(on_image.add_jpeg(img, 95) - img).mean()
    assert 0 < fine < 0.5 * coarse


def test_sharpening_leaves_flat_areas_and_raises_edges():
    img = np.full((64, 64, 1), 0.3, np.float32)
    np.testing.assert_allclose(on_image.add_sharpening(img), img, atol=1e-6)  # float32 rounding of the blur
    img[:, 32:] = 0.6
    assert on_image.add_sharpening(img).max() > 0.65


# ------------------------------------------------------------------------------------------------------- the figures


def drawn(strength, sf=4, draw=blindsr.draw_bsrgan, n=1500, channels=3):
    """The steps of n images of 320 pixels, by kind."""
    rng, found = np.random.default_rng(0), {kind: [] for kind in (Blur, Thin, Resize, Noise, Poisson, Jpeg, Camera)}
    for _ in range(n):
        for step in draw((320, 320, channels), sf, rng, strength):
            found[type(step)].append(step)
    return found


@pytest.mark.parametrize(
    ("strength", "variance", "std", "sizes", "anisotropic"),
    [
        (blindsr.KAIR, 7.0, 2.6, (7, 25), 0.5),  # scale 3: 4 + 3 and 2 + 0.6
        (blindsr.SSL_FORK, 0.8, 0.8, (3, 9), 0.3),
        (blindsr.SSL_TEST, 1.0, 1.0, (3, 11), 0.3),
    ],
)
def test_blurs_are_as_wide_as_the_figures_say(strength, variance, std, sizes, anisotropic):
    blurs = drawn(strength, sf=3)[Blur]
    assert len(blurs) == 3000
    assert {blur.size for blur in blurs} == set(range(sizes[0], sizes[1] + 1, 2))
    turned = [blur for blur in blurs if not blur.is_separable]
    # a share of 3,000 is known to 0.009, the mean of 900 uniform numbers to 2 %; four of these
    assert len(turned) / 3000 == pytest.approx(anisotropic, abs=0.036)
    assert np.mean([np.square(blur.sigma) for blur in turned]) == pytest.approx(variance / 2, rel=0.08)
    assert np.mean([blur.theta for blur in turned]) == pytest.approx(np.pi / 2, rel=0.08)
    assert np.mean([blur.sigma[0] for blur in blurs if blur.is_separable]) == pytest.approx(std / 2, rel=0.08)


def test_shrinking_takes_the_factors_of_kair():
    found = drawn(blindsr.KAIR, sf=3)
    # 1,500 draws: a share is known to 0.011
    assert len(found[Thin]) / 1500 == pytest.approx(0.25, abs=0.045)
    assert {(thin.size, thin.every) for thin in found[Thin]} == {(25, 3)}
    assert np.mean([thin.sigma for thin in found[Thin]]) == pytest.approx((0.1 + 1.8) / 2, rel=0.1)
    heights = [resize.height for resize in found[Resize] if resize.height != 106]  # the goal
    assert min(heights) >= 320 // 6 - 1
    assert max(heights) <= 320
    assert np.mean([320 / height for height in heights]) == pytest.approx(3.5, rel=0.06)
    shares = Counter(resize.filter for resize in found[Resize])
    assert all(abs(shares[name] / sum(shares.values()) - 1 / 3) < 0.04 for name in ("linear", "cubic", "area"))


def test_of_the_test_images_the_size_is_multiplied_by_the_factor_not_divided():
    heights = [resize.height for resize in drawn(blindsr.SSL_TEST, sf=3)[Resize] if resize.height != 106]
    assert int(0.75 * 320) <= min(heights) <= max(heights) <= 320
    # Some 1,100 uniform sizes, whose mean is known to 0.7; of 1/f it would be 276.
    assert np.mean(heights) == pytest.approx(0.875 * 320 - 0.5, abs=2.8)


def test_a_quarter_is_halved_first_at_scale_4_alone():
    # 1,500 draws: a share is known to 0.011
    assert sum(r.filter == "matlab" for r in drawn(blindsr.KAIR)[Resize]) / 1500 == pytest.approx(1 / 8, abs=0.035)
    every = Counter(thin.every for thin in drawn(blindsr.KAIR)[Thin])
    assert every[2] / every.total() == pytest.approx(1 / 4, abs=0.09)
    assert not any(r.filter == "matlab" for r in drawn(blindsr.KAIR, sf=2)[Resize])


@pytest.mark.parametrize(("strength", "quality"), [(blindsr.KAIR, (30, 95)), (blindsr.SSL_FORK, (75, 95))])
def test_jpeg_comes_last_and_in_nine_of_ten_before(strength, quality):
    found = drawn(strength)
    assert len(found[Jpeg]) / 1500 == pytest.approx(1.9, abs=0.035)  # known to 0.008
    qualities = {jpeg.quality for jpeg in found[Jpeg]}
    assert qualities == set(range(quality[0], quality[1] + 1))
    assert {jpeg.codec for jpeg in found[Jpeg]} == {"libjpeg"}


def test_cameras_are_drawn_as_often_as_asked_and_never_for_gray_images():
    assert not drawn(blindsr.KAIR, n=200)[Camera]
    asked = replace(blindsr.KAIR, camera_prob=0.25)
    assert not drawn(asked, n=200, channels=1)[Camera]
    cameras = drawn(asked)[Camera]
    assert len(cameras) / 1500 == pytest.approx(0.25, abs=0.045)
    assert 1.2 <= min(camera.red_gain for camera in cameras) <= max(camera.blue_gain for camera in cameras) <= 2.4
    assert 2**-0.1 <= min(camera.exposure for camera in cameras) <= max(camera.exposure for camera in cameras) <= 2**0.3
    assert all(sum(camera.cameras) == pytest.approx(1) for camera in cameras)


def test_plus_has_two_rounds_and_shuffles_as_often_as_asked():
    rng = np.random.default_rng(0)
    for shuffle_prob in (0.0, 0.4):
        orders = [blindsr._plus_steps(rng, shuffle_prob) for _ in range(1500)]
        assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}
        regular = sum(
            (order[0], order[1], order[6], order[7]) == ("blur", "resize", "jpeg", "blur") for order in orders
        )
        # some of the shuffled ones look regular: 2 of 13 blurs, 2 of 12 resizes, ...: 1 in 4,300
        assert regular / 1500 == pytest.approx(1 - shuffle_prob, abs=0.05)  # known to 0.013
        assert len({tuple(order[2:6]) for order in orders}) >= 24
    found = drawn(blindsr.KAIR, draw=blindsr.draw_bsrgan_plus, n=1000)
    assert len(found[Blur]) == 2000
    assert len(found[Jpeg]) == 2000
    assert len(found[Resize]) == 3000
    speckles = sum(noise.speckle for noise in found[Noise])
    # 2,000 draws at 0.1: 200, standard deviation 13
    assert abs(speckles - 200) < 55
    assert abs(len(found[Poisson]) - 200) < 55
    assert len(found[Noise]) == 2000 + speckles
    assert 100 <= min(p.photons for p in found[Poisson]) <= max(p.photons for p in found[Poisson]) <= 10_000
