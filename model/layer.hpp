#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include <torch/types.h>

#include "attention.hpp"
#include "hestia/architecture/architecture.hpp"
#include "hestia/model/moe_model.hpp"
#include "layer_weights.hpp"

namespace hestia {

/// What all layers of one forward share.
struct SharedInputs {
  AttentionInputs attention;
  TokenBatch batch;
};

/// One layer of a forward and what runs in it.
struct LayerRun {
  Architecture architecture;
  std::shared_ptr<const LayerWeights> weights;
  std::int64_t layer = 0;      ///< Model layer.
  std::int64_t moe_layer = 0;  ///< Its place among the layers with experts; without meaning in a dense layer.
  std::shared_ptr<const SharedInputs> shared;
  std::shared_ptr<Selector> selector;
  std::shared_ptr<Executor> executor;
  torch::Tensor router_ED;              ///< The router to use, present or reference.
  ExpertWeights experts;                ///< With the adapters to use.
  bool router_gradient_of_all = false;  ///< with_gradient_of_others
};

/// What one run of a layer gives; the record is empty for a dense layer.
struct LayerResult {
  torch::Tensor hidden_BSD;
  RoutingRecord routing;
};

/// Attention and feed-forward of one layer; with a selection given, that one is served instead of asking the selector.
[[nodiscard]] LayerResult run_layer(const LayerRun& run, const torch::Tensor& hidden_BSD,
                                    const std::optional<torch::Tensor>& selected_TK = std::nullopt);

/// The same, with activations recomputed in backward instead of kept.
[[nodiscard]] LayerResult run_layer_checkpointed(const LayerRun& run, const torch::Tensor& hidden_BSD);

}  // namespace hestia
