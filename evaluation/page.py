"""``report.html``: the results of a test in one file that needs no network, with images to compare by eye.

The page itself is ``report.html`` beside this file: plain HTML, CSS and JavaScript; here its data are made.
"""

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.metrics import Measured
from utils.utils_image import uint2tensor4
from utils.utils_metric_table import METRICS
from utils.utils_run import to_json, write_atomically
from utils.utils_ssl import edge_mask

Picture = NDArray[np.uint8]

_TEMPLATE = Path(__file__).with_name("report.html")
_PLACE = "REPORT_DATA"  # in the template
_LOSSLESS = 1536 * 1024  # bytes; a picture that takes more is embedded with losses
_PAGE = 128 * 2**20  # bytes of pictures; browsers get slow with more
_SIDE = 16383  # px, WebP's limit
_LARGEST = 65500  # px, JPEG's, and about what browsers show
_THUMBNAIL = 160
_EDGES = (0, 190, 255)


def _uri(image: Image.Image, kind: str, **settings: Any) -> str:
    data = io.BytesIO()
    image.save(data, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def _picture(image: Picture) -> tuple[str, bool]:
    """A picture as a data URI, and whether it is lossless: it is unless it would be very large."""
    picture = Image.fromarray(image)
    if max(image.shape[:2]) > _SIDE:
        return _uri(picture, "jpeg", quality=92, subsampling=0), False
    uri = _uri(picture, "webp", lossless=True, quality=30, method=2)
    return (uri, True) if len(uri) <= _LOSSLESS else (_uri(picture, "webp", quality=93, method=2), False)


def _thumbnail(image: Picture) -> str:
    factor = min(1, _THUMBNAIL / max(image.shape[:2]))
    size = tuple(max(1, round(side * factor)) for side in image.shape[1::-1])
    return _uri(Image.fromarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA)), "webp", quality=80)


def _overlay(levels: NDArray[np.uint8], colours: NDArray[np.uint8], opacity: NDArray[np.uint8]) -> str:
    """A picture (H, W) of indices into up to 256 colours (RGB) and opacities, as a PNG to lie over another picture."""
    image = Image.fromarray(levels, "P")
    image.putpalette(colours.tobytes())
    bits = 1 if len(colours) == 2 else 8
    # Values at scattered pixels do not repeat but in runs of clear ones: a search for more takes 50 times as long.
    return _uri(image, "png", transparency=opacity.tobytes(), bits=bits, compress_type=zlib.Z_RLE)


def _edges(H: Picture) -> str:
    mask = edge_mask(uint2tensor4(H))[0, 0].numpy().astype(np.uint8)
    return _overlay(mask, np.array([(0, 0, 0), _EDGES], np.uint8), np.array([0, 230], np.uint8))


def _differences(maps: Mapping[str, NDArray[np.float32]]) -> tuple[dict[str, str], float]:
    """SSG maps of one image as overlays on one scale, from 0 to the returned value; off the edges they are clear."""
    every = np.stack(list(maps.values()))
    measured = every[~np.isnan(every)]
    if not measured.size:
        return {}, 0.0
    top = float(np.percentile(measured, 99)) or 1.0
    ramp = np.linspace(70, 255, 256).astype(np.uint8)[:, None]  # the darkest would be lost on the dimmed picture
    colours = cv2.cvtColor(cv2.applyColorMap(ramp, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)[:, 0]
    opacity = np.full(256, 255, np.uint8)
    opacity[0] = 0
    overlays = {}
    for label, values in maps.items():
        levels = np.where(np.isnan(values), 0, 1 + 254 * np.clip(values / top, 0, 1))
        overlays[label] = _overlay(levels.astype(np.uint8), colours.astype(np.uint8), opacity)
    return overlays, top


def gallery_item(set_name: str, name: str, pictures: Mapping[str, Picture], measured: Measured) -> dict[str, Any]:
    """One image for the page, encoded: set, name, size, thumbnail, pictures by label, overlays.

    Args:
        set_name, name: as in the rows of ``results.json``.
        pictures: label -> (H, W, 3) RGB or (H, W) gray, uint8; where there is a ground truth it is the last one,
            under "ground truth".
        measured: its SSG maps.

    Returns:
        Nothing ({}) where a side is longer than browsers show.
    """
    if any(max(image.shape[:2]) > _LARGEST for image in pictures.values()):
        return {}
    truth = pictures.get("ground truth")
    encoded = {label: _picture(image) for label, image in pictures.items()}
    differences, top = _differences(measured.ssg) if measured.ssg else ({}, 0.0)
    last = list(pictures.values())[-1]
    return {
        "set": set_name,
        "name": name,
        "width": last.shape[1],
        "height": last.shape[0],
        "thumbnail": _thumbnail(last),
        "pictures": {label: uri for label, (uri, _) in encoded.items()},
        "lossless": all(lossless for _, lossless in encoded.values()),
        "edges": _edges(truth) if truth is not None and min(truth.shape[:2]) > 1 else None,
        "ssg": differences,
        "ssg_top": top,
    }


class Gallery:
    """The images of a report, until the page would get too large.

    Attributes:
        items: of :func:`gallery_item`.
        left_out: how many images did not fit.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.left_out = 0
        self._bytes = 0

    def add(self, item: dict[str, Any]) -> None:
        """One image; an empty one is too large to be shown."""
        uris = [*item["pictures"].values(), *item["ssg"].values(), item["edges"] or ""] if item else []
        size = sum(map(len, uris))
        if not item or (self.items and self._bytes + size > _PAGE):
            self.left_out += 1
            return
        self._bytes += size
        self.items.append(item)


def write_html(
    results: Mapping[str, Any], gallery: Gallery, names: Sequence[str], total: int, note: str, path: Path
) -> None:
    """Write the report.

    Args:
        results: the content of ``results.json``; the page shows its numbers.
        gallery: its images.
        names: the metrics, in the tables' order.
        total: how many images were tested; the page says how many of them it shows.
        note: what the columns are.

    Raises:
        UserError: the file cannot be written.
    """
    columns = [
        {
            "name": name,
            "title": METRICS[name].title,
            "about": METRICS[name].about,
            "higher": METRICS[name].higher_better,
            "digits": int(METRICS[name].spec[1:-1]),
        }
        for name in names
    ]
    data = {
        "results": results,
        "columns": columns,
        "gallery": gallery.items,
        "total": total,
        "left_out": gallery.left_out,
        "note": note,
    }
    # "<" inside a script could end it; JSON knows another way to write it.
    text = to_json(data, separators=(",", ":")).replace("<", "\\u003c")
    write_atomically(_TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, text), path)
