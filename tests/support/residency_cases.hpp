#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "hestia/core/random.hpp"
#include "hestia/routing/residency.hpp"

namespace hestia::testing {

/// Logits of some sequences with the rule to route them by.
struct ResidencyCase {
  ResidencyShape shape;
  std::vector<float> logits;          ///< [T, E]
  std::vector<std::uint8_t> counted;  ///< [T], 0 at prompt tokens and between the runs
  std::vector<float> strength;  ///< [T], 0 there; else 1, or in half of the cases something else at every other token
  std::vector<std::int64_t> run_begin;
  std::vector<std::int64_t> run_end;

  [[nodiscard]] std::int64_t num_runs() const { return static_cast<std::int64_t>(run_begin.size()); }
  [[nodiscard]] std::string text() const {
    return "T " + std::to_string(shape.num_tokens) + ", E " + std::to_string(shape.num_experts) + ", K " +
           std::to_string(shape.top_k) + ", J " + std::to_string(shape.always_keep) + ", C " +
           std::to_string(shape.slots) + ", bonus " + std::to_string(shape.bonus) + " by " +
           std::string(residency_score_name(shape.score)) + ", runs " + std::to_string(num_runs());
  }
};

/// Random sizes up to `max_experts`; sequences of 1 token and more with gaps between them, some with a prompt. Logits
/// drift, so that experts come back; in a third of the cases they are coarse, so that ties are everywhere, with the
/// bonus a multiple of the step, and 0 comes with both signs. Half of the cases score by weight, and some of these have
/// logits far apart, infinite ones and NaN among them.
inline ResidencyCase random_residency_case(SplitMix64& random, std::int64_t max_experts, std::int64_t max_tokens) {
  const auto below = [&](std::int64_t bound) {
    return static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(bound)));
  };
  ResidencyCase c;
  ResidencyShape& shape = c.shape;
  shape.num_experts = 1 + below(max_experts);
  shape.top_k = 1 + below(random.uniform() < 0.2 ? shape.num_experts : std::min<std::int64_t>(shape.num_experts, 9));
  shape.always_keep = random.uniform() < 0.3 ? below(2) * (shape.top_k + 1) : below(shape.top_k + 1);
  shape.slots =
      1 + below(random.uniform() < 0.3 ? shape.num_experts + 3 : std::min<std::int64_t>(shape.num_experts, 20));
  const bool coarse = random.uniform() < 0.35;
  shape.bonus = random.uniform() < 0.1 ? 0.0F
                : coarse               ? 0.5F * static_cast<float>(below(5))
                                       : static_cast<float>(2.0 * random.uniform());
  const bool by_weight = random.uniform() < 0.5;
  shape.score = !by_weight               ? ResidencyScore::kLogit
                : random.uniform() < 0.5 ? ResidencyScore::kWeight
                                         : ResidencyScore::kRoot;
  if (by_weight) {
    shape.bonus *= 0.25F;
  }
  const double scale = by_weight && random.uniform() < 0.3 ? 20.0 : 1.0;
  const std::int64_t runs = 1 + below(5);
  std::int64_t token = below(3);
  for (std::int64_t run = 0; run < runs; ++run) {
    const std::int64_t length = random.uniform() < 0.2 ? 1 : 1 + below(std::max<std::int64_t>(1, max_tokens / runs));
    const std::int64_t prompt = random.uniform() < 0.4 ? below(length + 1) : 0;
    c.run_begin.push_back(token);
    c.run_end.push_back(token + length);
    c.counted.resize(static_cast<std::size_t>(token), 0);
    for (std::int64_t t = 0; t < length; ++t) {
      c.counted.push_back(t >= prompt ? 1 : 0);
    }
    token += length + below(3);
  }
  shape.num_tokens = token;
  c.counted.resize(static_cast<std::size_t>(token), 0);
  const bool varies = random.uniform() < 0.5;
  for (const std::uint8_t counts : c.counted) {
    const float of_token = varies && random.uniform() < 0.5 ? 0.5F * static_cast<float>(below(5)) : 1.0F;
    c.strength.push_back(counts == 0 ? 0.0F : of_token);
  }
  std::vector<double> drift(static_cast<std::size_t>(shape.num_experts), 0.0);
  for (std::int64_t t = 0; t < token; ++t) {
    for (double& d : drift) {
      d = 0.9 * d + random.uniform() - 0.5;
      double z = d + 3.0 * (random.uniform() - 0.5);
      if (coarse) {
        z = 0.5 * std::floor(z * 2.0) + 0.0;
        z = z == 0.0 && random.uniform() < 0.5 ? -0.0 : z;
      }
      c.logits.push_back(static_cast<float>(scale * z));
      if (scale > 1.0 && random.uniform() < 0.02) {
        const float infinity = std::numeric_limits<float>::infinity();
        const float special[] = {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), -1e-40F};
        c.logits.back() = special[below(4)];
      }
    }
  }
  return c;
}

}  // namespace hestia::testing
