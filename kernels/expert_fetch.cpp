#include "hestia/kernels/expert_fetch.hpp"

#include <algorithm>
#include <cstring>

#include "expert_fetch_checks.hpp"

namespace hestia {

void expert_fetch_cpu(const ExpertFetchShape& shape, const SlotCacheAnswer& answer, std::int64_t layer,
                      std::int32_t wave, const std::uint8_t* store, std::uint8_t* slots) {
  check_expert_fetch(shape, layer, wave);
  const std::int32_t first = (wave - 1) * answer.step->wave_size;
  const std::int32_t last = std::min(first + answer.step->wave_size, answer.step->loads);
  for (std::int32_t i = first; i < last; ++i) {
    const SlotCacheLoad& load = answer.loads[i];
    std::memcpy(slots + static_cast<std::size_t>(load.slot) * shape.blob_bytes,
                store + static_cast<std::size_t>(layer * shape.num_experts + load.expert) * shape.blob_bytes,
                shape.blob_bytes);
  }
}

}  // namespace hestia
