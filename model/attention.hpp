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
  /// By window (Architecture::window_of): [B or 1, 1, S, keys] added to attention scores; undefined: plain causal, or
  /// with `all_visible` none.
  std::map<std::int64_t, torch::Tensor> masks;
  bool all_visible = false;
  KeyValueCache* cache = nullptr;  ///< Holds the keys of earlier tokens; null: there are none.
  torch::Tensor position_1;        ///< Of a step (StepPlace), with
  std::int64_t visible = 0;        ///< the keys that it looks at.
};

/// Rotations and masks of a batch: a token sees itself and earlier tokens of its sequence, no farther back than the
/// window. Padding sees itself only, which keeps its softmax finite.
[[nodiscard]] AttentionInputs attention_inputs(const Architecture& architecture, const TokenBatch& batch,
                                               torch::Dtype dtype);
/// The same for tokens that continue the sequences in `cache`, which must outlive the result. Throws as
/// MoeModelImpl::forward with a cache does.
[[nodiscard]] AttentionInputs attention_inputs(const Architecture& architecture, const TokenBatch& batch,
                                               torch::Dtype dtype, KeyValueCache& cache);
/// The same for one token more for each row, without a word to the host. Throws as MoeModelImpl::step does.
[[nodiscard]] AttentionInputs attention_inputs(const Architecture& architecture, const StepPlace& place,
                                               torch::Dtype dtype, KeyValueCache& cache);
/// Rotations of tokens, in the dtype in which attention rotates.
[[nodiscard]] RotaryTables rotations_of(const Architecture& architecture, const torch::Tensor& positions_BS,
                                        const torch::Tensor& sequence_ids_BS, torch::Dtype dtype);

/// Multi-head attention with grouped keys and values, or latent attention, of normalised hidden states [B, S, D],
/// output projection included.
[[nodiscard]] torch::Tensor attend(const Architecture& architecture, const LayerWeights& weights, std::int64_t layer,
                                   const AttentionInputs& inputs, const torch::Tensor& x_BSD);

}  // namespace hestia
