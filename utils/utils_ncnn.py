"""Published generators as ncnn files: ``X.param``, a text that names the layers, and ``X.bin``, their weights.

RRDBNet and SRVGGNetCompact are read, as Real-ESRGAN's programs for desktops ship them and as converters write them;
ncnn itself is not needed. A file is taken for one of them where all that it computes is what they compute.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from utils.utils_error import UserError

MAGIC = "7767517"
_LONGEST = 2**22  # bytes of a .param; that of RRDBNet of 23 blocks has 116,029
FLOAT16 = 0x01306B47  # before an array of weights; 0 stands before float32, and others before quantised ones


class _UnknownError(ValueError):
    """Not damaged, but nothing that is known."""


def is_ncnn(path: Path) -> bool:
    """By its content, whatever it is called."""
    with path.open("rb") as file:
        return file.read(8).split() == [MAGIC.encode()]


def load_ncnn(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Weights by BasicSR's names, float32, of the ``.param`` file ``path`` and the ``.bin`` beside it.

    Returns:
        The weights, and the kind of layer that follows the network, as one that reduces what x4 has made to x2: it is
        left out.

    Raises:
        UserError: one of the files is missing, damaged or quantised, or the network is another.
    """
    binary = path.with_suffix(".bin")
    if not binary.is_file():
        raise UserError(f"{path}: its weights are missing; put {binary.name} beside it")
    try:
        program = _run(path, binary)
        names, result = _network(program)
        program.weights.end()
    except OSError as error:
        raise UserError(f"{path}, {binary.name}: cannot be read: {error.strerror or error}") from error
    except _UnknownError as error:
        raise UserError(f"{path}: {error}; RRDBNet and SRVGGNetCompact in float32 or float16 can be read") from error
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: cannot be read, it or {binary.name} is damaged or no ncnn file ({error})") from error
    return dict(zip(names, program.arrays, strict=True)), None if program.result == result else program.last


# ------------------------------------------------------------------------------------------------- what is computed


class Operations(Protocol):
    """What a network is described with: done one after the other; an expression is called by a number."""

    def __call__(self, kind: str, *of: float | str) -> int: ...

    def sum(self, *terms: tuple[int, float]) -> int: ...


class _Expressions:
    """What is computed of an image, a number for each: two are equal where they do the same with the same weights."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}
        self._sums: dict[int, dict[int, float]] = {}

    def __call__(self, kind: str, *of: float | str) -> int:
        return self._known.setdefault((kind, *of), len(self._known))

    def sum(self, *terms: tuple[int, float]) -> int:
        """Of expressions with their factors; a product with a number is a sum of one, and becomes part of the next."""
        flat: dict[int, float] = {}
        for term, factor in terms:
            inner = self._sums.get(term, {})
            for one, own in inner.items() if len(inner) == 1 else [(term, 1.0)]:
                flat[one] = round(flat.get(one, 0.0) + own * factor, 5)
        number = self("sum", *sorted(flat.items()))  # type: ignore[arg-type]
        self._sums[number] = flat
        return number


def rrdbnet(of: Operations, blocks: int, factors: Sequence[float]) -> int:
    """The result of ``models/network_rrdbnet.py``; convolutions are numbered in their order."""
    numbers = itertools.count()

    def conv(x: int, leaky: bool = True) -> int:
        y = of("conv", next(numbers), x)
        return of("leaky", 0.2, y) if leaky else y

    shallow = x = conv(of("image"), leaky=False)
    for _ in range(blocks):
        begin = x
        for _ in range(3):
            dense = [x, conv(x)]
            for _ in range(3):
                dense.append(conv(of("concat", *dense)))
            x = of.sum((conv(of("concat", *dense), leaky=False), 0.2), (x, 1))
        x = of.sum((x, 0.2), (begin, 1))
    x = of.sum((conv(x, leaky=False), 1), (shallow, 1))
    for factor in factors:
        x = conv(of("nearest", factor, x))
    return conv(conv(x), leaky=False)


def rrdbnet_layers(blocks: int, upsamplings: int) -> list[str]:
    """BasicSR's names of these convolutions, in their order."""
    dense = itertools.product(range(blocks), range(1, 4), range(1, 6))
    body = [f"body.{block}.rdb{rdb}.conv{n}" for block, rdb, n in dense]
    return ["conv_first", *body, "conv_body", *(f"conv_up{n + 1}" for n in range(upsamplings)), "conv_hr", "conv_last"]


def compact(of: Operations, activations: int, scale: int) -> int:
    """The result of ``models/network_srvgg.py`` with PReLU."""
    x = of("image")
    for n in range(activations):
        x = of("prelu", n, of("conv", n, x))
    x = of("shuffle", scale, of("conv", activations, x))
    return of.sum((x, 1), (of("nearest", scale, of("image")), 1))


def _network(program: "_Program") -> tuple[list[str], int]:
    """Names for the arrays of a program, and which of its expressions is the result of the network.

    Raises:
        _UnknownError: it is none of the known networks.
    """
    of, convs = program.of, program.convs
    if not convs:
        raise _UnknownError("is another network")
    if program.slopes:
        scale = math.isqrt(len(convs[-1]) // max(1, convs[0].shape[1]))
        result = compact(of, program.slopes, scale)
        layers = [f"body.{n}" for n in range(2 * program.slopes + 1)]
    else:
        blocks, upsamplings = divmod(len(convs) - 4, 15)
        result = rrdbnet(of, blocks, program.factors[:upsamplings])
        layers = rrdbnet_layers(blocks, upsamplings)
    if result not in program.blobs.values():
        raise _UnknownError("is another network")
    has_bias = [not (program.slopes and n % 2) for n in range(len(layers))]  # slopes have none
    kinds = [("weight", "bias") if bias else ("weight",) for bias in has_bias]
    return [f"{layer}.{kind}" for layer, of_one in zip(layers, kinds, strict=True) for kind in of_one], result


# ---------------------------------------------------------------------------------------------------------- reading


class _Layer(NamedTuple):
    kind: str
    inputs: list[str]
    outputs: list[str]
    settings: dict[int, Any]  # numbers, and lists of them

    def has(self, *expected: tuple[int, float]) -> bool:
        """Whether these settings are so; those that a file leaves out are 0."""
        return all(self.settings.get(key, 0) == value for key, value in expected)


def _layers(path: Path) -> Iterator[_Layer]:
    """The text: a line for each layer, ``kind name inputs outputs`` (numbers), then blobs, then settings."""
    if path.stat().st_size > _LONGEST:
        raise _UnknownError(f"is longer than {_LONGEST:,} bytes")
    lines = path.read_text(encoding="utf-8").splitlines()
    count = int(lines[1].split()[0])
    if lines[0].strip() != MAGIC or count != sum(1 for line in lines[2:] if line.strip()):
        raise ValueError("its lines are not those that it announces")
    for line in lines[2 : 2 + count]:
        kind, _, inputs, outputs, *words = line.split()
        first, second = int(inputs), int(inputs) + int(outputs)
        settings: dict[int, Any] = {}
        for word in words[second:]:
            key, _, value = word.partition("=")
            if int(key) <= -23300:  # a list, its length in front
                settings[-23300 - int(key)] = [float(number) for number in value.split(",")[1:]]
            else:
                settings[int(key)] = float(value) if "." in value or "e" in value else int(value)
        yield _Layer(kind, words[:first], words[first:second], settings)


class _Weights:
    """The arrays of a ``.bin``, one after the other."""

    def __init__(self, path: Path) -> None:
        self._left = np.fromfile(path, np.uint8)

    def floats(self, count: int) -> Tensor:
        return torch.from_numpy(self._take(4 * count).view("<f4").astype(np.float32))

    def _take(self, size: int) -> np.ndarray:
        taken, self._left = self._left[:size], self._left[size:]
        if not 0 < size == len(taken):
            raise ValueError(f"{size} bytes wanted where {len(taken)} are left")
        return taken

    def tagged(self, count: int) -> Tensor:
        """An array whose first word says what it holds."""
        tag = int(self._take(4).view("<u4")[0])
        if tag == 0:
            return self.floats(count)
        if tag != FLOAT16:
            raise _UnknownError(f"has quantised weights (0x{tag:08X})")
        padded = self._take(-(-2 * count // 4) * 4)
        return torch.from_numpy(padded.view("<f2")[:count].astype(np.float32))

    def end(self) -> None:
        if len(self._left):
            raise ValueError(f"{len(self._left)} bytes are left over")


class _Program(NamedTuple):
    """A file, executed on expressions."""

    of: _Expressions
    weights: _Weights  # what is left of them
    blobs: dict[str, int]  # name -> what it holds
    result: int
    last: str  # the kind of the last layer
    arrays: list[Tensor]  # in the order of layers: weight and bias of a convolution, slopes
    convs: list[Tensor]  # weights alone
    slopes: int  # PReLUs
    factors: list[float]  # of nearest-neighbour enlargements


def _run(path: Path, binary: Path) -> _Program:
    of, weights = _Expressions(), _Weights(binary)
    blobs: dict[str, int] = {}
    arrays: list[Tensor] = []
    convs: list[Tensor] = []
    factors: list[float] = []
    slopes, result, last = 0, -1, ""
    for layer in _layers(path):
        x = [blobs[blob] for blob in layer.inputs]
        match layer.kind:
            case "Input":
                result = of("image")
            case "Split" | "Noop":
                (result,) = x
            case "Convolution" if layer.has((1, 3), (4, 1), (5, 1)):
                result = of("conv", len(convs), *x)
                width, count = layer.settings[0], layer.settings[6]
                convs.append(weights.tagged(count).reshape(width, count // (9 * width), 3, 3))
                arrays += [convs[-1], weights.floats(width)]
                if layer.settings.get(9, 0):
                    slope = round(layer.settings[10][0], 5) if layer.has((9, 2)) else layer.settings[9]
                    result = of("leaky" if layer.has((9, 2)) else "activation", slope, result)
            case "PReLU":
                result, slopes = of("prelu", slopes, *x), slopes + 1
                arrays.append(weights.floats(layer.settings[0]))
            case "ReLU":
                result = of("leaky", round(layer.settings.get(0, 0.0), 5), *x)
            case "Concat" if layer.has((0, 0)):
                result = of("concat", *x)
            case "PixelShuffle" if layer.has((1, 0)):
                result = of("shuffle", layer.settings[0], *x)
            case "Interp" if layer.has((0, 1), (3, 0), (4, 0)) and layer.settings[1] == layer.settings[2]:
                factors.append(layer.settings[1])
                result = of("nearest", layer.settings[1], *x)
            case "Eltwise" if layer.has((0, 1)):
                result = of.sum(*zip(x, layer.settings.get(1, [1.0] * len(x)), strict=True))
            case "BinaryOp" if layer.has((0, 0), (1, 0)):
                result = of.sum(*((one, 1.0) for one in x))
            case "BinaryOp" if layer.has((0, 2), (1, 1)):
                result = of.sum((x[0], layer.settings[2]))
            case _:  # it may stand after the network
                result = of(layer.kind, repr(sorted(layer.settings.items())), *x)
        blobs |= dict.fromkeys(layer.outputs, result)
        last = layer.kind
    return _Program(of, weights, blobs, result, last, arrays, convs, slopes, factors)
