"""A dry run: steps on real data that save nothing, and what they say about the losses' weights, memory and time."""

import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.model_base import ModelBase, ModelSR
from models.precision import in_float32
from training.progress import duration
from utils import utils_dist
from utils.utils_checkpoint import unwrap
from utils.utils_option import Options
from utils.utils_tile import image_of

logger = logging.getLogger(__name__)

STEPS = 20
WARM_UP = 5  # of them: the first ones start reading processes, choose algorithms, reserve memory


class Term(NamedTuple):
    """One of the generator's losses."""

    size: float  # weighted, as it is added up
    gradient: float  # the L2 norm of d term / d E; 0 where it does not depend on E


class Speed(NamedTuple):
    """What the steps took."""

    step: float  # seconds, the median
    data: float  # of these, waiting for data
    mean: float  # seconds, with what only some steps do


def rehearse(
    opt: Options,
    model: ModelBase,
    loaded: Iterator[dict[str, object]],
    step: int,
    reseed: Callable[[int], None],
    device: torch.device,
) -> None:
    """Train for ``STEPS`` steps, then measure the losses of as many batches, and log what was seen.

    Nothing is written. The steps are those behind ``train.D_init_iters``, in which every network trains.

    Args:
        opt, model, step: of the run; the step is the last one done.
        loaded: its batches.
        reseed: makes the draws those of a step.
    """
    first = max(step, opt.train.D_init_iters if opt.model in ("gan", "spsr") else 0)
    logger.info("dry run from step %d: %d steps, the losses of %d batches; nothing is saved", step, STEPS, STEPS)
    speed = _train(model, loaded, first, reseed, device)
    memory = _peak_memory(device)
    logger.info("")
    if isinstance(model, ModelSR):
        batches = []
        for number, batch in zip(range(STEPS), loaded, strict=False):
            reseed(first + STEPS + number + 1)
            model.feed_data(batch)
            batches.append(terms(model))
        measured = medians(batches)
        for line in _losses(opt, measured):
            logger.info("%s", line)
        if "D_loss" in measured and not step and opt.path.pretrained_netD is None:
            logger.info(
                "netD is new and has learned for %d steps: measure again when the run has a\n"
                "checkpoint, from which the same command starts.",
                STEPS,
            )
    else:
        logger.info("Model %s makes no image E: there are no gradients at E to compare.", opt.model)
    logger.info("")
    for line in _cost(opt, step, speed, memory, device):
        logger.info("%s", line)


# ------------------------------------------------------------------------------------------------------ time and memory


def _train(
    model: ModelBase,
    loaded: Iterator[dict[str, object]],
    first: int,
    reseed: Callable[[int], None],
    device: torch.device,
) -> Speed:
    steps, waits = [], []
    for step in range(first + 1, first + STEPS + 1):
        begin = time.perf_counter()
        reseed(step)
        batch = next(loaded)
        waits.append(time.perf_counter() - begin)
        model.update_learning_rate(step)
        model.feed_data(batch)
        model.optimize_parameters(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        steps.append(time.perf_counter() - begin)
    steps, waits = steps[WARM_UP:], waits[WARM_UP:]
    return Speed(median(steps), median(waits), mean(steps))


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU what tensors took, on the CPU what the process took; the most of all processes. 0 = unknown."""
    if device.type == "cuda":
        return utils_dist.highest(torch.cuda.max_memory_allocated(device), device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return utils_dist.highest(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, device)


def _cost(opt: Options, step: int, speed: Speed, memory: int, device: torch.device) -> Iterator[str]:
    what = "of the GPU, in tensors" if device.type == "cuda" else "of the process"
    if memory:
        yield f"{'peak memory':<20}{memory / 2**30:.2f} GiB {what}, validation not counted"
    count = STEPS - WARM_UP
    yield f"{'a step':<20}{speed.step:.3g} s, of these {speed.data:.2g} s waiting for data; medians of {count}"
    if opt.train.iterations is not None:
        left = max(0, opt.train.iterations - step)
        yield f"{'to train.iterations':<20}{duration(left * speed.mean)} for {left:,} steps, validation not counted"


# ---------------------------------------------------------------------------------------------------------------- terms


@contextmanager
def _outputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a generator returns: the very tensors, in float32, of which its losses are made."""
    found: list[Tensor] = []

    def keep(_network: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = in_float32(output)
        found.append(image_of(output))
        return output

    handle = unwrap(network).register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def terms(model: ModelSR) -> dict[str, Term]:
    """The generator's losses of the fed batch, over all pieces and processes, by name.

    The gradient is that of the batch's term with respect to E of the whole batch, in float32, RGB in [0, 1]; for a
    diffusion model with respect to what netG predicts, of which E is made. In fp16 it goes through the discriminator
    multiplied by the loss scaler's factor, as in training, and is divided by it.
    """
    factor = model.scalers["G"].get_scale()
    sums: dict[str, float] = defaultdict(float)
    for piece in model.pieces():
        with _outputs(model.netG) as found:
            losses = model.losses()
        (E,) = found
        for name, loss in losses.items():
            loss = piece.weight(name) * loss
            sums[f"{name} size"] += loss.item()
            sums[f"{name} square"] += _square(loss * factor, E) / factor**2
    # A term is the mean of the processes', each of which has a part of the batch.
    count = utils_dist.world_size()
    sums = utils_dist.total(sums, model.device)
    return {name: Term(sums[f"{name} size"] / count, math.sqrt(sums[f"{name} square"]) / count) for name in losses}


def _square(loss: Tensor, E: Tensor) -> float:
    """The squared norm of a loss's gradient, 0 where it does not depend on E."""
    if not loss.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(loss, E, retain_graph=True, allow_unused=True)
    return 0.0 if gradient is None else torch.linalg.vector_norm(gradient, dtype=torch.float64).item() ** 2


def medians(batches: Sequence[Mapping[str, Term]]) -> dict[str, Term]:
    """Each term's medians over batches."""
    return {
        name: Term(*(median(values) for values in zip(*(batch[name] for batch in batches), strict=True)))
        for name in batches[0]
    }


def balance(measured: Mapping[str, Term]) -> tuple[str, float] | None:
    """-> the term with the largest gradient besides SSL's, and the factor of SSL's weights that makes it as large.

    None where there are no two gradients to compare.
    """
    others = {name: term.gradient for name, term in measured.items() if name != "ssl"}
    largest = max(others, key=lambda name: others[name], default="")
    if "ssl" not in measured or not largest or not others[largest] or not measured["ssl"].gradient:
        return None
    return largest, others[largest] / measured["ssl"].gradient


def _losses(opt: Options, measured: Mapping[str, Term]) -> Iterator[str]:
    whole = sum(term.size for term in measured.values())
    point = "prediction" if opt.model == "dm" else "E"
    yield f"{'loss of netG':<20}{'weighted size':>15}{'share':>9}{f'gradient at {point}':>25}"
    for name, term in measured.items():
        share = f"{100 * term.size / whole:.0f} %" if whole else "-"
        yield f"{name:<20}{term.size:>15.4g}{share:>9}{f'{term.gradient:.4g}' if term.gradient else '-':>25}"
    yield f"\nGradient: L2 norm of d loss / d {point} over the batch, the loss weighted;"
    yield f"medians of {STEPS} batches. -: the loss does not depend on it."
    if opt.train.precision == "fp16":
        yield "It goes through netD multiplied by the loss scaler's factor, and is divided by it."
    yield ""
    yield from _advice(opt, measured)


def _advice(opt: Options, measured: Mapping[str, Term]) -> Iterator[str]:
    """The weights of SSL at which its gradient equals the largest other's."""
    train, found = opt.train, balance(measured)
    if "ssl" not in measured:
        yield "SSL is off. Give train.ssl_l1_weight and train.ssl_kl_weight any values, 100"
        yield "say, to be told those at which its gradient equals the largest other's."
    elif found is None:
        yield "SSL's gradient is 0, or no other loss has one: there is nothing to compare."
    else:
        name, factor = found
        yield f"SSL's gradient is {1 / factor:.3g} times {name}'s, the largest other; they are equal at"
        yield "  " + ", ".join(
            f'"{key}": {_rounded(factor * train[key])}' for key in ("ssl_l1_weight", "ssl_kl_weight")
        )


def _rounded(weight: float) -> str:
    """Three digits, as JSON has them."""
    return f"{float(f'{weight:.3g}'):.10g}"
