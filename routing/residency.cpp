#include "hestia/routing/residency.hpp"

#include <algorithm>

#include "demand_cache.hpp"

namespace hestia {

SimulationCounts route_with_residency(const ResidencyShape& shape, const float* logits, const std::uint8_t* counted,
                                      const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                                      std::int64_t* selected) {
  const std::int64_t kept = std::min(shape.always_keep, shape.top_k);
  SimulationOptions options;
  options.slots = shape.slots;
  SimulationCounts counts;
  std::vector<ResidencyCandidate> experts(static_cast<std::size_t>(shape.num_experts));
  std::vector<std::uint16_t> served(static_cast<std::size_t>(shape.top_k));
  for (std::int64_t run = 0; run < num_runs; ++run) {
    DemandCache cache(options, shape.num_experts, 0);
    for (std::int64_t token = run_begin[run]; token < run_end[run]; ++token) {
      for (std::size_t expert = 0; expert < experts.size(); ++expert) {
        const std::int32_t own = ordered_logit(logits[token * shape.num_experts + static_cast<std::int64_t>(expert)]);
        experts[expert] = {own, own, static_cast<std::int32_t>(expert)};
      }
      std::sort(experts.begin(), experts.end(), chosen_before);
      for (auto candidate = experts.begin() + kept; candidate != experts.end(); ++candidate) {
        if ((counted == nullptr || counted[token] != 0) &&
            cache.is_resident(static_cast<std::size_t>(candidate->expert))) {
          candidate->adjusted = ordered_logit(logits[token * shape.num_experts + candidate->expert] + shape.bonus);
        }
      }
      std::sort(experts.begin() + kept, experts.end(), chosen_before);
      const auto by_logit = [](ResidencyCandidate a, ResidencyCandidate b) {
        a.adjusted = a.own;
        b.adjusted = b.own;
        return chosen_before(a, b);
      };
      std::sort(experts.begin(), experts.begin() + shape.top_k, by_logit);
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
