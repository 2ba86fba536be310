"""ELAN, attention in windows of several sizes (arXiv 2203.06697), under the names of the original SSL code."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.network_swinir import colour_mean, extend


class _ShiftConv(nn.Module):
    """Fifths of the channels look one pixel right, left, down, up and nowhere; a 1 x 1 convolution mixes them.

    The looking is a fixed depthwise convolution, whose kernels published files hold among the weights.
    """

    def __init__(self, in_nc: int, out_nc: int) -> None:
        super().__init__()
        fifth = in_nc // 5
        kernels = torch.zeros(in_nc, 1, 3, 3)
        for n, (y, x) in enumerate(((1, 2), (1, 0), (2, 1), (0, 1))):
            kernels[n * fifth : (n + 1) * fifth, :, y, x] = 1
        kernels[4 * fifth :, :, 1, 1] = 1
        self.weight = nn.Parameter(kernels, requires_grad=False)
        self.conv1x1 = nn.Conv2d(in_nc, out_nc, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(F.conv2d(x, self.weight, padding=1, groups=len(self.weight)))


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel of ``(N, nc, H, W)``."""

    def __init__(self, nc: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(nc)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _local_features(nc: int, r_expand: int) -> nn.Module:
    """Two shift convolutions with ``nc * r_expand`` channels between them (LFE, section 3.2)."""

    def shift_conv(in_nc: int, out_nc: int) -> nn.Module:
        return nn.Sequential(OrderedDict(shift_conv=_ShiftConv(in_nc, out_nc)))

    wide = nc * r_expand
    return nn.Sequential(OrderedDict(conv0=shift_conv(nc, wide), act=nn.ReLU(inplace=True), conv1=shift_conv(wide, nc)))


def _windows(x: Tensor, size: int) -> Tensor:
    """``(N, C, H, W)`` -> ``(N * rows, columns, size ** 2, C)``, the pixels of each window."""
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 1)


def _image(windows: Tensor, size: int, n: int) -> Tensor:
    """The inverse of :func:`_windows` for ``n`` images."""
    x = windows.unflatten(0, (n, -1)).unflatten(3, (size, size))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class _GroupwiseAttention(nn.Module):
    """Each group of channels attends within windows of its own size (GMSA, section 3.2), queries serving as keys.

    Args:
        shifted: windows lie half a window further, round the end of the image, without a mask.
        shares: only values are projected; the queries are those that an earlier block returned.
    """

    def __init__(self, nc: int, window_sizes: Sequence[int], shifted: bool, shares: bool) -> None:
        super().__init__()
        self.window_sizes = window_sizes
        self.shifted = shifted
        wide = nc if shares else 2 * nc
        self.project_inp = nn.Sequential(nn.Conv2d(nc, wide, 1), _ChannelNorm(wide))
        self.project_out = nn.Conv2d(nc, nc, 1)

    def forward(self, x: Tensor, shared: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        queries = [] if shared is None else shared
        outputs = []
        groups = self.project_inp(x).chunk(len(self.window_sizes), dim=1)
        for n, (group, size) in enumerate(zip(groups, self.window_sizes, strict=True)):
            if self.shifted:
                group = torch.roll(group, (-(size // 2), -(size // 2)), (2, 3))
            v = _windows(group, size)
            if shared is None:
                q, v = v.chunk(2, dim=-1)
                queries.append(q)
            # Shared are the queries and not, as published, the softmax of their products: so these need not be stored.
            y = _image(F.scaled_dot_product_attention(queries[n], queries[n], v, scale=1.0), size, x.shape[0])
            outputs.append(torch.roll(y, (size // 2, size // 2), (2, 3)) if self.shifted else y)
        return self.project_out(torch.cat(outputs, dim=1)), queries


class _ELAB(nn.Module):
    """Local features and group-wise attention, each added to its input, ``1 + n_share`` times (section 3.2)."""

    def __init__(self, nc: int, window_sizes: Sequence[int], shifted: bool, n_share: int, r_expand: int) -> None:
        super().__init__()
        self.modules_lfe = nn.ModuleDict({f"lfe_{n}": _local_features(nc, r_expand) for n in range(1 + n_share)})
        self.modules_gmsa = nn.ModuleDict(
            {f"gmsa_{n}": _GroupwiseAttention(nc, window_sizes, shifted, shares=n > 0) for n in range(1 + n_share)}
        )

    def forward(self, x: Tensor) -> Tensor:
        queries: list[Tensor] | None = None
        for lfe, gmsa in zip(self.modules_lfe.values(), self.modules_gmsa.values(), strict=True):
            x = x + lfe(x)
            y, queries = gmsa(x, queries)
            x = x + y
        return x


class ELAN(nn.Module):
    """ELAN: ``(N, colors, H, W)`` in [0, 1] -> ``(N, colors, scale H, scale W)``, not clamped, of any size.

    The input is extended by reflection to a multiple of all windows.

    Args:
        scale: any whole scale.
        colors: image channels.
        window_sizes: a window for each group of channels, all of one size.
        m_elan: attention blocks; c_elan: features.
        n_share: so many blocks after each one attend with its queries and keys.
        r_expand: widening of the local features.
        img_range: the input is multiplied, the output divided by it.
        rgb_mean: subtracted before and added after where ``colors`` is 3; None = DIV2K's.
        use_checkpoint: recompute each block in the backward pass, to save memory at about a third more time.

    Raises:
        ValueError: ``c_elan`` does not divide by the number of windows, or ``m_elan`` by ``1 + n_share``; or the
            windows have no common multiple up to 1024.
    """

    mean: Tensor

    def __init__(
        self,
        scale: int = 4,
        colors: int = 3,
        window_sizes: Sequence[int] = (4, 8, 16),
        m_elan: int = 36,
        c_elan: int = 180,
        n_share: int = 0,
        r_expand: int = 2,
        img_range: float = 255.0,
        use_checkpoint: bool = False,
        rgb_mean: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if c_elan % len(window_sizes):
            raise ValueError(f"c_elan {c_elan} must divide by the number of window_sizes, {len(window_sizes)}")
        if m_elan % (1 + n_share):
            raise ValueError(f"m_elan {m_elan} must divide by 1 + n_share, {1 + n_share}")
        self.scale = scale
        self.img_range = img_range
        self.use_checkpoint = use_checkpoint
        self.size_multiple = math.lcm(*window_sizes)
        if self.size_multiple > 1024:
            raise ValueError(f"window_sizes {window_sizes} fit into no image of less than {self.size_multiple} pixels")
        mean = colour_mean(colors) if rgb_mean is None or colors != 3 else torch.tensor(rgb_mean).view(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.head = nn.Sequential(nn.Conv2d(colors, c_elan, 3, 1, 1))
        self.body = nn.Sequential(
            *(_ELAB(c_elan, window_sizes, n % 2 == 1, n_share, r_expand) for n in range(m_elan // (1 + n_share)))
        )
        self.tail = nn.Sequential(nn.Conv2d(c_elan, colors * scale**2, 3, 1, 1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        multiple = self.size_multiple
        # So exporters see that all windows divide it, and need no remainder of what is negative, which others round up.
        height, width = ((side + multiple - 1) // multiple * multiple for side in (h, w))
        x = extend(x, height, width)
        shallow = self.head((x - self.mean) * self.img_range)
        deep = shallow
        for block in self.body.children():
            if self.use_checkpoint and torch.is_grad_enabled():
                deep = checkpoint(block, deep, use_reentrant=False)
            else:
                deep = block(deep)
        E = self.tail(shallow + deep) / self.img_range + self.mean
        return E[..., : h * self.scale, : w * self.scale]
