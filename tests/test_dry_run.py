"""``--dry_run``: it says what a step does, the weights it proposes balance the gradients, nothing is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models.model_base import ModelSR
from tests.test_dist import torchrun
from tests.test_model_dm import NETG, RESSHIFT
from tests.test_ranker import Results
from tests.test_systems import SPSR, SPSR_TERMS
from tests.training import SSL, Workplace, tree
from training.dry_run import STEPS, Term, balance, medians, terms

BOXSUM = (*SSL, "train.ssl_mode=boxsum", "datasets.test=null")  # nothing to compile in a test
KINDS: dict[str, tuple[str, ...]] = {
    "plain": ("model=plain", *BOXSUM),
    "gan": ("model=gan", "train.D_init_iters=1000", "train.D_update_ratio=2", *BOXSUM),
    "spsr": ("model=spsr", *SPSR_TERMS, *BOXSUM),
    "dm": BOXSUM,
}


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def of_kind(work: Workplace, kind: str) -> tuple[str, ...]:
    if kind == "spsr":
        work.options["netG"] = SPSR
    if kind == "dm":
        del work.options["netD"], work.options["train"]["gan_type"], work.options["train"]["D_lossfn_weight"]
        work.options |= {"model": "dm", "netG": NETG, "diffusion": RESSHIFT}
    return KINDS[kind]


def table(said: str) -> dict[str, tuple[float, float]]:
    """Term -> its printed size and gradient."""
    rows = re.findall(r"^(\w+) +([-+.\de]+) +\d+ % +([-+.\de]+)$", said, re.MULTILINE)
    return {name: (float(size), 0.0 if gradient == "-" else float(gradient)) for name, size, gradient in rows}


def fed(work: Workplace, *overrides: str) -> Any:
    model = work.model(*overrides)
    model.feed_data(work.batch(*overrides))
    return model


# ------------------------------------------------------------------------------------------------------ what it prints


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_of_the_generator_stands_in_a_table_of_80_columns(
    work: Workplace, kind, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("models.network_spsr._rrdb", lambda nc, gc: torch.nn.Conv2d(nc, nc, 3, 1, 1))
    overrides = of_kind(work, kind)
    work.run(*overrides, "train.iterations=100000", "--dry_run")
    report = capsys.readouterr().out.partition("dry run from step 0")[2]
    model = fed(work, *overrides)
    assert list(table(report)) == list(model.losses())
    without = {"branch"} if kind == "spsr" else set()  # H's gradient map against the branch's, not E's
    assert {name for name, (_, gradient) in table(report).items() if not gradient} == without
    assert max(map(len, report.splitlines())) <= 80
    assert re.search(r"^peak memory +\d+\.\d\d GiB of the process, validation not counted$", report, re.MULTILINE)
    assert re.search(r"^a step +[.\d]+ s, of these [.\de-]+ s waiting for data; medians of 15$", report, re.MULTILINE)
    assert re.search(r"^to train\.iterations +[\dd ]*\d+:\d\d:\d\d for 100,000 steps", report, re.MULTILINE)
    assert ("netD is new" in report) == (kind in ("gan", "spsr"))


def test_without_ssl_it_says_how_to_be_told(work: Workplace, capsys) -> None:
    work.run("--dry_run")
    assert "SSL is off. Give train.ssl_l1_weight and train.ssl_kl_weight any values" in capsys.readouterr().out


def test_a_discriminator_that_is_given_is_not_called_new(work: Workplace, capsys) -> None:
    work.run("model=gan", "task=before", "datasets.test=null", "train.iterations=2")
    capsys.readouterr()
    netD = work.folder("before") / "models" / "2_D.pth"
    work.run("model=gan", "datasets.test=null", f"path.pretrained_netD={netD}", "--dry_run")
    said = capsys.readouterr().out
    assert "D_loss" in table(said)
    assert "netD is new" not in said


def test_a_ranker_makes_no_image_to_balance(tmp_path: Path, capsys) -> None:
    results = Results(tmp_path)
    before = tree(tmp_path)
    results.run("--dry_run")
    report = capsys.readouterr().out.partition("dry run")[2]
    assert "Model ranker makes no image E" in report
    assert "a step " in report
    assert tree(tmp_path).keys() - before.keys() <= {str(tmp_path / "o.json")}


# ------------------------------------------------------------------------------------------------- nothing is written


def test_nothing_is_written_and_a_run_that_exists_is_not_touched(work: Workplace, capsys) -> None:
    work.file()
    before = tree(work.root)
    work.run("model=gan", "--dry_run")
    assert not work.folder().exists()
    assert tree(work.root).keys() == before.keys()
    work.run("model=gan", "datasets.test=null")
    before = tree(work.folder())
    capsys.readouterr()
    work.run("model=gan", "datasets.test=null", "--dry_run")  # at its end, of which a dry run has none
    said = capsys.readouterr().out
    assert "resumed at step 4" in said
    assert "dry run from step 4: 20 steps, the losses of 20 batches; nothing is saved" in said
    assert "netD is new" not in said
    assert tree(work.folder()) == before


# ------------------------------------------------------------------------------------------------------- the gradients


def test_gradients_are_those_of_each_weighted_loss_at_E(work: Workplace) -> None:
    model = fed(work, "model=gan", "train.G_lossfn_weight=3", "train.D_lossfn_weight=0.5", *BOXSUM)
    begun = {name: buffer.clone() for name, buffer in model.netD.named_buffers()}
    found = terms(model)
    model.netD.load_state_dict(begun, strict=False)  # spectral norms move with each call
    E = model.E.detach().requires_grad_()
    losses = {
        "G_loss": 3 * F.l1_loss(E, model.H),
        "ssl": model.ssl(E, model.H),
        "D_loss": 0.5 * ((model.netD(E) - 1) ** 2).mean(),  # lsgan
    }
    assert found.keys() == losses.keys()
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, E)
        # float32, twice the same operations.
        assert found[name].size == pytest.approx(loss.item(), rel=1e-5)
        assert found[name].gradient == pytest.approx(gradient.norm().item(), rel=1e-4)
    # By hand: the mean absolute difference has gradients of +-1 / n.
    assert found["G_loss"].gradient == pytest.approx(3 / E.numel() ** 0.5, rel=1e-5)


def test_a_diffusion_loss_is_compared_with_the_others_at_what_the_network_predicts(work: Workplace) -> None:
    model = fed(work, *of_kind(work, "dm"), "train.dm_weight=2", "train.G_lossfn_weight=0")
    found = terms(model)["dm_loss"]
    n = model.H.numel()
    # 2 mean(d^2) has the gradient 4 d / n, and the norm of d is that of its mean square.
    assert found.gradient == pytest.approx(4 / n * (found.size / 2 * n) ** 0.5, rel=1e-4)  # float32


def test_measuring_trains_nothing(work: Workplace) -> None:
    model = fed(work, "model=gan", *BOXSUM)
    before = {name: p.clone() for net in ("G", "D") for name, p in model.networks[net].named_parameters(prefix=net)}
    terms(model)
    for net in ("G", "D"):
        for name, parameter in model.networks[net].named_parameters(prefix=net):
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None
            assert parameter.requires_grad


def test_in_pieces_they_are_those_of_the_batch(work: Workplace) -> None:
    whole, pieces = (terms(fed(work, "model=gan", *BOXSUM, f"train.micro_batch={n}")) for n in ("null", "1"))
    assert whole.keys() == pieces.keys()
    for name, term in whole.items():
        assert pieces[name] == pytest.approx(term, rel=1e-4), name  # float32 sums in another order


@pytest.mark.parametrize("factor", [64.0, 1024.0])
def test_the_factor_of_fp16s_scaler_is_divided_out(work: Workplace, factor) -> None:
    exact = terms(fed(work, "model=gan"))
    model = fed(work, "model=gan", "train.precision=fp16")
    model.scalers["G"].load_state_dict(model.scalers["G"].state_dict() | {"scale": factor})
    for name, term in terms(model).items():
        # netG and netD compute with 11 bits here, in some layers one after the other.
        assert term == pytest.approx(exact[name], rel=0.02), name


def test_two_processes_print_one_table_that_is_one_processs(work: Workplace, capsys) -> None:
    gan = ("model=gan", "datasets.test=null")
    result = torchrun("main_train_gan.py", work, *gan, "--dry_run")
    assert result.returncode == 0, result.stderr
    work.run(*gan, "--dry_run")
    one, two = table(capsys.readouterr().out), table(result.stdout)
    assert result.stdout.count("loss of netG") == 1
    assert one.keys() == two.keys() == {"G_loss", "D_loss"}
    for name, numbers in one.items():
        # Four digits are printed, of 20 steps with the same batches in two halves.
        assert two[name] == pytest.approx(numbers, rel=2e-3), name
    assert not work.folder().exists()


# ------------------------------------------------------------------------------------------------------ the proposal


def test_the_factor_is_that_of_the_largest_other_gradient() -> None:
    measured = {"G_loss": Term(9.0, 2.0), "ssl": Term(1.0, 4.0), "D_loss": Term(0.1, 3.0), "branch": Term(99.0, 0.0)}
    assert balance(measured) == ("D_loss", 0.75)
    assert balance({"ssl": Term(1.0, 4.0)}) is None
    assert balance({"ssl": Term(0.0, 0.0), "G_loss": Term(1.0, 1.0)}) is None
    assert balance({"G_loss": Term(1.0, 1.0)}) is None


def test_numbers_are_medians_over_the_batches() -> None:
    batches = [{"ssl": Term(size, 10 - size)} for size in (0.0, 1.0, 5.0)]
    assert medians(batches) == {"ssl": Term(1.0, 9.0)}


@pytest.mark.parametrize("kind", ["plain", "gan", "dm"])
def test_with_the_weights_it_prints_the_gradients_are_equal(work: Workplace, kind, capsys) -> None:
    # The weights of SSL change what the steps learn; at this rate they learn nothing that could be seen.
    still = (*of_kind(work, kind), "train.G_optimizer_lr=1e-12", "train.ssl_kl_weight=25", "--dry_run")
    work.run(*still)
    said = capsys.readouterr().out
    largest = re.search(r"SSL's gradient is \S+ times (\w+)'s", said)
    proposed = re.search(r'^  "ssl_l1_weight": (\S+), "ssl_kl_weight": (\S+)$', said, re.MULTILINE)
    assert largest
    assert proposed
    assert float(proposed[1]) == pytest.approx(2 * float(proposed[2]), rel=0.01)  # one factor, three digits
    work.run(*still, f"train.ssl_l1_weight={proposed[1]}", f"train.ssl_kl_weight={proposed[2]}")
    gradients = {name: gradient for name, (_, gradient) in table(capsys.readouterr().out).items()}
    assert gradients["ssl"] == pytest.approx(gradients[largest[1]], rel=0.01)  # three digits, twice
    assert gradients["ssl"] == pytest.approx(max(v for name, v in gradients.items() if name != "ssl"), rel=0.01)


def test_the_batches_are_those_behind_the_steps(work: Workplace, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    feed = ModelSR.feed_data

    def feed_data(self: ModelSR, data: dict[str, Any], need_H: bool = True) -> None:
        seen.append(data["H"])
        feed(self, data, need_H)

    monkeypatch.setattr(ModelSR, "feed_data", feed_data)
    work.run("datasets.test=null", "--dry_run")
    assert len(seen) == 2 * STEPS
    assert not any(torch.equal(seen[0], other) for other in seen[1:])
