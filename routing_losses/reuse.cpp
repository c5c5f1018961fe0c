#include "loss_support.hpp"

namespace hestia {
namespace {

constexpr double kEpsilon = 1e-8;

class Reuse final : public RoutingLoss {
 public:
  std::string_view name() const override { return "reuse"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_pairs()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    if (layout.num_pairs() == 0) {
      return zero_sum(logits);
    }
    const std::int64_t top_k = routing.selected_LTK.size(2);
    const torch::Tensor p = torch::softmax(logits.index_select(1, layout.pair_indices()), -1);
    const torch::Tensor previous = routing.selected_LTK.index_select(1, layout.pair_indices() - 1);
    const torch::Tensor reused = p.gather(2, previous).sum(-1) / top_k;  // [L, pairs]
    const torch::Tensor total = torch::zeros({logits.size(0), layout.run_begins().numel()}, logits.options())
                                    .index_add(1, layout.pair_runs(), reused);
    // Runs without a pair: mean 0 of divisor 1, weighted by 0.
    const torch::Tensor pairs = layout.pairs_per_run().to(logits.scalar_type());
    const torch::Tensor mean = total / pairs.clamp_min(1.0);
    return -(pairs * torch::log(mean + kEpsilon)).sum(1);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    const std::int64_t top_k = routing.selected_LTK.size(2);
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor total = torch::zeros({}, logits.options().dtype(torch::kFloat64));
      for (const SequenceRun& run : layout.runs()) {
        torch::Tensor reused = torch::zeros({}, total.options());
        std::int64_t pairs = 0;
        for (std::int64_t token = run.begin + 1; token < run.end; ++token) {
          if (!is_counted(layout, token)) {
            continue;
          }
          const torch::Tensor p = torch::softmax(logit_row(logits, layer, token), 0);
          for (std::int64_t k = 0; k < top_k; ++k) {
            reused = reused + p[routing.selected_LTK[layer][token - 1][k].item<std::int64_t>()] / top_k;
          }
          ++pairs;
        }
        if (pairs > 0) {
          total = total - pairs * torch::log(reused / pairs + kEpsilon);
        }
      }
      sums.push_back(total);
    }
    return layout.num_pairs() == 0 ? zero_sum(logits) : stack_layers(sums, logits);
  }
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_reuse() {
  return std::make_shared<Reuse>();
}

}  // namespace hestia
