"""The self-similarity loss: every form against the published numbers and against the specification."""

import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.golden_numbers import PHOTOGRAPHS
from utils import utils_ssl
from utils.utils_ssl import SelfSimilarityLoss, edge_mask, graph_difference, mask_stride_pattern, self_similarity_graph

WHY_NO_CPP = utils_ssl._why_not("cpp", "cpu")
CPP = pytest.param("cpp", marks=pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}"))
WHY_NO_CUDA = utils_ssl._why_not("cuda", "cuda")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(WHY_NO_CUDA is not None, reason=f"no CUDA kernels: {WHY_NO_CUDA}"))
MODES = ["pytorch", "boxsum", CPP, CUDA]
CASES = sorted(path.stem for path in (PHOTOGRAPHS / "ssl").glob("s*.json"))


class Loss(SelfSimilarityLoss):
    """The loss, computed on a GPU in the mode for GPUs; tensors and gradients stay on the CPU."""

    def parts(self, *images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = "cuda" if self.ssl_mode == "cuda" else "cpu"
        total, l1, kl = super().parts(*(image.to(device) for image in images))
        return total.cpu(), l1.cpu(), kl.cpu()


def graph_of(img: torch.Tensor, mask: torch.Tensor, *sizes: float, ssl_mode: str, **settings) -> torch.Tensor:
    """The graph, likewise."""
    device = "cuda" if ssl_mode == "cuda" else "cpu"
    return self_similarity_graph(img.to(device), mask.to(device), *sizes, ssl_mode=ssl_mode, **settings).cpu()


def published_pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The generated pair of the conformance figures, in float64: (GT, SR, mask)."""
    c, y, x = np.mgrid[:3, :24, :24].astype(np.float64)
    gt = 0.5 + 0.25 * np.sin(0.3 * y + 0.2 * x + c)
    sr = gt + 0.02 * np.cos(0.5 * x - 0.4 * y)
    mask = np.zeros((24, 24))
    for pixel in ((0, 0), (5, 17), (12, 12), (23, 3)):
        mask[pixel] = 1
    return torch.tensor(gt)[None], torch.tensor(sr)[None], torch.tensor(mask)[None, None]


@pytest.mark.parametrize("mode", MODES)
def test_graph_of_the_generated_image_has_the_published_numbers(mode):
    gt, sr, mask = published_pair()
    plain = graph_of(gt, mask, generalization=False, ssl_mode=mode).reshape(4, 25, 25)
    graph = graph_of(gt, mask, ssl_mode=mode).reshape(4, 25, 25)
    graph_sr = graph_of(sr, mask, ssl_mode=mode).reshape(4, 25, 25)
    # The figures are printed with ten decimals.
    published = [7.6218446099, 26.3403832140, 35.9930937156, 8.2852154081]
    torch.testing.assert_close(plain.sum((1, 2)), torch.tensor(published, dtype=torch.float64), rtol=0, atol=6e-11)
    for value, figures in (
        (graph[:, 12, 12], [0.1312018351, 0.0379645198, 0.0277831077, 0.1206969223]),
        (graph_sr[:, 12, 12], [0.1382681341, 0.0416678567, 0.0305762991, 0.1258080942]),
        (graph[:, 12, 13], [0.0965520853, 0.0277686153, 0.0203496591, 0.0890391090]),
        (plain[:, 9, 14], [0.0027956011, 0.1481404647, 0.1468505505, 0.0181271750]),
    ):
        torch.testing.assert_close(value, torch.tensor(figures, dtype=torch.float64), rtol=0, atol=6e-11)
    # Two positions in the ring where windows leave the search area; printed with five and seven digits.
    corner = torch.tensor([1.7325e-34, 6.6621e-18, 1.1374e-24, 1.9039e-35], dtype=torch.float64)
    torch.testing.assert_close(plain[:, 0, 0], corner, rtol=5e-5, atol=0)
    side = torch.tensor([2.822472e-10, 4.335880e-10, 1.963067e-11, 2.415190e-08], dtype=torch.float64)
    torch.testing.assert_close(plain[:, 12, 3], side, rtol=5e-7, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_of_the_generated_pair_are_the_published_ones(mode):
    gt, sr, mask = published_pair()
    sr.requires_grad_()
    _, l1, kl = Loss(1, 1, ssl_mode=mode).parts(sr, gt, mask)
    # Printed with thirteen digits, computed in float64.
    assert l1.item() == pytest.approx(1.019350012864e-04, rel=1e-11)
    assert kl.item() == pytest.approx(6.786220051409e-06, rel=1e-11)
    (gradient,) = torch.autograd.grad(Loss(1000, 1000, ssl_mode=mode)(sr, gt, mask), sr)
    # Printed with eleven decimals at most.
    assert gradient.sum().item() == pytest.approx(-8.4240981e-03, abs=6e-11)
    assert gradient.abs().sum().item() == pytest.approx(17.597248932, abs=6e-10)
    assert gradient[0, 0, 12, 12].item() == pytest.approx(9.8450138245e-03, abs=6e-13)
    assert gradient[0, 2, 0, 0].item() == pytest.approx(5.3494095026e-02, abs=6e-12)
    assert gradient[0, 1, 20, 5].item() == pytest.approx(1.2542492313e-02, abs=6e-12)


@pytest.mark.parametrize("case", CASES or ["none here"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_every_golden_case_gives_its_values_and_gradients(golden, case, mode, dtype):
    info = golden(f"ssl/{case}.json")
    data = golden(f"ssl/{case}.npz")
    gt, sr = (torch.tensor(data[name])[None].to(dtype) for name in ("gt", "sr"))
    mask = torch.tensor(data["mask"])[None, None]
    sizes = info["kernel_size_search"], info["kernel_size_window"]
    settings = *sizes, info["sigma"], info["generalization"]
    if mode == "pytorch" and sizes == (25, 9) and info["masked_pixels"] > 100:
        pytest.skip("the specification would hold more than 100 MB of windows per image")
    sr.requires_grad_()
    loss, l1, kl = Loss(1, 1, *settings, ssl_mode=mode).parts(sr, gt, mask)
    loss.backward()
    if dtype == torch.float64:  # agreement to rounding
        rtol = dict(l1=1e-12, kl=1e-9, graph=1e-11, gradient=1e-10)
    else:  # float32; at sigma 1 the graph is flat, and KL is a difference of numbers near 1
        flat = info["sigma"] == 1
        rtol = dict(l1=2e-4 if flat else 2e-5, kl=0.1 if flat else 1e-5, graph=2e-5, gradient=2e-3 if flat else 2e-4)
    assert l1.item() == pytest.approx(float(data["loss_l1"]), rel=rtol["l1"])
    assert kl.item() == pytest.approx(float(data["loss_kl"]), rel=rtol["kl"])
    for image, name in ((sr.detach(), "sr"), (gt, "gt")):
        graph = graph_of(image, mask, *settings, ssl_mode=mode).double().numpy()
        rows = data["ssg_rows"] if "ssg_rows" in data else slice(None)
        published = data[f"ssg_{name}"]
        # Entries far down the exponential carry the relative error of the exponent; all that matter are above 1e-12.
        np.testing.assert_allclose(graph[rows], published, rtol=rtol["graph"], atol=1e-12 + rtol["graph"] * 1e-2)
    assert sr.grad is not None
    error = np.abs(sr.grad[0].double().numpy() - data["grad"]).max() / np.abs(data["grad"]).max()
    assert error < rtol["gradient"]


@pytest.mark.parametrize("case", ["batch_recipe", "batch_small_window"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("mode", MODES[1:])
def test_batches_average_over_the_pixels_of_all_images(golden, case, strided, mode):
    info = golden(f"ssl/{case}.json")
    data = golden(f"ssl/{case}.npz")
    gt, sr = (torch.tensor(data[name]).double() for name in ("gt", "sr"))
    mask = torch.tensor(data["mask"]).reshape(len(gt), 1, *gt.shape[2:]).double()
    loss = Loss(
        info["loss_weight"],
        info["loss_weight"],
        info["kernel_size_search"],
        info["kernel_size_window"],
        info["sigma"],
        info["generalization"],
        mask_stride=info["mask_stride_for_strided_variant"] if strided else 0,
        ssl_mode=mode,
    )
    sr.requires_grad_()
    total, l1, kl = loss.parts(sr, gt, mask)
    total.backward()
    suffix = "_strided" if strided else ""
    assert l1.item() == pytest.approx(info[f"l_selfsim{suffix}"], rel=1e-11)  # float64 to rounding
    assert kl.item() == pytest.approx(info[f"l_selfsim_kl{suffix}"], rel=1e-10)
    published = data[f"grad{suffix}"]
    assert np.abs(sr.grad.numpy() - published).max() < 1e-10 * np.abs(published).max()


@pytest.mark.parametrize(
    ("height", "width", "search", "window", "channels"),
    [
        (20, 24, 11, 5, 3),
        (9, 7, 9, 9, 1),
        (13, 14, 25, 9, 3),
        (30, 20, 7, 1, 2),
        (8, 9, 1, 1, 3),
        (16, 40, 25, 25, 1),
        (70, 35, 13, 11, 3),  # several tiles of the compiled forms, a window of more than nine
        (14, 150, 5, 3, 3),  # wider than a tile
    ],
)
@pytest.mark.parametrize("border", ["zero", "image"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_every_form_equals_the_specification_for_any_sizes(height, width, search, window, channels, border, mode):
    margin = search // 2 + (window // 2 if border == "image" else 0)
    if min(height, width) <= margin:
        height, width = height + margin, width + margin
    rng = torch.Generator().manual_seed(height)
    image = torch.rand(3, channels, height, width, dtype=torch.float64, generator=rng)
    target = image + 0.1 * torch.randn(image.shape, dtype=torch.float64, generator=rng)
    mask = (torch.rand(3, 1, height, width, generator=rng) < 20 / (height * width)).double()
    mask[1] = 0  # an image without edges between two with
    mask[0, 0, 0, 0] = mask[2, 0, -1, -1] = 1
    graphs, losses = [], []
    for form in ("pytorch", mode):
        img = image.clone().requires_grad_()
        graph = graph_of(img, mask, search, window, 0.1, ssl_mode=form, search_border=border)
        upstream = torch.rand(graph.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        graphs.append((graph.detach(), torch.autograd.grad((graph * upstream).sum(), img)[0]))
        for generalization in (True, False):
            settings = (search, window, 0.1, generalization)
            loss = Loss(300, 700, *settings, ssl_mode=form, search_border=border)
            parts = loss.parts(img, target, mask)
            gradient = torch.autograd.grad(2.5 * parts[0], img)[0]
            losses.append([torch.stack([p.detach() for p in parts]), gradient])
    # Float64 sums in another order; gradients of nearly uniform graphs are small differences.
    torch.testing.assert_close(graphs[0][0], graphs[1][0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(graphs[0][1], graphs[1][1], rtol=1e-9, atol=1e-13)
    for published, ours in zip(losses[:2], losses[2:], strict=True):
        torch.testing.assert_close(published[0], ours[0], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(published[1], ours[1], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("mode", MODES[1:])
def test_gradient_passes_gradcheck(mode):
    image = torch.rand(2, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.zeros(2, 1, 6, 7)
    mask[0, 0, 0, 0] = mask[0, 0, 3, 4] = mask[1, 0, 5, 6] = 1
    assert torch.autograd.gradcheck(lambda x: graph_of(x, mask, 5, 3, 0.3, ssl_mode=mode), image)


def test_many_large_images_are_split_without_changing_the_graph():
    image = torch.rand(5, 1, 220, 230, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(5, 1, 220, 230)
    mask[0, 0, 3, 4] = mask[3, 0, 100, 100] = mask[4, 0, 219, 0] = 1
    whole = self_similarity_graph(image, mask, ssl_mode="boxsum")
    alone = [self_similarity_graph(image[i : i + 1], mask[i : i + 1], ssl_mode="boxsum") for i in (0, 3, 4)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=0)  # the same sums in the same order


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_the_mean_difference_of_the_two_graphs(mode):
    gt, sr, mask = published_pair()
    l1, kl = graph_difference(*(graph_of(image, mask, ssl_mode=mode) for image in (sr, gt)))
    assert l1.shape == kl.shape == (4,)
    expected = torch.stack([300 * l1.mean() + 700 * kl.mean(), 300 * l1.mean(), 700 * kl.mean()])
    # Float64; KL is a small difference of large terms, which the fused form sums in another order.
    torch.testing.assert_close(
        torch.stack(Loss(300, 700, ssl_mode=mode).parts(sr, gt, mask)), expected, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("mode", MODES)
def test_empty_masks_give_zero_loss_and_zero_gradient(mode):
    sr = torch.rand(2, 3, 16, 16, requires_grad=True)
    loss = Loss(1000, 1000, 9, 3, ssl_mode=mode)(sr, torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16))
    loss.backward()
    assert loss.item() == 0
    assert sr.grad is not None
    assert sr.grad.abs().max() == 0


def test_gradient_flows_to_the_output_only_and_equal_images_have_no_loss():
    gt, _, mask = published_pair()
    sr, gt = gt.clone().requires_grad_(), gt.requires_grad_()
    loss = SelfSimilarityLoss(1000, 1000)(sr, gt, mask)
    loss.backward()
    assert loss.item() == 0
    assert gt.grad is None


def test_autocast_changes_nothing_and_half_precision_is_computed_in_float32():
    gt, sr, mask = (x.float() for x in published_pair())
    plain = SelfSimilarityLoss(1000, 1000)(sr, gt, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert SelfSimilarityLoss(1000, 1000)(sr, gt, mask) == plain
    half = sr.bfloat16().requires_grad_()
    loss = SelfSimilarityLoss(1000, 1000)(half, gt.bfloat16(), mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_loss_of_a_non_contiguous_image_is_that_of_its_copy():
    gt, sr, mask = published_pair()
    flipped = sr.permute(0, 1, 3, 2)
    loss = SelfSimilarityLoss(1, 1)
    expected = loss(flipped.contiguous(), gt.transpose(2, 3).contiguous(), mask.transpose(2, 3).contiguous())
    torch.testing.assert_close(loss(flipped, gt.transpose(2, 3), mask.transpose(2, 3)), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_masks_may_have_any_type(mode, dtype):
    gt, sr, mask = published_pair()
    loss = Loss(1, 1, mask_stride=5, ssl_mode=mode)
    assert loss(sr, gt, mask.to(dtype)) == loss(sr, gt, mask) > 0


@pytest.mark.parametrize("stride", [0, 3])
def test_a_mask_of_another_shape_is_refused_also_where_it_is_thinned(stride):
    gt, sr, mask = published_pair()
    with pytest.raises(ValueError, match=r"mask .* does not fit images"):
        Loss(1, 1, mask_stride=stride)(sr, gt, mask[:, 0])


@pytest.mark.parametrize("mode", MODES)
def test_images_of_two_types_are_compared_in_the_wider_one(mode):
    gt, sr, mask = published_pair()
    expected = Loss(1, 1, ssl_mode=mode)(sr.float().double(), gt, mask)
    x = sr.float().requires_grad_()
    loss = Loss(1, 1, ssl_mode=mode)(x, gt, mask)
    assert loss == expected
    assert loss.dtype == torch.float64
    assert torch.autograd.grad(loss, x)[0].dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_images_gives_zero_loss(mode):
    sr = torch.rand(0, 3, 16, 16, requires_grad=True)
    for mask in (None, torch.ones(0, 1, 16, 16)):
        hr = torch.rand(0, 3, 16, 16)
        loss = Loss(1, 1, 9, 3, ssl_mode=mode)(sr, hr, edge_mask(hr) if mask is None else mask)
        assert loss == 0
        assert torch.autograd.grad(loss, sr)[0].shape == sr.shape
    assert graph_of(sr, torch.ones(0, 1, 16, 16), 9, 3, ssl_mode=mode).shape == (0, 81)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_views_and_inference_tensors_give_the_same_loss(mode):
    gt, sr, mask = (x.float() for x in published_pair())
    loss = Loss(1000, 1000, ssl_mode=mode)
    right = loss(sr, gt, mask)
    parameter = torch.nn.Parameter(torch.cat([sr, sr]))
    (gradient,) = torch.autograd.grad(loss(parameter[1:], gt, mask), parameter)
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()
    with torch.no_grad():
        assert loss(parameter[1:], gt, mask) == right
    with torch.inference_mode():
        fixed = [x.clone() for x in (gt, mask)]
        assert loss(parameter[1:], *fixed) == right
    assert torch.equal(torch.autograd.grad(loss(parameter[1:], *fixed), parameter)[0], gradient)


@pytest.mark.parametrize("mode", MODES)
def test_the_default_type_of_new_tensors_changes_nothing(mode):
    gt, sr, mask = (x.float() for x in published_pair())
    loss = Loss(1000, 1000, mask_stride=5, ssl_mode=mode)
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            results.append(loss(sr, gt, mask))
            assert edge_mask(gt).dtype == results[-1].dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
    assert results[0] == results[1] > 0


@pytest.mark.parametrize("name", ["baby", "bird", "butterfly", "head", "woman"])
def test_edge_masks_equal_the_published_ones_bit_for_bit(golden, name):
    image = golden("ssl/images_set5.npz")[name]
    published = golden("ssl/masks_laplacian.npz")
    mask = edge_mask(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    np.testing.assert_array_equal(mask[0, 0].numpy(), published[name])


def test_edge_mask_marks_the_dark_side_of_an_edge():
    image = torch.full((1, 3, 6, 8), 0.8)
    image[..., :4] = 0.2
    mask = edge_mask(image)
    assert mask.shape == (1, 1, 6, 8)
    assert mask[0, 0].nonzero()[:, 1].unique().tolist() == [3]
    # 0.2 and 0.8 are the grey levels 51 and 204: the response is their difference, and the threshold is strict.
    assert edge_mask(image, threshold=152.9).sum() == 6
    assert edge_mask(image, threshold=153).sum() == 0
    assert torch.equal(edge_mask(image[:, :1]), mask)


def test_stride_pattern_is_a_tiled_identity():
    pattern = mask_stride_pattern(4, 7, 3)[0, 0].int()
    assert ["".join(map(str, row.tolist())) for row in pattern] == ["1001001", "0100100", "0010010", "1001001"]
    assert mask_stride_pattern(5, 4, 0).sum() == 20


def test_stride_patterns_equal_the_published_ones(golden):
    published = golden("ssl/mask_stride.npz")
    for name in published.files:
        size, stride = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
        np.testing.assert_array_equal(mask_stride_pattern(size, size, stride)[0, 0].numpy(), published[name])


def test_mask_is_made_from_the_ground_truth_when_none_is_given():
    gt = torch.full((1, 3, 16, 16), 0.8)
    gt[..., :8] = 0.2
    sr = gt + 0.05 * torch.rand(gt.shape, generator=torch.Generator().manual_seed(0))
    loss = SelfSimilarityLoss(10, 10, 9, 3)
    assert loss(sr, gt) == loss(sr, gt, edge_mask(gt)) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(img=torch.rand(1, 3, 12, 40)), "12 x 40 pixels are too small"),
        (dict(mask=torch.ones(1, 1, 40, 40)), "does not fit"),
        (dict(mask=torch.ones(1, 3, 20, 40)), "must be \\(N, 1, H, W\\)"),
        (dict(mask=torch.full((1, 1, 20, 40), 255.0)), "must be of {0, 1}"),
        (dict(search=24), "must be odd"),
        (dict(search=7), "not larger than the search area"),
        (dict(img=torch.zeros(1, 3, 20, 40, dtype=torch.uint8)), "floating point"),
        (dict(mode="cuda"), "'cuda' cannot be had here: it works on CUDA GPUs, the images are on cpu"),
        (dict(mode="opencl"), "'opencl' is unknown; valid are auto, pytorch, boxsum, cpp, cuda"),
        (dict(search=25.0), "search area 25.0"),
        (dict(mask=torch.ones(1, 1, 20, 40, device="meta")), "mask is on meta, images are on cpu"),
    ],
)
def test_wrong_arguments_are_named_with_their_values(change, words):
    img = change.get("img", torch.rand(1, 3, 20, 40))
    mask = change.get("mask", torch.ones(1, 1, *img.shape[2:]))
    with pytest.raises(ValueError, match=words):
        self_similarity_graph(img, mask, change.get("search", 25), 9, ssl_mode=change.get("mode", "auto"))


NO_SIGMAS = [0, -0.004, float("nan"), float("inf"), 1e-300, 1e300, "0.004", None]
NO_WEIGHTS = [-1, -1e-9, float("nan"), float("inf"), 1e308, "1e3", None]  # YAML reads 1e3, without a point, as a word
NO_STRIDES = [-1, -3, 2.5, 3.0, float("nan"), "3", None]


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigma", value) for value in NO_SIGMAS]
    + [(name, value) for name in ("l1_weight", "kl_weight") for value in NO_WEIGHTS]
    + [("mask_stride", value) for value in NO_STRIDES],
)
def test_settings_without_meaning_are_refused_by_name_and_value_at_once_and_later(name, value):
    words = f"^{name} must be .*not {re.escape(repr(value))}$"
    with pytest.raises(ValueError, match=words):
        SelfSimilarityLoss(**{"l1_weight": 1, "kl_weight": 1, name: value})
    loss = SelfSimilarityLoss(1, 1, 5, 3)
    setattr(loss, name, value)  # as a schedule would
    img = torch.rand(1, 3, 9, 9)
    with pytest.raises(ValueError, match=words):
        loss(img, img)
    if name == "sigma":
        with pytest.raises(ValueError, match=words):
            self_similarity_graph(img, torch.ones(1, 1, 9, 9), 5, 3, value)
    if name == "mask_stride":
        with pytest.raises(ValueError, match=words):
            mask_stride_pattern(9, 9, value)


def test_numbers_of_numpy_are_settings_too():
    gt, sr, mask = published_pair()
    settings = np.float32(1000), np.int64(0), np.int64(25), np.int32(9), np.float64(0.004)
    loss = SelfSimilarityLoss(*settings, mask_stride=np.int64(3))(sr, gt, mask)
    assert loss == SelfSimilarityLoss(1000, 0, mask_stride=3)(sr, gt, mask) != 0


@pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")
@pytest.mark.parametrize("wrong", [dict(sigma=0.0), dict(sigma=float("nan")), dict(l1=-1.0), dict(kl=float("inf"))])
def test_the_compiled_loss_refuses_settings_without_meaning(wrong):
    given = dict(sigma=0.1, l1=1.0, kl=1.0) | wrong
    img, mask = torch.rand(1, 3, 16, 18), torch.ones(1, 1, 16, 18)
    with pytest.raises(ValueError, match=f"not {next(iter(wrong.values())):g}"):
        torch.ops.similarity.loss(img, img, mask, 7, 3, True, given["sigma"], True, given["l1"], given["kl"], False)


@pytest.mark.parametrize(
    ("hr", "words"),
    [
        (torch.zeros(1, 3, 20, 40, dtype=torch.uint8), "torch.uint8 must have one shape, in floating point"),
        (torch.rand(1, 3, 20, 41), r"hr \(1, 3, 20, 41\) torch.float32 must have one shape"),
        (torch.rand(1, 3, 20, 40, device="meta"), "sr is on cpu, hr is on meta"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_named(hr, words):
    with pytest.raises(ValueError, match=words):
        SelfSimilarityLoss(1, 1)(torch.rand(1, 3, 20, 40), hr)


def test_edge_masks_of_integers_and_with_no_threshold_are_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\], not torch.uint8"):
        edge_mask(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="threshold must be a number, not nan"):
        edge_mask(torch.rand(1, 3, 8, 8), float("nan"))


def test_auto_says_once_what_it_took_and_why(caplog, monkeypatch):
    utils_ssl._said.clear()
    monkeypatch.setattr(utils_ssl, "_why_not", lambda *_: "ninja is missing")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            self_similarity_graph(torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16), 5, 3)
    said = [r.message for r in caplog.records if "ssl_mode auto" in r.message]
    assert said == ["self-similarity on cpu: ssl_mode auto takes boxsum (not cpp: ninja is missing)"]
    utils_ssl._said.clear()


def test_explicit_cpp_that_cannot_be_had_says_why(monkeypatch):
    monkeypatch.setattr(utils_ssl, "_why_not", lambda *_: "ninja is missing")
    with pytest.raises(ValueError, match="'cpp' cannot be had here: ninja is missing"):
        SelfSimilarityLoss(1, 1, ssl_mode="cpp")


@pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")
def test_the_compiled_operators_are_well_behaved_under_pytorch():
    sr, hr = torch.rand(2, 3, 16, 18, requires_grad=True), torch.rand(2, 3, 16, 18)
    mask = torch.rand(2, 1, 16, 18, generator=torch.Generator().manual_seed(0)) < 0.2
    pixels = (mask[:, 0] == 1).nonzero(as_tuple=True)
    torch.library.opcheck(torch.ops.similarity.distances.default, (sr, *pixels, 7, 3, True))
    torch.library.opcheck(torch.ops.similarity.loss.default, (sr, hr, mask, 7, 3, True, 0.1, True, 1.0, 1.0, True))
    graph = self_similarity_graph(sr, mask, 7, 3, 0.1, ssl_mode="cpp")
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(graph.sum(), sr, create_graph=True)
    loss = torch.ops.similarity.loss(sr, hr.requires_grad_(), mask, 7, 3, True, 0.1, True, 1.0, 1.0, True)
    with pytest.raises(RuntimeError, match="no gradient with respect to hr"):
        loss[0].backward()
    loss = SelfSimilarityLoss(1, 1, 7, 3, 0.1, ssl_mode="cpp")(sr, hr, mask)
    with pytest.raises(RuntimeError, match="second derivatives"):  # else it would be missing in the sum, silently
        torch.autograd.grad(loss + sr.square().sum(), sr, create_graph=True)


@pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")
def test_torch_compile_takes_the_loss_whole_and_changes_no_bit():
    loss = SelfSimilarityLoss(1000, 1000, 7, 3, 0.1)
    results = []
    for module in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        sr, hr = (torch.rand(2, 3, 16, 18, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        value = module(sr.requires_grad_(), hr)
        results.append((value.item(), torch.autograd.grad(value, sr)[0]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")
def test_threads_change_no_bit_of_the_compiled_loss():
    gt, sr, mask = (x.float().repeat(1, 1, 3, 3) for x in published_pair())
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        x = sr.clone().requires_grad_()
        loss = SelfSimilarityLoss(1000, 1000, ssl_mode="cpp")(x, gt, mask)
        results.append((loss.item(), torch.autograd.grad(loss, x)[0]))
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(img=torch.rand(3, 16, 18)), "not of 3 dimensions"),
        (dict(img=torch.rand(1, 3, 16, 18).half()), "float32 or float64"),
        (dict(img=torch.rand(1, 3, 16, 3)), "16 x 3 pixels are too small"),
        (dict(search=6), "search area 6"),
        (dict(window=9), "window 9"),
        (dict(row=torch.tensor([16])), "row 16"),
        (dict(row=torch.tensor([1, 2])), "2 rows"),
        (dict(row=torch.tensor([1.0])), "int64"),
        (dict(row=torch.tensor([1], dtype=torch.int32)), "int64 vectors on cpu, not Int"),
    ],
)
def test_the_compiled_operators_check_what_they_are_given(arguments, words):
    one = torch.tensor([0])
    img, row = arguments.get("img", torch.rand(1, 3, 16, 18)), arguments.get("row", one)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.similarity.distances(img, one, row, one, arguments.get("search", 7), arguments.get("window", 3), True)


@pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")
@pytest.mark.parametrize("shape", [(7, 7, 1), (1, 49), (1, 7, 9)])
def test_a_gradient_of_another_shape_is_refused(shape):
    one = torch.tensor([0])
    with pytest.raises(RuntimeError, match=r"Float on cpu must be \[1, 7, 7\] Float"):
        torch.ops.similarity.distances_backward(torch.rand(shape), torch.rand(1, 3, 9, 9), one, one, one, 7, 3, True)


@pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(hr=torch.rand(1, 3, 16, 19)), RuntimeError, r"hr \[1, 3, 16, 19\] Float on cpu must be alike"),
        (dict(hr=torch.rand(1, 3, 16, 18).double()), RuntimeError, "Double on cpu must be alike"),
        (dict(mask=torch.ones(1, 3, 16, 18)), RuntimeError, r"mask \[1, 3, 16, 18\]"),
        (dict(mask=torch.full((1, 1, 16, 18), 255.0)), ValueError, "must be of {0, 1}"),
    ],
)
def test_the_compiled_loss_checks_what_it_is_given(arguments, error, words):
    hr, mask = arguments.get("hr", torch.rand(1, 3, 16, 18)), arguments.get("mask", torch.ones(1, 1, 16, 18))
    with pytest.raises(error, match=words):
        torch.ops.similarity.loss(torch.rand(1, 3, 16, 18), hr, mask, 7, 3, True, 0.1, True, 1.0, 1.0, False)


def test_a_broken_compiler_is_named_and_the_loss_still_computed(tmp_path):
    script = (
        "import logging, torch; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from utils.utils_ssl import SelfSimilarityLoss\n"
        "torch.manual_seed(0); a, b = torch.rand(2, 1, 3, 16, 18)\n"
        "print(SelfSimilarityLoss(1, 1, 7, 3, 0.1)(a, b, torch.ones(1, 1, 16, 18)).item())\n"
        "SelfSimilarityLoss(1, 1, ssl_mode='cpp')"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "auto takes boxsum (not cpp:" in done.stderr
    assert "compiler none" in done.stderr
    assert str(tmp_path) in done.stderr  # the cache folder
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 3, 16, 18)
    expected = SelfSimilarityLoss(1, 1, 7, 3, 0.1, ssl_mode="boxsum")(a, b, torch.ones(1, 1, 16, 18)).item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)  # float32 with other numbers of threads
    assert "ValueError: ssl_mode 'cpp' cannot be had here" in done.stderr


def test_two_processes_that_start_at_once_build_the_op_once(tmp_path):
    if WHY_NO_CPP is not None:
        pytest.skip(f"no C++ kernels: {WHY_NO_CPP}")
    script = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "import similarity_cuda, torch; similarity_cuda.load('cpp')\n"
        "one = torch.tensor([4]); img = torch.arange(81.0).reshape(1, 1, 9, 9)\n"
        "print(torch.ops.similarity.distances(img, one * 0, one, one, 3, 1, True).flatten().tolist())"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=600) for process in processes]
    for out, err in ends:
        assert out.strip() == "[100.0, 81.0, 64.0, 1.0, 0.0, 1.0, 64.0, 81.0, 100.0]", err
    assert sum(err.count("building") for _, err in ends) == 1


def test_nan_in_the_output_gives_a_nan_loss_in_every_form():
    gt, sr, mask = published_pair()
    sr[0, 0, 12, 12] = float("nan")
    for mode in ["pytorch", "boxsum"] + ([] if WHY_NO_CPP else ["cpp"]) + ([] if WHY_NO_CUDA else ["cuda"]):
        assert Loss(1, 1, ssl_mode=mode)(sr, gt, mask).isnan()
        assert Loss(1, 1, ssl_mode=mode)(sr.float(), gt.float(), mask).isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("mode", ["pytorch", "boxsum"])
def test_gpu_gives_the_values_and_gradients_of_the_cpu(mode):
    gt, sr, mask = published_pair()
    results = []
    for device in ("cpu", "cuda"):
        x = sr.to(device).requires_grad_()
        loss = SelfSimilarityLoss(1000, 1000, ssl_mode=mode)(x, gt.to(device), mask.to(device))
        results.append((loss.item(), torch.autograd.grad(loss, x)[0].cpu()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)  # float64 in another order
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-13)


@pytest.mark.skipif(WHY_NO_CUDA is not None, reason=f"no CUDA kernels: {WHY_NO_CUDA}")
def test_the_op_on_a_gpu_is_well_behaved_under_pytorch_and_deterministic():
    sr, hr = torch.rand(3, 3, 40, 150, device="cuda", requires_grad=True), torch.rand(3, 3, 40, 150, device="cuda")
    mask = torch.rand(3, 1, 40, 150, device="cuda") < 0.2
    pixels = (mask[:, 0] == 1).nonzero(as_tuple=True)
    torch.library.opcheck(torch.ops.similarity.distances.default, (sr, *pixels, 7, 3, True))
    arguments = (sr, hr, mask, 25, 9, True, 0.1, True, 1.0, 1.0, True)
    torch.library.opcheck(torch.ops.similarity.loss.default, arguments)
    torch.use_deterministic_algorithms(True)
    try:
        one, other = (torch.ops.similarity.loss(*arguments) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
