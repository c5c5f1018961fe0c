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

class CacheSimulation final : public RoutingLoss {
 public:
  explicit CacheSimulation(CacheSimulationOptions options) : options_(std::move(options)) {}

  std::string_view name() const override { return "cache_simulation"; }
  double count(const LayoutTensors& layout) const override { return static_cast<double>(layout.num_counted()); }

  torch::Tensor accumulate(RoutingRows& rows, double scale, const torch::Tensor& gradient_LTE) const override {
    const SoftCacheShape shape = shape_of(rows.selected(), rows.num_experts());
    // The scan leaves rows of padding alone, and nothing below reads them.
    torch::Tensor buffer =
        torch::empty({rows.num_layers(), rows.layout().num_tokens(), rows.num_experts()}, rows.options());
    scan(shape, rows.selected(), rows.layout(), buffer);
    return rows.dispatch([&](auto real) {
      using Real = decltype(real);
      torch::Tensor sums =
          rows.sums<Real>(SoftCacheTerm<Real>{.cache = buffer.const_data_ptr<Real>(),
                                              .selected = rows.selected().const_data_ptr<std::int64_t>(),
                                              .top_k = rows.top_k(),
                                              .clamp = options_.clamp_at_one},
                          scale, gradient_LTE);
      if (options_.propagate_through_cache && gradient_LTE.defined()) {
        propagate<Real>(rows, shape, buffer, scale, gradient_LTE);
      }
      return sums;
    });
  }

  torch::Tensor reference_sum(const RoutingTensors& routing, const LayoutTensors& layout) const override {
    check_routing(*this, routing, layout);
    const double slots = static_cast<double>(options_.slots);
    const std::int64_t num_experts = routing.logits_LTE.size(2);
    return sum_over_runs(routing, layout, [&](std::int64_t layer, const SequenceRun& run) {
      const auto options = routing.logits_LTE.options().dtype(torch::kFloat64).requires_grad(false);
      torch::Tensor total = torch::zeros({}, options);
      torch::Tensor counts = torch::full(
          {num_experts}, options_.start == "empty" ? 0.0 : slots / static_cast<double>(num_experts), options);
      for (std::int64_t token = run.begin; token < run.end; ++token) {
        const torch::Tensor p = probability_row(routing.logits_LTE, layer, token);
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
      return total;
    });
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

  /// dF/ds of the surrogate s is the direct part, 1 - c, plus what s does to the later caches: with w = dF/dc, which is
  /// -r where a counted token uses c up to the clamp (at exactly 1 the unclamped side), that is the adjoint of the
  /// scan. `buffer` holds the cache and ends as the adjoint. Prompt tokens have gradient here.
  template <class Real>
  void propagate(RoutingRows& rows, const SoftCacheShape& shape, torch::Tensor& buffer, double scale,
                 const torch::Tensor& gradient_LTE) const {
    const RowLayout layout = rows.row_layout();
    const std::int64_t* const selected = rows.selected().const_data_ptr<std::int64_t>();
    Real* const data = buffer.data_ptr<Real>();
    if (rows.on_gpu()) {
      rows.on_stream([&](void* stream) {
        soft_cache_upstream_cuda(layout, selected, shape.top_k, options_.clamp_at_one, data, stream);
      });
    } else {
      soft_cache_upstream_cpu(layout, selected, shape.top_k, options_.clamp_at_one, data);
    }
    scan(shape, torch::Tensor(), rows.layout(), buffer);
    rows.add_gradient<Real>(PullTerm<Real>{.v = data, .num_vectors = shape.num_tokens, .every_token = true}, scale,
                            gradient_LTE);
  }

  CacheSimulationOptions options_;
};

}  // namespace

std::shared_ptr<const RoutingLoss> make_cache_simulation(const CacheSimulationOptions& options) {
  return std::make_shared<CacheSimulation>(options);
}

}  // namespace hestia
