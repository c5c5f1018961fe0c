#include "hestia/kernels/rank_hinge.hpp"

#include <algorithm>
#include <vector>

namespace hestia {
namespace {

/// Column sums over i for each j: of the hinge, of d value / d p_j, and of pairs. One flat array each, because sums
/// that run down columns vectorise where a reduction along the row would have to keep its order.
template <class Real>
struct Columns {
  explicit Columns(std::int64_t num_experts)
      : hinge(static_cast<std::size_t>(num_experts)),
        slope(static_cast<std::size_t>(num_experts)),
        pairs(static_cast<std::size_t>(num_experts)) {}
  std::vector<Real> hinge;
  std::vector<Real> slope;
  std::vector<Real> pairs;
};

/// All ordered pairs without a sort: masks keep equal base probabilities out, and up to some hundred experts the
/// vectorised square costs less than sorting would. (i above j) pushes p_j up; (j above i) pulls it down: counting both
/// here, with i and j exchanged, spares a sum along the row.
template <class Real>
void sum_pairs(const Real* __restrict__ p, const Real* __restrict__ base, std::int64_t num_experts, Real margin,
               Real* __restrict__ hinge, Real* __restrict__ slope, Real* __restrict__ pairs) {
  for (std::int64_t i = 0; i < num_experts; ++i) {
    const Real p_i = p[i];
    const Real base_i = base[i];
    for (std::int64_t j = 0; j < num_experts; ++j) {
      const Real push = (margin - p_i) + p[j];
      const Real pull = (margin - p[j]) + p_i;
      const Real below = base[j] < base_i ? Real(1) : Real(0);
      const Real above = base[j] > base_i ? Real(1) : Real(0);
      const Real pushes = push > Real(0) ? Real(1) : Real(0);
      const Real pulls = pull > Real(0) ? Real(1) : Real(0);
      hinge[j] += below * pushes * push;
      slope[j] += below * pushes - above * pulls;
      pairs[j] += below;
    }
  }
}

}  // namespace

template <class Real>
void rank_hinge_cpu(const Real* p, const Real* base, std::int64_t num_tokens, std::int64_t num_experts, double margin,
                    bool normalise, double* value, Real* gradient) {
  Columns<Real> columns(num_experts);
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    const Real* const row = p + token * num_experts;
    std::fill(columns.hinge.begin(), columns.hinge.end(), Real(0));
    std::fill(columns.slope.begin(), columns.slope.end(), Real(0));
    std::fill(columns.pairs.begin(), columns.pairs.end(), Real(0));
    sum_pairs(row, base + token * num_experts, num_experts, static_cast<Real>(margin), columns.hinge.data(),
              columns.slope.data(), columns.pairs.data());
    double total = 0.0;
    double pairs = 0.0;
    double mean_slope = 0.0;
    for (std::int64_t j = 0; j < num_experts; ++j) {
      const auto column = static_cast<std::size_t>(j);
      total += static_cast<double>(columns.hinge[column]);
      pairs += static_cast<double>(columns.pairs[column]);
      mean_slope += static_cast<double>(row[j] * columns.slope[column]);
    }
    const double scale = normalise ? 1.0 / std::max(pairs, 1.0) : 1.0;
    value[token] = total * scale;
    if (gradient != nullptr) {
      Real* const gradient_row = gradient + token * num_experts;
      for (std::int64_t j = 0; j < num_experts; ++j) {
        const Real slope = columns.slope[static_cast<std::size_t>(j)] - static_cast<Real>(mean_slope);
        gradient_row[j] = static_cast<Real>(scale) * row[j] * slope;
      }
    }
  }
}

template void rank_hinge_cpu<float>(const float*, const float*, std::int64_t, std::int64_t, double, bool, double*,
                                    float*);
template void rank_hinge_cpu<double>(const double*, const double*, std::int64_t, std::int64_t, double, bool, double*,
                                     double*);

}  // namespace hestia
