#include "demand_cache.hpp"

#include <algorithm>

namespace hestia {

DemandCache::DemandCache(const SimulationOptions& options, std::int64_t num_experts, std::uint64_t seed,
                         bool given_uses)
    : policy_(given_uses ? CachePolicyKind::kLfu : options.policy),
      given_uses_(given_uses),
      slots_(static_cast<std::size_t>(options.slots)),
      gamma_(options.gamma),
      random_(seed),
      states_(static_cast<std::size_t>(num_experts)),
      resident_(static_cast<std::size_t>(num_experts), 0),
      in_step_(static_cast<std::size_t>(num_experts), 0),
      seen_(static_cast<std::size_t>(num_experts), 0) {}

void DemandCache::preload(std::span<const std::uint16_t> experts) {
  for (std::size_t i = experts.size(); i-- > 0;) {
    ExpertState& state = states_[experts[i]];
    state.last_touch = serial_;
    state.loaded_at = serial_;
    resident_[experts[i]] = 1;
    residents_.push_back(experts[i]);
    ++serial_;
  }
}

void DemandCache::serve(std::span<const std::uint16_t> experts, const std::int64_t* next_uses,
                        SimulationCounts& counts) {
  counts.steps += 1;
  counts.requests += static_cast<std::int64_t>(experts.size());
  if (policy_ == CachePolicyKind::kGamma) {
    for (ExpertState& state : states_) {
      state.use_count = discounted_use(state.use_count, gamma_);
    }
  }
  // From the lowest weight to the highest, so that the top expert ends most recent.
  for (std::size_t i = experts.size(); i-- > 0;) {
    const std::uint16_t expert = experts[i];
    ExpertState& state = states_[expert];
    state.use_count += given_uses_ ? 0.0 : 1.0;
    state.last_touch = serial_;
    if (next_uses != nullptr) {
      state.next_use = next_uses[i];
    }
    in_step_[expert] = 1;
    counts.cold += seen_[expert] != 0 ? 0 : 1;
    seen_[expert] = 1;
    if (resident_[expert] != 0) {
      counts.hits += 1;
    } else {
      counts.loads += 1;
      state.loaded_at = serial_;
      resident_[expert] = 1;
      residents_.push_back(expert);
    }
    ++serial_;
  }
  if (residents_.size() > slots_) {
    evict(residents_.size() - slots_, experts.size() > slots_);
    counts.evictions += static_cast<std::int64_t>(evicted_);
  }
  for (const std::uint16_t expert : experts) {
    in_step_[expert] = 0;
  }
}

// The experts of the step are victims only when they alone do not fit.
void DemandCache::evict(std::size_t number, bool step_too_large) {
  candidates_.clear();
  for (const int expert : residents_) {
    if (step_too_large || in_step_[static_cast<std::size_t>(expert)] == 0) {
      candidates_.push_back(expert);
    }
  }
  if (policy_ == CachePolicyKind::kRandom) {
    std::sort(candidates_.begin(), candidates_.end());
    for (std::size_t i = 0; i < number; ++i) {
      const auto drawn = static_cast<std::ptrdiff_t>(random_.below(candidates_.size()));
      resident_[static_cast<std::size_t>(candidates_[static_cast<std::size_t>(drawn)])] = 0;
      candidates_.erase(candidates_.begin() + drawn);
    }
  } else {
    // A strict order, so the set of the first `number` is unique whatever nth_element does inside.
    const auto last_victim = candidates_.begin() + static_cast<std::ptrdiff_t>(number) - 1;
    std::nth_element(candidates_.begin(), last_victim, candidates_.end(), [this](int a, int b) {
      return evicts_before(policy_, states_[static_cast<std::size_t>(a)], a, states_[static_cast<std::size_t>(b)], b);
    });
    for (std::size_t i = 0; i < number; ++i) {
      resident_[static_cast<std::size_t>(candidates_[i])] = 0;
    }
  }
  std::erase_if(residents_, [this](int expert) { return resident_[static_cast<std::size_t>(expert)] == 0; });
  evicted_ = number;
}

}  // namespace hestia
