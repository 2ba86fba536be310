"""The training step: one pass of netD for both players, compiled networks, fused optimizers, bad steps, failures."""

import copy
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.loader import ahead
from models.model_base import synchronised
from models.precision import of_many_sizes, set_up
from tests.test_ranker import Results
from tests.test_systems import SPSR, SPSR_TERMS
from tests.test_train import forget_manifests
from tests.training import SSL, Workplace, assert_same, tree
from utils.utils_checkpoint import unwrap
from utils.utils_error import UserError
from utils.utils_option_sections import TrainOptions

GAN = ("model=gan", *SSL, "train.ssl_mode=boxsum")
BATCHNORM = ("netD.net_type=discriminator_patchgan", "netD.norm_type=batchspectral", "netD.n_layers=2")
# Without spectral norm, whose weights are other ones in each pass.
PATCHGAN = (*GAN, "netD.net_type=discriminator_patchgan", "netD.norm_type=instance", "netD.n_layers=2")


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def step(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """-> the log of one step, and the gradient of each network as one vector."""
    for scaler in model.scalers.values():
        if scaler.is_enabled():  # from the default, 2^16, it would take some steps down to where all fits
            scaler.load_state_dict(scaler.state_dict() | {"scale": 64.0})
    model.feed_data(batch)
    model.optimize_parameters(1)
    found = {}
    for name in model.optimizers:
        weights = unwrap(model.networks[name]).parameters()
        found[name] = torch.cat([p.grad.flatten() for p in weights if p.grad is not None])
    return model.current_log(), found


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= relative * gradient.norm(), name


# ---------------------------------------------------------------------------------------------- netD once for both


@pytest.mark.parametrize("pieces", [(), ("train.micro_batch=1",)], ids=["whole", "in pieces"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("gan_type", ["gan", "ragan"])
def test_one_pass_of_netD_serves_both_players(
    work: Workplace, gan_type: str, precision: str, pieces: tuple[str, ...]
) -> None:
    settings = (*PATCHGAN, f"train.gan_type={gan_type}", f"train.precision={precision}", *pieces)
    twice, once = (work.model(*settings, f"train.D_once={value}") for value in ("false", "true"))
    calls = dict.fromkeys(("twice", "once"), 0)
    for name, model in (("twice", twice), ("once", once)):

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        model.networks["D"].register_forward_hook(count)
    batch = work.batch()
    (log, expected), (log_once, found) = step(twice, batch), step(once, batch)
    assert calls["once"] == (4 if pieces else 2)
    assert calls["twice"] == calls["once"] * (2 if gan_type == "ragan" else 1.5)
    # The same operations on the same numbers; only the gradients at E are added in another order, and that sum is
    # rounded to half precision on its way back through netG.
    relative = 1e-5 if precision == "fp32" else 1e-3
    assert log_once == pytest.approx(log, rel=relative)
    assert_near(found, expected, relative)


def test_where_the_generator_rests_netD_learns_as_ever(work: Workplace) -> None:
    for task, once in (("twice", "false"), ("once", "true")):
        work.run(*GAN, f"task={task}", f"train.D_once={once}", "train.D_init_iters=2", "train.iterations=2")
    assert_same(work.saved(2, "twice"), work.saved(2, "once"))


def test_one_pass_trains_in_the_distributed_wrapper(
    work: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        for once in ("false", "true"):
            settings = (*GAN, f"train.D_once={once}")
            alone = work.model(*settings)
            with monkeypatch.context() as patched:
                patched.setattr("models.model_base.utils_dist.world_size", lambda: 2)
                wrapped = work.model(*settings)
            for number in range(2):
                batch = work.batch(number=number)
                (log, expected), (log_wrapped, found) = step(alone, batch), step(wrapped, batch)
                assert log_wrapped == pytest.approx(log, rel=1e-4)  # the wrapper may sum in another order
                assert_near(found, expected, 1e-3)
    finally:
        torch.distributed.destroy_process_group()


def test_whose_statistics_batch_norms_take_is_said_and_synchronising_them_needs_gpus(
    work: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work.model(*GAN, *BATCHNORM, "train.sync_batchnorm=true")  # one process has nothing to synchronise
    caplog.set_level("INFO")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        monkeypatch.setattr("models.model_base.utils_dist.world_size", lambda: 2)
        model = work.model(*GAN, *BATCHNORM)
        assert caplog.text.count("batch norms take each process's own statistics") == 1
        assert "netD: batch norms take each process's own statistics" in caplog.text
        with pytest.raises(UserError, match=r"^train\.sync_batchnorm: PyTorch has it for GPUs alone"):
            work.model(*GAN, *BATCHNORM, "train.sync_batchnorm=true")
        del model
    finally:
        torch.distributed.destroy_process_group()


def test_synchronised_batch_norms_are_trained_saved_and_loaded_as_others_are(work: Workplace) -> None:
    plain: Any = work.model(*GAN, *BATCHNORM).networks["D"]
    weights = list(plain.parameters())
    converted = synchronised(copy.deepcopy(plain), torch.device("cuda"))
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules()) == 2
    assert [p.shape for p in converted.parameters()] == [p.shape for p in weights]
    H = work.batch()["H"]
    assert torch.equal(converted(H), plain(H))  # alone each is over its own images
    assert_same(converted.state_dict(), plain.state_dict())
    in_place = synchronised(plain, torch.device("cuda"))
    assert all(map(operator.is_, weights, in_place.parameters()))  # the optimizer may have them already


# ------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks are traced, not compiled: that alone would take half a minute."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("eager_backend")
def test_compiled_networks_train_and_are_saved_as_others_are(work: Workplace) -> None:
    work.run(*GAN, "task=plain", "train.iterations=2")
    work.run(*GAN, "task=compiled", "train.iterations=2", "train.compile=true")
    assert_same(work.saved(2, "plain"), work.saved(2, "compiled"))  # traced operations are the same ones


def test_where_nothing_can_be_compiled_that_is_one_line(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(*_: Any) -> None:
        raise InductorError("\nNo working C++ compiler found\nSet TORCH_LOGS for more")

    monkeypatch.setattr("models.model_plain.ModelPlain.optimize_parameters", fail)
    with pytest.raises(UserError, match=r"^train\.compile: .* \(No working C\+\+ compiler found\); set it to false$"):
        work.run("train.compile=true")


# ------------------------------------------------------------------------------------------------ optimizer, settings


def test_a_run_whose_optimizer_was_not_fused_goes_on(work: Workplace) -> None:
    work.run("train.iterations=2")
    path = work.folder() / "models" / "2_optimizerG.pth"
    state = torch.load(path, weights_only=True)
    for group in state["param_groups"]:
        group["fused"] = None
    torch.save(state, path)
    forget_manifests(work.folder())
    work.run("train.iterations=3")
    assert work.saved(3)["optimizerG"]["param_groups"][0]["fused"] is True
    assert work.saved(3)["optimizerG"]["state"][0]["step"] == 3


def test_the_settings_of_a_gpus_convolutions_are_those_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))  # put back afterwards
    for wanted in (False, True):
        set_up(TrainOptions(cudnn_benchmark=wanted, tf32=wanted))
        assert torch.backends.cudnn.benchmark == torch.backends.cudnn.allow_tf32 == wanted
        with of_many_sizes():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark == wanted


def test_networks_are_in_channels_last_where_that_is_faster(work: Workplace) -> None:
    for given, expected in (("null", True), ("false", False)):
        weight = next(unwrap(work.model(f"train.channels_last={given}").netG).parameters())
        assert weight.is_contiguous(memory_format=torch.channels_last) == expected


# ---------------------------------------------------------------------------------------------------- bad steps

UNET2D = '{"net_type": "unet2d", "block_out_channels": [8], "norm_num_groups": 4, "mid_attention": false}'
BREAKABLE: dict[str, tuple[str, ...]] = {
    "plain": (*SSL, "train.ssl_mode=boxsum"),
    "gan": (*GAN, *BATCHNORM, "train.G_optimizer_clipgrad=1"),
    "pieces": (*GAN, *BATCHNORM, "train.micro_batch=1", "train.D_once=true"),
    "fp16": (*GAN, "train.precision=fp16"),
    "spsr": ("model=spsr", *SPSR_TERMS, f"netG={SPSR}".replace("'", '"')),
    "dm": ("model=dm", 'diffusion={"type": "resshift", "steps": 4}', f"netG={UNET2D}", "train.D_lossfn_weight=0"),
    "ranker": (),
}


def everything(model: Any) -> dict[str, Any]:
    """All that a step changes."""
    parts = (model.networks, model.optimizers, model.scalers)
    return copy.deepcopy([{name: part.state_dict() for name, part in of_kind.items()} for of_kind in parts])


def take(model: Any, batch: dict[str, Any], number: int) -> dict[str, float]:
    torch.manual_seed(number)
    model.feed_data(batch)
    model.optimize_parameters(number)
    return model.current_log()


@pytest.mark.parametrize("kind", BREAKABLE)
def test_a_bad_step_leaves_everything_as_it_was_and_the_next_one_is_as_ever(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "dm":
        pytest.importorskip("diffusers")
    monkeypatch.setattr("models.network_spsr._rrdb", lambda nc, gc: nn.Conv2d(nc, nc, 3, 1, 1))  # as in test_systems
    work = Results(tmp_path) if kind == "ranker" else Workplace(tmp_path)
    first, second, third = (work.batch(number=number) for number in range(3))
    broken = second["worse" if kind == "ranker" else "L"]
    broken[1, 0, 3, 3] = float("nan")
    paths = {"L_path": ["a.png", "c.png"], "H_path": ["a.png", "b.png"]}
    model, undisturbed = (work.model(*BREAKABLE[kind], "train.skip_bad_steps=2") for _ in range(2))
    for one in (model, undisturbed):
        take(one, first, 1)
    before = everything(model)
    assert take(model, second | paths, 2) == {}
    assert_same(before, everything(model))
    assert "; images: a.png, b.png, c.png" in caplog.text
    assert (model.bad_steps, model.bad_in_a_row) == (1, 1)
    assert take(model, third, 3) == take(undisturbed, third, 3)
    assert_same(everything(model), everything(undisturbed))
    assert (model.bad_steps, model.bad_in_a_row) == (1, 0)


# ---------------------------------------------------------------------------------------------------- reading ahead


def batches(count: int, closed: list[bool]) -> Iterator[dict[str, Any]]:
    try:
        for i in range(count):
            yield {"L": torch.full((1, 2), float(i)), "L_path": [str(i)]}
    finally:
        closed.append(True)


def test_on_a_cpu_batches_come_as_they_are_and_the_readers_go_home() -> None:
    closed: list[bool] = []
    loaded = ahead(batches(3, closed), torch.device("cpu"))  # type: ignore[arg-type]
    assert next(loaded)["L_path"] == ["0"]
    assert not closed
    loaded.close()
    assert closed == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_batches_come_in_order_and_whole() -> None:
    closed: list[bool] = []
    device = torch.device("cuda", 0)
    for i, batch in enumerate(ahead(batches(5, closed), device)):  # type: ignore[arg-type]
        assert batch["L"].device == device
        assert batch["L"].tolist() == [[i, i]]
        assert batch["L_path"] == [str(i)]
    assert i == 4
    assert closed == [True]


# ------------------------------------------------------------------------------------------------------- out of memory


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")


@pytest.mark.parametrize(
    ("where", "culprit"),
    [
        ("models.network_srvgg.SRVGGNetCompact.forward", "SRVGGNetCompact"),
        ("models.network_discriminator.DiscriminatorUNet.forward", "DiscriminatorUNet"),
        ("utils.utils_ssl.SelfSimilarityLoss.parts", "SelfSimilarityLoss"),
        ("torch.Tensor.backward", "the gradient of netG's losses"),
        ("torch.optim.Adam.step", "the optimizers' step"),
    ],
)
def test_out_of_memory_says_what_took_it_and_what_helps(
    work: Workplace, where: str, culprit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.run(*GAN, "train.iterations=2")
    before = tree(work.folder() / "models")
    with monkeypatch.context() as patched:
        if culprit == "SelfSimilarityLoss":  # its method's first argument is itself, by which it is known
            patched.setattr(where, lambda self, *_: no_memory())
        else:
            patched.setattr(where, (lambda self, *_, **__: no_memory()))
        with pytest.raises(UserError) as caught:
            work.run(*GAN)
    text = str(caught.value)
    assert re.match(rf"step 3: out of memory in {culprit} \(2\.00 GiB more were asked for\); weights, gradients", text)
    assert "2 patches of 32 px at once" in text
    remedies = ["train.micro_batch=1", "train.precision=bf16", "datasets.train.dataloader_batch_size=1"]
    assert text.endswith(f"take {', '.join(remedies)}")
    assert tree(work.folder() / "models") == before
    work.run(*GAN, *remedies[:2])
    assert "resumed at step 2" in work.log()


def test_what_the_gpus_form_of_ssl_cannot_do_is_one_line(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("kernel_size_search 181 with kernel_size_window 9 is too large for ssl_mode cuda: take ...")

    monkeypatch.setattr("utils.utils_ssl.SelfSimilarityLoss.parts", refuses)
    with pytest.raises(UserError, match=r"^step 1: train\.ssl_mode: kernel_size_search 181 .* take \.\.\.$"):
        work.run(*GAN)


def test_the_remedies_for_little_memory_are_settings_that_are_not_yet_so(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.network_srvgg.SRVGGNetCompact.forward", no_memory)
    small = ("train.precision=bf16", "train.micro_batch=1")
    with pytest.raises(UserError, match=r"1 patch of 32 px at once; take a smaller datasets\.train\.H_size$"):
        work.run(*small)
    work.options["netG"] = {"net_type": "rrdbnet", "nf": 8, "nb": 1, "gc": 4}
    monkeypatch.setattr("models.network_rrdbnet.RRDBNet.forward", no_memory)
    with pytest.raises(UserError, match=r"take netG\.use_checkpoint=true, a smaller datasets\.train\.H_size$"):
        work.run(*small)
    with pytest.raises(UserError, match=r"take train\.ssl_mode=auto, netG\.use_checkpoint=true, a smaller"):
        work.run(*small, *SSL, "train.ssl_mode=pytorch")
