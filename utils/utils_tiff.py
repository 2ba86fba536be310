"""TIFF, whatever its layout: what to do is decided from the tags, before pixels are read.

OpenCV reads planes of 16 bits as if they were interleaved and multiplies colours by alpha; Pillow cuts 16 bits with
alpha to 8. So tifffile reads the tags here, libtiff (through Pillow) or zlib unpacks the bytes, and NumPy makes pixels
of them. What is compressed as an image itself (JPEG in TIFF and the like) is 8 bits deep and left to Pillow.
"""

import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from tifffile import TiffFile, TiffPage

from utils.utils_error import UserError

Array = NDArray[Any]

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage becomes a UserError here

_NONE, _DEFLATE = 1, (8, 32946)
_BYTEWISE = (_NONE, *_DEFLATE, 5, 32773, 34925, 50000)  # also LZW, PackBits, LZMA, Zstandard: they know no pixels
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8  # PhotometricInterpretation
_COLOURS = {_MIN_IS_WHITE: 1, _MIN_IS_BLACK: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4}  # samples a pixel
_ASSOCIATED, _UNASSOCIATED = 1, 2  # ExtraSamples: alpha that the colours were multiplied by, or not


_TOGETHER = 1 << 25  # bytes to unpack at a time


class TiffImage(NamedTuple):
    """The first page of a TIFF, turned upright."""

    colours: Array  # (H, W, 1) or (H, W, 3), uint8 or uint16, not multiplied by alpha
    alpha: Array | None  # (H, W) of the same dtype


class TiffFacts(NamedTuple):
    """What the tags of the first page say."""

    size: tuple[int, int]  # height and width, turned upright
    orientation: int  # as in EXIF, 1 = upright
    has_alpha: bool
    is_cmyk: bool
    has_pages: bool  # more than this one
    icc: bytes | None


def is_tiff(data: NDArray[np.uint8]) -> bool:
    """Whether a file's bytes begin as those of a TIFF or BigTIFF."""
    return data[:4].tobytes() in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@contextmanager
def _damage() -> Iterator[None]:
    """Whatever a damaged file's tags make the code stumble over becomes ValueError."""
    try:
        yield
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:
        raise ValueError(str(error)) from error


@_damage()
def tiff_facts(data: NDArray[np.uint8]) -> TiffFacts:
    """What the tags say; no pixels are read. Raises ValueError or OSError for a damaged file."""
    page = _first_page(data)
    orientation = _orientation(page)
    size = (page.imagelength, page.imagewidth)
    icc = _value(page, 34675)
    return TiffFacts(
        size[::-1] if orientation >= 5 else size,
        orientation,
        _alpha(page) is not None,
        page.photometric == _CMYK,
        page.parent.pages.is_multipage,
        bytes(icc) if isinstance(icc, bytes) and icc else None,
    )


@_damage()
def read_tiff(data: NDArray[np.uint8], path: str) -> TiffImage:
    """The first page; ``path`` is for messages.

    Raises UserError for samples that are no unsigned integers of 1 to 16 bits and for a compression or colour space
    that nothing here can read, ValueError or OSError for a damaged file.
    """
    page = _first_page(data)
    bits, photometric = page.bitspersample, page.photometric
    if isinstance(bits, int) and (page.sampleformat != 1 or bits > 16) and photometric != _YCBCR:
        raise UserError(f"{path} holds {page.dtype or f'{bits}-bit'} values: save it with 8 or 16 bits a channel")
    if not isinstance(bits, int) or page.imagedepth > 1:
        raise UserError(f"{path} is a TIFF of an unusual kind: save it as RGB or gray with 8 or 16 bits a channel")
    if page.compression in _BYTEWISE and page.fillorder == 1 and photometric in _COLOURS:
        samples = _samples(page, data)
    elif bits <= 8 and (image := _with_libraries(page, data)):
        return image
    elif photometric in _COLOURS:
        samples = _with_imagecodecs(page, path)
    else:
        kind = getattr(photometric, "name", photometric)
        raise UserError(f"{path} is a TIFF of the kind {kind}: save it as RGB or gray")
    return _image(page, samples, path)


def _first_page(data: NDArray[np.uint8]) -> TiffPage:
    page = TiffFile(BytesIO(data.tobytes())).pages[0]
    assert isinstance(page, TiffPage)
    if min(page.imagelength, page.imagewidth, page.samplesperpixel) < 1:
        raise ValueError("no pixels")
    return page


def _value(page: TiffPage, code: int) -> Any:
    tag = page.tags.get(code)
    return None if tag is None else tag.value


def _orientation(page: TiffPage) -> int:
    value = _value(page, 274)
    return int(value) if value in range(1, 9) else 1


def _photometric(page: TiffPage) -> int:
    """Which colours the samples are. GDAL calls three bands gray with two more, unless it is told that they are RGB."""
    place = _alpha(page)
    is_rgb = page.photometric == _MIN_IS_BLACK and _bands(page) == 3 and (place is None or place[0] == 3)
    return _RGB if is_rgb else int(page.photometric)


def _bands(page: TiffPage) -> int:
    """Samples of a pixel that are not said to be alpha."""
    return int(page.samplesperpixel) - sum(int(kind) in (_ASSOCIATED, _UNASSOCIATED) for kind in page.extrasamples)


def _alpha(page: TiffPage) -> tuple[int, int] | None:
    """The place of alpha among a pixel's samples, and of which kind it is; None without alpha."""
    colours = _COLOURS.get(page.photometric, 3)
    extras = page.samplesperpixel - colours
    kinds = [int(kind) for kind in page.extrasamples]
    if not kinds and extras == 1:
        kinds = [_UNASSOCIATED]  # OpenCV writes RGBA without saying what the fourth is
    for place, kind in enumerate(kinds[:extras] if extras > 0 else ()):
        if kind in (_ASSOCIATED, _UNASSOCIATED):
            return colours + place, kind
    return None


# ------------------------------------------------------------------------------------------------ from bytes to samples


def _samples(page: TiffPage, data: NDArray[np.uint8]) -> Array:
    """All samples ``(H, W, S)``, unsigned, in the range of the file's bits. Raises ValueError for a damaged file."""
    height, width, count = page.imagelength, page.imagewidth, page.samplesperpixel
    planes, depth = (1, count) if page.planarconfig == 1 else (count, 1)
    segment_height = page.tilelength if page.is_tiled else min(page.rowsperstrip, height)
    segment_width = page.tilewidth if page.is_tiled else width
    if min(segment_height, segment_width) < 1 or segment_height * segment_width > 4 * max(height * width, 1 << 20):
        raise ValueError("tiles without pixels, or of many more than the image")
    rows, columns = range(0, height, segment_height), range(0, width, segment_width)
    if page.predictor not in (1, 2) or (page.predictor == 2 and page.bitspersample not in (8, 16)):
        raise ValueError(f"predictor {page.predictor} of {page.bitspersample} bits")
    if height * width * count > 1 << 31:
        raise ValueError("more samples than fit into memory")
    places = [(plane, top, left) for plane in range(planes) for top in rows for left in columns]
    encoded = _segments(page, data, len(places))
    row_bytes = (segment_width * depth * page.bitspersample + 7) // 8
    out = np.zeros((height, width, count), np.uint8 if page.bitspersample <= 8 else np.uint16)
    # Only strips end where the image does; tiles are whole.
    heights = [segment_height if page.is_tiled else min(segment_height, height - top) for _, top, _ in places]
    for segment_rows in sorted(set(heights)):
        chosen = [i for i, rows_there in enumerate(heights) if rows_there == segment_rows and encoded[i]]
        together = max(1, _TOGETHER // (segment_rows * row_bytes))
        for batch in (chosen[i : i + together] for i in range(0, len(chosen), together)):
            unpacked = _unpacked([encoded[i] for i in batch], page.compression, segment_rows, row_bytes)
            for i, raw in zip(batch, unpacked, strict=True):
                plane, top, left = places[i]
                block = _unsigned(raw, page.bitspersample, segment_width * depth, page.parent.byteorder)
                block = block.reshape(segment_rows, segment_width, depth)
                if page.predictor == 2:
                    block = block.cumsum(axis=1, dtype=block.dtype)
                target = out[top : top + segment_rows, left : left + segment_width, plane : plane + depth]
                target[:] = block[: target.shape[0], : target.shape[1]]
    return out


def _segments(page: TiffPage, data: NDArray[np.uint8], count: int) -> list[bytes]:
    """The encoded strips or tiles, empty where the file leaves out black ones, as GDAL's do.

    Raises ValueError where some are not there, or not whole.
    """
    if len(page.dataoffsets) < count or len(page.databytecounts) < count:
        raise ValueError("strips are missing")
    segments = []
    for offset, length in zip(page.dataoffsets[:count], page.databytecounts[:count], strict=True):
        if (offset < 8 or length < 1 or offset + length > data.size) and (offset, length) != (0, 0):
            raise ValueError("cut short")
        segments.append(data[offset : offset + length].tobytes())
    return segments


def _unpacked(segments: Sequence[bytes], compression: int, rows: int, row_bytes: int) -> list[Array]:
    """Each segment's bytes ``(rows, row_bytes)``."""
    size = rows * row_bytes
    if compression in (_NONE, *_DEFLATE):
        if compression != _NONE:
            segments = [zlib.decompressobj().decompress(segment, size) for segment in segments]
        if min(map(len, segments)) < size:
            raise ValueError("cut short")
        return [np.frombuffer(segment, np.uint8, size).reshape(rows, row_bytes) for segment in segments]
    return list(_unpacked_by_libtiff(segments, compression, rows, row_bytes))


def _unpacked_by_libtiff(segments: Sequence[bytes], compression: int, rows: int, row_bytes: int) -> Array:
    """``(segments, rows, row_bytes)``: the segments as strips of a gray 8-bit TIFF, which Pillow reads right."""
    count = len(segments)
    entries, first = 9, 8
    offsets_at = first + 2 + 12 * entries + 4
    lengths_at = offsets_at + 4 * count
    lengths = np.array([len(segment) for segment in segments], "<u4")
    offsets = (lengths_at + 4 * count + lengths.cumsum() - lengths).astype("<u4")
    one = count == 1  # a single value stands in its entry
    fields = [
        (256, 4, 1, row_bytes),  # ImageWidth
        (257, 4, 1, rows * count),  # ImageLength
        (258, 3, 1, 8),  # BitsPerSample
        (259, 3, 1, int(compression)),
        (262, 3, 1, _MIN_IS_BLACK),
        (273, 4, count, int(offsets[0]) if one else offsets_at),  # StripOffsets
        (277, 3, 1, 1),  # SamplesPerPixel
        (278, 4, 1, rows),  # RowsPerStrip
        (279, 4, count, int(lengths[0]) if one else lengths_at),  # StripByteCounts
    ]
    directory = struct.pack("<H", entries) + b"".join(struct.pack("<HHII", *field) for field in fields) + bytes(4)
    header = b"II*\0" + struct.pack("<I", first)
    file = b"".join([header, directory, offsets.tobytes(), lengths.tobytes(), *segments])
    return np.asarray(TiffImageFile(BytesIO(file))).reshape(count, rows, row_bytes)


def _unsigned(raw: Array, bits: int, count: int, byteorder: str) -> Array:
    """``count`` numbers a row from ``(rows, row_bytes)``, the first in the highest bits."""
    if bits == 8:
        return raw
    if bits == 16:
        return raw.view(f"{byteorder}u2").astype(np.uint16)
    dtype = np.uint8 if bits < 8 else np.uint16
    places = np.unpackbits(raw, axis=1)[:, : count * bits].reshape(len(raw), count, bits)
    numbers = np.zeros((len(raw), count), dtype)
    for place in range(bits):
        numbers = (numbers << 1) | places[:, :, place]
    return numbers


def _with_imagecodecs(page: TiffPage, path: str) -> Array:
    """All samples ``(H, W, S)`` of a TIFF with another compression."""
    try:
        import imagecodecs  # noqa: F401
    except ImportError as error:
        name = getattr(page.compression, "name", page.compression)
        raise UserError(
            f"{path} is compressed as {name}: save it without compression, or python -m pip install imagecodecs"
        ) from error
    samples = page.asarray(squeeze=False, maxworkers=1)[..., 0, :, :, :]  # (planes, H, W, samples)
    return np.concatenate(list(samples), axis=-1)


def _with_libraries(page: TiffPage, data: NDArray[np.uint8]) -> TiffImage | None:
    """A TIFF of 8 bits or fewer by Pillow or, where that does not know it, by OpenCV; None for neither."""
    try:
        image = ImageOps.exif_transpose(Image.open(BytesIO(data.tobytes())))
        if _alpha(page) is None:
            return TiffImage(np.asarray(image.convert("RGB" if image.mode not in ("1", "L") else "L")), None)
        rgba = np.asarray(image.convert("RGBA"))
        return TiffImage(rgba[..., :3], rgba[..., 3])
    except (UnidentifiedImageError, ValueError):  # ValueError: no conversion from LAB
        if page.photometric not in (_YCBCR, _LAB) or page.bitspersample != 8 or _alpha(page) is not None:
            return None
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        return None if decoded is None else TiffImage(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), None)


# ---------------------------------------------------------------------------------------------- from samples to colours


def _image(page: TiffPage, samples: Array, path: str) -> TiffImage:
    photometric, white = _photometric(page), 2**page.bitspersample - 1
    count = _COLOURS[photometric]
    if photometric == _MIN_IS_BLACK and _bands(page) > 3:
        raise UserError(
            f"{path} has {_bands(page)} bands, of which none is said to be a colour: save it as RGB or gray"
        )
    if samples.shape[2] < count:
        raise ValueError(f"{samples.shape[2]} samples a pixel")
    alpha, place = None, _alpha(page)
    if place is not None:
        alpha = full_range(samples[..., place[0]], white)
    colours = samples[..., :count]
    colours = _looked_up(colours[..., 0], page.colormap) if photometric == _PALETTE else full_range(colours, white)
    peak = np.iinfo(colours.dtype).max
    if photometric == _MIN_IS_WHITE:
        colours = peak - colours
    elif photometric == _CMYK:
        if _value(page, 332) not in (None, 1):
            raise UserError(f"{path} holds inks other than CMYK: save it as RGB or gray")
        light = peak - colours.astype(np.uint64)
        colours = ((light[..., :3] * light[..., 3:] + peak // 2) // peak).astype(colours.dtype)
    if alpha is not None and place is not None and place[1] == _ASSOCIATED and alpha.dtype == colours.dtype:
        # below alpha 0 the colours are as they are in the file
        opacity = np.where(alpha == 0, peak, alpha).astype(np.uint64)[..., None]
        divided = (colours.astype(np.uint64) * peak + opacity // 2) // opacity
        colours = divided.clip(0, peak).astype(colours.dtype)
    orientation = _orientation(page)
    return TiffImage(upright(colours, orientation), None if alpha is None else upright(alpha, orientation))


def full_range(samples: Array, white: int) -> Array:
    """0 to ``white`` to the whole range of uint8 or uint16; what lies above is white."""
    peak = np.iinfo(samples.dtype).max
    if white == peak:
        return samples
    levels = (np.arange(white + 1, dtype=np.uint64) * peak + white // 2) // white
    return levels.astype(samples.dtype)[np.minimum(samples, white)]


def _looked_up(indices: Array, colormap: Array | None) -> Array:
    """Colours (H, W, 3), uint8."""
    if colormap is None or indices.max() >= colormap.shape[1]:
        raise ValueError("no palette")
    deep = colormap.max() > 255  # some programs write 8 bits where the standard has 16
    return (colormap >> 8 if deep else colormap).astype(np.uint8).T[indices]


def upright(img: Array, orientation: int) -> Array:
    """Turn ``(H, W[, C])`` as an EXIF orientation from 1 to 8 says."""
    if orientation >= 5:
        img = img.swapaxes(0, 1)
    if orientation in (2, 3, 7, 6):
        img = img[:, ::-1]
    if orientation in (3, 4, 7, 8):
        img = img[::-1]
    return np.ascontiguousarray(img)
