#pragma once

#include <cstddef>
#include <cstdint>

#include "hestia/routing/residency.hpp"

namespace hestia {

/// Residency-aware routing of one layer by the rule of hestia/routing/residency.hpp: what route_with_residency gives,
/// choice by choice. logits: float32 [T, E]; strength: float32 [T], at least 0, times which the bonus counts at the
/// token (0: it routes by z alone), null: 1 everywhere; run_begin, run_end: int64 [num_runs], token range of each
/// sequence, whose cache starts empty; selected: int64 [T, K] by falling score, ties to the lower index, overwritten
/// inside the runs and left alone outside them. CPU, synchronous, one thread; runs may be shared out among several
/// calls. O(E) per token beside what is chosen.
void residency_scan_cpu(const ResidencyShape& shape, const float* logits, const float* strength,
                        const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                        std::int64_t* selected);

/// Most experts per layer that residency_scan_cuda takes.
inline constexpr std::int64_t kResidencyScanMaxExperts = 512;

/// Bytes of device memory that residency_scan_cuda works in: 4 (8 above 256 experts) per token and expert and 1 bit per
/// token and expert, E rounded up to 32 times a power of two.
[[nodiscard]] std::size_t residency_scan_workspace(const ResidencyShape& shape);

/// The same on the GPU: device pointers, asynchronous on `stream` (a cudaStream_t) of the current device; `workspace`:
/// residency_scan_workspace(shape) bytes, aligned to 8, in use until the stream has passed this call. What does not
/// depend on residency is worked out for all tokens at once; then one warp per run goes from token to token with bit
/// masks over the experts in their order by score. Throws std::invalid_argument above kResidencyScanMaxExperts,
/// RunError with the CUDA error when a launch fails, or when Hestia was built without its CUDA kernels.
void residency_scan_cuda(const ResidencyShape& shape, const float* logits, const float* strength,
                         const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                         std::int64_t* selected, void* workspace, void* stream);

}  // namespace hestia
