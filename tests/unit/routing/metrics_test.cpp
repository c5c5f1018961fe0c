#include "hestia/routing/metrics.hpp"

#include <cmath>
#include <map>
#include <set>

#include <catch2/catch.hpp>

#include "routing_fixtures.hpp"

namespace hestia {
namespace {

using testing::random_experts;
using testing::random_trace;
using testing::TraceShape;

// A random sequence as the model would record it, probabilities included.
SequenceRouting random_sequence(SplitMix64& random, std::int64_t id, std::int64_t num_tokens, std::int64_t num_prompt,
                                std::int64_t num_layers = 3, std::int64_t num_experts = 7, std::int64_t top_k = 2) {
  SequenceRouting sequence;
  sequence.id = id;
  sequence.task = "prose";
  sequence.num_prompt_tokens = num_prompt;
  sequence.num_tokens = num_tokens;
  sequence.num_layers = num_layers;
  sequence.num_experts = num_experts;
  sequence.top_k = top_k;
  for (std::int64_t row = 0; row < num_layers * num_tokens; ++row) {
    const auto chosen = random_experts(random, num_experts, top_k);
    sequence.selected.insert(sequence.selected.end(), chosen.begin(), chosen.end());
    std::vector<double> exponentials;
    double sum = 0.0;
    for (std::int64_t expert = 0; expert < num_experts; ++expert) {
      exponentials.push_back(std::exp(3.0 * random.uniform()));
      sum += exponentials.back();
    }
    for (const double value : exponentials) {
      sequence.probabilities.push_back(static_cast<float>(value / sum));
    }
    for (std::int64_t k = 0; k < top_k; ++k) {
      sequence.weights.push_back(
          sequence.probabilities[sequence.probabilities.size() - 1 - static_cast<std::size_t>(k)]);
    }
  }
  return sequence;
}

TEST_CASE("overlap and distinct experts agree with sets built from scratch") {
  SplitMix64 random(71);
  for (int round = 0; round < 30; ++round) {
    TraceShape shape;
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(5));
    shape.skip = round % 2 == 0 ? 0.25 : 0.0;
    const RoutingTrace trace = random_trace(random, shape);
    for (const bool include_prefill : {false, true}) {
      std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::set<int>>> steps;
      for (const TraceEntry& entry : trace.entries) {
        if (include_prefill || entry.phase == Phase::kDecode) {
          const auto experts = trace.experts_of(entry);
          steps[{entry.layer, entry.sequence}].emplace_back(experts.begin(), experts.end());
        }
      }
      double overlap = 0.0;
      double pairs = 0.0;
      double distinct = 0.0;
      for (const auto& [key, sets] : steps) {
        std::set<int> all;
        for (std::size_t t = 0; t < sets.size(); ++t) {
          all.insert(sets[t].begin(), sets[t].end());
          if (t > 0) {
            double common = 0.0;
            for (const int expert : sets[t]) {
              common += sets[t - 1].count(expert) > 0 ? 1.0 : 0.0;
            }
            overlap += common / static_cast<double>(sets[t].size());
            pairs += 1.0;
          }
        }
        distinct += static_cast<double>(all.size());
      }
      CHECK(expert_overlap_ratio(trace, include_prefill) == Approx(pairs == 0.0 ? 0.0 : overlap / pairs));
      CHECK(distinct_experts(trace, include_prefill) == Approx(distinct / static_cast<double>(steps.size())));
    }
  }
}

TEST_CASE("a single step has no pair, and nothing at all has no experts") {
  CHECK(expert_overlap_ratio(testing::trace_of(4, {{1, 2}})) == 0.0);
  CHECK(distinct_experts(testing::trace_of(4, {{1, 2}})) == 2.0);
  CHECK(distinct_experts(testing::trace_of(4, {})) == 0.0);
  CHECK(expert_overlap_ratio(testing::trace_of(4, {{1, 2}, {2, 1}})) == 1.0);
}

// F1 of the best threshold on the share of a segment's steps, every threshold tried, segments cut out one by one.
SegmentRouting segment_routing_by_hand(const RoutingTrace& trace, std::size_t segment_length, bool include_prefill) {
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::set<int>>> steps;
  for (const TraceEntry& entry : trace.entries) {
    if (include_prefill || entry.phase == Phase::kDecode) {
      const auto experts = trace.experts_of(entry);
      steps[{entry.layer, entry.sequence}].emplace_back(experts.begin(), experts.end());
    }
  }
  std::vector<std::pair<int, int>> uses_and_length;  // Of every expert in every segment.
  SegmentRouting result;
  for (const auto& [key, sets] : steps) {
    const std::size_t length = std::min(segment_length, sets.size());
    for (std::size_t begin = 0; begin + length <= sets.size(); ++begin) {
      result.segments += 1;
      for (int expert = 0; expert < trace.num_experts; ++expert) {
        int uses = 0;
        for (std::size_t t = begin; t < begin + length; ++t) {
          uses += static_cast<int>(sets[t].count(expert));
        }
        uses_and_length.emplace_back(uses, static_cast<int>(length));
      }
    }
  }
  for (const auto& [least_uses, of_length] : uses_and_length) {
    double true_positives = 0.0;
    double false_positives = 0.0;
    double false_negatives = 0.0;
    for (const auto& [uses, length] : uses_and_length) {
      if (uses * of_length >= least_uses * length) {
        true_positives += uses;
        false_positives += length - uses;
      } else {
        false_negatives += uses;
      }
    }
    const double f1 = 2.0 * true_positives / (2.0 * true_positives + false_positives + false_negatives);
    const double size_ratio = (true_positives + false_positives) / (true_positives + false_negatives);
    if (f1 > result.best_performance + 1e-12 ||
        (f1 > result.best_performance - 1e-12 && size_ratio > result.size_ratio)) {
      result.best_performance = f1;
      result.size_ratio = size_ratio;
    }
  }
  return result;
}

TEST_CASE("segment routing best performance, by hand") {
  // The example of docs/routing.md. Of its five segments of three steps, eleven (expert, segment) pairs have two uses
  // and eight have one: TP 22, FP 11, FN 8 at a threshold of 2, and TP 30, FP 27 at 1.
  const RoutingTrace trace = testing::trace_of(5, {{1, 4}, {1, 4}, {3, 2}, {3, 4}, {0, 2}, {0, 3}, {2, 3}});
  const SegmentRouting three = segment_routing(trace, 3);
  CHECK(three.best_performance == 44.0 / 63.0);
  CHECK(three.size_ratio == 33.0 / 30.0);
  CHECK(three.segments == 5);
  // Pairs of steps: five with two uses, fourteen with one; here it pays to keep them all.
  const SegmentRouting two = segment_routing(trace, 2);
  CHECK(two.best_performance == 48.0 / 62.0);
  CHECK(two.size_ratio == 38.0 / 24.0);
  CHECK(two.segments == 6);
  CHECK(segment_routing(trace, 1).best_performance == 1.0);
  // One segment of all seven steps: 3 has four uses, 2 and 4 have three, 0 and 1 two. Thresholds of 3 (TP 10 of 21)
  // and of 2 (TP 14 of 35) score the same; the lower one counts.
  for (const std::int64_t length : {7, 8, 1000}) {
    const SegmentRouting whole = segment_routing(trace, length);
    CHECK(whole.segments == 1);
    CHECK(whole.best_performance == 20.0 / 35.0);
    CHECK(whole.size_ratio == 35.0 / 14.0);
  }
  CHECK(segment_routing(testing::trace_of(4, {}), 4).segments == 0);
  CHECK(segment_routing(testing::trace_of(4, {}), 4).best_performance == 0.0);
  CHECK_THROWS_WITH(segment_routing(trace, 0), Catch::Contains("segment: must be at least 1 step, got 0"));
}

TEST_CASE("segment routing agrees with segments cut out one by one") {
  SplitMix64 random(75);
  for (int round = 0; round < 40; ++round) {
    TraceShape shape;
    shape.num_experts = 9;
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(4));
    shape.max_steps = 20;
    shape.skip = round % 2 == 0 ? 0.25 : 0.0;
    const RoutingTrace trace = random_trace(random, shape);
    // Sequences have 5 to 20 steps: the longer segments do not fit into all of them, the longest into none.
    for (const std::size_t length : {1U, 2U, 5U, 9U, 40U}) {
      for (const bool include_prefill : {false, true}) {
        const SegmentRouting expected = segment_routing_by_hand(trace, length, include_prefill);
        const SegmentRouting got = segment_routing(trace, static_cast<std::int64_t>(length), include_prefill);
        CAPTURE(round, length, include_prefill);
        CHECK(got.segments == expected.segments);
        CHECK(got.best_performance == Approx(expected.best_performance).epsilon(1e-12));
        CHECK(got.size_ratio == Approx(expected.size_ratio).epsilon(1e-12));
      }
    }
  }
}

TEST_CASE("streamed metrics equal the metrics of the trace they build") {
  SplitMix64 random(72);
  RoutingMetrics metrics(3, 7, 2, {1, 4, 5}, 900);
  std::int64_t counted = 0;
  std::vector<std::vector<double>> uses(3, std::vector<double>(7, 0.0));
  for (std::int64_t id = 0; id < 6; ++id) {
    const std::int64_t num_tokens = 5 + static_cast<std::int64_t>(random.below(20));
    const SequenceRouting sequence = random_sequence(random, id, num_tokens, id % 3);
    metrics.add(sequence);
    counted += num_tokens - id % 3;
    for (std::int64_t layer = 0; layer < 3; ++layer) {
      for (std::int64_t token = id % 3; token < num_tokens; ++token) {
        const std::int64_t row = layer * num_tokens + token;
        for (std::int64_t k = 0; k < 2; ++k) {
          uses[static_cast<std::size_t>(layer)][sequence.selected[static_cast<std::size_t>(row * 2 + k)]] += 1.0;
        }
      }
    }
  }
  CHECK(metrics.num_sequences() == 6);
  CHECK(metrics.num_counted() == counted);
  CHECK(metrics.expert_overlap_ratio() == expert_overlap_ratio(metrics.trace()));
  CHECK(metrics.distinct_experts() == distinct_experts(metrics.trace()));
  CHECK(metrics.segment_routing(4).best_performance == segment_routing(metrics.trace(), 4).best_performance);
  CHECK(metrics.trace().num_layers == 6);
  SimulationOptions options;
  options.slots = 3;
  const SimulationCounts counts = metrics.simulate(options);
  CHECK(counts.requests == counted * 3 * 2);
  CHECK(counts.load_bytes == counts.loads * 900);
  CHECK(metrics.simulate_segment_cache(4, options).hits == simulate_segment_cache(metrics.trace(), 4, options).hits);

  double entropy = 0.0;
  double variation = 0.0;
  double max_share = 0.0;
  for (std::size_t layer = 0; layer < 3; ++layer) {
    double total = 0.0;
    for (std::size_t e = 0; e < 7; ++e) {
      total += uses[layer][e];
    }
    double variance = 0.0;
    double largest = 0.0;
    for (std::size_t e = 0; e < 7; ++e) {
      const double share = uses[layer][e] / total;
      entropy -= share * std::log(share) / std::log(7.0) / 3.0;
      variance += (share - 1.0 / 7.0) * (share - 1.0 / 7.0) / 7.0;
      largest = std::max(largest, share);
    }
    variation += std::sqrt(variance) * 7.0 / 3.0;
    max_share += largest * 7.0 / 3.0;
  }
  const UsageStatistics usage = metrics.usage();
  CHECK(usage.normalised_entropy == Approx(entropy).epsilon(1e-12));
  CHECK(usage.coefficient_of_variation == Approx(variation).epsilon(1e-12));
  CHECK(usage.max_share == Approx(max_share).epsilon(1e-12));
  CHECK(usage.unused_experts == 0);
}

TEST_CASE("usage of balanced and collapsed routing") {
  SequenceRouting balanced;
  balanced.num_tokens = 4;
  balanced.num_layers = 1;
  balanced.num_experts = 4;
  balanced.top_k = 2;
  balanced.selected = {0, 1, 2, 3, 1, 0, 3, 2};
  RoutingMetrics even(1, 4, 2, {0}, 0);
  even.add(balanced);
  CHECK(even.usage().normalised_entropy == Approx(1.0));
  CHECK(even.usage().coefficient_of_variation == Approx(0.0).margin(1e-15));
  CHECK(even.usage().max_share == Approx(1.0));
  CHECK(even.usage().unused_experts == 0);

  SequenceRouting collapsed = balanced;
  collapsed.selected = {2, 1, 2, 1, 1, 2, 2, 1};
  RoutingMetrics uneven(1, 4, 2, {0}, 0);
  uneven.add(collapsed);
  CHECK(uneven.usage().normalised_entropy == Approx(0.5));
  CHECK(uneven.usage().coefficient_of_variation == Approx(1.0));
  CHECK(uneven.usage().max_share == Approx(2.0));
  CHECK(uneven.usage().unused_experts == 2);

  // Only prompt: nothing is counted.
  SequenceRouting prompt = balanced;
  prompt.num_prompt_tokens = 4;
  RoutingMetrics nothing(1, 4, 2, {0}, 0);
  nothing.add(prompt);
  CHECK(nothing.num_counted() == 0);
  CHECK(nothing.usage().normalised_entropy == 0.0);
  CHECK(nothing.usage().unused_experts == 4);
  CHECK(nothing.expert_overlap_ratio() == 0.0);
}

TEST_CASE("sequences of another shape are refused") {
  SplitMix64 random(74);
  RoutingMetrics metrics(3, 7, 2, {0, 1, 2}, 0);
  CHECK_THROWS_WITH(metrics.add(random_sequence(random, 0, 4, 0, 2)), Catch::Contains("2 layers, 7 experts"));
  CHECK_THROWS_AS(metrics.add(random_sequence(random, 0, 4, 0, 3, 8)), std::invalid_argument);
  SequenceRouting short_probabilities = random_sequence(random, 0, 4, 0);
  short_probabilities.probabilities.pop_back();
  CHECK_THROWS_WITH(metrics.add(short_probabilities), Catch::Contains("83 probabilities, expected 3 x 4 x 7"));
  SequenceRouting long_prompt = random_sequence(random, 0, 4, 5);
  CHECK_THROWS_WITH(metrics.add(long_prompt), Catch::Contains("5 prompt tokens of 4"));
  SequenceRouting strange = random_sequence(random, 0, 4, 0);
  strange.selected[3] = 7;
  CHECK_THROWS_WITH(metrics.add(strange), Catch::Contains("expert 7 is not below 7"));
  SequenceRouting repeated = random_sequence(random, 0, 4, 0);
  repeated.selected[3] = repeated.selected[2];
  CHECK_THROWS_WITH(metrics.add(repeated), Catch::Contains("twice"));
  // Nothing of a refused sequence stays behind.
  CHECK(metrics.num_sequences() == 0);
  CHECK(metrics.trace().entries.empty());
  metrics.add(random_sequence(random, 5, 4, 0));
  CHECK_THROWS_WITH(metrics.add(random_sequence(random, 5, 4, 0)), Catch::Contains("same id"));
  CHECK_THROWS_AS(RoutingMetrics(2, 7, 2, {0}, 0), std::invalid_argument);
  CHECK_THROWS_AS(RoutingMetrics(0, 7, 2, {}, 0), std::invalid_argument);
  CHECK_THROWS_AS(RoutingMetrics(1, 7, 8, {0}, 0), std::invalid_argument);
}

}  // namespace
}  // namespace hestia
