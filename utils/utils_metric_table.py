"""What can be measured: one table for all scripts. It imports no torch, because command lines name it in their help."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from utils.utils_error import UserError

Library = Literal["", "torchmetrics", "pytorch_fid", "pyiqa"]


@dataclass(frozen=True)
class Metric:
    """A column of the tables.

    Attributes:
        title: its heading.
        about: what it is, for the note under a table.
        higher_better: whether more is better.
        spec: format of its numbers.
        needs: ``pair`` = E and H, ``image`` = E alone, ``set`` = all E and all H of a test set.
        library: what must be installed to compute it, beyond requirements.txt; "" = nothing.
        smallest: side in pixels that it needs inside the border; smaller images get NaN.
        is_loss: learned, and differentiable: ``train.iqa_weights`` takes it.
    """

    title: str
    about: str
    higher_better: bool
    spec: str = ".4f"
    needs: Literal["pair", "image", "set"] = "pair"
    library: Library = "pyiqa"
    smallest: int = 1
    is_loss: bool = False

    def titled(self, value: float) -> str:
        """``PSNR 28.43 dB``."""
        return f"{self.title} {value:{self.spec}}{' dB' if self.about.startswith('dB') else ''}"


def _learned(title: str, about: str, library: Library, smallest: int) -> Metric:
    """A learned distance of E and H."""
    return Metric(title, about, higher_better=False, library=library, smallest=smallest, is_loss=True)


# By the name that --metrics and test.metrics take; where pyiqa computes it, also pyiqa's. Its licence (PolyForm
# Noncommercial) forbids commercial use: it computes only what no library with a free licence computes equally.
METRICS = {
    "psnr": Metric("PSNR", "dB, on RGB", True, ".2f", library=""),
    "ssim": Metric("SSIM", "on RGB, mean over the channels", True, library="", smallest=11),
    "psnr_y": Metric("PSNR-Y", "dB, on MATLAB's luma, not rounded, as in the paper", True, ".2f", library=""),
    "ssim_y": Metric("SSIM-Y", "on MATLAB's luma, not rounded, as in the paper", True, library="", smallest=11),
    "psnr_y8": Metric("PSNR-Y8", "dB, on luma rounded to 8 bits, as in KAIR", True, ".2f", library=""),
    "ssim_y8": Metric("SSIM-Y8", "on luma rounded to 8 bits, as in KAIR", True, library="", smallest=11),
    "ssg": Metric(
        "SSG",
        "distance of the self-similarity graphs at H's edges: 1000 (L1 + KL), the loss SSL",
        False,
        ".3f",
        library="",
        smallest=13,  # more than half of the search area
    ),
    "color": Metric(
        "COLOR", "mean difference of averages over 16 x 16 pixels, in levels of 255: drift", False, ".3f", library=""
    ),
    "stlpips": _learned("ST-LPIPS", "learned distance that tolerates shifts, AlexNet", "", 21),
    "stlpips_vgg": _learned("ST-LPIPS-VGG", "learned distance that tolerates shifts, VGG16", "", 18),
    "lpips": _learned("LPIPS", "learned perceptual distance, AlexNet, v0.1", "torchmetrics", 31),
    "lpips_vgg": _learned("LPIPS-VGG", "learned perceptual distance, VGG16, v0.1", "torchmetrics", 16),
    "dists": _learned("DISTS", "structure and texture distance, VGG16", "torchmetrics", 1),
    "fid": Metric(
        "FID", "Frechet distance of Inception features over the set, whole images", False, ".2f", "set", "pytorch_fid"
    ),
    "niqe": Metric("NIQE", "natural image statistics, no reference", False, ".3f", "image", smallest=96),
    "musiq": Metric("MUSIQ", "learned quality, KonIQ-10k, no reference", True, ".2f", "image"),
    "clipiqa": Metric("CLIPIQA", "CLIP's quality, no reference", True, ".4f", "image"),
    "maniqa": Metric("MANIQA", "learned quality, KonIQ-10k, no reference", True, ".4f", "image"),
    "ms_ssim": Metric("MS-SSIM", "SSIM over five scales, luma", True, smallest=161),
    "fsim": Metric("FSIM", "phase congruency and gradients, with colour", True, smallest=2),
    "gmsd": Metric("GMSD", "deviation of the gradient similarity, luma", False, smallest=2),
    "vif": Metric("VIF", "visual information fidelity, luma", True, smallest=41),
    "nlpd": Metric("NLPD", "normalised Laplacian pyramid distance, luma", False, smallest=2),
    "mad": Metric("MAD", "most apparent distortion; slow", False, ".2f", smallest=16),
    "piqe": Metric("PIQE", "block-wise distortion, no reference", False, ".2f", "image", smallest=16),
}

_DEFAULT = ("psnr", "ssim", "psnr_y", "ssim_y", "ssg")
GROUPS = {
    "default": _DEFAULT,
    "paper": ("psnr_y", "ssim_y", "ssg", "lpips", "dists", "fid", "niqe", "musiq", "clipiqa", "maniqa"),
    # What needs no download.
    "offline": (*_DEFAULT, "color", "stlpips", "stlpips_vgg", "ms_ssim", "fsim", "gmsd", "vif", "nlpd", "mad", "piqe"),
}


def choose(names: Iterable[str]) -> list[str]:
    """Names of ``METRICS`` from names and groups, each once, in the order given.

    Raises:
        UserError: an unknown name, with the nearest one.
    """
    chosen: dict[str, None] = {}
    for name in names:
        if name not in GROUPS and name not in METRICS:
            known = [*GROUPS, *METRICS]
            near = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1)
            remedy = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise UserError(f"{name!r} is not a metric of this program; {remedy}")
        chosen |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(chosen)
