"""Checkpoints: reading any published layout without running code, and writing without ever leaving half a file."""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from utils.utils_error import UserError
from utils.utils_ncnn import is_ncnn, load_ncnn
from utils.utils_pickle import HARMLESS, inflates, what_is

logger = logging.getLogger(__name__)

# In the order of preference: the averaged weights are the ones that papers report.
_GENERATORS = ("net_g", "netG", "generator", "G", "g", "model", "net", "network")
_WEIGHT_KEYS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", *_GENERATORS)


class DamagedError(UserError):
    """A checkpoint file is missing, cannot be read, or is not what was written."""


class Fingerprint(NamedTuple):
    """By which a file is known to be what was written."""

    size: int  # bytes
    sha256: str  # hexadecimal

    def check(self, path: Path) -> None:
        """Read a file of any size, a piece at a time.

        Raises:
            DamagedError: it is another one, or cannot be read.
        """
        try:
            digest = hashlib.sha256()  # hashlib.file_digest is of Python 3.11
            with path.open("rb") as file:
                while piece := file.read(2**20):
                    digest.update(piece)
            self._compare(path, path.stat().st_size, digest.hexdigest())
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read: {error.strerror or error}") from error

    def read(self, path: Path) -> bytes:
        """The content of a file that is this one; raises as :meth:`check` does."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read: {error.strerror or error}") from error
        self._compare(path, len(content), hashlib.sha256(content).hexdigest())
        return content

    def _compare(self, path: Path, size: int, sha256: str) -> None:
        if size != self.size:
            raise DamagedError(f"{path}: has {size} bytes, {self.size} were written")
        if sha256 != self.sha256:
            raise DamagedError(f"{path}: is not what was written, its SHA-256 is another")


# ---------------------------------------------------------------------------------------------------------- reading


def load_checkpoint_file(path: str | Path, expected: Fingerprint | None = None) -> Any:
    """Read a ``.safetensors`` file, one that ``torch.save`` wrote, or ncnn's ``.param``, onto the CPU.

    Code in it is refused, not run.

    Args:
        path: the file; it is read once.
        expected: what it must be, where that is known; then it is in memory as a whole before its content is made.

    Raises:
        DamagedError: no such file, a folder, an empty, damaged or foreign file, or one that holds more than data.
    """
    path = Path(path)
    if path.is_dir():
        raise DamagedError(f"{path}: this is a folder, expected a checkpoint file")
    if not path.is_file():
        raise DamagedError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DamagedError(f"{path}: the file is empty")
    content = expected.read(path) if expected else None
    if content is None and is_ncnn(path):
        weights, more = load_ncnn(path)
        if more:
            _say_once(f"{path}: takes the network itself, and leaves the layer that follows it: {more}")
        return weights
    if content is None and _is_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{path}: cannot be read, it is damaged or no safetensors file ({error})") from error
    try:
        # torch judges names by their suffix
        with path.open("rb") if content is None else io.BytesIO(content) as file:
            if why := inflates(file):
                raise DamagedError(f"{path}: {why}")
            with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
                # torch wonders about foreign pickles in a warning of several lines; the error below says it in one.
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: the memory is too small for it") from error
    except Exception as error:  # a damaged file makes torch raise almost anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is torch's seeking in a file cut short
            raise DamagedError(f"{path}: cannot be read: {error.strerror or error}") from error
        text = path.with_suffix(".param")
        of_ncnn = f"weights alone; name {text.name}, which says of what" if text.is_file() and is_ncnn(text) else None
        why = of_ncnn or what_is(path) or "cannot be read, it is damaged or no checkpoint"
        raise DamagedError(f"{path}: {why}") from error


def _is_safetensors(path: Path) -> bool:
    """By its content, whatever it is called: the length of a JSON text, then the text."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")))


def load_state_dict(
    path: str | Path,
    param_key: str | None = None,
    own: Collection[str] = frozenset(),
    expected: Fingerprint | None = None,
) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, by name, on the CPU; arrays become tensors.

    Bare state dicts and those under a key are understood; of several an average is taken before ``_WEIGHT_KEYS``, and
    the choice is logged. A Lightning file's generator is taken out of its module. The prefixes that DataParallel and
    ``torch.compile`` put before names are taken off.

    Args:
        path: a file that :func:`load_checkpoint_file` reads.
        param_key: take the weights under this key and no other.
        own: names of the network that they are for: where some of the file's are among them, no word is taken off.
        expected: see :func:`load_checkpoint_file`.

    Raises:
        UserError: the file cannot be read, lacks ``param_key``, is an optimizer's, or holds no weights.
    """
    content = load_checkpoint_file(path, expected)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not weights by name")
    if {"state", "param_groups"} <= content.keys():
        raise UserError(f"{path}: this is the state of an optimizer, not of a network")
    groups = {key: _unwrapped(value) for key, value in content.items() if isinstance(value, Mapping)}
    chosen = param_key if param_key in groups else _preferred(groups)
    weights = _without_wrappers(content if chosen is None else groups[chosen])
    fits = any(key in own for key in weights)
    parts = {} if fits else _parts(weights, is_lightning="pytorch-lightning_version" in content)
    if param_key is not None and param_key not in groups and param_key not in parts:
        there = ", ".join(map(str, {**groups, **parts})) or "none, its weights are bare"
        raise UserError(f"{path}: has no weights under {param_key!r}; keys there: {there}")
    others = [key for key in groups if key != chosen and _is_weights(groups[key])]
    part = param_key if param_key in parts else _preferred(parts)
    if part is not None:
        others += [key for key in parts if key != part]
        chosen, weights = part, parts[part]
    foreign = [key for key, value in weights.items() if not (isinstance(key, str) and _is_plain(value))]
    if foreign or not weights:
        found = ", ".join(map(str, foreign[:3])) or "nothing"
        raise UserError(f"{path}: expected weights by name or one of {', '.join(_WEIGHT_KEYS)}, found {found}")
    claimed = sum(value.nbytes for value in weights.values())
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights.values()}
    if claimed > _SHARED * sum(storages.values()):
        raise UserError(f"{path}: refused, its weights repeat {sum(storages.values()):,} bytes as {claimed:,}")
    if others and param_key is None:
        what = "the average" if _is_average(chosen) else "the weights"
        _say_once(
            f"{path}: takes {what} {chosen!r} and leaves {', '.join(map(str, others))}; --param_key names another"
        )
    return weights


_SHARED = 4  # names for one tensor, as tied weights have, on average; strides of 0 would make networks of any size


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.layout, value.device.type) == (torch.strided, "cpu")


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    logger.info("%s", text)


def _is_average(key: Any) -> bool:
    """Whether a name says that these are a generator's averaged weights: params_ema, model_ema, ema_state_dict, ..."""
    words = {*re.split(r"[_\-.]", re.sub(r"([a-z])([A-Z])", r"\1_\2", str(key)).lower())}
    return bool(words & {"ema", "swa", "avg", "average", "averaged"}) and not words & {"d", "disc", "discriminator"}


def _is_weights(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor | np.ndarray) for value in content.values())


def _unwrapped(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The weights themselves where the key holds them under one more, as ``{"ema": {"decay": 0.9, "shadow": ...}}``."""
    within = [value for value in content.values() if isinstance(value, Mapping) and _is_weights(value)]
    return within[0] if len(within) == 1 and not _is_weights(content) else content


def _preferred(groups: Mapping[Any, Mapping[Any, Any]]) -> Any:
    """The key to take weights from: an average, the first of ``_WEIGHT_KEYS``, the only one; None without any."""
    filled = [key for key, content in groups.items() if _is_weights(content)]
    known = [key for key in _WEIGHT_KEYS if key in filled]
    averages = [key for key in (*known, *filled) if _is_average(key)]
    return next(iter([*averages, *known, *(filled if len(filled) == 1 else [])]), None)


def _without_wrappers(weights: Mapping[Any, Any]) -> dict[Any, Any]:
    """Tensors under the names of the bare network; the count of an AveragedModel goes."""
    plain = {key: _as_tensor(value) for key, value in weights.items()}
    if all(isinstance(key, str) for key in plain):
        if all(key.startswith("module.") for key in plain if key != "n_averaged"):
            plain.pop("n_averaged", None)
        plain = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in plain.items()}
    return plain


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C", subok=False))
    return value


def _parts(weights: Mapping[Any, Any], is_lightning: bool) -> dict[str, dict[str, Any]]:
    """First word of the names -> weights under the names without it, where the words are networks of one module.

    They are in a Lightning file, where one of them is the average of another (``ema_model.`` beside ``online_model.``),
    and where all names begin with one that stands for the generator.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key, value in weights.items():
        word, _, rest = str(key).partition(".")
        if rest:
            parts.setdefault(word, {})[re.sub(r"^((module|_orig_mod)\.)+", "", rest)] = value
    # KAIR's networks are numbered below "model".
    parts = {word: part for word, part in parts.items() if not all(name[0].isdigit() for name in part)}
    # Latent diffusion's UNet is "model", but of no use without the other models of the file.
    whole = any(word.endswith("_stage_model") for word in parts)
    generators = {word: part for word, part in parts.items() if word in _GENERATORS and not whole}
    averages = {
        word: part
        for word, part in parts.items()
        if _is_average(word) and any(part.keys() == other.keys() for name, other in parts.items() if name != word)
    }
    if averages:
        return parts
    alone = len(generators) == 1 and sum(map(len, generators.values())) == len(weights)
    return generators if is_lightning or alone else {}


# ---------------------------------------------------------------------------------------------------------- layouts

# One network, many names: BasicSR's and old ESRGAN's or KAIR's numbered layout, each rewritten to BSRGAN's. The
# numbered tail is handled by _canonical_names.
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


def load_network(
    path: str | Path,
    network: nn.Module,
    strict: bool = True,
    param_key: str | None = None,
    expected: Fingerprint | None = None,
) -> LoadReport:
    """Load a checkpoint into a network, whichever of the known layouts either of them has, and log what was loaded.

    The RRDBNet family (BasicSR, BSRGAN, old ESRGAN, KAIR's RRDB) and MSRResNet (BasicSR, KAIR) are translated; a
    network that knows more layouts of its own has a method ``in_own_names``.

    Args:
        path: a file that :func:`load_state_dict` reads.
        network: changed in place; may be wrapped for distribution or compiled.
        strict: every tensor must match. Else those match that agree in name and shape, never by position, and the
            report names the rest.
        param_key: see :func:`load_state_dict`.
        expected: see :func:`load_checkpoint_file`.

    Raises:
        UserError: the file cannot be read; strict and something does not match; or nothing matches at all.
    """
    network = unwrap(network)
    own = network.state_dict()
    weights = load_state_dict(path, param_key, own, expected)
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


class _Hashed:
    """A file being written, with what it takes to know it again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """What writes does so from the beginning to the end and never goes back."""
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_network(network: nn.Module, path: str | Path) -> Fingerprint:
    """Write a network's bare state dict, on the CPU, in KAIR's form; see :func:`save_atomically`."""
    weights = {key: value.detach().cpu() for key, value in unwrap(network).state_dict().items()}
    return save_atomically(weights, path)


def save_safetensors(weights: Mapping[str, Tensor], path: str | Path, header: Mapping[str, str]) -> Fingerprint:
    """Write weights by name and a text for each key of ``header``; see :func:`save_atomically`."""
    # Copies: the format knows neither layouts nor weights that two layers share, as SPSR's do.
    copies = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    content = save(copies, metadata=dict(header))
    return _write(path, lambda file: file.write(content))


def read_header(path: Path) -> dict[str, str]:
    """What a ``.safetensors`` file holds besides weights; {} of other and unreadable files."""
    with contextlib.suppress(SafetensorError, OSError):
        if path.is_file() and _is_safetensors(path):
            with safe_open(path, "pt") as file:
                return file.metadata() or {}
    return {}


def save_atomically(content: Any, path: str | Path) -> Fingerprint:
    """``torch.save`` to ``path`` such that, whenever the power fails, the old file or the new one is there, whole.

    Returns:
        Of what was to be written: a disk that wrote something else is found out.

    Raises:
        UserError: the file cannot be written (no permission, no space, no such folder).
    """
    return _write(path, lambda file: torch.save(content, file))


def _write(path: str | Path, write: Callable[[IO[bytes]], Any]) -> Fingerprint:
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            hashed = _Hashed(file)
            write(cast(IO[bytes], hashed))  # it only writes
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return Fingerprint(hashed.size, hashed.sha256.hexdigest())
