#include "hestia/routing/residency.hpp"

#include <cmath>
#include <limits>

#include <catch2/catch.hpp>

using namespace hestia;

TEST_CASE("a relative weight is the exponential within a millionth, and 0 far below") {
  SplitMix64 random(41);
  double worst = 0.0;
  for (int i = 0; i < 200000; ++i) {
    const auto largest = static_cast<float>(40.0 * (random.uniform() - 0.5));
    const auto z = static_cast<float>(static_cast<double>(largest) - (i % 2 == 0 ? 5.0 : 86.6) * random.uniform());
    const auto difference = static_cast<double>(z - largest);
    const auto weight = static_cast<double>(relative_weight(z, largest));
    worst = std::max(worst, std::abs(weight / std::exp(difference) - 1.0));
    CHECK((weight > 0.0 && weight <= 1.0));
  }
  CHECK(worst < 1e-6);
  CHECK(worst > 1e-9);
  CHECK(relative_weight(1.0F, 88.0F) == 0.0F);
  CHECK(relative_weight(-std::numeric_limits<float>::max(), std::numeric_limits<float>::max()) == 0.0F);
}

TEST_CASE("a relative weight is 1 for the largest, and what is no logit stays what it is") {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float z : {0.0F, -0.0F, 1e-40F, -7.25F, 3e38F, infinity}) {
    CHECK(relative_weight(z, z) == 1.0F);
  }
  CHECK(relative_weight(0.0F, 1e-40F) == 1.0F);
  CHECK(relative_weight(3.0F, infinity) == 0.0F);
  CHECK(relative_weight(-infinity, 2.0F) == -infinity);
  CHECK(relative_weight(-infinity, -infinity) == -infinity);
  CHECK(std::isnan(relative_weight(nan, 2.0F)));
  const float logits[] = {nan, 1.0F, -infinity, 2.0F};
  float weights[4] = {};
  weight_scores(ResidencyScore::kWeight, logits, 4, weights);
  CHECK(std::isnan(weights[0]));
  CHECK(static_cast<double>(weights[1]) == Approx(std::exp(-1.0)));
  CHECK(weights[2] == -infinity);
  CHECK(weights[3] == 1.0F);
  weight_scores(ResidencyScore::kRoot, logits, 4, weights);
  CHECK(std::isnan(weights[0]));
  CHECK(static_cast<double>(weights[1]) == Approx(std::exp(-0.5)));
  CHECK(weights[2] == -infinity);
  CHECK(weights[3] == 1.0F);
}

TEST_CASE("the root of a relative weight is the weight of half the distance") {
  SplitMix64 random(43);
  double worst = 0.0;
  for (int i = 0; i < 100000; ++i) {
    const auto largest = static_cast<float>(40.0 * (random.uniform() - 0.5));
    const auto z = static_cast<float>(static_cast<double>(largest) - (i % 2 == 0 ? 5.0 : 170.0) * random.uniform());
    const double exact = std::sqrt(std::exp(static_cast<double>(z - largest)));
    const auto root = static_cast<double>(weight_score(ResidencyScore::kRoot, z, largest));
    worst = std::max(worst, std::abs(root / exact - 1.0));
    CHECK(weight_score(ResidencyScore::kWeight, z, largest) == relative_weight(z, largest));
  }
  CHECK(worst < 1e-6);
  CHECK(worst > 1e-9);
}

TEST_CASE("the bonus is lambda by weight, and in logit ranges by logit") {
  ResidencyRule rule;
  rule.lambda = 0.1;
  rule.logit_range = {3.0F};
  CHECK(rule.bonus(0) == static_cast<float>(0.1 * 3.0));
  CHECK_THROWS_AS(rule.bonus(1), std::out_of_range);
  rule.score = GENERATE(ResidencyScore::kWeight, ResidencyScore::kRoot);
  CHECK(rule.bonus(0) == 0.1F);
  CHECK(rule.bonus(1) == 0.1F);
  // Factors of its layers scale it; 1 changes no bit.
  rule.logit_range = {3.0F, 0.7F};
  rule.layer_factors = {1.0, 1.0};
  CHECK(rule.bonus(1) == 0.1F);
  rule.layer_factors = {2.5, 0.0};
  CHECK(rule.bonus(0) == static_cast<float>(0.1 * 2.5));
  CHECK(rule.bonus(1) == 0.0F);
  CHECK_THROWS_AS(rule.bonus(2), std::out_of_range);
  rule.score = ResidencyScore::kLogit;
  CHECK(rule.bonus(0) == static_cast<float>(0.1 * 2.5 * 3.0));
  CHECK(rule.bonus(1) == 0.0F);
  rule.layer_factors = {1.0, 1.0};
  CHECK(rule.bonus(1) == static_cast<float>(0.1 * static_cast<double>(0.7F)));
  rule.layer_factors = {1.0};
  CHECK_THROWS_AS(rule.bonus(1), std::out_of_range);
  CHECK(residency_score_names() == std::vector<std::string>{"logit", "weight", "root"});
  for (const std::string& name : residency_score_names()) {
    CHECK(residency_score_name(*residency_score_from_name(name)) == name);
  }
  CHECK_FALSE(residency_score_from_name("weights"));
}

TEST_CASE("a scope counts the bonus whole where the last tokens speak for it, and elsewhere times elsewhere") {
  ResidencyScope scope;
  scope.domains = {"python"};
  scope.elsewhere = 0.25;
  scope.window = 2;
  scope.weights = {{9.0F, 9.0F}, {1.0F, -2.0F}};
  scope.offsets = {0.0F, 0.5F};
  // Evidence of the second layer, z . (1, -2) + .5: 1.5, -.5, -1.5, 1.5, no number, .5 | -.5, 0.
  const float none = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> logits = {1, 0, 1, 1, 0, 1, 1, 0, none, 0, 2, 1, 1, 1, 0, 0.25F};
  const std::int64_t begins[] = {0, 6};
  const std::int64_t ends[] = {6, 8};
  std::vector<float> strength(9, -1.0F);
  scope_strengths(scope, 1, logits.data(), begins, ends, 2, strength.data());
  // Sums over two tokens: 1.5, 1, -2, 0, 1.5, .5 | -.5, -.5; what lies behind the runs is left alone.
  CHECK(strength == std::vector<float>{1, 1, 0.25F, 1, 1, 1, 0.25F, 0.25F, -1});
  CHECK_THROWS_AS(scope_strengths(scope, 2, logits.data(), begins, ends, 2, strength.data()), std::out_of_range);
  CHECK_FALSE(scope.everywhere());
  CHECK(ResidencyScope().everywhere());
}
