#pragma once

#include <cstddef>
#include <cstdint>

#include "hestia/kernels/decode_experts.hpp"
#include "hestia/kernels/slot_cache.hpp"

namespace hestia {

/// The slot cache of a layer and where its misses come from, in a step of one token. Pointers lie on the device.
struct DecodeFetch {
  SlotCacheShape cache;
  SlotCacheState state;
  std::int64_t layer = 0;
  const std::int32_t* selected = nullptr;   ///< int32 [K], by falling weight, from 0 to E - 1
  const std::int32_t* hit_slots = nullptr;  ///< int32 [K], the slots of the selected before the step, negative: a miss
  /// Pinned, mapped host memory or device memory that nobody writes meanwhile: the blob of expert e of layer l begins
  /// at (l * num_experts + e) * expert_blob(shape).bytes. Aligned to 16.
  const void* store = nullptr;
  SlotCacheAnswer answer;  ///< What serving writes; `wave_slots` is not written.
  /// decode_fetch_workspace() bytes, aligned to 16: zero before the first call, and zero again after each.
  void* workspace = nullptr;
};

/// Bytes of DecodeFetch::workspace.
[[nodiscard]] std::size_t decode_fetch_workspace();

/// slot_cache_serve, expert_fetch and decode_gate_up of one step in one: serves `fetch.selected`, copies the misses
/// into their slots of `pool`, and works out h = silu(gate x) * (up x) for every k, of the hits meanwhile and of a miss
/// once its gate and up are there. Then every expert of the step lies where `fetch.answer.slots` says. shape: one
/// token; x: bfloat16 [H]; pool: slot_cache_num_slots(cache) blobs; h: bfloat16 [K, F]. The result has the bits of the
/// three one after the other. CPU, synchronous, one thread. Throws std::invalid_argument for more than one token, a
/// policy or slots with which misses may pass by the cache (`static`, fewer slots than experts of a token), and as the
/// three do.
void decode_fetch_gate_up_cpu(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                              void* pool, std::uint16_t* h);

/// The same on the GPU, asynchronous on `stream` (a cudaStream_t) of the current device, one kernel, no allocation, no
/// word to the host, fit for capture in a graph. Its first block serves, and copies with the next ones; the others
/// compute. `dependent` as decode_gate_up_cuda. Throws RunError with the CUDA error when the launch fails, or when
/// Hestia was built without its CUDA kernels.
void decode_fetch_gate_up_cuda(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                               void* pool, std::uint16_t* h, void* stream);

}  // namespace hestia
