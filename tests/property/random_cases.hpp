#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/core/random.hpp"
#include "hestia/routing/trace.hpp"
#include "tests/unit/routing/routing_fixtures.hpp"

namespace hestia::testing {

/// HESTIA_PROPERTY_CASES=N in the environment: N times as many cases as usual.
inline int case_factor() {
  const char* text = std::getenv("HESTIA_PROPERTY_CASES");
  return text == nullptr ? 1 : std::max(1, std::atoi(text));
}

/// Runs `body` on `count` generators with seeds first_seed, first_seed + 1, ...; a failed check names its seed.
template <class Body>
void for_cases(int count, std::uint64_t first_seed, const Body& body) {
  const int total = count * case_factor();
  for (int i = 0; i < total; ++i) {
    const std::uint64_t seed = first_seed + static_cast<std::uint64_t>(i);
    INFO("case seed " << seed);
    SplitMix64 random(seed);
    body(random);
  }
}

/// Uniform in [low, high].
inline std::int64_t between(SplitMix64& random, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(high - low + 1)));
}

inline bool chance(SplitMix64& random, double probability) {
  return random.uniform() < probability;
}

/// Sizes from the smallest (one expert, one step) to some dozens; K = E now and then.
inline TraceShape random_shape(SplitMix64& random) {
  TraceShape shape;
  shape.num_sequences = between(random, 1, 4);
  shape.num_layers = between(random, 1, 3);
  shape.num_experts = chance(random, 0.1) ? between(random, 1, 2) : between(random, 2, 32);
  shape.top_k =
      chance(random, 0.1) ? shape.num_experts : between(random, 1, std::min<std::int64_t>(8, shape.num_experts));
  shape.min_steps = 1;
  shape.max_steps = between(random, 1, 50);
  shape.stickiness = random.uniform();
  shape.skip = chance(random, 0.3) ? 0.3 : 0.0;
  shape.prefill = chance(random, 0.3) ? random.uniform() : 0.0;
  return shape;
}

/// Drops experts of lowest weight from some steps, at least one stays: steps of unequal size.
inline void thin(SplitMix64& random, RoutingTrace& trace) {
  RoutingTrace thinned = trace;
  thinned.experts.clear();
  thinned.weights.clear();
  for (std::size_t i = 0; i < trace.entries.size(); ++i) {
    TraceEntry& entry = thinned.entries[i];
    entry.first = thinned.experts.size();
    if (chance(random, 0.5)) {
      entry.count = static_cast<std::uint32_t>(between(random, 1, entry.count));
    }
    const auto experts = trace.experts_of(trace.entries[i]).first(entry.count);
    const auto weights = trace.weights_of(trace.entries[i]).first(entry.count);
    thinned.experts.insert(thinned.experts.end(), experts.begin(), experts.end());
    thinned.weights.insert(thinned.weights.end(), weights.begin(), weights.end());
  }
  trace = std::move(thinned);
}

/// A random trace, in half of the cases with steps of unequal size.
inline RoutingTrace any_trace(SplitMix64& random) {
  RoutingTrace trace = random_trace(random, random_shape(random));
  if (chance(random, 0.5)) {
    thin(random, trace);
  }
  return trace;
}

/// A trace of the same experts under other names, one renaming for all layers.
inline RoutingTrace renamed(SplitMix64& random, const RoutingTrace& trace) {
  const std::vector<std::uint16_t> names = random_experts(random, trace.num_experts, trace.num_experts);
  RoutingTrace result = trace;
  for (std::uint16_t& expert : result.experts) {
    expert = names[expert];
  }
  return result;
}

using Steps = std::vector<std::vector<std::uint16_t>>;

/// The steps of each (layer, sequence) that are served.
inline std::map<std::pair<std::int64_t, std::int64_t>, Steps> served_steps(const RoutingTrace& trace,
                                                                           bool include_prefill) {
  std::map<std::pair<std::int64_t, std::int64_t>, Steps> steps;
  for (const TraceEntry& entry : trace.entries) {
    if (include_prefill || entry.phase == Phase::kDecode) {
      const auto experts = trace.experts_of(entry);
      steps[{entry.layer, entry.sequence}].emplace_back(experts.begin(), experts.end());
    }
  }
  return steps;
}

inline std::int64_t distinct_of(const Steps& steps) {
  std::set<std::uint16_t> distinct;
  for (const auto& step : steps) {
    distinct.insert(step.begin(), step.end());
  }
  return static_cast<std::int64_t>(distinct.size());
}

/// Experts that the step before served too, summed over the steps.
inline std::int64_t overlap_of(const Steps& steps) {
  std::int64_t overlap = 0;
  for (std::size_t t = 1; t < steps.size(); ++t) {
    for (const std::uint16_t expert : steps[t]) {
      overlap += std::count(steps[t - 1].begin(), steps[t - 1].end(), expert);
    }
  }
  return overlap;
}

}  // namespace hestia::testing
