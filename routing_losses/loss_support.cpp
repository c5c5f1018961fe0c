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

torch::Tensor symmetric_kl_sum(const torch::Tensor& logits_LTE, const LayoutTensors& layout,
                               const std::vector<std::int64_t>& lags) {
  if (layout.num_pairs() == 0) {
    return zero_sum(logits_LTE);
  }
  torch::Tensor total;
  torch::Tensor gradient;
  const bool with_gradient = wants_gradient(logits_LTE);
  {
    const torch::NoGradGuard no_grad;
    const double scale = 0.5 / static_cast<double>(lags.size());
    // Rows of padding are computed along, and picked by no index below.
    const torch::Tensor log_p = torch::log_softmax(logits_LTE.detach(), -1);
    total = torch::zeros({log_p.size(0)}, log_p.options().dtype(torch::kFloat64));
    if (with_gradient) {
      gradient = torch::zeros(log_p.sizes(), log_p.options());
    }
    for (const std::int64_t lag : lags) {
      const torch::Tensor current = layout.lagged_indices(lag);
      if (current.numel() == 0) {
        continue;
      }
      const torch::Tensor earlier = current - lag;
      const torch::Tensor log_a = log_p.index_select(1, current);
      const torch::Tensor log_b = log_p.index_select(1, earlier);
      const torch::Tensor a = log_a.exp();
      const torch::Tensor b = log_b.exp();
      const torch::Tensor difference = a - b;
      const torch::Tensor log_ratio = log_a - log_b;
      // KL(a||b) + KL(b||a): no term is negative, so nothing cancels.
      total += (difference * log_ratio).sum({1, 2}, false, torch::kFloat64) * scale;
      if (with_gradient) {
        // By a_j: log_ratio_j + difference_j / a_j, and the like by b_j; through the softmax the quotient goes away.
        gradient.index_add_(1, current, (a * (log_ratio - (a * log_ratio).sum(-1, true)) + difference) * scale);
        gradient.index_add_(1, earlier, (b * ((b * log_ratio).sum(-1, true) - log_ratio) - difference) * scale);
      }
    }
    total = total.to(logits_LTE.scalar_type());
  }
  return attach_gradient(logits_LTE, total, gradient);
}

torch::Tensor window_sums(const torch::Tensor& rows_LNE, const WindowTensors& windows) {
  return torch::zeros({rows_LNE.size(0), windows.lengths.numel(), rows_LNE.size(2)}, rows_LNE.options())
      .index_add(1, windows.window_of_counted, rows_LNE);
}

torch::Tensor kl_divergence(const torch::Tensor& logits_a_E, const torch::Tensor& logits_b_E) {
  const torch::Tensor log_a = torch::log_softmax(logits_a_E, 0);
  const torch::Tensor log_b = torch::log_softmax(logits_b_E, 0);
  torch::Tensor total = torch::zeros({}, log_a.options());
  for (std::int64_t expert = 0; expert < log_a.numel(); ++expert) {
    total = total + log_a[expert].exp() * (log_a[expert] - log_b[expert]);
  }
  return total;
}

torch::Tensor logit_row(const torch::Tensor& logits_LTE, std::int64_t layer, std::int64_t token) {
  return logits_LTE[layer][token].to(torch::kFloat64);
}

torch::Tensor stack_layers(const std::vector<torch::Tensor>& sums, const torch::Tensor& logits_LTE) {
  return torch::stack(sums).to(logits_LTE.scalar_type());
}

}  // namespace hestia
