"""RRDBNet, the generator of ESRGAN (arXiv 1809.00219), BSRGAN (arXiv 2103.14006) and Real-ESRGAN (arXiv 2107.10833)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.basicblock import LeakyConv2d, ResidualInResidualDenseBlock, scaled_kaiming_, upscale_factors


class _LayerNames(NamedTuple):
    """How one family of checkpoints names the layers."""

    trunk: str
    dense: str
    trunk_conv: str
    upconv: str
    hr_conv: str


class _RRDBNetwork(nn.Module):
    """The network itself; its two children below differ in the names of layers and in how they reach a scale."""

    def __init__(
        self,
        names: _LayerNames,
        in_nc: int,
        out_nc: int,
        nf: int,
        nb: int,
        gc: int,
        factors: list[int],
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.factors = factors
        self.use_checkpoint = use_checkpoint
        # forward() unpacks the layers in this order.
        trunk = nn.Sequential(*(ResidualInResidualDenseBlock(nf, gc, prefix=names.dense) for _ in range(nb)))
        self.conv_first = nn.Conv2d(in_nc, nf, 3, 1, 1)
        self.add_module(names.trunk, trunk)
        self.add_module(names.trunk_conv, nn.Conv2d(nf, nf, 3, 1, 1))
        for n in range(1, len(factors) + 1):
            self.add_module(f"{names.upconv}{n}", LeakyConv2d(nf, nf))
        self.add_module(names.hr_conv, LeakyConv2d(nf, nf))
        self.conv_last = nn.Conv2d(nf, out_nc, 3, 1, 1)
        scaled_kaiming_(trunk)

    def forward(self, x: Tensor) -> Tensor:
        conv_first, trunk, trunk_conv, *upconvs, hr_conv, conv_last = self.children()
        shallow = conv_first(x)
        deep = shallow
        for block in trunk.children():
            if self.use_checkpoint and torch.is_grad_enabled():
                deep = checkpoint(block, deep, use_reentrant=False)
            else:
                deep = block(deep)
        features = shallow + trunk_conv(deep)
        for factor, upconv in zip(self.factors, upconvs, strict=True):
            features = upconv(F.interpolate(features, scale_factor=factor, mode="nearest"))
        return conv_last(hr_conv(features))


class RRDBNet(_RRDBNetwork):
    """RRDBNet with BSRGAN's and KAIR's names: ``(N, in_nc, H, W)`` -> ``(N, out_nc, sf H, sf W)``, not clamped.

    Args:
        in_nc, out_nc: image channels.
        nf: features; nb: blocks; gc: growth of the dense blocks.
        sf: 1, 2, 3, 4 or 8; one nearest-neighbour upsampling layer for each factor 2, one for 3.
        use_checkpoint: recompute each block in the backward pass, to save memory at about a third more time.

    Raises:
        ValueError: another ``sf``.
    """

    def __init__(
        self,
        in_nc: int = 3,
        out_nc: int = 3,
        nf: int = 64,
        nb: int = 23,
        gc: int = 32,
        sf: int = 4,
        use_checkpoint: bool = False,
    ) -> None:
        names = _LayerNames("RRDB_trunk", "RDB", "trunk_conv", "upconv", "HRconv")
        super().__init__(names, in_nc, out_nc, nf, nb, gc, upscale_factors(sf), use_checkpoint)


class RRDBNetBasicSR(_RRDBNetwork):
    """RRDBNet with BasicSR's names: ``(N, in_nc, H, W)`` in [0, 1] -> ``(N, out_nc, sf H, sf W)``, not clamped.

    Scales 1 and 2 fold the input by pixel-unshuffle (4 or 2) and run the x4 network; an input that does not divide is
    extended by its edge and the result cropped. Arguments and errors are those of :class:`RRDBNet`.
    """

    def __init__(
        self,
        in_nc: int = 3,
        out_nc: int = 3,
        nf: int = 64,
        nb: int = 23,
        gc: int = 32,
        sf: int = 4,
        use_checkpoint: bool = False,
    ) -> None:
        names = _LayerNames("body", "rdb", "conv_body", "conv_up", "conv_hr")
        fold = 4 // sf if sf in (1, 2) else 1
        super().__init__(names, in_nc * fold**2, out_nc, nf, nb, gc, upscale_factors(sf * fold), use_checkpoint)
        self.sf = sf
        self.fold = fold
        self.size_multiple = fold  # tiles start on the grid of the pixel-unshuffle

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if h % self.fold or w % self.fold:
            x = F.pad(x, (0, -w % self.fold, 0, -h % self.fold), mode="replicate")
        return super().forward(F.pixel_unshuffle(x, self.fold))[..., : h * self.sf, : w * self.sf]
