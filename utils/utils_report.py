"""What a test leaves behind: a table for the terminal, CSV and JSON files, a picture to look at."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from utils.utils_error import UserError
from utils.utils_image import imsave
from utils.utils_run import write_atomically

Picture = NDArray[np.uint8]

# ------------------------------------------------------------------------------------------------- where results go


def output_names(paths: Sequence[str], roots: Sequence[str]) -> list[str]:
    """For each image the name of its result, ``sub/folder/stem``: its path below the root that holds it.

    Raises:
        UserError: two images would have results of one name.
    """
    names: dict[str, str] = {}
    for path in map(Path, paths):
        root = next(Path(root) for root in roots if Path(root) in [path, *path.parents])
        name = (path.relative_to(root) if path != root else Path(path.name)).with_suffix("").as_posix()
        if name in names:
            raise UserError(f"{path} and {names[name]}: both would be saved as {name}.png; rename one")
        names[name] = str(path)
    return list(names)


def check_output(output: Path, inputs: Sequence[str], roots: Sequence[str]) -> None:
    """Results must stay clear of the input images, now and when the same command runs again.

    Raises:
        UserError: ``output`` is no folder, holds one of the ``inputs`` or lies in one of the folders ``roots``.
    """
    remedy = "give another folder for the results"
    folder = output.resolve()
    for parent in [folder, *folder.parents]:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{output}: {parent} is a file; {remedy}")
    for path in inputs:
        if folder in Path(path).resolve().parents:
            raise UserError(f"{output}: holds the input image {path}; {remedy}")
    for root in roots:
        if Path(root).resolve() in folder.parents:
            raise UserError(f"{output}: lies among the input images in {root}; {remedy}")


# ------------------------------------------------------------------------------------------------------------ tables


def _cell(value: Any, spec: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return format(value, spec)


def _shorten(text: str, width: int) -> str:
    """Cut the middle out of a long name: both ends of file names tell something."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def format_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], width: int = 80) -> str:
    """A plain-text table: names to the left, numbers to the right, a rule under the headings.

    Args:
        rows: one mapping a line, from column to value; missing, None and NaN show as "-".
        columns: column -> format spec (".2f"); a column of spec "" holds text and stands to the left.
        width: the table's largest width; long texts are shortened in the middle.
    """
    cells = [list(columns), *([_cell(row.get(name), spec) for name, spec in columns.items()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    is_text = [spec == "" for spec in columns.values()]
    gap = "  "
    room = width - sum(w for w, text in zip(widths, is_text, strict=True) if not text) - len(gap) * (len(columns) - 1)
    largest = max(8, room // max(1, sum(is_text)))
    widths = [min(w, largest) if text else w for w, text in zip(widths, is_text, strict=True)]
    lines = [
        gap.join(
            _shorten(value, w).ljust(w) if text else value.rjust(w)
            for value, w, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], gap.join("-" * w for w in widths), *lines[1:]])


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one line a row under the keys of the first, atomically; NaN becomes an empty field.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    write_atomically(text.getvalue(), path)


# ----------------------------------------------------------------------------------------------------------- picture

_CELL = 256  # px, side of an enlarged crop
_GAP = 10
_HEADING = 40
_CAPTION = 26
_INK, _PAPER, _FRAME = (32, 32, 32), (255, 255, 255), (230, 30, 30)


def edge_rich_crop(image: Picture, size: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the window of at most ``size`` x ``size`` px with the most edges in it.

    Edges saturate, so that a window with many of them wins over one with a single strong edge; noise is smoothed away.
    """
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image
    smooth = cv2.GaussianBlur(gray.astype(np.float32), (0, 0), 1.5)
    edges = np.minimum(np.hypot(cv2.Sobel(smooth, -1, 1, 0), cv2.Sobel(smooth, -1, 0, 1)), 128)
    height, width = min(size, gray.shape[0]), min(size, gray.shape[1])
    sums = cv2.boxFilter(edges, -1, (width, height), anchor=(0, 0), normalize=False, borderType=cv2.BORDER_ISOLATED)
    sums = sums[: gray.shape[0] - height + 1, : gray.shape[1] - width + 1]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(top), int(left), height, width


def _fit(image: Picture, enlarge: bool) -> Image.Image:
    """The image in a square cell: pixels repeated when it is enlarged, averaged when it is reduced."""
    height, width = image.shape[:2]
    factor = _CELL / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    kind = cv2.INTER_NEAREST if enlarge or factor > 1 else cv2.INTER_AREA
    cell = Image.new("RGB", (_CELL, _CELL), _PAPER)
    resized = cv2.resize(image, size, interpolation=kind)
    cell.paste(Image.fromarray(resized), ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    return cell


def _overview(image: Picture, window: tuple[int, int, int, int]) -> Image.Image:
    """The whole image, reduced, with the crop framed."""
    top, left, height, width = window
    rgb = image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    line = max(2, round(max(rgb.shape[:2]) / 128))
    corners = (max(0, left - line), max(0, top - line)), (left + width + line, top + height + line)
    return _fit(cv2.rectangle(rgb.copy(), *corners, _FRAME, line).astype(np.uint8), enlarge=False)


def side_by_side(
    images: Mapping[str, Mapping[str, Picture]],
    path: Path,
    crop: int = 64,
    captions: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write one picture that shows the same enlarged detail of each image in labelled columns.

    The first column shows the whole image with the detail framed; the detail is where the last label's image (the
    ground truth) has the most edges.

    Args:
        images: name of the image (a row) -> label (a column) -> (H, W, 3) RGB or (H, W) gray, uint8, one size a row.
        path: the file to write, PNG.
        crop: side of the detail in pixels.
        captions: name -> label -> a few words under that detail.

    Raises:
        UserError: the file cannot be written.
    """
    labels = list(next(iter(images.values())))
    step_x, step_y = _CELL + _GAP, _CELL + _CAPTION + _GAP
    size = _GAP + step_x * (1 + len(labels)), _HEADING + step_y * len(images)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(14)

    def write(text: str, column: int, y: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
        while len(text) > 8 and draw.textlength(text, font=font) > _CELL:
            text = _shorten(text, len(text) - 1)
        draw.text((_GAP + column * step_x + _CELL / 2, y), text, _INK, font, anchor="mm")

    for column, label in enumerate(labels, 1):
        write(label, column, _HEADING // 2, large)
    for row, (name, pictures) in enumerate(images.items()):
        y = _HEADING + row * step_y
        truth = pictures[labels[-1]]
        top, left, height, width = window = edge_rich_crop(truth, crop)
        sheet.paste(_overview(truth, window), (_GAP, y))
        write(name, 0, y + _CELL + _CAPTION // 2, small)
        for column, label in enumerate(labels, 1):
            detail = pictures[label][top : top + height, left : left + width]
            sheet.paste(_fit(detail, enlarge=True), (_GAP + column * step_x, y))
            write((captions or {}).get(name, {}).get(label, ""), column, y + _CELL + _CAPTION // 2, small)
    imsave(np.asarray(sheet), str(path))
