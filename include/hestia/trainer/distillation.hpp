#pragma once

#include <torch/types.h>

#include "hestia/model/moe_model.hpp"

namespace hestia {

/// Sum over the labelled positions of KL(P_base || P) in nats, P = softmax(head(hidden)) over the vocabulary and P_base
/// that of the base model: what holds general ability where the task's labels do not speak (Hinton et al., arXiv
/// 1503.02531, at temperature 1). hidden [B, S, D] of `model`, differentiable; base_hidden [B, S, D] of `base`, no
/// gradient; labels int64 [B, S] (-100: not labelled; else their value does not matter). `base` may be `model` itself
/// when the head does not train. Logits are made in chunks of rows and never kept whole. float32 sum.
/// Throws std::invalid_argument when the shapes differ.
[[nodiscard]] torch::Tensor distillation_sum(MoeModel& model, const torch::Tensor& hidden_BSD, MoeModel& base,
                                             const torch::Tensor& base_hidden_BSD, const torch::Tensor& labels_BS);

}  // namespace hestia
