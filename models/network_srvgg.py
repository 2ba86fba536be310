"""SRVGGNetCompact, the small plain generator of Real-ESRGAN (arXiv 2107.10833)."""

from torch import Tensor, nn
from torch.nn import functional as F


def _activation(act_type: str, nf: int) -> nn.Module:
    match act_type:
        case "prelu":
            return nn.PReLU(nf)
        case "relu":
            return nn.ReLU(inplace=True)
        case "leakyrelu":
            return nn.LeakyReLU(0.1, inplace=True)
        case _:
            raise ValueError(f"act_type {act_type!r}: expected prelu, relu or leakyrelu")


class SRVGGNetCompact(nn.Module):
    """Convolutions at low resolution on a nearest base: ``(N, in_nc, H, W)`` in [0, 1] -> ``(N, out_nc, s H, s W)``.

    Args:
        in_nc, out_nc: image channels, equal because the base is added.
        nf: features; nc: number of convolutions between the first and the last.
        upscale: any whole scale s.
        act_type: prelu, relu or leakyrelu (slope 0.1).

    Raises:
        ValueError: another ``act_type``, or ``in_nc`` differs from ``out_nc``.
    """

    def __init__(
        self,
        in_nc: int = 3,
        out_nc: int = 3,
        nf: int = 64,
        nc: int = 16,
        upscale: int = 4,
        act_type: str = "prelu",
    ) -> None:
        super().__init__()
        if in_nc != out_nc:
            raise ValueError(f"SRVGGNetCompact adds its input to its output: in_nc {in_nc} must equal out_nc {out_nc}")
        self.upscale = upscale
        layers: list[nn.Module] = []
        for width in (in_nc, *[nf] * nc):
            layers += [nn.Conv2d(width, nf, 3, 1, 1), _activation(act_type, nf)]
        self.body = nn.Sequential(*layers, nn.Conv2d(nf, out_nc * upscale**2, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        base = F.interpolate(x, scale_factor=self.upscale, mode="nearest")
        return base + F.pixel_shuffle(self.body(x), self.upscale)
