"""Which generator a checkpoint holds, told from the names and shapes of its weights."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from utils.utils_error import UserError
from utils.utils_spandrel import describe_weights

Weights = Mapping[str, Tensor]

_REMEDY = "name the run's folder, its .safetensors file, or the network by main_test.py --opt"


def infer_netG(state_dict: Weights, scale: int | None = None) -> dict[str, Any]:
    """Options for ``define_G`` of the network whose weights these are.

    Known are RRDBNet in the layouts of BasicSR (also with the pixel-unshuffle of scales 2 and 1), BSRGAN and old
    ESRGAN, KAIR's RRDB, SPSRNet, MSRResNet in those of BasicSR and KAIR, RankSRGAN's SRResNet, SRVGGNetCompact, SwinIR,
    ELAN and ResShift's U-Net; any other that spandrel knows is left to it, where it is installed: net_type spandrel.

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
                    f"weights look like {options.__name__.strip('_')} but are incomplete ({error}); {_REMEDY}"
                ) from error
            break
    else:
        try:
            found = describe_weights(state_dict)
        except UserError as error:
            raise UserError(
                f"no network of this program has weights called {', '.join(list(state_dict)[:3])}, ...; {error}; "
                f"{_REMEDY}"
            ) from error
        scales, n_channels, netG = [found.scale], found.output_channels, {"net_type": "spandrel"}
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
    upsamplings = len(_numbers(weights, r"conv_up(\d+)\."))
    # The published input of scales 2 and 1 is folded by 2 and 4 before an x4 network; exported networks of other scales
    # have BasicSR's names alone.
    is_published = channels != out_channels or upsamplings == 2
    scales = [4 // math.isqrt(channels // out_channels)] if is_published else _nearest_scales(upsamplings)
    options = {
        "net_type": "rrdbnet_basicsr" if is_published else "rrdbnet",
        "nf": features,
        "nb": _blocks(weights, r"body\.(\d+)\.rdb1"),
        "gc": len(weights["body.0.rdb1.conv1.weight"]),
    }
    return scales, out_channels, options


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
    # The nearest-neighbour layer, number 2, has no weights.
    scales, upsample_mode = _upsampling(kernels, features, is_nearest=numbers[:1] == [3])
    return scales, out_channels, upsample_mode


def _upsampling(kernels: list[Tensor], features: int, is_nearest: bool) -> tuple[list[int], str]:
    """Scales and upsample mode of successive upsamplings with these kernels."""
    if not kernels or is_nearest:
        return _nearest_scales(len(kernels)), "upconv"
    if len(kernels[0]) == features:
        return [math.prod(kernel.shape[-1] for kernel in kernels)], "convtranspose"
    return [_shuffled(kernels, features)], "pixelshuffle"


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


def _spsr(weights: Weights) -> _Found:
    features = len(weights["model.0.weight"])
    *numbers, _, _ = _numbers(weights, r"b_module\.(\d+)\.weight")
    kernels = [weights[f"b_module.{n}.weight"] for n in numbers]
    scales, upsample_mode = _upsampling(kernels, features, is_nearest=numbers[:1] == [1])
    options = {
        "net_type": "spsr",
        "nf": features,
        "nb": _blocks(weights, r"model\.1\.sub\.(\d+)\.RDB1"),
        "gc": len(weights["model.1.sub.0.RDB1.conv1.0.weight"]),
        "upsample_mode": upsample_mode,
    }
    return scales, len(weights["f_HR_conv1.0.weight"]), options


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


def _ranksrgan_srresnet(weights: Weights) -> _Found:
    scales, out_channels, options = _msrresnet1(weights)
    return scales, out_channels, {"net_type": "ranksrgan_srresnet", "nf": options["nc"], "nb": options["nb"]}


def _srvgg_compact(weights: Weights) -> _Found:
    if "body.1.weight" not in weights:
        raise ValueError("whether ReLU or LeakyReLU is not written in them")
    features, channels = weights["body.0.weight"].shape[:2]
    last = _blocks(weights, r"body\.(\d+)\.weight") - 1
    options = {"net_type": "srvgg_compact", "nf": features, "nc": last // 2 - 1, "act_type": "prelu"}
    return [math.isqrt(len(weights[f"body.{last}.weight"]) // channels)], channels, options


def _swinir(weights: Weights) -> _Found:
    features, channels = weights["conv_first.weight"].shape[:2]
    groups = range(_blocks(weights, r"layers\.(\d+)\."))
    blocks = "layers.{}.residual_group.blocks."
    window = math.isqrt(len(weights["layers.0.residual_group.blocks.0.attn.relative_position_index"]))
    mask = weights.get("layers.0.residual_group.blocks.1.attn_mask")  # absent where nothing shifts
    options = {
        "net_type": "swinir",
        "img_size": window if mask is None else window * math.isqrt(len(mask)),
        "window_size": window,
        # Not written in the weights; of the published networks the JPEG ones have it, and they alone have windows of 7.
        "img_range": 255.0 if window == 7 else 1.0,
        "depths": [_blocks(weights, re.escape(blocks.format(g)) + r"(\d+)\.") for g in groups],
        "embed_dim": features,
        "num_heads": [weights[blocks.format(g) + "0.attn.relative_position_bias_table"].shape[1] for g in groups],
        "mlp_ratio": len(weights["layers.0.residual_group.blocks.0.mlp.fc1.bias"]) / features,
        "resi_connection": "3conv" if "conv_after_body.0.weight" in weights else "1conv",
    }
    if "conv_hr.weight" in weights:
        scales = _nearest_scales(len(_numbers(weights, r"conv_up(\d+)\.")))
        return scales, channels, options | {"upsampler": "nearest+conv"}
    kernels = [weights[f"upsample.{n}.weight"] for n in _numbers(weights, r"upsample\.(\d+)\.weight")]
    if "conv_before_upsample.0.weight" in weights:
        width = len(weights["conv_before_upsample.0.weight"])
        return [_shuffled(kernels, width)], channels, options | {"upsampler": "pixelshuffle"}
    if kernels:
        return [_shuffled(kernels, channels)], channels, options | {"upsampler": "pixelshuffledirect"}
    return [1], channels, options | {"upsampler": None}


def _elan(weights: Weights) -> _Found:
    features, channels = weights["head.0.weight"].shape[:2]
    sharing = _blocks(weights, r"body\.0\.modules_gmsa\.gmsa_(\d+)\.")
    # The windows and img_range are not written in the weights: the published ones are the defaults.
    options = {
        "net_type": "elan",
        "m_elan": _blocks(weights, r"body\.(\d+)\.") * sharing,
        "c_elan": features,
        "n_share": sharing - 1,
        "r_expand": len(weights["body.0.modules_lfe.lfe_0.conv1.shift_conv.weight"]) // features,
    }
    return [math.isqrt(len(weights["tail.0.weight"]) // channels)], channels, options


def _resshift(weights: Weights) -> _Found:
    channels, features = len(weights["out.2.weight"]), len(weights["input_blocks.0.0.weight"])
    widths, counts, windows, sides = [0], [0], {}, {}
    for n in _numbers(weights, r"input_blocks\.(\d+)\.")[1:]:
        if f"input_blocks.{n}.0.op.weight" in weights:
            widths.append(0)
            counts.append(0)
            continue
        level = len(widths) - 1
        widths[level] = len(weights[f"input_blocks.{n}.0.out_layers.3.weight"])
        counts[level] += 1
        swin = f"input_blocks.{n}.1.blocks."
        if f"{swin}0.attn.relative_position_index" in weights:
            windows[level] = math.isqrt(len(weights[f"{swin}0.attn.relative_position_index"]))
            mask = weights.get(f"{swin}1.attn_mask")  # absent where the level is one window
            sides[level] = windows[level] * (1 if mask is None else math.isqrt(len(mask)))
    swin = "middle_block.1.blocks."
    last = len(widths) - 1
    middle = math.isqrt(len(weights[f"{swin}0.attn.relative_position_index"]))
    image_size = max([side << level for level, side in sides.items()] + [middle << last])
    embed_dim = len(weights[f"{swin}0.norm1.weight"])
    halvings = len(_numbers(weights, r"feature_extractor\.(\d+)\.op\."))
    if 2**halvings > 4:
        raise ValueError(f"L is {2**halvings} times as large as the latent of VQ-f4")
    options = {
        "net_type": "resshift_unet_swin",
        "image_size": image_size,
        "in_channels": channels,
        "model_channels": features,
        "out_channels": channels,
        "attention_resolutions": [image_size >> level for level in windows],
        "channel_mult": [width // features for width in widths],
        "num_res_blocks": counts,
        "num_head_channels": embed_dim // weights[f"{swin}0.attn.relative_position_bias_table"].shape[1],
        "use_scale_shift_norm": len(weights["middle_block.0.emb_layers.1.weight"]) == 2 * widths[-1],
        "swin_depth": _blocks(weights, re.escape(swin) + r"(\d+)\."),
        "swin_embed_dim": embed_dim,
        "window_size": max([*windows.values(), middle]),
        "mlp_ratio": len(weights[f"{swin}0.mlp.fc1.weight"]) / embed_dim,
        "cond_lq": weights["input_blocks.0.0.weight"].shape[1] > channels,
        "lq_size": image_size << halvings,
    }
    return [4 >> halvings], 3, options  # VQ-f4 halves twice; the network's own pyramid comes instead of enlarging L


def _has(*names: str, without: str = "") -> Callable[[Weights], bool]:
    return lambda weights: without not in weights and all(name in weights for name in names)


_LAYOUTS: list[tuple[Callable[[Weights], bool], Callable[[Weights], _Found]]] = [
    (_has("body.0.rdb1.conv1.weight"), _rrdbnet_basicsr),
    (_has("RRDB_trunk.0.RDB1.conv1.weight"), _rrdbnet),
    (_has("model.1.sub.0.RDB1.conv1.0.weight", "f_concat.0.weight"), _spsr),
    (_has("model.1.sub.0.RDB1.conv1.0.weight", without="model.1.sub.0.RDB1.conv1x1.weight"), _rrdb),  # ESRGAN+ has it
    (_has("model.1.sub.0.res.0.weight"), _msrresnet0),
    (_has("body.0.conv1.weight", "conv_hr.weight"), _msrresnet1),
    (_has("recon_trunk.0.conv1.weight", "HRconv.weight", "LRconv.weight"), _ranksrgan_srresnet),
    (_has("recon_trunk.0.conv1.weight", "HRconv.weight"), _msrresnet1),
    (_has("body.0.weight", "body.2.weight"), _srvgg_compact),
    (
        _has(
            "layers.0.residual_group.blocks.0.attn.relative_position_index",  # HAT keeps it elsewhere,
            "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",  # and Swin2SR has no such table
        ),
        _swinir,
    ),
    (_has("body.0.modules_lfe.lfe_0.conv0.shift_conv.weight"), _elan),
    (_has("input_blocks.0.0.weight", "middle_block.1.patch_embed.proj.weight"), _resshift),
]
