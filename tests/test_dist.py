"""Two processes on the CPU (gloo) train as one: one set of files, one log, the same steps."""

import copy
import gc
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.dataset_blindsr import DatasetBlindSR
from data.loader import SampleKey
from models.model_base import ModelBase, ModelSR
from tests.conftest import REPOSITORY, photograph
from tests.training import SSL, Workplace, assert_same, tree
from training.loop import training_options
from utils import utils_dist, utils_launch
from utils.utils_error import UserError
from utils.utils_image import imsave
from utils.utils_logger import setup


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def torchrun(script: str, work: Workplace, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    return subprocess.run(
        [*command, "--opt", work.file(), *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_two_processes_train_gan_and_ssl_with_one_set_of_files_and_one_log(work: Workplace) -> None:
    # The first process's half of each batch is flat at times: no edge pixel in it, and none may wait for ever for that.
    imsave(np.full((48, 48, 3), 90, np.uint8), str(work.root / "H" / "0.png"))
    sr = ("datasets.train.dataset_type=sr", "train.iterations=3", "train.checkpoint_save=3")
    result = torchrun("main_train_gan.py", work, "model=gan", *SSL, *sr)
    assert result.returncode == 0, result.stderr
    names = {p.name for p in (work.folder() / "models").iterdir()}
    expected = {f"3_{n}.pth" for n in ("G", "E", "D", "optimizerG", "optimizerD")}
    assert names == expected | {"3_G.safetensors", "3_E.safetensors", "3_state.json"}
    assert len(list((work.folder() / "tensorboard").iterdir())) == 1
    for text in (result.stdout, work.log()):
        assert len(re.findall(r"step 3/3 ", text)) == 1
        assert text.count("done at step 3") == 1
        assert text.count("batch 2 = 2 x 1 patches") == 1
    assert "PSNR" in work.log()


def test_an_empty_mask_in_one_process_does_not_keep_the_other_waiting(work: Workplace) -> None:
    (work.root / "H" / "2.png").unlink()
    imsave(np.full((48, 48, 3), 90, np.uint8), str(work.root / "H" / "0.png"))
    alone = ("train.G_lossfn_weight=0", *SSL, "datasets.train.dataset_type=sr", "datasets.test=null")
    # In order: image 0 (flat) is always the first process's, image 1 the second's.
    result = torchrun("main_train_psnr.py", work, *alone, "datasets.train.dataloader_shuffle=false")
    assert result.returncode == 0, result.stderr
    assert all(bool(value.isfinite().all()) for value in work.saved(4)["G"].values())
    assert float(re.search(r"ssl_l1 (\S+)", work.log())[1]) > 0


def test_two_processes_with_half_the_batch_each_equal_one_process(work: Workplace) -> None:
    plain = ("train.iterations=3", "train.checkpoint_save=3", "train.checkpoint_test=3")
    result = torchrun("main_train_psnr.py", work, "task=two", *plain)
    assert result.returncode == 0, result.stderr
    work.run("task=one", *plain)
    one, two = work.saved(3, "one")["G"], work.saved(3, "two")["G"]
    start = work.model("task=one", "train.manual_seed=1", seed=1).netG.state_dict()
    moved = max((one[k] - start[k]).abs().max().item() for k in one)
    assert moved > 1e-3  # three steps of 1e-3
    for key in one:
        # The mean of two means is the mean, but for the order of the sums: the gradients differ by float32 noise, which
        # Adam, dividing by the gradient's own size, turns into some hundredths of a step of 1e-3 where a gradient is
        # small. Seen: 1.1e-5.
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")
    scores = [re.search(r"PSNR (\S+) dB, SSIM (\S+)", work.log(task)) for task in ("one", "two")]
    assert scores[0][0] == scores[1][0]  # the processes share the images of the test set


# ---------------------------------------------------------------------------------------------------- forks as ranks


class Ended(NamedTuple):
    """How one process of several ended."""

    status: int
    out: str
    err: str


class Processes:
    """Forks of this process, each with the variables of torchrun and a store as torchrun's, under ``run``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, main: Callable[[int], None], count: int = 2, agent: bool = True, **variables: str
    ) -> list[Ended]:
        """``main(rank)`` in each."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        if agent:
            port = store.port
        else:  # as without torchrun: the first process keeps the store
            with socket.socket() as free:
                free.bind(("", 0))
                port = free.getsockname()[1]
        pids = []
        # What other tests left in cycles may own threads, as process groups do. A fork has no such threads, and would
        # abort in waiting for them if it collected their owners.
        gc.collect()
        gc.freeze()
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": agent}
            pid = os.fork()
            if pid == 0:
                self._child(main, rank, {name: str(value) for name, value in {**place, **variables}.items()})
            pids.append(pid)
        gc.unfreeze()
        end = time.monotonic() + 60
        statuses: dict[int, int] = {}
        while len(statuses) < count:
            for pid in set(pids) - set(statuses):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return [Ended(statuses[pid], *map(self._text, (f"{r}.out", f"{r}.err"))) for r, pid in enumerate(pids)]

    def _text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def _child(self, main: Callable[[int], None], rank: int, variables: dict[str, str]) -> NoReturn:
        status = 99
        try:
            os.environ.update(variables)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
            sys.excepthook = sys.__excepthook__
            utils_launch.run(lambda: main(rank))
        except SystemExit as error:
            status = int(error.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    return Processes(tmp_path)


forks = pytest.mark.skipif(sys.platform != "linux", reason="forks this process, which macOS and Windows cannot")


def one_line(ended: list[Ended], expected: str, by: int | None = None) -> None:
    """All left with status 2, and one of them (process ``by``) with one line."""
    assert [e.status for e in ended] == [2] * len(ended), ended
    lines = [e.err for e in ended]
    assert re.fullmatch(f"error: .*{expected}.*\n", "".join(lines)), lines
    assert by is None or lines[by], lines


def raises_in(rank: int, error: BaseException, step: int = 2) -> Callable[..., dict[str, float]]:
    """A stand-in for ``ModelBase.current_log`` that fails in one process's step."""
    calls = iter(range(1, 100))

    def current_log(self: ModelBase) -> dict[str, float]:
        if next(calls) == step and utils_dist.rank() == rank:
            raise error
        return dict(self.log)

    return current_log


@forks
def test_each_process_goes_on_with_its_own_pool_of_pairs(work: Workplace, processes: Processes) -> None:
    pool = ("datasets.train.degradation_device=gpu", "datasets.train.pair_pool=2", "datasets.test=null")
    for task, last in (("whole", 6), ("parts", 4), ("parts", 6)):
        ended = processes(lambda rank: work.run(*pool, f"task={task}", f"train.iterations={last}"))  # noqa: B023
        assert [e.status for e in ended] == [0, 0], ended
    whole, parts = work.saved(6, "whole"), work.saved(6, "parts")
    assert_same(whole, parts)
    assert not torch.equal(whole["pool0"]["H"], whole["pool1"]["H"])
    flip = work.folder("parts") / "models" / "6_pool1.pth"
    flip.write_bytes(flip.read_bytes()[:-1] + b"x")
    ended = processes(lambda rank: work.run(*pool, "task=parts", "train.iterations=6"))
    assert [e.status for e in ended] == [0, 0], ended
    assert "resumed at step 4" in ended[0].out  # the first process could read all of 6, the second could not
    assert_same(whole, work.saved(6, "parts"))
    work.run(*pool, "task=parts", "train.iterations=7")
    assert "checkpoint 6 has pools of 2 processes, not of 1: it is filled anew" in work.log("parts")


@forks
def test_all_processes_leave_out_a_step_that_is_bad_for_one_of_them(work: Workplace, processes: Processes) -> None:
    def main(rank: int) -> None:
        utils_dist.init()
        setup(quiet=rank > 0)
        model = work.model("model=gan", "train.skip_bad_steps=2")
        sound = model.pixel
        for step in (1, 2, 3):
            # A loss that is not finite while its gradient is: the other process sees nothing of it.
            bad = math.inf if (rank, step) == (1, 2) else 0.0
            model.pixel = lambda E, H: sound(E, H) + bad  # noqa: B023
            before = copy.deepcopy([net.state_dict() for net in model.networks.values()])
            model.feed_data(work.batch(number=rank) | {"H_path": [f"of {rank}"]})
            model.optimize_parameters(step)
            after = [net.state_dict() for net in model.networks.values()]
            assert (model.current_log() == {}) == (step == 2)
            if step == 2:
                assert_same(before, after)
            weights = torch.cat([p.detach().flatten() for net in model.networks.values() for p in net.parameters()])
            assert len({tuple(digits) for digits in utils_dist.gathered(weights.tolist())}) == 1
        assert model.bad_steps == 1
        utils_dist.close()

    ended = processes(main)
    assert [e.status for e in ended] == [0, 0], ended
    assert re.fullmatch(r"step 2: G_loss is inf, the step is left out .*; images: of 1\n", ended[0].out)
    assert ended[0].err == ended[1].out == ended[1].err == ""


class Taken(NamedTuple):
    """A step: netG's weights after it, and the log, means over the processes."""

    weights: torch.Tensor
    log: dict[str, float]


def take(model: Any, batches: list[dict[str, torch.Tensor]], part: slice) -> list[Taken]:
    """Steps, on a part of each batch."""
    steps = []
    for step, batch in enumerate(batches, 1):
        model.feed_data({name: images[part] for name, images in batch.items()})
        model.optimize_parameters(step)
        weights = torch.cat([p.detach().flatten() for p in model.netG.parameters()])
        sums = utils_dist.total(model.current_log(), model.device)
        steps.append(Taken(weights, {name: value / utils_dist.world_size() for name, value in sums.items()}))
    return steps


@forks
def test_GAN_with_SSL_of_two_processes_is_that_of_one(work: Workplace, processes: Processes) -> None:
    settings = ("model=gan", *SSL, "train.ssl_mode=boxsum")
    batches = []
    for number in range(6):
        pairs = [work.batch(number=2 * number + i) for i in range(2)]
        batches.append({name: torch.cat([pair[name] for pair in pairs]) for name in pairs[0]})
        if number in (0, 3):
            batches[-1]["H"][:2] = 0.5  # no edge pixels for the first process
    # SSL alone would not show it: a factor that is the same in each step is lost in Adam.
    published, pieces = ("train.ssl_over_processes=false",), ("train.micro_batch=1",)
    cases = {"whole": ((), 6), "pieces": (pieces, 2), "published": (published, 2)}

    def main(rank: int) -> None:
        utils_dist.init()
        for name, (more, count) in cases.items():
            model = work.model(*settings, *more)
            steps = take(model, batches[:count], slice(2 * rank, 2 * rank + 2))
            if rank == 0:
                torch.save([step._asdict() for step in steps], work.root / name)
        del model
        gc.collect()  # the wrappers go before the group
        utils_dist.close()

    ended = processes(main)
    assert [e.status for e in ended] == [0, 0], ended
    model = work.model(*settings)
    start = torch.cat([p.detach().flatten() for p in model.netG.parameters()])
    expected = take(model, batches, slice(0, 4))
    for case, (_, count) in cases.items():
        steps = [Taken(**step) for step in torch.load(work.root / case)]
        one, two = expected[count - 1].weights, steps[-1].weights
        apart = (one - two).abs().max() / (one - start).abs().max()
        if case == "published":
            assert apart > 0.1
            assert steps[0].log["ssl"] == pytest.approx(expected[0].log["ssl"] / 2, rel=1e-5)  # the mean of 0 and it
            continue
        # float32's sums in another order, which Adam enlarges where a gradient is small. Seen: 4e-6.
        assert apart < 1e-4, case
        for step, wanted in zip(steps, expected, strict=False):
            losses = {name: value for name, value in wanted.log.items() if not name.endswith("_grad")}
            assert {name: step.log[name] for name in losses} == pytest.approx(losses, rel=1e-4, abs=1e-6)


# What SLURM's commands do, for two processes of this machine.
SLURM = {
    "srun": """
        for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & echo $! >> pids; all="$all $!"; done
        status=0
        for pid in $all; do wait $pid || status=$?; done
        exit $status
    """,
    "scancel": 'test "$*" = "--signal=USR1 $SLURM_JOB_ID" && kill -USR1 $(cat pids)',
    "scontrol": 'if [ "$1" = show ]; then printf "127.0.0.1\\nother\\n"; else echo "$*" > requeued; fi',
}


@pytest.mark.skipif(sys.platform != "linux", reason="SLURM's systems")
@pytest.mark.parametrize("ends", ["warned", "done"])
def test_the_slurm_script_of_the_docs_saves_and_requeues_a_run_whose_time_is_up(work: Workplace, ends: str) -> None:
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", (REPOSITORY / "docs" / "scale.md").read_text(), re.DOTALL)
    assert script
    for name, text in SLURM.items():
        (work.root / name).write_text(f"#!/bin/bash\n{text}")
        (work.root / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    last = "null" if ends == "warned" else "2"
    command = f"{REPOSITORY}/main_train_psnr.py --opt {work.file()} datasets.test=null train.iterations={last}"
    variables = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "x", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    variables |= {"PATH": f"{work.root}:{os.environ['PATH']}", "PYTHON": sys.executable, "COMMAND": command}
    text = script[1].replace("$((20000 + SLURM_JOB_ID % 20000))", str(port))
    job = subprocess.Popen(
        ["bash", "-c", text],
        cwd=work.root,
        env={**os.environ, **variables, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("step 2"):
            break
    if ends == "warned":
        job.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    out, err = job.communicate(timeout=100)
    if ends == "done":
        assert (job.returncode, (work.root / "requeued").exists()) == (0, False), err
        return
    assert job.returncode == 128 + signal.SIGUSR1, err
    assert (work.root / "requeued").read_text() == "requeue 77\n"
    step = int(re.search(r"stopped by a signal at step (\d+)", out)[1])
    assert set(work.saved(step)) == {"G", "E", "optimizerG"}


# ------------------------------------------------------------------------------------------------ mistakes, together


@forks
@pytest.mark.parametrize(
    ("rank", "overrides", "expected"),
    [
        (0, "datasets.train.dataroot_H=/nowhere", "there is no /nowhere"),
        (1, "datasets.train.dataroot_H=/nowhere", "there is no /nowhere"),
        (1, "netG.nonsense=1", "nonsense"),
        (1, "path.root={root}/other", "the step of the newest checkpoint is 0 for one process and 2 for another"),
        (1, "datasets.train.dataroot_H={root}/T", "items in train is 2 for one process and 3 for another"),
    ],
)
def test_what_one_process_alone_sees_before_training_is_its_one_line(
    work: Workplace, processes: Processes, rank: int, overrides: str, expected: str
) -> None:
    work.run("train.iterations=2", "train.checkpoint_test=1000", "datasets.test=null")
    before = tree(work.root / "runs")
    mine = overrides.replace("{root}", str(work.root))
    ended = processes(lambda r: work.run("train.iterations=3", "datasets.test=null", *([mine] if r == rank else [])))
    one_line(ended, expected, by=None if "one process" in expected else rank)
    assert tree(work.root / "runs") == before
    assert not (work.root / "other").exists()


@forks
@pytest.mark.parametrize("agent", [True, False])
def test_an_image_that_only_the_first_process_looks_at_is_its_one_line(
    work: Workplace, processes: Processes, agent: bool
) -> None:
    imsave(photograph(20, 24), str(work.root / "H" / "small.png"))
    one_line(processes(lambda rank: work.run(), agent=agent), r"small\.png \(24x20\): smaller than H_size 32", by=0)
    assert not (work.root / "runs").exists()


@forks
@pytest.mark.parametrize("overrides", ["datasets.train.dataloader_batch_size=4", "scale=99", "datasets.train="])
def test_a_mistake_that_all_processes_see_is_one_line_once(
    work: Workplace, processes: Processes, overrides: str
) -> None:
    one_line(
        processes(lambda rank: work.run(overrides), count=3), "(cannot be shared by 3|scale: must be|must be a section)"
    )


@forks
@pytest.mark.parametrize(
    ("rank", "error", "expected"),
    [
        (
            1,
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
            "Tried to allocate",
        ),
        (0, OSError(28, "No space left on device", "events"), "events: No space left on device"),
        (1, UserError("step 2: G_loss is nan"), "G_loss is nan"),
    ],
)
def test_what_stops_one_process_in_a_step_is_its_one_line(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception, expected: str
) -> None:
    monkeypatch.setattr(ModelBase, "current_log", raises_in(rank, error))
    one_line(processes(lambda r: work.run("datasets.test=null")), expected, by=rank)


@forks
def test_a_validation_that_one_process_cannot_do_is_one_line_once_all_have_saved(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    imsave(photograph(40, 44), str(work.root / "T" / "second.png"))  # an image for each process
    whole = ModelSR.test

    def test(self: ModelSR) -> None:
        if utils_dist.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole(self)

    monkeypatch.setattr(ModelSR, "test", test)
    pool = ("datasets.train.degradation_device=gpu", "datasets.train.pair_pool=2")  # of which each saves its own
    options = ("train.iterations=3", "train.checkpoint_test=2", "train.checkpoint_save=100")
    one_line(processes(lambda rank: work.run(*pool, *options)), r"test\.tile=256", by=None)
    assert {path.name for path in (work.folder() / "models").glob("2_pool*")} == {"2_pool0.pth", "2_pool1.pth"}
    assert (work.folder() / "models" / "2_state.json").is_file()


@forks
def test_a_disk_that_is_full_is_one_line_of_the_process_that_saves(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", no_space)
    one_line(processes(lambda rank: work.run("datasets.test=null")), r"2_G\.pth: cannot be written", by=0)


@forks
def test_an_image_that_breaks_while_training_is_one_line_of_the_process_that_reads_it(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DatasetBlindSR.__getitem__

    def broken(self: DatasetBlindSR, key: SampleKey) -> dict[str, Any]:
        if key[1][1] == 5:  # the second process's sample of step 3
            raise MemoryError("Unable to allocate 3 TiB")
        return whole(self, key)

    monkeypatch.setattr(DatasetBlindSR, "__getitem__", broken)
    workers = "datasets.train.dataloader_num_workers=1"
    one_line(processes(lambda rank: work.run(workers, "datasets.test=null")), "Unable to allocate 3 TiB", by=1)


@forks
def test_a_process_that_is_killed_is_one_line_of_another(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: ModelBase) -> dict[str, float]:
        if utils_dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    monkeypatch.setattr(ModelBase, "current_log", killed)
    monkeypatch.setattr(utils_dist, "_GRACE", 1.0)
    first, second = processes(lambda rank: work.run("datasets.test=null"))
    assert second.status == -signal.SIGKILL
    one_line([first], "another of the 2 processes has ended without a word")


@forks
def test_a_process_that_waits_where_nothing_wakes_it_leaves_too(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def current_log(self: ModelBase) -> dict[str, float]:
        if utils_dist.rank() == 1:
            raise UserError("the second process's mistake")
        time.sleep(100)  # as a collective of NCCL, whose end on the other side is gone
        return {}

    monkeypatch.setattr(ModelBase, "current_log", current_log)
    one_line(processes(lambda rank: work.run("datasets.test=null")), "the second process's mistake", by=1)
    assert not (work.folder() / "run.lock").exists()


@forks
def test_a_fault_of_the_program_shows_its_traceback_once(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelBase, "current_log", raises_in(1, ZeroDivisionError("a fault")))
    first, second = processes(lambda rank: work.run("datasets.test=null"))
    assert (first.status, second.status) == (1, 1)
    assert first.err == ""
    assert second.err.count("Traceback") == 1
    assert second.err.endswith("ZeroDivisionError: a fault\n")


@forks
def test_a_signal_to_one_process_stops_and_saves_all(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def current_log(self: ModelBase) -> dict[str, float]:
        if utils_dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    monkeypatch.setattr(ModelBase, "current_log", current_log)
    ended = processes(lambda rank: work.run("datasets.test=null"))
    assert [(e.status, e.err) for e in ended] == [(128 + signal.SIGTERM, "")] * 2
    assert "stopped by a signal at step 1" in ended[0].out
    assert set(work.saved(1)) == {"G", "E", "optimizerG"}


@forks
def test_nothing_is_in_the_store_when_a_process_ends(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils_dist._Meeting, "failure", lambda self: time.sleep(0.5))  # a store that answers late

    def main(rank: int) -> None:
        utils_dist.init()
        time.sleep(0.5)  # by now the thread that looks for failures is in the store
        utils_dist.close()
        assert not any(thread.daemon for thread in threading.enumerate())

    assert [ended.status for ended in processes(main)] == [0, 0]


@forks
def test_help_is_printed_once(processes: Processes, capfd: pytest.CaptureFixture[str]) -> None:
    ended = processes(lambda rank: training_options("What it does.", ["plain"], ["--help"]) and None)
    assert [e.status for e in ended] == [0, 0]
    assert "What it does." in ended[0].out
    assert ended[1].out == ended[0].err == ended[1].err == ""


# --------------------------------------------------------------------------------------------------------- meeting


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ("RANK=0", "RANK set in the environment, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start.*torchrun"),
        ("WORLD_SIZE=2", "WORLD_SIZE set in the environment, but not RANK"),
        ("LOCAL_RANK=1", "LOCAL_RANK set in the environment, but not RANK"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost", "but not MASTER_PORT"),
        ("RANK=zero WORLD_SIZE=1", "RANK=zero .*from 0 to 0"),
        ("RANK=-1 WORLD_SIZE=2", "RANK=-1"),
        ("RANK=2 WORLD_SIZE=2", "RANK=2 .*from 0 to 1"),
        ("RANK=1.5 WORLD_SIZE=2", r"RANK=1\.5"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE=0 .*from 1"),
        ("RANK=0 WORLD_SIZE=many", "WORLD_SIZE=many"),
        ("RANK=0 WORLD_SIZE=" + 5000 * "9", "WORLD_SIZE=999"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK=2 .*from 0 to 1"),
        ("RANK=0 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK=2 .*from 0 to 1"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=3", "LOCAL_WORLD_SIZE=3"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=port", "MASTER_PORT=port"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=70000", "MASTER_PORT=70000"),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=no.such.machine.invalid", r"MASTER_ADDR=no\.such\.machine\.invalid: no mach"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT={used}", "MASTER_PORT=.*in use.*choose another"),
        ("RANK=1 WORLD_SIZE=2 MASTER_PORT={free}", r"no process 0 at 127\.0\.0\.1:\d+ within 0\.5 seconds"),
        ("RANK=1 WORLD_SIZE=2 MASTER_PORT={used}", r"the processes cannot meet at 127\.0\.0\.1"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT={free}", r"WORLD_SIZE=2, but 1 came to 127\.0\.0\.1:\d+ within 0\.5 sec"),
    ],
)
def test_wrong_variables_of_torchrun_are_one_line_in_good_time(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, variables: str, expected: str
) -> None:
    monkeypatch.setattr(utils_dist, "JOIN_LIMIT", timedelta(seconds=0.5))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as used, socket.socket() as free:
        used.bind(("", 0)), free.bind(("", 0))
        used.listen()
        ports = {"{used}": used.getsockname()[1], "{free}": free.getsockname()[1]}
        free.close()
        given = dict(pair.split("=") for pair in variables.split())
        if len(given) > 1 and "MASTER_ADDR" not in given:
            given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{free}", **given}
        elif "invalid" in variables:
            given["MASTER_PORT"] = "{free}"
        for name, value in given.items():
            monkeypatch.setenv(name, str(ports.get(value, value)))
        with pytest.raises(UserError, match=expected) as error:
            work.run()
        utils_dist.close()
    assert "\n" not in str(error.value)
    assert not (work.root / "runs").exists()


def test_variables_of_one_process_and_leftovers_need_no_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "no.such.machine.invalid")
    assert utils_dist.place() == utils_dist.Place()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert utils_dist.place().world_size == 1


@forks
def test_two_processes_of_one_number_are_one_line(work: Workplace, processes: Processes) -> None:
    one_line(processes(lambda rank: work.run(), RANK="0"), "RANK=0 is the number of two processes")


@forks
@pytest.mark.parametrize(
    ("names", "expected"),
    [(["cuda a", "cuda a"], r"processes 0 and 1 are on one GPU \(cuda a\)"), (["cuda a", "cpu"], "some have none")],
)
def test_processes_that_cannot_train_together_on_their_devices_are_one_line(
    work: Workplace, processes: Processes, monkeypatch: pytest.MonkeyPatch, names: list[str], expected: str
) -> None:
    monkeypatch.setattr(utils_dist, "_device_name", lambda device: names[int(os.environ["RANK"])])
    one_line(processes(lambda rank: work.run()), expected)
