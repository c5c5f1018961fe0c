#include "hestia/runtime/expert_store.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

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
  explicit Memory(std::size_t wanted) : reserved(rounded_up(wanted, kHugePage) + kHugePage) {
    begin = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) {
      throw RunError(fmt::format(
          "expert store: no host memory for the routed experts, got {} for {}; use a machine with more memory or a "
          "smaller dtype",
          std::strerror(errno), format_bytes(static_cast<double>(wanted))));
    }
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    data = static_cast<std::uint8_t*>(begin) + (rounded_up(address, kHugePage) - address);
    bytes = wanted;
    // Without huge pages it works as well, slower: the kernel may not have them.
    (void)madvise(data, rounded_up(bytes, kHugePage), MADV_HUGEPAGE);
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
  const auto num_blobs = static_cast<std::int64_t>(architecture.moe_layers().size()) * architecture.num_experts;
  const auto blob_bytes = static_cast<std::int64_t>(layout_.bytes);
  memory_ = std::make_shared<Memory>(static_cast<std::size_t>(num_blobs * blob_bytes));
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
          "(ulimit -l) or use a smaller dtype",
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

OffloadedModel load_offloaded(const std::filesystem::path& directory, torch::Dtype dtype, torch::Device device,
                              bool quiet) {
  ExpertStore store(read_architecture(directory), dtype);
  MoeModel model = load_model(directory, dtype, device, quiet, store.blobs());
  if (device.is_cuda()) {
    store.pin();
  }
  return {std::move(model), std::move(store)};
}

OffloadedModel create_offloaded(const Architecture& architecture, torch::Dtype dtype, torch::Device device,
                                std::uint64_t seed) {
  ExpertStore store(architecture, dtype);
  MoeModel model = create_model(architecture, dtype, device, seed, store.blobs());
  if (device.is_cuda()) {
    store.pin();
  }
  return {std::move(model), std::move(store)};
}

}  // namespace hestia
