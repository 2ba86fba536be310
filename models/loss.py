"""The losses of PSNR and GAN training; the self-similarity loss has its own home, ``utils/utils_ssl.py``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network_feature import VGGFeatureExtractor
from utils.utils_error import UserError


class CharbonnierLoss(nn.Module):
    """Mean of ``sqrt((E - H)^2 + eps)``, a smooth L1, over images of equal shape (Lai et al., arXiv 1710.01992)."""

    def __init__(self, eps: float = 1e-9) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, E: Tensor, H: Tensor) -> Tensor:
        return torch.sqrt((E - H) ** 2 + self.eps).mean()


def ssim(E: Tensor, H: Tensor, window_size: int = 11) -> Tensor:
    """Structural similarity of each image: two ``(N, C, H, W)`` in [0, 1] -> ``(N,)``, 1 for equal images.

    Gaussian window of sigma 1.5 with zero padding, as KAIR's loss has it (Wang et al., IEEE TIP 2004, eq. 13); the
    metric of papers (``utils_image.calculate_ssim``) has no padding.
    """
    channels = E.shape[1]
    # E[x^2] - E[x]^2 cancels; in half precision, of the input or of autocast, nothing would be left of it.
    dtype = torch.promote_types(E.dtype, torch.float32)
    E, H = E.to(dtype), H.to(dtype)
    # In float32 even for float64 images, as the reference has it: its weights do not quite add up to 1.
    gauss = torch.tensor([math.exp(-((i - window_size // 2) ** 2) / (2 * 1.5**2)) for i in range(window_size)])
    gauss = gauss / gauss.sum()
    window = torch.outer(gauss, gauss).expand(channels, 1, -1, -1).to(E)

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, padding=window_size // 2, groups=channels)

    with torch.autocast(E.device.type, enabled=False):
        mu_e, mu_h = local_mean(E), local_mean(H)
        var_e = local_mean(E * E) - mu_e**2
        var_h = local_mean(H * H) - mu_h**2
        cov = local_mean(E * H) - mu_e * mu_h
        c1, c2 = 0.01**2, 0.03**2
        similarity = (2 * mu_e * mu_h + c1) * (2 * cov + c2) / ((mu_e**2 + mu_h**2 + c1) * (var_e + var_h + c2))
    return similarity.mean(dim=(1, 2, 3))


class SSIMLoss(nn.Module):
    """``1 - SSIM``, averaged over the batch: it falls as images grow alike.

    KAIR minimises SSIM itself, which drives images apart; :func:`ssim` is the same number without that fault.
    """

    def __init__(self, window_size: int = 11) -> None:
        super().__init__()
        self.window_size = window_size

    def forward(self, E: Tensor, H: Tensor) -> Tensor:
        return 1 - ssim(E, H, self.window_size).mean()


def pixel_loss(kind: str, charbonnier_eps: float = 1e-9) -> nn.Module:
    """The loss named by ``train.G_lossfn_type``: l1, l2, l2sum (a sum, not a mean), charbonnier or ssim.

    Raises:
        UserError: another name.
    """
    match kind:
        case "l1":
            return nn.L1Loss()
        case "l2":
            return nn.MSELoss()
        case "l2sum":
            return nn.MSELoss(reduction="sum")
        case "charbonnier":
            return CharbonnierLoss(charbonnier_eps)
        case "ssim":
            return SSIMLoss()
        case _:
            raise UserError(f"train.G_lossfn_type: {kind!r} is unknown, expected l1, l2, l2sum, charbonnier or ssim")


_COLOR_SIDE = 16  # pixels that are averaged; texture is finer than this, a tint is not


def color_loss(E: Tensor, H: Tensor) -> Tensor:
    """How far the colours of E are from H's where only areas count: two ``(N, C, H, W)`` of one range -> a scalar.

    The L1 distance of their averages over 16 x 16 pixels, each 8 from the next and the last ones of what is left, or
    over the whole of a smaller image. A GAN may shift or tint areas, which neither the discriminator nor features
    forbid much; what lies within an area, texture, this loss leaves to it. Zero for equal averages whatever the detail.
    """
    difference = E.to(torch.promote_types(E.dtype, torch.float32)) - H
    side = [min(_COLOR_SIDE, length) for length in difference.shape[-2:]]
    return F.avg_pool2d(difference, side, stride=_COLOR_SIDE // 2, ceil_mode=True).abs().mean()


class PerceptualLoss(nn.Module):
    """Weighted sum over layers of the mean distance of VGG19 features (arXiv 1603.08155, before ReLU: 1809.00219).

    ``forward(E, H)`` takes ``(N, 3 or 1, H, W)`` in [0, 1] and gives a scalar; gradient flows to ``E`` only.

    Args:
        feature_layer, use_input_norm, use_range_norm, weights_path, features: see :class:`VGGFeatureExtractor`.
        weights: one for each layer.
        lossfn_type: l1 or l2.

    Raises:
        UserError: another ``lossfn_type``, unequal numbers of layers and weights, or no VGG19 weights.
    """

    def __init__(
        self,
        feature_layer: int | Sequence[int] = (2, 7, 16, 25, 34),
        weights: float | Sequence[float] = (0.1, 0.1, 1.0, 1.0, 1.0),
        lossfn_type: str = "l1",
        use_input_norm: bool = True,
        use_range_norm: bool = False,
        weights_path: str | None = None,
        features: nn.Sequential | None = None,
    ) -> None:
        super().__init__()
        layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        self.weights = [float(weights)] if isinstance(weights, (int, float)) else list(weights)
        if len(layers) != len(self.weights):
            raise UserError(
                f"train.F_weights: expected one for each of the {len(layers)} layers of train.F_feature_layer, "
                f"got {len(self.weights)}"
            )
        if lossfn_type not in ("l1", "l2"):
            raise UserError(f"train.F_lossfn_type: {lossfn_type!r} is unknown, expected l1 or l2")
        self.distance = F.l1_loss if lossfn_type == "l1" else F.mse_loss
        self.vgg = VGGFeatureExtractor(layers, use_input_norm, use_range_norm, weights_path, features)

    def forward(self, E: Tensor, H: Tensor) -> Tensor:
        features_E = self.vgg(E)
        with torch.no_grad():
            features_H = self.vgg(H)
        terms = [w * self.distance(e, h) for w, e, h in zip(self.weights, features_E, features_H, strict=True)]
        return torch.stack(terms).sum()


class GANLoss(nn.Module):
    """Adversarial loss on raw logits, vectors ``(N, 1)`` or maps ``(N, 1, H, W)``, for either player.

    ==================  ================================================================================
    ``gan_type``        loss
    ==================  ================================================================================
    ``gan``             binary cross entropy (arXiv 1406.2661, non-saturating)
    ``lsgan``           squared distance to the labels (arXiv 1611.04076)
    ``wgan``            mean logit (arXiv 1701.07875); the labels have no say
    ``softplusgan``     softplus of the signed logit (arXiv 1801.04406); the labels have no say
    ``ragan``           relativistic average (arXiv 1807.00734), KAIR's form: logits of one side are compared
                        with the mean of the other over the batch, each place of a map by itself
    ``ragan_basicsr``   the same with the mean over all entries, ESRGAN's and BasicSR's form; for ``(N, 1)``
                        logits the two agree
    ==================  ================================================================================

    Args:
        gan_type: one of the above, in any case.
        real_label_val, fake_label_val: labels of gan, lsgan and the relativistic types.

    Raises:
        UserError: another ``gan_type``.
    """

    def __init__(self, gan_type: str, real_label_val: float = 1.0, fake_label_val: float = 0.0) -> None:
        super().__init__()
        self.gan_type = gan_type.lower()
        self.real_label_val = real_label_val
        self.fake_label_val = fake_label_val
        known = ("gan", "lsgan", "wgan", "softplusgan", "ragan", "ragan_basicsr")
        if self.gan_type not in known:
            raise UserError(f"train.gan_type: {gan_type!r} is unknown, expected one of {', '.join(known)}")

    @property
    def needs_real(self) -> bool:
        """Whether the generator's side needs the logits of real images too."""
        return self.gan_type in ("ragan", "ragan_basicsr")

    def generator(self, pred_fake: Tensor, pred_real: Tensor | None = None) -> Tensor:
        """The generator's scalar loss; gradient flows to ``pred_fake`` only.

        Args:
            pred_fake: logits of estimates.
            pred_real: logits of real images, used where :attr:`needs_real`.

        Raises:
            ValueError: ``pred_real`` is needed and not given.
        """
        if not self.needs_real:
            return self.towards(pred_fake, real=True)
        if pred_real is None:
            raise ValueError(f"{self.gan_type} compares with real images: pred_real is missing")
        pred_real = pred_real.detach()
        real_looks_fake = self.towards(pred_real - self._mean(pred_fake), real=False)
        fake_looks_real = self.towards(pred_fake - self._mean(pred_real), real=True)
        return (real_looks_fake + fake_looks_real) / 2

    def discriminator(self, pred_real: Tensor, pred_fake: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's two scalars, of real images and of (detached) estimates; its loss is their sum.

        As in KAIR and BasicSR, the relativistic terms are halved and the others are not.
        """
        if not self.needs_real:
            return self.towards(pred_real, real=True), self.towards(pred_fake, real=False)
        l_d_real = self.towards(pred_real - self._mean(pred_fake.detach()), real=True) / 2
        l_d_fake = self.towards(pred_fake - self._mean(pred_real.detach()), real=False) / 2
        return l_d_real, l_d_fake

    def _mean(self, pred: Tensor) -> Tensor:
        return pred.mean(dim=0, keepdim=True) if self.gan_type == "ragan" else pred.mean()

    def towards(self, pred: Tensor, real: bool) -> Tensor:
        """How far logits are from being judged real (or fake): each player's term, unless :attr:`needs_real`."""
        if self.gan_type == "wgan":
            return -pred.mean() if real else pred.mean()
        if self.gan_type == "softplusgan":
            return F.softplus(-pred if real else pred).mean()
        label = torch.full_like(pred, self.real_label_val if real else self.fake_label_val)
        if self.gan_type == "lsgan":
            return F.mse_loss(pred, label)
        return F.binary_cross_entropy_with_logits(pred, label)
