"""Which generator a checkpoint holds, told from the names and shapes of its weights."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from utils.utils_error import UserError

Weights = Mapping[str, Tensor]


def infer_netG(state_dict: Weights, scale: int | None = None) -> dict[str, Any]:
    """Options for ``define_G`` of the network whose weights these are.

    Known are RRDBNet in the layouts of BasicSR (also with the pixel-unshuffle of scales 2 and 1), BSRGAN and old
    ESRGAN, KAIR's RRDB, MSRResNet in those of BasicSR and KAIR, and SRVGGNetCompact.

    Args:
        state_dict: bare weights by name, as ``utils_checkpoint.load_state_dict`` returns them.
        scale: the scale to take where the weights leave it open (one nearest-neighbour upsampling is x2 or x3), and
            to agree with where they do not.

    Returns:
        ``scale``, ``n_channels``, ``is_train`` (False) and ``netG``.

    Raises:
        UserError: none of these networks, or ``scale`` contradicts the weights, or is needed and None.
    """
    for is_layout, options in _LAYOUTS:
        if is_layout(state_dict):
            try:
                scales, n_channels, netG = options(state_dict)
            except (KeyError, IndexError, ValueError) as error:
                raise UserError(
                    f"weights look like {options.__name__.strip('_')} but are incomplete ({error}); give the network "
                    "with --opt"
                ) from error
            break
    else:
        raise UserError(
            f"no network of this program has weights called {', '.join(list(state_dict)[:3])}, ...; "
            "give the network with --opt"
        )
    if n_channels not in (1, 3):
        raise UserError(f"the network puts out {n_channels} channels; only 1 (gray) and 3 (RGB) can be tested")
    choices = " or ".join(map(str, scales))
    if scale is None and len(scales) > 1:
        raise UserError(f"these weights fit scale {choices} alike; say which with --scale")
    if scale is not None and scale not in scales:
        raise UserError(f"scale {scale} contradicts the weights, which are made for scale {choices}")
    return {"scale": scale or scales[0], "n_channels": n_channels, "is_train": False, "netG": netG}


# What a layout's function finds: the scales that fit, the output channels, the options of netG.
_Found = tuple[list[int], int, dict[str, Any]]


def _numbers(weights: Weights, pattern: str) -> list[int]:
    """The numbers that the group of ``pattern`` matches at the start of the names, sorted."""
    return sorted({int(match[1]) for match in (re.match(pattern, name) for name in weights) if match})


def _blocks(weights: Weights, pattern: str) -> int:
    return _numbers(weights, pattern)[-1] + 1


def _nearest_scales(upsamplings: int) -> list[int]:
    """Scales of this many nearest-neighbour upsamplings, whose factor leaves no trace in the weights."""
    return [2, 3] if upsamplings == 1 else [2**upsamplings]


def _rrdbnet_basicsr(weights: Weights) -> _Found:
    features, channels = weights["conv_first.weight"].shape[:2]
    out_channels = len(weights["conv_last.weight"])
    # The input of scales 2 and 1 is folded by 2 and 4 before an x4 network.
    scale = 4 // math.isqrt(channels // out_channels)
    options = {
        "net_type": "rrdbnet_basicsr",
        "nf": features,
        "nb": _blocks(weights, r"body\.(\d+)\.rdb1"),
        "gc": len(weights["body.0.rdb1.conv1.weight"]),
    }
    return [scale], out_channels, options


def _rrdbnet(weights: Weights) -> _Found:
    options = {
        "net_type": "rrdbnet",
        "nf": len(weights["conv_first.weight"]),
        "nb": _blocks(weights, r"RRDB_trunk\.(\d+)\."),
        "gc": len(weights["RRDB_trunk.0.RDB1.conv1.weight"]),
    }
    return _nearest_scales(len(_numbers(weights, r"upconv(\d+)\."))), len(weights["conv_last.weight"]), options


def _numbered_tail(weights: Weights) -> tuple[list[int], int, str]:
    """Scales, output channels and upsample mode of a numbered layout, whose tail is upsamplings, hr and last layer."""
    *numbers, _, last = (n for n in _numbers(weights, r"model\.(\d+)\.weight") if n > 0)
    out_channels, features = len(weights[f"model.{last}.weight"]), len(weights["model.0.weight"])
    kernels = [weights[f"model.{n}.weight"] for n in numbers]
    if not kernels or numbers[0] == 3:  # the nearest-neighbour layer, number 2, has no weights
        return _nearest_scales(len(kernels)), out_channels, "upconv"
    if len(kernels[0]) == features:
        return [math.prod(kernel.shape[-1] for kernel in kernels)], out_channels, "convtranspose"
    return [_shuffled(kernels, features)], out_channels, "pixelshuffle"


def _shuffled(kernels: list[Tensor], features: int) -> int:
    """The scale of pixel shuffles that follow these convolutions."""
    return math.prod(math.isqrt(len(kernel) // features) for kernel in kernels)


def _rrdb(weights: Weights) -> _Found:
    scales, out_channels, upsample_mode = _numbered_tail(weights)
    options = {
        "nf": len(weights["model.0.weight"]),
        "nb": _blocks(weights, r"model\.1\.sub\.(\d+)\.RDB1"),
        "gc": len(weights["model.1.sub.0.RDB1.conv1.0.weight"]),
    }
    # Old ESRGAN wraps conv5 as the others (conv5.0), KAIR does not.
    if "model.1.sub.0.RDB1.conv5.0.weight" in weights:
        return scales, out_channels, {"net_type": "rrdbnet", **options}
    return scales, out_channels, {"net_type": "rrdb", "upsample_mode": upsample_mode, **options}


def _msrresnet0(weights: Weights) -> _Found:
    scales, out_channels, upsample_mode = _numbered_tail(weights)
    options = {
        "net_type": "msrresnet0",
        "nc": len(weights["model.0.weight"]),
        "nb": _blocks(weights, r"model\.1\.sub\.(\d+)\.res"),
        "upsample_mode": upsample_mode,
    }
    return scales, out_channels, options


def _msrresnet1(weights: Weights) -> _Found:
    features = len(weights["conv_first.weight"])
    upconvs = [weights[f"upconv{n}.weight"] for n in _numbers(weights, r"upconv(\d+)\.")]
    options = {
        "net_type": "msrresnet1",
        "nc": features,
        "nb": _blocks(weights, r"(?:body|recon_trunk)\.(\d+)\.conv1"),
    }
    return [_shuffled(upconvs, features)], len(weights["conv_last.weight"]), options


def _srvgg_compact(weights: Weights) -> _Found:
    if "body.1.weight" not in weights:
        raise ValueError("whether ReLU or LeakyReLU is not written in them")
    features, channels = weights["body.0.weight"].shape[:2]
    last = _blocks(weights, r"body\.(\d+)\.weight") - 1
    options = {"net_type": "srvgg_compact", "nf": features, "nc": last // 2 - 1, "act_type": "prelu"}
    return [math.isqrt(len(weights[f"body.{last}.weight"]) // channels)], channels, options


def _has(*names: str, without: str = "") -> Callable[[Weights], bool]:
    return lambda weights: all(name in weights for name in names) and without not in weights


_LAYOUTS: list[tuple[Callable[[Weights], bool], Callable[[Weights], _Found]]] = [
    (_has("body.0.rdb1.conv1.weight"), _rrdbnet_basicsr),
    (_has("RRDB_trunk.0.RDB1.conv1.weight"), _rrdbnet),
    (_has("model.1.sub.0.RDB1.conv1.0.weight", without="f_concat.0.weight"), _rrdb),  # SPSR shares the trunk
    (_has("model.1.sub.0.res.0.weight"), _msrresnet0),
    (_has("body.0.conv1.weight", "conv_hr.weight"), _msrresnet1),
    (_has("recon_trunk.0.conv1.weight", "HRconv.weight", without="LRconv.weight"), _msrresnet1),  # RankSRGAN's has it
    (_has("body.0.weight", "body.2.weight"), _srvgg_compact),
]
