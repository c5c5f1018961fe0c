#include "hestia/model/expert_blobs.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "layer_weights.hpp"

namespace hestia {

using torch::Tensor;

ExpertBlobLayout expert_blob_layout(const Architecture& architecture, torch::Dtype dtype) {
  using P = TensorPart;
  if (!torch::isFloatingType(dtype)) {
    throw std::invalid_argument("expert blobs: values must be floats");
  }
  constexpr std::size_t kAlignment = 64;
  const std::size_t width = torch::elementSize(dtype);
  const std::vector<TensorSpec> specs = tensor_specs(architecture);
  const std::vector<std::int64_t> moe_layers = architecture.moe_layers();
  ExpertBlobLayout layout;
  layout.dtype = dtype;
  for (const P part :
       {P::kExpertGate, P::kExpertUp, P::kExpertGateUp, P::kExpertGateUpBias, P::kExpertDown, P::kExpertDownBias}) {
    const auto spec = std::ranges::find_if(specs, [&](const TensorSpec& candidate) {
      return candidate.part == part && candidate.layer == moe_layers.front() && candidate.expert <= 0;
    });
    if (spec == specs.end()) {
      continue;
    }
    std::vector<std::int64_t> shape = spec->shape;
    if (spec->expert < 0) {
      shape.erase(shape.begin());  // stacked in the checkpoint
    }
    if (spec->transposed) {
      std::swap(shape[0], shape[1]);
    }
    std::size_t bytes = width;
    for (const std::int64_t size : shape) {
      bytes *= static_cast<std::size_t>(size);
    }
    layout.parts.push_back({part, std::move(shape), layout.bytes});
    layout.bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  return layout;
}

Tensor blob_part(const ExpertBlobLayout& layout, std::size_t index, const Tensor& blobs_NB) {
  if (blobs_NB.dim() != 2 || blobs_NB.scalar_type() != torch::kUInt8 || !blobs_NB.is_contiguous() ||
      blobs_NB.size(1) != static_cast<std::int64_t>(layout.bytes)) {
    throw std::invalid_argument("expert blobs: must be uint8 [N, bytes of a blob], contiguous");
  }
  const torch::NoGradGuard no_grad;
  const BlobPart& part = layout.parts.at(index);
  const auto width = static_cast<std::int64_t>(torch::elementSize(layout.dtype));
  std::vector<std::int64_t> shape = part.shape;
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
  shape.insert(shape.begin(), blobs_NB.size(0));
  strides.insert(strides.begin(), blobs_NB.size(1) / width);
  const Tensor values = blobs_NB.view(layout.dtype);
  return values.as_strided(shape, strides, values.storage_offset() + static_cast<std::int64_t>(part.offset) / width);
}

ExpertWeights experts_in_blobs(const Architecture& architecture, const ExpertBlobLayout& layout,
                               const Tensor& blobs_NB) {
  LayerWeights weights;
  for (std::size_t i = 0; i < layout.parts.size(); ++i) {
    weights[layout.parts[i].part] = blob_part(layout, i, blobs_NB);
  }
  ExpertWeights experts = weights.experts(/*with_adapters=*/false);
  experts.swiglu_limit = architecture.swiglu_limit;
  experts.swiglu_alpha = architecture.swiglu_alpha;
  return experts;
}

}  // namespace hestia
