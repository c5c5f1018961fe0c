#include "loss_support.hpp"

namespace hestia {
namespace {

class LoadBalance final : public RoutingLoss {
 public:
  std::string_view name() const override { return "load_balance"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    const torch::Tensor& counted = rows.layout().counted_indices();
    const torch::Tensor selected = rows.selected().index_select(1, counted).flatten(1);
    const double ratio = static_cast<double>(rows.num_experts()) / static_cast<double>(rows.top_k());
    // sum = value * count with value = (E/K) sum_e (uses_e / count) P_e: a constant times p, summed over tokens.
    const torch::Tensor v = torch::zeros({rows.num_layers(), rows.num_experts()}, rows.options())
                                .scatter_add_(1, selected, torch::ones({1, 1}, rows.options()).expand(selected.sizes()))
                                .mul_(ratio / static_cast<double>(counted.numel()));
    return rows.dispatch([&](auto real) {
      using Real = decltype(real);
      return rows.sums<Real>(PullTerm<Real>{.v = v.const_data_ptr<Real>(), .num_vectors = 1}, scale, gradient_LTE);
    });
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    const double num_counted = static_cast<double>(layout.num_counted());
    const double ratio =
        static_cast<double>(routing.logits_LTE.size(2)) / static_cast<double>(routing.selected_LTK.size(2));
    std::vector<torch::Tensor> f(static_cast<std::size_t>(routing.logits_LTE.size(0)));
    for (std::size_t layer = 0; layer < f.size(); ++layer) {
      f[layer] = torch::zeros({routing.logits_LTE.size(2)}, routing.logits_LTE.options().dtype(torch::kFloat64));
      for (const SequenceRun& run : layout.runs()) {
        for (std::int64_t token = run.begin; token < run.end; ++token) {
          if (is_counted(layout, token)) {
            const torch::Tensor served = routing.selected_LTK[static_cast<std::int64_t>(layer)][token];
            f[layer] = f[layer] + torch::zeros_like(f[layer]).scatter_(0, served, 1.0) / num_counted;
          }
        }
      }
    }
    return sum_over_counted(routing, layout, [&](std::int64_t layer, std::int64_t token) {
      return ratio * (f[static_cast<std::size_t>(layer)] * probability_row(routing.logits_LTE, layer, token)).sum();
    });
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_load_balance() {
  return std::make_shared<LoadBalance>();
}

}  // namespace hestia
