#include "loss_support.hpp"

namespace hestia {
namespace {

class Smooth final : public RoutingLoss {
 public:
  std::string_view name() const override { return "smooth"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    return symmetric_kl(rows, {1}, scale, gradient_LTE);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    return sum_over_pairs(routing, layout, [&](std::int64_t layer, std::int64_t token, std::int64_t /*first*/) {
      const torch::Tensor current = log_probability_row(routing.logits_LTE, layer, token);
      const torch::Tensor previous = log_probability_row(routing.logits_LTE, layer, token - 1);
      return 0.5 * (kl_divergence(current, previous) + kl_divergence(previous, current));
    });
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_smooth() {
  return std::make_shared<Smooth>();
}

}  // namespace hestia
