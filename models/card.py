"""What a generator's ``.safetensors`` file says of itself: enough to use it anywhere, without the folder of its run."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from utils.utils_checkpoint import Fingerprint, read_header, save_safetensors, unwrap
from utils.utils_error import UserError
from utils.utils_option import Options
from utils.utils_run import run_facts, to_json

logger = logging.getLogger(__name__)

_FORMAT = "self-similarity/1"  # the number goes up where a reader of before would misunderstand
_NETWORK = ("scale", "n_channels", "netG", "diffusion", "autoencoder")
# They change how a network is made or computed, not what of.
_WITHOUT_EFFECT = {"init_type", "init_bn_type", "init_gain", "use_checkpoint", "img_size"}


def network_of(options: Options | Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's options those that make its generator.

    Raises:
        KeyError: one of them is missing.
    """
    values = options.model_dump(include=set(_NETWORK)) if isinstance(options, Options) else options
    needed = _NETWORK if values.get("diffusion") else _NETWORK[:3]
    return {name: values[name] for name in needed}


def header_of(network: Mapping[str, Any]) -> dict[str, str]:
    """What a header says of any network, trained here or not: how to build it, by :func:`network_of`."""
    value_range = "RGB or gray in [0, 1], N x C x H x W"
    return {"format": _FORMAT, "network": to_json(network), "value_range": value_range}


def training_of(checkpoint: Path) -> dict[str, str]:
    """What the header of a checkpoint, or of the ``.safetensors`` file beside it, says of its training; {} without."""
    for path in (checkpoint, checkpoint.with_suffix(".safetensors")):
        header = read_header(path)
        if header.get("format") == _FORMAT:
            return {key: value for key, value in header.items() if key not in ("format", "network", "value_range")}
    return {}


def save_with_cards(
    generators: Mapping[str, nn.Module],
    opt: Options,
    folder: Path,
    step: int,
    validation: Mapping[str, Mapping[str, float]],
) -> dict[str, Fingerprint]:
    """Write ``{step}_{name}.safetensors`` of each generator; -> what was written, by the files' names.

    Args:
        generators: G, and E where there is one.
        validation: of this step: test set -> metric -> value; of the average where there is one.

    Raises:
        UserError: a file cannot be written.
    """
    resolved = opt.model_dump(exclude={"unused", "is_train"})
    card = header_of(network_of(opt)) | {
        "task": opt.task,
        "step": str(step),
        "options_sha256": hashlib.sha256(to_json(resolved, sort_keys=True).encode()).hexdigest(),
        "git_commit": run_facts()["git_commit"],
        "license": opt.path.license,
    }
    judged = "E" if "E" in generators else "G"
    written = {}
    for name, network in generators.items():
        path = folder / f"{step}_{name}.safetensors"
        scores = {"validation": to_json(validation)} if name == judged and validation else {}
        written[path.name] = save_safetensors(unwrap(network).state_dict(), path, card | scores)
    return written


def card_of(path: Path) -> dict[str, Any] | None:
    """The options of the network that a file holds, as :func:`network_of` gives them; None where it does not say.

    Raises:
        UserError: the file says it in a form that cannot be understood here.
    """
    header = read_header(path)
    if "format" not in header or "network" not in header:
        return None
    if header["format"] != _FORMAT:
        raise UserError(f"{path}: says what it is in the format {header['format'][:40]}, known is {_FORMAT}")
    try:
        network = network_of(json.loads(header["network"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its header does not say which network it is ({error!r})") from error
    return {**network, "is_train": False}


def check_start(path: Path, opt: Options) -> None:
    """Compare what a file says of its network with ``netG``: what its weights alone do not tell.

    Raises:
        UserError: they differ, and ``train.G_param_strict`` asks for the same.
    """
    card = card_of(path)
    assert opt.netG is not None
    own = opt.netG.model_dump()
    if card is None or card["netG"].get("net_type") != own["net_type"]:
        return
    theirs = {name: value for name, value in card["netG"].items() if name in own and name not in _WITHOUT_EFFECT}
    for name, value in theirs.items():
        if value == own[name]:
            continue
        difference = f"netG.{name} is {own[name]}, {path} was trained with {value}"
        if opt.train.G_param_strict:
            raise UserError(f"{difference}; set it so, or train.G_param_strict=false to begin with it all the same")
        logger.warning("%s", difference)
