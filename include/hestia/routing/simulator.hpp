#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/routing/cache_policy.hpp"
#include "hestia/routing/trace.hpp"

namespace hestia {

/// What a cache holds when its first counted step comes. The exact rules stand in docs/routing.md.
enum class CacheStart : std::int32_t { kCold, kPrefill, kPreload };

/// Name on the command line and in results: cold, prefill, preload.
[[nodiscard]] std::string_view start_name(CacheStart start);
/// Inverse of start_name. Throws UsageError with the nearest name.
[[nodiscard]] CacheStart start_from_name(std::string_view name);
/// All names, in enum order.
[[nodiscard]] std::vector<std::string> start_names();

/// Options of one cache simulation.
struct SimulationOptions {
  CachePolicyKind policy = CachePolicyKind::kLru;
  std::int64_t slots = 16;       ///< C, slots per layer, >= 1.
  double gamma = 0.9;            ///< Discount of the gamma-cache, in [0, 1].
  std::uint64_t seed = 1;        ///< Of SplitMix64, for `random`.
  bool include_prefill = false;  ///< Serve and count prefill steps too.
  bool reset_per_sequence = true;
  CacheStart start = CacheStart::kCold;
  /// kPreload: experts per layer, in the order of the trace's layers, best first; the first C are put in place at every
  /// reset. Empty otherwise.
  std::vector<std::vector<std::uint16_t>> preload;
  std::int64_t num_threads = 1;
};

/// Integer counts of one simulation, summed over layers and sequences.
struct SimulationCounts {
  std::int64_t requests = 0;   ///< Distinct experts asked for, summed over steps.
  std::int64_t hits = 0;       ///< Of those, resident before the step moved anything.
  std::int64_t cold = 0;       ///< First request of an expert since the last reset (misses no demand policy avoids).
  std::int64_t loads = 0;      ///< Host-to-device transfers of one expert on demand: one per miss (a pre-load is none).
  std::int64_t evictions = 0;  ///< Experts dropped to make room.
  std::int64_t steps = 0;      ///< Layer steps served (one token, one layer).
  std::int64_t load_bytes = 0;  ///< loads times the expert bytes of their layer (0 when the trace does not say).
  [[nodiscard]] double hit_rate() const {
    return requests == 0 ? 0.0 : static_cast<double>(hits) / static_cast<double>(requests);
  }
  SimulationCounts& operator+=(const SimulationCounts& other);
};

/// Serves `trace` through one slot cache per layer by the exact rules of docs/routing.md and counts.
/// Steps are served whole: hits are counted before anything moves; experts of the step are never victims while C >= K;
/// with C < K the cache keeps, after the step, the C experts that the policy ranks best. The counts do not depend on
/// num_threads. Throws UsageError for slots or num_threads < 1, gamma outside [0, 1], include_prefill with a start
/// other than cold, or a preload that does not fit the trace or the start; std::invalid_argument for a trace that names
/// experts or layers it does not have.
[[nodiscard]] SimulationCounts simulate(const RoutingTrace& trace, const SimulationOptions& options);

/// The same per layer, in the order of `trace.layers`.
[[nodiscard]] std::vector<SimulationCounts> simulate_per_layer(const RoutingTrace& trace,
                                                               const SimulationOptions& options);

/// Serves `trace` through the segment cache of arXiv 2505.16056 ("SCH" is its hit_rate()): a demand cache of
/// `options.slots` slots that knows how often each expert is used in the next `segment_length` steps of its layer and
/// sequence, the step being served left out, and evicts the least used. Ties go to the least recently touched, so a
/// segment of 0 steps is LRU; a segment that reaches the end counts what is left. The rules of a step are those of
/// `simulate`, and the cache is reset at every sequence: `options.policy`, `gamma`, `seed` and `reset_per_sequence` are
/// not read; only a cold start is allowed. Throws UsageError for segment_length < 0 and what `simulate` throws.
[[nodiscard]] SimulationCounts simulate_segment_cache(const RoutingTrace& trace, std::int64_t segment_length,
                                                      const SimulationOptions& options);

}  // namespace hestia
