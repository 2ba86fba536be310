"""MSRResNet, the residual networks without batch norm behind SRGAN (arXiv 1609.04802) as ESRGAN and KAIR train them."""

import warnings

from torch import Tensor, nn
from torch.nn import functional as F

from models.basicblock import (
    LeakyConv2d,
    ResidualBlock,
    conv_layers,
    scaled_kaiming_,
    sequential_sr_network,
    upscale_factors,
)


class _WrappedResidualBlock(nn.Module):
    """``x + res(x)``, ``res`` being convolution, ``act_mode``, convolution in one sequence."""

    def __init__(self, nc: int, act_mode: str) -> None:
        super().__init__()
        self.res = nn.Sequential(*conv_layers(nc, nc, act_mode), *conv_layers(nc, nc))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res(x)


class MSRResNet0(nn.Module):
    """KAIR's numbered MSRResNet: ``(N, in_nc, H, W)`` in [0, 1] -> ``(N, out_nc, upscale H, upscale W)``, not clamped.

    Args:
        in_nc, out_nc: image channels.
        nc: features; nb: residual blocks.
        upscale: 1, 2, 3, 4 or 8.
        act_mode: letters of :func:`models.basicblock.norm_act`.
        upsample_mode: upconv, pixelshuffle or convtranspose.

    Raises:
        ValueError: another upscale, act_mode or upsample_mode.
    """

    def __init__(
        self,
        in_nc: int = 3,
        out_nc: int = 3,
        nc: int = 64,
        nb: int = 16,
        upscale: int = 4,
        act_mode: str = "R",
        upsample_mode: str = "upconv",
    ) -> None:
        super().__init__()
        blocks = [_WrappedResidualBlock(nc, act_mode) for _ in range(nb)]
        self.model = sequential_sr_network(in_nc, out_nc, nc, blocks, upscale, act_mode, upsample_mode, last_bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class MSRResNet1(nn.Module):
    """MSRResNet on a bilinear base: ``(N, in_nc, H, W)`` -> ``(N, out_nc, upscale H, upscale W)``, not clamped.

    It equals BasicSR's MSRResNet but for names, which the checkpoint loader translates. The published network has one
    form; ``act_mode`` and ``upsample_mode`` are here because KAIR's option files give them, and only warn.

    Args:
        in_nc, out_nc: image channels, equal because the base is added.
        nc: features; nb: residual blocks.
        upscale: 1, 2, 3, 4 or 8.

    Raises:
        ValueError: another upscale, or ``in_nc`` differs from ``out_nc``.
    """

    def __init__(
        self,
        in_nc: int = 3,
        out_nc: int = 3,
        nc: int = 64,
        nb: int = 16,
        upscale: int = 4,
        act_mode: str = "R",
        upsample_mode: str = "upconv",
    ) -> None:
        super().__init__()
        if in_nc != out_nc:
            raise ValueError(f"MSRResNet1 adds its input to its output: in_nc {in_nc} must equal out_nc {out_nc}")
        if (act_mode, upsample_mode) != ("R", "upconv"):
            warnings.warn("msrresnet1 has one form: act_mode and upsample_mode have no effect", stacklevel=2)
        self.factors = upscale_factors(upscale)
        self.conv_first = LeakyConv2d(in_nc, nc, slope=0.1)
        self.recon_trunk = nn.Sequential(*(ResidualBlock(nc) for _ in range(nb)))
        for n, factor in enumerate(self.factors, start=1):
            self.add_module(f"upconv{n}", LeakyConv2d(nc, nc * factor**2, slope=0.1))
        self.HRconv = LeakyConv2d(nc, nc, slope=0.1)
        self.conv_last = nn.Conv2d(nc, out_nc, 3, 1, 1)
        scaled_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.recon_trunk(self.conv_first(x))
        for n, factor in enumerate(self.factors, start=1):
            features = F.pixel_shuffle(self.get_submodule(f"upconv{n}")(features), factor)
        base = F.interpolate(x, size=features.shape[-2:], mode="bilinear", align_corners=False)
        return base + self.conv_last(self.HRconv(features))
