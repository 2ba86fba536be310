"""Adversarial training, with the self-similarity loss where it is asked for."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.loss import GANLoss
from models.loss_systems import flat_mask
from models.model_base import ModelSR
from models.network_spsr import SPSROutput
from models.select_network import define_D
from utils.utils_checkpoint import unwrap
from utils.utils_option import Options
from utils.utils_tile import image_of


class Contest(NamedTuple):
    """What one discriminator is to tell apart, and how much it counts for the generator."""

    weight: float
    real: Tensor
    fake: Tensor  # with the generator's gradient, where this is its step


class ModelGAN(ModelSR):
    """A generator against a discriminator on images; a subclass may add others to :meth:`contests`."""

    def __init__(self, opt: Options, device: torch.device) -> None:
        super().__init__(opt, device)
        self.netD = self.add_network("D", define_D(opt), opt.path.pretrained_netD, opt.train.D_param_strict)
        self.gan = GANLoss(opt.train.gan_type)
        if self.in_pieces and self.gan.needs_real:
            self.warn_of_pieces(f"the means of {self.gan.gan_type} are")

    def optimize_parameters(self, current_step: int) -> None:
        """One step of the generator and of each discriminator, all from the same batch and the same E."""
        train = self.opt.train
        # The generator rests while it is the discriminators' turn alone.
        with_G = current_step > train.D_init_iters and current_step % train.D_update_ratio == 0
        for _ in self.pieces():
            with torch.set_grad_enabled(with_G):
                output, contests = self._enter()
            if with_G:
                self.backward("G", self._terms(output, contests))
            for name, contest in contests.items():
                self.backward(name, self._telling_apart(name, contest))
        self.update(current_step)
        if with_G:
            self.update_E()

    def losses(self) -> dict[str, Tensor]:
        """The generator's weighted losses of the fed images, by name."""
        return self._terms(*self._enter())

    def _enter(self) -> tuple[Tensor | SPSROutput, dict[str, Contest]]:
        """What netG makes of the fed images, and the contests into which it enters."""
        output = self.call(self.netG, self.L)
        self.E = image_of(output)
        return output, {name: contest for name, contest in self.contests().items() if contest.weight > 0}

    def _terms(self, output: Tensor | SPSROutput, contests: dict[str, Contest]) -> dict[str, Tensor]:
        terms = self.fidelity_terms(output)
        for name, contest in contests.items():
            terms[f"{name}_loss"] = contest.weight * self._fooling(name, contest)
        return terms

    def contests(self) -> dict[str, Contest]:
        """What each discriminator sees of H and E, by its name."""
        train = self.opt.train
        # All of an image, or only what is not flat in H.
        seen: Tensor | float = 1 - flat_mask(self.H) if train.region_aware else 1.0
        return {"D": Contest(train.D_lossfn_weight, seen * self.H, seen * self.E)}

    def _fooling(self, name: str, contest: Contest) -> Tensor:
        """The generator's loss against one discriminator, not weighted."""
        # Unwrapped: gradients pass through D to E, and D's own must not be exchanged between processes.
        netD = unwrap(self.networks[name]).requires_grad_(False)
        with torch.no_grad():
            pred_real = self.call(netD, contest.real) if self.gan.needs_real else None
        loss = self.gan.generator(self.call(netD, contest.fake), pred_real)
        netD.requires_grad_(True)
        return loss

    def _telling_apart(self, name: str, contest: Contest) -> dict[str, Tensor]:
        """The losses of one discriminator, by name."""
        netD = self.networks[name]
        pred_real, pred_fake = self.call(netD, contest.real), self.call(netD, contest.fake.detach())
        self.shown |= {f"{name}_real": pred_real.detach().mean(), f"{name}_fake": pred_fake.detach().mean()}
        l_real, l_fake = self.gan.discriminator(pred_real, pred_fake)
        return {f"l_{name.lower()}_real": l_real, f"l_{name.lower()}_fake": l_fake}
