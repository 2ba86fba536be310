"""Blocks of the U-Nets that descend from guided diffusion (arXiv 2105.05233), under the names of their checkpoints."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """Times (N,) -> (N, channels) float32: cosines, then sines, of t exp(-ln(10000) k / half), k = 0 .. half - 1."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(conv: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """The same convolution, started at zero, so that what it is added to passes unchanged at first."""
    init.zeros_(conv.weight)
    if conv.bias is not None:
        init.zeros_(conv.bias)
    return conv


class ResBlock(nn.Module):
    """Two convolutions beside a skip, with the embedding of the time between them.

    Args:
        in_channels, out_channels: C_in, C_out.
        embedding: E, features of the time's embedding.
        groups: of the group norms.
        scale_shift: the embedding scales and shifts what the second norm puts out; else it is added before it.
        dropout: chance to drop a feature before the second convolution, in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        groups: int = 32,
        scale_shift: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(N, C_in, h, w), (N, E) -> (N, C_out, h, w)."""
        inner, time = self.in_layers(h), self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            norm, *rest = self.out_layers
            scale, shift = time.chunk(2, dim=1)
            inner = norm(inner) * (1 + scale) + shift
            for layer in rest:
                inner = layer(inner)
        else:
            inner = self.out_layers(inner + time)
        return self.skip_connection(h) + inner


class Downsample(nn.Module):
    """Half the size, rounded up, by a strided convolution."""

    def __init__(self, in_channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.op = nn.Conv2d(in_channels, out_channels or in_channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(N, C_in, h, w) -> (N, C_out, ceil(h / 2), ceil(w / 2)); the embedding is not looked at."""
        return self.op(h)


class Upsample(nn.Module):
    """Twice the size, by nearest neighbours and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(N, C, h, w) -> (N, C, 2 h, 2 w); the embedding is not looked at."""
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"))


class Block(nn.ModuleList):
    """Layers that are shown the time's embedding, one after the other."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Through each of them."""
        for layer in self:
            h = layer(h, embedding)
        return h
