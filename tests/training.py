"""Tiny training runs for the tests: generated images, a small generator and discriminator, every option overridable."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.select_dataset import define_Dataset
from models.model_base import ModelBase
from models.select_model import define_Model
from tests.conftest import photograph
from training.command_line import training_command
from training.loop import train
from utils.utils_image import imsave
from utils.utils_option import parse

SSL = ("train.ssl_l1_weight=50", "train.ssl_kl_weight=50", "train.kernel_size_search=9", "train.kernel_size_window=3")


class Workplace:
    """A folder with images, option files and runs."""

    def __init__(self, root: Path, channels: int = 3) -> None:
        self.root = root
        for folder, count, size in (("H", 3, 48), ("T", 2, 40)):
            (root / folder).mkdir()
            for i in range(count):
                imsave(photograph(size, size + 8 * i, 10 * size + i, channels), str(root / folder / f"{i}.png"))
        self.options: dict[str, Any] = {
            "task": "run",
            "model": "plain",
            "scale": 4,
            "path": {"root": str(root / "runs")},
            "datasets": {
                "train": {
                    "dataset_type": "blindsr",
                    "dataroot_H": str(root / "H"),
                    "H_size": 32,
                    "dataloader_num_workers": 0,
                    "dataloader_batch_size": 2,
                },
                "test": {"dataset_type": "sr", "dataroot_H": str(root / "T")},
            },
            "netG": {"net_type": "srvgg_compact", "nf": 8, "nc": 2},
            "netD": {"net_type": "discriminator_unet", "base_nc": 4},
            "train": {
                "manual_seed": 1,
                "iterations": 4,
                "gan_type": "lsgan",
                "D_lossfn_weight": 0.1,
                "G_optimizer_lr": 1e-3,
                "D_optimizer_lr": 1e-3,
                "checkpoint_test": 1000,
                "checkpoint_save": 2,
                "checkpoint_print": 1,
            },
        }

    def file(self, name: str = "o.json") -> str:
        path = self.root / name
        own = path.with_suffix(f".{os.getpid()}")  # forks write it at the same time
        own.write_text(json.dumps(self.options), encoding="utf-8")
        own.replace(path)
        return str(path)

    def run(self, *overrides: str) -> None:
        """What ``python main_train_x.py --opt ... overrides`` does, in this process."""
        arguments = ["--opt", self.file(), *overrides]
        train(*training_command(None, ["plain", "gan", "spsr", "dm", "ranker"], arguments))

    def model(self, *overrides: str, seed: int = 0) -> ModelBase:
        """The model alone."""
        opt = parse(self.file(), overrides=overrides)
        torch.manual_seed(seed)
        return define_Model(opt)

    def batch(self, *overrides: str, number: int = 0) -> dict[str, torch.Tensor]:
        """One training batch."""
        opt = parse(self.file(), overrides=overrides)
        dataset = define_Dataset(opt.datasets["train"])
        items = [dataset[(i, (0, 2 * number + i))] for i in range(2)]  # type: ignore[index]
        return {key: torch.stack([item[key] for item in items]) for key in items[0] if not key.endswith("path")}

    def folder(self, task: str = "run") -> Path:
        return self.root / "runs" / task

    def log(self, task: str = "run") -> str:
        return (self.folder(task) / "train.log").read_text(encoding="utf-8")

    def saved(self, step: int, task: str = "run") -> dict[str, Any]:
        """Every file of a checkpoint, by the name behind the step."""
        return {
            path.stem.partition("_")[2]: torch.load(path, weights_only=True)
            for path in sorted((self.folder(task) / "models").glob(f"{step}_*.pth"))
        }


def flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, tensor or number) of everything in nested dicts and lists."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
    if pairs is None:
        yield prefix, content
        return
    for key, value in pairs:
        yield from flat(value, f"{prefix}/{key}")


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal in every bit: the same operations on the same numbers in the same order."""
    a, b = dict(flat(one)), dict(flat(other))
    assert a.keys() == b.keys()
    assert len(a) > 0
    for name in a:
        if isinstance(a[name], torch.Tensor):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert a[name] == b[name], name


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}
