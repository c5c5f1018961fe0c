#pragma once

#include <functional>

#include "hestia/routing_losses/routing_losses.hpp"
#include "routing_rows.hpp"

namespace hestia {

/// Throws std::invalid_argument, with the name of the loss, unless shapes, dtypes and devices of `routing` agree with
/// each other and with `layout`, what the loss needs of base routers included. On the CPU also unless the selected
/// experts of all tokens but padding are experts.
void check_routing(const RoutingLoss& loss, const RoutingTensors& routing, const LayoutTensors& layout);

/// Zeros [L] that depend on the logits with zero gradient, whatever padding holds: the sum of a term with nothing to
/// count.
[[nodiscard]] torch::Tensor zero_sum(const torch::Tensor& logits_LTE);

/// Sums [L] of (1/|lags|) * SymKL(p_t, p_{t-lag}) over counted t and the lags for which t-lag is a token of the same
/// sequence, in nats; the gradient of both sides, times `scale`, is added to gradient_LTE unless undefined.
[[nodiscard]] torch::Tensor symmetric_kl(RoutingRows& rows, const std::vector<std::int64_t>& lags, double scale,
                                         const torch::Tensor& gradient_LTE);

// Plain loops for reference_sum, in float64. Each adds `term` up per layer and gives zero_sum where there is nothing.

/// Over counted tokens: term(layer, token).
[[nodiscard]] torch::Tensor sum_over_counted(const RoutingTensors& routing, const LayoutTensors& layout,
                                             const std::function<torch::Tensor(std::int64_t, std::int64_t)>& term);
/// Over counted tokens with a token of their sequence before them: term(layer, token, first token of the sequence).
[[nodiscard]] torch::Tensor sum_over_pairs(
    const RoutingTensors& routing, const LayoutTensors& layout,
    const std::function<torch::Tensor(std::int64_t, std::int64_t, std::int64_t)>& term);
/// Over windows of counted tokens: term(layer, tokens).
[[nodiscard]] torch::Tensor sum_over_windows(
    const RoutingTensors& routing, const LayoutTensors& layout, std::int64_t size,
    const std::function<torch::Tensor(std::int64_t, const std::vector<std::int64_t>&)>& term);
/// Over sequences: term(layer, sequence).
[[nodiscard]] torch::Tensor sum_over_runs(const RoutingTensors& routing, const LayoutTensors& layout,
                                          const std::function<torch::Tensor(std::int64_t, const SequenceRun&)>& term);

/// logits[layer][token] as a vector [E] in float64.
[[nodiscard]] torch::Tensor logit_row(const torch::Tensor& logits_LTE, std::int64_t layer, std::int64_t token);
/// Its softmax and the softmax's logarithm.
[[nodiscard]] torch::Tensor probability_row(const torch::Tensor& logits_LTE, std::int64_t layer, std::int64_t token);
[[nodiscard]] torch::Tensor log_probability_row(const torch::Tensor& logits_LTE, std::int64_t layer,
                                                std::int64_t token);
/// KL(p || q) of two rows of log probabilities [E], in nats.
[[nodiscard]] torch::Tensor kl_divergence(const torch::Tensor& log_p_E, const torch::Tensor& log_q_E);

/// True where the token counts (padding is never asked for).
[[nodiscard]] inline bool is_counted(const LayoutTensors& layout, std::int64_t token) {
  return layout.layout().counted[static_cast<std::size_t>(token)] != 0;
}

[[nodiscard]] std::shared_ptr<const RoutingLoss> make_cache_simulation(const CacheSimulationOptions& options);
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_rank_matching(const RankMatchingOptions& options);
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_reuse();
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_trust();
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_smooth();
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_lag(const LagOptions& options);
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_working_set(const WorkingSetOptions& options);
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_router_entropy();
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_temporal_dot();
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_gate_consistency();
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_chunk_union(const ChunkUnionOptions& options);
[[nodiscard]] std::shared_ptr<const RoutingLoss> make_load_balance();

}  // namespace hestia
