#include <ATen/Parallel.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "hestia/kernels/soft_cache.hpp"
#include "loss_support.hpp"

namespace hestia {
namespace {

/// Runs the scan over all layers: `selected` given, buffer becomes the cache of every token; undefined, the adjoint.
template <class Real>
void scan(const SoftCacheShape& shape, const torch::Tensor& selected, const LayoutTensors& layout,
          torch::Tensor& buffer_LTE) {
  const std::int64_t* const chosen = selected.defined() ? selected.const_data_ptr<std::int64_t>() : nullptr;
  const std::int64_t* const begins = layout.run_begins().const_data_ptr<std::int64_t>();
  const std::int64_t* const ends = layout.run_ends().const_data_ptr<std::int64_t>();
  const std::int64_t num_runs = layout.run_begins().numel();
  Real* const buffer = buffer_LTE.data_ptr<Real>();
  if (buffer_LTE.is_cuda()) {
    const c10::cuda::CUDAGuard guard(buffer_LTE.device());
    cudaStream_t stream = c10::cuda::getCurrentCUDAStream(buffer_LTE.device().index()).stream();
    if (chosen != nullptr) {
      soft_cache_cuda(shape, chosen, begins, ends, num_runs, buffer, stream);
    } else {
      soft_cache_adjoint_cuda(shape, begins, ends, num_runs, buffer, stream);
    }
    return;
  }
  at::parallel_for(0, shape.num_layers, 1, [&](std::int64_t first, std::int64_t last) {
    SoftCacheShape part = shape;
    part.num_layers = last - first;
    Real* const part_buffer = buffer + first * shape.num_tokens * shape.num_experts;
    if (chosen != nullptr) {
      soft_cache_cpu(part, chosen + first * shape.num_tokens * shape.top_k, begins, ends, num_runs, part_buffer);
    } else {
      soft_cache_adjoint_cpu(part, begins, ends, num_runs, part_buffer);
    }
  });
}

void scan(const SoftCacheShape& shape, const torch::Tensor& selected, const LayoutTensors& layout,
          torch::Tensor& buffer_LTE) {
  if (buffer_LTE.scalar_type() == torch::kFloat64) {
    scan<double>(shape, selected, layout, buffer_LTE);
  } else {
    scan<float>(shape, selected, layout, buffer_LTE);
  }
}

/// d/dz of sum_i v_i p_i with v fixed: p_j (v_j - sum_i p_i v_i).
torch::Tensor through_softmax(const torch::Tensor& p, const torch::Tensor& v) {
  return p * (v - (p * v).sum(-1, true));
}

class CacheSimulation final : public RoutingLoss {
 public:
  explicit CacheSimulation(CacheSimulationOptions options) : options_(std::move(options)) {}

  std::string_view name() const override { return "cache_simulation"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    if (layout.num_counted() == 0) {
      return zero_sum(routing.logits_LTE);
    }
    torch::Tensor total;
    torch::Tensor gradient;
    const bool differentiable = wants_gradient(routing.logits_LTE);
    {
      const torch::NoGradGuard no_grad;
      const torch::Tensor logits = routing.logits_LTE.detach();
      const torch::Tensor selected = routing.selected_LTK.contiguous();
      const SoftCacheShape shape = shape_of(selected, logits.size(2));
      // Zeros, not empty: rows of padding are left alone by the scan and must not put stray NaNs into masked products.
      torch::Tensor cache = torch::zeros(logits.sizes(), logits.options());
      scan(shape, selected, layout, cache);
      const torch::Tensor counted_cache = cache.index_select(1, layout.counted_indices());
      const torch::Tensor seen = options_.clamp_at_one ? counted_cache.clamp_max(1.0) : counted_cache;
      const torch::Tensor counted_selected = selected.index_select(1, layout.counted_indices());
      total = (1.0 - seen.gather(2, counted_selected)).sum({1, 2}, false, torch::kFloat64).to(logits.scalar_type());
      if (differentiable) {
        gradient = options_.propagate_through_cache
                       ? propagated_gradient(shape, logits, counted_cache, seen, counted_selected, layout)
                       : direct_gradient(logits, seen, layout);
      }
    }
    return attach_gradient(routing.logits_LTE, total, gradient);
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(name(), routing, layout, false);
    const torch::Tensor& logits = routing.logits_LTE;
    const double slots = static_cast<double>(options_.slots);
    const std::int64_t num_experts = logits.size(2);
    std::vector<torch::Tensor> sums;
    for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
      torch::Tensor total = torch::zeros({}, logits.options().dtype(torch::kFloat64));
      for (const SequenceRun& run : layout.runs()) {
        torch::Tensor counts =
            torch::full({num_experts}, options_.start == "empty" ? 0.0 : slots / static_cast<double>(num_experts),
                        logits.options().dtype(torch::kFloat64));
        for (std::int64_t token = run.begin; token < run.end; ++token) {
          const torch::Tensor p = torch::softmax(logit_row(logits, layer, token), 0);
          const torch::Tensor r = torch::zeros_like(p.detach()).scatter_(0, routing.selected_LTK[layer][token], 1.0);
          const torch::Tensor surrogate = r + (p - p.detach());  // exactly r in value
          const torch::Tensor mass = counts.sum();
          const torch::Tensor cache =
              options_.start == "empty" ? counts / (mass / slots).clamp_min(1.0) : counts * slots / mass;
          if (is_counted(layout, token)) {
            total = total + (surrogate * (1.0 - (options_.clamp_at_one ? cache.clamp_max(1.0) : cache))).sum();
          }
          counts = options_.gamma * counts + (options_.propagate_through_cache ? surrogate : r);
        }
      }
      sums.push_back(total);
    }
    return layout.num_counted() == 0 ? zero_sum(logits) : stack_layers(sums, logits);
  }

 private:
  SoftCacheShape shape_of(const torch::Tensor& selected_LTK, std::int64_t num_experts) const {
    SoftCacheShape shape;
    shape.num_layers = selected_LTK.size(0);
    shape.num_tokens = selected_LTK.size(1);
    shape.num_experts = num_experts;
    shape.top_k = selected_LTK.size(2);
    shape.slots = static_cast<double>(options_.slots);
    shape.gamma = options_.gamma;
    shape.start = options_.start == "empty" ? SoftCacheStart::kEmpty : SoftCacheStart::kUniform;
    return shape;
  }

  static torch::Tensor direct_gradient(const torch::Tensor& logits, const torch::Tensor& seen,
                                       const LayoutTensors& layout) {
    const torch::Tensor p = torch::softmax(logits.index_select(1, layout.counted_indices()), -1);
    return scatter_counted(through_softmax(p, 1.0 - seen), layout);
  }

  /// dF/ds of the surrogate s is the direct part, 1 - c, plus what s does to the later caches: with w = dF/dc, which is
  /// -r where a counted token uses c up to the clamp (at exactly 1 the unclamped side), that is the adjoint of the
  /// scan.
  torch::Tensor propagated_gradient(const SoftCacheShape& shape, const torch::Tensor& logits,
                                    const torch::Tensor& counted_cache, const torch::Tensor& seen,
                                    const torch::Tensor& counted_selected, const LayoutTensors& layout) const {
    torch::Tensor upstream = torch::zeros_like(seen).scatter_(2, counted_selected, -1.0);
    if (options_.clamp_at_one) {
      upstream = upstream * (counted_cache <= 1.0);
    }
    torch::Tensor v = scatter_counted(upstream, layout).contiguous();
    scan(shape, torch::Tensor(), layout, v);
    v.index_add_(1, layout.counted_indices(), 1.0 - seen);
    // Prompt tokens have gradient here, padding has none and may hold anything.
    const torch::Tensor& indices = layout.token_indices();
    const torch::Tensor p = torch::softmax(logits.index_select(1, indices), -1);
    return torch::zeros_like(logits).index_copy_(1, indices, through_softmax(p, v.index_select(1, indices)));
  }

  CacheSimulationOptions options_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_cache_simulation(const CacheSimulationOptions& options) {
  return std::make_shared<CacheSimulation>(options);
}

}  // namespace hestia
