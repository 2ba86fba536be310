"""What is valid option by option but cannot work together, and options that nothing reads: a function a section."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from utils.utils_metric_table import METRICS
from utils.utils_option_networks import (
    DiffusionNetwork,
    ELANOptions,
    NetG,
    Network,
    ResShiftUNetOptions,
    Section,
    SpandrelOptions,
    UNet2DOptions,
    network_classes,
)
from utils.utils_option_sections import (
    FIDELITY_WEIGHTS,
    DatasetOptions,
    Options,
    Side,
    TrainOptions,
    fidelity_weight,
    patch_size,
)


def problems(opt: Options) -> Iterator[str]:
    """What is valid key by key but cannot work together: the first of these is the error."""
    yield from _sets(opt)
    if opt.model == "ranker":
        yield from _ranker(opt)
        return
    if opt.netG is None:
        yield "netG: is required and missing"
        return
    yield from _generator(opt, opt.netG)
    yield from _data(opt)
    yield from _diffusion(opt)
    yield from _testing(opt)
    if not opt.is_train:
        return
    if opt.train_set is None:
        yield "datasets.train: is required for training"
        return
    size = patch_size(opt.train_set)
    yield from _schedule(opt, "G")
    if opt.model in ("gan", "spsr"):
        yield from _schedule(opt, "D")
    yield from _model_dm(opt)
    yield from _training_data(opt.train_set, opt.train)
    yield from _similarity(opt.train, size)
    yield from _betas(opt.train, "G", "D")
    yield from _features(opt.train, size)
    yield from _metrics(opt.train, size)
    yield from _systems(opt, opt.netG, size)
    yield from _weights(opt)
    if opt.model in ("gan", "spsr"):
        yield from _discriminator(opt, size)


def _sets(opt: Options) -> Iterator[str]:
    for name in opt.test_sets:
        if not re.fullmatch(r"(test|val)[^/\\.\x00-\x1f]*", name):  # it becomes part of a file's name
            yield f"datasets.{name}: a set is called train, or its name begins with test or val, without / or dot"


def _generator(opt: Options, netG: NetG) -> Iterator[str]:
    if opt.scale not in netG.scales:
        yield f"scale: {netG.net_type} is made for scales {', '.join(map(str, netG.scales))}, not {opt.scale}"
    if (opt.model == "dm") != isinstance(netG, DiffusionNetwork):
        of_dm = [name for name, cls in network_classes(NetG).items() if issubclass(cls, DiffusionNetwork)]
        yield (
            f"netG.net_type: {netG.net_type} is no network for model {opt.model}; those of model dm are: "
            f"{', '.join(sorted(of_dm))}"
        )
    if opt.is_train and isinstance(netG, SpandrelOptions) and netG.path is None:
        yield "path.pretrained_netG: is required for net_type spandrel: the checkpoint that the network is built from"


def _data(opt: Options) -> Iterator[str]:
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


def _diffusion(opt: Options) -> Iterator[str]:
    """The process, the autoencoder, and whether they fit the network."""
    if opt.model != "dm":
        if opt.diffusion is not None:
            yield f"diffusion: is for model dm, not {opt.model}; remove it, or set model"
        return
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
    if isinstance(opt.netG, DiffusionNetwork):
        if opt.netG.process not in (None, opt.diffusion.type):
            yield f"diffusion.type: {opt.netG.net_type} is made for {opt.netG.process}, not {opt.diffusion.type}"
        t, last = opt.diffusion.get("timestep", 0), opt.netG.last_timestep
        if last is not None and t > last:
            yield f"diffusion.timestep: Stable Diffusion has times 0 to {last}, not {t}"
    count, wanted = getattr(opt.diffusion, "steps", 1), opt.diffusion.sample_steps
    if wanted and wanted > count:
        yield f"diffusion.sample_steps: {wanted} must not exceed the process's steps, {count}"


def _testing(opt: Options) -> Iterator[str]:
    tile, overlap = opt.test.tile, opt.test.tile_overlap
    if tile != "auto" and tile and overlap >= tile:
        yield f"test.tile_overlap: {overlap} must be smaller than test.tile {tile}"


def _training_data(data: DatasetOptions, train: TrainOptions) -> Iterator[str]:
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


def _similarity(train: TrainOptions, size: int) -> Iterator[str]:
    """The self-similarity loss on patches of ``size`` pixels."""
    for name in ("kernel_size_search", "kernel_size_window"):
        if getattr(train, name) % 2 == 0:
            yield f"train.{name}: must be odd, not {getattr(train, name)}"
    if train.kernel_size_window > train.kernel_size_search:
        yield (
            f"train.kernel_size_window: {train.kernel_size_window} must not be larger than "
            f"kernel_size_search {train.kernel_size_search}"
        )
    with_ssl = train.ssl_l1_weight > 0 or train.ssl_kl_weight > 0
    margin = train.kernel_size_search // 2 + (train.kernel_size_window // 2 if train.search_border == "image" else 0)
    if with_ssl and size <= margin:
        yield f"train.kernel_size_search: {train.kernel_size_search} needs patches larger than {margin} px, not {size}"


def _features(train: TrainOptions, size: int) -> Iterator[str]:
    """The perceptual loss on patches of ``size`` pixels."""
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


def _metrics(train: TrainOptions, size: int) -> Iterator[str]:
    """The metrics that are losses, on patches of ``size`` pixels."""
    if train.lpips_weight and train.iqa_weights.lpips_vgg:
        yield "train.lpips_weight: is another name for train.iqa_weights.lpips_vgg, which is given too; remove one"
    for name in train.iqa_losses:
        if size < METRICS[name].smallest:
            yield f"train.iqa_weights.{name}: needs patches of at least {METRICS[name].smallest} pixels, not {size}"


def _systems(opt: Options, netG: NetG, size: int) -> Iterator[str]:
    """What the terms of one system (LDL, BebyGAN, SPSR, RankSRGAN) need."""
    train = opt.train
    if train.ldl_weight and not train.E_decay:
        yield "train.ldl_weight: the artifact map needs the averaged generator: set train.E_decay"
    if train.best_buddy_weight and size < 12:
        yield f"train.best_buddy_weight: needs patches of at least 12 pixels, not {size}"
    if train.branch_weight and not netG.has_gradient_branch:
        yield f"train.branch_weight: {netG.net_type} has no gradient branch; use netG.net_type spsr, or set it to 0"
    if train.gradient_D_lossfn_weight and opt.model != "spsr":
        yield f"train.gradient_D_lossfn_weight: model {opt.model} has no second discriminator; use model spsr"
    if train.rank_weight:
        if opt.netR is None:
            yield "netR: is required for train.rank_weight > 0: the ranker (ranker_vgg12)"
        if opt.path.pretrained_netR is None:
            yield "path.pretrained_netR: is required for train.rank_weight > 0: the trained ranker"
        if size < 32:
            yield f"train.rank_weight: the ranker needs patches of at least 32 pixels, not {size}"


def _weights(opt: Options) -> Iterator[str]:
    train = opt.train
    fidelity = fidelity_weight(train)
    if train.micro_batch and train.G_lossfn_type == "l2sum":
        yield "train.micro_batch: l2sum is a sum over the batch, which pieces would change; use l2"
    if opt.model == "plain" and not fidelity:
        yield "train.G_lossfn_weight: all losses of the generator have weight 0: nothing to train"
    if opt.model == "dm" and not (fidelity or train.dm_weight):
        yield "train.dm_weight: all losses of the generator have weight 0: nothing to train"
    if opt.model in ("gan", "spsr") and not (fidelity or train.D_lossfn_weight or train.gradient_D_lossfn_weight):
        yield "train: all losses of the generator have weight 0: nothing to train"


def _discriminator(opt: Options, size: int) -> Iterator[str]:
    """The discriminator on patches of ``size`` pixels."""
    netD = opt.netD
    if netD is None:
        yield f"netD: is required for model {opt.model} (for example discriminator_unet)"
    elif size % netD.patch_multiple:
        yield f"netD.net_type: {netD.net_type} takes patches divisible by {netD.patch_multiple}, not {size}"
    elif netD.patch_side not in (None, size):
        key = "input_size" if "input_size" in type(netD).model_fields else "net_type"
        yield f"netD.{key}: {netD[key]} takes patches of {netD.patch_side} pixels, not {size}"


def _betas(train: TrainOptions, *sides: Side) -> Iterator[str]:
    for side in sides:
        kind, betas = train[f"{side}_optimizer_type"], train[f"{side}_optimizer_betas"] or ()
        key, count = f"train.{side}_optimizer_betas", 3 if kind == "adan" else 2
        if not all(0 <= b < 1 and math.isfinite(b) for b in betas):
            yield f"{key}: each must lie in [0, 1), not {betas}"
        elif betas and len(betas) != count:
            yield f"{key}: {kind} takes {count} numbers, not {betas}"


def _ranker(opt: Options) -> Iterator[str]:
    """Of model ranker, all of it."""
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
    yield from _betas(opt.train, "R")
    yield from _schedule(opt, "R")


def _schedule(opt: Options, side: Side) -> Iterator[str]:
    train = opt.train
    if train[f"{side}_scheduler_type"] != "CosineAnnealingLR":
        return
    warmup = train[f"{side}_scheduler_warmup"]
    if train.iterations is None:
        yield "train.iterations: is required for CosineAnnealingLR, which ends there"
    elif warmup >= train.iterations:
        yield f"train.{side}_scheduler_warmup: {warmup}: iterations, {train.iterations}, must be more"
    eta_min, lr = train[f"{side}_scheduler_eta_min"], train[f"{side}_optimizer_lr"]
    if eta_min > lr:
        yield f"train.{side}_scheduler_eta_min: {eta_min:g}: is more than the rate it falls from, {lr:g}"


def _model_dm(opt: Options) -> Iterator[str]:
    """What a diffusion model cannot have."""
    if opt.model != "dm":
        return
    for name in ("ldl", "branch", "rank", "D_lossfn", "gradient_D_lossfn"):
        if opt.train[f"{name}_weight"]:
            yield f"train.{name}_weight: model dm has no such loss; set it to 0"


# ---------------------------------------------------------------------------------------------------- read by nobody


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
        "test": {"tile_overlap": opt.test.tile != 0},
        "autoencoder": dict.fromkeys(("precision", "use_checkpoint"), opt.autoencoder.type != "pixel"),
    }
    for side in ("netG", "netD", "netR"):
        network = opt[side]
        if isinstance(network, Network):
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
        **dict.fromkeys((*FIDELITY_WEIGHTS, "iqa_weights", "E_decay"), sr),
        **dict.fromkeys(("G_lossfn_type", "l1_gt_usm"), sr and train.G_lossfn_weight > 0),
        "G_charbonnier_eps": sr and train.G_lossfn_weight > 0 and train.G_lossfn_type == "charbonnier",
        "percep_gt_usm": with_F,
        **{name: with_F for name in TrainOptions.model_fields if name.startswith("F_") and name != "F_lossfn_weight"},
        **dict.fromkeys(
            ("D_lossfn_weight", "gradient_D_lossfn_weight", "D_init_iters", "D_update_ratio", "D_once"), gan
        ),
        "gan_type": trains_D,
        "region_aware": gan and train.D_lossfn_weight > 0,
        **dict.fromkeys(("ssl_mode", "search_border", "kernel_size_search", "kernel_size_window"), with_ssl),
        **dict.fromkeys(("sigma", "generalization", "mask_stride", "ssl_over_processes"), with_ssl),
        "mask_threshold": with_ssl and not masks_from_files,
        "rank_published": sr and train.rank_weight > 0,
        "dm_weight": dm,
        "range_published": dm and fidelity_weight(train) > 0,
        **dict.fromkeys(("checkpoint_keep_every", "checkpoint_keep_best"), train.checkpoint_keep is not None),
        "checkpoint_best_by": sr,
        **{
            f"{side}_{name}": used
            for side, used in sides.items()
            for name in ("optimizer_type", "optimizer_lr", "optimizer_betas", "optimizer_wd", "optimizer_clipgrad")
        },
    }
    for side, used in sides.items():
        schedule, cosine = f"{side}_scheduler", train[f"{side}_scheduler_type"] == "CosineAnnealingLR"
        sections["train"] |= dict.fromkeys((f"{schedule}_type", f"{schedule}_warmup"), used)
        sections["train"] |= {f"{schedule}_eta_min": used and cosine, f"{schedule}_milestones": used and not cosine}
        sections["train"][f"{schedule}_gamma"] = used and not cosine and bool(train[f"{schedule}_milestones"])
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
        "use_rot": training,
        **dict.fromkeys(("dataroot_ranked", "rank_csv"), rank),
        **dict.fromkeys(("rank_metric", "rank_higher_better"), rank and data.rank_csv is not None),
        **dict.fromkeys(("H_size", "dataloader_shuffle", "dataloader_num_workers", "dataloader_batch_size"), training),
        **dict.fromkeys(("lq_patchsize", "degradation_device", "pair_pool"), blind and training),
        **dict.fromkeys(("degradation_type", "use_sharp"), blind),
        "shuffle_prob": blind and data.degradation_type == "bsrgan_plus",
        "camera_prob": blind and data.degradation_type.startswith("bsrgan") and data.n_channels == 3,
    }


def unread(opt: Options) -> Iterator[str]:
    """What differs from its default although nothing looks at it in this training run."""
    read = is_read(opt)
    for place, fields in read.items():
        section: Section = opt
        for part in place.split(".") if place else ():
            section = section[part]
        if place and not read[""].get(place, True):
            continue  # the whole section is named
        for name, used in fields.items():
            if not used and section[name] != type(section).model_fields[name].default:
                yield f"{place}.{name}" if place else name
