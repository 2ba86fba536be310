"""``train.precision`` and ``train.micro_batch`` of every model: near fp32, and the same as the whole batch."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from main_test import main as main_test
from models.precision import PRECISION
from tests.test_ranker import Results
from tests.test_systems import RANKED, SPSR, SPSR_TERMS, Systems
from tests.training import SSL, Workplace, assert_same
from utils.utils_checkpoint import unwrap
from utils.utils_error import UserError
from utils.utils_image import imread_uint

BOXSUM = (*SSL, "train.ssl_mode=boxsum")  # nothing to compile in a test
KINDS: dict[str, tuple[str, ...]] = {
    "plain": ("model=plain", *BOXSUM),
    "gan": ("model=gan", "train.gan_type=lsgan"),
    "gan_ssl": ("model=gan", "train.gan_type=gan", *BOXSUM),
    "ldl": ("model=gan", "train.ldl_weight=1", "train.E_decay=0.9"),
    "rank": ("model=gan", *RANKED),
    "spsr": ("model=spsr", *SPSR_TERMS, *BOXSUM),
}
PATCHGAN = ("netD.net_type=discriminator_patchgan", "netD.norm_type=batch")
BITS = {"bf16": 8, "fp16": 11}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systems:
    # SPSR has 20 blocks or more, each of 15 convolutions; what is tested here is not in them.
    monkeypatch.setattr("models.network_spsr._rrdb", lambda nc, gc: nn.Conv2d(nc, nc, 3, 1, 1))
    return Systems(tmp_path)


def built(work: Systems, kind: str, *more: str) -> Any:
    if kind == "spsr":
        work.options["netG"] = SPSR
    more = (f"path.pretrained_netR={work.root / 'ranker.pth'}", *more) if kind == "rank" else more
    return scaled(work.model(*KINDS[kind], "datasets.train.dataloader_batch_size=3", *more))


def scaled(model: Any) -> Any:
    """With small factors in fp16; from the default, 2^16, it would take some steps down to where all fits."""
    for scaler in model.scalers.values():
        if scaler.is_enabled():
            scaler.load_state_dict(scaler.state_dict() | {"scale": 64.0})
    return model


def three(work: Workplace) -> dict[str, Tensor]:
    """A batch of three images, the first of which has no edges."""
    items = [work.batch(number=i) for i in range(2)]
    batch = {name: torch.cat([item[name] for item in items])[:3] for name in items[0]}
    batch["H"][0] = batch["H"][0].mean()
    return batch


def step(model: Any, batch: dict[str, Tensor], number: int = 1) -> tuple[dict[str, float], dict[str, Tensor]]:
    """-> the log of one step, and the gradient of each network as one vector."""
    model.feed_data(batch)
    model.optimize_parameters(number)
    found = {}
    for name in model.optimizers:
        found[name] = torch.cat(
            [p.grad.flatten() for p in unwrap(model.networks[name]).parameters() if p.grad is not None]
        )
    return model.current_log(), found


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_term_and_gradient_is_near_that_of_fp32(work: Systems, kind: str, precision: str) -> None:
    batch = three(work)
    whole, half = (built(work, kind, f"train.precision={p}") for p in ("fp32", precision))
    inside = []
    for name, network in half.networks.items():
        convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        convolution.register_forward_hook(lambda m, a, output, name=name: inside.append((name, output.dtype)))
    (log, gradients), (log_half, gradients_half) = step(whole, batch), step(half, batch)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(inside) == {(name, dtype) for name in half.networks if name != "E" or kind == "ldl"}
    assert all(p.dtype == torch.float32 for net in half.networks.values() for p in net.parameters())
    assert half.E.dtype == torch.float32
    assert log.keys() == log_half.keys()
    unit = 2.0 ** -BITS[precision]  # the error of one rounding, at most
    for name, value in log.items():
        # Means of many roundings; logits near 0 are differences of larger numbers.
        assert log_half[name] == pytest.approx(value, rel=8 * unit, abs=2 * unit * (name[0] == "D")), name
    for name, gradient in gradients.items():
        # A sign of l1 or a slope of a LeakyReLU turns where its argument is less than a rounding from 0.
        assert 0 < distance(gradients_half[name], gradient) < 40 * unit, name


def test_the_losses_get_float32_and_stay_outside_autocast(work: Systems) -> None:
    model = built(work, "gan_ssl", "train.precision=bf16")
    seen = []

    def watch(of: Any, name: str) -> None:
        original = getattr(of, name)

        def watched(*args: Any, **named: Any) -> Any:
            seen.append((name, {a.dtype for a in args if isinstance(a, Tensor)}, torch.is_autocast_enabled("cpu")))
            return original(*args, **named)

        setattr(of, name, watched)

    model.perceptual = nn.L1Loss()
    for of, name in (
        (model.ssl, "parts"),
        (model.gan, "generator"),
        (model.gan, "towards"),
        (model.pixel, "forward"),
        (model.perceptual, "forward"),
    ):
        watch(of, name)
    step(model, three(work))
    assert {name for name, _, _ in seen} == {"parts", "generator", "towards", "forward"}
    assert all(kinds == {torch.float32} and not inside for _, kinds, inside in seen), seen


@pytest.mark.parametrize("netG", ["rrdbnet", "swinir", "elan", "msrresnet0"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_networks_train_in_half_precision(work: Systems, netG: str, precision: str) -> None:
    small = {
        "rrdbnet": {"nf": 8, "nb": 1, "gc": 4},
        "swinir": {"img_size": 8, "depths": [1], "embed_dim": 12, "num_heads": [2], "window_size": 4},
        "elan": {"m_elan": 2, "c_elan": 12, "window_sizes": [2, 4], "n_share": 1},
        "msrresnet0": {"nc": 8, "nb": 1},
    }[netG]
    work.options["netG"] = {"net_type": netG, **small}
    last = ("train.channels_last=true",)
    (log, gradients), (log_half, gradients_half) = (
        step(built(work, "gan", f"train.precision={p}", *last), three(work)) for p in ("fp32", precision)
    )
    assert log_half["G_loss"] == pytest.approx(log["G_loss"], rel=0.02)
    assert distance(gradients_half["G"], gradients["G"]) < 0.3


@pytest.mark.parametrize("net", ["discriminator_patchgan", "discriminator_vgg_96", "discriminator_unet_sn"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_discriminators_train_in_half_precision(work: Systems, net: str, precision: str) -> None:
    work.options["netD"] = {"net_type": net, "base_nc": 4}
    side = 96 if "96" in net else 32
    rng = torch.Generator().manual_seed(1)
    batch = {key: torch.rand(2, 3, s, s, generator=rng) for key, s in (("L", side // 4), ("H", side))}
    size = f"datasets.train.H_size={side}"
    logs = [step(built(work, "gan", f"train.precision={p}", size), batch)[0] for p in ("fp32", precision)]
    assert logs[1]["l_d_real"] == pytest.approx(logs[0]["l_d_real"], rel=0.05, abs=0.01)
    assert math.isfinite(logs[1]["D_grad"])


def test_a_step_that_one_network_leaves_out_does_not_hold_up_the_other(work: Systems) -> None:
    for broken, other in (("D", "G"), ("G", "D")):
        model = built(work, "gan", "train.precision=fp16")
        scaler = model.scalers[broken]
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**100})
        before = {name: [p.clone() for p in model.networks[name].parameters()] for name in "GD"}
        step(model, three(work))
        kept = {n: all(map(torch.equal, before[n], model.networks[n].parameters())) for n in "GD"}
        assert kept == {broken: True, other: False}
        assert f"{broken}_grad" not in model.current_log()  # its mean over steps would be nothing but infinite
        assert f"{other}_grad" in model.current_log()
        assert scaler.get_scale() == 2.0**99
        assert model.scalers[other].get_scale() == 64
        log, _ = step(model, three(work), 2)
        assert all(map(math.isfinite, (log["G_loss"], log["l_d_real"])))


@pytest.mark.parametrize("kind", ["plain", "gan", "spsr"])
def test_a_run_in_fp16_goes_on_in_every_bit_with_a_scaler_for_each_network(work: Systems, kind: str) -> None:
    if kind == "spsr":
        work.options["netG"] = SPSR
    half = (*KINDS[kind], "train.precision=fp16", "datasets.test=null")
    work.run(*half, "task=whole")
    work.run(*half, "task=parts", "train.iterations=2")
    torch.manual_seed(99)
    work.run(*half, "task=parts")
    whole = work.saved(4, "whole")
    assert_same(whole, work.saved(4, "parts"))
    optimizers = {name for name in whole if name.startswith("optimizer")}
    assert len(optimizers) == {"plain": 1, "gan": 2, "spsr": 3}[kind]
    assert all("scaler" in whole[name] for name in optimizers)


# -------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", list(KINDS))
def test_pieces_give_the_gradients_and_the_log_of_the_whole_batch(work: Systems, kind: str, size: int) -> None:
    batch = three(work)
    results = []
    for micro in ("null", str(size)):
        model = built(work, kind, f"train.micro_batch={micro}", "train.mask_stride=2" if "ssl" in kind else "scale=4")
        results.append((*step(model, batch), dict(model.networks["G"].state_dict()), model))
    (log, whole, _, first), (log_pieces, pieces, _, second) = results
    assert log.keys() == log_pieces.keys()
    for name, value in log.items():
        assert log_pieces[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name  # float32, the sums in another order
    for name in whole:
        assert distance(pieces[name], whole[name]) < 1e-4, name
    # Spectral norm: the power iteration, which sees no data, stands where the whole batch leaves it.
    if kind != "plain":
        assert_same(dict(unwrap(first.netD).named_buffers()), dict(unwrap(second.netD).named_buffers()))


def test_a_discriminator_alone_learns_from_pieces_too(work: Systems) -> None:
    logs = [step_of_D(work, micro) for micro in ("null", "1")]
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert set(logs[0]) == {"l_d_real", "l_d_fake", "D_real", "D_fake", "D_grad"}


def step_of_D(work: Systems, micro: str) -> dict[str, float]:
    model = built(work, "gan", f"train.micro_batch={micro}", "train.D_init_iters=5")
    model.feed_data(three(work))
    model.optimize_parameters(1)
    return model.current_log()


def test_the_ranker_learns_from_pieces_with_the_statistics_of_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = Results(tmp_path)
    batch = work.batch()
    for precision in ("fp32", "bf16", "fp16"):
        model = scaled(work.model("train.micro_batch=1", f"train.precision={precision}"))
        model.feed_data(batch)
        model.optimize_parameters(1)
        assert all(map(math.isfinite, model.current_log().values()))
    assert "train.micro_batch: the batch norms of netR take the statistics of a piece of 1" in caplog.text


@pytest.mark.parametrize("gan_type", ["ragan", "ragan_basicsr"])
def test_relativistic_means_are_of_the_piece_and_that_is_said_once(
    work: Systems, gan_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(work, "gan", f"train.gan_type={gan_type}", "train.micro_batch=2")
    assert caplog.text.count(f"the means of {gan_type} are of a piece of 2, not of the batch") == 1
    batch = three(work)
    log, _ = step(model, batch)
    parts = []
    for images in (slice(0, 2), slice(2, 3)):
        alone = built(work, "gan", f"train.gan_type={gan_type}")
        parts.append(step(alone, {name: value[images] for name, value in batch.items()})[0])
    for name in ("D_loss", "l_d_real", "l_d_fake"):
        assert log[name] == pytest.approx((2 * parts[0][name] + parts[1][name]) / 3, rel=1e-4), name


def test_batch_norms_are_of_the_piece_and_that_is_said_once(work: Systems, caplog: pytest.LogCaptureFixture) -> None:
    batch = three(work)
    built(work, "gan", *PATCHGAN)
    built(work, "gan", *PATCHGAN, "train.micro_batch=3")
    assert "train.micro_batch" not in caplog.text
    model = built(work, "gan", *PATCHGAN, "train.micro_batch=2")
    assert caplog.text.count("train.micro_batch: the batch norms of netD take the statistics of a piece of 2") == 1
    log, _ = step(model, batch)
    alone = built(work, "gan", *PATCHGAN)
    alone_log, _ = step(alone, batch)
    assert log["G_loss"] == pytest.approx(alone_log["G_loss"], rel=1e-4)
    assert log["D_loss"] != pytest.approx(alone_log["D_loss"], rel=1e-4)


def test_a_sum_over_the_batch_is_refused_in_pieces(work: Systems) -> None:
    with pytest.raises(UserError, match=r"train\.micro_batch: l2sum is a sum"):
        work.run("model=gan", "train.G_lossfn_type=l2sum", "train.micro_batch=1")


@pytest.mark.parametrize("kind", ["gan", "spsr"])
def test_pieces_in_half_precision_train_in_the_distributed_wrapper(
    work: Systems, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    batch, settings = three(work), ("train.micro_batch=1", "train.precision=bf16")
    try:
        alone = built(work, kind, *settings)
        monkeypatch.setattr("models.model_base.utils_dist.world_size", lambda: 2)
        wrapped = built(work, kind, *settings)
        assert unwrap(wrapped.netG) is not wrapped.netG
        for number in (1, 2):
            expected, log = step(alone, batch, number)[0], step(wrapped, batch, number)[0]
            assert log == pytest.approx(expected, rel=1e-3)  # the wrapper may sum in another order
    finally:
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------- inference


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return -10 * math.log10(max(1e-10, np.square((one.astype(float) - other) / 255).mean()))


@pytest.mark.parametrize("tile", ["0", "24"])
def test_restored_images_are_near_those_of_fp32(work: Systems, tile: str) -> None:
    model = work.model(seed=2)
    (work.root / "m").mkdir()
    torch.save(model.netG.state_dict(), work.root / "m" / "x.pth")
    images = {}
    for precision in PRECISION:
        out = work.root / precision
        argv = ["--model_path", str(work.root / "m" / "x.pth"), "--input", str(work.root / "T" / "0.png")]
        main_test([*argv, "--precision", precision, "--tile", tile, "--tile_overlap", "8", "--output", str(out)])
        (path,) = (out / "x").rglob("*.png")
        images[precision] = imread_uint(str(path))
        assert json.loads((out / "results.json").read_text(encoding="utf-8"))["precision"] == precision
    # The last layer's image is rounded to 8 bits of mantissa, as a PNG is; in fp16 a PNG hides nearly all of it.
    assert 40 < psnr(images["bf16"], images["fp32"]) < 90
    assert psnr(images["fp16"], images["fp32"]) > 55


def test_validation_is_in_test_precision_whatever_training_is_in(work: Systems) -> None:
    batch, E = three(work), {}
    for train, test in (("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")):
        model = built(work, "plain", f"train.precision={train}", f"test.precision={test}")
        model.feed_data(batch, need_H=False)
        model.test()
        assert model.E.dtype == torch.float32
        E[train, test] = model.E
    assert torch.equal(E["bf16", "fp32"], E["fp32", "fp32"])
    assert 0 < distance(E["fp32", "bf16"], E["fp32", "fp32"]) < 2**-6


def test_precision_with_an_option_file_stands_in_it(work: Systems) -> None:
    with pytest.raises(UserError, match="--precision: with --opt these stand in the file"):
        main_test(["--opt", work.file(), "--precision", "bf16"])
    with pytest.raises(UserError, match=r"test\.precision: .*fp32"):
        work.run("test.precision=half")
