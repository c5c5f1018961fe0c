#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <torch/types.h>

#include "hestia/data/packing.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/routing/layout.hpp"

namespace hestia {

/// A PackedBatch on the model's device.
[[nodiscard]] TokenBatch to_device(const PackedBatch& batch, torch::Device device);
/// Layout of a packed batch in the flat token order of [B, S].
[[nodiscard]] SequenceLayout layout_of(const PackedBatch& batch);

/// Sum of -log p(label) over the labelled positions and its count, differentiable: hidden [B, S, D], labels int64 [B,
/// S] (-100: none). The logits are made in chunks of rows and never kept whole: peak memory is O(chunk * V). float32
/// sum.
[[nodiscard]] torch::Tensor nll_sum(MoeModel& model, const torch::Tensor& hidden_BSD, const torch::Tensor& labels_BS);

/// log p(label) of every labelled position and 0 elsewhere, float32 [B, S], nats: hidden [B, S, D] and labels as in
/// `nll_sum`, and chunks as there. No gradient.
[[nodiscard]] torch::Tensor label_log_probabilities(MoeModel& model, const torch::Tensor& hidden_BSD,
                                                    const torch::Tensor& labels_BS);

/// Quality of a model on one set of batches.
struct QualityResult {
  double nll_sum = 0.0;  ///< nats
  std::int64_t labels = 0;
  std::int64_t bytes = 0;                      ///< Text bytes that the labels stand for.
  [[nodiscard]] double nll() const;            ///< nats per token; NaN without labels.
  [[nodiscard]] double perplexity() const;     ///< exp(nll)
  [[nodiscard]] double bits_per_byte() const;  ///< nll_sum / ln 2 / bytes; NaN without bytes.
};

/// Runs `batches` without gradient; `visit` (may be empty) gets every sequence's routing on the CPU, in order, with
/// probabilities when asked for. Sequence ids are made unique over all batches: first_id, first_id + 1, ... `data`
/// gives the domain names (task labels) and prompt lengths. `compare` (may be empty) gets, before `visit`, what the
/// model's kept reference routers choose on the hidden states that its own routers saw (id, prompt, selections and
/// probabilities, no weights), and the model's own routing, both with probabilities; std::invalid_argument when the
/// model keeps no reference routers.
QualityResult measure(
    MoeModel& model, const PackedData& data, const std::vector<PackedBatch>& batches, bool with_probabilities,
    const std::function<void(SequenceRouting&&)>& visit, const std::function<void(std::int64_t tokens)>& progress = {},
    const std::function<void(const SequenceRouting& reference, const SequenceRouting& own)>& compare = {});

/// Mean over the tokens of `batches` (padding left out) of max z - min z over the experts, per MoE layer, from the
/// logits themselves: D_avg of residency-aware routing. Without gradient, under the selector that the model has. NaN
/// when there are no tokens or a logit is not finite.
[[nodiscard]] std::vector<float> mean_logit_range(MoeModel& model, const std::vector<PackedBatch>& batches);

}  // namespace hestia
