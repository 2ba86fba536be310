"""Discriminators in KAIR's and BasicSR's layouts; all return raw logits.

Spectral norm is torch's classic hook (``weight_orig``, ``weight_u``, ``weight_v``), not the newer parametrization,
because published discriminators carry those names.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from models.basicblock import conv_layers


def _check_size(x: Tensor, size: int) -> None:
    if x.shape[-2:] != (size, size):
        raise ValueError(f"discriminator input: expected {size} x {size} pixels, got {x.shape[-2]} x {x.shape[-1]}")


class _UNet(nn.Module):
    """Frame of the U-Nets: ``depth`` halvings, as many doublings, ``flat`` convolutions; ``conv{n}`` in that order.

    All but the first and the last convolution have spectral norm and no bias. Each doubling reaches the size of the
    features that it meets again, and adds them where ``skip_connection`` says so.
    """

    def __init__(self, in_nc: int, base_nc: int, depth: int, flat: int, skip_connection: bool) -> None:
        super().__init__()
        self.depth = depth
        self.skip_connection = skip_connection
        widths = [base_nc * 2**level for level in range(depth)]

        def keep(width_in: int, width_out: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(width_in, width_out, 3, 1, 1, bias=False))

        convs = [
            nn.Conv2d(in_nc, base_nc, 3, 1, 1),
            *(spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False)) for width in widths),
            *(keep(2 * width, width) for width in reversed(widths)),
            *(keep(base_nc, base_nc) for _ in range(flat)),
            nn.Conv2d(base_nc, 1, 3, 1, 1),
        ]
        for n, conv in enumerate(convs):
            self.add_module(f"conv{n}", conv)

    def forward(self, x: Tensor) -> Tensor:
        def act(features: Tensor) -> Tensor:
            return F.leaky_relu(features, 0.2, inplace=True)

        first, *convs, last = self.children()
        halving, doubling, flat = convs[: self.depth], convs[self.depth : 2 * self.depth], convs[2 * self.depth :]
        x = act(first(x))
        skips = []
        for conv in halving:
            skips.append(x)
            x = act(conv(x))
        for conv, skip in zip(doubling, reversed(skips), strict=True):
            x = act(conv(F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)))
            if self.skip_connection:  # after the activation
                x = x + skip
        for conv in flat:
            x = act(conv(x))
        return last(x)


class DiscriminatorUNet(_UNet):
    """U-Net with spectral norm (Real-ESRGAN, arXiv 2107.10833): ``(N, in_nc, H, W)`` -> logits ``(N, 1, H, W)``.

    It is BasicSR's UNetDiscriminatorSN and KAIR's discriminator_unet.

    Args:
        in_nc: image channels; base_nc: features at full size, doubled by each of the three halvings.
        skip_connection: add the features of the way down to those of the way up.

    Raises:
        ValueError: H or W is no multiple of 8.
    """

    def __init__(self, in_nc: int = 3, base_nc: int = 64, skip_connection: bool = True) -> None:
        super().__init__(in_nc, base_nc, depth=3, flat=2, skip_connection=skip_connection)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if h % 8 or w % 8:
            raise ValueError(f"discriminator input: expected multiples of 8 pixels, got {h} x {w}")
        return super().forward(x)


class DiscriminatorUNetSmall(_UNet):
    """UNetDiscriminatorSNv1 of the original SSL code, one halving deep: ``(N, in_nc, H, W)`` -> ``(N, 1, H, W)``.

    No recipe of the paper uses it. Arguments are those of :class:`DiscriminatorUNet`; sides are of 2 pixels or more.
    """

    def __init__(self, in_nc: int = 3, base_nc: int = 64, skip_connection: bool = True) -> None:
        super().__init__(in_nc, base_nc, depth=1, flat=1, skip_connection=skip_connection)


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
            norm = norm_layer(width)
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.weight, 1.0, 0.02)
            children.append(nn.Sequential(conv(previous, width, stride), norm, nn.LeakyReLU(0.2, inplace=True)))
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


class _VGGConv(NamedTuple):
    """One convolution of a VGG-style network, with padding 1."""

    width_in: int
    width_out: int
    kernel_size: int
    stride: int


def _vgg_convs(in_nc: int, base_nc: int, stages: int) -> Iterator[_VGGConv]:
    """Two convolutions a stage, the second of which halves the side; the first three stages double the features."""
    previous = in_nc
    for stage in range(stages):
        width = base_nc * min(2**stage, 8)
        yield _VGGConv(previous, width, 3, 1)
        yield _VGGConv(width, width, 4, 2)
        previous = width


class VGGStages(nn.Module):
    """BasicSR's VGG-style stages: ``(N, in_nc, H, W)`` -> ``(N, width, H / 2^stages, W / 2^stages)``, rounded down.

    Stage s holds ``conv{s}_0``, ``conv{s}_1`` and their norms ``bn{s}_0``, ``bn{s}_1``, each with LeakyReLU(0.2); the
    first convolution of all has a bias and no norm.

    Args:
        in_nc: image channels; base_nc: features of the first stage, doubled by each of the next three.
        stages: number of halvings.
        norm_type: batch, or spectral for spectral norm and no batch norm.
        bias: whether the other convolutions have a bias too.

    Attributes:
        width: features of the last stage.

    Raises:
        ValueError: another ``norm_type``.
    """

    def __init__(self, in_nc: int, base_nc: int, stages: int, norm_type: str = "batch", bias: bool = False) -> None:
        super().__init__()
        if norm_type not in ("batch", "spectral"):
            raise ValueError(f"norm_type {norm_type!r}: expected batch or spectral")
        self.names = [f"{stage}_{half}" for stage in range(stages) for half in (0, 1)]
        for name, plan in zip(self.names, _vgg_convs(in_nc, base_nc, stages), strict=True):
            is_first = name == "0_0"
            conv: nn.Module = nn.Conv2d(*plan, padding=1, bias=bias or is_first)
            if norm_type == "spectral" and not is_first:
                conv = spectral_norm(conv)
            self.add_module(f"conv{name}", conv)
            has_bn = norm_type == "batch" and not is_first
            self.add_module(f"bn{name}", nn.BatchNorm2d(plan.width_out) if has_bn else nn.Identity())
            self.width = plan.width_out

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(f"bn{name}")(self.get_submodule(f"conv{name}")(x))
            x = F.leaky_relu(x, 0.2, inplace=True)
        return x


# The published number of halvings for each input size.
_STAGES = {128: 5, 192: 6, 256: 6, 296: 5}


class DiscriminatorVGGStyle(VGGStages):
    """BasicSR's VGGStyleDiscriminator (ESRGAN, arXiv 1809.00219): ``(N, in_nc, S, S)`` -> ``(N, 1)``.

    Its sizes 192 and 296 are Discriminator_VGG_192 (BebyGAN) and Discriminator_VGG_296 (RankSRGAN).

    Args:
        in_nc, base_nc, norm_type: those of :class:`VGGStages`; the published networks have batch norm, and size 192 a
            variant with spectral norm, which no recipe of the paper uses.
        input_size: side S, 128, 192, 256 or 296.

    Raises:
        ValueError: another ``input_size`` or ``norm_type``; in the forward pass, images of another size.
    """

    def __init__(self, in_nc: int = 3, base_nc: int = 64, input_size: int = 128, norm_type: str = "batch") -> None:
        if input_size not in _STAGES:
            raise ValueError(f"input_size {input_size}: expected {', '.join(map(str, _STAGES))}")
        stages = _STAGES[input_size]
        super().__init__(in_nc, base_nc, stages, norm_type)
        self.input_size = input_size
        side = input_size // 2**stages
        self.linear1 = nn.Linear(self.width * side**2, 100)
        self.linear2 = nn.Linear(100, 1)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.input_size)
        features = super().forward(x).flatten(1)
        return self.linear2(F.leaky_relu(self.linear1(features), 0.2, inplace=True))


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
        stages = 1
        while input_size // 2**stages > 4:
            stages += 1
        layers: list[nn.Module] = []
        for plan in _vgg_convs(in_nc, base_nc, stages):
            # KAIR puts nothing between the first two convolutions, neither norm nor activation.
            layers += conv_layers(plan.width_in, plan.width_out, act_mode if layers else "", *plan[2:])
        self.features = nn.Sequential(*layers)
        side = input_size // 2**stages
        self.classifier = nn.Sequential(
            nn.Linear(plan.width_out * side**2, 100), nn.LeakyReLU(0.2, inplace=True), nn.Linear(100, 1)
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
        for n, plan in enumerate(_vgg_convs(in_nc, base_nc, stages=5)):
            self.add_module(f"conv{n}", spectral_norm(nn.Conv2d(*plan, padding=1)))
        self.linear0 = spectral_norm(nn.Linear(plan.width_out * 4 * 4, 100))
        self.linear1 = spectral_norm(nn.Linear(100, 1))

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, 128)
        *convs, linear0, linear1 = self.children()
        for conv in convs:
            x = F.leaky_relu(conv(x), 0.2, inplace=True)
        return linear1(F.leaky_relu(linear0(x.flatten(1)), 0.2, inplace=True))
