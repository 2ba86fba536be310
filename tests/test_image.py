"""Reading, writing, colour, MATLAB bicubic and metrics: golden values of KAIR and BasicSR, and twins on made images."""

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from tests.conftest import photograph
from tests.golden_numbers import figures, golden
from utils import utils_image as util
from utils.utils_error import UserError


def smooth_image(height=40, width=52, seed=0):
    """A made uint8 RGB photograph: smooth noise over the full range."""
    noise = np.random.default_rng(seed).random((height, width, 3), np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 2)
    return cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------- files and folders


def test_images_are_found_recursively_sorted_in_any_case(tmp_path):
    names = ["b.PNG", "a.jpg", "sub/deep/c.TiF", "sub/d.webp", "e.jpeg", "f.bmp"]
    for name in [*names, "notes.txt", "._a.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert util.get_image_paths(str(tmp_path)) == sorted(str(tmp_path / name) for name in names)
    assert util.get_image_paths([str(tmp_path / "b.PNG"), str(tmp_path / "sub")])[0] == str(tmp_path / "b.PNG")
    assert util.get_image_paths(None) == []


@pytest.mark.parametrize("state", ["missing", "empty", "another file"])
def test_a_folder_without_images_is_named_with_its_remedy(tmp_path, state):
    path = tmp_path / "no images.here"
    if state == "empty":
        path.mkdir()
    elif state == "another file":
        path.touch()
    with pytest.raises(UserError, match=r"no images\.here.* put images there \(png") as error:
        util.get_image_paths(str(path))
    assert "\n" not in str(error.value)


def test_gray_alpha_palette_and_16_bit_files_come_as_rgb_and_as_gray(tmp_path):
    rgb = smooth_image()
    rgba = np.dstack([rgb, np.full(rgb.shape[:2], 7, np.uint8)])
    gray = rgb[..., 0]
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    Image.fromarray(gray).save(tmp_path / "gray.png")
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(tmp_path / "palette.png")
    deep = rgb.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    cv2.imwrite(str(tmp_path / "deep_alpha.png"), np.dstack([deep[..., ::-1], deep[..., 0]]))
    cv2.imwrite(str(tmp_path / "deep_gray.png"), deep[..., 0])
    expected = {
        "alpha": rgb,
        "gray": np.dstack([gray] * 3),
        "palette": np.array(palette.convert("RGB")),
        "deep": deep,
        "deep_alpha": deep,
        "deep_gray": np.dstack([deep[..., 0]] * 3),
    }
    for name, img in expected.items():
        path = str(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(util.imread_uint(path), img, err_msg=name)
        one = util.imread_uint(path, n_channels=1)
        assert one.shape == (*img.shape[:2], 1), name
        assert one.dtype == img.dtype, name
    np.testing.assert_array_equal(util.imread_uint(str(tmp_path / "deep_gray.png"), 1)[..., 0], deep[..., 0])


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(smooth_image(40, 52)).save(tmp_path / "turned.jpg", exif=exif)
    assert util.imread_uint(str(tmp_path / "turned.jpg")).shape == (52, 40, 3)


@pytest.mark.parametrize("white", [100, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_pnm_is_read_in_its_own_range(tmp_path, white, channels):
    image = (smooth_image()[..., :channels] / 255 * white).round().astype(">u2" if white > 255 else "u1")
    header = b"P%d\n# 9 9 9\n52 40\n%d\n" % (5 if channels == 1 else 6, white)
    (tmp_path / "a.pnm").write_bytes(header + image.tobytes())
    read = util.imread_uint(str(tmp_path / "a.pnm"), channels)
    assert read.itemsize == image.itemsize
    peak = np.iinfo(read.dtype).max
    np.testing.assert_allclose(read / peak, image / white, rtol=0, atol=0.5 / peak + 1e-9)  # rounding


@pytest.mark.parametrize(
    ("white", "values", "expected"), [(100, "0 25 50 100", [0, 63, 127, 255]), (4, "0 1 2 4", [0, 63, 127, 255])]
)
def test_pnm_that_is_written_out_is_read_in_its_own_range(tmp_path, white, values, expected):
    (tmp_path / "a.pgm").write_text(f"P2 4 1 {white}\n{values}\n")
    read = util.imread_uint(str(tmp_path / "a.pgm"), 1)[0, :, 0]
    np.testing.assert_allclose(read, expected, atol=1)  # OpenCV and Pillow round in different ways


def test_jpeg_2000_of_12_bits_is_read_in_its_own_range(tmp_path, monkeypatch):
    """Levels 0, 1365, 2730 and 4095 in 12 bits, without loss."""
    content = (
        "/0//UQApAAAAAAAEAAAABAAAAAAAAAAAAAAABAAAAAQAAAAAAAAAAAABCwEB/1IADAAAAAEAAAQEAAH/XAAEQGD/kAAKAAAAAAArAAH/k9/g"
        "aBFqSmCoBbBrpDM8o5WInCzHWAnCzHWAnFYb/9k="
    )
    (tmp_path / "a.j2k").write_bytes(base64.b64decode(content))
    for missing in (False, True):  # where OpenCV was built without JPEG 2000 Pillow reads it, with 4 empty bits
        if missing:
            monkeypatch.setattr("cv2.imdecode", lambda *_: None)
        levels = util.imread_uint(str(tmp_path / "a.j2k"), 1)[..., 0]
        assert levels.dtype == np.uint16
        np.testing.assert_allclose(levels, [[0, 21845, 43690, 65535]] * 4, rtol=0, atol=15 * missing)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".jpg", ".webp"])
def test_what_is_saved_is_read_back(tmp_path, suffix):
    path, img = str(tmp_path / f"größe 图{suffix}"), smooth_image()
    util.imsave(img, path)
    # JPEG halves the resolution of the colours: 4 of 255 on average; with red and blue exchanged it would be 50
    error = np.abs(util.imread_uint(path).astype(int) - img).mean()
    assert error <= (8 if suffix in (".jpg", ".webp") else 0)
    assert [p.name for p in tmp_path.iterdir()] == [Path(path).name]
    util.imsave(img[..., 0], path)
    assert util.imread_uint(path, 1).shape == (*img.shape[:2], 1)


def test_16_bits_are_saved_in_png_and_refused_for_jpg(tmp_path):
    deep = smooth_image().astype(np.uint16) * 257
    util.imsave(deep, str(tmp_path / "deep.png"))
    np.testing.assert_array_equal(util.imread_uint(str(tmp_path / "deep.png")), deep)
    for name in ("deep.jpg", "deep.xyz", "no_folder/deep.png"):
        with pytest.raises(UserError, match=name):
            util.imsave(deep, str(tmp_path / name))
    with pytest.raises(ValueError, match="float32"):
        util.imsave(util.uint2single(deep), str(tmp_path / "float.png"))
    assert [p.name for p in tmp_path.iterdir()] == ["deep.png"]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".jpg", ".webp"])
def test_an_empty_or_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    encoded = cv2.imencode(suffix, smooth_image(200, 150))[1].tobytes()
    for share in (0, 0.05, 0.5, 0.98):
        path.write_bytes(encoded[: int(share * len(encoded))])
        with pytest.raises(UserError, match=rf"broken\{suffix}"):
            util.imread_uint(str(path))
    with pytest.raises(UserError, match=r"missing\.png"):
        util.imread_uint(str(tmp_path / "missing.png"))


def test_a_truncated_jpeg_is_told_from_one_with_a_thumbnail_or_an_appended_video(tmp_path):
    whole = cv2.imencode(".jpg", smooth_image(200, 150))[1].tobytes()
    thumbnail = cv2.imencode(".jpg", smooth_image(8, 8))[1].tobytes()
    header = b"\xff\xd8\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    judge = {
        "thumbnail": (header + whole[2:], False),
        "thumbnail, truncated": (header + whole[2:-300], True),
        "video that looks like a scan": (whole + b"\xff\xda video", False),
    }
    for name, (encoded, is_short) in judge.items():
        assert util._jpeg_is_cut_short(np.frombuffer(encoded, np.uint8)) == is_short, name


def test_float_tiff_is_refused_by_name(tmp_path):
    cv2.imwrite(str(tmp_path / "float.tif"), smooth_image().astype(np.float32) / 255)
    # Older versions of tifffile say of the logarithms that OpenCV writes that they are whole numbers.
    with pytest.raises(UserError, match=r"float\.tif holds (float32|int16)"):
        util.imread_uint(str(tmp_path / "float.tif"))


def test_masks_are_read_from_mat_and_png(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (9, 13))
    savemat(tmp_path / "m.mat", {"mat": mask}, do_compression=True)
    util.imsave((mask * 255).astype(np.uint8), str(tmp_path / "m255.png"))
    util.imsave(mask.astype(np.uint8), str(tmp_path / "m1.png"))
    for name in ("m.mat", "m255.png", "m1.png"):
        read = util.read_mask(str(tmp_path / name))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, mask)
    assert util.get_mask_paths(str(tmp_path)) == [str(tmp_path / "m.mat")]
    savemat(tmp_path / "empty.mat", {"mat": np.zeros((4, 5), int)})
    assert util.read_mask(str(tmp_path / "empty.mat")).sum() == 0


def test_what_is_no_mask_is_named(tmp_path):
    savemat(tmp_path / "other.mat", {"mask": np.zeros((3, 3))})
    savemat(tmp_path / "three.mat", {"mat": np.arange(9).reshape(3, 3)})
    savemat(tmp_path / "whole.mat", {"mat": np.zeros((30, 30), int)}, do_compression=True)
    (tmp_path / "short.mat").write_bytes((tmp_path / "whole.mat").read_bytes()[:-12])
    (tmp_path / "zero.mat").touch()
    util.imsave(smooth_image(), str(tmp_path / "photo.png"))
    for name in ("other.mat", "three.mat", "short.mat", "zero.mat", "missing.mat", "photo.png"):
        with pytest.raises(UserError, match=name):
            util.read_mask(str(tmp_path / name))


# --------------------------------------------------------------------------------------------------------- raw images


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(9, 13, 3), (9, 13, 1), (9, 13)])
def test_raw_images_are_read_as_they_were_saved(tmp_path, shape, dtype):
    img = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    ours, numpys = str(tmp_path / "ours.npy"), str(tmp_path / "numpys.npy")
    util.imsave(img, ours)
    np.save(numpys, img)
    expected = img if img.ndim == 3 else img[..., None]
    np.testing.assert_array_equal(np.load(ours, allow_pickle=False), expected)
    for path in (ours, numpys):
        read, extras = util.read_image(path, None)
        for array in (util.imread_uint(path, None), util.open_image(path, None), read):
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, expected)
        assert extras == util.ImageExtras(8 * np.dtype(dtype).itemsize)
        assert util.image_size(path) == (9, 13)
        assert util.image_kind(path) == (expected.shape[2], dtype)
        assert util.open_image(path, 3).shape == (9, 13, 3)
        assert util.open_image(path, 1).shape == (9, 13, 1)


class Bomb:
    """An object that does harm where it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("was run",))


def npy(shape, descr="|u1", order=False, size=100, version=b"\x01\x00"):
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + bytes(size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"no image", "damaged"),
        (npy((10, 10))[:50], "damaged"),
        (npy((10, 10), version=b"\x02\x00"), "damaged"),
        (npy("[" * 100), "damaged"),
        (npy("(10,"), "damaged"),
        (npy((10, 10), descr="?!"), "damaged"),
        (npy((10, 10), size=99), "cut short"),
        (npy((10, 10), size=101), "pixels"),
        (npy((1 << 62, 1 << 62, 3)), "cut short"),
        (npy((-10, -10)), "shape"),
        (npy((0, 10), size=0), "shape"),
        (npy((100,)), "shape"),
        (npy((5, 5, 4)), "shape"),
        (npy((2, 5, 5, 2)), "shape"),
        (npy((10, 10), order=True), "Fortran"),
        (npy((5, 5), descr="<f4"), "float32"),
        (npy((10, 10), descr="|i1"), "int8"),
        (npy((5, 5), descr=">u2", size=50), ">u2"),
        (npy((5, 5), descr="|O", size=200), "object"),
    ],
)
def test_what_is_no_raw_image_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    for read in (util.imread_uint, util.open_image, util.read_image, util.image_size, util.image_kind, util.read_mask):
        with pytest.raises(UserError, match=f"x.npy .*{message}") as error:
            read(str(path))
        assert "\n" not in str(error.value)
    if content:
        with pytest.raises(UserError, match=r"x\.npy"):
            util.decode(np.frombuffer(content, np.uint8), str(path))


def test_objects_in_a_raw_image_are_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[Bomb()]], object), allow_pickle=True)
    for read in (util.imread_uint, util.open_image):
        with pytest.raises(UserError, match="object values"):
            read(str(tmp_path / "x.npy"))


def test_more_pixels_than_are_read_are_refused_of_raw_images_too(tmp_path, monkeypatch):
    util.imsave(smooth_image(), str(tmp_path / "x.npy"))
    monkeypatch.setattr(util, "MAX_PIXELS", 2000)
    for read in (util.imread_uint, util.image_size):
        with pytest.raises(UserError, match="megapixels"):
            read(str(tmp_path / "x.npy"))


def test_raw_images_count_only_where_there_are_no_others(tmp_path, caplog):
    for name in ("H/a.npy", "H/sub/b.NPY", "photos/a.png", "photos/a.npy", "photos/sub/features.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    raw = [str(tmp_path / "H/a.npy"), str(tmp_path / "H/sub/b.NPY")]
    photos, photo = str(tmp_path / "photos"), str(tmp_path / "photos/a.png")
    assert util.get_image_paths(str(tmp_path / "H")) == raw
    assert not caplog.messages
    assert util.get_image_paths(photos) == [photo]
    assert caplog.messages == [f"{photos}: 2 files of other kinds were not read (.npy)"]
    assert util.get_image_paths([raw[0], photos]) == [raw[0], photo]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts this process's open files as Linux shows them")
def test_raw_images_do_not_stay_open_and_are_not_written_to(tmp_path):
    path = str(tmp_path / "x.npy")
    util.imsave(smooth_image(), path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    pieces = [util.uint2single(util.open_image(path)[2:7, 3:9]) for _ in range(50)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    pieces[0][:] = 0
    with pytest.raises(ValueError, match="read-only"):
        util.open_image(path)[:] = 0


def test_raw_masks_are_read_and_stand_behind_mat(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (9, 13), np.uint8)
    for name, values in (("m1", mask), ("m255", 255 * mask), ("three", mask + mask[::-1])):
        util.imsave(values, str(tmp_path / f"{name}.npy"))
    for name in ("m1", "m255"):
        np.testing.assert_array_equal(util.read_mask(str(tmp_path / f"{name}.npy")), mask)
    with pytest.raises(UserError, match=r"three\.npy is not an edge mask"):
        util.read_mask(str(tmp_path / "three.npy"))
    (tmp_path / "m1.png").touch()
    assert len(util.get_mask_paths(str(tmp_path))) == 3
    (tmp_path / "m1.mat").touch()
    assert util.get_mask_paths(str(tmp_path)) == [str(tmp_path / "m1.mat")]


# ------------------------------------------------------------------------------------------- numbers, arrays, tensors


@pytest.mark.parametrize("bits", [8, 16])
def test_every_level_survives_the_way_to_a_tensor_and_back(bits):
    levels = np.arange(2**bits).astype(f"uint{bits}").reshape(2 ** (bits // 2), -1)
    for img in (levels, np.dstack([levels, levels.T, levels[::-1]])):
        tensor = util.uint2tensor4(img)
        assert tensor.shape == (1, 3 if img.ndim == 3 else 1, *img.shape[:2])
        assert (tensor.min(), tensor.max()) == (0, 1)
        np.testing.assert_array_equal(util.tensor2uint(tensor, bits), img)
        np.testing.assert_array_equal(util.single2uint(util.uint2single(img), bits), img)


def test_tensor2uint_clips_rounds_and_leaves_the_tensor_alone():
    tensor = torch.tensor([[[[-1.0, 0.3 / 255, 0.7 / 255, 2.0]]]], requires_grad=True)
    np.testing.assert_array_equal(util.tensor2uint(tensor), [[0, 0, 1, 255]])
    assert tensor.min() == -1
    with pytest.raises(ValueError, match="batch"):
        util.tensor2uint(torch.zeros(2, 3, 4, 4))


def test_modcrop_cuts_bottom_and_right():
    img = np.arange(7 * 9 * 3).reshape(7, 9, 3)
    np.testing.assert_array_equal(util.modcrop(img, 4), img[:4, :8])
    assert util.modcrop(img[..., 0], 1).shape == (7, 9)


def test_the_eight_augmentations_are_all_different_and_treat_gray_as_rgb():
    img = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    seen = {(view := util.augment_img(img, mode)).shape + tuple(view.ravel()) for mode in range(8)}
    assert len(seen) == 8
    for mode in range(8):
        np.testing.assert_array_equal(util.augment_img(img[..., 1], mode), util.augment_img(img, mode)[..., 1])
    np.testing.assert_array_equal(util.augment_img(img, 4), img[:, ::-1])


@pytest.mark.parametrize("mode", range(8))
def test_augmentations_equal_kairs(mode):
    z = golden("image/kair_blindsr.npz")
    np.testing.assert_array_equal(util.augment_img(z["augment_input"], mode), z[f"augment_mode{mode}"])


# ------------------------------------------------------------------------------------------------------------ colour


def test_white_and_black_have_matlabs_luma_in_every_dtype():
    for peak, dtype, tolerance in ((255, np.uint8, 0), (65535, np.uint16, 0), (1.0, np.float64, 1e-12)):
        img = np.array([[[0, 0, 0], [peak] * 3]]).astype(dtype)
        expected = np.array([16, 235]) * peak / 255  # exact for integers; rounding errors only for floats
        np.testing.assert_allclose(util.rgb2ycbcr(img)[0], expected, atol=tolerance)
        chroma = util.rgb2ycbcr(img, only_y=False)[0, :, 1:]
        np.testing.assert_allclose(chroma, 128 * peak / 255, atol=tolerance)
    np.testing.assert_allclose(util.unrounded_y(np.full((1, 1, 3), 100, np.uint8)), 16 + 219 * 100 / 255)
    np.testing.assert_array_equal(util.unrounded_y(np.full((2, 2, 1), 9, np.uint8)), np.full((2, 2), 9.0))


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_colour_equals_kairs(kind):
    z = golden("image/colour.npz")
    img = z[f"rgb_{kind}"]
    # uint8 exactly; float32: two units in the last place below 1
    for only_y, name in ((True, "rgb2ycbcr_y"), (False, "rgb2ycbcr")):
        ours = util.rgb2ycbcr(img, only_y)
        assert ours.dtype == img.dtype
        np.testing.assert_allclose(ours.astype(float), z[f"kair/{name}/{kind}"], atol=1.2e-7)


def test_luma_that_is_not_rounded_equals_basicsrs():
    z = golden("image/colour.npz")
    # the reference computes in float32, whose step near 235 is 1.5e-5
    y = util.unrounded_y(z["rgb_uint8"])
    np.testing.assert_allclose(y, z["basicsr/to_y_channel_of_bgr_uint8"][..., 0], atol=4e-5)


# ---------------------------------------------------------------------------------------------------- MATLAB bicubic


@pytest.mark.parametrize("crop", ["even48x60", "odd37x45", "odd51x33"])
def test_bicubic_equals_kairs_in_numpy_and_torch(crop):
    z = golden("image/imresize.npz")
    img = util.uint2single(z[f"input/{crop}"])
    names = [name for name in z.files if name.startswith(f"output/{crop}/")]
    assert len(names) >= 5
    for name in names:
        factor = name.split("/")[2].removeprefix("x").removesuffix("_no_antialias")
        is_fraction, antialiasing = factor.startswith("1_"), "_no_antialias" not in name
        scale = 1 / int(factor[2:]) if is_fraction else int(factor)
        # float32 sums of up to 18 taps in another order
        np.testing.assert_allclose(util.imresize_np(img, scale, antialiasing), z[name], atol=1e-6, err_msg=name)
        tensor = util.imresize(util.single2tensor3(img), scale, antialiasing)
        np.testing.assert_allclose(tensor.permute(1, 2, 0), z[name], atol=1e-6, err_msg=name)


def test_bicubic_of_gray_equals_kairs():
    z = golden("image/imresize.npz")
    for scale, name in ((0.5, "x1_2"), (2, "x2")):
        np.testing.assert_allclose(util.imresize_np(z["input_gray"], scale), z[f"output_gray/{name}"], atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "antialiasing", "recorded"),
    [
        (1 / 2, True, [0.512116084, 0.171230698, 0.67934967, 0.47675614]),
        (1 / 3, True, [0.517588198, 0.164346056, 0.290576234, 0.336136001]),
        (1 / 4, True, [0.512116084, 0.161097621, 0.386612228, 0.538979911]),
        (2, True, [0.512116084, 0.179173357, 0.700052198, 0.697751052]),
        (3, True, [0.512116084, 0.179263348, 0.278544353, 0.480852093]),
        (1 / 2, False, [0.512116084, 0.177966492, 0.714613991, 0.476087622]),
    ],
)
def test_bicubic_of_a_made_image_has_the_values_recorded_when_the_golden_ones_were_met(scale, antialiasing, recorded):
    img = util.uint2single(photograph(44, 52, 3)).astype(np.float64)
    # recorded with nine digits
    assert figures(util.imresize_np(img, scale, antialiasing)) == pytest.approx(recorded, rel=1e-8)


def test_bicubic_of_a_step_has_matlabs_values():
    # imresize([0 0 0 0 1 1 1 1], 0.5) by hand: half the cubic at 0.25, 0.75, 1.25, 1.75 is 111, 29, -9, -3 / 256
    step = np.repeat([0.0, 1.0], 4)[None].repeat(8, axis=0)
    row = util.imresize_np(step, 0.5)[0]
    np.testing.assert_allclose(row, [-3 / 256, 17 / 256, 239 / 256, 259 / 256], atol=1e-12)


@pytest.mark.parametrize(("scale", "shape"), [(0.25, (10, 13)), (1 / 3, (13, 17)), (2, (78, 102)), (1.5, (59, 77))])
def test_bicubic_keeps_constants_and_rounds_sizes_up(scale, shape):
    resized = util.imresize_np(np.full((39, 51, 2), 0.7), scale)
    assert resized.shape == (*shape, 2)
    np.testing.assert_allclose(resized, 0.7, rtol=1e-14)  # weights are normalised: float64 rounding is left


def test_bicubic_of_a_window_is_bit_for_bit_that_part_of_the_whole():
    img = util.uint2single(smooth_image(61, 83))
    whole = util.imresize_np(img, 1 / 3)
    np.testing.assert_array_equal(util.imresize_np(img, 1 / 3, window=(5, 7, 12, 11)), whole[5:17, 7:18])


def test_bicubic_works_on_images_smaller_than_its_kernel():
    assert util.imresize_np(np.ones((3, 2), np.float32), 0.25).tolist() == [[1.0]]


def test_bicubic_of_tensors_is_differentiable_and_agrees_with_numpy():
    img = np.random.default_rng(0).random((17, 23, 3))
    tensor = torch.from_numpy(img).permute(2, 0, 1)[None].requires_grad_()
    resized = util.imresize(tensor, 0.5)
    # the same weights in float64, another order of summation
    np.testing.assert_allclose(resized[0].detach().permute(1, 2, 0), util.imresize_np(img, 0.5), atol=1e-14)
    resized.sum().backward()
    assert tensor.grad.sum().item() == pytest.approx(resized.numel())  # each output pixel hands out a weight of 1


def test_a_tensor_is_resized_in_blocks_with_the_same_numbers_and_gradient(monkeypatch):
    image = torch.rand(2, 3, 23, 31, dtype=torch.float64, requires_grad=True)
    for scale in (4, 3, 1.7, 0.5, 1 / 3):
        whole = util.imresize(image, scale)
        (expected,) = torch.autograd.grad(whole.square().sum(), image)
        with monkeypatch.context() as patch:
            patch.setattr(util, "_BLOCK", 5)
            blocks = util.imresize(image, scale)
        (gradient,) = torch.autograd.grad(blocks.square().sum(), image)
        # Float64 sums of the same numbers, in another order.
        torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_resizing_a_long_tensor_builds_no_matrix_of_its_whole_length(monkeypatch):
    sizes = []
    toarray = util.csr_array.toarray
    monkeypatch.setattr(
        util.csr_array, "toarray", lambda self: sizes.append(self.shape[0] * self.shape[1]) or toarray(self)
    )
    assert util.imresize(torch.zeros(1, 1, 20000, 2), 4).shape == (1, 1, 80000, 8)
    assert max(sizes) < 512 * 512


# ----------------------------------------------------------------------------------------------------------- metrics


def test_psnr_of_a_constant_difference_is_the_formula():
    a = np.full((20, 30, 3), 100, np.uint8)
    b = a + 5
    assert util.calculate_psnr(a, b) == pytest.approx(20 * np.log10(255 / 5))
    deep_a, deep_b = a.astype(np.uint16) * 257, b.astype(np.uint16) * 257
    assert util.calculate_psnr(deep_a, deep_b) == pytest.approx(20 * np.log10(255 / 5))
    assert util.calculate_psnr(a / 255, b / 255, data_range=1.0) == pytest.approx(20 * np.log10(255 / 5))
    b[:4] = 0
    assert util.calculate_psnr(a, b, border=4) == pytest.approx(20 * np.log10(255 / 5))
    assert util.calculate_psnr(a, a) == float("inf")


def test_ssim_of_equal_images_is_one_and_of_constants_the_formula():
    a = smooth_image()
    assert util.calculate_ssim(a, a, border=4) == pytest.approx(1)
    x, y, c1 = 100.0, 120.0, (0.01 * 255) ** 2
    flat = np.full((20, 20), 1.0)
    expected = (2 * x * y + c1) / (x * x + y * y + c1)
    # rounding in the variances (1e-12 of 1e4) against c2 = 58
    assert util.calculate_ssim(x * flat, y * flat) == pytest.approx(expected, abs=1e-9)


def test_metrics_of_a_made_pair_have_the_values_recorded_when_the_golden_ones_were_met():
    row, column, channel = np.mgrid[:40, :52, :3]
    a = ((row * 5 + column * 3 + channel * 40) % 256).astype(np.uint8)
    b = ((row * 5 + column * 3 + channel * 40 + (row * column) % 23) % 256).astype(np.uint8)
    recorded = [
        (13.390755074269073, 0.5958715961580601),
        (18.626110894138566, 0.43135468025602514),
        (18.628575328654154, 0.43085863441652045),
    ]
    pairs = [(a, b), (util.rgb2ycbcr(a), util.rgb2ycbcr(b)), (util.unrounded_y(a), util.unrounded_y(b))]
    for (first, second), (psnr, ssim) in zip(pairs, recorded, strict=True):
        # float64 throughout
        assert util.calculate_psnr(first, second, border=4) == pytest.approx(psnr, abs=1e-9)
        assert util.calculate_ssim(first, second, border=4) == pytest.approx(ssim, abs=1e-9)


def test_metrics_of_16_bit_images_are_those_of_the_same_8_bit_images():
    a, b = smooth_image(seed=0), smooth_image(seed=1)
    deep_a, deep_b = (img.astype(np.uint16) * 257 for img in (a, b))
    assert util.calculate_ssim(deep_a, deep_b) == pytest.approx(util.calculate_ssim(a, b), abs=1e-12)
    assert util.unrounded_y(deep_a) == pytest.approx(util.unrounded_y(a) * 257)


def test_metrics_refuse_what_cannot_be_compared():
    a = np.zeros((12, 12, 3), np.uint8)
    for metric in (util.calculate_psnr, util.calculate_ssim):
        with pytest.raises(ValueError, match="different shapes"):
            metric(a, a[:-1])
    with pytest.raises(ValueError, match="11 x 11"):
        util.calculate_ssim(a, a, border=1)


@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("name", ["baby", "bird", "butterfly", "head", "woman"])
def test_metrics_equal_kairs_and_basicsrs(name, border):
    reference = golden("image/metrics.json")[name]
    E, H = golden("image/metrics.npz")[f"sr/{name}"], golden("ssl/images_set5.npz")[name]
    forms = {
        "kair_{}_rgb": ((E, H), 1e-9),
        "kair_{}_y": ((util.rgb2ycbcr(E), util.rgb2ycbcr(H)), 1e-9),
        # the reference computes Y in float32
        "basicsr_{}_y": ((util.unrounded_y(E), util.unrounded_y(H)), 1e-6),
    }
    for form, (pair, tolerance) in forms.items():
        for metric, function in (("psnr", util.calculate_psnr), ("ssim", util.calculate_ssim)):
            expected = reference[f"{form.format(metric)}_border{border}"]
            assert function(*pair, border=border) == pytest.approx(expected, abs=tolerance), form
