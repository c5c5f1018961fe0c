#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/types.h>

#include "hestia/model/moe_model.hpp"
#include "hestia/runtime/expert_store.hpp"
#include "hestia/runtime/slot_executor.hpp"
#include "packed_experts.hpp"

namespace hestia {

/// Runs the experts of a prompt as grouped products: on the CPU where the store is; on a GPU with all resident where
/// the slots are; else all experts of a layer are copied to one half of a double buffer while the layer before computes
/// out of the other. Packed experts of a layer are dequantised into bfloat16 first, where they compute. To be called
/// for layers 0, 1, ... in turn. No gradient. Not thread-safe.
class PrefillExecutor : public Executor {
 public:
  /// The double buffer and the memory of a layer in bfloat16 are taken at the first layer and given back by `release`.
  PrefillExecutor(const Architecture& architecture, ExpertStore store, torch::Device device,
                  std::shared_ptr<SlotExecutor> slots);
  /// Throws RunError when the GPU has no memory for them.
  [[nodiscard]] torch::Tensor run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                  const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                  std::int64_t moe_layer) override;
  /// Gives the memory back.
  void release();

 private:
  struct Half {
    torch::Tensor blobs_EB;
    ExpertWeights experts;
    at::cuda::CUDAEvent copied, used;
  };
  void start_copy(std::int64_t moe_layer);
  // Packed blobs first, first + 1, ... of a layer.
  const ExpertWeights& unpacked(const torch::Tensor& pool_NB, std::int64_t first);

  Architecture architecture_;
  ExpertStore store_;
  torch::Device device_;
  std::shared_ptr<SlotExecutor> slots_;
  GroupedExecutor grouped_;
  std::vector<Half> halves_;
  std::optional<UnpackedExperts> unpacked_;
  std::optional<c10::cuda::CUDAStream> side_;
};

}  // namespace hestia
