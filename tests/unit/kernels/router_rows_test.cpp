#include "hestia/kernels/router_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include <catch2/catch.hpp>

using namespace hestia;

namespace {

std::vector<double> random_probabilities(std::mt19937& random, std::size_t num_experts) {
  std::normal_distribution<double> normal(0.0, 1.2);
  std::vector<double> p(num_experts);
  double sum = 0.0;
  for (double& x : p) {
    x = std::exp(normal(random));
    sum += x;
  }
  for (double& x : p) {
    x /= sum;
  }
  return p;
}

struct Token {
  double value = 0.0;
  std::vector<double> gradient;
};

/// Straight from the formula: all pairs, then the Jacobian of softmax entry by entry.
Token by_definition(const std::vector<double>& p, const std::vector<double>& base, double margin, bool normalise) {
  const std::size_t num_experts = p.size();
  Token token;
  std::vector<double> slope(num_experts, 0.0);
  int pairs = 0;
  for (std::size_t i = 0; i < num_experts; ++i) {
    for (std::size_t j = 0; j < num_experts; ++j) {
      if (base[i] > base[j]) {
        ++pairs;
        const double hinge = margin - (p[i] - p[j]);
        if (hinge > 0.0) {
          token.value += hinge;
          slope[i] -= 1.0;
          slope[j] += 1.0;
        }
      }
    }
  }
  const double divisor = normalise && pairs > 0 ? pairs : 1.0;
  token.value /= divisor;
  for (std::size_t k = 0; k < num_experts; ++k) {
    double sum = 0.0;
    for (std::size_t i = 0; i < num_experts; ++i) {
      sum += slope[i] * p[i] * ((i == k ? 1.0 : 0.0) - p[k]);
    }
    token.gradient.push_back(sum / divisor);
  }
  return token;
}

/// Rows of given probabilities: one layer, all tokens counted, in one sequence.
template <class Real>
class Rows {
 public:
  Rows(const std::vector<Real>& probabilities, std::size_t num_experts)
      : num_experts_(num_experts), probabilities_(probabilities), logits_(probabilities) {
    const std::size_t num_tokens = probabilities.size() / num_experts;
    std::transform(logits_.begin(), logits_.end(), logits_.begin(), [](Real p) { return std::log(p); });
    zeros_.assign(num_tokens, Real(0));
    begin_.assign(num_tokens, 0);
    end_.assign(num_tokens, static_cast<std::int64_t>(num_tokens));
    counted_.assign(num_tokens, 1);
  }
  SoftmaxRows<Real> rows() const { return {logits_.data(), zeros_.data(), zeros_.data(), probabilities_.data()}; }
  RowLayout layout() const {
    return {1,
            static_cast<std::int64_t>(zeros_.size()),
            static_cast<std::int64_t>(num_experts_),
            begin_.data(),
            end_.data(),
            counted_.data()};
  }

 private:
  std::size_t num_experts_;
  std::vector<Real> probabilities_;
  std::vector<Real> logits_;
  std::vector<Real> zeros_;
  std::vector<std::int64_t> begin_;
  std::vector<std::int64_t> end_;
  std::vector<std::uint8_t> counted_;
};

}  // namespace

TEST_CASE("segment sums") {
  const std::vector<double> values = {1, 2, 3, 4, 10, 20, 30, 40};
  const std::vector<std::int64_t> begins = {0, 3};
  const std::vector<std::int64_t> ends = {2, 4};
  std::vector<double> sums(4, -1.0);
  segment_sums_cpu(values.data(), 2, 4, begins.data(), ends.data(), 2, sums.data());
  CHECK(sums == std::vector<double>{3, 4, 30, 40});
}

TEMPLATE_TEST_CASE("the vectorised hinge equals its definition", "", float, double) {
  const double tolerance = std::is_same_v<TestType, float> ? 2e-5 : 1e-12;
  std::mt19937 random(71);
  for (const std::size_t num_experts : {1U, 2U, 3U, 8U, 31U, 64U, 130U}) {
    for (const bool normalise : {false, true}) {
      for (const double margin : {0.0, 0.1, 1.5}) {
        CAPTURE(num_experts, normalise, margin);
        std::vector<TestType> p;
        std::vector<TestType> base;
        std::vector<Token> expected;
        const std::size_t num_tokens = 5;
        for (std::size_t token = 0; token < num_tokens; ++token) {
          const std::vector<double> row = random_probabilities(random, num_experts);
          std::vector<double> base_row = random_probabilities(random, num_experts);
          if (token == 3) {
            std::fill(base_row.begin(), base_row.end(), base_row[0]);  // no pair at all
          } else if (num_experts > 4) {
            base_row[4] = base_row[1];
            base_row[2] = base_row[1];
          }
          expected.push_back(by_definition(row, base_row, margin, normalise));
          std::transform(row.begin(), row.end(), std::back_inserter(p), [](double x) { return TestType(x); });
          std::transform(base_row.begin(), base_row.end(), std::back_inserter(base),
                         [](double x) { return TestType(x); });
        }
        const Rows<TestType> router(p, num_experts);
        const Rows<TestType> reference(base, num_experts);
        const RankHingeTerm<TestType> term{.base = reference.rows(), .margin = margin, .normalise = normalise};
        std::vector<double> value(num_tokens, -1.0);
        std::vector<double> value_alone(num_tokens, -1.0);
        std::vector<TestType> gradient(num_tokens * num_experts, TestType(0.5));
        row_term_cpu(router.layout(), router.rows(), term, {value.data(), gradient.data(), 2.0}, 0, 5);
        row_term_cpu<TestType>(router.layout(), router.rows(), term, {value_alone.data(), nullptr, 1.0}, 0, 5);
        CHECK(value == value_alone);
        double worst = 0.0;
        for (std::size_t token = 0; token < num_tokens; ++token) {
          const double size = std::max(1.0, expected[token].value);
          CHECK(value[token] == Approx(expected[token].value).epsilon(tolerance).margin(tolerance));
          for (std::size_t k = 0; k < num_experts; ++k) {
            worst = std::max(worst, std::abs((static_cast<double>(gradient[token * num_experts + k]) - 0.5) / 2.0 -
                                             expected[token].gradient[k]) /
                                        size);
          }
        }
        CHECK(worst < tolerance);
        CHECK(value[3] == 0.0);
      }
    }
  }
}

TEST_CASE("the hinge of probabilities that are no numbers ends, and other rows do not notice") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> good = {0.5, 0.3, 0.2};
  std::vector<double> p = good;
  std::vector<double> base = {0.2, 0.5, 0.3};
  p.insert(p.end(), {nan, nan, nan, 0.2, nan, 0.8});
  base.insert(base.end(), {nan, nan, nan, nan, 0.5, 0.5});
  const Rows<double> router(p, 3);
  const Rows<double> reference(base, 3);
  const RankHingeTerm<double> term{.base = reference.rows(), .margin = 0.1};
  std::vector<double> value(3, -1.0);
  std::vector<double> gradient(9, 0.0);
  row_term_cpu(router.layout(), router.rows(), term, {value.data(), gradient.data(), 1.0}, 0, 3);
  CHECK(value[0] == Approx(by_definition(good, {0.2, 0.5, 0.3}, 0.1, false).value));
  CHECK(std::isfinite(gradient[0] + gradient[1] + gradient[2]));
}
