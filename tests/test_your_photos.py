"""Every command of docs/your_photos.md, one after the other, in one folder, with a small network and few steps."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import main_export
import main_prepare_data
import main_test
from models.network_rrdbnet import RRDBNetBasicSR
from models.published import select
from models.select_network import define_D
from tests.conftest import REPOSITORY, photograph
from training.command_line import training_command
from training.loop import train
from utils.utils_checkpoint import save_network
from utils.utils_image import imsave

COMMANDS = re.findall(r"^python (main_\w+\.py .*)$", (REPOSITORY / "docs" / "your_photos.md").read_text(), re.MULTILINE)
NETWORKS = {"netG.nf": 8, "netG.nb": 1, "netG.gc": 4, "netD.base_nc": 4}
SMALL = {
    **NETWORKS,
    "train.iterations": 2,
    "train.checkpoint_test": 2,
    "train.checkpoint_save": 2,
    "train.precision": "fp32",  # not every CPU has bf16
    "train.F_lossfn_weight": 0,  # VGG19's weights would be downloaded
    "train.kernel_size_search": 9,
    "train.kernel_size_window": 3,
    "train.iqa_weights.stlpips": 0,
    "datasets.train.dataloader_batch_size": 1,
    "datasets.train.dataloader_num_workers": 0,
    "datasets.train.lq_patchsize": 16,
}


OF_DEMO = {"train.iterations": 2, "train.checkpoint_save": 2, "datasets.train.dataloader_batch_size": 1}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user has come to: the repository's options, photographs, and small networks under the published names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options").symlink_to(REPOSITORY / "options")
    for name, count, size in (("photos", 2, 420), ("judge", 1, 66), ("small", 1, 24)):
        (tmp_path / name).mkdir()
        for i in range(count):
            imsave(photograph(size, size, 10 * size + i), str(tmp_path / name / f"{i}.png"))
    (tmp_path / "model_zoo").mkdir()
    torch.manual_seed(0)
    save_network(RRDBNetBasicSR(nf=8, nb=1, gc=4), tmp_path / "model_zoo" / "RealESRGAN_x4plus.pth")
    netD = {"net_type": "discriminator_unet_sn", "base_nc": 4}
    options = {"scale": 4, "n_channels": 3, "is_train": True, "netD": netD}
    save_network(define_D(options), tmp_path / "model_zoo" / "RealESRGAN_x4plus_netD.pth")
    return tmp_path


def test_the_way_from_photographs_to_an_upscaler_can_be_gone(folder: Path) -> None:
    scripts = [command.partition(" ")[0] for command in COMMANDS]
    assert scripts[:3] == ["main_prepare_data.py"] * 3
    assert {"main_download_pretrained_models.py", "main_train_gan.py", "main_test.py"} <= {*scripts}
    for command in COMMANDS:
        script, *arguments = shlex.split(command)
        if script == "main_prepare_data.py":
            assert main_prepare_data.main(arguments) == 0
        elif script == "main_download_pretrained_models.py":
            assert all(file.url for file in select(arguments[1:]))  # it is not fetched here
        elif script.startswith("main_train"):
            small = [f"{key}={value}" for key, value in (OF_DEMO if "demo" in command else SMALL).items()]
            arguments = [argument.replace("600_E", "2_E") for argument in arguments]
            train(*training_command(None, ["plain", "gan"], [*arguments, *small]))
        elif script == "main_export.py":
            main_export.main(arguments)
        else:
            main_test.main([argument.replace("20000_E", "2_E") for argument in arguments])
    assert (folder / "results" / "judge" / "report.html").is_file()
    assert {path.parent.parent.name for path in (folder / "results" / "small").rglob("0.png")} == {"before", "after"}
    assert [path.name for path in (folder / "results" / "final").rglob("0.png")] == ["0.png"]
    assert (folder / "experiments" / "photos_gan_ssl" / "models" / "2_E.pth").is_file()
    assert {path.suffix for path in (folder / "exported").iterdir()} >= {".safetensors", ".param", ".bin"}
