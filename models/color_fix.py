"""Take an image's colours from another: what generated images drift in, the enlarged low-quality image still has."""

from torch import Tensor
from torch.nn import functional as F

_EPS = 1e-5  # added to variances
_LEVELS = 5


def adain_color_fix(E: Tensor, L_up: Tensor) -> Tensor:
    """E with the mean and deviation of L_up, channel by channel and image by image (AdaIN, arXiv 1703.06868, eq. 8).

    Args:
        E, L_up: (N, C, H, W), in [0, 1].

    Returns:
        (N, C, H, W), not clamped.
    """
    deviation, mean = _statistics(E)
    wanted_deviation, wanted_mean = _statistics(L_up)
    return (E - mean) / deviation * wanted_deviation + wanted_mean


def _statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation and mean of each channel, (N, C, 1, 1)."""
    correction = int(image[0, 0].numel() > 1)  # a single pixel has no unbiased variance
    variance = image.var((2, 3), correction=correction, keepdim=True)
    return (variance + _EPS).sqrt(), image.mean((2, 3), keepdim=True)


def wavelet_color_fix(E: Tensor, L_up: Tensor) -> Tensor:
    """The high frequencies of E on the low ones of L_up, as StableSR (arXiv 2305.07015) does it.

    Args:
        E, L_up: (N, C, H, W), in [0, 1].

    Returns:
        (N, C, H, W), not clamped.
    """
    return E - _low_frequencies(E) + _low_frequencies(L_up)


def _low_frequencies(image: Tensor) -> Tensor:
    """What an a-trous wavelet decomposition of five levels leaves: 1 2 1 along both axes, pixels 1, 2, 4, 8, 16 apart.

    The levels' details, each level's input less its output, add up to the image less this.
    """
    channels = image.shape[1]
    taps = image.new_tensor([1, 2, 1]) / 4
    kernel = (taps[:, None] * taps).expand(channels, 1, 3, 3)
    for level in range(_LEVELS):
        reach = 2**level
        padded = F.pad(image, (reach,) * 4, mode="replicate")
        image = F.conv2d(padded, kernel, dilation=reach, groups=channels)
    return image
