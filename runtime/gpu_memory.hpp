#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "hestia/architecture/architecture.hpp"
#include "hestia/runtime/slot_executor.hpp"

namespace hestia {

/// What a decoder takes of a GPU beside the weights that are there already, in bytes and experts.
struct DecoderMemory {
  std::int64_t slot_bytes = 0;       ///< Of one expert.
  std::int64_t slots = 0;            ///< In all, scratch slots included.
  std::int64_t scratch_slots = 0;    ///< Of these; two of them for guesses, where these are prefetched.
  std::int64_t layers = 0;           ///< MoE layers, each with as many slots; 0: one pool.
  bool all_resident = false;         ///< Every expert has a slot, and no cache is asked for.
  std::int64_t key_value_bytes = 0;  ///< Of all rows and tokens.
  std::int64_t prompt_bytes = 0;     ///< Of layers of experts that a prompt passes through.

  [[nodiscard]] std::int64_t bytes() const { return slots * slot_bytes + key_value_bytes + prompt_bytes; }
};

/// That of a decoder of up to `rows` sequences of `capacity` tokens out of `store`.
[[nodiscard]] DecoderMemory decoder_memory(const Architecture& architecture, const ExpertStore& store,
                                           std::int64_t rows, std::int64_t capacity,
                                           const std::optional<SlotCacheOptions>& cache);

/// Why `memory` does not fit into `free_bytes`: what takes how much, and how many slots would fit; empty when it does.
/// What the prompt's activations take comes on top and is not known before.
[[nodiscard]] std::string gpu_memory_refusal(const DecoderMemory& memory, std::int64_t free_bytes);

}  // namespace hestia
