"""What a user can get wrong, through the real scripts: one line, status 2, no file touched.

A case is a command as a user types it, with variables of the environment before it, and what the line must hold. What
is wrong in a single option or argument alone has longer tables of its own (WRONG in test_option.py, MISTAKES in
test_main_test.py and others); here are the ways of all of them through the whole program, in one folder.
"""

import errno
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pytest
import torch
from scipy.io import savemat

from tests.conftest import photograph
from tests.test_main_test import save_checkpoint, save_run
from tests.training import Workplace
from utils import utils_dist, utils_error, utils_launch, utils_lmdb
from utils.utils_image import imsave


def images(folder: Path, size: int, names: str = "012", channels: int = 3, suffix: str = "png") -> None:
    folder.mkdir()
    for i, name in enumerate(names):
        imsave(photograph(size, size, i, channels), str(folder / f"{name}.{suffix}"))


def masks(folder: Path, size: int, key: str = "mat", value: int = 1) -> None:
    folder.mkdir()
    for name in "012":
        savemat(folder / f"{name}.mat", {key: np.eye(size, dtype=np.uint8) * value})


def options(root: Path, name: str, **changes: object) -> None:
    """The option file of the tiny training, with other sections."""
    (root / f"{name}.json").write_text(json.dumps({**json.loads((root / "o.json").read_text()), **changes}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the cases make mistakes with."""
    root = tmp_path_factory.mktemp("place")
    work = Workplace(root)  # H of 48 pixels and more, T of 40
    work.options["path"]["root"] = "runs"
    for key, data in (("train", "H"), ("test", "T")):
        work.options["datasets"][key] |= {"dataset_type": "sr", "dataroot_H": data}
    work.file()
    before = Path.cwd()
    os.chdir(root)
    try:
        work.run("datasets.test=null", "train.iterations=2", "task=made")
    finally:
        os.chdir(before)
    options(root, "gan", model="gan")
    options(root, "dm", model="dm")
    options(root, "ranker", model="ranker")
    unet = {"net_type": "unet2d"}
    options(root, "unet", model="dm", diffusion={"type": "resshift"}, netG=unet, train={"iterations": 2})
    options(root, "test", datasets={"test": {"dataset_type": "sr", "dataroot_H": "T"}})
    options(root, "same", datasets={name: {"dataroot_H": "T", "name": "set"} for name in ("test1", "test2")})

    images(root / "L", 12)
    images(root / "L_small", 10)
    images(root / "L_two", 12, "01")
    images(root / "pixel", 1)
    images(root / "gray", 48, channels=1)
    images(root / "twins", 12, "0")
    imsave(photograph(12, 12), str(root / "twins" / "0.jpg"))
    masks(root / "M_small", 20)
    masks(root / "M_key", 48, key="mask")
    masks(root / "M_value", 48, value=7)
    for folder in ("empty", "broken", "notes", "photos.lmdb", "halves.lmdb", "folder.pth", "odd", "hidden"):
        (root / folder).mkdir()
    whole = (root / "H" / "0.png").read_bytes()
    for name, content in {
        "broken/0.png": b"no image",
        "broken/1.png": b"",
        "broken/2.png": whole[: len(whole) // 2],
        "notes/a.txt": b"no image",
        "hidden/.0.png": whole,
        "odd/caf\udce9.png": b"no image",
        "note.txt": b"no checkpoint",
        "halves.lmdb/meta_info.txt": b"0.png (48,48,3) 1\n",
        "halves.lmdb/data.mdb": b"no database" * 1000,
        "page.pth": b"<!DOCTYPE html><title>404</title>",
        "page.json": b"<!DOCTYPE html><title>404</title>",
        "empty.pth": b"",
        "empty.json": b"",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "list.json": b"[]",
        "comment.json": b'{"task": "a"} /* of yesterday */',
        "quotes.json": b"{'task': 'a'}",
        "comma.json": b'{"task": "a",,}',
        "twice.json": b'{"task": "a", "task": "b"}',
        "utf16.json": '{"task": "a"}'.encode("utf-16"),
        "latin.json": '{"task": "caf\u00e9"}'.encode("latin-1"),
        "deep.json": b'{"task": ' + 100_000 * b"[",
        "nan.json": b'{"task": "a", "scale": NaN}',
    }.items():
        (root / name).write_bytes(content)

    save_run(root / "run")
    shutil.copytree(root / "run", root / "deep_run")
    (root / "deep_run/options/20260103_000000.json").write_bytes(100_000 * b"[")
    shutil.copytree(root / "run", root / "foreign_run")
    (root / "foreign_run/options/20260103_000000.json").write_text('{"scale": 4}')
    save_checkpoint(root / "good.pth")
    save_checkpoint(root / "x2.pth", scale=2)
    save_checkpoint(root / "gray.pth", n_channels=1)
    save_checkpoint(root / "wide.pth", netG={"net_type": "srvgg_compact", "nf": 16, "nc": 2})
    save_checkpoint(root / "other.pth", netG={"net_type": "msrresnet1", "nc": 8, "nb": 1})
    (root / "cut.pth").write_bytes((root / "good.pth").read_bytes()[:-500])
    (root / "cut.safetensors").write_bytes(b"\xff\xff\xff\xff\xff\xff\x00\x00{}")
    torch.save({"weights": [1, 2]}, root / "list.pth")
    torch.save(torch.nn.Linear(2, 2), root / "pickled.pth")
    shutil.copytree(root / "runs/made", root / "runs/damaged")
    for path in (root / "runs/damaged/models").glob("2_*"):
        path.write_bytes(path.read_bytes()[:100])
    shutil.copytree(root / "runs/made", root / "runs/blocked")
    shutil.rmtree(root / "runs/blocked/images")
    (root / "runs/blocked/images").write_text("")
    (root / "link").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "pipe.json")
        os.mkfifo(root / "pipe.png")
        os.mkfifo(root / "pipe.pth")
    return root


def everything(root: Path) -> dict[str, tuple[int, int, int]]:
    """All that lies below a folder, with kind, size and time (of folders not: a lock comes and goes)."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, *((0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)))
    return found


class Ended(NamedTuple):
    status: int
    err: str


Typed = Callable[[str], Ended]


@pytest.fixture
def typed(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs a command as a shell would, in this process."""
    monkeypatch.chdir(place)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(command: str) -> Ended:
        shutil.rmtree("runs/run", ignore_errors=True)  # of a case that was not refused
        words = shlex.split(command)
        while re.match(r"[A-Z_]+=", words[0]):
            monkeypatch.setenv(*words.pop(0).split("=", 1))
        monkeypatch.setattr(sys, "argv", words)
        script = import_module(words[0].removesuffix(".py"))
        start = utils_launch.run if "train" in words[0] else utils_error.run
        try:
            with pytest.raises(SystemExit) as ended:
                start(script.main)
        finally:
            utils_dist.close()
            utils_lmdb.close_all()
        return Ended(int(ended.value.code or 0), capsys.readouterr().err)

    return run


def assert_refused(ended: Ended, words: str) -> None:
    assert ended.status == 2, ended.err
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    assert re.search(words, ended.err), ended.err
    assert len(ended.err) < 1500


PSNR, TEST = "main_train_psnr.py --opt o.json", "main_test.py --model_path good.pth"
DATA, MASK = f"{PSNR} datasets.train.", f"{PSNR} datasets.train.dataset_type=srmask datasets.train.dataroot_H_mask="
START, MADE = f"{PSNR} path.pretrained_netG=", f"{PSNR} task=made train.iterations=4"
ENLARGE, PREPARE, SHOW = f"{TEST} --gt T", "main_prepare_data.py", "main_show_ssg.py"
TWO = "WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT"

CASES = {
    # command lines
    "main_train_psnr.py": "required: --opt",
    "main_train_psnr.py o.json": "required: --opt",
    "main_train_psnr.py --opt": "--opt: expected one argument",
    f"{PSNR} --opts x": "unrecognized arguments: --opts",
    f"{PSNR} --iterations 100": "unrecognized arguments: --iterations",
    f"{PSNR} --train.iterations=100": "unrecognized arguments: --train.iterations",
    f"{PSNR} train.iterations 100": "written key.path=value",
    f"{PSNR} train.iterations = 100": "written key.path=value",
    f"{PSNR} --dry_run=yes": "--dry_run/--dry-run: ignored explicit argument 'yes'",
    f"{PSNR} --dry_run datasets.train.dataroot_H=nowhere": "there is no nowhere",
    "main_train_psnr.py --opt gan.json": "train it with main_train_gan.py",
    "main_train_gan.py --opt o.json": "train it with main_train_psnr.py",
    "main_train_dm.py --opt o.json": "train it with main_train_psnr.py",
    "main_train_ranker.py --opt o.json": "train it with main_train_psnr.py",
    "main_test.py": "give either --opt FILE or --model_path PATH",
    f"{TEST}": "give --input FOLDER, --gt FOLDER or both",
    "main_test.py --model_path --gt T": "--model_path: expected at least one argument",
    f"{TEST} --gt": "--gt: expected at least one argument",
    "main_test.py --opt test.json --tile 0": r"test\.tile=256",
    "main_test.py --opt test.json tile=64": r"tile: unknown key; did you mean 'test\.tile'",
    f"{ENLARGE} --tile 1.5": "'1.5' is neither a number of pixels nor auto",
    f"{ENLARGE} --tile 16 --tile_overlap 16": "give a tile of at least 17",
    f"{ENLARGE} --tile 64 --tile_overlap -1": "must be 0 or more",
    f"{ENLARGE} --steps 10": "are for diffusion models",
    f"{ENLARGE} --metrics": "--metrics: expected at least one argument",
    f"{ENLARGE} --metrics PSNR": "did you mean psnr",
    f"{ENLARGE} --metrics psnr,ssim": "'psnr,ssim' is not a metric",
    f"{ENLARGE} --precision half": "invalid choice: 'half'",
    f"{ENLARGE} --device cuda": "use one of cpu",
    f"{ENLARGE} test.tile=4": r"test\.tile=4: there is no such folder",
    PREPARE: "required: COMMAND",
    f"{PREPARE} mask": "invalid choice: 'mask'",
    f"{PREPARE} masks --input H": "required: --output",
    f"{PREPARE} masks --input H --output new --threshold high": "--threshold: invalid finite number",
    f"{PREPARE} subimages --input H --output new --size big": "--size: invalid number from 1",
    f"{PREPARE} lr-bicubic --input H --output new --scale 0.5": "--scale: invalid number from 1",
    f"{PREPARE} multiscale --input H --output new --factors 0": "--factors: invalid number above 0",
    f"{PREPARE} check --opt o.json --H H": "either --opt FILE or folders",
    SHOW: "give either an IMAGE or --run FOLDER",
    f"{SHOW} H/0.png --pixel 1": "--pixel: expected 2 arguments",
    f"{SHOW} H/0.png --pixel a b": "invalid int value: 'a'",
    f"{SHOW} --run runs/made --pixel 1 1": "are for an IMAGE",
    "main_download_pretrained_models.py BSRGAN.pth": "unrecognized arguments: BSRGAN.pth",
    "main_download_pretrained_models.py --models bsrgann.pth": "do you mean BSRGAN.pth",
    # option files
    "main_train_psnr.py --opt ''": "cannot be read as a text file",
    "main_train_psnr.py --opt o.jsn": "did you mean o.json",
    "main_train_psnr.py --opt H": "cannot be read as a text file",
    "main_train_psnr.py --opt good.pth": "cannot be read as a text file",
    "main_train_psnr.py --opt link": "link: there is no such option file",
    "main_train_psnr.py --opt loop": "loop: cannot be read",
    "main_train_psnr.py --opt pipe.json": "is no file but a pipe",
    "main_train_psnr.py --opt page.json": "page.json: line 1, column 1",
    "main_train_psnr.py --opt empty.json": "the file ends before it is complete",
    "main_train_psnr.py --opt list.json": "one {...} object",
    "main_train_psnr.py --opt comment.json": "is no comment here: begin each line of a comment with //",
    "main_train_psnr.py --opt quotes.json": "stand in double quotes",
    "main_train_psnr.py --opt comma.json": "remove one comma",
    "main_train_psnr.py --opt twice.json": "'task' stands twice",
    "main_train_psnr.py --opt utf16.json": "save as UTF-8",
    "main_train_psnr.py --opt latin.json": "save as UTF-8",
    "main_train_psnr.py --opt deep.json": "nested too deeply",
    "main_train_psnr.py --opt nan.json": "scale: must be a valid integer, not NaN",
    "main_train_psnr.py --opt caf\udce9.json": r"caf\\udce9.json: there is no such option file",
    # options at the wrong place
    f"{PSNR} iterations=100": r"iterations: unknown key; did you mean 'train\.iterations'",
    f"{PSNR} H_size=32": r"H_size: unknown key; did you mean 'datasets\.train\.H_size'",
    f"{PSNR} pretrained_netG=good.pth": r"did you mean 'path\.pretrained_netG'",
    f"{PSNR} train.scale=2": r"train\.scale: unknown key; did you mean 'scale'",
    f"{PSNR} datasets.H_size=32": r"datasets\.H_size: must be a section",
    f"{PSNR} datasets.trian.H_size=32": r"datasets\.trian: a set is called train",
    f"{DATA}batch_size=2": "did you mean 'dataloader_batch_size'",
    f"{DATA}scale=2": "contradicts scale, 4; remove it",
    f"{PSNR} path.pretrained_netg=good.pth": "did you mean 'pretrained_netG'",
    f"{PSNR} netG=rrdbnet": 'netG: must be a section {...}, not "rrdbnet"',
    f"{PSNR} netG.net_type=RRDBNet": "did you mean 'rrdbnet'",
    f"{PSNR} netG.net_type=discriminator_unet": "is not a network of this program",
    f"{PSNR} netG.act_type=gelu": r"netG\.act_type: .*did you mean 'relu'",
    f"{PSNR} train.iqa_weights=lpips": r"iqa_weights: must be a section",
    f"{PSNR} datasets=null": "datasets: must be a section",
    # values
    f"{PSNR} train.iterations=": 'must be a valid integer, not ""',
    f"{PSNR} train.iterations=10k": "must be a valid integer",
    f"{PSNR} train.iterations=1,000": "must be a valid integer",
    f"{PSNR} train.iterations=[100]": r"must be a valid integer, not \[100\]",
    f"{PSNR} train.iterations=inf": "must be a valid integer",
    f"{PSNR} train.G_optimizer_lr=nan": "must be a valid number",
    f"{PSNR} train.G_optimizer_lr=NaN": "finite",
    f"{PSNR} train.G_optimizer_lr=-1e-4": "greater than 0",
    f"{PSNR} train.precision=fp8": "valid are: bf16, fp16, fp32",
    f"{PSNR} train.G_lossfn_weight=0": "nothing to train",
    f"{PSNR} train.rank_weight=1": "netR: is required",
    f"{PSNR} scale=3": r"H_size: 32 must be divisible by scale 3",
    f"{PSNR} scale=x4": "scale: must be a valid integer",
    f"{PSNR} n_channels=4": "must be 1 or 3",
    f"{PSNR} task=../up": "task: .* plain name",
    f"{PSNR} task=/tmp/x": "task: .* plain name",
    f"{PSNR} gpu_ids=0": "gpu_ids: must be a valid list",
    f"{PSNR} test.metrics=psnr": r"test\.metrics: must be a valid list",
    f"{DATA}H_size=-32": "greater than or equal to 1",
    f"{DATA}dataloader_batch_size=1000000000": "this machine has",
    f"{DATA}dataset_type=usrnet": "which this program does not do",
    "main_train_gan.py --opt gan.json datasets.train.H_size=36": "patches divisible by 8, not 36",
    "main_train_gan.py --opt gan.json netD=null": "netD: is required",
    "main_train_gan.py --opt gan.json train.gan_type=hinge": "valid are: gan, lsgan",
    "main_train_dm.py --opt dm.json": "is no network for model dm",
    "main_train_ranker.py --opt ranker.json": "netR: is required for model ranker",
    "main_test.py --opt test.json test.tile=full": r"test\.tile: must be",
    "main_test.py --opt test.json datasets=null": "datasets: must be a section",
    "main_test.py --opt same.json path.pretrained_netG=good.pth": "two test sets have one name",
    # data
    f"{DATA}dataroot_H=[H,T]": r"there is no \[H,T\]",
    f"{DATA}dataroot_H=[]": "dataroot_H is not set",
    f"{DATA}dataroot_H=empty": "empty holds no images",
    f"{DATA}dataroot_H=notes": "notes holds no images",
    f"{DATA}dataroot_H=hidden": "hidden holds no images",
    f"{DATA}dataroot_H=good.pth": "good.pth is not one of the images",
    f"{DATA}dataroot_H=link": "there is no link",
    f"{DATA}dataroot_H=pipe.png": "pipe.png",
    f"{DATA}dataroot_H=M_small": "M_small holds no images",
    f"{DATA}dataroot_H=broken": "none of the train images can be read: 3 problems",
    f"{DATA}dataroot_H=odd": r"caf\\udce9.png cannot be decoded",
    f"{DATA}dataroot_H=pixel": r"pixel/0.png \(1x1\): smaller than H_size 32",
    f"{DATA}dataroot_H=photos.lmdb": "photos.lmdb has no meta_info.txt",
    f"{DATA}dataroot_H=halves.lmdb": "cannot be opened as LMDB",
    f"{DATA}dataroot_L=L_small": "3 problems with the train images: .* not 1/4 of H/0.png",
    f"{DATA}dataroot_L=L_two": "H/2.png: no image in dataroot_L",
    f"{DATA}dataroot_L=H": "not 1/4 of H/0.png",
    f"{DATA}dataroot_L=broken": "none of the train images can be read",
    f"{MASK}M_small": "M_small/0.mat .*not the size of H/0.png",
    f"{MASK}M_key": 'has no variable "mat"',
    f"{MASK}M_value": "is not an edge mask",
    f"{MASK}H": "is not an edge mask",
    f"{MASK}empty": "empty holds no edge masks",
    f"{DATA}dataset_type=plain": "needs both dataroot_L and dataroot_H",
    f"{DATA}dataset_type=plain datasets.train.dataroot_L=H": "not 1/4 of",
    f"{PSNR} datasets.test.dataroot_H=pixel": "smaller than the scale 4",
    f"{PSNR} datasets.test.dataroot_H=broken": "none of the test images can be read",
    f"{PSNR} datasets.test.dataroot_L=L_small": "no image in dataroot_L|not 1/4 of",
    f"{TEST} --gt nowhere": "nowhere: there is no such folder",
    f"{TEST} --gt broken": "none of the test images can be read",
    f"{TEST} --gt pixel": "smaller than the scale 4",
    f"{TEST} --gt halves.lmdb": "cannot be opened as LMDB",
    f"{TEST} --gt H --input L_small": "3 problems",
    f"{TEST} --gt H --input L_two": "no image in dataroot_L",
    f"{TEST} --gt H T --input L": "1 for 2 test sets",
    f"{TEST} --gt - --input -": "- for both",
    f"{TEST} --input 'H/*.jpg'": "there is no such folder or image",
    f"{TEST} --input pipe.png": "pipe.png",
    f"{TEST} --input twins": "both would be saved as 0.png",
    f"{PREPARE} masks --input nowhere --output new": "nowhere does not exist",
    f"{PREPARE} subimages --input H --L L --output new --size 33 --step 32": "take 32",
    f"{PREPARE} modcrop --input twins --output new": "both would be saved as 0.png",
    f"{PREPARE} check --H nowhere": "nowhere does not exist",
    f"{SHOW} note.txt": "cannot be decoded",
    f"{SHOW} H": "there is no such image",
    f"{SHOW} pixel/0.png": "needs sides over 12 pixels",
    f"{SHOW} H/0.png --pixel 1000 1": "lies outside H/0.png",
    f"{SHOW} H/0.png --other T/0.png": "two images of one size",
    f"{SHOW} --run empty": "not a run's folder",
    # checkpoints
    f"{START}nowhere.pth": "there is no file nowhere.pth",
    f"{START}folder.pth": "there is no file folder.pth",
    f"{START}pipe.pth": "there is no file pipe.pth",
    f"{START}empty.pth": "empty.pth: the file is empty",
    f"{START}page.pth": "page.pth: .*no checkpoint",
    f"{START}pointer.pth": "pointer.pth: .*no checkpoint",
    f"{START}cut.pth": "cut.pth: cannot be read, it is damaged",
    f"{START}cut.safetensors": "cut.safetensors: cannot be read, it is damaged",
    f"{START}list.pth": "list.pth: expected weights by name",
    f"{START}pickled.pth": "pickled.pth: refused, .*save it again",
    f"{START}x2.pth": "x2.pth does not fit SRVGGNetCompact: 2 of another shape",
    f"{START}gray.pth": "gray.pth does not fit SRVGGNetCompact: 3 of another shape",
    f"{START}wide.pth": "wide.pth does not fit SRVGGNetCompact: 10 of another shape",
    f"{START}other.pth": "other.pth does not fit SRVGGNetCompact: .*unknown to the network",
    f"{START}runs/made/models/2_optimizerG.pth": "state of an optimizer",
    f"{START}good.pth path.pretrained_netE=x2.pth": "x2.pth does not fit",
    f"{START}H/0.png": "H/0.png: .*no checkpoint",
    "main_train_gan.py --opt gan.json path.pretrained_netD=good.pth": "good.pth does not fit DiscriminatorUNet",
    f"{PSNR} train.F_lossfn_weight=1 path.pretrained_netF=good.pth": "not the weights of VGG19",
    f"{PSNR} train.F_lossfn_weight=1 path.pretrained_netF=nowhere.pth": "there is no file nowhere.pth",
    "main_test.py --model_path '' --gt T": "holds no generator",
    "main_test.py --model_path runs --gt T": "runs: holds no generator",
    "main_test.py --model_path link --gt T": "link: there is no such checkpoint",
    "main_test.py --model_path pipe.pth --gt T": "pipe.pth: no such file",
    "main_test.py --model_path page.pth --gt T": "page.pth: .*no checkpoint",
    "main_test.py --model_path cut.pth --gt T": "cut.pth: cannot be read, it is damaged",
    "main_test.py --model_path pickled.pth --gt T": "pickled.pth: refused",
    "main_test.py --model_path o.json --gt T": "o.json: .*no checkpoint",
    "main_test.py --model_path deep_run --gt T": "these are not a run's options",
    "main_test.py --model_path foreign_run --gt T": "these are not a run's options",
    "main_test.py --model_path runs/damaged --gt T": "no weights in it are whole",
    "main_test.py --model_path good.pth good.pth --gt T": "the name 'good' is taken",
    "main_test.py --model_path a=good.pth A=wide.pth --gt T": "the name 'a' is taken",
    "main_test.py --model_path a/b=good.pth --gt T": "cannot be the name of a folder",
    "main_test.py --model_path good.pth x2.pth --gt T": "differs from good",
    "main_test.py --model_path good.pth gray.pth --gt T": "differs from good",
    f"{ENLARGE} --scale 2": "scale 2 contradicts the weights",
    f"{ENLARGE} --param_key params": "its weights are bare",
    "main_test.py --opt test.json task=nowhere": "runs/nowhere: there is no such checkpoint",
    "main_test.py --opt test.json path.pretrained_netG=x2.pth": "x2.pth does not fit",
    # a run's folder
    f"{MADE} netG.nf=16": "2_G.pth does not fit SRVGGNetCompact",
    f"{MADE} scale=2": "2_G.pth does not fit SRVGGNetCompact",
    f"{MADE} n_channels=1": "2_G.pth does not fit SRVGGNetCompact",
    f"{MADE} datasets.train.dataroot_H=L": "smaller than H_size",
    "main_train_gan.py --opt gan.json task=made train.iterations=4": "cannot go on from .*no 2_D.pth.*another task",
    f"{PSNR} task=damaged": "cannot go on from .*another task",
    f"{PSNR} task=blocked": "images is not a folder that can be written",
    f"{PSNR} path.root=note.txt": r"path\.root: note.txt/run cannot be written",
    f"{PSNR} path.root=link": r"path\.root: link/run cannot be written",
    f"{PSNR} path.root=loop": r"path\.root: loop/run cannot be written",
    f"{PSNR} path.root=/proc/nowhere": r"path\.root: /proc/nowhere/run cannot be written",
    # folders of results
    f"{ENLARGE} --output T": "holds the input image",
    f"{ENLARGE} --output note.txt/out": "note.txt is a file",
    f"{ENLARGE} --output link": "link to nowhere",
    f"{ENLARGE} --output loop/out": "link to nowhere",
    f"{ENLARGE} --output /proc/nowhere": "cannot be written",
    f"{PREPARE} masks --input H --output H/masks": "lies among the input images",
    f"{PREPARE} masks --input H --output notes": "not prepared by this program",
    f"{PREPARE} masks --input H --output link": "link to nowhere",
    f"{PREPARE} lmdb --input H --output new": r"ends in \.lmdb",
    f"{PREPARE} demo --trainsets note.txt": "cannot be made",
    f"{SHOW} H/0.png --output H/0.png": "one of the inputs",
    f"{SHOW} H/0.png --output x.pdf": r"name a \.png file",
    "main_download_pretrained_models.py --models BSRGAN.pth --model_dir note.txt": "note.txt cannot be made",
    # environment
    f"RANK=0 {PSNR}": "RANK set in the environment, but not WORLD_SIZE",
    f"LOCAL_RANK=0 {PSNR}": "LOCAL_RANK set in the environment, but not RANK",
    f"RANK=0 WORLD_SIZE=2 {PSNR}": "but not MASTER_ADDR, MASTER_PORT",
    f"RANK=zero WORLD_SIZE=1 {PSNR}": "RANK=zero in the environment: a whole number",
    f"RANK=-1 WORLD_SIZE=1 {PSNR}": "RANK=-1 in the environment: a whole number",
    f"RANK=2 {TWO}=29511 {PSNR}": "a whole number from 0 to 1 is needed",
    f"RANK=0 {TWO}=99999 {PSNR}": "MASTER_PORT=99999 in the environment",
    f"RANK=0 WORLD_SIZE=1 LOCAL_RANK=5 {PSNR}": "LOCAL_RANK=5 in the environment",
    f"CUDA_VISIBLE_DEVICES=-1 {ENLARGE} --device cuda:0": "use one of cpu",
    f"CUDA_VISIBLE_DEVICES=-1 {PSNR} train.ssl_l1_weight=1 train.ssl_mode=cuda": "cannot be had here",
}


@pytest.mark.parametrize("command", CASES, ids=ascii)
def test_a_mistake_is_one_line_and_status_2_and_touches_no_file(place: Path, typed: Typed, command: str) -> None:
    before = everything(place)
    assert_refused(typed(command), CASES[command])
    assert everything(place) == before


# ------------------------------------------------------------------------------- what the machine lacks, by a stand-in

WITHOUT = [
    ("torchmetrics", f"{ENLARGE} --metrics lpips", "torchmetrics.*requirements-extra.txt"),
    ("torchmetrics", f"{PSNR} train.iqa_weights.dists=1", "torchmetrics.*requirements-extra.txt"),
    ("pytorch_fid", f"{ENLARGE} --metrics fid", "pytorch_fid.*requirements-extra.txt"),
    ("pyiqa", f"{ENLARGE} --metrics niqe", "pyiqa.*requirements-extra.txt"),
    ("spandrel", f"{START}good.pth netG.net_type=spandrel", "spandrel.*requirements-extra.txt"),
    ("diffusers", "main_train_dm.py --opt unet.json", "diffusers.*requirements-extra.txt"),
    ("lmdb", f"{DATA}dataroot_H=halves.lmdb", "lmdb.*requirements.txt"),
    ("lmdb", f"{PREPARE} lmdb --input H --output new.lmdb", "lmdb.*requirements.txt"),
    ("matplotlib", f"{SHOW} H/0.png --pixel 20 20", "matplotlib.*requirements.txt"),
    ("stlpips_pytorch", f"{PSNR} train.iqa_weights.stlpips=1", "stlpips.*requirements.txt"),
]


@pytest.mark.parametrize(("package", "command", "words"), WITHOUT, ids=[f"{w[0]}: {w[1]}" for w in WITHOUT])
def test_a_package_that_is_not_installed_is_named_with_the_command(
    place: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch, package: str, command: str, words: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    before = everything(place)
    assert_refused(typed(command), words)
    assert everything(place) == before


def denied(*arguments: object, **_: object) -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(arguments[0]))


def full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# A function of the system | its stand-in | command | words. Folders, and what a run wrote before, may be new.
REFUSED = [
    ("pathlib.Path.read_text", denied, PSNR, "o.json: cannot be read as a text file .*Permission denied"),
    ("os.scandir", denied, PSNR, "holds no images"),
    ("os.scandir", denied, ENLARGE, "holds no images"),
    ("numpy.fromfile", denied, f"{SHOW} H/0.png --pixel 20 20", "H/0.png cannot be read: Permission denied"),
    ("numpy.fromfile", denied, ENLARGE, "T/0.png cannot be read: Permission denied"),
    ("os.access", lambda *_: False, PSNR, r"path\.root: runs/run cannot be written"),
    (
        "pathlib.Path.mkdir",
        denied,
        f"{PSNR} path.root=new",
        r"path\.root: new/run cannot be written \(Permission denied\)",
    ),
    ("pathlib.Path.mkdir", denied, f"{ENLARGE} --output new", "new.*: cannot be written: Permission denied"),
    ("pathlib.Path.mkdir", denied, f"{PREPARE} masks --input H --output new", "new.*Permission denied"),
    ("os.replace", full, f"{ENLARGE} --output new", "cannot be written: No space left on device"),
    ("torch.save", full, f"{PSNR} task=full", r"cannot be written: .*No space left on device"),
    ("os.replace", full, f"{SHOW} H/0.png --pixel 20 20 --output new.png", "cannot be written.*No space left"),
]


@pytest.mark.parametrize(
    ("function", "stand_in", "command", "words"), REFUSED, ids=[f"{r[0]}: {r[2]}" for r in REFUSED]
)
def test_what_the_system_refuses_is_one_line_and_leaves_no_half_file(
    place: Path,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    stand_in: Callable[..., object],
    command: str,
    words: str,
) -> None:
    before = everything(place)
    with monkeypatch.context() as patch:
        patch.setattr(function, stand_in)
        ended = typed(command)
    assert_refused(ended, words)
    after = everything(place)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path.endswith((".part", "run.lock"))]
    for name in ("new", "runs/full"):
        shutil.rmtree(place / name, ignore_errors=True)


def test_a_terminal_of_the_C_locale_gets_the_line_in_its_letters(
    place: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stderr", stream)
    assert typed("main_train_psnr.py --opt caf\u00e9\udce9.json").status == 2
    stream.flush()
    assert stream.buffer.getvalue().startswith(b"error: caf\\xe9\\udce9.json: there is no")  # type: ignore[attr-defined]
