"""SwinIR, attention in shifted windows (arXiv 2108.10257), under the names of its authors' and KAIR's checkpoints.

The network is our own: spandrel's pads in one of the two published ways only, checkpoints its blocks by the reentrant
method, which refuses ``autograd.grad``, and refuses weights that were saved for another ``img_size``.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.utils.checkpoint import checkpoint

from models.basicblock import LeakyConv2d, conv_layers, sequential, upscale_factors

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K


def colour_mean(channels: int) -> Tensor:
    """What SwinIR and ELAN subtract from their input, ``(1, channels, 1, 1)``: DIV2K's mean, or 0 if not RGB."""
    return torch.tensor(RGB_MEAN if channels == 3 else [0.0] * channels).view(1, -1, 1, 1)


def extend(x: Tensor, height: int, width: int, repeat_edge: bool = False) -> Tensor:
    """Enlarge ``(N, C, h, w)`` at the bottom and right by mirroring, to and fro as often as it takes.

    Args:
        height, width: the size to reach.
        repeat_edge: mirror behind the last pixel, which then comes twice; else about it, as ``F.pad`` reflects.
    """
    for dim, size in ((2, height), (3, width)):
        if size > x.shape[dim]:
            turn = 2 * x.shape[dim] - (1 if repeat_edge else 2)
            # A tensor: ONNX's exporter knows the remainder of no number that depends on the image's size.
            period = torch.full((1,), max(turn + repeat_edge, 1), device=x.device)
            index = torch.arange(size, device=x.device) % period
            x = x.index_select(dim, torch.minimum(index, turn - index))
    return x


def shift_masks(window: int, shift: int) -> Tensor:
    """The four masks of shifted windows, ``(2, 2, window ** 2, window ** 2)``: [in the last row, in the last column].

    Rolling by ``shift`` brings pixels of the other end of the image into the last row and column of windows. There, and
    only there, -100 keeps pixels from seeing those that are not their neighbours.
    """
    rolled = torch.arange(window) >= window - shift
    y, x = rolled.repeat_interleave(window), rolled.repeat(window)
    rows, columns = y[:, None] != y, x[:, None] != x
    return -100.0 * torch.stack((torch.zeros_like(rows), columns, rows, rows | columns)).unflatten(0, (2, 2))


def masks_of_windows(masks: Tensor, rows: int, columns: int) -> Tensor:
    """A mask for each window of an image of ``rows`` x ``columns`` of them, ``(rows * columns, N, N)``."""
    last_row = torch.arange(1, rows + 1, device=masks.device) // rows
    last_column = torch.arange(1, columns + 1, device=masks.device) // columns
    return masks[last_row[:, None], last_column].flatten(0, 1)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learnt bias for each relative position (section 3.2).

    ``(N, H, W, dim)`` and an optional mask for each window -> ``(N, H, W, dim)``; H and W divide by the window.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.window = window
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        pixels = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        y, x = (pixels[:, None] - pixels + window - 1).unbind(-1)
        self.register_buffer("relative_position_index", y * (2 * window - 1) + x)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n, height, width, dim = x.shape
        rows, columns, pixels = height // self.window, width // self.window, self.window**2
        qkv = self.qkv(x).view(n, rows, self.window, columns, self.window, 3, self.heads, dim // self.heads)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, n, rows * columns, self.heads, pixels, dim // self.heads)
        q, k, v = qkv.unbind(0)  # (n, windows, heads, pixels, dim of a head)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        # Written out: a bias that needs a gradient leaves scaled_dot_product_attention no fused kernel on the CPU.
        attention = torch.add(bias, q @ k.transpose(-2, -1), alpha=(dim // self.heads) ** -0.5)
        if mask is not None:
            attention += mask[:, None]
        out = (attention.softmax(-1) @ v).view(n, rows, columns, self.heads, self.window, self.window, -1)
        return self.proj(out.permute(0, 1, 4, 2, 5, 3, 6).reshape(n, height, width, dim))


class _SwinBlock(nn.Module):
    """Attention in windows, shifted or not, and a two-layer perceptron, each added to its input (section 3.2).

    Args:
        attn_mask: of a shifted block, the masks for ``img_size``. They are in published files, hence kept, but not
            used: they are the same masks for one size as :func:`masks_of_windows` makes for any.
    """

    attn_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        window: int,
        shift: int,
        heads: int,
        mlp_ratio: float,
        drop_path: float,
        attn_mask: Tensor | None,
    ) -> None:
        super().__init__()
        self.shift = shift
        self.drop_path = drop_path
        self.register_buffer("attn_mask", attn_mask)
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm1(x)
        if self.shift:
            y = self.attn(torch.roll(y, (-self.shift, -self.shift), (1, 2)), mask)
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        else:
            y = self.attn(y, None)
        x = x + self._drop(y)
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, residual: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return residual
        from torchvision.ops import stochastic_depth  # as slow to import as in network_feature.py

        return stochastic_depth(residual, self.drop_path, "row", self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A file's masks belong to the size its network was trained with; ours may have another.
        if self.attn_mask is not None and f"{prefix}attn_mask" in state_dict:
            state_dict[f"{prefix}attn_mask"] = self.attn_mask
        super()._load_from_state_dict(state_dict, prefix, *args)


def _residual_conv(dim: int, resi_connection: str) -> nn.Module:
    match resi_connection:
        case "1conv":
            return nn.Conv2d(dim, dim, 3, 1, 1)
        case "3conv":
            middle = nn.Conv2d(dim // 4, dim // 4, 1)
            return sequential(
                *conv_layers(dim, dim // 4, "L"), middle, nn.LeakyReLU(0.2, inplace=True), *conv_layers(dim // 4, dim)
            )
        case _:
            raise ValueError(f"resi_connection {resi_connection!r}: expected 1conv or 3conv")


class _ResidualGroup(nn.Module):
    """``x + conv(blocks(x))`` on ``(N, H, W, C)``, the RSTB of the paper (section 3.2)."""

    def __init__(self, blocks: list[_SwinBlock], conv: nn.Module, use_checkpoint: bool) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv = conv

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        deep = x
        for block in self.residual_group["blocks"].children():
            if self.use_checkpoint and torch.is_grad_enabled():
                deep = checkpoint(block, deep, mask, use_reentrant=False)
            else:
                deep = block(deep, mask)
        return x + self.conv(deep.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinIR(nn.Module):
    """SwinIR: ``(N, in_chans, H, W)`` in [0, 1] -> ``(N, in_chans, upscale H, upscale W)``, not clamped, of any size.

    The defaults are SwinIR-M, x4. Checkpoints of any ``img_size`` load.

    Args:
        upscale: 1, 2, 3, 4 or 8; pixelshuffledirect takes any.
        in_chans: image channels; 3 subtracts DIV2K's mean.
        img_size: side of the input in training, a multiple of ``window_size``. It sizes the masks that published files
            hold, and no more, except that blocks do not shift where it equals ``window_size``.
        window_size: side of the attention windows.
        img_range: the input is multiplied, the output divided by it.
        depths: Swin blocks of each residual group; num_heads: attention heads of each.
        embed_dim: features; mlp_ratio: widening in the perceptrons.
        upsampler: pixelshuffle (classical), pixelshuffledirect (lightweight), nearest+conv (real-world), or None or ""
            for restoration without upscaling.
        resi_connection: 1conv or 3conv, the convolutions that end each group and the trunk.
        padding: reflect fills up to a multiple of the window, as published; mirror adds up to a whole window, also
            where the size fits, and repeats the edge, as the original SSL code does.
        drop_path_rate: chance to skip the last block's residuals in training, rising linearly from 0 at the first.
        ape: a learnt absolute position embedding; the padded input must then have ``img_size``.
        use_checkpoint: recompute each block in the backward pass, to save memory at about a third more time.

    Raises:
        ValueError: values that make no network.
    """

    computed_buffers = ("attn_mask",)  # a checkpoint's may have another shape; see _SwinBlock
    mean: Tensor
    shift_masks: Tensor

    def __init__(
        self,
        upscale: int = 4,
        in_chans: int = 3,
        img_size: int = 64,
        window_size: int = 8,
        img_range: float = 1.0,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        embed_dim: int = 180,
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        mlp_ratio: float = 2.0,
        upsampler: str | None = "pixelshuffle",
        resi_connection: str = "1conv",
        padding: str = "reflect",
        drop_path_rate: float = 0.1,
        ape: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if img_size % window_size:
            raise ValueError(f"img_size {img_size} must be a multiple of window_size {window_size}")
        if len(depths) != len(num_heads):
            raise ValueError(f"num_heads has {len(num_heads)} entries and depths {len(depths)}: give as many")
        for heads in num_heads:
            if embed_dim % heads:
                raise ValueError(f"embed_dim {embed_dim} must divide by num_heads {heads}")
        if padding not in ("reflect", "mirror"):
            raise ValueError(f"padding {padding!r}: expected reflect or mirror")
        self.upscale = upscale
        self.window_size = window_size
        self.size_multiple = window_size  # tiles start on the grid of the windows
        self.img_range = img_range
        self.upsampler = upsampler or ""
        self.padding = padding
        shift = window_size // 2 if img_size > window_size else 0
        masks = shift_masks(window_size, shift)
        self.register_buffer("mean", colour_mean(in_chans), persistent=False)
        self.register_buffer("shift_masks", masks, persistent=False)

        self.absolute_pos_embed = nn.Parameter(torch.empty(1, img_size**2, embed_dim)) if ape else None
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, 1, 1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.layers = nn.ModuleList()
        windows = img_size // window_size
        before = 0
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = []
            for n in range(depth):
                shifted = n % 2 == 1 and shift > 0
                blocks.append(
                    _SwinBlock(
                        embed_dim,
                        window_size,
                        shift if shifted else 0,
                        heads,
                        mlp_ratio,
                        drop_path_rate * (before + n) / max(sum(depths) - 1, 1),
                        masks_of_windows(masks, windows, windows) if shifted else None,
                    )
                )
            before += depth
            self.layers.append(_ResidualGroup(blocks, _residual_conv(embed_dim, resi_connection), use_checkpoint))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = _residual_conv(embed_dim, resi_connection)
        self._add_reconstruction(embed_dim, in_chans)

        if self.absolute_pos_embed is not None:
            init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                init.trunc_normal_(layer.weight, std=0.02)
                init.zeros_(layer.bias)

    def _add_reconstruction(self, embed_dim: int, in_chans: int, features: int = 64) -> None:
        match self.upsampler:
            case "pixelshuffle":
                self.conv_before_upsample = nn.Sequential(*conv_layers(embed_dim, features), nn.LeakyReLU(inplace=True))
                self.upsample = nn.Sequential()
                for factor in upscale_factors(self.upscale):
                    self.upsample.extend((*conv_layers(features, features * factor**2), nn.PixelShuffle(factor)))
                self.conv_last = nn.Conv2d(features, in_chans, 3, 1, 1)
            case "pixelshuffledirect":
                self.upsample = nn.Sequential(
                    *conv_layers(embed_dim, in_chans * self.upscale**2), nn.PixelShuffle(self.upscale)
                )
            case "nearest+conv":
                self.conv_before_upsample = nn.Sequential(*conv_layers(embed_dim, features), nn.LeakyReLU(inplace=True))
                for n in range(1, len(upscale_factors(self.upscale)) + 1):
                    self.add_module(f"conv_up{n}", LeakyConv2d(features, features))
                self.conv_hr = LeakyConv2d(features, features)
                self.conv_last = nn.Conv2d(features, in_chans, 3, 1, 1)
            case "" if self.upscale == 1:
                self.conv_last = nn.Conv2d(embed_dim, in_chans, 3, 1, 1)
            case "":
                raise ValueError(f"without an upsampler the scale is 1, not {self.upscale}: name an upsampler")
            case unknown:
                raise ValueError(f"upsampler {unknown!r}: expected pixelshuffle, pixelshuffledirect or nearest+conv")

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        whole = self.padding == "mirror"
        height, width = ((n + (0 if whole else -1)) // self.window_size * self.window_size for n in (h, w))
        x = extend(x, height + self.window_size, width + self.window_size, repeat_edge=whole)
        x = (x - self.mean) * self.img_range
        shallow = self.conv_first(x)
        E = self._reconstruct(x, shallow + self.conv_after_body(self._trunk(shallow)))
        return (E / self.img_range + self.mean)[..., : h * self.upscale, : w * self.upscale]

    def _trunk(self, shallow: Tensor) -> Tensor:
        features = self.patch_embed["norm"](shallow.permute(0, 2, 3, 1))
        _, height, width, dim = features.shape
        if self.absolute_pos_embed is not None:
            if height * width != self.absolute_pos_embed.shape[1]:
                side = round(self.absolute_pos_embed.shape[1] ** 0.5)
                raise ValueError(f"ape takes padded inputs of {side} x {side} pixels only, got {height} x {width}")
            features = features + self.absolute_pos_embed.view(1, height, width, dim)
        # Made here once for all blocks, on the device, by looking up which of four masks a window needs.
        mask = masks_of_windows(self.shift_masks, height // self.window_size, width // self.window_size)
        for layer in self.layers:
            features = layer(features, mask)
        return self.norm(features).permute(0, 3, 1, 2)

    def _reconstruct(self, x: Tensor, features: Tensor) -> Tensor:
        match self.upsampler:
            case "pixelshuffle":
                return self.conv_last(self.upsample(self.conv_before_upsample(features)))
            case "pixelshuffledirect":
                return self.upsample(features)
            case "nearest+conv":
                features = self.conv_before_upsample(features)
                for n, factor in enumerate(upscale_factors(self.upscale), start=1):
                    enlarged = F.interpolate(features, scale_factor=factor, mode="nearest")
                    features = self.get_submodule(f"conv_up{n}")(enlarged)
                return self.conv_last(self.conv_hr(features))
            case _:
                return x + self.conv_last(features)
