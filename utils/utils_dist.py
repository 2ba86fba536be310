"""Several processes, one GPU (or CPU) each: ``torchrun --nproc_per_node=2 main_train_gan.py --opt ...``.

Without torchrun everything here is a no-op of a world of one, so that no caller has to ask.
"""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.utils_error import UserError


def init(gpu_ids: Sequence[int] | None = None) -> torch.device:
    """Join the other processes, if torchrun started this one, and choose this process's device.

    Args:
        gpu_ids: GPUs to use, the first for local rank 0 and so on; None = by local rank.

    Raises:
        UserError: there is no such GPU.
    """
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        # KAIR's files list four GPUs; on a machine with fewer the first that exist serve.
        ids = [i for i in gpu_ids if i < count] if gpu_ids else list(range(count))
        if len(ids) < local_world:
            raise UserError(f"gpu_ids: {local_world} processes want a GPU each, {len(ids)} of {count} may be used")
        device = torch.device("cuda", ids[local_rank])
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        # The first process looks at every training image while the others wait: longer than the default of minutes.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))
    return device


def close() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes files and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum each value over all processes; every process must pass the same names."""
    if world_size() == 1:
        return dict(values)
    tensor = torch.tensor(list(values.values()), dtype=torch.float64 if device.type == "cpu" else torch.float32)
    tensor = tensor.to(device)
    dist.all_reduce(tensor)
    return dict(zip(values, tensor.tolist(), strict=True))


def from_main(value: int, device: torch.device) -> int:
    """The main process's value, for all."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.broadcast(tensor, 0)
    return int(tensor.item())


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in at least one process."""
    return total({"flag": float(flag)}, device)["flag"] > 0
