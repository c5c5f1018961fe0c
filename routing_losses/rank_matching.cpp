#include <ATen/Parallel.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "hestia/kernels/rank_hinge.hpp"
#include "loss_support.hpp"

namespace hestia {
namespace {

struct RankHinge {
  torch::Tensor value_N;      ///< float64
  torch::Tensor gradient_NE;  ///< In the type of p; undefined when not asked for.
};

template <class Real>
void fill_hinge(const torch::Tensor& p_NE, const torch::Tensor& base_NE, const RankMatchingOptions& options,
                RankHinge& result) {
  const std::int64_t num_tokens = p_NE.size(0);
  const std::int64_t num_experts = p_NE.size(1);
  const Real* const p = p_NE.const_data_ptr<Real>();
  const Real* const base = base_NE.const_data_ptr<Real>();
  double* const value = result.value_N.data_ptr<double>();
  Real* const gradient = result.gradient_NE.defined() ? result.gradient_NE.data_ptr<Real>() : nullptr;
  if (p_NE.is_cuda()) {
    const c10::cuda::CUDAGuard guard(p_NE.device());
    rank_hinge_cuda(p, base, num_tokens, num_experts, options.margin, options.normalise_pairs, value, gradient,
                    c10::cuda::getCurrentCUDAStream(p_NE.device().index()).stream());
    return;
  }
  at::parallel_for(0, num_tokens, 128, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t offset = first * num_experts;
    rank_hinge_cpu(p + offset, base + offset, last - first, num_experts, options.margin, options.normalise_pairs,
                   value + first, gradient == nullptr ? nullptr : gradient + offset);
  });
}

RankHinge rank_hinge(const torch::Tensor& p_NE, const torch::Tensor& base_NE, const RankMatchingOptions& options,
                     bool with_gradient) {
  RankHinge result;
  result.value_N = torch::empty({p_NE.size(0)}, p_NE.options().dtype(torch::kFloat64));
  if (with_gradient) {
    result.gradient_NE = torch::empty_like(p_NE);
  }
  if (p_NE.scalar_type() == torch::kFloat64) {
    fill_hinge<double>(p_NE, base_NE, options, result);
  } else {
    fill_hinge<float>(p_NE, base_NE, options, result);
  }
  return result;
}

class RankMatching final : public RoutingLoss {
 public:
  explicit RankMatching(const RankMatchingOptions& options)
      : options_(options), base_forward_(options.reference == "base_forward") {}

  std::string_view name() const override { return "rank_matching"; }
  bool needs_reference() const override { return !base_forward_; }
  bool needs_base_forward() const override { return base_forward_; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor sum(const RoutingTensors& given, const LayoutTensors& layout) const override {
    const RoutingTensors routing = with_reference(given);
    check_routing(name(), routing, layout, true);
    if (layout.num_counted() == 0) {
      return zero_sum(routing.logits_LTE);
    }
    const bool with_gradient = wants_gradient(routing.logits_LTE);
    torch::Tensor total;
    torch::Tensor gradient;
    {
      const torch::NoGradGuard no_grad;
      const torch::Tensor p = probabilities(routing.logits_LTE, layout);
      const torch::Tensor base = probabilities(routing.reference_logits_LTE, layout);
      const std::int64_t num_layers = routing.logits_LTE.size(0);
      const std::int64_t num_experts = p.size(1);
      const RankHinge hinge = rank_hinge(p, base, options_, with_gradient);
      total = hinge.value_N.view({num_layers, layout.num_counted()}).sum(1).to(p.scalar_type());
      if (with_gradient) {
        gradient = scatter_counted(hinge.gradient_NE.view({num_layers, layout.num_counted(), num_experts}), layout);
      }
    }
    return attach_gradient(routing.logits_LTE, total, gradient);
  }

  torch::Tensor reference_sum(const RoutingTensors& given, const LayoutTensors& layout) const override {
    const RoutingTensors routing = with_reference(given);
    check_routing(name(), routing, layout, true);
    const torch::Tensor& logits = routing.logits_LTE;
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor total = torch::zeros({}, logits.options().dtype(torch::kFloat64));
      for (const SequenceRun& run : layout.runs()) {
        for (std::int64_t token = run.begin; token < run.end; ++token) {
          if (!is_counted(layout, token)) {
            continue;
          }
          const torch::Tensor p = torch::softmax(logit_row(logits, layer, token), 0);
          // In the type of the logits: which base probabilities are equal is decided there.
          const torch::Tensor base = torch::softmax(routing.reference_logits_LTE[layer][token], 0).detach();
          const torch::Tensor included = base.unsqueeze(1) > base.unsqueeze(0);
          const torch::Tensor hinge = torch::relu(options_.margin - (p.unsqueeze(1) - p.unsqueeze(0)));
          const torch::Tensor value = (hinge * included).sum();
          total = total + (options_.normalise_pairs ? value / included.sum().clamp_min(1) : value);
        }
      }
      sums.push_back(total);
    }
    return layout.num_counted() == 0 ? zero_sum(logits) : stack_layers(sums, logits);
  }

 private:
  // The base logits of the chosen kind as the reference.
  RoutingTensors with_reference(const RoutingTensors& given) const {
    return {given.logits_LTE, given.selected_LTK,
            base_forward_ ? given.base_forward_logits_LTE : given.reference_logits_LTE};
  }

  static torch::Tensor probabilities(const torch::Tensor& logits_LTE, const LayoutTensors& layout) {
    const torch::Tensor counted = logits_LTE.detach().index_select(1, layout.counted_indices());
    return torch::softmax(counted, -1).flatten(0, 1).contiguous();
  }

  RankMatchingOptions options_;
  bool base_forward_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_rank_matching(const RankMatchingOptions& options) {
  return std::make_shared<RankMatching>(options);
}

}  // namespace hestia
