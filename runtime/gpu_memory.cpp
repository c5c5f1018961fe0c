#include "gpu_memory.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "hestia/core/progress.hpp"

namespace hestia {
namespace {

std::string shown(std::int64_t bytes) {
  return format_bytes(static_cast<double>(bytes));
}

}  // namespace

DecoderMemory decoder_memory(const Architecture& architecture, const ExpertStore& store, std::int64_t rows,
                             std::int64_t capacity, const std::optional<SlotCacheOptions>& cache) {
  DecoderMemory memory;
  memory.slot_bytes = static_cast<std::int64_t>(store.layout().bytes);
  const auto layers = static_cast<std::int64_t>(architecture.moe_layers().size());
  const std::int64_t layer_bytes = architecture.num_experts * memory.slot_bytes;
  memory.all_resident = !cache;
  memory.layers = cache && cache->slots.per_layer == 0 ? 0 : layers;
  if (cache) {
    const bool pool = cache->slots.per_layer == 0;
    const std::int64_t slots = pool ? cache->slots.pool : cache->slots.per_layer;
    memory.scratch_slots = may_pass_by(architecture, rows * architecture.top_k, *cache)
                               ? scratch_slots(architecture, rows * architecture.top_k)
                               : 0;
    const bool prefetches = cache->prefetch != PrefetchKind::kOff && rows == 1 && !pool &&
                            cache->policy != CachePolicyKind::kStatic &&
                            slots >= std::min(architecture.top_k, architecture.num_experts) &&
                            (cache->fetch == FetchPath::kAuto || cache->fetch == FetchPath::kCopies);
    memory.scratch_slots += prefetches ? 2 : 0;
    memory.slots = slots * (pool ? 1 : layers) + memory.scratch_slots;
    memory.prompt_bytes = 2 * layer_bytes;
  } else {
    memory.slots = layers * architecture.num_experts;
  }
  if (store.format() != ExpertFormat::kBfloat16) {
    memory.prompt_bytes +=
        architecture.num_experts * static_cast<std::int64_t>(expert_blob_layout(architecture, torch::kBFloat16).bytes);
  }
  const bool latent = architecture.key_value_rank > 0;
  const std::int64_t heads = latent ? architecture.num_attention_heads : architecture.num_key_value_heads;
  const std::int64_t width = architecture.head_dim + (latent ? architecture.value_head_dim : architecture.head_dim);
  memory.key_value_bytes = architecture.num_layers * rows * capacity * heads * width *
                           static_cast<std::int64_t>(torch::elementSize(store.layout().dtype));
  return memory;
}

std::string gpu_memory_refusal(const DecoderMemory& memory, std::int64_t free_bytes) {
  if (memory.bytes() <= free_bytes) {
    return "";
  }
  std::string text = fmt::format(
      "the GPU has too little memory: {} experts of {} take {}, keys and values {}, layers that the prompt passes "
      "through {}, {} in all, got {} free",
      memory.slots, shown(memory.slot_bytes), shown(memory.slots * memory.slot_bytes), shown(memory.key_value_bytes),
      shown(memory.prompt_bytes), shown(memory.bytes()), shown(free_bytes));
  if (memory.all_resident) {
    return text + "; keep most experts in host memory with --expert-slots memory:BYTES, or decode fewer tokens or rows";
  }
  const std::int64_t left = free_bytes - memory.key_value_bytes - memory.prompt_bytes;
  const std::int64_t fit = std::max<std::int64_t>(0, left / memory.slot_bytes - memory.scratch_slots);
  if (memory.layers > 0 && fit >= memory.layers) {
    return text +
           fmt::format("; {} slots per layer would fit: --expert-slots {}", fit / memory.layers, fit / memory.layers);
  }
  if (fit > 0) {
    return text + fmt::format("; {} slots in one pool would fit: --expert-slots total:{}", fit, fit);
  }
  return text + "; no slot would fit: decode fewer tokens or rows, or take a smaller expert format";
}

}  // namespace hestia
