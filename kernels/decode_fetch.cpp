#include "hestia/kernels/decode_fetch.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "decode_checks.hpp"

namespace hestia {

void check_decode_fetch(std::int64_t num_tokens, std::int64_t top_k, const DecodeFetch& fetch) {
  if (num_tokens != 1) {
    throw std::invalid_argument("decode fetch: takes one token, got " + std::to_string(num_tokens));
  }
  check_slot_cache(fetch.cache);
  if (fetch.cache.policy == CachePolicyKind::kStatic || fetch.cache.slots < std::min(top_k, fetch.cache.num_experts)) {
    throw std::invalid_argument(
        "decode fetch: every miss must find a slot; it takes no static cache and at least as many slots as a token has "
        "experts, got " +
        std::to_string(fetch.cache.slots) + " for " + std::to_string(top_k));
  }
  if (fetch.layer < 0 || fetch.layer >= fetch.cache.num_layers) {
    throw std::invalid_argument("decode fetch: layer must be below " + std::to_string(fetch.cache.num_layers) +
                                ", got " + std::to_string(fetch.layer));
  }
  if (fetch.request != nullptr && fetch.blob.bytes == 0) {
    throw std::invalid_argument("decode fetch: asking a host thread needs the blob's layout, got none");
  }
  if (fetch.request != nullptr && fetch.prefetch != nullptr && fetch.staging == nullptr) {
    throw std::invalid_argument("decode fetch: what was guessed comes through a staging place, got none");
  }
}

std::size_t fetch_own_bytes(const ExpertBlob& blob) {
  constexpr std::size_t kChunk = std::size_t{16} << 10;  // what a block copies at once
  constexpr std::size_t kMost = std::size_t{1} << 20;
  return std::min(kMost, blob.down) / kChunk * kChunk;
}

void decode_fetch_gate_up_cpu(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                              void* pool, std::uint16_t* h, float* y) {
  check_decode_fetch(shape.num_tokens, shape.top_k, fetch);
  slot_cache_serve_cpu(fetch.cache, fetch.state, fetch.layer, fetch.selected, 1, shape.top_k, fetch.answer);
  const ExpertStoreShape store{fetch.cache.num_layers, fetch.cache.num_experts, expert_blob(shape).bytes};
  if (fetch.prefetch != nullptr) {
    PrefetchState::Guess& guess = fetch.prefetch->guesses[fetch.layer % 2];
    const SlotCacheLoad* const loads = fetch.answer.loads;
    fetch.prefetch->counts.right += std::count_if(loads, loads + fetch.answer.step->loads, [&](const auto& load) {
      return guess.expert == static_cast<std::uint32_t>(load.expert) + 1;
    });
    guess.expert = 0;
  }
  if (fetch.answer.step->loads > 0) {
    expert_fetch_cpu(store, fetch.store, fetch.layer, fetch.answer.step, fetch.answer.loads, 1, pool);
  }
  decode_gate_up_cpu(shape, x, fetch.answer.slots, pool, h);
  if (y != nullptr && std::any_of(fetch.hit_slots, fetch.hit_slots + shape.top_k, [](auto slot) { return slot < 0; })) {
    decode_down_cpu(shape, h, fetch.hit_slots, pool, y);
  }
}

}  // namespace hestia
