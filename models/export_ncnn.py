"""RRDBNet and SRVGGNetCompact as ncnn files, in the form in which Real-ESRGAN's programs for desktops have them."""

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.network_rrdb import RRDB
from models.network_rrdbnet import RRDBNet, RRDBNetBasicSR
from models.network_srvgg import SRVGGNetCompact
from utils.utils_ncnn import FLOAT16, MAGIC, Operations, compact, rrdbnet, rrdbnet_layers


def published_weights(netG: nn.Module) -> dict[str, Tensor] | None:
    """Weights by BasicSR's names, in the order of layers, of a network that is RRDBNet or Compact; else None.

    KAIR's numbered RRDB is RRDBNet where it enlarges by nearest neighbours; (leaky) ReLU is a PReLU of one slope.
    """
    weights = netG.state_dict()
    if isinstance(netG, SRVGGNetCompact):
        slopes = {
            f"body.{n}.weight": torch.full_like(weights["body.0.bias"], getattr(layer, "negative_slope", 0.0))
            for n, layer in enumerate(netG.body)
            if not isinstance(layer, nn.Conv2d | nn.PReLU)
        }
        names = [f"body.{n}.{kind}" for n in range(len(netG.body)) for kind in ("weight", "bias")]
        weights = {**weights, **slopes}
        return {name: weights[name] for name in names if name in weights}
    if isinstance(netG, RRDB):
        kinds = {type(layer) for layer in netG.modules() if not [*layer.children()]}
        if kinds != {nn.Conv2d, nn.LeakyReLU, nn.Upsample}:
            return None
    elif not isinstance(netG, RRDBNet | RRDBNetBasicSR):
        return None
    blocks, upsamplings = divmod(len(weights) // 2 - 4, 15)
    names = [f"{name}.{kind}" for name in rrdbnet_layers(blocks, upsamplings) for kind in ("weight", "bias")]
    return dict(zip(names, weights.values(), strict=True))


def ncnn_description(netG: nn.Module, scale: int) -> Callable[[Operations], int] | None:
    """What computes the network from its :func:`published_weights`; None where this file does not know how."""
    if isinstance(netG, SRVGGNetCompact):
        return lambda of: compact(of, len(netG.body) // 2, scale)
    weights = published_weights(netG)
    if weights is None or getattr(netG, "fold", 1) > 1:
        return None
    blocks, upsamplings = divmod(len(weights) // 2 - 4, 15)
    factors = [3] if scale == 3 else [2] * upsamplings
    return lambda of: rrdbnet(of, blocks, factors)


def write_ncnn(path: Path, description: Callable[[Operations], int], weights: Sequence[Tensor], half: bool) -> None:
    """Write ``path``, a ``.param`` file, and the ``.bin`` beside it; an image goes from blob "data" to blob "output".

    Args:
        description: see :func:`ncnn_description`.
        weights: in the order of layers, weight before bias.
        half: weights of convolutions in float16, as ncnn ships them; biases and slopes are float32.
    """
    writer = _Writer(weights, half)
    description(writer)
    path.write_text(writer.text(), encoding="utf-8", newline="\n")
    path.with_suffix(".bin").write_bytes(b"".join(writer.arrays))


@dataclass
class _Layer:
    kind: str
    inputs: list[int]
    settings: str


class _Writer:
    """Operations that become layers, one each, but for activations, which belong to their convolution."""

    def __init__(self, weights: Sequence[Tensor], half: bool) -> None:
        self.layers: list[_Layer] = []
        self.arrays: list[bytes] = []
        self._weights = iter(weights)
        self._half = half

    def __call__(self, kind: str, *of: float | str) -> int:
        match kind, of:
            case "image", ():
                return 0 if self.layers else self._layer("Input")
            case "conv", (_, int(x)):
                weight = next(self._weights)
                self.arrays += [self._tagged(weight), _floats(next(self._weights))]
                return self._layer("Convolution", x, settings=f"0={len(weight)} 1=3 4=1 5=1 6={weight.numel()}")
            case "leaky", (float(slope), int(x)):
                assert x == len(self.layers) - 1
                self.layers[x].settings += f" 9=2 -23310=1,{slope:e}"
                return x
            case "prelu", (_, int(x)):
                slopes = next(self._weights)
                self.arrays.append(_floats(slopes))
                return self._layer("PReLU", x, settings=f"0={len(slopes)}")
            case "concat", _:
                return self._layer("Concat", *map(int, of))
            case "shuffle", (scale, int(x)):
                return self._layer("PixelShuffle", x, settings=f"0={scale}")
            case "nearest", (factor, int(x)):
                return self._layer("Interp", x, settings=f"0=1 1={factor:e} 2={factor:e}")
            case _:
                raise ValueError(f"ncnn layer for {kind}")

    def sum(self, *terms: tuple[int, float]) -> int:
        numbers, factors = zip(*terms, strict=True)
        if set(factors) == {1}:
            return self._layer("BinaryOp", *numbers)
        listed = ",".join(f"{factor:e}" for factor in factors)
        return self._layer("Eltwise", *numbers, settings=f"0=1 -23301={len(factors)},{listed}")

    def text(self) -> str:
        """The ``.param`` file. What several layers read is split, since ncnn gives a blob away with its one reader."""
        readers = Counter(x for layer in self.layers for x in layer.inputs)
        read: Counter[int] = Counter()
        lines: list[str] = []
        blobs = 0
        for number, layer in enumerate(self.layers):
            inputs = []
            for x in layer.inputs:
                inputs.append(self._blob(x) + (f"_splitncnn_{read[x]}" if readers[x] > 1 else ""))
                read[x] += 1
            name = f"{layer.kind.lower()}_{number}"
            counts = f"{len(inputs)} 1"
            lines.append(" ".join([f"{layer.kind:24} {name:24} {counts}", *inputs, self._blob(number), layer.settings]))
            blobs += 1
            if (copies := readers[number]) > 1:
                blob = self._blob(number)
                outputs = " ".join(f"{blob}_splitncnn_{n}" for n in range(copies))
                lines.append(f"{'Split':24} {f'splitncnn_{number}':24} 1 {copies} {blob} {outputs}")
                blobs += copies
        return "\n".join([MAGIC, f"{len(lines)} {blobs}", *(line.rstrip() for line in lines)]) + "\n"

    def _layer(self, kind: str, *inputs: int, settings: str = "") -> int:
        self.layers.append(_Layer(kind, [*inputs], settings))
        return len(self.layers) - 1

    def _blob(self, number: int) -> str:
        return {0: "data", len(self.layers) - 1: "output"}.get(number, str(number))

    def _tagged(self, weight: Tensor) -> bytes:
        if not self._half:
            return struct.pack("<I", 0) + _floats(weight)
        halves = weight.detach().cpu().numpy().astype("<f2").tobytes()
        return struct.pack("<I", FLOAT16) + halves + bytes(-len(halves) % 4)


def _floats(values: Tensor) -> bytes:
    return values.detach().cpu().numpy().astype("<f4").tobytes()
