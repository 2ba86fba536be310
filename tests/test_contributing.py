"""CONTRIBUTING.md works word for word: its pieces of code, put where they say, add a loss, a network and a recipe."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ROOMS = ("training", "data", "models", "evaluation", "utils", "similarity_cuda", "options", "tests")

# What is then done with them: the loss alone, by every kind of model; the network; the recipe.
TRAIN = """
import sys
from pathlib import Path
from tests.test_model_dm import NETG, RESSHIFT
from tests.training import Workplace
from training.loop import train, training_options

root = Path(sys.argv[1])
alone = ("train.tv_weight=0.5", "train.G_lossfn_weight=0", "train.iterations=2", "datasets.test=null")

def place(name, *without):
    (root / name).mkdir()
    work = Workplace(root / name)
    for key in without:
        del work.options["train"][key]
    return work

place("plain").run(*alone)
place("gan").run("model=gan", *alone)
place("spsr").run("model=spsr", "train.gradient_D_lossfn_weight=0.1", *alone)
dm = place("dm", "gan_type", "D_lossfn_weight")
del dm.options["netD"]
dm.options |= {"model": "dm", "netG": NETG, "diffusion": RESSHIFT}
dm.run(*alone, "train.dm_weight=0")
work = place("network")
work.options["netG"] = {"net_type": "fsrcnn", "nf": 8, "nb": 1}
work.run("train.iterations=2")
here = f"path.root={root / 'recipe'}"
small = ("H_size=32", "dataloader_batch_size=2", "dataloader_num_workers=0", f"dataroot_H={work.root / 'H'}")
overrides = [here, "train.iterations=1", *(f"datasets.train.{value}" for value in small)]
train(training_options(None, ["plain"], ["--opt", "options/train_fsrcnn_tv.json", *overrides]))
"""


def pieces() -> list[tuple[str, str, str]]:
    """(file, place, code) of every block of code: the place is "a new file", "at the end" or what stands behind it."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = []
    for indent, block in re.findall(r"^( *)```(?:python|json)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        first, _, code = "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True)).partition("\n")
        match = re.fullmatch(r'(?:#|//) (\S+), (a new file|at the end|before "(.*)")', first)
        assert match, f"{first}: does not say where the code goes"
        found.append((match[1], match[3] or match[2], code))
    return found


def put(code: str, file: Path, where: str) -> None:
    """Do with a piece of code what its first line says."""
    if where == "a new file":
        assert not file.exists()
        file.write_text(code, encoding="utf-8")
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if where == "at the end":
        lines += ["\n\n", code]
    else:
        at = [number for number, line in enumerate(lines) if line.strip().startswith(where)]
        assert len(at) == 1, f"{file.name}: {len(at)} lines begin with {where}"
        lines.insert(at[0], code)
    file.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with all pieces in their places, in which all of it has been trained."""
    pytest.importorskip("diffusers")
    copy, runs = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("runs")
    for room in ROOMS:
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(REPOSITORY / room, copy / room, ignore=ignored)
    for script in REPOSITORY.glob("main_*.py"):
        shutil.copy(script, copy)
    for file, where, code in pieces():
        put(code, copy / file, where)
    command = [sys.executable, "-c", TRAIN, str(runs)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return runs


@pytest.mark.parametrize("kind", ["plain", "gan", "spsr", "dm"])
def test_a_loss_added_as_it_says_is_logged_by_every_kind_of_model(trained, kind):
    log = (trained / kind / "runs" / "run" / "train.log").read_text(encoding="utf-8")
    values = [float(value) for value in re.findall(r"\btv (\S+)", log)]
    assert len(values) == 2
    assert min(values) > 0


def test_a_network_added_as_it_says_trains(trained):
    log = (trained / "network" / "runs" / "run" / "train.log").read_text(encoding="utf-8")
    assert "netG FSRCNN" in log
    assert (trained / "network" / "runs" / "run" / "models" / "2_G.pth").is_file()


def test_a_recipe_added_as_it_says_trains(trained):
    assert (trained / "recipe" / "fsrcnn_tv" / "models" / "1_G.pth").is_file()
