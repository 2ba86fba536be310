"""StableSR: a frozen Stable Diffusion whose residual blocks are modulated by features of the low-quality latent.

Wang et al., "Exploiting Diffusion Prior for Real-World Image Super-Resolution", https://arxiv.org/abs/2305.07015.
Names and shapes of what is trained are those of the published code: its checkpoints load, and it loads ours.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.block_diffusion import Block, Downsample, ResBlock, time_embedding, zeroed
from models.stable_diffusion import AroundStableDiffusion, StableDiffusion, tree

# --------------------------------------------------------------------------------------------------- structural encoder


class AttentionBlock(nn.Module):
    """Self-attention over all positions; queries, keys and values lie together head by head, as first published."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(N, C, h, w) -> the same; the embedding is not looked at."""
        n, c, *size = h.shape
        qkv = self.qkv(self.norm(h).flatten(2)).reshape(n, self.heads, 3, c // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(2)  # each (N, heads, positions, C / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, c, -1)
        return h + self.proj_out(attended).reshape(n, c, *size)


class StructuralEncoder(nn.Module):
    """The time-aware encoder: features of a low-quality latent, one map for each level of the U-Net.

    Args:
        in_channels: of the latent.
        model_channels: C, features of the first level and of every map that comes out.
        channel_mult: features of each level, in units of C; all but the last halve the maps and attend.
        num_heads: of each attention.
        groups: of the group norms.
        use_checkpoint: recompute blocks in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_heads: int,
        groups: int,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        embedding = 4 * model_channels
        self.model_channels = model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, model_channels, 3, padding=1)])])
        self.fea_tran = nn.ModuleList()
        channels = model_channels
        for level, mult in enumerate(channel_mult):
            last = level == len(channel_mult) - 1
            for _ in range(2):
                layers: list[nn.Module] = [ResBlock(channels, mult * model_channels, embedding, groups)]
                channels = mult * model_channels
                if not last:
                    layers.append(AttentionBlock(channels, num_heads, groups))
                self.input_blocks.append(Block(layers))
            if not last:
                self.input_blocks.append(Block([Downsample(channels)]))
            self.fea_tran.append(ResBlock(channels, model_channels, embedding, groups))
        self.middle_block = Block(
            [
                ResBlock(channels, channels, embedding, groups),
                AttentionBlock(channels, num_heads, groups),
                ResBlock(channels, channels, embedding, groups),
            ]
        )

    def forward(self, y: Tensor, t: Tensor) -> list[Tensor]:
        """The maps of the latent y, (N, C_in, h, w), at the times t, (N,): level by level, (N, C, h / 2^i, w / 2^i).

        Sides are halved upwards, as in the U-Net: any size will do.
        """
        embedding = self.time_embed(time_embedding(t, self.model_channels))
        first, *blocks = self.input_blocks
        assert isinstance(first, nn.ModuleList)
        h = first[0](y)
        taps = []
        for block in blocks:
            assert isinstance(block, Block)
            if isinstance(block[0], Downsample):
                taps.append(h)
            h = self._run(block, h, embedding)
        taps.append(self._run(self.middle_block, h, embedding))
        return [self._run(block, tap, embedding) for block, tap in zip(self.fea_tran, taps, strict=True)]

    def _run(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, h, embedding, use_reentrant=False)
        return block(h, embedding)


# ----------------------------------------------------------------------------------------------------------- modulation


class SFT(nn.Module):
    """Spatial feature transform, in the published code SPADE: normalise, then scale and shift at every position.

    Args:
        channels: C, of what is modulated.
        features: F, of the structural features.
        groups: of the group norm.
    """

    def __init__(self, channels: int, features: int, groups: int) -> None:
        super().__init__()
        self.param_free_norm = nn.GroupNorm(groups, channels)  # its name notwithstanding it has parameters
        self.mlp_shared = nn.Sequential(nn.Conv2d(features, 128, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(128, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(128, channels, 3, padding=1)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """(N, C, h, w), (N, F, h, w) -> norm(h) (1 + gamma) + beta, (N, C, h, w)."""
        shared = self.mlp_shared(features)
        return self.param_free_norm(h) * (1 + self.mlp_gamma(shared)) + self.mlp_beta(shared)


class _Shown:
    """The structural features, level by level, of the images that are in the U-Net."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []

    @contextmanager
    def while_showing(self, features: list[Tensor]) -> Iterator[None]:
        before, self.features = self.features, features
        try:
            yield
        finally:
            self.features = before


class _Modulated(nn.Module):
    """A residual block's second convolution with the modulation behind it: what is added to the skip."""

    def __init__(self, conv: nn.Module, sft: SFT, shown: _Shown, level: int) -> None:
        super().__init__()
        self.conv, self.sft, self.shown, self.level = conv, sft, shown, level

    def forward(self, h: Tensor) -> Tensor:
        return self.sft(self.conv(h), self.shown.features[self.level])


def residual_blocks(unet: Any) -> Iterator[tuple[str, int, Any]]:
    """The residual blocks of diffusers' U-Net in their order: the published name, the level, the block."""
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    bottom = len(down) - 1
    first = 1  # 0 is a convolution
    for level, block in enumerate(down):
        for j, resnet in enumerate(block.resnets):
            yield f"input_blocks.{first + j}.0", level, resnet
        first += len(block.resnets) + 1  # the downsampling has a number too
    for j, resnet in enumerate(unet.mid_block.resnets):
        yield f"middle_block.{2 * j}", bottom, resnet  # attention has the numbers between
    first = 0
    for i, block in enumerate(up):
        for j, resnet in enumerate(block.resnets):
            yield f"output_blocks.{first + j}.0", bottom - i, resnet
        first += len(block.resnets)


# ------------------------------------------------------------------------------------------------------------- StableSR


class StableSR(AroundStableDiffusion):
    """Stable Diffusion's frozen U-Net, guided by the low-quality latent; predicts the noise.

    In every residual block of the U-Net, behind the second convolution and before the skip, features of the structural
    encoder modulate what the block adds. Encoder and modulation are trained, 105.5 million parameters.

    Args:
        base: Stable Diffusion; its U-Net is modulated from here on.
        scale: of the super-resolution.
        model_channels, channel_mult, num_heads: of :class:`StructuralEncoder`, whose levels are the U-Net's.
        use_checkpoint: recompute blocks in the backward pass.

    Raises:
        ValueError: values that do not go with the base or with each other.
    """

    def __init__(
        self,
        base: StableDiffusion,
        scale: int = 4,
        model_channels: int = 256,
        channel_mult: Sequence[int] = (1, 1, 2, 2),
        num_heads: int = 4,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(base, scale)
        unet, groups = base.unet, base.unet.config.norm_num_groups
        if len(channel_mult) != len(unet.down_blocks):
            raise ValueError(f"channel_mult: {len(channel_mult)} levels, the U-Net of base has {len(unet.down_blocks)}")
        for name, divisor in (("norm_num_groups of base", groups), ("num_heads", num_heads)):
            if model_channels % divisor:
                raise ValueError(f"model_channels: {model_channels} does not divide by {name}, {divisor}")
        self.structcond_stage_model = StructuralEncoder(
            self.channels, model_channels, channel_mult, num_heads, groups, use_checkpoint
        )
        self._shown = _Shown()
        trained: dict[str, nn.Module] = {}
        for name, level, resnet in residual_blocks(unet):
            sft = SFT(resnet.out_channels, model_channels, groups)
            resnet.conv2 = _Modulated(resnet.conv2, sft, self._shown, level)
            trained[f"diffusion_model.{name}.spade"] = sft
        self.model = tree(trained)
        if use_checkpoint:
            unet.enable_gradient_checkpointing(self._checkpoint)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, L: Tensor | None = None) -> Tensor:
        """The noise in the state x at time t.

        Args:
            x: (N, C, h, w), any size.
            t: (N,) long.
            y: (N, C, h, w), the latent of the enlarged low-quality image.
            L: not looked at.

        Returns:
            (N, C, h, w), float32.
        """
        with self.own_precision(x.device):
            features = self.structcond_stage_model(y, t)
        with self._shown.while_showing(features):
            return self.predict_noise(x, t)

    def _checkpoint(self, function: Any, *args: Any) -> Any:
        """Run a block now and again in the backward pass, when other features may be shown, or none."""
        features = self._shown.features

        def run(*args: Any) -> Any:
            with self._shown.while_showing(features):
                return function(*args)

        return checkpoint(run, *args, use_reentrant=False)

    def in_own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained part of a published checkpoint, which may hold all of Stable Diffusion as well."""
        trained = {k: v for k, v in weights.items() if k.startswith("structcond_stage_model.") or ".spade." in k}
        return trained or dict(weights)
