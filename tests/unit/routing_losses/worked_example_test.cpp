// The example that docs/objectives.md works through by hand, with the numbers that stand there.
#include <map>
#include <set>

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
    options.lag.lags = {1, 2};
    options.working_set.window = 2;
    options.chunk_union.chunk = 2;
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

void check_row(const torch::Tensor& row, const std::vector<double>& expected, double margin) {
  for (std::int64_t expert = 0; expert < 4; ++expert) {
    CAPTURE(expert);
    CHECK(row[expert].item<double>() == Approx(expected[static_cast<std::size_t>(expert)]).margin(margin));
  }
}

}  // namespace

TEST_CASE("the worked example of docs/objectives.md: values") {
  Example example;
  CHECK(example.value("cache_simulation") == Approx(1.0).epsilon(1e-12));
  CHECK(example.value("rank_matching") == Approx(0.7).epsilon(1e-12));
  CHECK(example.value("reuse") == Approx(1.24653).margin(5e-6));
  CHECK(example.value("trust") == Approx(0.25686).margin(5e-6));
  CHECK(example.value("smooth") == Approx(0.30358).margin(5e-6));
  CHECK(example.value("lag") == Approx(0.22390).margin(5e-6));
  CHECK(example.value("working_set") == Approx(1.27611).margin(5e-6));
  CHECK(example.value("router_entropy") == Approx(1.22765).margin(5e-6));
  CHECK(example.value("temporal_dot") == Approx(0.74).epsilon(1e-12));
  CHECK(example.value("gate_consistency") == Approx(0.1375).epsilon(1e-12));
  CHECK(example.value("chunk_union") == Approx(0.42998).margin(5e-6));
  CHECK(example.value("load_balance") == Approx(1.325).epsilon(1e-12));
  CHECK(find_loss(example.options, "reuse", example.sizes)->count(example.layout) == 2.0);
  CHECK(find_loss(example.options, "trust", example.sizes)->count(example.layout) == 2.0);
  for (const std::string& name : routing_loss_names()) {
    CHECK(find_loss(example.options, name, example.sizes)->count(example.layout) == 2.0);
  }

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
      {"smooth", {-0.24690, 0.25394, -0.29988, 0.29285}},
      {"lag", {-0.12345, 0.12697, -0.14994, 0.14642}},
      {"working_set", {0.10794, -0.18374, 0.02685, 0.04894}},
      {"router_entropy", {0.11343, -0.23757, 0.11343, 0.01071}},
      {"temporal_dot", {0.002, -0.065, -0.003, 0.066}},
      {"gate_consistency", {-0.1, 0.15, -0.11, 0.06}},
      {"chunk_union", {0.009, -0.0175, -0.0035, 0.012}},
      {"load_balance", {-0.14, 0.3, -0.04, -0.12}}};
  // Terms of two tokens reach the prompt token as well.
  const std::map<std::string, std::vector<double>> at_prompt = {{"smooth", {0.34125, -0.24113, 0.07631, -0.17643}},
                                                                {"lag", {0.35155, -0.16915, -0.04368, -0.13872}},
                                                                {"temporal_dot", {0.056, -0.078, 0.028, -0.006}},
                                                                {"gate_consistency", {0.192, -0.156, 0.016, -0.052}}};
  const std::set<std::string> five_digits = {"trust", "smooth", "lag", "working_set", "router_entropy"};
  for (const auto& [name, expected] : at_second_token) {
    CAPTURE(name);
    const torch::Tensor gradient = example.gradient(name);
    const bool rounded = five_digits.count(name) > 0;
    // The 1e-8 inside the logarithm of reuse shows in the eighth digit.
    check_row(gradient[1], expected, rounded ? 5e-6 : 1e-7);
    const auto prompt = at_prompt.find(name);
    check_row(gradient[0], prompt == at_prompt.end() ? std::vector<double>(4, 0.0) : prompt->second,
              rounded ? 5e-6 : 1e-15);
  }
  CHECK(at_second_token.size() == routing_loss_names().size());
}
