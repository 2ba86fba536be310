"""ResShift's U-Net with Swin layers (arXiv 2307.12348), under the names of its authors' checkpoints."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.block_diffusion import Block, Downsample, ResBlock, Upsample, time_embedding
from models.network_swinir import WindowAttention, masks_of_windows, shift_masks

_GROUPS = 32  # of every group norm


def _published_masks(window: int, shift: int) -> Tensor:
    """The published code's masks of shifted windows, in the form of SwinIR's: [in the last row, in the last column].

    It mixes up two axes: only the last row of windows is masked, and there the columns that came from the other end
    are kept from the others where it should be the rows. Its weights are trained with these masks.
    """
    right = shift_masks(window, shift)
    columns = right[0, 1]
    return torch.stack((torch.zeros_like(columns),) * 2 + (columns,) * 2).unflatten(0, (2, 2))


class _SwinBlock(nn.Module):
    """Attention in windows, shifted or not, and a perceptron of 1 x 1 convolutions, each added to its input.

    Args:
        masks: of a shifted block, (2, 2, window ** 2, window ** 2); None = it does not shift.
        windows: a side of an image of the training size; sizes the masks that published files hold, and no more.
    """

    masks: Tensor | None
    attn_mask: Tensor | None

    def __init__(self, dim: int, window: int, heads: int, mlp_ratio: float, masks: Tensor | None, windows: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("masks", masks, persistent=False)
        self.register_buffer("attn_mask", None if masks is None else masks_of_windows(masks, windows, windows))
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.GroupNorm(_GROUPS, dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = nn.GroupNorm(_GROUPS, dim)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Conv2d(dim, hidden, 1), act=nn.GELU(), fc2=nn.Conv2d(hidden, dim, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim, h, w) -> the same; h and w divide by the window."""
        y = self.norm1(x).permute(0, 2, 3, 1)
        if self.masks is None:
            y = self.attn(y, None)
        else:
            mask = masks_of_windows(self.masks, y.shape[1] // self.window, y.shape[2] // self.window)
            shift = self.window // 2
            y = self.attn(torch.roll(y, (-shift, -shift), (1, 2)), mask)
            y = torch.roll(y, (shift, shift), (1, 2))
        x = x + y.permute(0, 3, 1, 2)
        return x + self.mlp(self.norm2(x))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A file's masks belong to the size its network was trained with; ours may have another.
        if self.attn_mask is not None and f"{prefix}attn_mask" in state_dict:
            state_dict[f"{prefix}attn_mask"] = self.attn_mask
        super()._load_from_state_dict(state_dict, prefix, *args)


class _SwinLayer(nn.Module):
    """Swin blocks, every second one shifted, between two 1 x 1 convolutions; nothing is added to its input.

    Args:
        channels: C, in and out.
        dim: features of the blocks.
        resolution: side of the map in training; one that is a single window does not shift.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        window: int,
        mlp_ratio: float,
        resolution: int,
        mask_quirk: bool,
    ) -> None:
        super().__init__()
        window = min(window, resolution)
        if resolution % window:
            raise ValueError(f"window_size {window} does not divide a level's side, {resolution}; change image_size")
        masks = None
        if resolution > window:
            masks = (_published_masks if mask_quirk else shift_masks)(window, window // 2)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, 1)})
        self.patch_unembed = nn.ModuleDict({"proj": nn.Conv2d(dim, channels, 1)})
        self.blocks = nn.Sequential(
            *(
                _SwinBlock(dim, window, heads, mlp_ratio, masks if n % 2 else None, resolution // window)
                for n in range(depth)
            )
        )

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(N, C, h, w) -> the same; the embedding is not looked at."""
        return self.patch_unembed["proj"](self.blocks(self.patch_embed["proj"](h)))


class UNetModelSwin(nn.Module):
    """ResShift's network: the prediction of x0 from the state x, its time and the low-quality image.

    The defaults are the published network. Sizes need not be those of training: any that divide by ``size_multiple``.

    Args:
        image_size: side of x in training. Which level has which side, and with it where Swin layers are and which of
            them shift, is counted from it.
        in_channels: of x; out_channels: of the prediction, the same.
        model_channels: features of the first level.
        attention_resolutions: sides of the levels, counted from ``image_size``, whose first block has a Swin layer.
        dropout: chance to drop a feature in residual blocks, in training.
        channel_mult: features of each level, in ``model_channels``; each but the last halves the map.
        num_res_blocks: residual blocks of each level.
        num_head_channels: features of an attention head.
        use_scale_shift_norm: the time scales and shifts features; else it is added to them.
        swin_depth: blocks of a Swin layer; swin_embed_dim: its features; mlp_ratio: widening in its perceptrons.
        window_size: side of the attention windows; levels that are smaller have one window.
        cond_lq: look at L.
        lq_size: side of L in training, ``image_size`` or more by a power of two; it is then reduced by convolutions.
        mask_quirk: mask shifted windows as the published code does (:func:`_published_masks`), which published weights
            need; False = Swin's masks.
        use_checkpoint: recompute blocks in the backward pass, to save memory at about a third more time.

    Raises:
        ValueError: values that make no network.
    """

    computed_buffers = ("attn_mask",)  # a checkpoint's may have another shape; see _SwinBlock

    def __init__(
        self,
        image_size: int = 64,
        in_channels: int = 3,
        model_channels: int = 160,
        out_channels: int = 3,
        attention_resolutions: Sequence[int] = (64, 32, 16, 8),
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: Sequence[int] = (2, 2, 2, 2),
        num_head_channels: int = 32,
        use_scale_shift_norm: bool = True,
        swin_depth: int = 2,
        swin_embed_dim: int = 192,
        window_size: int = 8,
        mlp_ratio: float = 4.0,
        cond_lq: bool = True,
        lq_size: int = 64,
        mask_quirk: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(f"out_channels {out_channels} must be in_channels, {in_channels}")
        if len(num_res_blocks) != len(channel_mult):
            raise ValueError(f"num_res_blocks names {len(num_res_blocks)} levels, channel_mult {len(channel_mult)}")
        last = len(channel_mult) - 1
        if image_size % 2**last:
            raise ValueError(f"image_size {image_size} must divide by {2**last}: it is halved {last} times")
        for name, features in (("model_channels", model_channels), ("swin_embed_dim", swin_embed_dim)):
            if features % _GROUPS:
                raise ValueError(f"{name} {features} must divide by {_GROUPS}, the groups of the norms")
        if swin_embed_dim % num_head_channels:
            raise ValueError(f"swin_embed_dim {swin_embed_dim} must divide by num_head_channels {num_head_channels}")
        halvings = (lq_size // image_size).bit_length() - 1
        if cond_lq and (halvings < 0 or lq_size != image_size * 2**halvings):
            raise ValueError(f"lq_size {lq_size} must be image_size {image_size} times 1, 2, 4, ...")
        self.channels = in_channels
        self.L_ratio = lq_size / image_size if cond_lq else None
        self.model_channels = model_channels
        self.use_checkpoint = use_checkpoint
        embedding = 4 * model_channels
        multiples = [2**last]

        def res_block(before: int, after: int) -> ResBlock:
            return ResBlock(before, after, embedding, _GROUPS, use_scale_shift_norm, dropout)

        def swin_layer(channels: int, level: int) -> _SwinLayer:
            side, heads = image_size >> level, swin_embed_dim // num_head_channels
            multiples.append(min(window_size, side) << level)
            return _SwinLayer(channels, swin_embed_dim, swin_depth, heads, window_size, mlp_ratio, side, mask_quirk)

        def attends(level: int) -> bool:
            return image_size >> level in attention_resolutions

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.feature_extractor = nn.Sequential()
        channels = 3
        for n in range(halvings if cond_lq else 0):
            conv = nn.Conv2d(channels, 16 << n, 3, padding=1)
            channels = 32 << n
            self.feature_extractor.extend((conv, nn.SiLU(), Downsample(16 << n, channels)))
        first = nn.Conv2d(in_channels + (channels if cond_lq else 0), model_channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([first])])
        channels = model_channels
        skips = [channels]
        for level, (mult, count) in enumerate(zip(channel_mult, num_res_blocks, strict=True)):
            for n in range(count):
                block = Block([res_block(channels, mult * model_channels)])
                channels = mult * model_channels
                if n == 0 and attends(level):
                    block.append(swin_layer(channels, level))
                self.input_blocks.append(block)
                skips.append(channels)
            if level != last:
                self.input_blocks.append(Block([Downsample(channels)]))
                skips.append(channels)
        self.middle_block = Block(
            [res_block(channels, channels), swin_layer(channels, last), res_block(channels, channels)]
        )
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            for n in range(num_res_blocks[level] + 1):
                block = Block([res_block(channels + skips.pop(), channel_mult[level] * model_channels)])
                channels = channel_mult[level] * model_channels
                if n == 0 and attends(level):
                    block.append(swin_layer(channels, level))
                if n == num_res_blocks[level] and level:
                    block.append(Upsample(channels))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.size_multiple = math.lcm(*multiples)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None, L: Tensor | None) -> Tensor:
        """The prediction for the state x at time t.

        Args:
            x: (N, C, h, w), h and w divisible by ``size_multiple``.
            t: (N,) long.
            y: not looked at; the published code calls its network (x, t, lq).
            L: (N, 3, h * L_ratio, w * L_ratio) in [-1, 1]; not looked at without ``cond_lq``.

        Returns:
            (N, C, h, w).

        Raises:
            ValueError: another size.
        """
        height, width = x.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(f"x is {height} x {width}: its sides must divide by {self.size_multiple}")
        embedding = self.time_embed(time_embedding(t, self.model_channels).to(x.dtype))
        if self.L_ratio is not None:
            x = torch.cat([x, self.feature_extractor(L)], dim=1)
        first, *blocks = self.input_blocks
        assert isinstance(first, nn.ModuleList)
        h = first[0](x)
        skips = [h]
        for block in blocks:
            h = self._run(block, h, embedding)
            skips.append(h)
        h = self._run(self.middle_block, h, embedding)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)

    def _run(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, h, embedding, use_reentrant=False)
        return block(h, embedding)
