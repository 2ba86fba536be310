"""A trained generator, ready to restore: found in a run's folder or a file, built from its options or its weights."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from models.card import card_of, network_of
from models.network_infer import infer_netG
from models.network_spandrel import load_spandrel
from models.sampler import DiffusionSampler, define_sampler
from models.select_network import define_G
from utils.utils_checkpoint import load_network, load_state_dict
from utils.utils_error import UserError
from utils.utils_name import safe_name
from utils.utils_option import Options, network_options, strip_comments
from utils.utils_resume import newest_generator, saved_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restorer:
    """A generator in ``eval`` mode with what it takes to use it; ``label`` names it in tables and folders.

    Of a diffusion model ``netG`` is the sampler. ``options`` are those that ``netG`` was built by.
    """

    label: str
    checkpoint: Path
    netG: nn.Module
    scale: int
    n_channels: int
    options: Mapping[str, Any]


def find_checkpoint(path: Path) -> Path:
    """The file itself, or of a run's folder (``root/task`` or its ``models``) the newest ``{iter}_E.pth`` or ``_G``.

    Raises:
        UserError: there is no such file or folder, or the folder holds no generator.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: there is no such checkpoint or run's folder; put one there or name another")
        return path
    models = path / "models" if (path / "models").is_dir() else path
    checkpoint = newest_generator(path)
    if checkpoint is None:
        raise UserError(
            f"{path}: holds no generator {{iter}}_E.pth or {{iter}}_G.pth; name a run's folder or a checkpoint"
        )
    averages = saved_steps(models, "E")
    count = len({*averages, *saved_steps(models, "G")})
    if checkpoint.stem.endswith("_E"):
        averaged = "the average E"
    elif averages:
        behind = int(checkpoint.stem.removesuffix("_G")) - averages[0]
        averaged = f"the newest average {averages[0]}_E.pth is {behind} steps older than G"
    else:
        averaged = "no average E is there"
    logger.info("%s: the newest of %d is %s (%s)", path, count, checkpoint.name, averaged)
    return checkpoint


def run_folder(checkpoint: Path) -> Path | None:
    """The run ``root/task`` whose ``models`` a checkpoint lies in, beside ``options``; None for a file elsewhere."""
    models = checkpoint.resolve().parent
    return models.parent if models.name == "models" and (models.parent / "options").is_dir() else None


def _saved_options(checkpoint: Path) -> dict[str, Any] | None:
    """What building the generator needs, by the file itself or the newest options of its run; None without either."""
    if card := card_of(checkpoint):
        return card
    found = run_options(checkpoint)
    if found is None:
        return None
    file, saved = found
    try:
        return {**network_of(saved), "is_train": False}
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_options(file, error) from error


def run_options(checkpoint: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest option file of the run that a checkpoint lies in, and what it holds; None without one.

    Raises:
        UserError: it cannot be read.
    """
    run = run_folder(checkpoint)
    files = sorted((run / "options").glob("*.json")) if run else []
    if not files:
        return None
    try:
        return files[-1], json.loads(strip_comments(files[-1].read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_options(files[-1], error) from error


def _no_options(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: these are not a run's options ({error!r}); give the network with --opt")


# ResShift's published models: the steps they were trained with -> min_noise_level. Their weights say neither.
_RESSHIFT = {15: 0.04, 4: 0.2}


def _published_resshift(checkpoint: Path, steps: int | None) -> dict[str, Any]:
    """What the weights of ResShift do not say: the process, and the autoencoder, which lies beside them."""
    if steps not in _RESSHIFT:
        raise UserError(
            "ResShift's weights do not say with how many steps they were trained: give --steps 15 (v1, v2) or "
            "--steps 4 (v3), or anything else with --opt options/test_resshift.json"
        )
    autoencoder = checkpoint.parent / "autoencoder_vq_f4.pth"
    if not autoencoder.is_file():
        raise UserError(
            f"{autoencoder.name} must lie beside it, ResShift's autoencoder, or be named by autoencoder.path with "
            "--opt options/test_resshift.json"
        )
    return {
        "diffusion": {"type": "resshift", "steps": steps, "min_noise_level": _RESSHIFT[steps]},
        "autoencoder": {"type": "vq", "path": str(autoencoder)},
    }


def labelled(spec: str) -> tuple[str, Path]:
    """``label=PATH`` or ``PATH`` -> the label, "" where there is none, and the path."""
    label, equals, path = spec.partition("=")
    return (label, Path(path)) if equals and not Path(spec).exists() else ("", Path(spec))


def run_name(folder: Path) -> str:
    """What a run's folder, or its ``models``, is called in tables."""
    folder = folder.resolve()
    return safe_name((folder.parent if folder.name == "models" else folder).name)


class Step(NamedTuple):
    """A checkpoint among those of its run."""

    run: str  # the name of the run in tables
    step: int
    path: Path

    @property
    def label(self) -> str:
        """Its own name in tables."""
        return f"{self.run}_{self.step}"

    @property
    def spec(self) -> str:
        """What :func:`load_restorer` takes."""
        return f"{self.label}={self.path}"


def steps_of(spec: str) -> list[Step]:
    """Every checkpoint of a run that ``spec`` names: the average E of each step that has one, else G.

    Raises:
        UserError: it is no folder of a run, or has no checkpoints.
    """
    label, path = labelled(spec)
    models = path / "models" if (path / "models").is_dir() else path
    averages = saved_steps(models, "E")
    steps = sorted({*averages, *saved_steps(models, "G")})
    if not steps:
        raise UserError(f"--all_steps: {path} is no run's folder with checkpoints, {{iter}}_E.pth or {{iter}}_G.pth")
    run = label or run_name(path)
    if averages and (without := [step for step in steps if step not in averages]):
        logger.info("--all_steps: of steps %s there is no average E, G is tested", ", ".join(map(str, without)))
    return [Step(run, step, models / f"{step}_{'E' if step in averages else 'G'}.pth") for step in steps]


# What decides over the result and is not told by the weights of a network.
_UNTOLD = {"elan": ("window_sizes", "img_range"), "swinir": ("img_range",)}


def _tell_assumed(checkpoint: Path, options: dict[str, Any]) -> None:
    netG = network_options(options).netG
    assert netG is not None
    if names := _UNTOLD.get(netG.net_type):
        values = ", ".join(f"netG.{name} {getattr(netG, name)}" for name in names)
        logger.info(
            "%s: its weights do not say all: %s as published; if that is wrong name the run, its .safetensors file, or "
            "options with --opt",
            *(checkpoint, values),
        )


def load_restorer(
    spec: str, scale: int | None, param_key: str | None, device: torch.device, steps: int | None = None
) -> Restorer:
    """Load what ``spec`` names: a checkpoint file or a run's folder, perhaps with a label in front, ``label=PATH``.

    The network comes from the options that the run saved, or else is told from the weights' names and shapes.

    Args:
        scale: must agree with the network, and decides where its weights leave the scale open.
        param_key: which weights of the file; see ``utils_checkpoint.load_state_dict``.
        steps: tells which of ResShift's published processes bare weights were trained for.

    Raises:
        UserError: the checkpoint is missing, unreadable, of an unknown network, or of another scale.
    """
    label, path = labelled(spec)
    checkpoint = find_checkpoint(path)
    options = _saved_options(checkpoint)
    if options is None:
        try:
            options = infer_netG(load_state_dict(checkpoint, param_key), scale)
            if options["netG"]["net_type"] == "resshift_unet_swin":
                options |= _published_resshift(checkpoint, steps)
            _tell_assumed(checkpoint, options)
        except UserError as error:
            prefix = "" if str(error).startswith(str(checkpoint)) else f"{checkpoint}: "
            raise UserError(f"{prefix}{error}") from error
    if scale not in (None, options["scale"]):
        raise UserError(f"{checkpoint}: is made for scale {options['scale']}, which --scale {scale} contradicts")
    if not label and path.is_dir():
        label = run_name(path)
    return _load(label or safe_name(checkpoint.stem), checkpoint, options, param_key, device)


def load_restorer_of(opt: Options, device: torch.device) -> Restorer:
    """The generator of resolved options: ``path.pretrained_netG``, a file or a run's folder; null = the run's own.

    Raises:
        UserError: the checkpoint is missing, unreadable or does not fit ``netG``.
    """
    checkpoint = find_checkpoint(Path(opt.path.pretrained_netG) if opt.path.pretrained_netG else opt.task_dir)
    return _load(safe_name(opt.task), checkpoint, opt, opt.test.param_key, device)


def _load(
    label: str, checkpoint: Path, options: Options | dict[str, Any], param_key: str | None, device: torch.device
) -> Restorer:
    netG: nn.Module
    if options["netG"]["net_type"] == "spandrel":  # whatever this checkpoint holds
        netG = load_spandrel(checkpoint, options["scale"], options["n_channels"], param_key)
    else:
        opt = network_options(options) if isinstance(options, dict) else options
        netG = define_G(opt)
        load_network(checkpoint, netG, param_key=param_key)
        if opt.diffusion is not None:
            netG = define_sampler(netG, opt)
    netG = netG.eval().requires_grad_(False).to(device)
    names = {"scale", "n_channels", "netG", "diffusion", "autoencoder"}
    built_by = options if isinstance(options, dict) else options.model_dump(include=names)
    return Restorer(label, checkpoint, netG, options["scale"], options["n_channels"], built_by)


def set_sampling(models: Iterable[Restorer], steps: int | None, seed: int | None) -> None:
    """Give those models that sample another number of steps or another seed; None = as it was.

    Raises:
        UserError: none of them samples, or one has fewer steps.
    """
    if steps is None and seed is None:
        return
    samplers = [model for model in models if isinstance(model.netG, DiffusionSampler)]
    if not samplers:
        raise UserError("--steps, --seed: are for diffusion models, and none is given")
    for model in samplers:
        assert isinstance(model.netG, DiffusionSampler)
        if steps is not None:
            model.netG.timesteps = model.netG.process.timesteps(steps)
        if seed is not None:
            model.netG.seed = seed
