"""Reads golden numbers: what public reference implementations computed, from made inputs or from photographs.

The former are in ``tests/golden``. Photographs are not distributed: where ``../shared/golden`` lies beside this
repository, tests read them there; elsewhere those tests skip, and twins beside them say the same of made images.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent / "golden"
PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "golden"


class Arrays:
    """The arrays of one file, wherever they are; asking for one that is not at hand skips the test."""

    def __init__(self, name: str) -> None:
        self._stored = [
            np.load(folder / name, allow_pickle=False) for folder in (HERE, PHOTOGRAPHS) if (folder / name).is_file()
        ]
        if not self._stored:
            _skip()

    @property
    def files(self) -> list[str]:
        """The names of the arrays at hand."""
        return list(dict.fromkeys(key for stored in self._stored for key in stored.files))

    def __contains__(self, key: str) -> bool:
        return any(key in stored for stored in self._stored)

    def __getitem__(self, key: str) -> np.ndarray:
        for stored in self._stored:
            if key in stored:
                return stored[key]
        if len(self._stored) > 1:
            raise KeyError(key)
        _skip()


class Tensors:
    """:class:`Arrays` as tensors in float64."""

    def __init__(self, name: str) -> None:
        self._arrays = Arrays(name)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self._arrays[key])).double()


def golden(name: str) -> Any:
    """``losses/ldl.npz`` -> :class:`Arrays`, ``losses/losses_kair.json`` -> its content."""
    if not name.endswith(".json"):
        return Arrays(name)
    for folder in (HERE, PHOTOGRAPHS):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text(encoding="utf-8"))
    _skip()


def figures(result: Any) -> list[float]:
    """Mean, deviation and two entries of a result: what twins on made images keep of it, as it was when the golden
    numbers of the same function were met."""
    array = np.asarray(result, np.float64)
    return [array.mean(), array.std(), array.flat[array.size // 3], array.flat[-array.size // 5]]


def _skip() -> Any:
    pytest.skip("../shared/golden is not here: these numbers come from photographs that are not distributed")
