#include "hestia/routing/agreement.hpp"

#include <cmath>

#include <catch2/catch.hpp>

#include "routing_fixtures.hpp"

namespace hestia {
namespace {

// Pair by pair.
double tau_by_pairs(const std::vector<float>& x, const std::vector<float>& y) {
  double score = 0.0;
  double untied_x = 0.0;
  double untied_y = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const int by_x = (x[i] > x[j] ? 1 : 0) - (x[i] < x[j] ? 1 : 0);
      const int by_y = (y[i] > y[j] ? 1 : 0) - (y[i] < y[j] ? 1 : 0);
      score += by_x * by_y;
      untied_x += by_x * by_x;
      untied_y += by_y * by_y;
    }
  }
  return score / std::sqrt(untied_x * untied_y);
}

TEST_CASE("Kendall's tau of small lists, by hand") {
  const std::vector<float> up = {1, 2, 3, 4};
  CHECK(kendall_tau(up, up) == 1.0);
  CHECK(kendall_tau(up, std::vector<float>{40, 30, 20, 10}) == -1.0);
  // One of six pairs the other way round.
  CHECK(kendall_tau(up, std::vector<float>{1, 3, 2, 4}) == Approx(4.0 / 6.0).epsilon(1e-15));
  // The pair (2, 3) tied in one list: 5 concordant, sqrt(6 * 5).
  CHECK(kendall_tau(up, std::vector<float>{1, 2, 2, 3}) == Approx(5.0 / std::sqrt(30.0)).epsilon(1e-15));
  // Tied in both: no pair that could be ordered is not.
  CHECK(kendall_tau(std::vector<float>{1, 1, 2}, std::vector<float>{1, 1, 2}) == 1.0);
  // Two pairs tied in x, two in y; of the others one is concordant, one not.
  CHECK(kendall_tau(std::vector<float>{1, 1, 2, 2}, std::vector<float>{1, 2, 1, 2}) == 0.0);
  CHECK(std::isnan(kendall_tau(up, std::vector<float>{5, 5, 5, 5})));
  CHECK(std::isnan(kendall_tau(std::vector<float>{1}, std::vector<float>{2})));
  CHECK(std::isnan(kendall_tau({}, {})));
  CHECK_THROWS_WITH(kendall_tau(up, std::vector<float>{1}), Catch::Contains("4 and 1 scores"));
}

TEST_CASE("Kendall's tau agrees with a count over all pairs, ties included") {
  SplitMix64 random(81);
  for (int round = 0; round < 500; ++round) {
    const std::size_t size = 2 + random.below(40);
    // From nearly all tied to nearly none.
    const std::uint64_t values = 1 + random.below(60);
    std::vector<float> x;
    std::vector<float> y;
    for (std::size_t i = 0; i < size; ++i) {
      x.push_back(static_cast<float>(random.below(values)));
      y.push_back(random.below(2) == 0 ? x.back() : static_cast<float>(random.below(values)));
    }
    const double expected = tau_by_pairs(x, y);
    const double got = kendall_tau(x, y);
    CAPTURE(round, size, values);
    if (std::isnan(expected)) {
      CHECK(std::isnan(got));
    } else {
      CHECK(got == Approx(expected).margin(1e-12));
    }
  }
}

SequenceRouting random_routing(SplitMix64& random, std::int64_t id, std::int64_t num_prompt, std::int64_t num_tokens) {
  SequenceRouting routing;
  routing.id = id;
  routing.num_prompt_tokens = num_prompt;
  routing.num_tokens = num_tokens;
  routing.num_layers = 2;
  routing.num_experts = 6;
  routing.top_k = 3;
  for (std::int64_t row = 0; row < 2 * num_tokens; ++row) {
    const auto chosen = testing::random_experts(random, 6, 3);
    routing.selected.insert(routing.selected.end(), chosen.begin(), chosen.end());
    for (int expert = 0; expert < 6; ++expert) {
      routing.probabilities.push_back(static_cast<float>(random.below(8)) / 8.0F);
    }
  }
  return routing;
}

TEST_CASE("agreement is the mean over counted tokens and layers, of any number of sequences") {
  SplitMix64 random(82);
  RouterAgreement agreement;
  CHECK(std::isnan(agreement.kendall_tau()));
  CHECK(std::isnan(agreement.top_k_agreement()));
  double tau = 0.0;
  double tau_rows = 0.0;
  double common = 0.0;
  std::int64_t counted = 0;
  for (std::int64_t id = 0; id < 8; ++id) {
    const std::int64_t num_tokens = 3 + static_cast<std::int64_t>(random.below(10));
    const SequenceRouting reference = random_routing(random, id, id % 4, num_tokens);
    SequenceRouting tuned = random_routing(random, id, id % 4, num_tokens);
    // A row whose order is undefined: it has no tau, but a choice.
    std::fill(tuned.probabilities.end() - 6, tuned.probabilities.end(), 0.5F);
    agreement.add(reference, tuned);
    for (std::int64_t row = 0; row < 2 * num_tokens; ++row) {
      if (row % num_tokens < id % 4) {
        continue;
      }
      const auto scores = [&](const SequenceRouting& routing) {
        return std::vector<float>(routing.probabilities.begin() + row * 6, routing.probabilities.begin() + row * 6 + 6);
      };
      const double of_row = tau_by_pairs(scores(reference), scores(tuned));
      if (!std::isnan(of_row)) {
        tau += of_row;
        tau_rows += 1.0;
      }
      for (std::int64_t i = row * 3; i < row * 3 + 3; ++i) {
        for (std::int64_t j = row * 3; j < row * 3 + 3; ++j) {
          common += reference.selected[static_cast<std::size_t>(i)] == tuned.selected[static_cast<std::size_t>(j)]
                        ? 1.0 / 3.0
                        : 0.0;
        }
      }
    }
    counted += num_tokens - id % 4;
  }
  CHECK(agreement.num_counted() == counted);
  CHECK(tau_rows < static_cast<double>(2 * counted));
  CHECK(agreement.kendall_tau() == Approx(tau / tau_rows).epsilon(1e-12));
  CHECK(agreement.top_k_agreement() == Approx(common / static_cast<double>(2 * counted)).epsilon(1e-12));
}

TEST_CASE("routing of other tokens or without probabilities is refused, and nothing of it stays") {
  SplitMix64 random(83);
  const SequenceRouting reference = random_routing(random, 4, 1, 5);
  RouterAgreement agreement;
  const auto refused = [&](const auto& change, const char* message) {
    SequenceRouting tuned = reference;
    change(tuned);
    CHECK_THROWS_WITH(agreement.add(reference, tuned), Catch::Contains(message));
    CHECK_THROWS_AS(agreement.add(tuned, reference), std::invalid_argument);
  };
  refused([](SequenceRouting& routing) { routing.id = 5; }, "id differs in sequence 4: 4 and 5");
  refused([](SequenceRouting& routing) { routing.num_tokens = 4; }, "number of tokens differs in sequence 4: 5 and 4");
  refused([](SequenceRouting& routing) { routing.num_prompt_tokens = 0; }, "number of prompt tokens");
  refused([](SequenceRouting& routing) { routing.num_layers = 1; }, "number of layers");
  refused([](SequenceRouting& routing) { routing.num_experts = 7; }, "number of experts");
  refused([](SequenceRouting& routing) { routing.top_k = 2; }, "top_k");
  refused([](SequenceRouting& routing) { routing.probabilities.clear(); }, "0 probabilities, expected 30 and 60");
  refused([](SequenceRouting& routing) { routing.selected.pop_back(); }, "29 selections");
  CHECK(agreement.num_counted() == 0);
  CHECK(std::isnan(agreement.top_k_agreement()));
}

}  // namespace
}  // namespace hestia
