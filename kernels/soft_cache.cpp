#include "hestia/kernels/soft_cache.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace hestia {

template <class Real>
void soft_cache_cpu(const SoftCacheShape& shape, const std::int64_t* selected, const std::int64_t* run_begin,
                    const std::int64_t* run_end, std::int64_t num_runs, Real* cache) {
  const std::int64_t num_experts = shape.num_experts;
  const Real gamma = static_cast<Real>(shape.gamma);
  const double start = shape.start == SoftCacheStart::kUniform ? shape.slots / static_cast<double>(num_experts) : 0.0;
  std::vector<Real> counts(static_cast<std::size_t>(num_experts));
  Real* const state = counts.data();
  for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
    for (std::int64_t run = 0; run < num_runs; ++run) {
      std::fill(counts.begin(), counts.end(), static_cast<Real>(start));
      for (std::int64_t token = run_begin[run]; token < run_end[run]; ++token) {
        const std::int64_t position = layer * shape.num_tokens + token;
        const Real scale = static_cast<Real>(soft_cache_scale(shape, token - run_begin[run]));
        Real* const row = cache + position * num_experts;
        for (std::int64_t expert = 0; expert < num_experts; ++expert) {
          row[expert] = state[expert] * scale;
          state[expert] *= gamma;
        }
        const std::int64_t* const chosen = selected + position * shape.top_k;
        for (std::int64_t k = 0; k < shape.top_k; ++k) {
          if (chosen[k] < 0 || chosen[k] >= num_experts) {
            throw std::invalid_argument("soft cache: selected expert must be between 0 and " +
                                        std::to_string(num_experts - 1) + ", got " + std::to_string(chosen[k]) +
                                        " at layer " + std::to_string(layer) + ", token " + std::to_string(token));
          }
          state[chosen[k]] += Real(1);
        }
      }
    }
  }
}

template <class Real>
void soft_cache_adjoint_cpu(const SoftCacheShape& shape, const std::int64_t* run_begin, const std::int64_t* run_end,
                            std::int64_t num_runs, Real* adjoint) {
  const std::int64_t num_experts = shape.num_experts;
  const Real gamma = static_cast<Real>(shape.gamma);
  std::vector<Real> later(static_cast<std::size_t>(num_experts));
  Real* const state = later.data();
  for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
    for (std::int64_t run = 0; run < num_runs; ++run) {
      std::fill(later.begin(), later.end(), Real(0));
      for (std::int64_t token = run_end[run] - 1; token >= run_begin[run]; --token) {
        const Real scale = static_cast<Real>(soft_cache_scale(shape, token - run_begin[run]));
        Real* const row = adjoint + (layer * shape.num_tokens + token) * num_experts;
        for (std::int64_t expert = 0; expert < num_experts; ++expert) {
          const Real own = row[expert] * scale;
          row[expert] = state[expert];
          state[expert] = state[expert] * gamma + own;
        }
      }
    }
  }
}

template void soft_cache_cpu<float>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                    const std::int64_t*, std::int64_t, float*);
template void soft_cache_cpu<double>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                     const std::int64_t*, std::int64_t, double*);
template void soft_cache_adjoint_cpu<float>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                            std::int64_t, float*);
template void soft_cache_adjoint_cpu<double>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                             std::int64_t, double*);

}  // namespace hestia
