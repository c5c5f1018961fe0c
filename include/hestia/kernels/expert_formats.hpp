#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/kernels/decode_experts.hpp"

namespace hestia {

/// Name on the command line and in recipes: bf16, int8, int4, int4-asymmetric.
[[nodiscard]] std::string_view expert_format_name(ExpertFormat format);
/// Inverse of expert_format_name. Throws UsageError with the nearest name.
[[nodiscard]] ExpertFormat expert_format_from_name(std::string_view name);
/// All names, in enum order.
[[nodiscard]] std::vector<std::string> expert_format_names();

/// Relative square error of each matrix, sum (w - w')^2 / sum w^2, w' the stored weight; 0 for a matrix of zeros.
struct ExpertError {
  double gate = 0.0;
  double up = 0.0;
  double down = 0.0;
};

/// Packs one expert into `blob` (expert_blob(shape).bytes bytes, aligned to 2, every byte written) in the format of
/// `shape`. gate, up: bfloat16 [F, H]; down: bfloat16 [H, F], row-major. Per group, all in float32:
///   kInt8              scale = bfloat16(max |w| / 127)          q = round(w / scale), from -127 to 127
///   kInt4              scale = bfloat16(-e / 8), e the w of largest |w|    q = round(w / scale), from -8 to 7
///   kInt4Asymmetric    minimum = bfloat16(min w), scale = bfloat16((max w - minimum) / 15)
///                                                               q = round((w - minimum) / scale), from 0 to 15
/// round to nearest, ties to even; a scale of 0 has q = 0. kBfloat16 copies the weights. Returns the error. Throws
/// InputError when a weight is not finite, saying where, and std::invalid_argument as expert_blob does. One thread.
ExpertError quantise_expert(const DecodeExpertsShape& shape, const std::uint16_t* gate, const std::uint16_t* up,
                            const std::uint16_t* down, void* blob);

/// The weights that the kernels compute with: float32, of the shapes above.
void dequantise_expert(const DecodeExpertsShape& shape, const void* blob, float* gate, float* up, float* down);

/// The same rounded to bfloat16, for products that take no integers: blob i of `out` becomes blob blobs[i] of `pool`,
/// or blob i where `blobs` is null, for i below `count`; it stays as it is where blobs[i] is negative. `pool`: blobs in
/// the format of `shape`; `out`: blobs of the same sizes in kBfloat16 (expert_blob); both aligned to 16 and apart.
/// CPU, synchronous, one thread. Throws std::invalid_argument as expert_blob does and for a negative count.
void dequantise_experts_cpu(const DecodeExpertsShape& shape, const void* pool, const std::int32_t* blobs,
                            std::int64_t count, void* out);
/// The same bits on the GPU: device pointers, asynchronous on `stream` (a cudaStream_t) of the current device, one
/// kernel, no allocation, fit for capture in a graph. At most 65,535 blobs. Throws RunError with the CUDA error when
/// the launch fails, or when Hestia was built without its CUDA kernels.
void dequantise_experts_cuda(const DecodeExpertsShape& shape, const void* pool, const std::int32_t* blobs,
                             std::int64_t count, void* out, void* stream);

}  // namespace hestia
