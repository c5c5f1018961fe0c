#include "hestia/routing/residency.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "demand_cache.hpp"

namespace hestia {

namespace {

constexpr std::array kScores = {ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot};

}  // namespace

std::string_view residency_score_name(ResidencyScore score) {
  switch (score) {
    case ResidencyScore::kWeight:
      return "weight";
    case ResidencyScore::kRoot:
      return "root";
    case ResidencyScore::kLogit:
      break;
  }
  return "logit";
}

std::optional<ResidencyScore> residency_score_from_name(std::string_view name) {
  for (const ResidencyScore score : kScores) {
    if (name == residency_score_name(score)) {
      return score;
    }
  }
  return std::nullopt;
}

std::vector<std::string> residency_score_names() {
  std::vector<std::string> names;
  names.reserve(kScores.size());
  for (const ResidencyScore score : kScores) {
    names.emplace_back(residency_score_name(score));
  }
  return names;
}

void weight_scores(ResidencyScore score, const float* logits, std::int64_t num_experts, float* scores) {
  float largest = -std::numeric_limits<float>::infinity();
  for (std::int64_t expert = 0; expert < num_experts; ++expert) {
    largest = larger_logit(largest, logits[expert]);
  }
  for (std::int64_t expert = 0; expert < num_experts; ++expert) {
    scores[expert] = weight_score(score, logits[expert], largest);
  }
}

void scope_strengths(const ResidencyScope& scope, std::int64_t layer, const float* logits,
                     const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                     float* strength) {
  const std::vector<float>& weights = scope.weights.at(static_cast<std::size_t>(layer));
  const double offset = scope.offsets.at(static_cast<std::size_t>(layer));
  const auto num_experts = static_cast<std::int64_t>(weights.size());
  const auto evidence = [&](std::int64_t token) -> std::int64_t {
    double sum = offset;
    for (std::int64_t expert = 0; expert < num_experts; ++expert) {
      sum += static_cast<double>(logits[token * num_experts + expert]) *
             static_cast<double>(weights[static_cast<std::size_t>(expert)]);
    }
    constexpr double kMost = ResidencyScope::kMostEvidence;
    return std::isfinite(sum) ? std::llrint(std::clamp(sum, -kMost, kMost) * ResidencyScope::kUnits) : 0;
  };
  for (std::int64_t run = 0; run < num_runs; ++run) {
    for (std::int64_t token = run_begin[run]; token < run_end[run]; ++token) {
      std::int64_t sum = 0;
      for (std::int64_t seen = std::max(run_begin[run], token + 1 - scope.window); seen <= token; ++seen) {
        sum += evidence(seen);
      }
      strength[token] = sum < 0 ? static_cast<float>(scope.elsewhere) : 1.0F;
    }
  }
}

SimulationCounts route_with_residency(const ResidencyShape& shape, const float* logits, const float* strength,
                                      const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                                      std::int64_t* selected) {
  const std::int64_t kept = std::min(shape.always_keep, shape.top_k);
  SimulationOptions options;
  options.slots = shape.slots;
  SimulationCounts counts;
  std::vector<ResidencyCandidate> experts(static_cast<std::size_t>(shape.num_experts));
  std::vector<float> scores(experts.size());
  std::vector<std::uint16_t> served(static_cast<std::size_t>(shape.top_k));
  for (std::int64_t run = 0; run < num_runs; ++run) {
    DemandCache cache(options, shape.num_experts, 0);
    for (std::int64_t token = run_begin[run]; token < run_end[run]; ++token) {
      const float bonus = bonus_at(shape.bonus, strength, token);
      const float* const row = logits + token * shape.num_experts;
      if (routes_by_weight(shape.score, bonus, shape.always_keep, shape.top_k)) {
        weight_scores(shape.score, row, shape.num_experts, scores.data());
      } else {
        std::copy(row, row + shape.num_experts, scores.begin());
      }
      for (std::size_t expert = 0; expert < experts.size(); ++expert) {
        const std::int32_t own = ordered_logit(scores[expert]);
        experts[expert] = {own, own, static_cast<std::int32_t>(expert)};
      }
      std::sort(experts.begin(), experts.end(), chosen_before);
      for (auto candidate = experts.begin() + kept; candidate != experts.end(); ++candidate) {
        const auto expert = static_cast<std::size_t>(candidate->expert);
        if (cache.is_resident(expert)) {
          candidate->adjusted = ordered_logit(scores[expert] + bonus);
        }
      }
      std::sort(experts.begin() + kept, experts.end(), chosen_before);
      const auto by_score = [](ResidencyCandidate a, ResidencyCandidate b) {
        a.adjusted = a.own;
        b.adjusted = b.own;
        return chosen_before(a, b);
      };
      std::sort(experts.begin(), experts.begin() + shape.top_k, by_score);
      for (std::size_t k = 0; k < served.size(); ++k) {
        served[k] = static_cast<std::uint16_t>(experts[k].expert);
        selected[token * shape.top_k + static_cast<std::int64_t>(k)] = experts[k].expert;
      }
      cache.serve(served, nullptr, counts);
    }
  }
  return counts;
}

}  // namespace hestia
