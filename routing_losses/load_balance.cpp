#include "loss_support.hpp"

namespace hestia {
namespace {

class LoadBalance final : public RoutingLoss {
 public:
  std::string_view name() const override { return "load_balance"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    if (layout.num_counted() == 0) {
      return zero_sum(logits);
    }
    const std::int64_t num_experts = logits.size(2);
    const torch::Tensor selected = routing.selected_LTK.index_select(1, layout.counted_indices());
    const torch::Tensor uses =
        torch::zeros({logits.size(0), num_experts}, logits.options())
            .scatter_add_(
                1, selected.flatten(1),
                torch::ones({1, 1}, logits.options()).expand({selected.size(0), selected.size(1) * selected.size(2)}));
    const torch::Tensor mean_p = torch::softmax(logits.index_select(1, layout.counted_indices()), -1).mean(1);
    // value * count with value = (E/K) sum_e (uses_e / count) P_e: the count cancels.
    return (uses * mean_p).sum(1) * (static_cast<double>(num_experts) / static_cast<double>(selected.size(2)));
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    if (layout.num_counted() == 0) {
      return zero_sum(logits);
    }
    const double num_counted = static_cast<double>(layout.num_counted());
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor f = torch::zeros({logits.size(2)}, logits.options().dtype(torch::kFloat64));
      torch::Tensor mean_p = torch::zeros_like(f);
      for (const SequenceRun& run : layout.runs()) {
        for (std::int64_t token = run.begin; token < run.end; ++token) {
          if (is_counted(layout, token)) {
            f = f + torch::zeros_like(f).scatter_(0, routing.selected_LTK[layer][token], 1.0) / num_counted;
            mean_p = mean_p + torch::softmax(logit_row(logits, layer, token), 0) / num_counted;
          }
        }
      }
      const double ratio = static_cast<double>(logits.size(2)) / static_cast<double>(routing.selected_LTK.size(2));
      sums.push_back(num_counted * ratio * (f * mean_p).sum());
    }
    return stack_layers(sums, logits);
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_load_balance() {
  return std::make_shared<LoadBalance>();
}

}  // namespace hestia
