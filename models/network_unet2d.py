"""The U-Net of diffusers (UNet2DModel) on the state beside the low-quality image: small enough for pixels and a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.utils_error import UserError


class UNet2D(nn.Module):
    """A U-Net on cat(x, y), both folded by ``patch`` (pixel-unshuffle), which makes the maps it works on smaller.

    With ``residual`` its last layer starts at zero, so that the output is y before any training.

    Args:
        channels: C of x and y.
        patch: pixels a side that become channels.
        residual: add y to the output, for a network that predicts x0.
        block_out_channels: features, level by level; each level but the last halves the maps.
        layers_per_block: residual blocks of a level.
        attention: whether a level has self-attention; empty = none has.
        mid_attention: self-attention at the bottom.
        attention_head_dim: features of a head.
        norm_num_groups: groups of the group norms.
        use_checkpoint: recompute blocks in the backward pass.

    Raises:
        UserError: diffusers is not installed.
        ValueError: values that do not go together.
    """

    L_ratio = None  # it looks at y, not at L

    def __init__(
        self,
        channels: int = 3,
        patch: int = 1,
        residual: bool = True,
        block_out_channels: Sequence[int] = (64, 128, 256),
        layers_per_block: int = 2,
        attention: Sequence[bool] = (),
        mid_attention: bool = True,
        attention_head_dim: int = 32,
        norm_num_groups: int = 32,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise UserError(
                "netG: unet2d needs the package diffusers; pip install -r requirements-extra.txt"
            ) from error
        attention = list(attention) or [False] * len(block_out_channels)
        if len(attention) != len(block_out_channels):
            raise ValueError(f"attention names {len(attention)} levels, block_out_channels {len(block_out_channels)}")
        for features in block_out_channels:
            if features % norm_num_groups:
                raise ValueError(f"block_out_channels: {features} does not divide by norm_num_groups {norm_num_groups}")
        attended = [n for n, here in zip(block_out_channels, attention, strict=True) if here]
        for features in [*attended, *([block_out_channels[-1]] if mid_attention else [])]:
            if features % attention_head_dim:
                raise ValueError(f"attention_head_dim {attention_head_dim} does not divide {features} features")
        self.channels, self.patch, self.residual = channels, patch, residual
        self.size_multiple = patch * 2 ** (len(block_out_channels) - 1)
        unet: Any = UNet2DModel(
            in_channels=2 * channels * patch**2,
            out_channels=channels * patch**2,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
            add_attention=mid_attention,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
        )
        if use_checkpoint:
            unet.enable_gradient_checkpointing()
        if residual:
            nn.init.zeros_(unet.conv_out.weight)
            nn.init.zeros_(unet.conv_out.bias)
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, y: Tensor, L: Tensor | None = None) -> Tensor:
        """The prediction for the state x at time t.

        Args:
            x: (N, C, h, w), h and w divisible by ``size_multiple``.
            t: (N,) long.
            y: (N, C, h, w), the enlarged low-quality image.
            L: not looked at.

        Returns:
            (N, C, h, w).
        """
        folded = F.pixel_unshuffle(torch.cat([x, y], 1), self.patch)
        output = F.pixel_shuffle(self.unet(folded, t).sample, self.patch)
        return y + output if self.residual else output
