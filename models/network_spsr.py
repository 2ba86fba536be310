"""SPSRNet, super-resolution guided by a branch that enlarges the image's gradient (SPSR, arXiv 2003.13081)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.basicblock import (
    ResidualInResidualDenseBlock,
    ShortcutBlock,
    conv_block,
    conv_layers,
    sequential,
    upsample_block,
    upscale_factors,
)

# The gradient branch reads the trunk after these blocks, counted from 1.
_TAPS = (5, 10, 15, 20)


class GradientMap(nn.Module):
    """Length of the gradient of each channel: ``(N, C, H, W)`` in [0, 1] -> ``(N, C, H, W)`` from 0.001 to 1.415.

    ``sqrt(v^2 + h^2 + 1e-6)``, v and h being the differences of the two vertical and horizontal neighbours, not
    halved; outside the image is 0. The taps are parameters, though fixed, because published checkpoints carry them.
    """

    def __init__(self) -> None:
        super().__init__()
        difference = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).view(1, 1, 3, 3)
        self.weight_h = nn.Parameter(difference, requires_grad=False)
        self.weight_v = nn.Parameter(difference.mT.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        # Differences of neighbours in half precision would be little but rounding.
        with torch.autocast(x.device.type, enabled=False):
            v = F.conv2d(x, self.weight_v.expand(channels, 1, 3, 3), padding=1, groups=channels)
            h = F.conv2d(x, self.weight_h.expand(channels, 1, 3, 3), padding=1, groups=channels)
        return torch.sqrt(v.square() + h.square() + 1e-6)


class SPSROutput(NamedTuple):
    """What :class:`SPSRNet` returns, in the published order."""

    gradient: Tensor  # (N, out_nc, sH, sW): the gradient map of H as the branch estimates it
    E: Tensor  # (N, out_nc, sH, sW): the estimate of H, not clamped
    gradient_L: Tensor  # (N, in_nc, H, W): the gradient map of L


def _conv(in_nc: int, out_nc: int, act_mode: str = "") -> nn.Sequential:
    """A convolution whose name ends in ``.0``, as all are called here."""
    return nn.Sequential(*conv_layers(in_nc, out_nc, act_mode))


def _rrdb(nc: int, gc: int) -> nn.Module:
    """KAIR's block, but for the fifth convolutions, which SPSR wraps like the others (``conv5.0``)."""
    block = ResidualInResidualDenseBlock(nc, gc, "L")
    for dense in block.children():
        dense.conv5 = nn.Sequential(dense.get_submodule("conv5"))
    return block


class SPSRNet(nn.Module):
    """SPSRNet: ``(N, in_nc, H, W)`` in [0, 1] -> :class:`SPSROutput` with ``s = upscale``.

    The published network accepts ``gc`` and ignores it (growth is always 32 there); here it is honoured.

    Args:
        in_nc, out_nc: image channels.
        nf: features, twice as many where two streams meet; nb: blocks, 20 or more; gc: growth of the dense blocks.
        upscale: 1, 2, 3, 4 or 8.
        upsample_mode: upconv, pixelshuffle or convtranspose.
        use_checkpoint: recompute each block in the backward pass, to save memory at about a third more time.

    Raises:
        ValueError: fewer blocks, another upscale or upsample_mode.
    """

    def __init__(
        self,
        in_nc: int = 3,
        out_nc: int = 3,
        nf: int = 64,
        nb: int = 23,
        gc: int = 32,
        upscale: int = 4,
        upsample_mode: str = "upconv",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if nb < _TAPS[-1]:
            raise ValueError(f"nb {nb}: the gradient branch reads the trunk after block 20, expected 20 or more")
        self.use_checkpoint = use_checkpoint

        def enlarge() -> list[nn.Module]:
            return [upsample_block(nf, factor, upsample_mode, "L") for factor in upscale_factors(upscale)]

        # The first of these is also the end of model: one layer under two names, as published.
        self.HR_conv0_new = _conv(nf, nf, "L")
        self.HR_conv1_new = _conv(nf, nf)
        trunk = ShortcutBlock(sequential(*(_rrdb(nf, gc) for _ in range(nb)), conv_block(nf, nf)))
        self.model = sequential(conv_block(in_nc, nf), trunk, *enlarge(), self.HR_conv0_new)

        self.get_g_nopadding = GradientMap()
        self.b_fea_conv = _conv(in_nc, nf)
        for n in range(1, len(_TAPS) + 1):
            self.add_module(f"b_concat_{n}", _conv(2 * nf, nf))
            self.add_module(f"b_block_{n}", _rrdb(2 * nf, gc))
        self.b_LR_conv = _conv(nf, nf)
        self.b_module = sequential(*enlarge(), conv_block(nf, nf, "L"), conv_block(nf, nf))
        self.conv_w = nn.Sequential(nn.Conv2d(nf, out_nc, 1))

        self.f_concat = _conv(2 * nf, nf)
        self.f_block = _rrdb(2 * nf, gc)
        self.f_HR_conv0 = _conv(nf, nf, "L")
        self.f_HR_conv1 = _conv(nf, out_nc)

    def forward(self, x: Tensor) -> SPSROutput:
        # The image: an RRDB network whose last layer is that of the fusion below.
        head, trunk, *tail = self.model.children()
        *blocks, trunk_conv = trunk.get_submodule("sub").children()
        shallow = head(x)
        deep, tapped = shallow, []
        for n, block in enumerate(blocks, start=1):
            deep = self._run(block, deep)
            if n in _TAPS:
                tapped.append(deep)
        image = shallow + trunk_conv(deep)
        for layer in (*tail, self.HR_conv1_new):
            image = layer(image)

        # The gradient, told by the image at four depths.
        gradient_L = self.get_g_nopadding(x)
        shallow = self.b_fea_conv(gradient_L)
        deep = shallow
        for n, tap in enumerate(tapped, start=1):
            deep = self._run(self.get_submodule(f"b_block_{n}"), torch.cat((deep, tap), dim=1))
            deep = self.get_submodule(f"b_concat_{n}")(deep)
        gradient = self.b_module(shallow + self.b_LR_conv(deep))

        # Their fusion.
        fused = self.f_concat(self._run(self.f_block, torch.cat((gradient, image), dim=1)))
        return SPSROutput(self.conv_w(gradient), self.f_HR_conv1(self.f_HR_conv0(fused)), gradient_L)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)
