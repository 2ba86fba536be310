"""Diffusion training, with the self-similarity loss where it is asked for."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from models.autoencoder import PRECISION, define_autoencoder
from models.model_base import OVER_EDGES, ModelSR
from models.sampler import check_fit, define_process, define_sampler, enlarge
from utils.utils_checkpoint import unwrap
from utils.utils_error import UserError
from utils.utils_option import Options, fidelity_weight, patch_size
from utils.utils_ssl import edge_mask, mask_stride_pattern


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

    def feed_data(self, data: dict[str, Any], need_H: bool = True) -> None:
        """As the other models' batch."""
        super().feed_data(data, need_H)
        self.fed = data

    # ------------------------------------------------------------------------------------------------------- one step

    def optimize_parameters(self, current_step: int) -> None:
        """One step of the network, the batch at once or in pieces of ``train.micro_batch`` images."""
        draw, whole = self.draw(), len(self.L)
        shown: dict[str, Tensor] = {}
        self.optimizers["G"].zero_grad(set_to_none=True)
        for images, edges in self._pieces():
            with self._exchange(last=images.stop == whole):
                terms = self.losses(draw.of(images))
                share = {name: edges if name in OVER_EDGES else len(self.L) / whole for name in terms | self.shown}
                self.add_gradient({name: share[name] * term for name, term in terms.items()})
            for name, value in (terms | self.shown).items():
                shown[name] = shown.get(name, torch.zeros_like(value)) + share[name] * value.detach()
            self.shown = {}
        self.update({"G": shown}, current_step)
        self.update_E()

    def draw(self) -> Draw:
        """Times, spread evenly over the process's, and noise for the fed batch."""
        n, _, height, width = self.H.shape
        factor = self.autoencoder.factor
        shape = (n, self.autoencoder.channels, height // factor, width // factor)
        times = self.process.times
        t = times[torch.randint(len(times), (n,))].to(self.device)
        return Draw(t, *(torch.randn(shape, device=self.device) for _ in range(3)))

    def losses(self, draw: Draw) -> dict[str, Tensor]:
        """The weighted losses of the fed images at the times and with the noise of ``draw``, by name."""
        train, process = self.opt.train, self.process
        L_up = enlarge(self.L, self.opt.scale)
        with torch.no_grad(), self._autocast():
            x0 = self.autoencoder.encode(2 * self.H - 1, draw.noise_H).float()
            y = self.autoencoder.encode(2 * L_up - 1, draw.noise_L).float()
        x_t = process.q_sample(x0, y, draw.t, draw.noise)
        with self._autocast():
            output = self.netG(process.scale_input(x_t, draw.t), draw.t, y, 2 * self.L - 1)
        output = output.float()

        terms = {}
        if train.dm_weight > 0:
            terms["dm_loss"] = train.dm_weight * F.mse_loss(output, process.target(x0, draw.noise))
        if fidelity_weight(train) > 0:
            with self._autocast():
                image = self.autoencoder.decode(process.x0_of(output, x_t, draw.t))
            self.E = (image.float() + 1) / 2
            terms |= self.fidelity_terms(self.E)
        return terms

    def describe(self) -> str:
        """One line: the networks, the process, and where it happens."""
        process, space = type(self.process).__name__, type(self.autoencoder).__name__
        return f"{super().describe()}, {process} of {len(self.process.times)} steps in {space}"

    # ------------------------------------------------------------------------------------------- pieces and precision

    def _pieces(self) -> Iterator[tuple[slice, float]]:
        """Feed the batch piece by piece; -> which of its images it is, and its share of the batch's edge pixels."""
        whole, size = len(self.L), self.opt.train.micro_batch
        if size is None or size >= whole:
            yield slice(0, whole), 1.0
            return
        batch = {name: self.fed[name] for name in ("L", "H", "H_usm", "mask") if name in self.fed}
        edges = torch.ones(whole)
        if self.ssl is not None:
            batch["mask"] = mask = batch["mask"] if "mask" in batch else edge_mask(batch["H"], self.ssl.threshold)
            pattern = mask_stride_pattern(mask.shape[2], mask.shape[3], max(1, self.ssl.mask_stride))
            edges = (mask * pattern.to(mask)).sum((1, 2, 3))
        for first in range(0, whole, size):
            images = slice(first, min(first + size, whole))
            super().feed_data({name: values[images] for name, values in batch.items()})
            yield images, edges[images].sum().item() / max(1.0, edges.sum().item())

    def _exchange(self, last: bool) -> Any:
        """Several processes exchange their gradients once a step, after the last piece."""
        if isinstance(self.netG, DistributedDataParallel) and not last:
            return self.netG.no_sync()
        return nullcontext()

    def _autocast(self) -> torch.autocast:
        precision = PRECISION[self.opt.train.precision]
        return torch.autocast(self.device.type, precision, enabled=precision != torch.float32)
