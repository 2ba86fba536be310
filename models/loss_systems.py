"""The losses that particular GAN systems add: LDL, BebyGAN, SPSR and RankSRGAN.

Images are RGB or gray in [0, 1] and are not clamped. The comparisons of images compute in float32 also inside autocast
and from half precision; float64 stays float64.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.utils_image import imresize

P = ParamSpec("P")


def _in_float32(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Switch autocast off within ``function`` and give it its tensors in float32 or better."""

    def promoted(value: Any) -> Any:
        return value.to(torch.promote_types(value.dtype, torch.float32)) if isinstance(value, Tensor) else value

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*map(promoted, args), **{name: promoted(value) for name, value in kwargs.items()})

    return wrapped


def local_variance(x: Tensor, window: int) -> Tensor:
    """Unbiased variance of the ``window`` x ``window`` pixels around each pixel: ``(N, C, H, W)`` -> the same shape.

    ``window`` is odd; the border is mirrored without its outermost pixel, so H and W are ``window // 2 + 1`` or more.
    """
    padded = F.pad(x, (window // 2,) * 4, mode="reflect")
    # A view, no copy. The mean of squares less the square of the mean would need less work, but cancels in float32.
    return padded.unfold(2, window, 1).unfold(3, window, 1).var(dim=(-2, -1))


# ---------------------------------------------------------------------------------------------------------------- LDL


@_in_float32
def artifact_map(E: Tensor, H: Tensor, E_ema: Tensor, window: int = 7) -> Tensor:
    """How likely each pixel of E is an artifact: three ``(N, C, H, W)`` -> ``(N, 1, H, W)``, 0 or more.

    The residual to H varies strongly where a GAN invents; where E is closer to H than the steadier ``E_ema``, output
    of the averaged generator, it is right and the map is 0 (LDL, Liang et al., CVPR 2022, arXiv 2203.09195). Gradient
    flows through the map to E, as published. ``window`` is the side of the neighbourhood, odd.
    """
    residual = (H - E).abs().sum(dim=1, keepdim=True)
    residual_ema = (H - E_ema).abs().sum(dim=1, keepdim=True)
    # A constant residual has variance 0, where the slope of the root is infinite: its gradient would be NaN.
    variance = residual.var(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(residual.dtype).tiny)
    weight = variance ** (1 / 5) * local_variance(residual, window)
    return torch.where(residual < residual_ema, 0, weight)


@_in_float32
def artifact_loss(E: Tensor, H: Tensor, E_ema: Tensor, window: int = 7) -> Tensor:
    """LDL's loss, the L1 distance of E and H weighted by their :func:`artifact_map`: a scalar."""
    return (artifact_map(E, H, E_ema, window) * (E - H)).abs().mean()


# ------------------------------------------------------------------------------------------------------------ BebyGAN

_PATCH = 3  # side of best-buddy's patches in pixels
_SCORES = 2**24  # best-buddy's scores at a time: 64 MiB in float32


def _patches(image: Tensor) -> Tensor:
    """Patches side by side, ``(N, C, H, W)`` -> ``(N, (H // 3) * (W // 3), 9 C)``; what is left over is cut off."""
    return F.unfold(image, _PATCH, stride=_PATCH).transpose(1, 2)


@torch.no_grad()
def _best_buddies(own: Tensor, truth: Tensor, candidates: Tensor, alpha: float, beta: float, norm: str) -> Tensor:
    """Which of the ``candidates`` (N, K, D) suits ``own`` and ``truth`` (N, M, D) best: their indices, (N, M)."""
    # Distances do not depend on the mean; without it the products below lose fewer digits.
    mean = candidates.mean(dim=1, keepdim=True)
    own, truth, candidates = own - mean, truth - mean, candidates - mean
    energy = candidates.square().sum(dim=2)[:, None]
    # All (N, M, K) scores of a recipe's batch would take 1.4 GB.
    rows = max(1, _SCORES // (candidates.shape[0] * candidates.shape[1]))
    best = []
    for p, g in zip(own.split(rows, dim=1), truth.split(rows, dim=1), strict=True):
        if norm == "l1":
            scores = alpha * torch.cdist(p, candidates, p=1) + beta * torch.cdist(g, candidates, p=1)
        else:
            # alpha |p - C|^2 + beta |g - C|^2 = (alpha + beta) |C|^2 - 2 (alpha p + beta g) C + terms without C
            scores = torch.baddbmm((alpha + beta) * energy, alpha * p + beta * g, candidates.mT, alpha=-2)
        best.append(scores.argmin(dim=2))
    return torch.cat(best, dim=1)


@_in_float32
def best_buddy_loss(
    E: Tensor, H: Tensor, alpha: float = 1.0, beta: float = 1.0, norm: Literal["l1", "l2"] = "l2"
) -> Tensor:
    """L1 distance of each 3 x 3 patch p of E to its best buddy: two ``(N, C, H, W)`` -> a scalar.

    The buddy is the patch C of H, H/2 or H/4 with the smallest ``alpha |p - C|^2 + beta |g - C|^2``, g being H's patch
    in p's place; it carries no gradient (BebyGAN, Li et al., AAAI 2022, arXiv 2103.15295). H and W are 12 or more; the
    one or two pixels by which they exceed a multiple of 3 do not count.

    Args:
        E, H: estimate and ground truth.
        alpha, beta: weights of the two distances.
        norm: l2 for the squared distances above, l1 for sums of absolute differences; no published recipe has l1.
    """
    # Torch's bicubic without antialiasing, as published.
    smaller = [F.interpolate(H, scale_factor=1 / s, mode="bicubic", align_corners=False) for s in (2, 4)]
    candidates = torch.cat([_patches(image) for image in (H, *smaller)], dim=1)
    own = _patches(E)
    best = _best_buddies(own, _patches(H), candidates, alpha, beta, norm)
    return F.l1_loss(own, candidates.gather(1, best[:, :, None].expand_as(own)))


@_in_float32
def back_projection_loss(E: Tensor, L: Tensor) -> Tensor:
    """L1 distance of E, shrunk by MATLAB's bicubic, to L: ``(N, C, sh, sw)`` and ``(N, C, h, w)`` -> a scalar.

    Of BebyGAN. It presumes that L was made from H in just this way, so it suits no blind degradation.
    """
    return F.l1_loss(imresize(E, L.shape[-1] / E.shape[-1]), L)


@torch.no_grad()
@_in_float32
def flat_mask(H: Tensor, window: int = 11, threshold: float = 0.025) -> Tensor:
    """1 where a neighbourhood of H hardly varies, else 0: ``(N, 1 or 3, H, W)`` -> ``(N, 1, H, W)``.

    Flat is a standard deviation of luma below ``threshold`` in ``window`` x ``window`` pixels. BebyGAN's discriminator
    sees H and E times ``1 - flat_mask(H)``, in its own step and in the generator's: its region-aware adversarial loss.
    """
    luma = H
    if H.shape[1] == 3:
        luma = (H * H.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    return (local_variance(luma, window).sqrt() < threshold).to(H.dtype)


# ---------------------------------------------------------------------------------------------------------- RankSRGAN


class RankLoss(nn.Module):
    """Sum over the batch of ``sigmoid(ranker(E) - bias)``: ``(N, C, H, W)`` -> a scalar (RankSRGAN, arXiv 1908.06382).

    A sum, not a mean, as published: its weight fits one batch size, that of each process.

    Args:
        ranker: images -> scores ``(N, 1)``, lower being better. It is frozen here and put into evaluation mode.
        bias: subtracted from each score.
        published: as the SSL paper's code has it: the term is logged but has no gradient, and the ranker stays in
            training mode, so that its batch norms use the batch's statistics and let their running ones drift.
    """

    def __init__(self, ranker: nn.Module, bias: float = 0.0, published: bool = False) -> None:
        super().__init__()
        self.ranker = ranker.train(published).requires_grad_(False)
        self.bias = bias
        self.published = published

    def forward(self, E: Tensor) -> Tensor:
        score = self.ranker(E.detach() if self.published else E)
        # The ranker may run in half precision, the sum may not.
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        return torch.sigmoid(score - self.bias).sum()


def margin_ranking_loss(
    score1: Tensor, score2: Tensor, metric1: Tensor, metric2: Tensor, margin: float = 0.5
) -> Tensor:
    """What trains a ranker, from scores and true metrics of two images each, all ``(N, 1)``: a scalar (RankSRGAN).

    ``mean(max(0, (score1 - score2) * sign(metric2 - metric1) + margin))``: the lower metric is to get the lower score,
    by ``margin`` at least. Equal metrics teach nothing: they add the margin and no gradient.
    """
    return F.margin_ranking_loss(score1, score2, torch.sign(metric1 - metric2), margin)
