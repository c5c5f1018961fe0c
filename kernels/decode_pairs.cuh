#pragma once

#include <cstdint>

#include "decode_dot.cuh"
#include "hestia/kernels/decode_experts.hpp"

// What the products with routed experts share, in bfloat16 and in integers.

namespace hestia {

constexpr int kMaxPairs = static_cast<int>(kDecodeMaxTokens * kDecodeMaxTopK);

/// A decode step's shape as the kernels take it.
struct DecodeSizes {
  int num_pairs;  // T * K
  int top_k;
  int hidden;         // H
  int expert_hidden;  // F
  bool dependent;     // DecodeExpertsShape::dependent
  ExpertBlob blob;
};

inline DecodeSizes decode_sizes(const DecodeExpertsShape& shape) {
  return {static_cast<int>(shape.num_tokens * shape.top_k),
          static_cast<int>(shape.top_k),
          static_cast<int>(shape.hidden_size),
          static_cast<int>(shape.expert_hidden_size),
          shape.dependent,
          expert_blob(shape)};
}

inline unsigned tiles(std::int64_t rows, std::int64_t rows_per_block) {
  return static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block);
}

/// The (t, k) pairs that this block serves: none unless pair blockIdx.y is the first of its slot, then all of that
/// slot. `pairs` and `count` are shared. Returns their number, the same to all threads. Without kGrouped, that pair
/// alone.
template <bool kGrouped>
__device__ int pairs_of_block(const std::int32_t* slots, int num_pairs, int slot, int* pairs, int* count) {
  const int own = static_cast<int>(blockIdx.y);
  if (slot < 0) {
    return 0;
  }
  if constexpr (!kGrouped) {
    if (threadIdx.x == 0) {
      pairs[0] = own;
    }
    __syncthreads();
    return 1;
  } else {
    if (threadIdx.x < kDecodeWarp) {
      const int lane = static_cast<int>(threadIdx.x);
      int found = 0;
      for (int base = 0; base < num_pairs; base += kDecodeWarp) {
        const int pair = base + lane;
        const unsigned same = __ballot_sync(0xffffffffU, pair < num_pairs && slots[pair] == slot);
        if ((same >> lane & 1U) != 0) {
          pairs[found + __popc(same & ((1U << lane) - 1U))] = pair;
        }
        found += __popc(same);
      }
      __syncwarp();
      if (lane == 0) {
        *count = pairs[0] == own ? found : 0;
      }
    }
    __syncthreads();
    return *count;
  }
}

/// A bit per pair of a token that is a hit; by whole warps.
__device__ inline unsigned hits_of(const std::int32_t* hit_slots, int top_k) {
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  return __ballot_sync(~0U, lane < top_k && hit_slots[lane] >= 0);
}

/// Whether the kernel before has computed down of the hits among the K pairs (decode_down_combine_cuda): where
/// something is missing. By whole warps.
__device__ inline bool hits_are_done(const std::int32_t* hit_slots, int top_k) {
  return hit_slots != nullptr && __popc(hits_of(hit_slots, top_k)) < top_k;
}

/// residual[at], or what changes no sum where there is no residual.
__device__ inline float residual_at(const std::uint16_t* residual, std::size_t at) {
  return residual == nullptr ? -0.0F : bfloat16_value(residual[at]);
}

}  // namespace hestia
