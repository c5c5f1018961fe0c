#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "hestia/kernels/slot_cache.hpp"
#include "slot_cache_rules.hpp"

// Serving a step from the slot cache by one block of kThreads threads, for the kernels that do.

namespace hestia::serving {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kNowhere = 1 << 30;
constexpr int kMaxExperts = static_cast<int>(kSlotCacheMaxExperts);
constexpr int kFewSlots = kThreads - kWarp;  // a thread each, the first warp aside

/// Something that may leave: a resident (place: its slot in the group) or a miss (place: its number in the order of the
/// step, behind all slots). key -1: nothing.
struct Candidate {
  ExpertState state;
  int key = -1;
  int place = -1;
};

__device__ inline bool leaves_before(CachePolicyKind policy, const Candidate& a, const Candidate& b) {
  return a.key >= 0 && (b.key < 0 || evicts_before(policy, a.state, a.key, b.state, b.key));
}

__device__ inline void offer(CachePolicyKind policy, Candidate& best, const Candidate& other) {
  if (leaves_before(policy, other, best)) {
    best = other;
  }
}

struct Shared {
  int first[kMaxExperts];   // place of the expert in the selection, rank by rank; kNowhere: not in the step
  int order[kMaxExperts];   // distinct experts by falling weight
  int slot[kMaxExperts];    // where the expert is served
  int wave[kMaxExperts];    // -1: a miss not placed yet
  int target[kMaxExperts];  // slots that the kept misses take, in the group
  int victim[kMaxExperts];
  unsigned char passes[kMaxExperts];
  int in_warp[kWarps];
  Candidate best[kWarps];
  double uses[kWarps];
  int keys[kWarps];
  int hits;
  int cold;
  int waits;
  int dropped;
  int chosen_key;
  int chosen_place;
};

/// The number of threads before this one whose flag is set, plus `running`, which grows by all of them.
__device__ inline int count_before(bool flag, int& running, Shared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned set = __ballot_sync(kAllLanes, flag);
  if (lane == 0) {
    shared.in_warp[warp] = __popc(set);
  }
  __syncthreads();
  int before = running + __popc(set & ((1U << lane) - 1U));
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? shared.in_warp[w] : 0;
    all += shared.in_warp[w];
  }
  running += all;
  __syncthreads();
  return before;
}

/// The one that leaves first of all threads' candidates: in every thread.
__device__ inline void first_of_block(CachePolicyKind policy, Candidate best, Shared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto reduce = [&](int width) {
    for (int step = width / 2; step > 0; step /= 2) {
      Candidate other;
      other.state.use_count = __shfl_xor_sync(kAllLanes, best.state.use_count, step);
      other.state.last_touch = __shfl_xor_sync(kAllLanes, best.state.last_touch, step);
      other.state.loaded_at = __shfl_xor_sync(kAllLanes, best.state.loaded_at, step);
      other.key = __shfl_xor_sync(kAllLanes, best.key, step);
      other.place = __shfl_xor_sync(kAllLanes, best.place, step);
      offer(policy, best, other);
    }
  };
  reduce(kWarp);
  if (lane == 0) {
    shared.best[warp] = best;
  }
  __syncthreads();
  if (warp == 0) {
    best = lane < kWarps ? shared.best[lane] : Candidate();
    reduce(kWarps);
    if (lane == 0) {
      shared.chosen_key = best.key;
      shared.chosen_place = best.place;
    }
  }
  __syncthreads();
}

/// One layer of a cache, as the threads of its block see it.
struct Layer {
  __device__ Layer(const SlotCacheShape& shape, const SlotCacheState& state, int layer)
      : policy(shape.policy),
        gamma(shape.gamma),
        stress(shape.stress),
        num_experts(static_cast<int>(shape.num_experts)),
        num_keys(static_cast<int>(shape.layers_per_group * shape.num_experts)),
        slots(static_cast<int>(shape.slots)),
        scratch(static_cast<int>(shape.scratch_slots)) {
    const int of_group = static_cast<int>(shape.layers_per_group);
    const int number = of_group == 1 ? layer : layer / of_group;  // the common case without divisions
    const int num_layers = static_cast<int>(shape.num_layers);
    first_key = (layer - number * of_group) * num_experts;
    first_slot = number * slots;
    first_scratch = (of_group == 1 ? num_layers : num_layers / of_group) * slots;
    states = state.experts + static_cast<std::int64_t>(number) * num_keys;
    slot_of = state.slot_of + static_cast<std::int64_t>(number) * num_keys;
    key_of = state.key_of + first_slot;
    requested = state.requested + static_cast<std::int64_t>(layer) * num_experts;
    group = state.groups + number;
    counts = state.counts + layer;
  }

  /// True when the key is of this layer and its expert is in the step.
  __device__ bool in_step(int key, const Shared& shared) const {
    const int expert = key - first_key;
    return expert >= 0 && expert < num_experts && shared.first[expert] != kNowhere;
  }

  CachePolicyKind policy;
  double gamma;
  bool stress;
  int num_experts;
  int num_keys;
  int slots;
  int scratch;
  int first_key;
  int first_slot;
  int first_scratch;
  ExpertState* states;
  std::int32_t* slot_of;
  std::int32_t* key_of;  // while a step is served, -2 - key: the key that leaves the slot
  std::uint8_t* requested;
  SlotCacheGroup* group;
  SlotCacheCounts* counts;
};

/// Takes the key out of the table; its slot remembers it until the step is placed.
__device__ inline void take_out(const Layer& layer, int key, int slot) {
  layer.slot_of[key] = -1;
  layer.key_of[slot] = -2 - key;
}

/// Chooses `over` of the candidates by the order of the policy.
__device__ inline void leave_by_order(const Layer& layer, int over, int distinct, bool step_too_large, Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto own_best = [&] {
    Candidate best;
    for (int slot = thread; slot < layer.slots; slot += kThreads) {
      const int key = layer.key_of[slot];
      if (key >= 0 && (step_too_large || !layer.in_step(key, shared))) {
        offer(layer.policy, best, {layer.states[key], key, slot});
      }
    }
    for (int i = thread; step_too_large && i < distinct; i += kThreads) {
      const int expert = shared.order[i];
      if (shared.wave[expert] < 0 && shared.passes[expert] == 0) {
        const int key = layer.first_key + expert;
        offer(layer.policy, best, {layer.states[key], key, layer.slots + i});
      }
    }
    return best;
  };
  Candidate best = own_best();
  for (int i = 0; i < over; ++i) {
    first_of_block(layer.policy, best, shared);
    if (best.key >= 0 && best.key == shared.chosen_key) {
      if (best.place < layer.slots) {
        take_out(layer, best.key, best.place);
      } else {
        shared.passes[best.key - layer.first_key] = 1;
      }
      best = own_best();
    }
  }
  __syncthreads();
}

/// Draws `over` of the candidates: one bit per key of the group that may leave.
__device__ inline void leave_by_chance(const Layer& layer, int over, bool step_too_large, unsigned* bits,
                                       Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int words = (layer.num_keys + kWarp - 1) / kWarp;
  for (int word = thread / kWarp; word < words; word += kWarps) {
    const int key = word * kWarp + thread % kWarp;
    const bool in_step = key < layer.num_keys && layer.in_step(key, shared);
    const bool resident = key < layer.num_keys && layer.slot_of[key] >= 0;
    const unsigned set = __ballot_sync(kAllLanes, in_step ? step_too_large : resident);
    if (thread % kWarp == 0) {
      bits[word] = set;
    }
  }
  __syncthreads();
  if (thread == 0) {
    int candidates = 0;
    for (int word = 0; word < words; ++word) {
      candidates += __popc(bits[word]);
    }
    SplitMix64 random(layer.group->random);
    for (int i = 0; i < over; ++i, --candidates) {
      int left = static_cast<int>(random.below(static_cast<std::uint64_t>(candidates)));
      int word = 0;
      for (; left >= __popc(bits[word]); ++word) {
        left -= __popc(bits[word]);
      }
      unsigned rest = bits[word];
      for (; left > 0; --left) {
        rest &= rest - 1U;
      }
      bits[word] &= ~(rest & (0U - rest));
      const int key = word * kWarp + __ffs(static_cast<int>(rest)) - 1;
      const int slot = layer.slot_of[key];
      if (slot >= 0) {
        take_out(layer, key, slot - layer.first_slot);
      } else {
        shared.passes[key - layer.first_key] = 1;
      }
    }
    layer.group->random = random.state();
  }
  __syncthreads();
}

/// A step of at most kWarp ids, as its warps share it.
struct Few {
  int expert[kWarp];       // misses by falling weight
  unsigned places[kWarp];  // theirs in the selection: a bit each
  int key[kFewSlots];      // residents that may leave, -1: none in this slot
  double use_count[kFewSlots];
  std::int64_t last_touch[kFewSlots];
  std::int64_t loaded_at[kFewSlots];
  unsigned leaving[kWarps];
};

/// How many of the residents that may leave go before the one in slot `own`.
template <CachePolicyKind kPolicy>
__device__ int leaving_before(const Few& few, int slots, int own) {
  const auto state_in = [&](int slot) {
    ExpertState state;
    state.use_count = few.use_count[slot];
    state.last_touch = few.last_touch[slot];
    state.loaded_at = few.loaded_at[slot];
    return state;
  };
  const ExpertState state = state_in(own);
  const int key = few.key[own];
  int before = 0;
#pragma unroll 8
  for (int slot = 0; slot < slots; ++slot) {
    const int other = few.key[slot];
    const bool earlier = evicts_before(kPolicy, state_in(slot), other, state, key);
    before += static_cast<int>(earlier) & static_cast<int>(other >= 0);  // no branch
  }
  return before;
}

__device__ inline int leaving_before(CachePolicyKind policy, const Few& few, int slots, int own) {
  switch (policy) {
    case CachePolicyKind::kLru:
      return leaving_before<CachePolicyKind::kLru>(few, slots, own);
    case CachePolicyKind::kLifo:
      return leaving_before<CachePolicyKind::kLifo>(few, slots, own);
    case CachePolicyKind::kFifo:
      return leaving_before<CachePolicyKind::kFifo>(few, slots, own);
    default:
      return leaving_before<CachePolicyKind::kLfu>(few, slots, own);  // its rule is that of `gamma`, too
  }
}

/// Serves a step of at most kWarp ids that needs no scratch slot, no draw and no stress; else writes nothing and
/// returns false. A lane of every warp per id, so that each warp knows hits and misses without the others; a thread
/// behind the first warp per slot.
template <class Index>
__device__ bool serve_few(const Layer& layer, const Index* selected, int rows, int top_k, bool counted,
                          const SlotCacheAnswer* answer) {
  __shared__ Few few;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const unsigned lanes_before = (1U << lane) - 1U;
  const int num_selected = rows * top_k;
  const auto index_of = [&](int place) { return rows == 1 ? place : place % rows * top_k + place / rows; };
  const int slot = thread - kWarp;
  const bool has_slot = slot >= 0 && slot < layer.slots;
  // Everything that may be needed is asked for before the first of it is looked at.
  const Index id = lane < num_selected ? selected[index_of(lane)] : -1;
  const int key = has_slot ? layer.key_of[slot] : -1;
  const std::int64_t serial = layer.group->serial;
  const int residents = static_cast<int>(layer.group->num_residents);
  SlotCacheCounts counts;
  if (counted && thread == 0) {
    counts = *layer.counts;
  }
  const int expert = id >= 0 && id < layer.num_experts ? static_cast<int>(id) : -1;
  const int own_slot = expert >= 0 ? layer.slot_of[layer.first_key + expert] : -1;
  double use_count = 0.0;
  bool cold = false;
  if (warp == 0 && expert >= 0) {
    use_count = layer.states[layer.first_key + expert].use_count;
    cold = layer.requested[expert] == 0;
  }
  ExpertState resident;
  if (key >= 0) {
    resident = layer.states[key];
  }
  const unsigned places = __match_any_sync(kAllLanes, expert);
  const bool is_first = expert >= 0 && (places & lanes_before) == 0;
  const unsigned firsts = __ballot_sync(kAllLanes, is_first);
  const unsigned missing = __ballot_sync(kAllLanes, is_first && own_slot < 0);
  const int distinct = __popc(firsts);
  const int misses = __popc(missing);
  const int over = max(residents + misses - layer.slots, 0);
  if (misses > 0 && (layer.policy == CachePolicyKind::kStatic || distinct > layer.slots || layer.slots > kFewSlots ||
                     (layer.policy == CachePolicyKind::kRandom && over > 0))) {
    return false;
  }
  if (misses > 0) {
    bool may_leave = false;
    if (warp == 0) {
      if (is_first && own_slot < 0) {
        const int number = __popc(missing & lanes_before);
        few.expert[number] = expert;
        few.places[number] = places;
      }
    } else {
      const int in_group = own_slot - layer.first_slot;
      const bool is_here = own_slot >= 0 && in_group / kWarp == warp - 1;
      const unsigned used = __reduce_or_sync(kAllLanes, is_here ? 1U << (in_group % kWarp) : 0U);
      may_leave = key >= 0 && (used >> lane & 1U) == 0;
      if (has_slot) {
        few.key[slot] = may_leave ? key : -1;
        few.use_count[slot] = resident.use_count;
        few.last_touch[slot] = resident.last_touch;
        few.loaded_at[slot] = resident.loaded_at;
      }
    }
    __syncthreads();
    bool leaves = has_slot && key < 0;
    if (may_leave && over > 0) {
      leaves = leaving_before(layer.policy, few, layer.slots, slot) < over;
    }
    const unsigned leaving = __ballot_sync(kAllLanes, leaves);
    int number = __popc(leaving & lanes_before);
    if (layer.slots > kWarp) {
      if (lane == 0) {
        few.leaving[warp] = leaving;
      }
      __syncthreads();
      for (int w = 1; w < warp; ++w) {
        number += __popc(few.leaving[w]);
      }
    }
    if (leaves && number < misses) {
      const int loaded = few.expert[number];
      const int target = layer.first_slot + slot;
      if (key >= 0) {
        layer.slot_of[key] = -1;
      }
      layer.slot_of[layer.first_key + loaded] = target;
      layer.key_of[slot] = layer.first_key + loaded;
      if (answer != nullptr) {
        answer->loads[number] = {loaded, target, key};
        for (unsigned rest = few.places[number]; rest != 0; rest &= rest - 1U) {
          answer->slots[index_of(__ffs(static_cast<int>(rest)) - 1)] = target;
        }
      }
    }
  }
  if (warp != 0) {
    return true;
  }
  if (is_first) {
    ExpertState& state = layer.states[layer.first_key + expert];
    const std::int64_t touch = serial + distinct - 1 - __popc(firsts & lanes_before);
    state.use_count = use_count + 1.0;
    state.last_touch = touch;
    if (own_slot < 0) {
      state.loaded_at = touch;
    }
    if (cold) {
      layer.requested[expert] = 1;
    }
  }
  if (answer != nullptr && lane < num_selected) {
    const int i = index_of(lane);
    answer->waves[i] = expert < 0 ? -1 : (own_slot < 0 ? 1 : 0);
    if (expert < 0 || own_slot >= 0) {
      answer->slots[i] = own_slot;
    }
  }
  const int num_cold = __popc(__ballot_sync(kAllLanes, is_first && cold));
  if (lane == 0) {
    layer.group->serial = serial + distinct;
    if (misses > 0) {
      layer.group->num_residents = residents + misses - over;
    }
    if (counted) {
      *layer.counts = {counts.steps + 1,       counts.requests + distinct, counts.hits + distinct - misses,
                       counts.cold + num_cold, counts.loads + misses,      counts.evictions + over};
    }
    if (answer != nullptr) {
      *answer->step = {distinct, misses, misses == 0 ? 1 : 2, misses + layer.scratch, 0};
    }
  }
  return true;
}

/// Serves one step; all threads of the block come in together. The caller synchronises before it serves another.
template <class Index>
__device__ void serve(const Layer& layer, const Index* selected, int rows, int top_k, bool counted,
                      const SlotCacheAnswer* answer, unsigned* bits, Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int num_selected = rows * top_k;
  const auto expert_at = [&](int place) {  // place: rank by rank, and row by row in a rank
    const Index id = selected[static_cast<std::int64_t>(place % rows) * top_k + place / rows];
    return id >= 0 && id < layer.num_experts ? static_cast<int>(id) : -1;
  };
  if (layer.policy == CachePolicyKind::kGamma) {
    for (int expert = thread; expert < layer.num_experts; expert += kThreads) {
      ExpertState& state = layer.states[layer.first_key + expert];
      state.use_count = discounted_use(state.use_count, layer.gamma);
    }
    __syncthreads();
  }
  if (num_selected <= kWarp && !layer.stress && serve_few(layer, selected, rows, top_k, counted, answer)) {
    return;
  }
  for (int expert = thread; expert < layer.num_experts; expert += kThreads) {
    shared.first[expert] = kNowhere;
    shared.passes[expert] = 0;
  }
  if (thread == 0) {
    shared.hits = 0;
    shared.cold = 0;
    shared.waits = 0;
    shared.dropped = 0;
  }
  __syncthreads();
  for (int place = thread; place < num_selected; place += kThreads) {
    const int expert = expert_at(place);
    if (expert >= 0) {
      atomicMin(&shared.first[expert], place);
    }
  }
  __syncthreads();
  int distinct = 0;
  for (int begin = 0; begin < num_selected; begin += kThreads) {
    const int expert = begin + thread < num_selected ? expert_at(begin + thread) : -1;
    const bool is_first = expert >= 0 && shared.first[expert] == begin + thread;
    const int number = count_before(is_first, distinct, shared);
    if (is_first) {
      shared.order[number] = expert;
    }
  }
  __syncthreads();
  const std::int64_t serial = layer.group->serial;
  const int residents = static_cast<int>(layer.group->num_residents);
  for (int i = thread; i < distinct; i += kThreads) {
    const int expert = shared.order[i];
    ExpertState& state = layer.states[layer.first_key + expert];
    const int slot = layer.slot_of[layer.first_key + expert];
    const std::int64_t touch = serial + distinct - 1 - i;
    state.use_count = state.use_count + 1.0;
    state.last_touch = touch;
    shared.slot[expert] = slot;
    shared.wave[expert] = slot >= 0 ? 0 : -1;
    if (slot >= 0) {
      atomicAdd(&shared.hits, 1);
    } else {
      state.loaded_at = touch;
    }
    if (layer.requested[expert] == 0) {
      layer.requested[expert] = 1;
      atomicAdd(&shared.cold, 1);
    }
  }
  __syncthreads();
  const int misses = distinct - shared.hits;
  const bool is_static = layer.policy == CachePolicyKind::kStatic;
  int evictions = 0;
  if (layer.stress) {
    for (int slot = thread; slot < layer.slots; slot += kThreads) {
      const int key = layer.key_of[slot];
      if (key >= 0 && !layer.in_step(key, shared)) {
        take_out(layer, key, slot);
        atomicAdd(&shared.dropped, 1);
      }
    }
    __syncthreads();
    evictions = shared.dropped;
  }
  const int over = is_static ? 0 : residents - evictions + misses - layer.slots;
  if (over > 0) {
    const bool step_too_large = distinct > layer.slots;
    if (layer.policy == CachePolicyKind::kRandom) {
      leave_by_chance(layer, over, step_too_large, bits, shared);
    } else {
      leave_by_order(layer, over, distinct, step_too_large, shared);
    }
    evictions += over;
  }
  int kept = 0;
  int passing = 0;
  if (misses > 0 || evictions > 0) {
    for (int begin = 0; begin < distinct; begin += kThreads) {
      const int expert = begin + thread < distinct ? shared.order[begin + thread] : -1;
      const bool passes = expert >= 0 && shared.wave[expert] < 0 && (is_static || shared.passes[expert] != 0);
      passing += __syncthreads_count(passes ? 1 : 0);
    }
    kept = misses - passing;
    int found = 0;
    for (int begin = 0; begin < layer.slots; begin += kThreads) {
      const int slot = begin + thread;
      const int key = slot < layer.slots ? layer.key_of[slot] : 0;
      const int number = count_before(key < 0, found, shared);
      if (key < 0) {
        layer.key_of[slot] = -1;
        if (number < kept) {
          const int leaving = key == -1 ? -1 : -2 - key;
          shared.target[number] = slot;
          shared.victim[number] = leaving;
          if (leaving >= 0 && layer.in_step(leaving, shared)) {
            shared.waits = 1;
          }
        }
      }
    }
    __syncthreads();
    int passed = 0;
    int stayed = 0;
    for (int begin = 0; begin < distinct; begin += kThreads) {
      const int expert = begin + thread < distinct ? shared.order[begin + thread] : -1;
      const bool miss = expert >= 0 && shared.slot[expert] < 0;
      const bool passes = miss && (is_static || shared.passes[expert] != 0);
      const int as_passing = count_before(passes, passed, shared);
      const int as_kept = count_before(miss && !passes, stayed, shared);
      if (miss) {
        const int index = passes ? as_passing : passing + as_kept;
        const SlotPlace at = slot_place(index, passing, kept, layer.scratch);
        const bool is_target = at.place < kept;
        const int slot = is_target ? layer.first_slot + shared.target[at.place] : layer.first_scratch + at.place - kept;
        shared.slot[expert] = slot;
        shared.wave[expert] = at.wave;
        if (answer != nullptr) {
          answer->loads[index] = {expert, slot, is_target && at.wave == 1 ? shared.victim[at.place] : -1};
        }
        if (!passes) {
          layer.slot_of[layer.first_key + expert] = slot;
          layer.key_of[slot - layer.first_slot] = layer.first_key + expert;
        }
      }
    }
    __syncthreads();
  }
  if (answer != nullptr) {
    for (int i = thread; i < num_selected; i += kThreads) {
      const Index id = selected[i];
      const bool valid = id >= 0 && id < layer.num_experts;
      answer->slots[i] = valid ? shared.slot[id] : -1;
      answer->waves[i] = valid ? shared.wave[id] : -1;
    }
  }
  if (thread == 0) {
    const int size = kept + layer.scratch;
    layer.group->serial = serial + distinct;
    layer.group->num_residents = is_static ? residents : residents + misses - evictions;
    if (counted) {
      layer.counts->steps += 1;
      layer.counts->requests += distinct;
      layer.counts->hits += shared.hits;
      layer.counts->cold += shared.cold;
      layer.counts->loads += misses;
      layer.counts->evictions += evictions;
    }
    if (answer != nullptr) {
      *answer->step = {distinct, misses, misses == 0 ? 1 : 1 + (misses + size - 1) / size, size, shared.waits};
    }
  }
}

/// Bytes of dynamic shared memory for the bits that `random` draws from, whole and one more 16 at a time: the compiler
/// reads on past the last word.
inline std::size_t bytes_of_bits(const SlotCacheShape& shape) {
  constexpr std::int64_t kRead = 16;
  const std::int64_t keys = shape.layers_per_group * shape.num_experts;
  const std::int64_t bytes = (keys + kWarp - 1) / kWarp * 4;
  return shape.policy == CachePolicyKind::kRandom ? static_cast<std::size_t>((bytes / kRead + 2) * kRead) : 0;
}

}  // namespace hestia::serving
