#include "loss_support.hpp"

namespace hestia {
namespace {

class TemporalDot final : public RoutingLoss {
 public:
  std::string_view name() const override { return "temporal_dot"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    return rows.dispatch([&](auto real) {
      using Real = decltype(real);
      return rows.sums<Real>(NeighbourTerm{}, scale, gradient_LTE);
    });
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    return sum_over_pairs(routing, layout, [&](std::int64_t layer, std::int64_t token, std::int64_t /*first*/) {
      return 1.0 - probability_row(routing.logits_LTE, layer, token)
                       .dot(probability_row(routing.logits_LTE, layer, token - 1));
    });
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_temporal_dot() {
  return std::make_shared<TemporalDot>();
}

}  // namespace hestia
