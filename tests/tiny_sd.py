"""A Stable Diffusion of the real classes with random weights, small enough for tests, in a folder as diffusers'."""

import json
from pathlib import Path
from typing import Any

import torch

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
PROMPT_LENGTH = 7


def write_tiny_sd(folder: Path, factor: int = 8, prediction_type: str = "epsilon", **unet: Any) -> Path:
    """Write a pipeline's folder; -> the folder.

    Args:
        folder: made if absent.
        factor: from pixels to the autoencoder's latent, a power of two.
        prediction_type: epsilon or v_prediction.
        unet: changes to ``UNET``.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    UNet2DConditionModel(**(UNET | unet)).save_pretrained(folder / "unet")
    levels = factor.bit_length()
    AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    config = CLIPTextConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    torch.set_rng_state(generator_state)

    # Byte pairs need no more than this for the empty prompt; "!" fills it up, as in Stable Diffusion 2.
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", "!", "!</w>"]
    (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {"bos_token": words[0], "eos_token": words[1], "unk_token": words[1], "pad_token": "!"}
    settings |= {"model_max_length": PROMPT_LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))

    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    index = {"_class_name": "StableDiffusionPipeline", **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
