"""What the steps of preparation can be asked for; steps.py carries it out.

Apart from it, because a command line is made of this: nothing here imports what reads images, which takes seconds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from utils.utils_option_sections import DegradationType


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


def option(default: Any, text: str, **argument: Any) -> Any:
    """A field of a step that is also an argument of its command, ``text`` its help; ``...`` = must be given."""
    metadata = {"help": text, **argument}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


class Arguments:
    """Arguments of a command: a frozen dataclass, whose docstring is the help, the first line in the list of commands.

    Attributes:
        command: its name.
        example: what may follow it.
    """

    command: ClassVar[str]
    example: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ImageArguments(Arguments):
    """Of a command that makes images."""

    format: str = option("png", "npy: raw, large and quick to read in training", choices=("png", "npy"))


@dataclass(frozen=True)
class Multiscale(ImageArguments):
    """smaller versions of each image

    name.png is the image itself, nameT0.png, nameT1.png, ... are smaller by the
    factors, and the shorter side of nameS.png is fixed. Lanczos. Presets: ssl, and
    realesrgan with the factors 0.75 0.5 1/3, the shortest side 400 (as T3), no
    smallest side, and no name.png. The published scripts (Real-ESRGAN's first)
    enlarge small images to the shortest side, as --enlarge does; without it no S
    is made of them: an enlarged photograph lacks the detail that ground truth is
    there to teach.
    """

    command = "multiscale"
    example = "--input DF2K_HR OST --output DF2K_OST_multiscale"
    factors: tuple[float, ...] = option((0.75, 0.6, 1 / 3), "sizes of T0, T1, ...", type=factor, nargs="+")
    shortest: int = option(512, "the shorter side of S in pixels; smaller images get none", type=at_least(1))
    enlarge: bool = option(False, "make an S of those too, as the published data have", action="store_true")
    min_side: int = option(512, "leave out the others where their shorter side is less", type=at_least(0))


@dataclass(frozen=True)
class Subimages(ImageArguments):
    """square pieces of each image

    name_s001.png, name_s002.png, ..., row by row. Where a rest is left at the
    right or lower edge, one more row or column of pieces lies against that edge.
    """

    command = "subimages"
    example = "--input DF2K_OST_multiscale --output DF2K_OST"
    size: int = option(512, "side in pixels", type=at_least(1))
    step: int = option(256, "pixels from one to the next", type=at_least(1))
    threshold: int = option(0, "a rest of so many pixels gets no pieces of its own", type=at_least(0))


@dataclass(frozen=True)
class Masks(Arguments):
    """edge masks, where the self-similarity loss is computed

    Bit for bit the published ones, and those that training makes on line where
    dataroot_H_mask is not set. mat: variable "mat" of 0 and 1; png: 0 and 255;
    npy: raw, 0 and 1; both: mat and png.
    """

    command = "masks"
    example = "--input DF2K_OST --output DF2K_OST_mask"
    threshold: float = option(20.0, "of the Laplacian, in gray levels", type=level)
    format: str = option("mat", "what to write", choices=("mat", "png", "both", "npy"))


@dataclass(frozen=True)
class LRBicubic(ImageArguments):
    """low-quality images: MATLAB's bicubic

    Of each image, cut to a multiple of the scale; same names.
    """

    command = "lr-bicubic"
    example = "--input DF2K_OST --output DF2K_OST_x4"
    scale: int = option(4, "how much smaller", type=at_least(1, 64))


@dataclass(frozen=True)
class LRBlind(ImageArguments):
    """low-quality images, degraded at random

    name.png or, of several versions, name+00.png, name+01.png, ...: data sets
    pair these with name.png. The draws depend on the seed and the file's name
    alone, and manifest.jsonl tells what was done to each file.
    """

    command = "lr-blind"
    example = "--type blind_test --versions 30 --input DIV2K100 --output DIV2K100_blind"
    type: str = option(
        ..., f"one of {', '.join(get_args(DegradationType))}", choices=get_args(DegradationType), metavar="TYPE"
    )
    scale: int = option(4, "how much smaller", type=at_least(1, 64))
    versions: int = option(1, "of each image", type=at_least(1, 10000))
    seed: int = option(0, "other draws for another", type=at_least(0, 2**63 - 1))


@dataclass(frozen=True)
class Enlarge(ImageArguments):
    """larger images: MATLAB's bicubic

    What low-quality images are shown as, and compared with; same names.
    """

    command = "enlarge"
    example = "--input DIV2K100_blind --output DIV2K100_blind_bicubic"
    scale: int = option(4, "how much larger", type=at_least(1, 16))


@dataclass(frozen=True)
class Modcrop(ImageArguments):
    """images cut at the bottom and right to multiples

    12, as in the published test sets, suits the scales 2, 3 and 4; same names.
    With --multiple 1 --format npy any folder becomes a raw one.
    """

    command = "modcrop"
    example = "--input DIV2K_valid_HR --output DIV2K100"
    multiple: int = option(12, "of so many pixels", type=at_least(1))


COMMANDS: tuple[type[Arguments], ...] = (Multiscale, Subimages, Masks, LRBicubic, LRBlind, Enlarge, Modcrop)

# Of multiscale, whose own figures are the paper's.
PRESETS: dict[str, dict[str, Any]] = {
    "ssl": {},
    "realesrgan": {
        "factors": (0.75, 0.5, 1 / 3),
        "shortest": 400,
        "min_side": 0,
        "original": False,
        "shortest_name": "T3",
    },
}
