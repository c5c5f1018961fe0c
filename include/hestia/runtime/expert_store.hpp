#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/kernels/expert_formats.hpp"
#include "hestia/model/expert_blobs.hpp"
#include "hestia/model/moe_model.hpp"

namespace hestia {

/// The routed experts of a model in host memory, one contiguous blob each: expert e of MoE layer l is blob l * E + e,
/// as the model has it (expert_blobs.hpp) or packed in integers (hestia/kernels/expert_formats.hpp). The memory lies in
/// huge pages where the system gives them and is there in full once it is filled. Copies share it; it lives as long as
/// a copy or a tensor of it does.
class ExpertStore {
 public:
  /// Memory for all routed experts of `architecture` in `dtype`, zeros, every page of it touched by
  /// `at::get_num_threads()` threads. Throws RunError with the bytes asked for when there is not as much memory.
  ExpertStore(const Architecture& architecture, torch::Dtype dtype);
  /// The experts of `from`, a filled store of bfloat16, packed in an integer format by `at::get_num_threads()` threads,
  /// with a progress bar when there are many and not `quiet`. Gives the pages of `from` back as it goes: it holds zeros
  /// afterwards. Throws UsageError as stored_expert_bytes does, RunError as the other constructor does, and InputError
  /// naming layer and expert of a weight that is not finite.
  [[nodiscard]] static ExpertStore packed(const Architecture& architecture, const ExpertStore& from,
                                          ExpertFormat format, bool quiet = false);

  /// kBfloat16: blobs are as the model has them, of whatever dtype.
  [[nodiscard]] ExpertFormat format() const noexcept { return format_; }
  /// Of packed blobs, `bytes` alone says something.
  [[nodiscard]] const ExpertBlobLayout& layout() const noexcept { return layout_; }
  /// What packing lost: of each MoE layer, the mean over its experts; empty when the store is not packed.
  [[nodiscard]] const std::vector<ExpertError>& errors() const noexcept { return errors_; }
  /// uint8 [MoE layers * E, layout().bytes], on the CPU: what `load_model` and `create_model` fill.
  [[nodiscard]] const torch::Tensor& blobs() const noexcept { return blobs_NB_; }
  [[nodiscard]] std::int64_t num_blobs() const { return blobs_NB_.size(0); }
  /// Bytes of the store.
  [[nodiscard]] std::int64_t bytes() const { return blobs_NB_.numel(); }

  /// Page-locks the memory and maps it into the address space of CUDA devices, for copies at the speed of the link and
  /// for kernels that read it. To be called once it is filled: pages are locked as they are. With a budget in bytes
  /// that does not hold all blobs, the first of them are, beside a few staging buffers that the others pass through on
  /// their way to a device, and a warning says so. Does nothing the second time. Throws RunError, which says "pinned
  /// host memory", when the system does not allow as much, and UsageError for a budget below the least.
  void pin(std::optional<std::int64_t> budget = std::nullopt);
  /// All blobs are.
  [[nodiscard]] bool pinned() const noexcept;
  /// How many blobs are pinned, from the first on.
  [[nodiscard]] std::int64_t pinned_blobs() const noexcept;
  /// Bytes of pinned memory: of these blobs, and of staging buffers (0: none are needed, or `pin` was not called).
  [[nodiscard]] std::int64_t pinned_bytes() const noexcept;
  [[nodiscard]] std::int64_t staging_bytes() const noexcept;
  /// Where kernels find the blobs. Throws std::logic_error unless all are pinned.
  [[nodiscard]] const std::uint8_t* device_data() const;
  /// Begins to copy `count` blobs from `first` on to memory of a GPU, on a `stream` of it (a cudaStream_t): by the
  /// copy engine, and through the staging buffers what is not pinned, which takes the host as long as reading it. The
  /// copies of one store run on one GPU. Not thread-safe, among copies of this object neither. Throws RunError when
  /// CUDA fails, std::logic_error before `pin`.
  void copy_to_device(std::int64_t first, std::int64_t count, void* to, void* stream) const;

 private:
  struct Memory;
  ExpertStore() = default;
  // `touch`: every page, now; else pages come as they are written.
  void take_memory(std::int64_t num_blobs, bool touch);

  ExpertFormat format_ = ExpertFormat::kBfloat16;
  ExpertBlobLayout layout_;
  std::vector<ExpertError> errors_;
  std::shared_ptr<Memory> memory_;
  torch::Tensor blobs_NB_;
};

/// Reads an amount of pinned memory, "8GiB"; GiB, MiB, KiB, GB, MB and bytes are known. Throws UsageError, which begins
/// with `option`, with what is wrong.
[[nodiscard]] std::int64_t parse_pinned_memory(std::string_view text, std::string_view option);

/// Bytes of one routed expert in a store. Throws UsageError when the format does not hold such experts, saying why: the
/// integer formats are packed from bfloat16 and hold plain gate, up and down matrices of sizes that are multiples of 8.
[[nodiscard]] std::int64_t stored_expert_bytes(const Architecture& architecture, torch::Dtype dtype,
                                               ExpertFormat format);

/// What results call the experts' format: its name, or "float32" where kBfloat16 leaves experts in another dtype.
[[nodiscard]] std::string stored_format_name(torch::Dtype dtype, ExpertFormat format);

/// A model whose routed experts lie in a store. When that is packed, the model's own expert parameters are NaN of no
/// memory: only a decoder runs it.
struct OffloadedModel {
  MoeModel model{nullptr};
  ExpertStore store;
};

/// Looks at a model between loading and packing, and may change it: where adapters are merged (merge_adapters).
using BeforePacking = std::function<void(OffloadedModel&)>;

/// `load_model` with the routed experts in host memory, straight from the mapped files, and the rest on `device`; then
/// `before` is called, the experts are packed in `format`, and the store is pinned within `pinned_budget` when `device`
/// is a GPU; on a CPU a warning says that a budget is of no use. Throws what stored_expert_bytes and, for the budget,
/// ExpertStore::pin (first of all), load_model and ExpertStore do.
[[nodiscard]] OffloadedModel load_offloaded(const std::filesystem::path& directory, torch::Dtype dtype,
                                            torch::Device device, bool quiet = false,
                                            ExpertFormat format = ExpertFormat::kBfloat16,
                                            const BeforePacking& before = {},
                                            std::optional<std::int64_t> pinned_budget = std::nullopt);
/// The same for `create_model`: random weights, in each format those of bfloat16.
[[nodiscard]] OffloadedModel create_offloaded(const Architecture& architecture, torch::Dtype dtype,
                                              torch::Device device, std::uint64_t seed, bool quiet = true,
                                              ExpertFormat format = ExpertFormat::kBfloat16,
                                              const BeforePacking& before = {},
                                              std::optional<std::int64_t> pinned_budget = std::nullopt);

}  // namespace hestia
