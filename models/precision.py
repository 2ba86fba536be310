"""What networks compute in: full precision, or half of it by autocast."""

from typing import Any

import torch
from torch import Tensor

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Within it, matrix products and convolutions compute in ``precision``; fp32 leaves all as it is."""
    return torch.autocast(device.type, PRECISION[precision], enabled=precision != "fp32")


def in_float32(output: Any) -> Any:
    """A network's output, a tensor or a named tuple of them, in float32 or better."""
    if isinstance(output, Tensor):
        return output.to(torch.promote_types(output.dtype, torch.float32))
    return type(output)(*map(in_float32, output))
