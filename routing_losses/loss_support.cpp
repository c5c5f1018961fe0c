#include "loss_support.hpp"

#include <algorithm>
#include <stdexcept>

#include <fmt/format.h>
#include <torch/autograd.h>

namespace hestia {
namespace {

[[nodiscard]] std::string shape_text(const torch::Tensor& tensor) {
  return tensor.defined() ? c10::str(tensor.sizes()) : "undefined";
}

[[nodiscard]] bool wants_gradient(const torch::Tensor& logits_LTE) {
  return torch::GradMode::is_enabled() && logits_LTE.requires_grad();
}

/// A value [L], or a scalar, whose gradient by the logits is known: backward gives grad_output * gradient. First order
/// only.
class AttachGradient : public torch::autograd::Function<AttachGradient> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& /*logits_LTE*/,
                               const torch::Tensor& value, const torch::Tensor& gradient_LTE) {
    context->save_for_backward({gradient_LTE});
    return value.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& outputs) {
    const torch::Tensor gradient = context->get_saved_variables()[0] * outputs[0].view({-1, 1, 1});
    return {gradient, torch::Tensor(), torch::Tensor()};
  }
};

[[nodiscard]] torch::Tensor scalar_zero(const torch::Tensor& logits_LTE) {
  return torch::zeros({}, logits_LTE.options().dtype(torch::kFloat64).requires_grad(false));
}

/// Runs add(layer, total) for every layer and stacks the totals; they depend on the logits even where nothing was
/// added.
[[nodiscard]] torch::Tensor stack_layers(const torch::Tensor& logits_LTE,
                                         const std::function<void(std::int64_t, torch::Tensor&)>& add) {
  std::vector<torch::Tensor> sums;
  for (std::int64_t layer = 0; layer < logits_LTE.size(0); ++layer) {
    torch::Tensor total = scalar_zero(logits_LTE);
    add(layer, total);
    sums.push_back(total);
  }
  return torch::stack(sums).to(logits_LTE.scalar_type()) + zero_sum(logits_LTE);
}

}  // namespace

void check_routing(const RoutingLoss& loss, const RoutingTensors& routing, const LayoutTensors& layout) {
  const torch::Tensor& logits = routing.logits_LTE;
  const torch::Tensor& selected = routing.selected_LTK;
  const auto require = [&](bool holds, std::string_view what, const std::string& got) {
    if (!holds) {
      throw std::invalid_argument(fmt::format("{}: {}, got {}", loss.name(), what, got));
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
  const auto require_base = [&](const torch::Tensor& base, std::string_view which) {
    require(base.defined() && base.sizes() == logits.sizes(),
            fmt::format("{} logits must be {}", which, shape_text(logits)), shape_text(base));
    require(
        base.scalar_type() == logits.scalar_type() && base.device() == logits.device(),
        fmt::format("{} logits must be {} on {}", which, c10::toString(logits.scalar_type()), logits.device().str()),
        fmt::format("{} on {}", c10::toString(base.scalar_type()), base.device().str()));
  };
  if (loss.needs_reference()) {
    require_base(routing.reference_logits_LTE, "reference");
  }
  if (loss.needs_base_forward()) {
    require_base(routing.base_forward_logits_LTE, "base_forward");
  }
  if (selected.is_cpu() && layout.token_indices().numel() > 0) {
    const torch::Tensor served = selected.index_select(1, layout.token_indices());
    require(served.min().item<std::int64_t>() >= 0 && served.max().item<std::int64_t>() < logits.size(2),
            fmt::format("selected experts must be between 0 and {}", logits.size(2) - 1),
            fmt::format("{} to {}", served.min().item<std::int64_t>(), served.max().item<std::int64_t>()));
  }
}

torch::Tensor zero_sum(const torch::Tensor& logits_LTE) {
  return logits_LTE.narrow(1, 0, 0).sum({1, 2});
}

torch::Tensor RoutingLoss::sum(const RoutingTensors& routing, const LayoutTensors& layout) const {
  check_routing(*this, routing, layout);
  if (count(layout) == 0.0) {
    return zero_sum(routing.logits_LTE);
  }
  const bool differentiable = wants_gradient(routing.logits_LTE);
  torch::Tensor total;
  torch::Tensor gradient;
  {
    const torch::NoGradGuard no_grad;
    RoutingRows rows(routing, layout);
    if (differentiable) {
      gradient = torch::zeros(routing.logits_LTE.sizes(), rows.options());
    }
    total = accumulate(rows, 1.0, gradient);
  }
  return differentiable ? AttachGradient::apply(routing.logits_LTE, total, gradient) : total;
}

CombinedLoss combine(const std::vector<LossShare>& shares, const RoutingTensors& routing, const LayoutTensors& layout) {
  for (const LossShare& share : shares) {
    check_routing(*share.loss, routing, layout);
  }
  CombinedLoss result;
  const bool differentiable =
      wants_gradient(routing.logits_LTE) &&
      std::any_of(shares.begin(), shares.end(), [](const LossShare& share) { return share.scale != 0.0; });
  torch::Tensor gradient;
  torch::Tensor total;
  {
    const torch::NoGradGuard no_grad;
    RoutingRows rows(routing, layout);
    if (differentiable) {
      gradient = torch::zeros(routing.logits_LTE.sizes(), rows.options());
    }
    total = torch::zeros({}, rows.options());
    for (const LossShare& share : shares) {
      const torch::Tensor sum_L =
          share.loss->count(layout) == 0.0
              ? zero_sum(routing.logits_LTE)
              : share.loss->accumulate(rows, share.scale, share.scale != 0.0 ? gradient : torch::Tensor());
      result.sums_L.push_back(sum_L);
      total += sum_L.sum() * share.scale;
    }
  }
  result.total = differentiable ? AttachGradient::apply(routing.logits_LTE, total, gradient) : total;
  return result;
}

torch::Tensor symmetric_kl(RoutingRows& rows, const std::vector<std::int64_t>& lags, double scale,
                           const torch::Tensor& gradient_LTE) {
  torch::Tensor total;
  for (std::size_t first = 0; first < lags.size(); first += SymmetricKlTerm::kMaxLags) {
    SymmetricKlTerm term;
    term.num_lags = static_cast<int>(std::min<std::size_t>(SymmetricKlTerm::kMaxLags, lags.size() - first));
    std::copy_n(lags.begin() + static_cast<std::ptrdiff_t>(first), term.num_lags, std::begin(term.lags));
    term.share = 0.5 / static_cast<double>(lags.size());
    const torch::Tensor part = rows.dispatch([&](auto real) {
      using Real = decltype(real);
      return rows.sums<Real>(term, scale, gradient_LTE);
    });
    total = total.defined() ? total + part : part;
  }
  return total;
}

torch::Tensor sum_over_counted(const RoutingTensors& routing, const LayoutTensors& layout,
                               const std::function<torch::Tensor(std::int64_t, std::int64_t)>& term) {
  return stack_layers(routing.logits_LTE, [&](std::int64_t layer, torch::Tensor& total) {
    for (const SequenceRun& run : layout.runs()) {
      for (std::int64_t token = run.begin; token < run.end; ++token) {
        if (is_counted(layout, token)) {
          total = total + term(layer, token);
        }
      }
    }
  });
}

torch::Tensor sum_over_pairs(const RoutingTensors& routing, const LayoutTensors& layout,
                             const std::function<torch::Tensor(std::int64_t, std::int64_t, std::int64_t)>& term) {
  return stack_layers(routing.logits_LTE, [&](std::int64_t layer, torch::Tensor& total) {
    for (const SequenceRun& run : layout.runs()) {
      for (std::int64_t token = run.begin + 1; token < run.end; ++token) {
        if (is_counted(layout, token)) {
          total = total + term(layer, token, run.begin);
        }
      }
    }
  });
}

torch::Tensor sum_over_windows(
    const RoutingTensors& routing, const LayoutTensors& layout, std::int64_t size,
    const std::function<torch::Tensor(std::int64_t, const std::vector<std::int64_t>&)>& term) {
  return stack_layers(routing.logits_LTE, [&](std::int64_t layer, torch::Tensor& total) {
    std::vector<std::int64_t> window;
    const auto close = [&] {
      if (!window.empty()) {
        total = total + term(layer, window);
        window.clear();
      }
    };
    for (const SequenceRun& run : layout.runs()) {
      for (std::int64_t token = run.begin; token < run.end; ++token) {
        if (is_counted(layout, token)) {
          window.push_back(token);
          if (static_cast<std::int64_t>(window.size()) == size) {
            close();
          }
        }
      }
      close();
    }
  });
}

torch::Tensor sum_over_runs(const RoutingTensors& routing, const LayoutTensors& layout,
                            const std::function<torch::Tensor(std::int64_t, const SequenceRun&)>& term) {
  return stack_layers(routing.logits_LTE, [&](std::int64_t layer, torch::Tensor& total) {
    for (const SequenceRun& run : layout.runs()) {
      total = total + term(layer, run);
    }
  });
}

torch::Tensor logit_row(const torch::Tensor& logits_LTE, std::int64_t layer, std::int64_t token) {
  return logits_LTE[layer][token].to(torch::kFloat64);
}

torch::Tensor probability_row(const torch::Tensor& logits_LTE, std::int64_t layer, std::int64_t token) {
  return torch::softmax(logit_row(logits_LTE, layer, token), 0);
}

torch::Tensor log_probability_row(const torch::Tensor& logits_LTE, std::int64_t layer, std::int64_t token) {
  return torch::log_softmax(logit_row(logits_LTE, layer, token), 0);
}

torch::Tensor kl_divergence(const torch::Tensor& log_p_E, const torch::Tensor& log_q_E) {
  torch::Tensor total = torch::zeros({}, log_p_E.options());
  for (std::int64_t expert = 0; expert < log_p_E.numel(); ++expert) {
    total = total + log_p_E[expert].exp() * (log_p_E[expert] - log_q_E[expert]);
  }
  return total;
}

}  // namespace hestia
