"""What goes with an exported generator: a card for its reader, and an entry for the database of upscaling models."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from utils.utils_option_networks import ImageNetworkOptions


class Facts(NamedTuple):
    """What is known of a model."""

    name: str
    architecture: str  # net_type, or spandrel's name
    scale: int
    n_channels: int
    parameters: int
    options: Mapping[str, Any]  # of netG
    training: Mapping[str, str]  # as a .safetensors file's header says: task, step, license, validation, ...
    run: Mapping[str, Any]  # a run's options; {} without


class Made(NamedTuple):
    """The files of one format."""

    format: str
    precision: str
    files: list[tuple[str, int, str]]  # name, bytes, SHA-256
    said: str  # how they were checked

    @property
    def name(self) -> str:
        """The file that is named to a program."""
        return self.files[-1][0]

    @classmethod
    def of(cls, format: str, precision: str, paths: Sequence[Path], said: str) -> "Made":
        contents = [(path.name, path.read_bytes()) for path in paths]
        return cls(format, precision, [(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in contents], said)


_USE = {
    "safetensors": "chaiNNer (Load Model), ComfyUI (models/upscale_models, Load Upscale Model), spandrel; "
    "`python main_test.py --model_path {name} --input FOLDER`",
    "pth": "as .safetensors, where only .pth is taken",
    "onnx": "onnxruntime and chaiNNer (ONNX): input `input` and output `output`, float32, N x C x H x W, in [0, 1]",
    "torchscript": 'PyTorch, also in C++: `torch.jit.load("{name}")` of L, float32, N x C x H x W, in [0, 1]',
    "ncnn": "Real-ESRGAN's ncnn programs, Upscayl, chaiNNer (NCNN): `realesrgan-ncnn-vulkan -m FOLDER -n {stem} "
    "-s {scale} -i IN -o OUT`; blobs `data` and `output`, RGB in [0, 1]",
}


def model_card(facts: Facts, made: Sequence[Made]) -> str:
    """A card in Markdown."""
    colours = "RGB" if facts.n_channels == 3 else "gray"
    options = ", ".join(f"{name} {json.dumps(value)}" for name, value in _architecture_options(facts.options).items())
    lines = [
        f"# {facts.name}",
        "",
        f"A network for super-resolution: {colours} images, enlarged {facts.scale} times.",
        "",
        f"- Architecture: {facts.architecture} ({options}), {facts.parameters:,} parameters",
        f"- Scale: {facts.scale}",
        f"- Licence of the weights: {_license(facts) or 'unknown'}",
        "",
        "## Training",
        "",
        *(_training(facts) or ["Not known here: the checkpoint lies in no run's folder and its header says nothing."]),
    ]
    if validation := json.loads(facts.training.get("validation", "{}")):
        metrics = list(dict.fromkeys(metric for values in validation.values() for metric in values))
        lines += ["", "Validation while training:", "", f"| set | {' | '.join(metrics)} |"]
        lines.append("|---" * (1 + len(metrics)) + "|")
        for name, values in validation.items():
            cells = (f"{values[metric]:.4g}" if values.get(metric) is not None else "-" for metric in metrics)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Files", "", "| file | weights | bytes | SHA-256 |", "|---|---|---|---|"]
    lines += [f"| {n} | {one.precision} | {size:,} | {sha256} |" for one in made for n, size, sha256 in one.files]
    lines += ["", "## Use", ""]
    for one in made:
        use = _USE[one.format].format(name=one.name, stem=Path(one.name).stem, scale=facts.scale)
        lines.append(f"- {one.name}: {use}. {one.said[:1].upper()}{one.said[1:]}.")
    return "\n".join(lines) + "\n"


def _architecture_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of netG's options those that shape the network: not how it is initialised or computed."""
    others = {"net_type", "use_checkpoint", "in_nc", "out_nc", "path", *ImageNetworkOptions.model_fields}
    return {name: value for name, value in options.items() if name not in others}


def _license(facts: Facts) -> str | None:
    license = facts.training.get("license")
    return None if license in (None, "unknown") else license


# Weights of losses that options hold for every kind of model, and those that have the loss.
_OF_SOME = {"dm_weight": ("dm",), "D_lossfn_weight": ("gan", "spsr"), "gradient_D_lossfn_weight": ("spsr",)}


def _training(facts: Facts) -> list[str]:
    training, run = facts.training, facts.run
    lines = []
    if "task" in training:
        lines.append(f"- Task {training['task']}, step {training.get('step', '?')}")
    if run:
        train = run.get("train", {})
        weights = {name: value for name, value in train.items() if name.endswith("_weight") and value}
        for name, models in _OF_SOME.items():
            if run.get("model") not in models:
                weights.pop(name, None)
        weights |= {name: value for name, value in (train.get("iqa_weights") or {}).items() if value}
        lines.append(f"- Model {run.get('model')}; weights of losses: {_listed(weights)}")
        lines.append(f"- Data: {_listed(_data(run))}")
    for name, words in (("options_sha256", "SHA-256 of the options"), ("git_commit", "Commit of the program")):
        if name in training:
            lines.append(f"- {words}: {training[name]}")
    return lines


def _data(run: Mapping[str, Any]) -> dict[str, Any]:
    """Of the training set what others may know: no paths, but the folders' names."""
    train = run.get("datasets", {}).get("train") or {}
    names = ("dataset_type", "degradation_type", "H_size", "dataloader_batch_size")
    roots = train.get("dataroot_H") or []
    folders = [Path(root).name for root in ([roots] if isinstance(roots, str) else roots)]
    return {name: train[name] for name in names if train.get(name) is not None} | {"images": "+".join(folders)}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


# net_type or spandrel's name -> OpenModelDB's id, where it has one
_ARCHITECTURES = {
    "rrdbnet": "esrgan",
    "rrdbnet_basicsr": "esrgan",
    "rrdb": "esrgan",
    "srvgg_compact": "compact",
    "swinir": "swinir",
    "spsr": "spsr",
}
_PLATFORMS = {"safetensors": "pytorch", "pth": "pytorch", "onnx": "onnx"}  # it lists no others


def open_model_db(facts: Facts, made: Sequence[Made]) -> dict[str, Any]:
    """An entry as OpenModelDB's ``data/models/{scale}x-ID.json`` has them, as far as it is known.

    What only its author can say is empty: author, tags, images, the addresses of the files.
    """
    train = (facts.run.get("datasets") or {}).get("train") or {}
    known = {
        "trainingIterations": int(facts.training["step"]) if "step" in facts.training else None,
        "trainingBatchSize": train.get("dataloader_batch_size"),
        "trainingHRSize": train.get("H_size"),
        "trainingOTF": str(train.get("dataset_type")).startswith("blindsr") if train else None,
        "dataset": _data(facts.run).get("images") or None,
    }
    return {
        "name": facts.name,
        "author": [],
        "license": _license(facts),
        "tags": [],
        "description": "\n".join(_training(facts)),
        "date": date.today().isoformat(),
        "architecture": _ARCHITECTURES.get(facts.architecture, facts.architecture.lower()),
        "size": None,
        "scale": facts.scale,
        "inputChannels": facts.n_channels,
        "outputChannels": facts.n_channels,
        "resources": [
            {
                "platform": _PLATFORMS[one.format],
                "type": one.format,
                "size": one.files[-1][1],
                "sha256": one.files[-1][2],
                "urls": [],
            }
            for one in made
            if one.format in _PLATFORMS
        ],
        **{name: value for name, value in known.items() if value is not None},
        "images": [],
    }
