"""RankSRGAN (arXiv 1908.06382): its SRResNet, and the ranker that learns to order images as a quality metric does."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.basicblock import ResidualBlock, scaled_kaiming_, upscale_factors
from models.network_discriminator import VGGStages


class RankSRGANSRResNet(nn.Module):
    """RankSRGAN's generator: ``(N, in_nc, H, W)`` in [0, 1] -> ``(N, out_nc, upscale H, upscale W)``, not clamped.

    Unlike :class:`models.network_msrresnet.MSRResNet1` it has a long shortcut, ReLU throughout and no bilinear base.

    Args:
        in_nc, out_nc: image channels.
        nf: features; nb: residual blocks.
        upscale: 1, 2, 3, 4 or 8.

    Raises:
        ValueError: another upscale.
    """

    def __init__(self, in_nc: int = 3, out_nc: int = 3, nf: int = 64, nb: int = 16, upscale: int = 4) -> None:
        super().__init__()
        self.factors = upscale_factors(upscale)
        self.conv_first = nn.Conv2d(in_nc, nf, 3, 1, 1)
        self.recon_trunk = nn.Sequential(*(ResidualBlock(nf) for _ in range(nb)))
        self.LRconv = nn.Conv2d(nf, nf, 3, 1, 1)
        for n, factor in enumerate(self.factors, start=1):
            self.add_module(f"upconv{n}", nn.Conv2d(nf, nf * factor**2, 3, 1, 1))
        self.HRconv = nn.Conv2d(nf, nf, 3, 1, 1)
        self.conv_last = nn.Conv2d(nf, out_nc, 3, 1, 1)
        # Published: all but LRconv.
        scaled_kaiming_(*(layer for layer in self.children() if layer is not self.LRconv))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.conv_first(x)
        features = shallow + self.LRconv(self.recon_trunk(shallow))
        for n, factor in enumerate(self.factors, start=1):
            features = F.relu(F.pixel_shuffle(self.get_submodule(f"upconv{n}")(features), factor))
        return self.conv_last(F.relu(self.HRconv(features)))


class RankerVGG12(VGGStages):
    """RankSRGAN's ranker: ``(N, in_nc, H, W)`` in [0, 1] -> one score an image, ``(N, 1)``, lower being better.

    It was trained on 296 x 296 pixels, but takes any size, for it averages over the image.

    Args:
        in_nc: image channels; base_nc: features of the first of five stages, doubled by each of the next three.

    Raises:
        ValueError: H or W is less than 32 pixels, which the five stages halve to nothing.
    """

    def __init__(self, in_nc: int = 3, base_nc: int = 64) -> None:
        super().__init__(in_nc, base_nc, stages=5, bias=True)
        self.classifier = nn.Sequential(nn.Linear(self.width, 100), nn.LeakyReLU(0.2, inplace=True), nn.Linear(100, 1))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if min(h, w) < 32:
            raise ValueError(f"ranker input: expected 32 x 32 pixels or more, got {h} x {w}")
        return self.classifier(super().forward(x).mean(dim=(-2, -1)))
