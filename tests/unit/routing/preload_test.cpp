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

TEST_CASE("router names go both ways") {
  for (const PreferenceRouter router : {PreferenceRouter::kBaseline, PreferenceRouter::kTuned}) {
    CHECK(router_from_name(router_name(router), "--preload-router") == router);
  }
  CHECK_THROWS_WITH(router_from_name("basline", "--preload-router"),
                    Catch::Contains("--preload-router: unknown router, got \"basline\"; did you mean \"baseline\"?"));
}

}  // namespace
}  // namespace hestia
