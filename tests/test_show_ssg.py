"""main_show_ssg.py and evaluation/figure.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import figure
from evaluation.figure import _panels, _smooth, graph_at, read_scalars, telling_pixel
from main_show_ssg import main
from tests.conftest import REPOSITORY, photograph
from utils.utils_error import UserError
from utils.utils_image import imread_uint, imsave, uint2tensor4
from utils.utils_png import encode_png
from utils.utils_ssl import edge_mask, self_similarity_graph


def blurred(image: np.ndarray) -> np.ndarray:
    return ((image.astype(int) + np.roll(image, 1, 0) + np.roll(image, 1, 1)) // 3).astype(np.uint8)


def save_run(folder: Path, steps: range = range(10, 60, 10)) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as board:
        for step in steps:
            for name in ("lr", "G_loss", "ssl", "l_d_real", "D_real", "G_grad", "data_time"):
                board.add_scalar(f"train/{name}", 1 / step, step)
            board.add_scalar("val/test/psnr", 20 + step / 100, step)
    (folder / "images").mkdir(exist_ok=True)
    for step in steps:
        imsave(photograph(40, 120, seed=step), str(folder / "images" / f"test_{step:08d}.png"))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = figure._save

    def remember(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(figure, "_save", remember)
    return figures


# ------------------------------------------------------------------------------------------------------------- graphs


def test_the_graph_of_a_pixel_is_the_one_of_the_loss():
    image = photograph(40, 44)
    edges = edge_mask(uint2tensor4(image))[0, 0].nonzero().tolist()
    for y, x in (edges[0], edges[len(edges) // 2], edges[-1]):
        mask = torch.zeros(1, 1, 40, 44)
        mask[0, 0, y, x] = 1
        graph = graph_at(image, x, y)
        expected = self_similarity_graph(uint2tensor4(image), mask, ssl_mode="pytorch")[0]
        # Box sums against windows: float32 sums in another order.
        assert np.allclose(graph.ravel(), expected, rtol=1e-3, atol=1e-7)
        assert graph.sum() == pytest.approx(1, abs=1e-5)


def test_images_of_16_bits_are_drawn_by_the_8_that_are_measured(tmp_path, drawn):
    image = photograph(40, 44)
    nearer_to_the_next = np.minimum(image.astype(int) * 257 + 129, 65535).astype(np.uint16)
    imsave(nearer_to_the_next, str(tmp_path / "deep.png"))
    main([str(tmp_path / "deep.png"), "--output", str(tmp_path / "f.png")])
    shown = [np.asarray(axes.images[0].get_array()) for axes in drawn[0].axes if axes.images]
    assert any(np.array_equal(one, np.minimum(image.astype(int) + 1, 255)) for one in shown)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"gray_$x$_$\\y$.png"])
def test_any_name_of_a_file_can_be_a_title(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    try:
        path.write_bytes(encode_png(photograph(40, 44)))
    except OSError:
        pytest.skip("this file system has no such names")
    main([str(path), "--output", str(tmp_path / "f.png")])
    assert imread_uint(str(tmp_path / "f.png")).size


def test_the_telling_pixel_is_where_the_graphs_differ_most():
    image = photograph(60, 60)
    other = image.copy()
    other[30:, 30:] = blurred(blurred(image))[30:, 30:]
    x, y = telling_pixel(image, other)
    assert edge_mask(uint2tensor4(image))[0, 0, y, x] == 1
    assert x > 30 - 12 - 4 < y  # the search area and its windows reach what was changed
    x, y = telling_pixel(image, None)
    assert edge_mask(uint2tensor4(image))[0, 0, y, x] == 1


def test_two_images_give_mask_areas_graphs_and_their_difference(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    image = photograph(50, 60)
    imsave(image, "hr.png")
    imsave(blurred(image), "sr.png")
    main(["hr.png", "--pixel", "20", "30", "--other", "sr.png"])
    picture = imread_uint("hr_ssg_20_30.png")
    assert picture.shape[1] > picture.shape[0] > 800
    (figure,) = drawn
    shown = {ax.get_title(loc="left"): ax.images[0].get_array() for ax in figure.axes if ax.images}
    titles = " | ".join(shown)
    for words in ("hr, 60 x 50", "edge mask", "hr: search area 25", "graph of hr", "graph of sr"):
        assert words in titles
    area = next(array for title, array in shown.items() if title.startswith("hr: search"))
    assert np.array_equal(area, image[30 - 12 : 30 + 13, 20 - 12 : 20 + 13])
    difference = shown["difference of the graphs x 1000"]
    assert np.allclose(difference, 1000 * (graph_at(blurred(image), 20, 30) - graph_at(image, 20, 30)), atol=1e-4)


@pytest.mark.parametrize("other", ["60x48", "56x49", "56x48"])  # x4, x7, x8
def test_the_truth_is_cut_to_what_main_test_makes_of_it(tmp_path, drawn, caplog, other):
    image = photograph(50, 60)
    width, height = map(int, other.split("x"))
    imsave(image, str(tmp_path / "hr.png"))
    imsave(blurred(image)[:height, :width], str(tmp_path / "sr.png"))
    with caplog.at_level("INFO"):
        main([str(tmp_path / "hr.png"), "--other", str(tmp_path / "sr.png"), "--output", str(tmp_path / "o.png")])
    said = [line for line in caplog.messages if "cut to" in line]
    assert said == [f"{tmp_path}/hr.png: cut to {other} at the right and below, the size of {tmp_path}/sr.png"]
    assert np.array_equal(drawn[0].axes[0].images[0].get_array(), image[:height, :width])


def test_images_of_one_size_are_not_cut(tmp_path, caplog):
    for name in ("hr.png", "sr.png"):
        imsave(photograph(50, 60), str(tmp_path / name))
    with caplog.at_level("INFO"):
        main([str(tmp_path / "hr.png"), "--other", str(tmp_path / "sr.png"), "--output", str(tmp_path / "o.png")])
    assert "cut to" not in caplog.text


def test_one_image_gives_its_graph_even_at_the_corner(tmp_path, drawn):
    imsave(photograph(20, 30, channels=1), str(tmp_path / "gray.png"))
    main([str(tmp_path / "gray.png"), "--pixel", "29", "0", "--output", str(tmp_path / "out.png")])
    assert len(drawn[0].axes) == 5  # four pictures and a colour bar
    assert imread_uint(str(tmp_path / "out.png")).size


# ----------------------------------------------------------------------------------------------------------- training


def test_the_later_value_of_a_step_counts_after_a_resumption(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for values in ({1: 1.0, 2: 2.0, 3: 3.0}, {3: 30.0, 4: 40.0}):
        with SummaryWriter(str(tmp_path / "tensorboard")) as board:
            for step, value in values.items():
                board.add_scalar("train/G_loss", value, step)
    steps, values_read = read_scalars(tmp_path)["train/G_loss"]
    assert steps.tolist() == [1, 2, 3, 4]
    assert values_read.tolist() == [1, 2, 30, 40]


def test_scalars_are_grouped_by_what_they_are():
    names = ["train/lr", "train/ssl", "train/D_loss", "train/D_real", "train/l_d_real", "train/D_grad"]
    panels = _panels([*names, "train/step_time", "val/a/psnr", "val/b/psnr"])
    assert next(iter(panels)) == "validation: PSNR, dB"
    assert panels["validation: PSNR, dB"] == ["val/a/psnr", "val/b/psnr"]
    assert panels["generator: weighted losses"] == ["train/ssl", "train/D_loss"]
    assert panels["discriminator: outputs"] == ["train/D_real"]
    assert sum(map(len, panels.values())) == 9


def test_smoothing_keeps_a_constant_and_the_length():
    assert np.allclose(_smooth(np.full(9, 2.5), 4), 2.5)
    assert _smooth(np.arange(100.0), 5)[50] == pytest.approx(50)


def test_a_run_gives_its_curves_and_image_grids(tmp_path, drawn):
    run = save_run(tmp_path / "run")
    main(["--run", str(run)])
    picture = imread_uint(str(run / "curves.png"))
    assert picture.shape[1] == 13 * 160
    axes = [ax for part in drawn[0].subfigs for ax in part.axes]
    lines = {line.get_label(): line.get_ydata() for ax in axes for line in ax.lines}
    assert np.allclose(lines["ssl"], [1 / step for step in range(10, 60, 10)])
    grids = [ax.get_title(loc="left") for ax in axes if ax.images]
    assert [title.split(":")[0] for title in grids] == [f"test, step {step}" for step in (10, 20, 40, 50)]


# ----------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "nothing given": ("", "IMAGE or --run"),
    "both given": ("a.png --run run", "IMAGE or --run"),
    "pixel of a run": ("--run run --pixel 1 2", "not for --run"),
    "missing image": ("b.png --pixel 1 2", r"b\.png: there is no such image"),
    "missing other": ("a.png --other b.png", r"b\.png: there is no such image"),
    "no image": ("note.txt", r"note\.txt"),
    "pixel outside": ("a.png --pixel 40 3", "X is 0 to 39 and Y 0 to 29"),
    "negative pixel": ("a.png --pixel -1 3", "X is 0 to 39"),
    "pixel is no number": ("a.png --pixel x 3", "--pixel"),
    "another size": ("a.png --other small.png", r"small\.png is 12x12, a\.png 40x30"),
    "cut to a multiple of nothing": ("a.png --other odd.png", r"odd\.png is 39x29, a\.png 40x30"),
    "cut by 8": ("a.png --other cut8.png", r"cut8\.png is 40x22, a\.png 40x30"),
    "larger": ("a.png --other wide.png", r"wide\.png is 44x28, a\.png 40x30"),
    "too small": ("small.png --pixel 1 1", "over 12 pixels"),
    "no edges": ("flat.png", "--pixel X Y"),
    "output is the image": ("a.png --pixel 1 1 --output a.png", "another file"),
    "output is no png": ("a.png --output a.jpg", r"\.png"),
    "output folder is missing": ("a.png --pixel 1 1 --output none/a.png", "cannot be written"),
    "no run": ("--run run", "not a run's folder"),
    "missing run": ("--run nowhere", "not a run's folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    imsave(photograph(30, 40), "a.png")
    imsave(photograph(12, 12), "small.png")
    imsave(photograph(22, 40), "cut8.png")
    imsave(photograph(29, 39), "odd.png")
    imsave(photograph(28, 44), "wide.png")  # larger in one direction, smaller in the other
    imsave(np.full((30, 30, 3), 9, np.uint8), "flat.png")
    Path("note.txt").write_text("no image")
    Path("run").mkdir()
    arguments, words = MISTAKES[mistake]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        main(arguments.split())
    assert re.search(words, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_one_line_names_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    imsave(photograph(30, 40), str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"matplotlib.*pip install -r requirements\.txt"):
        main([str(tmp_path / "a.png"), "--pixel", "3", "4"])


def test_the_script_ends_with_status_two_after_a_mistake(tmp_path):
    command = [sys.executable, str(REPOSITORY / "main_show_ssg.py"), "--run", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere: is not a run's folder")
    assert len(done.stderr.strip().split("\n")) == 1


def test_sixteen_bits_are_shown_as_eight(tmp_path, drawn):
    imsave(photograph(30, 40).astype(np.uint16) * 257, str(tmp_path / "deep.png"))
    main([str(tmp_path / "deep.png"), "--pixel", "20", "20", "--output", str(tmp_path / "o.png")])
    assert np.array_equal(drawn[0].axes[0].images[0].get_array(), photograph(30, 40))
