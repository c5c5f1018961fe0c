#include "slot_selectors.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>

namespace hestia {

using torch::Tensor;

SlotResidencySelector::SlotResidencySelector(ResidencyRule rule, std::shared_ptr<SlotExecutor> slots)
    : rule_(std::move(rule)), slots_(std::move(slots)) {}

torch::Tensor SlotResidencySelector::select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                            const TokenBatch& /*batch*/) {
  const torch::NoGradGuard no_grad;
  const float bonus = rule_.bonus(moe_layer);
  const Tensor logits = logits_TE.to(torch::kFloat32);
  if (bonus == 0.0F || slots_->all_resident()) {
    return top_k_lowest_index(logits, top_k);
  }
  const Tensor resident_E = slots_->resident(moe_layer);
  Tensor adjusted = logits + resident_E.to(torch::kFloat32) * bonus;
  const std::int64_t kept = std::clamp<std::int64_t>(rule_.always_keep, 0, top_k);
  if (kept > 0) {
    const Tensor best = top_k_lowest_index(logits, kept);
    adjusted.scatter_(1, best, std::numeric_limits<float>::infinity());
  }
  // chosen_before: by z', ties to the higher z, then to the lower index.
  const Tensor by_logit = std::get<1>(logits.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true));
  const Tensor order = std::get<1>(adjusted.gather(1, by_logit).sort(/*stable=*/true, /*dim=*/1, /*descending=*/true));
  // Places in by_logit: their rising order is that of falling logits.
  const Tensor places = std::get<0>(order.narrow(1, 0, top_k).sort(/*stable=*/true, /*dim=*/1, /*descending=*/false));
  return by_logit.gather(1, places);
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
