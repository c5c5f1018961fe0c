#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/model/moe_model.hpp"

namespace hestia {

/// One tensor of a routed expert in its blob.
struct BlobPart {
  TensorPart part = TensorPart::kExpertGate;
  std::vector<std::int64_t> shape;  ///< Of one expert, as the parameter has it: [F, D], [2F] and so on.
  std::size_t offset = 0;           ///< Bytes from the blob's first, a multiple of 64.
};

/// How everything that one routed expert holds lies in one piece of memory, in the order of use, so that one copy moves
/// it: gate, up, down, or gate and up row by row in turn, their bias, down, its bias.
struct ExpertBlobLayout {
  torch::Dtype dtype = torch::kFloat32;
  std::vector<BlobPart> parts;
  std::size_t bytes = 0;  ///< Of one blob, a multiple of 64: products may sum in an order that depends on alignment.
};

/// The blob of a routed expert whose values are of `dtype`. Throws std::invalid_argument for a dtype that is no float.
[[nodiscard]] ExpertBlobLayout expert_blob_layout(const Architecture& architecture, torch::Dtype dtype);

/// Part `index` of all blobs, [N, shape...], a view of `blobs_NB`: uint8 [N, layout.bytes], contiguous, aligned to 16,
/// any device. No gradient.
[[nodiscard]] torch::Tensor blob_part(const ExpertBlobLayout& layout, std::size_t index, const torch::Tensor& blobs_NB);

/// The experts in N blobs as an executor takes them, views of `blobs_NB`.
[[nodiscard]] ExpertWeights experts_in_blobs(const Architecture& architecture, const ExpertBlobLayout& layout,
                                             const torch::Tensor& blobs_NB);

}  // namespace hestia
