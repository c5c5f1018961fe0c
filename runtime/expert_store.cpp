#include "hestia/runtime/expert_store.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include <ATen/Parallel.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/progress.hpp"

namespace hestia {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t rounded_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

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
    if (device_data != nullptr) {
      (void)cudaHostUnregister(data);
    }
    (void)munmap(begin, reserved);
  }

  std::size_t reserved;
  void* begin = nullptr;
  std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
  std::uint8_t* device_data = nullptr;  // null until pinned
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

void ExpertStore::pin() {
  if (pinned()) {
    return;
  }
  const auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      throw RunError(fmt::format(
          "expert store: {} of pinned host memory cannot be had, got {} ({}); raise the limit of locked memory "
          "(ulimit -l) or use a smaller expert format",
          format_bytes(static_cast<double>(memory_->bytes)), cudaGetErrorName(error), cudaGetErrorString(error)));
    }
  };
  check(cudaHostRegister(memory_->data, memory_->bytes, cudaHostRegisterMapped | cudaHostRegisterPortable));
  void* device_data = nullptr;
  const cudaError_t mapped = cudaHostGetDevicePointer(&device_data, memory_->data, 0);
  if (mapped != cudaSuccess) {
    (void)cudaHostUnregister(memory_->data);
  }
  check(mapped);
  memory_->device_data = static_cast<std::uint8_t*>(device_data);
}

bool ExpertStore::pinned() const noexcept {
  return memory_->device_data != nullptr;
}

const std::uint8_t* ExpertStore::device_data() const {
  if (!pinned()) {
    throw std::logic_error("expert store: kernels cannot read memory that is not pinned");
  }
  return memory_->device_data;
}

namespace {

// Packs and pins what has been loaded.
OffloadedModel finished(OffloadedModel offloaded, ExpertFormat format, bool quiet, const BeforePacking& before) {
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
    offloaded.store.pin();
  }
  return offloaded;
}

}  // namespace

OffloadedModel load_offloaded(const std::filesystem::path& directory, torch::Dtype dtype, torch::Device device,
                              bool quiet, ExpertFormat format, const BeforePacking& before) {
  const Architecture architecture = read_architecture(directory);
  static_cast<void>(stored_expert_bytes(architecture, dtype, format));
  ExpertStore store(architecture, dtype);
  MoeModel model = load_model(directory, dtype, device, quiet, store.blobs());
  return finished({std::move(model), std::move(store)}, format, quiet, before);
}

OffloadedModel create_offloaded(const Architecture& architecture, torch::Dtype dtype, torch::Device device,
                                std::uint64_t seed, bool quiet, ExpertFormat format, const BeforePacking& before) {
  static_cast<void>(stored_expert_bytes(architecture, dtype, format));
  ExpertStore store(architecture, dtype);
  MoeModel model = create_model(architecture, dtype, device, seed, store.blobs());
  return finished({std::move(model), std::move(store)}, format, quiet, before);
}

}  // namespace hestia
