"""Networks as ONNX files, by PyTorch's exporter."""

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.utils_error import UserError

OPSET = 18  # the exporter's own; what is higher it converts to, and programs of before 2024 do not read
# Neither side divides by a window or a fold: so the network's filling up is part of the file, whatever the size.
TRACED = (67, 91)


def write_onnx(
    network: nn.Module, path: Path, n_channels: int, size: tuple[int, int] | None, header: Mapping[str, str]
) -> None:
    """Write a network, ``(N, C, h, w)`` -> ``(N, C, scale h, scale w)`` in float32, as one file, weights included.

    Args:
        size: height and width of the input; None = any.
        header: texts by name, which become the file's metadata.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        UserError: PyTorch cannot export the network so.
    """
    import onnx
    import onnxscript  # noqa: F401  what PyTorch's exporter is made with

    any_size = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    # Two images: one would be taken for what never changes.
    example = torch.rand(1, n_channels, *size) if size else torch.rand(2, n_channels, *TRACED)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.export.export(
                network.eval(), (example,), dynamic_shapes=None if size else (any_size,), strict=False
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                verbose=False,
            )
    except Exception as error:  # each of the libraries in it has its own
        found = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise UserError(f"PyTorch's exporter fails ({type(error).__name__}: {found[0].strip()[:200]})") from error
    assert program is not None
    model = program.model_proto
    _name_axes(model.graph)
    onnx.helper.set_model_props(model, dict(header))
    onnx.save(model, str(path))


def _name_axes(graph: Any) -> None:
    """N, H and W instead of the exporter's numbered names."""
    axes = [axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim]
    names = {axis: name for axis, name in zip(axes, "NCHW", strict=True) if axis}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), axis.dim_param)
