#pragma once

// Letters: L MoE layers, T tokens (flat over packed rows), E experts, K experts per token.

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include <torch/types.h>

#include "hestia/core/recipe.hpp"
#include "hestia/routing/layout.hpp"

namespace hestia {

/// Stacked routing of one micro-batch. All on one device; float32 or float64.
struct RoutingTensors {
  torch::Tensor logits_LTE;    ///< z; carries gradient.
  torch::Tensor selected_LTK;  ///< int64, the experts served; no gradient.
  /// z of the frozen base router on the hidden states of this forward, no gradient; undefined when there is none.
  torch::Tensor reference_logits_LTE;
  /// z of the base router in the base model's own forward, no gradient; undefined when there was none.
  torch::Tensor base_forward_logits_LTE{};
};

/// Non-overlapping windows of one size over the counted tokens of each sequence, in order: the first begins at the
/// sequence's first counted token, the last may be short.
struct WindowTensors {
  torch::Tensor window_of_token;  ///< int64 [T], the window (0..windows-1) of each counted token; -1 for all others.
  torch::Tensor begins;           ///< int64 [windows], first token of each.
  torch::Tensor ends;             ///< int64 [windows], one past its last counted token.
  torch::Tensor lengths;          ///< int64 [windows], counted tokens in each; adds up to counted.
};

/// A SequenceLayout as index tensors, made once per micro-batch and shared by all losses.
class LayoutTensors {
 public:
  /// Throws std::invalid_argument when the layout is inconsistent (see sequence_runs).
  LayoutTensors(const SequenceLayout& layout, torch::Device device);
  [[nodiscard]] const SequenceLayout& layout() const noexcept { return layout_; }
  [[nodiscard]] const std::vector<SequenceRun>& runs() const noexcept { return runs_; }
  [[nodiscard]] std::int64_t num_tokens() const noexcept { return layout_.num_tokens(); }
  /// Counted tokens that are not padding.
  [[nodiscard]] std::int64_t num_counted() const noexcept { return num_counted_; }
  /// Counted t whose t-1 is a real token of the same sequence.
  [[nodiscard]] std::int64_t num_pairs() const noexcept { return num_pairs_; }
  [[nodiscard]] torch::Device device() const noexcept { return device_; }
  /// int64, indices of all tokens that are not padding.
  [[nodiscard]] const torch::Tensor& token_indices() const noexcept { return token_indices_; }
  /// int64, indices of counted tokens.
  [[nodiscard]] const torch::Tensor& counted_indices() const noexcept { return counted_indices_; }
  /// int64 [runs], pairs of each run.
  [[nodiscard]] const torch::Tensor& pairs_per_run() const noexcept { return pairs_per_run_; }
  /// int64 [runs], first token of each run.
  [[nodiscard]] const torch::Tensor& run_begins() const noexcept { return run_begins_; }
  /// int64 [runs], one past the last token of each run.
  [[nodiscard]] const torch::Tensor& run_ends() const noexcept { return run_ends_; }
  /// int64 [T], first token of each token's run; 0 for padding.
  [[nodiscard]] const torch::Tensor& token_begins() const noexcept { return token_begins_; }
  /// int64 [T], one past the last token of each token's run; 0 for padding.
  [[nodiscard]] const torch::Tensor& token_ends() const noexcept { return token_ends_; }
  /// int64 [T], the run (0..runs-1) of each token; -1 for padding.
  [[nodiscard]] const torch::Tensor& token_runs() const noexcept { return token_runs_; }
  /// uint8 [T], 1 for counted tokens; 0 for padding, whatever the layout says.
  [[nodiscard]] const torch::Tensor& counted() const noexcept { return counted_; }
  /// Windows of `size` counted tokens, made when first asked for and kept. Throws std::invalid_argument when size is
  /// below 1.
  [[nodiscard]] const WindowTensors& windows(std::int64_t size) const;

 private:
  SequenceLayout layout_;
  std::vector<SequenceRun> runs_;
  torch::Device device_;
  std::int64_t num_counted_ = 0;
  std::int64_t num_pairs_ = 0;
  torch::Tensor token_indices_;
  torch::Tensor counted_indices_;
  torch::Tensor pairs_per_run_;
  torch::Tensor run_begins_;
  torch::Tensor run_ends_;
  torch::Tensor token_begins_;
  torch::Tensor token_ends_;
  torch::Tensor token_runs_;
  torch::Tensor counted_;
  std::unique_ptr<std::mutex> windows_mutex_;
  mutable std::map<std::int64_t, WindowTensors> windows_;
};

/// The routing of a micro-batch prepared for the kernels (routing_losses/routing_rows.hpp).
class RoutingRows;

/// One routing objective. A term's value over an optimiser step is (sum of `sum` over micro-batches and ranks) / (sum
/// of `count`), per layer, then the mean over layers; total count 0 gives 0. Stateless and thread-safe.
class RoutingLoss {
 public:
  virtual ~RoutingLoss() = default;
  /// Registry name, for example "cache_simulation".
  [[nodiscard]] virtual std::string_view name() const = 0;
  /// True when the term reads reference_logits_LTE.
  [[nodiscard]] virtual bool needs_reference() const { return false; }
  /// True when the term reads base_forward_logits_LTE, which costs a second forward.
  [[nodiscard]] virtual bool needs_base_forward() const { return false; }
  /// Divisor of this micro-batch: depends on the layout alone.
  [[nodiscard]] virtual double count(const LayoutTensors& layout) const = 0;
  /// Per-layer sums [L], differentiable in logits_LTE (first order); zeros, with zero gradient, when count is 0.
  /// Throws std::invalid_argument when the tensors do not fit the layout or each other.
  [[nodiscard]] torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const;
  /// The kernel behind `sum` and `combine`, for a count above 0: returns the sums [L] and adds scale * d(sum over
  /// layers)/d logits, in closed form, to gradient_LTE unless that is undefined. Not recorded by autograd.
  [[nodiscard]] virtual torch::Tensor accumulate(RoutingRows& rows, double scale,
                                                 const torch::Tensor& gradient_LTE) const = 0;
  /// The sums by plain loops over tokens, the simplest correct version: the reference of tests.
  [[nodiscard]] virtual torch::Tensor reference_sum(const RoutingTensors& routing,
                                                    const LayoutTensors& layout) const = 0;
};

/// A loss and what its sums are multiplied by in a total.
struct LossShare {
  const RoutingLoss* loss = nullptr;  ///< Borrowed.
  double scale = 0.0;                 ///< 0: only the value is wanted.
};
/// Result of `combine`.
struct CombinedLoss {
  torch::Tensor total;                ///< Scalar, sum of scale * (sum over layers), differentiable in logits_LTE.
  std::vector<torch::Tensor> sums_L;  ///< Per-layer sums [L] of each loss, without gradient.
};
/// Several losses over one micro-batch with one gradient: what they share is computed once and every term adds into the
/// same buffer, so beside that buffer memory holds at most one [L, T, E] tensor (the soft cache) and some values per
/// token. Throws as RoutingLoss::sum.
[[nodiscard]] CombinedLoss combine(const std::vector<LossShare>& shares, const RoutingTensors& routing,
                                   const LayoutTensors& layout);

/// MELINOE's cache simulation (arXiv 2602.11192), per layer and sequence
///   sum = sum_t sum_i r_{t,i} * (1 - c_{t,i}),   c_t the soft cache before token t (kernels/soft_cache.hpp),
/// over counted t; count: counted tokens. Gradient: straight-through, r -> r + p - stopgrad(p), with the recursion on
/// the hard r: dsum/dz_j = -p_j * (c_j - sum_i p_i c_i). The mean lies in [K - C, K].
struct CacheSimulationOptions {
  double weight = 0.0;
  std::int64_t slots = 0;  ///< C; 0: E/4, at least 1.
  double gamma = 0.9;
  std::string start = "uniform";         ///< uniform | empty
  bool clamp_at_one = false;             ///< min(c, 1) where c enters the loss; the recursion stays unclamped.
  bool propagate_through_cache = false;  ///< The recursion runs on the surrogate too; prompt tokens get gradient.
  FieldList fields();
};
/// MELINOE's rank matching against the base router's probabilities p^b:
///   sum = sum_t sum_{i,j: p^b_i > p^b_j} max(0, margin - (p_i - p_j))
/// over counted t; count: counted tokens. Pairs with equal p^b are left out.
struct RankMatchingOptions {
  double weight = 0.0;
  double margin = 0.1;
  bool normalise_pairs = false;  ///< Divides a token's sum by its number of pairs.
  /// p^b is the base router's softmax on the hidden states of this forward (current_hidden), or in a forward of the
  /// untouched model (base_forward).
  std::string reference = "current_hidden";
  FieldList fields();
};
/// ReMoE's reuse (arXiv 2605.27081), per layer and sequence over its pairs (t, t-1):
///   m_t = (1/K) * sum_{k in stopgrad(E_{t-1})} p_{t,k};  sum = pairs * -log(mean_t m_t + 1e-8);  count: pairs.
/// The mean is at least log K (up to the 1e-8).
struct ReuseOptions {
  double weight = 0.0;
  std::int64_t ramp_steps = 0;  ///< The weight grows linearly from 0 over this many steps.
  FieldList fields();
};
/// ReMoE's trust: sum = sum_t KL(p_t || stopgrad(p^ref_t)) over counted t and all E, in nats; count: counted tokens.
struct TrustOptions {
  double weight = 0.0;
  FieldList fields();
};
/// ReMoE's smoothness over pairs (t, t-1), in nats:
///   sum = sum_t SymKL(p_t, p_{t-1}),   SymKL(P, Q) = (KL(P||Q) + KL(Q||P)) / 2;   count: pairs.
/// Both sides get gradient, prompt tokens at t-1 included.
struct SmoothOptions {
  double weight = 0.0;
  std::int64_t ramp_steps = 0;  ///< The weight grows linearly from 0 over this many steps.
  FieldList fields();
};
/// ReMoE's smoothness over several lags D, for counted t with a token before them, in nats:
///   sum = sum_t (1/|D|) * sum_{d in D, t-d in the sequence} SymKL(p_t, p_{t-d});   count: pairs (t, t-1).
/// A lag that reaches before the sequence adds 0 and still counts in |D|. Both sides get gradient.
struct LagOptions {
  double weight = 0.0;
  std::int64_t ramp_steps = 0;                     ///< The weight grows linearly from 0 over this many steps.
  std::vector<std::int64_t> lags{1, 2, 4, 8, 16};  ///< D: at least 1 each, strictly increasing.
  FieldList fields();
};
/// ReMoE's working set, over windows b of counted tokens (LayoutTensors::windows), in nats:
///   sum = sum_b |b| * H(mean of p over b);   count: counted tokens.
/// Between 0 and log E, and at least router_entropy.
struct WorkingSetOptions {
  double weight = 0.0;
  std::int64_t ramp_steps = 0;  ///< The weight grows linearly from 0 over this many steps.
  std::int64_t window = 16;     ///< Counted tokens per window.
  FieldList fields();
};
/// SEER-MoE's entropy (arXiv 2404.05089): sum = sum_t H(p_t) over counted t, in nats; count: counted tokens.
struct RouterEntropyOptions {
  double weight = 0.0;
  FieldList fields();
};
/// Agreement of neighbours (arXiv 2608.18261): sum = sum_t (1 - <p_t, p_{t-1}>) over pairs; count: pairs. Both sides
/// get gradient.
struct TemporalDotOptions {
  double weight = 0.0;
  FieldList fields();
};
/// StickyMoE's gate consistency (arXiv 2607.08780): sum = sum_t ||p_t - p_{t-1}||^2 over pairs; count: pairs. Both
/// sides get gradient.
struct GateConsistencyOptions {
  double weight = 0.0;
  FieldList fields();
};
/// BlockFFN's chunk-level sparsity (arXiv 2507.08771), over chunks b of counted tokens (LayoutTensors::windows):
///   sum = sum_b |b| * (1 - mean_e exp(sum_{t in b} log(1 - p_{t,e} + 1e-5)));   count: counted tokens.
/// The share of experts that a chunk uses if each token used expert e with probability p_{t,e}, independently.
struct ChunkUnionOptions {
  double weight = 0.0;
  std::int64_t chunk = 64;  ///< Counted tokens per chunk.
  FieldList fields();
};
/// Load balance of Switch Transformers (arXiv 2101.03961): (E/K) * sum_e f_e P_e with f_e the mean of r (detached) and
/// P_e the mean of p over all counted tokens of the micro-batch, across sequences; 1 when balanced. sum = value *
/// count, count: counted tokens. The one term that splitting a batch changes.
struct LoadBalanceOptions {
  double weight = 0.0;
  FieldList fields();
};

/// The `losses` section of a recipe: one subsection per registered objective, under its registry name.
struct RoutingLossOptions {
  CacheSimulationOptions cache_simulation;
  RankMatchingOptions rank_matching;
  ReuseOptions reuse;
  TrustOptions trust;
  SmoothOptions smooth;
  LagOptions lag;
  WorkingSetOptions working_set;
  RouterEntropyOptions router_entropy;
  TemporalDotOptions temporal_dot;
  GateConsistencyOptions gate_consistency;
  ChunkUnionOptions chunk_union;
  LoadBalanceOptions load_balance;
  FieldList fields();
  /// The weight of every objective becomes `weight`; other options stay.
  void set_all_weights(double weight);
  /// Whether any objective has a weight above 0.
  [[nodiscard]] bool any_weight();
};

/// A loss with its weight over time. Weight 0: the value is reported, nothing is trained on it.
struct WeightedLoss {
  std::shared_ptr<const RoutingLoss> loss;
  double weight = 0.0;
  std::int64_t ramp_steps = 0;
  /// Weight at optimiser step `step` (first step: 1): weight * min(1, step / ramp_steps).
  [[nodiscard]] double weight_at(std::int64_t step) const;
};

/// Names of all registered objectives, in the order of the recipe section.
[[nodiscard]] std::vector<std::string> routing_loss_names();
/// Builds every registered objective for a model of E experts and K per token, weight 0 included.
/// Throws UsageError when an option does not fit the model (slots above E), is out of range or no choice of its field.
[[nodiscard]] std::vector<WeightedLoss> make_routing_losses(const RoutingLossOptions& options, std::int64_t num_experts,
                                                            std::int64_t top_k);

}  // namespace hestia
