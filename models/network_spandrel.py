"""Any published architecture that spandrel knows (HAT, DAT, SPAN, RealPLKSR, ...), built from a checkpoint of it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from utils.utils_error import UserError
from utils.utils_spandrel import describe_checkpoint, describe_weights

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

logger = logging.getLogger(__name__)


class SpandrelNetwork(nn.Module):
    """A network of spandrel in the form of those of this project: (N, C, h, w) → (N, C, h·scale, w·scale), RGB [0, 1].

    Spandrel's own call clamps, has no gradient and evaluates; this one leaves all three to the caller. Sizes that the
    network does not take are extended as spandrel does, by reflection, then by the border, and the result is cropped.
    The input is copied, since RCAN writes into it.
    The names of its weights are the architecture's own, so that what is saved loads wherever spandrel is used.
    """

    def __init__(self, found: "ImageModelDescriptor[nn.Module]") -> None:
        super().__init__()
        self.model = found.model
        self.architecture = found.architecture.name
        self.scale = found.scale
        self.size_requirements = found.size_requirements
        self.size_multiple = found.size_requirements.multiple_of
        call = getattr(found, "_call_fn", None)  # takes the image out of a tuple, or shifts the range
        if call is None:
            raise UserError("this version of spandrel is not known here; python -m pip install 'spandrel<0.5'")
        self.call = call
        for name, parameter in self.named_parameters():
            if ".eval_conv." in name:  # SPAN computes these from the others; they never see a gradient
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        right, bottom = self.size_requirements.get_padding(w, h)
        if right or bottom:
            mirrored_right, mirrored_bottom = min(right, w - 1), min(bottom, h - 1)
            x = F.pad(x, (0, mirrored_right, 0, mirrored_bottom), "reflect")
            x = F.pad(x, (0, right - mirrored_right, 0, bottom - mirrored_bottom), "replicate")
        return self.call(self.model, x.clone())[..., : h * self.scale, : w * self.scale]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The architecture's own, without the name of this wrapper."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`state_dict`."""
        return self.model.load_state_dict(state_dict, strict, assign)

    def in_own_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights in another of the layouts that spandrel reads, renamed to this network's; others as they are."""
        if weights.keys() == self.state_dict().keys():
            return weights
        try:
            return describe_weights(weights).model.state_dict()
        except UserError:
            return weights

    def check_patch(self, size: int) -> None:
        """Raise UserError unless patches of L of ``size`` x ``size`` pixels go through as they are."""
        padding, _ = self.size_requirements.get_padding(size, size)
        if padding:
            rule = f"at least {self.size_requirements.minimum} pixels and multiples of {self.size_multiple}"
            raise UserError(
                f"datasets.train.H_size: {self.architecture} takes patches of L of {rule}, not {size}; "
                f"the next that fits is H_size {(size + padding) * self.scale}"
            )


def load_spandrel(
    path: str | Path | None, scale: int, n_channels: int, param_key: str | None = None
) -> SpandrelNetwork:
    """Build the network that a checkpoint holds, with its weights.

    Args:
        path: any architecture's checkpoint that spandrel knows, in a layout that ``load_state_dict`` reads.
        scale: must be the checkpoint's.
        n_channels: must be the checkpoint's, in and out.
        param_key: which weights of the file; see ``load_state_dict``.

    Raises:
        UserError: no path, an unreadable file, an unknown network, one of another scale or other channels.
    """
    if path is None:
        raise UserError("netG.path: net_type spandrel is built from a checkpoint: set path.pretrained_netG")
    found = describe_checkpoint(path, param_key)
    name = found.architecture.name
    if found.scale != scale:
        raise UserError(f"scale: {path} holds {name} for scale {found.scale}, not {scale}; set scale to {found.scale}")
    if found.input_channels != n_channels:
        raise UserError(f"n_channels: {path} holds {name} for {found.input_channels} channels, not {n_channels}")
    logger.info("%s: %s (%s), scale %d", path, name, ", ".join(found.tags), scale)
    return SpandrelNetwork(found)
