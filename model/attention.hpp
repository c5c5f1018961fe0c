#pragma once

#include <cstdint>
#include <map>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/model/moe_model.hpp"
#include "layer_weights.hpp"
#include "rope.hpp"

namespace hestia {

/// What the attention of all layers of one forward shares.
struct AttentionInputs {
  RotaryTables rotary;
  /// By window (Architecture::window_of): [B, 1, S, S] added to attention scores; undefined: plain causal.
  std::map<std::int64_t, torch::Tensor> masks;
};

/// Rotations and masks of a batch: a token sees itself and earlier tokens of its sequence, no farther back than the
/// window. Padding sees itself only, which keeps its softmax finite.
[[nodiscard]] AttentionInputs attention_inputs(const Architecture& architecture, const TokenBatch& batch,
                                               torch::Dtype dtype);

/// Multi-head attention with grouped keys and values, or latent attention, of normalised hidden states [B, S, D],
/// output projection included.
[[nodiscard]] torch::Tensor attend(const Architecture& architecture, const LayerWeights& weights, std::int64_t layer,
                                   const AttentionInputs& inputs, const torch::Tensor& x_BSD);

}  // namespace hestia
