"""What a training step says that fails for want of something: memory, and which options ask for less; a compiler."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from models.model_base import ModelBase
from utils import utils_dist
from utils.utils_checkpoint import unwrap
from utils.utils_error import UserError, tells_of_memory
from utils.utils_option import Options, patch_size


@contextmanager
def told_in_one_line(model: ModelBase, step: int) -> Iterator[None]:
    """A step of training. What was saved before is not touched by its failure.

    Raises:
        UserError: memory ran out: what took it as far as that is known, and the options that ask for less, those first
            that leave the results as they are. Or ``train.compile`` finds no compiler, or the GPU's form of SSL has
            limits that this run does not keep.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if tells_of_memory(error):
            remedies = ", ".join(_remedies(model.opt))
            raise UserError(
                f"step {step}: out of memory in {_culprit(error)}{_asked_for(error)}; {_weights(model)}, the rest is "
                f"for {_pieces(model.opt)}; take {remedies}"
            ) from error
        if "for ssl_mode cuda" in str(error):
            raise UserError(f"step {step}: train.ssl_mode: {str(error).splitlines()[0]}") from error
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            reason = next(line for line in str(error).splitlines() if line.strip())
            raise UserError(
                f"train.compile: PyTorch cannot compile the networks here ({reason[:200]}); set it to false"
            ) from error
        raise


def _culprit(error: BaseException) -> str:
    """The outermost network or loss that was at work, or whose gradient was."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        at_work = frame.f_locals.get("self")
        if isinstance(at_work, ModelBase) and frame.f_code.co_name == "backward":
            return f"the gradient of net{frame.f_locals['name']}'s losses"
        if isinstance(at_work, ModelBase) and frame.f_code.co_name == "update":
            return "the optimizers' step"
        if isinstance(at_work, nn.Module):
            return type(unwrap(at_work)).__name__
    return "the step"


def _asked_for(error: BaseException) -> str:
    found = re.search(r"tried to allocate ([\d.]+ ?[A-Za-z]*)", str(error), re.IGNORECASE)
    return f" ({found[1]} more were asked for)" if found else ""


def _weights(model: ModelBase) -> str:
    # Of each trained weight: itself, its gradient and two moments.
    counted = {
        name: sum(p.numel() * p.element_size() for p in net.parameters()) for name, net in model.networks.items()
    }
    held = sum(size * (4 if name in model.optimizers else 1) for name, size in counted.items())
    return f"weights, gradients and moments take {held / 2**30:.2g} GiB"


def _at_once(opt: Options) -> int:
    """Images that go through the networks of one process together."""
    data = opt.train_set
    assert data is not None
    batch = data.dataloader_batch_size // utils_dist.world_size()
    return min(opt.train.micro_batch or batch, batch)


def _pieces(opt: Options) -> str:
    data, at_once = opt.train_set, _at_once(opt)
    assert data is not None
    return f"{at_once} {'patches' if at_once > 1 else 'patch'} of {patch_size(data)} px at once"


def _remedies(opt: Options) -> Iterator[str]:
    """Settings that lower the memory: first those that leave the result as it is."""
    train, data, at_once = opt.train, opt.train_set, _at_once(opt)
    assert data is not None
    if train.ssl_mode == "pytorch" and train.ssl_l1_weight + train.ssl_kl_weight > 0:
        yield "train.ssl_mode=auto"
    if at_once > 1:
        yield f"train.micro_batch={at_once // 2}"
    for name in ("netG", "autoencoder"):
        if getattr(getattr(opt, name), "use_checkpoint", None) is False and (name == "netG" or opt.model == "dm"):
            yield f"{name}.use_checkpoint=true"
    if train.precision == "fp32":
        yield "train.precision=bf16"
    if at_once > 1:
        yield f"datasets.train.dataloader_batch_size={max(1, data.dataloader_batch_size // 2)}"
    else:
        yield "a smaller datasets.train.H_size"
