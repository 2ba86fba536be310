"""The GPU kernels: their own source, run on the CPU over small sizes, and compiled for every architecture by nvcc."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from similarity_cuda import loader
from tests.conftest import REPOSITORY
from tests.cuda_on_cpu import build
from utils.utils_ssl import SelfSimilarityLoss, _distances_specification

SOURCE = r"""
#include "cuda_on_cpu.h"
CUDA_ON_CPU_SHARED_MEMORY(shared_memory)
#include "similarity_cuda/kernels.cuh"

using cuda_on_cpu::launch;
using namespace similarity;

Geometry geometry(const int64_t* g) { return {g[0], g[1], g[2], g[3], g[4], g[5], g[4] / 2, g[5] / 2, g[6] != 0}; }
int64_t over(int64_t size, int64_t by) { return (size + by - 1) / by; }

void clips(const int64_t* g, int64_t* to) { *to = geometry(g).clips(); }
CUDA_ON_CPU_EXPORT(clips)

void index(const int64_t* g, const int64_t* image, const int64_t* row, const int64_t* column, int64_t count, int* to) {
  launch<fill_index>(over(count, 32), 32, 0, to, Places{image, row, column}, count, geometry(g));
}
CUDA_ON_CPU_EXPORT(index)

Chunk chunk_of(const int64_t* chunk) { return {chunk[0], chunk[1], chunk[2], chunk[3]}; }

template <typename T>
void sums(const int64_t* of, const int64_t* chunk, const T* padded, const int* index, int64_t height, int64_t width,
          T* to) {
  const Geometry g = geometry(of);
  const Tiling t{g.height, g.width, height, width};
  const auto layout = Layout<T>::distances(g, t);
  const Map map{index, chunk_of(chunk), int(g.height), int(g.width)};
  const dim3 grid(map.chunk.images * t.of_image(), g.r + 1);
  const int64_t threads = over(layout.columns, 32) * 32;
  if (g.c == 3)
    launch<distance_sums<T, 3>>(grid, threads, layout.bytes(), padded, map, g, t, to);
  else if (g.c == 1)
    launch<distance_sums<T, 1>>(grid, threads, layout.bytes(), padded, map, g, t, to);
  else
    launch<distance_sums<T, 0>>(grid, threads, layout.bytes(), padded, map, g, t, to);
}

template <typename T>
void energies(const int64_t* of, const int64_t* chunk, const T* padded, const int64_t* image, const int64_t* row,
              const int64_t* column, T* to) {
  const Geometry g = geometry(of);
  launch<outside_energies<T>>(dim3(over(chunk[1], 32), g.clips()), 32, 0, padded, Places{image, row, column},
                              chunk_of(chunk), g, to);
}

template <typename T>
void distances(const int64_t* of, const int64_t* chunk, const T* sums, const T* energies, double scale, T* to) {
  const Geometry g = geometry(of);
  launch<finish<T>>(dim3(over(chunk[1], 32), g.k), 32, 0, sums, energies, g, chunk_of(chunk), T(scale), to);
}

template <typename T>
void compared(const int64_t* of, const int64_t* chunk, T* sums_x, const T* energies_x, const T* sums_t,
              const T* energies_t, double scale, double l1_flow, double kl_flow, int64_t generalization,
              double* totals) {
  const Geometry g = geometry(of);
  launch<compare<T>>(over(chunk[1], kLanes), dim3(kLanes, kWarps), 0, sums_x, energies_x, sums_t, energies_t, g,
                     chunk_of(chunk), Terms<T>{T(scale), T(l1_flow), T(kl_flow), generalization != 0}, totals);
}

template <typename T>
void add_gradient(const int64_t* of, const int64_t* chunk, const T* padded, const T* grads, const int* index,
                  int64_t height, int64_t width, int64_t groups, T* by_clip, T* total) {
  const Geometry g = geometry(of);
  const Tiling t{g.height + 2 * g.reach(), g.stride(), height, width};
  const int64_t threads = over(kParts * (t.width + g.apart() + g.w - 1), 32) * 32;
  const int64_t bytes = Layout<T>::gradients(g, t, threads).bytes();
  const Map map{index, chunk_of(chunk), int(g.height), int(g.width)};
  const int64_t tiles = map.chunk.images * t.of_image();
  if (g.c == 3)
    launch<gradient<T, 3>>(dim3(tiles, groups), threads, bytes, padded, grads, map, g, t, total);
  else
    launch<gradient<T, 1>>(dim3(tiles, groups, g.c), threads, bytes, padded, grads, map, g, t, total);
  if (g.clips() == 1) return;
  launch<clip_sums<T>>(dim3(over(map.chunk.count, 32), g.clips()), 32, 0, grads, g, map.chunk, by_clip);
  const int64_t positions = map.chunk.images * (g.height + 2 * g.f) * (g.width + 2 * g.f);
  launch<outside_gradient<T>>(over(positions, 32), 32, 0, padded, static_cast<const T*>(by_clip), map, g, total);
}

template <typename T>
void folded(const int64_t* of, const int64_t* chunk, const T* total, int64_t groups, T* to) {
  const Geometry g = geometry(of);
  launch<fold<T>>(over(chunk[3] * g.c * g.height * g.width, 32), 32, 0, total, g, chunk_of(chunk), int(groups), to);
}

#define BOTH(name) \
  constexpr auto name##_f4 = name<float>; \
  constexpr auto name##_f8 = name<double>;                          \
  CUDA_ON_CPU_EXPORT(name##_f4) CUDA_ON_CPU_EXPORT(name##_f8)
BOTH(sums)
BOTH(energies)
BOTH(distances)
BOTH(compared)
BOTH(add_gradient)
BOTH(folded)
"""

Driver = Callable[..., None]
Array = np.ndarray


class Op:
    """The op of cuda.cpp, step by step, with tiles, chunks and groups small enough to have several of each."""

    def __init__(
        self, driver: Driver, img: Array, mask: Array, search: int, window: int, border: str, cut: int
    ) -> None:
        self.driver, self.border, self.cut = driver, border, cut
        self.g = np.array([*img.shape, search, window, border == "zero"], dtype=np.int64)
        self.places = [x.astype(np.int64) for x in np.nonzero(mask[:, 0] == 1)]
        self.count = len(self.places[0])
        self.index = np.full((len(img), *img.shape[2:]), -1, dtype=np.int32)
        driver("index", self.g, *self.places, self.count, self.index)
        clips = np.zeros(1, dtype=np.int64)
        driver("clips", self.g, clips)
        self.clips = int(clips[0])
        self.shape = img.shape
        self.area = search**2
        self.scale = 1 / (img.shape[1] * window**2)

    def pad(self, img: Array) -> Array:
        r = self.g[4] // 2 + (0 if self.border == "zero" else self.g[5] // 2)
        padded = np.pad(img, ((0, 0), (0, 0), (r, r), (r, r)), mode="reflect").transpose(0, 2, 3, 1)
        if img.shape[1] == 3:
            padded = np.pad(padded, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=np.nan)  # never to be used
        return np.ascontiguousarray(padded)

    def run(self, name: str, chunk: Array, *arguments: Any, dtype: np.dtype) -> None:
        self.driver(f"{name}_{np.dtype(dtype).str[1:]}", self.g, chunk, *arguments)

    def chunks(self) -> list[Array]:
        """(first pixel, pixels, first image, images) of each."""
        size = -(-self.count // self.cut)
        chunks = []
        for first in range(0, self.count, size):
            images = self.places[0][first : first + size]
            chunks.append(np.array([first, len(images), images[0], images[-1] - images[0] + 1]))
        return chunks

    def sums(self, padded: Array, chunk: Array) -> tuple[Array, Array]:
        sums = np.full((self.area, chunk[1]), np.nan, dtype=padded.dtype)  # NaN shows what is not written
        sums[self.area // 2] = 0
        tile = -(-self.shape[2] // self.cut), -(-self.shape[3] // self.cut)
        self.run("sums", chunk, padded, self.index, *tile, sums, dtype=padded.dtype)
        energies = np.full((self.clips**2, chunk[1]), np.nan, dtype=padded.dtype)
        if self.clips > 1:
            self.run("energies", chunk, padded, *self.places, energies, dtype=padded.dtype)
        return sums, energies

    def distances(self, img: Array) -> Array:
        padded, result = self.pad(img), np.full((self.count, self.area), np.nan, dtype=img.dtype)
        for chunk in self.chunks():
            self.run("distances", chunk, *self.sums(padded, chunk), self.scale, result, dtype=img.dtype)
        return result

    def gradient(self, img: Array, grads: list[Array]) -> Array:
        """grads: with respect to the sums, (k^2, pixels), one for each chunk."""
        padded = self.pad(img)
        groups = min(2, self.g[4] // 2 + 1)
        tile = min(14, -(-padded.shape[1] // self.cut)), -(-padded.shape[2] // self.cut)
        result = np.zeros_like(img)
        for chunk, grad in zip(self.chunks(), grads, strict=True):
            total = np.zeros((groups, chunk[3], img.shape[1], *padded.shape[1:3]), dtype=img.dtype)
            by_clip = np.full((self.clips * self.g[5], chunk[1]), np.nan, dtype=img.dtype)
            arguments = (padded, np.ascontiguousarray(grad), self.index, *tile, groups, by_clip, total)
            self.run("add_gradient", chunk, *arguments, dtype=img.dtype)
            self.run("folded", chunk, total, groups, result, dtype=img.dtype)
        return result

    def loss(
        self, sr: Array, hr: Array, sigma: float, generalization: bool, l1: float, kl: float
    ) -> tuple[Array, Array]:
        padded_sr, padded_hr = self.pad(sr), self.pad(hr)
        scale, entries = -self.scale / sigma, self.count * self.area
        totals, flows = np.zeros(2), []
        for chunk in self.chunks():
            graphs = *self.sums(padded_sr, chunk), *self.sums(padded_hr, chunk)
            blocks = np.full((-(-chunk[1] // 32), 2), np.nan)
            flow = l1 / entries * scale, kl / entries * scale
            self.run("compared", chunk, *graphs, scale, *flow, int(generalization), blocks, dtype=sr.dtype)
            totals += blocks.sum(0)
            flows.append(graphs[0])
        return totals / entries, self.gradient(sr, flows)


@pytest.fixture(scope="module")
def driver() -> Driver:
    return build(SOURCE)


def example(
    shape: tuple[int, ...], density: float, dtype: type = np.float64, seed: int = 0
) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    c, y, x = np.mgrid[: shape[1], : shape[2], : shape[3]]
    hr = 0.5 + 0.25 * np.sin(0.3 * y + 0.2 * x + c) + 0.02 * rng.standard_normal(shape)
    sr = hr + 0.02 * rng.standard_normal(shape)
    mask = (rng.random((shape[0], 1, *shape[2:])) < density).astype(np.float64)
    mask[0, 0, 0, 0] = mask[-1, 0, -1, -1] = 1
    if len(mask) > 2:
        mask[1] = 0  # an image without edges between two with
    return sr.astype(dtype), hr.astype(dtype), mask


def specification(img: Array, mask: Array, search: int, window: int, border: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.from_numpy(img.astype(np.float64)).requires_grad_()
    pixels = (torch.from_numpy(mask)[:, 0] == 1).nonzero(as_tuple=True)
    return _distances_specification(x, pixels, search, window, border == "zero"), x


CASES = [
    # shape, search, window, density, cut
    ((1, 3, 12, 14), 5, 3, 0.3, 1),
    ((3, 3, 12, 14), 5, 3, 0.3, 3),
    ((2, 1, 13, 9), 7, 7, 0.2, 2),
    ((2, 2, 9, 13), 7, 5, 1.0, 2),
    ((1, 3, 8, 7), 3, 1, 1.0, 2),
    ((1, 1, 3, 5), 1, 1, 0.5, 1),
    ((1, 3, 17, 19), 13, 11, 0.1, 2),
]


@pytest.mark.parametrize("border", ["zero", "image"])
@pytest.mark.parametrize(("shape", "search", "window", "density", "cut"), CASES)
def test_kernels_compute_the_specified_distances_and_gradients(driver, shape, search, window, density, cut, border):
    img, _, mask = example(shape, density)
    op = Op(driver, img, mask, search, window, border, cut)
    expected, x = specification(img, mask, search, window, border)
    # Float64 sums in another order.
    np.testing.assert_allclose(op.distances(img), expected.detach().flatten(1).numpy(), rtol=1e-12, atol=1e-15)
    upstream = np.random.default_rng(1).standard_normal((op.count, op.area))
    grads = [(upstream[first : first + count] * op.scale).T for first, count, *_ in op.chunks()]
    gradient = torch.autograd.grad(expected, x, torch.from_numpy(upstream).reshape(expected.shape))[0].numpy()
    np.testing.assert_allclose(op.gradient(img, grads), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("generalization", [True, False])
@pytest.mark.parametrize("sigma", [0.004, 0.1])
def test_kernels_compute_the_specified_loss_and_gradient(driver, sigma, generalization):
    sr, hr, mask = example((3, 3, 12, 14), 0.3)
    totals, gradient = Op(driver, sr, mask, 7, 5, "zero", 2).loss(sr, hr, sigma, generalization, 300, 700)
    loss = SelfSimilarityLoss(300, 700, 7, 5, sigma, generalization, ssl_mode="pytorch")
    x = torch.from_numpy(sr).requires_grad_()
    total, l1, kl = loss.parts(x, torch.from_numpy(hr), torch.from_numpy(mask))
    np.testing.assert_allclose(totals * (300, 700), [l1.item(), kl.item()], rtol=1e-9)  # float64 in another order
    np.testing.assert_allclose(gradient, torch.autograd.grad(total, x)[0].numpy(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("border", ["zero", "image"])
def test_kernels_in_single_precision_keep_published_windows_in_registers(driver, border):
    sr, hr, mask = example((1, 3, 21, 19), 0.05, np.float32)
    op = Op(driver, sr, mask, 25, 9, border, 2)
    expected, x = specification(sr, mask, 25, 9, border)
    # Float32 sums of 243 squares.
    np.testing.assert_allclose(op.distances(sr), expected.detach().flatten(1).numpy(), rtol=2e-6, atol=1e-8)
    totals, gradient = op.loss(sr, hr, 0.1, True, 1000, 1000)
    loss = SelfSimilarityLoss(1000, 1000, 25, 9, 0.1, ssl_mode="pytorch", search_border=border)
    total, l1, kl = loss.parts(x, torch.from_numpy(hr).double(), torch.from_numpy(mask))
    # KL is what is left of terms of both signs, a hundred times as large.
    np.testing.assert_allclose(totals * 1000, [l1.item(), kl.item()], rtol=1e-5, atol=1e-7)
    expected_gradient = torch.autograd.grad(total, x)[0].numpy()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=2e-6 * np.abs(expected_gradient).max())


def test_graphs_of_any_size_are_compared_and_scaled(driver):
    rng, k, count, scale, flow = np.random.default_rng(0), 259, 3, -0.5, 0.25
    sums_x, sums_t = rng.random((k * k, count)), rng.random((k * k, count))
    g, chunk = np.array([1, 1, 200, 200, k, 1, 0]), np.array([0, count, 0, 1])
    nothing, result, totals = np.zeros((1, 0)), np.full((count, k * k), np.nan), np.full((1, 2), np.nan)
    driver("distances_f8", g, chunk, sums_x, nothing, 2, result)
    assert np.array_equal(result, 2 * sums_x.T)
    flows = sums_x.copy()
    driver("compared_f8", g, chunk, flows, nothing, sums_t, nothing, scale, flow, flow, 0, totals)
    x, t = np.exp(scale * sums_x), np.exp(scale * sums_t)
    # Float64 sums of 201,243 terms in another order.
    np.testing.assert_allclose(totals[0], [np.abs(x - t).sum(), (t * scale * (sums_t - sums_x)).sum()], rtol=1e-10)
    np.testing.assert_allclose(flows, flow * (np.sign(x - t) * x - t), rtol=1e-12, atol=1e-15)


def test_the_order_of_threads_changes_no_bit(driver):
    sr, hr, mask = example((2, 3, 12, 14), 0.3, np.float32)
    results = []
    for seed in (1, 2):

        def scrambled(*arguments: Any, seed: int = seed) -> None:
            driver(*arguments, seed=seed)

        results.append(Op(scrambled, sr, mask, 5, 3, "zero", 2).loss(sr, hr, 0.1, True, 1, 1))
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(("border", "dtype"), [("zero", np.float32), ("image", np.float64)])
def test_kernels_stay_within_their_memory(border, dtype):
    sanitized = build(SOURCE, sanitize=True)
    for (shape, search, window, cut), density in itertools.product(
        [((2, 3, 12, 11), 7, 5, 2), ((1, 1, 14, 9), 5, 3, 3)], [0.2, 1.0]
    ):
        sr, hr, mask = example(shape, density, dtype)
        _, gradient = Op(sanitized, sr, mask, search, window, border, cut).loss(sr, hr, 0.1, True, 1, 1)
        assert np.isfinite(gradient).all()


@pytest.mark.skipif(loader._toolkit() is None, reason="no CUDA toolkit")
@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA")
def test_the_op_compiles_for_every_supported_architecture_and_links_with_pytorch():
    script = (
        "import torch; from similarity_cuda import loader; torch.ops.load_library(loader.build('cuda'))\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('similarity::loss', 'CUDA'))"
    )
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "7.5;8.0;8.6;8.9;9.0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.skipif(loader._toolkit() is None, reason="no CUDA toolkit")
@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA")
def test_the_benchmarks_published_kernel_compiles():
    """It runs on a GPU only, which may be rented by the minute: there is no time for a typing error then."""
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0", "PYTHONPATH": str(REPOSITORY / "benchmarks")}
    done = subprocess.run(
        [sys.executable, "-c", "import bench_ssl; bench_ssl.load_naive()"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
