#include "hestia/kernels/slot_cache.hpp"

#include <cstdint>

#include "launch.cuh"
#include "slot_cache_serve.cuh"

namespace hestia {

using namespace serving;

namespace {

/// More uses first, ties to the lower key.
__device__ bool used_before(double uses_a, int key_a, double uses_b, int key_b) {
  return uses_a != uses_b ? uses_a > uses_b : key_a < key_b;
}

/// The C keys used most fill the slots: one after the other, each the first in the order of uses behind the last.
__device__ void keep_most_used(const Layer& layer, Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  for (int key = thread; key < layer.num_keys; key += kThreads) {
    layer.slot_of[key] = -1;
  }
  for (int slot = thread; slot < layer.slots; slot += kThreads) {
    layer.key_of[slot] = -1;
  }
  __syncthreads();
  int filled = 0;
  for (; filled < layer.slots; ++filled) {
    double most = 0.0;
    int best = kNowhere;
    for (int key = thread; key < layer.num_keys; key += kThreads) {
      const double uses = layer.states[key].use_count;
      if (layer.slot_of[key] < 0 && uses > 0.0 && used_before(uses, key, most, best)) {
        most = uses;
        best = key;
      }
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const double uses = __shfl_xor_sync(kAllLanes, most, step);
      const int key = __shfl_xor_sync(kAllLanes, best, step);
      if (used_before(uses, key, most, best)) {
        most = uses;
        best = key;
      }
    }
    if (lane == 0) {
      shared.uses[warp] = most;
      shared.keys[warp] = best;
    }
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kWarps; ++w) {
        if (used_before(shared.uses[w], shared.keys[w], shared.uses[0], shared.keys[0])) {
          shared.uses[0] = shared.uses[w];
          shared.keys[0] = shared.keys[w];
        }
      }
      shared.chosen_key = shared.keys[0];
      if (shared.keys[0] != kNowhere) {
        layer.slot_of[shared.keys[0]] = layer.first_slot + filled;
        layer.key_of[filled] = shared.keys[0];
      }
    }
    __syncthreads();
    if (shared.chosen_key == kNowhere) {
      break;
    }
  }
  if (thread == 0) {
    layer.group->num_residents = filled;
  }
}

template <class Index>
__global__ void __launch_bounds__(kThreads)
    slot_cache_serve_kernel(SlotCacheShape shape, SlotCacheState state, int layer, const Index* selected, int rows,
                            int top_k, int max_waves, SlotCacheAnswer answer) {
  __shared__ Shared shared;
  extern __shared__ unsigned bits[];
  serve(Layer(shape, state, layer), selected, rows, top_k, true, &answer, bits, shared);
  if (answer.wave_slots == nullptr) {
    return;
  }
  __syncthreads();
  const int num_selected = rows * top_k;
  for (int i = static_cast<int>(threadIdx.x); i < max_waves * num_selected; i += kThreads) {
    const int of = i % num_selected;
    answer.wave_slots[i] = answer.waves[of] == i / num_selected ? answer.slots[of] : -1;
  }
}

template <class Index>
__global__ void __launch_bounds__(kThreads)
    slot_cache_touch_kernel(SlotCacheShape shape, SlotCacheState state, int layer, const Index* selected,
                            std::int64_t steps, int rows, int top_k) {
  __shared__ Shared shared;
  extern __shared__ unsigned bits[];
  const Layer of(shape, state, layer);
  for (std::int64_t step = 0; step < steps; ++step) {
    serve(of, selected + step * rows * top_k, rows, top_k, false, nullptr, bits, shared);
    __syncthreads();
  }
  if (of.policy == CachePolicyKind::kStatic) {
    keep_most_used(of, shared);
  }
}

/// One block per group.
__global__ void __launch_bounds__(kThreads)
    slot_cache_reset_kernel(SlotCacheShape shape, SlotCacheState state, const std::int32_t* preload,
                            std::int64_t preload_count, const std::uint64_t* victim_seeds) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto group = static_cast<std::int64_t>(blockIdx.x);
  const std::int64_t num_keys = shape.layers_per_group * shape.num_experts;
  for (std::int64_t key = group * num_keys + thread; key < (group + 1) * num_keys; key += kThreads) {
    state.experts[key] = ExpertState();
    state.slot_of[key] = -1;
    state.requested[key] = 0;
  }
  for (std::int64_t slot = group * shape.slots + thread; slot < (group + 1) * shape.slots; slot += kThreads) {
    state.key_of[slot] = -1;
  }
  for (std::int64_t layer = thread; layer < shape.layers_per_group; layer += kThreads) {
    state.counts[group * shape.layers_per_group + layer] = SlotCacheCounts();
  }
  const std::int32_t* const keys = preload == nullptr ? nullptr : preload + group * preload_count;
  const std::int64_t most = keys == nullptr ? 0 : (preload_count < shape.slots ? preload_count : shape.slots);
  __shared__ int count;
  if (thread == 0) {
    count = 0;
    while (count < most && keys[count] >= 0) {
      ++count;
    }
    state.groups[group] = {count, victim_seeds == nullptr ? 0 : victim_seeds[group], count};
  }
  __syncthreads();
  for (std::int64_t i = thread; i < count; i += kThreads) {
    ExpertState& expert = state.experts[group * num_keys + keys[i]];
    expert.last_touch = count - 1 - i;
    expert.loaded_at = count - 1 - i;
    state.slot_of[group * num_keys + keys[i]] = static_cast<std::int32_t>(group * shape.slots + i);
    state.key_of[group * shape.slots + i] = keys[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    slot_cache_mask_kernel(const std::int32_t* slot_of, int num_experts, std::uint8_t* mask) {
  for (int expert = static_cast<int>(threadIdx.x); expert < num_experts; expert += kThreads) {
    mask[expert] = slot_of[expert] >= 0 ? 1 : 0;
  }
}

}  // namespace

void slot_cache_reset_cuda(const SlotCacheShape& shape, const SlotCacheState& state, const std::int32_t* preload,
                           std::int64_t preload_count, const std::uint64_t* victim_seeds, void* stream) {
  check_slot_cache(shape);
  const auto groups = static_cast<unsigned>(shape.num_layers / shape.layers_per_group);
  slot_cache_reset_kernel<<<groups, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(shape, state, preload,
                                                                                      preload_count, victim_seeds);
  check_launch("slot_cache_reset_kernel");
}

template <class Index>
void slot_cache_serve_cuda(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                           const Index* selected, std::int64_t rows, std::int64_t top_k, const SlotCacheAnswer& answer,
                           void* stream) {
  check_slot_cache_step(shape, layer, rows, top_k);
  slot_cache_serve_kernel<<<1, kThreads, bytes_of_bits(shape), static_cast<cudaStream_t>(stream)>>>(
      shape, state, static_cast<int>(layer), selected, static_cast<int>(rows), static_cast<int>(top_k),
      static_cast<int>(slot_cache_max_waves(shape, rows * top_k)), answer);
  check_launch("slot_cache_serve_kernel");
}

template <class Index>
void slot_cache_touch_cuda(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                           const Index* selected, std::int64_t steps, std::int64_t rows, std::int64_t top_k,
                           void* stream) {
  check_slot_cache_step(shape, layer, rows, top_k);
  slot_cache_touch_kernel<<<1, kThreads, bytes_of_bits(shape), static_cast<cudaStream_t>(stream)>>>(
      shape, state, static_cast<int>(layer), selected, steps, static_cast<int>(rows), static_cast<int>(top_k));
  check_launch("slot_cache_touch_kernel");
}

void slot_cache_mask_cuda(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                          std::uint8_t* mask, void* stream) {
  slot_cache_mask_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      state.slot_of + layer * shape.num_experts, static_cast<int>(shape.num_experts), mask);
  check_launch("slot_cache_mask_kernel");
}

#define HESTIA_INSTANTIATE(Index)                                                                                      \
  template void slot_cache_serve_cuda<Index>(const SlotCacheShape&, const SlotCacheState&, std::int64_t, const Index*, \
                                             std::int64_t, std::int64_t, const SlotCacheAnswer&, void*);               \
  template void slot_cache_touch_cuda<Index>(const SlotCacheShape&, const SlotCacheState&, std::int64_t, const Index*, \
                                             std::int64_t, std::int64_t, std::int64_t, void*);
HESTIA_INSTANTIATE(std::int32_t)
HESTIA_INSTANTIATE(std::int64_t)
#undef HESTIA_INSTANTIATE

}  // namespace hestia
