"""How far an estimate E lies from the ground truth H: PSNR and SSIM by KAIR's definitions, and the SSL distance."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from utils.utils_image import calculate_psnr, calculate_ssim, rgb2ycbcr, uint2tensor4
from utils.utils_ssl import SelfSimilarityLoss, edge_mask

# Name -> format of a table's column, in the table's order.
METRICS = {"PSNR": ".2f", "SSIM": ".4f", "PSNR-Y": ".2f", "SSIM-Y": ".4f", "SSL": ".3f"}

_SSIM_WINDOW = 11
_BAND_PIXELS = 2**17  # the graphs of one band's pixels take at most 330 MB each, commonly a tenth of that


def describe_metrics(n_channels: int, border: int) -> str:
    """What the columns are: the note under a table of ``METRICS``."""
    channels = "RGB" if n_channels == 3 else "gray (which is its own luma)"
    return (
        f"PSNR in dB and SSIM on {channels}, and on luma (-Y: BT.601 rounded to 8 bits, as KAIR); SSL: self-similarity "
        "distance 1000 * (L1 + KL) at the edges of the ground truth, lower is better. All on 8-bit images without a "
        f"border of {border} px, mean over the images; '-': image too small, or (SSL) without edges."
    )


def measure(E: NDArray[np.uint8], H: NDArray[np.uint8], border: int, device: torch.device | str) -> dict[str, float]:
    """All of ``METRICS`` for one image.

    Args:
        E, H: RGB (H, W, 3) or gray (H, W), uint8; a gray image is its own luma.
        border: pixels left out at each side, customarily the scale.
        device: where the SSL distance is computed.

    Returns:
        name -> value; NaN where the image is too small for a metric or has no edges for SSL.

    Raises:
        ValueError: the shapes differ.
    """
    if E.shape != H.shape:
        raise ValueError(f"images of different shapes cannot be compared: {E.shape} and {H.shape}")
    E_Y, H_Y = (image if image.ndim == 2 else rgb2ycbcr(image) for image in (E, H))
    side = min(H.shape[:2]) - 2 * border
    inside = np.s_[border : H.shape[0] - border, border : H.shape[1] - border]
    return {
        "PSNR": calculate_psnr(E, H, border) if side >= 1 else math.nan,
        "SSIM": calculate_ssim(E, H, border) if side >= _SSIM_WINDOW else math.nan,
        "PSNR-Y": calculate_psnr(E_Y, H_Y, border) if side >= 1 else math.nan,
        "SSIM-Y": calculate_ssim(E_Y, H_Y, border) if side >= _SSIM_WINDOW else math.nan,
        "SSL": ssl_distance(E[inside], H[inside], device) if side >= 1 else math.nan,
    }


def ssl_distance(E: NDArray[np.uint8], H: NDArray[np.uint8], device: torch.device | str = "cpu") -> float:
    """``SelfSimilarityLoss(1000, 1000)`` at the edge pixels of H (threshold 20), for uint8 images (H, W[, 3]).

    NaN where a side does not exceed half the search area (12 pixels) or H has no edge pixel. The mean is gathered from
    bands of rows, which gives the value of the whole image and bounds the memory.
    """
    loss = SelfSimilarityLoss(1000, 1000)
    radius = loss.kernel_size_search // 2
    height, width = H.shape[:2]
    if min(height, width) <= radius:
        return math.nan
    sr, hr = (uint2tensor4(np.ascontiguousarray(image)).to(device) for image in (E, H))
    mask = edge_mask(hr)
    total, count, rows = 0.0, 0, max(radius + 1, _BAND_PIXELS // width)
    with torch.inference_mode():
        for top in range(0, height, rows):
            # A graph reads no farther than the search area: the band and this margin are all it needs.
            band = slice(max(0, top - radius), min(height, top + rows + radius))
            of_band = torch.zeros_like(mask)
            of_band[:, :, top : top + rows] = mask[:, :, top : top + rows]
            pixels = int(of_band.sum())
            if pixels:
                total += pixels * float(loss(sr[:, :, band], hr[:, :, band], of_band[:, :, band]))
                count += pixels
    return total / count if count else math.nan


def mean_metrics(values: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the images that have it; NaN where none has."""
    means = {}
    for name in METRICS:
        measured = [image[name] for image in values if not math.isnan(image[name])]
        means[name] = sum(measured) / len(measured) if measured else math.nan
    return means
