#include "hestia/routing/cache_policy.hpp"

#include <algorithm>
#include <numeric>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/random.hpp"

namespace hestia {
namespace {

TEST_CASE("policy names go both ways") {
  const std::vector<std::string> names = policy_names();
  CHECK(names == std::vector<std::string>{"lru", "lfu", "gamma", "lifo", "fifo", "random", "static", "belady"});
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto kind = static_cast<CachePolicyKind>(i);
    CHECK(policy_name(kind) == names[i]);
    CHECK(policy_from_name(names[i]) == kind);
  }
  CHECK_THROWS_AS(policy_name(static_cast<CachePolicyKind>(names.size())), std::out_of_range);
}

TEST_CASE("an unknown policy names the nearest") {
  CHECK_THROWS_AS(policy_from_name("beladi"), UsageError);
  CHECK_THROWS_WITH(policy_from_name("beladi"), Catch::Contains("got \"beladi\"; did you mean \"belady\"?") &&
                                                    Catch::Contains("lru, lfu, gamma, lifo, fifo, random, static"));
  CHECK_THROWS_WITH(policy_from_name("something else"), Catch::Contains("; choose one of") && !Catch::Contains("mean"));
  CHECK_THROWS_AS(policy_from_name("LRU"), UsageError);
  CHECK_THROWS_AS(policy_from_name(""), UsageError);
}

TEST_CASE("each rule orders by its own field first") {
  const ExpertState plain{2.0, 10, 5, 20};
  const auto with = [&](auto change) {
    ExpertState state = plain;
    change(state);
    return state;
  };
  const ExpertState older = with([](ExpertState& s) { s.last_touch = 9; });
  const ExpertState rarer = with([](ExpertState& s) { s.use_count = 1.5; });
  const ExpertState loaded_later = with([](ExpertState& s) { s.loaded_at = 6; });
  const ExpertState needed_later = with([](ExpertState& s) { s.next_use = 21; });
  // Index 0 loses every tie, so the other stands at index 1 and must win by its field alone.
  CHECK(evicts_before(CachePolicyKind::kLru, older, 1, plain, 0));
  CHECK(evicts_before(CachePolicyKind::kLfu, rarer, 1, plain, 0));
  CHECK(evicts_before(CachePolicyKind::kLfu, older, 1, plain, 0));
  CHECK(evicts_before(CachePolicyKind::kGamma, rarer, 1, plain, 0));
  CHECK(evicts_before(CachePolicyKind::kGamma, older, 1, plain, 0));
  CHECK(evicts_before(CachePolicyKind::kLifo, loaded_later, 1, plain, 0));
  CHECK(evicts_before(CachePolicyKind::kFifo, plain, 1, loaded_later, 0));
  CHECK(evicts_before(CachePolicyKind::kBelady, needed_later, 1, plain, 0));
  // LFU looks at recency only between equal counts.
  const ExpertState rarer_but_recent{1.0, 99, 5, 20};
  CHECK(evicts_before(CachePolicyKind::kLfu, rarer_but_recent, 1, older, 0));
}

TEST_CASE("every rule is a strict total order, ties to the lower index") {
  SplitMix64 random(5);
  // Few values per field, so that ties are common.
  std::vector<ExpertState> states(24);
  for (ExpertState& state : states) {
    state = {static_cast<double>(random.below(3)) / 2.0, static_cast<std::int64_t>(random.below(3)),
             static_cast<std::int64_t>(random.below(3)), static_cast<std::int64_t>(random.below(3))};
  }
  for (std::size_t kind = 0; kind < policy_names().size(); ++kind) {
    const auto before = [&](int a, int b) {
      return evicts_before(static_cast<CachePolicyKind>(kind), states[static_cast<std::size_t>(a)], a,
                           states[static_cast<std::size_t>(b)], b);
    };
    std::vector<int> order(states.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), before);
    for (std::size_t i = 0; i < order.size(); ++i) {
      for (std::size_t j = 0; j < order.size(); ++j) {
        // Agreement with a position makes it transitive, and exactly one direction holds for different experts.
        REQUIRE(before(order[i], order[j]) == (i < j));
      }
    }
  }
  for (std::size_t kind = 0; kind < policy_names().size(); ++kind) {
    CHECK(evicts_before(static_cast<CachePolicyKind>(kind), states[0], 3, states[0], 4));
    CHECK_FALSE(evicts_before(static_cast<CachePolicyKind>(kind), states[0], 4, states[0], 3));
  }
}

TEST_CASE("discounting keeps the ends of gamma exact") {
  SplitMix64 random(6);
  for (int i = 0; i < 20; ++i) {
    const double count = 1.0 + 100.0 * random.uniform();
    CHECK(discounted_use(count, 1.0) == count);
    CHECK(discounted_use(count, 0.0) == 0.0);
    CHECK(discounted_use(count, 0.5) == count / 2.0);
  }
}

}  // namespace
}  // namespace hestia
