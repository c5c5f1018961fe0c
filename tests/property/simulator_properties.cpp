#include "hestia/routing/simulator.hpp"

#include <cmath>
#include <numeric>

#include "hestia/routing/metrics.hpp"
#include "random_cases.hpp"

namespace hestia {
namespace {

using namespace testing;
using Kind = CachePolicyKind;

const std::vector<Kind> kOnline = {Kind::kLru, Kind::kLfu, Kind::kGamma, Kind::kLifo, Kind::kFifo, Kind::kRandom};
const std::vector<Kind> kAll = {Kind::kLru,  Kind::kLfu,    Kind::kGamma,  Kind::kLifo,
                                Kind::kFifo, Kind::kRandom, Kind::kStatic, Kind::kBelady};

SimulationOptions options_of(Kind policy, std::int64_t slots) {
  SimulationOptions options;
  options.policy = policy;
  options.slots = slots;
  return options;
}

// Options with everything but the policy drawn, slots below and above K and E.
SimulationOptions random_options(SplitMix64& random, const RoutingTrace& trace) {
  SimulationOptions options;
  options.slots = between(random, 1, trace.num_experts + 2);
  options.gamma = random.uniform();
  options.seed = random.next();
  options.include_prefill = chance(random, 0.3);
  options.reset_per_sequence = chance(random, 0.7);
  options.num_threads = between(random, 1, 3);
  return options;
}

bool same_counts(const SimulationCounts& a, const SimulationCounts& b) {
  return a.requests == b.requests && a.hits == b.hits && a.cold == b.cold && a.loads == b.loads &&
         a.evictions == b.evictions && a.steps == b.steps && a.load_bytes == b.load_bytes;
}

// The trace without what `keep` refuses.
template <class Keep>
RoutingTrace filtered(const RoutingTrace& trace, const Keep& keep) {
  RoutingTrace result = trace;
  std::erase_if(result.entries, [&](const TraceEntry& entry) { return !keep(entry); });
  return result;
}

TEST_CASE("property: requests, hits, cold misses, loads, evictions and bytes add up in every layer") {
  for_cases(240, 1000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    SimulationOptions options = random_options(random, trace);
    for (const Kind policy : kAll) {
      options.policy = policy;
      const std::vector<SimulationCounts> layers = simulate_per_layer(trace, options);
      REQUIRE(layers.size() == trace.layers.size());
      SimulationCounts total;
      for (std::size_t layer = 0; layer < layers.size(); ++layer) {
        CAPTURE(policy_name(policy), options.slots, options.include_prefill, options.reset_per_sequence, layer);
        // From one reset to the next.
        std::map<std::int64_t, Steps> lives;
        for (const auto& [key, steps] : served_steps(trace, options.include_prefill)) {
          if (key.first == trace.layers[layer].layer) {
            Steps& life = lives[options.reset_per_sequence ? key.second : 0];
            life.insert(life.end(), steps.begin(), steps.end());
          }
        }
        std::int64_t requests = 0;
        std::int64_t num_steps = 0;
        std::int64_t cold = 0;
        std::int64_t residents = 0;
        std::int64_t best_fixed = 0;
        for (const auto& [id, steps] : lives) {
          std::vector<std::int64_t> uses(static_cast<std::size_t>(trace.num_experts), 0);
          for (const auto& step : steps) {
            requests += static_cast<std::int64_t>(step.size());
            for (const std::uint16_t expert : step) {
              uses[expert] += 1;
            }
          }
          std::sort(uses.rbegin(), uses.rend());
          uses.resize(std::min(uses.size(), static_cast<std::size_t>(options.slots)));
          best_fixed = std::accumulate(uses.begin(), uses.end(), best_fixed);
          num_steps += static_cast<std::int64_t>(steps.size());
          cold += distinct_of(steps);
          residents += std::min(options.slots, distinct_of(steps));
        }
        const SimulationCounts& counts = layers[layer];
        CHECK(counts.steps == num_steps);
        CHECK(counts.requests == requests);
        CHECK(counts.cold == cold);
        CHECK(counts.loads == counts.requests - counts.hits);
        CHECK(counts.load_bytes == counts.loads * trace.layers[layer].expert_bytes);
        if (policy == Kind::kStatic) {
          CHECK(counts.evictions == 0);
          CHECK(counts.hits == best_fixed);
        } else {
          CHECK(counts.loads - counts.evictions == residents);
          CHECK(counts.hits <= counts.requests - counts.cold);
          if (options.slots >= trace.num_experts) {
            CHECK(counts.hits == counts.requests - counts.cold);
          }
        }
        total += counts;
      }
      CHECK(same_counts(total, simulate(trace, options)));
    }
  });
}

TEST_CASE("property: MIN has at least the hits of every other policy that starts cold, at every number of slots") {
  for_cases(120, 2000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    SimulationOptions options = random_options(random, trace);
    std::int64_t fewer_slots = 0;
    for (std::int64_t slots = 1; slots <= trace.num_experts; ++slots) {
      options.slots = slots;
      options.policy = Kind::kBelady;
      const std::int64_t bound = simulate(trace, options).hits;
      for (const Kind policy : kOnline) {
        options.policy = policy;
        CAPTURE(policy_name(policy), slots, options.gamma);
        CHECK(simulate(trace, options).hits <= bound);
      }
      // Below the size of a step the cache may let go of what it has just served, from K on it may not: that choice
      // can be worth more than a slot, so the sets are nested on either side of K only.
      if (slots > trace.top_k) {
        CAPTURE(slots);
        CHECK(bound >= fewer_slots);
      }
      fewer_slots = bound;
    }
  });
}

TEST_CASE("property: inclusion: with one slot more, no step has fewer hits") {
  for_cases(75, 3000, [](SplitMix64& random) {
    TraceShape shape = random_shape(random);
    shape.num_sequences = 1;
    shape.num_layers = 1;
    shape.skip = 0.0;
    shape.prefill = 0.0;
    shape.num_experts = std::min<std::int64_t>(shape.num_experts, 12);
    shape.top_k = std::min(shape.top_k, shape.num_experts);
    shape.max_steps = std::min<std::int64_t>(shape.max_steps, 30);
    RoutingTrace trace = random_trace(random, shape);
    if (chance(random, 0.5)) {
      thin(random, trace);
    }
    // What has been served decides, so the hits of step t are what the trace up to t has more than the one up to t-1.
    const auto hits_by_step = [&](Kind policy, std::int64_t slots, double gamma) {
      SimulationOptions options = options_of(policy, slots);
      options.gamma = gamma;
      std::vector<std::int64_t> hits;
      RoutingTrace prefix = trace;
      for (std::size_t length = trace.entries.size(); length > 0; --length) {
        prefix.entries.resize(length);
        hits.push_back(simulate(prefix, options).hits);
      }
      for (std::size_t i = 0; i + 1 < hits.size(); ++i) {
        hits[i] -= hits[i + 1];
      }
      return hits;
    };
    const double gamma = random.uniform();
    for (const Kind policy : {Kind::kLru, Kind::kLfu, Kind::kGamma}) {
      // LRU orders the experts of a step like all others, so its sets are nested below K too.
      const std::int64_t first = policy == Kind::kLru ? 1 : shape.top_k;
      std::vector<std::int64_t> fewer = hits_by_step(policy, first, gamma);
      for (std::int64_t slots = first + 1; slots <= shape.num_experts; ++slots) {
        const std::vector<std::int64_t> more = hits_by_step(policy, slots, gamma);
        for (std::size_t i = 0; i < more.size(); ++i) {
          CAPTURE(policy_name(policy), slots, gamma, i);
          CHECK(more[i] >= fewer[i]);
        }
        fewer = more;
      }
    }
  });
}

TEST_CASE("property: the gamma-cache ends at LRU and LFU, for steps of any size") {
  for_cases(180, 4000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    SimulationOptions options = random_options(random, trace);
    const auto counts = [&](Kind policy, double gamma) {
      options.policy = policy;
      options.gamma = gamma;
      return simulate(trace, options);
    };
    CAPTURE(options.slots, options.include_prefill, options.reset_per_sequence);
    CHECK(same_counts(counts(Kind::kGamma, 1.0), counts(Kind::kLfu, 0.5)));
    CHECK(same_counts(counts(Kind::kGamma, 0.0), counts(Kind::kLru, 0.5)));
  });
}

TEST_CASE("property: K slots under LRU are the step before: hits are the overlap, hit rate EOR * pairs / steps") {
  for_cases(180, 5000, [](SplitMix64& random) {
    const RoutingTrace trace = random_trace(random, random_shape(random));
    SimulationOptions options = options_of(Kind::kLru, trace.top_k);
    options.include_prefill = chance(random, 0.5);
    std::int64_t overlap = 0;
    std::int64_t num_steps = 0;
    std::int64_t pairs = 0;
    for (const auto& [key, steps] : served_steps(trace, options.include_prefill)) {
      overlap += overlap_of(steps);
      num_steps += static_cast<std::int64_t>(steps.size());
      pairs += static_cast<std::int64_t>(steps.size()) - 1;
    }
    const SimulationCounts counts = simulate(trace, options);
    const double eor = expert_overlap_ratio(trace, options.include_prefill);
    CHECK(eor >= 0.0);
    CHECK(eor <= 1.0);
    CHECK(counts.hits == overlap);
    if (num_steps > 0) {
      CHECK(counts.hit_rate() ==
            Approx(eor * static_cast<double>(pairs) / static_cast<double>(num_steps)).margin(1e-12));
    }
  });
}

TEST_CASE("property: fewer slots than experts of a step: LRU keeps the heaviest of the step before") {
  for_cases(180, 5500, [](SplitMix64& random) {
    const RoutingTrace trace = random_trace(random, random_shape(random));
    const std::int64_t slots = between(random, 1, trace.top_k);
    std::int64_t expected = 0;
    for (const auto& [key, steps] : served_steps(trace, false)) {
      for (std::size_t t = 1; t < steps.size(); ++t) {
        const auto& before = steps[t - 1];
        for (const std::uint16_t expert : steps[t]) {
          expected += std::count(before.begin(), before.begin() + slots, expert);
        }
      }
    }
    CAPTURE(slots, trace.top_k);
    CHECK(simulate(trace, options_of(Kind::kLru, slots)).hits == expected);
  });
}

TEST_CASE("property: with K slots or more, loads per token after the first are at most K (1 - EOR)") {
  for_cases(180, 6000, [](SplitMix64& random) {
    const RoutingTrace trace = random_trace(random, random_shape(random));
    std::int64_t lives = 0;
    std::int64_t pairs = 0;
    for (const auto& [key, steps] : served_steps(trace, false)) {
      lives += 1;
      pairs += static_cast<std::int64_t>(steps.size()) - 1;
    }
    const auto top_k = static_cast<double>(trace.top_k);
    const double bound = top_k * (1.0 - expert_overlap_ratio(trace)) * static_cast<double>(pairs);
    // Not for LRU alone: no policy gives up an expert of the step just served.
    for (const Kind policy : kOnline) {
      SimulationOptions options = options_of(policy, between(random, trace.top_k, trace.num_experts));
      options.seed = random.next();
      CAPTURE(policy_name(policy), options.slots);
      const double after_first =
          static_cast<double>(simulate(trace, options).loads) - top_k * static_cast<double>(lives);
      CHECK(after_first <= bound + 1e-6);
    }
  });
}

TEST_CASE("property: routing that remembers nothing hits with probability C/E, whatever the sizes") {
  for_cases(36, 7000, [](SplitMix64& random) {
    const std::int64_t num_experts = between(random, 4, 40);
    const std::int64_t top_k = between(random, 1, std::max<std::int64_t>(1, num_experts / 3));
    Steps steps;
    for (int t = 0; t < 3000; ++t) {
      steps.push_back(random_experts(random, num_experts, top_k));
    }
    const RoutingTrace trace = trace_of(num_experts, steps);
    const std::int64_t slots = between(random, 1, num_experts);
    const double requests = 3000.0 * static_cast<double>(top_k);
    for (const Kind policy : kOnline) {
      CAPTURE(policy_name(policy), num_experts, top_k, slots);
      // Hits less their expectation are a martingale of variance at most requests/4; a cache that still fills costs at
      // most C hits.
      const double rate = simulate(trace, options_of(policy, slots)).hit_rate();
      const double expected = static_cast<double>(slots) / static_cast<double>(num_experts);
      const double spread = 5.0 * 0.5 / std::sqrt(requests);
      CHECK(rate <= expected + spread);
      CHECK(rate >= expected - spread - static_cast<double>(slots) / requests);
    }
  });
}

TEST_CASE("property: the names of the experts do not matter where ties cannot reach them") {
  for_cases(180, 8000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    const RoutingTrace other = renamed(random, trace);
    SimulationOptions options = random_options(random, trace);
    for (const Kind policy :
         {Kind::kLru, Kind::kLfu, Kind::kGamma, Kind::kLifo, Kind::kFifo, Kind::kStatic, Kind::kBelady}) {
      options.policy = policy;
      CAPTURE(policy_name(policy), options.slots, options.gamma);
      CHECK(same_counts(simulate(trace, options), simulate(other, options)));
    }
    CHECK(expert_overlap_ratio(trace) == expert_overlap_ratio(other));
    CHECK(distinct_experts(trace) == distinct_experts(other));
  });
}

TEST_CASE("property: a reset parts sequences: together they count what each counts alone, in any order") {
  for_cases(150, 9000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    SimulationOptions options = random_options(random, trace);
    options.reset_per_sequence = true;
    std::vector<std::int64_t> ids;
    for (const TraceEntry& entry : trace.entries) {
      if (ids.empty() || ids.back() != entry.sequence) {
        ids.push_back(entry.sequence);
      }
    }
    RoutingTrace reversed = trace;
    reversed.entries.clear();
    for (auto id = ids.rbegin(); id != ids.rend(); ++id) {
      const RoutingTrace alone = filtered(trace, [&](const TraceEntry& entry) { return entry.sequence == *id; });
      reversed.entries.insert(reversed.entries.end(), alone.entries.begin(), alone.entries.end());
    }
    for (const Kind policy : kAll) {
      options.policy = policy;
      SimulationCounts sum;
      for (const std::int64_t id : ids) {
        sum += simulate(filtered(trace, [&](const TraceEntry& entry) { return entry.sequence == id; }), options);
      }
      CAPTURE(policy_name(policy), options.slots);
      const SimulationCounts together = simulate(trace, options);
      CHECK(same_counts(together, sum));
      CHECK(same_counts(together, simulate(reversed, options)));
    }
  });
}

TEST_CASE("property: without a reset, sequences are one sequence") {
  for_cases(150, 10000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    RoutingTrace joined = trace;
    std::int64_t step = 0;
    for (std::size_t i = 0; i < joined.entries.size(); ++i) {
      const bool next = i > 0 && (trace.entries[i].sequence != trace.entries[i - 1].sequence ||
                                  trace.entries[i].step != trace.entries[i - 1].step);
      step += next ? 1 : 0;
      joined.entries[i].sequence = trace.entries.front().sequence;
      joined.entries[i].step = step;
    }
    SimulationOptions options = random_options(random, trace);
    for (const Kind policy : kAll) {
      // A layer that the first sequence skips starts `random` from another sequence's seed.
      if (policy == Kind::kRandom) {
        continue;
      }
      options.policy = policy;
      options.reset_per_sequence = false;
      const SimulationCounts counts = simulate(trace, options);
      options.reset_per_sequence = true;
      CAPTURE(policy_name(policy), options.slots);
      CHECK(same_counts(counts, simulate(joined, options)));
    }
  });
}

TEST_CASE(
    "property: a step served twice in a row loads nothing the second time and disturbs no order of touch or load") {
  for_cases(150, 11000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    RoutingTrace doubled = trace;
    doubled.entries.clear();
    for (std::size_t begin = 0; begin < trace.entries.size();) {
      std::size_t end = begin;
      while (end < trace.entries.size() && trace.entries[end].sequence == trace.entries[begin].sequence &&
             trace.entries[end].step == trace.entries[begin].step) {
        ++end;
      }
      for (const std::int64_t half : {0, 1}) {
        for (std::size_t i = begin; i < end; ++i) {
          doubled.entries.push_back(trace.entries[i]);
          doubled.entries.back().step = 2 * trace.entries[i].step + half;
        }
      }
      begin = end;
    }
    SimulationOptions options = random_options(random, trace);
    options.slots = between(random, trace.top_k, trace.num_experts);
    for (const Kind policy : {Kind::kLru, Kind::kFifo, Kind::kLifo, Kind::kBelady}) {
      options.policy = policy;
      const SimulationCounts once = simulate(trace, options);
      const SimulationCounts twice = simulate(doubled, options);
      CAPTURE(policy_name(policy), options.slots);
      CHECK(twice.requests == 2 * once.requests);
      CHECK(twice.loads == once.loads);
      CHECK(twice.evictions == once.evictions);
    }
  });
}

TEST_CASE("property: the segment cache obeys the step's identities, starts at LRU, and MIN bounds it") {
  for_cases(120, 12000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    SimulationOptions options = random_options(random, trace);
    options.reset_per_sequence = true;
    const auto at = [&](std::int64_t length) { return simulate_segment_cache(trace, length, options); };
    const SimulationCounts some = at(between(random, 0, 20));
    options.policy = Kind::kLru;
    const SimulationCounts lru = simulate(trace, options);
    CHECK(same_counts(at(0), lru));
    options.policy = Kind::kBelady;
    const SimulationCounts bound = simulate(trace, options);
    CHECK(some.hits <= bound.hits);
    CHECK(some.requests == bound.requests);
    CHECK(some.cold == bound.cold);
    CHECK(some.steps == bound.steps);
    CHECK(some.loads == some.requests - some.hits);
    CHECK(some.evictions <= some.loads);
    CHECK(some.hits <= some.requests - some.cold);
    if (options.slots >= trace.num_experts) {
      CHECK(some.hits == some.requests - some.cold);
      CHECK(some.evictions == 0);
    }
  });
}

TEST_CASE("property: a segment longer than the sequence is a cache that knows how often each expert is still to come") {
  for_cases(120, 13000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    SimulationOptions options = random_options(random, trace);
    options.reset_per_sequence = true;
    std::int64_t hits = 0;
    std::int64_t longest = 0;
    for (const auto& [key, steps] : served_steps(trace, options.include_prefill)) {
      longest = std::max(longest, static_cast<std::int64_t>(steps.size()));
      std::map<std::uint16_t, std::int64_t> left;  // Uses still to come.
      for (const auto& step : steps) {
        for (const std::uint16_t expert : step) {
          left[expert] += 1;
        }
      }
      std::map<std::uint16_t, std::int64_t> resident;  // When each was touched.
      std::int64_t clock = 0;
      for (const auto& step : steps) {
        for (auto expert = step.rbegin(); expert != step.rend(); ++expert) {
          hits += static_cast<std::int64_t>(resident.count(*expert));
          resident[*expert] = clock++;
          left[*expert] -= 1;
        }
        const bool fits = static_cast<std::int64_t>(step.size()) <= options.slots;
        while (static_cast<std::int64_t>(resident.size()) > options.slots) {
          auto victim = resident.end();
          for (auto it = resident.begin(); it != resident.end(); ++it) {
            const bool served_now = std::find(step.begin(), step.end(), it->first) != step.end();
            if (!(fits && served_now) &&
                (victim == resident.end() ||
                 std::pair(left[it->first], it->second) < std::pair(left[victim->first], victim->second))) {
              victim = it;
            }
          }
          resident.erase(victim);
        }
      }
    }
    // From the second step to the last are T - 1.
    const SimulationCounts counts = simulate_segment_cache(trace, std::max<std::int64_t>(0, longest - 1), options);
    CHECK(counts.hits == hits);
    CHECK(same_counts(counts, simulate_segment_cache(trace, std::int64_t{1} << 60, options)));
  });
}

}  // namespace
}  // namespace hestia
