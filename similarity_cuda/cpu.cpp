// The self-similarity op on the CPU: distances of masked pixels by box sums, tile by tile, and the fused loss.
//
// geometry.h says which box sums those are. The gradient is the adjoint of each step in reverse: scatter the incoming
// gradient of d and -d into one field, spread it by box sums, multiply it by I(x) - I(x + d), add it at x and subtract
// it at x + d.
//
// Deterministic: every number is summed in an order that does not depend on threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "boundary.h"
#include "geometry.h"
#include "terms.h"

namespace {

using at::Tensor;
using similarity::Axis;
using similarity::Geometry;
using similarity::kEps;
using similarity::Range;
using similarity::Terms;

constexpr int64_t kRows = 32, kColumns = 128;  // of a tile, in pixels: its fields stay in the caches nearest to a core
constexpr int64_t kBlock = 16;                 // pixels whose graphs are compared together

// ------------------------------------------------------------------------------------------------------ vectors

#if defined(__GNUC__)
template <typename T>
struct Vector_ {
  typedef T Type __attribute__((vector_size(32)));
};
#else
template <typename T>
struct Vector_ {
  struct Type {
    T lane[32 / sizeof(T)];
    friend Type operator+(Type a, const Type& b) { return a += b; }
    friend Type operator-(Type a, const Type& b) { return a -= b; }
    friend Type operator*(Type a, const Type& b) {
      for (size_t i = 0; i < 32 / sizeof(T); ++i) a.lane[i] *= b.lane[i];
      return a;
    }
    Type& operator+=(const Type& b) {
      for (size_t i = 0; i < 32 / sizeof(T); ++i) lane[i] += b.lane[i];
      return *this;
    }
    Type& operator-=(const Type& b) {
      for (size_t i = 0; i < 32 / sizeof(T); ++i) lane[i] -= b.lane[i];
      return *this;
    }
  };
};
#endif
template <typename T>
using Vector = typename Vector_<T>::Type;
template <typename T>
constexpr int64_t lanes = 32 / sizeof(T);

// Lane by lane: a > b ? yes : no, also where a or b is NaN.
template <typename V>
inline V where_greater(V a, V b, V yes, V no) {
#if defined(__GNUC__)
  return a > b ? yes : no;
#else
  for (size_t i = 0; i < sizeof a.lane / sizeof a.lane[0]; ++i)
    yes.lane[i] = a.lane[i] > b.lane[i] ? yes.lane[i] : no.lane[i];
  return yes;
#endif
}

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename T>
inline void store(T* to, const Vector<T>& value) {
  std::memcpy(to, &value, sizeof value);
}

template <typename T>
inline Vector<T> all(T value) {
  T copies[lanes<T>];
  std::fill_n(copies, lanes<T>, value);
  return load(copies);
}

// -------------------------------------------------------------------------------------------------------- pixels

struct Tile {
  int64_t index, image, top, left, height, width, first, count;  // [first, first + count) of the pixels sorted by tile
  // Of a row of numbers, one for each pixel: whole blocks; what fills the last one up is computed along and not used.
  int64_t pitch() const { return (count + kBlock - 1) / kBlock * kBlock; }
};

struct Pixels {
  std::vector<int64_t> order, y, x;        // index in the caller's order; place inside the tile
  std::vector<std::vector<Tile>> colours;  // tiles of one colour write to disjoint parts of the gradient
  int64_t tiles = 0;
};

// Sort the masked pixels into tiles; tiles without a pixel do not exist.
Pixels sort_into_tiles(const Tensor& any_image, const Tensor& any_row, const Tensor& any_column, const Geometry& g) {
  const Tensor image = any_image.contiguous(), row = any_row.contiguous(), column = any_column.contiguous();
  const int64_t m = image.numel();
  const int64_t *pi = image.const_data_ptr<int64_t>(), *py = row.const_data_ptr<int64_t>(),
                *px = column.const_data_ptr<int64_t>();
  const int64_t down = (g.height + kRows - 1) / kRows, across = (g.width + kColumns - 1) / kColumns;
  std::vector<int64_t> start(g.n * down * across + 1, 0);
  auto tile_of = [&](int64_t p) { return (pi[p] * down + py[p] / kRows) * across + px[p] / kColumns; };
  for (int64_t p = 0; p < m; ++p) {
    TORCH_CHECK(pi[p] >= 0 && pi[p] < g.n && py[p] >= 0 && py[p] < g.height && px[p] >= 0 && px[p] < g.width,
                "masked pixel ", p, " = (image ", pi[p], ", row ", py[p], ", column ", px[p], ") lies outside of ", g.n,
                " images of ", g.height, " x ", g.width);
    ++start[tile_of(p) + 1];
  }
  for (size_t t = 1; t < start.size(); ++t) start[t] += start[t - 1];
  Pixels result;
  result.order.resize(m), result.y.resize(m), result.x.resize(m);
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t p = 0; p < m; ++p) {
    const int64_t at = next[tile_of(p)]++;
    result.order[at] = p, result.y[at] = py[p] % kRows, result.x[at] = px[p] % kColumns;
  }
  // A tile's gradient reaches beyond it on each side: only every so-manieth tile may run beside it.
  const int64_t every_y = (2 * g.reach() + 2 * kRows - 1) / kRows,
                every_x = (2 * g.reach() + 2 * kColumns - 1) / kColumns;
  result.colours.resize(every_y * every_x);
  for (int64_t i = 0; i < g.n; ++i)
    for (int64_t ty = 0; ty < down; ++ty)
      for (int64_t tx = 0; tx < across; ++tx) {
        const int64_t t = (i * down + ty) * across + tx, count = start[t + 1] - start[t];
        if (!count) continue;
        int64_t* const y = result.y.data() + start[t];  // cut to what holds its pixels
        int64_t* const x = result.x.data() + start[t];
        const auto [top, bottom] = std::minmax_element(y, y + count);
        const auto [left, right] = std::minmax_element(x, x + count);
        const Tile tile{
            result.tiles++, i,    ty * kRows + *top, tx * kColumns + *left, *bottom - *top + 1, *right - *left + 1,
            start[t],       count};
        for (int64_t p = 0; p < count; ++p) y[p] += ty * kRows - tile.top, x[p] += tx * kColumns - tile.left;
        result.colours[(ty % every_y) * every_x + tx % every_x].push_back(tile);
      }
  return result;
}

// ------------------------------------------------------------------------------------------------------ box sums

// emit(y, read(y) + ... + read(y + n - 1)) for y < rows. Rows are taken in blocks of n: a sum is the end of one block
// and the beginning of the next, so it costs three additions whatever n is, and nothing is subtracted that could
// cancel. N = n where that is known to the compiler, which then keeps the block in registers; else 0, and `block` holds
// it.
template <int N, typename T, typename Read, typename Emit>
inline void sums_down(int64_t n, int64_t rows, Vector<T>* block, const Read& read, const Emit& emit) {
  Vector<T> registers[N > 0 ? N : 1];
  Vector<T>* const ends = N > 0 ? registers : block;
  const int64_t size = N > 0 ? N : n;
#pragma GCC unroll 9
  for (int64_t t = 0; t < size; ++t) ends[t] = read(t);
  for (int64_t y = 0;; y += size) {
#pragma GCC unroll 9
    for (int64_t t = size - 2; t >= 0; --t) ends[t] += ends[t + 1];
    Vector<T> beginning{};
#pragma GCC unroll 9
    for (int64_t t = 0; t < size; ++t) {
      emit(y + t, ends[t] + beginning);
      if (y + t + 1 == rows) return;
      beginning += ends[t] = read(y + size + t);
    }
  }
}

// Calls f with a compile-time n where there is one (in float32, up to 9), else with 0.
template <typename T, typename F>
void with_constant(int64_t n, const F& f) {
  if constexpr (sizeof(T) == 4) {
    switch (n) {
      case 1:
        return f(std::integral_constant<int, 1>());
      case 2:
        return f(std::integral_constant<int, 2>());
      case 3:
        return f(std::integral_constant<int, 3>());
      case 4:
        return f(std::integral_constant<int, 4>());
      case 5:
        return f(std::integral_constant<int, 5>());
      case 6:
        return f(std::integral_constant<int, 6>());
      case 7:
        return f(std::integral_constant<int, 7>());
      case 8:
        return f(std::integral_constant<int, 8>());
      case 9:
        return f(std::integral_constant<int, 9>());
    }
  }
  f(std::integral_constant<int, 0>());
}

// out[i] (+)= in[i] + in[i + shift] + ... (N terms), i < length.
template <int N, bool kAdd, typename T>
void few_sums(const T* __restrict in, T* __restrict out, int64_t length, int64_t shift) {
  for (int64_t i = 0; i < length; ++i) {
    T sum = kAdd ? out[i] + in[i] : in[i];
    for (int n = 1; n < N; ++n) sum += in[i + n * shift];
    out[i] = sum;
  }
}

template <bool kAdd, typename T>
void up_to_six(const T* in, T* out, int64_t length, int64_t count, int64_t shift) {
  switch (count) {
    case 1:
      return few_sums<1, kAdd>(in, out, length, shift);
    case 2:
      return few_sums<2, kAdd>(in, out, length, shift);
    case 3:
      return few_sums<3, kAdd>(in, out, length, shift);
    case 4:
      return few_sums<4, kAdd>(in, out, length, shift);
    case 5:
      return few_sums<5, kAdd>(in, out, length, shift);
    case 6:
      return few_sums<6, kAdd>(in, out, length, shift);
  }
}

// out[i] = in[i] + ... + in[i + count - 1], i < length: up to 6 terms directly, more as sums of sums of 3 or 5. Rows of
// a field lie one behind the other: what is summed across their ends is not used. scratch: length + count numbers.
template <typename T>
void sums_along(const T* in, T* out, T* scratch, int64_t length, int64_t count) {
  if (count <= 6) return up_to_six<false>(in, out, length, count, 1);
  const int64_t inner = count <= 18 ? 3 : 5, groups = count / inner, rest = count % inner;
  up_to_six<false>(in, scratch, length + (groups - 1) * inner, inner, 1);
  up_to_six<false>(scratch, out, length, std::min<int64_t>(groups, 6), inner);
  for (int64_t n = 6; n < groups; n += 6)
    up_to_six<true>(scratch + n * inner, out, length, std::min<int64_t>(groups - n, 6), inner);
  if (rest) up_to_six<true>(in + groups * inner, out, length, rest, 1);
}

// -------------------------------------------------------------------------------------------------------- tiles

// Everything one thread needs for a tile.
template <typename T>
struct Workspace {
  const Geometry& g;
  std::vector<T> field, sums, scratch, energy, inside, outside, clipped, grad_here, grad_there, block_memory;

  explicit Workspace(const Geometry& geometry) : g(geometry), block_memory((geometry.w + 1) * lanes<T>) {
    const int64_t size = (kRows + g.apart() + 2 * (g.w - 1)) * margined(kColumns) + g.w + lanes<T>;
    for (auto* buffer : {&field, &sums, &scratch, &energy, &inside, &outside}) buffer->assign(size, T(0));
  }
  Vector<T>* block() {
    void* memory = block_memory.data();
    size_t space = block_memory.size() * sizeof(T);
    return static_cast<Vector<T>*>(std::align(sizeof(Vector<T>), g.w * sizeof(Vector<T>), memory, space));
  }
  // Strides of fields of box sums, and of those with w - 1 zeros on both sides; whole vectors may be read.
  int64_t plain(int64_t width) const { return rounded(width + g.apart() + g.w - 1); }
  int64_t margined(int64_t width) const { return rounded(width + g.apart() + 2 * (g.w - 1) + lanes<T>); }
  // Of the gradient around a tile.
  int64_t grad_stride(const Tile& tile) const { return rounded(tile.width + 2 * g.reach() + lanes<T>); }
  int64_t grad_plane(const Tile& tile) const { return (tile.height + 2 * g.reach()) * grad_stride(tile); }

 private:
  static int64_t rounded(int64_t width) { return (width + lanes<T> - 1) / lanes<T> * lanes<T>; }
};

// The place of a tile's first pixel in the padded image.
template <typename T>
const T* origin(const T* padded, const Geometry& g, const Tile& tile) {
  return padded + tile.image * g.c * g.plane() + (tile.top + g.reach()) * g.stride() + tile.left + g.reach();
}

// Squared difference, summed over channels, of two vectors of pixels. C = 0: any number of channels.
template <int C, typename T>
inline Vector<T> squares(const T* here, const T* there, int64_t channels, int64_t plane) {
  Vector<T> difference = load(here) - load(there), sum = difference * difference;
  for (int64_t c = 1; c < (C ? C : channels); ++c) {
    difference = load(here + c * plane) - load(there + c * plane);
    sum += difference * difference;
  }
  return sum;
}

// f(dy, dx) for one offset of each pair.
template <typename F>
void for_each_pair(int64_t r, const F& f) {
  for (int64_t dy = 0; dy <= r; ++dy)
    for (int64_t dx = dy ? -r : 1; dx <= r; ++dx) f(dy, dx);
}

// Energies of the template where its window leaves the search area, for each pair of clips: out[clip * pitch + p].
template <typename T>
void outside_energies(const T* base, const Geometry& g, const Pixels& pixels, const Tile& tile, Workspace<T>& s) {
  const int64_t w = g.w, clips = g.clips(), stride = s.plain(tile.width), length = tile.width + w - 1,
                pitch = tile.pitch();
  const int64_t *y_of = pixels.y.data() + tile.first, *x_of = pixels.x.data() + tile.first;
  for (int64_t y = 0; y < tile.height + w - 1; ++y)
    for (int64_t x = 0; x < length; ++x) {
      T sum = 0;
      for (int64_t c = 0; c < g.c; ++c) {
        const T value = base[c * g.plane() + (y - g.f) * g.stride() + x - g.f];
        sum += value * value;
      }
      s.energy[y * stride + x] = sum;
    }
  s.clipped.resize(clips * clips * pitch);
  for (int64_t a = 0; a < clips; ++a) {
    const Range down = g.range(a);
    for (int64_t y = 0; y < tile.height; ++y) {
      T* __restrict in = s.inside.data() + y * stride, * __restrict out = s.outside.data() + y * stride;
      std::fill(in, in + length, T(0));
      std::fill(out, out + length, T(0));
      for (int64_t u = 0; u < w; ++u) {
        const T* __restrict row = s.energy.data() + (y + u) * stride;
        T* __restrict target = u >= down.first && u < down.last ? in : out;
        for (int64_t x = 0; x < length; ++x) target[x] += row[x];
      }
    }
    sums_along(s.outside.data(), s.sums.data(), s.scratch.data(), (tile.height - 1) * stride + tile.width, w);
    T* all = s.clipped.data() + a * clips * pitch;  // rows outside, all columns; then those outside of a clip
    for (int64_t p = 0; p < tile.count; ++p) {
      const int64_t at = y_of[p] * stride + x_of[p];
      T start = s.sums[at], end = start;
      all[p] = start;
      for (int64_t b = 1; b <= g.f; ++b) {
        all[b * pitch + p] = start += s.inside[at + b - 1];
        all[(g.f + b) * pitch + p] = end += s.inside[at + w - b];
      }
    }
  }
}

// Distances (sums of squares, not normalised) of a tile's masked pixels: out[d * pitch + p]. With the pixels innermost
// every later step runs along them, and the writes stay on few pages.
template <typename T>
void tile_distances(const T* padded, const Geometry& g, const Pixels& pixels, const Tile& tile, Workspace<T>& s,
                    T* out) {
  const int64_t *y_of = pixels.y.data() + tile.first, *x_of = pixels.x.data() + tile.first;
  const int64_t kk = g.k * g.k, stride = s.plain(tile.width), count = tile.count, pitch = tile.pitch();
  const int64_t channels = g.c, line = g.stride(), plane = g.plane();
  const T* base = origin(padded, g, tile);
  std::fill_n(out + kk / 2 * pitch, count, T(0));
  for_each_pair(g.r, [&](int64_t dy, int64_t dx) {
    const Axis down(g, dy), across(g, dx);
    const int64_t rows = tile.height + down.apart, columns = tile.width + across.apart;
    const T* here = base + down.start * line + across.start;
    const T* there = here + dy * line + dx;
    // Captured by value: the compiler keeps in registers what no store can change.
    with_constant<T>(down.count, [=, &s](auto n) {
      for (int64_t x = 0; x < columns + across.count - 1; x += lanes<T>) {
        const auto sum_up = [=, &s](auto read) {
          T* to = s.field.data() + x;
          const auto emit = [=](int64_t y, Vector<T> sum) { store(to + y * stride, sum); };
          sums_down<decltype(n)::value, T>(down.count, rows, s.block(), read, emit);
        };
        if (channels == 3)
          sum_up([=](int64_t y) { return squares<3>(here + y * line + x, there + y * line + x, 3, plane); });
        else
          sum_up([=](int64_t y) { return squares<0>(here + y * line + x, there + y * line + x, channels, plane); });
      }
    });
    sums_along(s.field.data(), s.sums.data(), s.scratch.data(), (rows - 1) * stride + columns, across.count);
    const int64_t d = (dy + g.r) * g.k + dx + g.r;
    T* __restrict plus = out + d * pitch, * __restrict minus = out + (kk - 1 - d) * pitch;
    const T *of_plus = s.sums.data() + down.plus() * stride + across.plus(),
            *of_minus = s.sums.data() + down.minus() * stride + across.minus();
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = y_of[p] * stride + x_of[p];
      plus[p] = of_plus[at], minus[p] = of_minus[at];
    }
  });
  if (g.clips() == 1) return;
  outside_energies(base, g, pixels, tile, s);
  for (int64_t d = 0; d < kk; ++d) {
    const int64_t clip = g.clip(d / g.k - g.r) * g.clips() + g.clip(d % g.k - g.r);
    if (!clip) continue;
    const T* __restrict outside = s.clipped.data() + clip * pitch;
    T* __restrict target = out + d * pitch;
    for (int64_t p = 0; p < count; ++p) target[p] += outside[p];
  }
}

// Adjoint of the energies: adds to s.grad_here what the template's own squares weigh.
template <typename T>
void outside_backward(const T* base, const Geometry& g, const Pixels& pixels, const Tile& tile, Workspace<T>& s,
                      const T* grads) {
  const int64_t w = g.w, clips = g.clips(), stride = s.margined(tile.width), count = tile.count, pitch = tile.pitch();
  const int64_t *y_of = pixels.y.data() + tile.first, *x_of = pixels.x.data() + tile.first;
  const int64_t length = tile.width + w - 1;
  s.clipped.assign(clips * clips * pitch, T(0));
  for (int64_t d = 0; d < g.k * g.k; ++d) {
    const int64_t clip = g.clip(d / g.k - g.r) * clips + g.clip(d % g.k - g.r);
    if (!clip) continue;
    T* __restrict target = s.clipped.data() + clip * pitch;
    const T* __restrict from = grads + d * pitch;
    for (int64_t p = 0; p < count; ++p) target[p] += 2 * from[p];
  }
  std::fill(s.energy.begin(), s.energy.end(), T(0));  // the weight of each of the template's squares
  for (int64_t a = 0; a < clips; ++a) {
    const Range down = g.range(a);
    std::fill(s.inside.begin(), s.inside.end(), T(0));
    std::fill(s.field.begin(), s.field.end(), T(0));
    for (int64_t p = 0; p < count; ++p) {
      const T* of = s.clipped.data() + a * clips * pitch + p;
      T* in = s.inside.data() + y_of[p] * stride + x_of[p];
      T start = 0, end = 0;
      for (int64_t b = g.f; b >= 1; --b) {
        in[b - 1] += start += of[b * pitch];
        in[w - b] += end += of[(g.f + b) * pitch];
      }
      s.field[y_of[p] * stride + w - 1 + x_of[p]] = of[0] + start + end;
    }
    sums_along(s.field.data(), s.outside.data(), s.scratch.data(), (tile.height - 1) * stride + length, w);
    for (int64_t y = 0; y < tile.height; ++y)
      for (int64_t u = 0; u < w; ++u) {
        const auto& rows = u >= down.first && u < down.last ? s.inside : s.outside;
        const T* __restrict from = rows.data() + y * stride;
        T* __restrict target = s.energy.data() + (y + u) * stride;
        for (int64_t x = 0; x < length; ++x) target[x] += from[x];
      }
  }
  const int64_t to_stride = s.grad_stride(tile), corner = g.reach() - g.f;
  for (int64_t c = 0; c < g.c; ++c)
    for (int64_t y = 0; y < tile.height + w - 1; ++y) {
      const T* image = base + c * g.plane() + (y - g.f) * g.stride() - g.f;
      T* __restrict target = s.grad_here.data() + c * s.grad_plane(tile) + (corner + y) * to_stride + corner;
      for (int64_t x = 0; x < length; ++x) target[x] += s.energy[y * stride + x] * image[x];
    }
}

// Adds to grad (of the padded image) the gradient through a tile's distances; grads[d * pitch + p] = dL / d distance.
template <typename T>
void tile_backward(const T* padded, T* grad, const Geometry& g, const Pixels& pixels, const Tile& tile, Workspace<T>& s,
                   const T* grads) {
  const int64_t *y_of = pixels.y.data() + tile.first, *x_of = pixels.x.data() + tile.first;
  const int64_t kk = g.k * g.k, margin = g.w - 1, stride = s.margined(tile.width), count = tile.count;
  const int64_t pitch = tile.pitch(), to_line = s.grad_stride(tile), to_plane = s.grad_plane(tile);
  const int64_t channels = g.c, line = g.stride(), plane = g.plane();
  const T* base = origin(padded, g, tile);
  // A pixel's gradient as the centre's and as the candidate's are kept apart: what one step stores, the next does not
  // load, which the processor would have to wait for.
  s.grad_here.assign(g.c * to_plane, T(0));
  s.grad_there.assign(g.c * to_plane, T(0));
  std::fill(s.field.begin(), s.field.end(), T(0));
  for_each_pair(g.r, [&](int64_t dy, int64_t dx) {
    const Axis down(g, dy), across(g, dx);
    const int64_t starts = tile.height + down.apart, rows = starts + down.count - 1;
    const int64_t columns = tile.width + across.apart + across.count - 1;
    const int64_t d = (dy + g.r) * g.k + dx + g.r;
    const T *plus = grads + d * pitch, *minus = grads + (kk - 1 - d) * pitch;
    T *of_plus = s.field.data() + down.plus() * stride + margin + across.plus(),
      *of_minus = s.field.data() + down.minus() * stride + margin + across.minus();
    for (int64_t p = 0; p < count; ++p) of_plus[y_of[p] * stride + x_of[p]] = 2 * plus[p];
    for (int64_t p = 0; p < count; ++p) of_minus[y_of[p] * stride + x_of[p]] += 2 * minus[p];
    T* along = s.sums.data() + margin * stride;
    std::fill_n(along - (down.count - 1) * stride, (down.count - 1) * stride, T(0));
    sums_along(s.field.data() + g.w - across.count, along, s.scratch.data(), starts * stride - g.w, across.count);
    std::fill_n(along + starts * stride, (down.count - 1) * stride, T(0));
    for (int64_t p = 0; p < count; ++p)
      of_plus[y_of[p] * stride + x_of[p]] = of_minus[y_of[p] * stride + x_of[p]] = T(0);

    const T* first = along - (down.count - 1) * stride;
    const T* here = base + down.start * line + across.start;
    const T* there = here + dy * line + dx;
    T* to_here = s.grad_here.data() + (g.reach() + down.start) * to_line + g.reach() + across.start;
    T* to_there = s.grad_there.data() + (to_here - s.grad_here.data()) + dy * to_line + dx;
    with_constant<T>(down.count, [=, &s](auto n) {
      for (int64_t x = 0; x < columns; x += lanes<T>) {
        const auto spread = [=, &s](auto constant) {
          const int64_t all_channels = decltype(constant)::value ? decltype(constant)::value : channels;
          const auto read = [=](int64_t y) { return load(first + y * stride + x); };
          const auto emit = [=](int64_t y, Vector<T> weight) {
            for (int64_t c = 0; c < all_channels; ++c) {
              const int64_t at = c * plane + y * line + x, to = c * to_plane + y * to_line + x;
              const Vector<T> flow = weight * (load(here + at) - load(there + at));
              store(to_here + to, load(to_here + to) + flow);
              store(to_there + to, load(to_there + to) - flow);
            }
          };
          sums_down<decltype(n)::value, T>(down.count, rows, s.block(), read, emit);
        };
        if (channels == 3)
          spread(std::integral_constant<int64_t, 3>());
        else
          spread(std::integral_constant<int64_t, 0>());
      }
    });
  });
  if (g.clips() > 1) outside_backward(base, g, pixels, tile, s, grads);
  T* corner = grad + (base - padded) - g.reach() * g.stride() - g.reach();
  for (int64_t c = 0; c < g.c; ++c)
    for (int64_t y = 0; y < tile.height + 2 * g.reach(); ++y) {
      const int64_t from = c * to_plane + y * to_line;
      T* target = corner + c * g.plane() + y * g.stride();
      for (int64_t x = 0; x < tile.width + 2 * g.reach(); ++x)
        target[x] += s.grad_here[from + x] + s.grad_there[from + x];
    }
}

// --------------------------------------------------------------------------------------- the graphs' comparison

// exp(x) for x <= 0, as a loop that compilers vectorise; below the normal numbers it is 0. Relative error about 1e-7.
inline void exp_row(float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = std::max(x[i], -87.0f);
    const float t = v * 1.44269504f + 12582912.0f;  // round to the nearest integer by adding 1.5 * 2^23
    const float whole = t - 12582912.0f;
    const float part = (v - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * part + 1.3981999507e-3f;
    p = p * part + 8.3334519073e-3f;
    p = p * part + 4.1665795894e-2f;
    p = p * part + 1.6666665459e-1f;
    p = p * part + 5.0000001201e-1f;
    p = p * part * part + part + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &t, 4);
    bits = (bits - 0x4B400000 + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    x[i] = x[i] < -87.0f ? 0.0f : p * power;
  }
}
inline void exp_row(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::exp(x[i]);
}

// Compares the graphs of kBlock pixels and replaces X, their distances in the output, by the gradient of the loss.
// X and Y (those of the ground truth) are [d][pitch], of which the block is the first columns; `here` of them are
// pixels, the others are computed and left out of the sums of L1 and KL, which are added to l1 and kl. scratch: 2 k^2
// kBlock numbers.
template <typename T>
void compare(T* __restrict X, const T* __restrict Y, int64_t pitch, int64_t here, int64_t k, const Terms<T>& terms,
             T* __restrict scratch, double& l1, double& kl) {
  const int64_t kk = k * k;
  T* __restrict s_x = scratch, * __restrict s_t = scratch + kk * kBlock;
  for (int64_t d = 0; d < kk; ++d)
    for (int64_t b = 0; b < kBlock; ++b) {
      s_x[d * kBlock + b] = X[d * pitch + b] * terms.scale;
      s_t[d * kBlock + b] = Y[d * pitch + b] * terms.scale;
    }
  exp_row(s_x, kk * kBlock);
  exp_row(s_t, kk * kBlock);
  T over_x[kBlock], over_t[kBlock], ln_over_x[kBlock], ln_over_t[kBlock], ln_ratio[kBlock];
  double sum_x[kBlock] = {}, sum_t[kBlock] = {};
  for (int64_t i = 0; i < k; ++i) {  // a line at a time in T, the lines in double
    T line_x[kBlock] = {}, line_t[kBlock] = {};
    for (int64_t d = i * k; d < (i + 1) * k; ++d)
      for (int64_t b = 0; b < kBlock; ++b) line_x[b] += s_x[d * kBlock + b], line_t[b] += s_t[d * kBlock + b];
    for (int64_t b = 0; b < kBlock; ++b) sum_x[b] += line_x[b], sum_t[b] += line_t[b];
  }
  for (int64_t b = 0; b < kBlock; ++b) {
    const double by_x = terms.generalization ? sum_x[b] + kEps : 1, by_t = terms.generalization ? sum_t[b] + kEps : 1;
    over_x[b] = T(1 / by_x), over_t[b] = T(1 / by_t);
    ln_over_x[b] = T(-std::log(by_x)), ln_over_t[b] = T(-std::log(by_t)), ln_ratio[b] = T(std::log(by_x / by_t));
  }
  const auto zero = all(T(0)), eps = all(T(kEps)), ln_eps = all(T(std::log(kEps)));
  const auto scale = all(terms.scale), l1_flow = all(terms.l1_flow), kl_flow = all(terms.kl_flow);
  double sum_l1[kBlock] = {}, sum_kl[kBlock] = {}, mean[kBlock] = {};
  for (int64_t i = 0; i < k; ++i)
    for (int64_t v = 0; v < kBlock; v += lanes<T>) {
      auto line_l1 = zero, line_kl = zero, line_mean = zero;
      for (int64_t d = i * k; d < (i + 1) * k; ++d) {
        T *to_x = s_x + d * kBlock + v, *to_flow = s_t + d * kBlock + v;
        const auto x = load(to_x) * load(over_x + v), t = load(to_flow) * load(over_t + v);
        const auto distance_x = load(X + d * pitch + v), distance_t = load(Y + d * pitch + v);
        const auto whole_x = distance_x * scale + load(ln_over_x + v),
                   whole_t = distance_t * scale + load(ln_over_t + v);
        const auto clamped =
            where_greater(whole_t, ln_eps, whole_t, ln_eps) - where_greater(whole_x, ln_eps, whole_x, ln_eps);
        // Without the normalisations' logarithms where nothing is clamped: flat graphs differ by less than their
        // rounding.
        const auto direct = (distance_t - distance_x) * scale + load(ln_ratio + v);
        const auto target = where_greater(t, eps, t, eps);
        line_kl += target * where_greater(whole_x, ln_eps, where_greater(whole_t, ln_eps, direct, clamped), clamped);
        // G x, with G = dL / dx: sign(x - t) x of L1, and -t / x * x = -t of KL unless x is clamped.
        const auto signed_x = where_greater(x, t, x, where_greater(t, x, zero - x, zero));
        line_l1 += where_greater(x, t, x - t, t - x);
        const auto flow = l1_flow * signed_x - where_greater(eps, x, zero, kl_flow * target);
        line_mean += flow;
        store(to_x, x);
        store(to_flow, flow);
      }
      T of_l1[lanes<T>], of_kl[lanes<T>], of_mean[lanes<T>];
      store(of_l1, line_l1), store(of_kl, line_kl), store(of_mean, line_mean);
      for (int64_t b = 0; b < lanes<T>; ++b)
        sum_l1[v + b] += of_l1[b], sum_kl[v + b] += of_kl[b], mean[v + b] += of_mean[b];
    }
  for (int64_t b = 0; b < here; ++b) l1 += sum_l1[b], kl += sum_kl[b];
  T through_sum[kBlock];  // of the normalisation: every entry acts on all others
  for (int64_t b = 0; b < kBlock; ++b) through_sum[b] = terms.generalization ? T(mean[b]) : T(0);
  for (int64_t d = 0; d < kk; ++d)
    for (int64_t b = 0; b < kBlock; ++b) X[d * pitch + b] = s_t[d * kBlock + b] - through_sum[b] * s_x[d * kBlock + b];
}

// ------------------------------------------------------------------------------------------------------ operators

// The image extended by reflection, or zeros of that size, as planes; the last vector of the last row may be read beyond
// its end.
Tensor padded_zeros(const Tensor& img, const Geometry& g) {
  const int64_t size = g.n * g.c * g.plane();
  const Tensor memory = at::zeros({size + 32}, img.options());
  return memory.narrow(0, 0, size).view({g.n * g.c, g.plane() / g.stride(), g.stride()});
}

Tensor pad(const Tensor& img, const Geometry& g) {
  Tensor padded = padded_zeros(img, g);
  at::reflection_pad2d_out(padded, similarity::planes(img), {g.reach(), g.reach(), g.reach(), g.reach()});
  return padded;
}

Tensor unpad(const Tensor& grad, const Geometry& g) {
  Tensor planes = at::empty({g.n * g.c, g.height, g.width}, grad.options());
  at::reflection_pad2d_backward_out(planes, grad, planes, {g.reach(), g.reach(), g.reach(), g.reach()});
  return planes.view({g.n, g.c, g.height, g.width});
}

// f(tile, workspace) for all tiles, those of one colour in parallel.
template <typename T, typename F>
void for_each_tile(const Pixels& pixels, const Geometry& g, const F& f) {
  for (const auto& tiles : pixels.colours)
    at::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
      Workspace<T> workspace(g);
      for (int64_t t = begin; t < end; ++t) f(tiles[t], workspace);
    });
}

// f(place in a tile's numbers, place in the caller's) for the kk numbers of each pixel; a block of pixels at a time,
// which the caches hold from either side.
template <typename F>
void for_each_number(const Pixels& pixels, const Tile& tile, int64_t kk, const F& f) {
  for (int64_t first = 0; first < tile.count; first += kBlock)
    for (int64_t d = 0; d < kk; ++d)
      for (int64_t p = first; p < std::min(first + kBlock, tile.count); ++p)
        f(d * tile.pitch() + p, pixels.order[tile.first + p] * kk + d);
}

Tensor distances(const Tensor& img, const Tensor& image, const Tensor& row, const Tensor& column, int64_t k, int64_t w,
                 bool zero_border) {
  const Geometry g = similarity::check(img, k, w, zero_border, at::kCPU);
  similarity::check_pixels(img, image, row, column);
  const Pixels pixels = sort_into_tiles(image, row, column, g);
  Tensor result = at::empty({image.numel(), k, k}, img.options());
  if (!image.numel()) return result;
  const Tensor padded = pad(img, g);
  AT_DISPATCH_FLOATING_TYPES(img.scalar_type(), "similarity::distances", [&] {
    const scalar_t* source = padded.const_data_ptr<scalar_t>();
    scalar_t* target = result.mutable_data_ptr<scalar_t>();
    const scalar_t scale = scalar_t(1) / scalar_t(g.c * w * w);
    for_each_tile<scalar_t>(pixels, g, [&](const Tile& tile, Workspace<scalar_t>& workspace) {
      std::vector<scalar_t> local(tile.pitch() * k * k);
      tile_distances(source, g, pixels, tile, workspace, local.data());
      for_each_number(pixels, tile, k * k, [&](int64_t here, int64_t there) { target[there] = local[here] * scale; });
    });
  });
  return result;
}

Tensor distances_backward(const Tensor& grad, const Tensor& img, const Tensor& image, const Tensor& row,
                          const Tensor& column, int64_t k, int64_t w, bool zero_border) {
  const Geometry g = similarity::check(img, k, w, zero_border, at::kCPU);
  similarity::check_pixels(img, image, row, column);
  similarity::check_gradient(grad, img, image.numel(), k);
  const Pixels pixels = sort_into_tiles(image, row, column, g);
  if (!image.numel()) return at::zeros_like(img, at::MemoryFormat::Contiguous);
  const Tensor padded = pad(img, g), flow = grad.contiguous();
  Tensor result = padded_zeros(img, g);
  AT_DISPATCH_FLOATING_TYPES(img.scalar_type(), "similarity::distances_backward", [&] {
    const scalar_t *source = padded.const_data_ptr<scalar_t>(), *from = flow.const_data_ptr<scalar_t>();
    scalar_t* target = result.mutable_data_ptr<scalar_t>();
    const scalar_t scale = scalar_t(1) / scalar_t(g.c * w * w);
    for_each_tile<scalar_t>(pixels, g, [&](const Tile& tile, Workspace<scalar_t>& workspace) {
      std::vector<scalar_t> local(tile.pitch() * k * k);
      for_each_number(pixels, tile, k * k, [&](int64_t here, int64_t there) { local[here] = from[there] * scale; });
      tile_backward(source, target, g, pixels, tile, workspace, local.data());
    });
  });
  return unpad(result, g);
}

// (l1_weight * L1 + kl_weight * KL, L1, KL, gradient of the first with respect to sr); the graphs of one tile at a
// time.
std::tuple<Tensor, Tensor, Tensor, Tensor> loss(const Tensor& sr, const Tensor& hr, const Tensor& mask, int64_t k,
                                                int64_t w, bool zero_border, double sigma, bool generalization,
                                                double l1_weight, double kl_weight, bool with_gradient) {
  const Geometry g = similarity::check(sr, k, w, zero_border, at::kCPU);
  similarity::check_pair(sr, hr, mask);
  similarity::check_settings(sigma, l1_weight, kl_weight);
  const std::vector<Tensor> where = similarity::masked_pixels(mask);
  const int64_t m = where[0].numel(), kk = k * k;
  const Tensor options = at::empty({0}, sr.options());
  if (!m) {
    auto zero = [&] { return at::zeros({}, sr.options()); };
    return {zero(), zero(), zero(), with_gradient ? at::zeros_like(sr, at::MemoryFormat::Contiguous) : options};
  }
  const Pixels pixels = sort_into_tiles(where[0], where[1], where[2], g);
  const Tensor padded_sr = pad(sr, g), padded_hr = pad(hr, g);
  Tensor gradient = with_gradient ? padded_zeros(sr, g) : options;
  std::vector<double> l1_of(pixels.tiles), kl_of(pixels.tiles);
  AT_DISPATCH_FLOATING_TYPES(sr.scalar_type(), "similarity::loss", [&] {
    const scalar_t *x_source = padded_sr.const_data_ptr<scalar_t>(), *t_source = padded_hr.const_data_ptr<scalar_t>();
    scalar_t* target = with_gradient ? gradient.mutable_data_ptr<scalar_t>() : nullptr;
    const double normal = 1.0 / double(g.c * w * w);
    const scalar_t scale = scalar_t(-normal / sigma);
    const double entries = double(m * kk);  // means run over all entries of the batch
    const Terms<scalar_t> terms{scale, scalar_t(l1_weight / entries) * scale, scalar_t(kl_weight / entries) * scale,
                                generalization};
    for_each_tile<scalar_t>(pixels, g, [&](const Tile& tile, Workspace<scalar_t>& workspace) {
      std::vector<scalar_t> X(tile.pitch() * kk), Y(tile.pitch() * kk), scratch(2 * kk * kBlock);
      tile_distances(x_source, g, pixels, tile, workspace, X.data());
      tile_distances(t_source, g, pixels, tile, workspace, Y.data());
      double &l1 = l1_of[tile.index], &kl = kl_of[tile.index];
      for (int64_t p = 0; p < tile.count; p += kBlock)
        compare(X.data() + p, Y.data() + p, tile.pitch(), std::min(kBlock, tile.count - p), k, terms, scratch.data(),
                l1, kl);
      if (with_gradient) tile_backward(x_source, target, g, pixels, tile, workspace, X.data());
    });
  });
  double l1 = 0, kl = 0;
  for (int64_t t = 0; t < pixels.tiles; ++t) l1 += l1_of[t], kl += kl_of[t];
  l1 /= double(m * kk), kl /= double(m * kk);
  // By way of float64: what float32 cannot hold becomes infinite, as in any form, instead of an error.
  auto scalar = [&](double value) {
    return at::scalar_tensor(value, sr.options().dtype(at::kDouble)).to(sr.scalar_type());
  };
  return {scalar(l1_weight * l1 + kl_weight * kl), scalar(l1), scalar(kl),
          with_gradient ? unpad(gradient, g) : options};
}

}  // namespace

TORCH_LIBRARY_IMPL(similarity, CPU, m) {
  m.impl("distances", &distances);
  m.impl("distances_backward", &distances_backward);
  m.impl("loss", &loss);
}
