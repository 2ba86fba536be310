"""Stable Diffusion as a network that restores in one step, trained by low-rank adaptation (LoRA)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.stable_diffusion import AroundStableDiffusion, StableDiffusion, tree
from utils.utils_error import UserError


class _InFull(nn.Module):
    """A layer that computes in float32 whatever the layers before it do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.float()

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return self.layer(h.float())


class SDLoRA(AroundStableDiffusion):
    """The latent of the enlarged L goes in as if it were a noised state; x0 comes out (OSEDiff, arXiv 2406.08177).

    The noise e that the U-Net sees in x at time t is taken off at once: x0 = (x - sqrt(1 - abar_t) e) / sqrt(abar_t).

    Args:
        base: Stable Diffusion; its U-Net is adapted from here on.
        scale: of the super-resolution.
        rank: of the update of each adapted layer.
        alpha: the update is weighted by alpha / rank; None = rank.
        target_modules: the layers that are adapted, by the ends of their names.
        use_checkpoint: recompute blocks in the backward pass.

    Raises:
        UserError: peft is not installed.
        ValueError: no layer of the U-Net is called so.
    """

    def __init__(
        self,
        base: StableDiffusion,
        scale: int = 4,
        rank: int = 4,
        alpha: int | None = None,
        target_modules: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(base, scale)
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UserError(
                "netG: sd_lora needs the package peft; python -m pip install -r requirements-extra.txt"
            ) from error
        unet = base.unet
        unet.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank if alpha is None else alpha,
                init_lora_weights="gaussian",
                target_modules=list(target_modules),
            )
        )
        # peft keeps them in the precision of the layers that they adapt; what is trained is kept in full.
        self.unet = tree(
            {
                name.removesuffix(".default"): module.float()
                for name, module in unet.named_modules()
                if name.endswith((".lora_A.default", ".lora_B.default"))
            }
        )
        # At t = 999 an error of the noise is 15 times as large in x0: that of half precision would be seen.
        unet.conv_out = _InFull(unet.conv_out)
        if use_checkpoint:
            unet.enable_gradient_checkpointing()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, L: Tensor | None = None) -> Tensor:
        """The restored latent.

        Args:
            x: (N, C, h, w), the latent of the enlarged low-quality image, any size.
            t: (N,) long, the time that the U-Net is shown.
            y: the same as x, not looked at.
            L: not looked at.

        Returns:
            (N, C, h, w), float32.
        """
        of_x0, of_noise = self.of_signal_and_noise(t)
        return (x - of_noise * self.predict_noise(x, t)) / of_x0
