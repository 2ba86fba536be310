"""Adversarial training, with the self-similarity loss where it is asked for."""

import torch

from models.loss import GANLoss
from models.model_base import ModelBase
from models.select_network import define_D
from utils.utils_checkpoint import unwrap
from utils.utils_option import Options


class ModelGAN(ModelBase):
    """A generator against a discriminator on images."""

    def __init__(self, opt: Options, device: torch.device) -> None:
        super().__init__(opt, device)
        self.netD = self.add_network("D", define_D(opt), opt.path.pretrained_netD, opt.train.D_param_strict)
        self.gan = GANLoss(opt.train.gan_type)

    def optimize_parameters(self, current_step: int) -> None:
        """One step of the generator, then one of the discriminator on the same batch."""
        train = self.opt.train

        # The generator, unless it is the discriminator's turn alone.
        if current_step > train.D_init_iters and current_step % train.D_update_ratio == 0:
            self.E = self.netG(self.L)
            terms = self.fidelity_terms(self.E)
            if train.D_lossfn_weight > 0:
                # Unwrapped: gradients pass through D to E, and D's own must not be exchanged between processes.
                netD = unwrap(self.netD).requires_grad_(False)
                with torch.no_grad():
                    pred_real = netD(self.H) if self.gan.needs_real else None
                terms["D_loss"] = train.D_lossfn_weight * self.gan.generator(netD(self.E), pred_real)
                netD.requires_grad_(True)
            self.descend("G", terms, current_step)
            self.update_E()
        else:
            with torch.no_grad():
                self.E = self.netG(self.L)

        # The discriminator.
        if train.D_lossfn_weight > 0:
            pred_real = self.netD(self.H)
            pred_fake = self.netD(self.E.detach())
            l_d_real, l_d_fake = self.gan.discriminator(pred_real, pred_fake)
            self.descend("D", {"l_d_real": l_d_real, "l_d_fake": l_d_fake}, current_step)
            self.log["D_real"] = pred_real.detach().mean().item()
            self.log["D_fake"] = pred_fake.detach().mean().item()
