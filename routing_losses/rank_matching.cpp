#include "loss_support.hpp"

namespace hestia {
namespace {

class RankMatching final : public RoutingLoss {
 public:
  explicit RankMatching(const RankMatchingOptions& options)
      : options_(options), base_forward_(options.reference == "base_forward") {}

  std::string_view name() const override { return "rank_matching"; }
  bool needs_reference() const override { return !base_forward_; }
  bool needs_base_forward() const override { return base_forward_; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    return rows.dispatch([&](auto real) {
      using Real = decltype(real);
      return rows.sums<Real>(
          RankHingeTerm<Real>{.base = (base_forward_ ? rows.base_forward() : rows.reference()).template rows<Real>(),
                              .margin = options_.margin,
                              .normalise = options_.normalise_pairs},
          scale, gradient_LTE);
    });
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    const torch::Tensor& base_logits = base_forward_ ? routing.base_forward_logits_LTE : routing.reference_logits_LTE;
    return sum_over_counted(routing, layout, [&](std::int64_t layer, std::int64_t token) {
      const torch::Tensor p = probability_row(routing.logits_LTE, layer, token);
      // In the type of the logits: which base probabilities are equal is decided there.
      const torch::Tensor base = torch::softmax(base_logits[layer][token], 0).detach();
      const torch::Tensor included = base.unsqueeze(1) > base.unsqueeze(0);
      const torch::Tensor hinge = torch::relu(options_.margin - (p.unsqueeze(1) - p.unsqueeze(0)));
      const torch::Tensor value = (hinge * included).sum();
      return options_.normalise_pairs ? value / included.sum().clamp_min(1) : value;
    });
  }

 private:
  RankMatchingOptions options_;
  bool base_forward_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_rank_matching(const RankMatchingOptions& options) {
  return std::make_shared<RankMatching>(options);
}

}  // namespace hestia
