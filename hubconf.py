"""Entry points of torch.hub: the self-similarity loss without the rest of this repository."""

import collections.abc
import functools
import importlib.util
import inspect
import pathlib
import sys
import types

import torch

# torch.hub has this folder on the path only while it loads. Imported now, the op's package is found when the first
# batch asks for it; nothing is built before. (Whatever is callable here is an entry point: import modules, not names.)
import similarity_cuda  # noqa: F401

dependencies = ["torch"]

_NAME = "self_similarity_loss_from_hub"


def _utils_ssl() -> types.ModuleType:
    """utils/utils_ssl.py under a name of its own: ``utils`` often is a package of the caller's."""
    if _NAME not in sys.modules:  # loaded once, so that all modules from here are of one class
        path = pathlib.Path(__file__).resolve().parent / "utils" / "utils_ssl.py"
        spec = importlib.util.spec_from_file_location(_NAME, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[_NAME] = module  # where pickle and torch.compile look for its classes
    return sys.modules[_NAME]


def self_similarity_loss(l1_weight: float, kl_weight: float, **settings: object) -> torch.nn.Module:
    """The self-similarity loss (Chen et al., ACM MM 2024, arXiv 2408.05713), a ``torch.nn.Module`` without parameters.

    Example:
        ssl = torch.hub.load("OWNER/REPO", "self_similarity_loss", l1_weight=1000, kl_weight=1000)
        loss = pixel_loss + ssl(sr, hr)

    ``ssl(sr, hr, mask=None)`` -> scalar; the gradient flows to ``sr`` only. ``ssl.parts(sr, hr, mask=None)`` -> the
    loss and, for logs, its weighted L1 and KL parts. sr, hr: (N, 3, H, W), RGB in [0, 1], sr not clamped, sides of at
    least 13 pixels; mask: (N, 1, H, W) of {0, 1}, the edges of hr when None.

    Args:
        l1_weight, kl_weight: weights of the two terms, published as 1000 and 1000 or 500 and 500. Choose them so
            that its gradient at sr is about as large as the largest other loss's.
        mask_stride: 3 computes one edge pixel in three (default 0: all).
        ssl_mode: "auto" (default), the fastest form that works here, or "pytorch", "boxsum", "cpp", "cuda". The
            compiled forms are built on the first call: ``ssl.prepare(device)`` does it before.
        kernel_size_search, kernel_size_window, sigma, generalization, threshold, search_border: 25, 9, 0.004, True,
            20.0 and "zero", as published.

    Raises:
        TypeError: a setting that is unknown.
        ValueError: a value of ``ssl_mode`` that is unknown or cannot be had here.
    """
    return _utils_ssl().SelfSimilarityLoss(l1_weight, kl_weight, **settings)


def self_similarity_graph(**settings: object) -> collections.abc.Callable[..., torch.Tensor]:
    """The function behind the loss: how each masked pixel resembles its surroundings; with ``settings`` bound, if any.

    Example:
        graph = torch.hub.load("OWNER/REPO", "self_similarity_graph", kernel_size_search=11, kernel_size_window=5)
        similarity = graph(img, mask)  # (M, 11 * 11), M = number of masked pixels

    img: (N, C, H, W) in [0, 1], differentiable; mask: (N, 1, H, W), entries equal to 1 are selected. Rows: the masked
    pixels of all images, batch order, then raster order; columns: the offsets of the search area in raster order.

    Args:
        kernel_size_search, kernel_size_window, sigma, generalization, ssl_mode, search_border: as of
            "self_similarity_loss"; what is not bound here can still be given in a call.

    Raises:
        TypeError: a setting that is unknown.
    """
    function = _utils_ssl().self_similarity_graph
    inspect.signature(function).bind_partial(**settings)  # a misspelt setting fails here, not in the first call
    return functools.partial(function, **settings)
