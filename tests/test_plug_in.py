"""The loss outside of this repository: copied out, through torch.hub, and every code block of docs/plug_in.md."""

import copy
import importlib.util
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
import self_similarity
from pathlib import Path

here = Path(__file__).resolve().parent
assert Path(self_similarity.__file__).resolve().parent == here
ssl = self_similarity.SelfSimilarityLoss(**SETTINGS, ssl_mode="auto")
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
    shutil.copy(REPOSITORY / "utils" / "utils_ssl.py", their_trainer / "self_similarity.py")
    copy_op(their_trainer)
    loss, mode = loss_and_mode(run(their_trainer, PROGRAM + STEP + COPIED))
    assert loss == pytest.approx(expected, rel=1e-4) != 0  # float32, another form, other threads
    assert mode == SelfSimilarityLoss(1, 1).prepare("cpu")  # the compiled one, where this machine has a compiler


def test_loss_copied_out_alone_trains_in_pytorch_and_says_why(their_trainer, expected):
    shutil.copy(REPOSITORY / "utils" / "utils_ssl.py", their_trainer / "self_similarity.py")
    done = run(their_trainer, PROGRAM + STEP + COPIED)
    loss, mode = loss_and_mode(done)
    assert loss == pytest.approx(expected, rel=1e-4)  # float32, other threads
    assert mode == "boxsum"
    said = "self-similarity on cpu: ssl_mode auto takes boxsum (not cpp: No module named 'similarity_cuda')"
    assert f"self_similarity: {said}" in done.stderr.splitlines()


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
SECTION = re.compile(r"^## (?P<title>[^\n]+)\n(?P<text>(?:(?!^## ).)*)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def code_of(title: str, language: str) -> tuple[str, int]:
    """-> a section's only block in this language, and the number of lines before it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (section,) = (match for match in SECTION.finditer(text) if match["title"] == title)
    (block,) = (match for match in BLOCK.finditer(section["text"]) if match["language"] == language)
    return block["code"], text.count("\n", 0, section.start("text") + block.start("code"))


def run_block(title: str, monkeypatch) -> dict[str, Any]:
    """Execute a section's code block, with ``self_similarity`` importable as where it is installed; -> its names."""
    code, lines_before = code_of(title, "python")
    monkeypatch.setitem(sys.modules, "self_similarity", utils_ssl)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "plug_in"}
    exec(compile("\n" * lines_before + code, str(DOCUMENT), "exec"), namespace)  # errors name the document's line
    return namespace


def stand_in(monkeypatch, modules: dict[str, dict[str, Any]]) -> None:
    """Put modules with these contents in the place of a package."""
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def test_every_block_of_the_document_is_run_by_a_test_here():
    text = DOCUMENT.read_text(encoding="utf-8")
    found = [
        (section["title"], block["language"])
        for section in SECTION.finditer(text)
        for block in BLOCK.finditer(section["text"])
    ]
    titles = [
        "A plain loop",
        "BasicSR",
        "BasicSR's GANs",
        "neosr",
        "traiNNer-redux",
        "Lightning",
        "diffusers",
        "torch.hub",
    ]
    assert [title for title, language in found if language == "python"] == titles
    assert [block for block in found if block[1] != "python"] == [("neosr", "toml"), ("traiNNer-redux", "yaml")]
    assert text.count("```") == 2 * len(found)


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
        self.cri_perceptual = self.opt["train"].get("perceptual")
        self.optimizer_g = torch.optim.Adam(self.net_g.parameters())

    def feed_data(self, data: dict[str, torch.Tensor]) -> None:
        self.lq, self.gt = data["lq"], data["gt"]

    def reduce_loss_dict(self, loss_dict: OrderedDict) -> OrderedDict:
        stacked = torch.stack(list(loss_dict.values()))  # as between ranks: every term must be a scalar tensor
        return OrderedDict(zip(loss_dict, stacked.tolist(), strict=True))

    def model_ema(self, decay: float) -> None:
        self.averaged.append(decay)


class ESRGANModel(SRModel):
    """Of BasicSR's class of this name the generator's step, without its other losses."""

    def optimize_parameters(self, current_iter: int) -> None:
        self.optimizer_g.zero_grad()
        self.output = self.net_g(self.lq)
        l_g_total = 0
        if self.cri_pix:
            l_g_pix = self.cri_pix(self.output, self.gt)
            l_g_total += l_g_pix
        l_g_total.backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict(OrderedDict(l_g_pix=l_g_pix))


@pytest.fixture
def basicsr(monkeypatch) -> dict[str, type]:
    """Stand-ins for BasicSR's modules; -> the models that were registered."""
    registered: dict[str, type] = {}
    registry = types.SimpleNamespace(register=lambda: lambda cls: registered.setdefault(cls.__name__, cls))
    modules: dict[str, dict[str, Any]] = {
        "basicsr": {},
        "basicsr.models": {},
        "basicsr.models.sr_model": {"SRModel": SRModel},
        "basicsr.models.esrgan_model": {"ESRGANModel": ESRGANModel},
        "basicsr.utils": {},
        "basicsr.utils.registry": {"MODEL_REGISTRY": registry},
    }
    stand_in(monkeypatch, modules)
    return registered


@pytest.mark.parametrize("with_perceptual", [False, True])
def test_the_basicsr_model_of_the_document_trains_and_logs_the_named_terms(monkeypatch, basicsr, with_perceptual):
    run_block("BasicSR", monkeypatch)
    perceptual = lambda output, gt: ((output - gt).square().mean(), None)  # noqa: E731
    options = {"ssl_opt": SETTINGS, "ema_decay": 0.999, **({"perceptual": perceptual} if with_perceptual else {})}
    model = basicsr["SRSSLModel"]({"train": options})
    gt = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), scale_factor=4)
    model.feed_data({"lq": torch.nn.functional.avg_pool2d(gt, 2), "gt": gt})
    begun = copy.deepcopy(model.net_g)
    model.optimize_parameters(1)
    assert not torch.equal(model.net_g[0].weight, begun[0].weight)
    assert list(model.log_dict) == ["l_ssl_l1", "l_ssl_kl", "l_pix", *["l_percep"] * with_perceptual]
    E = begun(model.lq)
    losses = [torch.nn.functional.l1_loss(E, gt), SelfSimilarityLoss(**SETTINGS)(E, gt)]
    losses += [perceptual(E, gt)[0]] if with_perceptual else []
    (gradient,) = torch.autograd.grad(sum(losses), begun[0].weight)
    torch.testing.assert_close(model.net_g[0].weight.grad, gradient, rtol=1e-4, atol=1e-5)  # float32
    _, l1, kl = SelfSimilarityLoss(**SETTINGS).parts(model.output, gt)
    assert model.log_dict["l_ssl_l1"] == pytest.approx(l1.item(), rel=1e-6) != 0
    assert model.log_dict["l_ssl_kl"] == pytest.approx(kl.item(), rel=1e-6) != 0
    assert model.averaged == [0.999]


def test_the_basicsr_gan_of_the_document_adds_the_loss_to_the_generators_pixel_loss(monkeypatch, basicsr):
    run_block("BasicSR's GANs", monkeypatch)
    model = basicsr["ESRGANSSLModel"]({"train": {"ssl_opt": SETTINGS, "ema_decay": 0.999}})
    gt = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), scale_factor=4)
    model.feed_data({"lq": torch.nn.functional.avg_pool2d(gt, 2), "gt": gt})
    model.optimize_parameters(1)
    ssl = SelfSimilarityLoss(**SETTINGS)(model.output, gt)
    both = torch.nn.functional.l1_loss(model.output, gt) + ssl
    assert model.log_dict["l_g_pix"] == pytest.approx(both.item(), rel=1e-5)  # float32
    assert ssl > 0
    assert model.net_g[0].weight.grad.abs().sum() > 0


class Registry(dict[str, type]):
    """What the blocks use of the registries of neosr and traiNNer-redux."""

    def register(self, cls: type | None = None) -> Any:
        if cls is None:
            return self.register
        self[cls.__name__] = cls
        return cls


@pytest.fixture
def registry(monkeypatch, request) -> Registry:
    """``LOSS_REGISTRY`` of a stand-in of the package that is the test's parameter."""
    registry = Registry()
    package = request.param
    stand_in(
        monkeypatch, {package: {}, f"{package}.utils": {}, f"{package}.utils.registry": {"LOSS_REGISTRY": registry}}
    )
    return registry


def output_and_ground_truth() -> tuple[torch.Tensor, torch.Tensor]:
    """As their loaders give them: RGB in [0, 1], channels_last."""
    H = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6), scale_factor=4)
    E = (H + 0.1 * torch.randn_like(H)).to(memory_format=torch.channels_last).requires_grad_()
    return E, H.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("registry", ["neosr"], indirect=True)
def test_the_neosr_loss_of_the_document_is_built_from_its_option_file_and_has_a_gradient(monkeypatch, registry):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib; neosr asks for 3.12")
    run_block("neosr", monkeypatch)
    options = tomllib.loads(code_of("neosr", "toml")[0])["train"]["ff_opt"]
    loss = registry[options.pop("type")](**options).to("cpu", memory_format=torch.channels_last, non_blocking=True)
    E, H = output_and_ground_truth()
    total = torch.zeros(1)
    total += loss(E, H)
    total.backward()
    assert total.item() == SelfSimilarityLoss(1000, 1000)(E, H).item() > 0
    assert E.grad.abs().max() > 0


@pytest.mark.parametrize("registry", ["traiNNer"], indirect=True)
def test_the_trainner_redux_loss_of_the_document_is_weighted_once_by_old_and_new_models(monkeypatch, registry):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install pyyaml")
    run_block("traiNNer-redux", monkeypatch)
    (options,) = yaml.safe_load(code_of("traiNNer-redux", "yaml")[0])["train"]["losses"]
    loss = registry[options.pop("type")](**options).to("cpu", memory_format=torch.channels_last, non_blocking=True)
    E, H = output_and_ground_truth()
    old = loss(E, H)
    new = loss(E, H) * abs(loss.loss_weight)
    new.backward()
    assert old.item() == new.item() == SelfSimilarityLoss(1000, 1000)(E, H).item() > 0
    assert E.grad.abs().max() > 0


class LightningModule(torch.nn.Module):
    """What the block uses of Lightning's class of this name."""

    device = torch.device("cpu")

    def log_dict(self, logged: dict[str, torch.Tensor]) -> None:
        self.logged = logged


def test_the_lightning_module_of_the_document_trains_and_logs_the_named_terms(monkeypatch):
    if importlib.util.find_spec("lightning") is None:
        stand_in(monkeypatch, {"lightning": {"LightningModule": LightningModule}})
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.PixelShuffle(2))
    before = net[0].weight.detach().clone()
    H = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6), scale_factor=4)
    batch = (torch.nn.functional.avg_pool2d(H, 2), H)
    module = run_block("Lightning", monkeypatch)["SuperResolution"](net)
    assert not any(name.startswith("ssl") for name in module.state_dict())
    if isinstance(module, LightningModule):
        optimizer = module.configure_optimizers()
        module.on_fit_start()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        logged = module.logged
        assert loss.item() == pytest.approx(sum(logged.values()).item(), rel=1e-5)  # float32
    else:
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        trainer = importlib.import_module("lightning").Trainer(accelerator="cpu", max_steps=1, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
        logged = trainer.logged_metrics
    assert list(logged) == ["l_pix", "l_ssl_l1", "l_ssl_kl"]
    assert all(value > 0 for value in logged.values())
    assert not torch.equal(net[0].weight, before)


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
