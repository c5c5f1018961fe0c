#pragma once

// The formulas of the terms over rows, written once for CPU and GPU. Every term is bound to one row and then asked for
// w_j = p_j v_j of each expert; the driver turns that into the gradient w_j - p_j * sum_i w_i. A bound term also adds
// its value, by expert or by selected expert.

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "hestia/kernels/router_rows.hpp"

namespace hestia {

template <class Real>
HESTIA_HOST_DEVICE inline Real log_probability(const SoftmaxRows<Real>& rows, std::int64_t row,
                                               std::int64_t num_experts, std::int64_t expert) {
  return (rows.logits[row * num_experts + expert] - rows.max[row]) - rows.log_sum[row];
}

template <class Real>
HESTIA_HOST_DEVICE inline Real probability(const SoftmaxRows<Real>& rows, std::int64_t row, std::int64_t num_experts,
                                           std::int64_t expert) {
  using std::exp;
  return rows.probabilities != nullptr ? rows.probabilities[row * num_experts + expert]
                                       : exp(log_probability(rows, row, num_experts, expert));
}

/// What a row adds up besides its gradient.
struct RowSums {
  double value = 0.0;
  double pairs = 0.0;
};

/// Where a bound term stands, and what terms leave out when they have nothing of the kind.
template <class Real>
struct BoundRow {
  SoftmaxRows<Real> rows;
  std::int64_t row = 0;
  std::int64_t layer = 0;
  std::int64_t token = 0;
  std::int64_t num_experts = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  const std::uint8_t* counted = nullptr;
  const Real* p = nullptr;  ///< This row's probabilities, staged.
  Real* extra = nullptr;    ///< Room for E more, staged by the term itself.

  static constexpr bool kStages = false;
  HESTIA_HOST_DEVICE bool active() const { return counted[token] != 0; }
  HESTIA_HOST_DEVICE void stage(std::int64_t /*expert*/) const {}
  HESTIA_HOST_DEVICE std::int64_t num_choices() const { return 0; }
  HESTIA_HOST_DEVICE double choice(std::int64_t /*k*/) const { return 0.0; }
  HESTIA_HOST_DEVICE Real factor(const RowSums& /*sums*/) const { return Real(1); }
  /// Counted, with a token of the same sequence `lag` before it.
  HESTIA_HOST_DEVICE bool has_earlier(std::int64_t lag) const { return counted[token] != 0 && token - lag >= begin; }
  /// A counted token of the same sequence stands `lag` after it.
  HESTIA_HOST_DEVICE bool has_later(std::int64_t lag) const { return token + lag < end && counted[token + lag] != 0; }
};

template <class Real>
HESTIA_HOST_DEVICE inline BoundRow<Real> bound_row(const RowLayout& layout, const SoftmaxRows<Real>& rows,
                                                   std::int64_t layer, std::int64_t token) {
  BoundRow<Real> bound;
  bound.rows = rows;
  bound.row = layer * layout.num_tokens + token;
  bound.layer = layer;
  bound.token = token;
  bound.num_experts = layout.num_experts;
  bound.begin = layout.run_begin[bound.token];
  bound.end = layout.run_end[bound.token];
  bound.counted = layout.counted;
  return bound;
}

template <class Real, class Term>
struct Bound;

template <class Real>
struct Bound<Real, DivergenceTerm<Real>> : BoundRow<Real> {
  const DivergenceTerm<Real>& term;
  HESTIA_HOST_DEVICE Real weighted(std::int64_t j, Real log_p, RowSums& sums) const {
    // Finite logarithms even where p underflows to 0, so 0 log 0 comes out as 0.
    const Real w = this->p[j] * (log_p - log_probability(term.reference, this->row, this->num_experts, j));
    sums.value += static_cast<double>(w);
    return w;
  }
};

template <class Real>
struct Bound<Real, EntropyTerm> : BoundRow<Real> {
  const EntropyTerm& term;
  HESTIA_HOST_DEVICE Real weighted(std::int64_t j, Real log_p, RowSums& sums) const {
    const Real w = -this->p[j] * log_p;
    sums.value += static_cast<double>(w);
    return w;
  }
};

template <class Real>
struct Bound<Real, SymmetricKlTerm> : BoundRow<Real> {
  const SymmetricKlTerm& term;
  HESTIA_HOST_DEVICE bool active() const {
    for (int i = 0; i < term.num_lags; ++i) {
      if (this->has_earlier(term.lags[i]) || this->has_later(term.lags[i])) {
        return true;
      }
    }
    return false;
  }
  HESTIA_HOST_DEVICE Real weighted(std::int64_t j, Real log_p, RowSums& sums) const {
    const Real p_j = this->p[j];
    Real w = Real(0);
    Real value = Real(0);
    for (int i = 0; i < term.num_lags; ++i) {
      const std::int64_t lag = term.lags[i];
      if (this->has_earlier(lag)) {
        Real difference = Real(0);
        const Real log_ratio = partner(this->row - lag, j, log_p, difference);
        w += p_j * log_ratio + difference;
        value += difference * log_ratio;  // never negative: KL(p||q) + KL(q||p) without cancelling
      }
      if (this->has_later(lag)) {
        Real difference = Real(0);
        const Real log_ratio = partner(this->row + lag, j, log_p, difference);
        w += p_j * log_ratio + difference;
      }
    }
    sums.value += term.share * static_cast<double>(value);
    return static_cast<Real>(term.share) * w;
  }

 private:
  HESTIA_HOST_DEVICE Real partner(std::int64_t other, std::int64_t j, Real log_p, Real& difference) const {
    difference = this->p[j] - probability(this->rows, other, this->num_experts, j);
    return log_p - log_probability(this->rows, other, this->num_experts, j);
  }
};

template <class Real>
struct Bound<Real, NeighbourTerm> : BoundRow<Real> {
  const NeighbourTerm& term;
  HESTIA_HOST_DEVICE bool active() const { return this->has_earlier(1) || this->has_later(1); }
  HESTIA_HOST_DEVICE Real weighted(std::int64_t j, Real /*log_p*/, RowSums& sums) const {
    const Real p_j = this->p[j];
    Real v = Real(0);
    if (this->has_earlier(1)) {
      const Real q = probability(this->rows, this->row - 1, this->num_experts, j);
      // 1 - <p, q> as sum_j p_j (1 - q_j): the 1 is spread over the experts.
      sums.value += static_cast<double>(term.squared ? (p_j - q) * (p_j - q) : p_j * (Real(1) - q));
      v += slope(p_j, q);
    }
    if (this->has_later(1)) {
      v += slope(p_j, probability(this->rows, this->row + 1, this->num_experts, j));
    }
    return p_j * v;
  }

 private:
  HESTIA_HOST_DEVICE Real slope(Real p_j, Real q) const { return term.squared ? Real(2) * (p_j - q) : -q; }
};

template <class Real>
struct Bound<Real, ReuseTerm<Real>> : BoundRow<Real> {
  const ReuseTerm<Real>& term;
  HESTIA_HOST_DEVICE bool active() const { return this->has_earlier(1); }
  HESTIA_HOST_DEVICE Real weighted(std::int64_t j, Real /*log_p*/, RowSums& /*sums*/) const {
    int uses = 0;
    for (std::int64_t k = 0; k < term.top_k; ++k) {
      uses += previous(k) == j ? 1 : 0;
    }
    if (uses == 0) {
      return Real(0);
    }
    const Real weight =
        term.weight == nullptr ? Real(1) : term.weight[this->layer * term.num_runs + term.run_of_token[this->token]];
    return this->p[j] * weight * static_cast<Real>(uses) / static_cast<Real>(term.top_k);
  }
  HESTIA_HOST_DEVICE std::int64_t num_choices() const { return term.top_k; }
  HESTIA_HOST_DEVICE double choice(std::int64_t k) const {
    const std::int64_t expert = previous(k);
    return expert < 0 || expert >= this->num_experts
               ? 0.0
               : static_cast<double>(this->p[expert]) / static_cast<double>(term.top_k);
  }

 private:
  HESTIA_HOST_DEVICE std::int64_t previous(std::int64_t k) const {
    return term.selected[(this->row - 1) * term.top_k + k];
  }
};

template <class Real>
struct Bound<Real, PullTerm<Real>> : BoundRow<Real> {
  const PullTerm<Real>& term;
  HESTIA_HOST_DEVICE bool active() const {
    const bool wanted = term.every_token ? this->end > this->begin : this->counted[this->token] != 0;
    return wanted && vector() >= 0;
  }
  HESTIA_HOST_DEVICE Real weighted(std::int64_t j, Real /*log_p*/, RowSums& sums) const {
    const Real p_j = this->p[j];
    const Real w = p_j * term.v[(this->layer * term.num_vectors + vector()) * this->num_experts + j];
    sums.value += static_cast<double>(w);
    return term.idle_epsilon > 0.0 ? w / ((Real(1) - p_j) + static_cast<Real>(term.idle_epsilon)) : w;
  }

 private:
  HESTIA_HOST_DEVICE std::int64_t vector() const {
    if (term.vector_of_token != nullptr) {
      return term.vector_of_token[this->token];
    }
    return term.num_vectors == 1 ? 0 : this->token;
  }
};

template <class Real>
struct Bound<Real, SoftCacheTerm<Real>> : BoundRow<Real> {
  const SoftCacheTerm<Real>& term;
  HESTIA_HOST_DEVICE Real weighted(std::int64_t j, Real /*log_p*/, RowSums& /*sums*/) const {
    return this->p[j] * missing(j);
  }
  HESTIA_HOST_DEVICE std::int64_t num_choices() const { return term.top_k; }
  HESTIA_HOST_DEVICE double choice(std::int64_t k) const {
    const std::int64_t expert = term.selected[this->row * term.top_k + k];
    return expert < 0 || expert >= this->num_experts ? 0.0 : static_cast<double>(missing(expert));
  }

 private:
  HESTIA_HOST_DEVICE Real missing(std::int64_t expert) const {
    const Real cached = term.cache[this->row * this->num_experts + expert];
    return Real(1) - (term.clamp && cached > Real(1) ? Real(1) : cached);
  }
};

/// The margin against every other expert; `extra` holds the base probabilities. (i above j) pushes p_j up, (j above i)
/// pulls it down: counting both at j spares a second pass.
template <class Real>
struct Bound<Real, RankHingeTerm<Real>> : BoundRow<Real> {
  const RankHingeTerm<Real>& term;
  static constexpr bool kStages = true;
  HESTIA_HOST_DEVICE void stage(std::int64_t j) const {
    this->extra[j] = probability(term.base, this->row, this->num_experts, j);
  }
  HESTIA_HOST_DEVICE Real weighted(std::int64_t j, Real /*log_p*/, RowSums& sums) const {
    const Real margin = static_cast<Real>(term.margin);
    const Real p_j = this->p[j];
    const Real base_j = this->extra[j];
    Real hinge = Real(0);
    int slope = 0;
    int pairs = 0;
    for (std::int64_t i = 0; i < this->num_experts; ++i) {
      const Real lead = this->p[i] - p_j;
      const Real base_i = this->extra[i];
      const Real push = margin - lead;
      pairs += base_i > base_j ? 1 : 0;
      if (base_i > base_j && push > Real(0)) {
        hinge += push;
        ++slope;
      }
      slope -= base_j > base_i && margin + lead > Real(0) ? 1 : 0;
    }
    sums.value += static_cast<double>(hinge);
    sums.pairs += pairs;
    return p_j * static_cast<Real>(slope);
  }
  HESTIA_HOST_DEVICE Real factor(const RowSums& sums) const {
    return term.normalise ? static_cast<Real>(1.0 / (sums.pairs > 1.0 ? sums.pairs : 1.0)) : Real(1);
  }
};

/// Every term in both types, for explicit instantiation: X(Real, Term).
#define HESTIA_FOR_EACH_ROW_TERM_OF(X, Real) \
  X(Real, DivergenceTerm<Real>)              \
  X(Real, EntropyTerm)                       \
  X(Real, SymmetricKlTerm)                   \
  X(Real, NeighbourTerm)                     \
  X(Real, ReuseTerm<Real>)                   \
  X(Real, PullTerm<Real>)                    \
  X(Real, SoftCacheTerm<Real>)               \
  X(Real, RankHingeTerm<Real>)
#define HESTIA_FOR_EACH_ROW_TERM(X)     \
  HESTIA_FOR_EACH_ROW_TERM_OF(X, float) \
  HESTIA_FOR_EACH_ROW_TERM_OF(X, double)

}  // namespace hestia
