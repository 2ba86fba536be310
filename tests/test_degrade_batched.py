"""Degradations of a batch on the training device: the steps, the whole beside the form for one image, the pair pool."""

import json
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from data.degradations import on_batch as batched
from data.degradations import on_image
from data.degradations.bsrgan import KAIR, draw_camera
from data.degradations.select_degradation import DEGRADATIONS, Degrader, degrade_image
from data.degradations.steps import Blur, Camera, Jpeg, Noise, Poisson, Resize, Thin
from data.select_dataset import define_Dataset
from tests.conftest import photograph
from tests.training import Workplace, assert_same
from utils.utils_error import UserError
from utils.utils_image import imsave, single2tensor3, uint2single, uint2tensor4
from utils.utils_option import DatasetOptions, parse


def photo(height=48, width=56, seed=0, channels=3):
    return uint2single(photograph(height, width, seed, channels))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SIZES = np.array([(33, 20), (40, 47), (21, 48)])


def canvas(channels=3):
    """Three images of their own sizes on a canvas, and what others have left beyond them."""
    img = torch.rand(3, channels, 41, 48, generator=generator())
    images = [photo(*size, seed=i, channels=channels) for i, size in enumerate(SIZES)]
    for i, one in enumerate(images):
        img[i, :, : one.shape[0], : one.shape[1]] = single2tensor3(one)
    return img, images


def on_canvas(img, i, size):
    return img[i, :, : size[0], : size[1]].permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["linear", "cubic", "area"])
def test_images_on_a_canvas_are_resized_as_opencv_does(name, channels):
    img, images = canvas(channels)
    for goals in ([(10, 7), (21, 30), (21, 48)], [(50, 31), (13, 47), (20, 60)], [(33, 20), (1, 1), (40, 47)]):
        ours = batched.resize(img, SIZES, np.array(goals), name)
        for i, ((height, width), one) in enumerate(zip(goals, images, strict=True)):
            expected = on_image.resize(one, Resize(height, width, name, clip=False))
            np.testing.assert_allclose(on_canvas(ours, i, goals[i]), expected, atol=2e-6)  # float32
            flag = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}[name]
            theirs = cv2.resize(one, (width, height), interpolation=flag).reshape(expected.shape)
            np.testing.assert_array_equal(expected, theirs)


@pytest.mark.parametrize("goal", [(10, 7), (50, 31), (33, 20), (32, 21), (1, 1)])
def test_window_is_what_pytorch_calls_area(goal):
    img, images = canvas()
    expected = torch.nn.functional.interpolate(single2tensor3(images[0])[None], goal, mode="area")[0]
    ours = batched.resize(img, SIZES, np.array([goal, (5, 6), (40, 40)]), "window")
    # float32, sums in another order
    np.testing.assert_allclose(ours[0, :, : goal[0], : goal[1]], expected, atol=1e-6)
    one = on_image.resize(images[0], Resize(*goal, "window", clip=False))
    np.testing.assert_allclose(single2tensor3(one), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_on_a_canvas_are_filtered_with_borders_of_their_own(channels):
    img, images = canvas(channels)
    kernels = [np.random.default_rng(k).random((k, k)) for k in (5, 13, 1)]  # not symmetric: turning round shows
    ours = batched.filter2d(img, kernels, SIZES)
    for i, (one, kernel) in enumerate(zip(images, kernels, strict=True)):
        expected = ndimage.correlate(one, kernel[..., None], mode="mirror")
        # float32 by Fourier transform; sums of up to 169 numbers
        np.testing.assert_allclose(on_canvas(ours, i, SIZES[i]), expected, rtol=1e-5, atol=1e-5)


def test_thinned_images_are_those_of_the_form_for_one():
    img, images = canvas()
    thin = Thin(25, 1.3, 4)
    ours, sizes = batched._apply(img, SIZES, [thin] * 3, generator())
    for i, one in enumerate(images):
        expected = on_image.apply(one, [thin], np.random.default_rng(0))
        assert expected.shape[:2] == tuple(sizes[i])
        np.testing.assert_allclose(on_canvas(ours, i, sizes[i]), expected, atol=2e-6)  # float32


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [5, 30, 60, 75, 95, 100])
def test_jpeg_is_libjpegs_number_for_number(quality, channels):
    sizes = np.array([(33, 20), (40, 47), (12, 15), (24, 30), (17, 5), (16, 48), (1, 7)])
    img = torch.rand(len(sizes), channels, 41, 48, generator=generator())
    images = [photo(*size, seed=i, channels=channels) for i, size in enumerate(sizes)]
    for i, one in enumerate(images):
        img[i, :, : one.shape[0], : one.shape[1]] = single2tensor3(one)
    ours = batched.jpeg(img, [quality] * len(sizes), "libjpeg", sizes)
    for i, one in enumerate(images):
        difference = np.abs(255 * on_canvas(ours, i, sizes[i]) - 255 * on_image.add_jpeg(one, quality))
        # The transforms' sums of up to 2^29 are rounded to float32, and then divided by 2^18: hardly ever one more or
        # less, which can take a coefficient to the next step.
        assert (difference < 0.01).mean() > 0.9
        assert difference.mean() < 0.2


def test_jpeg_of_real_esrgan_fills_up_with_black_beyond_each_image():
    img, images = canvas()
    ours = batched.jpeg(img, [30.0, 80.0, 95.0], "diffjpeg", SIZES)
    for i, (one, quality) in enumerate(zip(images, (30.0, 80.0, 95.0), strict=True)):
        alone = batched.jpeg(single2tensor3(one)[None], [quality], "diffjpeg")[0]
        # float32: a coefficient half-way between two steps may go the other way
        assert np.abs(single2tensor3(on_canvas(ours, i, SIZES[i])) - alone).mean() < 1e-4


def test_a_sharpened_batch_is_opencvs():
    for size in ((80, 96), (60, 40)):
        one = photo(*size)
        # float32; 51 taps in another order, and a threshold between the two blurs
        np.testing.assert_allclose(
            batched.sharpen(uint2tensor4(photograph(*size)))[0], single2tensor3(on_image.add_sharpening(one)), atol=5e-6
        )


# ------------------------------------------------------------------------------------------------------------ camera


QUIET = Camera(shot=0.0, read=0.0, red_gain=2.0, blue_gain=1.5, exposure=1.1, cameras=(0.4, 0.3, 0.2, 0.1))


def test_a_camera_without_noise_gives_flat_colours_back():
    colours = torch.rand(5, 3, 1, 1, generator=generator()) * 0.8 + 0.1
    flat = colours.expand(-1, -1, 12, 14)
    # float32, through powers, sines and matrices of condition 10
    np.testing.assert_allclose(batched.photograph(flat, [QUIET] * 5, generator()), flat, atol=2e-4)


def test_demosaicing_is_exact_for_ramps():
    # Malvar et al.: bilinear, corrected by a Laplacian, which is 0 here; so at the mirrored border it is not
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(18.0), indexing="ij")
    ramp = torch.stack([0.2 + 0.01 * y, 0.3 + 0.01 * y, 0.5 + 0.01 * y])[None] + 0.02 * x
    sizes = torch.tensor([[16]]), torch.tensor([[18]])
    inside = slice(2, -2)
    result = batched._demosaic(batched._mosaic(ramp), *sizes)[..., inside, inside]
    np.testing.assert_allclose(result, ramp[..., inside, inside], atol=1e-6)  # float32


def test_a_camera_keeps_an_image_and_adds_noise_of_its_sensor():
    img = uint2tensor4(photograph(64, 72)).expand(2, -1, -1, -1)
    loud = replace(QUIET, shot=0.01, read=0.001)
    quiet, noisy = batched.photograph(img, [QUIET, loud], generator())
    # but at sharp edges and stripes of 3 pixels, of which the mosaic has a half and a quarter, and in saturated colours
    assert (quiet - img[0]).abs().median() < 0.01
    assert (quiet - img[0]).abs().mean() < 0.06
    assert (noisy - quiet).std() > 0.02
    gray = torch.full((1, 3, 64, 64), 0.5)
    deviations = [
        (batched.photograph(gray, [replace(QUIET, read=read)], generator()) - 0.5).std().item() for read in (1e-5, 4e-5)
    ]
    # so little that everything is linear: twice the deviation for four times the variance; the same draws
    assert deviations[1] / deviations[0] == pytest.approx(2, rel=0.05)


def test_photographs_on_a_canvas_have_borders_of_their_own():
    img, images = canvas()
    ours = batched.photograph(img, [QUIET] * 3, generator(), SIZES)
    for i, one in enumerate(images):
        alone = batched.photograph(single2tensor3(one)[None], [QUIET], generator())[0].permute(1, 2, 0)
        np.testing.assert_allclose(on_canvas(ours, i, SIZES[i]), alone, atol=1e-5)  # float32


# --------------------------------------------------------------------------------------------------------- the whole


def plans(name, n, shape=(48, 48, 3), seed=0, without=()):
    rng = np.random.default_rng(seed)
    return [[s for s in DEGRADATIONS[name](shape, 4, rng) if not isinstance(s, without)] for _ in range(n)]


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_batched_form_does_what_the_form_for_one_image_does(name):
    """The same steps but for the noise: the same L."""
    shape = (48, 60, 3)
    drawn = plans(name, 24, shape, without=(Noise, Poisson))
    images = [photo(*shape[:2], seed=i) for i in range(24)]
    ours = batched.apply_batch(torch.stack([single2tensor3(one) for one in images]), drawn, generator())
    assert ours.shape == (24, 3, 12, 15)
    differences = []
    for one, mine, steps in zip(images, ours, drawn, strict=True):
        expected = on_image.apply(one, steps, np.random.default_rng(0))
        differences.append(255 * np.abs(mine - single2tensor3(expected)).mean())
    # Resizing differs by 1e-7, which now and then rounds a pixel to the next level in front of JPEG, and a coefficient
    # to its next step: then a few levels, in a block or two of one or two of these images.
    assert np.mean(differences) < 0.2
    assert np.median(differences) < 0.01
    without_jpeg = [[s for s in steps if not isinstance(s, Jpeg)] for steps in drawn]
    ours = batched.apply_batch(torch.stack([single2tensor3(one) for one in images]), without_jpeg, generator())
    for one, mine, steps in zip(images, ours, without_jpeg, strict=True):
        expected = on_image.apply(one, steps, np.random.default_rng(0))
        difference = np.abs(mine - single2tensor3(expected))
        # float32; what is rounded to 8 bits in the end may go the other way where it is a half: in a few of 100 pixels
        assert difference.max() < 1.01 / 255
        assert difference.mean() < 0.15 / 255


def residuals(Ls, clean):
    """Mean square, mean, and share of fine structure of what the noise has done, for each image."""
    difference = Ls - clean
    fine = (difference[..., 1:] - difference[..., :-1]).square().mean(dim=(1, 2, 3))
    return difference.square().mean(dim=(1, 2, 3)), difference.mean(dim=(1, 2, 3)), fine


@pytest.mark.parametrize("name", ["bsrgan", "bsrgan_plus", "realesrgan"])
def test_noise_of_both_forms_has_the_same_statistics(name):
    n, drawn = 120, plans(name, 120)
    one = photo(48, 48)
    batch = single2tensor3(one).expand(n, -1, -1, -1)
    silent = [[s for s in steps if not isinstance(s, (Noise, Poisson))] for steps in drawn]
    clean = batched.apply_batch(batch, silent, generator())
    in_batch = batched.apply_batch(batch, drawn, generator(1))
    rng = np.random.default_rng(1)
    one_by_one = torch.stack([single2tensor3(on_image.apply(one, steps, rng)) for steps in drawn])
    power, shift, fine = residuals(in_batch, clean)
    power_1, shift_1, fine_1 = residuals(one_by_one, clean)
    # Each sample has the same figures in both forms, and so the same strength but for its 432 numbers of noise, of
    # which gray ones are 144: its power is known to 7 to 12 %, the mean of 120, some much stronger, to some 4 %.
    assert power.mean().item() == pytest.approx(power_1.mean().item(), rel=0.15)
    assert fine.mean().item() == pytest.approx(fine_1.mean().item(), rel=0.15)
    assert np.corrcoef(power.sqrt(), power_1.sqrt())[0, 1] > 0.8
    # the noise has no mean; 120 images, of which one is shifted by some 2 levels
    assert abs(shift.mean() - shift_1.mean()) < 1 / 255


@pytest.mark.parametrize("name", ["bsrgan", "realesrgan"])
def test_blur_of_both_forms_is_as_strong(name):
    n = 150
    only = [[s for s in steps if isinstance(s, Blur)][:1] for steps in plans(name, n)]
    one = photo(48, 48)
    ours = batched.apply_batch(single2tensor3(one).expand(n, -1, -1, -1), only, generator())
    theirs = torch.stack([single2tensor3(on_image.apply(one, steps, np.random.default_rng(0))) for steps in only])
    strength, expected = (x.diff(dim=-1).square().mean(dim=(1, 2, 3)) for x in (ours, theirs))
    # the same kernels in float32, without the millionths that the form for one image leaves out
    np.testing.assert_allclose(strength, expected, rtol=1e-3)
    assert strength.std() > 0.2 * strength.mean()  # and they differ


def test_noise_levels_in_a_batch_are_those_drawn():
    drawn = [[step] for steps in plans("bsrgan", 300) for step in steps if isinstance(step, Noise)]
    drawn = [steps for steps in drawn if steps[0].kind != "mixed"][:200]
    gray = torch.full((200, 3, 32, 32), 0.5)
    noise = batched.apply_batch(gray, drawn, generator()) - gray
    levels = np.array([steps[0].level for steps in drawn])
    # 1,024 draws know the deviation to 2.2 %; five of these
    np.testing.assert_allclose(255 * noise.std(dim=(1, 2, 3)), levels, rtol=0.11)
    assert {2, 25} <= set(levels)
    for one, steps in zip(noise, drawn, strict=True):
        assert torch.equal(one[0], one[1]) == (steps[0].kind == "gray")


def test_an_image_is_degraded_alike_in_any_company():
    drawn = plans("bsrgan", 6, without=(Noise, Poisson))
    img = torch.stack([single2tensor3(photo(48, 48, seed=i)) for i in range(6)])
    before = img.clone()
    together = batched.apply_batch(img, drawn, generator())
    assert torch.equal(img, before)
    for i in range(6):
        alone = batched.apply_batch(img[i : i + 1], drawn[i : i + 1], generator())
        # float32: products of other shapes; then a coefficient of JPEG may go the other way
        assert (together[i] - alone[0]).abs().mean() < 0.01


# ------------------------------------------------------------------------------------------------------ the degrader


def degrader(**changes):
    common = {"dataset_type": "blindsr", "degradation_type": "bsrgan", "degradation_device": "gpu", "phase": "train"}
    return Degrader(DatasetOptions(**{**common, **changes}), torch.device("cpu"))


def batch(n=4, size=48, first=0):
    H = torch.stack([single2tensor3(photo(size, size, seed=first + i)) for i in range(n)])
    return {"H": H, "mask": (H[:, :1] > 0.5).float(), "H_path": [str(first + i) for i in range(n)]}


def test_torchs_generator_decides_all():
    make, results = degrader(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(make(batch())["L"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].shape == (4, 3, 12, 12)


def test_images_of_a_batch_have_draws_of_their_own():
    torch.manual_seed(0)
    same = {"H": single2tensor3(photo(48, 48)).expand(5, -1, -1, -1)}
    L = degrader(degradation_type="realesrgan_light")(same)["L"]
    assert not any(torch.equal(L[i], L[j]) for i in range(5) for j in range(i))


@pytest.mark.parametrize("scale", [2, 4])
def test_cut_pairs_stay_aligned_with_their_mask(scale):
    torch.manual_seed(0)
    out = degrader(lq_patchsize=8, scale=scale, degradation_type="realesrgan_light", use_sharp=True)(batch(6))
    assert out["L"].shape == (6, 3, 8, 8)
    assert out["H"].shape == out["H_usm"].shape == (6, 3, 8 * scale, 8 * scale)
    assert torch.equal(out["mask"], (out["H"][:, :1] > 0.5).float())
    # the sharpened image is the other, and more of it
    assert all(np.corrcoef(a.flatten(), b.flatten())[0, 1] > 0.9 for a, b in zip(out["H_usm"], out["H"], strict=True))
    small = torch.nn.functional.avg_pool2d(out["H"], scale)
    for one, other in zip(out["L"], small, strict=True):
        assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.7
    corners = {tuple(h[:, 0, 0].tolist()) for h in out["H"]}
    assert len(corners) > 2


def test_kairs_degradations_sharpen_H_itself():
    torch.manual_seed(0)
    given = batch()
    out = degrader(use_sharp=True)(given)
    assert "H_usm" not in out
    assert torch.equal(out["H"], batched.sharpen(given["H"]))


def test_the_pool_gives_out_old_pairs_and_keeps_what_belongs_together():
    make = degrader(pair_pool=8, degradation_type="realesrgan_light", use_sharp=True, dataloader_batch_size=4)

    def numbered(first):
        """H and its mask say which pair they are of; L does too, for the image is flat."""
        H = torch.arange(first, first + 4.0)[:, None, None, None].expand(-1, 3, 32, 32) / 100
        return {"H": H, "mask": H[:, :1] * 1, "H_path": [str(first + i) for i in range(4)]}

    seen, positions = Counter(), []
    for step in range(12):
        torch.manual_seed(step)
        out = make(numbered(4 * step))
        pair = (100 * out["H"][:, 0, 0, 0]).round()
        assert torch.equal((100 * out["mask"].mean(dim=(1, 2, 3))).round(), pair)
        assert torch.equal((100 * out["H_usm"].mean(dim=(1, 2, 3))).round(), pair)
        # noise of up to 8 levels over 192 numbers, gray: about a level
        np.testing.assert_allclose(100 * out["L"].mean(dim=(1, 2, 3)), pair, atol=4)
        seen.update(pair.tolist())
        if step < 2:
            assert pair.tolist() == list(range(4 * step, 4 * step + 4))  # while the pool fills up
        else:
            assert "H_path" not in out
            positions += [4 * step - p for p in pair.tolist()]
    # the eight that filled it came out as themselves, and again from the pool; no other comes twice
    assert all(count <= 2 for count in seen.values())
    assert all(seen[i] == 1 for i in seen if i >= 8)
    assert len(make.pool["L"]) == 8
    assert len(set(positions)) > 8  # old and new, mixed


# ------------------------------------------------------------------------------------- data sets, options, training


def test_data_sets_leave_L_to_the_device_in_training_alone(tmp_path):
    (tmp_path / "M").mkdir()
    for i in range(2):
        img = photograph(60, 70, seed=i)
        imsave(img, str(tmp_path / f"{i}.png"))
        imsave((img[..., :1] > 127).astype(np.uint8) * 255, str(tmp_path / "M" / f"{i}.png"))
    common = {
        "dataset_type": "blindsrmask",
        "dataroot_H": [str(tmp_path / f"{i}.png") for i in range(2)],
        "dataroot_H_mask": str(tmp_path / "M"),
        "H_size": 32,
        "lq_patchsize": 4,
        "use_sharp": True,
        "degradation_device": "gpu",
    }
    items = define_Dataset(DatasetOptions(**common, phase="train"))
    for seed in range(8):
        item = items[seed % 2, seed]
        assert "L" not in item
        assert item["H"].shape == (3, 32, 32)
        assert torch.equal(item["mask"], (item["H"][:1] * 255 > 127.5).float())  # flipped and turned with the image
    assert define_Dataset(DatasetOptions(**common, phase="test"))[0]["L"].shape == (3, 15, 17)


@pytest.fixture
def work(tmp_path):
    return Workplace(tmp_path)


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        (["datasets.train.degradation_device=cuda"], "degradation_device", "gpu"),
        (["datasets.train.degradation_device=gpu", "datasets.train.dataset_type=sr"], "degradation_device", "blindsr"),
        (["datasets.train.pair_pool=180"], "pair_pool", "degradation_device gpu"),
        (
            ["datasets.train.pair_pool=5", "datasets.train.degradation_device=gpu"],
            "pair_pool",
            "divide by the batch, 2",
        ),
        (["datasets.train.camera_prob=2"], "camera_prob", "less than or equal to 1"),
        (["train.l1_gt_usm=true", "datasets.train.use_sharp=true"], "l1_gt_usm", "realesrgan"),
    ],
)
def test_options_that_cannot_be_are_named(work, changes, key, words):
    with pytest.raises(UserError, match=f"{key}.*{words}"):
        parse(work.file(), overrides=changes)


@pytest.mark.parametrize("degradation_type", DEGRADATIONS)
def test_every_degradation_has_its_name_in_the_options(work, degradation_type):
    opt = parse(work.file(), overrides=[f"datasets.train.degradation_type={degradation_type}"])
    assert opt.train_set.degradation_type == degradation_type


def test_a_resumed_run_that_degrades_on_its_device_equals_the_uninterrupted_one(work):
    gpu = ("model=plain", "datasets.train.degradation_device=gpu", "train.checkpoint_save=1")
    work.run(*gpu, "train.iterations=2", "task=whole")
    work.run(*gpu, "train.iterations=1", "task=parts")
    work.run(*gpu, "train.iterations=2", "task=parts")
    assert_same(work.saved(2, "whole"), work.saved(2, "parts"))


def test_training_against_the_sharpened_H_with_a_pool(work):
    work.run(
        "model=plain",
        "datasets.train.degradation_device=gpu",
        "datasets.train.degradation_type=stablesr",
        "datasets.train.use_sharp=true",
        "datasets.train.pair_pool=4",
        "datasets.train.lq_patchsize=6",
        "train.l1_gt_usm=true",
        "train.iterations=4",
    )
    assert "done at step 4" in work.log()


POOL = (
    "model=plain",
    "datasets.train.degradation_device=gpu",
    "datasets.train.pair_pool=4",
    "train.iterations=8",
    "datasets.test=null",
)


def test_a_resumed_run_with_a_pool_equals_the_uninterrupted_one(work):
    work.run(*POOL, "task=whole")
    for last in (1, 4, 8):  # while it is being filled, and when pairs have changed places
        work.run(*POOL, "task=parts", f"train.iterations={last}")
    assert_same(work.saved(8, "whole"), work.saved(8, "parts"))
    assert len(work.saved(1, "parts")["pool0"]["L"]) == 2
    assert len(work.saved(8, "parts")["pool0"]["H"]) == 4
    pool = work.folder("parts") / "models" / "8_pool0.pth"
    pool.write_bytes(pool.read_bytes()[:-1] + b"x")
    work.run(*POOL, "task=parts")
    assert "checkpoint 8 cannot be used" in work.log("parts")
    assert "resumed at step 6" in work.log("parts")
    assert_same(work.saved(8, "whole"), work.saved(8, "parts"))


def test_a_pool_is_filled_anew_with_a_word_where_there_is_none_that_fits(work):
    work.run(*POOL, "datasets.train.pair_pool=0", "train.iterations=2")
    work.run(*POOL, "train.iterations=4")
    assert "checkpoint 2 has no pool: it is filled anew" in work.log()
    work.run(*POOL, "datasets.train.H_size=24")
    assert "the options make other pairs than those of the pool: it is filled anew" in work.log()
    assert work.saved(8)["pool0"]["H"].shape == (4, 3, 24, 24)


def test_the_pool_of_a_checkpoint_is_dropped_with_it(work):
    work.run(*POOL, "train.checkpoint_keep=1")
    assert {path.name.split("_")[0] for path in (work.folder() / "models").iterdir()} == {"8"}


# ---------------------------------------------------------------------------------------------- one image, for a file


@pytest.mark.parametrize("degradation_type", DEGRADATIONS)
@pytest.mark.parametrize(("channels", "scale"), [(1, 4), (3, 3)])
def test_a_file_is_degraded_by_its_seed_and_name(degradation_type, channels, scale):
    H = photograph(50, 61, channels=channels)
    L, record = degrade_image(H, degradation_type, scale, 7, "a/b.png")
    assert L.shape == (50 // scale, 61 // scale, channels)
    assert L.dtype == np.uint8
    again, same = degrade_image(H, degradation_type, scale, 7, "a/b.png")
    np.testing.assert_array_equal(L, again)
    assert record == same
    assert json.loads(json.dumps(record))["steps"][0]["step"] in ("blur", "resize", "thin", "noise", "jpeg", "poisson")
    others = [degrade_image(H, degradation_type, scale, *key)[1]["steps"] for key in ((8, "a/b.png"), (7, "c.png"))]
    assert record["steps"] not in others


def test_depths_of_a_file_make_no_difference():
    H = photograph(48, 48)
    expected = degrade_image(H, "bsrgan", 4, 0)[0]
    np.testing.assert_array_equal(degrade_image(H.astype(np.uint16) * 257, "bsrgan", 4, 0)[0], expected)
    np.testing.assert_array_equal(degrade_image(uint2single(H), "bsrgan", 4, 0)[0], expected)


def test_the_blind_test_images_are_a_mixture():
    codecs = [degrade_image(photograph(16, 16), "blind_test", 4, 0, str(i))[1]["steps"] for i in range(200)]
    realesrgan = sum(any(step.get("codec") == "diffjpeg" for step in steps) for steps in codecs)
    assert realesrgan / 200 == pytest.approx(0.6, abs=0.14)  # known to 0.035


def test_what_cannot_be_degraded_is_refused():
    with pytest.raises(ValueError, match=r"degradation_type must be one of bsrgan, .*not bicubic"):
        degrade_image(photograph(16, 16), "bicubic", 4, 0)
    with pytest.raises(ValueError, match="3 x 40 pixels"):
        degrade_image(photograph(40, 3), "bsrgan", 4, 0)


def test_cameras_are_part_of_a_data_set_that_asks_for_them(tmp_path):
    imsave(photograph(48, 48), str(tmp_path / "a.png"))
    common = {"dataset_type": "blindsr", "dataroot_H": str(tmp_path), "H_size": 48, "phase": "train"}
    plain, cameras = (define_Dataset(DatasetOptions(**common, camera_prob=p)) for p in (0.0, 1.0))
    Ls = [(plain[0, seed]["L"], cameras[0, seed]["L"]) for seed in range(4)]
    assert not any(torch.equal(one, other) for one, other in Ls)
    # a camera's white balance is its own business: colours stay about what they were
    assert max((one.mean(dim=(1, 2)) - other.mean(dim=(1, 2))).abs().max() for one, other in Ls) < 0.15
    assert draw_camera(np.random.default_rng(0)) != draw_camera(np.random.default_rng(1))
    assert KAIR.camera_prob == 0
