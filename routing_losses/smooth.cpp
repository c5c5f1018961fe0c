#include "loss_support.hpp"

namespace hestia {
namespace {

class Smooth final : public RoutingLoss {
 public:
  std::string_view name() const override { return "smooth"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    return symmetric_kl_sum(routing.logits_LTE, layout, {1});
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor total = torch::zeros({}, logits.options().dtype(torch::kFloat64));
      for (const SequenceRun& run : layout.runs()) {
        for (std::int64_t token = run.begin + 1; token < run.end; ++token) {
          if (!is_counted(layout, token)) {
            continue;
          }
          const torch::Tensor current = logit_row(logits, layer, token);
          const torch::Tensor previous = logit_row(logits, layer, token - 1);
          total = total + 0.5 * (kl_divergence(current, previous) + kl_divergence(previous, current));
        }
      }
      sums.push_back(total);
    }
    return layout.num_pairs() == 0 ? zero_sum(logits) : stack_layers(sums, logits);
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_smooth() {
  return std::make_shared<Smooth>();
}

}  // namespace hestia
