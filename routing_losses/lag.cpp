#include "loss_support.hpp"

namespace hestia {
namespace {

class Lag final : public RoutingLoss {
 public:
  explicit Lag(LagOptions options) : options_(std::move(options)) {}

  std::string_view name() const override { return "lag"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    return symmetric_kl_sum(routing.logits_LTE, layout, options_.lags);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    const double share = 1.0 / static_cast<double>(options_.lags.size());
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor total = torch::zeros({}, logits.options().dtype(torch::kFloat64));
      for (const SequenceRun& run : layout.runs()) {
        for (std::int64_t token = run.begin + 1; token < run.end; ++token) {
          if (!is_counted(layout, token)) {
            continue;
          }
          const torch::Tensor current = logit_row(logits, layer, token);
          for (const std::int64_t lag : options_.lags) {
            if (token - lag >= run.begin) {
              const torch::Tensor earlier = logit_row(logits, layer, token - lag);
              total = total + share * 0.5 * (kl_divergence(current, earlier) + kl_divergence(earlier, current));
            }
          }
        }
      }
      // Depends on the logits even where every lag is absent.
      sums.push_back(total + zero_sum(logits)[layer]);
    }
    return layout.num_pairs() == 0 ? zero_sum(logits) : stack_layers(sums, logits);
  }

 private:
  LagOptions options_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_lag(const LagOptions& options) {
  return std::make_shared<Lag>(options);
}

}  // namespace hestia
