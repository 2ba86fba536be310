// The self-similarity op on the CPU: distances of masked pixels by box sums, tile by tile, and the fused loss.
//
// Notation as in utils/utils_ssl.py: k search area, w window, r = k / 2, f = w / 2. For one offset d the distance of a
// pixel is the box sum over its window of the squared difference between the image and its shift by d, so neighbouring
// pixels share it. A tile of the image and all it needs fit the caches; the offsets are the outer loops.
//
// Where a window leaves the search area (border "zero", as published) its range of rows and columns shrinks, and the
// energy of the template outside of that range is added. Each axis knows 2f + 1 such ranges, its "clips".
//
// Deterministic: every number is summed in an order that does not depend on threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kTile = 32;   // side of a tile in pixels: its fields stay in the first-level cache
constexpr int64_t kBlock = 16;  // pixels whose graphs are compared together
constexpr double kEps = 1e-10;  // of the normalisation, and of the clamp in the KL term

struct Range {
  int64_t first, last;  // window indices [first, last) of 0 .. w that lie in the search area
  int64_t size() const { return last - first; }
};

struct Geometry {
  int64_t n, c, height, width, k, w, r, f;
  bool zero_border;

  int64_t stride() const { return width + 2 * (r + f); }  // of a row of the padded image
  int64_t plane() const { return (height + 2 * (r + f)) * stride(); }
  int64_t clips() const { return zero_border ? 2 * f + 1 : 1; }
  // 0: the whole window; 1 .. f: so many rows (columns) cut at the start; f + 1 .. 2f: so many less f at the end.
  int64_t clip(int64_t i) const {
    if (!zero_border) return 0;
    const int64_t offset = i - r, start = -r - offset + f, end = offset + f - r;
    return start > 0 ? start : end > 0 ? f + end : 0;
  }
  Range range(int64_t clip) const { return {clip <= f ? clip : 0, clip <= f ? w : w - (clip - f)}; }
};

struct Tile {
  int64_t image, top, left, height, width, first, count;  // [first, first + count) of the pixels sorted by tile
};

struct Pixels {
  std::vector<int64_t> order, y, x;       // index in the caller's order; place inside the tile
  std::vector<std::vector<Tile>> colours;  // tiles of one colour write to disjoint parts of the gradient
  int64_t tiles = 0;
};

// Sort the masked pixels into tiles; tiles without a pixel do not exist.
Pixels sort_into_tiles(const Tensor& image, const Tensor& row, const Tensor& column, const Geometry& g) {
  const int64_t m = image.numel();
  const int64_t *pi = image.const_data_ptr<int64_t>(), *py = row.const_data_ptr<int64_t>(),
                *px = column.const_data_ptr<int64_t>();
  const int64_t down = (g.height + kTile - 1) / kTile, across = (g.width + kTile - 1) / kTile;
  std::vector<int64_t> start(g.n * down * across + 1, 0);
  auto tile_of = [&](int64_t p) { return (pi[p] * down + py[p] / kTile) * across + px[p] / kTile; };
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
    result.order[at] = p, result.y[at] = py[p] % kTile, result.x[at] = px[p] % kTile;
  }
  // A tile's gradient reaches r + f beyond it on each side, that is `apart` tiles further.
  const int64_t apart = (kTile + g.w - 1 + g.k - 1 + kTile - 1) / kTile;
  result.colours.resize(apart * apart);
  for (int64_t i = 0; i < g.n; ++i)
    for (int64_t ty = 0; ty < down; ++ty)
      for (int64_t tx = 0; tx < across; ++tx) {
        const int64_t t = (i * down + ty) * across + tx, count = start[t + 1] - start[t];
        if (!count) continue;
        result.colours[(ty % apart) * apart + tx % apart].push_back(
            {i, ty * kTile, tx * kTile, std::min(kTile, g.height - ty * kTile), std::min(kTile, g.width - tx * kTile),
             start[t], count});
        ++result.tiles;
      }
  return result;
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
void up_to_nine(const T* in, T* out, int64_t length, int64_t count, int64_t shift) {
  switch (count) {
    case 1: return few_sums<1, kAdd>(in, out, length, shift);
    case 2: return few_sums<2, kAdd>(in, out, length, shift);
    case 3: return few_sums<3, kAdd>(in, out, length, shift);
    case 4: return few_sums<4, kAdd>(in, out, length, shift);
    case 5: return few_sums<5, kAdd>(in, out, length, shift);
    case 6: return few_sums<6, kAdd>(in, out, length, shift);
    case 7: return few_sums<7, kAdd>(in, out, length, shift);
    case 8: return few_sums<8, kAdd>(in, out, length, shift);
    case 9: return few_sums<9, kAdd>(in, out, length, shift);
  }
}

// The same for any count: up to 9 terms directly, more as sums of sums of 5. Nothing is subtracted, so that nothing
// cancels as it would in a running sum. Rows of a field lie one behind the other: what is summed across their ends is
// not read.
template <typename T>
void box_sums(const T* in, T* out, T* scratch, int64_t length, int64_t count, int64_t shift) {
  if (count <= 9) return up_to_nine<false>(in, out, length, count, shift);
  const int64_t fives = count / 5, rest = count % 5;
  few_sums<5, false>(in, scratch, length + (fives - 1) * 5 * shift, shift);
  for (int64_t n = 0; n < fives; n += 9) {
    const int64_t now = std::min<int64_t>(9, fives - n);
    if (n == 0)
      up_to_nine<false>(scratch, out, length, now, 5 * shift);
    else
      up_to_nine<true>(scratch + n * 5 * shift, out, length, now, 5 * shift);
  }
  if (rest) up_to_nine<true>(in + fives * 5 * shift, out, length, rest, shift);
}

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

// Everything one thread needs for a tile.
template <typename T>
struct Workspace {
  const Geometry& g;
  int64_t span, stride;  // of fields: the tile and w - 1 on each side
  std::vector<T> squares, scratch, rows, field, spread, energy, grad_template, weights;
  std::vector<T> window, clipped, outside;

  explicit Workspace(const Geometry& geometry) : g(geometry) {
    span = stride = kTile + 2 * (g.w - 1);
    const int64_t size = span * stride + 64;
    for (auto* buffer : {&squares, &scratch, &rows, &field, &spread, &energy, &weights}) buffer->assign(size, T(0));
    grad_template.assign(g.c * size, T(0));
    window.assign(g.w * g.w + g.w * g.clips() + g.w, T(0));
    clipped.assign(g.clips() * g.clips() + g.clips() * (g.w + 1), T(0));
  }
};

// target[x] = sum over C channels of the squared difference of two lines; with C = 1 it is added.
template <int C, typename T>
void squares_of(const T* __restrict here, const T* __restrict there, int64_t plane, T* __restrict target, int64_t n) {
  for (int64_t x = 0; x < n; ++x) {
    T sum = C == 1 ? target[x] : T(0);
    for (int c = 0; c < C; ++c) {
      const T difference = here[c * plane + x] - there[c * plane + x];
      sum += difference * difference;
    }
    target[x] = sum;
  }
}

// The first pixel of the template of a tile: window index (0, 0) of the tile's pixel (0, 0), in the padded image.
template <typename T>
const T* template_of(const T* padded, const Geometry& g, const Tile& tile) {
  return padded + tile.image * g.c * g.plane() + (tile.top + g.r) * g.stride() + tile.left + g.r;
}

// Distances (sums of squares, not normalised) of a tile's masked pixels: out[d * count + p]. With the pixels innermost
// every later step runs along them, and the writes stay on few pages.
template <typename T>
void tile_distances(const T* padded, const Geometry& g, const Pixels& pixels, const Tile& tile, Workspace<T>& s, T* out) {
  const int64_t w = g.w;
  const int64_t *y_of = pixels.y.data() + tile.first, *x_of = pixels.x.data() + tile.first;
  const T* base = template_of(padded, g, tile);
  const int64_t stride = tile.width + w - 1;
  for (int64_t i = 0; i < g.k; ++i) {
    const Range down = g.range(g.clip(i));
    const int64_t rows = tile.height + down.size() - 1;
    for (int64_t j = 0; j < g.k; ++j) {
      const Range across = g.range(g.clip(j));
      const int64_t columns = tile.width + across.size() - 1;
      for (int64_t y = 0; y < rows; ++y) {
        T* __restrict target = s.squares.data() + y * stride;
        const T* here = base + (y + down.first) * g.stride() + across.first;
        const T* there = here + (i - g.r) * g.stride() + (j - g.r);
        if (g.c == 3)
          squares_of<3>(here, there, g.plane(), target, columns);
        else {
          std::fill(target, target + columns, T(0));
          for (int64_t c = 0; c < g.c; ++c) squares_of<1>(here + c * g.plane(), there + c * g.plane(), 0, target, columns);
        }
      }
      box_sums(s.squares.data(), s.rows.data(), s.scratch.data(), (tile.height - 1) * stride + columns,
               down.size(), stride);
      box_sums(s.rows.data(), s.field.data(), s.scratch.data(), (tile.height - 1) * stride + tile.width,
               across.size(), int64_t(1));
      T* __restrict target = out + (i * g.k + j) * tile.count;
      for (int64_t p = 0; p < tile.count; ++p) target[p] = s.field[y_of[p] * stride + x_of[p]];
    }
  }
  if (g.clips() == 1) return;
  // The energy of the template where the window leaves the search area.
  const int64_t clips = g.clips();
  for (int64_t y = 0; y < tile.height + w - 1; ++y)
    for (int64_t x = 0; x < stride; ++x) {
      T sum = 0;
      for (int64_t c = 0; c < g.c; ++c) {
        const T value = base[c * g.plane() + y * g.stride() + x];
        sum += value * value;
      }
      s.energy[y * stride + x] = sum;
    }
  T* whole = s.window.data();    // [w]: sums of the window's rows
  T* cut = s.window.data() + w;  // [w][clips]: of their parts outside of each range of columns
  s.outside.resize(clips * clips * tile.count);
  for (int64_t p = 0; p < tile.count; ++p) {
    const T* e = s.energy.data() + y_of[p] * stride + x_of[p];
    for (int64_t u = 0; u < w; ++u) {
      const T* line = e + u * stride;
      T sum = 0;
      for (int64_t v = 0; v < w; ++v) sum += line[v];
      whole[u] = sum;
      T start = 0, end = 0;
      cut[u * clips] = 0;
      for (int64_t v = 1; v <= g.f; ++v) {
        cut[u * clips + v] = start += line[v - 1];
        cut[u * clips + g.f + v] = end += line[w - v];
      }
    }
    for (int64_t a = 0; a < clips; ++a) {
      const Range down = g.range(a);
      T* target = s.clipped.data();
      T rows_outside = 0;
      for (int64_t u = 0; u < w; ++u)
        if (u < down.first || u >= down.last) rows_outside += whole[u];
      for (int64_t b = 0; b < clips; ++b) target[b] = rows_outside;
      for (int64_t u = down.first; u < down.last; ++u)
        for (int64_t b = 0; b < clips; ++b) target[b] += cut[u * clips + b];
      for (int64_t b = 0; b < clips; ++b) s.outside[(a * clips + b) * tile.count + p] = target[b];
    }
  }
  for (int64_t i = 0; i < g.k; ++i)
    for (int64_t j = 0; j < g.k; ++j) {
      const int64_t clip = g.clip(i) * clips + g.clip(j);
      if (!clip) continue;
      const T* __restrict outside = s.outside.data() + clip * tile.count;
      T* __restrict target = out + (i * g.k + j) * tile.count;
      for (int64_t p = 0; p < tile.count; ++p) target[p] += outside[p];
    }
}

// Adds to grad (of the padded image) the gradient through a tile's distances; grads[d * count + p] = dL / d distance.
template <typename T>
void tile_backward(const T* padded, T* grad, const Geometry& g, const Pixels& pixels, const Tile& tile, Workspace<T>& s,
                   const T* grads) {
  const int64_t w = g.w, margin = w - 1;
  const int64_t *y_of = pixels.y.data() + tile.first, *x_of = pixels.x.data() + tile.first;
  const T* base = template_of(padded, g, tile);
  T* grad_base = grad + (base - padded);
  const int64_t stride = tile.width + 2 * margin;  // of a field with a margin of zeros
  const int64_t template_stride = tile.width + w - 1, template_size = (tile.height + w - 1) * template_stride;
  std::fill(s.field.begin(), s.field.end(), T(0));
  std::fill(s.rows.begin(), s.rows.end(), T(0));
  std::fill(s.grad_template.begin(), s.grad_template.end(), T(0));
  for (int64_t i = 0; i < g.k; ++i) {
    const Range down = g.range(g.clip(i));
    const int64_t rows = tile.height + down.size() - 1;
    for (int64_t j = 0; j < g.k; ++j) {
      const Range across = g.range(g.clip(j));
      const int64_t columns = tile.width + across.size() - 1;
      // Each gradient, spread over its window: the adjoint of a box sum is a box sum over a margin of zeros.
      const T* from = grads + (i * g.k + j) * tile.count;
      for (int64_t p = 0; p < tile.count; ++p) s.field[y_of[p] * stride + margin + x_of[p]] = 2 * from[p];
      box_sums(s.field.data() + w - across.size(), s.rows.data() + margin * stride, s.scratch.data(),
               (tile.height - 1) * stride + columns, across.size(), int64_t(1));
      box_sums(s.rows.data() + (w - down.size()) * stride, s.spread.data(), s.scratch.data(),
               (rows - 1) * stride + columns, down.size(), stride);
      for (int64_t c = 0; c < g.c; ++c)
        for (int64_t y = 0; y < rows; ++y) {
          const int64_t line = c * g.plane() + (y + down.first) * g.stride() + across.first;
          const T* __restrict here = base + line;
          const T* __restrict there = here + (i - g.r) * g.stride() + (j - g.r);
          const T* __restrict weight = s.spread.data() + y * stride;
          T* __restrict to_here =
              s.grad_template.data() + c * template_size + (y + down.first) * template_stride + across.first;
          T* __restrict to_there = grad_base + line + (i - g.r) * g.stride() + (j - g.r);
          for (int64_t x = 0; x < columns; ++x) {
            const T flow = weight[x] * (here[x] - there[x]);
            to_here[x] += flow;
            to_there[x] -= flow;
          }
        }
    }
  }
  if (g.clips() > 1) {
    // Of the template's energy outside of the search area: how often each of its pixels was counted.
    const int64_t clips = g.clips();
    std::fill(s.weights.begin(), s.weights.end(), T(0));
    T* by_clip = s.clipped.data();              // [clips][clips]
    T* by_column = by_clip + clips * clips;     // [clips][w]
    T* by_row = by_column + clips * w;          // [clips]
    for (int64_t p = 0; p < tile.count; ++p) {
      std::fill(s.clipped.begin(), s.clipped.end(), T(0));
      for (int64_t i = 0; i < g.k; ++i)
        for (int64_t j = 0; j < g.k; ++j) 
          by_clip[g.clip(i) * clips + g.clip(j)] += 2 * grads[(i * g.k + j) * tile.count + p];
      for (int64_t a = 0; a < clips; ++a)
        for (int64_t b = 0; b < clips; ++b) {
          const Range across = g.range(b);
          const T value = by_clip[a * clips + b];
          by_row[a] += value;
          for (int64_t v = 0; v < across.first; ++v) by_column[a * w + v] += value;
          for (int64_t v = across.last; v < w; ++v) by_column[a * w + v] += value;
        }
      T* target = s.weights.data() + y_of[p] * template_stride + x_of[p];
      for (int64_t a = 0; a < clips; ++a) {
        const Range down = g.range(a);
        for (int64_t u = 0; u < w; ++u) {
          const bool inside = u >= down.first && u < down.last;
          for (int64_t v = 0; v < w; ++v)
            target[u * template_stride + v] += inside ? by_column[a * w + v] : by_row[a];
        }
      }
    }
    for (int64_t c = 0; c < g.c; ++c)
      for (int64_t y = 0; y < tile.height + w - 1; ++y)
        for (int64_t x = 0; x < template_stride; ++x)
          s.grad_template[c * template_size + y * template_stride + x] +=
              s.weights[y * template_stride + x] * base[c * g.plane() + y * g.stride() + x];
  }
  for (int64_t c = 0; c < g.c; ++c)
    for (int64_t y = 0; y < tile.height + w - 1; ++y)
      for (int64_t x = 0; x < template_stride; ++x)
        grad_base[c * g.plane() + y * g.stride() + x] +=
            s.grad_template[c * template_size + y * template_stride + x];
}

// What the loss needs besides distances.
template <typename T>
struct Terms {
  T scale;              // of a sum of squares in the exponent, negative
  T l1_flow, kl_flow;   // weight / number of entries * scale: dL / d distance = dL / ds * s * scale
  bool generalization;
};

// Compares the graphs of kBlock pixels and replaces X, their distances in the output, by the gradient of the loss.
// X and Y (those of the ground truth) are [d][count], of which the block is the columns [0, here). Sums of L1 and KL are
// added to l1 and kl. scratch: 4 k^2 kBlock numbers.
template <typename T>
void compare(T* X, const T* Y, int64_t count, int64_t here, int64_t k, const Terms<T>& terms, T* scratch, double& l1,
             double& kl) {
  const int64_t kk = k * k, size = kk * kBlock;
  T *ln_x = scratch, *ln_t = scratch + size, *s_x = scratch + 2 * size, *s_t = scratch + 3 * size;
  for (int64_t d = 0; d < kk; ++d)
    for (int64_t b = 0; b < kBlock; ++b) {
      const int64_t at = d * count + std::min(b, here - 1);  // a block that is not full repeats its last pixel
      ln_x[d * kBlock + b] = s_x[d * kBlock + b] = X[at] * terms.scale;
      ln_t[d * kBlock + b] = s_t[d * kBlock + b] = Y[at] * terms.scale;
    }
  exp_row(s_x, size);
  exp_row(s_t, size);
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
  const T eps = T(kEps), ln_eps = T(std::log(kEps));
  double sum_l1[kBlock] = {}, sum_kl[kBlock] = {}, mean[kBlock] = {};
  for (int64_t i = 0; i < k; ++i) {
    T line_l1[kBlock] = {}, line_kl[kBlock] = {}, line_mean[kBlock] = {};
    for (int64_t d = i * k; d < (i + 1) * k; ++d)
      for (int64_t b = 0; b < kBlock; ++b) {
        const int64_t at = d * kBlock + b;
        const T x = s_x[at] * over_x[b], t = s_t[at] * over_t[b], difference = x - t, target = std::max(t, eps);
        const T ln_of_x = std::max(ln_x[at] + ln_over_x[b], ln_eps), ln_of_t = std::max(ln_t[at] + ln_over_t[b], ln_eps);
        line_l1[b] += std::abs(difference);
        // Without the normalisations' logarithms where nothing is clamped: flat graphs differ by less than their rounding.
        const T direct = (ln_t[at] - ln_x[at]) + ln_ratio[b];
        line_kl[b] += target * (ln_of_x > ln_eps && ln_of_t > ln_eps ? direct : ln_of_t - ln_of_x);
        // G x, with G = dL / dx: sign(x - t) x of L1, and -t / x * x = -t of KL unless x is clamped.
        const T sign = T(difference > 0) - T(difference < 0);
        const T flow = terms.l1_flow * sign * x - (x >= eps ? terms.kl_flow * target : T(0));
        line_mean[b] += flow;
        s_x[at] = x;
        s_t[at] = flow;
      }
    for (int64_t b = 0; b < kBlock; ++b)
      sum_l1[b] += line_l1[b], sum_kl[b] += line_kl[b], mean[b] += line_mean[b];
  }
  for (int64_t b = 0; b < here; ++b) l1 += sum_l1[b], kl += sum_kl[b];
  T through_sum[kBlock];  // of the normalisation: every entry acts on all others
  for (int64_t b = 0; b < kBlock; ++b) through_sum[b] = terms.generalization ? T(mean[b]) : T(0);
  for (int64_t d = 0; d < kk; ++d)
    for (int64_t b = 0; b < here; ++b)
      X[d * count + b] = s_t[d * kBlock + b] - through_sum[b] * s_x[d * kBlock + b];
}

// ------------------------------------------------------------------------------------------------------- boundary

Geometry check(const Tensor& img, const Tensor& image, const Tensor& row, const Tensor& column, int64_t k, int64_t w,
               bool zero_border) {
  TORCH_CHECK(img.dim() == 4, "images must be (N, C, H, W), not of ", img.dim(), " dimensions");
  TORCH_CHECK(img.device().is_cpu(), "images must be on the CPU, not on ", img.device());
  TORCH_CHECK(img.scalar_type() == at::kFloat || img.scalar_type() == at::kDouble,
              "images must be float32 or float64, not ", img.scalar_type());
  TORCH_CHECK(k % 2 == 1 && w % 2 == 1 && w >= 1 && w <= k, "search area ", k, " and window ", w,
              " must be odd, the window not larger than the search area");
  const int64_t margin = k / 2 + (zero_border ? 0 : w / 2);
  TORCH_CHECK(img.size(2) > margin && img.size(3) > margin, "images of ", img.size(2), " x ", img.size(3),
              " pixels are too small: both sides must be at least ", margin + 1);
  for (const Tensor* index : {&image, &row, &column}) {
    TORCH_CHECK(index->scalar_type() == at::kLong && index->device().is_cpu() && index->dim() == 1,
                "masked pixels must be int64 vectors on the CPU, not ", index->scalar_type(), " on ", index->device());
    TORCH_CHECK(index->numel() == image.numel(), "masked pixels: ", image.numel(), " images, but ", index->numel(),
                " rows or columns");
  }
  return {img.size(0), img.size(1), img.size(2), img.size(3), k, w, k / 2, w / 2, zero_border};
}

// Reflected by r, then f of anything, never read inside a search area; or reflected by r + f.
Tensor pad(const Tensor& img, const Geometry& g) {
  const int64_t inner = g.zero_border ? g.r : g.r + g.f, outer = g.zero_border ? g.f : 0;
  Tensor padded = at::reflection_pad2d(img, {inner, inner, inner, inner});
  return at::constant_pad_nd(padded, {outer, outer, outer, outer}).contiguous();
}

Tensor unpad(Tensor grad, const Tensor& img, const Geometry& g) {
  const int64_t inner = g.zero_border ? g.r : g.r + g.f, outer = g.zero_border ? g.f : 0;
  grad = grad.slice(2, outer, grad.size(2) - outer).slice(3, outer, grad.size(3) - outer).contiguous();
  return at::reflection_pad2d_backward(grad, img, {inner, inner, inner, inner});
}

Tensor distances(const Tensor& img, const Tensor& image, const Tensor& row, const Tensor& column, int64_t k, int64_t w,
                 bool zero_border) {
  const Geometry g = check(img, image, row, column, k, w, zero_border);
  const Tensor i = image.contiguous(), y = row.contiguous(), x = column.contiguous();
  const Pixels pixels = sort_into_tiles(i, y, x, g);
  Tensor result = at::empty({image.numel(), k, k}, img.options());
  if (!image.numel()) return result;
  const Tensor padded = pad(img, g);
  AT_DISPATCH_FLOATING_TYPES(img.scalar_type(), "similarity::distances", [&] {
    const scalar_t* source = padded.const_data_ptr<scalar_t>();
    scalar_t* target = result.mutable_data_ptr<scalar_t>();
    const scalar_t scale = scalar_t(1) / scalar_t(g.c * w * w);
    for (const auto& tiles : pixels.colours)
      at::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
        Workspace<scalar_t> workspace(g);
        std::vector<scalar_t> local;
        for (int64_t t = begin; t < end; ++t) {
          const Tile& tile = tiles[t];
          local.resize(tile.count * k * k);
          tile_distances(source, g, pixels, tile, workspace, local.data());
          for (int64_t p = 0; p < tile.count; ++p)
            for (int64_t d = 0; d < k * k; ++d)
              target[pixels.order[tile.first + p] * k * k + d] = local[d * tile.count + p] * scale;
        }
      });
  });
  return result;
}

Tensor distances_backward(const Tensor& grad, const Tensor& img, const Tensor& image, const Tensor& row,
                          const Tensor& column, int64_t k, int64_t w, bool zero_border) {
  const Geometry g = check(img, image, row, column, k, w, zero_border);
  TORCH_CHECK(grad.numel() == image.numel() * k * k && grad.scalar_type() == img.scalar_type(),
              "the gradient must have ", image.numel() * k * k, " entries of ", img.scalar_type());
  const Tensor i = image.contiguous(), y = row.contiguous(), x = column.contiguous(), flow = grad.contiguous();
  const Pixels pixels = sort_into_tiles(i, y, x, g);
  if (!image.numel()) return at::zeros_like(img);
  const Tensor padded = pad(img, g);
  Tensor result = at::zeros_like(padded);
  AT_DISPATCH_FLOATING_TYPES(img.scalar_type(), "similarity::distances_backward", [&] {
    const scalar_t *source = padded.const_data_ptr<scalar_t>(), *from = flow.const_data_ptr<scalar_t>();
    scalar_t* target = result.mutable_data_ptr<scalar_t>();
    const scalar_t scale = scalar_t(1) / scalar_t(g.c * w * w);
    for (const auto& tiles : pixels.colours)
      at::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
        Workspace<scalar_t> workspace(g);
        std::vector<scalar_t> local;
        for (int64_t t = begin; t < end; ++t) {
          const Tile& tile = tiles[t];
          local.resize(tile.count * k * k);
          for (int64_t p = 0; p < tile.count; ++p)
            for (int64_t d = 0; d < k * k; ++d)
              local[d * tile.count + p] = from[pixels.order[tile.first + p] * k * k + d] * scale;
          tile_backward(source, target, g, pixels, tile, workspace, local.data());
        }
      });
  });
  return unpad(result, img, g);
}

// (l1_weight * L1 + kl_weight * KL, L1, KL, gradient of the first with respect to sr); the graphs of one tile at a time.
std::tuple<Tensor, Tensor, Tensor, Tensor> loss(const Tensor& sr, const Tensor& hr, const Tensor& image,
                                                const Tensor& row, const Tensor& column, int64_t k, int64_t w,
                                                bool zero_border, double sigma, bool generalization, double l1_weight,
                                                double kl_weight, bool with_gradient) {
  const Geometry g = check(sr, image, row, column, k, w, zero_border);
  TORCH_CHECK(sr.sizes() == hr.sizes() && sr.scalar_type() == hr.scalar_type() && hr.device().is_cpu(),
              "sr ", sr.sizes(), " ", sr.scalar_type(), " and hr ", hr.sizes(), " ", hr.scalar_type(),
              " must be alike, both on the CPU");
  const Tensor i = image.contiguous(), y = row.contiguous(), x = column.contiguous();
  const Pixels pixels = sort_into_tiles(i, y, x, g);
  const int64_t m = image.numel(), kk = k * k;
  const Tensor options = at::empty({0}, sr.options());
  if (!m) {
    auto zero = [&] { return at::zeros({}, sr.options()); };
    return {zero(), zero(), zero(), with_gradient ? at::zeros_like(sr) : options};
  }
  const Tensor padded_sr = pad(sr, g), padded_hr = pad(hr, g);
  Tensor gradient = with_gradient ? at::zeros_like(padded_sr) : options;
  std::vector<double> l1_of(pixels.tiles), kl_of(pixels.tiles);
  AT_DISPATCH_FLOATING_TYPES(sr.scalar_type(), "similarity::loss", [&] {
    const scalar_t *x_source = padded_sr.const_data_ptr<scalar_t>(), *t_source = padded_hr.const_data_ptr<scalar_t>();
    scalar_t* target = with_gradient ? gradient.mutable_data_ptr<scalar_t>() : nullptr;
    const double normal = 1.0 / double(g.c * w * w);
    const scalar_t scale = scalar_t(-normal / sigma);
    const double entries = double(m * kk);  // means run over all entries of the batch
    const Terms<scalar_t> terms{scale, scalar_t(l1_weight / entries) * scale, scalar_t(kl_weight / entries) * scale,
                                generalization};
    int64_t done = 0;
    for (const auto& tiles : pixels.colours) {
      at::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
        Workspace<scalar_t> workspace(g);
        std::vector<scalar_t> X, Y, scratch(4 * kk * kBlock);
        for (int64_t t = begin; t < end; ++t) {
          const Tile& tile = tiles[t];
          X.resize(tile.count * kk), Y.resize(tile.count * kk);
          tile_distances(x_source, g, pixels, tile, workspace, X.data());
          tile_distances(t_source, g, pixels, tile, workspace, Y.data());
          double l1 = 0, kl = 0;
          for (int64_t p = 0; p < tile.count; p += kBlock)
            compare(X.data() + p, Y.data() + p, tile.count, std::min(kBlock, tile.count - p), k, terms, scratch.data(),
                    l1, kl);
          l1_of[done + t] = l1, kl_of[done + t] = kl;
          if (with_gradient) tile_backward(x_source, target, g, pixels, tile, workspace, X.data());
        }
      });
      done += tiles.size();
    }
  });
  double l1 = 0, kl = 0;
  for (int64_t t = 0; t < pixels.tiles; ++t) l1 += l1_of[t], kl += kl_of[t];
  l1 /= double(m * kk), kl /= double(m * kk);
  auto scalar = [&](double value) { return at::scalar_tensor(value, sr.options()); };
  return {scalar(l1_weight * l1 + kl_weight * kl), scalar(l1), scalar(kl),
          with_gradient ? unpad(gradient, sr, g) : options};
}

}  // namespace

TORCH_LIBRARY_IMPL(similarity, CPU, m) {
  m.impl("distances", &distances);
  m.impl("distances_backward", &distances_backward);
  m.impl("loss", &loss);
}
