#include <catch2/catch.hpp>

#include "loss_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

using Function = std::function<double(const torch::Tensor& logits_LTE)>;

/// Central differences of `function`, one logit at a time.
torch::Tensor finite_differences(const Function& function, const torch::Tensor& logits_LTE) {
  constexpr double kStep = 1e-6;
  const torch::Tensor point = logits_LTE.detach().clone();
  torch::Tensor result = torch::empty_like(point);
  double* const z = point.data_ptr<double>();
  double* const slope = result.data_ptr<double>();
  for (std::int64_t i = 0; i < point.numel(); ++i) {
    const double centre = z[i];
    z[i] = centre + kStep;
    const double above = function(point);
    z[i] = centre - kStep;
    const double below = function(point);
    z[i] = centre;
    slope[i] = (above - below) / (2.0 * kStep);
  }
  return result;
}

double weighted(const torch::Tensor& sum_L) {
  return (sum_L * layer_weights(sum_L)).sum().item<double>();
}

struct CacheOptions {
  bool empty = false;
  bool clamp = false;
  bool propagate = false;
  double gamma = 0.8;
  double slots = 4.0;
};

/// The surrogate that objectives.md differentiates, in plain numbers: s = r_0 + p(z) - p(z_0) with r_0 fixed; the
/// recursion on r_0, or on s with `propagate`. `nearest_kink`, when given, becomes the least |c - 1| seen.
double cache_surrogate(const torch::Tensor& logits, const torch::Tensor& logits_0, const RoutingTensors& routing,
                       const LayoutTensors& layout, const CacheOptions& options, double* nearest_kink = nullptr) {
  const torch::Tensor moved = (torch::softmax(logits, -1) - torch::softmax(logits_0, -1)).contiguous();
  const std::int64_t num_experts = logits.size(2);
  const std::int64_t top_k = routing.selected_LTK.size(2);
  const auto moves = moved.accessor<double, 3>();
  const auto selected = routing.selected_LTK.accessor<std::int64_t, 3>();
  double total = 0.0;
  for (std::int64_t layer = 0; layer < logits.size(0); ++layer) {
    double sum = 0.0;
    for (const SequenceRun& run : layout.runs()) {
      const double start = options.empty ? 0.0 : options.slots / static_cast<double>(num_experts);
      std::vector<double> counts(static_cast<std::size_t>(num_experts), start);
      double mass = options.empty ? 0.0 : options.slots;
      for (std::int64_t token = run.begin; token < run.end; ++token) {
        const double scale = options.empty ? 1.0 / std::max(1.0, mass / options.slots) : options.slots / mass;
        for (std::int64_t e = 0; e < num_experts; ++e) {
          double r = 0.0;
          for (std::int64_t k = 0; k < top_k; ++k) {
            r += selected[layer][token][k] == e ? 1.0 : 0.0;
          }
          const double s = r + moves[layer][token][e];
          double& count = counts[static_cast<std::size_t>(e)];
          const double cache = count * scale;
          if (layout.layout().counted[static_cast<std::size_t>(token)] != 0) {
            sum += s * (1.0 - (options.clamp ? std::min(cache, 1.0) : cache));
            if (nearest_kink != nullptr) {
              *nearest_kink = std::min(*nearest_kink, std::abs(cache - 1.0));
            }
          }
          count = options.gamma * count + (options.propagate ? s : r);
        }
        mass = options.gamma * mass + static_cast<double>(top_k);
      }
    }
    total += sum * (0.75 * static_cast<double>(layer + 1) - 0.3);  // layer_weights
  }
  return total;
}

double rank_kink(const RoutingTensors& routing, double margin) {
  const torch::Tensor p = torch::softmax(routing.logits_LTE.detach(), -1);
  return (margin - (p.unsqueeze(-1) - p.unsqueeze(-2))).abs().min().item<double>();
}

}  // namespace

TEST_CASE("cache simulation: the gradient is that of the straight-through surrogate") {
  CacheOptions options;
  options.empty = GENERATE(false, true);
  options.clamp = GENERATE(false, true);
  options.propagate = GENERATE(false, true);
  const bool has_kinks = options.clamp && options.propagate;
  const Sizes sizes;
  std::mt19937 random(31);
  // The second token after an empty start meets entries of exactly 1, the kink of the clamp: keep it in the prompt.
  const LayoutTensors layout(
      has_kinks ? layout_of({{2, 0, true}, {7, 3}, {6, 2}, {1, 0, true}, {3, 3}, {8, 2}}) : usual_layout(),
      torch::kCPU);
  RoutingTensors routing;
  double kink = 0.0;
  for (int attempt = 0; kink < 1e-4; ++attempt) {
    REQUIRE(attempt < 50);
    routing = random_routing(random, sizes, layout.num_tokens());
    kink = 1.0;
    if (has_kinks) {
      const torch::Tensor logits = routing.logits_LTE.detach();
      static_cast<void>(cache_surrogate(logits, logits, routing, layout, options, &kink));
    }
  }
  const Variant variant =
      cache_variant(options.empty ? "empty" : "uniform", options.clamp, options.propagate, sizes, 0.8, 4);
  CAPTURE(variant.label);
  const torch::Tensor logits_0 = routing.logits_LTE.detach().clone();
  const torch::Tensor expected = finite_differences(
      [&](const torch::Tensor& logits) { return cache_surrogate(logits, logits_0, routing, layout, options); },
      logits_0);
  const torch::Tensor sum = variant.loss->sum(routing, layout);
  CHECK(weighted(sum.detach()) == Approx(cache_surrogate(logits_0, logits_0, routing, layout, options)).epsilon(1e-12));
  const torch::Tensor gradient = gradient_of(sum, routing);
  CHECK(expected.abs().max().item<double>() > 0.05);
  CHECK(relative_difference(gradient, expected) < 1e-8);
  // The options must matter here, or the case would prove nothing about them.
  CacheOptions other = options;
  other.propagate = !options.propagate;
  const torch::Tensor without =
      gradient_of(cache_variant(options.empty ? "empty" : "uniform", options.clamp, other.propagate, sizes, 0.8, 4)
                      .loss->sum(routing, layout),
                  routing);
  CHECK(relative_difference(gradient, without) > 1e-2);
  if (options.clamp) {
    const torch::Tensor unclamped =
        cache_variant(options.empty ? "empty" : "uniform", false, options.propagate, sizes, 0.8, 4)
            .loss->sum(routing, layout);
    CHECK(relative_difference(sum, unclamped) > 1e-3);
  }
}

TEST_CASE("every other objective: the gradient equals finite differences") {
  const Sizes sizes;
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  std::mt19937 random(32);
  RoutingTensors routing;
  double kink = 0.0;
  for (int attempt = 0; kink < 2e-5; ++attempt) {
    REQUIRE(attempt < 50);
    routing = random_routing(random, sizes, layout.num_tokens());
    kink = std::min(rank_kink(routing, 0.1), rank_kink(routing, 0.25));
  }
  for (const Variant& variant : every_variant(sizes)) {
    if (variant.loss->name() == "cache_simulation") {
      continue;
    }
    CAPTURE(variant.label);
    const auto function = [&](const torch::Tensor& logits) {
      RoutingTensors moved = routing;
      moved.logits_LTE = logits;
      return weighted(variant.loss->sum(moved, layout));
    };
    const torch::Tensor expected = finite_differences(function, routing.logits_LTE);
    CHECK(expected.abs().max().item<double>() > 0.01);
    CHECK(relative_difference(gradient_of(variant.loss->sum(routing, layout), routing), expected) < 2e-8);
  }
}

TEST_CASE("fast and plain-loop versions agree in value and gradient on random layouts") {
  std::mt19937 random(33);
  int with_padding = 0;
  for (int round = 0; round < 20; ++round) {
    Sizes sizes;
    sizes.num_layers = std::uniform_int_distribution<std::int64_t>(1, 3)(random);
    sizes.num_experts = std::uniform_int_distribution<std::int64_t>(2, 19)(random);
    sizes.top_k = std::uniform_int_distribution<std::int64_t>(1, sizes.num_experts)(random);
    const LayoutTensors layout(random_layout(random), torch::kCPU);
    with_padding += layout.token_indices().numel() < layout.num_tokens() ? 1 : 0;
    const RoutingTensors exact = random_routing(random, sizes, layout.num_tokens());
    for (const torch::ScalarType dtype : {torch::kFloat64, torch::kFloat32}) {
      const bool single = dtype == torch::kFloat32;
      const RoutingTensors routing = converted(exact, dtype, torch::kCPU);
      for (const Variant& variant : every_variant(sizes)) {
        CAPTURE(round, variant.label, single, sizes.num_experts, sizes.top_k, layout.num_tokens());
        const torch::Tensor fast = variant.loss->sum(routing, layout);
        const torch::Tensor plain = variant.loss->reference_sum(routing, layout);
        REQUIRE(fast.scalar_type() == dtype);
        REQUIRE(fast.sizes() == torch::IntArrayRef({sizes.num_layers}));
        CHECK(relative_difference(fast, plain) < (single ? 1e-5 : 1e-12));
        if (!plain.requires_grad()) {
          continue;
        }
        CHECK(relative_difference(gradient_of(fast, routing), gradient_of(plain, routing)) < (single ? 1e-4 : 1e-11));
      }
    }
  }
  CHECK(with_padding > 3);
}

TEST_CASE("without a gradient to compute the value is the same") {
  const Sizes sizes;
  std::mt19937 random(34);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    const torch::Tensor with_gradient = variant.loss->sum(routing, layout);
    REQUIRE(with_gradient.requires_grad());
    const torch::NoGradGuard no_grad;
    const torch::Tensor value = variant.loss->sum(routing, layout);
    CHECK_FALSE(value.requires_grad());
    CHECK(torch::equal(value, with_gradient));
  }
}

TEST_CASE("logits that are a view of something else are read as what they show") {
  const Sizes sizes;
  std::mt19937 random(35);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  RoutingTensors strided = routing;
  strided.logits_LTE = routing.logits_LTE.detach().permute({2, 0, 1}).contiguous().permute({1, 2, 0});
  strided.logits_LTE.requires_grad_(true);
  strided.selected_LTK = routing.selected_LTK.transpose(0, 2).contiguous().transpose(0, 2);
  strided.reference_logits_LTE = routing.reference_logits_LTE.transpose(1, 2).contiguous().transpose(1, 2);
  REQUIRE_FALSE(strided.logits_LTE.is_contiguous());
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    const torch::Tensor sum = variant.loss->sum(strided, layout);
    const torch::Tensor expected = variant.loss->sum(routing, layout);
    CHECK(relative_difference(sum, expected) < 1e-13);
    CHECK(relative_difference(gradient_of(sum, strided), gradient_of(expected, routing)) < 1e-13);
  }
}
