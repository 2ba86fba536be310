"""How networks compute: in full precision, or half of it by autocast, and in which layout of memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from utils.utils_option_sections import TrainOptions

logger = logging.getLogger(__name__)

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Within it, matrix products and convolutions compute in ``precision``; fp32 leaves all as it is."""
    return torch.autocast(device.type, PRECISION[precision], enabled=precision != "fp32")


def faster_layout(device: torch.device, precision: str) -> torch.memory_format:
    """The layout of weights, and with them of features, in which convolutions are faster."""
    innermost = device.type == "cpu" or precision != "fp32"
    return torch.channels_last if innermost else torch.contiguous_format


def training_layout(device: torch.device, train: TrainOptions) -> torch.memory_format:
    """The layout of weights by ``train.channels_last``; null = the faster one."""
    if train.channels_last is None:
        return faster_layout(device, train.precision)
    return torch.channels_last if train.channels_last else torch.contiguous_format


def set_up(train: TrainOptions) -> None:
    """Tell PyTorch how a GPU's convolutions are to be computed; without effect on a CPU."""
    torch.backends.cudnn.benchmark = train.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = train.tf32


@contextmanager
def of_many_sizes() -> Iterator[None]:
    """Within it no convolutions are tried out: that pays where one size comes again and again, as in training."""
    tried = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tried


def warn_if_slow(device: torch.device, precision: str) -> None:
    """Say where half precision costs time instead of saving it."""
    # A convolution took 10 to 40 times as long as in float32 on a processor with AVX2 alone.
    if precision != "fp32" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        logger.warning("%s is slower than fp32 here: this processor has no instructions for it", precision)


def in_float32(output: Any) -> Any:
    """A network's output, a tensor or a named tuple of them, in float32 or better."""
    if isinstance(output, Tensor):
        return output.to(torch.promote_types(output.dtype, torch.float32))
    return type(output)(*map(in_float32, output))
