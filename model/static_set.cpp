#include "hestia/model/static_set.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>

namespace hestia {

StaticSetSelector::StaticSetSelector(const std::vector<std::vector<std::int64_t>>& experts, std::int64_t num_experts,
                                     std::shared_ptr<Selector> inside)
    : inside_(inside ? std::move(inside) : std::make_shared<TopKSelector>()) {
  for (const std::vector<std::int64_t>& layer : experts) {
    torch::Tensor forbidden = torch::ones({num_experts}, torch::kBool);
    for (const std::int64_t expert : layer) {
      if (expert < 0 || expert >= num_experts || !forbidden[expert].item<bool>()) {
        throw std::invalid_argument(
            fmt::format("static set: expert {} is there twice or not below {}", expert, num_experts));
      }
      forbidden[expert] = false;
    }
    forbidden_E_.push_back(forbidden);
    sizes_.push_back(static_cast<std::int64_t>(layer.size()));
  }
}

torch::Tensor StaticSetSelector::select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                        const TokenBatch& batch) {
  const auto layer = static_cast<std::size_t>(moe_layer);
  if (sizes_.at(layer) < top_k) {
    throw std::invalid_argument(
        fmt::format("static set: layer {} has {} experts for a top {}", moe_layer, sizes_[layer], top_k));
  }
  forbidden_E_[layer] = forbidden_E_[layer].to(logits_TE.device());
  // Groups that the family left out have scores of -inf, too: the set's own come before what is forbidden.
  const torch::Tensor allowed_TE = logits_TE.clamp_min(std::numeric_limits<float>::lowest());
  return inside_->select(allowed_TE.masked_fill(forbidden_E_[layer], -std::numeric_limits<double>::infinity()), top_k,
                         moe_layer, batch);
}

std::vector<std::vector<std::int64_t>> most_used_experts(const std::vector<std::int64_t>& counts,
                                                         std::int64_t num_layers, std::int64_t size) {
  const auto layers = static_cast<std::size_t>(num_layers);
  if (num_layers < 1 || counts.size() % layers != 0 || size < 0 ||
      size > static_cast<std::int64_t>(counts.size() / layers)) {
    throw std::invalid_argument(
        fmt::format("static set: {} experts of {} counts in {} layers", size, counts.size(), num_layers));
  }
  const std::size_t experts = counts.size() / layers;
  std::vector<std::vector<std::int64_t>> sets;
  for (std::size_t layer = 0; layer < layers; ++layer) {
    std::vector<std::int64_t> order(experts);
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return counts[layer * experts + static_cast<std::size_t>(a)] >
             counts[layer * experts + static_cast<std::size_t>(b)];
    });
    order.resize(static_cast<std::size_t>(size));
    sets.push_back(std::move(order));
  }
  return sets;
}

}  // namespace hestia
