#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "hestia/routing/cache_policy.hpp"
#include "hestia/routing/simulator.hpp"

namespace hestia {

/// Residency-aware routing (after the cache-prior of arXiv 2412.00099; docs/routing.md): z' = z + lambda * D_avg for
/// the experts that the layer's slot cache holds, the J highest of z chosen first and the other K - J by z'. What a
/// router is trained or served with; lambda 0 is plain Top-K.
struct ResidencyRule {
  double lambda = 0.0;             ///< At least 0.
  std::int64_t always_keep = 2;    ///< J: experts chosen by z alone before residency has a say.
  std::int64_t slots = 0;          ///< C per layer, at least 1.
  std::string policy = "lru";      ///< Of the slot cache; lru is the only one there is.
  std::vector<float> logit_range;  ///< D_avg per MoE layer: mean of max z - min z under the base router.
  std::string calibration;         ///< The text that logit_range is the mean over, in words.

  /// What z' adds in MoE layer `layer`: lambda * D_avg, rounded to float32 once, here. Throws std::out_of_range.
  [[nodiscard]] float bonus(std::int64_t layer) const {
    return static_cast<float>(lambda * static_cast<double>(logit_range.at(static_cast<std::size_t>(layer))));
  }
};

/// Sizes and rule of one layer's residency-aware routing.
struct ResidencyShape {
  std::int64_t num_tokens = 0;   ///< T, flat over packed rows
  std::int64_t num_experts = 0;  ///< E, at least 1
  std::int64_t top_k = 0;        ///< K, from 1 to E
  std::int64_t always_keep = 0;  ///< J, at least 0; K where it is more
  std::int64_t slots = 0;        ///< C, at least 1
  float bonus = 0.0F;            ///< lambda * D_avg, at least 0
};

/// An integer that orders as the logit does: equal floats (0 and -0 among them) give equal numbers, NaN comes before
/// all.
[[nodiscard]] HESTIA_HOST_DEVICE inline std::int32_t ordered_logit(float z) {
  const float value = z + 0.0F;  // -0 becomes 0
  std::int32_t bits = 0;
#if defined(__CUDA_ARCH__)
  bits = __float_as_int(value);
#else
  std::memcpy(&bits, &value, sizeof bits);
#endif
  // Integer operations only, so that loops over it vectorise. Floats are sign and magnitude: a negative one is turned.
  const std::int32_t ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
  return (bits & 0x7fffffff) > 0x7f800000 ? INT32_MIN : ordered;
}

/// An expert as the rule sees it in one token.
struct ResidencyCandidate {
  std::int32_t adjusted = 0;  ///< ordered_logit of z', the float32 sum of z and the bonus where it is resident.
  std::int32_t own = 0;       ///< ordered_logit of z.
  std::int32_t expert = 0;
};

/// True when the rule chooses `a` before `b`: by z', ties to the higher z, then to the lower index. A strict order.
/// With nothing resident it is that of plain Top-K, and of mixing weights. The one place it is written: reference, CPU
/// and CUDA scans run this line.
[[nodiscard]] HESTIA_HOST_DEVICE inline bool chosen_before(const ResidencyCandidate& a, const ResidencyCandidate& b) {
  if (a.adjusted != b.adjusted) {
    return a.adjusted > b.adjusted;
  }
  return a.own != b.own ? a.own > b.own : a.expert < b.expert;
}

/// Routes the tokens of each run by the rule, through the simulator's slot cache (LRU, empty at the start of each run),
/// in the plainest way: a sort per token. The reference that the scans in kernels/ are compared with.
/// logits: float32 [T, E]; counted: uint8 [T], 0 where the token routes by z alone (a prompt token, which is served
/// through the same cache), null: all count; run_begin, run_end: int64 [num_runs], token range of each sequence;
/// selected: int64 [T, K], by falling z, ties to the lower index, overwritten inside the runs. Returns what the cache
/// saw, prompt tokens included. E is at most 65,536.
SimulationCounts route_with_residency(const ResidencyShape& shape, const float* logits, const std::uint8_t* counted,
                                      const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                                      std::int64_t* selected);

}  // namespace hestia
