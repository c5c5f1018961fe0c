#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/core/host_device.hpp"
#include "hestia/core/random.hpp"

namespace hestia {

/// Slot-cache policies. The exact rules, ties included, stand in docs/routing.md.
enum class CachePolicyKind : std::int32_t { kLru, kLfu, kGamma, kLifo, kFifo, kRandom, kStatic, kBelady };

/// Name on the command line and in recipes: lru, lfu, gamma, lifo, fifo, random, static, belady.
[[nodiscard]] std::string_view policy_name(CachePolicyKind kind);
/// Inverse of policy_name. Throws UsageError with the nearest name.
[[nodiscard]] CachePolicyKind policy_from_name(std::string_view name);
/// All names, in enum order.
[[nodiscard]] std::vector<std::string> policy_names();

/// What a policy knows of one expert. Kept per layer and sequence; `use_count` and `last_touch` survive eviction.
struct ExpertState {
  double use_count =
      0.0;  ///< Uses so far (LFU), or the discounted count (gamma-cache), brought up to the current step.
  std::int64_t last_touch = -1;  ///< Serial number of the last touch; -1: never.
  std::int64_t loaded_at = -1;   ///< Serial number of the load that made it resident.
  std::int64_t next_use = 0;     ///< Belady MIN only: next step that uses it (a number past the end when none).
};

/// `use_count` one step later, before the uses of that step are added: n * gamma, one IEEE multiplication. A function
/// of its own because a fused multiply-add would round differently, and device and simulator must count alike.
[[nodiscard]] HESTIA_HOST_DEVICE inline double discounted_use(double use_count, double gamma) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(use_count, gamma);
#else
  return use_count * gamma;
#endif
}

/// Seed of the victims that `random` draws in one layer and sequence: mix(mix(mix(seed) + layer) + sequence), mix(x)
/// being the first output of SplitMix64(x). One seed per layer and sequence, so that the draws do not depend on the
/// order in which layers are served.
[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint64_t victim_seed(std::uint64_t seed, std::int64_t layer,
                                                                  std::int64_t sequence) {
  const std::uint64_t of_layer = SplitMix64(SplitMix64(seed).next() + static_cast<std::uint64_t>(layer)).next();
  return SplitMix64(of_layer + static_cast<std::uint64_t>(sequence)).next();
}

/// True when `a` is evicted before `b` under `kind`. A strict order: all ties end at the lower expert index.
/// The one place the rule of a policy is written: the simulator, training and the device slot cache run these lines.
/// kRandom and kStatic have no rule of this form.
[[nodiscard]] HESTIA_HOST_DEVICE inline bool evicts_before(CachePolicyKind kind, const ExpertState& a, int index_a,
                                                           const ExpertState& b, int index_b) {
  switch (kind) {
    case CachePolicyKind::kLru:
      if (a.last_touch != b.last_touch) {
        return a.last_touch < b.last_touch;
      }
      break;
    case CachePolicyKind::kLfu:
    case CachePolicyKind::kGamma:
      if (a.use_count != b.use_count) {
        return a.use_count < b.use_count;
      }
      if (a.last_touch != b.last_touch) {
        return a.last_touch < b.last_touch;
      }
      break;
    case CachePolicyKind::kLifo:
      if (a.loaded_at != b.loaded_at) {
        return a.loaded_at > b.loaded_at;
      }
      break;
    case CachePolicyKind::kFifo:
      if (a.loaded_at != b.loaded_at) {
        return a.loaded_at < b.loaded_at;
      }
      break;
    case CachePolicyKind::kBelady:
      if (a.next_use != b.next_use) {
        return a.next_use > b.next_use;
      }
      break;
    case CachePolicyKind::kRandom:
    case CachePolicyKind::kStatic:
      break;
  }
  return index_a < index_b;
}

}  // namespace hestia
