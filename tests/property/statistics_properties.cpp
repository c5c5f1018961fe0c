#include <cmath>
#include <numeric>
#include <set>

#include "hestia/routing/agreement.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/preferences.hpp"
#include "random_cases.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using namespace testing;

struct ModelShape {
  std::int64_t num_layers = 0;
  std::int64_t num_experts = 0;
  std::int64_t top_k = 0;
  std::vector<std::int64_t> model_layers;
};

ModelShape random_model(SplitMix64& random) {
  ModelShape shape;
  shape.num_layers = between(random, 1, 3);
  shape.num_experts = between(random, 1, 12);
  shape.top_k = between(random, 1, shape.num_experts);
  for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
    shape.model_layers.push_back(2 * layer + between(random, 0, 1));
  }
  return shape;
}

// Sticky choices and softmax probabilities; the prompt may be empty or everything.
SequenceRouting random_sequence(SplitMix64& random, const ModelShape& shape, std::int64_t id, bool with_prompt) {
  SequenceRouting sequence;
  sequence.id = id;
  sequence.task = chance(random, 0.5) ? "prose" : "code";
  sequence.num_tokens = between(random, 1, 25);
  sequence.num_prompt_tokens = with_prompt ? between(random, 0, sequence.num_tokens) : 0;
  sequence.num_layers = shape.num_layers;
  sequence.num_experts = shape.num_experts;
  sequence.top_k = shape.top_k;
  for (std::int64_t row = 0; row < shape.num_layers * sequence.num_tokens; ++row) {
    const auto fresh = random_experts(random, shape.num_experts, shape.top_k);
    if (row % sequence.num_tokens > 0 && chance(random, 0.5)) {
      const std::vector<std::uint16_t> before(sequence.selected.end() - shape.top_k, sequence.selected.end());
      sequence.selected.insert(sequence.selected.end(), before.begin(), before.end());
    } else {
      sequence.selected.insert(sequence.selected.end(), fresh.begin(), fresh.end());
    }
    std::vector<double> values;
    double sum = 0.0;
    for (std::int64_t expert = 0; expert < shape.num_experts; ++expert) {
      values.push_back(std::exp(8.0 * random.uniform()));
      sum += values.back();
    }
    for (const double value : values) {
      sequence.probabilities.push_back(static_cast<float>(value / sum));
    }
  }
  return sequence;
}

// The same tokens seen by another router.
SequenceRouting seen_by_another(SplitMix64& random, const ModelShape& shape, const SequenceRouting& sequence) {
  SequenceRouting other = sequence;
  other.selected.clear();
  for (std::int64_t row = 0; row < shape.num_layers * sequence.num_tokens; ++row) {
    const auto chosen = random_experts(random, shape.num_experts, shape.top_k);
    other.selected.insert(other.selected.end(), chosen.begin(), chosen.end());
  }
  return other;
}

std::int64_t uses_at(const SequenceRouting& sequence, std::int64_t layer, std::int64_t token, std::int64_t expert) {
  const auto begin = sequence.selected.begin() + (layer * sequence.num_tokens + token) * sequence.top_k;
  return std::count(begin, begin + sequence.top_k, static_cast<std::uint16_t>(expert));
}

bool same_aggregate(const PreferenceAggregate& a, const PreferenceAggregate& b) {
  return a.num_layers == b.num_layers && a.num_experts == b.num_experts && a.count == b.count &&
         a.coactivation == b.coactivation && a.transition == b.transition && a.mean_probability == b.mean_probability;
}

void check_identities(const PreferenceAggregate& aggregate, const ModelShape& shape,
                      const std::vector<SequenceRouting>& sequences) {
  const std::int64_t num_experts = shape.num_experts;
  std::int64_t counted = 0;
  for (const SequenceRouting& sequence : sequences) {
    counted += sequence.num_tokens - sequence.num_prompt_tokens;
  }
  for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
    const auto count = [&](std::int64_t e) {
      return aggregate.count[static_cast<std::size_t>(layer * num_experts + e)];
    };
    const auto both = [&](std::int64_t e, std::int64_t f) {
      return aggregate.coactivation[static_cast<std::size_t>((layer * num_experts + e) * num_experts + f)];
    };
    const auto follows = [&](std::int64_t e, std::int64_t f) {
      return aggregate.transition[static_cast<std::size_t>((layer * num_experts + e) * num_experts + f)];
    };
    std::int64_t total = 0;
    double probability = 0.0;
    for (std::int64_t e = 0; e < num_experts; ++e) {
      total += count(e);
      probability += aggregate.mean_probability[static_cast<std::size_t>(layer * num_experts + e)];
      std::int64_t partners = 0;
      std::int64_t into = 0;
      std::int64_t out_of = 0;
      for (std::int64_t f = 0; f < num_experts; ++f) {
        CHECK(both(e, f) == both(f, e));
        CHECK(both(e, f) <= std::min(count(e), count(f)));
        partners += both(e, f);
        into += follows(f, e);
        out_of += follows(e, f);
      }
      // What e could follow: all its completion steps but those that open a sequence without prompt. What could follow
      // e: all its steps from the last prompt token on, but those that end a sequence.
      std::int64_t opens = 0;
      std::int64_t leaves = 0;
      for (const SequenceRouting& sequence : sequences) {
        if (sequence.num_prompt_tokens == 0) {
          opens += uses_at(sequence, layer, 0, e);
        }
        for (std::int64_t t = std::max<std::int64_t>(0, sequence.num_prompt_tokens - 1); t + 1 < sequence.num_tokens;
             ++t) {
          leaves += uses_at(sequence, layer, t, e);
        }
      }
      CHECK(both(e, e) == count(e));
      CHECK(partners == shape.top_k * count(e));
      CHECK(into == shape.top_k * (count(e) - opens));
      CHECK(out_of == shape.top_k * leaves);
    }
    CHECK(total == shape.top_k * counted);
    CHECK(probability == Approx(counted > 0 ? 1.0 : 0.0).margin(1e-5));
  }
}

TEST_CASE("property: preference statistics obey their identities, from memory and from the file") {
  const TemporaryFolder folder;
  for_cases(60, 30000, [&](SplitMix64& random) {
    const ModelShape shape = random_model(random);
    const std::int64_t max_sequences = between(random, 0, 6);
    PreferenceWriterOptions options;
    options.max_sequences = max_sequences;
    options.seed = random.next();
    options.chunk_bytes = between(random, 1, 4 * 2 * shape.num_layers * shape.num_experts);
    options.buffer_bytes = between(random, 1, 8 * 12 * shape.num_layers * shape.num_experts);
    const std::filesystem::path path = folder.path() / "preferences.h5";
    PreferenceWriter writer(path, shape.num_layers, shape.num_experts, shape.model_layers, options);
    std::vector<SequenceRouting> baseline;
    std::vector<SequenceRouting> tuned;
    const std::int64_t num_sequences = between(random, 1, 8);
    for (std::int64_t id = 0; id < num_sequences; ++id) {
      baseline.push_back(random_sequence(random, shape, id, true));
      tuned.push_back(seen_by_another(random, shape, baseline.back()));
      writer.add(baseline.back(), tuned.back());
    }
    writer.close();
    const PreferenceReader back(path);
    for (const PreferenceRouter router : {PreferenceRouter::kBaseline, PreferenceRouter::kTuned}) {
      check_identities(writer.aggregate(router), shape, router == PreferenceRouter::kBaseline ? baseline : tuned);
      CHECK(same_aggregate(back.aggregate(router), writer.aggregate(router)));
    }
    CHECK(back.num_sequences_total() == num_sequences);
    CHECK(back.layers() == shape.model_layers);
    CHECK(back.num_stored() == (max_sequences == 0 ? num_sequences : std::min(max_sequences, num_sequences)));
    const std::vector<std::int64_t> ids = back.ids();
    CHECK(std::set<std::int64_t>(ids.begin(), ids.end()).size() == ids.size());
    // The rows of all sequences add up to the aggregate.
    const PreferenceRows rows = back.rows(PreferenceRouter::kTuned, 0, back.num_stored());
    if (back.num_stored() == num_sequences) {
      CHECK(std::accumulate(rows.count.begin(), rows.count.end(), std::int64_t{0}) == [&] {
        const std::vector<std::int64_t> total = writer.aggregate(PreferenceRouter::kTuned).count;
        return std::accumulate(total.begin(), total.end(), std::int64_t{0});
      }());
    }
  });
}

TEST_CASE("property: statistics, metrics and the simulator tell of the same routing") {
  const TemporaryFolder folder;
  for_cases(60, 31000, [&](SplitMix64& random) {
    const ModelShape shape = random_model(random);
    const bool with_prompt = chance(random, 0.5);
    PreferenceWriter writer(folder.path() / "p.h5", shape.num_layers, shape.num_experts, shape.model_layers);
    RoutingMetrics metrics(shape.num_layers, shape.num_experts, shape.top_k, shape.model_layers, 1000);
    std::int64_t steps = 0;
    std::int64_t pairs = 0;
    for (std::int64_t id = between(random, 1, 6); id > 0; --id) {
      const SequenceRouting sequence = random_sequence(random, shape, id, with_prompt);
      writer.add(sequence, sequence);
      metrics.add(sequence);
      const std::int64_t counted = sequence.num_tokens - sequence.num_prompt_tokens;
      steps += shape.num_layers * counted;
      pairs += shape.num_layers * std::max<std::int64_t>(0, counted - 1);
    }
    const PreferenceAggregate aggregate = writer.aggregate(PreferenceRouter::kBaseline);
    const auto experts = static_cast<std::size_t>(shape.num_experts);
    std::int64_t uses = 0;
    std::int64_t unused = 0;
    std::int64_t stays = 0;
    for (std::size_t at = 0; at < aggregate.count.size(); ++at) {
      uses += aggregate.count[at];
      unused += aggregate.count[at] == 0 ? 1 : 0;
      stays += aggregate.transition[at * experts + at % experts];
    }
    SimulationOptions options;
    options.slots = shape.top_k;
    const SimulationCounts counts = metrics.simulate(options);
    CHECK(counts.requests == uses);
    CHECK(counts.steps == steps);
    CHECK(metrics.usage().unused_experts == unused);
    if (!with_prompt) {
      // Each expert that follows itself is one of overlap; the step before a first completion token would be prompt.
      CHECK(counts.hits == stays);
      CHECK(metrics.expert_overlap_ratio() * static_cast<double>(shape.top_k * pairs) ==
            Approx(static_cast<double>(stays)).margin(1e-9));
    }
    const double sequences = static_cast<double>(counts.cold);
    if (steps > 0) {
      CHECK(metrics.distinct_experts() >= static_cast<double>(shape.top_k));
      CHECK(metrics.distinct_experts() <= static_cast<double>(shape.num_experts));
      CHECK(sequences >= metrics.distinct_experts());
    }
  });
}

TEST_CASE("property: usage figures stay in their bounds and do not know the experts' names") {
  for_cases(60, 32000, [&](SplitMix64& random) {
    const ModelShape shape = random_model(random);
    const std::vector<std::uint16_t> names = random_experts(random, shape.num_experts, shape.num_experts);
    RoutingMetrics metrics(shape.num_layers, shape.num_experts, shape.top_k, shape.model_layers, 1000);
    RoutingMetrics other(shape.num_layers, shape.num_experts, shape.top_k, shape.model_layers, 1000);
    for (std::int64_t id = between(random, 1, 4); id > 0; --id) {
      SequenceRouting sequence = random_sequence(random, shape, id, true);
      metrics.add(sequence);
      const SequenceRouting original = sequence;
      for (std::uint16_t& expert : sequence.selected) {
        expert = names[expert];
      }
      const auto experts = static_cast<std::size_t>(shape.num_experts);
      for (std::size_t i = 0; i < sequence.probabilities.size(); ++i) {
        sequence.probabilities[i / experts * experts + names[i % experts]] = original.probabilities[i];
      }
      other.add(sequence);
    }
    const UsageStatistics usage = metrics.usage();
    const UsageStatistics renamed_usage = other.usage();
    const auto experts = static_cast<double>(shape.num_experts);
    CAPTURE(shape.num_experts, shape.top_k, metrics.num_counted());
    CHECK(usage.normalised_entropy >= 0.0);
    CHECK(usage.normalised_entropy <= 1.0 + 1e-12);
    CHECK(usage.coefficient_of_variation >= 0.0);
    // K experts take a K-th of all uses at most: the uneven extreme is K equal experts and no other.
    CHECK(usage.coefficient_of_variation <= std::sqrt(experts / static_cast<double>(shape.top_k) - 1.0) + 1e-12);
    CHECK(usage.max_share <= experts / static_cast<double>(shape.top_k) + 1e-12);
    CHECK(usage.unused_experts <=
          shape.num_layers * (shape.num_experts - (metrics.num_counted() > 0 ? shape.top_k : 0)));
    if (metrics.num_counted() > 0) {
      CHECK(usage.max_share >= 1.0 - 1e-12);
      const double floor = shape.num_experts > 1 ? std::log(static_cast<double>(shape.top_k)) / std::log(experts) : 1.0;
      CHECK(usage.normalised_entropy >= floor - 1e-12);
    }
    CHECK(usage.normalised_entropy == Approx(renamed_usage.normalised_entropy).margin(1e-12));
    CHECK(usage.coefficient_of_variation == Approx(renamed_usage.coefficient_of_variation).margin(1e-12));
    CHECK(usage.max_share == Approx(renamed_usage.max_share).epsilon(1e-12));
    CHECK(usage.unused_experts == renamed_usage.unused_experts);
  });
}

TEST_CASE("property: segment routing lies between what keeping every expert gives and 1, and knows no names") {
  for_cases(120, 33000, [](SplitMix64& random) {
    const RoutingTrace trace = any_trace(random);
    const bool include_prefill = chance(random, 0.3);
    const RoutingTrace other = renamed(random, trace);
    double requests = 0.0;
    double steps = 0.0;
    for (const auto& [key, served] : served_steps(trace, include_prefill)) {
      for (const auto& step : served) {
        requests += static_cast<double>(step.size());
      }
      steps += static_cast<double>(served.size());
    }
    for (const std::int64_t length : {std::int64_t{1}, between(random, 2, 12), std::int64_t{1} << 40}) {
      const SegmentRouting routing = segment_routing(trace, length, include_prefill);
      CAPTURE(length, trace.num_experts, trace.top_k);
      CHECK(routing.best_performance >= 0.0);
      CHECK(routing.best_performance <= 1.0);
      CHECK(routing.best_performance == segment_routing(other, length, include_prefill).best_performance);
      if (steps == 0.0) {
        CHECK(routing.segments == 0);
        continue;
      }
      CHECK(routing.segments <= static_cast<std::int64_t>(steps));
      CHECK(routing.size_ratio > 0.0);
      if (length == 1) {
        CHECK(routing.best_performance == 1.0);
        CHECK(routing.size_ratio == 1.0);
        CHECK(routing.segments == static_cast<std::int64_t>(steps));
      }
      if (length > trace.num_experts + 1000) {
        // One segment a sequence. With every expert active throughout, precision is requests / (steps * E), recall 1.
        const double slots = steps * static_cast<double>(trace.num_experts);
        CHECK(routing.best_performance >= 2.0 * requests / (requests + slots) - 1e-12);
      }
    }
  });
}

TEST_CASE("property: routing that never changes within a sequence has a segment routing of 1 at every length") {
  for_cases(60, 34000, [](SplitMix64& random) {
    const ModelShape shape = random_model(random);
    RoutingMetrics metrics(shape.num_layers, shape.num_experts, shape.top_k, shape.model_layers, 0);
    for (std::int64_t id = between(random, 1, 5); id > 0; --id) {
      SequenceRouting sequence = random_sequence(random, shape, id, false);
      const std::int64_t row_size = sequence.num_tokens * shape.top_k;
      for (std::int64_t i = 0; i < shape.num_layers * row_size; ++i) {
        sequence.selected[static_cast<std::size_t>(i)] =
            sequence.selected[static_cast<std::size_t>(i / row_size * row_size + i % shape.top_k)];
      }
      metrics.add(sequence);
    }
    const SegmentRouting routing = metrics.segment_routing(between(random, 1, 30));
    CHECK(routing.best_performance == 1.0);
    CHECK(routing.size_ratio == 1.0);
  });
}

TEST_CASE("property: long segments of random routing do little better than keeping every expert") {
  for_cases(12, 35000, [](SplitMix64& random) {
    const std::int64_t num_experts = between(random, 4, 24);
    const std::int64_t top_k = between(random, 1, num_experts / 2);
    Steps steps;
    for (int t = 0; t < 4000; ++t) {
      steps.push_back(random_experts(random, num_experts, top_k));
    }
    const double segment_routing_at_2000 = segment_routing(trace_of(num_experts, steps), 2000).best_performance;
    // Precision is at most the largest share s of a segment's steps that an expert has, so F1 is at most 2s / (1 + s).
    const double share = static_cast<double>(top_k) / static_cast<double>(num_experts);
    const double largest = share + 6.0 * std::sqrt(share * (1.0 - share) / 2000.0);
    CHECK(segment_routing_at_2000 >= 2.0 * share / (1.0 + share) - 1e-12);
    CHECK(segment_routing_at_2000 <= 2.0 * largest / (1.0 + largest));
  });
}

TEST_CASE("property: a router agrees with itself, and with another the same both ways and under other names") {
  for_cases(60, 36000, [](SplitMix64& random) {
    const ModelShape shape = random_model(random);
    const std::vector<std::uint16_t> names = random_experts(random, shape.num_experts, shape.num_experts);
    const auto experts = static_cast<std::size_t>(shape.num_experts);
    const auto rename = [&](SequenceRouting sequence) {
      const SequenceRouting original = sequence;
      for (std::uint16_t& expert : sequence.selected) {
        expert = names[expert];
      }
      for (std::size_t i = 0; i < sequence.probabilities.size(); ++i) {
        sequence.probabilities[i / experts * experts + names[i % experts]] = original.probabilities[i];
      }
      return sequence;
    };
    RouterAgreement itself;
    RouterAgreement reversed;
    RouterAgreement forward;
    RouterAgreement backward;
    RouterAgreement other;
    for (std::int64_t id = between(random, 1, 4); id > 0; --id) {
      const SequenceRouting reference = random_sequence(random, shape, id, true);
      SequenceRouting tuned = seen_by_another(random, shape, reference);
      for (float& probability : tuned.probabilities) {
        probability = std::round(20.0F * static_cast<float>(random.uniform())) / 20.0F;  // ties
      }
      // The order alone counts.
      SequenceRouting steeper = reference;
      SequenceRouting falling = reference;
      for (std::size_t i = 0; i < reference.probabilities.size(); ++i) {
        steeper.probabilities[i] = 2.0F * reference.probabilities[i];
        falling.probabilities[i] = -reference.probabilities[i];
      }
      itself.add(reference, steeper);
      reversed.add(reference, falling);
      forward.add(reference, tuned);
      backward.add(tuned, reference);
      other.add(rename(reference), rename(tuned));
    }
    if (itself.num_counted() == 0) {
      CHECK(std::isnan(forward.top_k_agreement()));
      return;
    }
    CHECK(itself.top_k_agreement() == 1.0);
    CHECK(std::isnan(itself.kendall_tau()) == (shape.num_experts == 1));
    if (shape.num_experts > 1) {
      CHECK(itself.kendall_tau() == Approx(1.0).epsilon(1e-12));
      CHECK(reversed.kendall_tau() == Approx(-1.0).epsilon(1e-12));
    }
    const double k = static_cast<double>(shape.top_k);
    const double e = static_cast<double>(shape.num_experts);
    CHECK(forward.top_k_agreement() >= std::max(0.0, 2.0 * k - e) / k - 1e-12);
    CHECK(forward.top_k_agreement() <= 1.0 + 1e-12);
    CHECK(forward.top_k_agreement() == Approx(backward.top_k_agreement()).epsilon(1e-12));
    CHECK(forward.top_k_agreement() == Approx(other.top_k_agreement()).epsilon(1e-12));
    if (!std::isnan(forward.kendall_tau())) {
      CHECK(std::abs(forward.kendall_tau()) <= 1.0 + 1e-12);
      CHECK(forward.kendall_tau() == Approx(backward.kendall_tau()).margin(1e-12));
      CHECK(forward.kendall_tau() == Approx(other.kendall_tau()).margin(1e-12));
    }
  });
}

}  // namespace
}  // namespace hestia
