#pragma once

#include <cstdint>

namespace hestia {

/// Rank-matching hinge of independent tokens (MELINOE, arXiv 2602.11192), against the base router's probabilities:
///   value_n = sum over i,j with base_i > base_j of max(0, margin - p_i + p_j)
/// p, base: float32 or float64 [N, E]; value: float64 [N], overwritten; gradient: d value_n / d logits [N, E] in the
/// type of p (p = softmax(logits)), overwritten, or null when not wanted. `normalise`: value and gradient of a token
/// are divided by its number of pairs (no pair: 0). All pairs of a token are visited and memory stays O(E) beside the
/// results; equal base probabilities are no pair, exactly. CPU, plain loops, synchronous, one thread.
template <class Real>
void rank_hinge_cpu(const Real* p, const Real* base, std::int64_t num_tokens, std::int64_t num_experts, double margin,
                    bool normalise, double* value, Real* gradient);

/// The same on the GPU: device pointers, asynchronous on `stream` (a cudaStream_t) of the current device; one warp per
/// token. Throws RunError with the CUDA error when the launch fails, or when Hestia was built without its CUDA kernels.
template <class Real>
void rank_hinge_cuda(const Real* p, const Real* base, std::int64_t num_tokens, std::int64_t num_experts, double margin,
                     bool normalise, double* value, Real* gradient, void* stream);

}  // namespace hestia
