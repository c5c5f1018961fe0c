#include "loss_support.hpp"

namespace hestia {
namespace {

constexpr double kEpsilon = 1e-8;

class Reuse final : public RoutingLoss {
 public:
  std::string_view name() const override { return "reuse"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    const LayoutTensors& layout = rows.layout();
    return rows.dispatch([&](auto real) {
      using Real = decltype(real);
      ReuseTerm<Real> term{.selected = rows.selected().const_data_ptr<std::int64_t>(),
                           .top_k = rows.top_k(),
                           .run_of_token = layout.token_runs().const_data_ptr<std::int64_t>(),
                           .num_runs = layout.run_begins().numel()};
      const torch::Tensor reused = rows.run_sums(rows.values<Real>(term, 1.0, torch::Tensor()));
      // Runs without a pair: mean 0 of divisor 1, weighted by 0.
      const torch::Tensor pairs = layout.pairs_per_run().to(torch::kFloat64);
      const torch::Tensor mean = reused / pairs.clamp_min(1.0) + kEpsilon;
      if (gradient_LTE.defined()) {
        const torch::Tensor weight = (-1.0 / mean).to(rows.options().dtype());
        term.weight = weight.const_data_ptr<Real>();
        rows.add_gradient<Real>(term, scale, gradient_LTE);
      }
      return -(pairs * mean.log()).sum(1).to(rows.options().dtype());
    });
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    const std::int64_t top_k = routing.selected_LTK.size(2);
    return sum_over_runs(routing, layout, [&](std::int64_t layer, const SequenceRun& run) {
      torch::Tensor reused = torch::zeros({}, routing.logits_LTE.options().dtype(torch::kFloat64));
      std::int64_t pairs = 0;
      for (std::int64_t token = run.begin + 1; token < run.end; ++token) {
        if (!is_counted(layout, token)) {
          continue;
        }
        const torch::Tensor p = probability_row(routing.logits_LTE, layer, token);
        for (std::int64_t k = 0; k < top_k; ++k) {
          reused = reused + p[routing.selected_LTK[layer][token - 1][k].item<std::int64_t>()] / top_k;
        }
        ++pairs;
      }
      return pairs == 0 ? reused : -pairs * torch::log(reused / pairs + kEpsilon);
    });
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_reuse() {
  return std::make_shared<Reuse>();
}

}  // namespace hestia
