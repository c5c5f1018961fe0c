#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "hestia/model/key_value_cache.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/routing/residency.hpp"
#include "hestia/runtime/slot_executor.hpp"

namespace hestia {

/// Why the decode kernels do not take a model's steps: "" when they do. They take bfloat16 models on a GPU whose layers
/// all have routed experts only, with ordinary attention, RMSNorm and softmax routing (OLMoE, Qwen3-MoE, Mixtral).
[[nodiscard]] std::string fused_step_refusal(MoeModel& model, const SlotExecutor& slots, std::int64_t rows);

/// A decode step in about seven kernels a layer: what MoeModelImpl::step does with a slot executor, through the decode
/// kernels. Captured in a graph it follows tokens, position and step in device memory. Results agree with the model's
/// own within bfloat16 rounding; those of a row do not depend on the other rows, on slots or waves, bit by bit. Not
/// thread-safe.
class FusedStep {
 public:
  /// `model` must be one that fused_step_refusal takes. Query, key and value weights are put behind one another, the
  /// model's own becoming views of them. `cache` must outlive this, as must what `rotations` views.
  FusedStep(MoeModel model, KeyValueCache& cache, std::shared_ptr<SlotExecutor> slots, const Rotations& rotations,
            std::int64_t rows);
  ~FusedStep();

  /// Experts of a trace, int64 [MoE layers, steps, B, K] on the GPU; nullopt: the router's.
  void replay(std::optional<torch::Tensor> steps_LSBK);
  /// Whether kernels may start before the one before them ends, with weights on their way (compute capability 9.0 has
  /// it); at first they may where the GPU has it. The same bits either way.
  void start_early(bool allowed);
  /// nullopt: plain routing. strength_LB: float32 [MoE layers, B] on the GPU, times which the rule's bonus counts in
  /// each layer and row; it may be written between steps.
  void route_by(std::optional<ResidencyRule> rule, torch::Tensor strength_LB);

  /// One token more for each row. tokens_B1, position_1, step_1: int64 on the GPU; logits_BV: float32, written. The
  /// cache must have tokens. Asynchronous on the current stream.
  void run(const torch::Tensor& tokens_B1, const torch::Tensor& position_1, const torch::Tensor& step_1,
           const torch::Tensor& logits_BV);

  // What the last step routed.
  [[nodiscard]] const torch::Tensor& selected() const noexcept;       ///< int32 [L, B, K]
  [[nodiscard]] const torch::Tensor& weights() const noexcept;        ///< float32 [L, B, K]
  [[nodiscard]] const torch::Tensor& router_logits() const noexcept;  ///< float32 [L, B, E]

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hestia
