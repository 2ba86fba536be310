// What the operators demand of their arguments, on the CPU and on GPUs; every message names the offending value.
#pragma once

#include <ATen/ATen.h>

#include <cmath>

#include "geometry.h"

namespace similarity {

inline Geometry check(const at::Tensor& img, int64_t k, int64_t w, bool zero_border, c10::DeviceType device) {
  TORCH_CHECK(img.dim() == 4, "images must be (N, C, H, W), not of ", img.dim(), " dimensions");
  TORCH_CHECK(img.device().type() == device, "images must be on ", device, ", not on ", img.device());
  TORCH_CHECK(img.scalar_type() == at::kFloat || img.scalar_type() == at::kDouble,
              "images must be float32 or float64, not ", img.scalar_type());
  TORCH_CHECK(k % 2 == 1 && w % 2 == 1 && w >= 1 && w <= k, "search area ", k, " and window ", w,
              " must be odd, the window not larger than the search area");
  const Geometry g{img.size(0), img.size(1), img.size(2), img.size(3), k, w, k / 2, w / 2, zero_border};
  TORCH_CHECK(g.c > 0, "images must have a channel");
  TORCH_CHECK(!g.n || (g.height > g.reach() && g.width > g.reach()), "images of ", g.height, " x ", g.width,
              " pixels are too small: both sides must be at least ", g.reach() + 1);
  return g;
}

inline void check_pixels(const at::Tensor& img, const at::Tensor& image, const at::Tensor& row,
                         const at::Tensor& column) {
  for (const at::Tensor* index : {&image, &row, &column}) {
    TORCH_CHECK(index->scalar_type() == at::kLong && index->device() == img.device() && index->dim() == 1,
                "masked pixels must be int64 vectors on ", img.device(), ", not ", index->scalar_type(), " on ",
                index->device());
    TORCH_CHECK(index->numel() == image.numel(), "masked pixels: ", image.numel(), " images, but ", index->numel(),
                " rows or columns");
  }
}

inline void check_gradient(const at::Tensor& grad, const at::Tensor& img, int64_t pixels, int64_t k) {
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({pixels, k, k}) && grad.scalar_type() == img.scalar_type() &&
                  grad.device() == img.device(),
              "the gradient ", grad.sizes(), " ", grad.scalar_type(), " on ", grad.device(), " must be [", pixels, ", ",
              k, ", ", k, "] ", img.scalar_type(), " on ", img.device());
}

inline void check_settings(double sigma, double l1_weight, double kl_weight) {
  TORCH_CHECK_VALUE(sigma > 0 && std::isfinite(sigma), "sigma must be positive and finite, not ", sigma);
  for (const double weight : {l1_weight, kl_weight})
    TORCH_CHECK_VALUE(weight >= 0 && std::isfinite(weight), "weights must be finite and not negative, not ", weight);
}

inline void check_pair(const at::Tensor& sr, const at::Tensor& hr, const at::Tensor& mask) {
  TORCH_CHECK(sr.sizes() == hr.sizes() && sr.scalar_type() == hr.scalar_type() && hr.device() == sr.device(), "sr ",
              sr.sizes(), " ", sr.scalar_type(), " on ", sr.device(), " and hr ", hr.sizes(), " ", hr.scalar_type(),
              " on ", hr.device(), " must be alike");
  TORCH_CHECK(mask.dim() == 4 && mask.size(0) == sr.size(0) && mask.size(1) == 1 && mask.size(2) == sr.size(2) &&
                  mask.size(3) == sr.size(3) && mask.device() == sr.device(),
              "mask ", mask.sizes(), " on ", mask.device(), " must be (N, 1, H, W) of the images ", sr.sizes(), " on ",
              sr.device());
}

// (N * C, H, W), contiguous: what the kernels, which know pointers only, are given. Of three dimensions, because what
// PyTorch makes of (N, C, H, W) may take over its layout (channels_last), also where it writes into memory of ours.
inline at::Tensor planes(const at::Tensor& img) {
  return img.reshape({img.size(0) * img.size(1), img.size(2), img.size(3)}).contiguous();
}

// (image, row, column) of every mask entry equal to 1, in batch order, then raster order. On a GPU the host waits here,
// and nowhere else: their number is the size of what follows.
inline std::vector<at::Tensor> masked_pixels(const at::Tensor& mask) {
  const std::vector<at::Tensor> where = mask.select(1, 0).eq(1).nonzero_numpy();
  if (!where[0].numel())
    TORCH_CHECK_VALUE(!mask.ne(0).any().item<bool>(),
                      "no mask entry equals 1, but some are not 0: the mask must be of ", "{0, 1}");
  return where;
}

}  // namespace similarity
