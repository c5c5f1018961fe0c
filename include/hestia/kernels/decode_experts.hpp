#pragma once

#include <cstddef>
#include <cstdint>

namespace hestia {

/// How the matrices of a routed expert are stored. Integers come in groups of kExpertGroup inputs of a row, the last
/// one possibly shorter, with a bfloat16 scale (and minimum) each; a weight is q * scale, or minimum + q * scale, in
/// float32. hestia/kernels/expert_formats.hpp packs them and says how they are chosen.
enum class ExpertFormat : std::int32_t {
  kBfloat16,        ///< Row-major bfloat16.
  kInt8,            ///< Signed 8 bits, symmetric: 8.125 bits a weight.
  kInt4,            ///< 4 bits from -8 to 7, symmetric: 4.125 bits a weight.
  kInt4Asymmetric,  ///< 4 bits from 0 to 15, with a minimum: 4.25 bits a weight.
};

/// Weights of a row that share a scale.
inline constexpr std::int64_t kExpertGroup = 128;

/// Most rows of a decode step.
inline constexpr std::int64_t kDecodeMaxTokens = 32;
/// Most experts per token.
inline constexpr std::int64_t kDecodeMaxTopK = 32;
/// Rows of a step from which bfloat16 products go over tensor cores; with fewer, warps multiply row by row.
inline constexpr std::int64_t kDecodeTensorRows = 4;

/// Sizes of one layer's routed experts in a decode step.
struct DecodeExpertsShape {
  std::int64_t num_tokens = 0;          ///< T, 1 to kDecodeMaxTokens
  std::int64_t top_k = 0;               ///< K, 1 to kDecodeMaxTopK
  std::int64_t hidden_size = 0;         ///< H, a multiple of 8
  std::int64_t expert_hidden_size = 0;  ///< F, a multiple of 8
  ExpertFormat format = ExpertFormat::kBfloat16;
  /// The kernels may start before the one before them on the stream has ended; they await that end themselves, those of
  /// down while their weights come in: the kernel right before decode_down and decode_down_combine must not write
  /// `slots` or what lies in them. Those of integers bring nothing in before that end. Compute capability 9.0 or
  /// higher; no effect on the CPU.
  bool dependent = false;
  std::int64_t tensor_rows = kDecodeTensorRows;  ///< In place of it; no effect on integers or on the CPU.
};

/// One expert's blob: where its three matrices begin, in the order of use. gate and up [F, H], down [H, F]; row-major
/// in bfloat16, in tiles of 16 rows and one group else (kernels/expert_layout.hpp), rows and groups filled up with
/// zeros.
struct ExpertBlob {
  std::size_t gate = 0;  ///< Byte offset of a matrix in the blob, a multiple of 16.
  std::size_t up = 0;
  std::size_t down = 0;
  std::size_t gate_scales = 0;  ///< Byte offset of its scales; 0 in bfloat16.
  std::size_t up_scales = 0;
  std::size_t down_scales = 0;
  std::size_t bytes = 0;  ///< Of the whole blob, a multiple of 16: slot s begins at s * bytes.
};

/// The blob of a shape. Throws std::invalid_argument when a size is none that the kernels take, naming it.
[[nodiscard]] ExpertBlob expert_blob(const DecodeExpertsShape& shape);

// Products of a decode step with the experts that a slot table names. `slots`: int32 [T, K], the slot in `pool` that
// holds the k-th expert of row t, negative: not served in this wave. `pool`: blobs one behind the other, aligned to 16.
// bfloat16 values are their bits. A row's result depends on its own x, experts and weights alone, bit by bit: not on
// slot numbers, on the wave that an expert is served in, on the other rows or on their number, but for the side of
// tensor_rows on which it is. Sums are float32 in a fixed order (the CPU's, one after the other, is another one than
// the GPU's, and the GPU's two differ). Stored integers are dequantised in registers.
//
// With waves: decode_gate_up and decode_down for each wave as its experts arrive (a slot may be overwritten as soon as
// its wave's decode_down is through, so products are kept for each k), then decode_combine. The last wave, or the only
// one, may take decode_down_combine in place of the last two.

/// h[t, k] = silu(gate x_t) * (up x_t), silu(a) = a / (1 + exp(-a)), rounded to bfloat16 once, where slots[t, k] is not
/// negative; other rows of h stay. x: bfloat16 [T, H]; h: bfloat16 [T, K, F]. CPU, synchronous, one thread. Throws
/// std::invalid_argument as expert_blob does.
void decode_gate_up_cpu(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                        const void* pool, std::uint16_t* h);
/// y[t, k] = down h[t, k], where slots[t, k] is not negative; other rows of y stay. y: float32 [T, K, H].
void decode_down_cpu(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                     const void* pool, float* y);
/// out_t = residual_t + sum_k weights[t, k] y[t, k], the sum from k = 0 upwards in float32 with fused multiply-adds,
/// rounded to bfloat16 once. weights: float32 [T, K]; residual: bfloat16 [T, H], null: 0; out: bfloat16 [T, H], may be
/// residual itself.
void decode_combine_cpu(const DecodeExpertsShape& shape, const float* y, const float* weights,
                        const std::uint16_t* residual, std::uint16_t* out);
/// decode_down and decode_combine at once: y[t, k] is read where slots[t, k] is negative and worked out elsewhere,
/// without being written. y may be null: then experts without a slot add nothing.
void decode_down_combine_cpu(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                             const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                             std::uint16_t* out);

// The same on the GPU: device pointers, asynchronous on `stream` (a cudaStream_t) of the current device, one kernel
// each, no allocation, fit for capture in a graph. x, h, y, residual and out aligned to 16. They throw RunError with
// the CUDA error when the launch fails, or when Hestia was built without its CUDA kernels.

/// Below tensor_rows one warp per row of gate and up, from there on two blocks per multiprocessor that take 16 rows by
/// turns, on tensor cores; or one block per 16 rows of integers, on tensor cores (sums of a group in their float32,
/// groups in float32). For T > 1 rows with the same slot read its weights together, up to 8 at once, 32 in the second.
void decode_gate_up_cuda(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                         const void* pool, std::uint16_t* h, void* stream);
/// One warp per two rows of down, or 32 rows by turns, or one block per 32 rows of integers; shared among rows in the
/// same way.
void decode_down_cuda(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                      const void* pool, float* y, void* stream);
/// One thread per element.
void decode_combine_cuda(const DecodeExpertsShape& shape, const float* y, const float* weights,
                         const std::uint16_t* residual, std::uint16_t* out, void* stream);
/// One warp per expert and two rows of down, or one block per 32 rows or 16 of integers; every row reads its experts
/// for itself, so it is for T = 1 or few. hit_slots: null where `slots` and what lies in them was there before the
/// kernel right before this one; else, behind decode_fetch_gate_up, its int32 [K]: those of the slots that were,
/// negative elsewhere, and y, where it is not null, holds the products of the hits if and only if one of them is
/// negative.
void decode_down_combine_cuda(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                              const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                              std::uint16_t* out, void* stream, const std::int32_t* hit_slots = nullptr);

}  // namespace hestia
