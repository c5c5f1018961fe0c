#include <array>
#include <set>

#include <catch2/catch.hpp>

#include "hestia/core/median.hpp"
#include "hestia/core/random.hpp"

namespace hestia {
namespace {

TEST_CASE("SplitMix64 gives the published sequence") {
  // The first outputs for seed 1234567, as in the reference implementation's own check values.
  SplitMix64 random(1234567);
  CHECK(random.next() == 6457827717110365317ULL);
  CHECK(random.next() == 3203168211198807973ULL);
  CHECK(random.next() == 9817491932198370423ULL);
  CHECK(random.next() == 4593380528125082431ULL);
  CHECK(random.next() == 16408922859458223821ULL);
}

TEST_CASE("A generator made from another's state continues its sequence") {
  SplitMix64 first(99);
  for (int i = 0; i < 17; ++i) {
    (void)first.next();
  }
  SplitMix64 second(first.state());
  for (int i = 0; i < 100; ++i) {
    REQUIRE(first.next() == second.next());
  }
}

TEST_CASE("below stays under its bound and reaches every value evenly") {
  SplitMix64 random(7);
  std::array<int, 13> counts{};
  constexpr int kDraws = 130'000;
  for (int i = 0; i < kDraws; ++i) {
    ++counts.at(random.below(counts.size()));
  }
  for (const int count : counts) {
    CHECK(std::abs(count - 10'000) < 500);  // five standard deviations
  }
  CHECK(random.below(1) == 0);
  constexpr std::uint64_t kHuge = (std::uint64_t{1} << 63) + 1;
  for (int i = 0; i < 1000; ++i) {
    REQUIRE(random.below(kHuge) < kHuge);
  }
}

TEST_CASE("uniform is at least 0, below 1, with mean one half") {
  SplitMix64 random(11);
  double sum = 0.0;
  for (int i = 0; i < 100'000; ++i) {
    const double value = random.uniform();
    REQUIRE(value >= 0.0);
    REQUIRE(value < 1.0);
    sum += value;
  }
  CHECK(sum / 100'000 == Approx(0.5).margin(0.005));
}

TEST_CASE("Purposes and seeds get seeds of their own, the same on every machine") {
  std::set<std::uint64_t> seeds;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    for (const char* purpose : {"weights", "data order", "dropout", ""}) {
      seeds.insert(derive_seed(seed, purpose));
    }
  }
  CHECK(seeds.size() == 200);
  // A changed derivation would change every run: FNV-1a("") is the offset basis, then one splitmix64 step.
  CHECK(derive_seed(0, "") == SplitMix64(0xCBF29CE484222325ULL).next());
  CHECK(derive_seed(5, "a") == SplitMix64(5 ^ 0xAF63DC4C8601EC8CULL).next());
}

TEST_CASE("The median of an even number of values lies between the two in the middle") {
  CHECK(median({3.0, 1.0, 2.0}) == 2.0);
  CHECK(median({4.0, 1.0}) == 2.5);
  CHECK(median({7.0, 1.0, 100.0, 3.0}) == 5.0);
  CHECK(median({5.0}) == 5.0);
  CHECK_THROWS_AS(median({}), std::invalid_argument);
}

}  // namespace
}  // namespace hestia
