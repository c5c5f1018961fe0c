#include "hestia/model/residency_selector.hpp"

#include <cmath>
#include <stdexcept>
#include <utility>

#include <ATen/Parallel.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/kernels/residency_scan.hpp"

namespace hestia {

using torch::Tensor;

Tensor scope_evidence(const Tensor& logits_TE, const Tensor& weights_E, double offset) {
  const Tensor evidence_T = logits_TE.to(torch::kFloat64).matmul(weights_E) + offset;
  constexpr double kMost = ResidencyScope::kMostEvidence;
  const Tensor units_T = (evidence_T.clamp(-kMost, kMost) * ResidencyScope::kUnits).round();
  return torch::where(evidence_T.isfinite(), units_T, 0.0).to(torch::kInt64);
}

Tensor run_begin_of_tokens(const TokenBatch& batch) {
  const Tensor ids = batch.sequence_ids_BS.to(torch::kCPU).contiguous();
  const std::int64_t* const id = ids.const_data_ptr<std::int64_t>();
  Tensor begins = torch::empty({ids.numel()}, torch::kInt64);
  auto* const begin = begins.mutable_data_ptr<std::int64_t>();
  for (std::int64_t token = 0; token < ids.numel(); ++token) {
    begin[token] = token % ids.size(1) == 0 || id[token] != id[token - 1] ? token : begin[token - 1];
  }
  return begins;
}

Tensor windowed_mean(const Tensor& evidence_T, const Tensor& run_begin_T, std::int64_t window) {
  const Tensor token_T = torch::arange(evidence_T.size(0), run_begin_T.options());
  const Tensor first_T = torch::maximum(run_begin_T, token_T - (window - 1));
  const Tensor sums = torch::cat({evidence_T.new_zeros({1}), evidence_T.cumsum(0)});
  const Tensor sum_T = sums.narrow(0, 1, evidence_T.size(0)) - sums.index_select(0, first_T);
  return sum_T.to(torch::kFloat64) / (ResidencyScope::kUnits * (token_T - first_T + 1).to(torch::kFloat64));
}

/// Runs of one batch on its device: stretches of one sequence id within a row, padding included.
struct ResidencySelector::Layout {
  // What it was made from; held, so that no other tensor can be taken for it.
  Tensor sequence_ids_BS;
  Tensor given_counted_BS;
  std::int64_t ids_version = 0;
  std::int64_t counted_version = 0;

  Tensor run_begins;  ///< int64 [runs]
  Tensor run_ends;
  Tensor run_begin_T;  ///< int64, of each token's run
  Tensor strength_T;   ///< float32, 0 at prompt tokens and padding, else 1

  [[nodiscard]] bool is_of(const TokenBatch& batch) const {
    return sequence_ids_BS.is_same(batch.sequence_ids_BS) && ids_version == batch.sequence_ids_BS._version() &&
           given_counted_BS.is_same(batch.counted_BS) &&
           (!given_counted_BS.defined() || counted_version == given_counted_BS._version());
  }
};

ResidencySelector::ResidencySelector(ResidencyRule rule) {
  set_rule(std::move(rule));
}

void ResidencySelector::set_rule(ResidencyRule rule) {
  const auto refuse = [](const std::string& problem) { throw std::invalid_argument("residency rule: " + problem); };
  // Written so that NaN fails too.
  if (!(rule.lambda >= 0.0 && std::isfinite(rule.lambda))) {
    refuse(fmt::format("lambda must be at least 0 and finite, got {}", rule.lambda));
  }
  if (rule.always_keep < 0 || rule.slots < 1) {
    refuse(fmt::format("always_keep must be at least 0 and slots at least 1, got {} and {}", rule.always_keep,
                       rule.slots));
  }
  if (rule.policy != policy_name(CachePolicyKind::kLru)) {
    refuse(fmt::format("the policy must be lru, got \"{}\"", rule.policy));
  }
  for (const double factor : rule.layer_factors) {
    if (!(factor >= 0.0 && std::isfinite(factor))) {
      refuse(fmt::format("a layer's factor must be at least 0 and finite, got {}", factor));
    }
  }
  for (const float range : rule.logit_range) {
    if (!(range >= 0.0F && std::isfinite(range))) {
      refuse(fmt::format("a logit range must be at least 0 and finite, got {}", range));
    }
  }
  const ResidencyScope& scope = rule.scope;
  if (!scope.everywhere()) {
    if (!(scope.elsewhere >= 0.0 && scope.elsewhere <= 1.0) || scope.window < 1) {
      refuse(fmt::format("the scope's elsewhere must be from 0 to 1 and its window at least 1, got {} and {}",
                         scope.elsewhere, scope.window));
    }
    if (scope.weights.empty() || scope.weights.size() != scope.offsets.size()) {
      refuse(fmt::format("the scope must have weights and an offset for each MoE layer, got {} and {}",
                         scope.weights.size(), scope.offsets.size()));
    }
  }
  if (!(scope == rule_.scope)) {
    scope_weights_.clear();
  }
  rule_ = std::move(rule);
}

ResidencySelector::~ResidencySelector() = default;

const ResidencySelector::Layout& ResidencySelector::layout_of(const TokenBatch& batch) {
  if (layout_ && layout_->is_of(batch)) {
    return *layout_;
  }
  if (batch.counted_BS.defined() && batch.counted_BS.sizes() != batch.sequence_ids_BS.sizes()) {
    throw std::invalid_argument("residency selector: counted_BS must have the shape of the sequence ids");
  }
  auto layout = std::make_unique<Layout>();
  layout->sequence_ids_BS = batch.sequence_ids_BS;
  layout->given_counted_BS = batch.counted_BS;
  layout->ids_version = batch.sequence_ids_BS._version();
  layout->counted_version = batch.counted_BS.defined() ? batch.counted_BS._version() : 0;
  const Tensor begin_of = run_begin_of_tokens(batch);
  std::vector<std::int64_t> begins;
  std::vector<std::int64_t> ends;
  for (std::int64_t token = 0; token < begin_of.numel(); ++token) {
    if (begin_of.const_data_ptr<std::int64_t>()[token] == token) {
      begins.push_back(token);
      ends.push_back(token);
    }
    ends.back() = token + 1;
  }
  const torch::Device device = batch.sequence_ids_BS.device();
  layout->run_begin_T = begin_of.to(device);
  layout->run_begins = torch::tensor(begins, torch::kInt64).to(device);
  layout->run_ends = torch::tensor(ends, torch::kInt64).to(device);
  Tensor counted = batch.sequence_ids_BS.ge(0);
  if (batch.counted_BS.defined()) {
    counted = counted.logical_and(batch.counted_BS.ne(0));
  }
  layout->strength_T = counted.reshape({-1}).to(torch::kFloat32).contiguous();
  layout_ = std::move(layout);
  return *layout_;
}

Tensor ResidencySelector::strength_of(const Tensor& logits_TE, std::int64_t moe_layer, const Layout& layout) {
  const ResidencyScope& scope = rule_.scope;
  if (scope.everywhere()) {
    return layout.strength_T;
  }
  const auto index = static_cast<std::size_t>(moe_layer);
  if (scope_weights_.empty() || scope_weights_.front().device() != logits_TE.device()) {
    scope_weights_.clear();
    for (const std::vector<float>& weights : scope.weights) {
      scope_weights_.push_back(torch::tensor(weights, torch::kFloat64).to(logits_TE.device()));
    }
  }
  const Tensor& weights = scope_weights_.at(index);
  if (weights.size(0) != logits_TE.size(1)) {
    throw std::invalid_argument(fmt::format("residency selector: the scope is of {} experts, the layer has {}",
                                            weights.size(0), logits_TE.size(1)));
  }
  const Tensor mean =
      windowed_mean(scope_evidence(logits_TE, weights, scope.offsets.at(index)), layout.run_begin_T, scope.window);
  const Tensor outside = mean.lt(0.0);
  const Tensor counted = layout.strength_T.gt(0.0F);
  const Tensor seen = torch::stack({counted.logical_and(outside.logical_not()).sum(), counted.sum()});
  inside_ = inside_.defined() && inside_.device() == seen.device() ? inside_ + seen : seen;
  return layout.strength_T * torch::where(outside, scope.elsewhere, 1.0).to(torch::kFloat32);
}

std::optional<double> ResidencySelector::take_scope_share() {
  const Tensor seen = std::exchange(inside_, Tensor());
  if (!seen.defined()) {
    return std::nullopt;
  }
  const Tensor on_host = seen.to(torch::kCPU);
  const std::int64_t* const tokens = on_host.const_data_ptr<std::int64_t>();
  return tokens[1] == 0 ? std::nullopt
                        : std::optional<double>(static_cast<double>(tokens[0]) / static_cast<double>(tokens[1]));
}

Tensor ResidencySelector::select(const Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                 const TokenBatch& batch) {
  const torch::NoGradGuard no_grad;
  const Tensor logits = logits_TE.detach().to(torch::kFloat32).contiguous();
  if (logits.dim() != 2 || logits.size(0) != batch.sequence_ids_BS.numel() || top_k < 1 || top_k > logits.size(1)) {
    throw std::invalid_argument(
        fmt::format("residency selector: logits must be [tokens of the batch, experts] with K from 1 to the experts, "
                    "got {} dimensions and K {}",
                    logits.dim(), top_k));
  }
  const ResidencyShape shape{.num_tokens = logits.size(0),
                             .num_experts = logits.size(1),
                             .top_k = top_k,
                             .always_keep = rule_.always_keep,
                             .slots = rule_.slots,
                             .bonus = rule_.bonus(moe_layer),
                             .score = rule_.score};
  const Layout& layout = layout_of(batch);
  Tensor selected = torch::empty({shape.num_tokens, top_k}, logits.options().dtype(torch::kInt64));
  const float* const z = logits.const_data_ptr<float>();
  const Tensor strength_T = strength_of(logits, moe_layer, layout);
  const float* const strength = strength_T.const_data_ptr<float>();
  const std::int64_t* const begins = layout.run_begins.const_data_ptr<std::int64_t>();
  const std::int64_t* const ends = layout.run_ends.const_data_ptr<std::int64_t>();
  const std::int64_t num_runs = layout.run_begins.numel();
  auto* const out = selected.mutable_data_ptr<std::int64_t>();
  if (logits.is_cuda()) {
    const c10::cuda::CUDAGuard guard(logits.device());
    const Tensor workspace = torch::empty({static_cast<std::int64_t>(residency_scan_workspace(shape))},
                                          logits.options().dtype(torch::kUInt8));
    residency_scan_cuda(shape, z, strength, begins, ends, num_runs, out, workspace.data_ptr(),
                        c10::cuda::getCurrentCUDAStream(logits.device().index()).stream());
  } else {
    at::parallel_for(0, num_runs, 1, [&](std::int64_t first, std::int64_t last) {
      residency_scan_cpu(shape, z, strength, begins + first, ends + first, last - first, out);
    });
  }
  return selected;
}

}  // namespace hestia
