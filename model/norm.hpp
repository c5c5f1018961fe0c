#pragma once

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"

namespace hestia {

/// y = weight * round(x / sqrt(mean(x^2) + eps)) over the last dimension, the mean in float32 (Zhang & Sennrich 2019,
/// arXiv 1910.07467; the rounding to the model's dtype before the weight is transformers').
[[nodiscard]] torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double eps);

/// The architecture's norm of hidden states [..., D]; `bias` is undefined for RMSNorm.
[[nodiscard]] torch::Tensor normalise(const Architecture& architecture, const torch::Tensor& x,
                                      const torch::Tensor& weight, const torch::Tensor& bias);

}  // namespace hestia
