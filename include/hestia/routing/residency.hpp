#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/routing/cache_policy.hpp"
#include "hestia/routing/simulator.hpp"

namespace hestia {

/// What the rule compares experts by.
enum class ResidencyScore : std::int32_t {
  kLogit,   ///< z itself; the bonus is lambda * D_avg.
  kWeight,  ///< u = exp(z - max z), the mixing weight relative to the token's largest; the bonus is lambda.
  kRoot     ///< sqrt(u), between the two: what is far behind is neither lost nor near; the bonus is lambda.
};

/// Name in recipes, manifests and on the command line: logit, weight, root.
[[nodiscard]] std::string_view residency_score_name(ResidencyScore score);
/// Inverse of residency_score_name; nullopt for any other name.
[[nodiscard]] std::optional<ResidencyScore> residency_score_from_name(std::string_view name);
/// All names, in enum order.
[[nodiscard]] std::vector<std::string> residency_score_names();

/// The text that a residency rule is for, told as it comes by the router's own logits: text like that of some training
/// domains. z . w + b, in units of 2^-20 so that sums are exact, is a token's evidence for them in a layer; where its
/// mean over the token and the window - 1 before it, of the same sequence, is below 0, the bonus counts `elsewhere`
/// times. w is Fisher's linear discriminant (Annals of Eugenics 7, 1936) between these domains and the others that were
/// trained on; b leaves the share `keep` of their own text inside (fit_scope of hestia/trainer/residency.hpp).
struct ResidencyScope {
  std::vector<std::string> domains;         ///< Empty: the rule holds everywhere, and the rest means nothing.
  double elsewhere = 0.0;                   ///< Times which the bonus counts outside, from 0 to 1.
  std::int64_t window = 64;                 ///< Tokens, at least 1.
  double keep = 0.95;                       ///< Above 0, at most 1.
  std::vector<std::vector<float>> weights;  ///< w, [MoE layers][E].
  std::vector<float> offsets;               ///< b, [MoE layers].

  static constexpr double kUnits = 1048576.0;   ///< Of evidence in 1.
  static constexpr double kMostEvidence = 1e6;  ///< Either way, of one token.

  [[nodiscard]] bool everywhere() const { return domains.empty(); }
  friend bool operator==(const ResidencyScope&, const ResidencyScope&) = default;
};

/// Residency-aware routing (after the cache-prior of arXiv 2412.00099; docs/routing.md): a bonus on the score, z, u
/// or sqrt(u), of the experts that the layer's slot cache holds, z' = z + lambda * D_avg, u' = u + lambda or sqrt(u) +
/// lambda, where layers may scale lambda by factors of their own; the J highest by score alone chosen first and the
/// other K - J with the bonus. What a router is trained or served with; lambda 0 is plain Top-K.
struct ResidencyRule {
  ResidencyScore score = ResidencyScore::kLogit;
  double lambda = 0.0;                ///< At least 0.
  std::vector<double> layer_factors;  ///< Of lambda, one per MoE layer, each at least 0; empty: 1 everywhere.
  std::int64_t always_keep = 2;       ///< J: experts chosen by the score alone before residency has a say.
  /// The chosen experts' mixing weights are scaled to the sum that plain Top-K's would have (mixing_weights of
  /// hestia/model/routing_rule.hpp). No effect where the family normalises them.
  bool preserve_mass = false;
  std::int64_t slots = 0;          ///< C per layer, at least 1.
  std::string policy = "lru";      ///< Of the slot cache; lru is the only one there is.
  std::vector<float> logit_range;  ///< D_avg per MoE layer: mean of max z - min z under the base router.
  std::string calibration;         ///< The text that logit_range is the mean over, in words.
  ResidencyScope scope;            ///< Where the bonus counts.

  /// What is added to a resident's score in MoE layer `layer`, rounded to float32 once, here: lambda * factor * D_avg
  /// for logits, lambda * factor for weights and their roots. Throws std::out_of_range where the layer has no range,
  /// for logits, or no factor although others have.
  [[nodiscard]] float bonus(std::int64_t layer) const {
    const auto index = static_cast<std::size_t>(layer);
    const double strength = layer_factors.empty() ? lambda : lambda * layer_factors.at(index);
    return static_cast<float>(score == ResidencyScore::kLogit ? strength * static_cast<double>(logit_range.at(index))
                                                              : strength);
  }

  /// Whether mixing weights of MoE layer `layer` are scaled: where the rule changes nothing (no bonus, or J at least
  /// `top_k`) they are plain Top-K's. Throws as bonus does.
  [[nodiscard]] bool scales_weights(std::int64_t layer, std::int64_t top_k) const {
    return preserve_mass && always_keep < top_k && bonus(layer) > 0.0F;
  }
};

/// Sizes and rule of one layer's residency-aware routing.
struct ResidencyShape {
  std::int64_t num_tokens = 0;   ///< T, flat over packed rows
  std::int64_t num_experts = 0;  ///< E, at least 1
  std::int64_t top_k = 0;        ///< K, from 1 to E
  std::int64_t always_keep = 0;  ///< J, at least 0; K where it is more
  std::int64_t slots = 0;        ///< C, at least 1
  float bonus = 0.0F;            ///< Of a resident's score: ResidencyRule::bonus, at least 0
  ResidencyScore score = ResidencyScore::kLogit;
};

/// Whether a token that the rule routes is routed by u or its root: where it changes nothing (no bonus, or J at least
/// K) it is plain Top-K, by z, in all forms.
[[nodiscard]] HESTIA_HOST_DEVICE inline bool routes_by_weight(ResidencyScore score, float bonus,
                                                              std::int64_t always_keep, std::int64_t top_k) {
  return score != ResidencyScore::kLogit && bonus > 0.0F && always_keep < top_k;
}

/// The larger of two logits for a row's maximum, begun with minus infinity: NaN as `next` is passed over.
[[nodiscard]] HESTIA_HOST_DEVICE inline float larger_logit(float largest, float next) {
  return next > largest ? next : largest;
}

/// One product, one sum, each rounded by itself: a fused multiply-add would round differently, and host and device must
/// choose alike.
[[nodiscard]] HESTIA_HOST_DEVICE inline float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
[[nodiscard]] HESTIA_HOST_DEVICE inline float rounded_sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

/// Constants of relative_weight: exp(d) = 2^n exp(r), n = d / ln 2 rounded to even, r = d - n ln 2 in two steps, exp(r)
/// by its Taylor polynomial of degree 6, so within 3e-7 of it.
struct RelativeWeight {
  static constexpr float kLog2E = 1.44269504F;
  static constexpr float kRound = 12582912.0F;     ///< 1.5 * 2^23: adding it rounds to an integer, half to even.
  static constexpr float kLn2High = 0.693359375F;  ///< 9 bits, so that n times it is exact.
  static constexpr float kLn2Low = -2.12194440e-4F;
  static constexpr float kLowest = std::numeric_limits<float>::lowest();
  static constexpr float kSmallest = -125.0F;  ///< 0 below 2^-125, so that no result is denormal.
  static constexpr float kTerm6 = 1.0F / 720.0F;
  static constexpr float kTerm5 = 1.0F / 120.0F;
  static constexpr float kTerm4 = 1.0F / 24.0F;
  static constexpr float kTerm3 = 1.0F / 6.0F;
  static constexpr float kTerm2 = 0.5F;
};

/// u = exp(z - largest) of a logit, in [0, 1], largest being the highest of its token. Minus infinity and NaN stay what
/// they are: an expert that is left out stays so, whatever the bonus. Every operation is rounded by itself (no fused
/// multiply-add), so that host and device give the same bits; the error relative to std::exp is below 1e-6 down to
/// 2^-125, below which u is 0, and u of the largest is 1.
[[nodiscard]] HESTIA_HOST_DEVICE inline float relative_weight(float z, float largest) {
  using C = RelativeWeight;
  const float difference = z == largest ? 0.0F : z - largest;  // both may be infinite
  const float exponent = rounded_product(difference, C::kLog2E);
  const float rounded = rounded_sum(exponent, C::kRound);
  const float n = rounded_sum(rounded, -C::kRound);
  const float r =
      rounded_sum(rounded_sum(difference, rounded_product(n, -C::kLn2High)), rounded_product(n, -C::kLn2Low));
  float value = C::kTerm6;
  value = rounded_sum(rounded_product(value, r), C::kTerm5);
  value = rounded_sum(rounded_product(value, r), C::kTerm4);
  value = rounded_sum(rounded_product(value, r), C::kTerm3);
  value = rounded_sum(rounded_product(value, r), C::kTerm2);
  value = rounded_sum(rounded_product(value, r), 1.0F);
  value = rounded_sum(rounded_product(value, r), 1.0F);
  // The low bits of `rounded` are n; 2^n has n + 127 for its exponent.
  float power = 0.0F;
#if defined(__CUDA_ARCH__)
  power = __uint_as_float((__float_as_uint(rounded) + 127U) << 23U);
#else
  std::uint32_t bits = 0;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits + 127U) << 23U;
  std::memcpy(&power, &bits, sizeof power);
#endif
  const float weight = exponent < C::kSmallest ? 0.0F : rounded_product(value, power);
  return z >= C::kLowest ? weight : z;
}

/// The score of an expert in a token that is routed by weight: u, or sqrt(u) = exp((z - largest) / 2). Halving is exact
/// but for denormal logits, and rounded by itself, so that host and device give the same bits here, too.
[[nodiscard]] HESTIA_HOST_DEVICE inline float weight_score(ResidencyScore score, float z, float largest) {
  const float power = score == ResidencyScore::kRoot ? 0.5F : 1.0F;
  return relative_weight(rounded_product(power, z), rounded_product(power, largest));
}

/// weight_score of a row of logits, float32 [E], each with the row's largest; scores: float32 [E]. CPU.
void weight_scores(ResidencyScore score, const float* logits, std::int64_t num_experts, float* scores);

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
  std::int32_t adjusted = 0;  ///< ordered_logit of the float32 sum of its score and the bonus where it is resident.
  std::int32_t own = 0;       ///< ordered_logit of its score: z, u or sqrt(u).
  std::int32_t expert = 0;
};

/// True when the rule chooses `a` before `b`: by the score with the bonus, ties to the higher score, then to the lower
/// index. A strict order. With nothing resident it is that of plain Top-K, and of mixing weights. The one place it is
/// written: reference, CPU and CUDA scans run this line.
[[nodiscard]] HESTIA_HOST_DEVICE inline bool chosen_before(const ResidencyCandidate& a, const ResidencyCandidate& b) {
  if (a.adjusted != b.adjusted) {
    return a.adjusted > b.adjusted;
  }
  return a.own != b.own ? a.own > b.own : a.expert < b.expert;
}

/// A resident's bonus at a token: the shape's, times `strength` [T] of that token where there is one, rounded to
/// float32.
[[nodiscard]] HESTIA_HOST_DEVICE inline float bonus_at(float bonus, const float* strength, std::int64_t token) {
  return strength == nullptr ? bonus : rounded_product(bonus, strength[token]);
}

/// Strengths of a scope, which is not everywhere, in MoE layer `layer`, token by token in the plainest way: the
/// reference of ResidencySelector's. logits: float32 [T, E], E of the scope; run_begin, run_end: int64 [num_runs],
/// token range of each sequence; strength: float32 [T], 1 or `elsewhere`, overwritten inside the runs. A token whose
/// evidence is no finite number has none (0). Throws std::out_of_range for a layer that the scope does not have.
void scope_strengths(const ResidencyScope& scope, std::int64_t layer, const float* logits,
                     const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                     float* strength);

/// Routes the tokens of each run by the rule, through the simulator's slot cache (LRU, empty at the start of each run),
/// in the plainest way: a sort per token. The reference that the scans in kernels/ are compared with.
/// logits: float32 [T, E]; strength: float32 [T], at least 0, times which the bonus counts at the token: at 0 it routes
/// by z alone, in all forms (a prompt token, which is served through the same cache); null: 1 everywhere; run_begin,
/// run_end: int64 [num_runs], token range of each sequence; selected: int64 [T, K], by falling score, ties to the lower
/// index, overwritten inside the runs. Returns what the cache saw, prompt tokens included. E is at most 65,536.
SimulationCounts route_with_residency(const ResidencyShape& shape, const float* logits, const float* strength,
                                      const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                                      std::int64_t* selected);

}  // namespace hestia
