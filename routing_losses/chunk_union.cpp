#include "loss_support.hpp"

namespace hestia {
namespace {

constexpr double kEpsilon = 1e-5;

class ChunkUnion final : public RoutingLoss {
 public:
  explicit ChunkUnion(const ChunkUnionOptions& options) : options_(options) {}

  std::string_view name() const override { return "chunk_union"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    const WindowTensors& chunks = rows.layout().windows(options_.chunk);
    const torch::Tensor lengths = chunks.lengths.to(rows.options().dtype());
    const torch::Tensor idle = rows.window_sums(WindowQuantity::kLogIdle, kEpsilon, chunks).exp();
    if (gradient_LTE.defined()) {
      const torch::Tensor v = idle * lengths.unsqueeze(1) / static_cast<double>(rows.num_experts());
      rows.dispatch([&](auto real) {
        using Real = decltype(real);
        rows.add_gradient<Real>(PullTerm<Real>{.v = v.const_data_ptr<Real>(),
                                               .vector_of_token = chunks.window_of_token.const_data_ptr<std::int64_t>(),
                                               .num_vectors = lengths.numel(),
                                               .idle_epsilon = kEpsilon},
                                scale, gradient_LTE);
      });
    }
    return ((1.0 - idle.mean(-1)) * lengths).sum(1);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    return sum_over_windows(
        routing, layout, options_.chunk, [&](std::int64_t layer, const std::vector<std::int64_t>& tokens) {
          torch::Tensor idle;  // product over the chunk's tokens
          for (const std::int64_t token : tokens) {
            const torch::Tensor factor = 1.0 - probability_row(routing.logits_LTE, layer, token) + kEpsilon;
            idle = idle.defined() ? idle * factor : factor;
          }
          return static_cast<double>(tokens.size()) * (1.0 - idle.mean());
        });
  }

 private:
  ChunkUnionOptions options_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_chunk_union(const ChunkUnionOptions& options) {
  return std::make_shared<ChunkUnion>(options);
}

}  // namespace hestia
