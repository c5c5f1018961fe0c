#pragma once

#include "decode_dot.cuh"
#include "hestia/kernels/decode_router.hpp"

namespace hestia {

/// Two neighbours of a row, as bits, times `inverse` and their weights.
__device__ inline unsigned normalised_pair(unsigned values, unsigned weights, float inverse, DecodeNorm norm) {
  const auto scaled = [&](unsigned value, unsigned weight) {
    float normal = __fmul_rn(__uint_as_float(value), inverse);
    if (norm == DecodeNorm::kRms) {
      normal = bfloat16_value(bfloat16_bits(normal));
    }
    return static_cast<unsigned>(bfloat16_bits(__fmul_rn(normal, __uint_as_float(weight))));
  };
  return scaled(values << 16, weights << 16) | scaled(values & 0xffff0000U, weights & 0xffff0000U) << 16;
}

__device__ inline uint4 normalised(const uint4& v, const uint4& w, float inverse, DecodeNorm norm) {
  return make_uint4(normalised_pair(v.x, w.x, inverse, norm), normalised_pair(v.y, w.y, inverse, norm),
                    normalised_pair(v.z, w.z, inverse, norm), normalised_pair(v.w, w.w, inverse, norm));
}

/// 1 / sqrt(mean(x^2) + eps) from the sum of the squares.
__device__ inline float inverse_rms(float squares, int size, float eps) {
  return __frsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(size)), eps));
}

/// RMSNorm of `size` bfloat16 values (a multiple of 8, `x`, `weight` and `out` aligned to 16) by a block of kThreads:
/// the same bits wherever it is called with the same kThreads. `out` may be shared memory and may be x. `partial`:
/// shared, kThreads / 32 floats. The caller synchronises before it reads `out`.
template <int kThreads>
__device__ void block_rms_norm(const std::uint16_t* x, const std::uint16_t* weight, int size, float eps,
                               DecodeNorm norm, std::uint16_t* out, float* partial) {
  constexpr int kWarps = kThreads / kDecodeWarp;
  constexpr int kHeld = 2;  // chunks per thread that are read once, weights too before the sum is known
  const int thread = static_cast<int>(threadIdx.x);
  const int chunks = size / 8;
  uint4 held[kHeld];
  uint4 held_weight[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int chunk = thread + i * kThreads;
    if (chunk < chunks) {
      held[i] = *reinterpret_cast<const uint4*>(x + chunk * 8);
      held_weight[i] = *reinterpret_cast<const uint4*>(weight + chunk * 8);
    }
  }
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (thread + i * kThreads < chunks) {
      sum = add_products(held[i], held[i], sum);
    }
  }
#pragma unroll 1
  for (int chunk = thread + kHeld * kThreads; chunk < chunks; chunk += kThreads) {
    const uint4 values = *reinterpret_cast<const uint4*>(x + chunk * 8);
    sum = add_products(values, values, sum);
  }
  sum = decode_warp_sum(sum);
  if (thread % kDecodeWarp == 0) {
    partial[thread / kDecodeWarp] = sum;
  }
  __syncthreads();
  sum = 0.0F;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum = __fadd_rn(sum, partial[warp]);
  }
  const float inverse = inverse_rms(sum, size, eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int chunk = thread + i * kThreads;
    if (chunk < chunks) {
      *reinterpret_cast<uint4*>(out + chunk * 8) = normalised(held[i], held_weight[i], inverse, norm);
    }
  }
#pragma unroll 1
  for (int chunk = thread + kHeld * kThreads; chunk < chunks; chunk += kThreads) {
    const uint4 v = *reinterpret_cast<const uint4*>(x + chunk * 8);
    const uint4 w = *reinterpret_cast<const uint4*>(weight + chunk * 8);
    *reinterpret_cast<uint4*>(out + chunk * 8) = normalised(v, w, inverse, norm);
  }
}

}  // namespace hestia
