"""Checkpoints: reading any published layout without running code, and writing without ever leaving half a file."""

import contextlib
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from utils.utils_error import UserError

logger = logging.getLogger(__name__)

# In the order of preference: the averaged weights are the ones that papers report.
_WEIGHT_KEYS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net")


# ---------------------------------------------------------------------------------------------------------- reading


def load_checkpoint_file(path: str | Path) -> Any:
    """Read a ``.safetensors`` file, or one that ``torch.save`` wrote, onto the CPU; code in it is refused, not run.

    Raises:
        UserError: no such file, a folder, an empty, damaged or foreign file, or one that holds more than data.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: this is a folder, expected a checkpoint file")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read, it is damaged or no safetensors file ({error})") from error
    try:
        with warnings.catch_warnings():
            # torch wonders about foreign pickles in a warning of several lines; the error below says it in one.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file makes torch raise almost anything
        if isinstance(error, pickle.UnpicklingError):
            code = re.search(r"GLOBAL (\S+)", str(error))
            if code:
                raise UserError(f"{path}: refused, it holds {code[1]}, and unpickling that could run code") from error
            if _starts_like_a_pickle(path):
                raise UserError(f"{path}: refused, it is a pickle of more than weights, and could run code") from error
        raise UserError(f"{path}: cannot be read, it is damaged or no checkpoint") from error


def _starts_like_a_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def load_state_dict(path: str | Path, param_key: str | None = None) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, by name, on the CPU.

    Bare state dicts and those under one of ``_WEIGHT_KEYS`` (the first that is there) are understood; the prefixes that
    DataParallel and ``torch.compile`` put before names are taken off.

    Args:
        path: a file that :func:`load_checkpoint_file` reads.
        param_key: take the weights under this key and no other.

    Raises:
        UserError: the file cannot be read, lacks ``param_key``, is an optimizer's, or holds no weights.
    """
    content = load_checkpoint_file(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not weights by name")
    if {"state", "param_groups"} <= content.keys():
        raise UserError(f"{path}: this is the state of an optimizer, not of a network")
    groups = [key for key, value in content.items() if isinstance(value, Mapping)]
    if param_key is not None and param_key not in groups:
        there = ", ".join(map(str, groups)) or "none, its weights are bare"
        raise UserError(f"{path}: has no weights under {param_key!r}; keys there: {there}")
    chosen = param_key or next((key for key in _WEIGHT_KEYS if key in groups), None)
    weights = content if chosen is None else content[chosen]
    foreign = [key for key, value in weights.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if foreign or not weights:
        found = ", ".join(map(str, foreign[:3])) or "nothing"
        raise UserError(f"{path}: expected weights by name or one of {', '.join(_WEIGHT_KEYS)}, found {found}")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in weights.items()}


# ---------------------------------------------------------------------------------------------------------- layouts

# One network, many names (spec/architectures.md, 1.2 and 2.1): BasicSR's and old ESRGAN's or KAIR's numbered layout,
# each rewritten to BSRGAN's. The numbered tail is handled by _canonical_names.
_RENAMINGS = (
    (r"^body\.(\d+)\.rdb(\d)\.", r"RRDB_trunk.\1.RDB\2."),
    (r"^body\.(\d+)\.conv(\d)\.", r"recon_trunk.\1.conv\2."),
    (r"^conv_body\.", "trunk_conv."),
    (r"^conv_up(\d)\.", r"upconv\1."),
    (r"^conv_hr\.", "HRconv."),
    (r"^model\.0\.", "conv_first."),
    # Old ESRGAN wraps conv5 too (conv5.0), KAIR's RRDB does not.
    (r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.(?:0\.)?(?=weight|bias)", r"RRDB_trunk.\1.RDB\2.conv\3."),
    (r"^model\.1\.sub\.\d+\.(?=weight|bias)", "trunk_conv."),
)
_TAIL = re.compile(r"^model\.(\d+)\.(weight|bias)$")


def _canonical_names(keys: Iterable[str]) -> dict[str, str]:
    """Map each key to BSRGAN's name of the same layer; keys of other networks stay as they are."""
    keys = list(keys)
    # The numbers of the tail depend on the scale: the last is conv_last, the one before HRconv, the others upconvs.
    is_numbered = any(key.startswith("model.1.sub.") for key in keys)
    numbers = sorted({int(match[1]) for match in map(_TAIL.match, keys) if match and is_numbered} - {0})
    roles = [f"upconv{n}" for n in range(1, len(numbers) - 1)] + ["HRconv", "conv_last"]
    tail = dict(zip(numbers, roles, strict=True)) if len(numbers) >= 2 else {}
    names = {}
    for key in keys:
        match = _TAIL.match(key)
        if match and int(match[1]) in tail:
            names[key] = f"{tail[int(match[1])]}.{match[2]}"
            continue
        for pattern, replacement in _RENAMINGS:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                break
        names[key] = renamed if count else key
    # Two layers under one name would mean that these are not the networks we know.
    return names if len(set(names.values())) == len(names) else {key: key for key in keys}


def _in_names_of(target: Iterable[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``weights`` to the layout of ``target`` where the two are layouts of one network."""
    target = list(target)
    if weights.keys() == set(target):
        return dict(weights)
    to_target = {canonical: key for key, canonical in _canonical_names(target).items()}
    return {to_target.get(name, key): weights[key] for key, name in _canonical_names(weights).items()}


# ---------------------------------------------------------------------------------------------- loading into networks


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_network` did; names are the network's, and the file's under ``unexpected``."""

    path: str
    loaded: int
    total: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor of the network was loaded and none of the file was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def differences(self, limit: int | None = None) -> str:
        """What did not match, in one line, naming at most ``limit`` of each kind."""
        kinds = {
            "missing in the file": self.missing,
            "unknown to the network": self.unexpected,
            "of another shape": self.mismatched,
        }
        parts = []
        for kind, names in kinds.items():
            if names:
                more = ", ..." if limit is not None and len(names) > limit else ""
                parts.append(f"{len(names)} {kind} ({', '.join(names[:limit])}{more})")
        return "; ".join(parts)

    def __str__(self) -> str:
        summary = f"loaded {self.loaded} of {self.total} tensors from {self.path}"
        return summary if self.complete else f"{summary}; {self.differences()}"


def load_network(path: str | Path, network: nn.Module, strict: bool = True, param_key: str | None = None) -> LoadReport:
    """Load a checkpoint into a network, whichever of the known layouts either of them has, and log what was loaded.

    The RRDBNet family (BasicSR, BSRGAN, old ESRGAN, KAIR's RRDB) and MSRResNet (BasicSR, KAIR) are translated; a
    network that knows more layouts of its own has a method ``in_own_names``.

    Args:
        path: a file that :func:`load_state_dict` reads.
        network: changed in place; may be wrapped for distribution or compiled.
        strict: every tensor must match. Else those match that agree in name and shape, never by position, and the
            report names the rest.
        param_key: see :func:`load_state_dict`.

    Raises:
        UserError: the file cannot be read; strict and something does not match; or nothing matches at all.
    """
    network = unwrap(network)
    own = network.state_dict()
    weights = load_state_dict(path, param_key)
    in_own_names = getattr(network, "in_own_names", None)
    weights = in_own_names(weights) if in_own_names else _in_names_of(own, weights)
    # What a network works out by itself (SwinIR's masks) is in files too, in the size that was right for them.
    computed = getattr(network, "computed_buffers", ())
    weights = {key: own[key] if key in own and key.endswith(computed) else value for key, value in weights.items()}
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    report = LoadReport(
        path=str(path),
        loaded=len(fitting),
        total=len(own),
        missing=[key for key in own if key not in weights],
        unexpected=[key for key in weights if key not in own],
        mismatched=[
            f"{key}: expected {_shape(own[key])}, found {_shape(value)}"
            for key, value in weights.items()
            if key in own and value.shape != own[key].shape
        ],
    )
    if not fitting or (strict and not report.complete):
        raise UserError(f"{path} does not fit {type(network).__name__}: {report.differences(limit=3)}")
    network.load_state_dict(fitting, strict=False)
    logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
    return report


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel or ``torch.compile``."""
    while True:
        if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            network = network.module
        elif hasattr(network, "_orig_mod"):
            inner = network._orig_mod
            assert isinstance(inner, nn.Module)
            network = inner
        else:
            return network


# ---------------------------------------------------------------------------------------------------------- writing


def save_network(network: nn.Module, path: str | Path) -> None:
    """Write a network's bare state dict, on the CPU, in KAIR's form; see :func:`save_atomically`."""
    weights = {key: value.detach().cpu() for key, value in unwrap(network).state_dict().items()}
    save_atomically(weights, path)


def save_atomically(content: Any, path: str | Path) -> None:
    """``torch.save`` to ``path`` such that, whenever the power fails, the old file or the new one is there, whole.

    Raises:
        UserError: the file cannot be written (no permission, no space, no such folder).
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
