#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace hestia {

constexpr int kDecodeWarp = 32;

/// Sum over the lanes of a whole warp; every lane gets the same bits.
__device__ inline float decode_warp_sum(float value) {
  for (int offset = kDecodeWarp / 2; offset > 0; offset /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(0xffffffffU, value, offset));
  }
  return value;
}

__device__ inline float bfloat16_value(std::uint16_t bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

__device__ inline std::uint16_t bfloat16_bits(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

/// 16 bytes of weights: each is read once, so they leave L1 to the activations. volatile: else the compiler may read
/// before it knows that there is something to read.
__device__ inline uint4 load_weights(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

/// The same of weights that other blocks of this kernel wrote, behind what said so.
__device__ inline uint4 load_arrived(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

constexpr int kLine = 128;  // bytes of a line of L2

/// Asks for the line of `address` to be brought into L2. Nothing waits for it.
__device__ inline void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

/// 16 bytes of weights, kArriving: that other blocks of this kernel may have written.
template <bool kArriving>
__device__ uint4 load_weights_of(const void* address) {
  if constexpr (kArriving) {
    return load_arrived(address);
  } else {
    return load_weights(address);
  }
}

/// sum + the products of two pairs of bfloat16, the low halves first.
__device__ inline float add_products(unsigned a, unsigned b, float sum) {
  sum = __fmaf_rn(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
  return __fmaf_rn(__uint_as_float(a & 0xffff0000U), __uint_as_float(b & 0xffff0000U), sum);
}

__device__ inline float add_products(const uint4& a, const uint4& b, float sum) {
  sum = add_products(a.x, b.x, sum);
  sum = add_products(a.y, b.y, sum);
  sum = add_products(a.z, b.z, sum);
  return add_products(a.w, b.w, sum);
}

/// sums[m][r] = product of weight row m and activation row r over `size` bfloat16 values (a multiple of 8), by one
/// warp: lane l adds up the chunks of 8 values l, l + 32, ... in that order, then lanes are added in a tree. The order
/// is the same for every M, R and kUnroll, and so are the bits. Weights in global memory, activations anywhere.
template <int M, int R, int kUnroll, bool kArriving = false>
__device__ void warp_dots(const std::uint16_t* const (&weights)[M], const std::uint16_t* const (&rows)[R], int size,
                          float (&sums)[M][R]) {
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  const int chunks = size / 8;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      sums[m][r] = 0.0F;
    }
  }
  int chunk = lane;
  for (; chunk + (kUnroll - 1) * kDecodeWarp < chunks; chunk += kUnroll * kDecodeWarp) {
    uint4 w[kUnroll][M];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        w[u][m] = load_weights_of<kArriving>(weights[m] + (chunk + u * kDecodeWarp) * 8);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const uint4 x = *reinterpret_cast<const uint4*>(rows[r] + (chunk + u * kDecodeWarp) * 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          sums[m][r] = add_products(w[u][m], x, sums[m][r]);
        }
      }
    }
  }
  for (; chunk < chunks; chunk += kDecodeWarp) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const uint4 w = load_weights_of<kArriving>(weights[m] + chunk * 8);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        sums[m][r] = add_products(w, *reinterpret_cast<const uint4*>(rows[r] + chunk * 8), sums[m][r]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      sums[m][r] = decode_warp_sum(sums[m][r]);
    }
  }
}

}  // namespace hestia
