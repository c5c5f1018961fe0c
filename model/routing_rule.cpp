#include "hestia/model/routing_rule.hpp"

#include <limits>
#include <stdexcept>

#include "hestia/model/moe_model.hpp"

namespace hestia {

using torch::Tensor;

Tensor selection_scores(const Architecture& a, const Tensor& logits_TE) {
  const Tensor logits = logits_TE.detach();
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
                      const Tensor& selected_TK) {
  Tensor weights_TK;
  switch (a.routing) {
    case RoutingKind::kSoftmax:
      weights_TK = probabilities_TE.gather(1, selected_TK);
      break;
    case RoutingKind::kSoftmaxOfChosen:
      weights_TK = logits_TE.gather(1, selected_TK).softmax(1);
      break;
  }
  if (a.normalise_top_k) {
    weights_TK = weights_TK / weights_TK.sum(1, /*keepdim=*/true);
  }
  return a.routed_scale == 1.0 ? weights_TK : weights_TK * a.routed_scale;
}

}  // namespace hestia
