"""TIFF in every layout that cameras, scanners and programs write: read right, or refused in one line."""

import struct
import sys

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from utils import utils_image as util
from utils.utils_error import UserError
from utils.utils_tiff import upright

HEIGHT, WIDTH = 37, 53  # neither divides by a tile, a strip or 8


def noise(channels, bits, seed=0):
    dtype = np.uint8 if bits <= 8 else np.uint16
    img = np.random.default_rng(seed).integers(0, 2**bits, (HEIGHT, WIDTH, channels))
    img[0, 0] = 0  # an alpha of 0 ...
    img[0, 1] = 2**bits - 1  # ... and of the greatest value
    return img.astype(dtype)


def write(path, samples, photometric, **settings):
    planar = settings.get("planarconfig") == "separate"
    contiguous = samples[..., 0] if samples.shape[2] == 1 else samples
    array = np.moveaxis(samples, -1, 0) if planar else contiguous
    tifffile.imwrite(path, array, photometric=photometric, **settings)


def cmyk_to_rgb(cmyk):
    peak = np.iinfo(cmyk.dtype).max
    light = 1 - cmyk / peak
    return (light[..., :3] * light[..., 3:] * peak).round().astype(cmyk.dtype)


def divided(colours, alpha):
    """Colours that were multiplied by alpha; below an alpha of 0 they stay."""
    peak = float(np.iinfo(colours.dtype).max)
    opacity = np.where(alpha == 0, peak, alpha)[..., None]
    return np.floor(colours * peak / opacity + 0.5).clip(0, peak).astype(colours.dtype)


CONTAINERS = {
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (16, 32)},
    "big-endian": {"byteorder": ">"},
    "BigTIFF": {"bigtiff": True},
    "big-endian BigTIFF in tiles": {"byteorder": ">", "bigtiff": True, "tile": (16, 16)},
    "deflate": {"compression": "zlib", "rowsperstrip": 7},
    "deflate, predictor": {"compression": "zlib", "predictor": True, "rowsperstrip": 7},
    "deflate, predictor, big-endian tiles": {
        "compression": "zlib", "predictor": True, "byteorder": ">", "tile": (16, 32)
    },
    "LZMA": {"compression": "lzma"},
}  # fmt: skip
LAYOUTS = {
    "gray": ("minisblack", 1, []),
    "gray, white is 0": ("miniswhite", 1, []),
    "gray with alpha": ("minisblack", 2, ["unassalpha"]),
    "gray with something else": ("minisblack", 2, ["unspecified"]),
    "gray with two more": ("minisblack", 3, ["unspecified", "unassalpha"]),
    "RGB": ("rgb", 3, []),
    "RGB with alpha": ("rgb", 4, ["unassalpha"]),
    "RGB multiplied by alpha": ("rgb", 4, ["assocalpha"]),
    "RGB with something else": ("rgb", 4, ["unspecified"]),
    "RGB with an infrared plane and alpha": ("rgb", 5, ["unspecified", "unassalpha"]),
    "CMYK": ("separated", 4, []),
    "CMYK with alpha": ("separated", 5, ["unassalpha"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [8, 16])
def test_every_layout_in_every_container_gives_the_pixels_written(tmp_path, layout, bits):
    photometric, count, extras = LAYOUTS[layout]
    samples = noise(count, bits)
    colours = samples[..., : {"rgb": 3, "separated": 4}.get(photometric, 1)]
    kind = next((kind for kind in extras if kind != "unspecified"), None)
    alpha = samples[..., colours.shape[2] + extras.index(kind)] if kind else None
    if photometric == "miniswhite":
        expected = np.iinfo(samples.dtype).max - colours
    elif photometric == "separated":
        expected = cmyk_to_rgb(colours)
    else:
        expected = divided(colours, alpha) if kind == "assocalpha" else colours
    path = str(tmp_path / "a.tif")
    for name, container in CONTAINERS.items():
        for planar in ("contig", "separate") if count > 1 else ("contig",):
            settings = {"planarconfig": planar, "extrasamples": extras} if count > 1 else {}
            write(path, samples, photometric, **settings, **container)
            what = f"{name}, {planar}"
            img, found = util.read_image(path, None)
            assert img.dtype == samples.dtype, what
            np.testing.assert_array_equal(img, expected, err_msg=what)
            assert found.bits == bits, what
            if alpha is None:
                assert found.alpha is None, what
            else:
                np.testing.assert_array_equal(found.alpha, alpha, err_msg=what)
            assert util.image_size(path) == (HEIGHT, WIDTH), what
    assert util.imread_uint(path, 3).shape == (HEIGHT, WIDTH, 3)
    assert util.imread_uint(path, 1).shape == (HEIGHT, WIDTH, 1)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "CMYK", "P", "1", "I;16"])
def test_what_pillow_writes_in_any_compression_is_what_it_was(tmp_path, mode, compression):
    image = Image.fromarray(noise(4, 8)).convert("RGB" if mode in ("P", "CMYK") else "RGBA" if "A" in mode else "RGB")
    image = Image.fromarray(noise(1, 16)[..., 0]) if mode == "I;16" else image.convert(mode)
    try:
        image.save(tmp_path / "a.tif", compression=compression)
    except OSError:
        assert compression == "zstd"
        pytest.skip("the libtiff of Pillow 10.1 writes none")
    img, extras = util.read_image(str(tmp_path / "a.tif"))
    if mode == "I;16":
        expected = np.dstack([np.asarray(image)] * 3)
    elif mode == "CMYK":
        expected = cmyk_to_rgb(np.asarray(image))
    else:
        expected = np.asarray(image.convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(img, expected)
    alpha = np.asarray(image.getchannel("A")) if "A" in mode else None
    np.testing.assert_array_equal(extras.alpha, alpha)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 16])
def test_what_opencv_writes_compressed_by_lzw_is_what_it_was(tmp_path, channels, bits):
    samples = noise(channels, bits)
    cv2.imwrite(str(tmp_path / "a.tif"), samples[..., [2, 1, 0, 3][:channels]] if channels > 1 else samples)
    img, extras = util.read_image(str(tmp_path / "a.tif"), None)
    np.testing.assert_array_equal(img, samples[..., :3])
    np.testing.assert_array_equal(extras.alpha, samples[..., 3] if channels == 4 else None)


def small_tiff(bits, samples_per_pixel, photometric, data, width, more=()):
    """A little-endian TIFF of one strip, tag by tag."""
    entries = [
        (256, 3, 1, width), (257, 3, 1, HEIGHT), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, 4096), (277, 3, 1, samples_per_pixel), (278, 3, 1, HEIGHT), (279, 4, 1, len(data)), *more,
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return (b"II*\0\x08\0\0\0" + directory).ljust(4096, b"\0") + data


@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12, 14])
def test_numbers_that_fill_no_bytes_are_spread_over_the_whole_range(tmp_path, bits):
    numbers = noise(1, bits)[..., 0]
    places = (numbers[..., None] >> np.arange(bits)[::-1]) & 1
    data = np.packbits(places.reshape(HEIGHT, -1).astype(np.uint8), axis=1).tobytes()
    (tmp_path / "a.tif").write_bytes(small_tiff(bits, 1, 1, data, WIDTH))
    img = util.imread_uint(str(tmp_path / "a.tif"), 1)[..., 0]
    peak = 255 if bits < 8 else 65535
    assert img.dtype == (np.uint8 if bits < 8 else np.uint16)
    np.testing.assert_array_equal(img, np.floor(numbers / (2**bits - 1) * peak + 0.5))


def test_a_palette_gives_its_colours(tmp_path):
    indices = noise(1, 8)[..., 0]
    palette = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16)
    for name, table in {"16 bits, the standard": palette * 257, "8 bits, an old habit": palette}.items():
        tifffile.imwrite(tmp_path / "a.tif", indices, photometric="palette", colormap=table)
        img = util.imread_uint(str(tmp_path / "a.tif"))
        np.testing.assert_array_equal(img, palette.T[indices].astype(np.uint8), err_msg=name)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["none", "jpeg"])
def test_a_page_is_turned_as_its_orientation_says_whoever_decodes_it(tmp_path, orientation, compression):
    path, samples = str(tmp_path / "a.tif"), noise(4, 16)
    if compression == "none":
        tag = [(274, "H", 1, orientation, True)]
        write(path, samples, "rgb", extrasamples=["unassalpha"], extratags=tag)
    else:
        samples = cv2.GaussianBlur(noise(4, 8), (0, 0), 4)
        Image.fromarray(samples).save(path, compression="jpeg", quality=98, tiffinfo={274: orientation})
    img, extras = util.read_image(path)
    difference = np.dstack([img, extras.alpha]).astype(int) - upright(samples, orientation)
    assert np.abs(difference).mean() <= (0 if compression == "none" else 3)  # JPEG's loss; wrongly turned it is over 9
    assert util.image_size(path) == img.shape[:2]


def test_upright_is_what_pillow_does():
    img = noise(3, 8)
    for orientation in range(1, 9):
        image = Image.fromarray(img)
        image.getexif()[0x0112] = orientation
        np.testing.assert_array_equal(upright(img, orientation), ImageOps.exif_transpose(image), f"{orientation}")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "YCbCr"])
def test_jpeg_in_tiff_is_read(tmp_path, mode):
    smooth = cv2.GaussianBlur(noise(4, 8), (0, 0), 4)
    image = Image.fromarray(smooth[..., : {"RGB": 3, "YCbCr": 3}.get(mode, 4)])
    image = image.convert(mode) if mode in ("L", "CMYK", "YCbCr") else image
    image.save(tmp_path / "a.tif", compression="jpeg", quality=98)
    difference = util.imread_uint(str(tmp_path / "a.tif")).astype(int) - np.asarray(image.convert("RGB"))
    assert np.abs(difference).mean() < 3  # JPEG's loss


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax_is_read(tmp_path, compression):
    image = Image.fromarray(noise(1, 8)[..., 0]).convert("1")
    image.save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(util.imread_uint(str(tmp_path / "a.tif"), 1)[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_three_bands_that_are_called_gray_are_rgb(tmp_path, planar):
    samples = noise(3, 16)
    write(tmp_path / "a.tif", samples, "minisblack", planarconfig=planar, extrasamples=["unspecified"] * 2)
    np.testing.assert_array_equal(util.imread_uint(str(tmp_path / "a.tif")), samples)


def test_three_bands_that_are_called_gray_keep_their_alpha(tmp_path):
    samples = noise(4, 16)
    kinds = ["unspecified", "unspecified", "unassalpha"]
    write(tmp_path / "a.tif", samples, "minisblack", planarconfig="contig", extrasamples=kinds)
    img, extras = util.read_image(str(tmp_path / "a.tif"))
    np.testing.assert_array_equal(np.dstack([img, extras.alpha]), samples)


def test_gray_with_alpha_in_front_of_other_bands_stays_gray(tmp_path):
    samples = noise(4, 16)
    kinds = ["unassalpha", "unspecified", "unspecified"]
    write(tmp_path / "a.tif", samples, "minisblack", planarconfig="contig", extrasamples=kinds)
    img, extras = util.read_image(str(tmp_path / "a.tif"), None)
    np.testing.assert_array_equal(np.dstack([img, extras.alpha]), samples[..., :2])


def test_more_bands_that_are_called_gray_are_refused(tmp_path):
    write(tmp_path / "a.tif", noise(5, 16), "minisblack", planarconfig="contig", extrasamples=["unspecified"] * 4)
    with pytest.raises(UserError, match=r"a\.tif has 5 bands, of which none is said to be a colour"):
        util.imread_uint(str(tmp_path / "a.tif"))


def test_of_several_pages_the_first_is_read(tmp_path):
    pages = np.stack([noise(3, 16), noise(3, 16, seed=1)])
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="rgb")
    np.testing.assert_array_equal(util.imread_uint(str(tmp_path / "a.tif")), pages[0])


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint32", "float16", "float32", "float64"])
def test_other_numbers_are_refused_by_name(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 8, 3), dtype), photometric="rgb")
    with pytest.raises(UserError, match=rf"a\.tif holds {dtype} values: save it with 8 or 16 bits"):
        util.imread_uint(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("kind", ["icclab", "cfa", "logl"])
def test_colours_that_nothing_here_knows_are_refused_by_name(tmp_path, kind):
    shape = (8, 8, 3) if kind == "icclab" else (8, 8)
    tifffile.imwrite(tmp_path / "a.tif", np.ones(shape, np.uint16), photometric=kind)
    with pytest.raises(UserError, match=rf"a\.tif is a TIFF of the kind {kind.upper()}: save it as RGB"):
        util.imread_uint(str(tmp_path / "a.tif"))


def test_a_compression_that_nothing_here_knows_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    data = noise(1, 8).tobytes()
    content = bytearray(small_tiff(8, 1, 1, data, WIDTH))
    at = content.index(struct.pack("<HHI", 259, 3, 1)) + 8
    content[at : at + 2] = struct.pack("<H", 34887)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tif is compressed as LERC: .* python -m pip install imagecodecs"):
        util.imread_uint(str(tmp_path / "a.tif"))


def test_tiles_that_are_left_out_are_black(tmp_path):
    samples = noise(1, 16)
    write(tmp_path / "a.tif", samples, "minisblack", tile=(16, 16))
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        for code in (324, 325):  # TileOffsets, TileByteCounts
            tag = file.pages[0].tags[code]
            size = {3: 2, 4: 4}[int(tag.dtype)]
            content[tag.valueoffset : tag.valueoffset + size] = bytes(size)
    (tmp_path / "a.tif").write_bytes(content)
    samples[:16, :16] = 0
    np.testing.assert_array_equal(util.imread_uint(str(tmp_path / "a.tif"), 1), samples)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_short_or_with_a_hole_is_refused(tmp_path, container):
    path = tmp_path / "a.tif"
    write(path, noise(3, 16), "rgb", **CONTAINERS[container])
    content = path.read_bytes()
    for share in (0.01, 0.3, 0.6, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=r"a\.tif cannot be decoded"):
            util.imread_uint(str(path))


def test_a_tiff_that_unpacks_to_gigabytes_is_refused_by_its_header(tmp_path):
    (tmp_path / "a.tif").write_bytes(small_tiff(8, 1, 1, b"1234", 65535).replace(
        struct.pack("<HHII", 257, 3, 1, HEIGHT), struct.pack("<HHII", 257, 3, 1, 65535)
    ))  # fmt: skip
    for read in (util.imread_uint, util.image_size):
        with pytest.raises(UserError, match=r"a\.tif has 4,295 megapixels, more than the 268"):
            read(str(tmp_path / "a.tif"))
