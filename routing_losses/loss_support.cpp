#include "loss_support.hpp"

#include <stdexcept>

#include <fmt/format.h>
#include <torch/autograd.h>

namespace hestia {
namespace {

[[nodiscard]] std::string shape_text(const torch::Tensor& tensor) {
  return tensor.defined() ? c10::str(tensor.sizes()) : "undefined";
}

class AttachGradient : public torch::autograd::Function<AttachGradient> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& /*logits_LTE*/,
                               const torch::Tensor& sum_L, const torch::Tensor& gradient_LTE) {
    context->save_for_backward({gradient_LTE});
    return sum_L.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& outputs) {
    const torch::Tensor gradient = context->get_saved_variables()[0] * outputs[0].view({-1, 1, 1});
    return {gradient, torch::Tensor(), torch::Tensor()};
  }
};

}  // namespace

void check_routing(std::string_view loss, const RoutingTensors& routing, const LayoutTensors& layout,
                   bool needs_reference) {
  const torch::Tensor& logits = routing.logits_LTE;
  const torch::Tensor& selected = routing.selected_LTK;
  const auto require = [&](bool holds, std::string_view what, const std::string& got) {
    if (!holds) {
      throw std::invalid_argument(fmt::format("{}: {}, got {}", loss, what, got));
    }
  };
  require(logits.defined() && logits.dim() == 3, "logits must be [layers, tokens, experts]", shape_text(logits));
  require(logits.size(1) == layout.num_tokens(), fmt::format("logits must have {} tokens", layout.num_tokens()),
          shape_text(logits));
  require(logits.scalar_type() == torch::kFloat32 || logits.scalar_type() == torch::kFloat64,
          "logits must be float32 or float64", c10::toString(logits.scalar_type()));
  require(selected.defined() && selected.dim() == 3 && selected.size(0) == logits.size(0) &&
              selected.size(1) == logits.size(1) && selected.size(2) >= 1 && selected.size(2) <= logits.size(2),
          fmt::format("selected must be [layers, tokens, top-k] like logits {}", shape_text(logits)),
          shape_text(selected));
  require(selected.scalar_type() == torch::kInt64, "selected must be int64", c10::toString(selected.scalar_type()));
  require(logits.device() == layout.device() && selected.device() == layout.device(),
          "logits and selected must be on the device of the layout " + layout.device().str(),
          logits.device().str() + " and " + selected.device().str());
  if (needs_reference) {
    const torch::Tensor& reference = routing.reference_logits_LTE;
    require(reference.defined() && reference.sizes() == logits.sizes(),
            fmt::format("reference logits must be {}", shape_text(logits)), shape_text(reference));
    require(
        reference.scalar_type() == logits.scalar_type() && reference.device() == logits.device(),
        fmt::format("reference logits must be {} on {}", c10::toString(logits.scalar_type()), logits.device().str()),
        fmt::format("{} on {}", c10::toString(reference.scalar_type()), reference.device().str()));
  }
}

torch::Tensor zero_sum(const torch::Tensor& logits_LTE) {
  return logits_LTE.narrow(1, 0, 0).sum({1, 2});
}

bool wants_gradient(const torch::Tensor& logits_LTE) {
  return torch::GradMode::is_enabled() && logits_LTE.requires_grad();
}

torch::Tensor attach_gradient(const torch::Tensor& logits_LTE, const torch::Tensor& sum_L,
                              const torch::Tensor& gradient_LTE) {
  return wants_gradient(logits_LTE) ? AttachGradient::apply(logits_LTE, sum_L, gradient_LTE) : sum_L;
}

torch::Tensor scatter_counted(const torch::Tensor& rows_LNE, const LayoutTensors& layout) {
  if (layout.num_counted() == layout.num_tokens()) {
    return rows_LNE;
  }
  return torch::zeros({rows_LNE.size(0), layout.num_tokens(), rows_LNE.size(2)}, rows_LNE.options())
      .index_copy_(1, layout.counted_indices(), rows_LNE);
}

torch::Tensor logit_row(const torch::Tensor& logits_LTE, std::int64_t layer, std::int64_t token) {
  return logits_LTE[layer][token].to(torch::kFloat64);
}

torch::Tensor stack_layers(const std::vector<torch::Tensor>& sums, const torch::Tensor& logits_LTE) {
  return torch::stack(sums).to(logits_LTE.scalar_type());
}

}  // namespace hestia
