#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <torch/types.h>

#include "hestia/model/moe_model.hpp"
#include "hestia/routing/residency.hpp"
#include "hestia/runtime/slot_executor.hpp"

namespace hestia {

/// Residency-aware routing (hestia/routing/residency.hpp) on the slots as they are before the step; all tokens of a
/// step see the same. Nothing is read back. Experts by falling score, ties to the lower index. No gradient.
class SlotResidencySelector : public Selector {
 public:
  /// The rule's slots, policy and scope are not looked at: the executor's slots count, and what strength_LB, float32
  /// [MoE layers, T] on the model's device, says of the bonus in each layer and row; it may be written between steps.
  SlotResidencySelector(ResidencyRule rule, std::shared_ptr<SlotExecutor> slots, torch::Tensor strength_LB);
  [[nodiscard]] torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                     const TokenBatch& batch) override;
  [[nodiscard]] bool preserves_mass(std::int64_t moe_layer, std::int64_t top_k) const override {
    return !slots_->all_resident() && rule_.scales_weights(moe_layer, top_k);
  }

 private:
  ResidencyRule rule_;
  std::shared_ptr<SlotExecutor> slots_;
  torch::Tensor strength_LB_;
};

/// Serves what a trace says, step after step and from the first again after the last, whatever the router says; the
/// mixing weights are still the router's.
class ReplaySelector : public Selector {
 public:
  /// selected_LSTK: int64 [MoE layers, steps, T, K], on the model's device. step_1: int64 [1] there, the step that
  /// comes.
  ReplaySelector(torch::Tensor selected_LSTK, torch::Tensor step_1);
  [[nodiscard]] torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                     const TokenBatch& batch) override;

 private:
  torch::Tensor selected_LSTK_;
  torch::Tensor step_1_;
};

}  // namespace hestia
