#include "loss_support.hpp"

namespace hestia {
namespace {

class WorkingSet final : public RoutingLoss {
 public:
  explicit WorkingSet(const WorkingSetOptions& options) : options_(options) {}

  std::string_view name() const override { return "working_set"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    if (layout.num_counted() == 0) {
      return zero_sum(logits);
    }
    const WindowTensors windows = layout.windows(options_.window);
    const torch::Tensor lengths = windows.lengths.to(logits.scalar_type());
    const torch::Tensor p = torch::softmax(logits.index_select(1, layout.counted_indices()), -1);
    const torch::Tensor mean = window_sums(p, windows) / lengths.unsqueeze(1);
    // A mean of 0 has p = 0 in every token of the window: whatever finite number stands for its logarithm is
    // multiplied by 0, in the gradient as well.
    const double smallest = logits.scalar_type() == torch::kFloat64 ? std::numeric_limits<double>::min()
                                                                    : std::numeric_limits<float>::min();
    const torch::Tensor entropy = -(mean * mean.clamp_min(smallest).log()).sum(-1);
    return (entropy * lengths).sum(1);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor total = torch::zeros({}, logits.options().dtype(torch::kFloat64));
      std::vector<torch::Tensor> window;  // log p of its tokens
      const auto close = [&] {
        if (!window.empty()) {
          // The logarithm of the mean without leaving logarithms.
          const torch::Tensor log_mean =
              torch::logsumexp(torch::stack(window), 0) - std::log(static_cast<double>(window.size()));
          total = total - static_cast<double>(window.size()) * (log_mean.exp() * log_mean).sum();
          window.clear();
        }
      };
      for (const SequenceRun& run : layout.runs()) {
        for (std::int64_t token = run.begin; token < run.end; ++token) {
          if (!is_counted(layout, token)) {
            continue;
          }
          window.push_back(torch::log_softmax(logit_row(logits, layer, token), 0));
          if (static_cast<std::int64_t>(window.size()) == options_.window) {
            close();
          }
        }
        close();
      }
      sums.push_back(total);
    }
    return layout.num_counted() == 0 ? zero_sum(logits) : stack_layers(sums, logits);
  }

 private:
  WorkingSetOptions options_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_working_set(const WorkingSetOptions& options) {
  return std::make_shared<WorkingSet>(options);
}

}  // namespace hestia
