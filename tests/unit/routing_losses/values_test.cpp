#include <catch2/catch.hpp>

#include "loss_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

double mean_value(const RoutingLoss& loss, const RoutingTensors& routing, const LayoutTensors& layout) {
  return loss.sum(routing, layout).mean().item<double>() / loss.count(layout);
}

/// One layer whose tokens have the given probabilities; the first experts are served.
RoutingTensors routing_of(const std::vector<std::vector<double>>& p, std::int64_t top_k = 1) {
  const auto num_tokens = static_cast<std::int64_t>(p.size());
  const auto num_experts = static_cast<std::int64_t>(p.front().size());
  std::vector<double> flat;
  for (const std::vector<double>& row : p) {
    flat.insert(flat.end(), row.begin(), row.end());
  }
  RoutingTensors routing;
  routing.logits_LTE = torch::tensor(flat, torch::kFloat64).view({1, num_tokens, num_experts}).log();
  routing.reference_logits_LTE = routing.logits_LTE.clone();
  routing.selected_LTK = torch::arange(top_k).expand({1, num_tokens, top_k}).contiguous();
  routing.logits_LTE.requires_grad_(true);
  return routing;
}

double first_sum(const Variant& variant, const RoutingTensors& routing, const LayoutTensors& layout) {
  const double value = variant.loss->sum(routing, layout)[0].item<double>();
  CHECK(variant.loss->reference_sum(routing, layout)[0].item<double>() == Approx(value).epsilon(1e-12).margin(1e-14));
  return value;
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
  for (const char* name : {"smooth", "lag", "gate_consistency"}) {
    CHECK(mean_value(*find_loss(options, name, sizes), routing, layout) == 0.0);
  }
  for (const char* name : {"router_entropy", "working_set"}) {
    CHECK(mean_value(*find_loss(options, name, sizes), routing, layout) == Approx(std::log(64.0)));
  }
  CHECK(mean_value(*find_loss(options, "temporal_dot", sizes), routing, layout) == Approx(1.0 - 1.0 / 64.0));
  // Chunks of 7 and 5 tokens.
  const double idle = 1.0 - 1.0 / 64.0 + 1e-5;
  CHECK(mean_value(*find_loss(options, "chunk_union", sizes), routing, layout) ==
        Approx((7.0 * (1.0 - std::pow(idle, 7)) + 5.0 * (1.0 - std::pow(idle, 5))) / 12.0));
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

TEST_CASE("terms of two tokens, by hand") {
  // Two experts: SymKL((a, 1-a), (b, 1-b)) = (a - b) (log(a/b) - log((1-a)/(1-b))) / 2.
  const Sizes sizes{.num_layers = 1, .num_experts = 2, .top_k = 1};
  const RoutingTensors routing = routing_of({{0.5, 0.5}, {0.8, 0.2}, {0.2, 0.8}, {0.5, 0.5}});
  const LayoutTensors plain(layout_of({{4, 0}}), torch::kCPU);
  const double near = 0.5 * 0.3 * std::log(4.0);  // .5 and .8, or .5 and .2
  const double far = 0.5 * 0.6 * std::log(16.0);  // .8 and .2
  const Variant smooth{"smooth", find_loss({}, "smooth", sizes)};
  const Variant dot{"temporal_dot", find_loss({}, "temporal_dot", sizes)};
  const Variant square{"gate_consistency", find_loss({}, "gate_consistency", sizes)};
  CHECK(smooth.loss->count(plain) == 3.0);
  CHECK(first_sum(smooth, routing, plain) == Approx(2.0 * near + far));
  CHECK(first_sum(dot, routing, plain) == Approx(0.5 + 0.68 + 0.5));
  CHECK(first_sum(square, routing, plain) == Approx(0.18 + 0.72 + 0.18));
  // Lag 2: t = 3 against 1 and t = 4 against 2; lag 3: t = 4 against 1, which agree.
  CHECK(first_sum(lag_variant({2}, sizes), routing, plain) == Approx(2.0 * near));
  CHECK(first_sum(lag_variant({1, 2, 3}, sizes), routing, plain) == Approx((2.0 * near + far + 2.0 * near) / 3.0));
  CHECK(lag_variant({2}, sizes).loss->count(plain) == 3.0);  // pairs at distance 1, whatever the lags
  // The default reaches lags 1 and 2 only, and still divides by 5.
  CHECK(first_sum({"lag", find_loss({}, "lag", sizes)}, routing, plain) == Approx((4.0 * near + far) / 5.0));

  // A prompt of two: t-1 and t-2 may be prompt tokens, t may not.
  const LayoutTensors prompted(layout_of({{4, 2}}), torch::kCPU);
  CHECK(smooth.loss->count(prompted) == 2.0);
  CHECK(first_sum(smooth, routing, prompted) == Approx(far + near));
  CHECK(first_sum(lag_variant({2, 9}, sizes), routing, prompted) == Approx(near));
  // Two sequences: no pair across.
  const LayoutTensors split(layout_of({{2, 0}, {2, 0}}), torch::kCPU);
  CHECK(smooth.loss->count(split) == 2.0);
  CHECK(first_sum(smooth, routing, split) == Approx(2.0 * near));
  CHECK(first_sum(lag_variant({1, 2}, sizes), routing, split) == Approx(near));
  CHECK(first_sum(dot, routing, split) == Approx(1.0));
  CHECK(first_sum(square, routing, split) == Approx(0.36));
}

TEST_CASE("terms of windows, by hand") {
  const Sizes sizes{.num_layers = 1, .num_experts = 2, .top_k = 1};
  const RoutingTensors routing = routing_of({{0.5, 0.5}, {0.8, 0.2}, {0.2, 0.8}, {0.5, 0.5}, {0.9, 0.1}});
  const auto entropy = [](double a) { return -a * std::log(a) - (1.0 - a) * std::log(1.0 - a); };
  const auto idle = [](double a) { return 1.0 - a + 1e-5; };
  const LayoutTensors plain(layout_of({{5, 0}}), torch::kCPU);
  CHECK(first_sum({"router_entropy", find_loss({}, "router_entropy", sizes)}, routing, plain) ==
        Approx(2.0 * entropy(0.5) + 2.0 * entropy(0.8) + entropy(0.9)));
  // Windows of 2, 2 and 1 tokens with means .65, .35 and .9.
  CHECK(first_sum(window_variant(2, sizes), routing, plain) == Approx(4.0 * entropy(0.65) + entropy(0.9)));
  CHECK(first_sum(window_variant(3, sizes), routing, plain) == Approx(3.0 * entropy(0.5) + 2.0 * entropy(0.7)));
  CHECK(first_sum(window_variant(5, sizes), routing, plain) == Approx(5.0 * entropy(0.58)));
  CHECK(first_sum(window_variant(500, sizes), routing, plain) == Approx(5.0 * entropy(0.58)));
  CHECK(window_variant(500, sizes).loss->count(plain) == 5.0);
  // 1 - (products of both experts) / 2, by length.
  const double first = 1.0 - (idle(0.5) * idle(0.8) + idle(0.5) * idle(0.2)) / 2.0;
  const double last = 1.0 - (idle(0.9) + idle(0.1)) / 2.0;
  CHECK(first_sum(chunk_variant(2, sizes), routing, plain) == Approx(4.0 * first + last));
  const double all = 1.0 - (idle(0.5) * idle(0.8) * idle(0.2) * idle(0.5) * idle(0.9) +
                            idle(0.5) * idle(0.2) * idle(0.8) * idle(0.5) * idle(0.1)) /
                               2.0;
  CHECK(first_sum(chunk_variant(5, sizes), routing, plain) == Approx(5.0 * all));
  CHECK(first_sum({"chunk_union", find_loss({}, "chunk_union", sizes)}, routing, plain) == Approx(5.0 * all));

  // The first counted token begins the first window, wherever it stands; sequences do not share windows.
  const LayoutTensors prompted(layout_of({{3, 1}, {2, 0}}), torch::kCPU);
  CHECK(first_sum(window_variant(2, sizes), routing, prompted) == Approx(2.0 * entropy(0.5) + 2.0 * entropy(0.7)));
  CHECK(first_sum(window_variant(16, sizes), routing, prompted) == Approx(2.0 * entropy(0.5) + 2.0 * entropy(0.7)));
  CHECK(first_sum(chunk_variant(16, sizes), routing, prompted) ==
        Approx(2.0 * (1.0 - idle(0.8) * idle(0.2)) +
               2.0 * (1.0 - (idle(0.5) * idle(0.9) + idle(0.5) * idle(0.1)) / 2.0)));
}

TEST_CASE("a router that never changes pays nothing for it, and is moved by no term of two tokens") {
  const Sizes sizes{.num_layers = 2, .num_experts = 5, .top_k = 2};
  std::mt19937 random(28);
  const LayoutTensors layout(layout_of({{9, 2}, {20, 0}}), torch::kCPU);
  for (const torch::ScalarType dtype : {torch::kFloat32, torch::kFloat64}) {
    RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
    routing.logits_LTE = routing.logits_LTE.detach().narrow(1, 0, 1).expand_as(routing.logits_LTE).clone();
    routing = converted(routing, dtype, torch::kCPU);
    for (const char* name : {"smooth", "lag", "gate_consistency"}) {
      CAPTURE(name);
      const torch::Tensor sum = find_loss({}, name, sizes)->sum(routing, layout);
      CHECK((sum == 0.0).all().item<bool>());
      CHECK((gradient_of(sum, routing) == 0.0).all().item<bool>());
    }
    // Windows of equal tokens have the entropy of one.
    const double tolerance = dtype == torch::kFloat32 ? 1e-5 : 1e-12;
    const torch::Tensor entropy = find_loss({}, "router_entropy", sizes)->sum(routing, layout);
    for (const std::int64_t window : {1, 4, 100}) {
      const torch::Tensor set = window_variant(window, sizes).loss->sum(routing, layout);
      CHECK(relative_difference(set, entropy) < tolerance);
    }
  }
}

TEST_CASE("a lag no sequence reaches adds nothing, and its share stays in the divisor") {
  const Sizes sizes;
  std::mt19937 random(29);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  const Variant far = lag_variant({7, 50}, sizes);  // the longest sequence has 7 tokens
  const torch::Tensor sum = far.loss->sum(routing, layout);
  CHECK(far.loss->count(layout) == 12.0);
  CHECK((sum == 0.0).all().item<bool>());
  CHECK((gradient_of(sum, routing) == 0.0).all().item<bool>());
  CHECK((gradient_of(far.loss->reference_sum(routing, layout), routing) == 0.0).all().item<bool>());
  const torch::Tensor one = find_loss({}, "smooth", sizes)->sum(routing, layout);
  CHECK(torch::equal(lag_variant({1}, sizes).loss->sum(routing, layout), one));
  CHECK(relative_difference(lag_variant({1, 50, 60, 70}, sizes).loss->sum(routing, layout) * 4.0, one) < 1e-14);
}

TEST_CASE("a router that is sure to the last bit: values at the ends of the new terms, gradients finite") {
  // The expert with 1e4 changes with every token, or stays for ever.
  const Sizes sizes{.num_layers = 2, .num_experts = 4, .top_k = 1};
  std::mt19937 random(30);
  const LayoutTensors layout(layout_of({{2, 0, true}, {8, 0}}), torch::kCPU);
  for (const torch::ScalarType dtype : {torch::kFloat32, torch::kFloat64}) {
    for (const bool stays : {false, true}) {
      RoutingTensors routing = random_routing(random, sizes, 10);
      routing.selected_LTK = (torch::arange(10).view({1, 10, 1}) * (stays ? 0 : 1) % 4).expand({2, 10, 1}).contiguous();
      routing.logits_LTE =
          torch::full({2, 10, 4}, -1e4, torch::kFloat64).scatter(2, routing.selected_LTK, 1e4).contiguous();
      routing = converted(routing, dtype, torch::kCPU);
      CAPTURE(stays, c10::toString(dtype));
      const auto value = [&](const Variant& variant) {
        CAPTURE(variant.label);
        const torch::Tensor sum = variant.loss->sum(routing, layout);
        CHECK(torch::isfinite(gradient_of(sum, routing)).all().item<bool>());
        return sum[1].item<double>() / variant.loss->count(layout);
      };
      const auto named = [&](const char* name) { return value({name, find_loss({}, name, sizes)}); };
      CHECK(named("router_entropy") == 0.0);
      CHECK(named("smooth") == Approx(stays ? 0.0 : 2e4));
      // Of lags 1, 2, 4, 8 the expert is the same at 4, and 8 reaches nothing.
      CHECK(named("lag") == Approx(stays ? 0.0 : 2e4 * (7.0 + 6.0) / 5.0 / 7.0));
      CHECK(named("temporal_dot") == Approx(stays ? 0.0 : 1.0));
      CHECK(named("gate_consistency") == Approx(stays ? 0.0 : 2.0));
      CHECK(value(window_variant(1, sizes)) == 0.0);
      CHECK(value(window_variant(4, sizes)) == Approx(stays ? 0.0 : std::log(4.0)));
      // One expert of 4 in every chunk, or all four, up to the 1e-5.
      CHECK(value(chunk_variant(4, sizes)) == Approx(stays ? 0.25 : 1.0).margin(1e-4));
    }
  }
}

TEST_CASE("a single expert has nothing to choose") {
  const Sizes sizes{.num_layers = 2, .num_experts = 1, .top_k = 1};
  std::mt19937 random(20);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  for (const char* name : {"smooth", "lag", "working_set", "router_entropy", "temporal_dot", "gate_consistency"}) {
    CAPTURE(name);
    const torch::Tensor sum = find_loss({}, name, sizes)->sum(routing, layout);
    CHECK(sum.abs().max().item<double>() == 0.0);
    CHECK(gradient_of(sum, routing).abs().max().item<double>() == 0.0);
  }
  CHECK(mean_value(*find_loss({}, "chunk_union", sizes), routing, layout) == Approx(1.0).margin(1e-5));
}

TEST_CASE("rank matching against the base model's own forward reads those logits and no others") {
  std::mt19937 random(41);
  const Sizes sizes;
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  RoutingLossOptions options;
  const auto here = find_loss(options, "rank_matching", sizes);
  options.rank_matching.reference = "base_forward";
  const auto there = find_loss(options, "rank_matching", sizes);
  CHECK(here->needs_reference());
  CHECK_FALSE(here->needs_base_forward());
  CHECK_FALSE(there->needs_reference());
  CHECK(there->needs_base_forward());
  CHECK_THROWS_AS(there->sum(routing, layout), std::invalid_argument);

  RoutingTensors swapped = routing;
  swapped.base_forward_logits_LTE = routing.reference_logits_LTE;
  swapped.reference_logits_LTE = torch::Tensor();
  CHECK(torch::equal(there->sum(swapped, layout), here->sum(routing, layout)));
  CHECK(torch::equal(there->reference_sum(swapped, layout), here->reference_sum(routing, layout)));
  CHECK(torch::equal(gradient_of(there->sum(swapped, layout), swapped),
                     gradient_of(here->sum(routing, layout), routing)));
  CHECK_THROWS_AS(here->sum(swapped, layout), std::invalid_argument);
  options.rank_matching.reference = "elsewhere";
  CHECK_THROWS_WITH(find_loss(options, "rank_matching", sizes), Catch::Contains("current_hidden or base_forward"));
}
