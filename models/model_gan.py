"""Adversarial training, with the self-similarity loss where it is asked for."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

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


class Judged(NamedTuple):
    """What a discriminator says of both images: logits."""

    real: Tensor
    fake: Tensor


class ModelGAN(ModelSR):
    """A generator against a discriminator on images; a subclass may add others to :meth:`contests`."""

    def __init__(self, opt: Options, device: torch.device) -> None:
        super().__init__(opt, device)
        self.netD = self.add_network("D", define_D(opt), opt.path.pretrained_netD, opt.train.D_param_strict)
        self.gan = GANLoss(opt.train.gan_type)
        self.judges_once = opt.train.D_once
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
            judged: dict[str, Judged] = {}
            if with_G:
                self.backward("G", self._terms(output, contests, judged))
            for name, contest in contests.items():
                self._tell_apart(name, contest, judged.get(name))
        if self.update(current_step) and with_G:
            self.update_E()

    def losses(self) -> dict[str, Tensor]:
        """The generator's weighted losses of the fed images, by name."""
        return self._terms(*self._enter(), {})

    def _enter(self) -> tuple[Tensor | SPSROutput, dict[str, Contest]]:
        """What netG makes of the fed images, and the contests into which it enters."""
        output = self.call(self.netG, self.L)
        self.E = image_of(output)
        return output, {name: contest for name, contest in self.contests().items() if contest.weight > 0}

    def _terms(
        self, output: Tensor | SPSROutput, contests: dict[str, Contest], judged: dict[str, Judged]
    ) -> dict[str, Tensor]:
        """The generator's weighted losses; ``judged`` gets the logits that the discriminators learn from too."""
        terms = self.fidelity_terms(output)
        for name, contest in contests.items():
            if self.judges_once:
                loss, judged[name] = self._judged_once(name, contest)
            else:
                loss = self._fooling(name, contest)
            terms[f"{name}_loss"] = contest.weight * loss
        return terms

    def contests(self) -> dict[str, Contest]:
        """What each discriminator sees of H and E, by its name."""
        train, H, E = self.opt.train, self.H, self.E
        if train.region_aware:  # only what is not flat in H
            seen = 1 - flat_mask(H)
            H, E = seen * H, seen * E
        return {"D": Contest(train.D_lossfn_weight, H, E)}

    def _fooling(self, name: str, contest: Contest) -> Tensor:
        """The generator's loss against one discriminator, not weighted."""
        # Unwrapped: gradients pass through D to E, and D's own must not be exchanged between processes.
        netD = unwrap(self.networks[name]).requires_grad_(False)
        with torch.no_grad():
            pred_real = self.call(netD, contest.real) if self.gan.needs_real else None
        loss = self.gan.generator(self.call(netD, contest.fake), pred_real)
        netD.requires_grad_(True)
        return loss

    def _judged_once(self, name: str, contest: Contest) -> tuple[Tensor, Judged]:
        """The same loss, and the logits with their graphs, from which the discriminator learns afterwards."""
        netD, fake = self.networks[name], contest.fake.detach().requires_grad_()
        judged = Judged(self.call(netD, contest.real), self.call(netD, fake))
        loss = self.gan.generator(judged.fake, judged.real)
        # The way from the loss to E is gone here, that of D's weights later: neither computes what the other needs.
        scale = self.scalers["G"].scale(torch.ones_like(loss))
        (slope,) = torch.autograd.grad(loss, fake, scale, retain_graph=True)
        return _WithSlope.apply(contest.fake, loss.detach(), slope / scale), judged

    def _tell_apart(self, name: str, contest: Contest, judged: Judged | None) -> None:
        """Give one discriminator the gradient of its losses, of logits that were ``judged`` for both players or not."""
        netD, real, fake = self.networks[name], f"l_{name.lower()}_real", f"l_{name.lower()}_fake"
        if judged or self.gan.needs_real:
            judged = judged or Judged(self.call(netD, contest.real), self.call(netD, contest.fake.detach()))
            self.backward(name, dict(zip((real, fake), self.gan.discriminator(*judged), strict=True)))
        else:  # each graph goes before the next one comes
            with netD.no_sync() if isinstance(netD, DistributedDataParallel) else nullcontext():
                pred_real = self.call(netD, contest.real)
                self.backward(name, {real: self.gan.towards(pred_real, real=True)})
            pred_fake = self.call(netD, contest.fake.detach())
            self.backward(name, {fake: self.gan.towards(pred_fake, real=False)})
            judged = Judged(pred_real, pred_fake)
        self.shown |= {f"{name}_{of}": pred.detach().mean() for of, pred in judged._asdict().items()}


class _WithSlope(torch.autograd.Function):
    """A number that was computed elsewhere, with its gradient at a tensor."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *flow: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return flow[0] * slope, None, None
