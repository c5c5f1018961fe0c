#pragma once

#include <cstdint>
#include <string_view>

#include "hestia/core/host_device.hpp"

namespace hestia {

/// Derives the seed of one purpose ("weights", "data order", ...) from the run's seed: one generator per purpose.
/// FNV-1a over the name, mixed with `seed` by splitmix64.
[[nodiscard]] std::uint64_t derive_seed(std::uint64_t seed, std::string_view purpose);

/// splitmix64 (Steele et al. 2014): a small, portable generator whose sequence is the same on every platform.
class SplitMix64 {
 public:
  HESTIA_HOST_DEVICE explicit SplitMix64(std::uint64_t seed) : state_(seed) {}
  /// Next 64 random bits.
  HESTIA_HOST_DEVICE std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  /// Uniform integer in [0, bound), bound >= 1, without modulo bias (rejection).
  HESTIA_HOST_DEVICE std::uint64_t below(std::uint64_t bound) {
    const std::uint64_t limit = UINT64_MAX - UINT64_MAX % bound;
    std::uint64_t value = next();
    while (value >= limit) {
      value = next();
    }
    return value % bound;
  }
  /// Uniform double in [0, 1) with 53 bits.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }
  /// The whole state, for checkpoints.
  [[nodiscard]] HESTIA_HOST_DEVICE std::uint64_t state() const { return state_; }

 private:
  std::uint64_t state_;
};

}  // namespace hestia
