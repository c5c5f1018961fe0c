#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/model/expert_blobs.hpp"
#include "hestia/model/moe_model.hpp"

namespace hestia {

/// The routed experts of a model in host memory, one contiguous blob each (expert_blobs.hpp): expert e of MoE layer l
/// is blob l * E + e. The memory lies in huge pages where the system gives them and is there in full from the start.
/// Copies share it; it lives as long as a copy or a tensor of it does.
class ExpertStore {
 public:
  /// Memory for all routed experts of `architecture` in `dtype`, zeros, every page of it touched by
  /// `at::get_num_threads()` threads. Throws RunError with the bytes asked for when there is not as much memory.
  ExpertStore(const Architecture& architecture, torch::Dtype dtype);

  [[nodiscard]] const ExpertBlobLayout& layout() const noexcept { return layout_; }
  /// uint8 [MoE layers * E, layout().bytes], on the CPU: what `load_model` and `create_model` fill.
  [[nodiscard]] const torch::Tensor& blobs() const noexcept { return blobs_NB_; }
  [[nodiscard]] std::int64_t num_blobs() const { return blobs_NB_.size(0); }
  /// Bytes of the store.
  [[nodiscard]] std::int64_t bytes() const { return blobs_NB_.numel(); }

  /// Page-locks the memory and maps it into the address space of CUDA devices, for copies at the speed of the link and
  /// for kernels that read it. To be called once it is filled: pages are locked as they are. Does nothing the second
  /// time. Throws RunError, which says "pinned host memory", when the system does not allow as much.
  void pin();
  [[nodiscard]] bool pinned() const noexcept;
  /// Where kernels find the blobs. Throws std::logic_error unless pinned.
  [[nodiscard]] const std::uint8_t* device_data() const;

 private:
  struct Memory;
  ExpertBlobLayout layout_;
  std::shared_ptr<Memory> memory_;
  torch::Tensor blobs_NB_;
};

/// A model whose routed experts lie in a store.
struct OffloadedModel {
  MoeModel model{nullptr};
  ExpertStore store;
};

/// `load_model` with the routed experts in host memory, straight from the mapped files, and the rest on `device`; the
/// store is pinned when that is a GPU. Throws what load_model, ExpertStore and pin do.
[[nodiscard]] OffloadedModel load_offloaded(const std::filesystem::path& directory, torch::Dtype dtype,
                                            torch::Device device, bool quiet = false);
/// The same for `create_model`: random weights.
[[nodiscard]] OffloadedModel create_offloaded(const Architecture& architecture, torch::Dtype dtype,
                                              torch::Device device, std::uint64_t seed);

}  // namespace hestia
