#include "loss_support.hpp"

namespace hestia {
namespace {

class RouterEntropy final : public RoutingLoss {
 public:
  std::string_view name() const override { return "router_entropy"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    if (layout.num_counted() == 0) {
      return zero_sum(routing.logits_LTE);
    }
    // Finite logarithms even where p underflows to 0, so 0 log 0 comes out as 0.
    const torch::Tensor log_p = torch::log_softmax(routing.logits_LTE.index_select(1, layout.counted_indices()), -1);
    return -(log_p.exp() * log_p).sum({1, 2});
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor total = torch::zeros({}, logits.options().dtype(torch::kFloat64));
      for (const SequenceRun& run : layout.runs()) {
        for (std::int64_t token = run.begin; token < run.end; ++token) {
          if (!is_counted(layout, token)) {
            continue;
          }
          const torch::Tensor log_p = torch::log_softmax(logit_row(logits, layer, token), 0);
          for (std::int64_t expert = 0; expert < logits.size(2); ++expert) {
            total = total - log_p[expert].exp() * log_p[expert];
          }
        }
      }
      sums.push_back(total);
    }
    return layout.num_counted() == 0 ? zero_sum(logits) : stack_layers(sums, logits);
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_router_entropy() {
  return std::make_shared<RouterEntropy>();
}

}  // namespace hestia
