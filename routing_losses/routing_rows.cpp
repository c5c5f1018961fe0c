#include "routing_rows.hpp"

namespace hestia {

RoutingRows::RoutingRows(const RoutingTensors& routing, const LayoutTensors& layout)
    : routing_(routing), layout_(layout), selected_LTK_(routing.selected_LTK.contiguous()) {}

const SoftmaxTensors& RoutingRows::router() {
  if (!router_.logits_LTE.defined()) {
    router_ = softmax_of(routing_.logits_LTE);
  }
  return router_;
}

const SoftmaxTensors& RoutingRows::reference() {
  if (!reference_.logits_LTE.defined()) {
    reference_ = softmax_of(routing_.reference_logits_LTE);
  }
  return reference_;
}

const SoftmaxTensors& RoutingRows::base_forward() {
  if (!base_forward_.logits_LTE.defined()) {
    base_forward_ = softmax_of(routing_.base_forward_logits_LTE);
  }
  return base_forward_;
}

SoftmaxTensors RoutingRows::softmax_of(const torch::Tensor& logits_LTE) const {
  SoftmaxTensors result;
  result.logits_LTE = logits_LTE.detach().contiguous();
  if (!on_gpu()) {
    result.probabilities_LTE = torch::softmax(result.logits_LTE, -1);
    result.max_LT = result.logits_LTE.amax(-1);
    result.log_sum_LT = -result.probabilities_LTE.amax(-1).log();  // the largest logit's is exp(0) / sum
    return result;
  }
  result.max_LT = torch::empty({logits_LTE.size(0), logits_LTE.size(1)}, result.logits_LTE.options());
  result.log_sum_LT = torch::empty_like(result.max_LT);
  dispatch([&](auto real) {
    using Real = decltype(real);
    on_stream([&](void* stream) {
      softmax_rows_cuda(result.logits_LTE.const_data_ptr<Real>(), num_experts(), result.max_LT.numel(),
                        result.max_LT.data_ptr<Real>(), result.log_sum_LT.data_ptr<Real>(), stream);
    });
  });
  return result;
}

RowLayout RoutingRows::row_layout() const {
  return {num_layers(),
          layout_.num_tokens(),
          num_experts(),
          layout_.token_begins().const_data_ptr<std::int64_t>(),
          layout_.token_ends().const_data_ptr<std::int64_t>(),
          layout_.counted().const_data_ptr<std::uint8_t>()};
}

torch::Tensor RoutingRows::window_sums(WindowQuantity quantity, double epsilon, const WindowTensors& windows) {
  const std::int64_t num_windows = windows.begins.numel();
  torch::Tensor sums = torch::empty({num_layers(), num_windows, num_experts()}, options());
  const RowLayout rows_layout = row_layout();
  dispatch([&](auto real) {
    using Real = decltype(real);
    const SoftmaxRows<Real> rows = router().rows<Real>();
    const std::int64_t* const begins = windows.begins.const_data_ptr<std::int64_t>();
    const std::int64_t* const ends = windows.ends.const_data_ptr<std::int64_t>();
    Real* const data = sums.data_ptr<Real>();
    if (on_gpu()) {
      on_stream([&](void* stream) {
        window_sums_cuda(rows_layout, rows, quantity, epsilon, begins, ends, num_windows, data, stream);
      });
      return;
    }
    at::parallel_for(0, num_layers(), 1, [&](std::int64_t first, std::int64_t last) {
      window_sums_cpu(rows_layout, rows, quantity, epsilon, begins, ends, num_windows, data, first, last);
    });
  });
  return sums;
}

torch::Tensor RoutingRows::run_sums(const torch::Tensor& values_LT) const {
  const std::int64_t num_runs = layout_.run_begins().numel();
  torch::Tensor sums = torch::empty({num_layers(), num_runs}, values_LT.options());
  const double* const values = values_LT.const_data_ptr<double>();
  const std::int64_t* const begins = layout_.run_begins().const_data_ptr<std::int64_t>();
  const std::int64_t* const ends = layout_.run_ends().const_data_ptr<std::int64_t>();
  double* const data = sums.data_ptr<double>();
  if (on_gpu()) {
    on_stream([&](void* stream) {
      segment_sums_cuda(values, num_layers(), layout_.num_tokens(), begins, ends, num_runs, data, stream);
    });
  } else {
    segment_sums_cpu(values, num_layers(), layout_.num_tokens(), begins, ends, num_runs, data);
  }
  return sums;
}

}  // namespace hestia
