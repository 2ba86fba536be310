"""A frozen Stable Diffusion U-Net, and what every network that is built around one has in common."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.hub import model_folder
from models.precision import PRECISION
from utils.utils_error import UserError

# What a pipeline's folder must hold, and the classes that can be read; of the autoencoder only its settings are.
_PARTS = {
    "unet": ("config.json", "UNet2DConditionModel"),
    "vae": ("config.json", "AutoencoderKL"),
    "scheduler": ("scheduler_config.json", None),
    "text_encoder": ("config.json", None),
    "tokenizer": ("vocab.json", None),
}


@dataclass(frozen=True)
class StableDiffusion:
    """The parts of a pipeline that super-resolution needs."""

    unet: Any  # diffusers' UNet2DConditionModel
    prompt: Tensor  # (1, tokens, width), the embedding of the empty prompt
    abar: Tensor  # (T,), cumulative products of 1 - beta
    predicts_v: bool  # v of arXiv 2202.00512 instead of the noise
    factor: int  # from pixels to the latent of the U-Net
    scaling_factor: float  # of that latent


def load_stable_diffusion(name: str, precision: str = "fp32") -> StableDiffusion:
    """Read a pipeline of Stable Diffusion 1 or 2; its prompt encoder embeds "" and is let go.

    Args:
        name: a folder in the layout of diffusers, or a name of the hub.
        precision: what the weights of the U-Net are kept in: fp32, bf16 or fp16.

    Raises:
        UserError: a package is not installed, or the pipeline cannot be had, lacks a part or is of another kind.
    """
    try:
        import transformers
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise UserError(
            "netG.base: Stable Diffusion needs the packages diffusers and transformers; "
            "python -m pip install -r requirements-extra.txt"
        ) from error
    weights = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    folder = model_folder(name, "netG.base", ["*.json", "tokenizer/*", *weights])
    settings = _settings(folder)
    transformers.utils.logging.disable_progress_bar()

    with _reading(folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    with _reading(folder / "text_encoder"):
        # Stable Diffusion 2 conditions on OpenCLIP's penultimate layer: the encoder of its folder ends there.
        read: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
        encoder, found = read
    _require_all(folder / "text_encoder", found)
    with torch.no_grad(), _reading(folder / "tokenizer"):
        tokens = tokenizer("", padding="max_length", max_length=encoder.config.max_position_embeddings)
        prompt = encoder(torch.tensor([tokens.input_ids])).last_hidden_state.float()

    with _reading(folder / "unet"):
        unet, found = UNet2DConditionModel.from_pretrained(
            folder / "unet", torch_dtype=PRECISION[precision], output_loading_info=True
        )
    _require_all(folder / "unet", found)
    if unet.config.cross_attention_dim != prompt.shape[-1]:
        raise UserError(
            f"netG.base: {name}: its prompt encoder is {prompt.shape[-1]} wide, its U-Net reads "
            f"{unet.config.cross_attention_dim}: these are parts of different models"
        )
    with _reading(folder / "scheduler"):
        scheduler: Any = DDPMScheduler.from_pretrained(folder / "scheduler")
    vae = settings["vae"]
    return StableDiffusion(
        unet=unet,
        prompt=prompt,
        abar=scheduler.alphas_cumprod,
        predicts_v=scheduler.config.prediction_type == "v_prediction",
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        scaling_factor=vae.get("scaling_factor", 0.18215),
    )


def _settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of each part of a pipeline, which is then known to be of Stable Diffusion 1 or 2."""
    missing = [part for part, (file, _) in _PARTS.items() if not (folder / part / file).is_file()]
    if missing:
        what = "no folder of Stable Diffusion"
        if set(missing) <= {"text_encoder", "tokenizer"}:
            what = "its prompt encoder is absent"
        raise UserError(f"netG.base: {folder}: {what}, it lacks {', '.join(missing)}")
    settings = {}
    for part, (file, kind) in _PARTS.items():
        with _reading(folder / part):
            settings[part] = json.loads((folder / part / file).read_text(encoding="utf-8"))
        found = settings[part].get("_class_name")
        if kind and found != kind:
            raise UserError(f"netG.base: {folder / part} holds a {found}, Stable Diffusion 1 and 2 have a {kind} there")
    unet = settings["unet"]
    channels = (unet["in_channels"], unet["out_channels"], settings["vae"].get("latent_channels"))
    if len(set(channels)) > 1:
        raise UserError(
            f"netG.base: {folder}: its U-Net goes from {channels[0]} channels to {channels[1]}, its autoencoder makes "
            f"{channels[2]}; take a text-to-image model, not one for inpainting or depth"
        )
    if unet.get("addition_embed_type") or unet.get("class_embed_type") or unet.get("num_class_embeds"):
        raise UserError(f"netG.base: {folder}: its U-Net wants more than time and prompt; take Stable Diffusion 1 or 2")
    prediction = settings["scheduler"].get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"netG.base: {folder}: it predicts {prediction}, not noise or v")
    return settings


@contextmanager
def _reading(part: Path) -> Iterator[None]:
    """Turns whatever the libraries say about a broken part into one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"netG.base: {part} cannot be read ({reason})") from error


def _require_all(part: Path, found: Mapping[str, Any]) -> None:
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"netG.base: {part} is incomplete: {len(missing)} tensors are missing ({missing[0]}, ...)")


class AroundStableDiffusion(nn.Module):
    """A network around a frozen U-Net of Stable Diffusion: only what is added to it is trained.

    The frozen part is in neither ``parameters()`` nor the state dict, moves with ``to()`` and is shared by copies, so
    that a moving average takes no more than the trained part.

    Args:
        base: the U-Net is changed by the network that is built around it, and must not be used by another.
        scale: of the super-resolution.
    """

    prompt: Tensor
    abar: Tensor

    def __init__(self, base: StableDiffusion, scale: int) -> None:
        super().__init__()
        unet = base.unet.requires_grad_(False).eval()
        self._unet = [unet]  # in a list: what is trained of it is registered by the networks, the rest nowhere
        self.predicts_v = base.predicts_v
        self.channels = unet.config.in_channels
        self.size_multiple = 2 ** (len(unet.config.block_out_channels) - 1)
        self.L_ratio = base.factor / scale
        self.scaling_factor = base.scaling_factor
        self.register_buffer("prompt", base.prompt.to(unet.dtype), persistent=False)
        self.register_buffer("abar", base.abar, persistent=False)

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """The U-Net's estimate of the noise in the state x, (N, C, h, w) of any size, at the times t, (N,) long.

        Weights that are kept in half precision are computed with in half precision, others as the caller says.
        """
        unet = self._unet[0]
        with self.own_precision(x.device):
            output = unet(x, t, self.prompt.expand(len(x), -1, -1), return_dict=False)[0].float()
        if not self.predicts_v:
            return output
        signal, noise = self.of_signal_and_noise(t)
        return signal * output + noise * x  # v = sqrt(abar) noise - sqrt(1 - abar) x0

    def own_precision(self, device: torch.device) -> Any:
        """The context in which the U-Net's weights can be computed with."""
        kept = self.prompt.dtype
        return nullcontext() if kept == torch.float32 else torch.autocast(device.type, kept)

    def of_signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t), sqrt(1 - abar_t), each (N, 1, 1, 1)."""
        abar = self.abar[t].reshape(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._unet[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AroundStableDiffusion":
        unet, own = self._unet[0], {id(p) for p in self.parameters()}
        for tensor in (*unet.parameters(), *unet.buffers()):
            if id(tensor) not in own:
                memo[id(tensor)] = tensor
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        # Without what Module.compile() leaves, as torch's own copies: it would call the original.
        state = {name: value for name, value in self.__dict__.items() if name != "_compiled_call_impl"}
        result.__dict__.update(copy.deepcopy(state, memo))
        return result


def tree(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Nested modules under dotted names: {"a.b": m} is found as ["a"]["b"]."""
    root = nn.ModuleDict()
    for name, module in modules.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in place:
                place[part] = nn.ModuleDict()
            inner = place[part]
            assert isinstance(inner, nn.ModuleDict)
            place = inner
        place[last] = module
    return root
