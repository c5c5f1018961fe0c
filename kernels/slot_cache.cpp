#include "hestia/kernels/slot_cache.hpp"

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "slot_cache_rules.hpp"

namespace hestia {
namespace {

constexpr std::size_t kAlignment = 16;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

struct Sizes {
  explicit Sizes(const SlotCacheShape& shape)
      : experts(static_cast<std::size_t>(shape.num_layers * shape.num_experts)),
        layers(static_cast<std::size_t>(shape.num_layers)),
        groups(static_cast<std::size_t>(shape.num_layers / shape.layers_per_group)),
        slots(groups * static_cast<std::size_t>(shape.slots)) {}
  std::size_t experts;
  std::size_t layers;
  std::size_t groups;
  std::size_t slots;
};

void require(bool holds, const char* name, std::int64_t value, const char* range) {
  if (!holds) {
    throw UsageError(fmt::format("slot cache: {} must be {}, got {}", name, range, value));
  }
}

/// One step of one layer. The plainest form of the rules: sets as vectors of flags.
class Step {
 public:
  Step(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer)
      : shape_(shape),
        num_keys_(static_cast<std::size_t>(shape.layers_per_group * shape.num_experts)),
        first_key_(static_cast<std::size_t>(layer % shape.layers_per_group * shape.num_experts)),
        group_(state.groups[layer / shape.layers_per_group]),
        counts_(state.counts[layer]),
        states_(state.experts + (layer / shape.layers_per_group) * static_cast<std::int64_t>(num_keys_)),
        slot_of_(state.slot_of + (layer / shape.layers_per_group) * static_cast<std::int64_t>(num_keys_)),
        key_of_(state.key_of + (layer / shape.layers_per_group) * shape.slots),
        requested_(state.requested + layer * shape.num_experts),
        first_slot_(static_cast<std::int32_t>(layer / shape.layers_per_group * shape.slots)),
        first_scratch_(static_cast<std::int32_t>(shape.num_layers / shape.layers_per_group * shape.slots)),
        in_step_(num_keys_, 0),
        leaves_(num_keys_, 0),
        slot_in_step_(static_cast<std::size_t>(shape.num_experts), -1),
        wave_of_(static_cast<std::size_t>(shape.num_experts), -1) {}

  template <class Index>
  void serve(const Index* selected, std::int64_t rows, std::int64_t top_k, bool counted,
             const SlotCacheAnswer* answer) {
    find_distinct(selected, rows, top_k);
    SlotCacheCounts counts = touch();
    const bool is_static = shape_.policy == CachePolicyKind::kStatic;
    if (!is_static) {
      counts.evictions = choose_leaving();
    }
    std::vector<std::size_t> order;  // passing by the cache first
    for (const std::size_t miss : misses_) {
      if (is_static || leaves_[first_key_ + miss] != 0) {
        order.push_back(miss);
      }
    }
    const std::size_t passing = order.size();
    for (const std::size_t miss : misses_) {
      if (!is_static && leaves_[first_key_ + miss] == 0) {
        order.push_back(miss);
      }
    }
    place(order, passing, answer);
    if (counted) {
      counts_.steps += 1;
      counts_.requests += counts.requests;
      counts_.hits += counts.hits;
      counts_.cold += counts.cold;
      counts_.loads += counts.loads;
      counts_.evictions += counts.evictions;
    }
    if (answer != nullptr) {
      for (std::int64_t i = 0; i < rows * top_k; ++i) {
        const bool valid = is_expert(selected[i]);
        answer->slots[i] = valid ? slot_in_step_[static_cast<std::size_t>(selected[i])] : -1;
        answer->waves[i] = valid ? wave_of_[static_cast<std::size_t>(selected[i])] : -1;
      }
      if (answer->wave_slots != nullptr) {
        const std::int64_t num_selected = rows * top_k;
        const std::int64_t waves = slot_cache_max_waves(shape_, num_selected);
        for (std::int64_t i = 0; i < waves * num_selected; ++i) {
          const std::int64_t of = i % num_selected;
          answer->wave_slots[i] = answer->waves[of] == i / num_selected ? answer->slots[of] : -1;
        }
      }
    }
  }

  /// The C keys used most fill the slots.
  void keep_most_used() {
    std::fill(slot_of_, slot_of_ + num_keys_, -1);
    std::fill(key_of_, key_of_ + shape_.slots, -1);
    std::vector<std::size_t> keys;
    for (std::size_t key = 0; key < num_keys_; ++key) {
      if (states_[key].use_count > 0.0) {
        keys.push_back(key);
      }
    }
    std::stable_sort(keys.begin(), keys.end(),
                     [this](std::size_t a, std::size_t b) { return states_[a].use_count > states_[b].use_count; });
    keys.resize(std::min(keys.size(), static_cast<std::size_t>(shape_.slots)));
    for (std::size_t slot = 0; slot < keys.size(); ++slot) {
      key_of_[slot] = static_cast<std::int32_t>(keys[slot]);
      slot_of_[keys[slot]] = first_slot_ + static_cast<std::int32_t>(slot);
    }
    group_.num_residents = static_cast<std::int64_t>(keys.size());
  }

 private:
  template <class Index>
  [[nodiscard]] bool is_expert(Index id) const {
    return id >= 0 && id < shape_.num_experts;
  }

  template <class Index>
  void find_distinct(const Index* selected, std::int64_t rows, std::int64_t top_k) {
    for (std::int64_t rank = 0; rank < top_k; ++rank) {
      for (std::int64_t row = 0; row < rows; ++row) {
        const Index id = selected[row * top_k + rank];
        if (is_expert(id) && in_step_[first_key_ + static_cast<std::size_t>(id)] == 0) {
          in_step_[first_key_ + static_cast<std::size_t>(id)] = 1;
          distinct_.push_back(static_cast<std::size_t>(id));
        }
      }
    }
  }

  SlotCacheCounts touch() {
    SlotCacheCounts counts;
    counts.requests = static_cast<std::int64_t>(distinct_.size());
    if (shape_.policy == CachePolicyKind::kGamma) {
      for (std::size_t expert = 0; expert < slot_in_step_.size(); ++expert) {
        ExpertState& state = states_[first_key_ + expert];
        state.use_count = discounted_use(state.use_count, shape_.gamma);
      }
    }
    for (std::size_t i = distinct_.size(); i-- > 0;) {
      const std::size_t expert = distinct_[i];
      ExpertState& state = states_[first_key_ + expert];
      state.use_count += 1.0;
      state.last_touch = group_.serial;
      counts.cold += requested_[expert] == 0 ? 1 : 0;
      requested_[expert] = 1;
      slot_in_step_[expert] = slot_of_[first_key_ + expert];
      if (slot_in_step_[expert] >= 0) {
        counts.hits += 1;
        wave_of_[expert] = 0;
      } else {
        counts.loads += 1;
        state.loaded_at = group_.serial;
      }
      ++group_.serial;
    }
    for (const std::size_t expert : distinct_) {
      if (slot_in_step_[expert] < 0) {
        misses_.push_back(expert);
      }
    }
    return counts;
  }

  // Marks what leaves: residents, and misses that only pass by. Returns how many.
  std::int64_t choose_leaving() {
    std::int64_t dropped = 0;
    std::vector<int> candidates;
    const bool step_too_large = distinct_.size() > static_cast<std::size_t>(shape_.slots);
    for (std::size_t key = 0; key < num_keys_; ++key) {
      const bool resident = slot_of_[key] >= 0;
      if (resident && in_step_[key] == 0 && shape_.stress) {
        leaves_[key] = 1;
        ++dropped;
      } else if ((resident && in_step_[key] == 0) || (in_step_[key] != 0 && step_too_large)) {
        candidates.push_back(static_cast<int>(key));
      }
    }
    const std::int64_t over = group_.num_residents - dropped + static_cast<std::int64_t>(misses_.size()) - shape_.slots;
    if (over <= 0) {
      return dropped;
    }
    if (shape_.policy == CachePolicyKind::kRandom) {
      SplitMix64 random(group_.random);
      for (std::int64_t i = 0; i < over; ++i) {
        const auto drawn = static_cast<std::ptrdiff_t>(random.below(candidates.size()));
        leaves_[static_cast<std::size_t>(candidates[static_cast<std::size_t>(drawn)])] = 1;
        candidates.erase(candidates.begin() + drawn);
      }
      group_.random = random.state();
    } else {
      std::sort(candidates.begin(), candidates.end(), [this](int a, int b) {
        return evicts_before(shape_.policy, states_[static_cast<std::size_t>(a)], a,
                             states_[static_cast<std::size_t>(b)], b);
      });
      for (std::int64_t i = 0; i < over; ++i) {
        leaves_[static_cast<std::size_t>(candidates[static_cast<std::size_t>(i)])] = 1;
      }
    }
    return dropped + over;
  }

  void place(const std::vector<std::size_t>& order, std::size_t passing, const SlotCacheAnswer* answer) {
    const std::size_t kept = order.size() - passing;
    std::vector<std::int32_t> targets;
    std::vector<std::int32_t> victims;
    bool waits = false;
    for (std::int32_t slot = 0; slot < shape_.slots; ++slot) {
      const std::int32_t key = key_of_[slot];
      const bool leaves = key >= 0 && leaves_[static_cast<std::size_t>(key)] != 0;
      if (leaves) {
        slot_of_[key] = -1;
        key_of_[slot] = -1;
        group_.num_residents -= 1;
      }
      if ((leaves || key < 0) && targets.size() < kept) {
        targets.push_back(first_slot_ + slot);
        victims.push_back(key);
        waits = waits || (leaves && in_step_[static_cast<std::size_t>(key)] != 0);
      }
    }
    const auto size = static_cast<std::int32_t>(static_cast<std::int64_t>(kept) + shape_.scratch_slots);
    for (std::size_t i = 0; i < order.size(); ++i) {
      const std::size_t expert = order[i];
      const SlotPlace at = slot_place(static_cast<std::int32_t>(i), static_cast<std::int32_t>(passing),
                                      static_cast<std::int32_t>(kept), static_cast<std::int32_t>(shape_.scratch_slots));
      const auto target = static_cast<std::size_t>(at.place);
      const bool is_target = target < kept;
      slot_in_step_[expert] = is_target ? targets[target] : first_scratch_ + static_cast<std::int32_t>(target - kept);
      wave_of_[expert] = at.wave;
      if (answer != nullptr) {
        answer->loads[i] = {static_cast<std::int32_t>(expert), slot_in_step_[expert],
                            is_target && at.wave == 1 ? victims[target] : -1};
      }
      if (i >= passing) {
        slot_of_[first_key_ + expert] = slot_in_step_[expert];
        key_of_[slot_in_step_[expert] - first_slot_] = static_cast<std::int32_t>(first_key_ + expert);
        group_.num_residents += 1;
      }
    }
    if (answer != nullptr) {
      const auto loads = static_cast<std::int32_t>(order.size());
      *answer->step = {static_cast<std::int32_t>(distinct_.size()), loads,
                       loads == 0 ? 1 : 1 + (loads + size - 1) / size, size, waits ? 1 : 0};
    }
  }

  SlotCacheShape shape_;
  std::size_t num_keys_;
  std::size_t first_key_;
  SlotCacheGroup& group_;
  SlotCacheCounts& counts_;
  ExpertState* states_;
  std::int32_t* slot_of_;
  std::int32_t* key_of_;
  std::uint8_t* requested_;
  std::int32_t first_slot_;
  std::int32_t first_scratch_;
  std::vector<std::uint8_t> in_step_;  // by key, like leaves_
  std::vector<std::uint8_t> leaves_;
  std::vector<std::int32_t> slot_in_step_;  // by expert, like wave_of_
  std::vector<std::int32_t> wave_of_;
  std::vector<std::size_t> distinct_;  // experts by falling weight, like misses_
  std::vector<std::size_t> misses_;
};

}  // namespace

void check_slot_cache(const SlotCacheShape& shape) {
  require(shape.num_layers >= 1, "the number of layers", shape.num_layers, "at least 1");
  require(shape.num_experts >= 1 && shape.num_experts <= kSlotCacheMaxExperts, "the number of experts",
          shape.num_experts, "from 1 to 512");
  require(shape.layers_per_group >= 1 && shape.num_layers % shape.layers_per_group == 0, "the layers of a group",
          shape.layers_per_group, "a divisor of the number of layers (1, or all of them for one pool)");
  require(shape.layers_per_group * shape.num_experts <= 65536, "the experts of a group",
          shape.layers_per_group * shape.num_experts, "at most 65536; use slots per layer");
  require(shape.slots >= 1 && shape.slots <= shape.layers_per_group * shape.num_experts, "the number of slots",
          shape.slots, "at least 1 and at most the experts that share them");
  require(shape.scratch_slots >= 0 && shape.scratch_slots <= kSlotCacheMaxExperts, "the number of scratch slots",
          shape.scratch_slots, "from 0 to 512");
  if (!(shape.gamma >= 0.0 && shape.gamma <= 1.0)) {
    throw UsageError(fmt::format("slot cache: gamma must lie in [0, 1], got {}; 0 is LRU, 1 is LFU", shape.gamma));
  }
  if (shape.policy == CachePolicyKind::kBelady) {
    throw UsageError(
        "slot cache: the policy must not need the future, got belady; simulate it on a trace, or use lru, lfu, gamma, "
        "lifo, fifo, random or static");
  }
  if (shape.stress && shape.policy == CachePolicyKind::kStatic) {
    throw UsageError("slot cache: stress needs a policy that evicts, got static; use another policy");
  }
}

std::size_t slot_cache_bytes(const SlotCacheShape& shape) {
  const Sizes sizes(shape);
  return aligned(sizes.experts * sizeof(ExpertState)) + aligned(sizes.layers * sizeof(SlotCacheCounts)) +
         aligned(sizes.groups * sizeof(SlotCacheGroup)) + aligned(sizes.experts * sizeof(std::int32_t)) +
         aligned(sizes.slots * sizeof(std::int32_t)) + aligned(sizes.experts);
}

SlotCacheState slot_cache_state(const SlotCacheShape& shape, void* memory) {
  const Sizes sizes(shape);
  auto* next = static_cast<unsigned char*>(memory);
  const auto take = [&next](auto*& part, std::size_t count) {
    using Part = std::remove_reference_t<decltype(*part)>;
    part = reinterpret_cast<Part*>(next);
    next += aligned(count * sizeof(Part));
  };
  SlotCacheState state;
  take(state.experts, sizes.experts);
  take(state.counts, sizes.layers);
  take(state.groups, sizes.groups);
  take(state.slot_of, sizes.experts);
  take(state.key_of, sizes.slots);
  take(state.requested, sizes.experts);
  return state;
}

std::int64_t slot_cache_num_slots(const SlotCacheShape& shape) {
  return shape.num_layers / shape.layers_per_group * shape.slots + shape.scratch_slots;
}

std::int64_t slot_cache_max_waves(const SlotCacheShape& shape, std::int64_t num_selected) {
  const std::int64_t most = std::min(num_selected, shape.num_experts);
  if (shape.policy != CachePolicyKind::kStatic && most <= shape.slots) {
    return 2;
  }
  const std::int64_t scratch = std::max<std::int64_t>(shape.scratch_slots, 1);
  return 1 + (most + scratch - 1) / scratch;
}

void check_slot_cache_step(const SlotCacheShape& shape, std::int64_t layer, std::int64_t rows, std::int64_t top_k) {
  if (layer < 0 || layer >= shape.num_layers) {
    throw std::invalid_argument(fmt::format("slot cache: layer {} is not below {}", layer, shape.num_layers));
  }
  if (rows < 1 || top_k < 1 || rows * top_k > kSlotCacheMaxSelected) {
    throw std::invalid_argument(fmt::format("slot cache: a step has from 1 to {} expert ids, got {} rows of {}",
                                            kSlotCacheMaxSelected, rows, top_k));
  }
  const bool may_pass =
      shape.policy == CachePolicyKind::kStatic || std::min(rows * top_k, shape.num_experts) > shape.slots;
  if (may_pass && shape.scratch_slots < 1) {
    throw std::invalid_argument(
        fmt::format("slot cache: steps of {} rows of {} need a scratch slot with {} slots under {}, got none", rows,
                    top_k, shape.slots, policy_name(shape.policy)));
  }
}

void slot_cache_reset_cpu(const SlotCacheShape& shape, const SlotCacheState& state, const std::int32_t* preload,
                          std::int64_t preload_count, const std::uint64_t* victim_seeds) {
  check_slot_cache(shape);
  const Sizes sizes(shape);
  std::fill_n(state.experts, sizes.experts, ExpertState());
  std::fill_n(state.counts, sizes.layers, SlotCacheCounts());
  std::fill_n(state.slot_of, sizes.experts, -1);
  std::fill_n(state.key_of, sizes.slots, -1);
  std::fill_n(state.requested, sizes.experts, std::uint8_t{0});
  const std::int64_t num_keys = shape.layers_per_group * shape.num_experts;
  for (std::int64_t group = 0; group < static_cast<std::int64_t>(sizes.groups); ++group) {
    const std::int32_t* const keys = preload == nullptr ? nullptr : preload + group * preload_count;
    std::int64_t count = 0;
    while (keys != nullptr && count < std::min(preload_count, shape.slots) && keys[count] >= 0) {
      ++count;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      ExpertState& expert = state.experts[group * num_keys + keys[i]];
      expert.last_touch = count - 1 - i;
      expert.loaded_at = count - 1 - i;
      state.slot_of[group * num_keys + keys[i]] = static_cast<std::int32_t>(group * shape.slots + i);
      state.key_of[group * shape.slots + i] = keys[i];
    }
    state.groups[group] = {count, victim_seeds == nullptr ? 0 : victim_seeds[group], count};
  }
}

template <class Index>
void slot_cache_serve_cpu(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                          const Index* selected, std::int64_t rows, std::int64_t top_k, const SlotCacheAnswer& answer) {
  check_slot_cache_step(shape, layer, rows, top_k);
  Step(shape, state, layer).serve(selected, rows, top_k, true, &answer);
}

template <class Index>
void slot_cache_touch_cpu(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                          const Index* selected, std::int64_t steps, std::int64_t rows, std::int64_t top_k) {
  check_slot_cache_step(shape, layer, rows, top_k);
  for (std::int64_t step = 0; step < steps; ++step) {
    Step(shape, state, layer).serve(selected + step * rows * top_k, rows, top_k, false, nullptr);
  }
  if (shape.policy == CachePolicyKind::kStatic) {
    Step(shape, state, layer).keep_most_used();
  }
}

void slot_cache_mask_cpu(const SlotCacheShape& shape, const SlotCacheState& state, std::int64_t layer,
                         std::uint8_t* mask) {
  const std::int32_t* const slots = state.slot_of + layer * shape.num_experts;
  std::transform(slots, slots + shape.num_experts, mask,
                 [](std::int32_t slot) { return static_cast<std::uint8_t>(slot >= 0 ? 1 : 0); });
}

// NOLINTBEGIN(bugprone-macro-parentheses): types cannot stand in parentheses
#define HESTIA_INSTANTIATE(Index)                                                                                     \
  template void slot_cache_serve_cpu<Index>(const SlotCacheShape&, const SlotCacheState&, std::int64_t, const Index*, \
                                            std::int64_t, std::int64_t, const SlotCacheAnswer&);                      \
  template void slot_cache_touch_cpu<Index>(const SlotCacheShape&, const SlotCacheState&, std::int64_t, const Index*, \
                                            std::int64_t, std::int64_t, std::int64_t);
HESTIA_INSTANTIATE(std::int32_t)
HESTIA_INSTANTIATE(std::int64_t)
#undef HESTIA_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace hestia
