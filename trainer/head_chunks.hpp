#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <torch/autograd.h>
#include <torch/types.h>

namespace hestia {

/// Rows of hidden states whose [rows, V] logits are made at a time: a fixed number of elements per device kind.
[[nodiscard]] inline std::int64_t head_chunk_rows(const torch::Tensor& hidden_ND, const torch::Tensor& weight_VD) {
  const std::int64_t budget = hidden_ND.is_cuda() ? std::int64_t{1} << 27 : std::int64_t{1} << 24;
  return std::max<std::int64_t>(1, budget / weight_VD.size(0));
}

/// log softmax(head(hidden)) in float32, [N, V].
[[nodiscard]] inline torch::Tensor head_log_softmax(const torch::Tensor& hidden_ND, const torch::Tensor& weight_VD) {
  return torch::log_softmax(torch::matmul(hidden_ND, weight_VD.t()).to(torch::kFloat32), -1);
}

/// Gradient of a sum over rows in hidden states and head, collected chunk by chunk with the value, so that logits are
/// never kept. The head's is made only where it trains, in float32.
class HeadGradient {
 public:
  HeadGradient(const torch::Tensor& hidden_ND, const torch::Tensor& weight_VD, bool wanted)
      : hidden_(hidden_ND), weight_(weight_VD) {
    if (wanted) {
      grad_hidden_ = torch::empty_like(hidden_ND);
    }
    if (wanted && weight_VD.requires_grad()) {
      grad_weight_ = torch::zeros(weight_VD.sizes(), weight_VD.options().dtype(torch::kFloat32));
    }
  }

  /// Adds rows [begin, begin + N) given the gradient of their logits, float32 [N, V].
  void add(std::int64_t begin, const torch::Tensor& grad_logits_NV) {
    const torch::Tensor grad_logits = grad_logits_NV.to(hidden_.scalar_type());
    grad_hidden_.narrow(0, begin, grad_logits.size(0)).copy_(torch::matmul(grad_logits, weight_));
    if (grad_weight_.defined()) {
      const torch::Tensor rows = hidden_.narrow(0, begin, grad_logits.size(0));
      grad_weight_.add_(torch::matmul(grad_logits.t(), rows).to(torch::kFloat32));
    }
  }

  /// Keeps both for `scaled`.
  void save(torch::autograd::AutogradContext* context) const {
    context->saved_data["weight_gradient"] = grad_weight_.defined();
    context->saved_data["dtype"] = static_cast<std::int64_t>(weight_.scalar_type());
    torch::autograd::variable_list saved;
    for (const torch::Tensor& gradient : {grad_hidden_, grad_weight_}) {
      if (gradient.defined()) {
        saved.push_back(gradient);
      }
    }
    context->save_for_backward(saved);
  }

  /// Gradients of hidden states and head (undefined where it does not train), times `scale`.
  [[nodiscard]] static std::pair<torch::Tensor, torch::Tensor> scaled(torch::autograd::AutogradContext* context,
                                                                      const torch::Tensor& scale) {
    const torch::autograd::variable_list saved = context->get_saved_variables();
    torch::Tensor grad_weight;
    if (context->saved_data["weight_gradient"].toBool()) {
      grad_weight = (saved[1] * scale).to(static_cast<torch::Dtype>(context->saved_data["dtype"].toInt()));
    }
    return {saved[0] * scale.to(saved[0].scalar_type()), grad_weight};
  }

 private:
  torch::Tensor hidden_;
  torch::Tensor weight_;
  torch::Tensor grad_hidden_;
  torch::Tensor grad_weight_;
};

}  // namespace hestia
