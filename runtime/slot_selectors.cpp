#include "slot_selectors.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>

namespace hestia {

using torch::Tensor;

namespace {

// weight_score of every logit, operation by operation, so bit by bit: each of torch's rounds by itself.
Tensor weight_scores(ResidencyScore score, const Tensor& z_TE) {
  using C = RelativeWeight;
  const float infinity = std::numeric_limits<float>::infinity();
  const Tensor logits_TE = score == ResidencyScore::kRoot ? z_TE * 0.5F : z_TE;
  const Tensor largest = logits_TE.nan_to_num(-infinity, infinity, -infinity).amax(1, /*keepdim=*/true);
  const Tensor difference = (logits_TE - largest).masked_fill(logits_TE == largest, 0.0F);
  const Tensor exponent = difference * C::kLog2E;
  const Tensor n = exponent.clamp_min(C::kSmallest) + C::kRound - C::kRound;
  const Tensor r = difference - n * C::kLn2High - n * C::kLn2Low;
  Tensor value = torch::full_like(r, C::kTerm6);
  for (const float term : {C::kTerm5, C::kTerm4, C::kTerm3, C::kTerm2, 1.0F, 1.0F}) {
    value = value * r + term;
  }
  const Tensor power = ((n.to(torch::kInt32) + 127) * (1 << 23)).view(torch::kFloat32);
  const Tensor weight = (value * power).masked_fill(exponent < C::kSmallest, 0.0F);
  return torch::where(logits_TE >= C::kLowest, weight, logits_TE);
}

}  // namespace

SlotResidencySelector::SlotResidencySelector(ResidencyRule rule, std::shared_ptr<SlotExecutor> slots,
                                             torch::Tensor strength_LB)
    : rule_(std::move(rule)), slots_(std::move(slots)), strength_LB_(std::move(strength_LB)) {}

torch::Tensor SlotResidencySelector::select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                            const TokenBatch& /*batch*/) {
  const torch::NoGradGuard no_grad;
  const float bonus = rule_.bonus(moe_layer);
  const Tensor logits = logits_TE.to(torch::kFloat32);
  if (bonus == 0.0F || slots_->all_resident()) {
    return top_k_lowest_index(logits, top_k);
  }
  const bool by_weight = routes_by_weight(rule_.score, bonus, rule_.always_keep, top_k);
  const Tensor bonus_T1 = strength_LB_[moe_layer].unsqueeze(1) * bonus;
  const Tensor scores = by_weight ? torch::where(bonus_T1 > 0.0F, weight_scores(rule_.score, logits), logits) : logits;
  const Tensor resident_E = slots_->resident(moe_layer);
  Tensor adjusted = scores + resident_E.to(torch::kFloat32) * bonus_T1;
  const std::int64_t kept = std::clamp<std::int64_t>(rule_.always_keep, 0, top_k);
  if (kept > 0) {
    const Tensor best = top_k_lowest_index(scores, kept);
    adjusted.scatter_(1, best, std::numeric_limits<float>::infinity());
  }
  // chosen_before: with the bonus, ties to the higher score, then to the lower index.
  const Tensor by_score = std::get<1>(scores.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true));
  const Tensor order = std::get<1>(adjusted.gather(1, by_score).sort(/*stable=*/true, /*dim=*/1, /*descending=*/true));
  // Places in by_score: their rising order is that of falling scores.
  const Tensor places = std::get<0>(order.narrow(1, 0, top_k).sort(/*stable=*/true, /*dim=*/1, /*descending=*/false));
  return by_score.gather(1, places);
}

ReplaySelector::ReplaySelector(torch::Tensor selected_LSTK, torch::Tensor step_1)
    : selected_LSTK_(std::move(selected_LSTK)), step_1_(std::move(step_1)) {}

torch::Tensor ReplaySelector::select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                     const TokenBatch& /*batch*/) {
  if (logits_TE.size(0) != selected_LSTK_.size(2) || top_k != selected_LSTK_.size(3)) {
    throw std::invalid_argument(
        fmt::format("replay: the trace has steps of {} rows of {} experts, the model asks for {} of {}",
                    selected_LSTK_.size(2), selected_LSTK_.size(3), logits_TE.size(0), top_k));
  }
  return selected_LSTK_[moe_layer].index_select(0, step_1_.remainder(selected_LSTK_.size(1)))[0];
}

}  // namespace hestia
