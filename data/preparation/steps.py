"""The steps of preparing data: multi-scale versions, sub-images, edge masks, low-quality images.

The figures, in arguments.py, are those of the SSL paper's data (https://arxiv.org/abs/2408.05713) unless they are said
to be others'. run.py runs a step over a folder. Bit depth and number of channels are kept; images are PNG or raw
(utils_npy.py).
"""

from abc import abstractmethod
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.degradations.select_degradation import degrade_image
from data.files import list_files
from data.preparation import arguments
from data.preparation.run import PreparationStep, Product
from utils.utils_error import UserError
from utils.utils_image import Array, image_kind, image_size, imread_uint, imresize_np, modcrop, uint2tensor4
from utils.utils_npy import npy_size
from utils.utils_option import DatasetOptions
from utils.utils_ssl import edge_mask

_MOST_PIXELS = 1 << 28  # of an image that is made: 800 MB in 8 bits


class Source(NamedTuple):
    """What a file is made of, and its own size."""

    path: str
    height: int
    width: int


class ImageStep(PreparationStep):
    """A step that makes images with the channels and the bit depth of what they are made of."""

    format: str  # of arguments.ImageArguments

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
class Multiscale(arguments.Multiscale, ImageStep):
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

    def endings(self) -> Sequence[str]:
        return [*(f"T{i}" for i in range(len(self.factors))), self.shortest_name]

    def left_out(self, path: str, name: str) -> str:
        size = image_size(path)
        if not self._too_small(size):
            return ""
        without = f"without {self.shortest_name}" if self._sizes(name, size) else "left out"
        why = "and an enlarged photograph is no ground truth (--enlarge)"
        return f"{without}: a shorter side below {self.shortest}, {why}"

    def _too_small(self, size: tuple[int, int]) -> bool:
        """Whether no file with a fixed shorter side is made of an image."""
        return min(size) < self.shortest and not self.enlarge

    def _sizes(self, name: str, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """The (height, width) of each file."""
        height, width = size
        versions = {f"T{i}": (int(height * factor), int(width * factor)) for i, factor in enumerate(self.factors)}
        if self.original:
            versions[""] = size
        kept = {ending: sides for ending, sides in versions.items() if min(sides) >= max(1, self.min_side)}
        if not self._too_small(size):
            lying = self.shortest, int(self.shortest * (width / height))
            standing = int(self.shortest * (height / width)), self.shortest
            kept[self.shortest_name] = lying if height < width else standing
        return {f"{name}{ending}.{self.format}": sides for ending, sides in kept.items()}


def _check_area(height: int, width: int) -> None:
    if height * width > _MOST_PIXELS:
        raise UserError(f"would become {width}x{height} pixels, more than {_MOST_PIXELS / 1e6:.0f} million: left out")


MULTISCALE_PRESETS = {name: Multiscale(**figures) for name, figures in arguments.PRESETS.items()}


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
class Subimages(arguments.Subimages, ImageStep):
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
class Masks(arguments.Masks, PreparationStep):
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
class LRBicubic(arguments.LRBicubic, ImageStep):
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
class LRBlind(arguments.LRBlind, ImageStep):
    keeps_records = True

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
class Enlarge(arguments.Enlarge, ImageStep):
    def sources(self, path: str, name: str) -> dict[str, Source]:
        height, width = image_size(path)
        return {f"{name}.{self.format}": Source(path, height * self.scale, width * self.scale)}

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        img = imread_uint(path, None)
        _check_area(img.shape[0] * self.scale, img.shape[1] * self.scale)
        yield Product(wanted[0], matlab_bicubic(img, self.scale))


@dataclass(frozen=True)
class Modcrop(arguments.Modcrop, ImageStep):
    def sources(self, path: str, name: str) -> dict[str, Source]:
        height, width = (side - side % self.multiple for side in image_size(path))
        return {f"{name}.{self.format}": Source(path, height, width)}

    def make(self, path: str, name: str, wanted: Sequence[str]) -> Iterator[Product]:
        img = modcrop(imread_uint(path, None), self.multiple)
        if not img.size:
            raise UserError(f"smaller than {self.multiple} pixels")
        yield Product(wanted[0], np.ascontiguousarray(img))


STEPS: tuple[type[PreparationStep], ...] = (Multiscale, Subimages, Masks, LRBicubic, LRBlind, Enlarge, Modcrop)


def step_of(args: Namespace) -> PreparationStep:
    """The step that a command line asks for.

    Raises:
        UserError: its arguments do not go together.
    """
    step = next(step for step in STEPS if step.command == args.command)
    given = {f.name: getattr(args, f.name) for f in fields(step) if hasattr(args, f.name)}  # type: ignore[arg-type]
    if step is Subimages and args.L:
        return PairedSubimages(**given, scale=args.scale or 4, H=tuple(args.input), L=tuple(args.L))
    return replace(MULTISCALE_PRESETS[args.preset], **given) if step is Multiscale else step(**given)
