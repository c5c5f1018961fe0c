#include "random_losses.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

// What all tokens of `part` add to the gradient of the tokens they came from.
void add_gradient(torch::Tensor& total, const torch::Tensor& gradient, const std::vector<std::int64_t>& indices) {
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const torch::Tensor row = gradient.select(1, static_cast<std::int64_t>(i));
    if (indices[i] < 0) {
      CHECK((row == 0.0).all().item<bool>());
    } else {
      total.select(1, indices[i]).add_(row);
    }
  }
}

double largest(const torch::Tensor& tensor) {
  return tensor.numel() == 0 ? 0.0 : tensor.abs().max().item<double>();
}

}  // namespace

TEST_CASE("property: any sizes, layout and logits: finite, and equal to the plain loops") {
  for_loss_cases(40, 40000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    const bool single = chance(random, 0.5);
    const RoutingTensors routing = converted(any_routing(random, sizes, layout.num_tokens()),
                                             single ? torch::kFloat32 : torch::kFloat64, torch::kCPU);
    for (const Variant& variant : any_variants(random, sizes)) {
      CAPTURE(variant.label, single, sizes.num_experts, sizes.top_k, layout.num_tokens());
      const torch::Tensor sum = variant.loss->sum(routing, layout);
      const torch::Tensor plain = variant.loss->reference_sum(routing, layout);
      CHECK(torch::isfinite(sum).all().item<bool>());
      CHECK(relative_difference(sum, plain) < (single ? 2e-5 : 1e-11));
      const torch::Tensor gradient = gradient_of(sum, routing);
      CHECK(torch::isfinite(gradient).all().item<bool>());
      CHECK(relative_difference(gradient, gradient_of(plain, routing)) < (single ? 2e-4 : 1e-10));
      if (variant.loss->count(layout) == 0.0) {
        CHECK((sum == 0.0).all().item<bool>());
        CHECK((gradient == 0.0).all().item<bool>());
      }
    }
  });
}

TEST_CASE("property: every value stays in its bounds") {
  for_loss_cases(400, 41000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    const bool single = chance(random, 0.5);
    const double slack = single ? 1e-4 : 1e-10;
    const RoutingTensors routing = converted(any_routing(random, sizes, layout.num_tokens()),
                                             single ? torch::kFloat32 : torch::kFloat64, torch::kCPU);
    RoutingLossOptions options;
    CacheSimulationOptions& cache = options.cache_simulation;
    cache.slots = between(random, 1, sizes.num_experts);
    cache.gamma = chance(random, 0.2) ? 0.0 : chance(random, 0.2) ? 1.0 : random.uniform();
    cache.start = chance(random, 0.5) ? "uniform" : "empty";
    cache.clamp_at_one = chance(random, 0.5);
    options.rank_matching.margin = chance(random, 0.2) ? 0.0 : random.uniform();
    CAPTURE(single, sizes.num_experts, sizes.top_k, cache.slots, cache.gamma, cache.start, cache.clamp_at_one);
    const auto loss = [&](const char* name) { return find_loss(options, name, sizes); };
    // Per layer; 0 and within every bound when there is nothing to count.
    const auto values = [&](const char* name) {
      return (loss(name)->sum(routing, layout).detach().to(torch::kFloat64) / std::max(1.0, loss(name)->count(layout)));
    };
    const auto k = static_cast<double>(sizes.top_k);
    if (layout.num_counted() > 0) {
      const torch::Tensor misses = values("cache_simulation");
      const double lowest = k - static_cast<double>(cache.slots);
      CHECK(misses.min().item<double>() >= (cache.clamp_at_one ? std::max(0.0, lowest) : lowest) - slack * k);
      CHECK(misses.max().item<double>() <= k + slack * k);
      const torch::Tensor balance = values("load_balance");
      CHECK(balance.min().item<double>() >= -slack);
      CHECK(balance.max().item<double>() <= static_cast<double>(sizes.num_experts) / k * (1.0 + slack));
    }
    if (layout.num_pairs() > 0) {
      const torch::Tensor reuse = values("reuse");
      CHECK(reuse.min().item<double>() >= std::log(k) - 1e-7 * k - slack);
      CHECK(reuse.max().item<double>() <= -std::log(1e-8) + slack);
    }
    CHECK(values("trust").min().item<double>() >= -slack);
    options.lag.lags = any_lags(random);
    options.working_set.window = between(random, 1, 12);
    options.chunk_union.chunk = between(random, 1, 12);
    const double experts = static_cast<double>(sizes.num_experts);
    CHECK(values("lag").min().item<double>() >= 0.0);
    const torch::Tensor dot = values("temporal_dot");
    CHECK(dot.min().item<double>() >= -slack);
    CHECK(dot.max().item<double>() <= 1.0 + slack);
    const torch::Tensor square = values("gate_consistency");
    CHECK(square.min().item<double>() >= 0.0);
    CHECK(square.max().item<double>() <= 2.0 + slack);
    // Pinsker, and half the squared 1-norm is at least the squared 2-norm of what adds up to 0.
    CHECK((square <= values("smooth") + slack).all().item<bool>());
    // Mixing tokens never lowers the entropy.
    const torch::Tensor entropy = values("router_entropy");
    const torch::Tensor set = values("working_set");
    CHECK(entropy.min().item<double>() >= -slack);
    CHECK((set >= entropy - slack).all().item<bool>());
    CHECK(set.max().item<double>() <= std::log(experts) + slack);
    // A chunk uses no less than one of its tokens does, and no more than all of them together.
    const torch::Tensor used = values("chunk_union");
    const double epsilon = 1e-4;  // 12 tokens, 1e-5 each
    if (layout.num_counted() > 0) {
      CHECK(used.min().item<double>() >= 1.0 / experts - epsilon - slack);
      CHECK(used.max().item<double>() <=
            std::min(1.0, static_cast<double>(options.chunk_union.chunk) / experts) + epsilon + slack);
    }

    // The order of the base as the objective sees it: equal probabilities in the type of the logits are no pair.
    const torch::Tensor counted = layout.counted_indices();
    const torch::Tensor p = torch::softmax(routing.logits_LTE.detach().index_select(1, counted), -1);
    const torch::Tensor base = torch::softmax(routing.reference_logits_LTE.index_select(1, counted), -1);
    const torch::Tensor pairs = base.unsqueeze(3) > base.unsqueeze(2);
    const torch::Tensor wrong = pairs & (p.unsqueeze(3) <= p.unsqueeze(2));
    const double margin = options.rank_matching.margin;
    const torch::Tensor hinge = loss("rank_matching")->sum(routing, layout).detach().to(torch::kFloat64);
    const torch::Tensor at_least = wrong.sum({1, 2, 3}).to(torch::kFloat64) * margin;
    const torch::Tensor at_most = pairs.sum({1, 2, 3}).to(torch::kFloat64) * (1.0 + margin);
    CHECK((hinge >= at_least * (1.0 - slack) - slack).all().item<bool>());
    CHECK((hinge <= at_most * (1.0 + slack) + slack).all().item<bool>());
    options.rank_matching.normalise_pairs = true;
    const torch::Tensor per_pair = values("rank_matching");
    CHECK(per_pair.min().item<double>() >= -slack);
    CHECK(per_pair.max().item<double>() <= 1.0 + margin + slack);
  });
}

TEST_CASE("property: renaming the experts renames the gradient, at any sizes") {
  for_loss_cases(100, 42000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    const RoutingTensors routing = moderate_routing(random, sizes, layout.num_tokens());
    std::vector<std::int64_t> names;
    for (const std::size_t name : shuffled(random, static_cast<std::size_t>(sizes.num_experts))) {
      names.push_back(static_cast<std::int64_t>(name));
    }
    const torch::Tensor order = torch::tensor(names, torch::kInt64);
    RoutingTensors other;
    other.logits_LTE = routing.logits_LTE.detach().index_select(2, order).requires_grad_(true);
    other.reference_logits_LTE = routing.reference_logits_LTE.index_select(2, order);
    other.selected_LTK = order.argsort().index_select(0, routing.selected_LTK.flatten()).view_as(routing.selected_LTK);
    for (const Variant& variant : any_variants(random, sizes)) {
      CAPTURE(variant.label, sizes.num_experts, sizes.top_k);
      const torch::Tensor sum = variant.loss->sum(routing, layout);
      const torch::Tensor other_sum = variant.loss->sum(other, layout);
      CHECK(relative_difference(other_sum, sum) < 1e-12);
      CHECK(relative_difference(gradient_of(other_sum, other), gradient_of(sum, routing).index_select(2, order)) <
            1e-11);
    }
  });
}

TEST_CASE("property: sequences may be packed in any order with any padding") {
  for_loss_cases(100, 43000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    const RoutingTensors routing = moderate_routing(random, sizes, layout.num_tokens());
    const Repacked other = repacked(random, layout, shuffled(random, layout.runs().size()));
    const LayoutTensors other_layout(other.layout, torch::kCPU);
    const RoutingTensors other_routing = gathered(routing, other.indices);
    for (const Variant& variant : any_variants(random, sizes)) {
      CAPTURE(variant.label, layout.num_tokens());
      const torch::Tensor sum = variant.loss->sum(routing, layout);
      const torch::Tensor other_sum = variant.loss->sum(other_routing, other_layout);
      CHECK(variant.loss->count(other_layout) == variant.loss->count(layout));
      CHECK(relative_difference(other_sum, sum) < 1e-12);
      torch::Tensor gradient = torch::zeros_like(routing.logits_LTE).detach();
      add_gradient(gradient, gradient_of(other_sum, other_routing), other.indices);
      CHECK(relative_difference(gradient, gradient_of(sum, routing)) < 1e-12);
    }
  });
}

TEST_CASE("property: micro-batches add up to the batch, load balance excepted") {
  for_loss_cases(100, 44000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    const RoutingTensors routing = moderate_routing(random, sizes, layout.num_tokens());
    std::vector<std::vector<std::size_t>> groups(static_cast<std::size_t>(between(random, 1, 3)));
    for (std::size_t run = 0; run < layout.runs().size(); ++run) {
      groups[random.below(groups.size())].push_back(run);
    }
    std::vector<Repacked> parts;
    for (const std::vector<std::size_t>& group : groups) {
      parts.push_back(repacked(random, layout, group));
    }
    for (const Variant& variant : any_variants(random, sizes)) {
      CAPTURE(variant.label, groups.size());
      const torch::Tensor whole = variant.loss->sum(routing, layout);
      torch::Tensor sum = torch::zeros_like(whole).detach();
      torch::Tensor gradient = torch::zeros_like(routing.logits_LTE).detach();
      double count = 0.0;
      for (const Repacked& part : parts) {
        const LayoutTensors part_layout(part.layout, torch::kCPU);
        const RoutingTensors part_routing = gathered(routing, part.indices);
        const torch::Tensor part_sum = variant.loss->sum(part_routing, part_layout);
        sum += part_sum.detach();
        count += variant.loss->count(part_layout);
        add_gradient(gradient, gradient_of(part_sum, part_routing), part.indices);
      }
      CHECK(count == variant.loss->count(layout));
      if (variant.loss->name() != "load_balance") {
        CHECK(relative_difference(sum, whole) < 1e-12);
        CHECK(relative_difference(gradient, gradient_of(whole, routing)) < 1e-12);
      }
    }
  });
}

TEST_CASE("property: one number added to all logits of a token changes nothing, and no token pulls all its logits") {
  for_loss_cases(100, 45000, [](SplitMix64& random) {
    const Sizes sizes = any_sizes(random);
    const LayoutTensors layout(any_layout(random), torch::kCPU);
    const RoutingTensors routing = moderate_routing(random, sizes, layout.num_tokens());
    std::mt19937 engine(static_cast<std::mt19937::result_type>(random.next()));
    RoutingTensors shifted = routing;
    const torch::Tensor offset = random_normal(engine, {sizes.num_layers, layout.num_tokens(), 1}, 5.0);
    shifted.logits_LTE = (routing.logits_LTE.detach() + offset).requires_grad_(true);
    const torch::Tensor not_counted = torch::ones({layout.num_tokens()}, torch::kBool);
    not_counted.index_fill_(0, layout.counted_indices(), false);
    for (const Variant& variant : any_variants(random, sizes)) {
      CAPTURE(variant.label, sizes.num_experts, sizes.top_k);
      const torch::Tensor sum = variant.loss->sum(routing, layout);
      const torch::Tensor gradient = gradient_of(sum, routing);
      CHECK(relative_difference(variant.loss->sum(shifted, layout), sum) < 1e-12);
      CHECK(largest(gradient.sum(-1)) < 1e-11 * std::max(1.0, largest(gradient)));
      if (variant.label.find("propagate") == std::string::npos && !pulls_both_sides(*variant.loss)) {
        CHECK(largest(gradient.index_select(1, not_counted.nonzero().flatten())) == 0.0);
      }
    }
  });
}
