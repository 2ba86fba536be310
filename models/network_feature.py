"""The frozen VGG19 (arXiv 1409.1556) that perceptual losses compare features with."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils.utils_checkpoint import load_state_dict
from utils.utils_error import UserError

_REMEDY = "set path.pretrained_netF=FILE, or train.F_lossfn_weight=0 to train without the perceptual loss"


class VGGFeatureExtractor(nn.Module):
    """Features of VGG19 at chosen layers: ``(N, 3 or 1, H, W)`` in [0, 1] -> one ``(N, C, H', W')`` for each layer.

    It always stays in eval mode, its parameters take no gradient, and gradients flow to the input.

    Args:
        feature_layer: indices into ``torchvision.models.vgg19().features``; that of a convolution means its output
            before the ReLU. KAIR's 2, 7, 16, 25, 34 are conv1_2, conv2_2, conv3_4, conv4_4 and conv5_4.
        use_input_norm: normalise by the mean and deviation of ImageNet.
        use_range_norm: the input is in [-1, 1]; bring it to [0, 1] first.
        weights_path: a state dict of vgg19 or of its ``features``; None takes torch's cache, or downloads to it.
        features: layers to use instead of VGG19's, for tests; nothing is loaded then.

    Raises:
        UserError: the weights cannot be had or do not fit, or there is no such layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        feature_layer: int | Sequence[int] = 34,
        use_input_norm: bool = True,
        use_range_norm: bool = False,
        weights_path: str | None = None,
        features: nn.Sequential | None = None,
    ) -> None:
        super().__init__()
        self.feature_layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        self.use_input_norm = use_input_norm
        self.use_range_norm = use_range_norm
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        if features is None:
            # Torchvision brings PyTorch's compiler with it, a second and more: only who uses VGG19 imports it.
            from torchvision.models import vgg19

            # On the meta device nothing is allocated or initialised: VGG19's classifier alone is half a gigabyte.
            with torch.device("meta"):
                features = vgg19(weights=None).features
            self.features = self._upto_deepest(features)
            self._load(weights_path)
        else:
            self.features = self._upto_deepest(features)
        self.requires_grad_(False)
        self.train(False)

    def _upto_deepest(self, features: nn.Sequential) -> nn.Sequential:
        for index in self.feature_layers:
            if not 0 <= index < len(features):
                raise UserError(
                    f"train.F_feature_layer: {index} is no layer of VGG19, expected 0 to {len(features) - 1}"
                )
        # An in-place ReLU would overwrite the convolution's output that has just been collected.
        layers = (nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in features)
        return nn.Sequential(*layers)[: max(self.feature_layers) + 1]

    def _load(self, weights_path: str | None) -> None:
        path = weights_path or _in_cache()
        try:
            weights = load_state_dict(path)
        except UserError as error:
            raise UserError(f"VGG19 weights of the perceptual loss: {error}; {_REMEDY}") from error
        prefix = "features." if "features.0.weight" in weights else ""
        wanted = self.features.state_dict()
        for key, parameter in wanted.items():
            found = weights.get(prefix + key)
            if found is None or found.shape != parameter.shape:
                raise UserError(f"{path}: these are not the weights of VGG19; {_REMEDY}")
        self.features.load_state_dict({key: weights[prefix + key].float() for key in wanted}, assign=True)

    def train(self, mode: bool = True) -> "VGGFeatureExtractor":
        """Stay in eval mode whatever is asked: the features are a fixed yardstick."""
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.use_range_norm:
            x = (x + 1) / 2
        if self.use_input_norm:
            x = (x - self.mean) / self.std
        outputs: dict[int, Tensor] = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.feature_layers:
                outputs[index] = x
        return [outputs[index] for index in self.feature_layers]


def _in_cache() -> str:
    """The file where torchvision keeps the weights of VGG19, downloaded if it is not there."""
    from torchvision.models import VGG19_Weights

    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(VGG19_Weights.IMAGENET1K_V1.url))
    if not os.path.isfile(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with socket_timeout(seconds=30):
                torch.hub.download_url_to_file(VGG19_Weights.IMAGENET1K_V1.url, path, hash_prefix="dcbb9e9d")
        except (OSError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"the VGG19 weights of the perceptual loss are not in torch's cache and could not be downloaded "
                f"({reason}); put {VGG19_Weights.IMAGENET1K_V1.url} at {path}, or {_REMEDY}"
            ) from error
    return path


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Without a limit, a network that swallows packets would hold the training for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
