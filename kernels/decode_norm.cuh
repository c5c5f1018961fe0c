#pragma once

#include "decode_dot.cuh"
#include "hestia/kernels/decode_router.hpp"

namespace hestia {

/// RMSNorm of `size` bfloat16 values (a multiple of 8, `x`, `weight` and `out` aligned to 16) by a block of kThreads:
/// the same bits wherever it is called with the same kThreads. `out` may be shared memory and may be x. `partial`:
/// shared, kThreads / 32 floats. The caller synchronises before it reads `out`.
template <int kThreads>
__device__ void block_rms_norm(const std::uint16_t* x, const std::uint16_t* weight, int size, float eps,
                               DecodeNorm norm, std::uint16_t* out, float* partial) {
  constexpr int kWarps = kThreads / kDecodeWarp;
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0F;
  for (int chunk = thread; chunk < size / 8; chunk += kThreads) {
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
  const float inverse = __frsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(size)), eps));
  const auto scaled = [&](unsigned value, unsigned scale) {
    float normal = __fmul_rn(__uint_as_float(value), inverse);
    if (norm == DecodeNorm::kRms) {
      normal = bfloat16_value(bfloat16_bits(normal));
    }
    return static_cast<unsigned>(bfloat16_bits(__fmul_rn(normal, __uint_as_float(scale))));
  };
  const auto both = [&](unsigned value, unsigned scale) {
    return scaled(value << 16, scale << 16) | scaled(value & 0xffff0000U, scale & 0xffff0000U) << 16;
  };
  for (int chunk = thread; chunk < size / 8; chunk += kThreads) {
    const uint4 v = *reinterpret_cast<const uint4*>(x + chunk * 8);
    const uint4 w = *reinterpret_cast<const uint4*>(weight + chunk * 8);
    *reinterpret_cast<uint4*>(out + chunk * 8) =
        make_uint4(both(v.x, w.x), both(v.y, w.y), both(v.z, w.z), both(v.w, w.w));
  }
}

}  // namespace hestia
