#pragma once

#include <cstddef>
#include <cstdint>

#include "hestia/kernels/copy_request.hpp"
#include "hestia/kernels/slot_cache.hpp"

namespace hestia {

/// The expert store: the blob of expert e of layer l begins at (l * num_experts + e) * blob_bytes.
struct ExpertStoreShape {
  std::int64_t num_layers = 1;   ///< L
  std::int64_t num_experts = 0;  ///< E per layer
  std::size_t blob_bytes = 0;  ///< Of one expert, a multiple of 16; slot s of the slot buffer begins at s * blob_bytes.
};

/// Blocks of a fetch. From 8 to 64 fill the link alike; few leave the other multiprocessors to kernels that compute
/// with hits meanwhile.
inline constexpr std::int64_t kExpertFetchBlocks = 16;

/// Copies the blobs of wave `wave` (>= 1) of a served step from `store` into their slots: entries [(wave - 1) *
/// step->wave_size, wave * step->wave_size) of `loads` as far as step->loads goes; nothing in a wave past the last.
/// `step` and `loads` as slot_cache_serve writes them for `layer`; `slots`: uint8 [slots, blob_bytes]. Throws
/// std::invalid_argument for a size, layer or wave out of range, or memory not aligned to 16. Synchronous, one thread.
void expert_fetch_cpu(const ExpertStoreShape& shape, const void* store, std::int64_t layer, const SlotCacheStep* step,
                      const SlotCacheLoad* loads, std::int64_t wave, void* slots);

/// The same on the GPU, by its multiprocessors: `store` is a device pointer to pinned, mapped host memory
/// (cudaHostGetDevicePointer) or to device memory, that nobody writes meanwhile; the others are device pointers.
/// Asynchronous on `stream` (a cudaStream_t) of the current device; one launch of `num_blocks` blocks, nothing
/// allocated, no word to the host: it can be captured in a CUDA graph. An empty wave costs little more than the launch.
/// Throws as expert_fetch_cpu does, and RunError with the CUDA error when the launch fails, or when Hestia was built
/// without its CUDA kernels.
void expert_fetch_cuda(const ExpertStoreShape& shape, const void* store, std::int64_t layer, const SlotCacheStep* step,
                       const SlotCacheLoad* loads, std::int64_t wave, void* slots, std::int64_t num_blocks,
                       void* stream);

/// The same wave by the copy engine: one small kernel that asks a host thread through `request` (as the GPU sees it)
/// and ends once all is there. `flags`: uint32 [E] on the device, the words of the request, 0 before and after. The
/// thread must be looking for requests until then: else the kernel never ends. Asynchronous and fit for capture as
/// expert_fetch_cuda; nothing is asked for in an empty wave. Throws std::invalid_argument for a layer or wave out of
/// range, and RunError as that does.
void expert_ask_cuda(const ExpertStoreShape& shape, std::int64_t layer, const SlotCacheStep* step,
                     const SlotCacheLoad* loads, std::int64_t wave, std::uint32_t* flags, CopyRequest* request,
                     void* stream);

}  // namespace hestia
