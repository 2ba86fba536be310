"""Tables, files, pictures and metrics of a test: utils/utils_report.py, utils_metric.py, utils_run.py."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import photograph
from utils import utils_metric
from utils.utils_error import UserError
from utils.utils_image import calculate_psnr, calculate_ssim, imread_uint, rgb2ycbcr, uint2tensor4
from utils.utils_metric import METRICS, mean_metrics, measure, ssl_distance
from utils.utils_report import check_output, edge_rich_crop, format_table, output_names, side_by_side, write_csv
from utils.utils_run import run_facts, save_json, write_atomically
from utils.utils_ssl import SelfSimilarityLoss


def blurred(image: np.ndarray) -> np.ndarray:
    return ((image.astype(int) + np.roll(image, 1, 0) + np.roll(image, 1, 1)) // 3).astype(np.uint8)


def test_a_table_is_aligned_and_shows_missing_numbers_as_a_dash():
    rows = [{"model": "bicubic", "PSNR": 27.125, "SSIM": math.nan}, {"model": "psnr", "PSNR": math.inf}]
    lines = format_table(rows, {"model": "", "PSNR": ".2f", "SSIM": ".4f"}).split("\n")
    assert lines == ["model     PSNR  SSIM", "-------  -----  ----", "bicubic  27.12     -", "psnr       inf     -"]


def test_a_table_of_long_names_fits_eighty_columns_and_keeps_their_ends():
    name = "experiment_" + 100 * "x" + "_last"
    table = format_table([{"model": name, **dict.fromkeys(METRICS, 27.0)}], {"model": "", **METRICS})
    assert max(map(len, table.split("\n"))) <= 80
    assert "experiment_" in table
    assert "_last" in table


def test_a_csv_has_a_line_a_row_and_empty_fields_for_nan(tmp_path):
    write_csv([{"image": 'a,"b"', "PSNR": 30.5}, {"image": "c", "PSNR": math.nan}], tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["image", "PSNR"], ['a,"b"', "30.5"], ["c", ""]]


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
    rows = {name: {"bicubic": blurred(image), "ground truth": image} for name, image in (("a", H), ("b", gray))}
    side_by_side(rows, tmp_path / "two.png", crop=32, captions={"a": {"bicubic": "27.10 dB"}})
    side_by_side({"a": rows["a"]}, tmp_path / "one.png", crop=32)
    two, one = imread_uint(str(tmp_path / "two.png")), imread_uint(str(tmp_path / "one.png"))
    assert two.shape[1] == one.shape[1] > 3 * 256
    assert two.shape[0] - one.shape[0] > 256
    top, left, height, width = edge_rich_crop(H, 32)
    # The last cell of the first row repeats the detail's pixels eight times.
    cell = one[40:296, -266:-10]
    assert np.array_equal(cell[4::8, 4::8], H[top : top + height, left : left + width])


def test_metrics_are_kairs_on_rgb_and_on_rounded_luma():
    H = photograph(40, 44)
    E = blurred(H)
    values = measure(E, H, border=4, device="cpu")
    assert list(values) == list(METRICS)
    assert values["PSNR"] == calculate_psnr(E, H, 4)
    assert values["SSIM"] == calculate_ssim(E, H, 4)
    assert values["PSNR-Y"] == calculate_psnr(rgb2ycbcr(E), rgb2ycbcr(H), 4)
    assert values["SSIM-Y"] == calculate_ssim(rgb2ycbcr(E), rgb2ycbcr(H), 4)


def test_the_ssl_distance_is_the_loss_inside_the_border():
    H = photograph(40, 44)
    E = blurred(H)
    inside = np.s_[4:-4, 4:-4]
    loss = SelfSimilarityLoss(1000, 1000)(*(uint2tensor4(np.ascontiguousarray(x[inside])) for x in (E, H)))
    # One float32 mean against the mean of bands.
    assert measure(E, H, 4, "cpu")["SSL"] == pytest.approx(float(loss), rel=1e-5)
    assert measure(H, H, 4, "cpu")["SSL"] == pytest.approx(0, abs=1e-6)


def test_the_ssl_distance_does_not_depend_on_its_bands(monkeypatch):
    H = photograph(50, 24)
    whole = ssl_distance(blurred(H), H)
    monkeypatch.setattr(utils_metric, "_BAND_PIXELS", 1)
    # The box sums of a band start elsewhere: float32 rounding.
    assert ssl_distance(blurred(H), H) == pytest.approx(whole, rel=1e-5)


def test_a_gray_image_is_its_own_luma():
    H = photograph(40, 40, channels=1)[..., 0]
    values = measure(blurred(H), H, 2, "cpu")
    assert values["PSNR"] == values["PSNR-Y"]
    assert values["SSIM"] == values["SSIM-Y"]
    assert values["SSL"] > 0


@pytest.mark.parametrize(
    ("side", "measured"),
    [(8, []), (9, ["PSNR", "PSNR-Y"]), (19, ["PSNR", "SSIM", "PSNR-Y", "SSIM-Y"]), (21, [*METRICS])],
)
def test_what_an_image_is_too_small_for_is_nan(side, measured):
    H = photograph(side, side)
    H[side // 2] = 255
    H[side // 2 - 1] = 0
    values = measure(blurred(H), H, border=4, device="cpu")
    assert [name for name, value in values.items() if not math.isnan(value)] == measured


def test_an_image_without_edges_has_no_ssl_distance():
    flat = np.full((40, 40, 3), 100, np.uint8)
    assert math.isnan(ssl_distance(flat, flat))


def test_means_leave_out_what_could_not_be_measured():
    values = [{**dict.fromkeys(METRICS, 2.0), "SSL": math.nan}, dict.fromkeys(METRICS, 4.0)]
    assert mean_metrics(values)["PSNR"] == 3.0
    assert mean_metrics(values)["SSL"] == 4.0
    assert math.isnan(mean_metrics(values[:1])["SSL"])


def test_images_of_different_sizes_are_not_compared():
    with pytest.raises(ValueError, match="different shapes"):
        measure(photograph(20, 20), photograph(20, 21), 0, torch.device("cpu"))
