"""PNG beyond OpenCV: profiles, gray with alpha, and what a file's chunks say."""

import os
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, GRAY_ALPHA = 0, 4  # colour types


def png_chunks(data: NDArray[np.uint8]) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk before the pixels; nothing for a file that is no PNG."""
    at = len(_SIGNATURE)
    if data[:at].tobytes() != _SIGNATURE:
        return
    while at + 8 <= data.size:
        length, name = struct.unpack(">I4s", data[at : at + 8].tobytes())
        if name == b"IDAT":
            return
        yield name, data[at + 8 : at + 8 + length].tobytes()
        at += 12 + length


def late_exif(file: IO[bytes]) -> bytes:
    """The content of an eXIf chunk near the end of a PNG file, behind the pixels; b"" where there is none."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
    tail = file.read()
    at = tail.rfind(b"eXIf")
    if at < 4:
        return b""
    end = at + 4 + int.from_bytes(tail[at - 4 : at], "big")
    return tail[at + 4 : end] if tail[end : end + 4] == zlib.crc32(tail[at:end]).to_bytes(4, "big") else b""


def png_kind(data: NDArray[np.uint8]) -> tuple[int, int]:
    """Bits a sample and colour type; (0, -1) for a file that is no PNG."""
    header = next(png_chunks(data), (b"", b""))[1]
    return (header[8], header[9]) if len(header) == 13 else (0, -1)


def encode_png(img: Array, level: int | None = None, icc: bytes | None = None, cicp: bytes | None = None) -> bytes:
    """A PNG file of gray ``(H, W)``, gray with alpha, RGB or RGBA ``(H, W, C)``, uint8 or uint16.

    Args:
        level: how hard it is compressed, 0 to 9; None = OpenCV's, fast.
        icc: a colour profile.
        cicp: a cICP chunk, four numbers of ITU-T H.273 that say what the colours are.
    """
    channels = 1 if img.ndim == 2 else img.shape[2]
    if channels == 2:
        png = _encode_gray_alpha(img, 3 if level is None else level)
    else:
        settings = [] if level is None else [cv2.IMWRITE_PNG_COMPRESSION, level]
        turned = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(channels)
        png = cv2.imencode(".png", img if turned is None else cv2.cvtColor(img, turned), settings)[1].tobytes()
    header_end = len(_SIGNATURE) + 12 + 13
    colour = b"" if cicp is None else _chunk(b"cICP", cicp)
    if icc is not None:
        colour += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
    return png[:header_end] + colour + png[header_end:]


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _encode_gray_alpha(img: Array, level: int) -> bytes:
    """OpenCV writes no images of two channels, and Pillow none of them with 16 bits."""
    height, width = img.shape[:2]
    rows = np.ascontiguousarray(img.astype(f">u{img.itemsize}")).view(np.uint8).reshape(height, -1)
    above = np.zeros_like(rows)
    above[1:] = rows[:-1]
    filtered = np.full((height, rows.shape[1] + 1), 2, np.uint8)  # 2: each byte less the one above it
    filtered[:, 1:] = rows - above
    header = struct.pack(">IIBBBBB", width, height, 8 * img.itemsize, GRAY_ALPHA, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(filtered.tobytes(), level))
    return _SIGNATURE + _chunk(b"IHDR", header) + pixels + _chunk(b"IEND", b"")
