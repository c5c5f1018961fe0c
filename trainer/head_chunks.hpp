#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/autograd.h>
#include <torch/types.h>

#include "hestia/model/moe_model.hpp"

namespace hestia {

/// The head as arguments of an autograd node: its matrix [V, D] and, where it has one, its bias [V].
[[nodiscard]] inline std::vector<torch::Tensor> head_parameters(MoeModel& model) {
  std::vector<torch::Tensor> head = {model->head_weight()};
  if (model->head_bias().defined()) {
    head.push_back(model->head_bias());
  }
  return head;
}

/// Rows of hidden states whose [rows, V] logits are made at a time: a fixed number of elements per device kind.
[[nodiscard]] inline std::int64_t head_chunk_rows(const torch::Tensor& hidden_ND, at::TensorList head) {
  const std::int64_t budget = hidden_ND.is_cuda() ? std::int64_t{1} << 27 : std::int64_t{1} << 24;
  return std::max<std::int64_t>(1, budget / head[0].size(0));
}

/// log softmax(head(hidden)) in float32, [N, V].
[[nodiscard]] inline torch::Tensor head_log_softmax(const torch::Tensor& hidden_ND, at::TensorList head) {
  const torch::Tensor logits =
      head.size() > 1 ? at::linear(hidden_ND, head[0], head[1]) : torch::matmul(hidden_ND, head[0].t());
  return torch::log_softmax(logits.to(torch::kFloat32), -1);
}

/// Whether a sum over the head's outputs is to be differentiated.
[[nodiscard]] inline bool wants_gradient(const torch::Tensor& hidden_ND, at::TensorList head) {
  return torch::GradMode::is_enabled() &&
         (hidden_ND.requires_grad() ||
          std::any_of(head.begin(), head.end(), [](const torch::Tensor& part) { return part.requires_grad(); }));
}

/// Gradient of a sum over rows in hidden states and head, collected chunk by chunk with the value, so that logits are
/// never kept. The head's is made only where it trains, in float32.
class HeadGradient {
 public:
  HeadGradient(const torch::Tensor& hidden_ND, at::TensorList head, bool wanted)
      : hidden_(hidden_ND), weight_(head[0]), gradients_(1 + head.size()) {
    if (!wanted) {
      return;
    }
    gradients_[0] = torch::empty_like(hidden_ND);
    for (std::size_t i = 0; i < head.size(); ++i) {
      if (head[i].requires_grad()) {
        gradients_[1 + i] = torch::zeros(head[i].sizes(), head[i].options().dtype(torch::kFloat32));
      }
    }
  }

  /// Adds rows [begin, begin + N) given the gradient of their logits, float32 [N, V].
  void add(std::int64_t begin, const torch::Tensor& grad_logits_NV) {
    const torch::Tensor grad_logits = grad_logits_NV.to(hidden_.scalar_type());
    gradients_[0].narrow(0, begin, grad_logits.size(0)).copy_(torch::matmul(grad_logits, weight_));
    if (gradients_[1].defined()) {
      const torch::Tensor rows = hidden_.narrow(0, begin, grad_logits.size(0));
      gradients_[1].add_(torch::matmul(grad_logits.t(), rows).to(torch::kFloat32));
    }
    if (gradients_.size() > 2 && gradients_[2].defined()) {
      gradients_[2].add_(grad_logits_NV.sum(0));
    }
  }

  /// Keeps all for `scaled`.
  void save(torch::autograd::AutogradContext* context) const {
    context->saved_data["dtype"] = static_cast<std::int64_t>(weight_.scalar_type());
    context->save_for_backward(gradients_);
  }

  /// Gradients of hidden states and of each part of the head (undefined where it does not train), times `scale`, and
  /// none for the `others` that follow among the node's arguments.
  [[nodiscard]] static torch::autograd::variable_list scaled(torch::autograd::AutogradContext* context,
                                                             const torch::Tensor& scale, std::size_t others) {
    torch::autograd::variable_list gradients = context->get_saved_variables();
    const auto dtype = static_cast<torch::Dtype>(context->saved_data["dtype"].toInt());
    gradients[0] = gradients[0] * scale.to(gradients[0].scalar_type());
    for (std::size_t i = 1; i < gradients.size(); ++i) {
      if (gradients[i].defined()) {
        gradients[i] = (gradients[i] * scale).to(dtype);
      }
    }
    gradients.resize(gradients.size() + others);
    return gradients;
  }

 private:
  torch::Tensor hidden_;
  torch::Tensor weight_;
  torch::autograd::variable_list gradients_;  // hidden states, then the head's parts
};

}  // namespace hestia
