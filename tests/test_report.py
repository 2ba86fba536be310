"""Tables, files and pictures of a test: evaluation/report.py, utils_run.py."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageDraw

from evaluation import report as report_module
from evaluation.metrics import METRICS, Measurer
from evaluation.report import (
    Report,
    SetResults,
    baselines,
    edge_rich_crop,
    format_table,
    sheet_row,
    side_by_side,
    write_csv,
    write_markdown,
)
from tests.conftest import photograph
from utils.utils_error import UserError
from utils.utils_image import imread_uint
from utils.utils_name import check_output, output_names
from utils.utils_run import run_facts, save_json, write_atomically

TITLES = [metric.title for metric in METRICS.values()]


def blurred(image: np.ndarray) -> np.ndarray:
    return ((image.astype(int) + np.roll(image, 1, 0) + np.roll(image, 1, 1)) // 3).astype(np.uint8)


def test_a_table_is_aligned_and_shows_missing_numbers_as_a_dash():
    rows = [{"model": "bicubic", "PSNR": 27.125, "SSIM": math.nan}, {"model": "psnr", "PSNR": math.inf}]
    lines = format_table(rows, {"model": "", "PSNR": ".2f", "SSIM": ".4f"}).split("\n")
    assert lines == ["model     PSNR  SSIM", "-------  -----  ----", "bicubic  27.12     -", "psnr       inf     -"]


def test_a_table_of_long_names_fits_eighty_columns_and_keeps_their_ends():
    name = "experiment_" + 100 * "x" + "_last"
    table = format_table(
        [{"model": name, **dict.fromkeys(TITLES, 27.0)}], {"model": "", **dict.fromkeys(TITLES, ".4f")}
    )
    assert max(map(len, table.split("\n"))) <= 80
    assert "experiment_" in table
    assert "_last" in table


def test_a_table_that_is_too_wide_goes_on_below():
    columns = {"model": "", **dict.fromkeys(TITLES, ".4f")}
    tables = format_table([{"model": "gan", **dict.fromkeys(TITLES, 27.0)}], columns).split("\n\n")
    assert len(tables) > 1
    assert [table.split("\n")[0].split()[0] for table in tables] == ["model"] * len(tables)
    assert [title for table in tables for title in table.split("\n")[0].split()[1:]] == TITLES
    assert {tuple(table.split("\n")[2].split()[:2]) for table in tables} == {("gan", "27.0000")}


def test_a_csv_has_a_line_a_row_and_empty_fields_for_nan(tmp_path):
    write_csv([{"image": 'a,"b"', "PSNR": 30.5}, {"image": "c", "PSNR": math.nan}], tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["image", "PSNR"], ['a,"b"', "30.5"], ["c", ""]]


def test_a_csv_has_the_columns_of_all_rows(tmp_path):
    write_csv([{"image": "a", "piqe": 1.0}, {"image": "b", "psnr": 2.0}], tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text() == "image,piqe,psnr\na,1.0,\nb,,2.0\n"


def test_json_holds_null_where_a_number_is_not_finite(tmp_path):
    save_json({"a": [math.nan, 1.5], "b": {"c": math.inf}, "path": Path("x")}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}, "path": "x"}


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_debris(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json: cannot be written"):
        write_atomically("x", tmp_path / "results.json")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_the_facts_of_a_run_are_complete():
    facts = run_facts()
    assert facts.keys() >= {
        "git_commit",
        "python",
        "torch",
        "torchvision",
        "opencv",
        "numpy",
        "device",
        "command",
        "date",
    }
    assert all(isinstance(value, str) and value for value in facts.values())


def test_results_keep_the_folders_and_names_of_their_images():
    assert output_names(["a/x/1.png", "a/2.v1.jpg", "b/3.tif"], ["a", "b"]) == ["x/1", "2.v1", "3"]
    assert output_names(["a/x/1.png"], ["a/x/1.png"]) == ["1"]


def test_two_images_with_one_result_are_refused():
    with pytest.raises(UserError, match=r"both would be saved as x/1\.png"):
        output_names(["a/x/1.png", "a/x/1.jpg"], ["a"])


@pytest.mark.parametrize("output", ["in", "in/out", ".", "in/1.png", "in/1.png/deep"])
def test_an_output_folder_that_touches_the_inputs_is_refused(tmp_path, output):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").touch()
    with pytest.raises(UserError, match="give another folder"):
        check_output(tmp_path / output, [str(tmp_path / "in" / "1.png")], [str(tmp_path / "in")])
    check_output(tmp_path / "out", [str(tmp_path / "in" / "1.png")], [str(tmp_path / "in")])


def test_the_detail_is_where_the_edges_are():
    image = np.full((120, 150, 3), 128, np.uint8)
    image[60:100, 90:140:4] = 255
    top, left, height, width = edge_rich_crop(image, 48)
    assert (height, width) == (48, 48)
    assert top <= 60 <= 100 <= top + height
    assert 86 <= left <= 94
    assert edge_rich_crop(image[:9, :5, 0], 48) == (0, 0, 9, 5)


def test_side_by_side_shows_a_column_a_label_and_a_row_an_image(tmp_path):
    H, gray = photograph(90, 120), photograph(7, 130, channels=1)[..., 0]
    pictures = {name: {"bicubic": blurred(image), "ground truth": image} for name, image in (("a", H), ("b", gray))}
    rows = {name: sheet_row(of_image, crop=32) for name, of_image in pictures.items()}
    side_by_side(rows, tmp_path / "two.png", captions={"a": {"bicubic": "27.10 dB"}})
    side_by_side({"a": rows["a"]}, tmp_path / "one.png")
    two, one = imread_uint(str(tmp_path / "two.png")), imread_uint(str(tmp_path / "one.png"))
    assert two.shape[1] == one.shape[1] > 3 * 256
    assert two.shape[0] - one.shape[0] > 256
    top, left, height, width = edge_rich_crop(H, 32)
    # The last cell of the first row repeats the detail's pixels eight times.
    cell = one[40:296, -266:-10]
    assert np.array_equal(cell[4::8, 4::8], H[top : top + height, left : left + width])


def captions(folder, monkeypatch, metrics, *pairs):
    """Those of side_by_side.png, of images "0", "1", ... of one set, each (ground truth, estimate)."""
    drawn = {}
    monkeypatch.setattr(report_module, "side_by_side", lambda rows, path, captions: drawn.update(captions))
    report = Report(Measurer(metrics, 0, "cpu"), {"A": len(pairs)}, report_images=0)
    for index, (H, E) in enumerate(pairs):
        report.add(report.examine("A", index, str(index), {"gan": E}, H))
    report.end_set("A", True)
    report.write(folder, run_facts(), {"models": {}, "scale": 2}, n_channels=3)
    return [words["gan"] for words in drawn.values()]


def test_captions_give_psnr_and_ssg_as_far_as_they_were_measured(tmp_path, monkeypatch):
    H, flat = photograph(40, 44), np.full((40, 44, 3), 9, np.uint8)
    both = captions(tmp_path, monkeypatch, ["psnr", "ssg"], (H, blurred(H)), (flat, flat + 1), (H, H))
    values = json.loads((tmp_path / "results.json").read_text())["images"][0]
    assert both[0] == f"PSNR {values['psnr']:.2f} dB, SSG {values['ssg']:.3f}"
    assert both[1] == "PSNR 48.13 dB"  # 20 log10 of 255; no edges, no SSG
    assert both[2] == "PSNR inf dB, SSG 0.000"
    assert captions(tmp_path, monkeypatch, ["ssim", "ssg"], (H, H)) == ["SSG 0.000"]
    assert captions(tmp_path, monkeypatch, ["psnr"], (H, H)) == ["PSNR inf dB"]


def test_the_longest_caption_fits_below_its_detail(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, at, text, *_, **__: written.append(text))
    H = photograph(40, 44)
    longest = "PSNR 100.00 dB, SSG 1000.000"
    row = sheet_row({"gan": H, "ground truth": H})
    side_by_side({"a": row}, tmp_path / "a.png", captions={"a": {"gan": longest}})
    assert longest in written  # what does not fit is shortened


def results(**means: dict[str, float]) -> SetResults:
    return SetResults("Set2", 2, ["psnr", "ssg"], means)


def test_what_ssl_added_is_over_the_images_that_both_models_have():
    measurer = Measurer(["psnr"], 0, "cpu")
    report = Report(measurer, {"Set": 3}, 0)
    for i, level in enumerate((5, 20, 80)):
        H = photograph(40, 44, seed=i)
        E = np.clip(H.astype(int) + level, 0, 255).astype(np.uint8)
        report.add(report.examine("Set", i, f"{i}.png", {"gan": E, "gan_ssl": E}, H, ["gan"] * (i == 2)))
    report.end_set("Set", True)
    (results,) = report._sets
    assert results.deltas() == {"gan_ssl": {"psnr": 0}}
    assert results.means["gan"]["psnr"] > results.means["gan_ssl"]["psnr"] + 2
    assert results.as_json()["broken"] == {"gan": ["2.png"]}
    assert results.notes() == [
        "Set, gan: 1 image not finite (NaN): 2.png, left out of the means.",
        "Set: what SSL added is over the images that both models have.",
    ]


def test_infinite_means_are_best_and_differences_with_them_are_none():
    means = {
        "gan": {"psnr": math.inf},
        "gan_ssl": {"psnr": math.inf},
        "net": {"psnr": 30.0},
        "net_ssl": {"psnr": math.inf},
    }
    infinite = {label: {"psnr": ["a", "b"]} for label in means if label != "net"} | {"net": {"psnr": ["a"]}}
    results = SetResults("Set2", 2, ["psnr"], means, infinite)
    assert results.best("psnr") == "inf"
    assert all(math.isnan(value["psnr"]) for value in results.deltas().values())
    assert "| gan_ssl | **inf** |" in results.as_markdown()
    assert "| net | 30.00 |" in results.as_markdown()
    assert results.notes()[-1] == "Set2, net: 1 image equal to the ground truth (infinite PSNR), left out of the mean."
    assert results.notes()[0] == "Set2, gan: 2 images equal to the ground truth (infinite PSNR), all of the set."


@pytest.mark.parametrize("label", ["gan_ssl", "gan-SSL", "GAN+SSL", "gan + ssl", "ganssl"])
def test_a_model_with_ssl_is_told_by_its_name_from_its_baseline(label):
    assert baselines(["bicubic", "gan", label, "psnr"]) == {label: "gan"}


def test_without_the_baseline_there_is_no_comparison():
    assert baselines(["gan_ssl", "psnr", "ssl", "hassle"]) == {}
    assert baselines(["a", "a_ssl", "b_ssl", "b"]) == {"a_ssl": "a", "b_ssl": "b"}


def test_what_ssl_changed_stands_below_its_model():
    table = results(gan={"psnr": 26.5, "ssg": 1.5}, gan_ssl={"psnr": 26.25, "ssg": 1.0}).as_text().split("\n")
    assert [line.split() for line in table[2:]] == [
        ["gan", "26.50", "1.500"],
        ["gan_ssl", "26.25", "1.000"],
        ["-", "gan", "-0.25", "-0.500"],
    ]


def test_markdown_shows_the_best_in_bold_and_what_ssl_changed(tmp_path):
    of_set = results(
        bicubic={"psnr": 26.499, "ssg": math.nan},
        gan={"psnr": 26.501, "ssg": 1.5},
        gan_ssl={"psnr": 26.25, "ssg": 1.0},
    )
    write_markdown([of_set], "Results", ["A note."], tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "## Set2, 2 images" in text
    assert "| model | PSNR \u2191 | SSG \u2193 |\n|---|---:|---:|" in text
    # Equal as printed is equally good.
    assert "| bicubic | **26.50** | - |\n| gan | **26.50** | 1.500 |" in text
    assert "| gan_ssl | 26.25 (\u22120.25) | **1.000** (\u22120.500) |" in text
    assert "gan_ssl against gan" in text
    assert text.endswith("A note.\n")


def test_a_report_of_two_sets_has_the_means_of_each_and_says_what_is_left_out(tmp_path):
    measurer = Measurer(["psnr", "ssg"], 0, "cpu")
    measurer.missing["lpips"] = "its weights are not in the cache"
    report = Report(measurer, {"A": 1, "B": 2, "real": 1}, report_images=3)
    H = photograph(40, 44)
    for name, count in (("A", 1), ("B", 2)):
        for index in range(count):
            report.add(
                report.examine(name, index, f"{name}{index}", {"bicubic": blurred(blurred(H)), "gan": blurred(H)}, H)
            )
        report.end_set(name, True)
    report.add(report.examine("real", 0, "r", {"bicubic": H, "gan": blurred(H)}, None))
    report.end_set("real", False)
    content = {"models": {"gan": "gan.pth"}, "scale": 4}
    report.write(tmp_path, run_facts(), content, n_channels=3)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["sets"]) == ["A", "B"]
    assert found["sets"]["B"]["images"] == 2
    rows = [row for row in found["images"] if row["set"] == "B" and row["model"] == "gan"]
    assert found["sets"]["B"]["means"]["gan"]["psnr"] == pytest.approx(sum(row["psnr"] for row in rows) / 2)
    assert found["missing"] == {"LPIPS": "its weights are not in the cache"}
    assert "LPIPS was not computed" in (tmp_path / "results.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert [page.count(f'"name":"{name}"') for name in ("A0", "B0", "B1", "r")] == [1, 1, 0, 1]


def test_a_report_of_no_images_is_not_written(tmp_path):
    report = Report(Measurer(["psnr"], 0, "cpu"), {"A": 1}, report_images=0)
    H = photograph(20, 20)
    report.add(report.examine("A", 0, "a", {"bicubic": blurred(H)}, H))
    report.end_set("A", True)
    report.write(tmp_path, run_facts(), {"models": {}, "scale": 2}, n_channels=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results.csv",
        "results.json",
        "results.md",
        "side_by_side.png",
    ]
