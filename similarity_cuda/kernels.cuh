// The self-similarity op on a GPU: the kernels, without anything of PyTorch (kernels.cu launches them).
//
// geometry.h says which box sums are needed. A pixel's graph is made of k^2 numbers, which lie apart by the pitch of a
// chunk of pixels, so that neighbouring threads, which have neighbouring pixels, read and write neighbouring numbers:
//
//     distance_sums       sums of squared differences, for the windows as far as they lie in the search area
//     outside_energies    what the rest of the windows adds, by pairs of clips
//     compare             both graphs of a pixel -> L1, KL, gradient with respect to the sums
//     clip_sums           that gradient, summed over the offsets of each clip
//     gradient            adjoint of distance_sums: the gradient of the padded image
//     outside_gradient    adjoint of outside_energies
//     fold                adjoint of the reflection padding
//
// The padded image is (N, H + 2 reach, W + 2 reach, depth): a thread loads all channels of a pixel at once.
//
// No atomic operation touches a result: every number is summed by one thread in a fixed order, so the op is
// deterministic.
#pragma once

#include <math.h>

#include "launches.h"

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace similarity {

constexpr int kTogether = 2;       // horizontal offsets whose columns are summed in one go: they share the template
constexpr int kOutputRows = 7;     // rows of the gradient that a thread keeps in registers
constexpr int kParts = 2;          // of a column of a tile of the gradient: threads that share it
constexpr int kSegment = 12;       // pixels of a row that a thread sums along
constexpr int kMostThreads = 256;  // of a block of distance_sums and of gradient
constexpr int kLanes = 32, kWarps = 8;  // of a block of compare: pixels, and threads for each

// The chunk's images cut into tiles of height x width pixels, one for each block.
struct Tiling {
  int64_t image_height, image_width, height, width;

  SIMILARITY_ANYWHERE int64_t down() const { return (image_height + height - 1) / height; }
  SIMILARITY_ANYWHERE int64_t across() const { return (image_width + width - 1) / width; }
  SIMILARITY_ANYWHERE int64_t of_image() const { return down() * across(); }
};

struct Tile {
  int64_t image;
  int top, left, height, width;

  __device__ Tile(const Tiling& t, const Chunk& chunk, int64_t index)
      : image(chunk.image + index / t.of_image()),
        top(int(index % t.of_image() / t.across() * t.height)),
        left(int(index % t.across() * t.width)),
        height(int(t.image_height - top < t.height ? t.image_height - top : t.height)),
        width(int(t.image_width - left < t.width ? t.image_width - left : t.width)) {}
};

// emit(y, read(y) + ... + read(y + n - 1)) for y < rows. Rows are taken in blocks of n: a sum is the end of one block
// and the beginning of the next, so it costs three additions whatever n is, and nothing is subtracted that could
// cancel. N = n where the compiler knows it, which then keeps the block in registers; else 0, and `block` holds it,
// each number `step` from the last.
template <int N, typename T, typename Read, typename Emit>
__device__ __forceinline__ void sums_in_order(int n, int rows, T* block, int step, const Read& read, const Emit& emit) {
  T registers[N > 0 ? N : 1];
  const int size = N > 0 ? N : n;
  if (N > 0) block = registers, step = 1;
#pragma unroll
  for (int t = 0; t < size; ++t) block[t * step] = read(t);
  for (int y = 0;; y += size) {
#pragma unroll
    for (int t = size - 2; t >= 0; --t) block[t * step] += block[(t + 1) * step];
    T beginning{};
#pragma unroll
    for (int t = 0; t < size; ++t) {
      emit(y + t, block[t * step] + beginning);
      if (y + t + 1 == rows) return;
      beginning += block[t * step] = read(y + size + t);
    }
  }
}

// Calls f with a compile-time n where there is one (in float32, those of the published windows of 9), else with 0.
constexpr int kLeastTerms = 5, kMostTerms = 9;
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <typename T, typename F>
__device__ __forceinline__ void with_constant(int n, const F& f) {
  if constexpr (sizeof(T) == 4) {
    switch (n) {
      case 5:
        return f(Constant<5>());
      case 6:
        return f(Constant<6>());
      case 7:
        return f(Constant<7>());
      case 8:
        return f(Constant<8>());
      case 9:
        return f(Constant<9>());
    }
  }
  f(Constant<0>());
}

// C channels of a pixel of the padded image.
template <typename T, int C>
struct Pixel {
  T of[C];

  __device__ __forceinline__ explicit Pixel(const T* from) {
    struct alignas(16) Whole {
      T of[C == 3 ? 4 : C];
    };
    if constexpr (C == 3) {
      const Whole whole = *reinterpret_cast<const Whole*>(from);
#pragma unroll
      for (int c = 0; c < C; ++c) of[c] = whole.of[c];
    } else {
#pragma unroll
      for (int c = 0; c < C; ++c) of[c] = from[c];
    }
  }
};

// Numbers that are summed together.
template <typename T>
struct Group {
  T of[kTogether];

  __device__ __forceinline__ Group operator+(const Group& other) const {
    Group sum = *this;
    return sum += other;
  }
  __device__ __forceinline__ Group& operator+=(const Group& other) {
#pragma unroll
    for (int g = 0; g < kTogether; ++g) of[g] += other.of[g];
    return *this;
  }
};

// The shared memory of distance_sums and of gradient.
template <typename T>
struct Layout {
  int64_t columns, rows;       // of the box sums
  int64_t field, block, list;  // numbers: one field of them, the blocks of sums_in_order, pixels listed
  int64_t fields, sparse;      // so many fields, and what they are summed from

  // Of distance_sums: sums down the columns for kTogether offsets.
  SIMILARITY_ANYWHERE static Layout distances(const Geometry& g, const Tiling& t) {
    const int64_t columns = t.width + g.apart() + g.w - 1, rows = t.height + g.apart(), field = rows * columns;
    return {columns, rows, field, in_registers(g) ? 0 : kTogether * g.w * columns, t.height * t.width, kTogether, 0};
  }
  // Of gradient: gradients, sums of them down the columns, and along the rows.
  SIMILARITY_ANYWHERE static Layout gradients(const Geometry& g, const Tiling& t, int64_t threads) {
    const int64_t columns = t.width + g.apart() + g.w - 1, rows = t.height + g.r, pitch = pitch_of(columns);
    return {columns,
            rows,
            whole(rows * pitch),
            in_registers(g) ? 0 : g.w * threads,
            (t.height + 2 * g.reach()) * (t.width + 2 * g.reach()),
            2,
            whole((t.height + g.apart() + g.w - 1) * pitch)};
  }
  SIMILARITY_ANYWHERE static int64_t pitch_of(int64_t columns) { return columns | 1; }  // rows begin in other banks
  SIMILARITY_ANYWHERE static int64_t whole(int64_t numbers) { return (numbers + 3) / 4 * 4; }  // of 16 bytes each
  // Whether with_constant knows all numbers of terms that occur.
  SIMILARITY_ANYWHERE static bool in_registers(const Geometry& g) {
    return sizeof(T) == 4 && g.w <= kMostTerms && (g.zero_border ? g.w - g.f : g.w) >= kLeastTerms;
  }
  SIMILARITY_ANYWHERE int64_t numbers() const { return fields * field + block + sparse; }
  SIMILARITY_ANYWHERE int64_t bytes() const { return numbers() * sizeof(T) + (list + 1) * sizeof(unsigned); }
};

// Index of the pixel at (y, x) of an image within the chunk, or -1 where none is masked there.
struct Map {
  const int* index;  // as in Launch
  Chunk chunk;
  int height, width;

  __device__ __forceinline__ int at(int64_t image, int y, int x) const {
    if (y < 0 || y >= height || x < 0 || x >= width) return -1;
    const int64_t m = int64_t(index[(image * height + y) * width + x]) - chunk.first;
    return m >= 0 && m < chunk.count ? int(m) : -1;
  }
};

// The chunk's pixels in a rectangle of an image, whose sides are at most 256, listed by the threads of a block: each
// with its place in the chunk and in the rectangle. Their order differs from run to run: no sum depends on it.
struct Listed {
  unsigned entry;

  __device__ __forceinline__ Listed(int p, int y, int x) : entry(unsigned(p) << 16 | unsigned(y) << 8 | unsigned(x)) {}
  __device__ __forceinline__ explicit Listed(unsigned entry) : entry(entry) {}
  __device__ __forceinline__ int p() const { return int(entry >> 16); }
  __device__ __forceinline__ int y() const { return int(entry >> 8 & 255); }
  __device__ __forceinline__ int x() const { return int(entry & 255); }
};
static_assert(kMostPixels <= 65536, "a pixel's place in the chunk must fit 16 bits");

// -> how many; memory: one number more than pixels.
__device__ __forceinline__ int list_pixels(const Map& map, int64_t image, int top, int left, int height, int width,
                                           unsigned* memory) {
  if (threadIdx.x == 0) *memory = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < height * width; i += blockDim.x) {
    const int y = i / width, x = i % width, p = map.at(image, top + y, left + x);
    if (p >= 0) memory[1 + atomicAdd(memory, 1u)] = Listed(p, y, x).entry;
  }
  __syncthreads();
  return int(*memory);
}

__global__ void fill_index(int* index, Places places, int64_t count, Geometry g) {
  const int64_t m = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (m < count) index[(places.image[m] * g.height + places.row[m]) * g.width + places.column[m]] = int(m);
}

// sums[d * pitch + p] = sum of squared differences of the windows of pixel p and p + d, as far as they lie in the
// search area. A block has a tile and a vertical offset; a thread has a column. C = 0: any number of channels.
template <typename T, int C>
__global__ void __launch_bounds__(kMostThreads, 3)
    distance_sums(const T* __restrict__ padded, Map map, Geometry g, Tiling tiling, T* __restrict__ sums) {
  const Tile tile(tiling, map.chunk, blockIdx.x);
  const auto layout = Layout<T>::distances(g, tiling);
  T* const fields = reinterpret_cast<T*>(shared_memory);  // [kTogether][rows][columns]
  T* const block = fields + kTogether * layout.field;     // [w][columns] groups, where registers do not hold them
  unsigned* const list = reinterpret_cast<unsigned*>(block + layout.block);
  const int count = list_pixels(map, tile.image, tile.top, tile.left, tile.height, tile.width, list);
  if (!count) return;

  const int dy = blockIdx.y, r = int(g.r), k = int(g.k), columns = int(layout.columns), rows = int(layout.rows);
  const int depth = int(g.depth()), line = int(g.stride()) * depth, apart = int(g.apart()), x = threadIdx.x;
  const int pixels = int(map.chunk.count);
  const Axis down(g, dy);
  const int sums_down = tile.height + down.apart;
  const T* const row = padded + tile.image * g.plane() * depth + (g.reach() + tile.top + down.start) * line +
                       (g.reach() + tile.left) * depth;
  for (int dx0 = dy ? -r : 1; dx0 <= r; dx0 += kTogether) {
    const int first_column = -int(g.f) - (dx0 < 0 ? 0 : apart);  // to the right, d and -d begin to the left of a pixel
    const T* const here = row + (first_column + x) * depth;
    if (x < tile.width + apart + int(g.w) - 1) {
      // A column that an offset does not need may lie outside of the image when shifted by it: it is compared with
      // itself.
      int shift[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int dx = dx0 + i <= r ? dx0 + i : r;
        const Axis across(g, dx);
        const int at = x + first_column - across.start;
        shift[i] = at >= 0 && at < tile.width + across.apart + across.count - 1 ? dy * line + dx * depth : 0;
      }
      const auto read = [&](int y) {
        Group<T> squares{};
        const T* from = here + y * line;
        for (int c = 0; c < (C ? 1 : depth); ++c, ++from) {
          constexpr int together = C ? C : 1;
          const Pixel<T, together> centre(from);
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const Pixel<T, together> shifted(from + shift[i]);
#pragma unroll
            for (int j = 0; j < together; ++j) {
              const T difference = centre.of[j] - shifted.of[j];
              squares.of[i] += difference * difference;
            }
          }
        }
        return squares;
      };
      const auto emit = [&](int y, const Group<T>& sum) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) fields[(i * rows + y) * columns + x] = sum.of[i];
      };
      with_constant<T>(down.count, [&](auto n) {
        sums_in_order<decltype(n)::value>(down.count, sums_down, reinterpret_cast<Group<T>*>(block) + x, columns, read,
                                          emit);
      });
    }
    __syncthreads();
    for (int dx = dx0; dx < dx0 + kTogether && dx <= r; ++dx) {
      const Axis across(g, dx);
      const int n = across.count, d = (dy + r) * k + dx + r;
      const T* const field = fields + (dx - dx0) * rows * columns - first_column;
      for (int minus = 0; minus < 2; ++minus) {
        const T* const from =
            field + (minus ? down.minus() : down.plus()) * columns + (minus ? across.of_minus : across.of_plus);
        T* const to = sums + int64_t(minus ? k * k - 1 - d : d) * pixels;
        with_constant<T>(n, [&](auto constant) {
          constexpr int known = decltype(constant)::value;
          for (int i = threadIdx.x; i < count; i += blockDim.x) {
            const Listed pixel(list[1 + i]);
            const T* const first = from + pixel.y() * columns + pixel.x();
            T sum = 0;
#pragma unroll
            for (int t = 0; t < (known ? known : n); ++t) sum += first[t];
            to[pixel.p()] = sum;
          }
        });
      }
    }
    __syncthreads();
  }
}

// energies[clip * pitch + p]: of the pixel's own window, the part that lies outside for a pair of clips; clip is
// vertical clip * clips + horizontal clip. Thread: a pixel and a vertical clip (blockIdx.y).
template <typename T>
__global__ void outside_energies(const T* __restrict__ padded, Places places, Chunk chunk, Geometry g,
                                 T* __restrict__ energies) {
  const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p >= chunk.count) return;
  const int a = blockIdx.y, w = int(g.w), f = int(g.f);
  const int64_t m = chunk.first + p, line = g.stride();
  const Range inside = g.range(a);
  const T* const window = padded + (places.image[m] * g.plane() + (places.row[m] + g.reach() - f) * line +
                                    places.column[m] + g.reach() - f) *
                                       g.depth();
  const auto column = [&](int v, bool in) {  // squares of a column, in its rows inside or outside of the search area
    T sum = 0;
    for (int u = 0; u < w; ++u)
      if (inside.holds(u) == in)
        for (int64_t c = 0; c < g.c; ++c) {
          const T value = window[(u * line + v) * g.depth() + c];
          sum += value * value;
        }
    return sum;
  };
  T rows = 0;
  for (int v = 0; v < w; ++v) rows += column(v, false);
  T* const to = energies + a * g.clips() * chunk.count + p;
  to[0] = rows;
  T start = rows, end = rows;
  for (int b = 1; b <= f; ++b) {
    to[b * chunk.count] = start += column(b - 1, true);
    to[(f + b) * chunk.count] = end += column(w - b, true);
  }
}

// A distance in full (not normalised): the sum, and what lies outside of the search area.
template <typename T>
__device__ __forceinline__ T distance(const T* sums, const T* energies, int64_t place, int64_t of_clip) {
  return sums[place] + (of_clip >= 0 ? energies[of_clip] : T(0));
}

// distances (M, k, k) of the chunk's pixels, scaled. Thread: a pixel and a vertical offset.
template <typename T>
__global__ void finish(const T* __restrict__ sums, const T* __restrict__ energies, Geometry g, Chunk chunk, T scale,
                       T* __restrict__ distances) {
  const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p >= chunk.count) return;
  const int i = blockIdx.y, k = int(g.k), r = int(g.r), clips = int(g.clips()), down = g.clip(i - r) * clips;
  T* const to = distances + (chunk.first + p) * g.k * g.k;
  for (int j = 0, d = i * k; j < k; ++j, ++d) {
    const int clip = down + g.clip(j - r);
    to[d] = scale * distance(sums, energies, d * chunk.count + p, clip ? clip * chunk.count + p : -1);
  }
}

// Every kWarps-th offset d = i k + j, from the warp's own on.
struct Offset {
  int i, j;
  int64_t place;  // of pixel p: d * pitch + p

  __device__ __forceinline__ Offset(int k, int64_t pitch, int64_t p)
      : i(threadIdx.y / k), j(threadIdx.y % k), place(threadIdx.y * pitch + p) {}
  // more_i = kWarps / k, more_j = kWarps % k, more = kWarps * pitch
  __device__ __forceinline__ void next(int k, int more_i, int more_j, int64_t more) {
    i += more_i, j += more_j, place += more;
    if (j >= k) j -= k, ++i;
  }
};

template <typename T>
__device__ __forceinline__ T of_all_warps(T value, T (*shared)[kLanes]) {
  __syncthreads();  // the last result was read by all
  shared[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += shared[i][threadIdx.x];
  return sum;
}

// Compares the graphs of kLanes pixels, kWarps threads for each, and replaces sums_x, those of the output, by the
// gradient of the loss with respect to them. sums_t: those of the ground truth. totals[2 * block]: sums of L1 and of
// KL.
template <typename T>
__global__ void __launch_bounds__(kLanes* kWarps)
    compare(T* __restrict__ sums_x, const T* __restrict__ energies_x, const T* __restrict__ sums_t,
            const T* __restrict__ energies_t, Geometry g, Chunk chunk, Terms<T> terms, double* __restrict__ totals) {
  __shared__ T shared[kWarps][kLanes];
  const int64_t p = int64_t(blockIdx.x) * kLanes + threadIdx.x, pitch = chunk.count;
  const bool here = p < chunk.count;
  const int k = int(g.k), r = int(g.r), rows = here ? k : 0, clips = int(g.clips());
  const int more_i = kWarps / k, more_j = kWarps % k;
  const int64_t more = kWarps * pitch;
  const auto exponents = [&](const Offset& at, T& x, T& t) {
    const int clip = g.clip(at.i - r) * clips + g.clip(at.j - r);
    const int64_t of_clip = clip ? clip * pitch + p : -1;
    x = terms.scale * distance(sums_x, energies_x, at.place, of_clip);
    t = terms.scale * distance(sums_t, energies_t, at.place, of_clip);
  };
  T sum_x = 0, sum_t = 0;
  for (Offset at(k, pitch, p); at.i < rows; at.next(k, more_i, more_j, more)) {
    T x, t;
    exponents(at, x, t);
    sum_x += exp(x), sum_t += exp(t);
  }
  sum_x = of_all_warps(sum_x, shared), sum_t = of_all_warps(sum_t, shared);
  const T by_x = terms.generalization ? sum_x + T(kEps) : T(1), by_t = terms.generalization ? sum_t + T(kEps) : T(1);
  const T over_x = 1 / by_x, over_t = 1 / by_t, ln_x = log(by_x), ln_t = log(by_t), ln_ratio = log(by_x / by_t);
  const T eps = T(kEps), ln_eps = T(log(kEps));
  // x, t and G x, with G = dL / dx: sign(x - t) x of L1, and -t / x * x = -t of KL unless x is clamped.
  const auto flow_of = [&](T exponent_x, T exponent_t, T& x, T& t) {
    x = exp(exponent_x) * over_x, t = exp(exponent_t) * over_t;
    const T signed_x = x > t ? x : x < t ? -x : T(0);
    return terms.l1_flow * signed_x - (x < eps ? T(0) : terms.kl_flow * (t > eps ? t : eps));
  };
  T l1 = 0, kl = 0, mean = 0;
  for (Offset at(k, pitch, p); at.i < rows; at.next(k, more_i, more_j, more)) {
    T exponent_x, exponent_t, x, t;
    exponents(at, exponent_x, exponent_t);
    mean += flow_of(exponent_x, exponent_t, x, t);
    l1 += x > t ? x - t : t - x;
    const T whole_x = exponent_x - ln_x, whole_t = exponent_t - ln_t;
    // Without the normalisations' logarithms where nothing is clamped: flat graphs differ by less than their rounding.
    const T difference = whole_x > ln_eps && whole_t > ln_eps
                             ? exponent_t - exponent_x + ln_ratio
                             : (whole_t > ln_eps ? whole_t : ln_eps) - (whole_x > ln_eps ? whole_x : ln_eps);
    kl += (t > eps ? t : eps) * difference;
  }
  mean = terms.generalization ? of_all_warps(mean, shared) : T(0);  // of the normalisation: every entry acts on all
  l1 = of_all_warps(l1, shared), kl = of_all_warps(kl, shared);
  if (threadIdx.y == 0) {
    double total_l1 = l1, total_kl = kl;
    for (int step = kLanes / 2; step; step /= 2) {
      total_l1 += __shfl_down_sync(0xffffffffu, total_l1, step);
      total_kl += __shfl_down_sync(0xffffffffu, total_kl, step);
    }
    if (threadIdx.x == 0) totals[2 * blockIdx.x] = total_l1, totals[2 * blockIdx.x + 1] = total_kl;
  }
  for (Offset at(k, pitch, p); at.i < rows; at.next(k, more_i, more_j, more)) {
    T exponent_x, exponent_t, x, t;
    exponents(at, exponent_x, exponent_t);
    const T flow = flow_of(exponent_x, exponent_t, x, t);
    sums_x[at.place] = flow - mean * x;
  }
}

// clip_sums[(a * w + v) * pitch + p]: the gradient of a pixel, summed over the offsets with the vertical clip a whose
// window's column v lies outside; at v = f, which never does, over all offsets with that clip. Thread: a pixel and a.
template <typename T>
__global__ void clip_sums(const T* __restrict__ grads, Geometry g, Chunk chunk, T* __restrict__ result) {
  const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p >= chunk.count) return;
  const int a = blockIdx.y, k = int(g.k), w = int(g.w), f = int(g.f);
  // The vertical offsets of the clip: those between, or one.
  const int first = a == 0 ? f : a <= f ? f - a : k - 1 - 2 * f + a, last = a == 0 ? k - f : first + 1;
  const auto column = [&](int j) {  // of one horizontal offset
    T sum = 0;
    for (int i = first; i < last; ++i) sum += grads[(i * k + j) * chunk.count + p];
    return sum;
  };
  T* const to = result + a * w * chunk.count + p;
  T start = 0, end = 0, middle = 0;
  for (int b = f; b >= 1; --b) {  // the offsets with most columns outside come first
    start += column(f - b), end += column(k - 1 - f + b);
    to[(b - 1) * chunk.count] = start, to[(w - b) * chunk.count] = end;
  }
  for (int j = f; j < k - f; ++j) middle += column(j);
  to[f * chunk.count] = start + middle + end;
}

// result[(group, image of the chunk, channel)], zeros before: the gradient with respect to the padded image through
// distance_sums; grads as sums there. Half of it: the factor 2 of the squares is left to fold. A block has a tile of
// the padded image and every so-manieth vertical offset; a thread has a part of a column of it.
template <typename T, int C>
__global__ void __launch_bounds__(kMostThreads, 3)
    gradient(const T* __restrict__ padded, const T* __restrict__ grads, Map map, Geometry g, Tiling tiling,
             T* __restrict__ result) {
  const Tile tile(tiling, map.chunk, blockIdx.x);
  const auto layout = Layout<T>::gradients(g, tiling, blockDim.x);
  const int columns = int(layout.columns), pitch = int(layout.pitch_of(columns)), thread = threadIdx.x;
  T* const fields = reinterpret_cast<T*>(shared_memory);  // [rows][pitch]: gradients, summed down the columns
  T* const spread = fields + layout.field;                // [rows][pitch]: and along the rows
  T* const sparse = spread + layout.field;                // [rows + w - 1][pitch]: as they are
  T* const block = sparse + layout.sparse + thread;       // [w][threads], where registers do not hold it
  unsigned* const list = reinterpret_cast<unsigned*>(sparse + layout.sparse + layout.block);
  const int r = int(g.r), k = int(g.k), reach = int(g.reach());
  // Pixels near enough to matter.
  const int count = list_pixels(map, tile.image, tile.top - 2 * reach, tile.left - 2 * reach, tile.height + 2 * reach,
                                tile.width + 2 * reach, list);
  if (!count) return;
  const auto clear = [&] {
    uint4* const all = reinterpret_cast<uint4*>(sparse);
    const int size = int(layout.sparse) / int(sizeof(uint4) / sizeof(T));
#pragma unroll 1
    for (int i = thread; i < size; i += blockDim.x) all[i] = make_uint4(0, 0, 0, 0);
  };
  clear();
  __syncthreads();

  const int column = thread % columns, upper = thread / columns;  // of the sums down the columns
  const int x = thread % int(tiling.width), top = thread / int(tiling.width) * kOutputRows;  // of the gradient
  const int height = x < tile.width ? min(kOutputRows, tile.height - top) : 0;
  const int depth = int(g.depth()), line = int(g.stride()) * depth, channel = C == 1 ? blockIdx.z : 0;
  const int pixels = int(map.chunk.count), corner = (tile.top + top) * int(g.stride()) + tile.left + x;
  const T* const image = padded + (tile.image * g.plane() + corner) * depth + channel;
  T total[kOutputRows][C];
#pragma unroll
  for (int y = 0; y < kOutputRows; ++y)
#pragma unroll
    for (int c = 0; c < C; ++c) total[y][c] = 0;

  for (int dy = blockIdx.y; dy <= r; dy += gridDim.y) {
    const Axis down(g, dy);
    const int n = down.count, rows = tile.height + dy, half = (rows + kParts - 1) / kParts;
    const int first_row = thread % rows, first_segment = thread / rows;  // of the sums along the rows
    const int more_rows = int(blockDim.x) % rows, more_segments = int(blockDim.x) / rows;
    for (int dx = dy ? -r : 1; dx <= r; ++dx) {
      const Axis across(g, dx);
      const int d = (dy + r) * k + dx + r, m = across.count, right = dx > 0 ? dx : 0,
                wide = tile.width + (dx > 0 ? dx : -dx);
      // Each gradient to the first sum of which it is a term, first those of d, then those of -d. The sums begin with
      // one that covers the tile's first pixel, shifted by -d.
#pragma unroll 1
      for (int minus = 0; minus < 2; ++minus) {
        const T* const from = grads + int64_t(minus ? k * k - 1 - d : d) * pixels;
        const int to_y = (minus ? down.of_minus : down.of_plus) - reach + dy + n - 1;
        const int to_x = (minus ? across.of_minus : across.of_plus) - reach + right + m - 1;
        for (int i = thread; i < count; i += blockDim.x) {
          const Listed pixel(list[1 + i]);
          const int at_y = pixel.y() + to_y, at_x = pixel.x() + to_x;
          if (unsigned(at_y) >= unsigned(rows + n - 1) || unsigned(at_x) >= unsigned(wide + m - 1)) continue;
          T& to = sparse[at_y * pitch + at_x];
          to = minus ? to + from[pixel.p()] : from[pixel.p()];
        }
        __syncthreads();
      }
      if (column < wide + m - 1 && upper * half < rows) {
        const int offset = upper * half * pitch + column;
        const auto read = [&](int y) { return sparse[offset + y * pitch]; };
        const auto emit = [&](int y, T sum) { fields[offset + y * pitch] = sum; };
        with_constant<T>(n, [&](auto constant) {
          sums_in_order<decltype(constant)::value>(n, min(half, rows - upper * half), block, int(blockDim.x), read,
                                                   emit);
        });
      }
      __syncthreads();
      clear();  // for the next offset
      const int segments = (wide + kSegment - 1) / kSegment;
      for (int y = first_row, segment = first_segment; segment < segments;) {
        const int first = segment * kSegment;
        const auto read = [&](int t) { return fields[y * pitch + first + t]; };
        const auto emit = [&](int t, T sum) { spread[y * pitch + first + t] = sum; };
        with_constant<T>(m, [&](auto constant) {
          sums_in_order<decltype(constant)::value>(m, min(kSegment, wide - first), block, int(blockDim.x), read, emit);
        });
        y += more_rows, segment += more_segments;
        if (y >= rows) y -= rows, ++segment;
      }
      __syncthreads();
      const int shift = dy * line + dx * depth;
#pragma unroll
      for (int y = 0; y < kOutputRows; ++y) {
        if (y >= height) break;
        const T* const of_row = spread + (top + y) * pitch + x + right;
        const T weight = of_row[dy * pitch], opposite = of_row[-dx];
        const T* const pixel = image + y * line;
        const Pixel<T, C> centre(pixel);
        if (weight != 0) {  // else what is there may lie outside of the image
          const Pixel<T, C> other(pixel + shift);
#pragma unroll
          for (int c = 0; c < C; ++c) total[y][c] += weight * (centre.of[c] - other.of[c]);
        }
        if (opposite != 0) {
          const Pixel<T, C> other(pixel - shift);
#pragma unroll
          for (int c = 0; c < C; ++c) total[y][c] += opposite * (centre.of[c] - other.of[c]);
        }
      }
    }
  }
  const int64_t at = blockIdx.y * map.chunk.images + tile.image - map.chunk.image;
  T* const to = result + (at * g.c + channel) * g.plane() + corner;
#pragma unroll
  for (int y = 0; y < kOutputRows; ++y) {
    if (y >= height) break;
#pragma unroll
    for (int c = 0; c < C; ++c) to[c * g.plane() + y * g.stride()] = total[y][c];
  }
}

// The first group of result += the gradient through outside_energies, also half of it. Thread: a pixel of the image
// extended by f.
template <typename T>
__global__ void outside_gradient(const T* __restrict__ padded, const T* __restrict__ clip_sums, Map map, Geometry g,
                                 T* __restrict__ result) {
  const int w = int(g.w), f = int(g.f), wide = map.width + 2 * f, clips = int(g.clips());
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, size = int64_t(map.height + 2 * f) * wide;
  if (i >= size * map.chunk.images) return;
  const int64_t image = map.chunk.image + i / size;
  const int y = int(i % size / wide), x = int(i % wide);
  T weight = 0;
  for (int u = 0; u < w; ++u)
    for (int v = 0; v < w; ++v) {
      const int p = map.at(image, y - u, x - v);
      if (p < 0) continue;
      for (int a = 0; a < clips; ++a) {
        const bool inside = g.range(a).holds(u);
        if (!inside || v != f) weight += clip_sums[(a * w + (inside ? v : f)) * map.chunk.count + p];
      }
    }
  if (weight == 0) return;
  const int64_t at = (y + g.reach() - f) * g.stride() + x + g.reach() - f;
  for (int64_t c = 0; c < g.c; ++c)
    result[(i / size * g.c + c) * g.plane() + at] += weight * padded[(image * g.plane() + at) * g.depth() + c];
}

// to (N, C, H, W) += twice the sum of all groups, at a pixel and wherever reflection has put it.
template <typename T>
__global__ void fold(const T* __restrict__ total, Geometry g, Chunk chunk, int groups, T* __restrict__ to) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, images = chunk.images * g.c;
  if (i >= images * g.height * g.width) return;
  const int64_t reach = g.reach(), x = i % g.width, y = i / g.width % g.height, image = i / (g.width * g.height);
  // In the padded image: itself, its mirror image beyond the first line, and beyond the last.
  const auto seen_at = [&](int64_t place, int64_t size, int64_t which) -> int64_t {
    if (which == 0) return place + reach;
    if (which == 1) return place >= 1 && place <= reach ? reach - place : -1;
    return place >= size - 1 - reach && place <= size - 2 ? reach + 2 * (size - 1) - place : -1;
  };
  T sum = 0;
  for (int64_t group = 0; group < groups; ++group)
    for (int v = 0; v < 3; ++v)
      for (int h = 0; h < 3; ++h) {
        const int64_t row = seen_at(y, g.height, v), column = seen_at(x, g.width, h);
        if (row >= 0 && column >= 0) sum += total[(group * images + image) * g.plane() + row * g.stride() + column];
      }
  to[chunk.image * g.c * g.height * g.width + i] += 2 * sum;
}

}  // namespace similarity
