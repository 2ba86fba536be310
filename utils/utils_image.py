"""Images: finding, reading and writing files, arrays to tensors and back, colour, MATLAB bicubic, PSNR and SSIM.

The names and meanings are those of KAIR (https://github.com/cszn/KAIR, ``utils/utils_image.py``). An image is an array
``(H, W)`` or ``(H, W, C)`` in RGB order: ``uint8`` or ``uint16`` on disk, ``single`` (float32 in [0, 1]) in memory.
An LMDB folder (``X.lmdb``, see utils_lmdb.py) reads like a folder of images everywhere; so does one of raw images
(``.npy``, see utils_npy.py).
"""

import logging
import os
import re
import struct
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from math import ceil, inf, log10, nan, prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from PIL import Image, PngImagePlugin, features
from scipy.io import loadmat, savemat, whosmat
from scipy.sparse import csr_array

from utils import utils_lmdb
from utils.utils_error import UserError, check_regular
from utils.utils_icc import foreign_profile
from utils.utils_lmdb import MAX_FILE
from utils.utils_npy import RAW_SUFFIX, decode_npy, encode_npy, is_npy, map_npy, npy_facts
from utils.utils_png import GRAY, GRAY_ALPHA, encode_png, late_exif, png_chunks, png_kind
from utils.utils_tiff import TiffFacts, full_range, is_tiff, read_tiff, tiff_facts, upright

logger = logging.getLogger(__name__)
Array = NDArray[Any]

# Those that are written, and others that are read as well.
_WRITTEN = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
IMAGE_SUFFIXES = (
    *_WRITTEN,
    *(".jpe", ".jfif", ".dib", ".gif", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    *((".avif",) if "avif" in features.modules and features.check("avif") else ()),  # older ones warn of the question
    *((".jp2", ".j2k") if features.check("jpg_2000") else ()),
)
_PILLOWS = ("WEBP", "GIF", "AVIF")  # what Pillow decodes, and not OpenCV
_PILLOWS_TOO = ("DIB", "JPEG2000", "PPM", "TGA")  # what some versions of OpenCV do not read

FIRST_OF_SEVERAL = "animated or of several pages, of which the first is used"  # see dropped
_CICP_SRGB = bytes([1, 13, 0, 1])  # primaries, transfer, matrix, full range

# A small file can unpack to any size: 16384 x 16384 pixels are read, phones make 200 megapixels.
MAX_PIXELS = 1 << 28
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above that and refuses twice as many
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24  # bytes; Pillow's 1 MiB is less than some colour profiles have
_MAX_MAT = 1 << 30  # bytes that a variable of a MATLAB file may unpack to

# A file that cannot be decoded becomes a UserError here; OpenCV's and Pillow's own lines would only stand before it.
warnings.filterwarnings("ignore", module="PIL")
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)  # OpenCV 4, 5

# ------------------------------------------------------------------------------------------------- files and folders


def get_image_paths(dataroot: str | Sequence[str] | None) -> list[str]:
    """All image files below one folder or several, sorted within each; a single file or LMDB folder stands for itself.

    ``.npy`` files are images in a folder where there are no others: beside photographs they are masks, or features.
    Hidden files and folders, and those that systems make (``@eaDir``, ``__MACOSX``), are left out. Files of other kinds
    and folders that cannot be read are counted in a warning. None gives an empty list.

    Raises UserError for a path that is missing or holds no image.
    """
    return _find_files(dataroot, IMAGE_SUFFIXES, "images", or_else=RAW_SUFFIX)


def get_mask_paths(dataroot: str | Sequence[str] | None) -> list[str]:
    """All edge masks below one folder or several: its ``.mat`` files or, where there are none, ``.npy``, then ``.png``.

    Mask scripts write .mat and .png side by side, the PNG only to look at. Errors are those of :func:`get_image_paths`.
    """
    kinds = (".mat", RAW_SUFFIX, ".png")
    found = _find_files(dataroot, kinds, "edge masks")
    return next(filter(None, ([path for path in found if path.lower().endswith(kind)] for kind in kinds)), [])


def _find_files(
    dataroot: str | Sequence[str] | None, suffixes: tuple[str, ...], what: str, or_else: str | None = None
) -> list[str]:
    if dataroot is None:
        return []
    if not isinstance(dataroot, str):
        return [path for root in dataroot for path in _find_files(root, suffixes, what, or_else)]
    all_suffixes = (*suffixes, or_else) if or_else else suffixes
    kinds = " ".join(suffix[1:] for suffix in all_suffixes)
    wanted = f"put {what} there ({kinds}; sub-folders count) or change the option"
    if os.path.isfile(dataroot):
        if not dataroot.lower().endswith(all_suffixes):
            raise UserError(f"{dataroot} is not one of the {what} that can be read: {wanted}")
        return [dataroot]
    if not os.path.isdir(dataroot):
        raise UserError(f"{dataroot} does not exist: {wanted}")
    if utils_lmdb.is_lmdb(dataroot):
        listed = utils_lmdb.list_lmdb(dataroot.rstrip("/" + os.sep))
        found = [path for path in listed if path.lower().endswith(all_suffixes)]
    else:
        below = walk(dataroot, suffixes, or_else)
        found = below.found
        if below.closed:
            _warn_once(f"{dataroot}: {_counted(len(below.closed), 'folder')} cannot be read ({below.closed[0]})")
        if below.others:
            verb = "was" if sum(below.others.values()) == 1 else "were"
            kinds = f"{', '.join([*below.others][:8])}{', ...' if len(below.others) > 8 else ''}"
            count = _counted(sum(below.others.values()), "file")
            _warn_once(f"{dataroot}: {count} of other kinds {verb} not read ({kinds})")
    if not found:
        raise UserError(f"{dataroot} holds no {what}: {wanted}")
    return found


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


@lru_cache(maxsize=1 << 10)
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


class Below(NamedTuple):
    """What lies below a folder: files that are read, suffixes of the others, a line for each closed sub-folder."""

    found: list[str]
    others: Counter[str]
    closed: list[str]


# Thumbnails, deleted and system files of NAS, Windows, macOS, Linux, which nobody means. Without case.
_SYSTEM = frozenset(
    """@eadir|@tmp|@recycle|@recently-snapshot|#recycle|#snapshot|~snapshot|__macosx|lost+found|thumbs.db|ehthumbs.db
    ehthumbs_vista.db|desktop.ini|picasa.ini|$recycle.bin|recycler|recycled|system volume information
    network trash folder|temporary items|icon\r|__pycache__""".replace("\n    ", "|").split("|")
)
# What this program leaves beside images.
_OWN = ("prepared.json", "manifest.jsonl")


def _is_meant(name: str) -> bool:
    """Whether a file or folder is the user's: hidden ones and those that systems make are not."""
    return not name.startswith(".") and name.lower() not in _SYSTEM


def walk(root: str, suffixes: tuple[str, ...], or_else: str | None = None) -> Below:
    """All files below a folder, sorted; hidden files and folders, and those that systems make, are left out.

    Where none has one of the ``suffixes``, those that end in ``or_else`` are found.
    Links to folders are followed; a folder that is reached again, by whatever link, is not read again.
    """
    found: list[str] = []
    second: list[str] = []
    others: Counter[str] = Counter()
    closed: list[str] = []
    seen: set[str] = set()

    def is_new(folder: str) -> bool:
        place = os.path.realpath(folder)
        return place not in seen and not seen.add(place)  # type: ignore[func-returns-value]

    def note(error: OSError) -> None:
        closed.append(f"{error.filename}: {error.strerror or error}")

    starts = deque([root])  # and links, which come last: a folder is called by its own name where it has one
    while starts:
        start = starts.popleft()
        if not is_new(start):
            continue
        for folder, folders, names in os.walk(start, onerror=note):
            meant = [os.path.join(folder, name) for name in sorted(folders) if _is_meant(name)]
            here = Path(os.path.realpath(folder))
            links = (path for path in meant if os.path.islink(path))
            starts.extend(path for path in links if not here.is_relative_to(os.path.realpath(path)))  # else a loop
            folders[:] = [os.path.basename(path) for path in meant if not os.path.islink(path) and is_new(path)]
            for name in filter(_is_meant, names):
                if name.lower().endswith(suffixes):
                    found.append(os.path.join(folder, name))
                elif or_else and name.lower().endswith(or_else):
                    second.append(os.path.join(folder, name))
                elif name not in _OWN:
                    others[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    if found and or_else and second:
        others[or_else] += len(second)
    return Below(sorted(found or second), others, closed)


def read_file(path: str) -> NDArray[np.uint8]:
    """The bytes of a file, or of an image ``X.lmdb/name.png`` of an LMDB folder; UserError where they cannot be had."""
    place = utils_lmdb.split_path(path)
    if place:
        return np.frombuffer(utils_lmdb.read_lmdb(*place), np.uint8)
    check_regular(path)
    if _is_raw(path):
        _check_pixels(prod(npy_facts(path).shape[:2]), path)
    try:
        if (size := os.path.getsize(path)) > MAX_FILE:
            raise UserError(f"{path} has {size / 2**30:,.0f} GiB, more than the {MAX_FILE >> 30} that images may have")
        return np.fromfile(path, dtype=np.uint8)  # cv2.imread cannot open every path on Windows
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _is_raw(path: str) -> bool:
    """Whether a path is called as a raw image is, and is a file of its own."""
    return os.fspath(path).lower().endswith(RAW_SUFFIX) and not utils_lmdb.split_path(path)


@dataclass(frozen=True)
class ImageExtras:
    """What an image file holds besides gray or RGB, for a result to be saved alike."""

    bits: int = 8  # 8 or 16 a channel
    alpha: Array | None = None  # (H, W), uint8 or uint16; None = opaque
    icc: bytes | None = None  # a colour profile
    cicp: bytes | None = None  # PNG's four numbers that say what its colours are

    def resized(self, scale: float) -> "ImageExtras":
        """With alpha resized by MATLAB's bicubic, clipped, in ``bits`` bits."""
        if self.alpha is None:
            return self
        return replace(self, alpha=single2uint(imresize_np(uint2single(self.alpha), scale), self.bits))

    def fitting(self, channels: int) -> "ImageExtras":
        """Without a profile that is for something else than gray (``channels`` 1) or RGB (3): CMYK's, for one."""
        space = b"GRAY" if channels == 1 else b"RGB "
        icc = self.icc if self.icc and self.icc[16:20] == space else None
        return replace(self, icc=icc, cicp=self.cicp if channels == 3 else None)


def imread_uint(path: str, n_channels: int | None = 3) -> Array:
    """Read an image as ``(H, W, n_channels)``, RGB or gray, uint8 or uint16 as in the file.

    ``n_channels`` 3, 1 or None: as many of these as the file has. Alpha is dropped, palettes and CMYK become RGB, EXIF
    rotation is applied, of an animation or several pages the first is taken. Raises UserError for a file that cannot be
    read, or has more than MAX_PIXELS.
    """
    return decode(read_file(path), path, n_channels)


def open_image(path: str, n_channels: int | None = 3) -> Array:
    """:func:`imread_uint`, to cut a piece from: of a raw image with so many channels only the piece's rows are read.

    Such an array is read-only; its file is closed when the last view of it is gone.
    """
    return _with_channels(map_npy(path), n_channels) if _is_raw(path) else imread_uint(path, n_channels)


def read_image(path: str, n_channels: int | None = 3) -> tuple[Array, ImageExtras]:
    """:func:`imread_uint`, and what else the file holds. Its colours are not multiplied by its alpha."""
    data = read_file(path)
    img, alpha, header = _decode(data, path, n_channels, with_alpha=True)
    if alpha is not None and alpha.min() == np.iinfo(alpha.dtype).max:
        alpha = None
    return img, ImageExtras(8 * img.itemsize, alpha, *_profiles(data, header))


def dropped(data: NDArray[np.uint8], path: str) -> list[str]:
    """What :func:`decode` loses of a file that it can read: transparency, a profile, pages, bits; a phrase each."""
    header = read_header(data, path)
    if header is None:
        return []
    phrases = ["with transparency, which is dropped"] if has_alpha(header) else []
    if _has_several(header):
        phrases.append(FIRST_OF_SEVERAL)
    if isinstance(header, Image.Image) and header.format == "AVIF" and _is_deep_avif(data):
        phrases.append("with 10 or 12 bits a channel, of which 8 are read")
    icc, cicp = _profiles(data, header)
    if cicp not in (None, _CICP_SRGB):
        phrases.append(f"with colours that are not sRGB's (cICP {'-'.join(map(str, cicp))}), but taken for them")
    elif cicp is None and icc and icc[16:20] != b"CMYK" and (name := foreign_profile(icc)):
        phrases.append(f"with colours that are not sRGB's (profile {name}), but taken for them")
    return phrases


def _has_several(header: Image.Image | TiffFacts) -> bool:
    """Whether a file holds more pages or frames than the first; a phone's second picture behind a JPEG is neither."""
    if isinstance(header, TiffFacts):
        return header.has_pages
    try:
        return header.format != "MPO" and getattr(header, "n_frames", 1) > 1
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error):  # cut short behind the first
        return True


def _is_deep_avif(data: NDArray[np.uint8]) -> bool:
    """Whether the first image of an AVIF file says that it has more than 8 bits a channel (av1C, high_bitdepth)."""
    start = data[:65536].tobytes()
    at = start.find(b"av1C")
    return 0 <= at < len(start) - 6 and bool(start[at + 6] & 0x40)


def _profiles(data: NDArray[np.uint8], header: Image.Image | TiffFacts | None) -> tuple[bytes | None, bytes | None]:
    """The ICC profile and the cICP chunk."""
    icc = header.info.get("icc_profile") if isinstance(header, Image.Image) else header and header.icc
    return icc or None, dict(png_chunks(data)).get(b"cICP")


def decode(data: NDArray[np.uint8], path: str, n_channels: int | None = 3) -> Array:
    """:func:`imread_uint` of a file's bytes; ``path`` is for messages."""
    return _decode(data, path, n_channels, with_alpha=False)[0]


def _decode(
    data: NDArray[np.uint8], path: str, n_channels: int | None, with_alpha: bool
) -> tuple[Array, Array | None, Image.Image | TiffFacts | None]:
    """Pixels, alpha (H, W) if it is wanted and there, and what the header says as far as Pillow knows the format."""
    if n_channels not in (1, 3, None):
        raise ValueError(f"n_channels must be 1 or 3, not {n_channels}")
    bad = UserError(f"{path} cannot be decoded: it is damaged, cut short or no image; replace or remove it")
    if not data.size:
        raise UserError(f"{path} is empty (0 bytes); replace or remove it")
    img: Array | None
    alpha: Array | None = None
    try:
        header = read_header(data, path)
        if is_npy(data):
            img = decode_npy(data, path)
        elif isinstance(header, TiffFacts):
            img, alpha = read_tiff(data, path)
        elif header is not None and header.format in _PILLOWS:
            # OpenCV 4 refuses animated WebP and ignores WebP's EXIF rotation
            img = _with_pillow(header)
        else:
            kind = {3: cv2.IMREAD_COLOR, 1: cv2.IMREAD_GRAYSCALE, None: cv2.IMREAD_ANYCOLOR}[n_channels]
            if n_channels is None and png_kind(data)[1] == GRAY_ALPHA:  # to OpenCV a kind of RGB
                kind = cv2.IMREAD_GRAYSCALE
            of_png = header if header is not None and header.format == "PNG" else None
            if of_png:
                kind |= cv2.IMREAD_IGNORE_ORIENTATION  # which may stand behind the pixels, too
            img = cv2.imdecode(data, cv2.IMREAD_ANYDEPTH | kind)
            if img is not None and img.ndim == 3:
                img = cv2.cvtColor(img, cv2.COLOR_BGR2RGB)
            if img is not None and of_png:
                img = upright(img, exif_orientation(of_png))
            if img is not None and 0 < (white := _white(data)) < np.iinfo(img.dtype).max:
                img = full_range(img, white)
            if img is None and header is not None and header.format in _PILLOWS_TOO:
                img = _with_pillow(header)
        if with_alpha and isinstance(header, Image.Image):
            alpha = _alpha(data, header)
    except (cv2.error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise bad from error
    if img is None or _jpeg_is_cut_short(data):
        raise bad
    if img.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path} holds {img.dtype} values: save it with 8 or 16 bits a channel")
    return _with_channels(img, n_channels), alpha, header


def _white(data: NDArray[np.uint8]) -> int:
    """The largest number of the samples in a PNM file or JPEG 2000; 0 for others."""
    start = data[:65536].tobytes()
    # Magic number, width, height, largest value; a comment may stand before each.
    if found := re.match(rb"P[2356](?:(?:\s|#[^\n]*\n)+(\d+)){3}\s", start):
        white = int(found[1])
        return 0 if white < 256 and start[1:2] in b"23" else white  # written out OpenCV does it, up to 255
    if start.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
        codestream = start.find(b"\xff\x4f\xff\x51")  # SOC and SIZ; SIZ's 41st byte: the depth of samples, less one
        if 0 <= codestream < len(start) - 42:
            return int((1 << (start[codestream + 42] & 0x7F) + 1) - 1)
    return 0


def _with_channels(img: Array, n_channels: int | None) -> Array:
    """Gray ``(H, W)``, ``(H, W, 1)`` or RGB to ``(H, W, n_channels)``."""
    channels = 1 if img.ndim == 2 else img.shape[2]
    if n_channels is not None and channels != n_channels:
        img = cv2.cvtColor(img, cv2.COLOR_RGB2GRAY if channels == 3 else cv2.COLOR_GRAY2RGB)
    return img if img.ndim == 3 else img[..., None]


def read_header(data: NDArray[np.uint8], path: str) -> Image.Image | TiffFacts | None:
    """What a file says before its pixels: a TIFF's tags, for other files Pillow's; None where Pillow cannot tell.

    Raises UserError for an image of more than MAX_PIXELS, ValueError for a damaged TIFF.
    """
    if is_tiff(data):
        facts = tiff_facts(data)
        _check_pixels(prod(facts.size), path)
        return facts
    return None if is_npy(data) else _pillow_header(BytesIO(data.tobytes()), path)


def _pillow_header(file: IO[bytes], path: str) -> Image.Image | None:
    try:
        image = Image.open(file)
        if image.format == "PNG" and "exif" not in image.info:  # it may stand behind the pixels, too
            at = file.tell()
            if exif := late_exif(file):
                image.info["exif"] = b"Exif\0\0" + exif
            file.seek(at)
        return image
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))  # it begins with how many there are
        raise _too_many(int(found[0]) if found else MAX_PIXELS, path) from error
    except (OSError, ValueError, SyntaxError):
        return None


def _check_pixels(pixels: int, path: str) -> None:
    if pixels > MAX_PIXELS:
        raise _too_many(pixels, path)


def _too_many(pixels: int, path: str) -> UserError:
    return UserError(
        f"{path} has {pixels / 1e6:,.0f} megapixels, more than the {MAX_PIXELS / 1e6:.0f} that are read: cut it into "
        "pieces, or replace it if it should be smaller"
    )


def _alpha(data: NDArray[np.uint8], header: Image.Image) -> Array | None:
    """Alpha ``(H, W)``, turned as the colours are; None where a file that is no TIFF has none."""
    if not has_alpha(header):
        return None
    bits, colour = png_kind(data)
    if bits != 16 and colour != GRAY:
        return upright(np.asarray(header.convert("RGBA"))[..., 3], exif_orientation(header))
    # Pillow cuts 16 bits to 8, and mistakes which gray stands for transparent where there are 2 or 4 bits.
    raw: Array = np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED))
    if raw.ndim == 3:
        alpha = raw[..., -1]
    else:
        peak = np.iinfo(raw.dtype).max
        transparent = int.from_bytes(dict(png_chunks(data))[b"tRNS"][:2], "big") * peak // (2**bits - 1)
        alpha = np.where(raw == transparent, 0, peak).astype(raw.dtype)
    return upright(alpha, exif_orientation(header))


def has_alpha(header: Image.Image | TiffFacts) -> bool:
    """Whether an image has transparency of any kind."""
    if isinstance(header, TiffFacts):
        return header.has_alpha
    return header.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in header.info


def exif_orientation(header: Image.Image | TiffFacts) -> int:
    """1 (upright) to 8; from 5 on rows are columns."""
    if isinstance(header, TiffFacts):
        return header.orientation
    exif = Image.Exif()
    try:
        exif.load(header.info.get("exif", b""))  # asked of a PNG, getexif would decode it all
        return int(exif.get(0x0112, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OverflowError, ZeroDivisionError, struct.error):
        return 1  # the pixels are there, whatever a camera or program has written beside them


def _with_pillow(image: Image.Image) -> Array:
    if image.mode.startswith("I"):  # gray of 16 bits
        img = np.asarray(image).astype(np.uint16)
    else:
        img = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    return upright(img, exif_orientation(image))


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of what :func:`imread_uint` would return, from the file's header alone where that is enough.

    Raises UserError for a file whose header cannot be read; the rest of it may still be damaged.
    """
    if _is_raw(path):
        height, width, _ = npy_facts(path).shape
        _check_pixels(height * width, path)
        return height, width
    header: Image.Image | TiffFacts | None = None
    try:
        if utils_lmdb.split_path(path):
            header = read_header(read_file(path), path)
        else:
            check_regular(path)
            with open(path, "rb") as file:
                header = _pillow_header(file, path)
            if header is None or header.format == "TIFF":  # versions of Pillow differ in the sizes of rotated ones
                header = read_header(read_file(path), path)
        if isinstance(header, TiffFacts):
            return header.size
        if header is not None:
            width, height = header.size
            return (width, height) if exif_orientation(header) >= 5 else (height, width)
    except (OSError, ValueError, SyntaxError):
        pass
    height, width = imread_uint(path, None).shape[:2]  # raises in its own words, or knows better
    return height, width


def image_kind(path: str) -> tuple[int, np.dtype[Any]]:
    """Channels and dtype of what :func:`imread_uint` of all its channels would return.

    From the header of a PNG, a JPEG or a raw image; others are decoded. Raises UserError where a file cannot be read.
    """
    if _is_raw(path):
        facts = npy_facts(path)
        return facts.shape[2], facts.dtype
    if not utils_lmdb.split_path(path):
        check_regular(path)
        try:
            with open(path, "rb") as file:
                bits, colour = png_kind(np.frombuffer(file.read(64), np.uint8))
                header = _pillow_header(file, path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        is_keyed = header is not None and "transparency" in header.info  # gray is then RGB to some versions of OpenCV
        if bits and header is not None and not (colour == GRAY and is_keyed):
            return 1 if colour in (GRAY, GRAY_ALPHA) else 3, np.dtype(np.uint16 if bits == 16 else np.uint8)
        if header is not None and header.format in ("JPEG", "MPO"):
            return 1 if header.mode == "L" else 3, np.dtype(np.uint8)
    img = imread_uint(path, None)
    return img.shape[2], img.dtype


def _jpeg_is_cut_short(data: Array) -> bool:
    """OpenCV 4 fills the missing part of a JPEG with gray and reports success."""
    encoded = data.tobytes()
    start_of_scan, end_of_image = b"\xff\xda", b"\xff\xd9"
    if not encoded.startswith(b"\xff\xd8") or encoded.rfind(end_of_image) > encoded.rfind(start_of_scan):
        return False
    try:  # phones append videos, whose bytes can look like another scan: ask a decoder that knows
        Image.open(BytesIO(encoded)).load()
    except OSError:
        return True
    return False


def imsave(img: Array, img_path: str, png_level: int | None = None, extras: ImageExtras | None = None) -> None:
    """Write an RGB ``(H, W, 3)`` or gray ``(H, W)``, ``(H, W, 1)`` image, uint8 or uint16, whole or not at all.

    The suffix says how; ``.npy`` is raw.

    Args:
        png_level: how hard PNG is compressed, 0 to 9; None = OpenCV's, fast. 3 saves a tenth for thrice the time.
        extras: alpha (of the image's size and dtype) and colour profile, which a PNG takes along; its ``bits`` do not
            count.

    Raises UserError for a suffix or folder that cannot be written, ValueError for any other dtype.
    """
    if img.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"imsave takes uint8 or uint16, not {img.dtype}; convert with single2uint or tensor2uint")
    suffix = os.path.splitext(img_path)[1].lower()
    if suffix not in (*_WRITTEN, RAW_SUFFIX):
        raise UserError(f"{img_path}: no image format is called {suffix!r}; use one of {' '.join(_WRITTEN)}")
    if img.dtype == np.uint16 and suffix not in (".png", ".tif", ".tiff", RAW_SUFFIX):
        raise UserError(f"{img_path}: {suffix} holds 8 bits a channel; use .png or .tif for 16")
    is_rgb = img.ndim == 3 and img.shape[2] == 3
    if suffix == ".png":
        extras = (extras or ImageExtras()).fitting(3 if is_rgb else 1)
        if extras.alpha is not None:
            img = np.dstack([img, extras.alpha])
        encoded = encode_png(img, png_level, extras.icc, extras.cicp)
    elif suffix == RAW_SUFFIX:
        encoded = encode_npy(img)
    else:
        encoded = cv2.imencode(suffix, cv2.cvtColor(img, cv2.COLOR_RGB2BGR) if is_rgb else img)[1].tobytes()
    write_file(encoded, img_path)


def write_file(content: bytes, path: str) -> None:
    """Write a file whole or not at all. Raises UserError where it cannot be written."""
    unfinished = f"{path}.{os.getpid()}.part"
    try:
        try:
            with open(unfinished, "wb") as file:
                file.write(content)
            os.replace(unfinished, path)
        finally:
            if os.path.exists(unfinished):
                os.remove(unfinished)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def read_mask(path: str) -> NDArray[np.float32]:
    """Read an edge mask ``(H, W)`` of {0, 1}: variable "mat" of a ``.mat`` file, or an image of 0/1 or 0/255.

    Raises UserError for a file that is unreadable or holds other values.
    """
    return as_mask(open_mask(path), path)


def open_mask(path: str) -> Array:
    """The numbers ``(H, W)`` of an edge mask, for :func:`as_mask`; of a raw one only those looked at are read."""
    if path.lower().endswith(".mat"):
        content = read_file(path).tobytes()
        _check_unpacked(content, path)
        try:
            for name, shape, kind in whosmat(BytesIO(content)):
                if name == "mat":
                    _check_pixels(prod(shape), path)
                    if not re.fullmatch(r"u?int\d+|single|double|logical", kind):  # cells nest, sparse ones grow
                        raise _no_mask(path)
            mask: Array = loadmat(BytesIO(content), variable_names=["mat"])["mat"]
        except KeyError as error:
            raise UserError(f'{path} has no variable "mat": write the edge mask under that name') from error
        except (UserError, MemoryError):
            raise
        except Exception as error:  # scipy meets a damaged file with whatever its parser stumbled over
            raise UserError(f"{path} cannot be read as a MATLAB file: make the edge mask again") from error
    else:
        mask = open_image(path, n_channels=1)[..., 0]
    if mask.ndim != 2:
        raise _no_mask(path)
    return mask


def as_mask(mask: Array, path: str) -> NDArray[np.float32]:
    """An edge mask, or a part of it, of 0/1 or 0/255 as {0, 1}. Raises UserError where it has other values."""
    on = mask == (255 if mask.size and mask.max() > 1 else 1)
    if not np.all(on | (mask == 0)):
        raise _no_mask(path)
    return on.astype(np.float32)


def _no_mask(path: str) -> UserError:
    return UserError(f"{path} is not an edge mask: it must be one plane of 0 and 1, or 0 and 255")


def _check_unpacked(content: bytes, path: str) -> None:
    """Raise UserError for a MATLAB file of which a variable unpacks to more than _MAX_MAT bytes."""
    at, compressed, piece = 128, 15, 1 << 14
    order = "<" if content[126:128] == b"IM" else ">"
    while at + 8 <= len(content):
        kind, size = struct.unpack(f"{order}II", content[at : at + 8])
        at += 8
        unpacked, unpacker = 0, zlib.decompressobj()
        # Zlib makes at most 1000 bytes of one.
        for start in range(at, min(at + size, len(content)), piece) if kind == compressed else ():
            try:
                unpacked += len(unpacker.decompress(content[start : start + piece]))
            except zlib.error:
                break  # scipy will say so
            if unpacked > _MAX_MAT:
                raise UserError(
                    f"{path} unpacks to more than {_MAX_MAT / 2**30:.0f} GiB, which no edge mask needs: make it again"
                )
        at += size


def save_mask(mask: Array, path: str) -> None:
    """Write an edge mask ``(H, W)`` of {0, 1} as variable "mat" of a compressed ``.mat`` file, whole or not at all.

    The same mask gives the same bytes: the date that such files carry is left out.
    """
    content = BytesIO()
    savemat(content, {"mat": mask}, do_compression=True)
    header = b"MATLAB 5.0 MAT-file".ljust(116)
    write_file(header + content.getvalue()[len(header) :], path)


# ------------------------------------------------------------------------------------------- numbers, arrays, tensors


def _peak(img: Array) -> float:
    """The value that stands for white: the dtype's maximum, 1 for floats."""
    return float(np.iinfo(img.dtype).max) if np.issubdtype(img.dtype, np.integer) else 1.0


def uint2single(img: Array) -> NDArray[np.float32]:
    """uint8 or uint16 to float32 in [0, 1], same shape."""
    return img.astype(np.float32) / np.float32(_peak(img))


def single2uint(img: Array, bits: int = 8) -> Array:
    """Float in [0, 1] (clipped) to uint8, or uint16 with ``bits=16``, rounded, same shape."""
    levels = img.clip(0, 1) * _PEAK_OF_BITS[bits]
    return levels.round(out=levels).astype(f"uint{bits}")


_PEAK_OF_BITS = {8: 255.0, 16: 65535.0}


def single2tensor3(img: Array) -> torch.Tensor:
    """``(H, W, C)`` array to float32 tensor ``(C, H, W)``, values unchanged."""
    return torch.from_numpy(np.ascontiguousarray(img.transpose(2, 0, 1))).float()


def uint2tensor3(img: Array) -> torch.Tensor:
    """uint8 or uint16 ``(H, W)`` or ``(H, W, C)`` to float32 tensor ``(C, H, W)`` in [0, 1]."""
    return single2tensor3(uint2single(img if img.ndim == 3 else img[..., None]))


def uint2tensor4(img: Array) -> torch.Tensor:
    """uint8 or uint16 ``(H, W)`` or ``(H, W, C)`` to float32 tensor ``(1, C, H, W)`` in [0, 1]."""
    return uint2tensor3(img)[None]


def tensor2uint(img: torch.Tensor, bits: int = 8) -> Array:
    """``(1, C, H, W)``, ``(C, H, W)`` or ``(H, W)`` in [0, 1] (clipped) to uint8, or uint16 with ``bits=16``.

    Gives ``(H, W, C)``, or ``(H, W)`` for one channel; the tensor is left as it is.
    """
    array = img.detach().float().cpu().numpy()
    if array.ndim == 4:
        if len(array) != 1:
            raise ValueError(f"tensor2uint takes one image, not a batch of shape {tuple(array.shape)}")
        array = array[0]
    if array.ndim == 3:
        array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
    return single2uint(array, bits)


def modcrop(img: Array, scale: int) -> Array:
    """Cut ``(H, W[, C])`` at the bottom and right to a multiple of ``scale``."""
    height, width = img.shape[:2]
    return img[: height - height % scale, : width - width % scale]


_AUGMENTATIONS: tuple[Callable[[Array], Array], ...] = (
    lambda img: img,
    lambda img: np.flipud(np.rot90(img)),
    np.flipud,
    lambda img: np.rot90(img, k=3),
    lambda img: np.flipud(np.rot90(img, k=2)),
    np.rot90,
    lambda img: np.rot90(img, k=2),
    lambda img: np.flipud(np.rot90(img, k=3)),
)


def augment_img(img: Array, mode: int = 0) -> Array:
    """One of the eight flips and rotations of ``(H, W)`` or ``(H, W, C)``, a view; 0 is none, 4 mirrors left-right."""
    return _AUGMENTATIONS[mode](img)


# ------------------------------------------------------------------------------------------------------------ colour

# ITU-R BT.601 as in MATLAB's rgb2ycbcr: columns Y, Cb, Cr for RGB in [0, 1], result in [16, 235] and [16, 240]
_RGB_TO_YCBCR = np.array([[65.481, -37.797, 112.0], [128.553, -74.203, -93.786], [24.966, 112.0, -18.214]])
_YCBCR_OFFSET = np.array([16.0, 128.0, 128.0])


def rgb2ycbcr(img: Array, only_y: bool = True) -> Array:
    """RGB ``(H, W, 3)`` to Y ``(H, W)`` or YCbCr ``(H, W, 3)``, MATLAB's definition, in the dtype and range given.

    Integers are rounded, as KAIR and MATLAB do; floats in [0, 1] are not.
    """
    peak = _peak(img)
    columns = slice(0, 1) if only_y else slice(None)
    ycbcr = (img / peak) @ _RGB_TO_YCBCR[:, columns] + _YCBCR_OFFSET[columns]
    ycbcr *= peak / 255
    if peak > 1:
        ycbcr = ycbcr.round()
    return (ycbcr[..., 0] if only_y else ycbcr).astype(img.dtype)


def unrounded_y(img: Array) -> NDArray[np.float64]:
    """Y ``(H, W)`` of a uint8 or uint16 image in the image's range, not rounded: BasicSR's and the SSL paper's Y.

    A gray image is its own Y. For KAIR's Y, which is rounded, use :func:`rgb2ycbcr`.
    """
    if img.ndim == 2 or img.shape[2] == 1:
        return img.reshape(img.shape[:2]).astype(np.float64)
    return rgb2ycbcr(img / _peak(img)) * _peak(img)


# ---------------------------------------------------------------------------------------------------- MATLAB bicubic


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -1/2 (IEEE TASSP 29(6), 1981, Eq. 15)."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, inner, np.where(x <= 2, outer, 0.0))


@lru_cache(maxsize=256)
def _bicubic_matrix(n_in: int, scale: float, antialiasing: bool, dtype: DTypeLike) -> csr_array:
    """The ``(ceil(n_in * scale), n_in)`` matrix that resizes one axis as MATLAB's imresize does."""
    n_out = ceil(n_in * scale)
    stretch = min(scale, 1.0) if antialiasing else 1.0  # the kernel grows when the image shrinks
    width = 4 / stretch
    centre = (np.arange(n_out) + 0.5) / scale - 0.5
    taps = np.floor(centre - width / 2)[:, None] + np.arange(ceil(width) + 2)
    weights = _cubic(stretch * (centre[:, None] - taps))
    weights /= weights.sum(axis=1, keepdims=True)
    # beyond the border the image is mirrored with the edge pixel repeated, as often as it takes
    taps = taps.astype(np.int64) % (2 * n_in)
    taps = np.where(taps < n_in, taps, 2 * n_in - 1 - taps)
    starts = np.arange(n_out + 1) * taps.shape[1]
    return csr_array((weights.astype(dtype).ravel(), taps.ravel(), starts), shape=(n_out, n_in))


def imresize_np(
    img: Array,
    scale: float,
    antialiasing: bool = True,
    window: tuple[int, int, int, int] | None = None,
    as_single: bool = False,
) -> Array:
    """Resize ``(H, W)`` or ``(H, W, C)`` as MATLAB's ``imresize(img, scale, 'bicubic')``, without clipping or rounding.

    The result is ``ceil(size * scale)`` large, float64 for float64, else float32. ``window`` = (top, left, height,
    width) of the result computes only that part, bit for bit the same, and looks only at what that needs.
    ``as_single`` takes uint8 or uint16 as :func:`uint2single` makes them.
    """
    dtype = np.float64 if img.dtype == np.float64 else np.float32
    height, width = img.shape[:2]
    rows = _bicubic_matrix(height, scale, antialiasing, dtype)
    columns = _bicubic_matrix(width, scale, antialiasing, dtype)
    if window is not None:
        top, left, n_rows, n_columns = window
        rows, used_rows = _part(rows, top, n_rows)
        columns, used_columns = _part(columns, left, n_columns)
        img = img[used_rows, used_columns]
        height, width = img.shape[:2]
    if as_single:
        img = uint2single(img)
    resized = rows @ img.reshape(height, -1).astype(dtype, copy=False)
    resized = resized.reshape(len(resized), width, -1).swapaxes(0, 1)  # (W, h, C): the other axis comes first
    resized = columns @ resized.reshape(width, -1)
    resized = resized.reshape(columns.shape[0], rows.shape[0], -1).swapaxes(0, 1)
    return np.ascontiguousarray(resized).reshape(*resized.shape[:2], *img.shape[2:])


def _part(matrix: csr_array, first: int, count: int) -> tuple[csr_array, slice]:
    """So many rows of the matrix, and which of its columns they need; the others are left out."""
    starts = matrix.indptr[first : first + count + 1]  # scipy's own indexing takes twice the time
    entries = slice(starts[0], starts[-1])
    inputs = matrix.indices[entries]
    used = slice(int(inputs.min()), int(inputs.max()) + 1)
    shape = (len(starts) - 1, used.stop - used.start)
    return csr_array((matrix.data[entries], inputs - used.start, starts - starts[0]), shape=shape), used


def imresize(img: torch.Tensor, scale: float, antialiasing: bool = True) -> torch.Tensor:
    """:func:`imresize_np` for a tensor ``(..., H, W)``, on its device and differentiable.

    Blocks of the result are small dense products: the whole matrix would grow with the square of the side.
    """
    rows = [block @ img[..., inputs, :] for block, inputs in _bicubic_blocks(img.shape[-2], scale, antialiasing, img)]
    img = torch.cat(rows, dim=-2)
    columns = _bicubic_blocks(img.shape[-1], scale, antialiasing, img)
    return torch.cat([img[..., inputs] @ block.T for block, inputs in columns], dim=-1)


def _bicubic_blocks(
    n_in: int, scale: float, antialiasing: bool, like: torch.Tensor
) -> Iterator[tuple[torch.Tensor, slice]]:
    """The matrix of :func:`_bicubic_matrix` in blocks of rows, each with the columns that are not zero in it."""
    matrix = _bicubic_matrix(n_in, scale, antialiasing, np.float64)
    for first in range(0, matrix.shape[0], _BLOCK):
        block = matrix[first : first + _BLOCK]
        inputs = slice(int(block.indices.min()), int(block.indices.max()) + 1)
        yield torch.from_numpy(block[:, inputs].toarray()).to(like), inputs


_BLOCK = 512  # rows: a training patch's matrix is one block


# ----------------------------------------------------------------------------------------------------------- metrics


def _comparable(img1: Array, img2: Array, border: int, window: int = 1) -> Iterator[tuple[Array, Array]]:
    """Both images inside the border as float64, in bands of rows: whole they would take many times their memory.

    Bands overlap such that each position of a ``window`` lies in one of them.
    """
    if img1.shape != img2.shape:
        raise ValueError(f"images of different shapes cannot be compared: {img1.shape} and {img2.shape}")
    height, width = img1.shape[:2]
    columns = slice(border, width - border)
    rows = max(1, _BAND_PIXELS // max(1, width))
    for top in range(border, height - border - window + 1, rows):
        band = slice(top, min(top + rows + window - 1, height - border))
        yield img1[band, columns].astype(np.float64), img2[band, columns].astype(np.float64)


_BAND_PIXELS = 2**20


def _data_range(img: Array, data_range: float | None) -> float:
    if data_range is not None:
        return data_range
    return 65535.0 if img.dtype == np.uint16 else 255.0


def calculate_psnr(img1: Array, img2: Array, border: int = 0, data_range: float | None = None) -> float:
    """PSNR in dB of two images ``(H, W[, C])`` without ``border`` pixels at each side; inf where they are equal.

    ``data_range`` None: 65535 for uint16, else 255 (also for floats, as in KAIR). Raises ValueError when shapes differ.
    """
    errors, count = 0.0, 0
    for a, b in _comparable(img1, img2, border):
        errors += float(np.sum((a - b) ** 2))
        count += a.size
    mse = errors / count if count else nan
    return inf if mse == 0 else 20 * log10(_data_range(img1, data_range) / mse**0.5)


def calculate_ssim(img1: Array, img2: Array, border: int = 0, data_range: float | None = None) -> float:
    """SSIM of two images ``(H, W[, C])`` without ``border`` pixels at each side: the mean over the channels.

    Wang et al. 2004: 11 x 11 Gaussian of sigma 1.5, valid positions only. ``data_range`` as in :func:`calculate_psnr`.
    Raises ValueError when shapes differ or fewer than 11 pixels are left.
    """
    if min(img1.shape[:2]) - 2 * border < 11 and img1.shape == img2.shape:
        raise ValueError(f"SSIM needs 11 x 11 pixels inside the border of {border}: got shape {img1.shape}")
    peak = _data_range(img1, data_range)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    window = cv2.getGaussianKernel(11, 1.5)

    def mean(x: Array) -> Array:
        return cv2.sepFilter2D(x, -1, window, window)[5:-5, 5:-5]

    total, count = 0.0, 0
    for a, b in _comparable(img1, img2, border, window=11):
        mu1, mu2 = mean(a), mean(b)
        var1, var2, covariance = mean(a * a) - mu1**2, mean(b * b) - mu2**2, mean(a * b) - mu1 * mu2
        ssim = ((2 * mu1 * mu2 + c1) * (2 * covariance + c2)) / ((mu1**2 + mu2**2 + c1) * (var1 + var2 + c2))
        total += float(ssim.sum())
        count += ssim.size
    return total / count
