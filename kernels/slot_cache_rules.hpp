#pragma once

#include <cstdint>

#include "hestia/kernels/slot_cache.hpp"

namespace hestia {

/// Where a load goes: its wave, and its place among the slots that a wave can write (the targets of the `kept` misses,
/// then the scratch slots).
struct SlotPlace {
  std::int32_t wave = 0;
  std::int32_t place = 0;
};

/// The place of load `index` in the list: `passing` misses that the policy drops again, then `kept` ones, cut into
/// waves of `kept` + `scratch`. A kept one goes to its own target; the passing ones of its wave take the places after
/// the targets that are filled for good.
[[nodiscard]] HESTIA_HOST_DEVICE inline SlotPlace slot_place(std::int32_t index, std::int32_t passing,
                                                             std::int32_t kept, std::int32_t scratch) {
  const std::int32_t size = kept + scratch;
  const std::int32_t wave = index / size;
  if (index >= passing) {
    return {wave + 1, index - passing};
  }
  const std::int32_t of_kept = (wave + 1) * size - passing;
  const std::int32_t filled = of_kept < 0 ? 0 : (of_kept < kept ? of_kept : kept);
  return {wave + 1, filled + index - wave * size};
}

/// Throws std::invalid_argument when a step of these sizes cannot be served (slot_cache.cpp).
void check_slot_cache_step(const SlotCacheShape& shape, std::int64_t layer, std::int64_t rows, std::int64_t top_k);

}  // namespace hestia
