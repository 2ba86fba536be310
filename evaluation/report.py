"""What a test leaves behind: tables for the terminal, CSV, JSON and Markdown files, a picture to look at."""

import csv
import io
import logging
import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from evaluation.metrics import Measurer, mean_metrics
from evaluation.page import Gallery, gallery_item, write_html
from utils.utils_error import printable
from utils.utils_image import imsave
from utils.utils_metric_table import METRICS
from utils.utils_name import cell, output_path
from utils.utils_run import save_json, write_atomically

logger = logging.getLogger(__name__)
Picture = NDArray[np.uint8]

# ------------------------------------------------------------------------------------------------- where results go

RESULTS = ("results.json", "results.csv", "results.md", "report.html", "side_by_side.png")


# ------------------------------------------------------------------------------------------------------------ tables


def _cell(value: Any, spec: str) -> str:
    """A number as it is printed, "-" for None and NaN; text stays."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return value if isinstance(value, str) else format(value, spec)


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
        columns: column -> format spec (".2f"); the first one, of spec "", holds text and stands to the left.
        width: the table's largest width; long texts are shortened in the middle, and numbers that do not fit go on in
            further tables below.
    """
    name, *numbers = columns
    texts = [_shorten(row[name], 28) for row in rows]
    text_width = max(map(len, (name, *texts)))
    cells = {c: [c, *(_cell(row.get(c), columns[c]) for row in rows)] for c in numbers}
    blocks: list[list[list[str]]] = []
    room = 0
    for column in cells.values():
        needed = 2 + max(map(len, column))
        if needed > room:
            blocks.append([])
            room = width - text_width
        blocks[-1].append([cell.rjust(needed - 2) for cell in column])
        room -= needed
    texts = [text.ljust(text_width) for text in (name, *texts)]
    tables = []
    for block in blocks or [[]]:
        first, *rest = ["  ".join(line) for line in zip(texts, *block, strict=True)]
        rule = "  ".join("-" * width for width in (text_width, *(len(column[0]) for column in block)))
        tables.append("\n".join(line.rstrip() for line in (first, rule, *rest)))
    return "\n\n".join(tables)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one line a row under the keys of all, atomically; what a row lacks, and NaN, is an empty field.

    Text is written :func:`printable` and never as a formula (:func:`utils_name.cell`).

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        texts = {k: cell(printable(v)) for k, v in row.items() if isinstance(v, str)}
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} | texts)
    write_atomically(text.getvalue(), path)


# ----------------------------------------------------------------------------------------------------------- results

_SSL_ENDING = re.compile(r"[\s_+-]*ssl$", re.IGNORECASE)


def baselines(labels: Sequence[str]) -> dict[str, str]:
    """With SSL -> without: each label that is another one with ssl at its end: X and X_ssl, X-SSL or "X + SSL"."""
    by_name = {label.lower(): label for label in labels}
    bare = {label: _SSL_ENDING.sub("", label).lower() for label in labels}
    return {label: by_name[bare[label]] for label in labels if by_name.get(bare[label], label) != label}


def _difference(a: float, b: float) -> float:
    return a - b if math.isfinite(a) and math.isfinite(b) else math.nan


@dataclass(frozen=True)
class SetResults:
    """The means over a test set: label -> metric name -> value; ``evaluation.metrics.mean_metrics`` says which."""

    name: str
    images: int
    names: list[str]  # of the metrics, in the tables' order
    means: dict[str, dict[str, float]]
    infinite: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # label -> metric name -> images
    broken: dict[str, list[str]] = field(default_factory=dict)  # label -> images that are not finite themselves
    values: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # label -> for each image the metrics of it

    def deltas(self) -> dict[str, dict[str, float]]:
        """Label with SSL -> metric name -> what SSL added to its baseline, NaN where that is not finite.

        Of metrics of single images it is over those for which both have a finite value.
        """
        return {
            ours: {name: self._delta(ours, base, name) for name in self.names}
            for ours, base in baselines(list(self.means)).items()
        }

    def _delta(self, ours: str, base: str, name: str) -> float:
        both = list(zip(self.values.get(ours, ()), self.values.get(base, ()), strict=True))
        pairs = [(a[name], b[name]) for a, b in both if name in a and name in b]
        if not pairs and (ours in self.broken or base in self.broken):
            return math.nan  # of a metric over sets, which are different ones
        if not pairs:
            return _difference(self.means[ours][name], self.means[base][name])
        finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
        return sum(a for a, _ in finite) / len(finite) - sum(b for _, b in finite) / len(finite) if finite else math.nan

    def notes(self) -> list[str]:
        """What the means leave out, a sentence a model."""
        sentences = []
        for label, of_metrics in self.infinite.items():
            titles: dict[int, list[str]] = {}
            for name, images in of_metrics.items():
                titles.setdefault(len(images), []).append(METRICS[name].title)
            for count, of_count in titles.items():
                left_out = "all of the set" if count == self.images else "left out of the mean"
                what = f"{counted(count, 'image')} equal to the ground truth (infinite {', '.join(of_count)})"
                sentences.append(f"{self.name}, {label}: {what}, {left_out}.")
        for label, images in self.broken.items():
            what = f"{counted(len(images), 'image')} not finite (NaN): {', '.join(images[:3])}"
            more = ", ..." if len(images) > 3 else ""
            sentences.append(f"{self.name}, {label}: {what}{more}, left out of the means.")
        pairs = baselines(list(self.means))
        if self.values and {*self.infinite, *self.broken} & {*pairs, *pairs.values()}:
            sentences.append(f"{self.name}: what SSL added is over the images that both models have.")
        return sentences

    def best(self, name: str) -> str:
        """The best mean of a metric as it is printed: every label that prints it is best."""
        values = [means[name] for means in self.means.values() if not math.isnan(means[name])]
        metric = METRICS[name]
        return _cell((max if metric.higher_better else min)(values) if values else None, metric.spec)

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        left_out = {"infinite": self.infinite, "broken": self.broken}
        return {"images": self.images, "means": self.means, "deltas": self.deltas(), **left_out}

    def as_text(self) -> str:
        """For the terminal, at most 80 columns wide; below a model with SSL what it added."""
        columns = {METRICS[name].title: METRICS[name].spec for name in self.names}
        base_of, deltas, rows = baselines(list(self.means)), self.deltas(), []
        for label, means in self.means.items():
            rows.append({"model": label, **{METRICS[name].title: means[name] for name in self.names}})
            if label in deltas:
                signed = {METRICS[n].title: _cell(deltas[label][n], f"+{METRICS[n].spec}") for n in self.names}
                rows.append({"model": f"  - {base_of[label]}", **signed})
        return format_table(rows, {"model": "", **columns})

    def as_markdown(self) -> str:
        """For a paper or README: best in bold, what SSL added in brackets."""
        arrows = {name: "\u2191" if METRICS[name].higher_better else "\u2193" for name in self.names}
        lines = [
            f"| model | {' | '.join(f'{METRICS[name].title} {arrows[name]}' for name in self.names)} |",
            f"|---|{'---:|' * len(self.names)}",
        ]
        added = self.deltas()
        for label, means in self.means.items():
            cells = []
            for name in self.names:
                cell = _cell(means[name], METRICS[name].spec)
                cell = f"**{cell}**" if cell == self.best(name) != "-" else cell
                if label in added and not math.isnan(added[label][name]):
                    cell += f" ({_cell(added[label][name], '+' + METRICS[name].spec)})".replace("-", "\u2212")
                cells.append(cell)
            lines.append(f"| {label.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
        return "\n".join(lines)


def write_markdown(sets: Sequence[SetResults], heading: str, notes: Sequence[str], path: Path) -> None:
    """Write results.md: a table for each set, then the notes.

    Raises:
        UserError: the file cannot be written.
    """
    parts = [f"# {heading}"]
    for results in sets:
        parts += [f"## {results.name}, {counted(results.images, 'image')}", results.as_markdown()]
    pairs = {ours: base for results in sets for ours, base in baselines(list(results.means)).items()}
    brackets = [f"In brackets: {', '.join(f'{ours} against {base}' for ours, base in pairs.items())}."] if pairs else []
    best = "Best in bold; \u2191 higher is better, \u2193 lower."
    write_atomically("\n\n".join([*parts, " ".join([best, *brackets]), *notes]) + "\n", path)


def counted(count: int, noun: str) -> str:
    """ "1 image", "5 images"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


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


@dataclass(frozen=True)
class SheetRow:
    """What :func:`side_by_side` shows of one image; small, so that a long test can keep it."""

    overview: Image.Image  # of the whole image, the detail framed
    details: dict[str, Picture]  # label -> the same detail


def sheet_row(pictures: Mapping[str, Picture], crop: int = 64) -> SheetRow:
    """The detail is where the last label's image (the ground truth) has the most edges.

    Args:
        pictures: label (a column) -> (H, W, 3) RGB or (H, W) gray, uint8, all of one size.
        crop: side of the detail in pixels.
    """
    truth = list(pictures.values())[-1]
    top, left, height, width = window = edge_rich_crop(truth, crop)
    details = {label: image[top : top + height, left : left + width].copy() for label, image in pictures.items()}
    return SheetRow(_overview(truth, window), details)


def side_by_side(
    rows: Mapping[str, SheetRow], path: Path, captions: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Write one picture: a row an image, the whole of it first, then the same detail, enlarged, in labelled columns.

    Args:
        rows: name of the image -> its row; all have the same labels.
        path: the file to write, PNG.
        captions: name -> label -> a few words under that detail.

    Raises:
        UserError: the file cannot be written.
    """
    labels = list(next(iter(rows.values())).details)
    step_x, step_y = _CELL + _GAP, _CELL + _CAPTION + _GAP
    size = _GAP + step_x * (1 + len(labels)), _HEADING + step_y * len(rows)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(14)

    def write(text: str, column: int, y: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
        while len(text) > 8 and draw.textlength(text, font=font) > _CELL:
            text = _shorten(text, len(text) - 1)
        draw.text((_GAP + column * step_x + _CELL / 2, y), text, _INK, font, anchor="mm")

    for column, label in enumerate(labels, 1):
        write(label, column, _HEADING // 2, large)
    for number, (name, row) in enumerate(rows.items()):
        y = _HEADING + number * step_y
        sheet.paste(row.overview, (_GAP, y))
        write(name, 0, y + _CELL + _CAPTION // 2, small)
        for column, label in enumerate(labels, 1):
            sheet.paste(_fit(row.details[label], enlarge=True), (_GAP + column * step_x, y))
            write((captions or {}).get(name, {}).get(label, ""), column, y + _CELL + _CAPTION // 2, small)
    imsave(np.asarray(sheet), str(path))


def _caption(values: Mapping[str, float]) -> str:
    """ "PSNR 27.10 dB, SSG 1.234", of both what was measured."""
    known = {name: values[name] for name in ("psnr", "ssg") if not math.isnan(values.get(name, math.nan))}
    return ", ".join(METRICS[name].titled(value) for name, value in known.items())


# --------------------------------------------------------------------------------------------------------- all of it

_PICTURE_ROWS = 6


@dataclass(frozen=True)
class Entry:
    """What a report takes up of one image."""

    set_name: str
    name: str
    values: dict[str, dict[str, float]]  # label -> metric name -> value
    item: dict[str, Any] | None  # for the page
    row: SheetRow | None  # for the picture
    broken: tuple[str, ...] = ()  # labels


class Report:
    """Measures the images of a test as they come, and writes every file about them.

    Args:
        measurer: the metrics.
        counts: set -> how many images it has, in order.
        report_images: how many images go into report.html, spread over the sets; 0 = no such file.
    """

    def __init__(self, measurer: Measurer, counts: Mapping[str, int], report_images: int) -> None:
        self.measurer, self.counts = measurer, counts
        self._rows: list[dict[str, Any]] = []
        self._sets: list[SetResults] = []
        self._sheet: dict[str, tuple[SheetRow, dict[str, str]]] = {}
        self._gallery = Gallery() if report_images else None
        self._in_page = _spread_over(counts, report_images)
        self._in_sheet = _spread_over(counts, _PICTURE_ROWS)
        self._values: dict[str, list[dict[str, float]]] = {}
        self._infinite: dict[str, dict[str, list[str]]] = {}
        self._broken: dict[str, list[str]] = {}

    def shows(self, set_name: str, index: int, with_truth: bool) -> bool:
        """Whether anything comes of the estimates of an image: numbers, or a place among the pictures."""
        in_sheet = with_truth and index in self._in_sheet[set_name]
        return bool(self.measurer.names_for(with_truth)) or in_sheet or index in self._in_page[set_name]

    def examine(
        self,
        set_name: str,
        index: int,
        name: str,
        estimates: Mapping[str, Picture],
        H: Picture | None,
        broken: Collection[str] = (),
    ) -> Entry:
        """Measure one image, the ``index``-th of its set, and encode it for the page; any thread may.

        Args:
            broken: labels whose estimate is or would be no image (NaN): they are shown as they are and get no numbers.
        """
        measured = self.measurer.measure(estimates, H, broken)
        for label in measured.values.keys() & broken:  # none are measured where nobody looks
            measured.values[label] = dict.fromkeys(measured.values[label], math.nan)
        name = printable(name)
        pictures = dict(estimates) if H is None else {**estimates, "ground truth": H}
        in_page = self._gallery is not None and index in self._in_page[set_name]
        in_sheet = H is not None and index in self._in_sheet[set_name]
        item = gallery_item(set_name, name, pictures, measured) if in_page else None
        row = sheet_row(pictures) if in_sheet else None
        return Entry(set_name, name, measured.values, item, row, tuple(measured.values.keys() & broken))

    def add(self, entry: Entry) -> None:
        """Take up an image; they come in order, sets one after the other, each ended by :meth:`end_set`."""
        set_name, name, of_image = entry.set_name, entry.name, entry.values
        if any(of_image.values()):
            self._rows += [{"set": set_name, "image": name, "model": k, **v} for k, v in of_image.items()]
        if self._gallery and entry.item is not None:
            self._gallery.add(entry.item)
        if entry.row:
            captions = {label: _caption(values) for label, values in of_image.items()}
            self._sheet[f"{set_name}/{name}"] = entry.row, captions
        for label, values in of_image.items():
            self._values.setdefault(label, []).append(values)
            if label in entry.broken:
                self._broken.setdefault(label, []).append(name)
            for metric in [metric for metric, value in values.items() if math.isinf(value)]:
                self._infinite.setdefault(label, {}).setdefault(metric, []).append(name)

    def end_set(self, name: str, with_truth: bool) -> None:
        """After the last image of a set: its means."""
        names, over_set = self.measurer.names_for(with_truth), self.measurer.of_set()
        means = {k: {**mean_metrics(v, names), **over_set.get(k, {})} for k, v in self._values.items()}
        if names:
            left_out = self._infinite, self._broken
            self._sets.append(SetResults(name, self.counts[name], names, means, *left_out, self._values))
        self._values, self._infinite, self._broken = {}, {}, {}

    def write(self, output: Path, facts: Mapping[str, str], content: Mapping[str, Any], n_channels: int) -> None:
        """Print the tables and write results.{csv,json,md}, report.html and side_by_side.png, as far as there is any.

        Args:
            output: folder for the files.
            facts: of ``utils_run.run_facts``.
            content: what else goes into results.json: models, scale and so on.
            n_channels: of the models.

        Raises:
            UserError: a file cannot be written.
        """
        measurer = self.measurer
        scale = content["scale"]
        for results in self._sets:
            heading = f"{results.name}, x{scale}, {counted(results.images, 'image')}"
            logger.info("\n%s\n\n%s", heading, results.as_text())
        note = " ".join([measurer.describe(n_channels), *(n for results in self._sets for n in results.notes())])
        versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "opencv", "numpy"))
        missing = {METRICS[name].title: why for name, why in measurer.missing.items()}
        left_out = [f"{title} was not computed: {why}." for title, why in missing.items()]
        if self._sets:
            logger.info("\n%s", "\n".join(textwrap.fill(line, 80) for line in (f"{note} {versions}.", *left_out)))
        logger.info("")
        as_json, as_csv, as_markdown, as_page, as_picture = (output_path(output, name) for name in RESULTS)
        written = [as_json]
        content = {
            "facts": facts,
            **content,
            "metrics": {
                METRICS[name].title: {"name": name, "higher_better": METRICS[name].higher_better}
                for name in measurer.names
            },
            "note": note,
            "missing": missing,
            "baselines": baselines(list(content["models"])),
            "sets": {results.name: results.as_json() for results in self._sets},
            "images": self._rows,
        }
        save_json(content, as_json)
        if self._rows:
            write_csv(self._rows, as_csv)
            written.append(as_csv)
        if self._sets:
            heading = f"Results, x{scale}"
            write_markdown(self._sets, heading, [f"{note} {versions}.", *left_out], as_markdown)
            written.append(as_markdown)
        if self._gallery:
            total = sum(self.counts.values())
            write_html(content, self._gallery, measurer.names, total, note, as_page)
            written.append(as_page)
        if self._sheet:
            rows = {name: row for name, (row, _) in self._sheet.items()}
            captions = {name: words for name, (_, words) in self._sheet.items()}
            side_by_side(rows, as_picture, captions)
            written.append(as_picture)
        for path in written:
            logger.info("%s", path)


def _spread_over(counts: Mapping[str, int], wanted: int) -> dict[str, set[int]]:
    """Indices of ``wanted`` images, evenly over the sets and within each; what small sets leave, large ones get."""
    chosen: dict[str, set[int]] = {}
    for left, (name, count) in enumerate(sorted(counts.items(), key=lambda item: item[1])):
        share = min(count, -(-wanted // (len(counts) - left)))
        wanted -= share
        chosen[name] = set(np.linspace(0, count - 1, share).round().astype(int).tolist())
    return chosen
