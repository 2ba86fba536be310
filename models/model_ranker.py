"""Training of RankSRGAN's ranker (arXiv 1908.06382), which orders images as a quality metric does."""

from typing import Any

import torch
from torch import Tensor, nn

from models.loss_systems import margin_ranking_loss
from models.model_base import ModelBase
from models.precision import in_float32
from models.select_network import define_R
from utils.utils_checkpoint import unwrap
from utils.utils_option import Options


class ModelRanker(ModelBase):
    """A network ``netR``, asked for a lower score of the better of two images of one scene."""

    def __init__(self, opt: Options, device: torch.device) -> None:
        super().__init__(opt, device)
        self.netR = self.add_network("R", define_R(opt), opt.path.pretrained_netR, strict=True)

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``better`` and ``worse`` (N, C, h, w), RGB in [0, 1]."""
        super().feed_data(data)
        self.better: Tensor = self.fed["better"]
        self.worse: Tensor = self.fed["worse"]

    def optimize_parameters(self, current_step: int) -> None:
        """One step of the ranker, the batch at once or in pieces."""
        for _ in self.pieces():
            with self.autocast():
                better, worse = map(in_float32, self.scores(self.netR))
            loss = margin_ranking_loss(better, worse, torch.zeros_like(better), torch.ones_like(worse))
            self.shown = {
                "in_order": (better < worse).float().mean(),
                "score_better": better.mean(),
                "score_worse": worse.mean(),
            }
            self.backward("R", {"rank_loss": loss})
        self.update(current_step)

    def scores(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """What a ranker says of the better and of the worse images: (N, 1) each."""
        # Together: the batch norms of a batch of good images alone would take away what makes them good.
        better, worse = network(torch.cat([self.better, self.worse])).chunk(2)
        return better, worse

    @torch.no_grad()
    def test(self) -> Tensor:
        """Whether the ranker puts each fed pair in order: (N,) of {0, 1}."""
        network = unwrap(self.netR).eval()
        better, worse = self.scores(network)
        network.train()
        return (better < worse).float().flatten()
