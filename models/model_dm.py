"""Diffusion training, with the self-similarity loss where it is asked for."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.autoencoder import define_autoencoder
from models.model_base import ModelSR
from models.sampler import check_fit, define_process, define_sampler, enlarge
from utils.utils_checkpoint import unwrap
from utils.utils_error import UserError
from utils.utils_option import Options, fidelity_weight, patch_size


class Draw(NamedTuple):
    """All that is random in a training step."""

    t: Tensor  # (N,) long, the time of each image
    noise: Tensor  # (N, C, h, w) of the latent, normal: what is put on x0
    noise_H: Tensor  # the same, for the posterior that a variational autoencoder makes of H
    noise_L: Tensor  # and of the enlarged L

    def of(self, images: slice) -> "Draw":
        """The draw of some of the images."""
        return Draw(*(values[images] for values in self))


class ModelDM(ModelSR):
    """A network that takes a step of a diffusion process, trained on its prediction and on the image it amounts to.

    ResShift, StableSR and one-step super-resolution differ by process, autoencoder and network.
    """

    def __init__(self, opt: Options, device: torch.device) -> None:
        super().__init__(opt, device)
        self.process = define_process(opt)
        self.autoencoder: Any = define_autoencoder(opt).to(device)
        network: Any = unwrap(self.netG)
        check_fit(network, self.autoencoder, opt.scale)
        assert opt.train_set is not None
        size, multiple = patch_size(opt.train_set), self.autoencoder.factor * network.size_multiple
        if size % multiple:
            raise UserError(f"datasets.train.H_size: netG takes patches divisible by {multiple}, not {size}")

    def generator(self, network: nn.Module, quick: bool = False) -> nn.Module:
        """A sampler; a quick one takes a single step."""
        sampler = define_sampler(network, self.opt, self.autoencoder)
        if quick:
            sampler.timesteps = self.process.timesteps(1)
        return sampler

    # ------------------------------------------------------------------------------------------------------- one step

    def optimize_parameters(self, current_step: int) -> None:
        """One step of the network, the batch at once or in pieces."""
        draw = self.draw()
        for piece in self.pieces():
            self.backward("G", self.losses(draw.of(piece.images)))
        if self.update(current_step):
            self.update_E()

    def draw(self) -> Draw:
        """Times, spread evenly over the process's, and noise for the fed batch."""
        n, _, height, width = self.H.shape
        factor = self.autoencoder.factor
        shape = (n, self.autoencoder.channels, height // factor, width // factor)
        times = self.process.times
        t = times[torch.randint(len(times), (n,))].to(self.device)
        return Draw(t, *(torch.randn(shape, device=self.device) for _ in range(3)))

    def losses(self, draw: Draw | None = None) -> dict[str, Tensor]:
        """The weighted losses of the fed images at the times and with the noise of ``draw``, by name; None = drawn."""
        train, process, draw = self.opt.train, self.process, draw or self.draw()
        L_up = enlarge(self.L, self.opt.scale)
        with torch.no_grad(), self.autocast():
            x0 = self.autoencoder.encode(2 * self.H - 1, draw.noise_H).float()
            y = self.autoencoder.encode(2 * L_up - 1, draw.noise_L).float()
        x_t = process.q_sample(x0, y, draw.t, draw.noise)
        output = self.call(self.netG, process.scale_input(x_t, draw.t), draw.t, y, 2 * self.L - 1)

        terms = {}
        if train.dm_weight > 0:
            terms["dm_loss"] = train.dm_weight * F.mse_loss(output, process.target(x0, draw.noise))
        if fidelity_weight(train) > 0:
            with self.autocast():
                image = self.autoencoder.decode(process.x0_of(output, x_t, draw.t))
            self.E = (image.float() + 1) / 2
            terms |= self.fidelity_terms(2 * self.E - 1 if train.range_published else self.E)
        return terms

    def describe(self) -> str:
        """One line: the networks, the process, and where it happens."""
        process, space = type(self.process).__name__, type(self.autoencoder).__name__
        return f"{super().describe()}, {process} of {len(self.process.times)} steps in {space}"
