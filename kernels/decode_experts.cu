#include "hestia/kernels/decode_experts.hpp"

#include "decode_dot.cuh"
#include "decode_grouped.hpp"
#include "decode_pairs.cuh"
#include "decode_quantised.hpp"
#include "decode_rows.cuh"
#include "dependent.cuh"
#include "launch.cuh"

namespace hestia {
namespace {

/// Calls body.operator()<R>(first) for runs of up to 8 pairs, R the smallest of 1, 2, 4, 8 that holds the run.
template <bool kGrouped, class Body>
__device__ void for_runs_of_pairs(int count, const Body& body) {
  if constexpr (!kGrouped) {
    if (count > 0) {
      body.template operator()<1>(0);
    }
  } else {
    for (int first = 0; first < count; first += 8) {
      const int left = count - first;
      if (left == 1) {
        body.template operator()<1>(first);
      } else if (left == 2) {
        body.template operator()<2>(first);
      } else if (left <= 4) {
        body.template operator()<4>(first);
      } else {
        body.template operator()<8>(first);
      }
    }
  }
}

/// Grid: (tiles of kWarps rows, T * K).
template <bool kGrouped>
__global__ void __launch_bounds__(kWarps* kDecodeWarp)
    gate_up_kernel(DecodeSizes sizes, const std::uint16_t* x, const std::int32_t* slots, const void* pool,
                   std::uint16_t* h) {
  __shared__ int pairs[kGrouped ? kMaxPairs : 1];
  __shared__ int shared_count;
  after_kernel_before();
  const int slot = slots[blockIdx.y];
  const int count = pairs_of_block<kGrouped>(slots, sizes.num_pairs, slot, pairs, &shared_count);
  const int f = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kDecodeWarp;
  if (f >= sizes.expert_hidden) {
    return;
  }
  const std::size_t row = static_cast<std::size_t>(f) * sizes.hidden;
  const std::uint16_t* const gate = matrix(pool, sizes, slot, sizes.blob.gate) + row;
  const std::uint16_t* const up = matrix(pool, sizes, slot, sizes.blob.up) + row;
  for_runs_of_pairs<kGrouped>(
      count, [&]<int R>(int first) { gate_up_rows<R>(sizes, x, gate, up, pairs, first, count, f, h); });
}

/// Brings rows [i, i + kDownRows) of down into L2, one warp, if its kernel waits for another meanwhile.
__device__ void prefetch_down(const DecodeSizes& sizes, const std::uint16_t* down, int i) {
  if (!sizes.dependent || i >= sizes.hidden) {
    return;
  }
  const auto* const first =
      reinterpret_cast<const unsigned char*>(down + static_cast<std::size_t>(i) * sizes.expert_hidden);
  const std::size_t bytes = static_cast<std::size_t>(min(kDownRows, sizes.hidden - i)) * sizes.expert_hidden * 2;
  for (std::size_t at = threadIdx.x % kDecodeWarp * kLine; at < bytes; at += kDecodeWarp * kLine) {
    prefetch_line(first + at);
  }
}

/// Grid: (tiles of kWarps * kDownRows rows, T * K).
template <bool kGrouped>
__global__ void __launch_bounds__(kWarps* kDecodeWarp)
    down_kernel(DecodeSizes sizes, const std::uint16_t* h, const std::int32_t* slots, const void* pool, float* y) {
  __shared__ int pairs[kGrouped ? kMaxPairs : 1];
  __shared__ int shared_count;
  const int slot = slots[blockIdx.y];
  const int count = pairs_of_block<kGrouped>(slots, sizes.num_pairs, slot, pairs, &shared_count);
  const int i = (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kDecodeWarp) * kDownRows;
  const std::uint16_t* const down = matrix(pool, sizes, slot, sizes.blob.down);
  if (count > 0) {
    prefetch_down(sizes, down, i);
  }
  after_kernel_before();
  if (i >= sizes.hidden) {
    return;
  }
  for_runs_of_pairs<kGrouped>(count,
                              [&]<int R>(int first) { down_rows<R>(sizes, h, down, pairs, first, count, i, y); });
}

// residual and out may be one, so neither is __restrict__.
__global__ void combine_kernel(DecodeSizes sizes, const float* y, const float* weights, const std::uint16_t* residual,
                               std::uint16_t* out) {
  after_kernel_before();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= sizes.hidden) {
    return;
  }
  const std::size_t first = static_cast<std::size_t>(blockIdx.y) * sizes.top_k;
  const std::size_t at = static_cast<std::size_t>(blockIdx.y) * sizes.hidden + i;
  const float before = residual_at(residual, at);
  float sum = 0.0F;
  for (int k = 0; k < sizes.top_k; ++k) {
    sum = __fmaf_rn(weights[first + k], y[(first + k) * sizes.hidden + i], sum);
  }
  out[at] = bfloat16_bits(__fadd_rn(before, sum));
}

/// Grid: (tiles of kDownRows rows, T); block: one warp per expert of the token. hit_slots: null, or as
/// decode_down_combine_cuda has them.
__global__ void __launch_bounds__(kDecodeMaxTopK* kDecodeWarp)
    down_combine_kernel(DecodeSizes sizes, const std::uint16_t* h, const std::int32_t* slots, const void* pool,
                        const float* weights, const float* y, const std::uint16_t* residual, std::uint16_t* out,
                        const std::int32_t* hit_slots) {
  __shared__ float products[kDownRows][kDecodeMaxTopK];
  __shared__ float shares[kDecodeMaxTopK];
  __shared__ bool counts[kDecodeMaxTopK];
  const int k = static_cast<int>(threadIdx.x) / kDecodeWarp;
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  const int i = static_cast<int>(blockIdx.x) * kDownRows;
  const std::size_t first = static_cast<std::size_t>(blockIdx.y) * sizes.top_k;
  const int early_slot = (hit_slots == nullptr ? slots : hit_slots)[first + k];
  const bool has_hits = y != nullptr && hits_are_done(hit_slots, sizes.top_k);
  if (early_slot >= 0 && !has_hits) {
    prefetch_down(sizes, matrix(pool, sizes, early_slot, sizes.blob.down), i);
  }
  after_kernel_before();
  // All that is read is asked for at once.
  const int m = static_cast<int>(threadIdx.x);
  const bool is_out = m < kDownRows && i + m < sizes.hidden;
  const std::size_t at = static_cast<std::size_t>(blockIdx.y) * sizes.hidden + i + m;
  const float before = is_out ? residual_at(residual, at) : 0.0F;
  const int slot = has_hits && early_slot >= 0 ? -1 : slots[first + k];
  if (lane == 0) {
    shares[k] = weights[first + k];
    counts[k] = y != nullptr || slot >= 0;
  }
  if (slot >= 0) {
    const std::uint16_t* const rows[1] = {h + (first + k) * sizes.expert_hidden};
    float sums[kDownRows][1];
    down_dots<1>(sizes, matrix(pool, sizes, slot, sizes.blob.down), i, rows, sums);
    if (lane == 0) {
#pragma unroll
      for (int row = 0; row < kDownRows; ++row) {
        products[row][k] = sums[row][0];
      }
    }
  } else if (lane < kDownRows && y != nullptr && i + lane < sizes.hidden) {
    products[lane][k] = y[(first + k) * sizes.hidden + i + lane];
  }
  __syncthreads();
  if (is_out) {
    float sum = 0.0F;
    for (int j = 0; j < sizes.top_k; ++j) {
      if (counts[j]) {
        sum = __fmaf_rn(shares[j], products[m][j], sum);
      }
    }
    out[at] = bfloat16_bits(__fadd_rn(before, sum));
  }
}

}  // namespace

void decode_gate_up_cuda(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                         const void* pool, std::uint16_t* h, void* stream) {
  if (shape.format != ExpertFormat::kBfloat16) {
    quantised_gate_up(shape, x, slots, pool, h, stream);
    return;
  }
  if (shape.num_tokens >= shape.tensor_rows) {
    grouped_gate_up(shape, x, slots, pool, h, stream);
    return;
  }
  const DecodeSizes sizes = decode_sizes(shape);
  const dim3 grid(tiles(sizes.expert_hidden, kWarps), static_cast<unsigned>(sizes.num_pairs));
  auto* const kernel = shape.num_tokens == 1 ? gate_up_kernel<false> : gate_up_kernel<true>;
  launch_kernel("gate_up_kernel", kernel, grid, kWarps * kDecodeWarp, 0, stream, shape.dependent, sizes, x, slots, pool,
                h);
}

void decode_down_cuda(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                      const void* pool, float* y, void* stream) {
  if (shape.format != ExpertFormat::kBfloat16) {
    quantised_down(shape, h, slots, pool, y, stream);
    return;
  }
  if (shape.num_tokens >= shape.tensor_rows) {
    grouped_down(shape, h, slots, pool, y, stream);
    return;
  }
  const DecodeSizes sizes = decode_sizes(shape);
  const dim3 grid(tiles(sizes.hidden, kWarps * kDownRows), static_cast<unsigned>(sizes.num_pairs));
  auto* const kernel = shape.num_tokens == 1 ? down_kernel<false> : down_kernel<true>;
  launch_kernel("down_kernel", kernel, grid, kWarps * kDecodeWarp, 0, stream, shape.dependent, sizes, h, slots, pool,
                y);
}

void decode_combine_cuda(const DecodeExpertsShape& shape, const float* y, const float* weights,
                         const std::uint16_t* residual, std::uint16_t* out, void* stream) {
  const DecodeSizes sizes = decode_sizes(shape);
  constexpr int kThreads = 256;
  const dim3 grid(tiles(sizes.hidden, kThreads), static_cast<unsigned>(shape.num_tokens));
  launch_kernel("combine_kernel", combine_kernel, grid, kThreads, 0, stream, shape.dependent, sizes, y, weights,
                residual, out);
}

void decode_down_combine_cuda(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                              const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                              std::uint16_t* out, void* stream, const std::int32_t* hit_slots) {
  if (shape.format != ExpertFormat::kBfloat16) {
    quantised_down_combine(shape, h, slots, pool, weights, y, residual, out, stream, hit_slots);
    return;
  }
  if (shape.num_tokens >= shape.tensor_rows) {
    grouped_down_combine(shape, h, slots, pool, weights, y, residual, out, stream);
    return;
  }
  const DecodeSizes sizes = decode_sizes(shape);
  const dim3 grid(tiles(sizes.hidden, kDownRows), static_cast<unsigned>(shape.num_tokens));
  launch_kernel("down_combine_kernel", down_combine_kernel, grid, static_cast<unsigned>(sizes.top_k * kDecodeWarp), 0,
                stream, shape.dependent, sizes, h, slots, pool, weights, y, residual, out, hit_slots);
}

}  // namespace hestia
