"""The self-similarity op: kernels that are built on first use, never on import.

``load("cpp")`` builds (once for each machine, PyTorch and source), proves and loads the C++ kernels; then the operators
``torch.ops.similarity.distances`` and ``torch.ops.similarity.loss`` work on CPU tensors, under autograd and
``torch.compile``; ``load("cuda")`` makes them work on CUDA tensors. ``utils/utils_ssl.py`` calls them; both can be
copied into another trainer together. ``python -m similarity_cuda`` checks and times what this machine can have.

    distances(img, image, row, column, search, window, zero_border)
        img: (N, C, H, W) float32 or float64. image, row, column: (M,) int64, the masked pixels, each at most once.
        -> (M, search, search): the distances of the specification (utils/utils_ssl.py), differentiable in img.
    loss(sr, hr, mask, search, window, zero_border, sigma, generalization, l1_weight, kl_weight, with_gradient)
        sr, hr: as img. mask: (N, 1, H, W), of any type; entries equal to 1 are selected.
        -> the loss, its L1 and KL terms without their weights, and the gradient of the loss with respect to sr (empty
        unless asked for). The loss is differentiable in sr.

Both are deterministic, run to run and for any number of threads. On a GPU the host waits for it once in a call, to
learn how many pixels each image has: that is the size of what follows; there the masked pixels of ``distances`` must be
in the order of their images. Arguments may have any layout in memory, results are contiguous. They raise RuntimeError
(ValueError for a mask that is not of {0, 1}, a sigma that is not positive, negative weights) with the offending value.
"""

import torch
from torch import Tensor

from similarity_cuda.loader import UnavailableError, WrongError, failed_proof, load

__all__ = ["UnavailableError", "WrongError", "failed_proof", "load"]

_library = torch.library.Library("similarity", "DEF")
# The host waits for the number of masked pixels, which a CUDA graph cannot hold.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
_PIXELS = "Tensor image, Tensor row, Tensor column, int search, int window, bool zero_border"
_library.define(f"distances(Tensor img, {_PIXELS}) -> Tensor", tags=_TAGS)
_library.define(f"distances_backward(Tensor grad, Tensor img, {_PIXELS}) -> Tensor", tags=_TAGS)
_library.define(
    "loss(Tensor sr, Tensor hr, Tensor mask, int search, int window, bool zero_border, float sigma, "
    "bool generalization, float l1_weight, float kl_weight, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.register_fake("similarity::distances")
def _(img: Tensor, image: Tensor, row: Tensor, column: Tensor, search: int, window: int, zero_border: bool) -> Tensor:
    return img.new_empty(image.shape[0], search, search)


@torch.library.register_fake("similarity::distances_backward")
def _(grad: Tensor, img: Tensor, *_: object) -> Tensor:
    return img.new_empty(img.shape)


@torch.library.register_fake("similarity::loss")
def _(sr: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = sr.new_empty(sr.shape if arguments[-1] else (0,))
    return sr.new_empty(()), sr.new_empty(()), sr.new_empty(()), gradient


def _no_second_derivative(*_: object, **__: object) -> None:
    raise RuntimeError("second derivatives of the self-similarity op are not provided (create_graph=True was asked)")


def _distances_context(ctx, inputs, output) -> None:
    img, image, row, column, *ctx.settings = inputs
    ctx.save_for_backward(img, image, row, column)


def _distances_gradient(ctx, grad):
    gradient = torch.ops.similarity.distances_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (gradient, *[None] * 6)


def _loss_context(ctx, inputs, output) -> None:
    if not inputs[-1]:
        raise ValueError("similarity::loss was called without with_gradient, but sr requires a gradient")
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])


def _loss_gradient(ctx, grad, *_):
    if ctx.needs_input_grad[1]:
        raise RuntimeError("similarity::loss has no gradient with respect to hr: detach it")
    if torch.is_grad_enabled():
        _no_second_derivative()
    return (grad * ctx.saved_tensors[0], *[None] * 10)


torch.library.register_autograd(
    "similarity::distances_backward", lambda ctx, grad: None, setup_context=_no_second_derivative
)
torch.library.register_autograd("similarity::distances", _distances_gradient, setup_context=_distances_context)
torch.library.register_autograd("similarity::loss", _loss_gradient, setup_context=_loss_context)
