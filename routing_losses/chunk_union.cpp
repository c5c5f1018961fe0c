#include "loss_support.hpp"

namespace hestia {
namespace {

constexpr double kEpsilon = 1e-5;

class ChunkUnion final : public RoutingLoss {
 public:
  explicit ChunkUnion(const ChunkUnionOptions& options) : options_(options) {}

  std::string_view name() const override { return "chunk_union"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    if (layout.num_counted() == 0) {
      return zero_sum(logits);
    }
    const WindowTensors chunks = layout.windows(options_.chunk);
    const torch::Tensor p = torch::softmax(logits.index_select(1, layout.counted_indices()), -1);
    // log1p: in float32, 1 - p + 1e-5 would round a small p away, once per token of the chunk.
    const torch::Tensor idle = window_sums(torch::log1p(kEpsilon - p), chunks).exp();
    return ((1.0 - idle.mean(-1)) * chunks.lengths.to(logits.scalar_type())).sum(1);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor total = torch::zeros({}, logits.options().dtype(torch::kFloat64));
      torch::Tensor idle;  // product over the chunk's tokens so far
      std::int64_t length = 0;
      const auto close = [&] {
        if (length > 0) {
          total = total + static_cast<double>(length) * (1.0 - idle.mean());
          length = 0;
        }
      };
      for (const SequenceRun& run : layout.runs()) {
        for (std::int64_t token = run.begin; token < run.end; ++token) {
          if (!is_counted(layout, token)) {
            continue;
          }
          const torch::Tensor factor = 1.0 - torch::softmax(logit_row(logits, layer, token), 0) + kEpsilon;
          idle = length == 0 ? factor : idle * factor;
          if (++length == options_.chunk) {
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
  ChunkUnionOptions options_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_chunk_union(const ChunkUnionOptions& options) {
  return std::make_shared<ChunkUnion>(options);
}

}  // namespace hestia
