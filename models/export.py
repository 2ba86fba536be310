"""A trained generator for other programs: files in their formats, each tried in one of them where it is installed.

What is written is what was tried: files lie in a folder of their own until each has restored two photographs as the
network here does, and only then take their names.
"""

import copy
import json
import logging
import math
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from models.card import header_of, network_of, training_of
from models.export_card import Facts, Made, model_card, open_model_db
from models.export_ncnn import ncnn_description, published_weights, write_ncnn
from models.export_onnx import TRACED, write_onnx
from models.network_spandrel import SpandrelNetwork
from models.network_srvgg import SRVGGNetCompact
from models.restorer import Restorer, load_restorer, run_folder, run_options
from models.sampler import DiffusionSampler
from utils.utils_checkpoint import save_atomically, save_safetensors
from utils.utils_error import UserError
from utils.utils_image import calculate_psnr, uint2tensor4
from utils.utils_name import output_path, safe_name
from utils.utils_run import save_json, write_atomically
from utils.utils_tile import image_of

logger = logging.getLogger(__name__)

# (1, C, h, w) in [0, 1] -> (1, C, scale h, scale w), clamped or not
Restore = Callable[[Tensor], Tensor]

# Of each format its files, in the order in which they take their names: what names another comes after it.
_SUFFIXES = {
    **{"safetensors": (".safetensors",), "pth": (".pth",), "onnx": (".onnx",), "ncnn": (".bin", ".param")},
    "torchscript": (".pt",),
}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SIZES = (40, 56), (33, 47)  # of the photographs on which files are tried: a multiple of windows, and none
_INSTALL = "pip install -r requirements-dev.txt"
_SAME = 0.1  # levels of 255: far above what sums in another order make of float32, far below what can be seen
_FAITHFUL = 40.0  # dB to float32, below which half precision costs more than a network gains over another


class ImageOnly(nn.Module):
    """A generator's estimate alone, ``(N, C, h, w)`` -> ``(N, C, scale h, scale w)``, float32 at both ends."""

    def __init__(self, netG: nn.Module) -> None:
        super().__init__()
        self.netG = netG

    def forward(self, L: Tensor) -> Tensor:
        return image_of(self.netG(L.to(next(self.netG.parameters()).dtype))).to(L.dtype)


@dataclass(frozen=True)
class _Job:
    """A file to make; ``netG`` computes in float32, with weights that are numbers of the file's ``precision``."""

    model: Restorer
    netG: nn.Module
    precision: str  # of _DTYPES
    size: tuple[int, int] | None  # of L, where the file is for one size

    @property
    def half(self) -> bool:
        """Whether it costs something."""
        return self.precision != "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.precision]

    @property
    def weights(self) -> dict[str, Tensor]:
        """By the names that other programs know, in the precision of the file."""
        weights = published_weights(self.netG) or self.netG.state_dict()
        return {
            name: value.detach().to(self.dtype if value.is_floating_point() else value.dtype)
            for name, value in weights.items()
        }

    @property
    def header(self) -> dict[str, str]:
        """What the file says of itself."""
        network = network_of(self.model.options)
        if isinstance(self.netG, SRVGGNetCompact):
            network["netG"] = {**network["netG"], "act_type": "prelu"}  # see published_weights
        precision = {"precision": str(self.dtype).removeprefix("torch.")}
        return header_of(network) | training_of(self.model.checkpoint) | precision

    @cached_property
    def pictures(self) -> list[Tensor]:
        """Pieces of a photograph, ``(1, C, h, w)`` in [0, 1]."""
        from skimage import data

        photograph = uint2tensor4(data.astronaut()[60:, 160:])
        if self.model.n_channels == 1:
            photograph = photograph.mean(dim=1, keepdim=True)
        sizes = [self.size] if self.size else _SIZES
        times = [max(-(-size[i] // photograph.shape[i - 2]) for size in sizes) for i in (0, 1)]
        photograph = photograph.repeat(1, 1, *times)
        return [photograph[..., :h, :w] for h, w in sizes]


def export(args: Namespace) -> list[Path]:
    """What the command line of main_export.py asks for; -> the files.

    Raises:
        UserError: the model cannot be had or exported so, a file is there already, or one restores otherwise than the
            network; then nothing has been written.
    """
    model = load_restorer(args.model_path, args.scale, args.param_key, torch.device("cpu"))
    if isinstance(model.netG, DiffusionSampler):
        raise UserError(
            f"{model.checkpoint}: is a diffusion model; its noise, sampling steps and autoencoder are this program's, "
            "and no format here holds them: restore with main_test.py"
        )
    folder = Path(args.output or (run_folder(model.checkpoint) or Path()) / "export")
    label = model.label if model.label.startswith(f"{model.scale}x") else f"{model.scale}x_{model.label}"
    jobs: dict[str, _Job] = {}
    files: dict[str, list[str]] = {}
    for format in args.format:
        usual = "fp16" if format == "ncnn" else "fp32"
        precision = args.precision or usual
        if precision == "bf16" and format in ("onnx", "ncnn"):
            raise UserError(f"--format {format}: no program runs such a file in bf16; give --precision fp16 or fp32")
        netG = _rounded(model.netG, _DTYPES[precision], kernels_alone=format == "ncnn")
        jobs[format] = _Job(model, netG, precision, tuple(args.size) if args.size else None)
        name = safe_name(label if precision == usual else f"{label}_{precision}")
        files[format] = [name + suffix for suffix in _SUFFIXES[format]]
    about = [f"{safe_name(label)}{suffix}" for suffix in (".md", ".json")]
    final = {name: output_path(folder, name) for name in (*chain(*files.values()), *about)}
    if (there := [str(path) for path in final.values() if path.exists()]) and not args.overwrite:
        raise UserError(f"{', '.join(there)}: is there already; give --overwrite or another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=folder) as part:
            made = [_make(format, jobs[format], [Path(part) / name for name in files[format]]) for format in jobs]
            facts = _facts(model, label)
            write_atomically(model_card(facts, made), Path(part) / about[0])
            save_json(open_model_db(facts, made), Path(part) / about[1])
            for name, path in final.items():
                (Path(part) / name).replace(path)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    for one in made:
        logger.info("%s: %s", final[one.name], one.said)
    logger.info("%s: a card; %s: for OpenModelDB, to complete", *(final[name] for name in about))
    return [*final.values()]


def _rounded(netG: nn.Module, dtype: torch.dtype, kernels_alone: bool) -> nn.Module:
    """A copy whose weights are numbers of ``dtype``; ncnn's are so in the kernels alone, not in biases and slopes."""
    if dtype == torch.float32:
        return netG
    netG = copy.deepcopy(netG)
    if not kernels_alone:
        return netG.to(dtype).float()
    for weight in netG.parameters():
        if weight.ndim == 4:
            weight.copy_(weight.to(dtype))
    return netG


def _make(format: str, job: _Job, files: list[Path]) -> Made:
    """Write the files of one format and try them."""
    write = {"safetensors": _safetensors, "pth": _pth, "onnx": _onnx, "ncnn": _ncnn, "torchscript": _torchscript}
    said = write[format](job, files[-1])
    return Made.of(format, job.precision, files, said)


# -------------------------------------------------------------------------------------------------------------- tried


def _levels(E: Tensor, other: Tensor) -> float:
    """How far two images are apart at most, in levels of 255 within what can be shown."""
    return float((E.clamp(0, 1) - other.clamp(0, 1)).abs().max()) * 255


def _tried(job: _Job, program: str, restore: Restore, allowed: float | None = _SAME, otherwise: str = "") -> str:
    """How another program restores by a file.

    Args:
        allowed: levels that it may differ by from the network here with the same weights; None = any.
        otherwise: what to say where it does not restore as the network here does.

    Raises:
        UserError: it differs by more, or makes no image of these sizes.
    """
    own = ImageOnly(job.netG)
    made: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for L in job.pictures:
            E = own(L)
            if not E.isfinite().all():
                remedy = "; give --precision fp32" if job.half else ""
                raise UserError(f"{job.model.checkpoint}: what the network makes of a photograph is not finite{remedy}")
            try:
                other = restore(L)
            except Exception as error:  # what they raise differs
                raise UserError(f"{program} cannot restore {_size(L)} by it ({_first_line(error)})") from error
            if other.shape != E.shape:
                raise UserError(f"{program} makes {_size(other)} of {_size(L)} by it, not {_size(E)}")
            made.append((E, other))
    levels = [_levels(*pair) for pair in made]
    if not max(levels) <= (255 if allowed is None else allowed):  # nor is it where one is NaN
        raise UserError(f"{program} restores otherwise by it: differs by up to {max(levels):.2g} levels of 255")
    sizes = " and ".join(map(_size, job.pictures))
    said = f"checked with {program} at {sizes}: differs by at most {max(levels):.2g} levels of 255"
    if max(levels) > _SAME and otherwise:
        each = ", ".join(f"{level:.3g} at {_size(L)}" for level, L in zip(levels, job.pictures, strict=True))
        said = f"checked with {program}: differs by up to so many levels of 255: {each}; {otherwise}"
    return f"{said}{_cost(job, made[0][1])}"


def _cost(job: _Job, E: Tensor | None = None) -> str:
    """What half precision costs, by what was restored with it, or by the network with rounded weights."""
    if not job.half:
        return ""
    L = job.pictures[0]
    with torch.no_grad():
        pair = ImageOnly(job.model.netG)(L), E if E is not None else ImageOnly(job.netG)(L)
    full, half = (x[0].permute(1, 2, 0).clamp(0, 1).mul(255).numpy() for x in pair)
    psnr = calculate_psnr(full, half)
    if not psnr >= _FAITHFUL:
        found = "its image is not finite" if math.isnan(psnr) else f"{psnr:.1f} dB to fp32"
        raise UserError(f"half precision is too coarse for this network: {found}; give --precision fp32")
    return f"; PSNR to fp32 {psnr:.1f} dB"


def _size(image: Tensor) -> str:
    return " x ".join(map(str, image.shape[-2:]))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


# ------------------------------------------------------------------------------------------------------------ formats


def _safetensors(job: _Job, path: Path) -> str:
    save_safetensors(job.weights, path, job.header)
    return _in_spandrel(job, path)


def _pth(job: _Job, path: Path) -> str:
    save_atomically({"params_ema": job.weights}, path)
    return _in_spandrel(job, path)


def _in_spandrel(job: _Job, path: Path) -> str:
    """How spandrel restores by a file, which this program reads in any case."""
    if find_spec("spandrel") is None:
        return f"not checked: spandrel is not installed ({_INSTALL}){_cost(job)}"
    import spandrel

    instead = "chaiNNer, ComfyUI and others that read by spandrel take --format onnx instead"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch about the code of the networks
            found = spandrel.ModelLoader("cpu").load_from_file(path)
    except Exception:  # an unknown network, or names that look right with shapes that are not
        return f"for this program; spandrel does not know this network: {instead}{_cost(job)}"
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.scale != job.model.scale:
        scale = getattr(found, "scale", "another purpose")
        return f"for this program; spandrel takes it for x{scale}: {instead}{_cost(job)}"
    found.float()
    otherwise = "it fills sizes that are no multiple of windows or folds in another way"
    return _tried(job, "spandrel", found, None, otherwise)


def _ncnn(job: _Job, path: Path) -> str:
    description = ncnn_description(job.netG, job.model.scale)
    if description is None:
        raise UserError(
            f"{job.model.checkpoint}: ncnn files are written of RRDBNet with nearest-neighbour upsampling (rrdbnet; "
            "rrdbnet_basicsr x3, x4, x8; rrdb with upconv) and of srvgg_compact; take --format onnx"
        )
    write_ncnn(path, description, [*(published_weights(job.netG) or {}).values()], job.half)
    if find_spec("ncnn") is None:
        return f"not checked: ncnn is not installed ({_INSTALL}){_cost(job)}"
    return _tried(job, "ncnn", _by_ncnn(path))


def _by_ncnn(path: Path) -> Restore:
    import ncnn

    net = ncnn.Net()
    # Weights are float16, sums float32, as the network here is compared in.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise UserError(f"ncnn does not read {path.name}")

    def restore(L: Tensor) -> Tensor:
        extractor = net.create_extractor()
        planes = L[0].contiguous().numpy()  # ncnn.Mat keeps no hold of it
        extractor.input("data", ncnn.Mat(planes).clone())
        _, E = extractor.extract("output")
        return torch.from_numpy(np.array(E))[None]

    return restore


def _onnx(job: _Job, path: Path) -> str:
    netG = copy.deepcopy(job.netG).to(job.dtype)
    try:
        write_onnx(ImageOnly(netG), path, job.model.n_channels, job.size, job.header)
    except ImportError as error:
        raise UserError(f"--format onnx needs the packages onnx and onnxscript; {_INSTALL}") from error
    except UserError as error:
        raise _not_for_any_size(job, "an ONNX", str(error)) from error
    if find_spec("onnxruntime") is None:
        return f"not checked: onnxruntime is not installed ({_INSTALL}){_cost(job)}"
    try:
        # What it computes in float16 differs; _cost says how much, on a CPU, which sums in float32.
        said = _tried(job, "onnxruntime", _by_onnxruntime(path), None if job.half else _SAME)
        return f"{said}{' on a CPU' if job.half else ''}"
    except UserError as error:
        raise _not_for_any_size(job, "an ONNX", str(error)) from error


def _not_for_any_size(job: _Job, kind: str, why: str) -> UserError:
    remedy = "" if job.size else "; --size H W makes a file for images of one size"
    return UserError(f"{job.model.checkpoint}: cannot be {kind} file: {why}{remedy}")


def _torchscript(job: _Job, path: Path) -> str:
    network: nn.Module = ImageOnly(copy.deepcopy(job.netG).to(job.dtype)).eval()
    example = torch.rand(1, job.model.n_channels, *(job.size or TRACED))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of what depends on the size; whether it matters is tried
            if job.size:  # leaves what windows compute from the size, which tracing stumbles over, as numbers
                network = torch.export.export(network, (example,), strict=False).module()
            traced = torch.jit.trace(network, (example,), check_trace=False)
            traced.save(str(path), _extra_files={"header.json": json.dumps(job.header)})
            read = torch.jit.load(str(path))
        return _tried(job, "TorchScript", read, None if job.half else _SAME)
    except UserError as error:
        raise _not_for_any_size(job, "a TorchScript", str(error)) from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise _not_for_any_size(job, "a TorchScript", f"it is not traced ({_first_line(error)})") from error


def _by_onnxruntime(path: Path) -> Restore:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda L: torch.from_numpy(session.run(None, {"input": L.contiguous().numpy()})[0])


# ------------------------------------------------------------------------------------------------------------- facts


def _facts(model: Restorer, label: str) -> Facts:
    """What is known of a model, by its run and its file's header."""
    found = run_options(model.checkpoint)
    netG = model.netG
    architecture = netG.architecture if isinstance(netG, SpandrelNetwork) else model.options["netG"]["net_type"]
    return Facts(
        name=label,
        architecture=architecture,
        scale=model.scale,
        n_channels=model.n_channels,
        parameters=sum(weight.numel() for weight in netG.parameters()),
        options={key: value for key, value in model.options["netG"].items() if value is not None},
        training=training_of(model.checkpoint),
        run=found[1] if found else {},
    )
