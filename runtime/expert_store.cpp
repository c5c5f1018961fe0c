#include "hestia/runtime/expert_store.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include <ATen/Parallel.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/progress.hpp"
#include "staging_ring.hpp"

namespace hestia {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t rounded_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

void check_pinned(cudaError_t error, std::int64_t bytes) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    throw RunError(fmt::format(
        "expert store: {} of pinned host memory cannot be had, got {} ({}); raise the limit of locked memory "
        "(ulimit -l), take less with --pinned-memory (model.pinned_memory), or use a smaller expert format",
        format_bytes(static_cast<double>(bytes)), cudaGetErrorName(error), cudaGetErrorString(error)));
  }
}

void check_copy(cudaError_t error) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    throw RunError(fmt::format("expert store: experts cannot be copied to the GPU, got {} ({})",
                               cudaGetErrorName(error), cudaGetErrorString(error)));
  }
}

// Pinned buffers, and an event for each: what was last sent from it has arrived.
class StagingBuffers {
 public:
  explicit StagingBuffers(const PinnedPlan& plan) : events_(static_cast<std::size_t>(plan.num_buffers), nullptr) {
    void* memory = nullptr;
    check_pinned(cudaHostAlloc(&memory, static_cast<std::size_t>(plan.staging_bytes()), cudaHostAllocPortable),
                 plan.staging_bytes());
    memory_ = static_cast<std::uint8_t*>(memory);
    ring_ = std::make_unique<StagingRing>(
        memory_, events_.size(), static_cast<std::size_t>(plan.buffer_bytes),
        [this](std::size_t buffer, void* to, const std::uint8_t* from, std::size_t bytes) {
          check_copy(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
          if (events_[buffer] == nullptr) {
            // Of the GPU that the stream is of, whatever the current one is.
            cudaPointerAttributes attributes{};
            check_copy(cudaPointerGetAttributes(&attributes, to));
            const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(attributes.device));
            check_copy(cudaEventCreateWithFlags(&events_[buffer], cudaEventDisableTiming));
          }
          check_copy(cudaEventRecord(events_[buffer], stream_));
        },
        [this](std::size_t buffer) { check_copy(cudaEventSynchronize(events_[buffer])); });
  }
  StagingBuffers(const StagingBuffers&) = delete;
  StagingBuffers& operator=(const StagingBuffers&) = delete;
  StagingBuffers(StagingBuffers&&) = delete;
  StagingBuffers& operator=(StagingBuffers&&) = delete;
  ~StagingBuffers() {
    for (cudaEvent_t event : events_) {
      if (event != nullptr) {
        (void)cudaEventDestroy(event);
      }
    }
    (void)cudaFreeHost(memory_);
  }

  void copy(void* to, const std::uint8_t* from, std::size_t bytes, cudaStream_t stream) {
    stream_ = stream;
    ring_->copy(to, from, bytes);
  }

 private:
  std::uint8_t* memory_ = nullptr;
  std::vector<cudaEvent_t> events_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<StagingRing> ring_;
};

}  // namespace

struct ExpertStore::Memory {
  Memory(std::size_t wanted, bool touch) : reserved(rounded_up(wanted, kHugePage) + kHugePage) {
    begin = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) {
      throw RunError(fmt::format(
          "expert store: no host memory for the routed experts, got {} for {}; use a machine with more memory or a "
          "smaller expert format",
          std::strerror(errno), format_bytes(static_cast<double>(wanted))));
    }
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    data = static_cast<std::uint8_t*>(begin) + (rounded_up(address, kHugePage) - address);
    bytes = wanted;
    // Without huge pages it works as well, slower: the kernel may not have them.
    (void)madvise(data, rounded_up(bytes, kHugePage), MADV_HUGEPAGE);
    if (!touch) {
      return;
    }
    const auto pages = static_cast<std::int64_t>(rounded_up(bytes, kHugePage) / kHugePage);
    at::parallel_for(0, pages, 1, [&](std::int64_t first, std::int64_t last) {
      constexpr std::size_t kSmallPage = 4096;
      for (std::size_t at = static_cast<std::size_t>(first) * kHugePage;
           at < static_cast<std::size_t>(last) * kHugePage; at += kSmallPage) {
        data[at] = 0;
      }
    });
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  Memory(Memory&&) = delete;
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    if (registered) {
      (void)cudaHostUnregister(data);
    }
    (void)munmap(begin, reserved);
  }

  std::size_t reserved;
  void* begin = nullptr;
  std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
  std::uint8_t* device_data = nullptr;  // null until all is pinned
  bool registered = false;              // the first plan.blobs are
  std::optional<PinnedPlan> plan;
  std::unique_ptr<StagingBuffers> staging;
};

ExpertStore::ExpertStore(const Architecture& architecture, torch::Dtype dtype)
    : layout_(expert_blob_layout(architecture, dtype)) {
  take_memory(static_cast<std::int64_t>(architecture.moe_layers().size()) * architecture.num_experts, /*touch=*/true);
}

void ExpertStore::take_memory(std::int64_t num_blobs, bool touch) {
  const auto blob_bytes = static_cast<std::int64_t>(layout_.bytes);
  memory_ = std::make_shared<Memory>(static_cast<std::size_t>(num_blobs * blob_bytes), touch);
  blobs_NB_ = torch::from_blob(
      memory_->data, {num_blobs, blob_bytes}, [memory = memory_](void* /*data*/) {}, torch::kUInt8);
}

void ExpertStore::pin(std::optional<std::int64_t> budget) {
  Memory& memory = *memory_;
  if (memory.plan) {
    return;
  }
  const auto blob_bytes = static_cast<std::int64_t>(layout_.bytes);
  const PinnedPlan plan = plan_pinned(num_blobs(), blob_bytes, budget.value_or(bytes()));
  const std::int64_t wanted = plan.blobs * blob_bytes;
  if (plan.num_buffers > 0) {
    memory.staging = std::make_unique<StagingBuffers>(plan);
  }
  if (wanted > 0) {
    check_pinned(cudaHostRegister(memory.data, static_cast<std::size_t>(wanted),
                                  cudaHostRegisterMapped | cudaHostRegisterPortable),
                 wanted);
    memory.registered = true;
  }
  if (plan.num_buffers == 0) {
    void* device_data = nullptr;
    check_pinned(cudaHostGetDevicePointer(&device_data, memory.data, 0), wanted);
    memory.device_data = static_cast<std::uint8_t*>(device_data);
  } else {
    log_warning(fmt::format(
        "expert store: {} of {} experts are pinned host memory ({} of {}); the others pass through {} staging buffers "
        "of {}, and the host copies every miss: steps wait for it and run without CUDA graphs",
        plan.blobs, num_blobs(), format_bytes(static_cast<double>(wanted)), format_bytes(static_cast<double>(bytes())),
        plan.num_buffers, format_bytes(static_cast<double>(plan.buffer_bytes))));
  }
  memory.plan = plan;
}

bool ExpertStore::pinned() const noexcept {
  return memory_->device_data != nullptr;
}

std::int64_t ExpertStore::pinned_blobs() const noexcept {
  return memory_->plan ? memory_->plan->blobs : 0;
}

std::int64_t ExpertStore::pinned_bytes() const noexcept {
  return pinned_blobs() * static_cast<std::int64_t>(layout_.bytes);
}

std::int64_t ExpertStore::staging_bytes() const noexcept {
  return memory_->plan ? memory_->plan->staging_bytes() : 0;
}

void ExpertStore::copy_to_device(std::int64_t first, std::int64_t count, void* to, void* stream) const {
  if (!memory_->plan) {
    throw std::logic_error("expert store: experts come to a GPU once they are pinned");
  }
  const std::size_t blob_bytes = layout_.bytes;
  const auto direct = static_cast<std::size_t>(std::clamp<std::int64_t>(pinned_blobs() - first, 0, count));
  const std::uint8_t* from = memory_->data + static_cast<std::size_t>(first) * blob_bytes;
  auto* target = static_cast<std::uint8_t*>(to);
  if (direct > 0) {
    check_copy(
        cudaMemcpyAsync(target, from, direct * blob_bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
  }
  if (direct < static_cast<std::size_t>(count)) {
    memory_->staging->copy(target + direct * blob_bytes, from + direct * blob_bytes,
                           (static_cast<std::size_t>(count) - direct) * blob_bytes, static_cast<cudaStream_t>(stream));
  }
}

const std::uint8_t* ExpertStore::device_data() const {
  if (!pinned()) {
    throw std::logic_error("expert store: kernels cannot read memory that is not pinned");
  }
  return memory_->device_data;
}

namespace {

void check_budget(const Architecture& architecture, std::int64_t blob_bytes, std::optional<std::int64_t> budget) {
  if (budget) {
    const auto layers = static_cast<std::int64_t>(architecture.moe_layers().size());
    static_cast<void>(plan_pinned(layers * architecture.num_experts, blob_bytes, *budget));
  }
}

// Packs and pins what has been loaded.
OffloadedModel finished(OffloadedModel offloaded, ExpertFormat format, bool quiet, const BeforePacking& before,
                        std::optional<std::int64_t> pinned_budget) {
  const torch::NoGradGuard no_grad;
  if (before) {
    before(offloaded);
  }
  if (format != ExpertFormat::kBfloat16) {
    const torch::Tensor& staged = offloaded.store.blobs();
    ExpertStore packed = ExpertStore::packed(offloaded.model->architecture(), offloaded.store, format, quiet);
    const auto* const first = static_cast<const std::uint8_t*>(staged.const_data_ptr());
    for (torch::Tensor& parameter : offloaded.model->parameters()) {
      const auto* const at = static_cast<const std::uint8_t*>(parameter.const_data_ptr());
      if (parameter.device().is_cpu() && at >= first && at < first + staged.numel()) {
        parameter.set_data(
            torch::full({}, std::numeric_limits<double>::quiet_NaN(), parameter.options()).expand(parameter.sizes()));
      }
    }
    offloaded.store = std::move(packed);
  }
  if (offloaded.model->device().is_cuda()) {
    offloaded.store.pin(pinned_budget);
  } else if (pinned_budget) {
    log_warning("--pinned-memory: nothing is pinned on a CPU, where the experts are computed with as they lie");
  }
  return offloaded;
}

}  // namespace

OffloadedModel load_offloaded(const std::filesystem::path& directory, torch::Dtype dtype, torch::Device device,
                              bool quiet, ExpertFormat format, const BeforePacking& before,
                              std::optional<std::int64_t> pinned_budget) {
  const Architecture architecture = read_architecture(directory);
  check_budget(architecture, stored_expert_bytes(architecture, dtype, format), pinned_budget);
  ExpertStore store(architecture, dtype);
  MoeModel model = load_model(directory, dtype, device, quiet, store.blobs());
  return finished({std::move(model), std::move(store)}, format, quiet, before, pinned_budget);
}

OffloadedModel create_offloaded(const Architecture& architecture, torch::Dtype dtype, torch::Device device,
                                std::uint64_t seed, bool quiet, ExpertFormat format, const BeforePacking& before,
                                std::optional<std::int64_t> pinned_budget) {
  check_budget(architecture, stored_expert_bytes(architecture, dtype, format), pinned_budget);
  ExpertStore store(architecture, dtype);
  MoeModel model = create_model(architecture, dtype, device, seed, store.blobs());
  return finished({std::move(model), std::move(store)}, format, quiet, before, pinned_budget);
}

}  // namespace hestia
