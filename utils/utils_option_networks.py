"""Options of the networks: a class for each, and what is known of a network before it is built.

``netG.net_type`` and ``netD.net_type`` choose the class. What a network can do at all (its scales, the patches it
takes) stands on its class as data, with which utils_option_checks compares the other options.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def integral(value: Any) -> Any:
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


def plain_path(value: str | list[str]) -> str | list[str]:
    """``"D:\\train"`` with one backslash is valid JSON: it holds a tab."""
    for path in [value] if isinstance(value, str) else value:
        longest = max(len(name.encode("utf-8", "surrogatepass")) for name in re.split(r"[/\\]", path))
        if len(path) > 4000 or longest > 255:
            raise ValueError(f"of {len(path)} characters is too long, or a name in it; names have 255 bytes at most")
        if re.search(r"[\x00-\x1f\x7f]", path):
            raise ValueError(f"{json.dumps(path)} holds a control character, which {_BACKSLASH}")
    return value


def at_home(value: str | list[str]) -> str | list[str]:
    """``~`` in front is the home folder, as in KAIR."""
    return os.path.expanduser(value) if isinstance(value, str) else [os.path.expanduser(path) for path in value]


_BACKSLASH = r"a single backslash makes of the letter after it; write \\ or / in paths"
# The largest numbers only keep out what no machine could compute or count.
Channels = Annotated[Literal[1, 3], BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(integral), Field(ge=0, le=10**15)]
Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, BeforeValidator(integral), Field(ge=1, le=10**15)]
Pixels = Annotated[int, BeforeValidator(integral), Field(ge=1, le=65536)]
Features = Annotated[int, BeforeValidator(integral), Field(ge=1, le=16384)]
Blocks = Annotated[int, BeforeValidator(integral), Field(ge=1, le=1024)]
Window = Annotated[int, BeforeValidator(integral), Field(ge=1, le=64)]
Seed = Annotated[int, BeforeValidator(integral), Field(ge=0, lt=2**32)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False), AfterValidator(_not_tiny)]
PathText = Annotated[str, AfterValidator(plain_path), AfterValidator(at_home)]
Paths = Annotated[str | list[str], AfterValidator(plain_path), AfterValidator(at_home)]
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


class _IsGenerator(Section):
    """What is known of a generator."""

    scales: ClassVar[Collection[int]] = range(1, 9)
    has_gradient_branch: ClassVar[bool] = False


class Network(Section):
    init_type: InitType = Field("default", description='weight initialisation; "default" keeps the network\'s own')
    init_bn_type: Literal["uniform", "constant"] = Field("uniform", description="initialisation of batch norms")
    init_gain: Rate = Field(0.2, description="gain of init_type")


class ImageNetworkOptions(Network, _IsGenerator):
    scales: ClassVar[Collection[int]] = (2, 3, 4)
    in_nc: Features | None = Field(None, description="input channels; null = n_channels")
    out_nc: Features | None = Field(None, description="output channels; null = n_channels")


class _RRDBNetBase(ImageNetworkOptions):
    nf: Features = Field(64, description="features")
    nb: Blocks = Field(23, description="residual-in-residual dense blocks")
    gc: Features = Field(32, description="growth channels of a dense block")
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class RRDBNetOptions(_RRDBNetBase):
    net_type: Literal["rrdbnet"] = Field("rrdbnet", description="RRDBNet of ESRGAN and BSRGAN, scales 2, 3, 4")


class RRDBNetBasicSROptions(_RRDBNetBase):
    scales = (1, 2, 4)
    net_type: Literal["rrdbnet_basicsr"] = Field(
        "rrdbnet_basicsr", description="RRDBNet with BasicSR's names; scales 2 and 1 start with a pixel-unshuffle"
    )


class SPSROptions(_RRDBNetBase):
    has_gradient_branch = True
    net_type: Literal["spsr"] = Field("spsr", description="SPSRNet, guided by a branch that enlarges the gradient")
    nb: Annotated[int, BeforeValidator(integral), Field(ge=20, le=1024)] = Field(
        23, description="blocks; the branch needs 20"
    )
    upsample_mode: Literal["upconv", "pixelshuffle", "convtranspose"] = Field("upconv", description="upsampling")


class RRDBOptions(ImageNetworkOptions):
    net_type: Literal["rrdb"] = Field("rrdb", description="KAIR's RRDB, sequential names")
    nf: Features = Field(64, description="features (KAIR: nc)")
    nb: Blocks = Field(23, description="residual-in-residual dense blocks")
    gc: Features = Field(32, description="growth channels of a dense block")
    act_mode: ActMode = Field("L", description="R = ReLU, L = LeakyReLU; B or I before it = batch or instance norm")
    upsample_mode: Literal["upconv", "pixelshuffle", "convtranspose"] = Field("upconv", description="upsampling")


class MSRResNetOptions(ImageNetworkOptions):
    net_type: Literal["msrresnet0", "msrresnet1"] = Field("msrresnet1", description="KAIR's SRResNet variants")
    nc: Features = Field(64, description="features")
    nb: Blocks = Field(16, description="residual blocks")
    act_mode: ActMode = Field("R", description="R = ReLU, L = LeakyReLU; B or I before it = batch or instance norm")
    upsample_mode: Literal["upconv", "pixelshuffle", "convtranspose"] = Field("upconv", description="upsampling")


class RankSRGANSRResNetOptions(ImageNetworkOptions):
    net_type: Literal["ranksrgan_srresnet"] = Field("ranksrgan_srresnet", description="SRResNet of RankSRGAN")
    nf: Features = Field(64, description="features")
    nb: Blocks = Field(16, description="residual blocks")


class SRVGGOptions(ImageNetworkOptions):
    scales = range(1, 9)
    net_type: Literal["srvgg_compact"] = Field("srvgg_compact", description="small and fast, of Real-ESRGAN")
    nf: Features = Field(64, description="features")
    nc: Blocks = Field(16, description="number of convolutions between the first and the last")
    act_type: Literal["prelu", "relu", "leakyrelu"] = Field("prelu", description="activation")


class SwinIROptions(Network, _IsGenerator):
    scales = (1, 2, 3, 4, 8)
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


class ELANOptions(Network, _IsGenerator):
    net_type: Literal["elan"] = Field("elan", description="ELAN, arXiv 2203.06697")
    colors: Features | None = Field(None, description="image channels; null = n_channels")
    window_sizes: list[Window] = Field(
        [4, 8, 16], description="a window for each group of channels", min_length=1, max_length=64
    )
    m_elan: Blocks = Field(36, description="attention blocks")
    c_elan: Features = Field(180, description="features; divide by the number of windows")
    n_share: Annotated[int, BeforeValidator(integral), Field(ge=0, le=1024)] = Field(
        0, description="blocks after each one that attend with its queries"
    )
    r_expand: Blocks = Field(2, description="widening of the local features")
    img_range: Rate = Field(255.0, description="factor of the input")
    rgb_mean: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None, description="subtracted from RGB images; null = the mean of DIV2K", min_length=3, max_length=3
    )
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class DiffusionNetwork(Network, _IsGenerator):
    """A network of model dm: ``netG(x, t, y, L)``, see models/sampler.py."""

    process: ClassVar[str | None] = None  # the only diffusion.type that it is made for
    last_timestep: ClassVar[int | None] = None


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
    base_precision: Precision = Field(
        "fp32", description="what its weights are kept and computed with in; the trained ones are kept in fp32"
    )
    use_checkpoint: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")


class StableSROptions(_StableDiffusionNetwork):
    process = "ddpm"
    net_type: Literal["stablesr"] = Field(
        "stablesr", description="StableSR, arXiv 2305.07015: Stable Diffusion guided by the latent of L"
    )
    model_channels: Features = Field(256, description="features of the structural encoder")
    channel_mult: list[Blocks] = Field(
        [1, 1, 2, 2], description="in units of them, level by level", min_length=1, max_length=64
    )
    num_heads: Features = Field(4, description="heads of its attention")


class SDLoRAOptions(_StableDiffusionNetwork):
    process = "onestep"
    last_timestep = 999
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


class SpandrelOptions(_IsGenerator):
    net_type: Literal["spandrel"] = Field(
        "spandrel",
        description="any architecture that spandrel knows, as path.pretrained_netG holds it; scale and n_channels may "
        "be left out: they are the checkpoint's",
    )
    path: PathText | None = Field(
        None, exclude=True, description="filled in: the checkpoint that the network is built from"
    )


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


class _Discriminator(Network):
    patch_multiple: ClassVar[int] = 1  # sides of patches divide by it

    in_nc: Features | None = Field(None, description="input channels; null = n_channels")
    base_nc: Features = Field(64, description="features of the first layer")

    @property
    def patch_side(self) -> int | None:
        """The only patch size in pixels that it takes; None = any."""
        return None


class UNetDiscriminatorOptions(_Discriminator):
    patch_multiple = 8
    net_type: Literal["discriminator_unet", "discriminator_unet_sn"] = Field(
        "discriminator_unet",
        description="U-Net with spectral norm, one logit per pixel; patches divisible by 8. ..._sn is BasicSR's name",
    )
    skip_connection: bool = Field(True, description="add the features of the way down to those of the way up")


class UNetSmallDiscriminatorOptions(_Discriminator):
    net_type: Literal["discriminator_unet_sn_v1"] = Field(
        "discriminator_unet_sn_v1", description="a small U-Net for patches of any size, which no recipe uses"
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

    @property
    def patch_side(self) -> int:
        """The number in its name."""
        return int(self.net_type.rpartition("_")[2])


class VGGStyleDiscriminatorOptions(_Discriminator):
    net_type: Literal["discriminator_vgg_style"] = Field(
        "discriminator_vgg_style",
        description="BasicSR's VGG style, of ESRGAN, SPSR, LDL, BebyGAN (192), RankSRGAN (296)",
    )
    input_size: Literal[128, 192, 256, 296] = Field(128, description="the only patch size it takes")
    norm_type: Literal["batch", "spectral"] = Field("batch", description="normalisation; published: batch")

    @property
    def patch_side(self) -> int:
        """As the options say."""
        return self.input_size


class VGG128SNOptions(_Discriminator):
    net_type: Literal["discriminator_vgg_128_SN"] = Field(
        "discriminator_vgg_128_SN", description="VGG style with spectral norm, patches of 128"
    )

    @property
    def patch_side(self) -> int:
        """As its name says."""
        return 128


NetD = Annotated[
    UNetDiscriminatorOptions
    | UNetSmallDiscriminatorOptions
    | PatchGANOptions
    | VGGDiscriminatorOptions
    | VGGStyleDiscriminatorOptions
    | VGG128SNOptions,
    Field(discriminator="net_type"),
]


class RankerOptions(Network):
    net_type: Literal["ranker_vgg12"] = Field("ranker_vgg12", description="RankSRGAN's ranker")
    in_nc: Features | None = Field(None, description="input channels; null = n_channels")
    base_nc: Features = Field(64, description="features of the first layer")


def network_classes(union: Any, tag: str = "net_type") -> dict[str, type[Section]]:
    """What ``tag`` may say -> class of the options that it stands for."""
    classes = union.__origin__.__args__
    return {name: cls for cls in classes for name in cls.model_fields[tag].annotation.__args__}


def network_fields(union: Any, net_type: Any) -> Mapping[str, Any]:
    cls = network_classes(union).get(net_type) if isinstance(net_type, str) else None
    return cls.model_fields if cls else {}
