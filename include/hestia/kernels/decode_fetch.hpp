#pragma once

#include <cstddef>
#include <cstdint>

#include "hestia/kernels/copy_request.hpp"
#include "hestia/kernels/decode_experts.hpp"
#include "hestia/kernels/expert_prefetch.hpp"
#include "hestia/kernels/slot_cache.hpp"

namespace hestia {

/// Blocks that copy.
inline constexpr std::int64_t kFetchCopiers = 32;

/// Parts of a blob that the kernel's own copies bring one by one: gate and up, then down.
inline constexpr std::int64_t kFetchParts = 2;
/// Bytes at the end of the first load that the kernel copies itself while the host thread wakes: up to 1 MiB, and no
/// more than gate and up.
[[nodiscard]] std::size_t fetch_own_bytes(const ExpertBlob& blob);

/// Weights that kernels behind this one will read.
struct FetchAhead {
  const void* data = nullptr;  ///< On the device.
  std::size_t bytes = 0;
};
/// Most of them.
inline constexpr std::size_t kFetchAhead = 2;

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
  /// decode_fetch_workspace() bytes, aligned to 16: zero before the first call, and zero again after each; between a
  /// router that has served and this kernel, what the router wrote.
  void* workspace = nullptr;
  /// Null: the kernel copies all misses itself. Else it copies fetch_own_bytes of the first one and waits for a host
  /// thread that copies what is before them and, behind load i, writes 0 to word i of decode_fetch_flags(workspace).
  /// Memory as the kernel sees it. Ignored by the CPU.
  CopyRequest* request = nullptr;
  ExpertBlob blob = {};  ///< expert_blob(shape); may be left out without `request`.
  /// Null: nothing was guessed. Else the guess for this layer is looked at, and counted where it is right. With
  /// `request`, what the host thread says that it has brought into `staging` is then moved into the slot.
  PrefetchState* prefetch = nullptr;
  /// A blob of device memory, aligned to 16, into which the host thread copies guesses for layers of this one's parity.
  /// Ignored by the CPU.
  const void* staging = nullptr;
  std::int64_t copiers = kFetchCopiers;  ///< Blocks that copy.
  std::int64_t poll_ns = 2000;           ///< Time between looks of the blocks that wait for a miss.
  /// What blocks that wait for the last miss bring into L2 once the hits are through: memory has nothing else to do
  /// then. Changes no result. Ignored by the CPU.
  FetchAhead ahead[kFetchAhead] = {};
};

/// Bytes of DecodeFetch::workspace.
[[nodiscard]] std::size_t decode_fetch_workspace();
/// The words of a workspace that a host thread writes: uint32 [kDecodeMaxTopK].
[[nodiscard]] std::uint32_t* decode_fetch_flags(void* workspace);

/// slot_cache_serve, expert_fetch and decode_gate_up of one step in one: serves `fetch.selected`, copies the misses
/// into their slots of `pool`, and works out h = silu(gate x) * (up x) for every k, of the hits meanwhile and of a miss
/// once its gate and up are there. Then every expert of the step lies where `fetch.answer.slots` says. In a step with
/// misses also decode_down of the hits, y[k] = down h[k], while the misses are on their way; other rows of y stay, and
/// all of them where nothing is missing (decode_down_combine takes it from there, given `hit_slots`). shape: one token;
/// x: bfloat16 [H]; pool: slot_cache_num_slots(cache) blobs; h: bfloat16 [K, F]; y: float32 [K, H], null: no down. The
/// result has the bits of the functions one after the other. CPU, synchronous, one thread. Throws std::invalid_argument
/// for more than one token, a policy or slots with which misses may pass by the cache (`static`, fewer slots than
/// experts of a token), and as those do.
void decode_fetch_gate_up_cpu(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                              void* pool, std::uint16_t* h, float* y);

/// The same on the GPU, asynchronous on `stream` (a cudaStream_t) of the current device, one kernel, no allocation, no
/// word to the host, fit for capture in a graph. Its first block serves, unless the router has
/// (DecodeRouterInputs::fetch), and copies with the next ones; the others compute. `dependent` as decode_gate_up_cuda.
/// Throws RunError with the CUDA error when the launch fails, or when Hestia was built without its CUDA kernels.
void decode_fetch_gate_up_cuda(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                               void* pool, std::uint16_t* h, float* y, void* stream);

}  // namespace hestia
