"""Option files of KAIR and of the original SSL code, as they are; and that no option is accepted without a word."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import training.loop as training
from data.files import list_files
from tests.conftest import photograph
from tests.training import SSL, Workplace
from utils import utils_option_checks
from utils.utils_error import UserError
from utils.utils_image import imsave
from utils.utils_option import Options, is_read, parse
from utils.utils_option_networks import Section

# Keys and values of 22 published files, the authors' own folders made neutral.
FILES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "golden" / "foreign_options.json").read_text(encoding="utf-8")
)
OTHER_TASKS = {
    "train_imdn": "IMDN",
    "train_srmd": "blur",
    "train_usrnet": "blur",
    "train_dpsr": "blur",
    "train_dncnn": "denoising",
    "train_drunet": "denoising",
    "train_swinir_car_jpeg": "JPEG",
    "train_swinir_denoising_color": "denoising",
    "train_swinir_denoising_gray": "denoising",
    "001_train_vrt_videosr_bi_reds_6frames": "videos",
}


def short(name: str) -> str:
    return name.partition(": ")[2].removesuffix(".json")


SR = [name for name in FILES if short(name) not in OTHER_TASKS]


def as_published(content: dict[str, Any]) -> str:
    """With a comment on every line, commas before keys: how these files are written."""
    text = json.dumps(content, indent=2)
    return re.sub(r",\n( *)", r'  // "a" | "b", a//b' + r"\n\1, ", text) + "  // the end\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, **changes: Any) -> Path:
        path = tmp_path / f"{short(name)}.json"
        path.write_text(as_published({**FILES[name], **changes}), encoding="utf-8")
        return path

    return write


# ------------------------------------------------------------------------------------------------------ they run


TINY_G = {
    "rrdbnet": ("nf=4", "nb=1", "gc=2"),
    "rrdb": ("nc=4", "nb=1", "gc=2"),
    "msrresnet0": ("nc=4", "nb=1"),
    "swinir": ("depths=[2]", "num_heads=[2]", "embed_dim=8", "img_size=16"),
    "elan": ("m_elan=2", "c_elan=12"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H, masks of them, and two L for each of two H, of scale 4."""
    root = tmp_path_factory.mktemp("foreign")
    for folder in ("H", "L", "mask"):
        (root / folder).mkdir()
    for i in range(2):
        imsave(photograph(100, 104, i), str(root / "H" / f"{i}.png"))
        imsave(255 * (photograph(100, 104, i, 1) > 128).astype(np.uint8), str(root / "mask" / f"{i}.png"))
        for n in range(2):
            imsave(photograph(25, 26, n), str(root / "L" / f"{i}+{n}.png"))
    return root


def reduced(content: dict[str, Any], place: Path) -> list[str]:
    """Overrides for a small machine: folders, sizes, no VGG19, whose weights are a download."""
    train, size = "datasets.train", 96 if "netD" in content and "vgg" in content["netD"]["net_type"] else 64
    result = [f"path.root={place}", "path.pretrained_netG=null", "train.iterations=2", "train.F_lossfn_weight=0"]
    result += [f"{train}.dataroot_H={place / 'H'}", f"{train}.dataroot_L=null", f"{train}.H_size={size}"]
    result += [f"{train}.dataloader_batch_size=1", f"{train}.dataloader_num_workers=0"]
    if "lq_patchsize" in content["datasets"]["train"]:
        result += [f"{train}.lq_patchsize={size // content['scale']}"]
    if "dataroot_H_mask" in content["datasets"]["train"]:
        result += [f"{train}.dataroot_H_mask={place / 'mask'}"]
    several = "SSL" in content["task"]  # its validation sets are given with their L
    result += [f"datasets.test.dataroot_H={place / 'H'}"]
    result += [f"datasets.test.dataroot_L={json.dumps(str(place / 'L')) if several else 'null'}"]
    result += [f"netG.{text}" for text in TINY_G[content["netG"]["net_type"]]]
    result += ["netD.base_nc=4"] if "netD" in content else []
    if content["model"] == "SSL":  # boxsum: nothing to compile in a test
        result += ["train.ssl_mode=boxsum", "train.kernel_size_search=5", "train.kernel_size_window=3"]
    return result


@pytest.mark.parametrize("name", SR)
def test_a_file_for_super_resolution_trains_unchanged(
    name: str, write, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = FILES[name]
    script = "main_train_psnr" if content["model"] == "plain" else "main_train_gan"
    monkeypatch.setattr(sys, "argv", [script, "--opt", str(write(name)), *reduced(content, place)])
    importlib.import_module(script).main()

    folder = place / content["task"]
    averaged = {"E"} if content["train"].get("E_decay", 0.999) else set()
    expected = {"G", "optimizerG"} | averaged | ({"D", "optimizerD"} if "netD" in content else set())
    assert {path.stem.partition("_")[2] for path in (folder / "models").glob("2_*.pth")} == expected
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "PSNR" in log
    assert log.count("accepted, but without meaning here") == 1


@pytest.mark.parametrize("name", SR)
def test_every_key_of_a_file_has_its_place_or_is_named(name: str, write) -> None:
    opt = parse(write(name))
    renamed = {"SSL_loss_type", "SSL1_loss_type", "SSL_loss_weight", "SSL1_loss_weight"}
    renamed |= {"tile_process", "save_test_image", "nc"}  # they have a meaning under another name

    def keys(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
        for key, value in section.items():
            yield (*prefix.split("."), key) if prefix else (key,)
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}.{key}" if prefix else key)

    for path in keys(FILES[name]):
        section: Any = opt
        for part in path[:-1]:
            section = section[part]
        known = path[-1] in section if isinstance(section, dict) else path[-1] in type(section).model_fields
        assert known or ".".join(path) in opt.unused or path[-1] in renamed, path


# ------------------------------------------------------------------------------------------- what their keys mean

ELAN_SSL = "SSL: train_ELANGANSSL_BSRGAN_DF2K_OST_x4.json"


@pytest.mark.parametrize(
    ("changes", "tile", "overlap", "unused"),
    [
        ({}, 0, 32, {"tile_size", "tile_pad"}),  # as published: tile_process is false
        # There tile_size is what is kept of a tile, which reads tile_pad more on each side.
        ({"tile_process": True}, 264, 64, set()),
        ({"tile_process": True, "tile_pad": 0}, 200, 0, set()),
        ({"tile_process": True, "tile_size": 0}, 0, 32, {"tile_process", "tile_size", "tile_pad"}),
        ({"tile_process": True, "test": {"tile": 48}}, 48, 32, {"tile_process", "tile_size", "tile_pad"}),
    ],
)
def test_tiles_of_the_original_code_are_those_of_section_test(
    write, changes: dict[str, Any], tile: int, overlap: int, unused: set[str]
) -> None:
    opt = parse(write(ELAN_SSL, **changes))
    assert (opt.test.tile, opt.test.tile_overlap) == (tile, overlap)
    assert {key for key in opt.unused if key.startswith("tile")} == unused


@pytest.mark.parametrize("key", ["tile_size=x", "tile_size=-1", "tile_pad=true", "tile_process=1", "save_test_image=0"])
def test_a_wrong_value_of_the_original_code_is_one_line(write, key: str) -> None:
    with pytest.raises(UserError, match=rf"{key.partition('=')[0]}: must be (a whole number of pixels|true or false)"):
        parse(write(ELAN_SSL), overrides=[key])


def test_save_test_image_decides_whether_validation_saves_images(write) -> None:
    assert parse(write(ELAN_SSL)).test.images == 0
    assert parse(write(ELAN_SSL, save_test_image=True)).test.images == 4


def test_rgb_mean_is_what_elan_subtracts(write) -> None:
    path = write(ELAN_SSL)
    small = ["netG.m_elan=1", "netG.c_elan=12"]
    assert define_G_mean(parse(path, overrides=small)) == pytest.approx([0.4488, 0.4371, 0.404])
    assert define_G_mean(parse(path, overrides=[*small, "netG.rgb_mean=[0.5, 0.25, 0]"])) == [0.5, 0.25, 0.0]
    with pytest.raises(UserError, match=r"netG\.rgb_mean: .*at least 3"):
        parse(path, overrides=["netG.rgb_mean=[0.5]"])


def define_G_mean(opt: Options) -> list[float]:
    from models.select_network import define_G

    return define_G(opt).mean.flatten().tolist()


def test_several_L_of_one_H_are_paired_by_the_name_before_the_plus(tmp_path: Path, write) -> None:
    for folder, names in (("H", "abc"), ("L", ("a+0", "a+1+x", "b+7", "d+0"))):
        (tmp_path / folder).mkdir()
        for name in names:
            imsave(photograph(8, 8), str(tmp_path / folder / f"{name}.png"))
    roots = [f"datasets.test.dataroot_{kind}={tmp_path / kind}" for kind in "HL"]
    data = parse(write(ELAN_SSL), overrides=roots).datasets["test"]
    assert data.dataset_type == "multiLR_oneGT"
    files, problems = list_files(data)
    pairs = [(Path(L).name, Path(H).name) for H, L, _ in files if L]
    # An H without L is left out; an L without H is a mistake.
    assert pairs == [("a+0.png", "a.png"), ("a+1+x.png", "a.png"), ("b+7.png", "b.png")]
    assert len(problems) == 1
    assert "d+0.png" in problems[0]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("multilr_onegt", "multiLR_oneGT"), ("BlindSR", "blindsr"), ("super-resolution", "sr"), ("PlainPatch", "plain")],
)
def test_names_of_data_sets_are_read_as_kair_reads_them(write, theirs: str, ours: str) -> None:
    opt = parse(write(ELAN_SSL), overrides=[f"datasets.test.dataset_type={theirs}"])
    assert opt.datasets["test"].dataset_type == ours


def test_total_iter_is_iterations(write) -> None:
    name = "KAIR: train_bsrgan_x4_psnr.json"
    assert parse(write(name), overrides=["train.total_iter=7"]).train.iterations == 7
    with pytest.raises(UserError, match=r"train\.total_iter and train\.iterations are one option"):
        parse(write(name), overrides=["train.total_iter=7", "train.iterations=7"])


@pytest.mark.parametrize("override", ["netG.scale=2", "netG.upscale=2", "netG.in_nc=1", "netG.n_channels=1"])
def test_what_contradicts_the_top_of_the_file_is_an_error_whatever_the_network(write, override: str) -> None:
    with pytest.raises(UserError, match=r"contradicts .*; remove it"):
        parse(write(ELAN_SSL), overrides=[override])


# ---------------------------------------------------------------------------------------------------- other tasks


@pytest.mark.parametrize("name", [name for name in FILES if name not in SR])
@pytest.mark.parametrize("is_train", [True, False], ids=["train", "test"])
def test_a_file_for_another_task_is_one_line_that_names_the_task(write, name: str, is_train: bool) -> None:
    with pytest.raises(UserError, match="this program does not do") as error:
        parse(write(name), is_train=is_train)
    message = str(error.value)
    assert OTHER_TASKS[short(name)] in message
    assert "unknown key" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "task"),
    [
        (["netG.net_type=ffdnet", "model=plain2"], "denoising"),
        (["netG.net_type=RVRT"], "videos"),
        (["datasets.train.dataset_type=VideoTestDataset"], "videos"),
        (["datasets.test.dataset_type=denoising-noiselevelmap"], "denoising"),
        (["netG.net_type=new", "path.root=dejpeg"], "JPEG artifacts"),
        (["netG.net_type=new", "task=FFDNet_color25"], "denoising"),
        (["model=plain4"], "told to the network"),
        (["netG.net_type=gpen"], "faces"),
    ],
)
def test_other_tasks_are_known_by_network_data_model_or_folder(write, overrides: list[str], task: str) -> None:
    with pytest.raises(UserError, match=f"{task}, which this program does not do"):
        parse(write(SR[0]), overrides=overrides)


def test_a_run_may_be_called_as_one_likes(write) -> None:
    opt = parse(write(SR[0]), overrides=["task=denoising_vrt_face", "path.root=denoising"])
    assert opt.task == "denoising_vrt_face"


# ------------------------------------------------------------------------------------- accepted and without meaning

# Contexts in which options are read or not. Together they have each kind of model, data and term.
SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": ("datasets.train.dataset_type=sr", "netG.init_type=orthogonal"),
    "elan": ("datasets.train.dataset_type=sr", 'netG={"net_type": "elan", "m_elan": 1, "c_elan": 12}'),
    "gan": ("model=gan", *SSL, "train.G_scheduler_milestones=[1]", "datasets.train.degradation_type=bsrgan_plus"),
    "realesrgan": (
        *("model=gan", "datasets.train.degradation_type=realesrgan", "datasets.train.use_sharp=true"),
        *("datasets.train.lq_patchsize=8", "train.G_lossfn_type=charbonnier", "train.D_lossfn_weight=0"),
    ),
    "gpu": (
        "datasets.train.degradation_device=gpu",
        "datasets.train.pair_pool=4",
        "test.tile=16",
        "test.tile_overlap=8",
    ),
    "dm": (
        *(
            "model=dm",
            "train.D_lossfn_weight=0",
            'diffusion={"type": "resshift", "steps": 2}',
            "train.G_scheduler_type=CosineAnnealingLR",
        ),
        'netG={"net_type": "unet2d", "block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, '
        '"mid_attention": false}',
    ),
}
# Read by main_test.py, said for a test set to come, or a label that somebody else reads.
READ_ELSEWHERE = {"test.param_key", "test.output", "test.metrics", "test.report_images", "train.checkpoint_test"}
READ_ELSEWHERE |= {"datasets.train.name", "datasets.test.name"}
# Filled in, compared with others in parse, or with one valid value.
FIXED = {"in_nc", "out_nc", "upscale", "net_type", "type", "colors", "in_chans", "is_train", "unused", "seed", "phase"}
FIXED |= {"diffusion", "netG", "netD", "netR", "autoencoder", "root"}
# What parse refuses where nothing would read it.
REFUSED = ("train.branch_weight=1", "train.gradient_D_lossfn_weight=1", "autoencoder.path=x")
REFUSED += ("datasets.train.pair_pool=4",)


def sections_of(opt: Options) -> dict[str, Section]:
    named = {"path": opt.path, "train": opt.train, "test": opt.test, "netG": opt.netG, "netD": opt.netD}
    named |= {"netR": opt.netR, "diffusion": opt.diffusion, "autoencoder": opt.autoencoder}
    named |= {f"datasets.{name}": data for name, data in opt.datasets.items()}
    return {"": opt} | {place: section for place, section in named.items() if section is not None}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_option_that_is_not_named_is_read_in_training(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workplace(tmp_path)
    opt = parse(work.file(), overrides=[*SETTINGS[setting], "train.iterations=2"])
    expected, places = is_read(opt), sections_of(opt)
    # Sections are copied in building: known by what they are, data sets by their phase.
    kinds = {(type(section), section.get("phase")): place for place, section in places.items()}
    seen: set[tuple[str, str]] = set()

    def read(self: Section, name: str) -> Any:
        if name in type(self).model_fields:
            phase = object.__getattribute__(self, "__dict__").get("phase")
            seen.add((kinds[type(self), phase], name))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(training, "is_read", lambda _: expected)
    monkeypatch.setattr(Section, "__getattribute__", read)
    training.train(opt)
    monkeypatch.undo()

    silent = {
        f"{place}.{name}".removeprefix(".")
        for place, section in places.items()
        if expected[""].get(place, True)
        for name in type(section).model_fields
        if expected.get(place, {}).get(name, True) and name not in FIXED and (place, name) not in seen
    }
    for override in REFUSED:
        if override.partition("=")[0] in silent:
            silent.remove(override.partition("=")[0])
            with pytest.raises(UserError):
                parse(work.file(), overrides=[*SETTINGS[setting], override])
    silent -= READ_ELSEWHERE
    assert not silent, silent


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_option_that_nothing_reads_is_named(setting: str, tmp_path: Path) -> None:
    work = Workplace(tmp_path)
    opt = parse(work.file(), overrides=[*SETTINGS[setting], "train.iterations=2"])
    whole = is_read(opt)[""]
    for place, fields in is_read(opt).items():
        if not place or not whole.get(place, True):
            continue
        for name in (name for name, used in fields.items() if not used):
            section = sections_of(opt)[place].model_copy(update={name: "other"})
            changed = {place: section}
            if place.startswith("datasets."):
                changed = {"datasets": {**opt.datasets, place.partition(".")[2]: section}}
            assert f"{place}.{name}" in utils_option_checks.unread(opt.model_copy(update=changed))


@pytest.mark.parametrize(
    ("overrides", "unused"),
    [
        (["datasets.train.dataset_type=sr", "datasets.train.use_sharp=true"], "datasets.train.use_sharp"),
        (["datasets.train.degradation_type=realesrgan", "datasets.train.shuffle_prob=0.1"], "shuffle_prob"),
        (["datasets.train.degradation_type=realesrgan", "datasets.train.camera_prob=0.5"], "camera_prob"),
        (["datasets.test.H_size=32"], "datasets.test.H_size"),
        (["train.F_weights=2"], "train.F_weights"),
        (["train.sigma=1"], "train.sigma"),
        (["train.R_optimizer_lr=1"], "train.R_optimizer_lr"),
        (["autoencoder.precision=bf16"], "autoencoder"),
        (["netG.init_gain=2"], "netG.init_gain"),
        (["netG.nb=16"], "netG.nb"),
        (["test.tile_overlap=8"], "test.tile_overlap"),
        (["path.pretrained_netE=x.pth", "train.E_decay=0"], "path.pretrained_netE"),
    ],
)
def test_what_has_no_effect_here_is_named(tmp_path: Path, overrides: list[str], unused: str) -> None:
    work = Workplace(tmp_path)
    named = parse(work.file(), overrides=overrides).unused
    assert any(key.endswith(unused) for key in named), named
    assert named == sorted(set(named), key=named.index)  # each once
