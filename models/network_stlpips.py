"""ST-LPIPS (Ghildyal and Liu, ECCV 2022, arXiv 2207.13686): a learned distance of images that small shifts hardly move.

LPIPS (arXiv 1801.03924) on an AlexNet or VGG16 that blurs before it takes every second pixel (arXiv 1904.11486) and
pads more. Only the authors' weights are taken from their package: its code imports IPython and torchsummary without
installing them, and parts of it have a licence of their own, which forbids commercial use.
"""

import importlib.util
import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.utils_checkpoint import load_checkpoint_file
from utils.utils_error import UserError

Backbone = Literal["alex", "vgg"]


class BlurPool(nn.Module):
    """Every second pixel of a blur by [1, 2, 1] / 4 in both directions, mirrored for two pixels beyond the border."""

    filt: Tensor  # (C, 1, 3, 3)

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", torch.outer(line, line).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def _conv(c_in: int, c_out: int, kernel: int = 3, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, padding=padding), nn.ReLU(inplace=True)]


def _pool(channels: int, kernel: int) -> list[nn.Module]:
    return [nn.MaxPool2d(kernel, stride=1), BlurPool(channels)]


def _alex() -> nn.Sequential:
    first, relu = _conv(3, 64, 11, 2)
    layers = [first, BlurPool(64), relu, *_pool(64, 3), *_conv(64, 192, 5, 2), *_pool(192, 3), *_conv(192, 384)]
    return nn.Sequential(*layers, *_conv(384, 256), *_conv(256, 256))


def _vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    c_in = 3
    for c_out, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += _pool(c_in, 2) if layers else []
        for _ in range(convolutions):
            layers += _conv(c_in, c_out)
            c_in = c_out
    return nn.Sequential(*layers)


# Of each network: the layers whose outputs are compared, and their channels.
_TAPS: dict[Backbone, dict[int, int]] = {
    "alex": {2: 64, 6: 192, 10: 384, 12: 256, 14: 256},
    "vgg": {3: 64, 9: 128, 17: 256, 25: 512, 33: 512},
}


class STLPIPS(nn.Module):
    """Two ``(N, 3, H, W)``, RGB in [0, 1] (not clamped), sides of 21 (alex) or 18 (vgg) -> ``(N,)``, 0 if equal.

    The same in train and eval mode; that its weights take no gradient is for ``models.loss_metric.LearnedMetric``.

    Args:
        backbone: whose features are compared.

    Raises:
        UserError: the package with the weights is not installed, or they do not fit.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone = "alex") -> None:
        super().__init__()
        # LPIPS's own, of images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.taps = _TAPS[backbone]
        # On the meta device nothing is drawn: random numbers are the same with this network and without it.
        with torch.device("meta"):
            self.features = _alex() if backbone == "alex" else _vgg()
            self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in self.taps.values())
        self._load(_weights(backbone))

    def _load(self, path: Path) -> None:
        """The file names its layers ``net.slice2.5`` and ``lin2.model.1``: here ``features.5`` and ``heads.2``."""
        names = {r"net\.slice\d+\.": "features.", r"lin(\d)\.model\.1\.": r"heads.\1.", r"scaling_layer\.": ""}
        weights = {}
        for key, value in load_checkpoint_file(path).items():
            for theirs, ours in names.items():
                key = re.sub(f"^{theirs}", ours, key)
            weights[key] = value
        try:
            self.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UserError(f"{path}: these are not the weights of ST-LPIPS that this program knows") from error

    def forward(self, E: Tensor, H: Tensor) -> Tensor:
        pairs = zip(self._directions(E), self._directions(H), strict=True)
        maps = [head((e - h) ** 2) for head, (e, h) in zip(self.heads, pairs, strict=True)]
        return torch.stack([x.mean((1, 2, 3)) for x in maps]).sum(0)

    def _directions(self, image: Tensor) -> list[Tensor]:
        """The features of each tap, as vectors of length 1 at each pixel."""
        x = (2 * image - 1 - self.shift) / self.scale
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                # The root's gradient is NaN where all features are 0; the ReLU before each tap lets none of it pass.
                length = x.square().sum(1, keepdim=True).sqrt()
                found.append(x / (length + 1e-10))
        return found


def _weights(backbone: Backbone) -> Path:
    """The file in the package, found without importing it."""
    package = importlib.util.find_spec("stlpips_pytorch")
    if package is None or package.origin is None:
        raise UserError(
            "ST-LPIPS: its weights are in the package stlpips-pytorch, which is not installed; "
            "python -m pip install -r requirements.txt"
        )
    return Path(package.origin).parent / "weights" / "vST0.0" / f"{backbone}_shift_tolerant.pth"
