// Which windows of which pixels are summed: shared by the kernels for the CPU and for GPUs.
//
// Notation as in utils/utils_ssl.py: k search area, w window, r = k / 2, f = w / 2, d an offset. With
// q(x; d) = (I(x) - I(x + d))^2, summed over channels, the distance D(p; d) is a box sum of q(.; d) over the window of
// p, so neighbouring pixels share it. And q(x; -d) = q(x - d; d): the same field of box sums serves the offset -d, read
// at another place. So there is one field for each pair of offsets, 312 of them for k = 25.
//
// Where a window leaves the search area (border "zero", as published) its range of rows and columns shrinks, and the
// energy of the template outside of that range is added. Each axis knows 2f + 1 such ranges, its "clips".
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SIMILARITY_ANYWHERE __host__ __device__
#else
#define SIMILARITY_ANYWHERE
#endif

namespace similarity {

struct Range {
  int first, last;  // window indices [first, last) of 0 .. w that lie in the search area
  SIMILARITY_ANYWHERE int size() const { return last - first; }
  SIMILARITY_ANYWHERE bool holds(int index) const { return index >= first && index < last; }
};

struct Geometry {
  int64_t n, c, height, width, k, w, r, f;
  bool zero_border;

  // How far from a pixel the image is read.
  SIMILARITY_ANYWHERE int64_t reach() const { return zero_border ? r : r + f; }
  SIMILARITY_ANYWHERE int64_t stride() const { return width + 2 * reach(); }  // of a row of the padded image
  SIMILARITY_ANYWHERE int64_t plane() const { return (height + 2 * reach()) * stride(); }
  SIMILARITY_ANYWHERE int64_t depth() const { return c == 3 ? 4 : c; }  // numbers that a pixel has on a GPU
  SIMILARITY_ANYWHERE int64_t clips() const { return zero_border ? 2 * f + 1 : 1; }
  // The largest offset along an axis whose window lies whole in the search area; also the most of Axis::apart.
  SIMILARITY_ANYWHERE int apart() const { return int(zero_border ? r - f : r); }
  // How many rows (columns) of an offset's window lie after the end of the search area; of -offset, before its start.
  SIMILARITY_ANYWHERE int cut(int offset) const { return offset > apart() ? offset - apart() : 0; }
  // Of an offset along one axis. 0: the whole window; 1 .. f: so many rows (columns) cut at the start; f + 1 .. 2f: so
  // many, less f, cut at the end.
  SIMILARITY_ANYWHERE int clip(int offset) const {
    return offset < 0 ? cut(-offset) : cut(offset) ? int(f) + cut(offset) : 0;
  }
  SIMILARITY_ANYWHERE Range range(int clip) const {
    const int side = int(w), half = int(f);
    return {clip <= half ? clip : 0, clip <= half ? side : side - (clip - half)};
  }
};

// Along one axis: where the box sums that a pair of offsets needs begin, relative to the first pixel of a tile, how
// many terms they have, and how far apart those of d and of -d lie.
struct Axis {
  int of_plus, of_minus;  // the sum of a pixel at 0 starts here for d, and there for -d
  int start, count, apart;

  SIMILARITY_ANYWHERE Axis(const Geometry& g, int offset)
      : of_plus(g.cut(-offset) - int(g.f)),
        of_minus(g.cut(offset) - int(g.f) - offset),
        start(of_plus < of_minus ? of_plus : of_minus),
        count(int(g.w) - g.cut(offset) - g.cut(-offset)),
        apart(of_plus + of_minus - 2 * start) {}
  SIMILARITY_ANYWHERE int plus() const { return of_plus - start; }
  SIMILARITY_ANYWHERE int minus() const { return of_minus - start; }
};

}  // namespace similarity
