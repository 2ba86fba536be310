"""RRDB, the generator of ESRGAN (arXiv 1809.00219) in the numbered layout of its first release and of KAIR."""

from torch import Tensor, nn

from models.basicblock import ResidualInResidualDenseBlock, sequential_sr_network


class RRDB(nn.Module):
    """RRDB with KAIR's names: ``(N, in_nc, H, W)`` in [0, 1] -> ``(N, out_nc, upscale H, upscale W)``, not clamped.

    KAIR accepts ``gc`` and ignores it (growth is always 32 there); here it is honoured.

    Args:
        in_nc, out_nc: image channels.
        nf: features; nb: blocks; gc: growth of the dense blocks.
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
        nf: int = 64,
        nb: int = 23,
        gc: int = 32,
        upscale: int = 4,
        act_mode: str = "L",
        upsample_mode: str = "upconv",
    ) -> None:
        super().__init__()
        blocks = [ResidualInResidualDenseBlock(nf, gc, act_mode) for _ in range(nb)]
        self.model = sequential_sr_network(in_nc, out_nc, nf, blocks, upscale, act_mode, upsample_mode, last_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
