#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "hestia/core/random.hpp"
#include "hestia/routing/cache_policy.hpp"
#include "hestia/routing/simulator.hpp"

namespace hestia {

/// The slots of one layer from one reset to the next, served step by step by the rules of docs/routing.md.
class DemandCache {
 public:
  /// An empty cache for experts 0..num_experts-1; `seed` is that of `random`. Under `given_uses`, the policy is LFU on
  /// the use counts that `set_uses` gave, which serving leaves alone.
  DemandCache(const SimulationOptions& options, std::int64_t num_experts, std::uint64_t seed, bool given_uses = false);

  void set_uses(std::uint16_t expert, std::int64_t uses) { states_[expert].use_count = static_cast<double>(uses); }
  [[nodiscard]] bool is_resident(std::size_t expert) const { return resident_[expert] != 0; }

  /// Puts `experts` (best first, at most the slots) into the empty cache: loaded and touched from the last to the
  /// first, neither used nor requested.
  void preload(std::span<const std::uint16_t> experts);

  /// Serves one step and adds to `counts`: `experts` by falling weight, `next_uses` beside them (read under Belady
  /// only).
  void serve(std::span<const std::uint16_t> experts, const std::int64_t* next_uses, SimulationCounts& counts);

 private:
  void evict(std::size_t number, bool step_too_large);

  CachePolicyKind policy_;
  bool given_uses_;
  std::size_t slots_;
  double gamma_;
  SplitMix64 random_;
  std::int64_t serial_ = 0;
  std::size_t evicted_ = 0;
  std::vector<ExpertState> states_;
  std::vector<std::uint8_t> resident_;
  std::vector<std::uint8_t> in_step_;
  std::vector<std::uint8_t> seen_;
  std::vector<int> residents_;
  std::vector<int> candidates_;
};

}  // namespace hestia
