#include "hestia/kernels/expert_fetch.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "decode_checks.hpp"

namespace hestia {

void check_expert_fetch(const ExpertStoreShape& shape, const void* store, std::int64_t layer, std::int64_t wave,
                        const void* slots) {
  constexpr const char* kName = "expert fetch";
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  check_decode_range(kName, "the number of layers", shape.num_layers, kMost);
  check_decode_range(kName, "the number of experts", shape.num_experts, kSlotCacheMaxExperts);
  check_decode_multiple(kName, "the bytes of an expert", static_cast<std::int64_t>(shape.blob_bytes), 16);
  if (layer < 0 || layer >= shape.num_layers) {
    throw std::invalid_argument(std::string(kName) + ": layer must be below " + std::to_string(shape.num_layers) +
                                ", got " + std::to_string(layer));
  }
  check_decode_range(kName, "the wave", wave, kMost);
  for (const void* memory : {store, slots}) {
    if (reinterpret_cast<std::uintptr_t>(memory) % 16 != 0) {
      throw std::invalid_argument(std::string(kName) + ": store and slots must be aligned to 16 bytes, got an address" +
                                  " that ends in " + std::to_string(reinterpret_cast<std::uintptr_t>(memory) % 16));
    }
  }
}

void expert_fetch_cpu(const ExpertStoreShape& shape, const void* store, std::int64_t layer, const SlotCacheStep* step,
                      const SlotCacheLoad* loads, std::int64_t wave, void* slots) {
  check_expert_fetch(shape, store, layer, wave, slots);
  const auto* const from = static_cast<const unsigned char*>(store);
  auto* const to = static_cast<unsigned char*>(slots);
  const std::int64_t end = std::min<std::int64_t>(step->loads, wave * step->wave_size);
  for (std::int64_t i = (wave - 1) * step->wave_size; i < end; ++i) {
    const auto blob = static_cast<std::size_t>(layer * shape.num_experts + loads[i].expert);
    std::memcpy(to + static_cast<std::size_t>(loads[i].slot) * shape.blob_bytes, from + blob * shape.blob_bytes,
                shape.blob_bytes);
  }
}

}  // namespace hestia
