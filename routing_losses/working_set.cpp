#include "loss_support.hpp"

namespace hestia {
namespace {

class WorkingSet final : public RoutingLoss {
 public:
  explicit WorkingSet(const WorkingSetOptions& options) : options_(options) {}

  std::string_view name() const override { return "working_set"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    const WindowTensors& windows = rows.layout().windows(options_.window);
    const torch::Tensor lengths = windows.lengths.to(rows.options().dtype());
    const torch::Tensor mean = rows.window_sums(WindowQuantity::kProbability, 0.0, windows) / lengths.unsqueeze(1);
    // A mean of 0 has p = 0 in every token of the window: whatever finite number stands for its logarithm is
    // multiplied by 0, in the gradient as well.
    const double smallest =
        mean.scalar_type() == torch::kFloat64 ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
    const torch::Tensor log_mean = mean.clamp_min(smallest).log();
    if (gradient_LTE.defined()) {
      // d/dp of |b| H(mean) is -log mean - 1, and the softmax takes no notice of the 1.
      const torch::Tensor v = -log_mean;
      rows.dispatch([&](auto real) {
        using Real = decltype(real);
        rows.add_gradient<Real>(
            PullTerm<Real>{.v = v.const_data_ptr<Real>(),
                           .vector_of_token = windows.window_of_token.const_data_ptr<std::int64_t>(),
                           .num_vectors = lengths.numel()},
            scale, gradient_LTE);
      });
    }
    return -((mean * log_mean).sum(-1) * lengths).sum(1);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    return sum_over_windows(
        routing, layout, options_.window, [&](std::int64_t layer, const std::vector<std::int64_t>& tokens) {
          const double length = static_cast<double>(tokens.size());
          std::vector<torch::Tensor> log_p;
          log_p.reserve(tokens.size());
          for (const std::int64_t token : tokens) {
            log_p.push_back(log_probability_row(routing.logits_LTE, layer, token));
          }
          // The logarithm of the mean without leaving logarithms.
          const torch::Tensor log_mean = torch::logsumexp(torch::stack(log_p), 0) - std::log(length);
          return -length * (log_mean.exp() * log_mean).sum();
        });
  }

 private:
  WorkingSetOptions options_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_working_set(const WorkingSetOptions& options) {
  return std::make_shared<WorkingSet>(options);
}

}  // namespace hestia
