"""What spandrel makes of a checkpoint: which of the published architectures it holds, and for what images."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from utils.utils_checkpoint import load_state_dict
from utils.utils_error import UserError

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor


def describe_weights(weights: Mapping[str, Tensor]) -> "ImageModelDescriptor[nn.Module]":
    """The network of these weights as spandrel finds it from their names and shapes, with its scale and channels.

    Args:
        weights: bare weights by name, as ``utils_checkpoint.load_state_dict`` returns them; left as they are.

    Raises:
        UserError: spandrel is not installed, does not know the network, or it does not make an image of an image.
    """
    try:
        import spandrel
    except ImportError as error:
        raise UserError(
            "the package spandrel, which knows more networks, is not installed; pip install -r requirements-extra.txt"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch about the code of the networks
            # Its loaders change the dictionary that they are given.
            found = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(dict(weights)))
    except spandrel.UnsupportedModelError as error:
        raise UserError(f"spandrel knows no network with weights called {', '.join(list(weights)[:3])}, ...") from error
    except Exception as error:  # names that look right with shapes that are not make it raise almost anything
        raise UserError(f"spandrel cannot build a network from these weights ({error!r})") from error
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.input_channels != found.output_channels:
        raise UserError(f"{found.architecture.name} is no network for super-resolution")
    return found


def describe_checkpoint(path: str | Path, param_key: str | None = None) -> "ImageModelDescriptor[nn.Module]":
    """As :func:`describe_weights`, of the file ``path`` in any layout that ``load_state_dict`` reads."""
    weights = load_state_dict(path, param_key)
    try:
        return describe_weights(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
