#include "hestia/routing/simulator.hpp"

#include <algorithm>
#include <chrono>
#include <map>
#include <set>
#include <tuple>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/routing/metrics.hpp"
#include "routing_fixtures.hpp"

namespace hestia {
namespace {

using testing::random_experts;
using testing::random_trace;
using testing::recorded_trace;
using testing::trace_of;
using testing::TraceShape;
using Kind = CachePolicyKind;

const std::vector<Kind> kDemand = {Kind::kLru,  Kind::kLfu,    Kind::kGamma, Kind::kLifo,
                                   Kind::kFifo, Kind::kRandom, Kind::kBelady};
const std::vector<Kind> kAll = {Kind::kLru,  Kind::kLfu,    Kind::kGamma,  Kind::kLifo,
                                Kind::kFifo, Kind::kRandom, Kind::kStatic, Kind::kBelady};

SimulationCounts run(const RoutingTrace& trace, Kind policy, std::int64_t slots, double gamma = 0.9) {
  SimulationOptions options;
  options.policy = policy;
  options.slots = slots;
  options.gamma = gamma;
  return simulate(trace, options);
}

bool same(const SimulationCounts& a, const SimulationCounts& b) {
  return a.requests == b.requests && a.hits == b.hits && a.cold == b.cold && a.loads == b.loads &&
         a.evictions == b.evictions && a.steps == b.steps && a.load_bytes == b.load_bytes;
}

using Steps = std::vector<std::vector<std::uint16_t>>;

// The steps of each (layer, sequence) with the phases asked for, in order.
std::map<std::pair<std::int64_t, std::int64_t>, Steps> steps_of(const RoutingTrace& trace, bool include_prefill,
                                                                bool by_sequence = true) {
  std::map<std::pair<std::int64_t, std::int64_t>, Steps> steps;
  for (const TraceEntry& entry : trace.entries) {
    if (include_prefill || entry.phase == Phase::kDecode) {
      const auto experts = trace.experts_of(entry);
      const std::int64_t first_sequence = trace.entries.front().sequence;
      steps[{entry.layer, by_sequence ? entry.sequence : first_sequence}].emplace_back(experts.begin(), experts.end());
    }
  }
  return steps;
}

// A slow simulator that keeps no state but the set of residents and a log: every quantity a policy looks at is found
// anew by walking the history, or the future, of the steps.
class ReferenceSimulator {
 public:
  ReferenceSimulator(Steps steps, Kind policy, std::size_t slots, double gamma, std::uint64_t victim_seed)
      : steps_(std::move(steps)), policy_(policy), slots_(slots), gamma_(gamma), random_(victim_seed) {}

  SimulationCounts run() {
    if (policy_ == Kind::kStatic) {
      preload();
    }
    std::set<int> asked_before;
    for (now_ = 0; now_ < steps_.size(); ++now_) {
      const std::set<int> step(steps_[now_].begin(), steps_[now_].end());
      counts_.steps += 1;
      for (const int expert : step) {
        counts_.requests += 1;
        counts_.hits += static_cast<std::int64_t>(resident_.count(expert));
        counts_.loads += resident_.count(expert) == 0 ? 1 : 0;
        counts_.cold += asked_before.insert(expert).second ? 1 : 0;
      }
      if (policy_ == Kind::kStatic) {
        continue;
      }
      for (auto expert = steps_[now_].rbegin(); expert != steps_[now_].rend(); ++expert) {
        if (resident_.insert(*expert).second) {
          load_log_.push_back(*expert);
        }
      }
      while (resident_.size() > slots_) {
        evict_one(step);
      }
    }
    return counts_;
  }

 private:
  void preload() {
    std::map<int, int> uses;
    for (const auto& step : steps_) {
      for (const int expert : step) {
        uses[expert] -= 1;
      }
    }
    std::vector<std::pair<int, int>> ranking;
    for (const auto& [expert, negative_uses] : uses) {
      ranking.emplace_back(negative_uses, expert);
    }
    std::sort(ranking.begin(), ranking.end());
    for (std::size_t i = 0; i < std::min(slots_, ranking.size()); ++i) {
      resident_.insert(ranking[i].second);
    }
  }

  [[nodiscard]] bool uses(std::size_t step, int expert) const {
    return std::find(steps_[step].begin(), steps_[step].end(), expert) != steps_[step].end();
  }
  [[nodiscard]] int times_used(int expert) const {
    int count = 0;
    for (std::size_t step = 0; step <= now_; ++step) {
      count += uses(step, expert) ? 1 : 0;
    }
    return count;
  }
  [[nodiscard]] double discounted(int expert) const {
    double count = 0.0;
    for (std::size_t step = 0; step <= now_; ++step) {
      count *= gamma_;
      if (uses(step, expert)) {
        count += 1.0;
      }
    }
    return count;
  }
  // (step, rank from the bottom): larger is more recent.
  [[nodiscard]] std::pair<std::int64_t, std::int64_t> recency(int expert) const {
    for (std::size_t step = now_ + 1; step-- > 0;) {
      const auto found = std::find(steps_[step].begin(), steps_[step].end(), expert);
      if (found != steps_[step].end()) {
        return {static_cast<std::int64_t>(step), steps_[step].end() - found};
      }
    }
    return {-1, -1};
  }
  [[nodiscard]] std::int64_t loaded(int expert) const {
    return load_log_.rend() - std::find(load_log_.rbegin(), load_log_.rend(), expert);
  }
  [[nodiscard]] std::int64_t away(int expert) const {
    for (std::size_t step = now_ + 1; step < steps_.size(); ++step) {
      if (uses(step, expert)) {
        return static_cast<std::int64_t>(step);
      }
    }
    return 1'000'000;
  }
  // Small is evicted first; the expert index ends every comparison.
  [[nodiscard]] std::tuple<double, std::int64_t, std::int64_t, int> rank(int expert) const {
    const auto [step, place] = recency(expert);
    switch (policy_) {
      case Kind::kLru:
        return {0.0, step, place, expert};
      case Kind::kLfu:
        return {static_cast<double>(times_used(expert)), step, place, expert};
      case Kind::kGamma:
        return {discounted(expert), step, place, expert};
      case Kind::kLifo:
        return {0.0, -loaded(expert), 0, expert};
      case Kind::kFifo:
        return {0.0, loaded(expert), 0, expert};
      default:
        return {0.0, -away(expert), 0, expert};
    }
  }
  void evict_one(const std::set<int>& step) {
    std::vector<int> candidates;
    for (const int expert : resident_) {
      if (step.size() > slots_ || step.count(expert) == 0) {
        candidates.push_back(expert);
      }
    }
    int victim = 0;
    if (policy_ == Kind::kRandom) {
      victim = candidates[random_.below(candidates.size())];
    } else {
      victim =
          *std::min_element(candidates.begin(), candidates.end(), [this](int a, int b) { return rank(a) < rank(b); });
    }
    resident_.erase(victim);
    counts_.evictions += 1;
  }

  Steps steps_;
  Kind policy_;
  std::size_t slots_;
  double gamma_;
  SplitMix64 random_;
  std::size_t now_ = 0;
  std::set<int> resident_;
  std::vector<int> load_log_;
  SimulationCounts counts_;
};

SimulationCounts reference(const RoutingTrace& trace, const SimulationOptions& options) {
  SimulationCounts total;
  std::map<std::int64_t, std::int64_t> bytes;
  for (const TraceLayer& layer : trace.layers) {
    bytes[layer.layer] = layer.expert_bytes;
  }
  for (const auto& [key, steps] : steps_of(trace, options.include_prefill, options.reset_per_sequence)) {
    // The derivation that docs/routing.md promises for `random`.
    const auto of_layer = SplitMix64(SplitMix64(options.seed).next() + static_cast<std::uint64_t>(key.first)).next();
    const auto seed = SplitMix64(of_layer + static_cast<std::uint64_t>(key.second)).next();
    SimulationCounts counts =
        ReferenceSimulator(steps, options.policy, static_cast<std::size_t>(options.slots), options.gamma, seed).run();
    counts.load_bytes = counts.loads * bytes.at(key.first);
    total += counts;
  }
  return total;
}

// The most hits that any cold-start demand policy without bypass can have: a search over all choices of victims.
std::int64_t best_possible_hits(const Steps& steps, std::size_t slots) {
  std::map<unsigned, std::int64_t> best = {{0U, 0}};
  for (const auto& step : steps) {
    unsigned asked = 0;
    for (const std::uint16_t expert : step) {
      asked |= 1U << expert;
    }
    std::map<unsigned, std::int64_t> next;
    for (const auto& [resident, hits] : best) {
      const std::int64_t now = hits + __builtin_popcount(resident & asked);
      const unsigned all = resident | asked;
      const auto size = std::min(slots, static_cast<std::size_t>(__builtin_popcount(all)));
      for (unsigned kept = all;; kept = (kept - 1) & all) {
        const bool keeps_step = step.size() > slots || (kept & asked) == asked;
        if (static_cast<std::size_t>(__builtin_popcount(kept)) == size && keeps_step) {
          const auto [found, added] = next.try_emplace(kept, now);
          found->second = std::max(found->second, now);
        }
        if (kept == 0) {
          break;
        }
      }
    }
    best = std::move(next);
  }
  std::int64_t most = 0;
  for (const auto& [resident, hits] : best) {
    most = std::max(most, hits);
  }
  return most;
}

TEST_CASE("the recorded trace gives the golden counts", "[golden]") {
  const auto path = recorded_trace();
  if (!path) {
    return;
  }
  const RoutingTrace trace = read_trace(*path);
  const std::vector<std::int64_t> slots = {8, 16, 32, 64};
  const std::map<Kind, std::vector<std::int64_t>> golden = {{Kind::kLru, {15785, 22522, 29757, 33623}},
                                                            {Kind::kLfu, {16971, 23748, 30194, 33639}},
                                                            {Kind::kBelady, {19165, 27559, 32484, 33771}}};
  const auto start = std::chrono::steady_clock::now();
  for (const auto& [policy, hits] : golden) {
    for (std::size_t i = 0; i < slots.size(); ++i) {
      const SimulationCounts counts = run(trace, policy, slots[i]);
      CAPTURE(policy_name(policy), slots[i]);
      CHECK(counts.requests == 36864);
      CHECK(counts.cold == 3059);
      CHECK(counts.steps == 6144);
      CHECK(counts.hits == hits[i]);
      CHECK(counts.loads == 36864 - hits[i]);
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  // Far above a tenth of a second means a quadratic slip, even in a sanitised build.
  CHECK(seconds.count() < 5.0);
  CHECK(run(trace, Kind::kStatic, 64).hits == 36544);
  CHECK(expert_overlap_ratio(trace) == Approx(0.379511).margin(5e-7));
}

TEST_CASE("the recorded trace agrees with the slow simulator", "[golden]") {
  const auto path = recorded_trace();
  if (!path) {
    return;
  }
  RoutingTrace trace = read_trace(*path);
  // Three layers keep the quadratic reference within a second.
  std::erase_if(trace.entries, [](const TraceEntry& entry) { return entry.layer % 17 != 3; });
  for (const Kind policy : kAll) {
    for (const std::int64_t slots : {4, 8, 32}) {
      SimulationOptions options;
      options.policy = policy;
      options.slots = slots;
      CAPTURE(policy_name(policy), slots);
      CHECK(same(simulate(trace, options), reference(trace, options)));
    }
  }
}

TEST_CASE("all policies agree with the slow simulator on random traces") {
  SplitMix64 random(20260101);
  for (int round = 0; round < 40; ++round) {
    TraceShape shape;
    shape.num_experts = 3 + static_cast<std::int64_t>(random.below(12));
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(shape.num_experts)));
    shape.stickiness = random.uniform();
    shape.skip = round % 3 == 0 ? 0.3 : 0.0;
    const RoutingTrace trace = random_trace(random, shape);
    SimulationOptions options;
    options.slots = 1 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(shape.num_experts + 1)));
    options.gamma = round % 4 == 0 ? 0.25 : random.uniform();
    options.seed = random.next();
    options.include_prefill = random.uniform() < 0.5;
    options.reset_per_sequence = random.uniform() < 0.7;
    for (const Kind policy : kAll) {
      options.policy = policy;
      CAPTURE(round, policy_name(policy), options.slots, shape.num_experts, shape.top_k);
      CHECK(same(simulate(trace, options), reference(trace, options)));
    }
  }
}

TEST_CASE("gamma 0 is LRU and gamma 1 is LFU") {
  SplitMix64 random(31);
  bool between_differs = false;
  for (int round = 0; round < 30; ++round) {
    TraceShape shape;
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(5));
    const RoutingTrace trace = random_trace(random, shape);
    for (std::int64_t slots = 1; slots <= shape.num_experts; slots += 2) {
      const SimulationCounts lru = run(trace, Kind::kLru, slots);
      const SimulationCounts lfu = run(trace, Kind::kLfu, slots);
      CHECK(same(lru, run(trace, Kind::kGamma, slots, 0.0)));
      CHECK(same(lfu, run(trace, Kind::kGamma, slots, 1.0)));
      const SimulationCounts between = run(trace, Kind::kGamma, slots, 0.8);
      between_differs = between_differs || (between.hits != lru.hits && between.hits != lfu.hits);
    }
  }
  CHECK(between_differs);
}

TEST_CASE("MIN bounds every demand policy and static bounds what a fixed set can do") {
  SplitMix64 random(32);
  for (int round = 0; round < 40; ++round) {
    TraceShape shape;
    shape.num_experts = 6 + static_cast<std::int64_t>(random.below(20));
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(4));
    const RoutingTrace trace = random_trace(random, shape);
    for (std::int64_t slots = 1; slots <= shape.num_experts; ++slots) {
      const SimulationCounts bound = run(trace, Kind::kBelady, slots);
      for (const Kind policy : kDemand) {
        CAPTURE(round, slots, policy_name(policy));
        CHECK(run(trace, policy, slots).hits <= bound.hits);
      }
      CHECK(bound.hits <= bound.requests - bound.cold);
    }
  }
}

TEST_CASE("MIN has the most hits that any choice of victims allows") {
  SplitMix64 random(33);
  for (int round = 0; round < 150; ++round) {
    const std::int64_t num_experts = 3 + static_cast<std::int64_t>(random.below(4));
    const std::int64_t top_k = 1 + static_cast<std::int64_t>(random.below(3));
    Steps steps;
    for (std::uint64_t i = 4 + random.below(10); i > 0; --i) {
      // Also steps of unequal size: each is judged by its own.
      const std::int64_t size = 1 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(top_k)));
      steps.push_back(random_experts(random, num_experts, size));
    }
    for (std::int64_t slots = 1; slots <= num_experts; ++slots) {
      CAPTURE(round, slots);
      CHECK(run(trace_of(num_experts, steps), Kind::kBelady, slots).hits ==
            best_possible_hits(steps, static_cast<std::size_t>(slots)));
    }
  }
}

TEST_CASE("with C = K under LRU the hit rate is the overlap ratio of the pairs") {
  SplitMix64 random(34);
  for (int round = 0; round < 20; ++round) {
    TraceShape shape;
    shape.num_sequences = 1 + static_cast<std::int64_t>(random.below(6));
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(6));
    shape.stickiness = random.uniform();
    const RoutingTrace trace = random_trace(random, shape);
    for (const bool include_prefill : {false, true}) {
      std::int64_t tokens = 0;
      std::int64_t pairs = 0;
      for (const auto& [key, steps] : steps_of(trace, include_prefill)) {
        tokens += static_cast<std::int64_t>(steps.size());
        pairs += static_cast<std::int64_t>(steps.size()) - 1;
      }
      SimulationOptions options;
      options.slots = shape.top_k;
      options.include_prefill = include_prefill;
      const double expected =
          expert_overlap_ratio(trace, include_prefill) * static_cast<double>(pairs) / static_cast<double>(tokens);
      CHECK(simulate(trace, options).hit_rate() == Approx(expected).epsilon(1e-12));
    }
  }
}

TEST_CASE("cyclic scans have closed forms") {
  for (const std::int64_t n : {3, 5, 8, 13}) {
    for (std::int64_t c = 1; c < n; ++c) {
      for (const std::int64_t length : {n - 1, n, 4 * n + 1, 7 * (n - 1) + n, 40 * n - 3}) {
        Steps steps;
        for (std::int64_t t = 0; t < length; ++t) {
          steps.push_back({static_cast<std::uint16_t>(t % n)});
        }
        const RoutingTrace trace = trace_of(n, steps);
        CAPTURE(n, c, length);
        CHECK(run(trace, Kind::kLru, c).hits == 0);
        CHECK(run(trace, Kind::kFifo, c).hits == 0);
        // LIFO keeps the first c-1 for good; the last slot is handed on. So each later round hits experts 0 .. c-2.
        const std::int64_t rounds = length / n;
        const std::int64_t rest = length % n;
        const std::int64_t lifo = rounds == 0 ? 0 : (rounds - 1) * (c - 1) + std::min(rest, c - 1);
        CHECK(run(trace, Kind::kLifo, c).hits == lifo);
        // MIN, after n cold misses, alternates c-1 hits with n-c misses: periods of n-1 steps.
        const std::int64_t after = std::max<std::int64_t>(0, length - n);
        const std::int64_t min_hits = after / (n - 1) * (c - 1) + std::min(after % (n - 1), c - 1);
        CHECK(run(trace, Kind::kBelady, c).hits == min_hits);
      }
    }
  }
}

TEST_CASE("routing without memory hits with probability C/E under every online policy") {
  SplitMix64 random(35);
  constexpr std::int64_t kExperts = 32;
  constexpr std::int64_t kTopK = 4;
  Steps steps;
  for (int t = 0; t < 20000; ++t) {
    steps.push_back(random_experts(random, kExperts, kTopK));
  }
  const RoutingTrace trace = trace_of(kExperts, steps);
  for (const Kind policy : {Kind::kLru, Kind::kLfu, Kind::kGamma, Kind::kLifo, Kind::kFifo, Kind::kRandom}) {
    for (const std::int64_t slots : {2, 4, 8, 24}) {
      CAPTURE(policy_name(policy), slots);
      // 80000 requests: the standard error is at most 0.0018.
      CHECK(run(trace, policy, slots).hit_rate() ==
            Approx(static_cast<double>(slots) / static_cast<double>(kExperts)).margin(0.008));
    }
  }
}

TEST_CASE("counts add up for every policy and every number of slots") {
  SplitMix64 random(36);
  for (int round = 0; round < 15; ++round) {
    TraceShape shape;
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(6));
    const RoutingTrace trace = random_trace(random, shape);
    const auto groups = steps_of(trace, false);
    std::int64_t cold = 0;
    std::int64_t num_steps = 0;
    for (const auto& [key, steps] : groups) {
      std::set<int> distinct;
      for (const auto& step : steps) {
        distinct.insert(step.begin(), step.end());
      }
      cold += static_cast<std::int64_t>(distinct.size());
      num_steps += static_cast<std::int64_t>(steps.size());
    }
    for (const std::int64_t slots :
         {std::int64_t{1}, shape.top_k, shape.num_experts - 1, shape.num_experts, shape.num_experts + 5}) {
      std::int64_t residents_at_end = 0;
      for (const auto& [key, steps] : groups) {
        std::set<int> distinct;
        for (const auto& step : steps) {
          distinct.insert(step.begin(), step.end());
        }
        // A demand cache never holds an empty slot while something it saw is missing.
        residents_at_end += std::min(slots, static_cast<std::int64_t>(distinct.size()));
      }
      for (const Kind policy : kAll) {
        const SimulationCounts counts = run(trace, policy, slots);
        CAPTURE(policy_name(policy), slots);
        CHECK(counts.steps == num_steps);
        CHECK(counts.requests == num_steps * shape.top_k);
        CHECK(counts.cold == cold);
        CHECK(counts.loads == counts.requests - counts.hits);
        if (policy == Kind::kStatic) {
          CHECK(counts.evictions == 0);
        } else {
          CHECK(counts.loads - counts.evictions == residents_at_end);
          CHECK(counts.hits <= counts.requests - counts.cold);
        }
        if (slots >= shape.num_experts) {
          CHECK(counts.hits == (policy == Kind::kStatic ? counts.requests : counts.requests - counts.cold));
          CHECK(counts.evictions == 0);
        }
      }
    }
  }
}

TEST_CASE("more slots never lose hits under the policies that keep nested sets") {
  SplitMix64 random(37);
  const RoutingTrace trace = random_trace(random, TraceShape{});
  for (const Kind policy : {Kind::kLru, Kind::kLfu, Kind::kStatic, Kind::kBelady}) {
    std::int64_t last = -1;
    for (std::int64_t slots = TraceShape{}.top_k; slots <= TraceShape{}.num_experts; ++slots) {
      const std::int64_t hits = run(trace, policy, slots).hits;
      CAPTURE(policy_name(policy), slots);
      CHECK(hits >= last);
      last = hits;
    }
  }
}

TEST_CASE("renaming the experts changes no count where ties cannot reach the index") {
  SplitMix64 random(38);
  const RoutingTrace trace = random_trace(random, TraceShape{});
  const std::vector<std::uint16_t> names = random_experts(random, trace.num_experts, trace.num_experts);
  RoutingTrace renamed = trace;
  for (std::uint16_t& expert : renamed.experts) {
    expert = names[expert];
  }
  for (const Kind policy :
       {Kind::kLru, Kind::kLfu, Kind::kGamma, Kind::kLifo, Kind::kFifo, Kind::kStatic, Kind::kBelady}) {
    for (const std::int64_t slots : {1, 2, 3, 5, 8}) {
      CAPTURE(policy_name(policy), slots);
      const SimulationCounts a = run(trace, policy, slots);
      const SimulationCounts b = run(renamed, policy, slots);
      CHECK(a.hits == b.hits);
      CHECK(a.evictions == b.evictions);
    }
  }
}

TEST_CASE("fewer slots than experts of a step: the best by policy stay") {
  // Slot order is falling weight: of {5, 1, 3} LRU keeps 5 and 1, which the next steps ask for.
  const RoutingTrace trace = trace_of(6, {{5, 1, 3}, {5, 1, 0}, {3, 0, 2}});
  const SimulationCounts lru = run(trace, Kind::kLru, 2);
  // Step 2 finds {5, 1}; keeps {5, 1} (touched after 0); step 3 finds neither of 3, 0, 2.
  CHECK(lru.hits == 2);
  CHECK(lru.loads == 7);
  CHECK(lru.evictions == 5);
  // LFU: after step 3 experts 5, 1, 3 and 0 have two uses each; the most recent, 3 and 0, stay.
  const RoutingTrace longer = trace_of(6, {{5, 1, 3}, {5, 1, 0}, {3, 0, 2}, {3, 0, 4}});
  CHECK(run(longer, Kind::kLfu, 2).hits == 4);
  // FIFO keeps the last loaded, LIFO the first loaded, by load order 3, 1, 5 within step 1.
  CHECK(run(trace_of(6, {{5, 1, 3}, {5, 0, 2}}), Kind::kFifo, 1).hits == 1);
  CHECK(run(trace_of(6, {{5, 1, 3}, {5, 0, 2}}), Kind::kLifo, 1).hits == 0);
  CHECK(run(trace_of(6, {{5, 1, 3}, {3, 0, 2}}), Kind::kLifo, 1).hits == 1);
  // MIN keeps what comes next.
  CHECK(run(trace_of(6, {{5, 1, 3}, {1, 0, 2}, {5, 3, 4}}), Kind::kBelady, 1).hits == 1);
}

TEST_CASE("the worked example of the documentation") {
  // Each number was found by hand; docs/routing.md shows the way.
  const Steps steps = {{1, 4}, {1, 4}, {3, 2}, {3, 4}, {0, 2}, {0, 3}, {2, 3}};
  const RoutingTrace trace = trace_of(5, steps);
  struct Expected {
    Kind policy;
    std::int64_t hits;
    std::int64_t evictions;
  };
  for (const Expected& expected :
       {Expected{Kind::kLru, 8, 3}, Expected{Kind::kLfu, 5, 6}, Expected{Kind::kFifo, 6, 5},
        Expected{Kind::kLifo, 7, 4}, Expected{Kind::kBelady, 9, 2}, Expected{Kind::kStatic, 10, 0}}) {
    const SimulationCounts counts = run(trace, expected.policy, 3);
    CAPTURE(policy_name(expected.policy));
    CHECK(counts.requests == 14);
    CHECK(counts.cold == 5);
    CHECK(counts.hits == expected.hits);
    CHECK(counts.loads == 14 - expected.hits);
    CHECK(counts.evictions == expected.evictions);
  }
  CHECK(expert_overlap_ratio(trace) == Approx(5.0 / 12.0));
  CHECK(distinct_experts(trace) == 5.0);
}

TEST_CASE("random evicts the same experts for the same seed and any number of threads") {
  SplitMix64 random(39);
  TraceShape shape;
  shape.num_layers = 7;
  const RoutingTrace trace = random_trace(random, shape);
  SimulationOptions options;
  options.policy = Kind::kRandom;
  options.slots = 5;
  std::set<std::int64_t> different;
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    options.seed = seed;
    options.num_threads = 1;
    const SimulationCounts one = simulate(trace, options);
    for (const std::int64_t num_threads : {2, 3, 16}) {
      options.num_threads = num_threads;
      CHECK(same(simulate(trace, options), one));
    }
    different.insert(one.hits);
  }
  CHECK(different.size() > 1);
}

TEST_CASE("layers are counted apart and threads change nothing") {
  SplitMix64 random(40);
  TraceShape shape;
  shape.num_layers = 5;
  const RoutingTrace trace = random_trace(random, shape);
  for (const Kind policy : kAll) {
    SimulationOptions options;
    options.policy = policy;
    options.slots = 6;
    const std::vector<SimulationCounts> serial = simulate_per_layer(trace, options);
    options.num_threads = 4;
    const std::vector<SimulationCounts> parallel = simulate_per_layer(trace, options);
    REQUIRE(serial.size() == trace.layers.size());
    SimulationCounts total;
    for (std::size_t i = 0; i < serial.size(); ++i) {
      CHECK(same(serial[i], parallel[i]));
      // The layers have different expert sizes.
      CHECK(serial[i].load_bytes == serial[i].loads * trace.layers[i].expert_bytes);
      RoutingTrace alone = trace;
      std::erase_if(alone.entries, [&](const TraceEntry& entry) { return entry.layer != trace.layers[i].layer; });
      CHECK(same(serial[i], simulate(alone, options)));
      total += serial[i];
    }
    CHECK(same(total, simulate(trace, options)));
  }
}

TEST_CASE("a cache that is not reset carries its experts into the next sequence") {
  RoutingTrace trace = trace_of(4, {{0, 1}, {0, 1}, {1, 0}});
  trace.entries[1].sequence = 1;
  trace.entries[2].sequence = 2;
  SimulationOptions options;
  options.slots = 2;
  CHECK(simulate(trace, options).hits == 0);
  CHECK(simulate(trace, options).cold == 6);
  options.reset_per_sequence = false;
  CHECK(simulate(trace, options).hits == 4);
  CHECK(simulate(trace, options).cold == 2);
}

TEST_CASE("prefill steps count only when asked for") {
  RoutingTrace trace = trace_of(4, {{0, 1}, {0, 1}});
  trace.entries[0].phase = Phase::kPrefill;
  SimulationOptions options;
  options.slots = 2;
  CHECK(simulate(trace, options).requests == 2);
  CHECK(simulate(trace, options).hits == 0);
  options.include_prefill = true;
  CHECK(simulate(trace, options).requests == 4);
  CHECK(simulate(trace, options).hits == 2);
}

TEST_CASE("from a prefill start the prompt's steps are served and not counted") {
  SplitMix64 random(41);
  for (int round = 0; round < 30; ++round) {
    TraceShape shape;
    shape.skip = 0.1;
    shape.prefill = random.uniform();
    const RoutingTrace trace = random_trace(random, shape);
    RoutingTrace prompts = trace;
    std::erase_if(prompts.entries, [](const TraceEntry& entry) { return entry.phase == Phase::kDecode; });
    for (const Kind policy : {Kind::kLru, Kind::kLfu, Kind::kGamma, Kind::kLifo, Kind::kFifo, Kind::kRandom}) {
      SimulationOptions options;
      options.policy = policy;
      options.slots = 1 + static_cast<std::int64_t>(random.below(8));
      options.start = CacheStart::kPrefill;
      SimulationCounts counts = simulate(trace, options);
      options.start = CacheStart::kCold;
      options.include_prefill = true;
      counts += simulate(prompts, options);
      CAPTURE(policy_name(policy), options.slots);
      CHECK(same(counts, simulate(trace, options)));
    }
  }
}

TEST_CASE("a preload is a step before the first that counts nothing and uses nothing") {
  SplitMix64 random(42);
  for (int round = 0; round < 30; ++round) {
    TraceShape shape;
    shape.prefill = 0.0;
    shape.num_sequences = 1;
    shape.num_layers = 1;
    const RoutingTrace trace = random_trace(random, shape);
    SimulationOptions options;
    options.slots = 3 + static_cast<std::int64_t>(random.below(8));
    options.start = CacheStart::kPreload;
    options.preload = {random_experts(random, shape.num_experts, 1 + static_cast<std::int64_t>(random.below(12)))};
    RoutingTrace longer = trace;
    const auto first =
        static_cast<std::uint32_t>(std::min(options.preload[0].size(), static_cast<std::size_t>(options.slots)));
    longer.entries.insert(longer.entries.begin(), {10, -1, 1, Phase::kDecode, first, longer.experts.size()});
    longer.experts.insert(longer.experts.end(), options.preload[0].begin(), options.preload[0].begin() + first);
    // Uses are what sets the two apart; these policies do not look at them.
    for (const Kind policy : {Kind::kLru, Kind::kLifo, Kind::kFifo, Kind::kRandom}) {
      options.policy = policy;
      const SimulationCounts counts = simulate(trace, options);
      SimulationOptions cold = options;
      cold.start = CacheStart::kCold;
      cold.preload.clear();
      const SimulationCounts with_step = simulate(longer, cold);
      CAPTURE(policy_name(policy), options.slots);
      CHECK(counts.hits == with_step.hits);
      CHECK(counts.loads == with_step.loads - first);
      CHECK(counts.evictions == with_step.evictions);
      CHECK(counts.steps == with_step.steps - 1);
      CHECK(counts.cold == simulate(trace, cold).cold);
    }
  }
  // LFU: what was put in place has no use, so 3, touched in the start last of all, goes before 0 used once; of 3 and 4,
  // the one touched earlier.
  SimulationOptions options;
  options.policy = Kind::kLfu;
  options.slots = 3;
  options.start = CacheStart::kPreload;
  options.preload = {{3, 4}};
  const SimulationCounts counts = simulate(trace_of(6, {{0}, {1}, {3}, {0}}), options);
  CHECK(counts.hits == 2);
  CHECK(counts.cold == 3);
  CHECK(counts.evictions == 1);
}

TEST_CASE("static keeps what it is given, or what the prompt used most") {
  RoutingTrace trace = trace_of(6, {{0, 1}, {0, 2}, {5, 2}, {1, 2}, {5, 1}});
  trace.entries[0].phase = Phase::kPrefill;
  trace.entries[1].phase = Phase::kPrefill;
  SimulationOptions options;
  options.policy = Kind::kStatic;
  options.slots = 2;
  CHECK(simulate(trace, options).hits == 4);  // 1 and 2, of 1 2 5 used twice each
  options.start = CacheStart::kPrefill;       // 0 used twice, then 1 of 1 and 2
  CHECK(simulate(trace, options).hits == 2);
  CHECK(simulate(trace, options).cold == 1);
  options.start = CacheStart::kPreload;
  options.preload = {{5, 3, 2}};
  CHECK(simulate(trace, options).hits == 2);
  CHECK(simulate(trace, options).evictions == 0);
}

TEST_CASE("starts that do not fit are usage errors") {
  const RoutingTrace trace = trace_of(4, {{0}, {1}});
  const auto refused = [&](const SimulationOptions& options, const char* what) {
    CHECK_THROWS_AS(simulate(trace, options), UsageError);
    CHECK_THROWS_WITH(simulate(trace, options), Catch::Contains(what));
  };
  SimulationOptions options;
  options.start = CacheStart::kPreload;
  refused(options, "got 0 lists");
  options.preload = {{4}};
  refused(options, "got 4");
  options.preload = {{1, 1}};
  refused(options, "got 1");
  options.start = CacheStart::kCold;
  refused(options, "goes with the start preload only");
  options.preload.clear();
  options.start = CacheStart::kPrefill;
  CHECK_THROWS_AS(simulate_segment_cache(trace, 3, options), UsageError);
  options.include_prefill = true;
  refused(options, "include_prefill");
}

TEST_CASE("an empty trace counts nothing") {
  RoutingTrace trace = trace_of(4, {});
  trace.top_k = 2;
  for (const Kind policy : kAll) {
    const SimulationCounts counts = run(trace, policy, 2);
    CHECK(counts.requests == 0);
    CHECK(counts.hit_rate() == 0.0);
  }
}

TEST_CASE("wrong options are usage errors that name the value") {
  const RoutingTrace trace = trace_of(4, {{0, 1}});
  CHECK_THROWS_AS(run(trace, Kind::kLru, 0), UsageError);
  CHECK_THROWS_WITH(run(trace, Kind::kLru, -3), Catch::Contains("slots: must be at least 1, got -3"));
  CHECK_THROWS_WITH(run(trace, Kind::kGamma, 1, 1.5), Catch::Contains("gamma: must lie in [0, 1], got 1.5"));
  CHECK_THROWS_AS(run(trace, Kind::kGamma, 1, std::nan("")), UsageError);
  SimulationOptions options;
  options.num_threads = 0;
  CHECK_THROWS_WITH(simulate(trace, options), Catch::Contains("threads: must be at least 1, got 0"));
}

TEST_CASE("a trace that contradicts itself is refused before anything is indexed by it") {
  RoutingTrace trace = trace_of(4, {{0, 1}, {2, 3}});
  trace.experts[2] = 4;
  CHECK_THROWS_WITH(run(trace, Kind::kLru, 2), Catch::Contains("expert 4 of entry 1 is not below 4"));
  trace.experts[2] = 3;
  CHECK_THROWS_WITH(run(trace, Kind::kLru, 2), Catch::Contains("expert 3 stands twice in entry 1"));
  trace = trace_of(4, {{0, 1}, {2, 3}});
  trace.entries[1].layer = 9;
  CHECK_THROWS_WITH(run(trace, Kind::kLru, 2), Catch::Contains("layer 9"));
  trace = trace_of(4, {{0, 1}, {2, 3}});
  trace.entries[1].count = 3;
  CHECK_THROWS_WITH(run(trace, Kind::kLru, 2), Catch::Contains("entry 1 ends past"));
}

// A cache that looks `ahead` steps forward from every step, counted anew each time; victims are looked for one by one.
SimulationCounts segment_cache_by_hand(const RoutingTrace& trace, std::size_t ahead, std::size_t slots,
                                       bool include_prefill) {
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::vector<std::uint16_t>>> sequences;
  for (const TraceEntry& entry : trace.entries) {
    if (include_prefill || entry.phase == Phase::kDecode) {
      const auto experts = trace.experts_of(entry);
      sequences[{entry.layer, entry.sequence}].emplace_back(experts.begin(), experts.end());
    }
  }
  const auto holds = [](const auto& set, std::uint16_t expert) {
    return std::find(set.begin(), set.end(), expert) != set.end();
  };
  SimulationCounts counts;
  for (const auto& [key, steps] : sequences) {
    std::vector<std::uint16_t> resident;
    std::map<std::uint16_t, int> touched;
    int clock = 0;
    for (std::size_t now = 0; now < steps.size(); ++now) {
      for (const std::uint16_t expert : steps[now]) {
        counts.requests += 1;
        counts.hits += holds(resident, expert) ? 1 : 0;
      }
      for (std::size_t rank = steps[now].size(); rank-- > 0;) {
        touched[steps[now][rank]] = clock++;
        if (!holds(resident, steps[now][rank])) {
          counts.loads += 1;
          resident.push_back(steps[now][rank]);
        }
      }
      const auto worth = [&](std::uint16_t expert) {
        int uses = 0;
        for (std::size_t t = now + 1; t < steps.size() && t <= now + ahead; ++t) {
          uses += holds(steps[t], expert) ? 1 : 0;
        }
        return std::pair(uses, touched[expert]);
      };
      while (resident.size() > slots) {
        auto victim = resident.end();
        for (auto at = resident.begin(); at != resident.end(); ++at) {
          const bool may_go = steps[now].size() > slots || !holds(steps[now], *at);
          if (may_go && (victim == resident.end() || worth(*at) < worth(*victim))) {
            victim = at;
          }
        }
        resident.erase(victim);
        counts.evictions += 1;
      }
    }
  }
  return counts;
}

TEST_CASE("segment cache, by hand") {
  // The example of docs/routing.md. One step ahead is enough to keep 4 over 1 at the third step and 3 over 4 at the
  // fifth, as MIN does; no step ahead is LRU.
  const RoutingTrace trace = testing::trace_of(5, {{1, 4}, {1, 4}, {3, 2}, {3, 4}, {0, 2}, {0, 3}, {2, 3}});
  SimulationOptions options;
  options.slots = 3;
  const SimulationCounts one = simulate_segment_cache(trace, 1, options);
  CHECK(one.requests == 14);
  CHECK(one.hits == 9);
  CHECK(one.cold == 5);
  CHECK(one.loads == 5);
  CHECK(one.evictions == 2);
  CHECK(one.steps == 7);
  CHECK(one.load_bytes == 500);
  CHECK(simulate_segment_cache(trace, 0, options).hits == 8);
  // A count is not a distance: at 2, the three uses of 1 outweigh the one of 0, which comes first.
  const RoutingTrace counted = testing::trace_of(3, {{0}, {1}, {2}, {0}, {2}, {1}, {1}, {1}});
  options.slots = 2;
  CHECK(simulate_segment_cache(counted, 8, options).hits == 3);
  options.policy = CachePolicyKind::kBelady;
  CHECK(simulate(counted, options).hits == 4);
  CHECK_THROWS_WITH(simulate_segment_cache(trace, -1, options), Catch::Contains("segment: must be at least 0, got -1"));
  options.slots = 0;
  CHECK_THROWS_AS(simulate_segment_cache(trace, 1, options), UsageError);
}

TEST_CASE("segment cache agrees with looking ahead from every step anew") {
  SplitMix64 random(91);
  for (int round = 0; round < 30; ++round) {
    testing::TraceShape shape;
    shape.num_experts = 10;
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(4));
    shape.max_steps = 30;
    shape.skip = round % 2 == 0 ? 0.25 : 0.0;
    const RoutingTrace trace = testing::random_trace(random, shape);
    for (const std::size_t ahead : {0U, 1U, 3U, 8U, 100U}) {
      for (const std::size_t slots : {1U, 2U, 4U, 7U}) {
        SimulationOptions options;
        options.slots = static_cast<std::int64_t>(slots);
        options.include_prefill = random.below(2) == 0;
        options.num_threads = 1 + static_cast<std::int64_t>(random.below(3));
        const SimulationCounts expected = segment_cache_by_hand(trace, ahead, slots, options.include_prefill);
        const SimulationCounts got = simulate_segment_cache(trace, static_cast<std::int64_t>(ahead), options);
        CAPTURE(round, ahead, slots);
        CHECK(got.requests == expected.requests);
        CHECK(got.hits == expected.hits);
        CHECK(got.loads == expected.loads);
        CHECK(got.evictions == expected.evictions);
      }
    }
  }
}

}  // namespace
}  // namespace hestia
