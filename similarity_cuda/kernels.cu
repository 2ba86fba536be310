// Launches of the kernels in kernels.cuh: how large tiles and blocks are.

#include "kernels.cuh"

namespace similarity {
namespace {

constexpr int64_t kThreads = 128;      // of a block, where nothing else decides
constexpr int64_t kBlocks = 2048;      // enough to keep every multiprocessor busy, to the end
constexpr int64_t kColumns = 128;      // of a tile, at most
constexpr int64_t kDistanceRows = 16;  // likewise
constexpr int64_t kGradientRows = kOutputRows * kParts;
constexpr int64_t kListedSide = 256;          // of a rectangle of list_pixels, at most
constexpr int64_t kSharedMemory = 48 * 1024;  // what every GPU gives a block without being asked

int64_t over(int64_t size, int64_t by) { return (size + by - 1) / by; }

// What the GPU gives a block that asks for it.
int64_t shared_memory_on_request() {
  int device = 0, bytes = int(kSharedMemory);
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// The largest tiles, of equal size, whose blocks find the shared memory and the threads that they need: fits(tiling,
// bytes). Of one pixel where none do (Launch::fits). More shared memory than usual is asked for only where it must be,
// because fewer blocks run at a time then.
template <typename F>
Tiling tiling(int64_t height, int64_t width, int64_t rows, const F& fits) {
  const auto largest = [&](int64_t bytes) {
    Tiling t{height, width, height < rows ? height : rows, over(width, over(width, kColumns))};
    while (!fits(t, bytes) && (t.height > 1 || t.width > 1)) {
      if (t.width > 32 || t.height == 1)
        t.width = over(t.width, 2);
      else
        t.height = over(t.height, 2);
    }
    return t;
  };
  const Tiling t = largest(kSharedMemory);
  return fits(t, kSharedMemory) ? t : largest(shared_memory_on_request());
}

int64_t whole_warps(int64_t threads) { return over(threads, 32) * 32; }
int64_t columns(const Geometry& g, const Tiling& t) { return t.width + g.apart() + g.w - 1; }  // that sums need
int64_t distance_threads(const Geometry& g, const Tiling& t) { return whole_warps(columns(g, t)); }
int64_t gradient_threads(const Geometry& g, const Tiling& t) { return whole_warps(kParts * columns(g, t)); }

template <typename T>
bool distances_fit(const Geometry& g, const Tiling& t, int64_t bytes) {
  return Layout<T>::distances(g, t).bytes() <= bytes && distance_threads(g, t) <= kMostThreads;
}

template <typename T>
bool gradients_fit(const Geometry& g, const Tiling& t, int64_t bytes) {
  const int64_t threads = gradient_threads(g, t), around = 2 * g.reach();
  return Layout<T>::gradients(g, t, threads).bytes() <= bytes && threads <= kMostThreads &&
         t.height + around <= kListedSide && t.width + around <= kListedSide;
}

template <typename T>
Tiling distance_tiling(const Geometry& g) {
  const auto fits = [&](const Tiling& t, int64_t bytes) { return distances_fit<T>(g, t, bytes); };
  return tiling(g.height, g.width, kDistanceRows, fits);
}

template <typename T>
Tiling gradient_tiling(const Geometry& g) {
  const auto fits = [&](const Tiling& t, int64_t bytes) { return gradients_fit<T>(g, t, bytes); };
  return tiling(g.height + 2 * g.reach(), g.stride(), kGradientRows, fits);
}

// Ask for so much shared memory; that it cannot be had, the launch reports.
template <typename Kernel>
void request(Kernel kernel, int64_t bytes) {
  if (bytes > kSharedMemory) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

template <typename T>
Map map_of(const Launch<T>& launch, Chunk chunk) {
  return {launch.index, chunk, int(launch.g.height), int(launch.g.width)};
}

}  // namespace

template <typename T>
bool Launch<T>::fits(const Geometry& g) {
  const int64_t bytes = shared_memory_on_request();
  return distances_fit<T>(g, distance_tiling<T>(g), bytes) && gradients_fit<T>(g, gradient_tiling<T>(g), bytes);
}

template <typename T>
void Launch<T>::fill_index(int* to, int64_t count) const {
  similarity::fill_index<<<over(count, kThreads), kThreads, 0, stream>>>(to, places, count, g);
}

template <typename T>
void Launch<T>::distance_sums(const T* padded, Chunk chunk, T* sums) const {
  const Tiling t = distance_tiling<T>(g);
  const auto kernel = g.c == 3   ? similarity::distance_sums<T, 3>
                      : g.c == 1 ? similarity::distance_sums<T, 1>
                                 : similarity::distance_sums<T, 0>;
  const int64_t bytes = Layout<T>::distances(g, t).bytes();
  request(kernel, bytes);
  kernel<<<dim3(chunk.images * t.of_image(), g.r + 1), distance_threads(g, t), bytes, stream>>>(
      padded, map_of(*this, chunk), g, t, sums);
}

template <typename T>
void Launch<T>::outside_energies(const T* padded, Chunk chunk, T* energies) const {
  similarity::outside_energies<T>
      <<<dim3(over(chunk.count, kThreads), g.clips()), kThreads, 0, stream>>>(padded, places, chunk, g, energies);
}

template <typename T>
void Launch<T>::finish(const T* sums, const T* energies, Chunk chunk, T scale, T* distances) const {
  similarity::finish<T>
      <<<dim3(over(chunk.count, kThreads), g.k), kThreads, 0, stream>>>(sums, energies, g, chunk, scale, distances);
}

template <typename T>
int64_t Launch<T>::compared_together() {
  return kLanes;
}

template <typename T>
void Launch<T>::compare(T* sums_x, const T* energies_x, const T* sums_t, const T* energies_t, Chunk chunk,
                        Terms<T> terms, double* totals) const {
  similarity::compare<T><<<over(chunk.count, kLanes), dim3(kLanes, kWarps), 0, stream>>>(
      sums_x, energies_x, sums_t, energies_t, g, chunk, terms, totals);
}

template <typename T>
int Launch<T>::groups(Chunk chunk) const {
  const int64_t wanted = over(kBlocks, chunk.images * gradient_tiling<T>(g).of_image());
  return int(wanted < g.r + 1 ? wanted : g.r + 1);
}

template <typename T>
void Launch<T>::gradient(const T* padded, const T* grads, Chunk chunk, T* total) const {
  const Tiling t = gradient_tiling<T>(g);
  const auto kernel = g.c == 3 ? similarity::gradient<T, 3> : similarity::gradient<T, 1>;
  const int64_t threads = gradient_threads(g, t), bytes = Layout<T>::gradients(g, t, threads).bytes();
  request(kernel, bytes);
  kernel<<<dim3(chunk.images * t.of_image(), groups(chunk), g.c == 3 ? 1 : g.c), threads, bytes, stream>>>(
      padded, grads, map_of(*this, chunk), g, t, total);
}

template <typename T>
void Launch<T>::clip_sums(const T* grads, Chunk chunk, T* result) const {
  similarity::clip_sums<T>
      <<<dim3(over(chunk.count, kThreads), g.clips()), kThreads, 0, stream>>>(grads, g, chunk, result);
}

template <typename T>
void Launch<T>::outside_gradient(const T* padded, const T* clip_sums, Chunk chunk, T* total) const {
  const int64_t positions = chunk.images * (g.height + 2 * g.f) * (g.width + 2 * g.f);
  similarity::outside_gradient<T>
      <<<over(positions, kThreads), kThreads, 0, stream>>>(padded, clip_sums, map_of(*this, chunk), g, total);
}

template <typename T>
void Launch<T>::fold(const T* total, Chunk chunk, T* image) const {
  similarity::fold<T><<<over(chunk.images * g.c * g.height * g.width, kThreads), kThreads, 0, stream>>>(
      total, g, chunk, groups(chunk), image);
}

template struct Launch<float>;
template struct Launch<double>;

}  // namespace similarity
