#include "hestia/kernels/residency_scan.hpp"

#include <cmath>

#include <catch2/catch.hpp>

#include "residency_cases.hpp"

using namespace hestia;
using hestia::testing::random_residency_case;
using hestia::testing::ResidencyCase;

namespace {

using Choices = std::vector<std::int64_t>;

// -1 where nothing was written.
Choices scanned(const ResidencyCase& c, const float* strength) {
  Choices selected(static_cast<std::size_t>(c.shape.num_tokens * c.shape.top_k), -1);
  residency_scan_cpu(c.shape, c.logits.data(), strength, c.run_begin.data(), c.run_end.data(), c.num_runs(),
                     selected.data());
  return selected;
}

Choices by_reference(const ResidencyCase& c, const float* strength) {
  Choices selected(static_cast<std::size_t>(c.shape.num_tokens * c.shape.top_k), -1);
  route_with_residency(c.shape, c.logits.data(), strength, c.run_begin.data(), c.run_end.data(), c.num_runs(),
                       selected.data());
  return selected;
}

}  // namespace

TEST_CASE("the residency scan chooses what the reference chooses, token by token") {
  SplitMix64 random(2026);
  int moved_by_prior[3] = {0, 0, 0};  // by score
  for (int i = 0; i < 600; ++i) {
    ResidencyCase c = random_residency_case(random, i % 3 == 0 ? 300 : 70, 60);
    INFO("case " << i << ": " << c.text());
    const bool all_count = i % 4 == 0;
    const Choices selected = scanned(c, all_count ? nullptr : c.strength.data());
    REQUIRE(selected == by_reference(c, all_count ? nullptr : c.strength.data()));
    c.shape.bonus = 0.0F;
    moved_by_prior[static_cast<int>(c.shape.score)] += selected != scanned(c, nullptr) ? 1 : 0;
  }
  CHECK(moved_by_prior[0] > 100);
  CHECK(moved_by_prior[1] > 50);  // a quarter of the cases each
  CHECK(moved_by_prior[2] > 50);
}

TEST_CASE("the residency scan leaves tokens outside the runs alone") {
  SplitMix64 random(7);
  ResidencyCase c = random_residency_case(random, 20, 40);
  c.run_begin = {2, 6};
  c.run_end = {4, 7};
  c.shape.num_tokens = 9;
  c.logits.resize(static_cast<std::size_t>(9 * c.shape.num_experts), 0.25F);
  const Choices selected = scanned(c, nullptr);
  for (std::int64_t token = 0; token < 9; ++token) {
    const bool inside = token == 2 || token == 3 || token == 6;
    for (std::int64_t k = 0; k < c.shape.top_k; ++k) {
      CHECK((selected[static_cast<std::size_t>(token * c.shape.top_k + k)] >= 0) == inside);
    }
  }
}

TEST_CASE("the residency scan gives distinct experts whatever the logits hold") {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  ResidencyCase c;
  c.shape = {.num_tokens = 3, .num_experts = 5, .top_k = 3, .always_keep = 1, .slots = 2, .bonus = 0.5F};
  c.logits = {nan, nan, nan, nan, nan, inf, nan, -inf, 1, inf, -inf, -inf, -inf, nan, -inf};
  c.run_begin = {0};
  c.run_end = {3};
  const Choices selected = scanned(c, nullptr);
  CHECK(selected == by_reference(c, nullptr));
  CHECK(selected == Choices{0, 1, 2, 0, 4, 3, 0, 1, 2});
  for (const ResidencyScore score : {ResidencyScore::kWeight, ResidencyScore::kRoot}) {
    c.shape.score = score;
    CHECK(by_reference(c, nullptr) == Choices{0, 1, 2, 0, 4, 3, 0, 1, 2});
    CHECK(scanned(c, nullptr) == by_reference(c, nullptr));
  }
}

TEST_CASE("by weight the residency scan never chooses an expert that is left out before one that is not") {
  const float out = -std::numeric_limits<float>::infinity();
  ResidencyCase c;
  c.shape = {.num_tokens = 2, .num_experts = 4, .top_k = 2, .always_keep = 0, .slots = 2, .bonus = 5.0F};
  c.shape.score = GENERATE(ResidencyScore::kWeight, ResidencyScore::kRoot);
  c.logits = {3, 2, out, out, out, out, 1, -300};
  c.run_begin = {0};
  c.run_end = {2};
  CHECK(by_reference(c, nullptr) == Choices{0, 1, 2, 3});
  CHECK(scanned(c, nullptr) == Choices{0, 1, 2, 3});
}

TEST_CASE("by weight a prior that changes nothing is plain routing by the logits, as prompt tokens are") {
  // The weights of experts 0 and 1 are both 0, and those of 2 and 3 the same float.
  ResidencyCase c;
  c.shape = {.num_tokens = 2, .num_experts = 5, .top_k = 4, .always_keep = 1, .slots = 2, .bonus = 0.5F};
  c.shape.score = ResidencyScore::kWeight;
  c.logits = {-300, -200, 0.0F, 1e-9F, 50, -300, -200, 0.0F, 1e-9F, 50};
  c.strength = {0.0F, 0.0F};
  c.run_begin = {0, 1};
  c.run_end = {1, 2};
  const Choices plain = {4, 3, 2, 1, 4, 3, 2, 1};
  CHECK(scanned(c, nullptr) == Choices{4, 2, 3, 0, 4, 2, 3, 0});
  CHECK(scanned(c, c.strength.data()) == plain);
  CHECK(by_reference(c, c.strength.data()) == plain);
  for (const auto& [bonus, always_keep] : {std::pair(0.0F, 1), std::pair(0.5F, 4), std::pair(0.5F, 9)}) {
    c.shape.bonus = bonus;
    c.shape.always_keep = always_keep;
    CHECK(scanned(c, nullptr) == plain);
    CHECK(by_reference(c, nullptr) == plain);
  }
}

TEST_CASE("the residency scan gives the worked example of docs slash routing") {
  ResidencyCase c;
  c.shape = {.num_tokens = 4, .num_experts = 5, .top_k = 2, .always_keep = 1, .slots = 2, .bonus = 1.0F};
  c.logits = {3, 1, 0, 2, 0, 0, 2.5F, 2, 1.5F, 0, 2, 1.5F, 3, 0, 2, 0, 1, 0, 3, 2};
  c.run_begin = {0};
  c.run_end = {4};
  const auto loads = [&] {
    Choices selected(8);
    return route_with_residency(c.shape, c.logits.data(), nullptr, c.run_begin.data(), c.run_end.data(), 1,
                                selected.data())
        .loads;
  };
  CHECK(scanned(c, nullptr) == Choices{0, 3, 1, 3, 2, 1, 3, 4});
  CHECK(loads() == 6);
  c.shape.bonus = 0.0F;
  CHECK(scanned(c, nullptr) == Choices{0, 3, 1, 2, 2, 0, 3, 4});
  CHECK(loads() == 7);
}

TEST_CASE("by the root a bonus keeps a resident that it does not keep by weight") {
  ResidencyCase c;
  c.shape = {.num_tokens = 2, .num_experts = 4, .top_k = 2, .always_keep = 0, .slots = 2, .bonus = 0.35F};
  // Experts 0 and 1 are resident when the second token comes: u is .25, .01, 1 and .64, sqrt(u) is .5, .1, 1 and .8.
  for (const double u : {1.0, 0.5, 0.01, 0.02, 0.25, 0.01, 1.0, 0.64}) {
    c.logits.push_back(static_cast<float>(std::log(u) + 2.0));
  }
  c.run_begin = {0};
  c.run_end = {2};
  c.shape.score = ResidencyScore::kWeight;
  CHECK(by_reference(c, nullptr) == Choices{0, 1, 2, 3});  // .25 + .35 is below .64
  CHECK(scanned(c, nullptr) == Choices{0, 1, 2, 3});
  c.shape.score = ResidencyScore::kRoot;
  CHECK(by_reference(c, nullptr) == Choices{0, 1, 2, 0});  // .5 + .35 is above .8
  CHECK(scanned(c, nullptr) == Choices{0, 1, 2, 0});
}

TEST_CASE("the residency scan gives the worked example by weight of docs slash routing") {
  ResidencyCase c;
  c.shape = {.num_tokens = 4, .num_experts = 5, .top_k = 2, .always_keep = 1, .slots = 2, .bonus = 0.3F};
  c.shape.score = ResidencyScore::kWeight;
  const std::vector<double> weights = {1,   0.25, 0.0625, 0.5,   0.0625, 0.125,  1,     0.5,  0.25, 0.125,
                                       0.5, 0.25, 1,      0.125, 0.5,    0.0625, 0.125, 0.25, 1,    0.75};
  for (std::size_t i = 0; i < weights.size(); ++i) {
    // Whatever is added to all logits of a token is nothing to the rule.
    const std::size_t token = i / 5;
    c.logits.push_back(static_cast<float>(std::log(weights[i]) + 3.0 * static_cast<double>(token)));
  }
  c.run_begin = {0};
  c.run_end = {4};
  const auto loads = [&] {
    Choices selected(8);
    return route_with_residency(c.shape, c.logits.data(), nullptr, c.run_begin.data(), c.run_end.data(), 1,
                                selected.data())
        .loads;
  };
  CHECK(scanned(c, nullptr) == Choices{0, 3, 1, 3, 2, 1, 3, 4});
  CHECK(loads() == 6);
  c.shape.bonus = 0.0F;
  CHECK(scanned(c, nullptr) == Choices{0, 3, 1, 2, 2, 0, 3, 4});
  CHECK(loads() == 7);
}

TEST_CASE("a token's strength scales the bonus there, and the cache goes on") {
  // Expert 0 is resident after the first token and .6 behind expert 1 from then on.
  ResidencyCase c;
  c.shape = {.num_tokens = 4, .num_experts = 3, .top_k = 1, .always_keep = 0, .slots = 1, .bonus = 1.0F};
  c.logits = {2, 1, 0, 0, 0.6F, -1, 0, 0.6F, -1, 0, 0.6F, -1};
  c.run_begin = {0};
  c.run_end = {4};
  c.strength = {1.0F, 0.7F, 0.5F, 1.0F};
  CHECK(scanned(c, c.strength.data()) == Choices{0, 0, 1, 1});
  CHECK(by_reference(c, c.strength.data()) == Choices{0, 0, 1, 1});
  CHECK(scanned(c, nullptr) == Choices{0, 0, 0, 0});
  CHECK(by_reference(c, nullptr) == Choices{0, 0, 0, 0});
}
