#pragma once

#include <ATen/Parallel.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "hestia/kernels/router_rows.hpp"
#include "hestia/routing_losses/routing_losses.hpp"

namespace hestia {

/// Logits with what their softmax needs; contiguous, without gradient.
struct SoftmaxTensors {
  torch::Tensor logits_LTE;
  torch::Tensor max_LT;
  torch::Tensor log_sum_LT;
  torch::Tensor probabilities_LTE;  ///< On the CPU, where exp is dear and memory is not; undefined on the GPU.

  template <class Real>
  [[nodiscard]] SoftmaxRows<Real> rows() const {
    return {logits_LTE.const_data_ptr<Real>(), max_LT.const_data_ptr<Real>(), log_sum_LT.const_data_ptr<Real>(),
            probabilities_LTE.defined() ? probabilities_LTE.const_data_ptr<Real>() : nullptr};
  }
};

/// The routing of a micro-batch as rows for kernels/router_rows.hpp: what all terms share is computed once, when first
/// asked for. Work goes to the device of the logits, on its current stream; on the CPU to all threads.
class RoutingRows {
 public:
  /// Borrows both; they must have passed check_routing.
  RoutingRows(const RoutingTensors& routing, const LayoutTensors& layout);

  [[nodiscard]] const LayoutTensors& layout() const noexcept { return layout_; }
  [[nodiscard]] const RoutingTensors& routing() const noexcept { return routing_; }
  [[nodiscard]] std::int64_t num_layers() const { return routing_.logits_LTE.size(0); }
  [[nodiscard]] std::int64_t num_experts() const { return routing_.logits_LTE.size(2); }
  [[nodiscard]] std::int64_t top_k() const { return selected_LTK_.size(2); }
  /// Of the type and device of the logits.
  [[nodiscard]] torch::TensorOptions options() const { return routing_.logits_LTE.options().requires_grad(false); }
  /// int64, contiguous.
  [[nodiscard]] const torch::Tensor& selected() const noexcept { return selected_LTK_; }
  [[nodiscard]] const SoftmaxTensors& router();
  [[nodiscard]] const SoftmaxTensors& reference();
  [[nodiscard]] const SoftmaxTensors& base_forward();

  /// Calls function(Real{}) with the type of the logits.
  template <class Function>
  auto dispatch(const Function& function) const {
    return routing_.logits_LTE.scalar_type() == torch::kFloat64 ? function(double{}) : function(float{});
  }
  /// Calls function(stream) with the logits' device as the current one.
  template <class Function>
  void on_stream(const Function& function) const {
    const c10::cuda::CUDAGuard guard(routing_.logits_LTE.device());
    function(static_cast<void*>(c10::cuda::getCurrentCUDAStream(routing_.logits_LTE.device().index()).stream()));
  }
  [[nodiscard]] bool on_gpu() const { return routing_.logits_LTE.is_cuda(); }

  /// Sums [L] of a term over all rows, in the type of the logits. Its gradient times `scale` is added to
  /// `gradient_LTE`, unless that is undefined.
  template <class Real, class Term>
  torch::Tensor sums(const Term& term, double scale, const torch::Tensor& gradient_LTE) {
    return values<Real>(term, scale, gradient_LTE).sum(1).to(options().dtype());
  }
  /// Values [L, T] in float64, and the gradient as above.
  template <class Real, class Term>
  torch::Tensor values(const Term& term, double scale, const torch::Tensor& gradient_LTE) {
    torch::Tensor value_LT = torch::empty({num_layers(), layout_.num_tokens()}, options().dtype(torch::kFloat64));
    run<Real>(term, {value_LT.data_ptr<double>(), gradient_data<Real>(gradient_LTE), scale});
    return value_LT;
  }
  /// The gradient alone.
  template <class Real, class Term>
  void add_gradient(const Term& term, double scale, const torch::Tensor& gradient_LTE) {
    run<Real>(term, {nullptr, gradient_data<Real>(gradient_LTE), scale});
  }
  /// Sums [L, W, E] over the counted tokens of each window, in the type of the logits.
  [[nodiscard]] torch::Tensor window_sums(WindowQuantity quantity, double epsilon, const WindowTensors& windows);
  /// Sums [L, R] of values_LT (float64) over each sequence.
  [[nodiscard]] torch::Tensor run_sums(const torch::Tensor& values_LT) const;
  [[nodiscard]] RowLayout row_layout() const;

 private:
  template <class Real>
  static Real* gradient_data(const torch::Tensor& gradient_LTE) {
    return gradient_LTE.defined() ? gradient_LTE.data_ptr<Real>() : nullptr;
  }
  template <class Real, class Term>
  void run(const Term& term, const RowResult<Real>& result) {
    const RowLayout rows_layout = row_layout();
    const SoftmaxRows<Real> rows = router().rows<Real>();
    if (on_gpu()) {
      on_stream([&](void* stream) { row_term_cuda(rows_layout, rows, term, result, stream); });
      return;
    }
    at::parallel_for(0, num_layers() * layout_.num_tokens(), 256, [&](std::int64_t first, std::int64_t last) {
      row_term_cpu(rows_layout, rows, term, result, first, last);
    });
  }
  [[nodiscard]] SoftmaxTensors softmax_of(const torch::Tensor& logits_LTE) const;

  const RoutingTensors& routing_;
  const LayoutTensors& layout_;
  torch::Tensor selected_LTK_;
  SoftmaxTensors router_;
  SoftmaxTensors reference_;
  SoftmaxTensors base_forward_;
};

}  // namespace hestia
