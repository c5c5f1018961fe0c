#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "hestia/model/moe_model.hpp"
#include "hestia/routing/residency.hpp"

namespace hestia {

/// Evidence of each token for a scope (ResidencyScope): z . weights_E + offset in its units, rounded half to even, 0
/// where that is no finite number. logits_TE: float [T, E]; weights_E: float64 on the same device; result int64 [T].
[[nodiscard]] torch::Tensor scope_evidence(const torch::Tensor& logits_TE, const torch::Tensor& weights_E,
                                           double offset);

/// For each token of a batch, flat over its rows, the first of its run, the stretch of one sequence id within a row:
/// int64 [T] on the host, which waits for the sequence ids.
[[nodiscard]] torch::Tensor run_begin_of_tokens(const TokenBatch& batch);

/// Mean evidence of each token and up to `window` - 1 tokens before it in its run, float64 [T], out of units: of an
/// exact sum, so that its sign is the same on every device. evidence_T: int64 [T]; run_begin_T: run_begin_of_tokens, on
/// the same device.
[[nodiscard]] torch::Tensor windowed_mean(const torch::Tensor& evidence_T, const torch::Tensor& run_begin_T,
                                          std::int64_t window);

/// Residency-aware routing, in training and evaluation alike: every sequence of the batch meets a slot cache of its
/// own, empty at its first token, that is served what the selector chooses (rule: hestia/routing/residency.hpp). Prompt
/// tokens (TokenBatch::counted_BS 0) route by z alone and are served through the same cache; where the rule has a
/// scope, they are evidence, too. Padding routes by z alone and meets no sequence's cache. Choices are hard and carry
/// no gradient; the mixing weights that the model gathers for them do. Logits are taken as float32. Keeps nothing from
/// one batch to the next but the layout of the last one. Not thread-safe.
class ResidencySelector : public Selector {
 public:
  /// Throws std::invalid_argument for a rule without a meaning: lambda below 0 or not finite, negative always_keep, no
  /// slots, a policy other than lru, a logit range that is negative or not finite, or a scope whose `elsewhere` is not
  /// from 0 to 1, whose window is below 1, or which has not been fitted.
  explicit ResidencySelector(ResidencyRule rule);
  ~ResidencySelector() override;

  /// `logits_TE` -> selected_TK int64 on the same device, by falling score, ties to the lower index. On a GPU
  /// asynchronous, apart from the first layer of a batch, which copies the sequence ids to the host. Throws
  /// std::out_of_range when a rule by logits has no logit range for `moe_layer` or a scope no weights,
  /// std::invalid_argument when these are of another number of experts, RunError when a kernel does not start.
  [[nodiscard]] torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                     const TokenBatch& batch) override;
  [[nodiscard]] bool preserves_mass(std::int64_t moe_layer, std::int64_t top_k) const override {
    return rule_.scales_weights(moe_layer, top_k);
  }

  /// Share of the counted tokens, over all layers, that were inside the rule's scope since the last call; nothing when
  /// there was no such token or the rule has no scope. Waits for the GPU.
  [[nodiscard]] std::optional<double> take_scope_share();

  [[nodiscard]] const ResidencyRule& rule() const noexcept { return rule_; }
  /// Routes by another rule from the next forward on. Throws as the constructor does, and keeps the old one then.
  void set_rule(ResidencyRule rule);

 private:
  struct Layout;
  const Layout& layout_of(const TokenBatch& batch);
  // float32 [T], of the tokens of `layout`.
  torch::Tensor strength_of(const torch::Tensor& logits_TE, std::int64_t moe_layer, const Layout& layout);

  ResidencyRule rule_;
  std::vector<torch::Tensor> scope_weights_;  // of the layers, float64 on the device that was last asked for
  torch::Tensor inside_;  // int64 [2], tokens inside and all of them, since they were last asked for
  std::unique_ptr<Layout> layout_;
};

}  // namespace hestia
