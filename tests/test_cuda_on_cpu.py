"""The shim that runs CUDA kernels on the CPU: right kernels give right numbers, wrong ones are noticed."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.cuda_on_cpu import KernelError, build

Driver = Callable[..., None]

SOURCE = r"""
#include "cuda_on_cpu.h"

using cuda_on_cpu::launch;

namespace {

CUDA_ON_CPU_SHARED_MEMORY(shared_memory)

// Sums of blockDim.x numbers each.
template <bool barriers>
__global__ void __launch_bounds__(1024) tree(const float* __restrict__ x, float* __restrict__ sums) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* part = reinterpret_cast<float*>(shared_memory);
  part[threadIdx.x] = __ldg(x + blockIdx.x * blockDim.x + threadIdx.x);
#pragma unroll 1
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (barriers) __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
}

// Hands each number on to the thread before, `rounds` times. The second barrier keeps a number until it has been read.
template <bool second_barrier>
__global__ void rotate(float* x, int rounds) {
  __shared__ float all[128];
  float mine = x[threadIdx.x];
  for (int i = 0; i < rounds; ++i) {
    all[threadIdx.x] = mine;
    __syncthreads();
    mine = all[(threadIdx.x + 1) % blockDim.x];
    if (second_barrier) __syncthreads();
  }
  x[threadIdx.x] = mine;
}

template <bool sync>
__global__ void swap_neighbours(float* x) {
  __shared__ float all[32];
  all[threadIdx.x] = x[threadIdx.x];
  if (sync) __syncwarp();
  x[threadIdx.x] = all[threadIdx.x ^ 1];
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(0xffffffff, value, delta);
  return value;
}

template <typename T>
__global__ void shuffled(const T* x, T* sum) {
  __shared__ T part[32];
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  const T of_warp = warp_sum(x[threadIdx.x]);
  if (lane == 0) part[warp] = of_warp;
  __syncthreads();
  if (warp != 0) return;
  const T of_block = warp_sum(lane < int(blockDim.x) / warpSize ? part[lane] : T(0));
  if (lane == 0) *sum = of_block;
}

__global__ void shuffles(const int* x, int* out, int width) {
  const int value = x[threadIdx.x], lane = threadIdx.x % 32;
  const unsigned all = 0xffffffff;
  int* row = out + threadIdx.x;
  row[0 * blockDim.x] = __shfl_sync(all, value, lane * 7, width);
  row[1 * blockDim.x] = __shfl_up_sync(all, value, 3, width);
  row[2 * blockDim.x] = __shfl_down_sync(all, value, 3, width);
  row[3 * blockDim.x] = __shfl_xor_sync(all, value, 5, width);
}

// The halves of a warp go their own ways: 10 steps round for one, 21 for the other.
__global__ void halves(int* x, unsigned* ballots) {
  const int lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffff : 0xffff0000;
  int value = x[threadIdx.x];
  for (int i = 0; i < (lane < 16 ? 10 : 21); ++i) value = __shfl_sync(mask, value, lane + 1, 16);
  x[threadIdx.x] = value;
  ballots[threadIdx.x] = __ballot_sync(mask, lane % 3 == 0);
}

__global__ void votes(const int* yes, int* out) {
  const int mine = yes[threadIdx.x];
  int* row = out + 6 * threadIdx.x;
  row[0] = __syncthreads_count(mine);
  row[1] = __syncthreads_or(mine);
  row[2] = __syncthreads_and(mine);
  row[3] = __any_sync(0xffffffff, mine);
  row[4] = __all_sync(0xffffffff, mine);
  row[5] = __ffs(__ballot_sync(0xffffffff, mine)) + 100 * __popc(__ballot_sync(0xffffffff, mine));
}

__global__ void outside_of_the_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffff, 1.f, 8);
}

__global__ void counts(const int* x, int* i, unsigned* u, float* f, double* d, int* largest, int* smallest) {
  const int bin = x[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(i + bin, 1);
  atomicAdd(u + bin, 2);
  atomicAdd(f + bin, 0.5f);
  atomicAdd(d + bin, 0.25);
  atomicMax(largest, bin);
  atomicMin(smallest, bin);
}

__global__ void positions(int* out) {
  const dim3 all(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z);
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned y = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned z = blockIdx.z * blockDim.z + threadIdx.z;
  out[(z * all.y + y) * all.x + x] += 10000 * (z + 1) + 100 * y + x;
}

__global__ void functions(const float* x, float* out) {
  const float4 v = make_float4(x[0], x[1], x[2], x[3]);
  const float2 w = make_float2(v.x, v.y);
  const float results[] = {min(w.x, w.y), max(w.x, 1), max(NAN, v.z), expf(v.x), logf(v.y), exp(v.x), log(v.y),
                           fmaf(v.x, v.y, v.z), rsqrtf(v.w)};
  for (int i = 0; i < 9; ++i) out[i] = results[i];
  out[9] = min(-3, 2) + max(5u, 7u);
}

// Each block shows what it finds in shared memory, then writes to it.
__global__ void uninitialised(float* out, int* integers) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  __shared__ float fixed[4];
  __shared__ int integer;
  float* dynamic = reinterpret_cast<float*>(shared_memory);
  out[2 * blockIdx.x] = fixed[3];
  out[2 * blockIdx.x + 1] = dynamic[15];
  integers[blockIdx.x] = integer;
  fixed[3] = dynamic[15] = integer = 0;
}

__global__ void the_last(int* block, int* thread) {
  *block = blockIdx.x;
  *thread = threadIdx.x;
}

__global__ void ends_early() {
  if (threadIdx.x >= 48) return;
  __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void misses_shuffle(int* out) {
  if (threadIdx.x != 35) *out = __shfl_sync(0xffffffff, 1, 0);
}
__global__ void other_operation(int* out) {
  *out = threadIdx.x < 40 ? __any_sync(0xffffffff, 1) : __all_sync(0xffffffff, 1);
}
__global__ void other_mask(int* out) { *out = __any_sync(threadIdx.x < 8 ? 0xffffffff : 0xfffffffe, 1); }
__global__ void not_in_the_mask() { __syncwarp(0x7fffffff); }
__global__ void throws() {
  if (threadIdx.x == 5) throw std::runtime_error("five");
  __syncthreads();
}

template <typename T>
__global__ void write_global(T* x, int i) {
  if (threadIdx.x == 7) x[i] = T();
}
__global__ void write_dynamic(int i) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  if (threadIdx.x == 7) reinterpret_cast<float*>(shared_memory)[i] = 1;
}
__global__ void write_fixed(int i) {
  __shared__ float fixed[16];
  if (threadIdx.x == 7) fixed[i] = 1;
}
__global__ void deep(int* out) {
  volatile char much[20000];
  for (int i = 0; i < 20000; ++i) much[i] = char(i);
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < 20000; ++i) sum += much[i] == char(i);
  atomicAdd(out, sum);
}

void sums(const float* x, float* out, int blocks, int threads, bool barriers) {
  (barriers ? launch<tree<true>, const float*, float*> : launch<tree<false>, const float*, float*>)(
      blocks, threads, threads * sizeof(float), x, out);
}
void rotation(float* x, int rounds, bool second) {
  if (second) launch<rotate<true>>(1, 128, 0, x, rounds);
  else launch<rotate<false>>(1, 128, 0, x, rounds);
}
void swap(float* x, bool sync) {
  if (sync) launch<swap_neighbours<true>>(1, 32, 0, x);
  else launch<swap_neighbours<false>>(1, 32, 0, x);
}
void shuffle_float(const float* x, float* sum, int threads) { launch<shuffled<float>>(1, threads, 0, x, sum); }
void shuffle_double(const double* x, double* sum, int threads) { launch<shuffled<double>>(1, threads, 0, x, sum); }
void shuffle_kinds(const int* x, int* out, int width) { launch<shuffles>(1, 64, 0, x, out, width); }
void shuffle_halves(int* x, unsigned* ballots) { launch<halves>(1, 64, 0, x, ballots); }
void shuffle_outside(float* out) { launch<outside_of_the_mask>(1, 32, 0, out); }
void vote(const int* yes, int* out) { launch<votes>(1, 64, 0, yes, out); }
void count(const int* x, int blocks, int* i, unsigned* u, float* f, double* d, int* largest, int* smallest) {
  launch<counts>(blocks, 64, 0, x, i, u, f, d, largest, smallest);
}
void position(int* out) { launch<positions>(dim3(3, 2, 2), dim3(4, 5, 6), 0, out); }
void math(const float* x, float* out) { launch<functions>(1, 1, 0, x, out); }
void garbage(float* out, int* integers, int blocks) { launch<uninitialised>(blocks, 1, 64, out, integers); }
void last(int* block, int* thread) { launch<the_last>(8, 64, 0, block, thread); }
void sized(int gx, int gy, int gz, int bx, int by, int bz, int64_t bytes) {
  launch<ends_early>(dim3(gx, gy, gz), dim3(bx, by, bz), bytes);
}
void ending(int threads) { launch<ends_early>(1, threads, 0); }
void barriers() { launch<two_barriers>(1, 64, 0); }
void missing(int* out, int threads) { launch<misses_shuffle>(1, threads, 0, out); }
void mixed(int* out) { launch<other_operation>(1, 64, 0, out); }
void masks(int* out) { launch<other_mask>(1, 32, 0, out); }
void unmasked() { launch<not_in_the_mask>(1, 32, 0); }
void throwing() { launch<throws>(2, 32, 0); }
void global_float(float* x, int i) { launch<write_global<float>>(1, 32, 0, x, i); }
void global_float4(float* x, int i) { launch<write_global<float4>>(1, 32, 0, reinterpret_cast<float4*>(x + i), 0); }
void dynamic_shared(int bytes, int i) { launch<write_dynamic>(1, 32, bytes, i); }
void fixed_shared(int i) { launch<write_fixed>(1, 32, 0, i); }
void stacks(int* out) { launch<deep>(2, 1024, 0, out); }

CUDA_ON_CPU_EXPORT(sums)
CUDA_ON_CPU_EXPORT(rotation)
CUDA_ON_CPU_EXPORT(swap)
CUDA_ON_CPU_EXPORT(shuffle_float)
CUDA_ON_CPU_EXPORT(shuffle_double)
CUDA_ON_CPU_EXPORT(shuffle_kinds)
CUDA_ON_CPU_EXPORT(shuffle_halves)
CUDA_ON_CPU_EXPORT(shuffle_outside)
CUDA_ON_CPU_EXPORT(vote)
CUDA_ON_CPU_EXPORT(count)
CUDA_ON_CPU_EXPORT(position)
CUDA_ON_CPU_EXPORT(math)
CUDA_ON_CPU_EXPORT(garbage)
CUDA_ON_CPU_EXPORT(last)
CUDA_ON_CPU_EXPORT(sized)
CUDA_ON_CPU_EXPORT(ending)
CUDA_ON_CPU_EXPORT(barriers)
CUDA_ON_CPU_EXPORT(missing)
CUDA_ON_CPU_EXPORT(mixed)
CUDA_ON_CPU_EXPORT(masks)
CUDA_ON_CPU_EXPORT(unmasked)
CUDA_ON_CPU_EXPORT(throwing)
CUDA_ON_CPU_EXPORT(global_float)
CUDA_ON_CPU_EXPORT(global_float4)
CUDA_ON_CPU_EXPORT(dynamic_shared)
CUDA_ON_CPU_EXPORT(fixed_shared)
CUDA_ON_CPU_EXPORT(stacks)

}  // namespace
"""

SEEDS = range(8)


@pytest.fixture(scope="module")
def library() -> Driver:
    return build(SOURCE)


@pytest.fixture(scope="module")
def program() -> Driver:
    return build(SOURCE, sanitize=True)


@pytest.fixture(params=["library", "program"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return request.getfixturevalue(request.param)


def _tree_sums(driver: Driver, barriers: bool, seed: int) -> bool:
    """Whether the sums of 3 blocks of 256 numbers are right; whole numbers, so in any order without rounding."""
    x = np.random.default_rng(0).integers(0, 100, (3, 256)).astype(np.float32)
    sums = np.zeros(3, np.float32)
    driver("sums", x, sums, 3, 256, barriers, seed=seed)
    return bool((sums == x.sum(1)).all())


def test_a_sum_with_barriers_is_right_in_any_order(driver: Driver) -> None:
    assert all(_tree_sums(driver, True, seed) for seed in SEEDS)


def test_a_sum_without_barriers_is_wrong(library: Driver) -> None:
    assert not any(_tree_sums(library, False, seed) for seed in SEEDS)


@pytest.mark.parametrize("second", [True, False])
def test_a_missing_second_barrier_is_wrong_under_some_seeds(library: Driver, second: bool) -> None:
    right = []
    for seed in SEEDS:
        x = np.arange(128, dtype=np.float32)
        library("rotation", x, 5, second, seed=seed)
        right.append((x == (np.arange(128) + 5) % 128).all())
    assert all(right) == second


@pytest.mark.parametrize("sync", [True, False])
def test_a_missing_syncwarp_is_wrong_under_some_seeds(library: Driver, sync: bool) -> None:
    right = []
    for seed in SEEDS:
        x = np.arange(32, dtype=np.float32)
        library("swap", x, sync, seed=seed)
        right.append((x == np.arange(32) ^ 1).all())
    assert all(right) == sync


@pytest.mark.parametrize(("name", "kind"), [("shuffle_float", np.float32), ("shuffle_double", np.float64)])
def test_sums_by_shuffles_work_over_several_warps(driver: Driver, name: str, kind: type) -> None:
    x = np.random.default_rng(0).integers(0, 100, 192).astype(kind)
    total = np.zeros(1, kind)
    driver(name, x, total, x.size, seed=1)
    assert total[0] == x.sum()


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles_stay_in_their_segment(library: Driver, width: int) -> None:
    x = np.random.default_rng(0).integers(0, 1000, 64).astype(np.int32)
    out = np.zeros((4, 64), np.int32)
    library("shuffle_kinds", x, out, width)
    thread = np.arange(64)
    first = thread // width * width
    last = first + width - 1
    xor = thread ^ 5
    np.testing.assert_array_equal(out[0], x[first + thread % 32 * 7 % width])
    np.testing.assert_array_equal(out[1], x[np.where(thread - 3 < first, thread, thread - 3)])
    np.testing.assert_array_equal(out[2], x[np.where(thread + 3 > last, thread, thread + 3)])
    np.testing.assert_array_equal(out[3], x[np.where(xor > last, thread, xor)])


def test_parts_of_a_warp_exchange_values_on_their_own(library: Driver) -> None:
    for seed in SEEDS:
        x = np.arange(64, dtype=np.int32)
        ballots = np.zeros(64, np.uint32)
        library("shuffle_halves", x, ballots, seed=seed)
        halves = np.arange(64).reshape(2, 2, 16)
        right = np.stack([np.roll(halves[:, 0], -10, 1), np.roll(halves[:, 1], -21, 1)], 1)
        np.testing.assert_array_equal(x, right.ravel())
        every_third = sum(1 << lane for lane in range(0, 32, 3))
        masks = np.array([0xFFFF, 0xFFFF0000], np.uint32)
        np.testing.assert_array_equal(ballots, np.tile((every_third & masks).repeat(16), 2))


def test_a_shuffle_from_outside_of_its_mask_gives_nan(library: Driver) -> None:
    out = np.zeros(16, np.float32)
    library("shuffle_outside", out)
    np.testing.assert_array_equal(out, np.where(np.arange(16) < 8, 1, np.nan))


@pytest.mark.parametrize("yes", [[], [40], range(32), range(64)])
def test_votes_count_their_warp_or_their_block(library: Driver, yes: list[int]) -> None:
    votes = np.zeros(64, np.int32)
    votes[list(yes)] = 5  # any number but 0 is a yes
    out = np.zeros((64, 6), np.int32)
    library("vote", votes, out)
    assert (out[:, :3] == [len(yes), len(yes) > 0, len(yes) == 64]).all()
    for warp in (0, 32):
        mine = votes[warp : warp + 32] > 0
        first = mine.argmax() + 1 if mine.any() else 0
        assert (out[warp : warp + 32, 3:] == [mine.any(), mine.all(), first + 100 * mine.sum()]).all()


def test_atomics_add_and_compare(driver: Driver) -> None:
    x = np.random.default_rng(0).integers(1, 6, 4 * 64).astype(np.int32)
    results = [np.zeros(7, kind) for kind in (np.int32, np.uint32, np.float32, np.float64)]
    largest, smallest = np.array([3], np.int32), np.array([3], np.int32)
    driver("count", x, 4, *results, largest, smallest)
    for result, step in zip(results, (1, 2, 0.5, 0.25), strict=True):
        np.testing.assert_array_equal(result, step * np.bincount(x, minlength=7))
    assert (largest[0], smallest[0]) == (5, 1)


def test_grids_and_blocks_have_three_dimensions(library: Driver) -> None:
    out = np.zeros((12, 10, 12), np.int32)
    library("position", out)
    z, y, x = np.indices(out.shape)
    np.testing.assert_array_equal(out, 10000 * (z + 1) + 100 * y + x)


def test_functions_are_those_of_cuda(library: Driver) -> None:
    x = np.array([0.25, 3, -2, 16], np.float32)
    out = np.zeros(10, np.float32)
    library("math", x, out)
    right = [0.25, 1, -2, np.exp(0.25), np.log(3), np.exp(0.25), np.log(3), 0.25 * 3 - 2, 0.25, 4]
    np.testing.assert_allclose(out, right, rtol=3e-7)  # float32 rounds to 6e-8; exp and log may be off by some


def test_uninitialised_shared_memory_is_nan_in_each_block(driver: Driver) -> None:
    out, integers = np.zeros((5, 2), np.float32), np.zeros(5, np.int32)
    driver("garbage", out, integers, 5)
    assert np.isnan(out).all()
    assert (integers == -1).all()


def test_the_seed_changes_the_order_of_blocks_and_threads(library: Driver) -> None:
    orders = []
    for seed in [*SEEDS, *SEEDS]:
        block, thread = np.zeros(1, np.int32), np.zeros(1, np.int32)
        library("last", block, thread, seed=seed)
        orders.append((int(block[0]), int(thread[0])))
    half = len(SEEDS)
    assert orders[:half] == orders[half:]
    assert len({block for block, _ in orders}) > 2
    assert {thread // 32 for _, thread in orders} == {0, 1}
    assert len({thread % 32 for _, thread in orders}) > 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            ("ending", 64),
            "kernel .*ends_early, block .0, 0, 0.: .*threads 0-47 at __syncthr.*; threads 48-63 ended",
        ),
        (("barriers",), "threads 0-31 at __syncthreads .two_barriers, line .*threads 32-63 at __syncthreads .two_barr"),
        (
            ("missing", np.zeros(1, np.int32), 64),
            "threads 0-31 ended; threads 32-34 at __shfl_.*; thread 35 ended",
        ),
        (("missing", np.zeros(1, np.int32), 16), "threads 0-15 at __shfl_sync .mask 0xffffffff"),
        (("mixed", np.zeros(1, np.int32)), "threads 32-39 at __any_sync .*; threads 40-63 at __all_sync"),
        (
            ("masks", np.zeros(1, np.int32)),
            "threads 0-7 at .* .mask 0xffffffff, .*; threads 8-31 .*0xfffffffe",
        ),
        (("unmasked",), "thread .31, 0, 0.: __syncwarp .mask 0x7fffffff.*: the mask leaves out its caller"),
        (("throwing",), "kernel .*throws, block ... 0, 0., thread .5, 0, 0.: five"),
    ],
)
def test_threads_that_do_not_meet_are_named(driver: Driver, call: tuple, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        driver(*call)
    assert _tree_sums(driver, True, seed=0)  # the next launch is none the worse


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 1, 1025, 1, 1, 0), "1 to 1024 threads"),
        ((1, 1, 1, 32, 33, 1, 0), "1 to 1024 threads"),
        ((1, 1, 1, 1, 1, 65, 0), "64 of them along z"),
        ((1, 1, 1, 0, 1, 1, 0), "1 to 1024 threads"),
        ((0, 1, 1, 32, 1, 1, 0), "at least 1"),
        ((1, 65536, 1, 32, 1, 1, 0), "65535"),
        ((1, 1, 1, 32, 1, 1, 232449), "232449 bytes of shared memory: a block has at most 232448"),
    ],
)
def test_launches_over_the_limits_are_refused(library: Driver, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(KernelError, match=f"kernel .*ends_early: .*{message}"):
        library("sized", *sizes)


def test_the_largest_launch_is_possible(driver: Driver) -> None:
    driver("sized", 1, 1, 1, 1, 1, 64, 232448)
    out = np.zeros(1, np.int32)
    driver("stacks", out)  # 1024 threads with 20 kB of variables each
    assert out[0] == 2 * 1024 * 20000


@pytest.mark.parametrize(
    ("inside", "outside", "kernel", "report"),
    [
        (("global_float", 9), ("global_float", 10), "write_global", "heap-buffer-overflow"),
        (("global_float", 0), ("global_float", -1), "write_global", "heap-buffer-overflow"),
        (("dynamic_shared", 40, 9), ("dynamic_shared", 40, 10), "write_dynamic", "use-after-poison"),
        (("dynamic_shared", 232448, 58111), ("dynamic_shared", 232448, 58112), "write_dynamic", "insufficient space"),
        (("fixed_shared", 15), ("fixed_shared", 16), "write_fixed", "out of bounds"),
        (("global_float4", 4), ("global_float4", 5), "write_global", "misaligned address"),
    ],
)
def test_what_lies_outside_is_caught(program: Driver, inside: tuple, outside: tuple, kernel: str, report: str) -> None:
    def call(name: str, *arguments: int) -> None:
        program(name, *([np.ones(10, np.float32)] if name.startswith("global") else []), *arguments)

    call(*inside)
    with pytest.raises(KernelError, match=rf"(?s){report}.*in kernel .*{kernel}.*, block .0, 0, 0., thread .7, 0, 0."):
        call(*outside)


def test_wrong_arguments_are_refused(driver: Driver) -> None:
    x = np.zeros(64, np.float32)
    with pytest.raises(KernelError, match="rotation: an argument is of type f8 where an array of f4 is wanted"):
        driver("rotation", x.astype(np.float64), 1, True)
    with pytest.raises(KernelError, match="rotation: an argument is of type float where an integer is wanted"):
        driver("rotation", x, 1.5, True)
    with pytest.raises(KernelError, match="rotation: 1 arguments: it takes 3"):
        driver("rotation", x)
    with pytest.raises(KernelError, match="rotate: there is no such function"):
        driver("rotate")
    with pytest.raises(ValueError, match="contiguous"):
        driver("rotation", x[::2], 1, True)


def test_an_error_of_the_compiler_is_shown() -> None:
    with pytest.raises(KernelError, match="no_such_kernel"):
        build('#include "cuda_on_cpu.h"\nvoid f() { cuda_on_cpu::launch<no_such_kernel>(1, 1, 0); }')
