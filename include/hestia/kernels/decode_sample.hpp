#pragma once

#include <cstddef>
#include <cstdint>

namespace hestia {

/// How the next token of each row of a decode step is chosen.
struct DecodeSampleShape {
  std::int64_t num_tokens = 0;  ///< T, 1 to 32
  std::int64_t vocabulary = 0;  ///< V, 1 to 2^19
  float temperature = 0.0F;     ///< 0: the highest logit
  float top_p = 1.0F;           ///< Above 0, to 1; 1: the whole vocabulary
  bool one_step = false;        ///< All rows are at one step: `step` is [1] instead of [T].
  /// The kernel may start before the one before it on the stream has ended; it awaits that end itself. Compute
  /// capability 9.0 or higher; no effect on the CPU.
  bool dependent = false;
};

/// What goes in.
struct DecodeSampleInputs {
  const float* logits = nullptr;        ///< float32 [T, V]
  const std::uint64_t* seed = nullptr;  ///< uint64 [T], of each row's own stream of draws; unused at temperature 0
  const std::int64_t* step = nullptr;   ///< int64 [T] or [1], which draw of the stream; unused at temperature 0
};

/// ids_t = the token of row t. Index: std::int32_t or std::int64_t.
///
/// At temperature 0 the highest logit, ties to the lowest id; NaN counts as the lowest.
///
/// Else by integers alone, so that CPU and GPU choose the same token from the same logits. The distance of a token is
/// floor((max z - z) log2(e) / temperature 2^20), worked out in float32, and its weight floor(2^(40 - distance /
/// 2^20)), to about 7 digits; there is none from a distance of 41 2^20 on or for NaN. The nucleus is the shortest run
/// of tokens by rising distance, ties to the lower id, whose weights sum to top_p of all or more (Holtzman et al. 2020,
/// arXiv 1904.09751). With r the 64 bits of the row's draw, SplitMix64(SplitMix64(seed).next() + step).next(), and S
/// the sum of the nucleus, the token is the first by id whose weight, added to those of the nucleus before it, is above
/// floor(r S / 2^64). No weight at all, as with an infinite logit or none above minus infinity: id -1.
///
/// CPU, synchronous, one thread. Throws std::invalid_argument when a size or setting is none of the above.
template <class Index>
void decode_sample_cpu(const DecodeSampleShape& shape, const DecodeSampleInputs& in, Index* ids);

/// Bytes of device memory, aligned to 8, that decode_sample_cuda compares in: zero before the first call, and zero
/// again after each.
[[nodiscard]] std::size_t decode_sample_workspace(const DecodeSampleShape& shape);

/// The same on the GPU: device pointers, asynchronous on `stream` (a cudaStream_t) of the current device, one kernel,
/// no allocation, fit for capture in a graph, which then follows the steps in device memory. At temperature 0 several
/// blocks per row, else one. Throws RunError with the CUDA error when the launch fails, or when Hestia was built
/// without its CUDA kernels.
template <class Index>
void decode_sample_cuda(const DecodeSampleShape& shape, const DecodeSampleInputs& in, Index* ids, void* workspace,
                        void* stream);

}  // namespace hestia
