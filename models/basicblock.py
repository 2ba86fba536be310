"""Blocks that several networks share, with the attribute names that published checkpoints use."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init


def sequential(*modules: nn.Module) -> nn.Module:
    """Chain modules into one flat ``nn.Sequential``; a single module comes back unwrapped, without an index."""
    flat: list[nn.Module] = []
    for module in modules:
        flat.extend(module.children() if isinstance(module, nn.Sequential) else (module,))
    return flat[0] if len(flat) == 1 else nn.Sequential(*flat)


def norm_act(act_mode: str, channels: int) -> list[nn.Module]:
    """Norm and activation layers for KAIR's letters: B batch norm, I instance norm, R ReLU, L LeakyReLU(0.2).

    Raises:
        ValueError: an unknown letter.
    """
    layers: list[nn.Module] = []
    for letter in act_mode:
        match letter:
            case "B":
                # KAIR's eps and momentum, not torch's: published batch-norm weights were trained with them.
                layers.append(nn.BatchNorm2d(channels, eps=1e-4, momentum=0.9))
            case "I":
                layers.append(nn.InstanceNorm2d(channels, affine=True))
            case "R" | "r":
                layers.append(nn.ReLU(inplace=True))
            case "L" | "l":
                layers.append(nn.LeakyReLU(0.2, inplace=True))
            case _:
                raise ValueError(f"act_mode {act_mode!r}: unknown letter {letter!r}, known are B, I, R, L")
    return layers


def conv_layers(
    in_nc: int, out_nc: int, act_mode: str = "", kernel_size: int = 3, stride: int = 1, bias: bool = True
) -> list[nn.Module]:
    """A convolution with padding 1, followed by the layers of ``act_mode`` (see :func:`norm_act`)."""
    return [nn.Conv2d(in_nc, out_nc, kernel_size, stride, 1, bias=bias), *norm_act(act_mode, out_nc)]


def conv_block(in_nc: int, out_nc: int, act_mode: str = "", bias: bool = True) -> nn.Module:
    """The 3 x 3 :func:`conv_layers` as one module."""
    return sequential(*conv_layers(in_nc, out_nc, act_mode, bias=bias))


class LeakyConv2d(nn.Conv2d):
    """A 3 x 3 convolution and its LeakyReLU under one name, for layouts that give activations no key of their own."""

    def __init__(self, in_nc: int, out_nc: int, slope: float = 0.2) -> None:
        super().__init__(in_nc, out_nc, 3, 1, 1)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), self.slope, inplace=True)


class ShortcutBlock(nn.Module):
    """``x + sub(x)``."""

    def __init__(self, sub: nn.Module) -> None:
        super().__init__()
        self.sub = sub

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sub(x)


class ResidualBlock(nn.Module):
    """``x + conv2(ReLU(conv1(x)))``."""

    def __init__(self, nc: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(nc, nc, 3, 1, 1)
        self.conv2 = nn.Conv2d(nc, nc, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class ResidualDenseBlock(nn.Module):
    """Five densely connected convolutions with a residual scaled by 0.2 (ESRGAN, arXiv 1809.00219, figure 4).

    Args:
        nc: input and output channels.
        gc: channels that each of the first four convolutions adds.
        act_mode: None for the plain layout (``conv1.weight``, LeakyReLU 0.2); letters of :func:`norm_act` for KAIR's
            wrapped layout (``conv1.0.weight``), whose conv5 takes every letter but the last.
    """

    def __init__(self, nc: int, gc: int, act_mode: str | None = None) -> None:
        super().__init__()
        widths = [nc + n * gc for n in range(5)]

        def dense(width: int) -> nn.Module:
            return LeakyConv2d(width, gc) if act_mode is None else conv_block(width, gc, act_mode)

        self.conv1, self.conv2, self.conv3, self.conv4 = (dense(width) for width in widths[:4])
        self.conv5 = conv_block(widths[4], nc, "" if act_mode is None else act_mode[:-1])

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            features = torch.cat((features, conv(features)), dim=1)
        return x + 0.2 * self.conv5(features)


class ResidualInResidualDenseBlock(nn.Module):
    """Three residual dense blocks with a residual scaled by 0.2; ``prefix`` names them ``RDB1..3`` or ``rdb1..3``."""

    def __init__(self, nc: int, gc: int, act_mode: str | None = None, prefix: str = "RDB") -> None:
        super().__init__()
        for m in (1, 2, 3):
            self.add_module(f"{prefix}{m}", ResidualDenseBlock(nc, gc, act_mode))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for block in self.children():
            out = block(out)
        return x + 0.2 * out


def upscale_factors(scale: int) -> list[int]:
    """Split a scale into the factors of successive upsampling layers: 1 -> [], 3 -> [3], 4 -> [2, 2], 8 -> [2, 2, 2].

    Raises:
        ValueError: the scale is neither 3 nor a power of two.
    """
    if scale == 3:
        return [3]
    if scale < 1 or scale & (scale - 1):
        raise ValueError(f"scale {scale}: expected 1, 2, 3, 4 or 8")
    return [2] * int(math.log2(scale))


def upsample_block(nc: int, factor: int, upsample_mode: str, act_mode: str) -> nn.Module:
    """Enlarge ``(N, nc, H, W)`` to ``(N, nc, factor H, factor W)`` and activate.

    Raises:
        ValueError: ``upsample_mode`` is none of upconv, pixelshuffle, convtranspose.
    """
    enlarge: tuple[nn.Module, ...]
    match upsample_mode:
        case "upconv":
            enlarge = (nn.Upsample(scale_factor=factor, mode="nearest"), conv_block(nc, nc))
        case "pixelshuffle":
            enlarge = (conv_block(nc, nc * factor**2), nn.PixelShuffle(factor))
        case "convtranspose":
            enlarge = (nn.ConvTranspose2d(nc, nc, factor, factor),)
        case _:
            raise ValueError(f"upsample_mode {upsample_mode!r}: expected upconv, pixelshuffle or convtranspose")
    return sequential(*enlarge, *norm_act(act_mode, nc))


def sequential_sr_network(
    in_nc: int,
    out_nc: int,
    nc: int,
    blocks: Iterable[nn.Module],
    upscale: int,
    act_mode: str,
    upsample_mode: str,
    last_bias: bool,
) -> nn.Module:
    """Head, trunk of ``blocks`` with a long shortcut, upsampling and tail in the numbered layout (``0``, ``1.sub``)."""
    return sequential(
        conv_block(in_nc, nc),
        ShortcutBlock(sequential(*blocks, conv_block(nc, nc))),
        *(upsample_block(nc, factor, upsample_mode, act_mode) for factor in upscale_factors(upscale)),
        conv_block(nc, nc, act_mode),
        conv_block(nc, out_nc, bias=last_bias),
    )


@torch.no_grad()
def scaled_kaiming_(*modules: nn.Module) -> None:
    """Kaiming-normal weights times 0.1 and zero biases in every convolution, so that residuals start small (ESRGAN)."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                init.kaiming_normal_(layer.weight)
                layer.weight.mul_(0.1)
                if layer.bias is not None:
                    init.zeros_(layer.bias)
