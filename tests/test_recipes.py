"""The option files of the systems: what they say against what was published, and that each of them trains."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from main_test import main as main_test
from models.network_ranksrgan import RankerVGG12
from tests.conftest import REPOSITORY, photograph
from utils.utils_image import imsave
from utils.utils_option import Options, parse, patch_size, strip_comments

OPTIONS = REPOSITORY / "options"
TRAIN = sorted(p.stem for p in OPTIONS.glob("train_*.json"))
GAN: tuple[str, ...] = ("bebygan", "bsrgan", "elan_gan", "elan_gan_blind", "esrgan", "ldl", "ranksrgan", "realesrgan")
GAN += ("spsr", "swinir_gan", "swinir_gan_blind")
STAGES = ("bsrgan_psnr", "elan_psnr", "elan_psnr_blind", "realesrnet", "spsr_psnr", "swinir_psnr_blind")
RECIPES = [*(f"train_{name}{ssl}" for name in GAN for ssl in ("", "_ssl")), *(f"train_{name}" for name in STAGES)]

SSL_FIELDS = {"ssl_l1_weight", "ssl_kl_weight", "kernel_size_search", "kernel_size_window", "sigma", "mask_stride"}


def raw(name: str) -> dict[str, Any]:
    return json.loads(strip_comments((OPTIONS / f"{name}.json").read_text(encoding="utf-8")))


def options(name: str, *overrides: str) -> Options:
    return parse(OPTIONS / f"{name}.json", overrides=overrides)


def command(name: str) -> tuple[str, str]:
    """The script and the option file of the command line at the top of a file."""
    text = (OPTIONS / f"{name}.json").read_text(encoding="utf-8")
    found = re.search(r"^//   python (main_train_\w+)\.py --opt options/(\w+)\.json$", text[: text.index("{")], re.M)
    assert found, "no command line at the top"
    return found[1], found[2]


# ---------------------------------------------------------------------------------------------------------- the files


def test_every_system_has_its_files() -> None:
    others = {"train_demo_psnr", "train_demo_gan_ssl", "train_demo_color", "train_spandrel_ssl", "train_ranker"}
    others |= {name for name in TRAIN if raw(name)["model"] == "dm"}  # have tests of their own
    assert set(TRAIN) - others == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_is_called_as_its_run_and_its_command(name: str) -> None:
    opt = options(name)
    assert opt.task == name.removeprefix("train_")
    assert opt.unused == []
    assert command(name) == ("main_train_psnr" if opt.model == "plain" else "main_train_gan", name)


@pytest.mark.parametrize("name", GAN)
def test_a_file_and_its_twin_with_ssl_differ_in_ssl_alone(name: str) -> None:
    plain, ssl = raw(f"train_{name}"), raw(f"train_{name}_ssl")
    assert ssl["train"].keys() >= SSL_FIELDS
    for field in SSL_FIELDS:
        del ssl["train"][field]
    assert plain.pop("task") + "_ssl" == ssl.pop("task")
    assert plain == ssl


@pytest.mark.parametrize("name", [*GAN, "spandrel_ssl"])
def test_what_is_trained_is_tested_with_the_same_network(name: str) -> None:
    trained = options(f"train_{name}")
    file = OPTIONS / f"test_{name.removesuffix('_ssl').removesuffix('_blind')}.json"
    tested = parse(file, is_train=False)
    assert tested.netG.model_dump() == trained.netG.model_dump()
    assert tested.task == file.stem
    assert {data.name for data in tested.test_sets.values()} >= {"Set5", "Set14"}


@pytest.mark.parametrize("name", GAN)
def test_a_run_starts_from_published_weights_or_from_the_last_average_of_its_stage(name: str) -> None:
    opt = options(f"train_{name}")
    start = Path(opt.path.pretrained_netG or "")
    if start.parts[0] == "model_zoo":
        return
    stage = options(f"train_{start.parts[1]}")
    assert start == stage.task_dir / "models" / f"{stage.train.iterations}_E.pth"
    assert start.parts[1] in STAGES
    assert stage.netG == opt.netG.model_copy(update={n: stage.netG[n] for n in ("init_type", "init_gain")})
    assert stage.train_set is not None
    assert opt.train_set is not None
    assert patch_size(stage.train_set) == patch_size(opt.train_set)
    assert stage.train_set.degradation_type == opt.train_set.degradation_type


# -------------------------------------------------------------------------------------------------- published figures


class Published(NamedTuple):
    """The figures of one recipe of the SSL paper's code; iterations and milestones in thousands."""

    netG: str
    netD: str
    batch: int  # of one GPU (BasicSR) or of all (KAIR)
    patch: int  # pixels of H
    iterations: int
    milestones: tuple[float, ...]
    degradation: str = "bicubic"
    pixel: float = 0.01
    features: dict[int, float] = {34: 1}  # noqa: RUF012, never changed
    gan: tuple[str, float] = ("ragan_basicsr", 5e-3)
    beta2: float = 0.99
    ssl: int = 1000
    stride: int = 0  # what is applied
    gamma: float = 0.5
    more: dict[str, Any] = {}  # noqa: RUF012, never changed


FIVE = {2: 0.1, 7: 0.1, 16: 1, 25: 1, 34: 1}
QUARTERS = (50, 100, 200, 300)
KAIR: dict[str, Any] = {
    "degradation": "bsrgan_light",
    "pixel": 1,
    "features": FIVE,
    "gan": ("lsgan", 1),
    "beta2": 0.999,
    "ssl": 500,
    "stride": 3,
}
SPSR = {"gradient_weight": 0.01, "branch_weight": 0.5, "gradient_D_lossfn_weight": 5e-3}
BEBY = {"best_buddy_weight": 1, "back_projection_weight": 1, "region_aware": True}
CONV345 = {16: 0.125, 25: 0.25, 34: 0.5}
PUBLISHED: dict[str, Published] = {
    "esrgan": Published("rrdbnet", "vgg_style 128", 64, 128, 400, QUARTERS),
    "ranksrgan": Published(
        "ranksrgan_srresnet", "vgg_style 296", 32, 296, 500, QUARTERS, gan=("gan", 5e-3), more={"rank_weight": 0.03}
    ),
    "spsr": Published("spsr", "vgg_style 128", 30, 128, 400, QUARTERS, more=SPSR),
    "bebygan": Published("rrdbnet", "vgg_style 192", 16, 192, 600, (200, 400), pixel=0, features=CONV345, more=BEBY),
    "ldl": Published("rrdbnet", "vgg_style 128", 64, 128, 300, (200,), features=FIVE, gamma=1, more={"ldl_weight": 1}),
    "swinir_gan": Published("swinir", "vgg_style 256", 4, 256, 100, (50, 80, 90, 95, 100)),
    "elan_gan": Published("elan", "vgg_style 192", 16, 192, 300, (200, 250, 275, 287.5)),
    "realesrgan": Published(
        "rrdbnet", "unet_sn", 12, 256, 150, (100,), "realesrgan_light", 1, FIVE, ("gan", 0.1)
    ),  # EMA apart: published without
    "bsrgan": Published("rrdbnet", "unet", 48, 256, 150, (40, 80), **KAIR),
    "swinir_gan_blind": Published("swinir", "unet", 16, 256, 300, (200, 250, 287.5), **KAIR),
    "elan_gan_blind": Published("elan", "unet", 64, 192, 300, (200, 250, 275, 287.5), **KAIR),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "rrdbnet": {"nf": 64, "nb": 23, "gc": 32},
    "spsr": {"nf": 64, "nb": 23, "gc": 32, "upsample_mode": "upconv"},
    "ranksrgan_srresnet": {"nf": 64, "nb": 16},
    "swinir": {
        **{"window_size": 8, "img_range": 1, "depths": [6] * 6, "embed_dim": 180, "num_heads": [6] * 6},
        **{"img_size": 64, "mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv"},
        **{"drop_path_rate": 0.1, "padding": "reflect"},
    },
    "elan": {"window_sizes": [4, 8, 16], "m_elan": 36, "c_elan": 180, "n_share": 0, "r_expand": 2, "img_range": 255},
}
# What a system adds is off in all the others.
OFF = {"gradient_weight": 0, "branch_weight": 0, "gradient_D_lossfn_weight": 0, "rank_weight": 0, "ldl_weight": 0}
OFF |= {"best_buddy_weight": 0, "back_projection_weight": 0, "region_aware": False, "rank_published": False}
OFF |= {"color_weight": 0}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "options").glob("train_*.json")), ids=lambda path: path.stem)
def test_validation_is_there_or_is_switched_on_by_removing_its_slashes(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    block = re.search(r' // "test": \{\n(.*//.*\n)*? *// \}\n', text)
    if block:
        text = text.replace(block[0], re.sub(r"^ *// ?", "", block[0], flags=re.MULTILINE))
    edited = tmp_path / path.name
    edited.write_text(text, encoding="utf-8")
    assert "test" in parse(str(edited)).datasets


@pytest.mark.parametrize("suffix", ["", "_ssl"])
@pytest.mark.parametrize("name", GAN)
def test_the_figures_are_the_published_ones(name: str, suffix: str) -> None:
    opt, p = options(f"train_{name}{suffix}"), PUBLISHED[name]
    train, data, netD = opt.train, opt.train_set, opt.netD
    assert data is not None
    assert netD is not None

    assert opt.netG.net_type == p.netG
    assert {key: opt.netG[key] for key in NETWORKS[p.netG]} == NETWORKS[p.netG]
    kind, _, size = p.netD.partition(" ")
    assert (netD.net_type, netD.base_nc, netD.get("input_size")) == (
        f"discriminator_{kind}",
        64,
        int(size) if size else None,
    )
    if p.gan[0] == "lsgan":  # KAIR initialises it so, BasicSR as torch does
        assert (netD.init_type, netD.init_gain) == ("orthogonal", 0.2)

    bicubic = data.dataset_type == "sr"
    assert ("bicubic" if bicubic else data.degradation_type) == p.degradation
    assert (data.dataloader_batch_size, patch_size(data)) == (p.batch, p.patch)

    assert train.iterations == 1000 * p.iterations
    assert train.manual_seed == (None if p.gan[0] == "lsgan" else 0)  # KAIR draws one
    for side in "GD":
        assert train[f"{side}_optimizer_lr"] == 1e-4
        assert train[f"{side}_optimizer_betas"] == [0.9, p.beta2]
        assert train[f"{side}_optimizer_wd"] == 0
        assert train[f"{side}_scheduler_milestones"] == [1000 * m for m in p.milestones]
        assert train[f"{side}_scheduler_gamma"] == p.gamma
    assert train.E_decay == 0.999
    assert (train.D_init_iters, train.D_update_ratio) == (0, 1)

    assert (train.G_lossfn_type, train.G_lossfn_weight) == ("l1", p.pixel)
    layers, weights = (v if isinstance(v, list) else [v] for v in (train.F_feature_layer, train.F_weights))
    features = dict(zip(layers, weights, strict=True))
    assert (train.F_lossfn_type, train.F_lossfn_weight, features) == ("l1", 1, p.features)
    assert (train.gan_type, train.D_lossfn_weight) == p.gan
    assert {key: train[key] for key in OFF} == OFF | p.more
    if suffix:
        assert (train.ssl_l1_weight, train.ssl_kl_weight, train.mask_stride) == (p.ssl, p.ssl, p.stride)
        assert (train.kernel_size_search, train.kernel_size_window, train.sigma) == (25, 9, 0.004)
        assert (train.generalization, train.mask_threshold) == (True, 20)
    else:
        assert train.ssl_l1_weight == train.ssl_kl_weight == 0


# -------------------------------------------------------------------------------------------------- they train indeed

TINY_G = {
    "rrdbnet": ("nf=4", "nb=1", "gc=2"),
    "spsr": ("nf=4", "nb=20", "gc=2"),  # the branch needs 20 blocks
    "ranksrgan_srresnet": ("nf=4", "nb=1"),
    "swinir": ("depths=[2]", "num_heads=[2]", "embed_dim=8", "img_size=16"),
    "elan": ("m_elan=2", "c_elan=12"),
    "msrresnet1": ("nc=4", "nb=1"),
}
TERMS = {
    **{"gradient": "gradient_weight", "branch": "branch_weight", "D_grad_loss": "gradient_D_lossfn_weight"},
    **{"ldl": "ldl_weight", "best_buddy": "best_buddy_weight", "back_projection": "back_projection_weight"},
    **{"rank": "rank_weight", "color": "color_weight", "ssl": "ssl_l1_weight"},
    **{"G_loss": "G_lossfn_weight", "D_loss": "D_lossfn_weight"},
}
SAVED = {"plain": "", "gan": "D optimizerD", "spsr": "D D_grad optimizerD optimizerD_grad"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with training images of H, small ones of L to restore, and a ranker."""
    root = tmp_path_factory.mktemp("recipes")
    for folder, size in (("H", 136), ("L", 20)):
        (root / folder).mkdir()
        for i in range(2):
            imsave(photograph(size, size + 4 * i, i), str(root / folder / f"{i}.png"))
    torch.save(RankerVGG12(base_nc=4).state_dict(), root / "ranker.pth")
    return root


def reduced(opt: Options, place: Path) -> list[str]:
    """Overrides that leave a recipe its kinds of networks, data and losses, and take its size and its downloads."""
    assert opt.train_set is not None
    fixed = opt.netD is not None and opt.netD.net_type == "discriminator_vgg_style"  # takes 128 pixels or more
    size = 128 if fixed else 64
    result = [f"path.root={place}", "path.pretrained_netG=null", f"datasets.train.dataroot_H={place / 'H'}"]
    result += [f"datasets.train.H_size={size}", "datasets.train.dataloader_batch_size=1"]
    result += ["datasets.train.dataloader_num_workers=0", "train.manual_seed=1", "train.checkpoint_print=1"]
    result += ["train.checkpoint_save=2", "datasets.test=null"]
    result.append("train.F_lossfn_weight=0")  # VGG19's weights are a download
    if opt.train_set.lq_patchsize:
        result.append(f"datasets.train.lq_patchsize={size // 4}")
    result += [f"netG.{text}" for text in TINY_G[opt.netG.net_type]]
    if opt.netD is not None:
        result += [f"netD.base_nc={1 if fixed else 4}", *(["netD.input_size=128"] if fixed else [])]
        result.append("train.D_init_iters=0")
    if opt.netR is not None:
        result += ["netR.base_nc=4", f"path.pretrained_netR={place / 'ranker.pth'}"]
    if opt.train.ssl_l1_weight:
        # boxsum: nothing to compile in a test
        result += ["train.ssl_mode=boxsum", "train.kernel_size_search=5", "train.kernel_size_window=3"]
    return result


@pytest.mark.parametrize("name", [*RECIPES, "train_demo_color"])
def test_a_recipe_trains_saves_goes_on_and_restores(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = options(name)
    script, _ = command(name)
    arguments = [script, "--opt", str(OPTIONS / f"{name}.json"), *reduced(opt, place)]
    for iterations in (2, 4):
        monkeypatch.setattr(sys, "argv", [*arguments, f"train.iterations={iterations}"])
        importlib.import_module(script).main()

    folder = place / opt.task
    expected = {"G", "E", "optimizerG", *SAVED[opt.model].split()}
    assert {path.stem.partition("_")[2] for path in (folder / "models").glob("4_*.pth")} == expected
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "resumed at step 2" in log
    losses = next(line for line in log.splitlines() if "step 4/4" in line)
    assert {term for term in TERMS if f" {term} " in losses} == {term for term in TERMS if opt.train[TERMS[term]] > 0}
    first, last = (torch.load(folder / "models" / f"{step}_G.pth", weights_only=True) for step in (2, 4))
    assert any(not torch.equal(first[key], last[key]) for key in first)

    main_test(["--model_path", str(folder), "--input", str(place / "L"), "--output", str(folder / "E")])
    assert len(list((folder / "E").rglob("*.png"))) >= 2
