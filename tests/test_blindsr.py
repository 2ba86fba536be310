"""The BSRGAN degradation: golden kernels of KAIR, and the laws its random draws obey."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from utils import utils_blindsr as blindsr
from utils.utils_image import imresize_np, uint2single

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "image" / "kair_blindsr.npz"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="golden values of the reference code are not at hand")

STRENGTHS = [blindsr.KAIR, blindsr.SSL_FORK]
ANISOTROPIC = [(15, 0.5, 6.0, 1.5), (21, 2.2, 3.0, 3.0), (7, 0.0, 0.8, 0.2), (12, 1.0, 4.0, 1.0)]


def photo(height=64, width=80, channels=3, blur=1.5):
    """A made image: blurred noise in shades of one colour, for JPEG halves the resolution of colours at random."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((height, width)), blur)
    shades = 0.2 + 0.6 * (noise - noise.min()) / np.ptp(noise)
    return (shades[..., None] * np.linspace(1, 0.7, channels)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ golden


@needs_golden
@pytest.mark.parametrize(("size", "std"), [(7, 0.8), (15, 2.0), (25, 1.6), (3, 0.3)])
def test_gaussian_profile_is_the_root_of_fspecial(size, std):
    profile = blindsr.gaussian_profile(size, std)
    # float64 rounding; fspecial also zeroes what is below 2e-16 of the peak
    np.testing.assert_allclose(
        np.outer(profile, profile), np.load(GOLDEN)[f"fspecial_gaussian_{size}_{std}"], atol=1e-15
    )


@needs_golden
@pytest.mark.parametrize("case", range(4))
def test_anisotropic_gaussian_equals_kairs(case):
    kernel = blindsr.anisotropic_gaussian(*ANISOTROPIC[case])
    np.testing.assert_allclose(kernel, np.load(GOLDEN)[f"anisotropic_gaussian_{case}"], atol=1e-15)  # float64 rounding


@needs_golden
@pytest.mark.parametrize("upper_left", [True, False])
@pytest.mark.parametrize("sf", [2, 3, 4])
def test_shift_pixel_equals_kairs(sf, upper_left):
    z = np.load(GOLDEN)
    kernel = blindsr.shift_pixel(z["anisotropic_gaussian_0"], sf, upper_left)
    np.testing.assert_allclose(kernel, z[f"shift_pixel_kernel_sf{sf}_upperleft{upper_left}"], atol=1e-15)
    # KAIR shifts images in place, and the stored ones have been shifted twice; they are float32
    twice = blindsr.shift_pixel(blindsr.shift_pixel(z["shift_input_image"], sf, upper_left), sf, upper_left)
    np.testing.assert_allclose(twice, z[f"shift_pixel_image_sf{sf}_upperleft{upper_left}"], atol=2e-7)


@needs_golden
def test_sharpening_equals_kairs():
    z = np.load(GOLDEN)
    img = uint2single(z["degradation_input_uint8"])
    # the same OpenCV calls; another build may sum in another order
    np.testing.assert_allclose(blindsr.add_sharpening(img), z["add_sharpening"], atol=2e-6)
    sharpened = blindsr.add_sharpening(img, weight=1.0, radius=15, threshold=5)
    np.testing.assert_allclose(sharpened, z["add_sharpening_w1_r15_t5"], atol=2e-6)


# ----------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(("size", "theta", "l1", "l2"), ANISOTROPIC)
def test_anisotropic_gaussian_sums_to_one_and_leans_along_theta(size, theta, l1, l2):
    kernel = blindsr.anisotropic_gaussian(size, theta, l1, l2)
    assert kernel.sum() == pytest.approx(1)
    x = np.arange(size) - (size - 1) / 2
    along = np.cos(theta) * x + np.sin(theta) * x[:, None]
    across = np.cos(theta) * x[:, None] - np.sin(theta) * x
    # sampled and cut off at the window: the variances are met within a tenth, the small 0.2 only by order
    assert (kernel * along**2).sum() == pytest.approx(l1, rel=0.1)
    assert (kernel * across**2).sum() == pytest.approx(l2, rel=0.3)


def test_gaussians_of_vanishing_width_are_a_single_point():
    assert blindsr.gaussian_profile(5, 1e-9).tolist() == [0, 0, 1, 0, 0]
    assert blindsr.anisotropic_gaussian(3, 0.3, 1e-17, 1e-17).ravel().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_shift_pixel_moves_a_ramp_by_half_the_gap_and_repeats_the_border():
    ramp = np.arange(8.0)[None].repeat(5, axis=0)
    assert blindsr.shift_pixel(ramp, 4)[0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7, 7]
    assert blindsr.shift_pixel(ramp, 4, upper_left=False)[0].tolist() == [0, 0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    np.testing.assert_array_equal(blindsr.shift_pixel(ramp, 1), ramp)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [3, 9, 25])
def test_convolution_is_scipys_with_a_mirrored_border(size, channels):
    img = photo(channels=channels)
    kernel = np.random.default_rng(1).random((size, size))  # not symmetric: turning it round shows
    kernel /= kernel.sum()
    expected = ndimage.convolve(img.astype(np.float64), kernel[..., None], mode="mirror")
    # float32, by Fourier transform for large kernels
    np.testing.assert_allclose(blindsr.convolve(img, kernel), expected, atol=2e-6)
    profile = kernel.sum(axis=0)
    outer = blindsr.convolve(img, np.outer(profile, profile))
    np.testing.assert_allclose(blindsr._convolve_separable(img, profile), outer, atol=2e-6)


# ------------------------------------------------------------------------------------------------- the random draws


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("sf", "channels"), [(2, 3), (3, 3), (4, 3), (4, 1)])
def test_degrading_gives_a_small_L_and_the_cropped_H(strength, sf, channels):
    img = photo(50, 71, channels)
    for seed in range(20):
        L, H = blindsr.degrade_bsrgan(img, sf, np.random.default_rng(seed), strength)
        assert L.shape == (50 // sf, 71 // sf, channels)
        assert L.dtype == np.float32
        assert L.min() >= 0
        assert L.max() <= 1
        np.testing.assert_array_equal(H, img[: 50 // sf * sf, : 71 // sf * sf])


def test_the_generator_decides_everything_and_the_input_is_left_alone():
    img = photo()
    before = img.copy()
    first, again, other = (blindsr.degrade_bsrgan(img, 4, np.random.default_rng(s), blindsr.KAIR)[0] for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(img, before)


def test_the_published_ssl_degradation_is_milder_than_kairs():
    img = photo(128, 128, blur=3)
    reference = imresize_np(img, 1 / 4)

    def mean_error(strength):
        Ls = (blindsr.degrade_bsrgan(img, 4, np.random.default_rng(seed), strength)[0] for seed in range(40))
        return np.mean([np.abs(L - reference).mean() for L in Ls])

    assert mean_error(blindsr.SSL_FORK) < 0.75 * mean_error(blindsr.KAIR)


def test_degrading_does_not_shift_the_image():
    img = photo(128, 128, blur=4)
    Ls = [blindsr.degrade_bsrgan(img, 4, np.random.default_rng(seed), blindsr.SSL_FORK)[0] for seed in range(60)]
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
    assert all(Counter(order)["blur"] == 2 and len(order) == 6 for order in orders)
    # noise is first in one of six: 500 of 3000, standard deviation 20
    assert abs(sum(order[0] == "noise" for order in orders) - 500) < 100


@pytest.mark.parametrize("strength", STRENGTHS)
def test_noise_has_the_three_kinds_in_their_shares_and_no_more_than_its_level(strength):
    gray = np.full((32, 32, 3), 0.5, np.float32)
    rng, kinds, stds = np.random.default_rng(0), Counter(), []
    for _ in range(600):
        noise = blindsr.add_gaussian_noise(gray, rng, strength.noise_level) - gray
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
    coarse = np.abs(blindsr.add_jpeg(img, np.random.default_rng(0), (10, 10)) - img).mean()
    fine = np.abs(blindsr.add_jpeg(img, np.random.default_rng(0), (95, 95)) - img).mean()
    assert 0 < fine < 0.5 * coarse


def test_sharpening_leaves_flat_areas_and_raises_edges():
    img = np.full((64, 64, 1), 0.3, np.float32)
    np.testing.assert_allclose(blindsr.add_sharpening(img), img, atol=1e-6)  # float32 rounding of the blur
    img[:, 32:] = 0.6
    assert blindsr.add_sharpening(img).max() > 0.65
