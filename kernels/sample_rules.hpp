#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "hestia/core/host_device.hpp"
#include "hestia/core/random.hpp"
#include "hestia/kernels/decode_sample.hpp"
#include "hestia/routing/residency.hpp"

namespace hestia {

inline constexpr int kSampleIdBits = 19;
inline constexpr int kSampleHalvingBits = 20;  // a weight halves every 2^20 of distance
inline constexpr std::uint32_t kSampleFarthest = 41U << kSampleHalvingBits;
/// Distances below kSampleFarthest and ids: the bits of sample_key.
inline constexpr int kSampleKeyBits = 26 + kSampleIdBits;

/// Orders tokens for greedy choice: the higher is chosen.
[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint64_t greedy_key(float logit, std::uint32_t id) {
  const std::uint32_t ordered = static_cast<std::uint32_t>(ordered_logit(logit)) ^ 0x80000000U;
  return static_cast<std::uint64_t>(ordered) << 32 | (0xffffffffU - id);
}

[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint32_t greedy_id(std::uint64_t key) {
  return 0xffffffffU - static_cast<std::uint32_t>(key & 0xffffffffU);
}

/// log2(e) / temperature * 2^20, finite.
[[nodiscard]] inline float sample_factor(float temperature) {
  const double factor = 1.4426950408889634 / static_cast<double>(temperature) * (1 << kSampleHalvingBits);
  return static_cast<float>(std::min(factor, static_cast<double>(std::numeric_limits<float>::max())));
}

/// kSampleFarthest for all that have no weight.
[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint32_t sample_distance(float largest, float logit, float factor) {
  const float distance = (largest - logit) * factor;
  return distance < static_cast<float>(kSampleFarthest) ? static_cast<std::uint32_t>(distance) : kSampleFarthest;
}

/// floor(2^(40 - distance / 2^20)). Fused multiply-adds by name and nothing that a compiler may fuse, so that all
/// machines agree.
[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint64_t sample_weight(std::uint32_t distance) {
  if (distance >= kSampleFarthest) {
    return 0;
  }
  constexpr std::uint32_t kFraction = (1U << kSampleHalvingBits) - 1;
  // 2^-f = sqrt(1/2) exp(x), x = (1/2 - f) ln 2 within 0.35 of 0.
  const float x =
      fmaf(static_cast<float>(distance & kFraction), -0.6931471806F / (1 << kSampleHalvingBits), 0.34657359F);
  float sum = 1.0F / 5040.0F;
  sum = fmaf(sum, x, 1.0F / 720.0F);
  sum = fmaf(sum, x, 1.0F / 120.0F);
  sum = fmaf(sum, x, 1.0F / 24.0F);
  sum = fmaf(sum, x, 1.0F / 6.0F);
  sum = fmaf(sum, x, 0.5F);
  sum = fmaf(sum, x, 1.0F);
  sum = fmaf(sum, x, 1.0F);
  const float scaled = sum * (0.70710678F * 1099511627776.0F);
  return static_cast<std::uint64_t>(scaled) >> (distance >> kSampleHalvingBits);
}

/// Orders tokens for the nucleus: the lower is in it first.
[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint64_t sample_key(std::uint32_t distance, std::uint32_t id) {
  return static_cast<std::uint64_t>(distance) << kSampleIdBits | id;
}

/// The sum that the nucleus has to reach, from 1 to `total`.
[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint64_t nucleus_target(float top_p, std::uint64_t total) {
  const double share = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  const auto target = static_cast<std::uint64_t>(share);  // total is below 2^60
  return target < 1 ? 1 : (target > total ? total : target);
}

[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint64_t sample_bits(std::uint64_t seed, std::int64_t step) {
  return SplitMix64(SplitMix64(seed).next() + static_cast<std::uint64_t>(step)).next();
}

/// floor(bits * sum / 2^64).
[[nodiscard]] HESTIA_HOST_DEVICE inline std::uint64_t sample_draw(std::uint64_t bits, std::uint64_t sum) {
  const std::uint64_t low = (bits & 0xffffffffU) * (sum & 0xffffffffU);
  const std::uint64_t cross = (bits >> 32) * (sum & 0xffffffffU) + (low >> 32);
  const std::uint64_t other = (bits & 0xffffffffU) * (sum >> 32) + (cross & 0xffffffffU);
  return (bits >> 32) * (sum >> 32) + (cross >> 32) + (other >> 32);
}

/// Throws std::invalid_argument when the shape is none that the kernels take (decode_sample.cpp).
void check_decode_sample(const DecodeSampleShape& shape);

}  // namespace hestia
