#include <catch2/catch.hpp>

#include "loss_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

TEST_CASE("the registry: names, recipe keys and built losses come in one order") {
  RoutingLossOptions options;
  const std::vector<std::string> names = routing_loss_names();
  const std::vector<WeightedLoss> losses = make_routing_losses(options, 32, 4);
  const FieldList fields = options.fields();
  REQUIRE(names.size() == losses.size());
  REQUIRE(names.size() == fields.fields().size());
  for (std::size_t i = 0; i < names.size(); ++i) {
    CHECK(losses[i].loss->name() == names[i]);
    CHECK(fields.fields()[i].name == names[i]);
    CHECK(losses[i].weight == 0.0);
  }
  const std::vector<std::string> keys = field_keys(fields);
  for (const std::string key :
       {"cache_simulation.weight", "cache_simulation.slots", "cache_simulation.gamma", "cache_simulation.start",
        "cache_simulation.clamp_at_one", "cache_simulation.propagate_through_cache", "rank_matching.margin",
        "rank_matching.normalise_pairs", "reuse.ramp_steps", "trust.weight", "load_balance.weight"}) {
    CAPTURE(key);
    CHECK(std::count(keys.begin(), keys.end(), key) == 1);
  }
  CHECK(losses[1].loss->needs_reference());
  CHECK(losses[3].loss->needs_reference());
  CHECK_FALSE(losses[0].loss->needs_reference());
}

TEST_CASE("every option says what it is for, and numbers have bounds") {
  RoutingLossOptions options;
  const FieldList sections = options.fields();
  for (const Field& section : sections.fields()) {
    CHECK_FALSE(section.help.empty());
    for (const Field& field : std::get<std::shared_ptr<FieldList>>(section.target)->fields()) {
      CAPTURE(section.name, field.name);
      CHECK_FALSE(field.help.empty());
      if (std::holds_alternative<double*>(field.target) || std::holds_alternative<std::int64_t*>(field.target)) {
        CHECK(field.bounds.low == 0.0);
      }
      if (field.name == "start") {
        CHECK(field.choices == std::vector<std::string>{"uniform", "empty"});
      }
    }
  }
}

TEST_CASE("weights ramp linearly and then stay") {
  RoutingLossOptions options;
  options.reuse.weight = 0.5;
  options.reuse.ramp_steps = 400;
  options.trust.weight = 0.25;
  const std::vector<WeightedLoss> losses = make_routing_losses(options, 8, 2);
  CHECK(losses[2].weight_at(1) == Approx(0.5 / 400));
  CHECK(losses[2].weight_at(200) == Approx(0.25));
  CHECK(losses[2].weight_at(400) == 0.5);
  CHECK(losses[2].weight_at(9000) == 0.5);
  CHECK(losses[3].weight_at(1) == 0.25);
}

TEST_CASE("weight 0 is still built and still has a value") {
  const Sizes sizes;
  std::mt19937 random(51);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  RoutingLossOptions off;
  RoutingLossOptions on;
  on.cache_simulation.weight = on.rank_matching.weight = on.reuse.weight = 1.0;
  on.trust.weight = on.load_balance.weight = 2.0;
  const std::vector<WeightedLoss> silent = make_routing_losses(off, 7, 3);
  const std::vector<WeightedLoss> loud = make_routing_losses(on, 7, 3);
  for (std::size_t i = 0; i < silent.size(); ++i) {
    CHECK(silent[i].weight == 0.0);
    CHECK(loud[i].weight > 0.0);
    const torch::Tensor value = silent[i].loss->sum(routing, layout);
    CHECK(torch::equal(value, loud[i].loss->sum(routing, layout)));
    CHECK(value.abs().min().item<double>() > 0.0);
  }
}

TEST_CASE("0 slots mean a quarter of the experts, and never none") {
  std::mt19937 random(52);
  for (const std::int64_t num_experts : {3, 7, 16}) {
    const Sizes sizes{.num_layers = 1, .num_experts = num_experts, .top_k = 2};
    const LayoutTensors layout(usual_layout(), torch::kCPU);
    const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
    RoutingLossOptions by_default;
    RoutingLossOptions given;
    given.cache_simulation.slots = num_experts == 16 ? 4 : 1;
    CHECK(torch::equal(find_loss(by_default, "cache_simulation", sizes)->sum(routing, layout),
                       find_loss(given, "cache_simulation", sizes)->sum(routing, layout)));
  }
}

TEST_CASE("options that do not fit are refused with key, range and value") {
  RoutingLossOptions options;
  options.cache_simulation.slots = 40;
  CHECK_THROWS_AS(make_routing_losses(options, 32, 4), UsageError);
  CHECK_THROWS_WITH(make_routing_losses(options, 32, 4), Catch::Contains("losses.cache_simulation.slots") &&
                                                             Catch::Contains("32 experts") &&
                                                             Catch::Contains("got 40"));
  options.cache_simulation.slots = 32;
  CHECK_NOTHROW(make_routing_losses(options, 32, 4));
  options.cache_simulation.slots = -1;
  CHECK_THROWS_AS(make_routing_losses(options, 32, 4), UsageError);
  options = {};
  options.cache_simulation.gamma = 1.5;
  CHECK_THROWS_WITH(make_routing_losses(options, 32, 4),
                    Catch::Contains("cache_simulation.gamma") && Catch::Contains("got 1.5"));
  options = {};
  options.cache_simulation.start = "warm";
  CHECK_THROWS_WITH(make_routing_losses(options, 32, 4), Catch::Contains("uniform or empty, got \"warm\""));
  options = {};
  options.rank_matching.margin = -0.1;
  CHECK_THROWS_WITH(make_routing_losses(options, 32, 4), Catch::Contains("rank_matching.margin"));
  options = {};
  options.reuse.ramp_steps = -3;
  CHECK_THROWS_WITH(make_routing_losses(options, 32, 4), Catch::Contains("reuse.ramp_steps"));
  options = {};
  options.trust.weight = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_WITH(make_routing_losses(options, 32, 4), Catch::Contains("losses.trust.weight"));
  options = {};
  CHECK_THROWS_AS(make_routing_losses(options, 4, 5), std::invalid_argument);
}
