// The self-similarity op on GPUs: memory, and the order of the kernels (launches.h).
//
// Graphs are in memory for one chunk of the batch's pixels at a time, less than a third of all of them where there are
// many, so that both graphs of the loss and all else take less memory than one graph would.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "boundary.h"
#include "launches.h"

namespace {

using at::Tensor;
using similarity::Chunk;
using similarity::Geometry;
using similarity::Terms;

// Masked pixels in the order of their images, and how many of them each image has.
struct Pixels {
  Tensor image, row, column;
  std::vector<int64_t> counts;
};

std::vector<int64_t> numbers(const Tensor& on_host) {
  return {on_host.const_data_ptr<int64_t>(), on_host.const_data_ptr<int64_t>() + on_host.numel()};
}

Pixels in_order(const Geometry& g, const Tensor& image, const Tensor& row, const Tensor& column) {
  const auto outside = [](const Tensor& place, int64_t size) { return place.lt(0).logical_or(place.ge(size)); };
  const Tensor strays = outside(image, g.n).logical_or(outside(row, g.height)).logical_or(outside(column, g.width));
  const Tensor counted = image.clamp(0, g.n - 1);  // a place that does not exist would end the GPU's context
  const Tensor counts = at::zeros({g.n}, image.options()).scatter_add_(0, counted, at::ones_like(image));
  const Tensor descents = image.slice(0, 1).lt(image.slice(0, 0, -1)).sum().unsqueeze(0);
  // The host waits here, and nowhere else.
  std::vector<int64_t> known = numbers(at::cat({counts, descents, strays.sum().unsqueeze(0)}).cpu());
  TORCH_CHECK(!known.back(), known.back(), " masked pixels lie outside of ", g.n, " images of ", g.height, " x ",
              g.width);
  known.pop_back();
  TORCH_CHECK(!known.back(), "masked pixels must be in the order of their images");
  known.pop_back();
  return {image, row, column, known};
}

// Every mask entry equal to 1. The counts are on the host when it has waited for the number of pixels.
Pixels in_mask(const Tensor& mask) {
  const Tensor counts = mask.eq(1).sum({1, 2, 3});
  Tensor on_host = at::empty(counts.sizes(), counts.options().device(at::kCPU).pinned_memory(true));
  on_host.copy_(counts, /*non_blocking=*/true);
  const std::vector<Tensor> where = similarity::masked_pixels(mask);
  return {where[0], where[1], where[2], numbers(on_host)};
}

// What the kernels, which count in int and in the shared memory of a block, can do.
template <typename T>
void check_limits(const Geometry& g, int64_t pixels) {
  const int64_t most = std::numeric_limits<int>::max();
  TORCH_CHECK(pixels <= most, pixels, " masked pixels are too many for ssl_mode cuda: take a smaller batch or crops");
  TORCH_CHECK(g.plane() * g.depth() <= most && g.c <= similarity::kMostChannels, "images of ", g.c, " x ", g.height,
              " x ", g.width, " are too large for ssl_mode cuda: take crops, or ssl_mode boxsum");
  TORCH_CHECK(similarity::Launch<T>::fits(g), "kernel_size_search ", g.k, " with kernel_size_window ", g.w,
              " is too large for ssl_mode cuda: take a smaller kernel_size_search, or ssl_mode boxsum");
}

// One call's images and masked pixels, and every step of the op on them.
template <typename T>
class Batch {
 public:
  Batch(const Geometry& g, const Tensor& img, const Pixels& pixels)
      : g_(g),
        options_(img.options()),
        image_(pixels.image.contiguous()),
        row_(pixels.row.contiguous()),
        column_(pixels.column.contiguous()),
        counts_(pixels.counts),
        index_(at::full({g.n, g.height, g.width}, -1, img.options().dtype(at::kInt))),
        launch_{g,
                {image_.const_data_ptr<int64_t>(), row_.const_data_ptr<int64_t>(), column_.const_data_ptr<int64_t>()},
                index_.const_data_ptr<int>(),
                c10::cuda::getCurrentCUDAStream()} {
    check_limits<T>(g, image_.numel());
    launch_.fill_index(index_.mutable_data_ptr<int>(), image_.numel());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Calls f with each chunk of the pixels.
  template <typename F>
  void for_each_chunk(const F& f) const {
    const int64_t count = image_.numel(),
                  size = std::clamp((count + 3) / 4, similarity::kFewestPixels, similarity::kMostPixels);
    int64_t image = 0, end = 0;  // and of the images' pixels before it
    const auto seek = [&](int64_t pixel) {
      while (end + counts_[image] <= pixel) end += counts_[image++];
      return image;
    };
    for (int64_t first = 0; first < count; first += size) {
      const int64_t pixels = std::min(size, count - first), first_image = seek(first);
      f(Chunk{first, pixels, first_image, seek(first + pixels - 1) - first_image + 1});
    }
  }

  // (N, H + 2 reach, W + 2 reach, depth)
  Tensor pad(const Tensor& img) const {
    const Tensor planes =
        at::reflection_pad2d(similarity::planes(img), {g_.reach(), g_.reach(), g_.reach(), g_.reach()});
    Tensor result = at::zeros({g_.n, planes.size(1), planes.size(2), g_.depth()}, options_);
    result.narrow(3, 0, g_.c).copy_(planes.unflatten(0, {g_.n, g_.c}).permute({0, 2, 3, 1}));
    return result;
  }

  // Sums of squared differences, (k^2, pixels of the chunk).
  Tensor sums(const Tensor& padded, const Chunk& chunk) const {
    Tensor result = at::empty({g_.k * g_.k, chunk.count}, options_);
    result.select(0, g_.k * g_.k / 2).zero_();  // a pixel's distance from itself, which the pairs of offsets leave out
    launch_.distance_sums(padded.const_data_ptr<T>(), chunk, result.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return result;
  }

  // Energies outside of the search area, (clips^2, pixels of the chunk).
  Tensor energies(const Tensor& padded, const Chunk& chunk) const {
    if (g_.clips() == 1) return at::empty({1, 0}, options_);
    Tensor result = at::empty({g_.clips() * g_.clips(), chunk.count}, options_);
    launch_.outside_energies(padded.const_data_ptr<T>(), chunk, result.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return result;
  }

  void write_distances(const Tensor& sums, const Tensor& energies, const Chunk& chunk, Tensor& to) const {
    launch_.finish(sums.const_data_ptr<T>(), energies.const_data_ptr<T>(), chunk, T(1) / T(g_.c * g_.w * g_.w),
                   to.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // -> (2,) of float64: sums of L1 and KL. sums_x becomes the gradient with respect to it.
  Tensor compare(Tensor& sums_x, const Tensor& energies_x, const Tensor& sums_t, const Tensor& energies_t,
                 const Chunk& chunk, const Terms<T>& terms) const {
    const int64_t together = launch_.compared_together();
    Tensor totals = at::empty({(chunk.count + together - 1) / together, 2}, options_.dtype(at::kDouble));
    launch_.compare(sums_x.mutable_data_ptr<T>(), energies_x.const_data_ptr<T>(), sums_t.const_data_ptr<T>(),
                    energies_t.const_data_ptr<T>(), chunk, terms, totals.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return totals.sum(0);
  }

  // to (N, C, H, W) += the gradient with respect to the images; grads: with respect to the sums, (k^2, pixels).
  void add_gradient(const Tensor& padded, const Tensor& grads, const Chunk& chunk, Tensor& to) const {
    Tensor total = at::zeros({launch_.groups(chunk), chunk.images, g_.c, g_.plane()}, options_);
    launch_.gradient(padded.const_data_ptr<T>(), grads.const_data_ptr<T>(), chunk, total.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (g_.clips() > 1) {
      Tensor by_clip = at::empty({g_.clips() * g_.w, chunk.count}, options_);
      launch_.clip_sums(grads.const_data_ptr<T>(), chunk, by_clip.mutable_data_ptr<T>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      launch_.outside_gradient(padded.const_data_ptr<T>(), by_clip.const_data_ptr<T>(), chunk,
                               total.mutable_data_ptr<T>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    launch_.fold(total.const_data_ptr<T>(), chunk, to.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  const Geometry g_;
  const at::TensorOptions options_;
  const Tensor image_, row_, column_;
  const std::vector<int64_t> counts_;  // pixels of each image
  const Tensor index_;
  const similarity::Launch<T> launch_;
};

Tensor distances(const Tensor& img, const Tensor& image, const Tensor& row, const Tensor& column, int64_t k, int64_t w,
                 bool zero_border) {
  const Geometry g = similarity::check(img, k, w, zero_border, at::kCUDA);
  similarity::check_pixels(img, image, row, column);
  const c10::cuda::CUDAGuard guard(img.device());
  Tensor result = at::empty({image.numel(), k, k}, img.options());
  if (!image.numel()) return result;
  const Pixels pixels = in_order(g, image, row, column);
  AT_DISPATCH_FLOATING_TYPES(img.scalar_type(), "similarity::distances", [&] {
    const Batch<scalar_t> batch(g, img, pixels);
    const Tensor padded = batch.pad(img);
    batch.for_each_chunk([&](const Chunk& chunk) {
      batch.write_distances(batch.sums(padded, chunk), batch.energies(padded, chunk), chunk, result);
    });
  });
  return result;
}

Tensor distances_backward(const Tensor& grad, const Tensor& img, const Tensor& image, const Tensor& row,
                          const Tensor& column, int64_t k, int64_t w, bool zero_border) {
  const Geometry g = similarity::check(img, k, w, zero_border, at::kCUDA);
  similarity::check_pixels(img, image, row, column);
  similarity::check_gradient(grad, img, image.numel(), k);
  const c10::cuda::CUDAGuard guard(img.device());
  Tensor result = at::zeros_like(img, at::MemoryFormat::Contiguous);
  if (!image.numel()) return result;
  const Pixels pixels = in_order(g, image, row, column);
  AT_DISPATCH_FLOATING_TYPES(img.scalar_type(), "similarity::distances_backward", [&] {
    const Batch<scalar_t> batch(g, img, pixels);
    const Tensor padded = batch.pad(img), flow = grad.reshape({image.numel(), k * k});
    batch.for_each_chunk([&](const Chunk& chunk) {
      const Tensor of_chunk = flow.narrow(0, chunk.first, chunk.count).t().contiguous() / double(g.c * w * w);
      batch.add_gradient(padded, of_chunk, chunk, result);
    });
  });
  return result;
}

// (l1_weight * L1 + kl_weight * KL, L1, KL, gradient of the first with respect to sr).
std::tuple<Tensor, Tensor, Tensor, Tensor> loss(const Tensor& sr, const Tensor& hr, const Tensor& mask, int64_t k,
                                                int64_t w, bool zero_border, double sigma, bool generalization,
                                                double l1_weight, double kl_weight, bool with_gradient) {
  const Geometry g = similarity::check(sr, k, w, zero_border, at::kCUDA);
  similarity::check_pair(sr, hr, mask);
  similarity::check_settings(sigma, l1_weight, kl_weight);
  const c10::cuda::CUDAGuard guard(sr.device());
  const Pixels pixels = in_mask(mask);
  const int64_t m = pixels.image.numel();
  Tensor gradient = with_gradient ? at::zeros_like(sr, at::MemoryFormat::Contiguous) : at::empty({0}, sr.options());
  if (!m) {
    auto zero = [&] { return at::zeros({}, sr.options()); };
    return {zero(), zero(), zero(), gradient};
  }
  const double entries = double(m * k * k);  // means run over all entries of the batch
  Tensor totals = at::zeros({2}, sr.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(sr.scalar_type(), "similarity::loss", [&] {
    const scalar_t scale = scalar_t(-1.0 / (double(g.c * w * w) * sigma));
    const Terms<scalar_t> terms{scale, scalar_t(l1_weight / entries) * scale, scalar_t(kl_weight / entries) * scale,
                                generalization};
    const Batch<scalar_t> batch(g, sr, pixels);
    const Tensor padded_sr = batch.pad(sr), padded_hr = batch.pad(hr);
    batch.for_each_chunk([&](const Chunk& chunk) {
      Tensor sums = batch.sums(padded_sr, chunk);
      {  // the ground truth's graph is released before the backward pass
        const Tensor sums_t = batch.sums(padded_hr, chunk);
        totals += batch.compare(sums, batch.energies(padded_sr, chunk), sums_t, batch.energies(padded_hr, chunk), chunk,
                                terms);
      }
      if (with_gradient) batch.add_gradient(padded_sr, sums, chunk, gradient);
    });
  });
  totals /= entries;
  const Tensor l1 = totals.select(0, 0).to(sr.scalar_type()), kl = totals.select(0, 1).to(sr.scalar_type());
  return {l1_weight * l1 + kl_weight * kl, l1, kl, gradient};
}

}  // namespace

TORCH_LIBRARY_IMPL(similarity, CUDA, m) {
  m.impl("distances", &distances);
  m.impl("distances_backward", &distances_backward);
  m.impl("loss", &loss);
}
