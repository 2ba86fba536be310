"""Where diffusion happens: in pixels, or in the latent of a trained autoencoder, which stays as it is."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.hub import model_folder
from models.precision import PRECISION
from utils.utils_checkpoint import load_state_dict
from utils.utils_error import UserError

_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
_NEEDED = ("config.json", "diffusion_pytorch_model.safetensors")
_CODES_AT_ONCE = 4096


class PixelSpace(nn.Module):
    """No autoencoder: the latent is the image."""

    factor = 1

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """(N, C, H, W) in [-1, 1], as it is."""
        return image

    def decode(self, latent: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1], as it is."""
        return latent


class _Frozen(nn.Module):
    """An autoencoder of diffusers that is never trained, though gradients pass through ``decode``.

    Args:
        model: VQModel or AutoencoderKL.
        dtype: what its weights are kept in, and computed with outside autocast.
        use_checkpoint: recompute the decoder's blocks in the backward pass.
    """

    def __init__(self, model: Any, dtype: torch.dtype, use_checkpoint: bool) -> None:
        super().__init__()
        if use_checkpoint:
            model._supports_gradient_checkpointing = True  # its blocks do, though VQModel does not say so
            model.enable_gradient_checkpointing()
        self.model = model.requires_grad_(False).eval()
        for name, part in model.named_children():
            if name != "quantize":  # the nearest code is looked for in float32
                part.to(dtype)
        self.dtype = dtype
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)

    def train(self, mode: bool = True) -> "_Frozen":
        """Nothing: it stays in ``eval``."""
        return self

    def _as_own(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"the image is {height} x {width}: its sides must divide by {self.factor}")
        return image.to(self.dtype)


class VQAutoencoder(_Frozen):
    """VQ-f4 (latent diffusion, arXiv 2112.10752), frozen: the latent is what the encoder makes, before the codebook.

    Args:
        path: a checkpoint file under the names of its authors (taming, latent diffusion, ResShift) or of diffusers,
            or a folder or hub name in the layout of diffusers (VQModel).
        dtype, use_checkpoint: see :class:`_Frozen`.

    Raises:
        UserError: it cannot be had, or is of another kind.
    """

    def __init__(self, path: str, dtype: torch.dtype = torch.float32, use_checkpoint: bool = False) -> None:
        is_file = Path(path).is_file() or Path(path).suffix in _FILES
        model = _vq_of_file(path) if is_file else _of_folder(path, "VQModel")
        super().__init__(model, dtype, use_checkpoint)
        self.channels = model.config.vq_embed_dim or model.config.latent_channels

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, C, H / factor, W / factor), in the image's dtype; the noise is not looked at.

        Raises:
            ValueError: H or W does not divide by ``factor``.
        """
        return self.model.encode(self._as_own(image)).latents.to(image.dtype)

    def decode(self, latent: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, h * factor, w * factor), about [-1, 1], of the nearest code of each vector.

        The gradient passes by the codebook as if it were not there (straight through).
        """
        latent, dtype = latent.float(), latent.dtype
        codes = latent + (self._nearest(latent) - latent).detach()
        return self.model.decode(codes.to(self.dtype), force_not_quantize=True).sample.to(dtype)

    @torch.no_grad()
    def _nearest(self, latent: Tensor) -> Tensor:
        # Piece by piece: the distances of a 512 x 512 latent to 8192 codes are 8 GiB.
        codebook = self.model.quantize.embedding.weight
        vectors = latent.permute(0, 2, 3, 1).flatten(0, 2).split(_CODES_AT_ONCE)
        nearest = torch.cat([torch.cdist(some, codebook).argmin(1) for some in vectors])
        n, _, h, w = latent.shape
        return codebook[nearest].view(n, h, w, -1).permute(0, 3, 1, 2)


class KLAutoencoder(_Frozen):
    """Stable Diffusion's variational autoencoder, frozen.

    Args:
        path: a folder or hub name in the layout of diffusers: AutoencoderKL, or a pipeline that has one as ``vae``.
        dtype, use_checkpoint: see :class:`_Frozen`.

    Raises:
        UserError: it cannot be had, or is of another kind.
    """

    def __init__(self, path: str, dtype: torch.dtype = torch.float32, use_checkpoint: bool = False) -> None:
        model = _of_folder(path, "AutoencoderKL")
        super().__init__(model, dtype, use_checkpoint)
        self.channels = model.config.latent_channels
        self.scaling_factor = model.config.scaling_factor
        self.shift_factor = model.config.shift_factor or 0.0

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """(N, 3, H, W), clamped to [-1, 1] -> (N, C, H / factor, W / factor), scaled, in the image's dtype.

        Args:
            noise: normal, of the latent's shape: a sample of the posterior; None = its mean.

        Raises:
            ValueError: H or W does not divide by ``factor``.
        """
        posterior = self.model.encode(self._as_own(image.clamp(-1, 1))).latent_dist
        latent = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(self.dtype)
        return ((latent - self.shift_factor) * self.scaling_factor).to(image.dtype)

    def decode(self, latent: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, h * factor, w * factor), about [-1, 1]."""
        unscaled = latent / self.scaling_factor + self.shift_factor
        return self.model.decode(unscaled.to(self.dtype)).sample.to(latent.dtype)


# ---------------------------------------------------------------------------------------------------------- reading


def _class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "autoencoder.type: vq and kl need the package diffusers; python -m pip install -r requirements-extra.txt"
        ) from error
    return getattr(diffusers, name)


def _of_folder(path: str, kind: str) -> Any:
    """The autoencoder of class ``kind`` in a folder or a pipeline's folder, local or of the hub."""
    cls = _class(kind)
    places = ("", "vae/", "vqvae/")
    folder = model_folder(path, "autoencoder.path", [place + file for place in places for file in _NEEDED])
    part = next((folder / place for place in places if (folder / place / "config.json").is_file()), None)
    if part is None:
        raise UserError(f"autoencoder.path: {folder}: there is no config.json of an autoencoder in it, nor in its vae")
    try:
        found = json.loads((part / "config.json").read_text(encoding="utf-8")).get("_class_name")
        if found != kind:
            raise UserError(f"autoencoder.path: {part} holds a {found}, this autoencoder.type needs a {kind}")
        model, report = cls.from_pretrained(part, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # what the library raises for damaged files can be anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"autoencoder.path: {part} cannot be read ({reason})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"autoencoder.path: {part}: {len(missing)} tensors are missing ({missing[0]}, ...)")
    return model


def _vq_of_file(path: str) -> Any:
    cls = _class("VQModel")
    try:
        weights = load_state_dict(path)
    except UserError as error:
        raise UserError(f"autoencoder.path: {error}") from error
    weights = vq_in_diffusers_names(weights)
    try:
        model = cls(**_vq_settings(weights))
        model.load_state_dict(weights)
    except (KeyError, IndexError, RuntimeError) as error:
        # torch lists what does not fit line by line; the first of it tells.
        reason = re.sub(r"\s+", " ", str(error))[:160]
        raise UserError(f"autoencoder.path: {path} holds no VQ autoencoder like VQ-f4 ({reason})") from error
    return model


# Inside encoder and decoder, the published names and those of diffusers.
_RENAMINGS = (
    (r"\bnorm_out\.", "conv_norm_out."),
    (r"\bmid\.block_1\.", "mid_block.resnets.0."),
    (r"\bmid\.block_2\.", "mid_block.resnets.1."),
    (r"\bmid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"\bmid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"\bmid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
    (r"\b(down|up)\.(\d+)\.block\.(\d+)\.", r"\1_blocks.\2.resnets.\3."),
    (r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bup\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\bnin_shortcut\.", "conv_shortcut."),
)
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")


def vq_in_diffusers_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VQ autoencoder's weights under the names of diffusers, whether they have those or the published ones.

    The published decoder counts its levels from the finest, diffusers' from the coarsest; the attention's 1 x 1
    convolutions are linear layers there. Discriminator, perceptual network and average of a training file are left out.
    """
    weights = {name: value for name, value in weights.items() if name.startswith(_PARTS)}
    levels = {int(match[1]) for name in weights if (match := re.match(r"decoder\.up\.(\d+)\.", name))}
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in _RENAMINGS:
            name = re.sub(pattern, replacement, name)
        if levels:
            name = re.sub(r"\bup_blocks\.(\d+)", lambda match: f"up_blocks.{max(levels) - int(match[1])}", name)
        if ".to_" in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        renamed[name] = value
    return renamed


def _vq_settings(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """VQModel's arguments, from the names of diffusers and their shapes."""

    def count(pattern: str) -> int:
        return len({match[0] for name in weights if (match := re.match(pattern, name))})

    levels = range(count(r"encoder\.down_blocks\.\d+\."))
    widths = tuple(len(weights[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"]) for n in levels)
    codes, code_channels = weights["quantize.embedding.weight"].shape
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": len(weights["decoder.conv_out.weight"]),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": count(r"encoder\.down_blocks\.0\.resnets\.\d+\."),
        "latent_channels": len(weights["encoder.conv_out.weight"]),
        "num_vq_embeddings": codes,
        "vq_embed_dim": code_channels,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in weights,
    }


def define_autoencoder(opt: Any) -> nn.Module:
    """The autoencoder of ``opt.autoencoder``, resolved options, frozen.

    Raises:
        UserError: it cannot be had.
    """
    settings = opt.autoencoder
    match settings.type:
        case "pixel":
            return PixelSpace(opt.n_channels)
        case "vq":
            return VQAutoencoder(settings.path, PRECISION[settings.precision], settings.use_checkpoint)
        case "kl":
            return KLAutoencoder(settings.path, PRECISION[settings.precision], settings.use_checkpoint)
        case unknown:
            raise UserError(f"autoencoder.type: {unknown!r} is no autoencoder of this project")
