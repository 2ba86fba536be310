"""What an image file holds besides RGB or gray: alpha, profile, bits; and files that are none or unpack without end."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from scipy.io import savemat

import main_prepare_data
from data.check import check_dataset
from data.loader import one_by_one
from data.select_dataset import define_Dataset
from main_test import main
from tests.conftest import photograph
from tests.test_main_test import save_checkpoint
from utils import utils_image as util
from utils.utils_error import UserError
from utils.utils_icc import foreign_profile
from utils.utils_option import DatasetOptions, parse
from utils.utils_png import encode_png, png_chunks
from utils.utils_tiff import upright


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def raw_png(samples, bits, colour, *chunks):
    """A PNG written byte by byte; samples (H, W, C)."""
    height, width = samples.shape[:2]
    places = (samples[..., None].astype(int) >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(places.reshape(height, -1).astype(np.uint8), axis=1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + pixels + chunk(b"IEND", b"")


def profile(space=b"RGB ", primaries=((0.515, 0.241, -0.001), (0.292, 0.692, 0.042), (0.157, 0.067, 0.784))):
    """A minimal ICC profile of gamma 2.2; the primaries are Display P3's."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = b"made here\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
    }
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256))
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {name + b"XYZ": xyz(values) for name, values in zip((b"r", b"g", b"b"), primaries, strict=True)}
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    table, data, offset = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + body


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# ------------------------------------------------------------------------------------------------------ reading, saving


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", [4, 6])
@pytest.mark.parametrize("orientation", [1, 6, "6, behind the pixels"])
def test_alpha_is_read_beside_colours_that_stay_and_saved_again(tmp_path, bits, colour, orientation):
    is_late = isinstance(orientation, str)
    orientation = 6 if is_late else orientation
    samples = np.random.default_rng(0).integers(0, 2**bits, (9, 13, 2 if colour == 4 else 4))
    samples[:4, ..., -1] = 0  # below it the colours stay
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "a.png")
    content = raw_png(samples, bits, colour, (b"eXIf", exif.tobytes()[6:]))
    if is_late:
        chunk = content[content.index(b"eXIf") - 4 : content.index(b"IDAT") - 4]
        content = content.replace(chunk, b"")
        content = content[:-12] + chunk + content[-12:]  # before IEND
    (tmp_path / "a.png").write_bytes(content)
    assert util.image_size(path) == upright(samples, orientation).shape[:2]
    for _ in range(2):
        img, extras = util.read_image(path, None)
        np.testing.assert_array_equal(np.dstack([img, extras.alpha]), upright(samples, orientation))
        assert (extras.bits, img.dtype) == (bits, extras.alpha.dtype)
        path = str(tmp_path / "saved.png")
        util.imsave(img, path, extras=extras)


@pytest.mark.parametrize(
    "exif", [b"garbage", b"MM\0*\0\0", b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\x1a\0\0\0" + bytes(12)]
)
def test_exif_that_makes_no_sense_does_not_cost_the_image(tmp_path, exif):
    samples = np.random.default_rng(0).integers(0, 256, (9, 13, 3))
    path = tmp_path / "a.png"
    path.write_bytes(raw_png(samples, 8, 2, (b"eXIf", exif)))
    np.testing.assert_array_equal(util.imread_uint(str(path)), samples)
    assert util.image_size(str(path)) == (9, 13)
    rgba = np.dstack([samples, samples[..., 0]])
    path.write_bytes(raw_png(rgba, 8, 6, (b"eXIf", exif)))
    np.testing.assert_array_equal(util.read_image(str(path))[1].alpha, samples[..., 0])
    Image.fromarray(samples.astype(np.uint8)).save(tmp_path / "a.webp", lossless=True, exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(util.imread_uint(str(tmp_path / "a.webp")), samples)


@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_one_colour_that_stands_for_transparent_is_alpha_0(tmp_path, bits, colour):
    samples = np.random.default_rng(0).integers(0, 2**bits, (9, 13, 3 if colour else 1))
    key = samples[3, 4]
    (tmp_path / "a.png").write_bytes(raw_png(samples, bits, colour, (b"tRNS", key.astype(">u2").tobytes())))
    alpha = util.read_image(str(tmp_path / "a.png"))[1].alpha
    np.testing.assert_array_equal(alpha == 0, (samples == key).all(-1))
    assert alpha.max() == (255 if bits <= 8 else 65535)


def test_a_palettes_and_webps_alpha_are_read_and_an_opaque_one_is_none(tmp_path):
    palette = Image.fromarray(photograph(9, 13)).quantize(8)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 50, 100]))
    rgba = np.dstack([photograph(9, 13), photograph(9, 13, seed=1, channels=1)])
    Image.fromarray(rgba).save(tmp_path / "w.webp", lossless=True, exact=True)
    expected = {"p.png": np.array([0, 50, 100, *[255] * 5])[np.asarray(palette)], "w.webp": rgba[..., 3]}
    for name, alpha in expected.items():
        np.testing.assert_array_equal(util.read_image(str(tmp_path / name))[1].alpha, alpha)
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    assert util.read_image(str(tmp_path / "opaque.png"))[1].alpha is None


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_profile_is_read_from_each_format_however_long(tmp_path, suffix):
    icc = profile() + np.random.default_rng(0).bytes(150_000)  # in JPEG that takes three segments
    Image.fromarray(photograph(9, 13)).save(tmp_path / f"a.{suffix}", icc_profile=icc)
    assert util.read_image(str(tmp_path / f"a.{suffix}"))[1].icc == icc


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_takes_a_profile_along_and_other_programs_read_it(tmp_path, dtype, channels):
    img = photograph(9, 13, channels=channels).astype(dtype)
    if dtype == np.uint16:
        img *= 257
    icc = profile(b"GRAY" if channels < 3 else b"RGB ")
    (tmp_path / "a.png").write_bytes(encode_png(img, icc=icc, cicp=bytes([12, 13, 0, 1])))
    with Image.open(tmp_path / "a.png") as image:
        image.load()  # checks every checksum
        assert image.info["icc_profile"] == icc
        if dtype == np.uint8:
            np.testing.assert_array_equal(np.asarray(image).reshape(img.shape), img)
    data = np.fromfile(tmp_path / "a.png", np.uint8)
    assert [name for name, _ in png_chunks(data)][:3] == [b"IHDR", b"cICP", b"iCCP"]  # the order that PNG asks for
    found, extras = util.read_image(str(tmp_path / "a.png"), None)
    expected = img if channels in (1, 3) else img[..., :-1]
    np.testing.assert_array_equal(found, expected)
    assert extras.icc == icc


def test_only_a_profile_that_fits_is_kept():
    rgb, gray = util.ImageExtras(icc=profile(), cicp=b"\x0c\r\0\1"), util.ImageExtras(icc=profile(b"GRAY"))
    assert rgb.fitting(3) == rgb
    assert gray.fitting(1) == gray
    assert rgb.fitting(1) == gray.fitting(3) == util.ImageExtras()
    assert util.ImageExtras(icc=profile(b"CMYK")).fitting(3).icc is None


def test_profiles_are_told_from_srgb_by_what_they_mean():
    srgb_primaries = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
    assert foreign_profile(SRGB) is None
    assert foreign_profile(profile()) == "made here"
    assert foreign_profile(profile(primaries=srgb_primaries)) == "made here"  # gamma 2.2 is not sRGB's curve
    assert foreign_profile(b"no profile") == "unknown"


# ------------------------------------------------------------------------------------------------------------ restoring


@pytest.fixture
def odd(tmp_path):
    """A folder of images with extras, 20 x 24."""
    folder = tmp_path / "odd"
    folder.mkdir()
    img, alpha = photograph(20, 24), np.zeros((20, 24, 1), np.uint8)
    alpha[6:14, 8:] = 200
    Image.fromarray(np.dstack([img, alpha])).save(folder / "alpha.png", icc_profile=profile())
    deep = np.dstack([img, alpha]).astype(np.uint16) * 257
    (folder / "deep.png").write_bytes(encode_png(deep))
    (folder / "gray.png").write_bytes(encode_png(deep[..., 2:]))
    Image.fromarray(img).convert("CMYK").save(folder / "cmyk.jpg", icc_profile=profile(b"CMYK"))
    return folder


@pytest.mark.parametrize("n_channels", [3, 1])
def test_alpha_profile_and_bits_of_the_input_are_kept(tmp_path, odd, n_channels, capsys):
    model = save_checkpoint(tmp_path / "net.pth", n_channels=n_channels)
    main(["--model_path", f"m={model}", "--input", str(odd), "--output", str(tmp_path / "out")])
    saved = {}
    for name in ("alpha", "deep", "gray", "cmyk"):
        img, saved[name] = util.read_image(str(tmp_path / "out" / "m" / "odd" / f"{name}.png"), None)
        assert img.shape == (80, 96, n_channels), name
    assert {name: extras.bits for name, extras in saved.items()} == {"alpha": 8, "deep": 16, "gray": 16, "cmyk": 8}
    alpha = util.read_image(str(odd / "alpha.png"))[1].alpha
    larger = util.imresize_np(util.uint2single(alpha), 4)
    np.testing.assert_array_equal(saved["alpha"].alpha, util.single2uint(larger))
    np.testing.assert_array_equal(saved["deep"].alpha, util.single2uint(larger, 16))
    assert saved["cmyk"].alpha is None
    assert saved["alpha"].icc == (profile() if n_channels == 3 else None)
    lost = 1 if n_channels == 3 else 2  # CMYK's is for neither
    assert f"{lost} of 4 images have a colour profile that is not for {'RGB' if n_channels == 3 else 'gray'}" in (
        capsys.readouterr().out
    )


def test_with_ground_truth_alpha_is_that_of_L_and_metrics_stay_on_rgb(tmp_path, odd):
    model = save_checkpoint(tmp_path / "net.pth")
    L = tmp_path / "L"
    L.mkdir()
    for path in odd.iterdir():
        Image.fromarray(photograph(5, 6)).save(L / f"{path.stem}.png")
    main(["--model_path", f"m={model}", "--gt", str(odd), "--output", str(tmp_path / "made")])
    main(["--model_path", f"m={model}", "--gt", str(odd), "--input", str(L), "--output", str(tmp_path / "given")])
    made = util.read_image(str(tmp_path / "made/m/odd/alpha.png"))[1].alpha
    alpha = util.uint2single(util.read_image(str(odd / "alpha.png"))[1].alpha)
    reduced = util.single2uint(util.imresize_np(alpha, 0.25))
    np.testing.assert_array_equal(made, util.single2uint(util.imresize_np(util.uint2single(reduced), 4)))
    assert util.read_image(str(tmp_path / "given/m/L/alpha.png"))[1].alpha is None
    for path in list(odd.iterdir()):
        img = util.imread_uint(str(path))
        path.unlink()
        util.imsave(img, str(path.with_suffix(".png")))
    main(["--model_path", f"m={model}", "--gt", str(odd), "--output", str(tmp_path / "plain")])
    tables = [(tmp_path / out / "results.csv").read_text() for out in ("made", "plain")]
    assert len(tables[0].splitlines()) == 9
    assert tables[0] == tables[1]


def test_validation_takes_items_with_extras(odd):
    dataset = define_Dataset(DatasetOptions(dataset_type="l", dataroot_L=str(odd), phase="test", n_channels=3))
    assert dataset[0]["L_extras"].alpha.shape == (20, 24)
    batch = next(iter(one_by_one(dataset, 0, 1)))
    assert batch["L"].shape == (1, 3, 20, 24)
    assert torch.equal(batch["L"][0], dataset[0]["L"])


# --------------------------------------------------------------------------------------------------------- what is said


def test_training_and_preparation_say_once_how_many_images_lose_what(tmp_path, odd, caplog, capsys):
    Image.fromarray(photograph(20, 24)).save(odd / "srgb.png", icc_profile=SRGB)
    opt = DatasetOptions(dataset_type="blindsr", dataroot_H=str(odd), H_size=16, scale=4, n_channels=3)
    check_dataset(opt)
    colours = "with colours that are not sRGB's (profile made here), but taken for them"
    expected = ["2 of the train images with transparency, which is dropped"]
    expected += [f"1 of the train images with transparency, which is dropped and {colours}"]
    assert sorted(caplog.messages) == sorted(expected)
    assert (
        main_prepare_data.main(["modcrop", "--multiple", "4", "--input", str(odd), "--output", str(tmp_path / "o")])
        == 0
    )
    assert "2 images with transparency, which is dropped\n" in capsys.readouterr().err
    main_prepare_data.main(["check", "--H", str(odd)])
    out = capsys.readouterr().out
    assert "3 with transparency, which is dropped" in out
    assert f"1 {colours}" in out
    assert "1 CMYK, made RGB" in out


# ---------------------------------------------------------------------------------------------- what must not be opened


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are Unix's")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    for name in ("a.png", "a.mat", "a.tif", "a.json"):
        os.mkfifo(tmp_path / name)
    os.symlink("/dev/zero", tmp_path / "zero.png")
    calls = [(util.imread_uint, "a.png"), (util.imread_uint, "zero.png"), (util.read_mask, "a.mat")]
    calls += [(util.image_size, "a.png"), (util.image_size, "a.tif"), (parse, "a.json")]
    for read, name in calls:
        with pytest.raises(UserError, match=rf"{name} is no file but a pipe, a socket or a device"):
            read(str(tmp_path / name))


def test_a_png_that_unpacks_to_gigabytes_is_refused_by_its_header(tmp_path):
    content = bytearray(raw_png(np.zeros((4, 4, 1), int), 8, 0))
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    for read in (util.imread_uint, util.image_size):
        with pytest.raises(UserError, match=r"bomb\.png has 3,600 megapixels, more than the 268 that are read: cut it"):
            read(str(tmp_path / "bomb.png"))


def test_a_mask_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(util, "MAX_PIXELS", 99)
    savemat(tmp_path / "large.mat", {"mat": np.zeros((10, 10))}, do_compression=True)
    with pytest.raises(UserError, match=r"large\.mat has 0 megapixels, more than"):
        util.read_mask(str(tmp_path / "large.mat"))
    monkeypatch.setattr(util, "_MAX_MAT", 1 << 20)
    endless = zlib.compress(bytes(1 << 21))  # says nothing of its size
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x100) + b"IM"
    (tmp_path / "bomb.mat").write_bytes(header + struct.pack("<II", 15, len(endless)) + endless)
    with pytest.raises(UserError, match=r"bomb\.mat unpacks to more than"):
        util.read_mask(str(tmp_path / "bomb.mat"))
