"""SPSR (arXiv 2003.13081): adversarial training with a second discriminator, which sees gradient maps."""

import torch

from models.model_gan import Contest, ModelGAN
from models.select_network import define_D
from utils.utils_option import Options


class ModelSPSR(ModelGAN):
    """A generator against a discriminator on images and one on their gradient maps.

    The second, ``netD_grad``, has the first one's architecture and optimizer settings and starts from random weights.
    SPSR's other terms are named ones of every model: ``train.gradient_weight``, and ``train.branch_weight`` for the
    generator's gradient branch.
    """

    def __init__(self, opt: Options, device: torch.device) -> None:
        super().__init__(opt, device)
        self.netD_grad = self.add_network("D_grad", define_D(opt), pretrained=None, strict=True)

    def contests(self) -> dict[str, Contest]:
        """What each discriminator sees: the images, and their gradient maps."""
        weight = self.opt.train.gradient_D_lossfn_weight
        return {**super().contests(), "D_grad": Contest(weight, self.gradient_H, self.gradient_map(self.E))}
