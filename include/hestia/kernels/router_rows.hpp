#pragma once

// Letters: L layers, T tokens (flat over packed rows), E experts, K experts per token, W windows, R sequences (runs).
// A row is one token of one layer: row = layer * T + token.

#include <cstdint>

#include "hestia/routing/cache_policy.hpp"

namespace hestia {

/// Where rows stand. Arrays over tokens [T], on the device of the rows.
struct RowLayout {
  std::int64_t num_layers = 0;
  std::int64_t num_tokens = 0;
  std::int64_t num_experts = 0;
  const std::int64_t* run_begin = nullptr;  ///< First token of the token's sequence; 0 for padding.
  const std::int64_t* run_end = nullptr;    ///< One past its last token; 0 for padding.
  const std::uint8_t* counted = nullptr;    ///< 1 where the token counts; 0 for padding.
};

/// Softmax of rows of logits: log p_j = (z_j - max) - log_sum keeps its digits for logits of any size.
template <class Real>
struct SoftmaxRows {
  const Real* logits = nullptr;         ///< [L*T, E]
  const Real* max = nullptr;            ///< [L*T], the largest logit
  const Real* log_sum = nullptr;        ///< [L*T], log sum_j exp(z_j - max)
  const Real* probabilities = nullptr;  ///< [L*T, E] where they are worth keeping (CPU); null: from the three above
};

/// What a term over rows leaves behind.
template <class Real>
struct RowResult {
  double* value = nullptr;   ///< [L*T], overwritten, 0 for rows that add nothing; null: not wanted
  Real* gradient = nullptr;  ///< [L*T, E] += scale * d(sum of all values)/d logits; null: not wanted
  double scale = 1.0;
};

/// KL(p || reference) of counted rows, in nats; the reference is constant. Gradient of a row: p_j (v_j - sum_i p_i
/// v_i) with v = log p - log reference.
template <class Real>
struct DivergenceTerm {
  SoftmaxRows<Real> reference;
};

/// Entropy of counted rows, in nats: as above with v = -log p.
struct EntropyTerm {};

/// share * sum over lags d of KL(p_t || p_{t-d}) + KL(p_{t-d} || p_t), over counted t whose t-d is of the same
/// sequence. A row's value holds its own pairs; its gradient gathers those in which it is t and those in which it is
/// t-d: p_j log(p_j/q_j) + p_j - q_j - p_j KL(p || q) for every partner q.
struct SymmetricKlTerm {
  static constexpr int kMaxLags = 16;
  std::int64_t lags[kMaxLags] = {};
  int num_lags = 0;
  double share = 0.5;
};

/// Of pairs (t, t-1), t counted: 1 - <p_t, p_{t-1}>, or ||p_t - p_{t-1}||^2 when `squared`. Gradient as above.
struct NeighbourTerm {
  bool squared = false;
};

/// Of pairs (t, t-1), t counted: the mean of p_t over the experts that t-1 selected (ReMoE's m_t). Gradient: that of
/// weight[layer, run] * m_t, constant weights [L, R]; null weights mean 1.
template <class Real>
struct ReuseTerm {
  const std::int64_t* selected = nullptr;  ///< [L*T, K]; an expert outside [0, E) is ignored
  std::int64_t top_k = 0;
  const std::int64_t* run_of_token = nullptr;  ///< [T]
  std::int64_t num_runs = 0;                   ///< R
  const Real* weight = nullptr;                ///< [L, R]
};

/// sum_j p_j v_j with v constant: the gradient of any function whose derivative by p is known.
template <class Real>
struct PullTerm {
  const Real* v = nullptr;  ///< [L, V, E]: row `vector_of_token[t]` of the layer for token t
  const std::int64_t* vector_of_token =
      nullptr;                   ///< [T], negative: none; null: the only vector (V = 1), or one for each token (V = T)
  std::int64_t num_vectors = 0;  ///< V
  /// Above 0: v_j / (1 - p_j + idle_epsilon) in place of v_j in the gradient, which is what a product of such factors
  /// leaves.
  double idle_epsilon = 0.0;
  bool every_token = false;  ///< All tokens but padding, not only counted ones.
};

/// MELINOE's sum_i r_i (1 - c_i) of counted rows, with its straight-through gradient p_j ((1 - c_j) - sum_i p_i (1 -
/// c_i)); c is min(cache, 1) with `clamp`.
template <class Real>
struct SoftCacheTerm {
  const Real* cache = nullptr;             ///< [L*T, E], soft_cache.hpp
  const std::int64_t* selected = nullptr;  ///< [L*T, K]; an expert outside [0, E) is ignored
  std::int64_t top_k = 0;
  bool clamp = false;
};

/// MELINOE's rank-matching hinge (arXiv 2602.11192) of counted rows: sum over i,j with base_i > base_j of
/// max(0, margin - p_i + p_j). All pairs are visited and memory stays O(E); equal base probabilities are no pair,
/// exactly. `normalise`: divided by the row's number of pairs (no pair: 0).
template <class Real>
struct RankHingeTerm {
  SoftmaxRows<Real> base;
  double margin = 0.1;
  bool normalise = false;
};

/// max and log_sum of all `num_rows` rows of `logits` [num_rows, E] on the GPU: device pointers, asynchronous on
/// `stream` (a cudaStream_t) of the current device, one warp per row. Throws RunError with the CUDA error when the
/// launch fails, or when Hestia was built without its CUDA kernels; so do all functions below that end in _cuda. (On
/// the CPU, where probabilities are kept, max is their logits' and log_sum is -log of the largest.)
template <class Real>
void softmax_rows_cuda(const Real* logits, std::int64_t num_experts, std::int64_t num_rows, Real* max, Real* log_sum,
                       void* stream);

/// Values and gradient of a term (any of the structs above) over rows [first_row, last_row). Rows outside the range are
/// read, where a term looks at neighbours, and not written. CPU, synchronous, one thread.
template <class Real, class Term>
void row_term_cpu(const RowLayout& layout, const SoftmaxRows<Real>& rows, const Term& term,
                  const RowResult<Real>& result, std::int64_t first_row, std::int64_t last_row);
/// The same over all rows on the GPU; one warp per row, no atomics, so results repeat.
template <class Real, class Term>
void row_term_cuda(const RowLayout& layout, const SoftmaxRows<Real>& rows, const Term& term,
                   const RowResult<Real>& result, void* stream);

/// What is summed over the counted tokens of a window.
enum class WindowQuantity : std::int32_t {
  kProbability,  ///< p
  kLogIdle       ///< log(1 - p + epsilon), through log1p: in float32 the direct form would round a small p away
};

/// sums[layer, w, e] = sum of the quantity over counted tokens of window w, that is of [begins[w], ends[w]).
/// sums: [L, W, E], overwritten. CPU, synchronous, one thread, layers [first_layer, last_layer).
template <class Real>
void window_sums_cpu(const RowLayout& layout, const SoftmaxRows<Real>& rows, WindowQuantity quantity, double epsilon,
                     const std::int64_t* begins, const std::int64_t* ends, std::int64_t num_windows, Real* sums,
                     std::int64_t first_layer, std::int64_t last_layer);
/// The same over all layers on the GPU; one thread per layer, window and expert.
template <class Real>
void window_sums_cuda(const RowLayout& layout, const SoftmaxRows<Real>& rows, WindowQuantity quantity, double epsilon,
                      const std::int64_t* begins, const std::int64_t* ends, std::int64_t num_windows, Real* sums,
                      void* stream);

/// sums[i, s] = sum of values[i, begins[s]..ends[s]): values [outer, length], sums [outer, num_segments], overwritten.
/// CPU, synchronous, one thread.
void segment_sums_cpu(const double* values, std::int64_t outer, std::int64_t length, const std::int64_t* begins,
                      const std::int64_t* ends, std::int64_t num_segments, double* sums);
/// The same on the GPU; one block per sum, in an order that repeats.
void segment_sums_cuda(const double* values, std::int64_t outer, std::int64_t length, const std::int64_t* begins,
                       const std::int64_t* ends, std::int64_t num_segments, double* sums, void* stream);

/// Turns a soft cache into what its use by counted rows sends back, in place: -1 where a counted token selects an
/// expert and (with `clamp`) the cache holds at most 1 of it, else 0. selected: [L*T, K], an expert outside [0, E) is
/// ignored; cache: [L*T, E], rows that do not count become 0. CPU, synchronous, one thread.
template <class Real>
void soft_cache_upstream_cpu(const RowLayout& layout, const std::int64_t* selected, std::int64_t top_k, bool clamp,
                             Real* cache);
/// The same on the GPU.
template <class Real>
void soft_cache_upstream_cuda(const RowLayout& layout, const std::int64_t* selected, std::int64_t top_k, bool clamp,
                              Real* cache, void* stream);

}  // namespace hestia
