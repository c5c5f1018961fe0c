#pragma once

#include <ATen/Parallel.h>

#include "random_cases.hpp"
#include "tests/unit/routing_losses/loss_fixtures.hpp"

namespace hestia::testing {

/// for_cases for tensors of some hundred numbers: a second thread would cost more than all the rest.
template <class Body>
void for_loss_cases(int count, std::uint64_t first_seed, const Body& body) {
  at::set_num_threads(1);
  for_cases(count, first_seed, body);
}

/// From one expert to some dozens; K = E now and then.
inline Sizes any_sizes(SplitMix64& random) {
  Sizes sizes;
  sizes.num_layers = between(random, 1, 3);
  sizes.num_experts = chance(random, 0.1) ? 1 : between(random, 2, 20);
  sizes.top_k = chance(random, 0.15) ? sizes.num_experts : between(random, 1, sizes.num_experts);
  return sizes;
}

/// Sequences with and without prompts, padding anywhere; now and then nothing but padding, prompts or single tokens.
inline SequenceLayout any_layout(SplitMix64& random) {
  const std::int64_t kind = between(random, 0, 11);
  std::vector<Stretch> stretches;
  for (std::int64_t i = between(random, 1, 5); i > 0; --i) {
    Stretch stretch;
    stretch.length = kind == 0 ? 1 : between(random, 1, 10);
    stretch.prompt = kind == 1 ? stretch.length : chance(random, 0.5) ? between(random, 0, stretch.length) : 0;
    stretch.padding = kind == 2 || chance(random, 0.2);
    stretches.push_back(stretch);
  }
  return layout_of(stretches);
}

/// Float64 routing with logits from nearly equal to +-1e4, or with one expert far above all others.
inline RoutingTensors any_routing(SplitMix64& random, const Sizes& sizes, std::int64_t num_tokens) {
  std::mt19937 engine(static_cast<std::mt19937::result_type>(random.next()));
  RoutingTensors routing = random_routing(engine, sizes, num_tokens);
  torch::Tensor logits = routing.logits_LTE.detach().clone();
  const std::int64_t kind = between(random, 0, 5);
  if (kind == 0) {
    logits = logits.sign() * 1e4;
    routing.reference_logits_LTE = routing.reference_logits_LTE.sign() * -1e4;
  } else if (kind == 1) {
    logits.select(2, between(random, 0, sizes.num_experts - 1)).fill_(1e4);
    routing.reference_logits_LTE.select(2, between(random, 0, sizes.num_experts - 1)).fill_(1e4);
  } else if (kind == 2) {
    logits.mul_(1e-3);
  } else if (kind == 3) {
    logits.mul_(30.0);
  }
  routing.logits_LTE = logits.requires_grad_(true);
  return routing;
}

/// Moderate logits: no two results differ by what a large one rounds away.
inline RoutingTensors moderate_routing(SplitMix64& random, const Sizes& sizes, std::int64_t num_tokens) {
  std::mt19937 engine(static_cast<std::mt19937::result_type>(random.next()));
  return random_routing(engine, sizes, num_tokens);
}

/// Strictly increasing, now and then beyond every sequence of any_layout.
inline std::vector<std::int64_t> any_lags(SplitMix64& random) {
  std::vector<std::int64_t> lags{between(random, 1, 4)};
  for (std::int64_t i = between(random, 0, 3); i > 0; --i) {
    lags.push_back(lags.back() + between(random, 1, 5));
  }
  return lags;
}

/// Every objective under every option, numbers drawn. C is never K, nor gamma a round number: c would sit at 1, the
/// kink of the clamp, up to rounding.
inline std::vector<Variant> any_variants(SplitMix64& random, const Sizes& sizes) {
  std::vector<Variant> variants;
  std::int64_t slots = between(random, 1, sizes.num_experts);
  if (slots == sizes.top_k) {
    slots = slots > 1 ? slots - 1 : std::min<std::int64_t>(2, sizes.num_experts);
  }
  const double gamma = 0.3 + 0.7 * random.uniform();
  for (const std::string start : {"uniform", "empty"}) {
    for (const bool clamp : {false, true}) {
      for (const bool propagate : {false, true}) {
        variants.push_back(cache_variant(start, clamp, propagate, sizes, gamma, slots));
      }
    }
  }
  RoutingLossOptions options;
  options.rank_matching.margin = 0.01 + 0.5 * random.uniform();
  variants.push_back({"rank_matching", find_loss(options, "rank_matching", sizes)});
  options.rank_matching.normalise_pairs = true;
  variants.push_back({"rank_matching normalised", find_loss(options, "rank_matching", sizes)});
  for (const std::string name :
       {"reuse", "trust", "smooth", "router_entropy", "temporal_dot", "gate_consistency", "load_balance"}) {
    variants.push_back({name, find_loss(options, name, sizes)});
  }
  variants.push_back(lag_variant(any_lags(random), sizes));
  variants.push_back(window_variant(between(random, 1, 12), sizes));
  variants.push_back(chunk_variant(between(random, 1, 12), sizes));
  return variants;
}

/// Tokens `indices` of `routing`; -1 becomes a padding token that holds nothing usable.
inline RoutingTensors gathered(const RoutingTensors& routing, const std::vector<std::int64_t>& indices) {
  const torch::Tensor index = torch::tensor(indices, torch::kInt64);
  const torch::Tensor holes = (index < 0).nonzero().flatten();
  const torch::Tensor safe = index.clamp_min(0);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  RoutingTensors part;
  part.logits_LTE = routing.logits_LTE.detach().index_select(1, safe).index_fill(1, holes, nan).requires_grad_(true);
  part.reference_logits_LTE = routing.reference_logits_LTE.index_select(1, safe).index_fill(1, holes, nan);
  part.selected_LTK = routing.selected_LTK.index_select(1, safe).index_fill(1, holes, 1'000'000);
  return part;
}

/// Some sequences of a layout, packed anew.
struct Repacked {
  SequenceLayout layout;
  std::vector<std::int64_t> indices;  ///< Token in the original of each token; -1: padding.
};

inline Repacked repacked(SplitMix64& random, const LayoutTensors& original, const std::vector<std::size_t>& runs) {
  Repacked result;
  const auto pad = [&] {
    for (std::int64_t i = chance(random, 0.5) ? between(random, 1, 3) : 0; i > 0; --i) {
      result.layout.sequence_ids.push_back(-1 - between(random, 0, 3));
      result.layout.counted.push_back(1);
      result.indices.push_back(-1);
    }
  };
  std::int64_t id = between(random, 0, 50);
  for (const std::size_t run : runs) {
    pad();
    for (std::int64_t token = original.runs()[run].begin; token < original.runs()[run].end; ++token) {
      result.layout.sequence_ids.push_back(id);
      result.layout.counted.push_back(original.layout().counted[static_cast<std::size_t>(token)]);
      result.indices.push_back(token);
    }
    id += between(random, 1, 5);
  }
  pad();
  return result;
}

/// 0 .. count-1 in random order.
inline std::vector<std::size_t> shuffled(SplitMix64& random, std::size_t count) {
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (std::size_t i = count; i > 1; --i) {
    std::swap(order[i - 1], order[random.below(i)]);
  }
  return order;
}

}  // namespace hestia::testing
