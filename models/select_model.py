"""From ``model`` in the options to the training step that it names."""

import torch

from models.model_base import ModelBase
from models.model_dm import ModelDM
from models.model_gan import ModelGAN
from models.model_plain import ModelPlain
from models.model_ranker import ModelRanker
from models.model_spsr import ModelSPSR
from utils.utils_option import Options


def define_Model(opt: Options, device: torch.device | str = "cpu") -> ModelBase:
    """Build the model of resolved training options, with its networks loaded from ``path.pretrained_net*``.

    Raises:
        UserError: a pretrained file is missing or does not fit, or the perceptual loss has no weights.
    """
    models: dict[str, type[ModelBase]] = {
        "plain": ModelPlain,
        "gan": ModelGAN,
        "spsr": ModelSPSR,
        "dm": ModelDM,
        "ranker": ModelRanker,
    }
    return models[opt.model](opt, torch.device(device))
