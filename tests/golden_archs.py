"""Reads the golden network fixtures: numbers that public reference implementations computed (tests/golden/README.md).

Weights are not stored; the fill rule below draws them from each tensor's name.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN_ARCHS = Path(__file__).parent / "golden" / "archs"


def names(*prefixes: str, full: bool = False) -> list[str]:
    """The fixtures whose names start with one of ``prefixes``: numeric ones, or full-size lists of keys."""
    found = sorted({path.stem for prefix in prefixes for path in GOLDEN_ARCHS.glob(f"{prefix}*.json")})
    return [name for name in found if name.endswith("_full") == full]


def description(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN_ARCHS / f"{name}.json").read_text(encoding="utf-8"))


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN_ARCHS / f"{name}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def inputs(golden: dict[str, Any]) -> list[Tensor]:
    """The input images, drawn in float64 and cast, as the fixtures say."""
    return [
        torch.from_numpy(np.random.default_rng(spec["seed"]).random(spec["shape"]).astype(np.float32))
        for spec in golden["inputs"]
    ]


def _generator(key: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(key.encode("utf-8")))


def _spectral_vectors(weight: np.ndarray, key_u: str) -> tuple[np.ndarray, np.ndarray]:
    matrix = weight.astype(np.float64).reshape(weight.shape[0], -1)
    u = _generator(key_u).standard_normal(weight.shape[0])
    u = u / np.linalg.norm(u)
    for _ in range(10):
        v = matrix.T @ u
        v = v / np.linalg.norm(v)
        u = matrix @ v
        u = u / np.linalg.norm(u)
    return u.astype(np.float32), v.astype(np.float32)


def values(golden: dict[str, Any]) -> dict[str, Tensor]:
    """The filled tensors by name, in the published order: what a checkpoint of its authors would hold, but for the
    constants that the constructor computes (``fill.kept_keys``)."""
    rule, found = golden["fill"], {}
    for key, shape, _ in golden["manifest"]:
        if key in rule["kept_keys"]:
            continue
        value = (_generator(key).standard_normal(shape) * rule["scale"]).astype(np.float32)
        if key.endswith("running_var"):
            value = np.abs(value) + 1
        elif key in rule["norm_weight_keys"]:
            value = value + 1
        found[key] = torch.from_numpy(value)
    for module in rule["spectral_norm_modules"]:
        u, v = _spectral_vectors(found[f"{module}.weight_orig"].numpy(), f"{module}.weight_u")
        found[f"{module}.weight_u"], found[f"{module}.weight_v"] = torch.from_numpy(u), torch.from_numpy(v)
    for first, second in rule["aliases"]:
        later = max(first, second, key=list(found).index)
        found[first] = found[second] = found[later]
    return found


@torch.no_grad()
def fill(network: nn.Module, golden: dict[str, Any]) -> None:
    """Give every tensor the value that its name and shape determine."""
    state = network.state_dict()
    for key, value in values(golden).items():
        state[key].copy_(value)


def relative_error(found: Tensor, expected: np.ndarray) -> float:
    """``max|found - expected| / max|expected|``, the fixtures' own measure."""
    return float(relative_errors(found, expected).max())


def relative_errors(found: Tensor, expected: np.ndarray) -> Tensor:
    """``|found - expected| / max|expected|``, entry by entry."""
    assert tuple(found.shape) == expected.shape
    return (found.detach().double() - torch.from_numpy(expected).double()).abs() / np.abs(expected).max()
