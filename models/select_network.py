"""From ``netG.net_type`` and ``netD.net_type`` to networks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

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
from models.network_spandrel import SpandrelNetwork, load_spandrel
from models.network_spsr import SPSRNet
from models.network_srvgg import SRVGGNetCompact
from models.network_stablesr import StableSR
from models.network_swinir import SwinIR
from models.network_unet2d import UNet2D
from models.stable_diffusion import load_stable_diffusion
from utils.utils_error import UserError
from utils.utils_option import NetworkOptions, Options, network_options, patch_size
from utils.utils_option_networks import ImageNetworkOptions, NetD, NetG


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


class _Images(TypedDict):
    """What a network takes and makes, in channels."""

    in_nc: int
    out_nc: int


def define_G(opt: Options | NetworkOptions | dict[str, object]) -> nn.Module:
    """Build the generator of ``opt.netG``, initialised when ``opt.is_train``; spandrel's come with their weights.

    Args:
        opt: resolved options, or a plain dict, with ``scale``, ``n_channels``, ``is_train`` and ``netG``.

    Raises:
        UserError: an unknown ``net_type``, or values it cannot be built with.
    """
    opt = network_options(opt) if isinstance(opt, dict) else opt
    net = opt.netG
    if net is None:
        raise UserError("netG: is required and missing")
    with _one_line("netG", net.net_type):
        network = _generator(net, opt.scale, opt.n_channels)
    if isinstance(network, SpandrelNetwork):
        if opt.is_train and isinstance(opt, Options) and opt.train_set:
            network.check_patch(patch_size(opt.train_set) // opt.scale)
    elif net.net_type != "spandrel" and opt.is_train:
        init_weights(network, net.init_type, net.init_bn_type, net.init_gain)
    return network


def _generator(net: NetG, scale: int, n_channels: int) -> nn.Module:
    match net.net_type:
        case "rrdbnet" | "rrdbnet_basicsr":
            rrdbnet = RRDBNet if net.net_type == "rrdbnet" else RRDBNetBasicSR
            return rrdbnet(
                **_images(net, n_channels), nf=net.nf, nb=net.nb, gc=net.gc, sf=scale, use_checkpoint=net.use_checkpoint
            )
        case "rrdb":
            return RRDB(
                **_images(net, n_channels),
                nf=net.nf,
                nb=net.nb,
                gc=net.gc,
                upscale=scale,
                act_mode=net.act_mode,
                upsample_mode=net.upsample_mode,
            )
        case "spsr":
            return SPSRNet(
                **_images(net, n_channels),
                nf=net.nf,
                nb=net.nb,
                gc=net.gc,
                upscale=scale,
                upsample_mode=net.upsample_mode,
                use_checkpoint=net.use_checkpoint,
            )
        case "ranksrgan_srresnet":
            return RankSRGANSRResNet(**_images(net, n_channels), nf=net.nf, nb=net.nb, upscale=scale)
        case "msrresnet0" | "msrresnet1":
            msrresnet = MSRResNet0 if net.net_type == "msrresnet0" else MSRResNet1
            return msrresnet(
                **_images(net, n_channels),
                nc=net.nc,
                nb=net.nb,
                upscale=scale,
                act_mode=net.act_mode,
                upsample_mode=net.upsample_mode,
            )
        case "srvgg_compact":
            return SRVGGNetCompact(
                **_images(net, n_channels), nf=net.nf, nc=net.nc, upscale=scale, act_type=net.act_type
            )
        case "swinir":
            return SwinIR(
                upscale=scale,
                in_chans=net.in_chans or n_channels,
                img_size=net.img_size,
                window_size=net.window_size,
                img_range=net.img_range,
                depths=net.depths,
                embed_dim=net.embed_dim,
                num_heads=net.num_heads,
                mlp_ratio=net.mlp_ratio,
                upsampler=net.upsampler,
                resi_connection=net.resi_connection,
                padding=net.padding,
                drop_path_rate=net.drop_path_rate,
                use_checkpoint=net.use_checkpoint,
            )
        case "elan":
            return ELAN(
                scale=scale,
                colors=net.colors or n_channels,
                window_sizes=net.window_sizes,
                m_elan=net.m_elan,
                c_elan=net.c_elan,
                n_share=net.n_share,
                r_expand=net.r_expand,
                img_range=net.img_range,
                use_checkpoint=net.use_checkpoint,
                rgb_mean=net.rgb_mean,
            )
        case "resshift_unet_swin":
            return UNetModelSwin(
                image_size=net.image_size,
                in_channels=net.in_channels,
                model_channels=net.model_channels,
                out_channels=net.out_channels,
                attention_resolutions=net.attention_resolutions,
                dropout=net.dropout,
                channel_mult=net.channel_mult,
                num_res_blocks=net.num_res_blocks,
                num_head_channels=net.num_head_channels,
                use_scale_shift_norm=net.use_scale_shift_norm,
                swin_depth=net.swin_depth,
                swin_embed_dim=net.swin_embed_dim,
                window_size=net.window_size,
                mlp_ratio=net.mlp_ratio,
                cond_lq=net.cond_lq,
                lq_size=net.lq_size,
                mask_quirk=net.mask_quirk,
                use_checkpoint=net.use_checkpoint,
            )
        case "unet2d":
            return UNet2D(
                channels=net.channels,
                patch=net.patch,
                residual=net.residual,
                block_out_channels=net.block_out_channels,
                layers_per_block=net.layers_per_block,
                attention=net.attention,
                mid_attention=net.mid_attention,
                attention_head_dim=net.attention_head_dim,
                norm_num_groups=net.norm_num_groups,
                use_checkpoint=net.use_checkpoint,
            )
        case "stablesr":
            return StableSR(
                load_stable_diffusion(net.base, net.base_precision),
                scale=scale,
                model_channels=net.model_channels,
                channel_mult=net.channel_mult,
                num_heads=net.num_heads,
                use_checkpoint=net.use_checkpoint,
            )
        case "sd_lora":
            return SDLoRA(
                load_stable_diffusion(net.base, net.base_precision),
                scale=scale,
                rank=net.rank,
                alpha=net.alpha,
                target_modules=net.target_modules,
                use_checkpoint=net.use_checkpoint,
            )
        case "spandrel":
            return load_spandrel(net.path, scale, n_channels)
        case unknown:
            raise UserError(f"netG.net_type: {unknown!r} is no generator of this project")


def _images(net: ImageNetworkOptions, n_channels: int) -> _Images:
    """The channels that a network states, or else those of the images."""
    return _Images(in_nc=net.in_nc or n_channels, out_nc=net.out_nc or n_channels)


def define_D(opt: Options | NetworkOptions | dict[str, object]) -> nn.Module:
    """Build the discriminator of ``opt.netD``, initialised when ``opt.is_train``; else as :func:`define_G`."""
    opt = network_options(opt) if isinstance(opt, dict) else opt
    net = opt.netD
    if net is None:
        raise UserError("netD: is required and missing")
    with _one_line("netD", net.net_type):
        network = _discriminator(net, opt.n_channels)
    if opt.is_train:
        init_weights(network, net.init_type, net.init_bn_type, net.init_gain)
    return network


def _discriminator(net: NetD, n_channels: int) -> nn.Module:
    in_nc = net.in_nc or n_channels
    match net.net_type:
        case "discriminator_unet" | "discriminator_unet_sn":
            return DiscriminatorUNet(in_nc, base_nc=net.base_nc, skip_connection=net.skip_connection)
        case "discriminator_unet_sn_v1":
            return DiscriminatorUNetSmall(in_nc, base_nc=net.base_nc, skip_connection=net.skip_connection)
        case "discriminator_patchgan":
            return DiscriminatorPatchGAN(in_nc, net.base_nc, n_layers=net.n_layers, norm_type=net.norm_type)
        case "discriminator_vgg_96" | "discriminator_vgg_128" | "discriminator_vgg_192":
            return DiscriminatorVGG(
                in_nc, net.base_nc, act_mode=net.act_mode, input_size=int(net.net_type.rpartition("_")[2])
            )
        case "discriminator_vgg_style":
            return DiscriminatorVGGStyle(in_nc, net.base_nc, input_size=net.input_size, norm_type=net.norm_type)
        case "discriminator_vgg_128_SN":
            return DiscriminatorVGG128SN(in_nc, net.base_nc)
        case unknown:
            raise UserError(f"netD.net_type: {unknown!r} is no discriminator of this project")


def define_R(opt: Options) -> nn.Module:
    """Build the ranker of ``opt.netR``, initialised when ``opt.is_train``; a new one is trained, not used as it is."""
    net = opt.netR
    if net is None:
        raise UserError("netR: is required and missing")
    with _one_line("netR", net.net_type):
        network = RankerVGG12(net.in_nc or opt.n_channels, base_nc=net.base_nc)
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
