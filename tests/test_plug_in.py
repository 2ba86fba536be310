"""The loss outside of this repository: copied out, through torch.hub, and every code block of docs/plug_in.md."""

import os
import re
import shutil
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from utils import utils_ssl
from utils.utils_ssl import SelfSimilarityLoss, self_similarity_graph

SETTINGS = dict(l1_weight=1000, kl_weight=1000, kernel_size_search=9, kernel_size_window=3)
STEP = f"""
SETTINGS = {SETTINGS}
REPOSITORY = {str(REPOSITORY)!r}
import torch
import torch.nn.functional as F

def train_one_step(ssl):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.PixelShuffle(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hr = F.interpolate(torch.rand(2, 3, 4, 4), scale_factor=6)
    before = [p.detach().clone() for p in net.parameters()]
    loss = ssl(net(F.avg_pool2d(hr, 2)), hr)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert not any(torch.equal(p, q) for p, q in zip(before, net.parameters()))
    return loss.item()
"""
PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

for name in ("utils.utils_option", "models.select_model", "tests.conftest", "main_train_gan"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported: this is not the place of somebody else")
"""
COPIED = """
import utils_ssl
from pathlib import Path

here = Path(__file__).resolve().parent
assert Path(utils_ssl.__file__).resolve().parent == here
ssl = utils_ssl.SelfSimilarityLoss(**SETTINGS, ssl_mode="auto")
print(train_one_step(ssl), ssl.prepare("cpu"))
if "similarity_cuda" in sys.modules:
    assert Path(sys.modules["similarity_cuda"].__file__).resolve().parent.parent == here
"""
# A caller with a package of the same name as ours, which even has a module utils_ssl: of certificates, say.
FROM_HUB = """
import pickle, utils
path = list(sys.path)
load = lambda: torch.hub.load(REPOSITORY, "self_similarity_loss", source="local", **SETTINGS)
ssl = load()
assert sys.path == path
print(train_one_step(ssl), ssl.prepare("cpu"))
assert type(load()) is type(ssl) is type(pickle.loads(pickle.dumps(ssl)))
import utils.utils_ssl
assert utils.utils_ssl.certificates == ["theirs"]
"""


def run(folder: Path, program: str) -> subprocess.CompletedProcess:
    """Run a program that sees its own folder and the installed packages only."""
    (folder / "train.py").write_text(program, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-E", "-s", "-B", "train.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def loss_and_mode(done: subprocess.CompletedProcess) -> tuple[float, str]:
    loss, mode = done.stdout.split()
    return float(loss), mode


@pytest.fixture(scope="module")
def expected() -> float:
    """The loss of ``train_one_step`` in this process."""
    namespace: dict[str, Any] = {}
    exec(STEP, namespace)
    return namespace["train_one_step"](SelfSimilarityLoss(**SETTINGS, ssl_mode="boxsum"))


@pytest.fixture
def their_trainer(tmp_path) -> Path:
    folder = tmp_path / "their_trainer"
    folder.mkdir()
    return folder


def copy_op(folder: Path) -> None:
    shutil.copytree(REPOSITORY / "similarity_cuda", folder / "similarity_cuda", ignore=lambda *_: {"__pycache__"})


# -------------------------------------------------------------------------------------------------------- copied out


def test_loss_and_op_copied_out_train_without_this_repository(their_trainer, expected):
    shutil.copy(REPOSITORY / "utils" / "utils_ssl.py", their_trainer)
    copy_op(their_trainer)
    loss, mode = loss_and_mode(run(their_trainer, PROGRAM + STEP + COPIED))
    assert loss == pytest.approx(expected, rel=1e-4) != 0  # float32, another form, other threads
    assert mode == SelfSimilarityLoss(1, 1).prepare("cpu")  # the compiled one, where this machine has a compiler


def test_loss_copied_out_alone_trains_in_pytorch_and_says_why(their_trainer, expected):
    shutil.copy(REPOSITORY / "utils" / "utils_ssl.py", their_trainer)
    done = run(their_trainer, PROGRAM + STEP + COPIED)
    loss, mode = loss_and_mode(done)
    assert loss == pytest.approx(expected, rel=1e-4)  # float32, other threads
    assert mode == "boxsum"
    said = "utils_ssl: self-similarity on cpu: ssl_mode auto takes boxsum (not cpp: No module named 'similarity_cuda')"
    assert said in done.stderr.splitlines()


# --------------------------------------------------------------------------------------------------------- torch.hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> str:
    """What torch.hub finds in its cache after a download: here, the files that the entry points need and no others."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "OWNER_REPO_main"
    (folder / "utils").mkdir(parents=True)
    shutil.copy(REPOSITORY / "hubconf.py", folder)
    shutil.copy(REPOSITORY / "utils" / "utils_ssl.py", folder / "utils")
    copy_op(folder)
    monkeypatch.setitem(sys.modules, "self_similarity_loss_from_hub", None)  # put back after the test ...
    monkeypatch.delitem(sys.modules, "self_similarity_loss_from_hub")  # ... which starts without it
    return "OWNER/REPO:main"


def test_hub_loads_beside_a_package_utils_of_the_caller(their_trainer, expected):
    (their_trainer / "utils").mkdir()
    (their_trainer / "utils" / "__init__.py").touch()
    (their_trainer / "utils" / "utils_ssl.py").write_text('certificates = ["theirs"]\n')
    done = run(their_trainer, PROGRAM + STEP + FROM_HUB)
    loss, mode = loss_and_mode(done)
    assert loss == pytest.approx(expected, rel=1e-4)  # float32, another form, other threads
    assert mode == SelfSimilarityLoss(1, 1).prepare("cpu")
    assert "No module named" not in done.stderr  # the op was found, whether or not it could be built


def test_hub_lists_two_entry_points_and_explains_them(hub):
    assert sorted(torch.hub.list(hub, trust_repo=True)) == ["self_similarity_graph", "self_similarity_loss"]
    assert "arXiv 2408.05713" in torch.hub.help(hub, "self_similarity_loss", trust_repo=True)
    assert "(M, 11 * 11)" in torch.hub.help(hub, "self_similarity_graph", trust_repo=True)


def test_hub_passes_settings_on():
    settings = dict(kernel_size_search=7, kernel_size_window=3, sigma=0.1, ssl_mode="boxsum", search_border="image")
    image, mask = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 12, 12)
    graph = torch.hub.load(str(REPOSITORY), "self_similarity_graph", source="local", **settings)
    assert torch.equal(graph(image, mask), self_similarity_graph(image, mask, **settings))
    whole = torch.hub.load(str(REPOSITORY), "self_similarity_graph", source="local")
    assert torch.equal(whole(image, mask, **settings), graph(image, mask))
    loss = torch.hub.load(str(REPOSITORY), "self_similarity_loss", 3, 5, source="local", mask_stride=3, **settings)
    assert loss(image.flip(3), image) == SelfSimilarityLoss(3, 5, mask_stride=3, **settings)(image.flip(3), image) > 0


@pytest.mark.parametrize(
    ("entry", "arguments"), [("self_similarity_loss", dict(l1_weight=1, kl_weight=1)), ("self_similarity_graph", {})]
)
def test_hub_refuses_a_misspelt_setting_when_it_loads(entry, arguments):
    with pytest.raises(TypeError, match="sigmma"):
        torch.hub.load(str(REPOSITORY), entry, source="local", sigmma=0.1, **arguments)


# ------------------------------------------------------------------------------------------------------ docs/plug_in.md

DOCUMENT = REPOSITORY / "docs" / "plug_in.md"
BLOCK = re.compile(r"^## (?P<title>[^\n]+)\n(?:(?!^## ).)*?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def run_block(title: str, monkeypatch) -> dict[str, Any]:
    """Execute a section's code block, with ``utils_ssl`` importable as where it was copied to; -> its names."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (block,) = (match for match in BLOCK.finditer(text) if match["title"] == title)
    monkeypatch.setitem(sys.modules, "utils_ssl", utils_ssl)
    torch.manual_seed(0)
    lines_before = text.count("\n", 0, block.start("code"))  # so that errors name the line of the document
    namespace: dict[str, Any] = {"__name__": "plug_in"}
    exec(compile("\n" * lines_before + block["code"], str(DOCUMENT), "exec"), namespace)
    return namespace


def test_every_block_of_the_document_is_run_by_a_test_here():
    text = DOCUMENT.read_text(encoding="utf-8")
    titles = [match["title"] for match in BLOCK.finditer(text)]
    assert titles == ["A plain loop", "BasicSR", "diffusers", "torch.hub"]
    assert text.count("```") == 2 * len(titles)


def test_the_plain_loop_of_the_document_trains_with_the_loss(monkeypatch, capsys):
    names = run_block("A plain loop", monkeypatch)
    assert names["l_ssl"].item() == pytest.approx(names["l1"].item() + names["kl"].item(), rel=1e-5)  # float32
    assert names["loss"].item() == pytest.approx(names["l_pix"].item() + names["l_ssl"].item(), rel=1e-5)
    assert names["l1"] > 0 < names["kl"]
    assert f"ssl {names['l_ssl'].item():.3f}" in capsys.readouterr().out


class SRModel:
    """What the block uses of BasicSR 1.4.2's class of this name."""

    def __init__(self, opt: dict[str, Any]) -> None:
        self.opt = opt
        self.net_g = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.PixelShuffle(2))
        self.init_training_settings()

    def init_training_settings(self) -> None:
        self.ema_decay = self.opt["train"]["ema_decay"]
        self.averaged: list[float] = []
        self.cri_pix = torch.nn.L1Loss()
        self.optimizer_g = torch.optim.Adam(self.net_g.parameters())

    def feed_data(self, data: dict[str, torch.Tensor]) -> None:
        self.lq, self.gt = data["lq"], data["gt"]

    def reduce_loss_dict(self, loss_dict: OrderedDict) -> OrderedDict:
        stacked = torch.stack(list(loss_dict.values()))  # as between ranks: every term must be a scalar tensor
        return OrderedDict(zip(loss_dict, stacked.tolist(), strict=True))

    def model_ema(self, decay: float) -> None:
        self.averaged.append(decay)


@pytest.fixture
def basicsr(monkeypatch) -> dict[str, type]:
    """Stand-ins for BasicSR's modules; -> the models that were registered."""
    registered: dict[str, type] = {}
    registry = types.SimpleNamespace(register=lambda: lambda cls: registered.setdefault(cls.__name__, cls))
    modules: dict[str, dict[str, Any]] = {
        "basicsr": {},
        "basicsr.models": {},
        "basicsr.models.sr_model": {"SRModel": SRModel},
        "basicsr.utils": {},
        "basicsr.utils.registry": {"MODEL_REGISTRY": registry},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return registered


def test_the_basicsr_model_of_the_document_trains_and_logs_the_named_terms(monkeypatch, basicsr):
    run_block("BasicSR", monkeypatch)
    model = basicsr["SRSSLModel"]({"train": {"ssl_opt": SETTINGS, "ema_decay": 0.999}})
    gt = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), scale_factor=4)
    model.feed_data({"lq": torch.nn.functional.avg_pool2d(gt, 2), "gt": gt})
    before = model.net_g[0].weight.detach().clone()
    model.optimize_parameters(1)
    assert not torch.equal(model.net_g[0].weight, before)
    assert list(model.log_dict) == ["l_pix", "l_ssl_l1", "l_ssl_kl"]
    assert sum(model.log_dict.values()) == pytest.approx(model.l_total.item(), rel=1e-5)  # float32
    _, l1, kl = SelfSimilarityLoss(**SETTINGS).parts(model.output, gt)
    assert model.log_dict["l_ssl_l1"] == pytest.approx(l1.item(), rel=1e-6) != 0
    assert model.log_dict["l_ssl_kl"] == pytest.approx(kl.item(), rel=1e-6) != 0
    assert model.averaged == [0.999]


def test_the_diffusers_loop_of_the_document_trains_on_images_in_0_to_1(monkeypatch):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    names = run_block("diffusers", monkeypatch)
    assert names["loss"].isfinite()
    assert all(p.grad is not None for p in names["unet"].parameters())
    assert all(p.grad is None for p in names["vae"].parameters())
    # An untrained decoder gives images around 0: mid-grey, which is 0.5 after the mapping.
    assert names["E"].mean().item() == pytest.approx(0.5, abs=0.25)
    # With the right noise the document's estimate is the clean latent, up to float32 and 15 times that at t = 999.
    (estimate,) = re.findall(r"z_0 = (.*?)  # SSL", DOCUMENT.read_text(encoding="utf-8"))
    clean = eval(estimate, {**names, "eps": names["noise"]})
    torch.testing.assert_close(clean, names["z"], rtol=1e-4, atol=1e-4)


def test_the_hub_block_of_the_document_loads_both_entry_points(monkeypatch, hub):
    names = run_block("torch.hub", monkeypatch)
    assert names["hub"]["repo_or_dir"] == hub
    assert (names["ssl"].l1_weight, names["ssl"].mask_stride) == (1000, 3)
    assert names["similarity"].shape == (1024, 121)
