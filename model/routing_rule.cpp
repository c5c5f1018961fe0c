#include "hestia/model/routing_rule.hpp"

#include <limits>
#include <vector>

#include "hestia/model/moe_model.hpp"

namespace hestia {

using torch::Tensor;

namespace {

Tensor sparsemixer_weights(const Architecture& a, const Tensor& logits_TE, const Tensor& selected_TK) {
  constexpr double kNever = -std::numeric_limits<double>::infinity();
  const Tensor z = logits_TE.detach();
  Tensor taken = torch::zeros(z.sizes(), z.options().dtype(torch::kBool));
  std::vector<Tensor> weights;
  for (std::int64_t k = 0; k < selected_TK.size(1); ++k) {
    const Tensor chosen_T1 = selected_TK.narrow(1, k, 1);
    const Tensor best_T1 = std::get<0>(z.masked_fill(taken, kNever).max(1, /*keepdim=*/true));
    const Tensor distance = (best_T1 - z).div_(at::maximum(z.abs(), best_T1));
    const Tensor far = distance.gt(2.0 * a.router_jitter).logical_or_(taken).scatter_(1, chosen_T1, false);
    weights.push_back(logits_TE.masked_fill(far, kNever).softmax(1).gather(1, chosen_T1));
    taken = taken.scatter(1, chosen_T1, true);
  }
  return torch::cat(weights, 1);
}

}  // namespace

Tensor selection_scores(const Architecture& a, const Tensor& logits_TE) {
  Tensor logits = logits_TE.detach();
  if (a.num_groups == a.top_groups) {
    return logits;
  }
  const std::int64_t size = a.num_experts / a.num_groups;
  const Tensor grouped_TGe = logits.view({-1, a.num_groups, size});
  const Tensor chosen_Tg = top_k_lowest_index(std::get<0>(grouped_TGe.max(2)), a.top_groups);
  const Tensor left_out_TG =
      torch::ones({logits.size(0), a.num_groups}, logits.options().dtype(torch::kBool)).scatter_(1, chosen_Tg, false);
  return grouped_TGe.masked_fill(left_out_TG.unsqueeze(2), -std::numeric_limits<double>::infinity())
      .view(logits.sizes());
}

Tensor mixing_weights(const Architecture& a, const Tensor& logits_TE, const Tensor& probabilities_TE,
                      const Tensor& selected_TK, const Tensor& plain_TK) {
  Tensor weights_TK;
  switch (a.routing) {
    case RoutingKind::kSoftmax:
      weights_TK = probabilities_TE.gather(1, selected_TK);
      if (plain_TK.defined() && !a.normalise_top_k) {
        const Tensor plain_T1 = probabilities_TE.gather(1, plain_TK).sum(1, /*keepdim=*/true);
        const Tensor chosen_T1 = weights_TK.sum(1, /*keepdim=*/true).clamp_min(std::numeric_limits<float>::min());
        weights_TK = weights_TK * (plain_T1 / chosen_T1);
      }
      break;
    case RoutingKind::kSoftmaxOfChosen:
      weights_TK = logits_TE.gather(1, selected_TK).softmax(1);
      break;
    case RoutingKind::kSparsemixer:
      weights_TK = sparsemixer_weights(a, logits_TE, selected_TK);
      break;
  }
  if (a.normalise_top_k) {
    weights_TK = weights_TK / weights_TK.sum(1, /*keepdim=*/true);
  }
  return a.routed_scale == 1.0 ? weights_TK : weights_TK * a.routed_scale;
}

}  // namespace hestia
