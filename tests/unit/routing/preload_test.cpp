#include "hestia/routing/preload.hpp"

#include <algorithm>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "routing_fixtures.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_experts;

constexpr std::int64_t kLayers = 3;
constexpr std::int64_t kExperts = 11;
const std::vector<std::int64_t> kModelLayers = {1, 2, 5};

SequenceRouting random_sequence(SplitMix64& random, std::int64_t num_tokens, std::int64_t num_prompt) {
  SequenceRouting sequence;
  sequence.num_tokens = num_tokens;
  sequence.num_prompt_tokens = num_prompt;
  sequence.num_layers = kLayers;
  sequence.num_experts = kExperts;
  sequence.top_k = 2;
  for (std::int64_t row = 0; row < kLayers * num_tokens; ++row) {
    const auto experts = random_experts(random, kExperts, 2);
    sequence.selected.insert(sequence.selected.end(), experts.begin(), experts.end());
    sequence.probabilities.insert(sequence.probabilities.end(), kExperts, 1.0F / kExperts);
  }
  return sequence;
}

TEST_CASE("a preload order falls by count, and ties go to the lower index") {
  PreferenceAggregate aggregate;
  aggregate.num_layers = 2;
  aggregate.num_experts = 5;
  aggregate.count = {3, 9, 3, 0, 9, 0, 0, 0, 0, 1};
  CHECK(preload_order(aggregate) == std::vector<std::vector<std::uint16_t>>{{1, 4, 0, 2, 3}, {4, 0, 1, 2, 3}});
  aggregate.count.pop_back();
  CHECK_THROWS_AS(preload_order(aggregate), std::invalid_argument);
}

TEST_CASE("a preload is read from the router that is named") {
  SplitMix64 random(401);
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "preferences.h5";
  const SequenceRouting baseline = random_sequence(random, 60, 7);
  const SequenceRouting tuned = random_sequence(random, 60, 7);
  PreferenceWriter writer(path, kLayers, kExperts, kModelLayers);
  writer.add(baseline, tuned);
  writer.close();
  for (const PreferenceRouter router : {PreferenceRouter::kBaseline, PreferenceRouter::kTuned}) {
    const SequenceRouting& sequence = router == PreferenceRouter::kBaseline ? baseline : tuned;
    const auto order = read_preload(path, router, kModelLayers, kExperts, "the model");
    REQUIRE(order.size() == kLayers);
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
      std::vector<int> uses(kExperts, 0);
      const std::size_t begin = layer * 60 * 2;
      for (std::size_t i = begin + std::size_t{7} * 2; i < begin + std::size_t{60} * 2; ++i) {
        ++uses[sequence.selected[i]];
      }
      REQUIRE(order[layer].size() == kExperts);
      for (std::size_t i = 1; i < kExperts; ++i) {
        const std::uint16_t before = order[layer][i - 1];
        const std::uint16_t after = order[layer][i];
        CHECK((uses[before] > uses[after] || (uses[before] == uses[after] && before < after)));
      }
    }
  }
  CHECK(read_preload(path, PreferenceRouter::kBaseline, kModelLayers, kExperts, "the model") !=
        read_preload(path, PreferenceRouter::kTuned, kModelLayers, kExperts, "the model"));
  const auto read = [&](const std::vector<std::int64_t>& layers, std::int64_t num_experts) {
    return read_preload(path, PreferenceRouter::kTuned, layers, num_experts, "the model");
  };
  CHECK_THROWS_AS(read({1, 2}, kExperts), UsageError);
  CHECK_THROWS_WITH(read({1, 2}, kExperts), Catch::Contains("2 MoE layers of the model (1 2), got 3 (1 2 5)"));
  CHECK_THROWS_WITH(read({1, 2, 4}, kExperts), Catch::Contains("(1 2 4), got 3 (1 2 5)"));
  CHECK_THROWS_WITH(read(kModelLayers, 12), Catch::Contains("12 experts of the model, got 11"));
}

TEST_CASE("preferences without completion tokens are no preload") {
  SplitMix64 random(402);
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "preferences.h5";
  PreferenceWriter writer(path, kLayers, kExperts, kModelLayers);
  writer.add(random_sequence(random, 9, 9), random_sequence(random, 9, 9));
  writer.close();
  CHECK_THROWS_AS(read_preload(path, PreferenceRouter::kTuned, kModelLayers, kExperts, "the model"), InputError);
  CHECK_THROWS_WITH(read_preload(path, PreferenceRouter::kBaseline, kModelLayers, kExperts, "the model"),
                    Catch::Contains("the baseline router has no completion token"));
  CHECK_THROWS_AS(
      read_preload(folder.path() / "none.h5", PreferenceRouter::kTuned, kModelLayers, kExperts, "the model"),
      InputError);
}

TEST_CASE("scores of a predictor are ranked layer by layer") {
  const std::vector<float> scores = {0.1F, 0.7F, 0.2F, 0.4F, 0.2F, 0.4F};
  CHECK(preload_order(scores, 2, 3) == std::vector<std::vector<std::uint16_t>>{{1, 2, 0}, {0, 2, 1}});
  CHECK_THROWS_AS(preload_order(scores, 2, 4), std::invalid_argument);
}

// Counts of tokens [begin, end) of a sequence, [L, E].
std::vector<std::int64_t> counts_of(const SequenceRouting& sequence, std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> counts(kLayers * kExperts, 0);
  for (std::int64_t layer = 0; layer < kLayers; ++layer) {
    for (std::int64_t i = begin * 2; i < end * 2; ++i) {
      ++counts[layer * kExperts + sequence.selected[layer * sequence.num_tokens * 2 + i]];
    }
  }
  return counts;
}

TEST_CASE("the nearest prompt is the stored one that routed most alike, and its answer ranks the experts") {
  SplitMix64 random(403);
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "preferences.h5";
  std::vector<SequenceRouting> stored;
  PreferenceWriter writer(path, kLayers, kExperts, kModelLayers);
  for (std::int64_t i = 0; i < 300; ++i) {  // more than are read at once
    // Some without a prompt, some without an answer.
    const std::int64_t prompt = i % 7 == 0 ? 0 : i % 11 == 0 ? 30 : 9;
    stored.push_back(random_sequence(random, 30, prompt));
    stored.back().id = 1000 + i;
    SequenceRouting tuned = random_sequence(random, 30, prompt);
    tuned.id = 1000 + i;
    writer.add(stored.back(), tuned);
  }
  writer.close();
  const NearestPrompt nearest(path, PreferenceRouter::kBaseline, kModelLayers, kExperts, "the model");
  const PreferenceAggregate aggregate = PreferenceReader(path).aggregate(PreferenceRouter::kBaseline);
  for (const std::int64_t wanted : {1, 298}) {
    const SequenceRouting& sequence = stored[static_cast<std::size_t>(wanted)];
    std::vector<std::int64_t> prompt = counts_of(sequence, 0, 9);
    for (std::int64_t& count : prompt) {
      count *= 3;  // the length says nothing
    }
    const NearestPreload found = nearest.find(prompt);
    CHECK(found.id == sequence.id);
    CHECK(found.similarity == Approx(1.0));
    const std::vector<std::int64_t> answer = counts_of(sequence, 9, 30);
    REQUIRE(found.order.size() == kLayers);
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
      REQUIRE(found.order[layer].size() == kExperts);
      for (std::size_t i = 1; i < kExperts; ++i) {
        const std::size_t a = layer * kExperts + found.order[layer][i - 1];
        const std::size_t b = layer * kExperts + found.order[layer][i];
        CHECK((answer[a] > answer[b] || (answer[a] == answer[b] && aggregate.count[a] >= aggregate.count[b])));
      }
    }
  }
  // What has no answer is as near as can be, and not taken.
  const NearestPreload other = nearest.find(counts_of(stored[11], 0, 30));
  CHECK(other.id != 1011);
  CHECK(other.similarity < 1.0);
  CHECK_THROWS_AS(nearest.find(std::vector<std::int64_t>(5, 1)), std::invalid_argument);
}

TEST_CASE("a file without prompts or without a fitting predictor says what it lacks") {
  SplitMix64 random(404);
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "preferences.h5";
  const auto write = [&](const PreferencePredictor* predictor) {
    PreferenceWriter writer(path, kLayers, kExperts, kModelLayers);
    writer.add(random_sequence(random, 9, 0), random_sequence(random, 9, 0));
    writer.close(predictor);
  };
  const auto predictor_for = [&](std::int64_t inputs) {
    return read_preload_predictor(path, kModelLayers, kExperts, inputs, "the model");
  };
  write(nullptr);
  CHECK_THROWS_WITH(NearestPrompt(path, PreferenceRouter::kTuned, kModelLayers, kExperts, "the model"),
                    Catch::Contains("no sequence with a prompt and an answer, got 1 sequences") &&
                        Catch::Contains("preload by aggregate"));
  CHECK_THROWS_WITH(NearestPrompt(path, PreferenceRouter::kTuned, kModelLayers, 12, "the model"),
                    Catch::Contains("12 experts of the model"));
  CHECK_THROWS_WITH(predictor_for(5),
                    Catch::Contains("has no predictor") && Catch::Contains("export.predictor.enabled=true"));
  PreferencePredictor predictor;
  predictor.num_layers = kLayers;
  predictor.num_experts = kExperts;
  predictor.embedding_size = 5;
  predictor.hidden_size = 2;
  predictor.hidden_weight.assign(10, 0.5F);
  predictor.hidden_bias.assign(2, 0.1F);
  predictor.output_weight.assign(kLayers * kExperts * 2, 0.2F);
  predictor.output_bias.assign(kLayers * kExperts, 0.0F);
  predictor.embedding = kMeanTokenEmbedding;
  predictor.report.slots = {1};
  predictor.report.best_by_requests = predictor.report.best_by_kl = "predictor";
  write(&predictor);
  CHECK(predictor_for(5).hidden_weight == predictor.hidden_weight);
  CHECK_THROWS_WITH(predictor_for(6), Catch::Contains("must take the 6 mean token embedding of the model, got 5"));
  predictor.embedding = "by sequence id from other.safetensors";
  write(&predictor);
  CHECK_THROWS_WITH(predictor_for(5),
                    Catch::Contains("other.safetensors") && Catch::Contains("export.predictor.embeddings left empty"));
}

TEST_CASE("names of choices go both ways") {
  for (const std::string& name : preload_choice_names()) {
    CHECK(preload_choice_names().at(static_cast<std::size_t>(preload_choice_from_name(name, "--preload-by"))) == name);
  }
  CHECK_THROWS_WITH(preload_choice_from_name("nearst", "--preload-by"),
                    Catch::Contains("--preload-by") && Catch::Contains("did you mean \"nearest\"?"));
}

TEST_CASE("router names go both ways") {
  for (const PreferenceRouter router : {PreferenceRouter::kBaseline, PreferenceRouter::kTuned}) {
    CHECK(router_from_name(router_name(router), "--preload-router") == router);
  }
  CHECK_THROWS_WITH(router_from_name("basline", "--preload-router"),
                    Catch::Contains("--preload-router: unknown router, got \"basline\"; did you mean \"baseline\"?"));
}

}  // namespace
}  // namespace hestia
