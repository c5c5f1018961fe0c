#include "loss_support.hpp"

namespace hestia {
namespace {

class RouterEntropy final : public RoutingLoss {
 public:
  std::string_view name() const override { return "router_entropy"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    return rows.dispatch([&](auto real) {
      using Real = decltype(real);
      return rows.sums<Real>(EntropyTerm{}, scale, gradient_LTE);
    });
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    return sum_over_counted(routing, layout, [&](std::int64_t layer, std::int64_t token) {
      const torch::Tensor log_p = log_probability_row(routing.logits_LTE, layer, token);
      return -(log_p.exp() * log_p).sum();
    });
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_router_entropy() {
  return std::make_shared<RouterEntropy>();
}

}  // namespace hestia
