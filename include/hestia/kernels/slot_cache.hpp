#pragma once

#include <cstddef>
#include <cstdint>

#include "hestia/routing/cache_policy.hpp"

namespace hestia {

/// The slot cache of the offloading decoder (docs/routing.md, "The slot cache on the device"). A slot holds the weights
/// of one expert; the L MoE layers are cut into groups of `layers_per_group` layers that share C slots: 1 for C slots
/// per layer, L for one pool. In a group, `layer in the group * E + expert` is the expert's *key*. Slots are numbered
/// through: group g has [g * C, (g + 1) * C), and the scratch slots follow the last group.
struct SlotCacheShape {
  std::int64_t num_layers = 1;   ///< L
  std::int64_t num_experts = 0;  ///< E per layer, from 1 to kSlotCacheMaxExperts
  std::int64_t slots = 0;        ///< C per group, at least 1
  std::int64_t layers_per_group = 1;
  /// Slots that all groups share, for misses that the policy does not keep. At least 1 under `static` and wherever a
  /// step may ask for more experts than C.
  std::int64_t scratch_slots = 1;
  CachePolicyKind policy = CachePolicyKind::kLru;  ///< Any but belady, which knows the future.
  double gamma = 0.9;                              ///< Discount of `gamma`, in [0, 1].
  /// Every step first drops all residents that it does not use: forces evictions, for tests of exactness.
  bool stress = false;
};

inline constexpr std::int64_t kSlotCacheMaxExperts = 512;
/// Most expert ids (rows times K) of one step.
inline constexpr std::int64_t kSlotCacheMaxSelected = 2048;

/// Counts of one layer since the last reset: what `hestia simulate` counts.
struct SlotCacheCounts {
  std::int64_t steps = 0;
  std::int64_t requests = 0;
  std::int64_t hits = 0;
  std::int64_t cold = 0;
  std::int64_t loads = 0;
  std::int64_t evictions = 0;
};

/// What the layers of a group share.
struct SlotCacheGroup {
  std::int64_t serial = 0;         ///< Of the next touch.
  std::uint64_t random = 0;        ///< State of the generator of `random`.
  std::int64_t num_residents = 0;  ///< Slots in use.
};

/// Where the parts of a cache lie in its memory; all of it in host or all in device memory.
struct SlotCacheState {
  ExpertState* experts = nullptr;     ///< [L, E]
  SlotCacheCounts* counts = nullptr;  ///< [L]
  SlotCacheGroup* groups = nullptr;   ///< [groups]
  std::int32_t* slot_of = nullptr;    ///< [L, E]: the slot that holds the expert, -1: none
  std::int32_t* key_of = nullptr;     ///< [groups, C]: the key that the slot holds, -1: free
  std::uint8_t* requested = nullptr;  ///< [L, E]: 1 once requested since the last reset
};

/// One expert to be copied into one slot.
struct SlotCacheLoad {
  std::int32_t expert = 0;
  std::int32_t slot = 0;
  std::int32_t victim = -1;  ///< Key of the resident whose slot it takes, -1: the slot was free, or is written again.
};

/// How a step is served. Wave 0 computes with the hits; wave w >= 1 loads entries [(w - 1) * wave_size, w * wave_size)
/// of the list of loads, as far as it goes, and computes with them. Waves come one after the other, for later ones
/// write slots of earlier ones again; only wave 1 may load while wave 0 computes, and not if `waits_for_hits`.
struct SlotCacheStep {
  std::int32_t requests = 0;        ///< Distinct experts.
  std::int32_t loads = 0;           ///< Misses: entries of the list.
  std::int32_t waves = 0;           ///< At least 1; wave 0 may be empty.
  std::int32_t wave_size = 0;       ///< Loads per wave, at least 1 when there are any.
  std::int32_t waits_for_hits = 0;  ///< 1: wave 1 takes slots that wave 0 computes with. Never while U fits (U <= C).
};

/// What serving a step writes; memory of the caller, on the side of the cache.
struct SlotCacheAnswer {
  SlotCacheStep* step = nullptr;   ///< [1]
  SlotCacheLoad* loads = nullptr;  ///< [min(E, rows * K)]: entries past step->loads are left alone
  std::int32_t* slots = nullptr;   ///< [rows, K]: slot of each selected expert in its wave; -1 where there was none
  std::int32_t* waves = nullptr;   ///< [rows, K]: its wave, or -1
  /// [most waves, rows, K], most waves as slot_cache_max_waves says: of each wave the slots that are served in it, -1
  /// elsewhere. Null: not written.
  std::int32_t* wave_slots = nullptr;
};

/// Throws UsageError when a number of `shape` is out of range, the policy cannot be served (belady), or stress is asked
/// of `static`.
void check_slot_cache(const SlotCacheShape& shape);

/// Bytes of memory that a cache takes, aligned to 16.
[[nodiscard]] std::size_t slot_cache_bytes(const SlotCacheShape& shape);

/// The parts of the cache in `memory`: slot_cache_bytes(shape) bytes, aligned to 16, of the caller. Touches nothing:
/// `memory` may lie on a device. Reset it before use.
[[nodiscard]] SlotCacheState slot_cache_state(const SlotCacheShape& shape, void* memory);

/// All slots, scratch slots included: the size of the slot buffer in experts.
[[nodiscard]] std::int64_t slot_cache_num_slots(const SlotCacheShape& shape);

/// Most waves of a step of `num_selected` = rows * K ids, wave 0 included: how many a captured graph must hold.
[[nodiscard]] std::int64_t slot_cache_max_waves(const SlotCacheShape& shape, std::int64_t num_selected);

/// Empties the cache, counts included, and puts `preload` in place: int32 [groups, preload_count], keys of each group,
/// different ones, best first, ended early by a negative one; the first C count. They are touched and loaded from the
/// last to the first, and neither used nor requested. null: none. victim_seeds: uint64 [groups], of `random` (see
/// victim_seed); null: 0. Synchronous.
void slot_cache_reset_cpu(const SlotCacheShape& shape, const SlotCacheState& state, const std::int32_t* preload,
                          std::int64_t preload_count, const std::uint64_t* victim_seeds);

/// Serves one step of `layer` by the rules of docs/routing.md and writes tables, counts and `answer`. selected: int32
/// or int64 [rows, top_k], each row by falling weight; ids outside [0, E) are no requests (a row that has ended). The
/// step is the set U of distinct experts, by falling weight: rank by rank, and row by row in a rank; an expert counts
/// once, at its first place. Misses that the policy does not keep, all under `static`, go through scratch slots (and
/// through freed ones before these are filled for good). Throws std::invalid_argument for a layer or sizes out of
/// range, or when a scratch slot may be needed and there is none. Synchronous, one thread.
template <class Index>
void slot_cache_serve_cpu(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                          const Index* selected, std::int64_t rows, std::int64_t top_k, const SlotCacheAnswer& answer);

/// Serves `steps` steps ([steps, rows, top_k]) without counting them: the state that a prefill's own routing leaves.
/// The slots must then be filled by what key_of says. Under `static` the group then holds the C keys used most since
/// the last reset, ties to the lower key, slot by slot from the most used.
template <class Index>
void slot_cache_touch_cpu(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                          const Index* selected, std::int64_t steps, std::int64_t rows, std::int64_t top_k);

/// Residents of `layer` before its next step, for a router that looks at them: mask: uint8 [E], 1: resident.
void slot_cache_mask_cpu(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                         std::uint8_t* mask);

/// The same on the GPU: device pointers (the shape and the struct of pointers are passed by value), asynchronous on
/// `stream` (a cudaStream_t) of the current device; one launch each, one block per call (reset: per group), nothing
/// allocated, no word to the host: they can be captured in a CUDA graph. The same bits as the CPU. Throw RunError with
/// the CUDA error when a launch fails, or when Hestia was built without its CUDA kernels.
void slot_cache_reset_cuda(const SlotCacheShape& shape, const SlotCacheState& state, const std::int32_t* preload,
                           std::int64_t preload_count, const std::uint64_t* victim_seeds, void* stream);
template <class Index>
void slot_cache_serve_cuda(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                           const Index* selected, std::int64_t rows, std::int64_t top_k, const SlotCacheAnswer& answer,
                           void* stream);
template <class Index>
void slot_cache_touch_cuda(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                           const Index* selected, std::int64_t steps, std::int64_t rows, std::int64_t top_k,
                           void* stream);
void slot_cache_mask_cuda(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                          std::uint8_t* mask, void* stream);

}  // namespace hestia
