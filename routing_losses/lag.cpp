#include "loss_support.hpp"

namespace hestia {
namespace {

class Lag final : public RoutingLoss {
 public:
  explicit Lag(LagOptions options) : options_(std::move(options)) {}

  std::string_view name() const override { return "lag"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    return symmetric_kl(rows, options_.lags, scale, gradient_LTE);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    const double share = 1.0 / static_cast<double>(options_.lags.size());
    return sum_over_pairs(routing, layout, [&](std::int64_t layer, std::int64_t token, std::int64_t first) {
      const torch::Tensor current = log_probability_row(routing.logits_LTE, layer, token);
      torch::Tensor total = torch::zeros({}, current.options());
      for (const std::int64_t lag : options_.lags) {
        if (token - lag >= first) {
          const torch::Tensor earlier = log_probability_row(routing.logits_LTE, layer, token - lag);
          total = total + share * 0.5 * (kl_divergence(current, earlier) + kl_divergence(earlier, current));
        }
      }
      return total;
    });
  }

 private:
  LagOptions options_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_lag(const LagOptions& options) {
  return std::make_shared<Lag>(options);
}

}  // namespace hestia
