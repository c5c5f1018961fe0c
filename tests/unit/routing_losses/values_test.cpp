#include <catch2/catch.hpp>

#include "loss_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

double mean_value(const RoutingLoss& loss, const RoutingTensors& routing, const LayoutTensors& layout) {
  return loss.sum(routing, layout).mean().item<double>() / loss.count(layout);
}

}  // namespace

TEST_CASE("a uniform router has the known values") {
  const Sizes sizes{.num_layers = 2, .num_experts = 64, .top_k = 8};
  std::mt19937 random(21);
  const LayoutTensors layout(layout_of({{9, 2}, {4, 0, true}, {5, 0}}), torch::kCPU);
  RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  routing.logits_LTE = torch::full_like(routing.logits_LTE.detach(), 0.37).requires_grad_(true);
  const torch::Tensor distinct_base = random_normal(random, {2, layout.num_tokens(), 64});
  RoutingLossOptions options;

  routing.reference_logits_LTE = distinct_base;
  CHECK(mean_value(*find_loss(options, "rank_matching", sizes), routing, layout) == Approx(0.1 * 64 * 63 / 2));
  CHECK(mean_value(*find_loss(options, "reuse", sizes), routing, layout) == Approx(std::log(64.0)).epsilon(1e-6));
  CHECK(mean_value(*find_loss(options, "load_balance", sizes), routing, layout) == Approx(1.0));
  options.rank_matching.normalise_pairs = true;
  CHECK(mean_value(*find_loss(options, "rank_matching", sizes), routing, layout) == Approx(0.1));

  // A base without any order has no pair to keep.
  routing.reference_logits_LTE = torch::full_like(distinct_base, -2.0);
  CHECK(mean_value(*find_loss(options, "rank_matching", sizes), routing, layout) == 0.0);
  CHECK(mean_value(*find_loss(options, "trust", sizes), routing, layout) == Approx(0.0).margin(1e-14));
  // First token of a sequence: a uniform cache holds C/E of every expert.
  const LayoutTensors one_token(layout_of({{17, 17}, {1, 0}}), torch::kCPU);
  const auto cache = find_loss(options, "cache_simulation", sizes);
  CHECK(mean_value(*cache, routing, one_token) == Approx(8.0 - 8.0 * 16.0 / 64.0));
}

TEST_CASE("trust is 0 at the reference and positive elsewhere") {
  const Sizes sizes;
  std::mt19937 random(22);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  const auto trust = find_loss({}, "trust", sizes);
  CHECK(trust->sum(routing, layout).min().item<double>() > 0.01);
  routing.reference_logits_LTE = routing.logits_LTE.detach() + 3.0;  // softmax ignores a common offset
  const torch::Tensor sum = trust->sum(routing, layout);
  CHECK(sum.abs().max().item<double>() < 1e-13);
  CHECK(gradient_of(sum, routing).abs().max().item<double>() < 1e-13);
}

TEST_CASE("the bounds of cache simulation and reuse hold and are reached") {
  std::mt19937 random(23);
  const Sizes sizes{.num_layers = 2, .num_experts = 9, .top_k = 3};
  for (int round = 0; round < 20; ++round) {
    const LayoutTensors layout(random_layout(random), torch::kCPU);
    if (layout.num_pairs() == 0) {
      continue;
    }
    const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
    for (const std::int64_t slots : {1, 4, 9}) {
      const torch::Tensor mean =
          cache_variant("uniform", false, false, sizes, 0.7, slots).loss->sum(routing, layout) / layout.num_counted();
      CHECK(mean.min().item<double>() >= 3.0 - static_cast<double>(slots) - 1e-12);
      CHECK(mean.max().item<double>() <= 3.0 + 1e-12);
    }
    const torch::Tensor reuse = find_loss({}, "reuse", sizes)->sum(routing, layout) / layout.num_pairs();
    CHECK(reuse.min().item<double>() >= std::log(3.0) - 1e-6);
  }
  // The same experts for ever, with all probability on them: both lower bounds.
  const LayoutTensors layout(layout_of({{400, 350}}), torch::kCPU);
  RoutingTensors routing = random_routing(random, sizes, 400);
  routing.selected_LTK = torch::tensor({1, 4, 8}, torch::kInt64).expand({2, 400, 3});
  const torch::Tensor favour = torch::full({2, 400, 9}, -60.0, torch::kFloat64);
  routing.logits_LTE = favour.scatter(2, routing.selected_LTK, 0.0).requires_grad_(true);
  CHECK(mean_value(*cache_variant("uniform", false, false, sizes, 0.7, 6).loss, routing, layout) ==
        Approx(3.0 - 6.0).epsilon(1e-12));
  CHECK(mean_value(*find_loss({}, "reuse", sizes), routing, layout) == Approx(std::log(3.0)).epsilon(1e-7));
}

TEST_CASE("without memory the cache is the previous token's set: K minus the overlap") {
  const Sizes sizes{.num_layers = 2, .num_experts = 8, .top_k = 3};
  std::mt19937 random(24);
  const LayoutTensors layout(layout_of({{40, 0}}), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, 40);
  const torch::Tensor sum = cache_variant("empty", false, false, sizes, 0.0, 8).loss->sum(routing, layout);
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    const torch::Tensor chosen = torch::zeros({40, 8}, torch::kFloat64).scatter_(1, routing.selected_LTK[layer], 1.0);
    const double overlap = (chosen.narrow(0, 1, 39) * chosen.narrow(0, 0, 39)).sum().item<double>();
    CHECK(sum[layer].item<double>() == Approx(40 * 3 - overlap));
  }
}

TEST_CASE("reuse takes its logarithm per sequence and weighs sequences by their pairs") {
  const Sizes sizes{.num_layers = 1, .num_experts = 4, .top_k = 1};
  const LayoutTensors layout(layout_of({{2, 0}, {4, 0}}), torch::kCPU);
  RoutingTensors routing;
  const std::vector<double> on_previous = {0.25, 0.5, 0.25, 0.1, 0.2, 0.3};
  torch::Tensor p = torch::empty({1, 6, 4}, torch::kFloat64);
  for (std::int64_t token = 0; token < 6; ++token) {
    const double kept = on_previous[static_cast<std::size_t>(token)];
    p[0][token].fill_((1.0 - kept) / 3.0);
    p[0][token][2] = kept;
  }
  routing.logits_LTE = p.log().requires_grad_(true);
  routing.selected_LTK = torch::full({1, 6, 1}, 2, torch::kInt64);
  const double expected = 1.0 * -std::log(0.5 + 1e-8) + 3.0 * -std::log(0.2 + 1e-8);
  const auto reuse = find_loss({}, "reuse", sizes);
  CHECK(reuse->sum(routing, layout)[0].item<double>() == Approx(expected).epsilon(1e-12));
  CHECK(reuse->count(layout) == 4.0);
}

TEST_CASE("nothing to count is 0 with zero gradient, never NaN") {
  const Sizes sizes;
  std::mt19937 random(25);
  const SequenceLayout one_token = layout_of({{1, 0}});
  for (const SequenceLayout& layout_data :
       {layout_of({{5, 0, true}}), layout_of({{4, 4}, {2, 0, true}}), one_token, SequenceLayout{}}) {
    const LayoutTensors layout(layout_data, torch::kCPU);
    const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
    for (const Variant& variant : every_variant(sizes)) {
      if (variant.loss->count(layout) > 0.0) {
        continue;
      }
      CAPTURE(variant.label, layout.num_tokens());
      const torch::Tensor sum = variant.loss->sum(routing, layout);
      REQUIRE(sum.sizes() == torch::IntArrayRef({2}));
      CHECK(sum.abs().max().item<double>() == 0.0);
      CHECK(variant.loss->reference_sum(routing, layout).abs().max().item<double>() == 0.0);
      const torch::Tensor gradient = gradient_of(sum, routing);
      REQUIRE(gradient.sizes() == routing.logits_LTE.sizes());
      CHECK((gradient == 0.0).all().item<bool>());
    }
  }
  const LayoutTensors layout(one_token, torch::kCPU);
  CHECK(find_loss({}, "reuse", sizes)->count(layout) == 0.0);
  CHECK(find_loss({}, "trust", sizes)->count(layout) == 1.0);
}

TEST_CASE("logits of 1e4 and one dominating expert stay finite and equal the reference") {
  const Sizes sizes;
  std::mt19937 random(26);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  for (const torch::ScalarType dtype : {torch::kFloat32, torch::kFloat64}) {
    RoutingTensors extreme = random_routing(random, sizes, layout.num_tokens());
    extreme.logits_LTE = extreme.logits_LTE.detach().sign() * 1e4;
    extreme.reference_logits_LTE = extreme.reference_logits_LTE.sign() * -1e4;
    RoutingTensors dominated = random_routing(random, sizes, layout.num_tokens());
    dominated.logits_LTE = dominated.logits_LTE.detach().clone();
    dominated.logits_LTE.select(2, 3).fill_(1e4);
    dominated.reference_logits_LTE.select(2, 5).fill_(1e4);
    for (const RoutingTensors& kind : {extreme, dominated}) {
      const RoutingTensors routing = converted(kind, dtype, torch::kCPU);
      for (const Variant& variant : every_variant(sizes)) {
        CAPTURE(variant.label, c10::toString(dtype));
        const torch::Tensor sum = variant.loss->sum(routing, layout);
        const torch::Tensor expected = variant.loss->reference_sum(routing, layout);
        CHECK(torch::isfinite(sum).all().item<bool>());
        CHECK(relative_difference(sum, expected) < (dtype == torch::kFloat32 ? 1e-5 : 1e-12));
        const torch::Tensor gradient = gradient_of(sum, routing);
        CHECK(torch::isfinite(gradient).all().item<bool>());
        CHECK(relative_difference(gradient, gradient_of(expected, routing)) <
              (dtype == torch::kFloat32 ? 1e-4 : 1e-12));
      }
    }
  }
}

TEST_CASE("with every expert chosen there is nothing left to choose") {
  const Sizes sizes{.num_layers = 2, .num_experts = 5, .top_k = 5};
  std::mt19937 random(27);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  CHECK(mean_value(*find_loss({}, "reuse", sizes), routing, layout) == Approx(std::log(5.0)).epsilon(1e-6));
  CHECK(mean_value(*find_loss({}, "load_balance", sizes), routing, layout) == Approx(1.0));
  const Variant cache = cache_variant("uniform", false, false, sizes, 0.9, 2);
  CHECK(mean_value(*cache.loss, routing, layout) == Approx(3.0));
  CHECK(gradient_of(cache.loss->sum(routing, layout), routing).abs().max().item<double>() < 1e-14);
}
