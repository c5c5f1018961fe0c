#pragma once

#include <cstdint>

#include "hestia/kernels/decode_router.hpp"

namespace hestia {

/// Sizes of a dense product of a decode step, and the norm before it.
struct DecodeLinearShape {
  std::int64_t num_tokens = 0;         ///< T, 1 to 32
  std::int64_t input_size = 0;         ///< H, a multiple of 8
  std::int64_t output_size = 0;        ///< N, from 1
  DecodeNorm norm = DecodeNorm::kRms;  ///< With a norm_weight.
  float norm_eps = 1e-5F;
  /// The kernel may start before the one before it on the stream has ended; it awaits that end itself, weights already
  /// on their way. So that kernel must not write `weight`. Compute capability 9.0 or higher; no effect on the CPU.
  bool dependent = false;
};

/// What goes in. bfloat16 values are their bits.
struct DecodeLinearInputs {
  const std::uint16_t* x = nullptr;            ///< bfloat16 [T, H]
  const std::uint16_t* norm_weight = nullptr;  ///< bfloat16 [H], of an RMSNorm of x; null: x as it is
  const std::uint16_t* weight = nullptr;       ///< bfloat16 [N, H]
  const std::uint16_t* bias = nullptr;         ///< bfloat16 [N]; null: none
  const std::uint16_t* residual = nullptr;     ///< bfloat16 [T, N], may be the output itself; null: none
  /// bfloat16 [T, H], overwritten with the RMSNorm of x where that is worked out once and not by every block: from 3
  /// rows on, or where all rows together are beyond 40 KiB. Null: such sizes are refused. Ignored without a
  /// norm_weight, and by the CPU.
  std::uint16_t* normal = nullptr;
};

// Dense products of a decode step: query, key and value at once (weights one behind the other), the output projection
// with its residual, the lm head. A row's result depends on its own x alone, bit by bit: not on T or the other rows.

/// out_t = residual_t + (weight n(x_t) + bias), n the RMSNorm, whose result is rounded to bfloat16; all sums float32,
/// rounded to bfloat16 once at the end. out: bfloat16 [T, N]. CPU, synchronous, one thread. Throws
/// std::invalid_argument when a size is none of the above.
void decode_linear_cpu(const DecodeLinearShape& shape, const DecodeLinearInputs& in, std::uint16_t* out);
/// The same, not rounded at the end. out: float32 [T, N].
void decode_linear_cpu(const DecodeLinearShape& shape, const DecodeLinearInputs& in, float* out);

/// The same on the GPU: device pointers (x, norm_weight, weight and normal aligned to 16), asynchronous on `stream` (a
/// cudaStream_t) of the current device, one kernel, or two where `normal` is written, no allocation, fit for capture in
/// a graph. A block owns 16 rows of `weight`, its warps a part of H each, in products of tensor cores that serve all
/// rows of the step at once; the parts are added in order. Throws std::invalid_argument where `normal` is needed and
/// null, and RunError with the CUDA error when the launch fails, or when Hestia was built without its CUDA kernels.
void decode_linear_cuda(const DecodeLinearShape& shape, const DecodeLinearInputs& in, std::uint16_t* out, void* stream);
void decode_linear_cuda(const DecodeLinearShape& shape, const DecodeLinearInputs& in, float* out, void* stream);

}  // namespace hestia
