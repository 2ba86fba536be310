"""Discriminators in KAIR's layouts; all return raw logits.

Spectral norm is torch's classic hook (``weight_orig``, ``weight_u``, ``weight_v``), not the newer parametrization,
because published discriminators carry those names.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from models.basicblock import conv_layers


def _check_size(x: Tensor, size: int) -> None:
    if x.shape[-2:] != (size, size):
        raise ValueError(f"discriminator input: expected {size} x {size} pixels, got {x.shape[-2]} x {x.shape[-1]}")


class DiscriminatorUNet(nn.Module):
    """U-Net with spectral norm (Real-ESRGAN, arXiv 2107.10833): ``(N, in_nc, H, W)`` -> logits ``(N, 1, H, W)``.

    Raises:
        ValueError: H or W is no multiple of 8.
    """

    def __init__(self, in_nc: int = 3, base_nc: int = 64) -> None:
        super().__init__()

        def down(width: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False))

        def keep(width_in: int, width_out: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(width_in, width_out, 3, 1, 1, bias=False))

        self.conv0 = nn.Conv2d(in_nc, base_nc, 3, 1, 1)
        self.conv1 = down(base_nc)
        self.conv2 = down(base_nc * 2)
        self.conv3 = down(base_nc * 4)
        self.conv4 = keep(base_nc * 8, base_nc * 4)
        self.conv5 = keep(base_nc * 4, base_nc * 2)
        self.conv6 = keep(base_nc * 2, base_nc)
        self.conv7 = keep(base_nc, base_nc)
        self.conv8 = keep(base_nc, base_nc)
        self.conv9 = nn.Conv2d(base_nc, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if h % 8 or w % 8:
            raise ValueError(f"discriminator input: expected multiples of 8 pixels, got {h} x {w}")

        def act(features: Tensor) -> Tensor:
            return F.leaky_relu(features, 0.2, inplace=True)

        def double(features: Tensor) -> Tensor:
            return F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)

        x0 = act(self.conv0(x))
        x1 = act(self.conv1(x0))
        x2 = act(self.conv2(x1))
        x3 = act(self.conv3(x2))
        # The skips are added after the activation.
        y2 = act(self.conv4(double(x3))) + x2
        y1 = act(self.conv5(double(y2))) + x1
        y0 = act(self.conv6(double(y1))) + x0
        return self.conv9(act(self.conv8(act(self.conv7(y0)))))


class DiscriminatorPatchGAN(nn.Module):
    """PatchGAN (pix2pix, arXiv 1611.07004): ``(N, in_nc, H, W)`` -> one logit a patch, ``(N, 1, ~H/2^n, ~W/2^n)``.

    Args:
        in_nc: image channels; base_nc: features of the first layer, doubled by each of the next up to 512.
        n_layers: number of strided layers; 3 gives patches of 70 x 70 pixels.
        norm_type: none, batch, instance, spectral, batchspectral or instancespectral.

    Raises:
        ValueError: another ``norm_type``.
    """

    def __init__(self, in_nc: int = 3, base_nc: int = 64, n_layers: int = 3, norm_type: str = "spectral") -> None:
        super().__init__()
        norm_layer, is_spectral = self._norm(norm_type)

        def conv(width_in: int, width_out: int, stride: int) -> nn.Module:
            layer = nn.Conv2d(width_in, width_out, 4, stride, 2)
            nn.init.normal_(layer.weight, 0.0, 0.02)
            return spectral_norm(layer) if is_spectral else layer

        children = [nn.Sequential(conv(in_nc, base_nc, 2), nn.LeakyReLU(0.2, inplace=True))]
        width = base_nc
        for n in range(1, n_layers + 1):
            previous, width = width, min(2 * width, 512)
            stride = 2 if n < n_layers else 1
            children.append(
                nn.Sequential(conv(previous, width, stride), norm_layer(width), nn.LeakyReLU(0.2, inplace=True))
            )
        children.append(nn.Sequential(conv(width, 1, 1)))
        self.model = nn.Sequential()
        for n, child in enumerate(children):
            self.model.add_module(f"child{n}", child)

    @staticmethod
    def _norm(norm_type: str) -> tuple[Callable[[int], nn.Module], bool]:
        match norm_type:
            case "batch" | "batchspectral":
                norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d
            case "instance" | "instancespectral":
                norm_layer = nn.InstanceNorm2d
            case "spectral" | "none":
                norm_layer = nn.Identity
            case _:
                raise ValueError(f"norm_type {norm_type!r}: expected none or [batch|instance][spectral]")
        return norm_layer, norm_type.endswith("spectral")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class DiscriminatorVGG(nn.Module):
    """KAIR's discriminator_vgg_96, _128 and _192 (after SRGAN, arXiv 1609.04802): ``(N, in_nc, S, S)`` -> ``(N, 1)``.

    Each stage is a convolution and a strided one that halves the side, until it is 4 pixels or fewer.

    Args:
        in_nc: image channels; base_nc: features of the first stage, doubled by each of the next three.
        act_mode: letters of :func:`models.basicblock.norm_act`.
        input_size: side S, 96, 128 or 192.

    Raises:
        ValueError: an unknown letter; in the forward pass, another input size.
    """

    def __init__(self, in_nc: int = 3, base_nc: int = 64, act_mode: str = "BL", input_size: int = 128) -> None:
        super().__init__()
        self.input_size = input_size
        # KAIR puts nothing between the first two convolutions, neither norm nor activation.
        layers = [*conv_layers(in_nc, base_nc), *conv_layers(base_nc, base_nc, act_mode, 4, 2)]
        side, width = input_size // 2, base_nc
        while side > 4:
            previous, width = width, min(2 * width, 8 * base_nc)
            layers += conv_layers(previous, width, act_mode)
            layers += conv_layers(width, width, act_mode, 4, 2)
            side //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(width * side**2, 100), nn.LeakyReLU(0.2, inplace=True), nn.Linear(100, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.input_size)
        return self.classifier(self.features(x).flatten(1))


class DiscriminatorVGG128SN(nn.Module):
    """KAIR's discriminator_vgg_128_SN, spectral norm in every layer: ``(N, in_nc, 128, 128)`` -> ``(N, 1)``.

    Raises:
        ValueError: another input size.
    """

    def __init__(self, in_nc: int = 3, base_nc: int = 64) -> None:
        super().__init__()
        width_in = in_nc
        for stage, factor in enumerate((1, 2, 4, 8, 8)):
            width = factor * base_nc
            self.add_module(f"conv{2 * stage}", spectral_norm(nn.Conv2d(width_in, width, 3, 1, 1)))
            self.add_module(f"conv{2 * stage + 1}", spectral_norm(nn.Conv2d(width, width, 4, 2, 1)))
            width_in = width
        self.linear0 = spectral_norm(nn.Linear(width_in * 4 * 4, 100))
        self.linear1 = spectral_norm(nn.Linear(100, 1))

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, 128)
        *convs, linear0, linear1 = self.children()
        for conv in convs:
            x = F.leaky_relu(conv(x), 0.2, inplace=True)
        return linear1(F.leaky_relu(linear0(x.flatten(1)), 0.2, inplace=True))
