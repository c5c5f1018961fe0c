#include "router_gradient.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include <torch/autograd.h>

namespace hestia {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr std::int64_t kChunk = 1024;  // tokens of which all experts run together

// Lets autograd own the experts until backward is done.
struct Experts : torch::CustomClassHolder {
  explicit Experts(ExpertWeights weights_in) : weights(std::move(weights_in)) {}
  ExpertWeights weights;
};

Tensor responses_of_chunk(const ExpertWeights& experts, const Tensor& x_TD, const Tensor& g_TD) {
  const ExpertAdapters& adapters = experts.adapters;
  Tensor gate_ETF = at::matmul(x_TD, experts.gate_EFD.transpose(1, 2));
  Tensor up_ETF = at::matmul(x_TD, experts.up_EFD.transpose(1, 2));
  Tensor back_ETF = at::matmul(g_TD, experts.down_EDF);
  if (adapters.defined()) {
    const Tensor up_low_ETR = at::matmul(x_TD, adapters.up_a_ERD.transpose(1, 2)).mul_(adapters.scale);
    up_ETF.baddbmm_(up_low_ETR, adapters.up_b_EFR.transpose(1, 2));
    back_ETF.baddbmm_(at::matmul(g_TD, adapters.down_b_EDR).mul_(adapters.scale), adapters.down_a_ERF);
  }
  if (experts.gate_bias_EF.defined()) {
    gate_ETF.add_(experts.gate_bias_EF.unsqueeze(1));
    up_ETF.add_(experts.up_bias_EF.unsqueeze(1));
  }
  const auto accumulator = torch::promote_types(x_TD.scalar_type(), torch::kFloat32);
  Tensor response_TE = gated_activation(experts, gate_ETF, up_ETF).mul_(back_ETF).sum(2, false, accumulator).t();
  if (experts.down_bias_ED.defined()) {
    response_TE = response_TE + at::matmul(g_TD, experts.down_bias_ED.t());
  }
  return response_TE;
}

class GradientOfOthers : public Function<GradientOfOthers> {
 public:
  /// gate_TE: probabilities, or the logits where the weights are normalised; the gradient goes there.
  static Tensor forward(AutogradContext* ctx, const Tensor& mixed_TD, const Tensor& gate_TE,
                        const Tensor& probabilities_TE, const Tensor& selected_TK, const Tensor& weights_TK,
                        const Tensor& x_TD, const c10::intrusive_ptr<Experts>& experts, bool normalised) {
    ctx->save_for_backward({normalised ? mixed_TD : Tensor(), probabilities_TE, selected_TK, weights_TK, x_TD});
    ctx->saved_data["experts"] = c10::IValue::make_capsule(experts);
    ctx->saved_data["normalised"] = normalised;
    ctx->saved_data["gate_type"] = static_cast<std::int64_t>(gate_TE.scalar_type());
    return mixed_TD.view_as(mixed_TD);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& mixed_TD = saved[0];
    const Tensor& p_TE = saved[1];
    const Tensor& selected_TK = saved[2];
    const Tensor& weights_TK = saved[3];
    variable_list result(8);
    result[0] = gradients[0];
    if (ctx->needs_input_grad(1)) {
      const auto experts = c10::static_intrusive_pointer_cast<Experts>(ctx->saved_data["experts"].toCapsule());
      const Tensor g_TD = gradients[0].contiguous();
      const Tensor mass_T1 =
          p_TE.gather(1, selected_TK).sum(1, /*keepdim=*/true).clamp_min(std::numeric_limits<float>::min());
      const Tensor scale_T1 = weights_TK.sum(1, /*keepdim=*/true) / mass_T1;
      Tensor gate_TE = expert_responses(experts->weights, saved[4], g_TD) * scale_T1;
      if (ctx->saved_data["normalised"].toBool()) {
        const auto type = gate_TE.scalar_type();
        const Tensor own_T1 = (g_TD.to(type) * mixed_TD.to(type)).sum(1, /*keepdim=*/true);
        gate_TE = (gate_TE - own_T1 / mass_T1) * p_TE;
      }
      const auto type = static_cast<torch::Dtype>(ctx->saved_data["gate_type"].toInt());
      result[1] = gate_TE.scatter(1, selected_TK, 0.0).to(type);
    }
    return result;
  }
};

}  // namespace

Tensor expert_responses(const ExpertWeights& experts, const Tensor& x_TD, const Tensor& g_TD) {
  const torch::NoGradGuard no_grad;
  if (x_TD.size(0) == 0) {
    return torch::zeros({0, experts.gate_EFD.size(0)}, x_TD.options().dtype(torch::kFloat32));
  }
  std::vector<Tensor> chunks;
  for (std::int64_t begin = 0; begin < x_TD.size(0); begin += kChunk) {
    const std::int64_t length = std::min(kChunk, x_TD.size(0) - begin);
    chunks.push_back(responses_of_chunk(experts, x_TD.narrow(0, begin, length), g_TD.narrow(0, begin, length)));
  }
  return at::cat(chunks);
}

Tensor with_gradient_of_others(const Architecture& a, const ExpertWeights& experts, const Tensor& mixed_TD,
                               const Tensor& x_TD, const RoutingRecord& routing) {
  if (a.routing == RoutingKind::kSparsemixer) {
    throw std::invalid_argument("router gradient of all experts: not for sparsemixer, whose weights share no sum");
  }
  const bool normalised = a.normalise_top_k || a.routing == RoutingKind::kSoftmaxOfChosen;
  return GradientOfOthers::apply(mixed_TD, normalised ? routing.logits_TE : routing.probabilities_TE,
                                 routing.probabilities_TE.detach(), routing.selected_TK, routing.weights_TK.detach(),
                                 x_TD.detach(), c10::make_intrusive<Experts>(experts), normalised);
}

}  // namespace hestia
