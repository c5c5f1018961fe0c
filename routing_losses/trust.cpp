#include "loss_support.hpp"

namespace hestia {
namespace {

class Trust final : public RoutingLoss {
 public:
  std::string_view name() const override { return "trust"; }
  bool needs_reference() const override { return true; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    return rows.dispatch([&](auto real) {
      using Real = decltype(real);
      return rows.sums<Real>(DivergenceTerm<Real>{rows.reference().rows<Real>()}, scale, gradient_LTE);
    });
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    return sum_over_counted(routing, layout, [&](std::int64_t layer, std::int64_t token) {
      return kl_divergence(log_probability_row(routing.logits_LTE, layer, token),
                           log_probability_row(routing.reference_logits_LTE, layer, token).detach());
    });
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_trust() {
  return std::make_shared<Trust>();
}

}  // namespace hestia
