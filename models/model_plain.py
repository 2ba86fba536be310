"""PSNR-oriented training: pixel losses, and the self-similarity or perceptual loss where they are asked for."""

from models.model_base import ModelBase


class ModelPlain(ModelBase):
    """One generator, trained against the ground truth."""

    def optimize_parameters(self, current_step: int) -> None:
        """One step of the generator."""
        self.E = self.netG(self.L)
        terms = self.fidelity_terms(self.E)
        self.descend("G", terms, current_step)
        self.update_E()
