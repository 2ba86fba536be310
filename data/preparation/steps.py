"""The steps of preparing data: multi-scale versions, sub-images, edge masks, low-quality images.

The figures are those of the SSL paper's data (https://arxiv.org/abs/2408.05713) unless they are said to be others'.
data/preparation/run.py runs a step over a folder. Bit depth and number of channels are kept; images are PNG or raw
(utils_npy.py).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.degradations.select_degradation import DEGRADATIONS, degrade_image
from data.files import list_files
from data.preparation.run import Product, Step, option
from utils.utils_error import UserError
from utils.utils_image import Array, image_kind, image_size, imread_uint, imresize_np, modcrop, uint2tensor4
from utils.utils_npy import npy_size
from utils.utils_option import DatasetOptions
from utils.utils_ssl import edge_mask

_MOST_PIXELS = 1 << 28  # of an image that is made: 800 MB in 8 bits


def at_least(least: int, most: int = 1 << 16) -> Callable[[str], int]:
    """For argparse: a whole number, not below ``least`` and not above ``most``."""

    def whole(text: str) -> int:
        if not least <= int(text) <= most:
            raise ValueError
        return int(text)

    whole.__name__ = f"number from {least} up to {most}:"  # the message: "invalid number from 1 up to 9: value: '0'"
    return whole


def factor(text: str) -> float:
    """For argparse: a number above 0, up to 16, such as 0.75 or 1/3."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except ZeroDivisionError as error:
        raise ValueError from error
    if not 0 < value <= 16:
        raise ValueError
    return value


factor.__name__ = "number above 0, up to 16:"


def level(text: str) -> float:
    """For argparse: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


level.__name__ = "finite number:"


class Source(NamedTuple):
    """What a file is made of, and its own size."""

    path: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ImageStep(Step):
    """A step that makes images with the channels and the bit depth of what they are made of."""

    format: str = option("png", "npy: raw, large and quick to read in training", choices=("png", "npy"))

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return settings if self.is_raw else {key: settings[key] for key in settings if key != "format"}

    @property
    def is_raw(self) -> bool:
        return self.format == "npy"

    @abstractmethod
    def sources(self, path: str, name: str) -> dict[str, Source]:
        """The files to make of the image ``path``, whose own name is ``name``; reads headers at most."""

    def outputs(self, path: str, name: str) -> list[str]:
        return list(self.sources(path, name))

    def room(self, path: str, name: str, wanted: Sequence[str]) -> int:
        sources = {file: source for file, source in self.sources(path, name).items() if file in wanted}
        kinds = {source.path: self.kind(source.path) for source in sources.values()}
        sizes = ((*source[1:], *kinds[source.path]) for source in sources.values())
        return sum(npy_size((height, width, channels), dtype) for height, width, channels, dtype in sizes)

    def kind(self, source: str) -> tuple[int, np.dtype[Any]]:
        """Channels and dtype of what is made of an image."""
        return image_kind(source)


# -------------------------------------------------------------------------------------------------------- multi-scale


@dataclass(frozen=True)
class Multiscale(ImageStep):
    """smaller versions of each image

    name.png is the image itself, nameT0.png, nameT1.png, ... are smaller by the
    factors, and the shorter side of nameS.png is fixed: small images are enlarged
    to it. Lanczos. Presets: ssl, and realesrgan with the factors 0.75 0.5 1/3, the
    shortest side 400 (as T3), no smallest side, and no name.png.
    """

    command = "multiscale"
    example = "--input DF2K_HR OST --output DF2K_OST_multiscale"
    factors: tuple[float, ...] = option((0.75, 0.6, 1 / 3), "sizes of T0, T1, ...", type=factor, nargs="+")
    shortest: int = option(512, "the shorter side of S in pixels", type=at_least(1))
    min_side: int = option(512, "leave out the others where their shorter side is less", type=at_least(0))
    original: bool = True
    shortest_name: str = "S"

    def sources(self, path: str, name: str) -> dict[str, Source]:
        return {file: Source(path, *size) for file, size in self._sizes(name, image_size(path)).items()}

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        img = imread_uint(path, None)
        height, width = img.shape[:2]
        for file, size in self._sizes(name, (height, width)).items():
            if file in wanted:
                _check_area(*size)
                yield Product(file, img if size == (height, width) else lanczos(img, *size))

    def _sizes(self, name: str, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """The (height, width) of each file."""
        height, width = size
        versions = {f"T{i}": (int(height * factor), int(width * factor)) for i, factor in enumerate(self.factors)}
        if self.original:
            versions[""] = size
        kept = {ending: sides for ending, sides in versions.items() if min(sides) >= max(1, self.min_side)}
        if height < width:
            kept[self.shortest_name] = (self.shortest, int(self.shortest * (width / height)))
        else:
            kept[self.shortest_name] = (int(self.shortest * (height / width)), self.shortest)
        return {f"{name}{ending}.{self.format}": sides for ending, sides in kept.items()}


def _check_area(height: int, width: int) -> None:
    if height * width > _MOST_PIXELS:
        raise UserError(f"would become {width}x{height} pixels, more than {_MOST_PIXELS / 1e6:.0f} million: left out")


MULTISCALE_PRESETS = {
    "ssl": Multiscale(),
    "realesrgan": Multiscale((0.75, 0.5, 1 / 3), shortest=400, min_side=0, original=False, shortest_name="T3"),
}


def lanczos(img: Array, height: int, width: int) -> Array:
    """Resize ``(H, W, C)`` by Pillow's Lanczos filter; 16 bits are computed in float32 and rounded."""
    if img.dtype == np.uint8:
        plane = img[..., 0] if img.shape[2] == 1 else img
        resized = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
        return resized.reshape(height, width, img.shape[2])
    planes = [Image.fromarray(img[..., c].astype(np.float32)) for c in range(img.shape[2])]
    resized = np.dstack([np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS)) for plane in planes])
    return resized.round().clip(0, 65535).astype(np.uint16)


# --------------------------------------------------------------------------------------------------------- sub-images


@dataclass(frozen=True)
class Subimages(ImageStep):
    """square pieces of each image

    name_s001.png, name_s002.png, ..., row by row. Where a rest is left at the
    right or lower edge, one more row or column of pieces lies against that edge.
    """

    command = "subimages"
    example = "--input DF2K_OST_multiscale --output DF2K_OST"
    size: int = option(512, "side in pixels", type=at_least(1))
    step: int = option(256, "pixels from one to the next", type=at_least(1))
    threshold: int = option(0, "a rest of so many pixels gets no pieces of its own", type=at_least(0))

    def sources(self, path: str, name: str) -> dict[str, Source]:
        return {file: Source(image, side, side) for file, image, _, _, side in self._pieces(path, name)}

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        source, img = "", np.empty(0)
        for file, image, y, x, side in self._pieces(path, name):
            if file in wanted:
                if image != source:
                    source, img = image, imread_uint(image, None)
                yield Product(file, np.ascontiguousarray(img[y : y + side, x : x + side]))

    def _pieces(self, path: str, name: str) -> Iterator[tuple[str, str, int, int, int]]:
        """File, the image it is cut from, top, left and side."""
        for i, (y, x) in enumerate(self._corners(image_size(path)), 1):
            yield f"{name}_s{i:03d}.{self.format}", path, y, x, self.size

    def _corners(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        if min(size) < self.size:
            raise UserError(f"{size[1]}x{size[0]} pixels are less than one sub-image of {self.size}")
        rows, columns = (self._origins(side) for side in size)
        return [(y, x) for y in rows for x in columns]

    def _origins(self, side: int) -> list[int]:
        origins = list(range(0, side - self.size + 1, self.step))
        if side - (origins[-1] + self.size) > self.threshold:
            origins.append(side - self.size)
        return origins


@dataclass(frozen=True)
class PairedSubimages(Subimages):
    """Pieces of H in ``H/`` and of its L in ``L/`` that show the same; several L of one H are cut alike.

    H is cut to a multiple of the scale first, so that no piece at its far edge is shifted against L's.
    """

    scale: int = 4
    H: tuple[str, ...] = ()
    L: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("size", "step"):
            if (value := getattr(self, name)) % self.scale:
                near = max(self.scale, value // self.scale * self.scale)
                raise UserError(f"--{name} {value}: pieces of H are --scale {self.scale} times those of L; take {near}")

    def settings(self) -> dict[str, Any]:
        L = [str(Path(root).resolve()) for root in self.L]
        return {key: value for key, value in super().settings().items() if key != "H"} | {"L": L}

    def also_read(self) -> Sequence[str]:
        return self.L

    def folders(self, names: Sequence[str]) -> list[str]:
        return [f"{role}/{name}" for role in "HL" for name in super(PairedSubimages, self).folders(names)]

    def _pieces(self, path: str, name: str) -> Iterator[tuple[str, str, int, int, int]]:
        partners, problems = _partners_of(self.H, self.L, self.scale)
        if path not in partners:
            raise UserError(problems.get(path, f"{path}: no image in --L of its name"))
        scale = self.scale
        height, width = (side // scale for side in image_size(path))
        corners = self._corners((scale * height, scale * width))
        yield from ((f"H/{name}_s{i:03d}.{self.format}", path, y, x, self.size) for i, (y, x) in enumerate(corners, 1))
        for L in partners[path]:
            if (found := image_size(L)) != (height, width):
                raise UserError(f"{L} is {found[1]}x{found[0]}, not 1/{scale} of {path}: {width}x{height}")
            version = "".join(Path(L).stem.partition("+")[1:]) if len(partners[path]) > 1 else ""
            for i, (y, x) in enumerate(corners, 1):
                yield f"L/{name}_s{i:03d}{version}.{self.format}", L, y // scale, x // scale, self.size // scale

    def _origins(self, side: int) -> list[int]:
        scale, threshold = self.scale, self.threshold // self.scale
        alone = Subimages(self.size // scale, self.step // scale, threshold)
        return [scale * origin for origin in alone._origins(side // scale)]


@lru_cache(maxsize=1)
def _partners_of(H: tuple[str, ...], L: tuple[str, ...], scale: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The L of each H, and what is the matter with those that have none; listed once in each process."""
    opt = DatasetOptions(dataset_type="plain", dataroot_H=list(H), dataroot_L=list(L), scale=scale)
    items, problems = list_files(opt)
    partners: dict[str, list[str]] = {}
    for item in items:
        if item.L:
            partners.setdefault(item.H, []).append(item.L)
    return partners, {problem.partition(": ")[0]: problem for problem in problems}


# -------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Masks(Step):
    """edge masks, where the self-similarity loss is computed

    Bit for bit the published ones, and those that training makes on line where
    dataroot_H_mask is not set. mat: variable "mat" of 0 and 1; png: 0 and 255;
    npy: raw, 0 and 1; both: mat and png.
    """

    command = "masks"
    example = "--input DF2K_OST --output DF2K_OST_mask"
    threshold: float = option(20.0, "of the Laplacian, in gray levels", type=level)
    format: str = option("mat", "what to write", choices=("mat", "png", "both", "npy"))

    def outputs(self, path: str, name: str) -> list[str]:
        return [f"{name}.{suffix}" for suffix in (("mat", "png") if self.format == "both" else (self.format,))]

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        mask = edge_mask(uint2tensor4(imread_uint(path, None)), self.threshold)[0, 0].numpy().astype(np.uint8)
        for file in wanted:
            yield Product(file, 255 * mask if file.endswith(".png") else mask)

    @property
    def is_raw(self) -> bool:
        return self.format == "npy"

    def room(self, path: str, name: str, wanted: Sequence[str]) -> int:
        return len(wanted) * npy_size((*image_size(path), 1), np.dtype(np.uint8))


# -------------------------------------------------------------------------------------------------- low-quality images


@dataclass(frozen=True)
class LRBicubic(ImageStep):
    """low-quality images: MATLAB's bicubic

    Of each image, cut to a multiple of the scale; same names.
    """

    command = "lr-bicubic"
    example = "--input DF2K_OST --output DF2K_OST_x4"
    scale: int = option(4, "how much smaller", type=at_least(1, 64))

    def sources(self, path: str, name: str) -> dict[str, Source]:
        height, width = image_size(path)
        return {f"{name}.{self.format}": Source(path, height // self.scale, width // self.scale)}

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        H = modcrop(imread_uint(path, None), self.scale)
        if not H.size:
            raise UserError(f"smaller than the scale {self.scale}")
        yield Product(wanted[0], matlab_bicubic(H, 1 / self.scale))


def matlab_bicubic(img: Array, scale: float) -> Array:
    """Resize a uint8 or uint16 ``(H, W, C)`` image as MATLAB does, rounded to the same type."""
    resized = imresize_np(img.astype(np.float64), scale)
    # halves away from zero, as MATLAB rounds
    return np.floor(resized + 0.5).clip(0, np.iinfo(img.dtype).max).astype(img.dtype)


@dataclass(frozen=True)
class LRBlind(ImageStep):
    """low-quality images, degraded at random

    name.png or, of several versions, name+00.png, name+01.png, ...: data sets
    pair these with name.png. The draws depend on the seed and the file's name
    alone, and manifest.jsonl tells what was done to each file.
    """

    command = "lr-blind"
    example = "--type blind_test --versions 30 --input DIV2K100 --output DIV2K100_blind"
    keeps_records = True
    type: str = option(..., f"one of {', '.join(DEGRADATIONS)}", choices=tuple(DEGRADATIONS), metavar="TYPE")
    scale: int = option(4, "how much smaller", type=at_least(1, 64))
    versions: int = option(1, "of each image", type=at_least(1, 10000))
    seed: int = option(0, "other draws for another", type=at_least(0, 2**63 - 1))

    def sources(self, path: str, name: str) -> dict[str, Source]:
        height, width = image_size(path)
        return {
            f"{version}.{self.format}": Source(path, height // self.scale, width // self.scale)
            for version in self._versions(name)
        }

    def kind(self, source: str) -> tuple[int, np.dtype[Any]]:
        return image_kind(source)[0], np.dtype(np.uint8)

    def _versions(self, name: str) -> list[str]:
        if self.versions == 1:
            return [name]
        if "+" in Path(name).name:
            raise UserError('several versions are told from their H at the first "+" of their names: rename this image')
        digits = max(2, len(str(self.versions - 1)))
        return [f"{name}+{version:0{digits}d}" for version in range(self.versions)]

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        H = imread_uint(path, None)
        for file in wanted:
            L, record = degrade_image(H, self.type, self.scale, self.seed, file.removesuffix(f".{self.format}"))
            yield Product(file, L, record)


@dataclass(frozen=True)
class Enlarge(ImageStep):
    """larger images: MATLAB's bicubic

    What low-quality images are shown as, and compared with; same names.
    """

    command = "enlarge"
    example = "--input DIV2K100_blind --output DIV2K100_blind_bicubic"
    scale: int = option(4, "how much larger", type=at_least(1, 16))

    def sources(self, path: str, name: str) -> dict[str, Source]:
        height, width = image_size(path)
        return {f"{name}.{self.format}": Source(path, height * self.scale, width * self.scale)}

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        img = imread_uint(path, None)
        _check_area(img.shape[0] * self.scale, img.shape[1] * self.scale)
        yield Product(wanted[0], matlab_bicubic(img, self.scale))


@dataclass(frozen=True)
class Modcrop(ImageStep):
    """images cut at the bottom and right to multiples

    12, as in the published test sets, suits the scales 2, 3 and 4; same names.
    With --multiple 1 --format npy any folder becomes a raw one.
    """

    command = "modcrop"
    example = "--input DIV2K_valid_HR --output DIV2K100"
    multiple: int = option(12, "of so many pixels", type=at_least(1))

    def sources(self, path: str, name: str) -> dict[str, Source]:
        height, width = (side - side % self.multiple for side in image_size(path))
        return {f"{name}.{self.format}": Source(path, height, width)}

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        img = modcrop(imread_uint(path, None), self.multiple)
        if not img.size:
            raise UserError(f"smaller than {self.multiple} pixels")
        yield Product(wanted[0], np.ascontiguousarray(img))


STEPS: tuple[type[Step], ...] = (Multiscale, Subimages, Masks, LRBicubic, LRBlind, Enlarge, Modcrop)
