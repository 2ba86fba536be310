"""PSNR-oriented training: pixel losses, and the self-similarity or perceptual loss where they are asked for."""

from torch import Tensor

from models.model_base import ModelSR
from utils.utils_tile import image_of


class ModelPlain(ModelSR):
    """One generator, trained against the ground truth."""

    def optimize_parameters(self, current_step: int) -> None:
        """One step of the generator, the batch at once or in pieces."""
        for _ in self.pieces():
            self.backward("G", self.losses())
        if self.update(current_step):
            self.update_E()

    def losses(self) -> dict[str, Tensor]:
        """The weighted losses of the fed images, by name."""
        output = self.call(self.netG, self.L)
        self.E = image_of(output)
        return self.fidelity_terms(output)
