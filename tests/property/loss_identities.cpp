// Objectives against what the simulator and the metrics say of the same choices.
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/simulator.hpp"
#include "random_losses.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

// Sequences without prompts, a single one when asked for.
SequenceLayout plain_layout(SplitMix64& random, std::int64_t num_sequences) {
  std::vector<Stretch> stretches;
  for (std::int64_t i = 0; i < num_sequences; ++i) {
    if (chance(random, 0.3)) {
      stretches.push_back({between(random, 1, 4), 0, true});
    }
    stretches.push_back({between(random, 2, 20), 0, false});
  }
  return layout_of(stretches);
}

// Choices that often stay from one token to the next: [L, T, K].
torch::Tensor sticky_choices(SplitMix64& random, const Sizes& sizes, std::int64_t num_tokens) {
  std::vector<std::int64_t> selected;
  for (std::int64_t layer = 0; layer < sizes.num_layers; ++layer) {
    std::vector<std::uint16_t> chosen;
    for (std::int64_t token = 0; token < num_tokens; ++token) {
      if (chosen.empty() || chance(random, 0.6)) {
        chosen = random_experts(random, sizes.num_experts, sizes.top_k);
      }
      selected.insert(selected.end(), chosen.begin(), chosen.end());
    }
  }
  return torch::tensor(selected, torch::kInt64).view({sizes.num_layers, num_tokens, sizes.top_k});
}

// Metrics of one layer's choices over all sequences of a layout.
RoutingMetrics metrics_of(const torch::Tensor& selected_LTK, const Sizes& sizes, const LayoutTensors& layout,
                          std::int64_t layer) {
  RoutingMetrics metrics(1, sizes.num_experts, sizes.top_k, {layer}, 1);
  const torch::Tensor selected = selected_LTK[layer].contiguous();
  for (const SequenceRun& run : layout.runs()) {
    SequenceRouting sequence;
    sequence.id = run.id;
    sequence.num_tokens = run.length();
    sequence.num_layers = 1;
    sequence.num_experts = sizes.num_experts;
    sequence.top_k = sizes.top_k;
    const std::int64_t* const data = selected.const_data_ptr<std::int64_t>();
    for (std::int64_t i = run.begin * sizes.top_k; i < run.end * sizes.top_k; ++i) {
      sequence.selected.push_back(static_cast<std::uint16_t>(data[i]));
    }
    metrics.add(sequence);
  }
  return metrics;
}

// A router that is sure of its choice: p = r / K.
torch::Tensor sure_logits(const torch::Tensor& selected_LTK, std::int64_t num_experts) {
  return torch::full({selected_LTK.size(0), selected_LTK.size(1), num_experts}, -500.0, torch::kFloat64)
      .scatter(2, selected_LTK, 0.0)
      .requires_grad_(true);
}

Sizes chosen_sizes(SplitMix64& random) {
  Sizes sizes = any_sizes(random);
  sizes.num_experts = std::max<std::int64_t>(2, sizes.num_experts);
  sizes.top_k = std::min(sizes.top_k, sizes.num_experts);
  return sizes;
}

RoutingTensors routing_of(SplitMix64& random, const Sizes& sizes, const LayoutTensors& layout) {
  RoutingTensors routing = moderate_routing(random, sizes, layout.num_tokens());
  routing.selected_LTK = sticky_choices(random, sizes, layout.num_tokens());
  return routing;
}

}  // namespace

TEST_CASE("property: a soft cache without memory misses what LRU with K slots loads") {
  for_loss_cases(80, 50000, [](SplitMix64& random) {
    const Sizes sizes = chosen_sizes(random);
    const LayoutTensors layout(plain_layout(random, between(random, 1, 4)), torch::kCPU);
    const RoutingTensors routing = routing_of(random, sizes, layout);
    const auto k = static_cast<double>(sizes.top_k);
    const torch::Tensor empty =
        cache_variant("empty", false, false, sizes, 0.0, sizes.num_experts).loss->sum(routing, layout);
    const torch::Tensor uniform =
        cache_variant("uniform", false, false, sizes, 0.0, sizes.top_k).loss->sum(routing, layout);
    SimulationOptions options;
    options.slots = sizes.top_k;
    for (std::int64_t layer = 0; layer < sizes.num_layers; ++layer) {
      const auto loads =
          static_cast<double>(metrics_of(routing.selected_LTK, sizes, layout, layer).simulate(options).loads);
      CAPTURE(layer, sizes.num_experts, sizes.top_k);
      CHECK(empty[layer].item<double>() == Approx(loads).margin(1e-10));
      // The uniform start lends K/E of every expert to the first token of each sequence.
      const double lent = static_cast<double>(layout.runs().size()) * k * k / static_cast<double>(sizes.num_experts);
      CHECK(uniform[layer].item<double>() == Approx(loads - lent).margin(1e-10));
    }
  });
}

TEST_CASE("property: terms of a sure router are functions of EOR, its load balance is 1 + CV^2") {
  for_loss_cases(80, 51000, [](SplitMix64& random) {
    const Sizes sizes = chosen_sizes(random);
    const LayoutTensors layout(plain_layout(random, 1), torch::kCPU);
    RoutingTensors routing = routing_of(random, sizes, layout);
    routing.logits_LTE = sure_logits(routing.selected_LTK, sizes.num_experts);
    const auto reuse = find_loss({}, "reuse", sizes);
    const torch::Tensor reused = reuse->sum(routing, layout) / reuse->count(layout);
    const torch::Tensor dot = find_loss({}, "temporal_dot", sizes)->sum(routing, layout) / reuse->count(layout);
    const torch::Tensor square = find_loss({}, "gate_consistency", sizes)->sum(routing, layout) / reuse->count(layout);
    const torch::Tensor entropy =
        find_loss({}, "router_entropy", sizes)->sum(routing, layout) / static_cast<double>(layout.num_counted());
    const auto balance = find_loss({}, "load_balance", sizes);
    const torch::Tensor balanced = balance->sum(routing, layout) / balance->count(layout);
    for (std::int64_t layer = 0; layer < sizes.num_layers; ++layer) {
      const RoutingMetrics metrics = metrics_of(routing.selected_LTK, sizes, layout, layer);
      CAPTURE(layer, sizes.num_experts, sizes.top_k);
      const double eor = metrics.expert_overlap_ratio();
      CHECK(reused[layer].item<double>() ==
            Approx(-std::log(eor / static_cast<double>(sizes.top_k) + 1e-8)).epsilon(1e-10));
      const auto k = static_cast<double>(sizes.top_k);
      CHECK(dot[layer].item<double>() == Approx(1.0 - eor / k).margin(1e-12));
      CHECK(square[layer].item<double>() == Approx(2.0 * (1.0 - eor) / k).margin(1e-12));
      CHECK(entropy[layer].item<double>() == Approx(std::log(k)).margin(1e-12));
      const double variation = metrics.usage().coefficient_of_variation;
      CHECK(balanced[layer].item<double>() == Approx(1.0 + variation * variation).epsilon(1e-10));
    }
  });
}

TEST_CASE("property: load balance is 1 when either choices or probabilities are even") {
  for_loss_cases(80, 52000, [](SplitMix64& random) {
    const Sizes sizes = chosen_sizes(random);
    // E tokens whose experts go round: each is served K times.
    const LayoutTensors layout(layout_of({{sizes.num_experts, 0}, {2, 0, true}}), torch::kCPU);
    RoutingTensors routing = moderate_routing(random, sizes, layout.num_tokens());
    const torch::Tensor token = torch::arange(layout.num_tokens()).view({1, -1, 1});
    const torch::Tensor place = torch::arange(sizes.top_k).view({1, 1, -1});
    RoutingTensors even_choices = routing;
    even_choices.selected_LTK = ((token + place) % sizes.num_experts).expand_as(routing.selected_LTK).contiguous();
    RoutingTensors even_p = routing;
    even_p.logits_LTE = torch::full_like(routing.logits_LTE.detach(), random.uniform()).requires_grad_(true);
    const auto balance = find_loss({}, "load_balance", sizes);
    for (const RoutingTensors& even : {even_choices, even_p}) {
      const torch::Tensor value = balance->sum(even, layout) / balance->count(layout);
      CHECK(relative_difference(value, torch::ones_like(value)) < 1e-12);
    }
    // Even choices leave the router nothing to gain.
    CHECK(gradient_of(balance->sum(even_choices, layout), even_choices).abs().max().item<double>() < 1e-13);
  });
}

TEST_CASE(
    "property: a router that agrees with its base has nothing to pay to trust, nor to the order without a margin") {
  for_loss_cases(80, 53000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    RoutingTensors routing = any_routing(random, sizes, layout.num_tokens());
    routing.reference_logits_LTE = routing.logits_LTE.detach() + 10.0 * random.uniform();
    const auto trust = find_loss({}, "trust", sizes);
    const torch::Tensor sum = trust->sum(routing, layout);
    CHECK(relative_difference(sum, torch::zeros_like(sum)) < 1e-10);
    const torch::Tensor gradient = gradient_of(sum, routing);
    CHECK(relative_difference(gradient, torch::zeros_like(gradient)) < 1e-10);

    // Flatter or sharper, the order stays.
    RoutingLossOptions options;
    options.rank_matching.margin = 0.0;
    const auto order = find_loss(options, "rank_matching", sizes);
    routing.reference_logits_LTE = routing.logits_LTE.detach() * (0.5 + random.uniform());
    CHECK((order->sum(routing, layout) == 0.0).all().item<bool>());
  });
}

TEST_CASE("property: windows of one token, and one lag, are the plain terms") {
  for_loss_cases(80, 54000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    const RoutingTensors routing = any_routing(random, sizes, layout.num_tokens());
    const auto sum = [&](const std::shared_ptr<const RoutingLoss>& loss) { return loss->sum(routing, layout); };
    const torch::Tensor entropy = sum(find_loss({}, "router_entropy", sizes));
    const torch::Tensor set = sum(window_variant(1, sizes).loss);
    CHECK(relative_difference(set, entropy) < 1e-11);
    CHECK(relative_difference(gradient_of(set, routing), gradient_of(entropy, routing)) < 1e-10);
    const torch::Tensor smooth = sum(find_loss({}, "smooth", sizes));
    const torch::Tensor lag = sum(lag_variant({1}, sizes).loss);
    CHECK(torch::equal(lag, smooth));
    CHECK(torch::equal(gradient_of(lag, routing), gradient_of(smooth, routing)));
    // Chunks of one token: 1 - mean(1 - p + 1e-5), the same for every router.
    const torch::Tensor used = sum(chunk_variant(1, sizes).loss);
    const double each = 1.0 / static_cast<double>(sizes.num_experts) - 1e-5;
    CHECK(relative_difference(used, torch::full_like(used, each * static_cast<double>(layout.num_counted()))) < 1e-11);
    CHECK(relative_difference(gradient_of(used, routing), torch::zeros_like(routing.logits_LTE)) < 1e-11);
  });
}

TEST_CASE("property: the terms of lags add up, each by its share") {
  for_loss_cases(80, 55000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    const RoutingTensors routing = moderate_routing(random, sizes, layout.num_tokens());
    const std::vector<std::int64_t> lags = any_lags(random);
    torch::Tensor sum = torch::zeros({sizes.num_layers}, torch::kFloat64);
    for (const std::int64_t lag : lags) {
      sum = sum + lag_variant({lag}, sizes).loss->sum(routing, layout) / static_cast<double>(lags.size());
    }
    const torch::Tensor together = lag_variant(lags, sizes).loss->sum(routing, layout);
    CHECK(relative_difference(together, sum) < 1e-12);
    CHECK(relative_difference(gradient_of(together, routing), gradient_of(sum, routing)) < 1e-12);
  });
}
