#pragma once

#include <cmath>
#include <cstdint>

#include "hestia/routing/cache_policy.hpp"

namespace hestia {

/// Which cache a sequence starts with (MELINOE, arXiv 2602.11192).
enum class SoftCacheStart : std::int32_t { kUniform, kEmpty };

/// Sizes and rule of a soft-cache scan.
struct SoftCacheShape {
  std::int64_t num_layers = 0;   ///< L
  std::int64_t num_tokens = 0;   ///< T, flat over packed rows
  std::int64_t num_experts = 0;  ///< E
  std::int64_t top_k = 0;        ///< K
  double slots = 0.0;            ///< C
  double gamma = 0.9;
  SoftCacheStart start = SoftCacheStart::kUniform;
};

/// What turns the raw counts n of a sequence into its cache, c = scale * n, after `steps` tokens were added:
/// C / ||n||_1 (kUniform) or 1 / max(1, ||n||_1 / C) (kEmpty). Every token adds K, so the mass needs no sum over
/// experts:
///   ||n||_1 = gamma^steps * ||n_1||_1 + K * (1 - gamma^steps) / (1 - gamma).
[[nodiscard]] HESTIA_HOST_DEVICE inline double soft_cache_scale(const SoftCacheShape& shape, std::int64_t steps) {
  const double count = static_cast<double>(steps);
  // gamma^steps - 1 through expm1: near gamma = 1 the direct quotient loses its digits.
  double faded = 0.0;
  double uses = count;
  if (steps > 0 && shape.gamma < 1.0) {
    faded = expm1(count * log1p(shape.gamma - 1.0));
    uses = -faded / (1.0 - shape.gamma);
  }
  const double added = static_cast<double>(shape.top_k) * uses;
  if (shape.start == SoftCacheStart::kEmpty) {
    return added > shape.slots ? shape.slots / added : 1.0;
  }
  return shape.slots / ((1.0 + faded) * shape.slots + added);
}

/// The soft cache of every token BEFORE it is added:
///   n_{t+1} = gamma * n_t + r_t,  c_t = C * n_t / ||n_t||_1,  n_1 = C/E in every entry (kUniform);
///   n_1 = 0,  c_t = n_t / max(1, ||n_t||_1 / C) (kEmpty).
/// selected: int64 [L, T, K]; run_begin, run_end: int64 [num_runs], the token range of each sequence; cache: float32 or
/// float64 [L, T, E], overwritten inside the runs and left alone outside them. State is kept in the type of `cache`,
/// reset at each run. CPU, plain loops, synchronous, one thread.
/// Throws std::invalid_argument when an expert of a token inside a run is not in [0, E).
template <class Real>
void soft_cache_cpu(const SoftCacheShape& shape, const std::int64_t* selected, const std::int64_t* run_begin,
                    const std::int64_t* run_end, std::int64_t num_runs, Real* cache);

/// The same on the GPU: device pointers, asynchronous on `stream` (a cudaStream_t) of the current device; experts do
/// not meet in the recursion, so one thread scans one expert of one layer and run. An expert outside [0, E) is ignored.
/// Throws RunError with the CUDA error when the launch fails, or when Hestia was built without its CUDA kernels.
template <class Real>
void soft_cache_cuda(const SoftCacheShape& shape, const std::int64_t* selected, const std::int64_t* run_begin,
                     const std::int64_t* run_end, std::int64_t num_runs, Real* cache, void* stream);

/// The scan backwards: `adjoint` holds dF/dc_t of some F, float32 or float64 [L, T, E], and is overwritten inside the
/// runs by dF/dr_t = sum over t' > t of the run of gamma^(t'-t-1) * scale_t' * dF/dc_t' (the mass is constant in r,
/// because every token adds K). CPU, plain loops, synchronous, one thread.
template <class Real>
void soft_cache_adjoint_cpu(const SoftCacheShape& shape, const std::int64_t* run_begin, const std::int64_t* run_end,
                            std::int64_t num_runs, Real* adjoint);

/// The same on the GPU, as soft_cache_cuda.
template <class Real>
void soft_cache_adjoint_cuda(const SoftCacheShape& shape, const std::int64_t* run_begin, const std::int64_t* run_end,
                             std::int64_t num_runs, Real* adjoint, void* stream);

/// True when this build has Hestia's CUDA kernels.
[[nodiscard]] bool has_cuda_kernels();

}  // namespace hestia
