#pragma once

#include <memory>
#include <vector>

#include "hestia/model/moe_model.hpp"
#include "hestia/routing/residency.hpp"

namespace hestia {

/// Residency-aware routing, in training and evaluation alike: every sequence of the batch meets a slot cache of its
/// own, empty at its first token, that is served what the selector chooses (rule: hestia/routing/residency.hpp). Prompt
/// tokens (TokenBatch::counted_BS 0) route by z alone and are served through the same cache. Padding routes by z alone
/// and meets no sequence's cache. Choices are hard and carry no gradient; the mixing weights that the model gathers for
/// them do. Logits are taken as float32. Keeps nothing from one batch to the next but the layout of the last one. Not
/// thread-safe.
class ResidencySelector : public Selector {
 public:
  /// Throws std::invalid_argument for a rule without a meaning: lambda below 0 or not finite, negative always_keep, no
  /// slots, a policy other than lru, or a logit range that is negative or not finite.
  explicit ResidencySelector(ResidencyRule rule);
  ~ResidencySelector() override;

  /// `logits_TE` -> selected_TK int64 on the same device, by falling score, ties to the lower index. On a GPU
  /// asynchronous, apart from the first layer of a batch, which copies the sequence ids to the host. Throws
  /// std::out_of_range when a rule by logits has no logit range for `moe_layer`, RunError when a kernel does not start.
  [[nodiscard]] torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                     const TokenBatch& batch) override;
  [[nodiscard]] bool preserves_mass(std::int64_t moe_layer, std::int64_t top_k) const override {
    return rule_.scales_weights(moe_layer, top_k);
  }

  [[nodiscard]] const ResidencyRule& rule() const noexcept { return rule_; }
  /// Routes by another rule from the next forward on. Throws as the constructor does, and keeps the old one then.
  void set_rule(ResidencyRule rule);

 private:
  struct Layout;
  const Layout& layout_of(const TokenBatch& batch);

  ResidencyRule rule_;
  std::unique_ptr<Layout> layout_;
};

}  // namespace hestia
