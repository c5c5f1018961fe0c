// The example that docs/objectives.md works through by hand, with the numbers that stand there.
#include <map>

#include <catch2/catch.hpp>

#include "loss_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

// One layer, one sequence of a prompt token and two counted ones.
struct Example {
  Sizes sizes{.num_layers = 1, .num_experts = 4, .top_k = 2};
  LayoutTensors layout{layout_of({{3, 1}}), torch::kCPU};
  RoutingTensors routing;
  RoutingLossOptions options;
  Example() {
    routing.logits_LTE =
        rows({0.4, 0.3, 0.2, 0.1, 0.1, 0.5, 0.1, 0.3, 0.1, 0.35, 0.35, 0.2}).log().requires_grad_(true);
    routing.reference_logits_LTE = rows({0.4, 0.3, 0.2, 0.1, 0.4, 0.3, 0.2, 0.1, 0.3, 0.3, 0.3, 0.1}).log();
    routing.selected_LTK = torch::tensor({0, 1, 1, 3, 1, 2}, torch::kInt64).view({1, 3, 2});
    options.cache_simulation.slots = 2;
    options.cache_simulation.gamma = 0.5;
  }
  static torch::Tensor rows(const std::vector<double>& p) { return torch::tensor(p, torch::kFloat64).view({1, 3, 4}); }
  [[nodiscard]] double value(const std::string& name) const {
    const auto loss = find_loss(options, name, sizes);
    return loss->sum(routing, layout)[0].item<double>() / loss->count(layout);
  }
  // d sum / d z of all three tokens, [3, 4].
  [[nodiscard]] torch::Tensor gradient(const std::string& name) const {
    const auto loss = find_loss(options, name, sizes);
    return torch::autograd::grad({loss->sum(routing, layout)[0]}, {routing.logits_LTE})[0][0];
  }
};

}  // namespace

TEST_CASE("the worked example of docs/objectives.md: values") {
  Example example;
  CHECK(example.value("cache_simulation") == Approx(1.0).epsilon(1e-12));
  CHECK(example.value("rank_matching") == Approx(0.7).epsilon(1e-12));
  CHECK(example.value("reuse") == Approx(1.24653).margin(5e-6));
  CHECK(example.value("trust") == Approx(0.25686).margin(5e-6));
  CHECK(example.value("load_balance") == Approx(1.325).epsilon(1e-12));
  CHECK(find_loss(example.options, "reuse", example.sizes)->count(example.layout) == 2.0);
  CHECK(find_loss(example.options, "trust", example.sizes)->count(example.layout) == 2.0);

  example.options.rank_matching.normalise_pairs = true;
  CHECK(example.value("rank_matching") == Approx((1.2 / 6.0 + 0.2 / 3.0) / 2.0).epsilon(1e-12));

  // n = (1, 1, 0, 0) before t = 2 and (.5, 1.5, 0, 1), of mass 3, before t = 3.
  example.options.cache_simulation.start = "empty";
  CHECK(example.value("cache_simulation") == Approx((1.0 + 0.0 + 1.0) / 2.0).epsilon(1e-12));
  // One slot: n / 2 and n / 3.
  example.options.cache_simulation.slots = 1;
  CHECK(example.value("cache_simulation") == Approx((0.5 + 1.0 + 0.5 + 1.0) / 2.0).epsilon(1e-12));
  // Four slots never fill, so c = n; clamped, the 1.5 counts as 1.
  example.options.cache_simulation.slots = 4;
  CHECK(example.value("cache_simulation") == Approx((0.0 + 1.0 - 0.5 + 1.0) / 2.0).epsilon(1e-12));
  example.options.cache_simulation.clamp_at_one = true;
  CHECK(example.value("cache_simulation") == Approx((0.0 + 1.0 + 0.0 + 1.0) / 2.0).epsilon(1e-12));
}

TEST_CASE("the worked example of docs/objectives.md: gradients") {
  const Example example;
  const double s = 0.575;
  const std::map<std::string, std::vector<double>> at_second_token = {
      {"cache_simulation", {-0.8 / 30.0, -4.0 / 30.0, 1.2 / 30.0, 3.6 / 30.0}},
      {"rank_matching", {-0.38, 0.1, -0.08, 0.36}},
      {"reuse", {-0.04 / s, -0.2 / s, 0.06 / s, 0.18 / s}},
      {"trust", {-0.17633, 0.06689, -0.10702, 0.21647}},
      {"load_balance", {-0.14, 0.3, -0.04, -0.12}}};
  for (const auto& [name, expected] : at_second_token) {
    const torch::Tensor gradient = example.gradient(name);
    CHECK(gradient[0].abs().max().item<double>() == 0.0);  // the prompt token
    for (std::int64_t expert = 0; expert < 4; ++expert) {
      CAPTURE(name, expert);
      // The 1e-8 inside the logarithm of reuse shows in the eighth digit.
      const double margin = name == "trust" ? 5e-6 : 1e-7;
      CHECK(gradient[1][expert].item<double>() == Approx(expected[static_cast<std::size_t>(expert)]).margin(margin));
    }
  }
}
