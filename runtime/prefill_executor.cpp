#include "prefill_executor.hpp"

#include <utility>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/progress.hpp"

namespace hestia {

using torch::Tensor;

PrefillExecutor::PrefillExecutor(const Architecture& architecture, ExpertStore store, torch::Device device,
                                 std::shared_ptr<SlotExecutor> slots)
    : architecture_(architecture), store_(std::move(store)), device_(device), slots_(std::move(slots)) {}

void PrefillExecutor::start_copy(std::int64_t moe_layer) {
  Half& half = halves_[static_cast<std::size_t>(moe_layer % 2)];
  half.used.block(*side_);
  store_.copy_to_device(moe_layer * architecture_.num_experts, architecture_.num_experts,
                        half.blobs_EB.mutable_data_ptr(), side_->stream());
  half.copied.record(*side_);
}

const ExpertWeights& PrefillExecutor::unpacked(const Tensor& pool_NB, std::int64_t first) {
  if (!unpacked_) {
    try {
      unpacked_.emplace(architecture_, store_.format(), architecture_.num_experts, device_);
    } catch (const c10::OutOfMemoryError&) {
      const auto bytes = static_cast<double>(expert_blob_layout(architecture_, torch::kBFloat16).bytes);
      throw RunError(
          fmt::format("prefill: the GPU has no memory for a layer of experts in bfloat16, got out of memory at {}; ask "
                      "for fewer slots with --expert-slots",
                      format_bytes(bytes * static_cast<double>(architecture_.num_experts))));
    }
  }
  return unpacked_->consecutive(pool_NB, first);
}

torch::Tensor PrefillExecutor::run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                   const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                   std::int64_t moe_layer) {
  const torch::NoGradGuard no_grad;
  const std::int64_t num_experts = architecture_.num_experts;
  const bool packed = store_.format() != ExpertFormat::kBfloat16;
  if (!device_.is_cuda()) {
    return grouped_.run(packed ? unpacked(store_.blobs(), moe_layer * num_experts) : experts, x_TD, selected_TK,
                        weights_TK, moe_layer);
  }
  if (slots_->all_resident()) {
    if (packed) {
      return grouped_.run(unpacked(slots_->memory(), moe_layer * num_experts), x_TD, selected_TK, weights_TK,
                          moe_layer);
    }
    ExpertWeights layer = slots_->slots();
    for (Tensor* tensor : {&layer.gate_EFD, &layer.up_EFD, &layer.down_EDF, &layer.gate_bias_EF, &layer.up_bias_EF,
                           &layer.down_bias_ED}) {
      if (tensor->defined()) {
        *tensor = tensor->narrow(0, moe_layer * num_experts, num_experts);
      }
    }
    return grouped_.run(layer, x_TD, selected_TK, weights_TK, moe_layer);
  }
  const auto current = c10::cuda::getCurrentCUDAStream(device_.index());
  if (halves_.empty()) {
    side_ = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_.index());
    const std::int64_t bytes = num_experts * static_cast<std::int64_t>(store_.layout().bytes);
    std::vector<Half> halves(2);
    for (Half& half : halves) {
      try {
        half.blobs_EB = torch::empty({num_experts, static_cast<std::int64_t>(store_.layout().bytes)},
                                     torch::TensorOptions().dtype(torch::kUInt8).device(device_));
      } catch (const c10::OutOfMemoryError&) {
        throw RunError(
            fmt::format("prefill: the GPU has no memory for two layers of experts, got out of memory at 2 x {}; ask "
                        "for fewer slots "
                        "with --expert-slots",
                        format_bytes(static_cast<double>(bytes))));
      }
      if (!packed) {
        half.experts = experts_in_blobs(architecture_, store_.layout(), half.blobs_EB);
      }
      half.used.record(current);
    }
    halves_ = std::move(halves);
  }
  if (moe_layer == 0) {
    start_copy(0);
  }
  // Where the host itself copies, the GPU first gets something to do.
  const bool more = moe_layer + 1 < store_.num_blobs() / num_experts;
  if (more && store_.pinned()) {
    start_copy(moe_layer + 1);
  }
  Half& half = halves_[static_cast<std::size_t>(moe_layer % 2)];
  half.copied.block(current);
  if (packed) {
    const ExpertWeights& layer = unpacked(half.blobs_EB, 0);
    half.used.record(current);
    Tensor out = grouped_.run(layer, x_TD, selected_TK, weights_TK, moe_layer);
    if (more && !store_.pinned()) {
      start_copy(moe_layer + 1);
    }
    return out;
  }
  Tensor out = grouped_.run(half.experts, x_TD, selected_TK, weights_TK, moe_layer);
  half.used.record(current);
  if (more && !store_.pinned()) {
    start_copy(moe_layer + 1);
  }
  return out;
}

void PrefillExecutor::release() {
  unpacked_.reset();
  if (halves_.empty()) {
    return;
  }
  // The allocator knows of the current stream only.
  side_->synchronize();
  halves_.clear();
}

}  // namespace hestia
