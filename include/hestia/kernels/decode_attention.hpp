#pragma once

#include <cstddef>
#include <cstdint>

namespace hestia {

/// Over what the RMSNorm of queries and keys goes.
enum class DecodeHeadNorm : std::int32_t {
  kNone,
  kHeads,  ///< Each head on its own, as Qwen3 does.
  kWidth   ///< All heads of the row at once, as OLMoE does.
};

/// Sizes and rules of one layer's attention in a decode step: one new token per row.
struct DecodeAttentionShape {
  std::int64_t num_tokens = 0;           ///< T, 1 to 32
  std::int64_t num_heads = 0;            ///< A, a multiple of G
  std::int64_t num_key_value_heads = 0;  ///< G
  std::int64_t head_dim = 0;             ///< d, a multiple of 8, to 256
  std::int64_t capacity = 0;             ///< C, tokens that a row of the key-value cache holds
  bool one_position = false;             ///< All rows are at one position: `position` is [1] instead of [T].
  /// The kernels may start before the one before them on the stream has ended; they await that end themselves. Compute
  /// capability 9.0 or higher; no effect on the CPU.
  bool dependent = false;
  DecodeHeadNorm norm = DecodeHeadNorm::kNone;
  float norm_eps = 1e-5F;
  float clip = 0.0F;               ///< Projections are clamped to [-clip, clip]; 0: not.
  std::int64_t num_rotations = 0;  ///< P, positions that the tables of rotations hold
  float scale = 0.0F;              ///< Of scores, most often 1 / sqrt(d).
  std::int64_t window = 0;         ///< Keys seen at most, the newest ones; 0: all.
};

/// The key-value cache of a layer, written at the position and read up to it.
struct DecodeKeyValues {
  std::uint16_t* keys = nullptr;    ///< bfloat16 [T, G, C, d]
  std::uint16_t* values = nullptr;  ///< bfloat16 [T, G, C, d]
};

/// What goes into decode_attention. bfloat16 values are their bits.
struct DecodeAttentionInputs {
  const std::uint16_t* projected = nullptr;   ///< bfloat16 [T, (A + 2 G) d]: queries, keys, values
  const std::uint16_t* query_norm = nullptr;  ///< bfloat16 [d] or, over the width, [A d]
  const std::uint16_t* key_norm = nullptr;    ///< bfloat16 [d] or, over the width, [G d]
  const std::uint16_t* cosine = nullptr;      ///< bfloat16 [P, d / 2]
  const std::uint16_t* sine = nullptr;        ///< bfloat16 [P, d / 2]
  const std::int64_t* position = nullptr;     ///< int64 [T] or [1], from 0, below C and P
  const std::uint16_t* sinks = nullptr;       ///< bfloat16 [A], null: none
};

// A row's results depend on the row alone, bit by bit: not on T or the other rows.

/// Norms, clamps and rotates the queries and keys of the new tokens, writes keys and values into the cache at the
/// position, and attends: out = softmax(scale q K^T) V over the keys 0 to position of the row, the newest `window` of
/// them if that is not 0; query head h reads key-value head h / (A / G). As the model's own attention rounds: n(x) =
/// bfloat16(bfloat16(x * inverse) * weight) with inverse = 1 / sqrt(mean(x^2) + eps), over the width before the clamp
/// and of heads behind it; with a and b the halves of a head (a, b) -> (bfloat16(bfloat16(a cos) - b sin),
/// bfloat16(bfloat16(b cos) + a sin)). With sinks head h has one score more, sinks[h], of a key that brings no value.
/// The softmax is float32, rounded to bfloat16 once. out: bfloat16 [T, A d], not `projected`. CPU, synchronous, one
/// thread. Throws std::invalid_argument when a size is none of the above or a position outside the cache or the tables,
/// before anything is written.
void decode_attention_cpu(const DecodeAttentionShape& shape, const DecodeAttentionInputs& in,
                          const DecodeKeyValues& cache, std::uint16_t* out);

/// Bytes of device memory that decode_attention_cuda works in, aligned to 16: zero before the first call; its counters,
/// the first 4 T A bytes, are zero again after each, the rest need not be.
[[nodiscard]] std::size_t decode_attention_workspace(const DecodeAttentionShape& shape);

/// The same on the GPU: device pointers (all but position and sinks aligned to 16), asynchronous on `stream` (a
/// cudaStream_t) of the current device, one kernel, no allocation, fit for capture in a graph, which then follows the
/// positions in device memory. A block takes one or, of many rows, more of the stretches of keys of a row and key-value
/// head with up to 4 of its query heads; the block that ends last joins the stretches in order. How many stretches
/// there are depends on A, G and C, their length on the row's position. `dependent`: the kernel before must not write
/// the position, the norms' weights, the tables or what the cache holds of earlier tokens. A position outside the cache
/// or the tables writes nothing into the cache and NaN to out. Throws RunError with the CUDA error when the launch
/// fails, or when Hestia was built without its CUDA kernels.
void decode_attention_cuda(const DecodeAttentionShape& shape, const DecodeAttentionInputs& in,
                           const DecodeKeyValues& cache, std::uint16_t* out, void* workspace, void* stream);

}  // namespace hestia
