#pragma once

#include <cstddef>
#include <cstdint>

#include "decode_dot.cuh"
#include "decode_pairs.cuh"

// Rows of gate, up and down in bfloat16, for the kernels that work them out.

namespace hestia {

constexpr int kWarps = 8;     // of a block: a row each of gate and up
constexpr int kDownRows = 2;  // of down per warp

__device__ inline const std::uint16_t* matrix(const void* pool, const DecodeSizes& sizes, int slot,
                                              std::size_t offset) {
  return reinterpret_cast<const std::uint16_t*>(static_cast<const unsigned char*>(pool) +
                                                static_cast<std::size_t>(slot) * sizes.blob.bytes + offset);
}

/// One warp, row f of gate and up, R pairs beginning at `first`; those past `count` repeat the last and are not stored.
template <int R, bool kArriving = false>
__device__ void gate_up_rows(const DecodeSizes& sizes, const std::uint16_t* x, const std::uint16_t* gate,
                             const std::uint16_t* up, const int* pairs, int first, int count, int f, std::uint16_t* h) {
  const std::uint16_t* rows[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    rows[r] = x + static_cast<std::size_t>(pairs[min(first + r, count - 1)] / sizes.top_k) * sizes.hidden;
  }
  const std::uint16_t* const weights[2] = {gate, up};
  float sums[2][R];
  warp_dots<2, R, 4, kArriving>(weights, rows, sizes.hidden, sums);
  if (threadIdx.x % kDecodeWarp == 0) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first + r < count) {
        const float silu = __fdiv_rn(sums[0][r], __fadd_rn(1.0F, expf(-sums[0][r])));
        h[static_cast<std::size_t>(pairs[first + r]) * sizes.expert_hidden + f] =
            bfloat16_bits(__fmul_rn(silu, sums[1][r]));
      }
    }
  }
}

/// Products of rows [i, i + kDownRows) of down with R vectors; a row past the last repeats it.
template <int R>
__device__ void down_dots(const DecodeSizes& sizes, const std::uint16_t* down, int i,
                          const std::uint16_t* const (&rows)[R], float (&sums)[kDownRows][R]) {
  const std::uint16_t* weights[kDownRows];
#pragma unroll
  for (int m = 0; m < kDownRows; ++m) {
    weights[m] = down + static_cast<std::size_t>(min(i + m, sizes.hidden - 1)) * sizes.expert_hidden;
  }
  warp_dots<kDownRows, R, 4>(weights, rows, sizes.expert_hidden, sums);
}

template <int R>
__device__ void down_rows(const DecodeSizes& sizes, const std::uint16_t* h, const std::uint16_t* down, const int* pairs,
                          int first, int count, int i, float* y) {
  const std::uint16_t* rows[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    rows[r] = h + static_cast<std::size_t>(pairs[min(first + r, count - 1)]) * sizes.expert_hidden;
  }
  float sums[kDownRows][R];
  down_dots<R>(sizes, down, i, rows, sums);
  if (threadIdx.x % kDecodeWarp == 0) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int m = 0; m < kDownRows; ++m) {
        if (first + r < count && i + m < sizes.hidden) {
          y[static_cast<std::size_t>(pairs[first + r]) * sizes.hidden + i + m] = sums[m][r];
        }
      }
    }
  }
}

}  // namespace hestia
