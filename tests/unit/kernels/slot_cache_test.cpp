#include "hestia/kernels/slot_cache.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/random.hpp"
#include "hestia/kernels/soft_cache.hpp"
#include "hestia/routing/simulator.hpp"
#include "tests/unit/routing/routing_fixtures.hpp"

using namespace hestia;
using Kind = CachePolicyKind;

namespace {

const std::vector<Kind> kServed = {Kind::kLru,  Kind::kLfu,    Kind::kGamma, Kind::kLifo,
                                   Kind::kFifo, Kind::kRandom, Kind::kStatic};

constexpr std::int32_t kUnwritten = -77;

struct Answer {
  Answer(const SlotCacheShape& shape, std::int64_t num_selected)
      : loads(static_cast<std::size_t>(std::min(shape.num_experts, num_selected)) + 1,
              {kUnwritten, kUnwritten, kUnwritten}),
        slots(static_cast<std::size_t>(num_selected) + 1, kUnwritten),
        waves(slots),
        wave_slots(static_cast<std::size_t>(slot_cache_max_waves(shape, num_selected) * num_selected) + 1, kUnwritten) {
  }
  [[nodiscard]] SlotCacheAnswer view() { return {&step, loads.data(), slots.data(), waves.data(), wave_slots.data()}; }
  /// Each wave's own slots, by the plain lists.
  void check_wave_slots() const {
    const std::size_t num_selected = slots.size() - 1;
    for (std::size_t i = 0; i + 1 < wave_slots.size(); ++i) {
      const std::size_t of = i % num_selected;
      REQUIRE(wave_slots[i] == (waves[of] == static_cast<std::int32_t>(i / num_selected) ? slots[of] : -1));
    }
    REQUIRE(wave_slots.back() == kUnwritten);
  }
  SlotCacheStep step;
  std::vector<SlotCacheLoad> loads;  // one more than may be written, like the others
  std::vector<std::int32_t> slots;
  std::vector<std::int32_t> waves;
  std::vector<std::int32_t> wave_slots;
};

/// A cache in host memory, and what lies in every slot.
struct Cache {
  explicit Cache(const SlotCacheShape& of)
      : shape(of),
        memory(slot_cache_bytes(of) / sizeof(std::max_align_t) + 1, std::max_align_t()),
        state(slot_cache_state(of, memory.data())),
        content(static_cast<std::size_t>(slot_cache_num_slots(of)), -1) {}

  [[nodiscard]] std::int64_t num_groups() const { return shape.num_layers / shape.layers_per_group; }
  [[nodiscard]] std::int64_t num_keys() const { return shape.layers_per_group * shape.num_experts; }

  /// The tables agree, and the slots hold what they say.
  void check_tables() const {
    for (std::int64_t group = 0; group < num_groups(); ++group) {
      std::int64_t residents = 0;
      for (std::int64_t slot = group * shape.slots; slot < (group + 1) * shape.slots; ++slot) {
        const std::int32_t key = state.key_of[slot];
        if (key >= 0) {
          ++residents;
          REQUIRE(key < num_keys());
          REQUIRE(state.slot_of[group * num_keys() + key] == slot);
          REQUIRE(content[static_cast<std::size_t>(slot)] == group * num_keys() + key);
        }
      }
      REQUIRE(residents == state.groups[group].num_residents);
      REQUIRE(std::count_if(state.slot_of + group * num_keys(), state.slot_of + (group + 1) * num_keys(),
                            [](std::int32_t slot) { return slot >= 0; }) == residents);
    }
  }

  /// Copies into the slots what the tables say, as after a start.
  void fill() {
    for (std::int64_t slot = 0; slot < num_groups() * shape.slots; ++slot) {
      if (state.key_of[slot] >= 0) {
        content[static_cast<std::size_t>(slot)] = slot / shape.slots * num_keys() + state.key_of[slot];
      }
    }
  }

  SlotCacheShape shape;
  std::vector<std::max_align_t> memory;
  SlotCacheState state;
  std::vector<std::int64_t> content;
};

/// Serves a step and carries its waves out: every selected expert must lie in its slot in its wave.
template <class Index>
void serve_and_check(Cache& cache, std::int64_t layer, const std::vector<Index>& selected, std::int64_t top_k) {
  const SlotCacheShape& shape = cache.shape;
  const auto count = static_cast<std::int64_t>(selected.size());
  const std::vector<std::int32_t> before(cache.state.key_of, cache.state.key_of + cache.num_groups() * shape.slots);
  const SlotCacheCounts counts = cache.state.counts[layer];
  const std::int64_t residents = cache.state.groups[layer / shape.layers_per_group].num_residents;
  Answer answer(shape, count);
  slot_cache_serve_cpu(shape, cache.state, layer, selected.data(), count / top_k, top_k, answer.view());
  answer.check_wave_slots();
  const SlotCacheStep& step = answer.step;
  const auto is_expert = [&](Index id) { return id >= 0 && id < shape.num_experts; };

  std::map<std::int32_t, std::vector<std::size_t>> waves;
  std::vector<Index> distinct;
  for (std::size_t i = 0; i < selected.size(); ++i) {
    REQUIRE((answer.slots[i] >= 0) == is_expert(selected[i]));
    REQUIRE((answer.waves[i] >= 0) == is_expert(selected[i]));
    if (is_expert(selected[i])) {
      waves[answer.waves[i]].push_back(i);
      distinct.push_back(selected[i]);
    }
  }
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  REQUIRE(step.requests == static_cast<std::int32_t>(distinct.size()));
  REQUIRE(step.waves >= 1);
  REQUIRE(step.waves <= slot_cache_max_waves(shape, count));
  REQUIRE((waves.empty() || waves.rbegin()->first < step.waves));
  REQUIRE(answer.slots.back() == kUnwritten);
  REQUIRE(answer.waves.back() == kUnwritten);
  for (std::size_t i = static_cast<std::size_t>(step.loads); i < answer.loads.size(); ++i) {
    REQUIRE(answer.loads[i].slot == kUnwritten);
  }
  std::vector<std::int32_t> hit_slots;
  std::size_t loaded = 0;
  for (std::int32_t wave = 0; wave < step.waves; ++wave) {
    std::vector<std::int32_t> written;
    for (; wave > 0 && loaded < static_cast<std::size_t>(std::min(step.loads, wave * step.wave_size)); ++loaded) {
      const SlotCacheLoad& load = answer.loads[loaded];
      REQUIRE(load.slot >= 0);
      REQUIRE(load.slot < slot_cache_num_slots(shape));
      const bool scratch = load.slot >= static_cast<std::int32_t>(before.size());
      REQUIRE((scratch || load.slot / shape.slots == layer / shape.layers_per_group));
      REQUIRE(load.victim == (scratch || wave > 1 ? -1 : before[static_cast<std::size_t>(load.slot)]));
      cache.content[static_cast<std::size_t>(load.slot)] = layer * shape.num_experts + load.expert;
      written.push_back(load.slot);
    }
    std::sort(written.begin(), written.end());
    REQUIRE(std::adjacent_find(written.begin(), written.end()) == written.end());
    if (wave == 1) {
      const bool clash = std::any_of(written.begin(), written.end(), [&](std::int32_t slot) {
        return std::find(hit_slots.begin(), hit_slots.end(), slot) != hit_slots.end();
      });
      REQUIRE((!clash || step.waits_for_hits == 1));
      REQUIRE((wave == 0 || !written.empty()));
    }
    for (const std::size_t i : waves[wave]) {
      REQUIRE(cache.content[static_cast<std::size_t>(answer.slots[i])] ==
              layer * shape.num_experts + static_cast<std::int64_t>(selected[i]));
      if (wave == 0) {
        hit_slots.push_back(answer.slots[i]);
      }
    }
  }
  REQUIRE(loaded == static_cast<std::size_t>(step.loads));
  if (step.requests <= shape.slots && shape.policy != Kind::kStatic) {
    REQUIRE(step.waves <= 2);
    REQUIRE(step.waits_for_hits == 0);
  }
  cache.check_tables();
  const SlotCacheCounts& after = cache.state.counts[layer];
  REQUIRE(after.steps == counts.steps + 1);
  REQUIRE(after.requests == counts.requests + step.requests);
  REQUIRE(after.loads == counts.loads + step.loads);
  REQUIRE(after.hits == counts.hits + step.requests - step.loads);
  const std::int64_t grown = cache.state.groups[layer / shape.layers_per_group].num_residents - residents;
  REQUIRE(grown == (shape.policy == Kind::kStatic ? 0 : step.loads - (after.evictions - counts.evictions)));
}

/// Steps of some layers, [layers][steps][rows * K], the first `prefill` of them prefill.
struct Steps {
  std::int64_t rows = 1;
  std::int64_t top_k = 1;
  std::int64_t prefill = 0;
  std::vector<std::vector<std::vector<std::int64_t>>> selected;
};

Steps random_steps(SplitMix64& random, std::int64_t num_layers, std::int64_t num_experts, std::int64_t num_steps,
                   std::int64_t rows, std::int64_t top_k) {
  Steps steps{rows, top_k, static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(num_steps / 2))), {}};
  const double sticky = random.uniform();
  const double idle = random.below(3) == 0 ? 0.3 : 0.0;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    std::vector<std::vector<std::int64_t>> of_layer;
    for (std::int64_t step = 0; step < num_steps; ++step) {
      std::vector<std::int64_t> ids;
      for (std::int64_t row = 0; row < rows; ++row) {
        std::vector<std::uint16_t> experts = testing::random_experts(random, num_experts, top_k);
        if (random.uniform() < idle) {
          ids.insert(ids.end(), static_cast<std::size_t>(top_k), row % 2 == 0 ? -1 : num_experts);
        } else if (step > 0 && random.uniform() < sticky) {
          const auto from = of_layer.back().begin() + row * top_k;
          ids.insert(ids.end(), from, from + top_k);
          std::reverse(ids.end() - top_k, ids.end());
        } else {
          ids.insert(ids.end(), experts.begin(), experts.end());
        }
      }
      of_layer.push_back(ids);
    }
    steps.selected.push_back(of_layer);
  }
  return steps;
}

// The distinct experts of a step by falling weight, in another way than the cache: by their best (rank, row).
std::vector<std::uint16_t> union_of(const std::vector<std::int64_t>& ids, std::int64_t top_k,
                                    std::int64_t num_experts) {
  std::map<std::int64_t, std::pair<std::int64_t, std::int64_t>> best;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(ids.size()); ++i) {
    const std::int64_t id = ids[static_cast<std::size_t>(i)];
    const std::pair<std::int64_t, std::int64_t> place{i % top_k, i / top_k};
    if (id >= 0 && id < num_experts && (best.count(id) == 0 || place < best[id])) {
      best[id] = place;
    }
  }
  std::vector<std::uint16_t> experts;
  experts.reserve(best.size());
  for (const auto& [id, place] : best) {
    experts.push_back(static_cast<std::uint16_t>(id));
  }
  std::sort(experts.begin(), experts.end(), [&](std::uint16_t a, std::uint16_t b) { return best[a] < best[b]; });
  return experts;
}

RoutingTrace trace_of_steps(const Steps& steps, std::int64_t num_experts) {
  RoutingTrace trace;
  trace.num_layers = static_cast<std::int64_t>(steps.selected.size());
  trace.num_experts = num_experts;
  trace.top_k = num_experts;
  for (std::int64_t layer = 0; layer < trace.num_layers; ++layer) {
    trace.layers.push_back({layer, 10, 0});
  }
  for (std::size_t step = 0; step < steps.selected[0].size(); ++step) {
    for (std::size_t layer = 0; layer < steps.selected.size(); ++layer) {
      const std::vector<std::uint16_t> experts = union_of(steps.selected[layer][step], steps.top_k, num_experts);
      trace.entries.push_back({4, static_cast<std::int64_t>(step), static_cast<std::int32_t>(layer),
                               static_cast<std::int64_t>(step) < steps.prefill ? Phase::kPrefill : Phase::kDecode,
                               static_cast<std::uint32_t>(experts.size()), trace.experts.size()});
      trace.experts.insert(trace.experts.end(), experts.begin(), experts.end());
    }
  }
  trace.weights.assign(trace.experts.size(), 0.0F);
  return trace;
}

void check_counts(const SlotCacheCounts& found, const SimulationCounts& expected) {
  CHECK(found.steps == expected.steps);
  CHECK(found.requests == expected.requests);
  CHECK(found.hits == expected.hits);
  CHECK(found.cold == expected.cold);
  CHECK(found.loads == expected.loads);
  CHECK(found.evictions == expected.evictions);
}

std::vector<std::uint64_t> seeds_of(std::int64_t num_layers, std::uint64_t seed, std::int64_t sequence) {
  std::vector<std::uint64_t> seeds;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    seeds.push_back(victim_seed(seed, layer, sequence));
  }
  return seeds;
}

/// Everything a run needs beside the steps.
struct Case {
  SlotCacheShape shape;
  CacheStart start = CacheStart::kCold;
  std::vector<std::int32_t> preload;  // [groups, preload_count]
  std::int64_t preload_count = 0;
  std::vector<std::uint64_t> seeds;
  Steps steps;

  [[nodiscard]] std::string text() const {
    return "E " + std::to_string(shape.num_experts) + ", K " + std::to_string(steps.top_k) + ", C " +
           std::to_string(shape.slots) + ", rows " + std::to_string(steps.rows) + ", scratch " +
           std::to_string(shape.scratch_slots) + ", layers per group " + std::to_string(shape.layers_per_group) + ", " +
           std::string(policy_name(shape.policy)) + ", start " + std::to_string(static_cast<int>(start)) +
           (shape.stress ? ", stress" : "");
  }
};

Case random_case(SplitMix64& random, bool pooled) {
  const auto draw = [&](std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(high - low + 1)));
  };
  Case c;
  c.shape.num_layers = pooled ? 3 : 2;
  c.shape.layers_per_group = pooled ? 3 : 1;
  const std::int64_t most = std::vector<std::int64_t>{4, 16, 64, 256}.at(random.below(4));
  c.shape.num_experts = draw(1, most);
  const std::int64_t num_keys = c.shape.layers_per_group * c.shape.num_experts;
  c.shape.slots = random.below(2) == 0 ? draw(1, num_keys) : draw(1, std::min<std::int64_t>(num_keys, 12));
  c.shape.scratch_slots = draw(1, 4);
  c.shape.policy = kServed.at(random.below(kServed.size()));
  c.shape.gamma = std::vector<double>{0.0, 0.9, 0.37, 1.0}.at(random.below(4));
  c.start = static_cast<CacheStart>(random.below(3));
  if (c.shape.policy == Kind::kStatic && c.start == CacheStart::kCold) {
    c.start = CacheStart::kPreload;
  }
  if (c.start == CacheStart::kPreload) {
    c.preload_count = draw(1, num_keys);
    for (std::int64_t group = 0; group < c.shape.num_layers / c.shape.layers_per_group; ++group) {
      const auto keys = testing::random_experts(random, num_keys, c.preload_count);
      c.preload.insert(c.preload.end(), keys.begin(), keys.end());
    }
    c.preload[static_cast<std::size_t>(c.preload_count) - 1] = -1;
  }
  c.seeds = seeds_of(c.shape.num_layers / c.shape.layers_per_group, 5, 4);
  const std::int64_t rows = random.below(2) == 0 ? 1 : draw(1, 32);
  c.steps = random_steps(random, c.shape.num_layers, c.shape.num_experts, draw(4, 40), rows,
                         draw(1, std::min<std::int64_t>(8, c.shape.num_experts)));
  return c;
}

void start(Cache& cache, const Case& c) {
  slot_cache_reset_cpu(c.shape, cache.state, c.preload.empty() ? nullptr : c.preload.data(), c.preload_count,
                       c.seeds.data());
  for (std::int64_t layer = 0; c.start == CacheStart::kPrefill && layer < c.shape.num_layers; ++layer) {
    std::vector<std::int64_t> prompt;
    for (std::int64_t step = 0; step < c.steps.prefill; ++step) {
      const auto& ids = c.steps.selected[static_cast<std::size_t>(layer)][static_cast<std::size_t>(step)];
      prompt.insert(prompt.end(), ids.begin(), ids.end());
    }
    slot_cache_touch_cpu(c.shape, cache.state, layer, prompt.data(), c.steps.prefill, c.steps.rows, c.steps.top_k);
  }
  cache.fill();
  cache.check_tables();
}

void decode(Cache& cache, const Case& c) {
  for (auto step = static_cast<std::size_t>(c.steps.prefill); step < c.steps.selected[0].size(); ++step) {
    for (std::int64_t layer = 0; layer < c.shape.num_layers; ++layer) {
      serve_and_check(cache, layer, c.steps.selected[static_cast<std::size_t>(layer)][step], c.steps.top_k);
    }
  }
}

SimulationOptions options_of(const Case& c) {
  SimulationOptions options;
  options.policy = c.shape.policy;
  options.slots = c.shape.slots;
  options.gamma = c.shape.gamma;
  options.seed = 5;
  options.start = c.start;
  for (std::int64_t layer = 0; c.start == CacheStart::kPreload && layer < c.shape.num_layers; ++layer) {
    const auto first = c.preload.begin() + layer * c.preload_count;
    options.preload.emplace_back(first, std::find(first, first + c.preload_count, -1));
  }
  return options;
}

}  // namespace

TEST_CASE("the slot cache counts what the simulator counts, and its waves hold what they use") {
  SplitMix64 random(20261126);
  std::int64_t large_steps = 0;
  std::int64_t evictions = 0;
  for (int i = 0; i < 700; ++i) {
    const Case c = random_case(random, false);
    INFO("case " << i << ": " << c.text());
    Cache cache(c.shape);
    start(cache, c);
    decode(cache, c);
    const auto expected = simulate_per_layer(trace_of_steps(c.steps, c.shape.num_experts), options_of(c));
    for (std::size_t layer = 0; layer < expected.size(); ++layer) {
      check_counts(cache.state.counts[layer], expected[layer]);
      large_steps += expected[layer].requests > expected[layer].steps * c.shape.slots ? 1 : 0;
      evictions += expected[layer].evictions;
    }
  }
  CHECK(large_steps > 100);
  CHECK(evictions > 10000);
}

TEST_CASE("a slot cache that is static from a cold start holds what it was told: the simulator's foresight") {
  SplitMix64 random(3);
  Case c;
  c.shape = {.num_layers = 2, .num_experts = 12, .slots = 4, .policy = Kind::kStatic};
  c.steps = random_steps(random, 2, 12, 50, 1, 3);
  c.steps.prefill = 0;
  for (const auto& of_layer : c.steps.selected) {
    std::vector<std::pair<int, std::int32_t>> uses;
    for (std::int32_t expert = 0; expert < 12; ++expert) {
      int count = 0;
      for (const auto& ids : of_layer) {
        count += static_cast<int>(std::count(ids.begin(), ids.end(), expert));
      }
      uses.emplace_back(-count, expert);
    }
    std::sort(uses.begin(), uses.end());
    for (std::size_t i = 0; i < 4; ++i) {
      c.preload.push_back(uses[i].second);
    }
  }
  c.preload_count = 4;
  Cache cache(c.shape);
  start(cache, c);
  decode(cache, c);
  const auto expected = simulate_per_layer(trace_of_steps(c.steps, 12), options_of(c));
  check_counts(cache.state.counts[0], expected[0]);
  check_counts(cache.state.counts[1], expected[1]);
}

TEST_CASE("the slot cache gives the golden counts of the recorded trace", "[golden]") {
  const auto path = testing::recorded_trace();
  if (!path) {
    return;
  }
  const RoutingTrace trace = read_trace(*path);
  const std::map<Kind, std::vector<std::int64_t>> golden = {{Kind::kLru, {15785, 22522, 29757, 33623}},
                                                            {Kind::kLfu, {16971, 23748, 30194, 33639}}};
  const std::vector<std::int64_t> slots = {8, 16, 32, 64};
  for (const Kind policy : {Kind::kLru, Kind::kLfu, Kind::kGamma, Kind::kLifo, Kind::kFifo, Kind::kRandom}) {
    for (std::size_t i = 0; i < slots.size(); ++i) {
      CAPTURE(policy_name(policy), slots[i]);
      const SlotCacheShape shape{
          .num_layers = trace.num_layers, .num_experts = trace.num_experts, .slots = slots[i], .policy = policy};
      Cache cache(shape);
      const std::int64_t sequence = trace.entries.front().sequence;
      const std::vector<std::uint64_t> seeds = seeds_of(shape.num_layers, 1, sequence);
      slot_cache_reset_cpu(shape, cache.state, nullptr, 0, seeds.data());
      for (const TraceEntry& entry : trace.entries) {
        REQUIRE(entry.sequence == sequence);
        if (entry.phase == Phase::kDecode) {
          const auto experts = trace.experts_of(entry);
          Answer answer(shape, entry.count);
          const std::vector<std::int32_t> ids(experts.begin(), experts.end());
          slot_cache_serve_cpu(shape, cache.state, entry.layer, ids.data(), 1, entry.count, answer.view());
        }
      }
      SimulationOptions options;
      options.policy = policy;
      options.slots = slots[i];
      const auto expected = simulate_per_layer(trace, options);
      std::int64_t hits = 0;
      for (std::size_t layer = 0; layer < expected.size(); ++layer) {
        check_counts(cache.state.counts[layer], expected[layer]);
        hits += cache.state.counts[layer].hits;
      }
      if (golden.count(policy) != 0) {
        CHECK(hits == golden.at(policy)[i]);
      }
    }
  }
}

TEST_CASE("one pool of slots for all layers: a layer's step takes slots of the others by the policy") {
  SplitMix64 random(77);
  for (int i = 0; i < 200; ++i) {
    const Case c = random_case(random, true);
    INFO("case " << i << ": " << c.text());
    Cache cache(c.shape);
    start(cache, c);
    decode(cache, c);
    if (c.start != CacheStart::kCold || c.shape.policy == Kind::kGamma) {
      continue;
    }
    // From a cold start a pool is a cache of L * E experts that serves the layers' steps in turn.
    RoutingTrace trace = trace_of_steps(c.steps, c.shape.num_experts);
    trace.num_experts = c.shape.layers_per_group * c.shape.num_experts;
    for (TraceEntry& entry : trace.entries) {
      for (std::uint64_t at = entry.first; at < entry.first + entry.count; ++at) {
        trace.experts[at] = static_cast<std::uint16_t>(trace.experts[at] + entry.layer * c.shape.num_experts);
      }
      entry.step = entry.step * c.shape.num_layers + entry.layer;
      entry.layer = 0;
    }
    trace.num_layers = 1;
    trace.layers.resize(1);
    SlotCacheCounts total;
    for (std::int64_t layer = 0; layer < c.shape.num_layers; ++layer) {
      const SlotCacheCounts& of_layer = cache.state.counts[layer];
      total = {total.steps + of_layer.steps, total.requests + of_layer.requests, total.hits + of_layer.hits,
               total.cold + of_layer.cold,   total.loads + of_layer.loads,       total.evictions + of_layer.evictions};
    }
    check_counts(total, simulate(trace, options_of(c)));
  }
}

TEST_CASE("under stress nothing stays but what the step uses, and the waves still hold what they use") {
  SplitMix64 random(8);
  for (int i = 0; i < 200; ++i) {
    Case c = random_case(random, i % 4 == 0);
    if (c.shape.policy == Kind::kStatic) {
      continue;
    }
    c.shape.stress = true;
    INFO("case " << i << ": " << c.text());
    Cache cache(c.shape);
    start(cache, c);
    for (auto step = static_cast<std::size_t>(c.steps.prefill); step < c.steps.selected[0].size(); ++step) {
      for (std::int64_t layer = 0; layer < c.shape.num_layers; ++layer) {
        const auto& ids = c.steps.selected[static_cast<std::size_t>(layer)][step];
        serve_and_check(cache, layer, ids, c.steps.top_k);
        std::vector<std::uint8_t> mask(static_cast<std::size_t>(c.shape.num_experts));
        slot_cache_mask_cpu(c.shape, cache.state, layer, mask.data());
        const auto used = union_of(ids, c.steps.top_k, c.shape.num_experts);
        const auto residents = std::count(mask.begin(), mask.end(), 1);
        REQUIRE(residents == static_cast<std::int64_t>(std::min(used.size(), static_cast<std::size_t>(c.shape.slots))));
        REQUIRE(residents == cache.state.groups[layer / c.shape.layers_per_group].num_residents);
        for (std::size_t expert = 0; expert < mask.size(); ++expert) {
          REQUIRE((mask[expert] == 0 || std::find(used.begin(), used.end(), expert) != used.end()));
        }
      }
    }
  }
}

TEST_CASE("a step of the slot cache by hand") {
  // Two slots, LRU, one scratch slot. Experts 3 (slot 0) and 5 (slot 1) are there.
  const SlotCacheShape shape{.num_layers = 1, .num_experts = 6, .slots = 2};
  Cache cache(shape);
  const std::vector<std::int32_t> preload = {3, 5};
  slot_cache_reset_cpu(shape, cache.state, preload.data(), 2, nullptr);
  Answer answer(shape, 4);
  // Of 0 5 1 3 by falling weight, 0 and 5 stay: 0 takes the slot of 3, which has been computed with; 1 passes by.
  const std::vector<std::int32_t> ids = {0, 5, 1, 3};
  slot_cache_serve_cpu(shape, cache.state, 0, ids.data(), 1, 4, answer.view());
  CHECK(answer.step.requests == 4);
  CHECK(answer.step.loads == 2);
  CHECK(answer.step.waves == 2);
  CHECK(answer.step.wave_size == 2);
  CHECK(answer.step.waits_for_hits == 1);
  CHECK(std::vector<std::int32_t>(answer.waves.begin(), answer.waves.begin() + 4) ==
        std::vector<std::int32_t>{1, 0, 1, 0});
  CHECK(std::vector<std::int32_t>(answer.slots.begin(), answer.slots.begin() + 4) ==
        std::vector<std::int32_t>{0, 1, 2, 0});
  CHECK(answer.loads[0].expert == 1);
  CHECK(answer.loads[0].victim == -1);
  CHECK(answer.loads[1].expert == 0);
  CHECK(answer.loads[1].victim == 3);
  CHECK(cache.state.counts[0].evictions == 2);
  CHECK(cache.state.key_of[0] == 0);
  CHECK(cache.state.key_of[1] == 5);
}

TEST_CASE("what the slot cache cannot serve is refused") {
  const auto refused = [](const SlotCacheShape& shape, const char* what) {
    CHECK_THROWS_AS(check_slot_cache(shape), UsageError);
    CHECK_THROWS_WITH(check_slot_cache(shape), Catch::Contains(what));
  };
  const SlotCacheShape good{.num_layers = 4, .num_experts = 8, .slots = 4};
  CHECK_NOTHROW(check_slot_cache(good));
  SlotCacheShape bad = good;
  bad.policy = Kind::kBelady;
  refused(bad, "got belady");
  bad = good;
  bad.slots = 0;
  refused(bad, "got 0");
  bad.slots = 9;
  refused(bad, "got 9");
  bad = good;
  bad.num_experts = 513;
  refused(bad, "got 513");
  bad = good;
  bad.layers_per_group = 3;
  refused(bad, "got 3");
  bad = good;
  bad.gamma = 1.5;
  refused(bad, "got 1.5");
  bad = good;
  bad.policy = Kind::kStatic;
  bad.stress = true;
  refused(bad, "got static");
  Cache cache(good);
  slot_cache_reset_cpu(good, cache.state, nullptr, 0, nullptr);
  const std::vector<std::int32_t> ids(8, 0);
  Answer answer(good, 8);
  CHECK_THROWS_AS(slot_cache_serve_cpu(good, cache.state, 4, ids.data(), 1, 4, answer.view()), std::invalid_argument);
  CHECK_THROWS_AS(slot_cache_serve_cpu(good, cache.state, 0, ids.data(), 300, 8, answer.view()), std::invalid_argument);
  SlotCacheShape no_scratch = good;
  no_scratch.scratch_slots = 0;
  CHECK_NOTHROW(slot_cache_serve_cpu(no_scratch, cache.state, 0, ids.data(), 1, 4, answer.view()));
  CHECK_THROWS_AS(slot_cache_serve_cpu(no_scratch, cache.state, 0, ids.data(), 1, 5, answer.view()),
                  std::invalid_argument);
}

namespace {

bool gpu_ready() {
  int devices = 0;
  if (!has_cuda_kernels() || cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    WARN("SKIPPED: needs a GPU and a build with CUDA kernels");
    return false;
  }
  return true;
}

void require_success(cudaError_t error) {
  INFO(cudaGetErrorString(error));
  REQUIRE(error == cudaSuccess);
}

/// Device memory of `count` values.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : count_(count) {
    require_success(cudaMalloc(&data_, std::max<std::size_t>(count, 1) * sizeof(T)));
    require_success(cudaMemset(data_, 0, std::max<std::size_t>(count, 1) * sizeof(T)));  // gaps between parts are read
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { set(values); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  void set(const std::vector<T>& values) {
    REQUIRE(values.size() == count_);
    require_success(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  [[nodiscard]] std::vector<T> get() const {
    std::vector<T> values(count_);
    require_success(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
  [[nodiscard]] T* data() const { return static_cast<T*>(data_); }

 private:
  std::size_t count_;
  void* data_ = nullptr;
};

struct DeviceAnswer {
  DeviceAnswer(const SlotCacheShape& shape, std::int64_t num_selected)
      : clean(shape, num_selected),
        step(std::vector{clean.step}),
        loads(clean.loads),
        slots(clean.slots),
        waves(clean.waves),
        wave_slots(clean.wave_slots) {}
  [[nodiscard]] SlotCacheAnswer view() const {
    return {step.data(), loads.data(), slots.data(), waves.data(), wave_slots.data()};
  }
  void check_against(const Answer& expected) const {
    const SlotCacheStep found = step.get().front();
    REQUIRE(std::memcmp(&found, &expected.step, sizeof found) == 0);
    REQUIRE(slots.get() == expected.slots);
    REQUIRE(waves.get() == expected.waves);
    REQUIRE(wave_slots.get() == expected.wave_slots);
    const std::vector<SlotCacheLoad> found_loads = loads.get();
    REQUIRE(std::memcmp(found_loads.data(), expected.loads.data(), found_loads.size() * sizeof(SlotCacheLoad)) == 0);
  }
  Answer clean;
  DeviceArray<SlotCacheStep> step;
  DeviceArray<SlotCacheLoad> loads;
  DeviceArray<std::int32_t> slots;
  DeviceArray<std::int32_t> waves;
  DeviceArray<std::int32_t> wave_slots;
};

/// The cache on the device holds the bits of the one on the host.
void check_state(const SlotCacheShape& shape, const SlotCacheState& host, const DeviceArray<std::max_align_t>& device) {
  std::vector<std::max_align_t> memory = device.get();
  const SlotCacheState found = slot_cache_state(shape, memory.data());
  const auto same = [](const auto* a, const auto* b, std::int64_t count) {
    return std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof *a) == 0;
  };
  const std::int64_t experts = shape.num_layers * shape.num_experts;
  const std::int64_t groups = shape.num_layers / shape.layers_per_group;
  REQUIRE(same(found.experts, host.experts, experts));
  REQUIRE(same(found.counts, host.counts, shape.num_layers));
  REQUIRE(same(found.groups, host.groups, groups));
  REQUIRE(same(found.slot_of, host.slot_of, experts));
  REQUIRE(same(found.key_of, host.key_of, groups * shape.slots));
  REQUIRE(same(found.requested, host.requested, experts));
}

template <class Index>
void compare_on_gpu(const Case& c) {
  Cache cache(c.shape);
  const DeviceArray<std::max_align_t> memory(cache.memory.size());
  const SlotCacheState state = slot_cache_state(c.shape, memory.data());
  const DeviceArray<std::int32_t> preload(c.preload);
  const DeviceArray<std::uint64_t> seeds(c.seeds);
  start(cache, c);
  slot_cache_reset_cuda(c.shape, state, c.preload.empty() ? nullptr : preload.data(), c.preload_count, seeds.data(),
                        nullptr);
  for (std::int64_t layer = 0; c.start == CacheStart::kPrefill && layer < c.shape.num_layers; ++layer) {
    std::vector<Index> prompt;
    for (std::int64_t step = 0; step < c.steps.prefill; ++step) {
      const auto& ids = c.steps.selected[static_cast<std::size_t>(layer)][static_cast<std::size_t>(step)];
      prompt.insert(prompt.end(), ids.begin(), ids.end());
    }
    const DeviceArray<Index> selected(prompt);
    slot_cache_touch_cuda(c.shape, state, layer, selected.data(), c.steps.prefill, c.steps.rows, c.steps.top_k,
                          nullptr);
    require_success(cudaDeviceSynchronize());
  }
  check_state(c.shape, cache.state, memory);
  const DeviceArray<std::uint8_t> mask(static_cast<std::size_t>(c.shape.num_experts));
  for (auto step = static_cast<std::size_t>(c.steps.prefill); step < c.steps.selected[0].size(); ++step) {
    for (std::int64_t layer = 0; layer < c.shape.num_layers; ++layer) {
      const auto& ids = c.steps.selected[static_cast<std::size_t>(layer)][step];
      const auto count = static_cast<std::int64_t>(ids.size());
      Answer expected(c.shape, count);
      slot_cache_serve_cpu(c.shape, cache.state, layer, ids.data(), c.steps.rows, c.steps.top_k, expected.view());
      const DeviceAnswer found(c.shape, count);
      const DeviceArray<Index> selected(std::vector<Index>(ids.begin(), ids.end()));
      slot_cache_serve_cuda(c.shape, state, layer, selected.data(), c.steps.rows, c.steps.top_k, found.view(), nullptr);
      found.check_against(expected);
      check_state(c.shape, cache.state, memory);
      std::vector<std::uint8_t> residents(static_cast<std::size_t>(c.shape.num_experts));
      slot_cache_mask_cpu(c.shape, cache.state, layer, residents.data());
      slot_cache_mask_cuda(c.shape, state, layer, mask.data(), nullptr);
      REQUIRE(mask.get() == residents);
    }
  }
}

}  // namespace

TEST_CASE("the slot cache on the GPU holds and answers the CPU's bits", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(4711);
  for (int i = 0; i < 160; ++i) {
    Case c = random_case(random, i % 4 == 0);
    c.shape.stress = i % 5 == 0 && c.shape.policy != Kind::kStatic;
    INFO("case " << i << ": " << c.text());
    if (i % 2 == 0) {
      compare_on_gpu<std::int32_t>(c);
    } else {
      compare_on_gpu<std::int64_t>(c);
    }
  }
}

TEST_CASE("full caches of all sizes hold and answer the CPU's bits on the GPU", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(4712);
  // About a warp of slots, and about as many as the threads that look through them for a step of up to 32 ids.
  for (const std::int64_t slots : {8, 31, 32, 33, 64, 223, 224, 225, 300}) {
    for (const Kind policy : kServed) {
      for (const std::int64_t rows : {1, 4, 5}) {
        Case c;
        c.shape = {.num_layers = 1, .num_experts = 400, .slots = slots, .policy = policy};
        c.start = CacheStart::kPreload;
        c.preload_count = slots;
        const auto keys = testing::random_experts(random, c.shape.num_experts, slots);
        c.preload.assign(keys.begin(), keys.end());
        c.seeds = seeds_of(1, 5, 4);
        c.steps = random_steps(random, 1, c.shape.num_experts, 12, rows, 8);
        c.steps.prefill = 0;
        INFO(c.text());
        compare_on_gpu<std::int32_t>(c);
      }
    }
  }
}

TEST_CASE("a captured step of the slot cache is served again with every launch of its graph", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(12);
  const SlotCacheShape shape{.num_layers = 2, .num_experts = 64, .slots = 16, .policy = Kind::kGamma};
  Cache cache(shape);
  const DeviceArray<std::max_align_t> memory(cache.memory.size());
  const SlotCacheState state = slot_cache_state(shape, memory.data());
  slot_cache_reset_cpu(shape, cache.state, nullptr, 0, nullptr);
  slot_cache_reset_cuda(shape, state, nullptr, 0, nullptr, nullptr);
  require_success(cudaDeviceSynchronize());
  DeviceArray<std::int64_t> selected(16);
  const DeviceAnswer first(shape, 8);
  const DeviceAnswer second(shape, 8);
  cudaStream_t stream = nullptr;
  require_success(cudaStreamCreate(&stream));
  require_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  slot_cache_serve_cuda(shape, state, 0, selected.data(), 1, 8, first.view(), stream);
  slot_cache_serve_cuda(shape, state, 1, selected.data() + 8, 1, 8, second.view(), stream);
  cudaGraph_t graph = nullptr;
  require_success(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable = nullptr;
  require_success(cudaGraphInstantiate(&executable, graph, 0));
  const Steps steps = random_steps(random, 2, 64, 50, 1, 8);
  for (std::size_t step = 0; step < 50; ++step) {
    std::vector<std::int64_t> ids = steps.selected[0][step];
    ids.insert(ids.end(), steps.selected[1][step].begin(), steps.selected[1][step].end());
    selected.set(ids);
    require_success(cudaGraphLaunch(executable, stream));
    require_success(cudaStreamSynchronize(stream));
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      Answer expected(shape, 8);
      slot_cache_serve_cpu(shape, cache.state, layer, ids.data() + 8 * layer, 1, 8, expected.view());
      // Loads of an earlier launch lie behind the list.
      const std::vector<SlotCacheLoad> loads = (layer == 0 ? first : second).loads.get();
      REQUIRE(std::memcmp(loads.data(), expected.loads.data(),
                          static_cast<std::size_t>(expected.step.loads) * sizeof(SlotCacheLoad)) == 0);
      REQUIRE((layer == 0 ? first : second).slots.get() == expected.slots);
    }
    check_state(shape, cache.state, memory);
  }
  require_success(cudaGraphExecDestroy(executable));
  require_success(cudaGraphDestroy(graph));
  require_success(cudaStreamDestroy(stream));
}
