// The kernels' launches, apart from PyTorch: kernels.cu holds them, cuda.cpp calls them. All are asynchronous, on
// `stream`; pointers are to the GPU's memory. What the kernels compute is said in kernels.cuh.
#pragma once

#include "geometry.h"
#include "terms.h"

typedef struct CUstream_st* cudaStream_t;  // as the CUDA runtime declares it

namespace similarity {

// Pixels [first, first + count) of the batch, graphs of which are in memory at a time. They lie in the images [image,
// image + images): the batch's pixels are in the order of its images.
struct Chunk {
  int64_t first, count, image, images;
};
constexpr int64_t kMostChannels = 65535;                      // a launch has so many blocks in its third dimension
constexpr int64_t kFewestPixels = 8192, kMostPixels = 65536;  // of a chunk, but for the last

struct Places {
  const int64_t *image, *row, *column;  // of the masked pixels of the batch
};

template <typename T>  // float or double
struct Launch {
  Geometry g;
  Places places;
  const int* index;  // (N, H, W): a masked pixel's place in the batch, elsewhere -1
  cudaStream_t stream;

  static bool fits(const Geometry& g);  // whether a block finds the shared memory that the smallest tiles need
  void fill_index(int* to, int64_t count) const;
  void distance_sums(const T* padded, Chunk chunk, T* sums) const;                          // (k^2, count)
  void outside_energies(const T* padded, Chunk chunk, T* energies) const;                   // (clips^2, count)
  void finish(const T* sums, const T* energies, Chunk chunk, T scale, T* distances) const;  // (M, k, k)
  static int64_t compared_together();                                                       // pixels of a block
  void compare(T* sums_x, const T* energies_x, const T* sums_t, const T* energies_t, Chunk chunk, Terms<T> terms,
               double* totals) const;                                           // (blocks, 2)
  int groups(Chunk chunk) const;                                                // of `total`, below
  void gradient(const T* padded, const T* grads, Chunk chunk, T* total) const;  // (groups, images, C, H + .., W + ..)
  void clip_sums(const T* grads, Chunk chunk, T* result) const;                 // (clips, w, count)
  void outside_gradient(const T* padded, const T* clip_sums, Chunk chunk, T* total) const;
  void fold(const T* total, Chunk chunk, T* image) const;  // (N, C, H, W)
};

}  // namespace similarity
