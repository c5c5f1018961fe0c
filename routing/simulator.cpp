#include "hestia/routing/simulator.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <future>
#include <numeric>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "demand_cache.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/random.hpp"
#include "layer_steps.hpp"

namespace hestia {

namespace {

// In enum order.
constexpr std::array<std::string_view, 3> kStartNames = {"cold", "prefill", "preload"};

// Steps that are served but not counted: those of the prefill that a start leaves its residents by.
bool is_start(const SimulationOptions& options, const TraceEntry& entry) {
  return options.start == CacheStart::kPrefill && entry.phase == Phase::kPrefill;
}

// The experts that layer `index` of the trace starts with, as many as fit.
std::span<const std::uint16_t> preloaded(const SimulationOptions& options, std::size_t index) {
  if (options.start != CacheStart::kPreload) {
    return {};
  }
  const std::span<const std::uint16_t> experts(options.preload[index]);
  return experts.first(std::min(experts.size(), static_cast<std::size_t>(options.slots)));
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
                     std::uint64_t seed, std::span<const std::uint16_t> preload, SimulationCounts& counts) {
  DemandCache cache(options, trace.num_experts, seed);
  cache.preload(preload);
  SimulationCounts of_start;
  std::vector<std::int64_t> uses;
  if (options.policy == CachePolicyKind::kBelady) {
    uses = next_uses(trace, entries);
  }
  std::size_t first = 0;
  for (const std::size_t entry : entries) {
    const std::span<const std::uint16_t> experts = trace.experts_of(trace.entries[entry]);
    cache.serve(experts, uses.empty() ? nullptr : uses.data() + first,
                is_start(options, trace.entries[entry]) ? of_start : counts);
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

// C experts are resident throughout, and misses pass by the cache: those of the preload, else the most used of the
// start, else, from a cold start, the most used of these very steps. Ties to the lower index.
void serve_static(const RoutingTrace& trace, const SimulationOptions& options, std::span<const std::size_t> entries,
                  std::span<const std::uint16_t> preload, SimulationCounts& counts) {
  const auto num_experts = static_cast<std::size_t>(trace.num_experts);
  std::vector<std::int64_t> uses(num_experts, 0);
  std::vector<std::int64_t> uses_of_start(num_experts, 0);
  for (const std::size_t entry : entries) {
    const std::span<const std::uint16_t> experts = trace.experts_of(trace.entries[entry]);
    const bool counted = !is_start(options, trace.entries[entry]);
    counts.steps += counted ? 1 : 0;
    counts.requests += counted ? static_cast<std::int64_t>(experts.size()) : 0;
    for (const std::uint16_t expert : experts) {
      (counted ? uses : uses_of_start)[expert] += 1;
      counts.cold += counted && uses[expert] == 1 && uses_of_start[expert] == 0 ? 1 : 0;
    }
  }
  std::vector<std::uint16_t> kept(preload.begin(), preload.end());
  if (options.start != CacheStart::kPreload) {
    const std::vector<std::int64_t>& ranking = options.start == CacheStart::kPrefill ? uses_of_start : uses;
    for (std::size_t expert = 0; expert < num_experts; ++expert) {
      if (ranking[expert] > 0) {
        kept.push_back(static_cast<std::uint16_t>(expert));
      }
    }
    std::stable_sort(kept.begin(), kept.end(),
                     [&](std::uint16_t a, std::uint16_t b) { return ranking[a] > ranking[b]; });
    kept.resize(std::min(kept.size(), static_cast<std::size_t>(options.slots)));
  }
  std::int64_t hits = 0;
  for (const std::uint16_t expert : kept) {
    hits += uses[expert];
  }
  counts.hits += hits;
  counts.loads += std::accumulate(uses.begin(), uses.end(), std::int64_t{0}) - hits;
}

SimulationCounts simulate_layer(const RoutingTrace& trace, const SimulationOptions& options, std::size_t index,
                                const LayerSteps& steps) {
  SimulationCounts counts;
  const TraceLayer& layer = trace.layers[index];
  const std::span<const std::uint16_t> preload = preloaded(options, index);
  const std::span<const std::size_t> all(steps.entries);
  const auto serve = [&](std::span<const std::size_t> entries, std::int64_t sequence) {
    if (options.policy == CachePolicyKind::kStatic) {
      serve_static(trace, options, entries, preload, counts);
    } else {
      serve_on_demand(trace, options, entries, victim_seed(options.seed, layer.layer, sequence), preload, counts);
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
  if (options.include_prefill && options.start != CacheStart::kCold) {
    throw UsageError(
        "start: must be cold when prefill steps are counted, got another with include_prefill; drop one of them");
  }
  if (options.start != CacheStart::kPreload && !options.preload.empty()) {
    throw UsageError(fmt::format("preload: goes with the start preload only, got {} layers with another start",
                                 options.preload.size()));
  }
  if (options.num_threads < 1) {
    throw UsageError(fmt::format("threads: must be at least 1, got {}; give 1 or more", options.num_threads));
  }
}

void check_preload(const RoutingTrace& trace, const SimulationOptions& options) {
  if (options.start != CacheStart::kPreload) {
    return;
  }
  if (options.preload.size() != trace.layers.size()) {
    throw UsageError(fmt::format("preload: must name the experts of the trace's {} layers, got {} lists",
                                 trace.layers.size(), options.preload.size()));
  }
  for (std::size_t layer = 0; layer < options.preload.size(); ++layer) {
    std::vector<std::uint8_t> seen(static_cast<std::size_t>(trace.num_experts), 0);
    for (const std::uint16_t expert : options.preload[layer]) {
      if (expert >= trace.num_experts || seen[expert] != 0) {
        throw UsageError(fmt::format("preload: layer {} must name different experts below {}, got {}",
                                     trace.layers[layer].layer, trace.num_experts, expert));
      }
      seen[expert] = 1;
    }
  }
}

// `layer_counts` of every layer, on options.num_threads threads.
template <class LayerCounts>
std::vector<SimulationCounts> for_layers(const RoutingTrace& trace, const SimulationOptions& options,
                                         const LayerCounts& layer_counts) {
  check_preload(trace, options);
  const std::vector<LayerSteps> layers =
      layer_steps(trace, options.include_prefill || options.start == CacheStart::kPrefill);
  std::vector<SimulationCounts> counts(layers.size());
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < layers.size(); i = next++) {
      counts[i] = layer_counts(i, layers[i]);
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

std::string_view start_name(CacheStart start) {
  return kStartNames.at(static_cast<std::size_t>(start));
}

CacheStart start_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kStartNames.size(); ++i) {
    if (kStartNames[i] == name) {
      return static_cast<CacheStart>(i);
    }
  }
  const std::string nearest = nearest_name(name, start_names());
  throw UsageError(fmt::format("start: unknown name, got \"{}\"; {}choose one of {}", name,
                               nearest.empty() ? "" : fmt::format("did you mean \"{}\"? ", nearest),
                               fmt::join(kStartNames, ", ")));
}

std::vector<std::string> start_names() {
  return {kStartNames.begin(), kStartNames.end()};
}

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
  return for_layers(trace, options, [&](std::size_t layer, const LayerSteps& steps) {
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
  if (options.start != CacheStart::kCold) {
    throw UsageError("start: must be cold for the segment cache, got another; leave it out");
  }
  if (segment_length < 0) {
    throw UsageError(fmt::format("segment: must be at least 0, got {}; give the steps to look ahead", segment_length));
  }
  SimulationCounts total;
  for (const SimulationCounts& counts : for_layers(trace, options, [&](std::size_t layer, const LayerSteps&steps) {
         SimulationCounts of_layer;
         const std::span<const std::size_t> all(steps.entries);
         for (const LayerSequence& sequence : steps.sequences) {
           serve_with_segment(trace, options, all.subspan(sequence.begin, sequence.end - sequence.begin),
                              segment_length, of_layer);
         }
         of_layer.load_bytes = of_layer.loads * trace.layers[layer].expert_bytes;
         return of_layer;
       })) {
    total += counts;
  }
  return total;
}

}  // namespace hestia
