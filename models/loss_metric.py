"""Learned metrics of two images, E and the ground truth H, that are losses too: by the names of utils_metric_table."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.network_feature import socket_timeout
from models.network_stlpips import STLPIPS
from utils.utils_error import UserError
from utils.utils_metric_table import METRICS


class LearnedMetric(nn.Module):
    """A metric: ``(N, 3 or 1, H, W)`` twice, RGB or gray in [0, 1], E not clamped -> ``(N,)``, 0 for equal images.

    It computes in float32 also inside autocast, always stays in eval mode, and its weights take no gradient. Sides
    smaller than ``METRICS[name].smallest`` make its network raise.

    Args:
        name: of ``METRICS``, one that ``is_loss``.

    Raises:
        ImportError: the library that it needs.
        OSError, RuntimeError: its weights are not in torch's cache and cannot be fetched. How long a socket is waited
            for is the caller's to say (``models.network_feature.socket_timeout``).
        UserError: the package with the weights of ST-LPIPS is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        # Random numbers are the same with the metric and without it.
        with torch.random.fork_rng(devices=[]):
            self.network, self._distance = _network(name)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "LearnedMetric":
        """Stay in eval mode whatever is asked: a metric is a fixed yardstick."""
        return super().train(False)

    def forward(self, E: Tensor, H: Tensor) -> Tensor:
        with torch.autocast(E.device.type, enabled=False):
            return self._distance(*(image.float().expand(-1, 3, -1, -1) for image in (E, H))).reshape(len(E))


def _network(name: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """-> the network and how it is called."""
    if name in ("stlpips", "stlpips_vgg"):
        network: nn.Module = STLPIPS("alex" if name == "stlpips" else "vgg")
        return network, network
    if name in ("lpips", "lpips_vgg"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        # The metric around it keeps sums, and refuses an E that leaves [0, 1].
        network = LearnedPerceptualImagePatchSimilarity("alex" if name == "lpips" else "vgg").net
        return network, lambda E, H: network(E, H, normalize=True)
    if name == "dists":
        from torchmetrics.functional.image.dists import DISTSNetwork

        network = DISTSNetwork()
        return network, lambda E, H: network(E, H, require_grad=True)
    raise ValueError(f"{name!r} is no learned metric of two images")


def metric_loss(name: str, device: torch.device) -> LearnedMetric:
    """The metric ``name`` as a loss, for ``train.iqa_weights``.

    Raises:
        UserError: its library is not installed, or its weights cannot be had.
    """
    key = f"train.iqa_weights.{name}"
    try:
        with socket_timeout(seconds=30):
            return LearnedMetric(name).to(device)
    except ImportError as error:
        raise UserError(
            f"{key}: needs {METRICS[name].library}, which cannot be imported here ({error}); pip install -r "
            f"requirements-extra.txt, or set it to 0"
        ) from error
    except (OSError, RuntimeError) as error:  # whatever goes wrong with a download
        raise UserError(
            f"{key}: its weights are not in the cache and cannot be fetched ({error}); fetch them where there is a "
            f"network, or set it to 0"
        ) from error
