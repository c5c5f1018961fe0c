#include "loss_support.hpp"

namespace hestia {
namespace {

class TemporalDot final : public RoutingLoss {
 public:
  std::string_view name() const override { return "temporal_dot"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    if (layout.num_pairs() == 0) {
      return zero_sum(logits);
    }
    // Rows are picked before the softmax, so that no row of padding is in the graph.
    const torch::Tensor p = torch::softmax(logits.index_select(1, layout.pair_indices()), -1);
    const torch::Tensor previous = torch::softmax(logits.index_select(1, layout.pair_indices() - 1), -1);
    return (1.0 - (p * previous).sum(-1)).sum(1);
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
          const torch::Tensor p = torch::softmax(logit_row(logits, layer, token), 0);
          const torch::Tensor previous = torch::softmax(logit_row(logits, layer, token - 1), 0);
          total = total + 1.0 - p.dot(previous);
        }
      }
      sums.push_back(total);
    }
    return layout.num_pairs() == 0 ? zero_sum(logits) : stack_layers(sums, logits);
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_temporal_dot() {
  return std::make_shared<TemporalDot>();
}

}  // namespace hestia
