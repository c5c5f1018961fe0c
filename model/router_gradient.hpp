#pragma once

#include <cstdint>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/model/moe_model.hpp"

namespace hestia {

/// What each expert would give towards a gradient: out[t, e] = <g_t, E_e(x_t)>, float32 [T, E] (float64 of float64), of
/// every expert with its adapters or biases, in chunks of tokens. x_TD and g_TD [T, D] in the model's dtype. No
/// gradient; on a GPU asynchronous.
[[nodiscard]] torch::Tensor expert_responses(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                             const torch::Tensor& g_TD);

/// `mixed_TD` itself, with a straight-through gradient to the logits of the experts that were not chosen, as if they
/// had been in the sum (DenseMixer, F. Yao et al., NeurIPS 2025 workshop: "Improving MoE Post-Training with Precise
/// Router Gradient"). With S the chosen experts, y = sum over S of w_k E_k(x) = mixed_TD and c = (sum over S of w) /
/// (sum over S of p), for j outside S
///   weights that are not normalised over S:  dL/dp_j = c <dL/dy, E_j(x)>
///   those that are:                          dL/dz_j = p_j (c <dL/dy, E_j(x)> - <dL/dy, y> / sum over S of p)
/// beside what the mixing weights give: dL/dw of the chosen, and what a preserved mass gives experts of plain Top-K.
/// mixed_TD and x_TD [T, D] in the model's dtype, routing of the same T tokens; the result is [T, D], the same bits.
/// The experts get nothing from here, and x_TD what comes through the router. Backward runs all experts once (three
/// products of E instead of K experts per token); until then x_TD stays, and mixed_TD where weights are normalised.
/// Throws std::invalid_argument for kSparsemixer.
[[nodiscard]] torch::Tensor with_gradient_of_others(const Architecture& architecture, const ExpertWeights& experts,
                                                    const torch::Tensor& mixed_TD, const torch::Tensor& x_TD,
                                                    const RoutingRecord& routing);

}  // namespace hestia
