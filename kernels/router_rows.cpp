#include "hestia/kernels/router_rows.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "row_terms.hpp"

namespace hestia {
namespace {

/// An expert and what the base router gives it.
template <class Real>
struct Ranked {
  Real base = Real(0);
  std::int32_t expert = 0;
};

/// Room for one row, kept over many.
template <class Real>
struct Scratch {
  explicit Scratch(std::int64_t num_experts)
      : values(6 * static_cast<std::size_t>(num_experts)),
        order(static_cast<std::size_t>(num_experts)),
        sum_from(static_cast<std::size_t>(num_experts) + 1) {}
  std::vector<Real> values;
  std::vector<Ranked<Real>> order;
  std::vector<double> sum_from;
};

/// w_j of all experts of a row.
template <class Real, class Term>
void weigh_row(const Bound<Real, Term>& bound, Real* weighted, RowSums& sums, Scratch<Real>& /*scratch*/) {
  for (std::int64_t j = 0; j < bound.num_experts; ++j) {
    weighted[j] = bound.weighted(j, log_probability(bound.rows, bound.row, bound.num_experts, j), sums);
  }
}

/// Of one upper expert against all that stand below it, contiguous: how many it pushes up, and by how much in all.
template <class Real>
Real push_up(const Real* __restrict__ p, std::int64_t count, Real p_upper, Real margin, Real* __restrict__ hinge,
             Real* __restrict__ slope) {
  int pushed = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    const Real push = margin - (p_upper - p[j]);
    const Real pushes = push > Real(0) ? Real(1) : Real(0);
    hinge[j] += pushes * push;
    slope[j] += pushes;
    pushed += push > Real(0) ? 1 : 0;
  }
  return static_cast<Real>(pushed);
}

/// The hinge over experts sorted by their base probability, so that only pairs that count are visited. An upper expert
/// with p below the margin pushes all that stand below it, whatever they hold: no pair of it is looked at. At most
/// 1 / margin experts are above the margin.
template <class Real>
void weigh_row(const Bound<Real, RankHingeTerm<Real>>& bound, Real* weighted, RowSums& sums, Scratch<Real>& scratch) {
  const std::int64_t num_experts = bound.num_experts;
  const Real margin = static_cast<Real>(bound.term.margin);
  std::vector<Ranked<Real>>& order = scratch.order;
  Real* const p = scratch.values.data() + 3 * num_experts;  // what comes before is the driver's
  Real* const hinge = p + num_experts;
  Real* const slope = hinge + num_experts;
  std::fill(hinge, slope + num_experts, Real(0));
  for (std::int64_t j = 0; j < num_experts; ++j) {
    bound.stage(j);
    // A router that blew up must not break the order of the sort: what is no number stands below everything.
    order[static_cast<std::size_t>(j)] = {std::isnan(bound.extra[j]) ? Real(-1) : bound.extra[j],
                                          static_cast<std::int32_t>(j)};
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.base > b.base; });
  std::vector<double>& sum_from = scratch.sum_from;  // of p, from a rank to the last
  for (std::int64_t rank = num_experts - 1; rank >= 0; --rank) {
    p[rank] = bound.p[order[static_cast<std::size_t>(rank)].expert];
    sum_from[static_cast<std::size_t>(rank)] =
        sum_from[static_cast<std::size_t>(rank) + 1] + static_cast<double>(p[rank]);
  }
  std::int64_t full_above = 0;  // experts that push everything below them
  for (std::int64_t begin = 0, end = 0; begin < num_experts; begin = end) {
    // One group of equal base probabilities.
    while (end < num_experts &&
           order[static_cast<std::size_t>(end)].base == order[static_cast<std::size_t>(begin)].base) {
      ++end;
    }
    const std::int64_t below = num_experts - end;
    std::int64_t full = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      slope[i] += static_cast<Real>(full_above);
      if (p[i] < margin) {
        ++full;
        slope[i] -= static_cast<Real>(below);
        sums.value +=
            static_cast<double>(below) * static_cast<double>(margin - p[i]) + sum_from[static_cast<std::size_t>(end)];
      } else {
        slope[i] -= push_up(p + end, below, p[i], margin, hinge + end, slope + end);
      }
    }
    full_above += full;
    sums.pairs += static_cast<double>((end - begin) * below);
  }
  for (std::int64_t rank = 0; rank < num_experts; ++rank) {
    sums.value += static_cast<double>(hinge[rank]);
    weighted[order[static_cast<std::size_t>(rank)].expert] = p[rank] * slope[rank];
  }
}

}  // namespace

template <class Real, class Term>
void row_term_cpu(const RowLayout& layout, const SoftmaxRows<Real>& rows, const Term& term,
                  const RowResult<Real>& result, std::int64_t first_row, std::int64_t last_row) {
  const std::int64_t num_experts = layout.num_experts;
  Scratch<Real> scratch(num_experts);
  Real* const p = scratch.values.data();
  Real* const weighted = p + num_experts;
  for (std::int64_t row = first_row; row < last_row; ++row) {
    Bound<Real, Term> bound{bound_row(layout, rows, row / layout.num_tokens, row % layout.num_tokens), term};
    if (!bound.active()) {
      if (result.value != nullptr) {
        result.value[row] = 0.0;
      }
      continue;
    }
    for (std::int64_t j = 0; j < num_experts; ++j) {
      p[j] = probability(rows, row, num_experts, j);
    }
    bound.p = p;
    bound.extra = weighted + num_experts;
    RowSums sums;
    weigh_row(bound, weighted, sums, scratch);
    const Real factor = bound.factor(sums);
    if (result.value != nullptr) {
      for (std::int64_t k = 0; k < bound.num_choices(); ++k) {
        sums.value += bound.choice(k);
      }
      result.value[row] = sums.value * static_cast<double>(factor);
    }
    if (result.gradient != nullptr) {
      Real total = Real(0);
      for (std::int64_t j = 0; j < num_experts; ++j) {
        total += weighted[j];
      }
      const Real scale = static_cast<Real>(result.scale) * factor;
      Real* const gradient = result.gradient + row * num_experts;
      for (std::int64_t j = 0; j < num_experts; ++j) {
        gradient[j] += scale * (weighted[j] - p[j] * total);
      }
    }
  }
}

template <class Real>
void window_sums_cpu(const RowLayout& layout, const SoftmaxRows<Real>& rows, WindowQuantity quantity, double epsilon,
                     const std::int64_t* begins, const std::int64_t* ends, std::int64_t num_windows, Real* sums,
                     std::int64_t first_layer, std::int64_t last_layer) {
  const std::int64_t num_experts = layout.num_experts;
  for (std::int64_t layer = first_layer; layer < last_layer; ++layer) {
    for (std::int64_t window = 0; window < num_windows; ++window) {
      Real* const sum = sums + (layer * num_windows + window) * num_experts;
      std::fill(sum, sum + num_experts, Real(0));
      for (std::int64_t token = begins[window]; token < ends[window]; ++token) {
        if (layout.counted[token] == 0) {
          continue;
        }
        const std::int64_t row = layer * layout.num_tokens + token;
        for (std::int64_t j = 0; j < num_experts; ++j) {
          const Real p = probability(rows, row, num_experts, j);
          sum[j] += quantity == WindowQuantity::kProbability ? p : std::log1p(static_cast<Real>(epsilon) - p);
        }
      }
    }
  }
}

void segment_sums_cpu(const double* values, std::int64_t outer, std::int64_t length, const std::int64_t* begins,
                      const std::int64_t* ends, std::int64_t num_segments, double* sums) {
  for (std::int64_t i = 0; i < outer; ++i) {
    for (std::int64_t segment = 0; segment < num_segments; ++segment) {
      sums[i * num_segments + segment] =
          std::accumulate(values + i * length + begins[segment], values + i * length + ends[segment], 0.0);
    }
  }
}

template <class Real>
void soft_cache_upstream_cpu(const RowLayout& layout, const std::int64_t* selected, std::int64_t top_k, bool clamp,
                             Real* cache) {
  std::vector<Real> upstream(static_cast<std::size_t>(layout.num_experts));
  for (std::int64_t row = 0; row < layout.num_layers * layout.num_tokens; ++row) {
    Real* const cached = cache + row * layout.num_experts;
    std::fill(upstream.begin(), upstream.end(), Real(0));
    if (layout.counted[row % layout.num_tokens] != 0) {
      for (std::int64_t k = 0; k < top_k; ++k) {
        const std::int64_t expert = selected[row * top_k + k];
        if (expert >= 0 && expert < layout.num_experts && !(clamp && cached[expert] > Real(1))) {
          upstream[static_cast<std::size_t>(expert)] = Real(-1);
        }
      }
    }
    std::copy(upstream.begin(), upstream.end(), cached);
  }
}

// NOLINTBEGIN(bugprone-macro-parentheses): types cannot stand in parentheses
#define HESTIA_INSTANTIATE(Real, Term)                                                            \
  template void row_term_cpu<Real, Term>(const RowLayout&, const SoftmaxRows<Real>&, const Term&, \
                                         const RowResult<Real>&, std::int64_t, std::int64_t);
HESTIA_FOR_EACH_ROW_TERM(HESTIA_INSTANTIATE)
#undef HESTIA_INSTANTIATE

#define HESTIA_INSTANTIATE(Real)                                                                                   \
  template void window_sums_cpu<Real>(const RowLayout&, const SoftmaxRows<Real>&, WindowQuantity, double,          \
                                      const std::int64_t*, const std::int64_t*, std::int64_t, Real*, std::int64_t, \
                                      std::int64_t);                                                               \
  template void soft_cache_upstream_cpu<Real>(const RowLayout&, const std::int64_t*, std::int64_t, bool, Real*);
HESTIA_INSTANTIATE(float)
HESTIA_INSTANTIATE(double)
#undef HESTIA_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace hestia
