#pragma once

#include <cstddef>
#include <cstdint>

#include "hestia/kernels/slot_cache.hpp"

namespace hestia {

/// Where the experts of a store and the slots lie: blob e of MoE layer l begins at (l * num_experts + e) * blob_bytes
/// of the store, slot s at s * blob_bytes of the slots.
struct ExpertFetchShape {
  std::int64_t num_experts = 0;  ///< E per layer, at least 1
  std::size_t blob_bytes = 0;    ///< A multiple of 16, at least 16.
};

/// Copies the experts that wave `wave` (from 1) of a served step loads from the store into their slots: entries
/// [(wave - 1) * wave_size, wave * wave_size) of the list of loads, as far as it goes. Only `answer.step` and
/// `answer.loads` are read. Throws std::invalid_argument for a shape, layer or wave out of range. Synchronous.
void expert_fetch_cpu(const ExpertFetchShape& shape, const SlotCacheAnswer& answer, std::int64_t layer,
                      std::int32_t wave, const std::uint8_t* store, std::uint8_t* slots);

/// The same on the GPU, as a kernel that reads the store over the link: `store` is pinned host memory as the device
/// sees it (cudaHostGetDevicePointer), `slots` and what `answer` points to lie in device memory; store and slots
/// aligned to
/// 16. Asynchronous on `stream` (a cudaStream_t) of the current device, one launch of `blocks` blocks whatever the list
/// holds, no allocation, no word to the host: fit for capture in a graph. Throws RunError with the CUDA error when the
/// launch fails, or when Hestia was built without its CUDA kernels.
void expert_fetch_cuda(const ExpertFetchShape& shape, const SlotCacheAnswer& answer, std::int64_t layer,
                       std::int32_t wave, const std::uint8_t* store, std::uint8_t* slots, void* stream,
                       std::int32_t blocks = 32);

}  // namespace hestia
