#include "hestia/routing/simulator.hpp"

#include <algorithm>
#include <atomic>
#include <future>
#include <numeric>

#include <fmt/format.h>

#include "demand_cache.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/random.hpp"
#include "layer_steps.hpp"

namespace hestia {

namespace {

// One seed per layer and sequence, so that the draws do not depend on the order in which threads take layers.
std::uint64_t victim_seed(std::uint64_t seed, std::int64_t layer, std::int64_t sequence) {
  const std::uint64_t of_layer = SplitMix64(SplitMix64(seed).next() + static_cast<std::uint64_t>(layer)).next();
  return SplitMix64(of_layer + static_cast<std::uint64_t>(sequence)).next();
}

// For every request of the steps, the position of the next step that asks for the same expert; the number of steps when
// none does. One backward pass.
std::vector<std::int64_t> next_uses(const RoutingTrace& trace, std::span<const std::size_t> entries) {
  std::size_t total = 0;
  for (const std::size_t entry : entries) {
    total += trace.entries[entry].count;
  }
  const auto none = static_cast<std::int64_t>(entries.size());
  std::vector<std::int64_t> upcoming(static_cast<std::size_t>(trace.num_experts), none);
  std::vector<std::int64_t> uses(total);
  std::size_t first = total;
  for (std::size_t step = entries.size(); step-- > 0;) {
    const std::span<const std::uint16_t> experts = trace.experts_of(trace.entries[entries[step]]);
    first -= experts.size();
    for (std::size_t i = 0; i < experts.size(); ++i) {
      uses[first + i] = upcoming[experts[i]];
      upcoming[experts[i]] = static_cast<std::int64_t>(step);
    }
  }
  return uses;
}

void serve_on_demand(const RoutingTrace& trace, const SimulationOptions& options, std::span<const std::size_t> entries,
                     std::uint64_t seed, SimulationCounts& counts) {
  DemandCache cache(options, trace.num_experts, seed);
  std::vector<std::int64_t> uses;
  if (options.policy == CachePolicyKind::kBelady) {
    uses = next_uses(trace, entries);
  }
  std::size_t first = 0;
  for (const std::size_t entry : entries) {
    const std::span<const std::uint16_t> experts = trace.experts_of(trace.entries[entry]);
    cache.serve(experts, uses.empty() ? nullptr : uses.data() + first, counts);
    first += experts.size();
  }
}

// Evicts what is least used in the `segment_length` steps after the one being served.
void serve_with_segment(const RoutingTrace& trace, const SimulationOptions& options,
                        std::span<const std::size_t> entries, std::int64_t segment_length, SimulationCounts& counts) {
  DemandCache cache(options, trace.num_experts, 0, true);
  std::vector<std::int64_t> uses(static_cast<std::size_t>(trace.num_experts), 0);
  const auto count = [&](std::size_t step, std::int64_t by) {
    for (const std::uint16_t expert : trace.experts_of(trace.entries[entries[step]])) {
      uses[expert] += by;
      cache.set_uses(expert, uses[expert]);
    }
  };
  const auto ahead = static_cast<std::size_t>(std::min(segment_length, static_cast<std::int64_t>(entries.size())));
  for (std::size_t step = 0; step < ahead; ++step) {
    count(step, 1);
  }
  for (std::size_t step = 0; step < entries.size(); ++step) {
    // Entering first: with a segment of 0 steps this one comes and goes.
    if (step + ahead < entries.size()) {
      count(step + ahead, 1);
    }
    count(step, -1);
    cache.serve(trace.experts_of(trace.entries[entries[step]]), nullptr, counts);
  }
}

// The C most used experts of these very steps are resident throughout; misses pass by the cache.
void serve_static(const RoutingTrace& trace, const SimulationOptions& options, std::span<const std::size_t> entries,
                  SimulationCounts& counts) {
  const auto num_experts = static_cast<std::size_t>(trace.num_experts);
  std::vector<std::int64_t> uses(num_experts, 0);
  for (const std::size_t entry : entries) {
    const std::span<const std::uint16_t> experts = trace.experts_of(trace.entries[entry]);
    counts.steps += 1;
    counts.requests += static_cast<std::int64_t>(experts.size());
    for (const std::uint16_t expert : experts) {
      uses[expert] += 1;
    }
  }
  std::sort(uses.begin(), uses.end(), std::greater<>());
  const std::size_t kept = std::min(num_experts, static_cast<std::size_t>(options.slots));
  const std::int64_t hits =
      std::accumulate(uses.begin(), uses.begin() + static_cast<std::ptrdiff_t>(kept), std::int64_t{0});
  const std::int64_t all = std::accumulate(uses.begin(), uses.end(), std::int64_t{0});
  counts.hits += hits;
  counts.loads += all - hits;
  counts.cold += std::count_if(uses.begin(), uses.end(), [](std::int64_t count) { return count > 0; });
}

SimulationCounts simulate_layer(const RoutingTrace& trace, const SimulationOptions& options, const TraceLayer& layer,
                                const LayerSteps& steps) {
  SimulationCounts counts;
  const std::span<const std::size_t> all(steps.entries);
  const auto serve = [&](std::span<const std::size_t> entries, std::int64_t sequence) {
    if (options.policy == CachePolicyKind::kStatic) {
      serve_static(trace, options, entries, counts);
    } else {
      serve_on_demand(trace, options, entries, victim_seed(options.seed, layer.layer, sequence), counts);
    }
  };
  if (options.reset_per_sequence) {
    for (const LayerSequence& sequence : steps.sequences) {
      serve(all.subspan(sequence.begin, sequence.end - sequence.begin), sequence.sequence);
    }
  } else if (!all.empty()) {
    serve(all, steps.sequences.front().sequence);
  }
  counts.load_bytes = counts.loads * layer.expert_bytes;
  return counts;
}

void check(const SimulationOptions& options) {
  if (options.slots < 1) {
    throw UsageError(
        fmt::format("slots: must be at least 1, got {}; give the experts that fit per layer", options.slots));
  }
  // Written so that NaN fails too.
  if (!(options.gamma >= 0.0 && options.gamma <= 1.0)) {
    throw UsageError(fmt::format("gamma: must lie in [0, 1], got {}; 0 is LRU, 1 is LFU", options.gamma));
  }
  if (options.num_threads < 1) {
    throw UsageError(fmt::format("threads: must be at least 1, got {}; give 1 or more", options.num_threads));
  }
}

// `layer_counts` of every layer, on options.num_threads threads.
template <class LayerCounts>
std::vector<SimulationCounts> for_layers(const RoutingTrace& trace, const SimulationOptions& options,
                                         const LayerCounts& layer_counts) {
  const std::vector<LayerSteps> layers = layer_steps(trace, options.include_prefill);
  std::vector<SimulationCounts> counts(layers.size());
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < layers.size(); i = next++) {
      counts[i] = layer_counts(trace.layers[i], layers[i]);
    }
  };
  const std::size_t num_threads = std::min(static_cast<std::size_t>(options.num_threads), layers.size());
  std::vector<std::future<void>> helpers;
  for (std::size_t i = 1; i < num_threads; ++i) {
    helpers.push_back(std::async(std::launch::async, work));
  }
  work();
  for (std::future<void>& helper : helpers) {
    helper.get();
  }
  return counts;
}

}  // namespace

SimulationCounts& SimulationCounts::operator+=(const SimulationCounts& other) {
  requests += other.requests;
  hits += other.hits;
  cold += other.cold;
  loads += other.loads;
  evictions += other.evictions;
  steps += other.steps;
  load_bytes += other.load_bytes;
  return *this;
}

std::vector<SimulationCounts> simulate_per_layer(const RoutingTrace& trace, const SimulationOptions& options) {
  check(options);
  return for_layers(trace, options, [&](const TraceLayer& layer, const LayerSteps& steps) {
    return simulate_layer(trace, options, layer, steps);
  });
}

SimulationCounts simulate(const RoutingTrace& trace, const SimulationOptions& options) {
  SimulationCounts total;
  for (const SimulationCounts& counts : simulate_per_layer(trace, options)) {
    total += counts;
  }
  return total;
}

SimulationCounts simulate_segment_cache(const RoutingTrace& trace, std::int64_t segment_length,
                                        const SimulationOptions& options) {
  check(options);
  if (segment_length < 0) {
    throw UsageError(fmt::format("segment: must be at least 0, got {}; give the steps to look ahead", segment_length));
  }
  SimulationCounts total;
  for (const SimulationCounts& counts : for_layers(trace, options, [&](const TraceLayer&layer, const LayerSteps&steps) {
         SimulationCounts of_layer;
         const std::span<const std::size_t> all(steps.entries);
         for (const LayerSequence& sequence : steps.sequences) {
           serve_with_segment(trace, options, all.subspan(sequence.begin, sequence.end - sequence.begin),
                              segment_length, of_layer);
         }
         of_layer.load_bytes = of_layer.loads * layer.expert_bytes;
         return of_layer;
       })) {
    total += counts;
  }
  return total;
}

}  // namespace hestia
