"""Two processes on the CPU (gloo) train as one: one set of files, one log, the same steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.training import SSL, Workplace
from utils.utils_image import imsave


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
    assert names == {f"3_{n}.pth" for n in ("G", "E", "D", "optimizerG", "optimizerD")} | {"3_state.json"}
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
