#include <map>

#include <catch2/catch.hpp>

#include "hestia/core/files.hpp"
#include "loss_fixtures.hpp"
#include "temporary_folder.hpp"

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
  for (const std::string key : {"cache_simulation.weight",
                                "cache_simulation.slots",
                                "cache_simulation.gamma",
                                "cache_simulation.start",
                                "cache_simulation.clamp_at_one",
                                "cache_simulation.propagate_through_cache",
                                "rank_matching.margin",
                                "rank_matching.normalise_pairs",
                                "reuse.ramp_steps",
                                "trust.weight",
                                "smooth.ramp_steps",
                                "lag.ramp_steps",
                                "lag.lags",
                                "working_set.ramp_steps",
                                "working_set.window",
                                "router_entropy.weight",
                                "temporal_dot.weight",
                                "gate_consistency.weight",
                                "chunk_union.chunk",
                                "load_balance.weight"}) {
    CAPTURE(key);
    CHECK(std::count(keys.begin(), keys.end(), key) == 1);
  }
  CHECK(losses[1].loss->needs_reference());
  CHECK(losses[3].loss->needs_reference());
  for (std::size_t i = 0; i < names.size(); ++i) {
    CHECK(losses[i].loss->needs_reference() == (names[i] == "rank_matching" || names[i] == "trust"));
    CHECK(std::count(keys.begin(), keys.end(), names[i] + ".weight") == 1);
  }
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
        const bool is_size = field.name == "window" || field.name == "chunk";
        CHECK(field.bounds.low == (is_size ? 1.0 : 0.0));
      }
      if (field.name == "lags") {
        CHECK(field.bounds.low == 1.0);
      }
      if (field.name == "start") {
        CHECK(field.choices == std::vector<std::string>{"uniform", "empty"});
      }
    }
  }
}

TEST_CASE("all weights are set at once, and nothing else") {
  RoutingLossOptions options;
  options.lag.lags = {3};
  options.smooth.ramp_steps = 7;
  options.set_all_weights(0.25);
  for (const WeightedLoss& weighted : make_routing_losses(options, 8, 2)) {
    CAPTURE(weighted.loss->name());
    CHECK(weighted.weight == 0.25);
    CHECK(weighted.ramp_steps == (weighted.loss->name() == "smooth" ? 7 : 0));
  }
  CHECK(options.lag.lags == std::vector<std::int64_t>{3});
  RoutingLossOptions copy = options;
  copy.set_all_weights(0.0);
  CHECK(copy.chunk_union.weight == 0.0);
  CHECK(options.chunk_union.weight == 0.25);
}

TEST_CASE("a recipe's section of objectives reads back as it was saved") {
  RoutingLossOptions options;
  options.set_all_weights(0.125);
  options.lag = {.weight = 0.05, .ramp_steps = 800, .lags = {1, 3, 32}};
  options.working_set = {.weight = 0.01, .ramp_steps = 800, .window = 24};
  options.smooth.ramp_steps = 800;
  options.chunk_union.chunk = 32;
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "losses.yaml";
  const std::string saved = save_recipe(options.fields());
  CHECK_THAT(saved, Catch::Contains("lags: [1, 3, 32]"));
  write_text_atomically(path, saved);
  RoutingLossOptions read;
  Problems problems;
  static_cast<void>(read_recipe(path, {}, read.fields(), problems));
  CHECK_NOTHROW(problems.throw_usage_if_any());
  CHECK(save_recipe(read.fields()) == saved);
  CHECK(read.lag.lags == options.lag.lags);
  CHECK(read.working_set.window == 24);
  static_cast<void>(
      read_recipe(path, {"lag.lags=[0, 2]", "working_set.window=0", "chunk_union.chunk=0"}, read.fields(), problems));
  CHECK_THROWS_WITH(problems.throw_usage_if_any(), Catch::Contains("lag.lags") &&
                                                       Catch::Contains("working_set.window") &&
                                                       Catch::Contains("chunk_union.chunk"));
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

  options = {};
  options.smooth = {.weight = 0.05, .ramp_steps = 100};
  options.lag.weight = 0.04;
  options.lag.ramp_steps = 200;
  options.working_set.weight = 0.01;
  options.working_set.ramp_steps = 800;
  std::map<std::string, double> at_50;
  for (const WeightedLoss& weighted : make_routing_losses(options, 8, 2)) {
    at_50[std::string(weighted.loss->name())] = weighted.weight_at(50);
  }
  CHECK(at_50.at("smooth") == Approx(0.025));
  CHECK(at_50.at("lag") == Approx(0.01));
  CHECK(at_50.at("working_set") == Approx(0.01 / 16));
}

TEST_CASE("weight 0 is still built and still has a value") {
  const Sizes sizes;
  std::mt19937 random(51);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  RoutingLossOptions off;
  RoutingLossOptions on;
  on.set_all_weights(2.0);
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
  for (const std::vector<std::int64_t>& lags : std::vector<std::vector<std::int64_t>>{{}, {0, 1}, {2, 2}, {1, 4, 3}}) {
    options = {};
    options.lag.lags = lags;
    CHECK_THROWS_AS(make_routing_losses(options, 32, 4), UsageError);
  }
  CHECK_THROWS_WITH(
      make_routing_losses(options, 32, 4),
      Catch::Contains("losses.lag.lags: must be a strictly increasing list") && Catch::Contains("got [1, 4, 3]"));
  options = {};
  options.working_set.window = 0;
  CHECK_THROWS_WITH(make_routing_losses(options, 32, 4),
                    Catch::Contains("losses.working_set.window: must be at least 1, got 0"));
  options = {};
  options.chunk_union.chunk = -64;
  CHECK_THROWS_WITH(make_routing_losses(options, 32, 4),
                    Catch::Contains("losses.chunk_union.chunk: must be at least 1, got -64"));
  for (const std::string name : {"smooth", "lag", "working_set"}) {
    options = {};
    (name == "smooth" ? options.smooth.ramp_steps
     : name == "lag"  ? options.lag.ramp_steps
                      : options.working_set.ramp_steps) = -1;
    CHECK_THROWS_WITH(make_routing_losses(options, 32, 4), Catch::Contains("losses." + name + ".ramp_steps"));
  }
  for (const std::string& name : routing_loss_names()) {
    options = {};
    const FieldList sections = options.fields();
    for (const Field& section : sections.fields()) {
      if (section.name == name) {
        *std::get<double*>(std::get<std::shared_ptr<FieldList>>(section.target)->fields().front().target) = -0.5;
      }
    }
    CHECK_THROWS_WITH(make_routing_losses(options, 32, 4),
                      Catch::Contains("losses." + name + ".weight") && Catch::Contains("got -0.5"));
  }
  options = {};
  CHECK_THROWS_AS(make_routing_losses(options, 4, 5), std::invalid_argument);
}

TEST_CASE("combined: one gradient for several losses is the weighted sum of theirs") {
  const Sizes sizes;
  std::mt19937 random(91);
  for (const SequenceLayout& packed : {usual_layout(), layout_of({{5, 5}}), layout_of({{3, 0, true}})}) {
    const LayoutTensors layout(packed, torch::kCPU);
    const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
    const std::vector<Variant> variants = every_variant(sizes);
    std::vector<LossShare> shares;
    torch::Tensor expected = torch::zeros({}, torch::kFloat64);
    for (std::size_t i = 0; i < variants.size(); ++i) {
      const double scale = i % 3 == 1 ? 0.0 : 0.1 * static_cast<double>(i + 1);
      shares.push_back({variants[i].loss.get(), scale});
      expected = expected + scale * variants[i].loss->sum(routing, layout).sum();
    }
    const CombinedLoss combined = combine(shares, routing, layout);
    REQUIRE(combined.sums_L.size() == variants.size());
    for (std::size_t i = 0; i < variants.size(); ++i) {
      CAPTURE(variants[i].label);
      CHECK_FALSE(combined.sums_L[i].requires_grad());
      CHECK(torch::equal(combined.sums_L[i], variants[i].loss->sum(routing, layout)));
    }
    CHECK(relative_difference(combined.total, expected) < 1e-13);
    REQUIRE(combined.total.requires_grad());
    // Through something more than backward() alone: the gradient that arrives must be multiplied in.
    const torch::Tensor gradient = torch::autograd::grad({combined.total * 3.0}, {routing.logits_LTE})[0];
    CHECK(relative_difference(gradient, torch::autograd::grad({expected * 3.0}, {routing.logits_LTE})[0]) < 1e-13);
  }
}

TEST_CASE("combined: losses that only report have no gradient, and none at all give 0") {
  const Sizes sizes;
  std::mt19937 random(92);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  const auto loss = find_loss({}, "smooth", sizes);
  CHECK_FALSE(combine({{loss.get(), 0.0}}, routing, layout).total.requires_grad());
  const CombinedLoss nothing = combine({}, routing, layout);
  CHECK(nothing.sums_L.empty());
  CHECK(nothing.total.item<double>() == 0.0);
  RoutingTensors bad = routing;
  bad.selected_LTK = routing.selected_LTK + sizes.num_experts;
  CHECK_THROWS_WITH(combine({{loss.get(), 1.0}}, bad, layout),
                    Catch::StartsWith("smooth: selected experts must be between 0 and 6"));
}
