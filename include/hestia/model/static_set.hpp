#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <torch/types.h>

#include "hestia/model/moe_model.hpp"

namespace hestia {

/// Lets each MoE layer choose among a fixed set of experts only: every other expert's logit is minus infinity for the
/// selector inside. Mixing weights are not its business: they come from the softmax over all experts, as under a
/// residency prior.
class StaticSetSelector : public Selector {
 public:
  /// `experts` [L]: the experts of each layer, at least one. `inside` chooses (plain Top-K when null). Throws
  /// std::invalid_argument for an expert outside [0, num_experts) or twice in a layer.
  StaticSetSelector(const std::vector<std::vector<std::int64_t>>& experts, std::int64_t num_experts,
                    std::shared_ptr<Selector> inside = nullptr);
  /// Throws std::invalid_argument when a layer has fewer experts than `top_k`.
  [[nodiscard]] torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                     const TokenBatch& batch) override;

 private:
  std::vector<torch::Tensor> forbidden_E_;  // bool, on the CPU until the first use elsewhere
  std::vector<std::int64_t> sizes_;
  std::shared_ptr<Selector> inside_;
};

/// The `size` experts of each layer that `counts` [L, E] (row-major) has most of, ties to the lower index.
[[nodiscard]] std::vector<std::vector<std::int64_t>> most_used_experts(const std::vector<std::int64_t>& counts,
                                                                       std::int64_t num_layers, std::int64_t size);

}  // namespace hestia
