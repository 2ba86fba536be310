"""The command line of main_test.py, on generated images and tiny networks."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.report import Report
from main_test import main
from models.select_network import define_G
from tests.conftest import REPOSITORY, photograph
from utils.utils_error import UserError
from utils.utils_image import (
    calculate_psnr,
    imread_uint,
    imresize,
    imresize_np,
    imsave,
    modcrop,
    single2uint,
    uint2single,
)
from utils.utils_tile import restore

COMPACT = {"net_type": "srvgg_compact", "nf": 8, "nc": 2}  # sees 4 pixels around each


def options(scale: int = 4, n_channels: int = 3, netG: dict | None = None) -> dict:
    return {"scale": scale, "n_channels": n_channels, "netG": netG or COMPACT}


def network(seed: int = 0, **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    return define_G(options(**kwargs))


def save_checkpoint(path: Path, seed: int = 0, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network(seed, **kwargs).state_dict(), path)
    return path


def save_run(folder: Path, names: tuple[str, ...] = ("8_G", "8_E", "10_G", "10_E"), **kwargs) -> Path:
    """A run's folder as training leaves it; every checkpoint has weights of its own."""
    for seed, name in enumerate(names):
        save_checkpoint(folder / "models" / f"{name}.pth", seed, **kwargs)
    (folder / "options").mkdir()
    (folder / "options" / "20260101_000000.json").write_text("{}")
    (folder / "options" / "20260102_000000.json").write_text(json.dumps({"task": folder.name, **options(**kwargs)}))
    return folder


def save_images(folder: Path, sizes: dict[str, tuple[int, int]], channels: int = 3) -> Path:
    for seed, (name, size) in enumerate(sizes.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        imsave(photograph(*size, seed=seed, channels=channels), str(folder / name))
    return folder


def results(folder: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): imread_uint(str(path)) for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize(
    ("sets", "more", "computed"),
    [
        (["--input", "L"], ["--report_images", "0"], 0),
        (["--input", "L"], ["--report_images", "1"], 1),
        (["--gt", "H"], ["--report_images", "0", "--metrics", "psnr"], 2),
    ],
)
def test_bicubic_is_computed_only_where_somebody_sees_it(tmp_path, monkeypatch, sets, more, computed):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    for folder in "LH":
        save_images(tmp_path / folder, {"a.png": (16, 20), "b.png": (16, 20)})
    calls = []
    monkeypatch.setattr("evaluation.run.imresize", lambda L, scale: calls.append(L) or imresize(L, scale))
    main(["--model_path", "run", *sets, "--output", "out", *more])
    assert len(calls) == computed


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_too_little_memory_is_one_line_whose_remedy_fits_the_tiles_of_now(tmp_path, monkeypatch, error):
    save_run(tmp_path / "run")
    save_images(tmp_path / "L", {"a.png": (40, 40)})
    option_file(tmp_path, datasets={"test": {"dataset_type": "l", "dataroot_L": str(tmp_path / "L")}})
    monkeypatch.chdir(tmp_path)

    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("evaluation.run.restore", fails)
    model, options = ["--model_path", "run", "--input", "L"], ["--opt", "test_x.json"]
    for command, words in {
        (*model,): r"a\.png: .*whole images; restore them in tiles, --tile 256$",
        (*model, "--tile", "64"): "tiles of 64; give smaller ones, --tile 32$",
        (*model, "--tile", "auto"): "even for small tiles; give --tile 32 and a smaller tile_overlap$",
        (*options,): r"in tiles, test\.tile=256$",
        (*options, "test.tile=100"): r"smaller ones, test\.tile=50$",
    }.items():
        with pytest.raises(UserError, match=words):
            main([*command])
    monkeypatch.setattr("evaluation.report.Report.examine", fails)
    monkeypatch.setattr("evaluation.run.restore", restore)
    for command, words in {
        (*model, "--tile", "64"): "fewer metrics, or cut",
        (*options,): r"test\.tile=256, or cut",
    }.items():
        with pytest.raises(UserError, match=words):
            main([*command])


class InTurn:
    """Stands in for evaluation.threads.Threads: every call when its result is asked for."""

    def __init__(self, *_arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def in_order(self, calls):
        return (call() for call in calls)


def test_files_and_tables_are_those_of_a_run_without_threads(tmp_path, monkeypatch, capsys):
    for name in ("psnr", "gan_ssl"):
        save_run(tmp_path / name, names=(f"{len(name)}_E",))
    torch.save({key: value * torch.nan for key, value in network().state_dict().items()}, tmp_path / "nan.pth")
    # Some take long, some do not: with threads the later ones are finished first.
    save_images(tmp_path / "Set8", {f"{i}.png": (150, 170) if i % 3 == 0 else (24, 28) for i in range(8)})
    save_images(tmp_path / "L", {f"{i}.png": (9 + 4 * i, 16) for i in range(5)})
    models = [str(tmp_path / name) for name in ("psnr", "gan_ssl", "nan.pth")]
    command = ["--model_path", *models, "--gt", str(tmp_path / "Set8"), "-", "--input", "-", str(tmp_path / "L")]
    monkeypatch.setattr("evaluation.run.run_facts", lambda device: dict.fromkeys(("torch", "opencv", "numpy"), "1"))

    def outcome(folder: str) -> tuple[dict[str, bytes], list[str]]:
        main([*command, "--output", str(tmp_path / folder)])
        files = [path for path in sorted((tmp_path / folder).rglob("*")) if path.is_file()]
        said = capsys.readouterr().out.replace(str(tmp_path / folder), "").split("\n")
        said = [line for line in said if not line.startswith("self-similarity")]  # once a process
        return {path.relative_to(tmp_path / folder).as_posix(): path.read_bytes() for path in files}, said

    monkeypatch.setattr("evaluation.run.torch.get_num_threads", lambda: 3)
    with_threads = outcome("threads")
    monkeypatch.setattr("evaluation.run.Threads", InTurn)
    assert len(with_threads[0]) == 3 * (8 + 5) + 6
    assert with_threads == outcome("in_turn")


def test_the_first_error_in_the_order_of_the_images_ends_the_run(tmp_path, monkeypatch):
    save_run(tmp_path / "run")
    save_images(tmp_path / "H", {f"{name}.png": (24, 28) for name in "abcdefgh"})
    known = Report.examine

    def examine(report, set_name, index, name, *images):
        if name in "cdf":
            raise UserError(f"{name} cannot be measured")
        return known(report, set_name, index, name, *images)

    monkeypatch.setattr(Report, "examine", examine)
    monkeypatch.setattr("evaluation.run.torch.get_num_threads", lambda: 3)
    with pytest.raises(UserError, match=r"^c cannot be measured$"):
        main(["--model_path", str(tmp_path / "run"), "--gt", str(tmp_path / "H"), "--output", str(tmp_path / "out")])
    restored = {name.removeprefix("run/H/") for name in results(tmp_path / "out")}
    # Of those behind it only what was in work by then.
    assert {"a.png", "b.png", "c.png"} <= restored <= {f"{name}.png" for name in "abcdefg"}


def test_where_the_network_fails_the_images_before_are_finished(tmp_path, monkeypatch):
    save_run(tmp_path / "run")
    save_images(tmp_path / "L", {f"{i}.png": (9, 13) for i in range(6)})
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise MemoryError
        return restore(*arguments)

    monkeypatch.setattr("evaluation.run.restore", fails)
    monkeypatch.setattr("evaluation.run.torch.get_num_threads", lambda: 3)
    with pytest.raises(UserError, match=r"4\.png: the memory is too small"):
        main(["--model_path", str(tmp_path / "run"), "--input", str(tmp_path / "L"), "--output", str(tmp_path / "out")])
    assert [*results(tmp_path / "out")] == [f"run/L/{i}.png" for i in range(4)]


def test_ctrl_c_ends_the_run_with_one_word(tmp_path):
    save_run(tmp_path / "run")
    H = save_images(tmp_path / "H", {f"{i:03}.png": (160, 160) for i in range(200)})
    command = [sys.executable, str(REPOSITORY / "main_test.py"), "--model_path", str(tmp_path / "run"), "--gt", str(H)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            assert any("H 2/200" in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "interrupted\n")
    assert "200/200" not in out


def test_an_image_equal_to_the_truth_is_left_out_of_the_mean_and_counted(tmp_path, capsys):
    save_run(tmp_path / "run")
    H = save_images(tmp_path / "H", {"a.png": (64, 64)})
    imsave(np.zeros((64, 64, 3), np.uint8), str(H / "black.png"))
    main(
        ["--model_path", str(tmp_path / "run"), "--gt", str(H), "--output", str(tmp_path / "out"), "--metrics", "psnr"]
    )
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = {(row["image"], row["model"]): float(row["psnr"]) for row in csv.DictReader(file)}
    assert rows["black", "bicubic"] == float("inf")
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    means = content["sets"]["H"]["means"]
    assert means["bicubic"]["psnr"] == pytest.approx(rows["a", "bicubic"])
    assert content["sets"]["H"]["infinite"]["bicubic"] == {"psnr": ["black"]}
    words = "H, bicubic: 1 image equal to the ground truth (infinite PSNR), left out of the mean."
    for text in (
        " ".join(capsys.readouterr().out.split()),
        content["note"],
        *((tmp_path / "out" / name).read_text() for name in ("results.md", "report.html")),
    ):
        assert words in text


def test_an_estimate_of_nan_has_no_numbers_and_is_named(tmp_path, capsys):
    save_run(tmp_path / "run")
    weights = network().state_dict()
    torch.save({key: torch.full_like(value, torch.nan) for key, value in weights.items()}, tmp_path / "nan.pth")
    H = save_images(tmp_path / "H", {"a.png": (64, 64)})
    models = [str(tmp_path / "run"), str(tmp_path / "nan.pth")]
    main(["--model_path", *models, "--gt", str(H), "--output", str(tmp_path / "out")])
    means = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["H"]["means"]
    assert set(means["nan"].values()) == {None}
    assert None not in means["run"].values()
    assert "a: what nan makes of it is not finite" in "".join(capsys.readouterr())
    # Nor where nobody looks at it.
    main(["--model_path", models[1], "--input", str(H), "--report_images", "0", "--output", str(tmp_path / "L")])
    assert "a: what nan makes of it is not finite" in "".join(capsys.readouterr())


def test_two_runs_are_compared_with_bicubic_on_any_sizes(tmp_path):
    for seed, name in enumerate(("psnr", "gan_ssl")):
        save_run(tmp_path / name, names=("10_E", f"{10 + seed}_G"))
    H = save_images(tmp_path / "Set2", {"a.png": (61, 83), "deep/er/b.bmp": (50, 45)})
    arguments = ["--model_path", tmp_path / "psnr", f"ssl={tmp_path / 'gan_ssl' / 'models'}", "--gt", H]
    command = [sys.executable, str(REPOSITORY / "main_test.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    table = [line.split() for line in done.stdout.split("\n")]
    start = table.index(["model", "PSNR", "SSIM", "PSNR-Y", "SSIM-Y", "SSG"])
    assert [line[0] for line in table[start + 2 : start + 5]] == ["bicubic", "psnr", "ssl"]
    assert "border of 4 px" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout[done.stdout.index("model ") :].split("\n")[:5])) <= 80

    out = tmp_path / "results"
    content = json.loads((out / "results.json").read_text())
    assert content["facts"]["torch"] == torch.__version__
    assert content["models"]["psnr"].endswith("10_E.pth")
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["model"]) for row in rows] == [
        (image, model) for image in ("a", "deep/er/b") for model in ("bicubic", "psnr", "ssl")
    ]
    assert list(rows[0])[3:] == ["psnr", "ssim", "psnr_y", "ssim_y", "ssg"]
    mean = sum(float(row["psnr"]) for row in rows if row["model"] == "psnr") / 2
    assert content["sets"]["Set2"]["means"]["psnr"]["psnr"] == pytest.approx(mean)
    assert table[start + 3][1] == f"{mean:.2f}"

    saved = results(out)
    assert saved["psnr/Set2/a.png"].shape == (60, 80, 3)
    assert saved["ssl/Set2/deep/er/b.png"].shape == (48, 44, 3)
    truth = modcrop(imread_uint(str(H / "a.png")), 4)
    assert float(rows[1]["psnr"]) == pytest.approx(calculate_psnr(saved["psnr/Set2/a.png"], truth, 4))
    bicubic = single2uint(imresize_np(imresize_np(uint2single(truth), 0.25), 4))
    # A value on the edge between two of the 256 levels may fall to the other side: float32 sums in another order.
    assert float(rows[0]["psnr"]) == pytest.approx(calculate_psnr(bicubic, truth, 4), abs=0.01)
    assert str(out / "side_by_side.png") in done.stdout.replace("results/", f"{out}/")
    assert saved["side_by_side.png"].shape[1] > 5 * 256


@pytest.mark.parametrize(
    ("names", "taken", "why"),
    [
        (("9_E", "9_G", "10_E", "10_G", "100_optimizerG"), "10_E.pth", "the average E"),
        (("9_G", "20_G", "100_D"), "20_G.pth", "no average E is there"),
        (("20_E", "20_G", "400_G"), "400_G.pth", "the newest average 20_E.pth is 380 steps older than G"),
        (("20_G", "100_E"), "100_E.pth", "the average E"),
    ],
)
def test_the_newest_weights_of_a_run_are_taken_and_named(tmp_path, capsys, names, taken, why):
    run = save_run(tmp_path / "run", names=names)
    L = save_images(tmp_path / "L", {"a.png": (9, 13)})
    main(["--model_path", str(run), "--input", str(L), "--output", str(tmp_path / "out")])
    assert f"is {taken} ({why})" in capsys.readouterr().out
    main(["--model_path", f"run={run / 'models' / taken}", "--input", str(L), "--output", str(tmp_path / "other")])
    assert np.array_equal(*(results(tmp_path / name)["run/L/a.png"] for name in ("out", "other")))


def test_all_steps_are_the_averages_of_a_run_in_their_order(tmp_path):
    run = save_run(tmp_path / "run")
    images = save_images(tmp_path / "gt", {"a.png": (40, 48)})
    main(["--model_path", str(run), "--all_steps", "--gt", str(images), "--metrics", "psnr"])
    content = json.loads((run / "results" / "results.json").read_text())
    assert content["steps"] == {f"run_{step}": {"run": "run", "step": step} for step in (8, 10)}
    assert [*content["models"]] == ["run_8", "run_10"]
    assert content["models"]["run_8"].endswith("8_E.pth")
    assert {path.name for path in (run / "results").glob("run_*")} == {"run_8", "run_10"}
    with pytest.raises(UserError, match=r"--all_steps: .*gt is no run's folder with checkpoints"):
        main(["--model_path", str(images), "--all_steps", "--gt", str(images)])


def test_all_steps_of_a_run_whose_average_has_ended_are_those_of_its_generator(tmp_path, capsys):
    run = save_run(tmp_path / "run", names=("8_E", "8_G", "10_G"))
    images = save_images(tmp_path / "gt", {"a.png": (40, 48)})
    main(["--model_path", str(run), "--all_steps", "--gt", str(images), "--metrics", "psnr"])
    models = json.loads((run / "results" / "results.json").read_text())["models"]
    assert [Path(models[f"run_{step}"]).name for step in (8, 10)] == ["8_E.pth", "10_G.pth"]
    assert "of steps 10 there is no average E, G is tested" in capsys.readouterr().out


def test_of_an_animation_the_first_image_is_restored_and_that_is_said(tmp_path, capsys):
    frames = [Image.fromarray(photograph(12, 12, seed=seed)) for seed in range(2)]
    (tmp_path / "L").mkdir()
    frames[0].save(tmp_path / "L" / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    main(["--model_path", str(save_run(tmp_path / "run")), "--input", str(tmp_path / "L")])
    told = capsys.readouterr()
    assert "a.webp, ...) animated or of several pages, of which the first is used" in told.out + told.err


def test_without_ground_truth_images_are_only_restored_beside_the_run(tmp_path):
    run = save_run(tmp_path / "run")
    L = save_images(tmp_path / "photos", {"x/one.jpg": (1, 1), "two.webp": (7, 30), "x/three.tif": (16, 16)})
    command = ["--model_path", str(run), "--input", str(L)]
    for more in ([], ["--overwrite"]):  # its own results are replaced
        main(command + more)
        shapes = {name: image.shape[:2] for name, image in results(run / "results").items()}
        prefix = "run/photos"
        assert shapes == {
            f"{prefix}/two.png": (28, 120),
            f"{prefix}/x/one.png": (4, 4),
            f"{prefix}/x/three.png": (64, 64),
        }
        files = sorted(path.name for path in (run / "results").iterdir() if path.is_file())
        assert files == ["report.html", "restored.jsonl", "results.json"]


def test_several_sets_are_given_in_order_with_and_without_ground_truth(tmp_path, capsys):
    run = save_run(tmp_path / "run")
    for name in ("Set2", "other/Set2", "more/HR"):
        save_images(tmp_path / name, {"a.png": (40, 44), "b.png": (40, 41)})
    save_images(tmp_path / "real", {"c.png": (9, 13)})
    sets = ["--gt", tmp_path / "Set2", tmp_path / "other" / "Set2", "-", "--input", "-", "-", tmp_path / "real"]
    out = tmp_path / "out"
    arguments = ["--model_path", run, *sets, "--output", out, "--metrics", "psnr", "ssg", "--report_images", "3"]
    main([*map(str, arguments)])
    content = json.loads((out / "results.json").read_text())
    assert [*content["sets"]] == ["Set2", "other_Set2"]
    assert [*content["sets"]["Set2"]["means"]["run"]] == ["psnr", "ssg"]
    assert {name for name in results(out) if name.startswith("run/")} == {
        *(f"run/{data}/{image}.png" for data in ("Set2", "other_Set2") for image in "ab"),
        "run/real/c.png",
    }
    assert "## other_Set2, 2 images" in (out / "results.md").read_text()
    page = (out / "report.html").read_text()
    assert [page.count(f'"set":"{name}"') > 0 for name in ("Set2", "other_Set2", "real")] == [True] * 3
    assert "report.html" in capsys.readouterr().out


def test_several_files_are_one_set_called_as_their_folder(tmp_path):
    run = save_run(tmp_path / "run", names=("1_E",))
    H = save_images(tmp_path / "Set4", {f"{name}.png": (24, 28) for name in "abcd"})
    save_images(tmp_path / "real", {"x.png": (9, 9), "y.png": (9, 9)})
    save_images(tmp_path / "L", {f"{name}.png": (6, 7) for name in "abcd"})

    def files(folder):
        return [str(path) for path in sorted((tmp_path / folder).iterdir())]

    def sets(*arguments):
        main(["--model_path", str(run), *arguments, "--output", str(tmp_path / "out"), "--metrics", "psnr"])
        found = {name.removeprefix("run/") for name in results(tmp_path / "out") if name.startswith("run/")}
        shutil.rmtree(tmp_path / "out")
        return found

    assert sets("--input", *files("Set4")) == {f"Set4/{name}.png" for name in "abcd"}
    assert sets("--gt", *files("Set4")[:2]) == {"Set4/a.png", "Set4/b.png"}
    assert sets("--gt", *files("Set4"), "--input", *files("L")) == {f"L/{name}.png" for name in "abcd"}
    assert sets("--gt", *files("Set4"), "--input", str(tmp_path / "L")) == {f"L/{name}.png" for name in "abcd"}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(H / "b.png")
    assert sets("--gt", *files("linked")) == {"linked/a.png"}
    several = sets("--gt", str(H), "-", "--input", "-", *files("real"))
    assert several == {*(f"Set4/{name}.png" for name in "abcd"), "real/x.png", "real/y.png"}
    assert sets("--input", *files("real"), files("L")[0], str(H)) == several | {"L/a.png"}
    again = sets("--input", files("L")[0], str(tmp_path / "L"), files("L")[1])
    parent = f"{tmp_path.name}_L"
    assert again == {"L/a.png", *(f"{parent}/{name}.png" for name in "abcd"), "L_2/b.png"}


@pytest.mark.parametrize("name", ["..", "../../gt", "/gt", "C:\\gt", "CON", "a\x1b"])
def test_no_name_of_a_set_leads_out_of_the_output_folder(tmp_path, name):
    save_run(tmp_path / "run", names=("1_E",))
    save_images(tmp_path / "H", {"a.png": (24, 24)})
    gt = save_images(tmp_path / "gt", {"a.png": (24, 24)})
    before = (gt / "a.png").read_bytes()
    data = {"dataset_type": "sr", "dataroot_H": str(tmp_path / "H"), "name": name}
    main(["--opt", str(option_file(tmp_path, datasets={"test": data})), f"test.output={tmp_path / 'out'}"])
    assert (gt / "a.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["H", "gt", "out", "run", "test_x.json"]
    assert len([*(tmp_path / "out/run").glob("*/a.png")]) == 1


def test_a_damaged_image_is_named_and_the_others_are_restored(tmp_path, capsys):
    run = save_run(tmp_path / "run")
    L = save_images(tmp_path / "L", {"a.png": (9, 13), "c.png": (9, 13)})
    (L / "b.png").write_bytes(b"no image")
    main(["--model_path", str(run), "--input", str(L)])
    assert [*results(run / "results")] == ["run/L/a.png", "run/L/c.png"]
    assert str(L / "b.png") in capsys.readouterr().out


def test_a_bare_checkpoint_is_recognised_and_one_image_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rrdbnet = {"net_type": "rrdbnet", "nf": 8, "nb": 1, "gc": 4}
    checkpoint = tmp_path / "bsrgan_x2.pth"
    torch.save({"params_ema": network(scale=2, netG=rrdbnet).state_dict()}, checkpoint)
    L = save_images(tmp_path / "L", {"a.png": (9, 13)}) / "a.png"
    with pytest.raises(UserError, match=r"bsrgan_x2\.pth: .*--scale"):
        main(["--model_path", str(checkpoint), "--input", str(L)])
    assert not Path("results").exists()
    main(["--model_path", str(checkpoint), "--input", str(L), "--scale", "2"])
    assert {name: i.shape for name, i in results(Path("results")).items()} == {"bsrgan_x2/L/a.png": (18, 26, 3)}


def test_tiles_give_the_whole_image(tmp_path):
    run = save_run(tmp_path / "run")
    L = save_images(tmp_path / "L", {"a.png": (45, 38)})
    for name, more in (("whole", []), ("tiled", ["--tile", "20", "--tile_overlap", "8"]), ("auto", ["--tile", "auto"])):
        main(["--model_path", str(run), "--input", str(L), "--output", str(tmp_path / name), *more])
    whole, tiled = (results(tmp_path / name)["run/L/a.png"].astype(int) for name in ("whole", "tiled"))
    # A float32 value between two levels may round to either.
    assert np.abs(whole - tiled).max() <= 1


def test_pairs_are_found_by_name_and_gray_networks_read_colour(tmp_path):
    run = save_run(tmp_path / "gray", n_channels=1, scale=2)
    H = save_images(tmp_path / "H", {"a.png": (41, 52), "b.png": (30, 30)})
    L = tmp_path / "L"
    L.mkdir()
    for name in ("a", "b"):
        small = imresize_np(uint2single(modcrop(imread_uint(str(H / f"{name}.png")), 2)), 0.5)
        imsave(single2uint(small), str(L / f"{name}x2.png"))
    output = tmp_path / "out"
    main(["--model_path", str(run), "--input", str(L), "--gt", str(H), "--output", str(output)])
    rows = json.loads((output / "results.json").read_text())["images"]
    assert [(row["image"], row["model"]) for row in rows][:2] == [("ax2", "bicubic"), ("ax2", "gray")]
    assert rows[0]["psnr"] == rows[0]["psnr_y"] > 15
    assert cv2.imread(str(output / "gray" / "L" / "ax2.png"), cv2.IMREAD_UNCHANGED).shape == (40, 52)


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    run = save_run(tmp_path / "run")
    (tmp_path / "L").mkdir()
    imsave(photograph(8, 9).astype(np.uint16) * 257, str(tmp_path / "L" / "deep.png"))
    imsave(photograph(8, 9), str(tmp_path / "L" / "flat.png"))
    main(["--model_path", str(run), "--input", str(tmp_path / "L")])
    deep, flat = (imread_uint(str(run / "results" / "run" / "L" / f"{name}.png")) for name in ("deep", "flat"))
    assert (deep.dtype, flat.dtype) == (np.uint16, np.uint8)
    # Two roundings to 8 bits, half a level each.
    assert np.abs(deep / 257 - flat).max() <= 1


def option_file(tmp_path: Path, **changes) -> Path:
    content = {
        "task": "run",
        **options(),
        "path": {"root": str(tmp_path)},
        "datasets": {
            "test_measured": {"dataset_type": "sr", "dataroot_H": str(tmp_path / "H")},
            "test_real": {"dataset_type": "l", "dataroot_L": str(tmp_path / "L"), "name": "real"},
        },
        **changes,
    }
    path = tmp_path / "test_x.json"
    path.write_text(f"// made by a test\n{json.dumps(content)}")
    return path


def test_an_option_file_tests_its_own_run_on_all_its_sets(tmp_path):
    save_run(tmp_path / "run")
    save_images(tmp_path / "H", {"a.png": (40, 44)})
    save_images(tmp_path / "L", {"b.png": (3, 5)})
    main(["--opt", str(option_file(tmp_path)), "test.tile=16", "test.tile_overlap=8"])
    out = tmp_path / "run" / "results"
    assert [*results(out)] == ["run/real/b.png", "run/test_measured/a.png", "side_by_side.png"]
    assert (out / "report.html").exists()
    content = json.loads((out / "results.json").read_text())
    assert [*content["sets"]] == ["test_measured"]
    assert content["tile"] == 16
    other = save_checkpoint(tmp_path / "other.pth", seed=7)
    main(["--opt", str(option_file(tmp_path)), f"path.pretrained_netG={other}", f"test.output={tmp_path / 'o'}"])
    assert not np.array_equal(results(tmp_path / "o")["run/real/b.png"], results(out)["run/real/b.png"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs, checkpoints and images to make mistakes with."""
    root = tmp_path_factory.mktemp("place")
    save_run(root / "run")
    save_run(root / "double", scale=2)
    save_images(root / "H", {"a.png": (40, 40)})
    save_images(root / "L", {"a.png": (10, 10)})
    save_images(root / "other", {"unpaired.png": (10, 10)})
    save_images(root / "twins", {"a.png": (10, 10), "a.jpg": (10, 10)})
    (root / "empty").mkdir()
    (root / "broken").mkdir()
    (root / "broken" / "z.png").write_bytes(b"no image")
    (root / "note.txt").write_text("no checkpoint")
    optimizer = torch.optim.Adam(network().parameters())
    torch.save(optimizer.state_dict(), root / "run" / "models" / "10_optimizerG.pth")
    save_checkpoint(root / "run" / "models" / "10_D.pth", netG={"net_type": "msrresnet1", "nc": 8, "nb": 1})
    torch.save({"layers.0.attn.qkv.weight": torch.zeros(3, 3)}, root / "unknown.pth")
    option_file(root)
    return root


MISTAKES = {
    "nothing given": ("", "--opt FILE or --model_path"),
    "both ways at once": ("--opt test_x.json --model_path run --input L", "either"),
    "unknown argument": ("--model_path run --input L --tiles 9", "--tiles"),
    "scale is no number": ("--model_path run --input L --scale four", "--scale"),
    "no images named": ("--model_path run", "--input"),
    "option beside a model": ("test.tile=9 --model_path run --input L", "--opt only"),
    "argument beside options": ("--opt test_x.json --tile 9", "test.tile"),
    "missing option file": ("--opt test_y.json", r"test_x\.json"),
    "unknown option": ("--opt test_x.json test.tiel=9", "'tile'"),
    "missing model": ("--model_path nowhere --input L", "nowhere"),
    "folder without a model": ("--model_path empty --input L", r"_E\.pth"),
    "optimizer file": ("--model_path run/models/10_optimizerG.pth --input L", "optimizer"),
    "discriminator file": ("--model_path run/models/10_D.pth --input L", "does not fit"),
    "text file": ("--model_path note.txt --input L", r"note\.txt"),
    "unknown network": ("--model_path unknown.pth --input L", r"layers\.0\.attn\.qkv\.weight.*--opt"),
    "wrong key": ("--model_path run --input L --param_key ema", "'ema'"),
    "wrong scale": ("--model_path run --input L --scale 2", "scale 4"),
    "wrong scale of a file": ("--model_path run/models/10_E.pth --input L --scale 3", "scale 4"),
    "two scales": ("--model_path run double --gt H", "differs from run"),
    "one name twice": ("--model_path run run --gt H", "NAME=PATH"),
    "reserved name": ("--model_path bicubic=run --gt H", "NAME=PATH"),
    "name of a path": ("--model_path ../up=run --gt H", "NAME=PATH"),
    "sets do not pair": ("--model_path run --gt H H --input L", "--input: 1 for 2 test sets"),
    "a set of nothing": ("--model_path run --gt H - --input L -", "- for both"),
    "unknown metric": ("--model_path run --gt H --metrics psnr lipps", "did you mean lpips"),
    "unknown metric in options": ('--opt test_x.json test.metrics=["lipps"]', "did you mean 'lpips'"),
    "metrics beside options": ("--opt test_x.json --metrics psnr", "stand in the file"),
    "negative images": ("--model_path run --gt H --report_images -1", "0 or more"),
    "missing input": ("--model_path run --input nowhere", "nowhere"),
    "missing ground truth": ("--model_path run --input L --gt nowhere", "nowhere"),
    "empty input": ("--model_path run --input empty", "no images"),
    "input is no image": ("--model_path run --input note.txt", r"note\.txt"),
    "broken image": ("--model_path run --input broken", r"z\.png"),
    "no partner": ("--model_path run --input other --gt H", r"a\.png"),
    "wrong sizes": ("--model_path double --input L --gt H", "10x10"),
    "two results of one name": ("--model_path run --input twins", "both"),
    "tile below overlap": ("--model_path run --input L --tile 16", "overlap"),
    "tile that is no number": ("--model_path run --input L --tile 64px", "neither a number of pixels nor auto"),
    "negative tile": ("--model_path run --input L --tile -4", "tile"),
    "unknown device": ("--model_path run --input L --device tpu", "tpu"),
    "missing device": ("--model_path run --input L --device cuda:77", "cuda:77"),
    "output is the input": ("--model_path run --input L --output L", "another folder"),
    "output in the input": ("--model_path run --input L --output L/out", "another folder"),
    "output around the input": ("--model_path run --input L --output .", "another folder"),
    "output is a file": ("--model_path run --input L --output note.txt", "another folder"),
    "set is missing": ("--opt test_x.json datasets.test_measured.dataroot_H=nowhere", "nowhere"),
    "no sets": ("--opt test_x.json datasets={}", "test set"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(place, monkeypatch, mistake):
    monkeypatch.chdir(place)
    arguments, words = MISTAKES[mistake]
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError) as error:
        main(arguments.split())
    assert re.search(words, str(error.value)), str(error.value)
    assert "\n" not in str(error.value).strip()
    assert sorted(place.rglob("*")) == before


def test_the_script_ends_with_status_two_after_a_mistake(place):
    command = [sys.executable, str(REPOSITORY / "main_test.py"), "--model_path", "run", "--input", "nowhere"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().split("\n") == ["error: nowhere: there is no such folder or image"]
