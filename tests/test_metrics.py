"""evaluation/metrics.py: against published numbers, against pyiqa called directly, and without network or pyiqa."""

import math
import socket
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch

from evaluation import metrics
from evaluation.metrics import GROUPS, METRICS, Measurer, choose, frechet_distance, mean_metrics, ssg_maps
from models.loss_metric import LearnedMetric
from tests.conftest import photograph
from utils import utils_image
from utils.utils_error import UserError
from utils.utils_image import calculate_psnr, calculate_ssim, rgb2ycbcr, uint2tensor4, unrounded_y
from utils.utils_option import MetricName
from utils.utils_ssl import SelfSimilarityLoss, edge_mask

OWN = [name for name, metric in METRICS.items() if not metric.library and not metric.is_loss]


def blurred(image: np.ndarray) -> np.ndarray:
    return ((image.astype(int) + np.roll(image, 1, 0) + np.roll(image, 1, 1)) // 3).astype(np.uint8)


def values_of(E: np.ndarray, H: np.ndarray | None, border: int = 0, names=("default",)) -> dict[str, float]:
    return Measurer(names, border, "cpu").measure({"E": E}, H).values["E"]


# ---------------------------------------------------------------------------------------------------------- the table


def test_names_and_groups_are_those_of_the_options():
    assert sorted(get_args(MetricName)) == sorted([*METRICS, *GROUPS])
    assert set(METRICS) >= {name for group in GROUPS.values() for name in group}


def test_groups_are_spread_out_and_each_metric_comes_once():
    assert choose(["ssg", "default", "psnr", "gmsd"]) == ["ssg", "psnr", "ssim", "psnr_y", "ssim_y", "gmsd"]
    with pytest.raises(UserError, match="did you mean lpips"):
        choose(["psnr", "lipps"])


def test_every_direction_is_pyiqas():
    configs = pytest.importorskip("pyiqa.default_model_configs", reason="pyiqa is not installed").DEFAULT_CONFIGS
    for name, metric in METRICS.items():
        name = name.replace("_vgg", "-vgg")
        if metric.library or metric.is_loss:
            assert configs[name].get("lower_better", False) != metric.higher_better, name
            assert (configs[name]["metric_mode"] == "FR") == (metric.needs == "pair"), name


# ------------------------------------------------------------------------------------------------------ PSNR and SSIM


def test_psnr_and_ssim_are_the_published_ones_in_both_definitions_of_luma(golden):
    expected = golden("image/metrics.json")
    E, H = golden("image/metrics.npz"), golden("ssl/images_set5.npz")
    ours = {"psnr": "kair_psnr_rgb", "ssim": "kair_ssim_rgb", "psnr_y8": "kair_psnr_y", "ssim_y8": "kair_ssim_y"}
    ours |= {"psnr_y": "basicsr_psnr_y", "ssim_y": "basicsr_ssim_y"}
    for name, numbers in expected.items():
        for border in (0, 4):
            values = values_of(E[f"sr/{name}"], H[name], border, ours)
            for metric, theirs in ours.items():
                # float64 on both sides, sums in another order; but BasicSR's luma is float32.
                precision = 1e-7 if theirs.startswith("basicsr") else 1e-9
                expected_value = pytest.approx(numbers[f"{theirs}_border{border}"], rel=precision)
                assert values[metric] == expected_value, (name, metric, border)


def test_luma_is_rounded_only_where_the_name_says_so():
    H = photograph(40, 44)
    E = blurred(H)
    values = values_of(E, H, 4, ["default", "psnr_y8", "ssim_y8"])
    assert values["psnr"] == calculate_psnr(E, H, 4)
    assert values["ssim"] == calculate_ssim(E, H, 4)
    assert values["psnr_y"] == calculate_psnr(unrounded_y(E), unrounded_y(H), 4)
    assert values["ssim_y"] == calculate_ssim(unrounded_y(E), unrounded_y(H), 4)
    assert values["psnr_y8"] == calculate_psnr(rgb2ycbcr(E), rgb2ycbcr(H), 4) != values["psnr_y"]
    assert values["ssim_y8"] == calculate_ssim(rgb2ycbcr(E), rgb2ycbcr(H), 4) != values["ssim_y"]


def test_a_gray_image_is_its_own_luma():
    H = photograph(40, 40, channels=1)[..., 0]
    values = values_of(blurred(H), H, 2, OWN)
    assert values["psnr"] == values["psnr_y"] == values["psnr_y8"]
    assert values["ssim"] == values["ssim_y"] == values["ssim_y8"]
    assert values["ssg"] > 0


@pytest.mark.parametrize(
    ("side", "measured"),
    [(8, []), (9, ["psnr", "psnr_y"]), (19, ["psnr", "ssim", "psnr_y", "ssim_y"]), (21, list(GROUPS["default"]))],
)
def test_what_an_image_is_too_small_for_is_nan(side, measured):
    H = photograph(side, side)
    H[side // 2] = 255
    H[side // 2 - 1] = 0
    values = values_of(blurred(H), H, border=4)
    assert [name for name, value in values.items() if not math.isnan(value)] == measured


def test_colour_drift_is_in_levels_and_leaves_out_the_border():
    H = np.clip(photograph(40, 44), 0, 240)
    E = H + np.uint8(6)
    E[:4] = 0
    assert values_of(E, H, 4, ["color"])["color"] == pytest.approx(6, rel=1e-5)  # float32
    assert values_of(E[..., 0], H[..., 0], 4, ["color"])["color"] == pytest.approx(6, rel=1e-5)


def test_images_of_different_sizes_are_not_compared():
    with pytest.raises(ValueError, match="different shapes"):
        values_of(photograph(20, 20), photograph(20, 21))


def test_means_leave_out_what_could_not_be_measured():
    values = [{"psnr": 2.0, "ssg": math.nan}, {"psnr": 4.0, "ssg": 4.0}]
    assert mean_metrics(values, ["psnr", "ssg"]) == {"psnr": 3.0, "ssg": 4.0}
    assert math.isnan(mean_metrics(values[:1], ["ssg"])["ssg"])


def test_the_mean_is_of_the_finite_values_and_infinite_where_all_are():
    values = [{"psnr": math.inf}, {"psnr": 30.0}, {"psnr": math.nan}, {"psnr": 20.0}]
    assert mean_metrics(values, ["psnr"]) == {"psnr": 25.0}
    assert mean_metrics([values[0], values[2]], ["psnr"]) == {"psnr": math.inf}


def test_large_images_are_compared_in_bands_with_the_same_numbers(monkeypatch):
    H, E = photograph(60, 44), blurred(photograph(60, 44))
    whole = values_of(E, H, 3, ["psnr", "ssim", "psnr_y", "ssim_y", "psnr_y8", "ssim_y8"])
    monkeypatch.setattr(utils_image, "_BAND_PIXELS", 44 * 7)
    banded = values_of(E, H, 3, whole)
    # The same numbers summed in another order.
    assert banded == pytest.approx(whole, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------- SSG


def test_the_ssg_distance_is_the_loss_inside_the_border_and_the_mean_of_its_map():
    H = photograph(40, 44)
    E = blurred(H)
    inside = np.s_[4:-4, 4:-4]
    loss = SelfSimilarityLoss(1000, 1000)(*(uint2tensor4(np.ascontiguousarray(x[inside])) for x in (E, H)))
    measured = Measurer(["ssg"], 4, "cpu").measure({"E": E, "H": H}, H)
    # One float32 mean over all entries against a mean of means.
    assert measured.values["E"]["ssg"] == pytest.approx(float(loss), rel=1e-5)
    assert measured.values["H"]["ssg"] == pytest.approx(0, abs=1e-6)
    assert np.nanmean(measured.ssg["E"]) == pytest.approx(measured.values["E"]["ssg"], rel=1e-5)


def test_the_ssg_map_lies_on_the_edges_and_shows_where_structure_differs():
    H = photograph(60, 60)
    E = H.copy()
    E[:, 40:] = blurred(H)[:, 40:]
    (values,) = ssg_maps([E], H, border=4)
    mask = edge_mask(uint2tensor4(np.ascontiguousarray(H[4:-4, 4:-4])))[0, 0].numpy()
    assert np.array_equal(~np.isnan(values[4:-4, 4:-4]), mask == 1)
    assert np.isnan(values[:4]).all()
    # Graphs left of column 40 - 12 - 4 read no changed pixel; those that do differ by far more than rounding.
    assert np.nanmax(np.abs(values[:, :24])) < 1e-4 < 0.1 < np.nanmean(values[:, 40:])


def test_the_ssg_map_does_not_depend_on_its_bands(monkeypatch):
    H = photograph(50, 24)
    whole = ssg_maps([blurred(H)], H)
    monkeypatch.setattr(metrics, "_BAND_PIXELS", 1)
    # The box sums of a band start elsewhere: float32 rounding, of values around 1.
    assert np.allclose(ssg_maps([blurred(H)], H), whole, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_an_image_without_edges_has_no_ssg_distance():
    flat = np.full((40, 40, 3), 100, np.uint8)
    assert math.isnan(values_of(flat, flat)["ssg"])


# ---------------------------------------------------------------------------------------------------------------- FID


def test_the_frechet_distance_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (400, 3)), rng.normal(1, 2, (300, 3)) @ np.diag([1, 2, 0.5])
    C_a, C_b = np.cov(a.T), np.cov(b.T)
    eigenvalues = np.linalg.eigvals(C_a @ C_b)  # of a product of covariances: real, not negative
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(C_a + C_b) - 2 * np.sqrt(eigenvalues.real).sum()
    # float64 by two ways.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert math.isnan(frechet_distance(a[:1], b))


def test_fid_compares_the_whole_images_of_a_set_with_its_ground_truth(monkeypatch):
    inception = types.SimpleNamespace(calls=[])

    def features(x):
        inception.calls.append(tuple(x.shape))
        return [x.mean((2, 3))[..., None, None]]

    monkeypatch.setattr(metrics, "_load", lambda names, device: ({"fid": features}, {}))
    measurer = Measurer(["fid"], 4, "cpu")
    truths = [photograph(30, 40, seed=seed) for seed in range(4)]
    for H in truths:
        assert measurer.measure({"same": H, "dark": H // 2}, H).values == {"same": {}, "dark": {}}
    result = measurer.of_set()
    assert set(inception.calls) == {(1, 3, 299, 299)}
    assert result["same"]["fid"] == pytest.approx(0, abs=1e-6)  # float32 features
    means = np.stack([H.mean((0, 1)) / 255 for H in truths])
    assert result["dark"]["fid"] == pytest.approx(frechet_distance(means / 2, means), rel=0.1)  # H // 2 rounds down
    assert measurer.of_set() == {}


def test_fid_is_of_the_images_that_a_model_made_and_of_no_broken_ones(monkeypatch):
    monkeypatch.setattr(metrics, "_load", lambda names, device: ({"fid": lambda x: [x.mean((2, 3), True)]}, {}))
    measurer = Measurer(["fid"], 4, "cpu")
    truths = [photograph(30, 40, seed=seed) for seed in range(4)]
    for i, H in enumerate(truths):
        broken = ["all", *(["once"] if i == 3 else [])]
        measurer.measure({"once": 0 * H if i == 3 else H, "all": H}, H, broken)
    result = measurer.of_set()
    means = np.stack([H.mean((0, 1)) / 255 for H in truths])
    assert result["once"]["fid"] == pytest.approx(frechet_distance(means[:3], means), abs=1e-6)  # float32 features
    assert math.isnan(result["all"]["fid"])


# ---------------------------------------------------------------------------------------------------------- libraries


@pytest.fixture(scope="module")
def pyiqa():
    return pytest.importorskip("pyiqa", reason="pyiqa is not installed: pip install -r requirements-extra.txt")


def test_offline_metrics_are_pyiqas_inside_the_border(pyiqa):
    names = [name for name in GROUPS["offline"] if METRICS[name].library and name != "mad"]  # mad takes long
    for name in names:
        H = photograph(177, 176) if name == "ms_ssim" else photograph(70, 81)
        E = blurred(H)
        metric = pyiqa.create_metric(name, device="cpu")
        x, y = (torch.from_numpy(image[4:-4, 4:-4] / 255).float().permute(2, 0, 1)[None] for image in (E, H))
        direct = metric(x, y) if METRICS[name].needs == "pair" else metric(x)
        assert values_of(E, H, 4, [name])[name] == pytest.approx(float(direct), rel=1e-6), name


def test_mad_is_not_zero_where_a_side_is_odd(pyiqa):
    H = photograph(33, 40)
    E = blurred(H)
    value = values_of(E, H, 0, ["mad"])["mad"]
    assert value == values_of(E[:32], H[:32], 0, ["mad"])["mad"] > 1


def test_images_without_ground_truth_get_what_needs_none(pyiqa):
    E = photograph(64, 48)
    measurer = Measurer(["default", "gmsd", "piqe"], 4, "cpu")
    assert measurer.names_for(with_truth=False) == ["piqe"]
    assert list(measurer.measure({"E": E}, None).values["E"]) == ["piqe"]
    gray = np.ascontiguousarray(E[..., 0])
    assert values_of(gray, None, 4, ["piqe"]) == values_of(np.stack([gray] * 3, -1), None, 4, ["piqe"])


def test_niqe_is_of_matlabs_luma_as_in_the_paper(pyiqa, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pyiqa, "create_metric", lambda name, **options: asked.append((name, options.get("color_space")))
    )
    Measurer(["niqe", "piqe"], 4, "cpu")
    assert asked == [("niqe", "ycbcr"), ("piqe", None)]


def test_weights_that_cannot_be_had_cost_a_line_each_and_little_time(pyiqa, monkeypatch, tmp_path, caplog):
    def no_network(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    from huggingface_hub import constants

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with caplog.at_level("INFO"):
        measurer = Measurer(["niqe", "psnr", "maniqa", "musiq"], 4, "cpu")
    # huggingface_hub alone would try for 48 seconds.
    assert time.monotonic() - began < 20
    assert measurer.names == ["psnr"]
    assert list(measurer.missing) == ["niqe", "maniqa", "musiq"]
    for name in measurer.missing:
        lines = [line for line in caplog.messages if line.startswith(METRICS[name].title)]
        assert len(lines) == 1
        assert "weights are not in the cache and cannot be fetched" in lines[0]
        assert "\n" not in lines[0]
    assert not constants.HF_HUB_OFFLINE
    assert "pkg_resources" not in sys.modules or sys.modules["pkg_resources"].__spec__


def test_weights_in_the_cache_are_enough(monkeypatch, tmp_path):
    pytest.importorskip("torchmetrics")
    import torchvision
    from torchvision.models import AlexNet_Weights

    torch.manual_seed(0)
    (tmp_path / "checkpoints").mkdir()
    name = AlexNet_Weights.DEFAULT.url.split("/")[-1]
    torch.save(torchvision.models.AlexNet().state_dict(), tmp_path / "checkpoints" / name)
    monkeypatch.setattr(metrics, "_online", lambda: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    H = photograph(70, 72)
    E = blurred(H)
    with torch.no_grad():
        inside = (uint2tensor4(np.ascontiguousarray(x[4:-4, 4:-4])) for x in (E, H))
        expected = LearnedMetric("lpips")(*inside)
    assert values_of(E, H, 4, ["lpips"])["lpips"] == pytest.approx(float(expected), rel=1e-6)  # float32


def test_a_metric_that_fails_on_an_image_is_nan_and_named(monkeypatch, caplog):
    def fails(*_images):
        raise RuntimeError("Kernel size can't be greater\nthan actual input size")

    monkeypatch.setattr(metrics, "_load", lambda names, device: ({"musiq": fails}, {}))
    with caplog.at_level("INFO"):
        assert math.isnan(values_of(photograph(20, 30), None, 0, ["musiq"])["musiq"])
    assert caplog.messages == [
        "MUSIQ has no value for an image of 30x20: RuntimeError: Kernel size can't be greater than actual input size"
    ]


def test_without_its_library_one_line_names_the_install_command(monkeypatch):
    for library, names, titles in (("pyiqa", ["gmsd", "piqe"], "GMSD, PIQE"), ("torchmetrics", ["lpips"], "LPIPS")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=rf"{titles}: needs {library}.*pip install -r requirements-extra\.txt"):
            Measurer(["psnr", *names], 4, "cpu")
    assert values_of(photograph(20, 20), photograph(20, 20))["psnr"] == math.inf


def test_the_note_says_what_the_columns_are(pyiqa):
    note = Measurer(["psnr_y", "piqe"], 4, "cpu").describe(n_channels=1)
    assert "PSNR-Y: dB, on MATLAB's luma" in note
    assert "border of 4 px" in note
    assert "Gray images" in note
    assert f"pyiqa {pyiqa.__version__}: PIQE" in note
    assert "By" not in Measurer(["psnr", "stlpips"], 4, "cpu").describe(3)


def test_threads_use_a_network_one_at_a_time_and_only_its_own_words_are_lost(monkeypatch, capsys):
    busy, most = [], []

    def network(*_images):
        busy.append(1)
        most.append(len(busy))
        print("loading")
        print_elsewhere = threading.Thread(target=print, args=("said by another thread",))
        print_elsewhere.start()
        print_elsewhere.join()
        busy.pop()
        return 1.0

    monkeypatch.setattr(metrics, "_load", lambda names, device: ({"musiq": network}, {}))
    measurer = Measurer(["musiq"], 0, "cpu")
    E = photograph(20, 30)
    with ThreadPoolExecutor(4) as pool:
        assert len([*pool.map(lambda _: measurer.measure({"E": E}, None), range(8))]) == 8
    assert set(most) == {1}
    assert capsys.readouterr().out == 8 * "said by another thread\n"


def test_fid_is_the_same_to_the_last_bit_in_whichever_order_images_are_measured(monkeypatch):
    def features(x):
        return [torch.stack([x.mean((0, 2, 3)), x.amax((0, 2, 3)), x.std((0, 2, 3))])]

    monkeypatch.setattr(metrics, "_load", lambda names, device: ({"fid": features}, {}))
    measurer = Measurer(["fid"], 0, "cpu")
    images = [photograph(40, 50, seed=seed) for seed in range(7)]
    results = set()
    for order in (range(7), reversed(range(7)), (3, 0, 6, 1, 5, 2, 4)):
        for i in order:
            measurer.measure({"E": blurred(images[i])}, images[i])
        results.add(measurer.of_set()["E"]["fid"])
    assert len(results) == 1
