"""A run's folder: checkpoints that know whether they are whole and whose they are, and one process at a time."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import SSL, Workplace, assert_same, tree
from training import lock as lock_module
from training.checkpoints import Checkpoints
from training.lock import LIMIT, FolderLock, remove_parts
from utils.utils_checkpoint import DamagedError
from utils.utils_error import UserError
from utils.utils_option import parse
from utils.utils_resume import newest_generator, read_run, read_state

RUN = ("model=gan", *SSL, "train.iterations=6", "datasets.test=null")


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Two runs of six steps, with sets at 2, 4 and 6."""
    work = Workplace(tmp_path_factory.mktemp("trained"))
    for task, seed in (("whole", 1), ("other", 2)):
        work.run(*RUN, f"task={task}", f"train.manual_seed={seed}")
    return work


@pytest.fixture
def run(trained: Workplace, tmp_path: Path) -> Workplace:
    """A copy of the first run, called ``run``; ``whole`` and ``other`` lie beside it."""
    work = Workplace(tmp_path)
    shutil.copytree(trained.root / "runs", work.root / "runs")
    shutil.copytree(work.folder("whole"), work.folder())
    return work


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------- manifests


def flipped(name: str) -> Callable[[Path], None]:
    return lambda models: flip(models / f"6_{name}", 8 * (models / f"6_{name}").stat().st_size // 2 + 3)


def copied(source: str, target: str) -> Callable[[Path], object]:
    return lambda models: shutil.copy(models / source, models / target)


def foreign(models: Path) -> None:
    for path in (models.parent.parent / "other" / "models").glob("6_*"):
        shutil.copy(path, models / path.name)


def renamed(models: Path) -> None:
    for path in models.glob("4_*"):
        shutil.copy(path, models / path.name.replace("4_", "6_"))


def shortened(models: Path) -> None:
    (models / "6_G.pth").write_bytes((models / "6_G.pth").read_bytes()[:-1])


WORDS = "is not what was written, its SHA-256 is another"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        *((flipped(f"{n}.pth"), rf"6_{n}\.pth: {WORDS}") for n in ("G", "E", "D", "optimizerG", "optimizerD")),
        (flipped("state.json"), r"6_state\.json: "),
        (lambda models: (models / "6_state.json").unlink(), r"no 6_state\.json"),
        (lambda models: (models / "6_E.pth").unlink(), r"no 6_E\.pth"),
        (lambda models: (models / "6_G.pth").unlink(), r"no 6_G\.pth"),
        (shortened, r"6_G\.pth: has \d+ bytes, \d+ were written"),
        (copied("4_G.pth", "6_G.pth"), rf"6_G\.pth: {WORDS}"),
        (copied("4_state.json", "6_state.json"), r"6_state\.json: is of step 4"),
        (renamed, r"6_state\.json: is of step 4"),
        (foreign, r"6_state\.json: is of another run"),
    ],
)
def test_a_set_that_is_not_whole_or_not_the_runs_is_named_and_passed_over(
    run: Workplace, damage: Callable[[Path], None], named: str
) -> None:
    damage(run.folder() / "models")
    run.run(*RUN)
    assert re.search(rf"checkpoint 6 cannot be used \(.*{named}.*\): looking for an older one", run.log())
    assert "resumed at step 4" in run.log()
    assert_same(run.saved(6, "whole"), run.saved(6))


def test_every_bit_of_a_state_counts(run: Workplace) -> None:
    models = run.folder() / "models"
    path, known = models / "6_state.json", read_run(models)
    assert read_state(models, 6, known)["files"].keys() == {
        path.name for path in models.glob("6_*") if path.suffix != ".json"
    }
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):  # a third of them, each bit of a byte among them
        flip(path, bit)
        with pytest.raises(DamagedError, match=r"6_state\.json"):
            read_state(models, 6, known)
        path.write_bytes(whole)


def test_a_damaged_run_json_is_named_and_the_run_goes_on(run: Workplace) -> None:
    flip(run.folder() / "run.json", 100)
    run.run(*RUN, "train.iterations=7")
    assert re.search(r"run\.json: passed over \(run\.json: ", run.log())
    assert "resumed at step 6" in run.log()
    assert read_run(run.folder() / "models").run == read_run(run.folder("whole") / "models").run


@pytest.mark.parametrize(
    ("pattern", "damage", "named"),
    [
        ("*_state.json", Path.unlink, r"no 6_state\.json"),
        ("*_state.json", lambda path: flip(path, 99), r"6_state\.json: "),
        ("*_D.pth", lambda path: flip(path, 999), rf"6_D\.pth: {WORDS}"),
        ("*_G.pth", Path.unlink, r"no 6_G\.pth"),
    ],
)
def test_where_no_set_is_whole_the_run_stops_and_touches_nothing(
    run: Workplace, pattern: str, damage: Callable[[Path], None], named: str
) -> None:
    for path in (run.folder() / "models").glob(pattern):
        damage(path)
    before = tree(run.folder())
    with pytest.raises(UserError, match=rf"holds checkpoints that this run cannot go on from \(.*{named}") as error:
        run.run(*RUN, "train.iterations=8")
    assert "\n" not in str(error.value)
    assert tree(run.folder()) == before


def test_a_first_save_that_was_cut_off_starts_anew_and_ends_equal(run: Workplace) -> None:
    models = run.folder("new") / "models"
    models.mkdir(parents=True)
    Checkpoints(models, None).begin(0)
    for name in ("2_G.pth", "2_E.pth", "2_D.pth", "2_optimizerG.pth", "2_optimizerD.pth"):  # but no 2_state.json
        shutil.copy(run.folder("other") / "models" / name, models / name)
    assert newest_generator(run.folder("new")) is None
    run.run(*RUN, "task=new")
    assert_same(run.saved(6, "whole"), run.saved(6, "new"))


def test_a_manifest_holds_size_and_hash_of_every_file_and_the_runs_name(run: Workplace) -> None:
    models = run.folder() / "models"
    state = json.loads((models / "4_state.json").read_text())
    assert state["files"] == {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in models.glob("4_*")
        if path.suffix != ".json"
    }
    assert (state["step"], state["seed"]) == (4, 1)
    assert state["run"] == json.loads((run.folder() / "run.json").read_text())["run"]
    assert state["run"] != json.loads((run.folder("other") / "run.json").read_text())["run"]


def test_resuming_opens_each_file_once(run: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    whole = Path.open

    def counted(self: Path, mode: str = "r", *args, **kwargs):
        if self.suffix == ".pth" and "r" in mode:
            opened.append(self.name)
        return whole(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    run.run(*RUN, "train.iterations=7")
    assert sorted(opened) == ["6_D.pth", "6_E.pth", "6_G.pth", "6_optimizerD.pth", "6_optimizerG.pth"]


def test_testing_takes_the_newest_weights_that_are_whole_with_a_word(run: Workplace, caplog) -> None:
    models = run.folder() / "models"
    assert newest_generator(run.folder()) == models / "6_E.pth"
    assert caplog.messages == []
    flip(models / "6_E.pth", 5000)
    assert newest_generator(run.folder()) == models / "4_E.pth"
    assert re.search(rf"6_E\.pth: {WORDS}: looking for an older one", caplog.messages[-1])
    (models / "4_state.json").unlink()
    assert newest_generator(run.folder(), "G") == models / "6_G.pth"
    assert newest_generator(models) == models / "2_E.pth"
    flip(models / "2_E.pth", 5000)
    with pytest.raises(UserError, match=r"no weights in it are whole \(.*6_E\.pth"):
        newest_generator(run.folder())


# -------------------------------------------------------------------------------------------------- which are kept


def kept(work: Workplace) -> list[int]:
    return sorted({int(path.name.split("_")[0]) for path in (work.folder() / "models").iterdir()})


def test_the_last_every_nth_and_the_best_by_a_metric_are_kept(work: Workplace, monkeypatch) -> None:
    psnr, ssim = iter([20.0, 30.0, 25.0, 24.0, 23.0, 22.0]), iter([0.1, 0.2, 0.8, 0.4, 0.7, 0.6])
    monkeypatch.setattr("training.loop.validate", lambda *a: {"psnr": next(psnr), "ssim": next(ssim)})
    each = ("train.checkpoint_save=1", "train.checkpoint_test=1", "train.checkpoint_keep=1")
    ours = ("train.checkpoint_keep_every=4", "train.checkpoint_keep_best=2", "train.checkpoint_best_by=ssim")
    work.run(*each, *ours, "train.iterations=5")
    assert kept(work) == [3, 4, 5]  # the best by SSIM and fourth; step 4; the second best, and last
    work.run(*each, *ours, "train.iterations=6")  # the scores are remembered over a restart
    assert kept(work) == [3, 4, 5, 6]
    work.run(*each, "train.iterations=7", "datasets.test=null")  # the best by SSIM is not the best by PSNR
    assert kept(work) == [7]


def test_half_a_set_does_not_push_out_a_whole_one(work: Workplace) -> None:
    each = ("train.checkpoint_save=2", "train.checkpoint_keep=2", "datasets.test=null")
    work.run(*each, "train.iterations=4")
    shutil.copy(work.folder() / "models" / "4_G.pth", work.folder() / "models" / "5_G.pth")  # killed in the midst of it
    work.run(*each, "train.iterations=6")
    assert {4, 6} <= set(kept(work))


def test_a_set_whose_card_was_moved_away_counts_as_whole(work: Workplace) -> None:
    each = ("train.checkpoint_save=2", "train.checkpoint_keep=2", "datasets.test=null")
    work.run(*each, "train.iterations=4")
    for card in (work.folder() / "models").glob("*.safetensors"):
        card.unlink()
    work.run(*each, "train.iterations=6")
    assert set(kept(work)) == {4, 6}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which file a descriptor is of")
def test_a_manifest_is_on_the_disk_before_older_sets_go(work: Workplace, monkeypatch) -> None:
    done: list[str] = []
    fsync, unlink = os.fsync, Path.unlink

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def unlinked(self: Path, **how: bool) -> None:
        done.append(f"remove {self.name}" if re.match(r"\d+_G\.pth", self.name) else "")
        unlink(self, **how)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    work.run("train.checkpoint_save=2", "train.checkpoint_keep=1", "datasets.test=null")
    manifest = next(i for i, name in enumerate(done) if name.startswith(".4_state.json"))
    assert manifest < len(done) - 1 - done[::-1].index("models") < done.index("remove 2_G.pth")


def test_what_is_kept_besides_means_nothing_where_all_are_kept(work: Workplace) -> None:
    ours = ("train.checkpoint_keep_every=4", "train.checkpoint_keep_best=2")
    assert set(parse(work.file(), overrides=ours).unused) >= {
        "train.checkpoint_keep_every",
        "train.checkpoint_keep_best",
    }
    unused = parse(work.file(), overrides=(*ours, "train.checkpoint_keep=1")).unused
    assert not [key for key in unused if "checkpoint" in key]


def test_none_of_the_best_need_be_kept(work: Workplace, monkeypatch) -> None:
    scores = iter([30.0, 20.0])
    monkeypatch.setattr("training.loop.validate", lambda *a: {"psnr": next(scores), "ssim": 0.5})
    each = ("train.checkpoint_save=1", "train.checkpoint_test=1", "train.checkpoint_keep=1")
    work.run(*each, "train.checkpoint_keep_best=0", "train.iterations=2")
    assert kept(work) == [2]


# ------------------------------------------------------------------------------------------------------- the lock


def ended() -> int:
    """The number of a process that has ended and been asked for its status."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def lock_of(path: Path, **changes: object) -> None:
    """A lock as a process of this system has left it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**lock_module._identity(), **changes}))


def test_a_folder_in_which_a_process_works_is_refused_in_one_line_and_untouched(work: Workplace) -> None:
    work.folder().mkdir(parents=True)
    with FolderLock(work.folder() / "run.lock") as lock:
        lock.take()
        before = tree(work.root / "runs")
        with pytest.raises(UserError) as error:
            work.run("train.iterations=2")
        assert re.search(rf"process {os.getpid()} on {re.escape(socket.gethostname())} works in", str(error.value))
        assert re.search(r"end it or choose another task.*or remove run\.lock$", str(error.value))
        assert "\n" not in str(error.value)
        assert tree(work.root / "runs") == before
    work.run("train.iterations=2")
    assert "done at step 2" in work.log()
    assert not (work.folder() / "run.lock").exists()


@pytest.mark.parametrize("fails", ["train.G_optimizer_lr=1e30", "datasets.train.dataroot_H=/nowhere"])
def test_the_lock_is_gone_after_a_run_that_ended_in_an_error(work: Workplace, fails: str) -> None:
    work.folder().mkdir(parents=True)
    with pytest.raises(UserError):
        work.run(fails)
    assert not list(work.folder().glob("*.lock*"))


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process says when it began")
def test_a_lock_of_a_dead_process_is_taken_over_with_a_word(tmp_path: Path, caplog) -> None:
    path = tmp_path / "run.lock"
    for changes, why in (({"pid": ended()}, "gone"), ({"started": "1"}, "that number is now another process's")):
        lock_of(path, **changes)
        with FolderLock(path) as lock:
            lock.take()
            assert f"taken over from process {changes.get('pid', os.getpid())} on" in caplog.messages[-1]
            assert why in caplog.messages[-1]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"pid": "x"}'])
def test_a_process_that_cannot_be_asked_for_is_dead_once_it_gives_no_sign_of_life(
    tmp_path: Path, text: str | None, caplog
) -> None:
    path = tmp_path / "run.lock"
    lock_of(path, host="elsewhere", system="elsewhere", pid=ended())
    if text is not None:
        path.write_text(text)
    with FolderLock(path) as lock:
        with pytest.raises(UserError, match=r"wait 3 minutes or remove run\.lock"):
            lock.take()
        past = time.time() - LIMIT - 60
        os.utime(path, (past, past))
        lock.take()
        assert "no sign of life for 4 minutes" in caplog.messages[-1]


def test_the_owner_gives_signs_of_life(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT", 0.01)
    with FolderLock(tmp_path / "run.lock") as lock:
        lock.take()
        os.utime(lock.path, (0, 0))
        end = time.monotonic() + 30
        while lock.path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_the_next_attempt_of_a_job_takes_over_from_the_last(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    path = tmp_path / "run.lock"
    for attempt, dead in (("2", False), ("3", True)):
        lock_of(path, host="elsewhere", system="elsewhere", job="77 ", attempt="000000002 000000000")
        monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
        with FolderLock(path) as lock:
            if dead:
                lock.take()
            else:
                with pytest.raises(UserError, match="works in this folder"):
                    lock.take()


def test_an_owner_that_was_taken_for_dead_writes_nothing_more(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run.lock") as lock:
        lock.take()
        lock.path.unlink()  # by hand
        lock.check()
        assert lock.path.exists()
        lock_of(lock.path, host="elsewhere", system="elsewhere")
        text = lock.path.read_text()
        with pytest.raises(UserError, match="took this one for dead"):
            lock.check()
    assert lock.path.read_text() == text


def _race(path: Path, barrier, won, end) -> None:
    with FolderLock(path) as lock:
        barrier.wait()
        try:
            lock.take()
            won.put(os.getpid())
        except UserError:
            won.put(0)
        end.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="processes start in the same moment by a fork")
@pytest.mark.parametrize("left", [False, True], ids=["no_lock", "of_a_dead_process"])
def test_of_processes_that_start_in_the_same_moment_one_wins(tmp_path: Path, left: bool) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(10):
        path = tmp_path / f"{number}.lock"
        if left:
            lock_of(path, pid=ended())
        barrier, won, end = context.Barrier(6), context.Queue(), context.Event()
        racers = [context.Process(target=_race, args=(path, barrier, won, end)) for _ in range(6)]
        for racer in racers:
            racer.start()
        results = [won.get(timeout=60) for _ in racers]
        end.set()
        for racer in racers:
            racer.join()
        assert sum(result > 0 for result in results) == 1, results
        assert not path.exists()


def test_of_two_trainings_that_begin_a_run_together_one_trains(work: Workplace) -> None:
    command = [sys.executable, "main_train_psnr.py", "--opt", work.file(), "datasets.test=null"]
    command += ["train.iterations=null", "train.checkpoint_save=100000"]
    repository = Path(__file__).parent.parent
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, cwd=repository, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    try:
        end = time.monotonic() + 100
        while not (loser := next((process for process in both if process.poll() is not None), None)):
            assert time.monotonic() < end
            time.sleep(0.1)
        _, err = loser.communicate()
        assert loser.returncode == 2
        assert re.fullmatch(r"error: .*(has just begun this run|works in this folder).*\n", err)
        assert len(list((work.folder() / "options").glob("*_facts.txt"))) == 1
    finally:
        for process in both:
            process.terminate()
            process.communicate()


# ----------------------------------------------------------------------------------------------------- left-over parts


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is not known who lives")
def test_parts_of_dead_processes_go_at_the_next_start_and_those_of_living_ones_stay(run: Workplace) -> None:
    models = run.folder() / "models"
    dead, alive = models / f".8_G.pth.{ended()}.part", models / f".8_E.pth.{os.getppid()}.part"
    others = [models / ".8_G.pth.x.part", models / "8_G.pth.1.part"]
    for path in (dead, alive, *others):
        path.write_bytes(b"half")
    run.run(*RUN, "train.iterations=7")
    assert not dead.exists()
    assert all(path.exists() for path in (alive, *others))
    assert f"removed {dead}" in run.log()
    remove_parts([models / "none"])
