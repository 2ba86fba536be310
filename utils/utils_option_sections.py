"""The sections of an option file: every key is a typed field with its default and a description."""

import math
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from utils.utils_option_networks import (
    Channels,
    Count,
    NetD,
    NetG,
    Paths,
    PathText,
    Pixels,
    Positive,
    Precision,
    RankerOptions,
    Rate,
    Section,
    Seed,
    Weight,
    integral,
    plain_path,
)

# -------------------------------------------------------------------------------------------------------- diffusion


class _Diffusion(Section):
    color_fix: Literal["none", "adain", "wavelet"] = Field(
        "none", description="take E's colours from the enlarged L: its mean and deviation, or its low frequencies"
    )
    sample_steps: Positive | None = Field(None, description="steps of sampling, in validation and tests; null = all")
    seed: Seed = Field(0, description="of the noise in sampling, the same for every image")


class ResShiftOptions(_Diffusion):
    type: Literal["resshift"] = Field("resshift", description="residual shifting, arXiv 2307.12348; predicts x0")
    steps: Annotated[int, BeforeValidator(integral), Field(ge=2, le=100000)] = Field(15, description="T")
    min_noise_level: Rate = Field(0.04, description="m: sqrt(eta_1) = min(m / kappa, m)")
    kappa: Rate = Field(2.0, description="strength of the noise against the residual")
    etas_end: Annotated[float, Field(gt=0, le=1)] = Field(0.99, description="sqrt(eta_T)")
    power: Rate = Field(0.3, description="form of the schedule; the smaller, the earlier the shift")


class DDPMOptions(_Diffusion):
    type: Literal["ddpm"] = Field("ddpm", description="Stable Diffusion's process; predicts the noise")
    steps: Annotated[int, BeforeValidator(integral), Field(ge=1, le=100000)] = Field(1000, description="T")
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
    precision: Precision = Field("fp32", description="what its weights are kept and computed in")
    use_checkpoint: bool = Field(
        False, description="recompute its decoder's blocks in the backward pass: less memory for SSL, more time"
    )


# ------------------------------------------------------------------------------------------------ data, paths, train


DatasetType = Literal["sr", "blindsr", "plain", "multiLR_oneGT", "srmask", "blindsrmask", "plainmask", "l", "rank"]
DegradationType = Literal[
    "bsrgan",
    "bsrgan_light",
    "bsrgan_plus",
    "realesrgan",
    "realesrgan_light",
    "stablesr",
    "resshift",
    "blind_test",
]


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
    degradation_type: DegradationType = Field(
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
    pair_pool: Annotated[int, BeforeValidator(integral), Field(ge=0, le=65536)] = Field(
        0,
        description="degradation_device gpu: keep this many pairs and give out old ones for new, at random; "
        "Real-ESRGAN: 180, for its batches shared their draws. Checkpoints hold the pool of each process. 0 = off",
    )
    use_sharp: bool = Field(
        False,
        description="blindsr: sharpen H (unsharp mask) before degrading it; realesrgan keeps H and adds H_usm",
    )
    use_rot: bool = Field(
        True, description="turn patches and flip them upside down, too; false mirrors them left-right alone, as faces"
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
    license: str = Field(
        "unknown",
        description="of the weights that are trained: what their .safetensors files say, as CC-BY-4.0",
        max_length=200,
    )
    pretrained_netG: PathText | None = Field(None, description="start the generator from this checkpoint")
    pretrained_netD: PathText | None = Field(None, description="start the discriminator from this checkpoint")
    pretrained_netE: PathText | None = Field(None, description="start the EMA generator from this; null = a copy of G")
    pretrained_netR: PathText | None = Field(
        None, description="the trained ranker, for train.rank_weight > 0; model ranker: start from this checkpoint"
    )
    pretrained_netF: PathText | None = Field(
        None, description="VGG19 weights of the perceptual loss; null = torch's own cache (downloaded if it can be)"
    )


# The names and groups of utils_metric_table.
_OwnMetric = Literal["psnr", "ssim", "psnr_y", "ssim_y", "psnr_y8", "ssim_y8", "ssg", "color"]
_OfflineMetric = Literal["ms_ssim", "fsim", "gmsd", "vif", "nlpd", "mad", "piqe"]
_LossMetric = Literal["stlpips", "stlpips_vgg", "lpips", "lpips_vgg", "dists"]
_LearnedMetric = Literal["fid", "niqe", "musiq", "clipiqa", "maniqa"]
_OneMetric = Literal[_OwnMetric, _LossMetric, _LearnedMetric, _OfflineMetric]
MetricName = Literal["default", "paper", "offline", _OneMetric]


Side = Literal["G", "D", "R"]


# The first two are PyTorch's, the others timm's.
OptimizerName = Literal["adam", "adamw", "adan", "adopt", "lion", "nadamw", "radamw"]
SchedulerName = Literal["MultiStepLR", "CosineAnnealingLR"]
Betas = Annotated[list[float], Field(min_length=2, max_length=3)] | None
_BETAS = "two numbers, of adan three; null = the optimizer's own, Adam's are 0.9 and 0.999"
_SCHEDULE = "learning rate: in steps, or half a cosine from the warm-up to iterations"
_WARMUP = "the learning rate rises linearly over this many steps first"
_ETA_MIN = "CosineAnnealingLR: the learning rate at the end"


class OptimizerOptions(NamedTuple):
    """The optimizer and the learning rate of the generator, the discriminators or the ranker."""

    type: OptimizerName
    lr: float
    betas: tuple[float, ...] | None  # None = the optimizer's own
    wd: float
    clipgrad: float | None  # the largest gradient norm; None = no clipping
    milestones: tuple[int, ...]
    gamma: float
    warmup: int  # steps
    cosine_end: int | None  # the step at which half a cosine ends at eta_min; None = in steps, by the milestones
    eta_min: float

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, in closed form: after a warm-up half a cosine, or, as KAIR, by milestones."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        if self.cosine_end is not None:
            passed = (step - self.warmup) / (self.cosine_end - self.warmup)
            return self.eta_min + (self.lr - self.eta_min) * (1 + math.cos(math.pi * passed)) / 2
        return self.lr * self.gamma ** sum(step >= m for m in self.milestones)


class IQAWeights(Section):
    """The weights of metrics that are losses, by the names of utils_metric_table."""

    stlpips: Weight = Field(0.0, description="ST-LPIPS on AlexNet, nothing to download; 0 = off")
    stlpips_vgg: Weight = Field(0.0, description="ST-LPIPS on VGG16, nothing to download; 0 = off")
    lpips: Weight = Field(0.0, description="LPIPS on AlexNet, v0.1, through torchmetrics; 0 = off")
    lpips_vgg: Weight = Field(0.0, description="LPIPS on VGG16, v0.1, through torchmetrics; 0 = off")
    dists: Weight = Field(0.0, description="DISTS, through torchmetrics; 0 = off")


class TrainOptions(Section):
    iterations: Positive | None = Field(None, description="stop after this step; null = until interrupted, as KAIR")
    manual_seed: Seed | None = Field(None, description="null = drawn at random and written to the log")

    dm_weight: Weight = Field(
        1.0, description="dm: weight of the squared error of what the network predicts (x0 or noise); 0 = off"
    )
    range_published: bool = Field(
        False,
        description="dm: losses of the image compare E in [-1, 1] with H in [0, 1], a fault of the published StableSR "
        "with SSL",
    )
    channels_last: bool | None = Field(
        None,
        description="networks with the channels innermost in memory; null = on CPUs, and on GPUs in half precision, "
        "where convolutions are faster so. The same results to rounding",
    )
    precision: Precision = Field(
        "fp32",
        description="what networks compute in while training (autocast); weights, VGG, metrics, losses keep fp32; "
        "fp16 with a loss scaler for each network",
    )
    micro_batch: Positive | None = Field(
        None,
        description="images that go through the networks at once, the batch of each process being done in pieces; null "
        "= all. Gradients are the batch's; the statistics of batch norms and the means of ragan and ragan_basicsr are "
        "each piece's",
    )
    sync_batchnorm: bool = Field(
        False,
        description="several GPUs: statistics of batch norms are over all processes; false = over each one's images",
    )
    compile: bool = Field(
        False,
        description="torch.compile for the trained networks: minutes at the start and for each new size of patches; "
        "meant for GPUs, not measured there (on a CPU steps took 1.2 times as long); needs a C++ compiler, on GPUs "
        "triton too",
    )
    cudnn_benchmark: bool = Field(
        True,
        description="GPUs: try cuDNN's convolutions at first and keep the fastest; false = as it guesses",
    )
    tf32: bool = Field(
        True,
        description="GPUs: fp32 convolutions multiply in TF32, 10 bits of mantissa, as PyTorch does by itself; matrix "
        "products keep fp32",
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

    iqa_weights: IQAWeights = Field(IQAWeights(), description="metrics as losses: the weight of each")
    lpips_weight: Weight = Field(0.0, description="another name for iqa_weights.lpips_vgg; 0 = off")

    color_weight: Weight = Field(
        0.0,
        description="L1 between averages of E and H over 16 x 16 pixels, against colours that drift in a GAN; of no "
        "published recipe; 0 = off",
    )

    gan_type: Literal["gan", "ragan", "ragan_basicsr", "lsgan", "wgan", "softplusgan"] = Field(
        "gan",
        description="ragan: means over the batch axis, as KAIR; ragan_basicsr: over all logits, as ESRGAN and BasicSR",
    )
    D_lossfn_weight: Weight = Field(0.0, description="weight of the generator's adversarial loss; 0 = no GAN")
    D_init_iters: Count = Field(0, description="train the discriminator alone for this many steps first")
    D_update_ratio: Positive = Field(1, description="one step of the generator in this many of the discriminator")
    D_once: bool = Field(
        False,
        description="one forward pass of netD on E, and on H, for both players instead of one for each: less time. The "
        "same gradients but for spectral norm, whose power iteration takes half as many steps",
    )

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
    ssl_over_processes: bool = Field(
        True,
        description="several processes: SSL is the mean over the edge pixels of the whole batch, as in one process; "
        "false = each process's own mean, as published: edges weigh more where a process has few of them",
    )
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

    G_optimizer_type: OptimizerName = Field("adam", description="optimizer of the generator")
    G_optimizer_lr: Rate = Field(1e-4, description="learning rate of the generator")
    G_optimizer_betas: Betas = Field(None, description=_BETAS)
    G_optimizer_wd: Weight = Field(0.0, description="weight decay")
    G_optimizer_clipgrad: Weight | None = Field(None, description="largest gradient norm; null or 0 = no clipping")
    G_scheduler_type: SchedulerName = Field("MultiStepLR", description=_SCHEDULE)
    G_scheduler_warmup: Count = Field(0, description=_WARMUP)
    G_scheduler_eta_min: Weight = Field(0.0, description=_ETA_MIN)
    G_scheduler_milestones: list[Count] = Field([], description="multiply by gamma from these steps on")
    G_scheduler_gamma: Rate = Field(0.5, description="factor at a milestone")
    G_param_strict: bool = Field(True, description="pretrained_netG must match in every tensor")

    D_optimizer_type: OptimizerName = Field("adam", description="optimizer of the discriminator")
    D_optimizer_lr: Rate = Field(1e-4, description="learning rate of the discriminator")
    D_optimizer_betas: Betas = Field(None, description=_BETAS)
    D_optimizer_wd: Weight = Field(0.0, description="weight decay")
    D_optimizer_clipgrad: Weight | None = Field(None, description="largest gradient norm; null or 0 = no clipping")
    D_scheduler_type: SchedulerName = Field("MultiStepLR", description=_SCHEDULE)
    D_scheduler_warmup: Count = Field(0, description=_WARMUP)
    D_scheduler_eta_min: Weight = Field(0.0, description=_ETA_MIN)
    D_scheduler_milestones: list[Count] = Field([], description="multiply by gamma from these steps on")
    D_scheduler_gamma: Rate = Field(0.5, description="factor at a milestone")
    D_param_strict: bool = Field(True, description="pretrained_netD must match in every tensor")
    E_param_strict: bool = Field(True, description="pretrained_netE must match in every tensor")

    R_optimizer_type: OptimizerName = Field("adam", description="optimizer of model ranker's netR")
    R_optimizer_lr: Rate = Field(1e-3, description="learning rate of the ranker")
    R_optimizer_betas: Betas = Field(None, description=_BETAS)
    R_optimizer_wd: Weight = Field(0.0, description="weight decay")
    R_optimizer_clipgrad: Weight | None = Field(None, description="largest gradient norm; null or 0 = no clipping")
    R_scheduler_type: SchedulerName = Field("MultiStepLR", description=_SCHEDULE)
    R_scheduler_warmup: Count = Field(0, description=_WARMUP)
    R_scheduler_eta_min: Weight = Field(0.0, description=_ETA_MIN)
    R_scheduler_milestones: list[Count] = Field([], description="multiply by gamma from these steps on")
    R_scheduler_gamma: Rate = Field(0.5, description="factor at a milestone")

    skip_bad_steps: Count = Field(
        0,
        description="n = leave out steps in which a loss or a gradient is not finite, all being as before them, and "
        "end the run at the n-th of them in a row; 0, as 1, = at the first",
    )
    checkpoint_print: Positive = Field(200, description="log every this many steps")
    checkpoint_test: Positive = Field(5000, description="validate every this many steps")
    checkpoint_save: Positive = Field(5000, description="save every this many steps")
    checkpoint_safetensors: bool = Field(
        True,
        description="save G and E as .safetensors too, files that say what they are: architecture, scale, step, scores",
    )
    checkpoint_keep: Positive | None = Field(
        None, description="keep the newest this many checkpoints and the best ones; null = keep all"
    )
    checkpoint_keep_every: Positive | None = Field(
        None, description="with checkpoint_keep: keep those of each multiple of this many steps too; null = none"
    )
    checkpoint_keep_best: Count = Field(1, description="with checkpoint_keep: how many of the best are kept; 0 = none")
    checkpoint_best_by: _OneMetric | None = Field(
        None,
        description="the metric that says which is best, on the first test set; null = PSNR, and of GANs the first of "
        "ST-LPIPS and SSG that is in test.validation; model ranker: always the share of pairs in order",
    )

    @property
    def iqa_losses(self) -> dict[str, float]:
        """The metrics that are losses, with their weights."""
        weights: dict[str, float] = self.iqa_weights.model_dump()
        weights["lpips_vgg"] += self.lpips_weight
        return {name: weight for name, weight in weights.items() if weight > 0}

    def optimizer(self, side: Side) -> OptimizerOptions:
        """How a side is trained."""
        betas, kind = self[f"{side}_optimizer_betas"], self[f"{side}_scheduler_type"]
        return OptimizerOptions(
            type=self[f"{side}_optimizer_type"],
            lr=self[f"{side}_optimizer_lr"],
            betas=betas and tuple(betas),
            wd=self[f"{side}_optimizer_wd"],
            clipgrad=self[f"{side}_optimizer_clipgrad"] or None,
            milestones=tuple(self[f"{side}_scheduler_milestones"]),
            gamma=self[f"{side}_scheduler_gamma"],
            warmup=self[f"{side}_scheduler_warmup"],
            cosine_end=self.iterations if kind == "CosineAnnealingLR" else None,
            eta_min=self[f"{side}_scheduler_eta_min"],
        )


class TestOptions(Section):
    """Validation in training and ``main_test.py``."""

    tile: Count | Literal["auto"] = Field(
        0,
        description='restore in tiles of this many L pixels; 0 = whole images, "auto" = whole if memory is enough',
    )
    tile_overlap: Count = Field(32, description="overlap of neighbouring tiles in L pixels")
    precision: Precision = Field(
        "fp32", description="what networks compute in (autocast), in validation too; images and weights are in fp32"
    )
    param_key: str | None = Field(None, description="which weights of the file; null = params_ema, params or the file")
    output: PathText | None = Field(None, description="folder for results; null = root/task/results")
    images: Count = Field(4, description="validation: how many images go into the grid; 0 = none")
    validation: list[MetricName] = Field(
        ["psnr", "ssim", "ssg"], description="what training measures, of E alone or with H: metrics or groups of them"
    )
    metrics: list[MetricName] = Field(["default"], description="what main_test.py measures: metrics or groups of them")
    report_images: Count = Field(30, description="main_test.py: how many images go into report.html; 0 = no such file")


class Options(Section):
    """All options of a run, resolved and checked."""

    task: Annotated[
        str, Field(pattern=r"^[^/\\\s.\x00-\x1f][^/\\\x00-\x1f]*$", max_length=200), AfterValidator(plain_path)
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


def patch_size(data: DatasetOptions) -> int:
    """Side of the H patch that reaches the losses, in pixels."""
    if data.lq_patchsize and data.dataset_type.startswith("blindsr"):
        return data.lq_patchsize * data.scale
    return data.H_size


# Of the weights, those of no loss of E: what a diffusion network predicts, and what discriminators say.
_NOT_FIDELITY = ("dm_weight", "D_lossfn_weight", "gradient_D_lossfn_weight")
FIDELITY_WEIGHTS = [n for n in TrainOptions.model_fields if n.endswith("_weight") and n not in _NOT_FIDELITY]


def fidelity_weight(train: TrainOptions) -> float:
    """The sum of what ModelSR.fidelity_terms weighs. A new option that ends in ``_weight`` is among it by itself."""
    return sum(train[name] for name in FIDELITY_WEIGHTS) + sum(train.iqa_losses.values())
