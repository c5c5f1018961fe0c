#pragma once

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"

namespace hestia {

// The routing rule of a family, apart from the choice itself, which a Selector makes: what it chooses by, and how the
// chosen experts are weighed. Training and decoding call the same functions.

/// What a selector chooses by: the logits, minus infinity at experts that the family's group limit leaves out (DeepSeek
/// V2, arXiv 2405.04434, group-limited greedy: the `top_groups` groups with the best experts stay, ties to the lower
/// group). `logits_TE` float32; without groups returned as it is. No gradient.
[[nodiscard]] torch::Tensor selection_scores(const Architecture& architecture, const torch::Tensor& logits_TE);

/// Mixing weights [T, K] of the experts `selected_TK`, whatever rule chose them. With p = softmax(z) over all experts
/// and S the chosen set:
///   kSoftmax          w_k = p_k, divided by the sum over S where the family normalises
///   kSoftmaxOfChosen  w_k = exp(z_k) / sum over S of exp(z)
///   kSparsemixer      w_k = exp(z_k) / sum over N_k of exp(z), S ordered as in selected_TK, R_k the experts without
///                     those before k, m = max of z over R_k, N_k = {k} and the j of R_k with
///                     (m - z_j) / max(|z_j|, m) <= 2 * router_jitter (arXiv 2409.12136 without its sampling: the
///                     model's inference; a chosen expert that is not near, as under a residency prior, counts as such)
/// times routed_scale. Differentiable in logits and probabilities (softmax of the same logits).
/// `plain_TK`, where defined, are the experts that plain Top-K chooses, and kSoftmax without normalisation gives
///   w_k = p_k * (sum over plain of p) / (sum over S of p)
/// so that a choice of other experts keeps the probability mass, with which the layer's output was trained to scale; as
/// it is, bit by bit, for a token whose S is plain in the same order. The other forms sum to a number of their own.
[[nodiscard]] torch::Tensor mixing_weights(const Architecture& architecture, const torch::Tensor& logits_TE,
                                           const torch::Tensor& probabilities_TE, const torch::Tensor& selected_TK,
                                           const torch::Tensor& plain_TK = {});

}  // namespace hestia
