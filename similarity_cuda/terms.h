// What the loss needs besides distances, on the CPU and on GPUs.
#pragma once

namespace similarity {

constexpr double kEps = 1e-10;  // of the normalisation, and of the clamp in the KL term

template <typename T>
struct Terms {
  T scale;             // of a sum of squares in the exponent, negative
  T l1_flow, kl_flow;  // weight / number of entries * scale: dL / d sum = dL / ds * s * scale
  bool generalization;
};

}  // namespace similarity
