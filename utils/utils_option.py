"""Options of a run: JSON with ``//`` comments and ``key.path=value`` overrides, checked before anything is built.

Every key is a typed field below, with its default and a description; ``python -m utils.utils_option`` prints the JSON
schema that editors complete from (``options/schema.json``). The names are KAIR's. KAIR's own option files and those of
the original SSL code run unchanged: keys that mean nothing here are accepted, collected in ``Options.unused`` and named
once by the training script; every other unknown key is an error.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from utils.utils_error import UserError


def _integral(value: Any) -> Any:
    """``4e5`` is how people write iterations; JSON reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no_bool(value: Any) -> Any:
    """To Python ``true`` equals 1 and so would be a choice of 1 or 3."""
    return json.dumps(value) if isinstance(value, bool) else value


def _not_tiny(value: float) -> float:
    """What is divided by must not be zero in single precision."""
    if value < 1e-30:
        raise ValueError(f"must be at least 1e-30, not {value}")
    return value


def _plain_path(value: str | list[str]) -> str | list[str]:
    """``"D:\\train"`` with one backslash is valid JSON: it holds a tab."""
    for path in [value] if isinstance(value, str) else value:
        longest = max(len(name.encode("utf-8", "surrogatepass")) for name in re.split(r"[/\\]", path))
        if len(path) > 4000 or longest > 255:
            raise ValueError(f"of {len(path)} characters is too long, or a name in it; names have 255 bytes at most")
        if re.search(r"[\x00-\x1f\x7f]", path):
            raise ValueError(f"{json.dumps(path)} holds a control character, which {_BACKSLASH}")
    return value


_BACKSLASH = r"a single backslash makes of the letter after it; write \\ or / in paths"
# The largest numbers only keep out what no machine could compute or count.
Channels = Annotated[Literal[1, 3], BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_integral), Field(ge=0, le=10**15)]
Positive = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=10**15)]
Pixels = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=65536)]
Features = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=16384)]
Blocks = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=1024)]
Window = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=64)]
Seed = Annotated[int, BeforeValidator(_integral), Field(ge=0, lt=2**32)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False), AfterValidator(_not_tiny)]
PathText = Annotated[str, AfterValidator(_plain_path)]
Paths = Annotated[str | list[str], AfterValidator(_plain_path)]
ActMode = Literal["R", "L", "BR", "BL", "IR", "IL"]
InitType = Literal[
    "default",
    "normal",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "orthogonal",
]


class Section(BaseModel):
    """A frozen group of options, read as ``opt.train.iterations`` or, as in KAIR, ``opt["train"]["iterations"]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def __getitem__(self, key: str) -> Any:
        if key not in type(self).model_fields:
            raise KeyError(key)
        return getattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default`` where there is no such option."""
        return getattr(self, key, default) if key in type(self).model_fields else default


# --------------------------------------------------------------------------------------------------------- networks


class _Network(Section):
    init_type: InitType = Field("default", description='weight initialisation; "default" keeps the network\'s own')
    init_bn_type: Literal["uniform", "constant"] = Field("uniform", description="initialisation of batch norms")
    init_gain: Rate = Field(0.2, description="gain of init_type")


class _Generator(_Network):
    in_nc: Features | None = Field(None, description="input channels; null = n_channels")
    out_nc: Features | None = Field(None, description="output channels; null = n_channels")


class _RRDBNetBase(_Generator):
    nf: Features = Field(64, description="features")
    nb: Blocks = Field(23, description="residual-in-residual dense blocks")
    gc: Features = Field(32, description="growth channels of a dense block")
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class RRDBNetOptions(_RRDBNetBase):
    net_type: Literal["rrdbnet"] = Field("rrdbnet", description="RRDBNet of ESRGAN and BSRGAN, scales 2, 3, 4")


class RRDBNetBasicSROptions(_RRDBNetBase):
    net_type: Literal["rrdbnet_basicsr"] = Field(
        "rrdbnet_basicsr", description="RRDBNet with BasicSR's names; scales 2 and 1 start with a pixel-unshuffle"
    )


class SPSROptions(_RRDBNetBase):
    net_type: Literal["spsr"] = Field("spsr", description="SPSRNet, guided by a branch that enlarges the gradient")
    nb: Annotated[int, BeforeValidator(_integral), Field(ge=20, le=1024)] = Field(
        23, description="blocks; the branch needs 20"
    )
    upsample_mode: Literal["upconv", "pixelshuffle", "convtranspose"] = Field("upconv", description="upsampling")


class RRDBOptions(_Generator):
    net_type: Literal["rrdb"] = Field("rrdb", description="KAIR's RRDB, sequential names")
    nf: Features = Field(64, description="features (KAIR: nc)")
    nb: Blocks = Field(23, description="residual-in-residual dense blocks")
    gc: Features = Field(32, description="growth channels of a dense block")
    act_mode: ActMode = Field("L", description="R = ReLU, L = LeakyReLU; B or I before it = batch or instance norm")
    upsample_mode: Literal["upconv", "pixelshuffle", "convtranspose"] = Field("upconv", description="upsampling")


class MSRResNetOptions(_Generator):
    net_type: Literal["msrresnet0", "msrresnet1"] = Field("msrresnet1", description="KAIR's SRResNet variants")
    nc: Features = Field(64, description="features")
    nb: Blocks = Field(16, description="residual blocks")
    act_mode: ActMode = Field("R", description="R = ReLU, L = LeakyReLU; B or I before it = batch or instance norm")
    upsample_mode: Literal["upconv", "pixelshuffle", "convtranspose"] = Field("upconv", description="upsampling")


class RankSRGANSRResNetOptions(_Generator):
    net_type: Literal["ranksrgan_srresnet"] = Field("ranksrgan_srresnet", description="SRResNet of RankSRGAN")
    nf: Features = Field(64, description="features")
    nb: Blocks = Field(16, description="residual blocks")


class SRVGGOptions(_Generator):
    net_type: Literal["srvgg_compact"] = Field("srvgg_compact", description="small and fast, of Real-ESRGAN")
    nf: Features = Field(64, description="features")
    nc: Blocks = Field(16, description="number of convolutions between the first and the last")
    act_type: Literal["prelu", "relu", "leakyrelu"] = Field("prelu", description="activation")


class SwinIROptions(_Network):
    net_type: Literal["swinir"] = Field("swinir", description="SwinIR, arXiv 2108.10257; the defaults are SwinIR-M")
    upscale: Positive | None = Field(None, description="null = scale")
    in_chans: Features | None = Field(None, description="image channels; null = n_channels")
    img_size: Pixels = Field(64, description="side of the L patch in training; sizes only the masks in the files")
    window_size: Window = Field(8, description="side of the attention windows; img_size must divide by it")
    img_range: Rate = Field(1.0, description="factor of the input; 255 in the JPEG models")
    depths: list[Blocks] = Field([6] * 6, description="Swin blocks of each residual group", min_length=1, max_length=64)
    embed_dim: Features = Field(180, description="features")
    num_heads: list[Features] = Field(
        [6] * 6, description="attention heads in each residual group", min_length=1, max_length=64
    )
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = Field(2.0, description="widening in the perceptrons")
    upsampler: Literal["pixelshuffle", "pixelshuffledirect", "nearest+conv", ""] | None = Field(
        "pixelshuffle", description="pixelshuffle, ...direct (lightweight), nearest+conv (real-world); null = scale 1"
    )
    resi_connection: Literal["1conv", "3conv"] = Field("1conv", description="convolutions at the end of a group")
    padding: Literal["reflect", "mirror"] = Field(
        "reflect",
        description="reflect = to the next multiple of the window; mirror = a whole window more, as SSL's code",
    )
    drop_path_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="chance to skip the last block in training, rising from 0 at the first"
    )
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class ELANOptions(_Network):
    net_type: Literal["elan"] = Field("elan", description="ELAN, arXiv 2203.06697")
    colors: Features | None = Field(None, description="image channels; null = n_channels")
    window_sizes: list[Window] = Field(
        [4, 8, 16], description="a window for each group of channels", min_length=1, max_length=64
    )
    m_elan: Blocks = Field(36, description="attention blocks")
    c_elan: Features = Field(180, description="features; divide by the number of windows")
    n_share: Annotated[int, BeforeValidator(_integral), Field(ge=0, le=1024)] = Field(
        0, description="blocks after each one that attend with its queries"
    )
    r_expand: Blocks = Field(2, description="widening of the local features")
    img_range: Rate = Field(255.0, description="factor of the input")
    rgb_mean: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None, description="subtracted from RGB images; null = the mean of DIV2K", min_length=3, max_length=3
    )
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class DiffusionNetwork(_Network):
    """A network of model dm: ``netG(x, t, y, L)``, see models/sampler.py."""


class UNet2DOptions(DiffusionNetwork):
    net_type: Literal["unet2d"] = Field("unet2d", description="U-Net of diffusers (UNet2DModel), on x_t beside y")
    channels: Features = Field(3, description="of x: n_channels in pixels, 3 with VQ-f4, 4 with Stable Diffusion")
    patch: Window = Field(1, description="fold this many pixels a side into channels: smaller maps, less work")
    residual: bool = Field(True, description="its output is what is added to y; false where noise is predicted")
    block_out_channels: list[Features] = Field(
        [64, 128, 256], description="features, level by level", min_length=1, max_length=64
    )
    layers_per_block: Blocks = Field(2, description="residual blocks of a level")
    attention: list[bool] = Field([], description="self-attention in each level; [] = nowhere")
    mid_attention: bool = Field(True, description="self-attention at the bottom")
    attention_head_dim: Features = Field(32, description="features of an attention head")
    norm_num_groups: Features = Field(32, description="groups of the group norms; the features divide by it")
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class _StableDiffusionNetwork(DiffusionNetwork):
    base: PathText = Field(
        description="Stable Diffusion 1 or 2, which stays as it is: a folder in diffusers' layout, or a hub's name"
    )
    base_precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="what its weights are kept and computed with in; the trained ones are kept in fp32"
    )
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class StableSROptions(_StableDiffusionNetwork):
    net_type: Literal["stablesr"] = Field(
        "stablesr", description="StableSR, arXiv 2305.07015: Stable Diffusion guided by the latent of L"
    )
    model_channels: Features = Field(256, description="features of the structural encoder")
    channel_mult: list[Blocks] = Field(
        [1, 1, 2, 2], description="in units of them, level by level", min_length=1, max_length=64
    )
    num_heads: Features = Field(4, description="heads of its attention")


class SDLoRAOptions(_StableDiffusionNetwork):
    net_type: Literal["sd_lora"] = Field(
        "sd_lora", description="Stable Diffusion in one step, by low-rank adaptation: OSEDiff, arXiv 2406.08177"
    )
    rank: Features = Field(4, description="of the update of each adapted layer")
    alpha: Features | None = Field(None, description="the update is weighted by alpha / rank; null = rank")
    target_modules: list[str] = Field(
        [
            *("to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_in", "conv_shortcut", "conv_out"),
            *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        ],
        description="the layers of the U-Net that are adapted, by the ends of their names; the default is OSEDiff's",
        min_length=1,
        max_length=64,
    )


class ResShiftUNetOptions(DiffusionNetwork):
    net_type: Literal["resshift_unet_swin"] = Field(
        "resshift_unet_swin", description="ResShift's U-Net with Swin layers; the defaults are the published network"
    )
    image_size: Pixels = Field(64, description="side of x in training; testing takes any")
    in_channels: Features = Field(3, description="of x: 3 in pixels and with VQ-f4")
    model_channels: Features = Field(160, description="features of the first level; divide by 32")
    out_channels: Features = Field(3, description="as in_channels")
    attention_resolutions: list[Pixels] = Field(
        [64, 32, 16, 8], description="sides of the levels that have a Swin layer, counted from image_size"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="chance to drop a feature in training")
    channel_mult: list[Blocks] = Field(
        [1, 2, 2, 4], description="features of each level, in model_channels", min_length=1, max_length=64
    )
    num_res_blocks: list[Blocks] = Field(
        [2, 2, 2, 2], description="residual blocks of each level", min_length=1, max_length=64
    )
    conv_resample: Literal[True] = Field(True, description="as published; no other is built")
    dims: Literal[2] = Field(2, description="as published; no other is built")
    use_fp16: Literal[False] = Field(False, description="as published; see train.precision")
    num_head_channels: Features = Field(32, description="features of an attention head")
    use_scale_shift_norm: bool = Field(True, description="the time scales and shifts features; false = it is added")
    resblock_updown: Literal[False] = Field(False, description="as published; no other is built")
    swin_depth: Blocks = Field(2, description="blocks of a Swin layer")
    swin_embed_dim: Features = Field(192, description="features of the Swin layers; divide by 32")
    window_size: Window = Field(8, description="side of the attention windows")
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = Field(4.0, description="widening in the perceptrons")
    patch_norm: Literal[False] = Field(False, description="as published; no other is built")
    cond_lq: bool = Field(True, description="look at L")
    lq_size: Pixels = Field(64, description="side of L in training, beside image_size; 1, 2, 4, ... times that")
    mask_quirk: bool = Field(
        True, description="the published masks of shifted windows, which published weights need; false = Swin's"
    )
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class SpandrelOptions(Section):
    net_type: Literal["spandrel"] = Field(
        "spandrel",
        description="any architecture that spandrel knows, as path.pretrained_netG holds it; scale and n_channels may "
        "be left out: they are the checkpoint's",
    )
    path: str | None = Field(None, exclude=True, description="filled in: the checkpoint that the network is built from")


NetG = Annotated[
    RRDBNetOptions
    | RRDBNetBasicSROptions
    | RRDBOptions
    | SPSROptions
    | MSRResNetOptions
    | RankSRGANSRResNetOptions
    | SRVGGOptions
    | SwinIROptions
    | ELANOptions
    | SpandrelOptions
    | UNet2DOptions
    | ResShiftUNetOptions
    | StableSROptions
    | SDLoRAOptions,
    Field(discriminator="net_type"),
]


class _Discriminator(_Network):
    in_nc: Features | None = Field(None, description="input channels; null = n_channels")
    base_nc: Features = Field(64, description="features of the first layer")


class UNetDiscriminatorOptions(_Discriminator):
    net_type: Literal["discriminator_unet", "discriminator_unet_sn", "discriminator_unet_sn_v1"] = Field(
        "discriminator_unet",
        description="U-Net with spectral norm, one logit per pixel; patches divisible by 8. ..._sn is BasicSR's name "
        "of the same network; ..._v1 a small one for any size, which no recipe uses",
    )
    skip_connection: bool = Field(True, description="add the features of the way down to those of the way up")


class PatchGANOptions(_Discriminator):
    net_type: Literal["discriminator_patchgan"] = Field("discriminator_patchgan", description="PatchGAN of pix2pix")
    n_layers: Blocks = Field(3, description="strided layers")
    norm_type: Literal["spectral", "batch", "instance", "batchspectral", "instancespectral"] = Field(
        "spectral", description="normalisation"
    )


class VGGDiscriminatorOptions(_Discriminator):
    net_type: Literal["discriminator_vgg_96", "discriminator_vgg_128", "discriminator_vgg_192"] = Field(
        "discriminator_vgg_128", description="VGG style; the number is the only patch size it takes"
    )
    act_mode: ActMode = Field("BL", description="batch norm and LeakyReLU or ReLU")


class VGGStyleDiscriminatorOptions(_Discriminator):
    net_type: Literal["discriminator_vgg_style"] = Field(
        "discriminator_vgg_style",
        description="BasicSR's VGG style, of ESRGAN, SPSR, LDL, BebyGAN (192), RankSRGAN (296)",
    )
    input_size: Literal[128, 192, 256, 296] = Field(128, description="the only patch size it takes")
    norm_type: Literal["batch", "spectral"] = Field("batch", description="normalisation; published: batch")


class VGG128SNOptions(_Discriminator):
    net_type: Literal["discriminator_vgg_128_SN"] = Field(
        "discriminator_vgg_128_SN", description="VGG style with spectral norm, patches of 128"
    )


NetD = Annotated[
    UNetDiscriminatorOptions
    | PatchGANOptions
    | VGGDiscriminatorOptions
    | VGGStyleDiscriminatorOptions
    | VGG128SNOptions,
    Field(discriminator="net_type"),
]


class RankerOptions(_Network):
    net_type: Literal["ranker_vgg12"] = Field("ranker_vgg12", description="RankSRGAN's ranker")
    in_nc: Features | None = Field(None, description="input channels; null = n_channels")
    base_nc: Features = Field(64, description="features of the first layer")


# -------------------------------------------------------------------------------------------------------- diffusion


class _Diffusion(Section):
    color_fix: Literal["none", "adain", "wavelet"] = Field(
        "none", description="take E's colours from the enlarged L: its mean and deviation, or its low frequencies"
    )
    sample_steps: Positive | None = Field(None, description="steps of sampling, in validation and tests; null = all")
    seed: Seed = Field(0, description="of the noise in sampling, the same for every image")


class ResShiftOptions(_Diffusion):
    type: Literal["resshift"] = Field("resshift", description="residual shifting, arXiv 2307.12348; predicts x0")
    steps: Annotated[int, BeforeValidator(_integral), Field(ge=2, le=100000)] = Field(15, description="T")
    min_noise_level: Rate = Field(0.04, description="m: sqrt(eta_1) = min(m / kappa, m)")
    kappa: Rate = Field(2.0, description="strength of the noise against the residual")
    etas_end: Annotated[float, Field(gt=0, le=1)] = Field(0.99, description="sqrt(eta_T)")
    power: Rate = Field(0.3, description="form of the schedule; the smaller, the earlier the shift")


class DDPMOptions(_Diffusion):
    type: Literal["ddpm"] = Field("ddpm", description="Stable Diffusion's process; predicts the noise")
    steps: Annotated[int, BeforeValidator(_integral), Field(ge=1, le=100000)] = Field(1000, description="T")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = Field(0.00085, description="first beta")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = Field(0.012, description="last beta; the roots are spread evenly")


class OneStepOptions(_Diffusion):
    type: Literal["onestep"] = Field("onestep", description="no process: one call of the network, from y to x0")
    timestep: Count = Field(0, description="the t that the network is shown; 999 for one of Stable Diffusion")


Diffusion = Annotated[ResShiftOptions | DDPMOptions | OneStepOptions, Field(discriminator="type")]


class AutoencoderOptions(Section):
    type: Literal["pixel", "vq", "kl"] = Field(
        "pixel", description="where diffusion happens: pixels, VQ-f4's latent (ResShift) or Stable Diffusion's"
    )
    path: PathText | None = Field(None, description="vq, kl: the trained autoencoder, a file, a folder or a hub's name")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="what its weights are kept and computed in")
    use_checkpoint: bool = Field(
        False, description="recompute its decoder's blocks in the backward pass: less memory for SSL, more time"
    )


# ------------------------------------------------------------------------------------------------ data, paths, train


DatasetType = Literal["sr", "blindsr", "plain", "multiLR_oneGT", "srmask", "blindsrmask", "plainmask", "l", "rank"]


class DatasetOptions(Section):
    """One data set. ``phase``, ``scale``, ``n_channels`` and ``seed`` are filled in from the top of the file."""

    name: str = Field("", description='a name for logs and tables; "" = the section\'s name')
    dataset_type: DatasetType = Field(
        "sr",
        description="sr: L from dataroot_L or by MATLAB bicubic; blindsr: L by degradation_type; plain: pairs; "
        "multiLR_oneGT: each L, named H's name + ..., with its H; "
        "...mask: with edge masks from dataroot_H_mask; l: low-quality images without ground truth; "
        "rank: results of the same scenes, by dataroot_ranked or rank_csv",
    )
    dataroot_H: Paths | None = Field(None, description="folder(s) of ground-truth images, read recursively")
    dataroot_L: Paths | None = Field(None, description="folder(s) of low-quality images, paired by name")
    dataroot_H_mask: Paths | None = Field(
        None, description="folder(s) of edge masks (.mat or .png) of the H images; null = made on line from H"
    )
    dataroot_ranked: list[PathText] | None = Field(
        None, description="rank: folders of results of the same scenes, paired by name, the best folder first"
    )
    rank_csv: PathText | None = Field(
        None,
        description="rank: instead, results.csv of main_test.py or a table like it (image, model, perhaps set, metric) "
        "beside the images, model/set/image.png: each image has its own order then",
    )
    rank_metric: str = Field("niqe", description="rank_csv: the column that says which of two images is better")
    rank_higher_better: bool | None = Field(
        None, description="rank_csv: whether more of rank_metric is better; null = it is one that main_test.py knows"
    )
    H_size: Pixels = Field(96, description="side of a training patch of H in pixels")
    lq_patchsize: Pixels | None = Field(
        None, description="side of the L patch kept after a blind degradation; null = H_size / scale"
    )
    degradation_type: Literal[
        "bsrgan",
        "bsrgan_light",
        "bsrgan_plus",
        "realesrgan",
        "realesrgan_light",
        "stablesr",
        "resshift",
        "blind_test",
    ] = Field(
        "bsrgan",
        description="blindsr: the figures of BSRGAN (KAIR's) or Real-ESRGAN; ..._light = the milder ones of the SSL "
        "paper's code; bsrgan_plus: KAIR's; stablesr, resshift: Real-ESRGAN's steps with their figures; blind_test: a "
        "mixture of both, of the SSL paper's test images. Each sample has draws of its own",
    )
    degradation_device: Literal["cpu", "gpu"] = Field(
        "cpu",
        description="blindsr in training: cpu = the reading processes degrade; gpu = the training device, batch-wise",
    )
    shuffle_prob: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="bsrgan_plus: how often all steps change places, null = 0.1; the others of bsrgan always shuffle",
    )
    camera_prob: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="bsrgan...: how often a simulated camera (mosaic, sensor noise, development) takes the image "
        "again. KAIR asks for 0.25 but brings no camera, which is 0",
    )
    pair_pool: Annotated[int, BeforeValidator(_integral), Field(ge=0, le=65536)] = Field(
        0,
        description="degradation_device gpu: keep this many pairs and give out old ones for new, at random; "
        "Real-ESRGAN: 180, for its batches shared their draws. Not in checkpoints: resumed runs differ. 0 = off",
    )
    use_sharp: bool = Field(
        False,
        description="blindsr: sharpen H (unsharp mask) before degrading it; realesrgan keeps H and adds H_usm",
    )
    mask_augment: bool = Field(
        True,
        description="flip and turn the mask with its image; false reproduces the published code, which did not",
    )
    dataloader_shuffle: bool = Field(True, description="random order; false = the order of the names")
    dataloader_num_workers: Count = Field(2, description="reading processes on each GPU; 0 = read in the main process")
    dataloader_batch_size: Positive = Field(4, description="patches per step over all GPUs together")
    phase: Literal["train", "test"] = Field("train", description="filled in")
    scale: Positive = Field(4, description="filled in")
    n_channels: Positive = Field(3, description="filled in")
    seed: Seed = Field(0, description="filled in")


class PathOptions(Section):
    root: PathText = Field("experiments", description="a run lives in root/task/{models,images,options}")
    pretrained_netG: PathText | None = Field(None, description="start the generator from this checkpoint")
    pretrained_netD: PathText | None = Field(None, description="start the discriminator from this checkpoint")
    pretrained_netE: PathText | None = Field(None, description="start the EMA generator from this; null = a copy of G")
    pretrained_netR: PathText | None = Field(
        None, description="the trained ranker, for train.rank_weight > 0; model ranker: start from this checkpoint"
    )
    pretrained_netF: PathText | None = Field(
        None, description="VGG19 weights of the perceptual loss; null = torch's own cache (downloaded if it can be)"
    )


class TrainOptions(Section):
    iterations: Positive | None = Field(None, description="stop after this step; null = until interrupted, as KAIR")
    manual_seed: Seed | None = Field(None, description="null = drawn at random and written to the log")

    dm_weight: Weight = Field(
        1.0, description="dm: weight of the squared error of what the network predicts (x0 or noise); 0 = off"
    )
    channels_last: bool = Field(
        False, description="networks with the channels innermost in memory: faster convolutions on some GPUs and CPUs"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dm: what networks compute in while training (autocast); the losses stay in fp32"
    )
    micro_batch: Positive | None = Field(
        None, description="dm: images that go through the network at once, the batch being done in pieces; null = all"
    )

    G_lossfn_type: Literal["l1", "l2", "l2sum", "charbonnier", "ssim"] = Field("l1", description="pixel loss")
    G_lossfn_weight: Weight = Field(1.0, description="weight of the pixel loss; 0 = off")
    l1_gt_usm: bool = Field(False, description="pixel loss against the sharpened H, H_usm; needs use_sharp of the data")
    percep_gt_usm: bool = Field(False, description="perceptual loss against the sharpened H, H_usm; as l1_gt_usm")
    G_charbonnier_eps: Rate = Field(1e-9, description="epsilon under the root of the Charbonnier loss")

    F_lossfn_type: Literal["l1", "l2"] = Field("l1", description="distance between VGG19 features")
    F_lossfn_weight: Weight = Field(0.0, description="weight of the perceptual loss; 0 = off")
    F_feature_layer: int | list[int] = Field(34, description="index (or indices) into torchvision's vgg19.features")
    F_weights: Weight | list[Weight] = Field(1.0, description="a weight for each feature layer")
    F_use_input_norm: bool = Field(True, description="normalise by ImageNet's mean and standard deviation")
    F_use_range_norm: bool = Field(False, description="map [-1, 1] to [0, 1] first")

    lpips_weight: Weight = Field(0.0, description="weight of LPIPS on VGG16, v0.1, through pyiqa; 0 = off")

    gan_type: Literal["gan", "ragan", "ragan_basicsr", "lsgan", "wgan", "softplusgan"] = Field(
        "gan",
        description="ragan: means over the batch axis, as KAIR; ragan_basicsr: over all logits, as ESRGAN and BasicSR",
    )
    D_lossfn_weight: Weight = Field(0.0, description="weight of the generator's adversarial loss; 0 = no GAN")
    D_init_iters: Count = Field(0, description="train the discriminator alone for this many steps first")
    D_update_ratio: Positive = Field(1, description="one step of the generator in this many of the discriminator")

    ssl_l1_weight: Weight = Field(0.0, description="weight of the L1 distance between the similarity graphs; 0 = off")
    ssl_kl_weight: Weight = Field(0.0, description="weight of KL(GT || SR) between the similarity graphs; 0 = off")
    ssl_mode: Literal["auto", "pytorch", "boxsum", "cpp", "cuda"] = Field(
        "auto", description="auto = the fastest that works here; pytorch = the readable specification (slow)"
    )
    search_border: Literal["zero", "image"] = Field(
        "zero", description="what a window that leaves the search area compares with: zero as published, or the image"
    )
    kernel_size_search: Pixels = Field(25, description="side of the search area, odd")
    kernel_size_window: Pixels = Field(9, description="side of the compared windows, odd")
    sigma: Rate = Field(0.004, description="scaling factor h of the paper")
    generalization: bool = Field(True, description="divide each pixel's graph by its sum")
    mask_stride: Count = Field(0, description="keep 1 edge pixel in this many (a tiled identity); 0 or 1 = all")
    mask_threshold: Weight = Field(20.0, description="Laplacian threshold of the edge mask")

    gradient_weight: Weight = Field(0.0, description="SPSR: squared distance of the images' gradient maps; 0 = off")
    branch_weight: Weight = Field(
        0.0, description="SPSR: L1 between H's gradient map and what netG's gradient branch makes of L; 0 = off"
    )
    gradient_D_lossfn_weight: Weight = Field(
        0.0, description="SPSR: weight of the generator's adversarial loss on gradient maps; 0 = off"
    )
    rank_weight: Weight = Field(
        0.0, description="RankSRGAN: sum over the batch of the sigmoid of netR's scores, lower being better; 0 = off"
    )
    rank_published: bool = Field(
        False,
        description="rank term as in the SSL paper's code: logged, but without gradient, netR in training mode",
    )
    ldl_weight: Weight = Field(0.0, description="LDL: L1 weighted by the artifact map, needs E_decay > 0; 0 = off")
    best_buddy_weight: Weight = Field(0.0, description="BebyGAN: best-buddy loss, patches of 12 or more; 0 = off")
    back_projection_weight: Weight = Field(
        0.0, description="BebyGAN: L1 between E shrunk by MATLAB's bicubic and L, for bicubic L only; 0 = off"
    )
    region_aware: bool = Field(
        False, description="BebyGAN: blacken the flat areas of H in what the discriminator sees of H and E"
    )

    E_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="EMA of the generator; 0 = off")

    G_optimizer_type: Literal["adam", "adamw"] = Field("adam", description="optimizer of the generator")
    G_optimizer_lr: Rate = Field(1e-4, description="learning rate of the generator")
    G_optimizer_betas: list[float] = Field([0.9, 0.999], description="Adam's betas", min_length=2, max_length=2)
    G_optimizer_wd: Weight = Field(0.0, description="weight decay")
    G_optimizer_clipgrad: Weight | None = Field(None, description="largest gradient norm; null or 0 = no clipping")
    G_scheduler_type: Literal["MultiStepLR", "CosineAnnealingLR"] = Field(
        "MultiStepLR", description="learning rate: in steps, or half a cosine from the warm-up to iterations"
    )
    G_scheduler_warmup: Count = Field(0, description="the learning rate rises linearly over this many steps first")
    G_scheduler_eta_min: Weight = Field(0.0, description="CosineAnnealingLR: the learning rate at the end")
    G_scheduler_milestones: list[Count] = Field([], description="multiply by gamma from these steps on")
    G_scheduler_gamma: Rate = Field(0.5, description="factor at a milestone")
    G_param_strict: bool = Field(True, description="pretrained_netG must match in every tensor")

    D_optimizer_type: Literal["adam", "adamw"] = Field("adam", description="optimizer of the discriminator")
    D_optimizer_lr: Rate = Field(1e-4, description="learning rate of the discriminator")
    D_optimizer_betas: list[float] = Field([0.9, 0.999], description="Adam's betas", min_length=2, max_length=2)
    D_optimizer_wd: Weight = Field(0.0, description="weight decay")
    D_optimizer_clipgrad: Weight | None = Field(None, description="largest gradient norm; null or 0 = no clipping")
    D_scheduler_type: Literal["MultiStepLR"] = Field("MultiStepLR", description="learning rate schedule")
    D_scheduler_milestones: list[Count] = Field([], description="multiply by gamma from these steps on")
    D_scheduler_gamma: Rate = Field(0.5, description="factor at a milestone")
    D_param_strict: bool = Field(True, description="pretrained_netD must match in every tensor")
    E_param_strict: bool = Field(True, description="pretrained_netE must match in every tensor")

    R_optimizer_type: Literal["adam", "adamw"] = Field("adam", description="optimizer of model ranker's netR")
    R_optimizer_lr: Rate = Field(1e-3, description="learning rate of the ranker")
    R_optimizer_betas: list[float] = Field([0.9, 0.999], description="Adam's betas", min_length=2, max_length=2)
    R_optimizer_wd: Weight = Field(0.0, description="weight decay")
    R_optimizer_clipgrad: Weight | None = Field(None, description="largest gradient norm; null or 0 = no clipping")
    R_scheduler_milestones: list[Count] = Field([], description="multiply by gamma from these steps on")
    R_scheduler_gamma: Rate = Field(0.5, description="factor at a milestone")

    checkpoint_print: Positive = Field(200, description="log every this many steps")
    checkpoint_test: Positive = Field(5000, description="validate every this many steps")
    checkpoint_save: Positive = Field(5000, description="save every this many steps")
    checkpoint_keep: Positive | None = Field(
        None, description="keep the newest this many checkpoints and the best one; null = keep all"
    )


# The names and groups of utils.utils_metrics.
_OwnMetric = Literal["psnr", "ssim", "psnr_y", "ssim_y", "psnr_y8", "ssim_y8", "ssg"]
_OfflineMetric = Literal["ms_ssim", "fsim", "gmsd", "vif", "nlpd", "mad", "piqe"]
_LearnedMetric = Literal["lpips", "dists", "fid", "niqe", "musiq", "clipiqa", "maniqa"]
MetricName = Literal["default", "paper", "offline", _OwnMetric, _LearnedMetric, _OfflineMetric]


class TestOptions(Section):
    """Validation in training and ``main_test.py``."""

    tile: Count = Field(0, description="restore in tiles of this many L pixels; 0 = whole images")
    tile_overlap: Count = Field(32, description="overlap of neighbouring tiles in L pixels")
    param_key: str | None = Field(None, description="which weights of the file; null = params_ema, params or the file")
    output: PathText | None = Field(None, description="folder for results; null = root/task/results")
    images: Count = Field(4, description="validation: how many images go into the grid; 0 = none")
    metrics: list[MetricName] = Field(["default"], description="what main_test.py measures: metrics or groups of them")
    report_images: Count = Field(30, description="main_test.py: how many images go into report.html; 0 = no such file")


class Options(Section):
    """All options of a run, resolved and checked."""

    task: Annotated[
        str, Field(pattern=r"^[^/\\\s.\x00-\x1f][^/\\\x00-\x1f]*$", max_length=200), AfterValidator(_plain_path)
    ] = Field(description="the run's name; its folder is root/task")
    model: Literal["plain", "gan", "spsr", "dm", "ranker"] = Field(
        "plain",
        description="plain = pixel losses, gan = adversarial, spsr = with a netD on gradient maps too, dm = diffusion, "
        "ranker = trains netR alone",
    )
    gpu_ids: list[Count] | None = Field(None, description="GPUs by number, one process each (torchrun); null = all")
    scale: Annotated[int, Field(ge=1, le=8)] = Field(4, description="upscaling factor, for networks and data alike")
    n_channels: Channels = Field(3, description="1 = gray, 3 = RGB, for networks and data alike")
    path: PathOptions = Field(PathOptions(), description="where the run lives and what it starts from")
    datasets: dict[str, DatasetOptions] = Field({}, description='"train" and any number of "test..." or "val..." sets')
    netG: NetG | None = Field(None, description="the generator (all models but ranker)")
    netD: NetD | None = Field(None, description="the discriminator (models gan and spsr)")
    netR: RankerOptions | None = Field(None, description="the ranker (train.rank_weight > 0, model ranker)")
    diffusion: Diffusion | None = Field(None, description="the diffusion process (model dm)")
    autoencoder: AutoencoderOptions = Field(AutoencoderOptions(), description="where diffusion happens (model dm)")
    train: TrainOptions = Field(TrainOptions(), description="losses, optimizers, schedule, checkpoints")
    test: TestOptions = Field(TestOptions(), description="validation and testing")
    is_train: bool = Field(True, description="filled in")
    unused: list[str] = Field([], description="filled in: accepted keys that mean nothing here")

    @property
    def train_set(self) -> DatasetOptions | None:
        """Options of the training set."""
        return self.datasets.get("train")

    @property
    def test_sets(self) -> dict[str, DatasetOptions]:
        """Options of all the other sets, by name, in the file's order."""
        return {name: data for name, data in self.datasets.items() if name != "train"}

    @property
    def task_dir(self) -> Path:
        """The run's folder, ``root/task``."""
        return Path(self.path.root) / self.task


class NetworkOptions(Section):
    """The part of the options that ``define_G`` and ``define_D`` read."""

    scale: Annotated[int, Field(ge=1, le=8)] = 4
    n_channels: Channels = 3
    is_train: bool = False
    netG: NetG | None = None
    netD: NetD | None = None
    diffusion: Diffusion | None = None
    autoencoder: AutoencoderOptions = AutoencoderOptions()


# ------------------------------------------------------------------------------ what KAIR and the original SSL wrote

# Keys of KAIR's files that mean nothing here, by section. They are named once, never silently dropped.
_UNUSED_TOP = {"dist", "merge_bn", "merge_bn_startpoint", "find_unused_parameters", "use_static_graph", "opt_path"}
_UNUSED_TOP |= {"rank", "world_size", "num_gpu", "sigma", "sigma_test", "is_color", "val", "$schema"}
_UNUSED_PATH = {"task", "log", "models", "images", "options", "pretrained_optimizerG", "pretrained_optimizerD"}
_UNUSED_DATASET = {"sigma", "sigma_test", "sigma_min", "sigma_max", "num_patches_per_image", "num_sampled"}
_UNUSED_DATASET |= {"quality_factor", "quality_factor_test", "is_color", "n_channels_datasetload"}
_UNUSED_DATASET |= {"use_flip", "use_hflip", "use_rot", "cache_data", "io_backend", "meta_info_file", "test_mode"}
_UNUSED_TRAIN = {f"{net}_regularizer_{kind}step" for net in "GD" for kind in ("orth", "clip")}
_UNUSED_TRAIN |= {f"{net}_optimizer_reuse" for net in "GD"} | {"fix_iter", "fix_lr_mul", "fix_keys"}
_UNUSED_TRAIN |= {f"G_scheduler_{what}" for what in ("periods", "restart_weights")}
_UNUSED_NETWORK = {"ng", "reduction", "bias", "r", "n_layers", "norm_type", "nf", "nc", "nb", "gc", "act_mode"}
_UNUSED_NETWORK |= {"upsample_mode", "downsample_mode", "upscale", "act_type", "use_checkpoint", "scale", "n_channels"}
_UNUSED_NETWORK |= {"in_nc", "out_nc", "in_chans", "colors", "rgb_mean"}
_UNUSED_NETWORK |= {"init_type", "init_bn_type", "init_gain"}  # of a network that is never initialised

_RENAMED_TRAIN = {"total_iter": "iterations"}
_RENAMED_SSL = {"SSL_loss_weight": "ssl_l1_weight", "SSL1_loss_weight": "ssl_kl_weight"}

# KAIR reads the names of data sets in any case, and these too.
_DATASET_ALIASES = {"super-resolution": "sr", "bsrnet": "blindsr", "bsrgan": "blindsr", "plainpatch": "plain"}
_DATASET_ALIASES |= {"low-quality": "l", "input-only": "l"} | {name.lower(): name for name in get_args(DatasetType)}

_FROM_THE_TOP = dict.fromkeys(("in_nc", "out_nc", "in_chans", "colors", "n_channels"), "n_channels")
_FROM_THE_TOP |= dict.fromkeys(("upscale", "scale"), "scale")

# What KAIR and its relatives do besides, by the names in their files: of networks, data sets, models and folders.
_OTHER_TASKS = {
    "image denoising": "dncnn dncnn3 fdncnn ffdnet ircnn drunet scunet dnpatch denoising denoising-patch "
    "denoising-noiselevel denoising-noiselevelmap denoise",
    "the removal of JPEG artifacts": "jpeg fbcnn dejpeg car",
    "the restoration of videos": "vrt rvrt basicvsr edvr videosr",
    "super-resolution of a blur and a noise that are known": "srmd dpsr dnsr usrnet usrgan",
    "super-resolution with the network IMDN": "imdn",
    "the restoration of faces": "face gpen gfpgan codeformer dfdnet",
    "a degradation that is told to the network": "plain2 plain4",
    "deblurring": "deblur deblurring deblurgan",
    "the removal of rain": "derain deraining",
    "inpainting": "inpaint inpainting",
}


def _task_of(name: Any) -> str | None:
    """The other task that the name of a network, data set, model or folder stands for."""
    lower = str(name).lower()
    if lower.startswith("video"):
        lower = "videosr"
    return next((task for task, names in _OTHER_TASKS.items() if lower in names.split()), None)


def _refuse_other_tasks(raw: dict[str, Any], source: str) -> None:
    """One line for a file that is not for super-resolution as it is done here, in place of a list of its keys."""

    def at(section: Any, key: str) -> Any:
        return section.get(key) if isinstance(section, dict) else None

    net_type, datasets = at(raw.get("netG"), "net_type"), raw.get("datasets")
    told = {"netG.net_type": net_type}
    for name, data in datasets.items() if isinstance(datasets, dict) else ():
        told[f"datasets.{name}.dataset_type"] = at(data, "dataset_type")
    told["model"] = raw.get("model")
    if isinstance(net_type, str) and net_type not in _network_classes(NetG):
        # Runs may be called as one likes, but beside a network that is not known here these names tell what it is.
        told["path.root"] = at(raw.get("path"), "root")
        told["task"] = next((w for w in re.split(r"[\W_\d]+", str(raw.get("task"))) if _task_of(w)), None)
    for key, name in told.items():
        if isinstance(name, str) and (task := _task_of(name)):
            raise UserError(
                f"{source}: {key}: {name!r} stands for {task}, which this program does not do: it trains and tests "
                f"super-resolution with the networks and data sets of options/schema.json"
            )


def _translate(raw: dict[str, Any], source: str) -> list[str]:
    """Rewrite KAIR's and the original SSL's spellings in ``raw`` into ours; return the keys that mean nothing here."""
    _refuse_other_tasks(raw, source)
    unused: list[str] = []

    def drop(section: Any, prefix: str, names: Iterable[str], known: Iterable[str] = ()) -> None:
        if isinstance(section, dict):
            for name in [n for n in section if n in names and n not in known]:
                del section[name]
                if name != "$schema":
                    unused.append(prefix + name)

    train, datasets = raw.get("train"), raw.get("datasets")
    sets: dict[str, Any] = datasets if isinstance(datasets, dict) else {}
    if raw.get("model") == "SSL":  # the KAIR fork of the original SSL code
        raw["model"] = "gan"
        if isinstance(train, dict) and train.get("ssl_mode") in ("pytorch", "cuda"):
            # There the two are one loss by two routes; here the fastest that works on this machine gives it.
            train["ssl_mode"] = "auto"
        for data in sets.values():
            # Its "bsrgan" is KAIR's pipeline with milder figures (recipes of the paper).
            if isinstance(data, dict) and data.get("degradation_type") == "bsrgan":
                data["degradation_type"] = "bsrgan_light"
    if isinstance(train, dict):
        renamed = dict(_RENAMED_SSL)
        # SSL_loss_type says which of the two terms SSL_loss_weight belongs to; both are always there.
        first = train.pop("SSL_loss_type", None)
        train.pop("SSL1_loss_type", None)
        if "kl" in str(first).lower():
            renamed = dict(zip(renamed, reversed(renamed.values()), strict=True))
        for theirs, ours in (_RENAMED_TRAIN | renamed).items():
            if theirs in train:
                if ours in train:
                    raise UserError(f"{source}: train.{theirs} and train.{ours} are one option: give one of them")
                train[ours] = train.pop(theirs)
        drop(train, "train.", _UNUSED_TRAIN)
    unused += _translate_testing(raw, source)
    drop(raw, "", _UNUSED_TOP)
    drop(raw.get("path"), "path.", _UNUSED_PATH)
    for name, data in list(sets.items()):
        if data is None:
            del sets[name]  # datasets.test=null on the command line: without this set
        elif isinstance(data, dict):
            drop(data, f"datasets.{name}.", _UNUSED_DATASET)
            given = data.get("dataset_type")
            if isinstance(given, str):
                data["dataset_type"] = _DATASET_ALIASES.get(given.lower(), given)
    for side, union in (("netG", NetG), ("netD", NetD)):
        network = raw.get(side)
        if not isinstance(network, dict):
            continue
        fields = _network_fields(union, network.get("net_type"))
        if "nf" in fields and "nc" not in fields and "nc" in network and "nf" not in network:
            network["nf"] = network.pop("nc")  # KAIR's rrdb and msrresnet write nc
        elif "nc" in fields and "nf" not in fields and "nf" in network and "nc" not in network:
            network["nc"] = network.pop("nf")
        if fields:
            for name, key in _FROM_THE_TOP.items():
                value = raw.get(key, NetworkOptions.model_fields[key].default)
                if name in network and name not in fields and network[name] != value:
                    raise UserError(f"{source}: {side}.{name}: {network[name]} contradicts {key} {value}; remove it")
            drop(network, f"{side}.", _UNUSED_NETWORK, fields)
    return unused


def _translate_testing(raw: dict[str, Any], source: str) -> list[str]:
    """The original SSL's keys of validation into section ``test``; -> those that mean nothing."""
    given = {key: raw.pop(key) for key in ("tile_process", "tile_size", "tile_pad", "save_test_image") if key in raw}
    for key, value in given.items():
        number = key in ("tile_size", "tile_pad")
        if isinstance(value, bool) == number or not isinstance(value, int) or value < 0:
            wanted = "a whole number of pixels" if number else "true or false"
            raise UserError(f"{source}: {key}: must be {wanted}, not {json.dumps(value)}")
    test = raw.setdefault("test", {}) if given else raw.get("test")
    if not isinstance(test, dict):
        return []
    if given.pop("save_test_image", True) is False:
        test.setdefault("images", 0)
    size, pad = given.get("tile_size", 0), given.get("tile_pad", 0)
    if not given.get("tile_process", size > 0):
        return [key for key in given if key != "tile_process"]
    if "tile" in test or not size:
        return list(given)
    # There a tile is what is kept of it and reads tile_pad pixels more on each side; here it is what goes through the
    # network at once, and half the overlap lies on each side.
    test.update(tile=size + 2 * pad, tile_overlap=test.get("tile_overlap", 2 * pad))
    return []


# Sections of which one key says what the others are.
_UNIONS = {"netG": (NetG, "net_type"), "netD": (NetD, "net_type"), "diffusion": (Diffusion, "type")}


def _network_classes(union: Any, tag: str = "net_type") -> dict[str, type[Section]]:
    """What ``tag`` may say -> class of the options that it stands for."""
    classes = union.__origin__.__args__
    return {name: cls for cls in classes for name in cls.model_fields[tag].annotation.__args__}


def _network_fields(union: Any, net_type: Any) -> Mapping[str, Any]:
    cls = _network_classes(union).get(net_type) if isinstance(net_type, str) else None
    return cls.model_fields if cls else {}


# ---------------------------------------------------------------------------------------------------------- reading

_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')


def strip_comments(text: str) -> str:
    """Blank out ``//`` comments outside strings; every other character keeps its line and column."""
    return _STRING_OR_COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else " " * len(m[0]), text)


_WORDS = {"none": "null", "null": "null", "nil": "null", "undefined": "null"}
_WORDS |= {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
_QUOTES = "'`\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"


def _remedy(text: str, error: json.JSONDecodeError) -> str:
    """What to do about a slip of JSON, by what stands where it was found."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip(" \t\r\n")
    line = text.splitlines()[error.lineno - 1] if before or after else ""
    word = re.match(r"[-+]?(\w+)", after)
    if re.search(r"(?<!\\)(\\\\)*\\([^\\/\"]|\"\s*([,}\]]|//|$))", line):
        return r"a backslash begins an escape: write \\ or / in paths"
    if not after:
        return "the file ends before it is complete: check brackets and quotes"
    if after.startswith(("/*", "*/", "#", "--", ";", "<!--")):
        return f"{after[:2].strip()} is no comment here: begin each line of a comment with //"
    if after[0] in _QUOTES:
        return 'check commas and quotes: texts and keys stand in double quotes, "..."'
    if not after[0].isprintable() or (after[0].isspace() or after[0] == "\ufeff"):
        return f"the character U+{ord(after[0]):04X} cannot be seen: remove it"
    if error.msg.startswith("Illegal trailing comma") or (before.endswith(",") and after[0] in "}]"):
        return "remove the comma before the bracket"
    if after[0] == ",":
        return "remove one comma"
    if error.msg.startswith(("Unterminated string", "Invalid control character")):
        return "a text ends on its line, without tabs in it: check its quotes"
    if error.msg.startswith("Extra data"):
        return "a file is one {...}: check brackets, remove what follows"
    if error.msg.startswith("Expecting ':' delimiter"):
        return "put a colon before it; check quotes"
    if re.search(r"[\d.]$", before) or re.match(r"[-+]?[.\d]|[-+][^\w]", after):
        return "write numbers as 4, 0.5 or 1e-4, and a comma after them"
    if word and word[1].lower() in _WORDS:
        return f"write {_WORDS[word[1].lower()]}"
    if word and word[1].lower() in ("inf", "infinity", "nan"):
        return "write a finite number"
    if word:
        return "check commas and quotes: texts and keys stand in double quotes"
    if error.msg.startswith("Expecting ',' delimiter"):
        return "put a comma before it; check quotes"
    return "check commas and quotes"


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give an option file with --opt"
        raise UserError(f"{path}: there is no such option file; {hint}") from None
    except UnicodeDecodeError as error:
        text, reason = "\0", f"{error.reason} at byte {error.start}"
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    else:
        reason = "it holds zero bytes"
    if "\0" in text:  # UTF-16 is full of them, with a mark at its begin or without
        raise UserError(f"{path}: cannot be read as a text file ({reason}); if it is one, save as UTF-8, not as UTF-16")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise UserError(f"{path}: the key {key!r} stands twice in one section: remove one")
            result[key] = value
        return result

    try:
        raw = json.loads(strip_comments(text), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        remedy = _remedy(text, error)
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; {remedy}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for an option file") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: an option file is one {{...}} object")
    return raw


def _override(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply ``key.path=value``; the value is read as JSON, else taken as a string."""
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"{text!r}: an override is written key.path=value, for example train.iterations=1000")
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
        section = raw
        for depth, part in enumerate(parts[:-1], 1):
            inner = section.get(part)
            if inner is None:
                inner = section[part] = {}
            if not isinstance(inner, dict):
                raise UserError(f"{text!r}: {'.'.join(parts[:depth])} is a value, not a section")
            section = inner
        section[parts[-1]] = parsed


def _fields_at(location: tuple[Any, ...]) -> Iterable[str]:
    """Names that are valid in the section at ``location``."""
    section: Any = Options
    for part in location:
        if part in _UNIONS and section is Options:
            section, tag = _UNIONS[part]
        elif part == "netR" and section is Options:
            section = RankerOptions
        elif section in (NetG, NetD, Diffusion):
            section = _network_classes(section, tag)[part]
        elif section is Options and part == "datasets":
            section = dict
        elif section is dict:
            section = DatasetOptions
        else:
            section = section.model_fields[part].annotation
    return section.model_fields if hasattr(section, "model_fields") else ()


def _nearest(name: Any, valid: Iterable[str]) -> str:
    lower = {v.lower(): v for v in valid if v not in ("is_train", "unused")}
    near = difflib.get_close_matches(str(name).lower(), lower, 1, cutoff=0.6)
    return f"did you mean {lower[near[0]]!r}?" if near else f"valid are: {', '.join(sorted(lower.values()))}"


def _explain(error: Any) -> str:
    """One line for one of pydantic's findings: full key path, what is wrong, the remedy."""
    location = tuple(error["loc"])
    shown = [str(p) for i, p in enumerate(location) if not (i == 1 and location[0] in _UNIONS)]
    # pydantic names the branch of a union it tried last; the key path ends before it.
    shown = [
        p for p in shown if not re.match(r"(int|float|str|list|constrained|function|literal)[\[(-]|^(int|str)$", p)
    ]
    key, kind, given = ".".join(shown), error["type"], error.get("input")
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}"
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(location[-1], _fields_at(location[:-1]))}"
    if kind == "missing":
        return f"{key}: is required and missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        union, tag = _UNIONS[location[0]]
        valid = _network_classes(union, tag)
        given = given.get(tag) if isinstance(given, dict) else given
        if kind == "union_tag_not_found":
            return f"{key}.{tag}: is required and missing; valid are: {', '.join(sorted(valid))}"
        what = "process" if key == "diffusion" else "network"
        return f"{key}.{tag}: {given!r} is not a {what} of this program; {_nearest(given, valid)}"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        remedy = _nearest(given, names) if names else error["msg"].replace("Input should", "it must")
        return f"{key}: {json.dumps(given)} is not valid; {remedy}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: must be a section {{...}}, not {json.dumps(given)}"
    if kind == "string_type":
        return f"{key}: must be text in double quotes, not {json.dumps(given, default=str)}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {json.dumps(given)} cannot be the name of a folder: give a plain name without / or leading dot"
    message = re.sub(
        r", not \d+$", "", error["msg"].replace("Input should be", "must be").replace("Input should", "must")
    )
    return f"{key}: {message[0].lower() + message[1:]}, not {json.dumps(given, default=str)}"


def _validate(cls: type[Any], raw: dict[str, Any], source: str) -> Any:
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        found = list(dict.fromkeys(_explain(e) for e in error.errors()))
        # A wrong value in a union is reported once per branch; the first line says it all for one key.
        found = list({line.split(":")[0]: line for line in reversed(found)}.values())[::-1]
        more = f" (and {len(found) - 1} more: {', '.join(f.split(':')[0] for f in found[1:4])})" if found[1:] else ""
        raise UserError(f"{source}: {found[0]}{more}") from None


# -------------------------------------------------------------------------------------------------------- resolving


def _with_top(network: Any, top: Any, side: str, source: str) -> Any:
    """Channels and scale come from the top of the file; a network that states other numbers contradicts it."""
    update = {}
    for name, key in _FROM_THE_TOP.items():
        if name in type(network).model_fields:
            given, value = getattr(network, name), getattr(top, key)
            if given not in (None, value):
                raise UserError(f"{source}: {side}.{name}: {given} contradicts {key} {value}; remove it")
            update[name] = value
    return network.model_copy(update=update)


def _newest(folder: Path, networks: str) -> Path | None:
    """The last step's file of the first of ``networks`` that ``folder`` or its ``models`` holds."""
    for network in networks:
        own = [*folder.glob(f"*_{network}.pth"), *(folder / "models").glob(f"*_{network}.pth")]
        if own:
            return max(own, key=lambda file: (len(file.name), file.name))
    return None


def _with_checkpoint(opt: Options, source: str) -> Options:
    """Where the network is built from a checkpoint: which, the pretrained one or, that one gone, the run's newest.

    The scale and the channels are then the checkpoint's, unless the options state them.
    """
    netG, path = opt.netG, opt.path.pretrained_netG
    if not isinstance(netG, SpandrelOptions):
        return opt
    if netG.path not in (None, path):
        raise UserError(f"{source}: netG.path: {netG.path} contradicts path.pretrained_netG {path}; remove it")
    if opt.is_train and not (path and Path(path).is_file()) and (own := _newest(opt.task_dir, "G")):
        path = str(own)
        opt = opt.model_copy(update={"path": opt.path.model_copy(update={"pretrained_netG": path})})
    update: dict[str, Any] = {"netG": netG.model_copy(update={"path": path})}
    left_open = {"scale", "n_channels"} - opt.model_fields_set
    given = Path(path) if path else opt.task_dir
    file = given if given.is_file() else _newest(given, "EG")
    if left_open and file:
        from utils.utils_spandrel import describe_checkpoint  # reads weights: only where they decide

        found = describe_checkpoint(file)
        of_checkpoint = {"scale": found.scale, "n_channels": found.input_channels}
        update |= {key: of_checkpoint[key] for key in left_open}
    return opt.model_copy(update=update)


def _filled_in(name: str, data: DatasetOptions, opt: Options, source: str) -> DatasetOptions:
    """A data set with what comes from the top of the file; a set that states something else contradicts it."""
    known = {
        "phase": "train" if name == "train" else "test",
        "scale": opt.scale,
        "n_channels": opt.n_channels,
        "seed": opt.train.manual_seed or 0,
    }
    for key, value in known.items():
        if key in data.model_fields_set and data[key] != value:
            where = "train.manual_seed" if key == "seed" else key if key != "phase" else "the set's name"
            raise UserError(f"{source}: datasets.{name}.{key}: {data[key]!r} contradicts {where}, {value!r}; remove it")
    return data.model_copy(update={**known, "name": data.name or name})


def is_read(opt: Options) -> dict[str, dict[str, bool]]:
    """Of a training run: section -> option -> whether anything looks at it; of those that not every run looks at.

    train.checkpoint_test is not among them: the recipes say it for the test set that their user may add.
    """
    train = opt.train
    ranker, gan, dm = opt.model == "ranker", opt.model in ("gan", "spsr"), opt.model == "dm"
    sr, trains_D = not ranker, gan and train.D_lossfn_weight + train.gradient_D_lossfn_weight > 0
    with_ssl = sr and (train.ssl_l1_weight > 0 or train.ssl_kl_weight > 0)
    with_F = sr and train.F_lossfn_weight > 0
    with_R = ranker or train.rank_weight > 0
    data = opt.train_set
    masks_from_files = data is not None and data.dataset_type.endswith("mask") and data.dataroot_H_mask is not None

    sections = {
        "": {"netG": sr, "netD": gan, "netR": with_R, "autoencoder": dm, "test": sr},
        "path": {
            "pretrained_netG": sr,
            "pretrained_netD": gan,
            "pretrained_netE": sr and train.E_decay > 0,
            "pretrained_netR": with_R,
            "pretrained_netF": with_F,
        },
        "test": {"tile_overlap": opt.test.tile > 0},
        "autoencoder": dict.fromkeys(("precision", "use_checkpoint"), opt.autoencoder.type != "pixel"),
    }
    for side in ("netG", "netD", "netR"):
        network = opt[side]
        if isinstance(network, _Network):
            sections[side] = dict.fromkeys(("init_bn_type", "init_gain"), network.init_type != "default")
        if isinstance(network, ELANOptions):
            sections[side]["rgb_mean"] = opt.n_channels == 3
        if isinstance(network, UNet2DOptions):
            sections[side]["attention_head_dim"] = network.mid_attention or any(network.attention)
        if isinstance(network, ResShiftUNetOptions):
            sections[side]["lq_size"] = network.cond_lq
    for name, one in opt.datasets.items():
        sections[f"datasets.{name}"] = _is_read_of(one)
    sides = {"G": sr, "D": trains_D, "R": ranker}
    sections["train"] = {
        **dict.fromkeys(("G_lossfn_weight", "F_lossfn_weight", "lpips_weight", "ssl_l1_weight", "ssl_kl_weight"), sr),
        **dict.fromkeys(("gradient_weight", "branch_weight", "rank_weight", "ldl_weight", "E_decay"), sr),
        **dict.fromkeys(("best_buddy_weight", "back_projection_weight"), sr),
        **dict.fromkeys(("G_lossfn_type", "l1_gt_usm"), sr and train.G_lossfn_weight > 0),
        "G_charbonnier_eps": sr and train.G_lossfn_weight > 0 and train.G_lossfn_type == "charbonnier",
        "percep_gt_usm": with_F,
        **{name: with_F for name in TrainOptions.model_fields if name.startswith("F_") and name != "F_lossfn_weight"},
        **dict.fromkeys(("D_lossfn_weight", "gradient_D_lossfn_weight", "D_init_iters", "D_update_ratio"), gan),
        "gan_type": trains_D,
        "region_aware": gan and train.D_lossfn_weight > 0,
        **dict.fromkeys(("ssl_mode", "search_border", "kernel_size_search", "kernel_size_window"), with_ssl),
        **dict.fromkeys(("sigma", "generalization", "mask_stride"), with_ssl),
        "mask_threshold": with_ssl and not masks_from_files,
        "rank_published": sr and train.rank_weight > 0,
        "dm_weight": dm,
        **{
            f"{side}_{name}": used
            for side, used in sides.items()
            for name in ("optimizer_type", "optimizer_lr", "optimizer_betas", "optimizer_wd", "optimizer_clipgrad")
        },
        **dict.fromkeys(("G_scheduler_type", "G_scheduler_warmup"), sr),
        "G_scheduler_eta_min": sr and train.G_scheduler_type == "CosineAnnealingLR",
        "G_scheduler_milestones": sr and train.G_scheduler_type == "MultiStepLR",
        "D_scheduler_milestones": trains_D,
        "R_scheduler_milestones": ranker,
    }
    for side in sides:
        milestones = f"{side}_scheduler_milestones"
        sections["train"][f"{side}_scheduler_gamma"] = sections["train"][milestones] and bool(train[milestones])
    for side in "GDE":
        pretrained = f"pretrained_net{side}"
        sections["train"][f"{side}_param_strict"] = sections["path"][pretrained] and bool(opt.path[pretrained])
    return sections


def _is_read_of(data: DatasetOptions) -> dict[str, bool]:
    """As :func:`is_read`, of one data set."""
    kind, training = data.dataset_type.removesuffix("mask"), data.phase == "train"
    blind, rank, masked = kind == "blindsr", kind == "rank", kind != data.dataset_type
    return {
        "dataroot_H": kind not in ("l", "rank"),
        "dataroot_L": not (blind or rank),
        "dataroot_H_mask": masked,
        "mask_augment": masked and training,
        **dict.fromkeys(("dataroot_ranked", "rank_csv"), rank),
        **dict.fromkeys(("rank_metric", "rank_higher_better"), rank and data.rank_csv is not None),
        **dict.fromkeys(("H_size", "dataloader_shuffle", "dataloader_num_workers", "dataloader_batch_size"), training),
        **dict.fromkeys(("lq_patchsize", "degradation_device", "pair_pool"), blind and training),
        **dict.fromkeys(("degradation_type", "use_sharp"), blind),
        "shuffle_prob": blind and data.degradation_type == "bsrgan_plus",
        "camera_prob": blind and data.degradation_type.startswith("bsrgan") and data.n_channels == 3,
    }


def _unread(opt: Options) -> Iterator[str]:
    """What differs from its default although nothing looks at it in this training run."""
    read = is_read(opt)
    for place, fields in read.items():
        section: Any = opt
        for part in place.split(".") if place else ():
            section = section[part]
        if place and not read[""].get(place, True):
            continue  # the whole section is named
        for name, used in fields.items():
            if not used and section[name] != type(section).model_fields[name].default:
                yield f"{place}.{name}" if place else name


def patch_size(data: DatasetOptions) -> int:
    """Side of the H patch that reaches the losses, in pixels."""
    if data.lq_patchsize and data.dataset_type.startswith("blindsr"):
        return data.lq_patchsize * data.scale
    return data.H_size


def fidelity_weight(train: TrainOptions) -> float:
    """The sum of what ModelSR.fidelity_terms weighs, but for the perceptual loss."""
    weighed = ("G_lossfn", "lpips", "gradient", "branch", "ldl", "best_buddy", "back_projection", "rank")
    return sum(train[f"{name}_weight"] for name in (*weighed, "ssl_l1", "ssl_kl"))


def _problems(opt: Options) -> Iterator[str]:
    """What is valid key by key but cannot work together: the first of these is the error."""
    train, data = opt.train, opt.train_set
    for name in opt.test_sets:
        if not re.fullmatch(r"(test|val)[^/\\.\x00-\x1f]*", name):  # it becomes part of a file's name
            yield f"datasets.{name}: a set is called train, or its name begins with test or val, without / or dot"
    if opt.model == "ranker":
        yield from _ranker_problems(opt)
        return
    if opt.netG is None:
        yield "netG: is required and missing"
        return
    scales = {
        "rrdbnet_basicsr": (1, 2, 4),
        "srvgg_compact": range(1, 9),
        "swinir": (1, 2, 3, 4, 8),
        "elan": range(1, 9),
        "spandrel": range(1, 9),
    }.get(opt.netG.net_type, range(1, 9) if isinstance(opt.netG, DiffusionNetwork) else (2, 3, 4))
    if opt.scale not in scales:
        yield f"scale: {opt.netG.net_type} is made for scales {', '.join(map(str, scales))}, not {opt.scale}"
    for name, d in opt.datasets.items():
        key = f"datasets.{name}"
        if d.dataset_type == "rank":
            yield f"{key}.dataset_type: rank is for model ranker, not {opt.model}"
        if name == "train" and d.dataset_type == "l":
            yield f"{key}.dataset_type: l has no ground truth to train on; use sr, blindsr or plain"
        if d.dataset_type == "l" and d.dataroot_L is None:
            yield f"{key}.dataroot_L: is required for dataset_type l: the folder of the images to restore"
        if re.match("plain|multiLR_oneGT", d.dataset_type) and (d.dataroot_L is None or d.dataroot_H is None):
            yield f"{key}: dataset_type {d.dataset_type} needs both dataroot_L and dataroot_H"
        if d.dataset_type != "l" and d.dataroot_H is None:
            yield f"{key}.dataroot_H: is required: the folder of the ground-truth images"
        if name == "train" and d.dataroot_H_mask and not d.dataset_type.endswith("mask"):
            yield f"{key}.dataroot_H_mask: is read by dataset_type {d.dataset_type}mask only, not {d.dataset_type}"
        if name == "train" and d.H_size % opt.scale:
            yield f"{key}.H_size: {d.H_size} must be divisible by scale {opt.scale}"
        if name == "train" and d.lq_patchsize and d.lq_patchsize * opt.scale > d.H_size:
            yield f"{key}.lq_patchsize: {d.lq_patchsize} x scale {opt.scale} is larger than H_size {d.H_size}"
    if (opt.model == "dm") != isinstance(opt.netG, DiffusionNetwork):
        of_dm = [name for name, cls in _network_classes(NetG).items() if issubclass(cls, DiffusionNetwork)]
        yield (
            f"netG.net_type: {opt.netG.net_type} is no network for model {opt.model}; those of model dm are: "
            f"{', '.join(sorted(of_dm))}"
        )
    if opt.model == "dm":
        if opt.diffusion is None:
            yield "diffusion: is required for model dm: the process, of type resshift, ddpm or onestep"
            return
        if (opt.autoencoder.type == "pixel") != (opt.autoencoder.path is None):
            yield f"autoencoder.path: {opt.autoencoder.path}: type pixel has none, types vq and kl need one"
        if opt.autoencoder.type != "pixel" and opt.n_channels != 3:
            yield f"n_channels: autoencoder.type {opt.autoencoder.type} is for RGB images, 3, not {opt.n_channels}"
        if isinstance(opt.netG, ResShiftUNetOptions) and opt.netG.cond_lq and opt.n_channels != 3:
            yield f"n_channels: resshift_unet_swin looks at an RGB image, 3 channels, not {opt.n_channels}"
        if isinstance(opt.netG, UNet2DOptions) and opt.netG.residual and opt.diffusion.type == "ddpm":
            yield "netG.residual: diffusion.type ddpm predicts noise, not what y lacks; set it to false"
        process = {"stablesr": "ddpm", "sd_lora": "onestep"}.get(opt.netG.net_type, opt.diffusion.type)
        if opt.diffusion.type != process:
            yield f"diffusion.type: {opt.netG.net_type} is made for {process}, not {opt.diffusion.type}"
        t = opt.diffusion.timestep if isinstance(opt.diffusion, OneStepOptions) else 0
        if opt.netG.net_type == "sd_lora" and t > 999:
            yield f"diffusion.timestep: Stable Diffusion has times 0 to 999, not {t}"
        count, wanted = getattr(opt.diffusion, "steps", 1), opt.diffusion.sample_steps
        if wanted and wanted > count:
            yield f"diffusion.sample_steps: {wanted} must not exceed the process's steps, {count}"
    elif opt.diffusion is not None:
        yield f"diffusion: is for model dm, not {opt.model}; remove it, or set model"
    if opt.test.tile and opt.test.tile_overlap >= opt.test.tile:
        yield f"test.tile_overlap: {opt.test.tile_overlap} must be smaller than test.tile {opt.test.tile}"
    if not opt.is_train:
        return
    if data is None:
        yield "datasets.train: is required for training"
        return
    if opt.netG.net_type == "spandrel" and opt.netG.path is None:
        yield "path.pretrained_netG: is required for net_type spandrel: the checkpoint that the network is built from"
    yield from _dm_problems(opt)
    is_blind = data.dataset_type.startswith("blind")
    if data.degradation_device == "gpu" and not is_blind:
        yield "datasets.train.degradation_device: gpu is for dataset_type blindsr; remove it"
    if data.pair_pool and data.degradation_device == "cpu":
        yield "datasets.train.pair_pool: is for degradation_device gpu; set it, or pair_pool to 0"
    if data.pair_pool % data.dataloader_batch_size:
        yield f"datasets.train.pair_pool: {data.pair_pool} must divide by the batch, {data.dataloader_batch_size}"
    gives_H_usm = data.use_sharp and is_blind and not data.degradation_type.startswith("bsrgan")
    for name in ("l1_gt_usm", "percep_gt_usm"):
        if train[name] and not gives_H_usm:
            yield f"train.{name}: needs datasets.train.use_sharp and degradation_type realesrgan, which make H_usm"
    for name in ("kernel_size_search", "kernel_size_window"):
        if getattr(train, name) % 2 == 0:
            yield f"train.{name}: must be odd, not {getattr(train, name)}"
    if train.kernel_size_window > train.kernel_size_search:
        yield (
            f"train.kernel_size_window: {train.kernel_size_window} must not be larger than "
            f"kernel_size_search {train.kernel_size_search}"
        )
    size = patch_size(data)
    with_ssl = train.ssl_l1_weight > 0 or train.ssl_kl_weight > 0
    margin = train.kernel_size_search // 2 + (train.kernel_size_window // 2 if train.search_border == "image" else 0)
    if with_ssl and size <= margin:
        yield f"train.kernel_size_search: {train.kernel_size_search} needs patches larger than {margin} px, not {size}"
    yield from _betas_problems(train, "GD")
    layers = train.F_feature_layer if isinstance(train.F_feature_layer, list) else [train.F_feature_layer]
    weights = train.F_weights if isinstance(train.F_weights, list) else [train.F_weights]
    if len(layers) != len(weights):
        yield f"train.F_weights: {len(weights)} weights for {len(layers)} layers in F_feature_layer"
    if not layers:
        yield "train.F_feature_layer: names no layer; give at least one, or set train.F_lossfn_weight to 0"
    for layer in layers:
        if not 0 <= layer <= 36:
            yield f"train.F_feature_layer: {layer} is not an index into vgg19.features (0 to 36)"
    halvings = sum(max(layers) >= pool for pool in (4, 9, 18, 27, 36))
    if train.F_lossfn_weight and size < 2**halvings:
        yield f"train.F_feature_layer: {max(layers)} needs patches of at least {2**halvings} pixels, not {size}"
    if train.ldl_weight and not train.E_decay:
        yield "train.ldl_weight: the artifact map needs the averaged generator: set train.E_decay"
    if train.best_buddy_weight and size < 12:
        yield f"train.best_buddy_weight: needs patches of at least 12 pixels, not {size}"
    if train.branch_weight and opt.netG.net_type != "spsr":
        yield f"train.branch_weight: {opt.netG.net_type} has no gradient branch; use netG.net_type spsr, or set it to 0"
    if train.gradient_D_lossfn_weight and opt.model != "spsr":
        yield f"train.gradient_D_lossfn_weight: model {opt.model} has no second discriminator; use model spsr"
    if train.rank_weight:
        if opt.netR is None:
            yield "netR: is required for train.rank_weight > 0: the ranker (ranker_vgg12)"
        if opt.path.pretrained_netR is None:
            yield "path.pretrained_netR: is required for train.rank_weight > 0: the trained ranker"
        if size < 32:
            yield f"train.rank_weight: the ranker needs patches of at least 32 pixels, not {size}"
    fidelity = fidelity_weight(train)
    if opt.model == "plain" and not fidelity:
        yield "train.G_lossfn_weight: all losses of the generator have weight 0: nothing to train"
    if opt.model == "dm" and not (fidelity or train.F_lossfn_weight or train.dm_weight):
        yield "train.dm_weight: all losses of the generator have weight 0: nothing to train"
    if opt.model in ("gan", "spsr"):
        if not (fidelity or train.F_lossfn_weight or train.D_lossfn_weight or train.gradient_D_lossfn_weight):
            yield "train: all losses of the generator have weight 0: nothing to train"
        if opt.netD is None:
            yield f"netD: is required for model {opt.model} (for example discriminator_unet)"
        elif opt.netD.net_type in ("discriminator_unet", "discriminator_unet_sn") and size % 8:
            yield f"netD.net_type: {opt.netD.net_type} takes patches divisible by 8, not {size}"
        elif isinstance(opt.netD, VGGStyleDiscriminatorOptions) and opt.netD.input_size != size:
            yield f"netD.input_size: {opt.netD.input_size} takes patches of {opt.netD.input_size} pixels, not {size}"
        elif (only := re.search(r"vgg_(\d+)", opt.netD.net_type)) and int(only[1]) != size:
            yield f"netD.net_type: {opt.netD.net_type} takes patches of {only[1]} pixels, not {size}"


def _betas_problems(train: TrainOptions, sides: str) -> Iterator[str]:
    for side in sides:
        betas = train[f"{side}_optimizer_betas"]
        if not all(0 <= b < 1 and math.isfinite(b) for b in betas):
            yield f"train.{side}_optimizer_betas: each must lie in [0, 1), not {betas}"


def _ranker_problems(opt: Options) -> Iterator[str]:
    """As _problems, of model ranker."""
    if not opt.is_train:
        yield "model: a ranker restores no images; it is for path.pretrained_netR of a generator's training"
    if opt.netR is None:
        yield "netR: is required for model ranker (ranker_vgg12)"
    if opt.train_set is None:
        yield "datasets.train: is required for training"
    for name, data in opt.datasets.items():
        key, folders = f"datasets.{name}", data.dataroot_ranked
        if data.dataset_type != "rank":
            yield f"{key}.dataset_type: model ranker learns from rank, not {data.dataset_type}"
        if (folders is None) == (data.rank_csv is None):
            yield f"{key}.dataroot_ranked: give either this, folders of results with the best first, or rank_csv"
        if folders is not None and len({Path(folder) for folder in folders}) < max(2, len(folders)):
            yield f"{key}.dataroot_ranked: takes two folders or more, the best first, each once, not {folders}"
        if data.degradation_device == "gpu" or data.pair_pool:
            yield f"{key}.degradation_device: gpu, and pair_pool, are for dataset_type blindsr; remove them"
        if name == "train" and data.H_size < 32:
            yield f"{key}.H_size: the ranker needs patches of at least 32 pixels, not {data.H_size}"
    yield from _betas_problems(opt.train, "R")
    yield from _dm_problems(opt)


def _dm_problems(opt: Options) -> Iterator[str]:
    """As _problems: what training a diffusion model needs, and what only it can have."""
    train, micro = opt.train, opt.train.micro_batch
    if train.G_scheduler_type == "CosineAnnealingLR":
        if train.iterations is None:
            yield "train.iterations: is required for CosineAnnealingLR, which ends there"
        elif train.G_scheduler_warmup >= train.iterations:
            yield f"train.G_scheduler_warmup: {train.G_scheduler_warmup}: iterations, {train.iterations}, must be more"
    if opt.model != "dm":
        if train.precision != "fp32" or micro:
            yield f"train.{'micro_batch' if micro else 'precision'}: is for model dm, not {opt.model}; remove it"
        return
    for name in ("ldl", "branch", "rank", "D_lossfn", "gradient_D_lossfn"):
        if train[f"{name}_weight"]:
            yield f"train.{name}_weight: model dm has no such loss; set it to 0"
    if micro and train.G_lossfn_type == "l2sum":
        yield "train.micro_batch: l2sum is a sum over the batch, which pieces would change; use l2"


def parse(path: str | Path, is_train: bool = True, overrides: Iterable[str] = ()) -> Options:
    """Read, override, check and resolve an option file.

    Args:
        path: the JSON file; ``//`` starts a comment outside strings.
        is_train: whether the file is used for training; testing needs no training set and no discriminator.
        overrides: ``key.path=value`` strings, applied in order on top of the file.

    Returns:
        The frozen options; keys that were accepted but mean nothing here are listed in ``unused``.

    Raises:
        UserError: one line with the file, the full key path, what is wrong and the nearest valid name.
    """
    source = str(path)
    raw = _read(Path(path))
    _override(raw, overrides)
    for filled_in in ("is_train", "unused"):
        raw.pop(filled_in, None)  # a run's own saved options can be given again
    unused = _translate(raw, source)
    if not is_train:
        raw.pop("netD", None)
    opt: Options = _validate(Options, raw, source)
    opt = _with_checkpoint(opt.model_copy(update={"is_train": is_train}), source)

    opt = opt.model_copy(
        update={
            "unused": unused,
            "datasets": {name: _filled_in(name, data, opt, source) for name, data in opt.datasets.items()},
            "netG": opt.netG and _with_top(opt.netG, opt, "netG", source),
            "netD": opt.netD and _with_top(opt.netD, opt, "netD", source),
            "netR": opt.netR and _with_top(opt.netR, opt, "netR", source),
        }
    )
    for problem in _problems(opt):
        raise UserError(f"{source}: {problem}")
    return opt.model_copy(update={"unused": [*unused, *_unread(opt)]}) if is_train else opt


def network_options(raw: Mapping[str, Any]) -> NetworkOptions:
    """Check a plain dict with ``scale``, ``n_channels``, ``is_train``, ``netG`` and/or ``netD``; see ``define_G``."""
    names = NetworkOptions.model_fields
    picked = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items() if k in names}
    source = "network options"
    _translate(picked, source)
    opt: NetworkOptions = _validate(NetworkOptions, picked, source)
    update = {
        side: _with_top(network, opt, side, source)
        for side, network in (("netG", opt.netG), ("netD", opt.netD))
        if network is not None
    }
    return opt.model_copy(update=update)


def schema() -> dict[str, Any]:
    """The JSON schema of an option file, for editors."""
    result = Options.model_json_schema()
    for filled_in in ("is_train", "unused"):
        del result["properties"][filled_in]
    result["properties"]["$schema"] = {"type": "string", "description": "this schema's path, for editors"}
    return result


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
