#include <cmath>

#include <catch2/catch.hpp>

#include "hestia/routing/agreement.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/preferences.hpp"
#include "routing_fixtures.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_experts;

constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kExperts = 6;
constexpr std::int64_t kTopK = 2;

// A conversation: prompt comes back between counted stretches.
SequenceRouting random_conversation(SplitMix64& random, std::int64_t id) {
  SequenceRouting sequence;
  sequence.id = id;
  sequence.task = "chat";
  sequence.num_layers = kLayers;
  sequence.num_experts = kExperts;
  sequence.top_k = kTopK;
  const std::size_t turns = 1 + random.below(3);
  for (std::size_t turn = 0; turn < turns; ++turn) {
    sequence.counted.insert(sequence.counted.end(), 1 + random.below(4), 0);
    sequence.counted.insert(sequence.counted.end(), 1 + random.below(5), 1);
  }
  while (sequence.counted[static_cast<std::size_t>(sequence.num_prompt_tokens)] == 0) {
    ++sequence.num_prompt_tokens;
  }
  sequence.num_tokens = static_cast<std::int64_t>(sequence.counted.size());
  for (std::int64_t row = 0; row < kLayers * sequence.num_tokens; ++row) {
    const auto chosen = random_experts(random, kExperts, kTopK);
    sequence.selected.insert(sequence.selected.end(), chosen.begin(), chosen.end());
    double sum = 0.0;
    std::vector<double> shares;
    for (std::int64_t expert = 0; expert < kExperts; ++expert) {
      shares.push_back(0.1 + random.uniform());
      sum += shares.back();
    }
    for (const double share : shares) {
      sequence.probabilities.push_back(static_cast<float>(share / sum));
    }
    sequence.weights.insert(sequence.weights.end(), {0.6F, 0.4F});
  }
  return sequence;
}

TEST_CASE("later questions of a conversation are prompt to metrics, statistics, agreement and traces") {
  SplitMix64 random(51);
  for (int round = 0; round < 20; ++round) {
    RoutingMetrics metrics(kLayers, kExperts, kTopK, {0, 1}, 0);
    const TemporaryFolder folder;
    PreferenceWriter writer(folder.path() / "preferences.h5", kLayers, kExperts, {0, 1});
    RouterAgreement agreement;
    std::vector<std::int64_t> counts(kLayers * kExperts, 0);
    std::vector<double> sums(kLayers * kExperts, 0.0);
    std::int64_t counted = 0;
    std::int64_t requests = 0;
    double agreement_sum = 0.0;
    for (std::int64_t id = 0; id < 5; ++id) {
      const SequenceRouting tuned = random_conversation(random, id);
      SequenceRouting base = tuned;
      for (std::int64_t row = 0; row < kLayers * base.num_tokens; ++row) {
        const auto chosen = random_experts(random, kExperts, kTopK);
        std::copy(chosen.begin(), chosen.end(), base.selected.begin() + row * kTopK);
      }
      metrics.add(tuned);
      writer.add(base, tuned);
      agreement.add(base, tuned);
      std::int64_t of_this = 0;
      for (std::int64_t token = 0; token < tuned.num_tokens; ++token) {
        const bool counts_here = tuned.counted[static_cast<std::size_t>(token)] != 0;
        CHECK(tuned.is_counted(token) == counts_here);
        of_this += counts_here ? 1 : 0;
        for (std::int64_t layer = 0; counts_here && layer < kLayers; ++layer) {
          const std::int64_t row = layer * tuned.num_tokens + token;
          std::int64_t common = 0;
          for (std::int64_t k = 0; k < kTopK; ++k) {
            const std::uint16_t expert = tuned.selected[static_cast<std::size_t>(row * kTopK + k)];
            counts[static_cast<std::size_t>(layer * kExperts + expert)] += 1;
            requests += 1;
            for (std::int64_t other = 0; other < kTopK; ++other) {
              common += base.selected[static_cast<std::size_t>(row * kTopK + other)] == expert ? 1 : 0;
            }
          }
          agreement_sum += static_cast<double>(common) / kTopK;
          for (std::int64_t expert = 0; expert < kExperts; ++expert) {
            sums[static_cast<std::size_t>(layer * kExperts + expert)] +=
                static_cast<double>(tuned.probabilities[static_cast<std::size_t>(row * kExperts + expert)]);
          }
        }
      }
      CHECK(tuned.num_counted() == of_this);
      counted += of_this;
    }
    CHECK(metrics.num_counted() == counted);
    SimulationOptions simulation;
    simulation.slots = 3;
    const SimulationCounts simulated = metrics.simulate(simulation);
    CHECK(simulated.requests == requests);
    const PreferenceAggregate aggregate = writer.aggregate(PreferenceRouter::kTuned);
    CHECK(aggregate.count == counts);
    for (std::size_t i = 0; i < sums.size(); ++i) {
      CHECK(aggregate.mean_probability[i] == Approx(sums[i] / static_cast<double>(counted)));
    }
    CHECK(agreement.top_k_agreement() == Approx(agreement_sum / static_cast<double>(counted * kLayers)));
  }
}

TEST_CASE("flags of counted tokens must fit the sequence, and be those of both routers") {
  SplitMix64 random(52);
  SequenceRouting sequence = random_conversation(random, 0);
  SequenceRouting other = sequence;
  other.counted.back() = 0;
  const TemporaryFolder folder;
  PreferenceWriter writer(folder.path() / "preferences.h5", kLayers, kExperts, {0, 1});
  RouterAgreement agreement;
  CHECK_THROWS_AS(writer.add(sequence, other), std::invalid_argument);
  CHECK_THROWS_AS(agreement.add(sequence, other), std::invalid_argument);
  sequence.counted.pop_back();
  CHECK_THROWS_AS(writer.add(sequence, sequence), std::invalid_argument);
  CHECK_THROWS_AS(agreement.add(sequence, sequence), std::invalid_argument);
  RoutingMetrics metrics(kLayers, kExperts, kTopK, {0, 1}, 0);
  CHECK_THROWS_WITH(metrics.add(sequence), Catch::Contains("flags of counted tokens"));
}

}  // namespace
}  // namespace hestia
