#pragma once

#include <cstdint>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/kernels/expert_formats.hpp"
#include "hestia/model/expert_blobs.hpp"

namespace hestia {

/// One expert of a model as quantise_expert and the kernels take it.
[[nodiscard]] DecodeExpertsShape packed_shape(const Architecture& architecture, ExpertFormat format);

/// Packed experts in bfloat16, each weight rounded once, for products that take no integers: N of them at a time, in
/// memory of its own. No gradient. Not thread-safe.
class UnpackedExperts {
 public:
  /// Takes the memory at once. Throws c10::OutOfMemoryError when the GPU has none.
  UnpackedExperts(const Architecture& architecture, ExpertFormat format, std::int64_t count, torch::Device device);
  /// Experts 0, 1, ... become blobs first, first + 1, ... of `pool_MB`: uint8 [M, bytes of a packed blob], on the
  /// device. Valid until the next call; asynchronous on the current stream.
  const ExpertWeights& consecutive(const torch::Tensor& pool_MB, std::int64_t first);
  /// Expert i becomes blob blob_N[i], int32 on the device, not negative.
  const ExpertWeights& listed(const torch::Tensor& pool_MB, const torch::Tensor& blob_N);

 private:
  void unpack(const void* pool, const std::int32_t* blobs);

  DecodeExpertsShape shape_;
  std::int64_t count_;
  torch::Tensor blobs_NB_;
  ExpertWeights experts_;
};

}  // namespace hestia
