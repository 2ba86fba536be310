"""From ``netG.net_type`` and ``netD.net_type`` to networks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import init

from models.network_discriminator import (
    DiscriminatorPatchGAN,
    DiscriminatorUNet,
    DiscriminatorUNetSmall,
    DiscriminatorVGG,
    DiscriminatorVGG128SN,
    DiscriminatorVGGStyle,
)
from models.network_elan import ELAN
from models.network_msrresnet import MSRResNet0, MSRResNet1
from models.network_ranksrgan import RankerVGG12, RankSRGANSRResNet
from models.network_resshift import UNetModelSwin
from models.network_rrdb import RRDB
from models.network_rrdbnet import RRDBNet, RRDBNetBasicSR
from models.network_sd_lora import SDLoRA
from models.network_spandrel import load_spandrel
from models.network_spsr import SPSRNet
from models.network_srvgg import SRVGGNetCompact
from models.network_stablesr import StableSR
from models.network_swinir import SwinIR
from models.network_unet2d import UNet2D
from models.stable_diffusion import load_stable_diffusion
from utils.utils_error import UserError
from utils.utils_option import Options, network_options, patch_size


@contextmanager
def _one_line(side: str, net_type: str) -> Iterator[None]:
    """What a network cannot be built with, or where, is the user's to change."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{side}: {net_type}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise UserError(
            f"{side}: {net_type}: too large for the memory of this machine; give it fewer features"
        ) from error


def define_G(opt: Any) -> nn.Module:
    """Build the generator of ``opt.netG``, initialised when ``opt.is_train``; spandrel's come with their weights.

    Args:
        opt: resolved options, or a plain dict, with ``scale``, ``n_channels``, ``is_train`` and ``netG``.

    Raises:
        UserError: an unknown ``net_type``, or values it cannot be built with.
    """
    opt = network_options(opt) if isinstance(opt, dict) else opt
    net = opt.netG
    if net.net_type == "spandrel":
        published = load_spandrel(net.path, opt.scale, opt.n_channels)
        if opt.is_train and isinstance(opt, Options) and opt.train_set:
            published.check_patch(patch_size(opt.train_set) // opt.scale)
        return published
    with _one_line("netG", net.net_type):
        network = _generator(net, opt.scale)
    if opt.is_train:
        init_weights(network, net.init_type, net.init_bn_type, net.init_gain)
    return network


def _generator(net: Any, scale: int) -> nn.Module:
    match net.net_type:
        case "rrdbnet":
            return RRDBNet(net.in_nc, net.out_nc, net.nf, net.nb, net.gc, scale, net.use_checkpoint)
        case "rrdbnet_basicsr":
            return RRDBNetBasicSR(net.in_nc, net.out_nc, net.nf, net.nb, net.gc, scale, net.use_checkpoint)
        case "rrdb":
            return RRDB(net.in_nc, net.out_nc, net.nf, net.nb, net.gc, scale, net.act_mode, net.upsample_mode)
        case "spsr":
            return SPSRNet(net.in_nc, net.out_nc, net.nf, net.nb, net.gc, scale, net.upsample_mode, net.use_checkpoint)
        case "ranksrgan_srresnet":
            return RankSRGANSRResNet(net.in_nc, net.out_nc, net.nf, net.nb, scale)
        case "msrresnet0":
            return MSRResNet0(net.in_nc, net.out_nc, net.nc, net.nb, scale, net.act_mode, net.upsample_mode)
        case "msrresnet1":
            return MSRResNet1(net.in_nc, net.out_nc, net.nc, net.nb, scale, net.act_mode, net.upsample_mode)
        case "srvgg_compact":
            return SRVGGNetCompact(net.in_nc, net.out_nc, net.nf, net.nc, scale, net.act_type)
        case "swinir":
            return SwinIR(
                scale,
                net.in_chans,
                net.img_size,
                net.window_size,
                net.img_range,
                net.depths,
                net.embed_dim,
                net.num_heads,
                net.mlp_ratio,
                net.upsampler,
                net.resi_connection,
                net.padding,
                net.drop_path_rate,
                use_checkpoint=net.use_checkpoint,
            )
        case "elan":
            return ELAN(
                scale,
                net.colors,
                net.window_sizes,
                net.m_elan,
                net.c_elan,
                net.n_share,
                net.r_expand,
                net.img_range,
                net.use_checkpoint,
                net.rgb_mean,
            )
        case "resshift_unet_swin":
            return UNetModelSwin(
                net.image_size,
                net.in_channels,
                net.model_channels,
                net.out_channels,
                net.attention_resolutions,
                net.dropout,
                net.channel_mult,
                net.num_res_blocks,
                net.num_head_channels,
                net.use_scale_shift_norm,
                net.swin_depth,
                net.swin_embed_dim,
                net.window_size,
                net.mlp_ratio,
                net.cond_lq,
                net.lq_size,
                net.mask_quirk,
                net.use_checkpoint,
            )
        case "unet2d":
            return UNet2D(
                net.channels,
                net.patch,
                net.residual,
                net.block_out_channels,
                net.layers_per_block,
                net.attention,
                net.mid_attention,
                net.attention_head_dim,
                net.norm_num_groups,
                net.use_checkpoint,
            )
        case "stablesr":
            base = load_stable_diffusion(net.base, net.base_precision)
            return StableSR(base, scale, net.model_channels, net.channel_mult, net.num_heads, net.use_checkpoint)
        case "sd_lora":
            base = load_stable_diffusion(net.base, net.base_precision)
            return SDLoRA(base, scale, net.rank, net.alpha, net.target_modules, net.use_checkpoint)
        case unknown:
            raise UserError(f"netG.net_type: {unknown!r} is no generator of this project")


def define_D(opt: Any) -> nn.Module:
    """Build the discriminator of ``opt.netD``, initialised when ``opt.is_train``; else as :func:`define_G`."""
    opt = network_options(opt) if isinstance(opt, dict) else opt
    net = opt.netD
    with _one_line("netD", net.net_type):
        network = _discriminator(net)
    if opt.is_train:
        init_weights(network, net.init_type, net.init_bn_type, net.init_gain)
    return network


def _discriminator(net: Any) -> nn.Module:
    match net.net_type:
        case "discriminator_unet" | "discriminator_unet_sn":
            return DiscriminatorUNet(net.in_nc, net.base_nc, net.skip_connection)
        case "discriminator_unet_sn_v1":
            return DiscriminatorUNetSmall(net.in_nc, net.base_nc, net.skip_connection)
        case "discriminator_patchgan":
            return DiscriminatorPatchGAN(net.in_nc, net.base_nc, net.n_layers, net.norm_type)
        case "discriminator_vgg_96" | "discriminator_vgg_128" | "discriminator_vgg_192":
            input_size = int(net.net_type.rsplit("_", 1)[1])
            return DiscriminatorVGG(net.in_nc, net.base_nc, net.act_mode, input_size)
        case "discriminator_vgg_style":
            return DiscriminatorVGGStyle(net.in_nc, net.base_nc, net.input_size, net.norm_type)
        case "discriminator_vgg_128_SN":
            return DiscriminatorVGG128SN(net.in_nc, net.base_nc)
        case unknown:
            raise UserError(f"netD.net_type: {unknown!r} is no discriminator of this project")


def define_R(opt: Any) -> nn.Module:
    """Build the ranker of ``opt.netR``, initialised when ``opt.is_train``; a new one is trained, not used as it is."""
    net = opt.netR
    with _one_line("netR", net.net_type):
        network = RankerVGG12(net.in_nc, net.base_nc)
    if opt.is_train:
        init_weights(network, net.init_type, net.init_bn_type, net.init_gain)
    return network


@torch.no_grad()
def init_weights(network: nn.Module, init_type: str, init_bn_type: str = "uniform", gain: float = 1.0) -> None:
    """Initialise convolutions and linear layers by KAIR's ``init_type``, batch norms by ``init_bn_type``, biases by 0.

    Args:
        network: changed in place; the types "default" and "none" leave it as its constructor built it.
        init_type: default, none, normal (deviation 0.1), uniform (-0.2 to 0.2), xavier_normal, xavier_uniform,
            kaiming_normal, kaiming_uniform or orthogonal; the normal ones are clamped to [-1, 1].
        init_bn_type: uniform (0.1 to 1) or constant (1).
        gain: factor of the weights.

    Raises:
        UserError: another ``init_type`` or ``init_bn_type``.
    """
    if init_type in ("default", "none"):
        return
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            # Under spectral norm the trained tensor is weight_orig; `weight` is only what it was last divided into.
            weight = layer.weight_orig if hasattr(layer, "weight_orig") else layer.weight
            assert isinstance(weight, torch.Tensor)
            _init_weight(weight, init_type, gain)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.BatchNorm2d) and layer.affine:
            match init_bn_type:
                case "uniform":
                    layer.weight.uniform_(0.1, 1.0)
                case "constant":
                    layer.weight.fill_(1.0)
                case _:
                    raise UserError(f"init_bn_type: {init_bn_type!r} is unknown, expected uniform or constant")
            layer.bias.zero_()


def _init_weight(weight: torch.Tensor, init_type: str, gain: float) -> None:
    match init_type:
        case "normal":
            weight.normal_(0.0, 0.1).clamp_(-1.0, 1.0).mul_(gain)
        case "uniform":
            weight.uniform_(-0.2, 0.2).mul_(gain)
        case "xavier_normal":
            init.xavier_normal_(weight, gain).clamp_(-1.0, 1.0)
        case "xavier_uniform":
            init.xavier_uniform_(weight, gain)
        case "kaiming_normal":
            init.kaiming_normal_(weight, nonlinearity="relu").clamp_(-1.0, 1.0).mul_(gain)
        case "kaiming_uniform":
            init.kaiming_uniform_(weight, nonlinearity="relu").mul_(gain)
        case "orthogonal":
            init.orthogonal_(weight, gain)
        case _:
            raise UserError(f"init_type: {init_type!r} is unknown")
