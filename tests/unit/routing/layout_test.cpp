#include "hestia/routing/layout.hpp"

#include <catch2/catch.hpp>

#include "hestia/core/random.hpp"

namespace hestia {
namespace {

SequenceLayout layout_of(std::vector<std::int64_t> ids) {
  SequenceLayout layout;
  layout.counted.assign(ids.size(), 1);
  layout.sequence_ids = std::move(ids);
  return layout;
}

TEST_CASE("sequence runs leave padding out") {
  const std::vector<SequenceRun> runs = sequence_runs(layout_of({-1, 4, 4, 7, -1, -2, 0, 0, 0, -1}));
  REQUIRE(runs.size() == 3);
  CHECK(runs[0].id == 4);
  CHECK(runs[0].begin == 1);
  CHECK(runs[0].end == 3);
  CHECK(runs[1].id == 7);
  CHECK(runs[1].length() == 1);
  CHECK(runs[2].id == 0);
  CHECK(runs[2].begin == 6);
  CHECK(runs[2].end == 9);
  CHECK(sequence_runs(layout_of({})).empty());
  CHECK(sequence_runs(layout_of({-1, -1})).empty());
}

TEST_CASE("a sequence that comes back is refused") {
  CHECK_THROWS_WITH(sequence_runs(layout_of({1, 1, 2, 1})), Catch::Contains("sequence 1 comes back at token 3"));
  // Padding inside a sequence splits it, which contiguity forbids.
  CHECK_THROWS_AS(sequence_runs(layout_of({5, -1, 5})), std::invalid_argument);
}

TEST_CASE("flags and ids must be of one length") {
  SequenceLayout layout = layout_of({1, 1, 2});
  layout.counted.pop_back();
  CHECK_THROWS_WITH(sequence_runs(layout), Catch::Contains("3 sequence ids but 2 counted flags"));
}

TEST_CASE("runs of random layouts rebuild the layout") {
  SplitMix64 random(11);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::int64_t> ids;
    std::int64_t next_id = 0;
    for (std::uint64_t part = random.below(12); part > 0; --part) {
      const std::int64_t id = random.uniform() < 0.3 ? -1 : next_id++;
      ids.insert(ids.end(), 1 + random.below(9), id);
    }
    std::vector<std::int64_t> rebuilt(ids.size(), -1);
    std::int64_t last_end = 0;
    for (const SequenceRun& run : sequence_runs(layout_of(ids))) {
      REQUIRE(run.begin >= last_end);
      REQUIRE(run.length() >= 1);
      last_end = run.end;
      std::fill(rebuilt.begin() + run.begin, rebuilt.begin() + run.end, run.id);
    }
    CHECK(rebuilt == ids);
  }
}

}  // namespace
}  // namespace hestia
