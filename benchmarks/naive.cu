// The published CUDA algorithm, written from its description, as the baseline of bench_ssl.py. It is slow on purpose:
// a thread for each (masked pixel, offset), 16 threads in a block, the sum over the window kept in global memory, and
// in the backward pass two atomic additions for each term. Nothing is slower than published: kernels run on the current
// stream, and the device synchronisations that the published backward pass holds are left out.
//
// Notation: k search area, w window, r = k / 2, f = w / 2. The image (C, H + 2r, W + 2r) is one image extended by
// reflection; a masked pixel (y, x) is the centre of the k x k search area that begins at (y, x) in it. Distances are
// sums of squared differences, not divided by C w^2. A window position outside of the search area counts as 0.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace {

using at::Tensor;

constexpr int kThreads = 16;

struct Sizes {
  int channels, height, width, k, w;  // height and width of the extended image
  int64_t pixels;
};

// No __restrict__: `out` must stay in global memory while it is summed, as published.
__global__ void forward_kernel(const float* image, const int64_t* row, const int64_t* column, float* out, Sizes s) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= s.pixels * s.k * s.k) return;
  const int64_t p = thread / (s.k * s.k);
  const int i = thread % (s.k * s.k) / s.k, j = thread % s.k, r = s.k / 2, f = s.w / 2;
  for (int c = 0; c < s.channels; ++c) {
    const float* area = image + (int64_t(c) * s.height + row[p]) * s.width + column[p];
    for (int u = -f; u <= f; ++u)
      for (int v = -f; v <= f; ++v) {
        const float centre = area[(r + u) * s.width + r + v];
        const int y = i + u, x = j + v;
        const bool inside = y >= 0 && y < s.k && x >= 0 && x < s.k;
        const float difference = centre - (inside ? area[y * s.width + x] : 0.f);
        out[thread] += difference * difference;
      }
  }
}

__global__ void backward_kernel(const float* grad, const float* image, const int64_t* row, const int64_t* column,
                                float* grad_image, Sizes s) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= s.pixels * s.k * s.k) return;
  const int64_t p = thread / (s.k * s.k);
  const int i = thread % (s.k * s.k) / s.k, j = thread % s.k, r = s.k / 2, f = s.w / 2;
  for (int c = 0; c < s.channels; ++c) {
    const int64_t corner = (int64_t(c) * s.height + row[p]) * s.width + column[p];
    const float* area = image + corner;
    float* grad_area = grad_image + corner;
    for (int u = -f; u <= f; ++u)
      for (int v = -f; v <= f; ++v) {
        const int at_centre = (r + u) * s.width + r + v;
        const int y = i + u, x = j + v;
        const bool inside = y >= 0 && y < s.k && x >= 0 && x < s.k;
        const float term = 2 * grad[thread] * (area[at_centre] - (inside ? area[y * s.width + x] : 0.f));
        atomicAdd(grad_area + at_centre, term);
        if (inside) atomicAdd(grad_area + y * s.width + x, -term);
      }
  }
}

Sizes check(const Tensor& image, const Tensor& row, const Tensor& column, int64_t k, int64_t w) {
  TORCH_CHECK(image.is_cuda() && image.scalar_type() == at::kFloat && image.dim() == 3 && image.is_contiguous(),
              "the image must be (C, H, W) float32, contiguous, on a GPU");
  TORCH_CHECK(row.device() == image.device() && column.device() == image.device() && row.is_contiguous() &&
                  column.is_contiguous() && row.scalar_type() == at::kLong && column.scalar_type() == at::kLong,
              "rows and columns must be contiguous int64 vectors beside the image");
  return {int(image.size(0)), int(image.size(1)), int(image.size(2)), int(k), int(w), row.numel()};
}

unsigned blocks(const Sizes& s) { return unsigned((s.pixels * s.k * s.k + kThreads - 1) / kThreads); }

Tensor forward(const Tensor& image, const Tensor& row, const Tensor& column, int64_t k, int64_t w) {
  const Sizes s = check(image, row, column, k, w);
  const c10::cuda::CUDAGuard guard(image.device());
  Tensor out = at::zeros({s.pixels, k * k}, image.options());
  if (!s.pixels) return out;
  forward_kernel<<<blocks(s), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      image.const_data_ptr<float>(), row.const_data_ptr<int64_t>(), column.const_data_ptr<int64_t>(),
      out.mutable_data_ptr<float>(), s);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor backward(const Tensor& grad, const Tensor& image, const Tensor& row, const Tensor& column, int64_t k,
                int64_t w) {
  const Sizes s = check(image, row, column, k, w);
  TORCH_CHECK(grad.device() == image.device() && grad.scalar_type() == at::kFloat && grad.is_contiguous() &&
                  grad.numel() == s.pixels * k * k,
              "the gradient must be (M, k * k) float32, contiguous, beside the image");
  const c10::cuda::CUDAGuard guard(image.device());
  Tensor grad_image = at::zeros_like(image);
  if (!s.pixels) return grad_image;
  backward_kernel<<<blocks(s), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      grad.const_data_ptr<float>(), image.const_data_ptr<float>(), row.const_data_ptr<int64_t>(),
      column.const_data_ptr<int64_t>(), grad_image.mutable_data_ptr<float>(), s);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_image;
}

}  // namespace

TORCH_LIBRARY(similarity_naive, m) {
  m.def("forward(Tensor image, Tensor row, Tensor column, int k, int w) -> Tensor");
  m.def("backward(Tensor grad, Tensor image, Tensor row, Tensor column, int k, int w) -> Tensor");
}

TORCH_LIBRARY_IMPL(similarity_naive, CUDA, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
}
