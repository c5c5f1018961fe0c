#pragma once

#include <string_view>

#include "hestia/routing_losses/routing_losses.hpp"

namespace hestia {

/// Throws std::invalid_argument, with the name of the loss, unless shapes, dtypes and devices of `routing` agree with
/// each other and with `layout`.
void check_routing(std::string_view loss, const RoutingTensors& routing, const LayoutTensors& layout,
                   bool needs_reference);

/// Zeros [L] that depend on the logits with zero gradient, whatever padding holds: the sum of a term with nothing to
/// count.
[[nodiscard]] torch::Tensor zero_sum(const torch::Tensor& logits_LTE);

/// True when a gradient with respect to the logits can be asked for.
[[nodiscard]] bool wants_gradient(const torch::Tensor& logits_LTE);

/// Sums [L] whose gradient is known: backward gives grad_output[l] * gradient[l, t, e]. First order only.
/// gradient_LTE may be undefined when wants_gradient(logits_LTE) is false.
[[nodiscard]] torch::Tensor attach_gradient(const torch::Tensor& logits_LTE, const torch::Tensor& sum_L,
                                            const torch::Tensor& gradient_LTE);

/// Gradient rows of counted tokens [L, counted, E] put back among all tokens, zero elsewhere.
[[nodiscard]] torch::Tensor scatter_counted(const torch::Tensor& rows_LNE, const LayoutTensors& layout);

/// Sums [L] of (1/|lags|) * SymKL(p_t, p_{t-lag}) over counted t and the lags for which t-lag is a token of the same
/// sequence, p = softmax(logits), in nats. The gradient, of both sides, is in closed form.
[[nodiscard]] torch::Tensor symmetric_kl_sum(const torch::Tensor& logits_LTE, const LayoutTensors& layout,
                                             const std::vector<std::int64_t>& lags);

/// Sums over each window of rows of counted tokens: [L, counted, E] becomes [L, windows, E].
[[nodiscard]] torch::Tensor window_sums(const torch::Tensor& rows_LNE, const WindowTensors& windows);

/// KL(softmax(a) || softmax(b)) of two vectors of logits [E] by a plain loop, in nats.
[[nodiscard]] torch::Tensor kl_divergence(const torch::Tensor& logits_a_E, const torch::Tensor& logits_b_E);

/// logits[layer][token] as a vector [E] in float64: what the plain-loop references work on.
[[nodiscard]] torch::Tensor logit_row(const torch::Tensor& logits_LTE, std::int64_t layer, std::int64_t token);

/// Stacks one float64 scalar per layer into sums [L] of the logits' type.
[[nodiscard]] torch::Tensor stack_layers(const std::vector<torch::Tensor>& sums, const torch::Tensor& logits_LTE);

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
