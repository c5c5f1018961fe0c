#include "loss_support.hpp"

namespace hestia {
namespace {

class GateConsistency final : public RoutingLoss {
 public:
  std::string_view name() const override { return "gate_consistency"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    return rows.dispatch([&](auto real) {
      using Real = decltype(real);
      return rows.sums<Real>(NeighbourTerm{.squared = true}, scale, gradient_LTE);
    });
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    return sum_over_pairs(routing, layout, [&](std::int64_t layer, std::int64_t token, std::int64_t /*first*/) {
      const torch::Tensor difference =
          probability_row(routing.logits_LTE, layer, token) - probability_row(routing.logits_LTE, layer, token - 1);
      return difference.pow(2).sum();
    });
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_gate_consistency() {
  return std::make_shared<GateConsistency>();
}

}  // namespace hestia
