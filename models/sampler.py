"""From a diffusion network to a generator: sampling an image of any size, in overlapping tiles."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.autoencoder import define_autoencoder
from models.color_fix import adain_color_fix, wavelet_color_fix
from models.diffusion import DDPM, OneStep, Process, ResShift
from utils.utils_error import UserError
from utils.utils_tile import blend_tiles, check_tile, pad_to_multiple


def define_process(opt: Any) -> Process:
    """The process of ``opt.diffusion``, resolved options."""
    diffusion = opt.diffusion
    match diffusion.type:
        case "resshift":
            return ResShift(
                diffusion.steps, diffusion.min_noise_level, diffusion.kappa, diffusion.etas_end, diffusion.power
            )
        case "ddpm":
            return DDPM(diffusion.steps, diffusion.beta_start, diffusion.beta_end)
        case "onestep":
            return OneStep(diffusion.timestep)
        case unknown:
            raise UserError(f"diffusion.type: {unknown!r} is no process of this project")


def enlarge(L: Tensor, scale: int) -> Tensor:
    """(N, C, h, w) -> (N, C, h * scale, w * scale) by torch's bicubic, as ResShift and StableSR; not clamped."""
    return F.interpolate(L, scale_factor=scale, mode="bicubic") if scale > 1 else L


def check_fit(netG: Any, autoencoder: Any, scale: int) -> None:
    """Refuse a network and an autoencoder that are not made for each other.

    Raises:
        UserError: in one line, what each of them says.
    """
    name, channels, factor = type(autoencoder).__name__, autoencoder.channels, autoencoder.factor
    if netG.channels != channels:
        raise UserError(f"autoencoder: {name} has {channels} channels, netG takes {netG.channels}; change one of them")
    ratio = netG.L_ratio
    if ratio is not None and factor != ratio * scale:
        raise UserError(
            f"autoencoder: {name} makes maps {factor} times smaller than E, netG takes {ratio * scale:g} times smaller "
            f"ones at scale {scale}; change one of them"
        )
    # Of Stable Diffusion's parts alone.
    ours, theirs = (getattr(part, "scaling_factor", None) for part in (netG, autoencoder))
    if None not in (ours, theirs) and ours != theirs:
        raise UserError(
            f"autoencoder: {name} scales its latent by {theirs:g}, netG's base by {ours:g}; take the base's own"
        )


class DiffusionSampler(nn.Module):
    """A diffusion network as a generator: E of L, in [0, 1], of any size.

    Sampling starts from the enlarged L. All noise comes from a generator on the CPU that is seeded anew for each call,
    and the images of a batch share it: a result depends on the image and the seed, not on what was restored before.

    Args:
        netG: ``netG(x, t, y, L)`` -> output, as :class:`models.network_unet2d.UNet2D`, L being in [-1, 1]; with
            attributes ``channels`` (C of x and y), ``size_multiple`` (their sides divide by it) and ``L_ratio`` (the
            side of L that it needs, in sides of x; None = any).
        process: of :mod:`models.diffusion`.
        autoencoder: of :mod:`models.autoencoder`.
        scale: from L to E.
        steps: of sampling; None = all that the process has.
        seed: of the noise.
        color_fix: none, adain or wavelet.

    Raises:
        UserError: the network and the autoencoder do not fit, or there are more steps than the process has.
    """

    def __init__(
        self,
        netG: nn.Module,
        process: Process,
        autoencoder: nn.Module,
        scale: int,
        steps: int | None = None,
        seed: int = 0,
        color_fix: str = "none",
    ) -> None:
        super().__init__()
        check_fit(netG, autoencoder, scale)
        self.netG: Any = netG
        self.process = process
        self.autoencoder: Any = autoencoder
        self.scale = scale
        self.timesteps = process.timesteps(steps)
        self.seed = seed
        self.color_fix = {"none": None, "adain": adain_color_fix, "wavelet": wavelet_color_fix}[color_fix]

    def forward(self, L: Tensor) -> Tensor:
        """:meth:`restore`, in one piece."""
        return self.restore(L)

    @torch.no_grad()
    def restore(self, L: Tensor, tile: int = 0, tile_overlap: int = 32) -> Tensor:
        """The estimate E of a low-quality image.

        With tiles, network and autoencoder see no more than a tile at once. At each step the network's outputs are
        blended (:func:`utils.utils_tile.blend_tiles`), so that neighbouring tiles grow together.

        Args:
            L: (N, C, h, w) in [0, 1], of any size from 1 x 1.
            tile: side of a tile in pixels of L, rounded up to what the network takes; 0 = the whole image.
            tile_overlap: overlap of neighbouring tiles in pixels of L.

        Returns:
            (N, C, h * scale, w * scale), not clamped.

        Raises:
            UserError: ``tile`` is too small for ``tile_overlap``.
        """
        autoencoder, scale = self.autoencoder, self.scale
        h, w = L.shape[-2:]
        # In pixels of L: where a pixel of the latent begins, and what the network's sides divide by.
        unit = math.lcm(autoencoder.factor, scale) // scale
        multiple = math.lcm(autoencoder.factor * int(self.netG.size_multiple), scale) // scale
        tile = -(-tile // multiple) * multiple
        check_tile(tile, tile_overlap, unit)

        padded = pad_to_multiple(L, multiple)

        def in_tiles(function: Callable[..., Tensor], *images: Tensor) -> Tensor:
            return blend_tiles(lambda L, *pieces: function(*pieces), [padded, *images], tile, tile_overlap, unit)

        y = in_tiles(autoencoder.encode, 2 * enlarge(padded, scale) - 1)
        x = self._sample(y.float(), 2 * padded - 1, in_tiles)
        E = (in_tiles(autoencoder.decode, x).float() + 1) / 2
        E = E[..., : h * scale, : w * scale]
        with torch.autocast(L.device.type, enabled=False):  # no network
            return E if self.color_fix is None else self.color_fix(E, enlarge(L, scale))

    def _sample(self, y: Tensor, L: Tensor, in_tiles: Callable[..., Tensor]) -> Tensor:
        """-> a sample of x0 given the latent y."""
        generator = torch.Generator().manual_seed(self.seed)

        def noise() -> Tensor:
            return torch.randn(y.shape[1:], generator=generator).to(y).expand_as(y)

        x = self.process.start(y, noise())
        for t, previous in zip(self.timesteps, [*self.timesteps[1:], -1], strict=True):
            time = torch.full((len(y),), t, device=y.device)
            shown = self.process.scale_input(x, time)
            output = in_tiles(lambda x, y, L, time=time: self.netG(x, time, y, L), shown, y, L)
            x = self.process.step(self.process.x0_of(output.float(), x, time), x, t, previous, noise())
        return x


def define_sampler(netG: nn.Module, opt: Any, autoencoder: nn.Module | None = None) -> DiffusionSampler:
    """The sampler of ``opt``, resolved options with ``scale``, ``n_channels``, ``diffusion`` and ``autoencoder``.

    Args:
        autoencoder: one that is built already; None = that of the options.

    Raises:
        UserError: the autoencoder cannot be had or does not fit the network.
    """
    autoencoder = define_autoencoder(opt) if autoencoder is None else autoencoder
    diffusion = opt.diffusion
    settings = (opt.scale, diffusion.sample_steps, diffusion.seed, diffusion.color_fix)
    return DiffusionSampler(netG, define_process(opt), autoencoder, *settings)
