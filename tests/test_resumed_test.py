"""A test that was interrupted goes on: main_test.py in a folder that holds restored images already."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import evaluation.run as room
from evaluation.restored import made_by
from main_test import main
from models.diffusion import ResShift
from models.restorer import Restorer
from models.sampler import DiffusionSampler
from tests.conftest import REPOSITORY, photograph
from tests.test_main_test import network, save_checkpoint, save_images
from training.lock import FolderLock
from utils.utils_error import UserError
from utils.utils_image import imread_uint, imsave
from utils.utils_png import encode_png
from utils.utils_tile import restore


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each L that a network restores; beside that, facts that are of no moment."""
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        room, "restore", lambda netG, L, *a: (shapes.append(tuple(L.shape[-2:])), restore(netG, L, *a))[1]
    )
    monkeypatch.setattr(room, "run_facts", lambda device: dict.fromkeys(("torch", "opencv", "numpy"), "1"))
    monkeypatch.setattr("evaluation.run.torch.get_num_threads", lambda: 3)
    return shapes


def fails_at(number: int, call: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """``call``, whose ``number``-th call raises instead."""
    calls = []

    def stub(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise error
        return call(*arguments)

    return stub


@pytest.mark.parametrize("n_channels", [3, 1])
def test_what_an_interrupted_test_leaves_is_to_the_byte_what_an_undisturbed_one_does(
    tmp_path, monkeypatch, restored, n_channels
) -> None:
    """Of images of 8 and 16 bits, transparent ones, and a model that makes NaN; interrupted while it computes, between
    an image's line and its file, before the line, in measuring; half a line and half an image lie about."""
    models = [
        str(save_checkpoint(tmp_path / f"{name}.pth", seed, n_channels=n_channels))
        for seed, name in enumerate(("a", "a_ssl"))
    ]
    weights = {key: value * torch.nan for key, value in network(n_channels=n_channels).state_dict().items()}
    torch.save(weights, tmp_path / "nan.pth")
    H = save_images(tmp_path / "H", {f"{i}.png": (84 + 4 * i, 96) for i in range(4)})
    image = photograph(40, 44, seed=9).astype(np.uint16) * 256 + 99
    (H / "deep.png").write_bytes(encode_png(np.dstack([image, image[..., 0]])))
    save_images(tmp_path / "L", {f"{i}.png": (9 + 4 * i, 13) for i in range(3)})
    command = ["--model_path", *models, str(tmp_path / "nan.pth"), "--gt", str(H), "-", "--input", "-"]
    command += [str(tmp_path / "L"), "--report_images", "4", "--output"]
    main([*command, str(tmp_path / "undisturbed")])
    in_all, out = len(restored), tmp_path / "out"
    assert in_all == 3 * (5 + 3)
    restored.clear()
    for module, name, number in (
        ("evaluation.run", "restore", 5),
        ("evaluation.restored", "write_file", 3),
        ("evaluation.restored", "_text", 4),
        ("evaluation.report", "gallery_item", 3),
    ):
        with monkeypatch.context() as patch:
            whole = getattr(sys.modules[module], name)
            patch.setattr(f"{module}.{name}", fails_at(number, whole, KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                main([*command, str(out)])
        with (out / "restored.jsonl").open("ab") as file:
            file.write(b'{"image": "a/H/0.png", "by": {"wei')
        (out / "a" / "H").mkdir(parents=True, exist_ok=True)
        (out / "a" / "H" / "1.png.12345.part").write_bytes(b"\x89PNG")
        (out / ".results.json.12345.part").write_text("{")
    before = len(restored)
    main([*command, str(out)])
    # The image whose page failed last was saved before, by three models.
    assert len(restored) - before <= in_all - 3
    assert tree(out) == tree(tmp_path / "undisturbed")


KILLED = """
import os, signal, sys
import evaluation.run as room
from main_test import main

restore, calls = room.restore, []

def killed(*arguments):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return restore(*arguments)

room.restore = killed
main(sys.argv[1:])
"""


def test_a_test_that_was_killed_goes_on_and_says_how_many_were_there(tmp_path, capsys, restored) -> None:
    model = save_checkpoint(tmp_path / "net.pth")
    L = save_images(tmp_path / "L", {f"{i}.png": (9, 13) for i in range(7)})
    command = ["--model_path", f"m={model}", "--input", str(L), "--report_images", "0", "--output"]
    arguments = [sys.executable, "-c", KILLED, *command, str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run(arguments, env=environment, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "test.lock").exists()
    main([*command, str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "taken over" in said
    there = 7 - len(restored)
    assert 3 <= there <= 4  # the fourth was being saved when the fifth was begun
    assert f"L: {there} of 7 restored images were there already" in said
    assert "L 1/7 0: 13x9 -> 52x36, was there\n" in said
    assert "L 7/7 6: 13x9 -> 52x36\n" in said
    main([*command, str(tmp_path / "undisturbed")])
    images = [
        {name: x for name, x in tree(tmp_path / name_).items() if name.endswith((".png", ".jsonl"))}
        for name_ in ("out", "undisturbed")
    ]
    assert len(images[0]) == 8
    assert images[0] == images[1]


def other_weights(place: Path) -> None:
    save_checkpoint(place / "net.pth", seed=1)


def same_weights_in_another_file(place: Path) -> None:
    torch.save({"params": network().state_dict(), "note": 1}, place / "net.pth")


def other_pixels(place: Path) -> None:
    imsave(photograph(10, 13, seed=8), str(place / "L" / "1.png"))


def same_pixels_in_another_file(place: Path) -> None:
    image = cv2.imread(str(place / "L" / "1.png"))
    (place / "L" / "1.png").unlink()
    cv2.imwrite(str(place / "L" / "1.bmp"), image)


def now_16_bits(place: Path) -> None:
    imsave(imread_uint(str(place / "L" / "1.png")).astype(np.uint16) * 257, str(place / "L" / "1.png"))


def removed(place: Path) -> None:
    (place / "out" / "m" / "L" / "1.png").unlink()


def cut_short(place: Path) -> None:
    path = place / "out" / "m" / "L" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])


def emptied(place: Path) -> None:
    (place / "out" / "m" / "L" / "1.png").write_bytes(b"")


def nothing(place: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "more", "again"),
    [
        (nothing, "", ""),
        (nothing, "--metrics psnr --report_images 1", ""),
        (nothing, "--overwrite", "012"),
        (nothing, "--tile 16 --tile_overlap 8", "012"),
        (nothing, "--tile_overlap 8", "012"),
        (nothing, "--precision bf16", "012"),
        (other_weights, "", "012"),
        (same_weights_in_another_file, "", ""),
        (other_pixels, "", "1"),
        (same_pixels_in_another_file, "", ""),
        (now_16_bits, "", "1"),
        (removed, "", "1"),
        (cut_short, "", "1"),
        (emptied, "", "1"),
    ],
)
def test_what_is_not_the_same_is_restored_again_and_nothing_else(tmp_path, restored, change, more, again) -> None:
    save_checkpoint(tmp_path / "net.pth")
    L = save_images(tmp_path / "L", {f"{i}.png": (9 + i, 13) for i in range(3)})
    command = ["--model_path", f"m={tmp_path / 'net.pth'}", "--input", str(L), "--report_images", "0", "--output"]
    main([*command, str(tmp_path / "out")])
    change(tmp_path)
    restored.clear()
    main([*command, str(tmp_path / "out"), *more.split()])
    assert sorted(restored) == [(9 + int(i), 13) for i in again]
    main([*command, str(tmp_path / "anew"), *more.split()])
    anew, out = (tree(tmp_path / name) for name in ("anew", "out"))
    assert {name: x for name, x in out.items() if name.endswith("png")} == {
        name: x for name, x in anew.items() if name.endswith("png")
    }
    restored.clear()
    main([*command, str(tmp_path / "out"), *more.replace("--overwrite", "").split()])
    assert not restored


def test_another_program_or_device_restores_all_again(tmp_path, monkeypatch, restored) -> None:
    model = save_checkpoint(tmp_path / "net.pth")
    L = save_images(tmp_path / "L", {"0.png": (9, 13)})
    command = ["--model_path", str(model), "--input", str(L), "--report_images", "0", "--output", str(tmp_path / "out")]
    main(command)
    monkeypatch.setattr("evaluation.restored._program", lambda: "another")
    main(command)
    monkeypatch.setattr(torch, "__version__", "0.0")
    main(command)
    assert len(restored) == 3


def test_seed_and_steps_of_sampling_its_colours_and_the_autoencoder_are_part_of_what_makes_an_image() -> None:
    class Space(nn.Conv2d):
        factor, channels = 1, 3

    class Nothing(nn.Conv2d):
        channels, size_multiple, L_ratio = 3, 1, None

    def made(
        steps: int | None = None, seed: int = 0, weight: float = 0, color_fix: str = "none", **settings: Any
    ) -> Any:
        netG, autoencoder = Nothing(3, 3, 1), Space(3, 3, 1)
        for value in (*netG.parameters(), *autoencoder.parameters()):
            value.data.fill_(0)
        autoencoder.bias.data.fill_(weight)
        autoencoder.register_buffer("strided", torch.arange(6.0)[::2])
        sampler = DiffusionSampler(netG, ResShift(4, 0.2), autoencoder, 4, steps, seed, color_fix)
        options = {"diffusion": {"color_fix": color_fix}}
        return made_by(Restorer("m", Path("x.pth"), sampler, 4, 3, options), torch.device("cpu"), **settings)

    kinds = [
        made(),
        made(steps=2),
        made(seed=1),
        made(weight=1),
        made(color_fix="adain"),
        made(tile=64),
    ]
    assert made() == kinds[0]
    assert all(kind not in kinds[:i] for i, kind in enumerate(kinds))


def test_a_further_model_does_not_restore_the_others_again(tmp_path, restored) -> None:
    models = [f"{name}={save_checkpoint(tmp_path / f'{name}.pth', seed)}" for seed, name in enumerate("abc")]
    H = save_images(tmp_path / "H", {"0.png": (40, 44)})
    more = ["--gt", str(H), "--metrics", "psnr", "--output"]
    main(["--model_path", *models[1:], *more, str(tmp_path / "out")])
    restored.clear()
    main(["--model_path", *models, *more, str(tmp_path / "out")])
    assert len(restored) == 1
    main(["--model_path", *models, *more, str(tmp_path / "anew")])
    csvs = [(tmp_path / name / "results.csv").read_bytes() for name in ("out", "anew")]
    assert csvs[0] == csvs[1]


@pytest.mark.parametrize("kind", ["edited", "of before", "no image", "of another folder"])
def test_what_somebody_else_has_put_there_is_named_and_replaced_only_on_demand(tmp_path, restored, kind) -> None:
    model = save_checkpoint(tmp_path / "net.pth")
    L = save_images(tmp_path / "L", {f"{i}.png": (9, 13) for i in range(3)})
    out = tmp_path / "out"
    command = ["--model_path", f"m={model}", "--input", str(L), "--report_images", "0", "--output", str(out)]
    main(command)
    whole, path = tree(out), out / "m" / "L" / "1.png"
    if kind == "edited":
        imsave(255 - imread_uint(str(path)), str(path))
    elif kind == "of before":
        (out / "restored.jsonl").unlink()
    elif kind == "no image":
        path.write_text("notes on this image")
    else:
        path.write_bytes((out / "m" / "L" / "0.png").read_bytes() + b" ")
    restored.clear()
    before = tree(out)
    name, others = ("0", r" \(nor are 2 others\)") if kind == "of before" else ("1", "")
    with pytest.raises(
        UserError, match=rf"{name}\.png is not as this program wrote it, .*{others}: .*--overwrite$"
    ) as said:
        main(command)
    assert "\n" not in str(said.value)
    assert tree(out) == before
    assert not restored
    main([*command, "--overwrite"])
    assert len(restored) == 3
    images = {name for name in whole if name.endswith((".png", ".jsonl"))}
    assert {name: x for name, x in tree(out).items() if name in images} == {name: whole[name] for name in images}


def test_a_folder_in_which_another_test_is_at_work_is_left_to_it(tmp_path) -> None:
    model = save_checkpoint(tmp_path / "net.pth")
    L = save_images(tmp_path / "L", {"0.png": (9, 13)})
    out = tmp_path / "out"
    out.mkdir()
    command = ["--model_path", str(model), "--input", str(L), "--output", str(out)]
    with FolderLock(out / "test.lock") as lock:
        lock.take()
        before = tree(out)
        with pytest.raises(
            UserError, match=r"works in this folder .*choose another folder for the results; .*test\.lock$"
        ):
            main(command)
        assert tree(out) == before
    main(command)
    assert (out / "net" / "L" / "0.png").exists()
    assert not (out / "test.lock").exists()
