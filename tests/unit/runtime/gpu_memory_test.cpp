#include "runtime/gpu_memory.hpp"

#include <catch2/catch.hpp>

#include "hestia/model/key_value_cache.hpp"
#include "tests/unit/model/model_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

constexpr std::int64_t kMiB = std::int64_t{1} << 20;

DecoderMemory some_memory() {
  DecoderMemory memory;
  memory.slot_bytes = 10 * kMiB;
  memory.scratch_slots = 4;
  memory.layers = 8;
  memory.slots = 8 * 16 + 4;
  memory.key_value_bytes = 100 * kMiB;
  memory.prompt_bytes = 60 * kMiB;
  return memory;
}

TEST_CASE("what does not fit a GPU is told in one message with the slots that would") {
  const DecoderMemory memory = some_memory();
  CHECK(memory.bytes() == 1480 * kMiB);
  CHECK(gpu_memory_refusal(memory, 1480 * kMiB).empty());
  // 1479 - 160 are 131 slots, 127 without scratch: 15 for each of 8 layers.
  const std::string refusal = gpu_memory_refusal(memory, 1480 * kMiB - 1);
  CHECK_THAT(refusal, Catch::Contains("132 experts of 10.0 MiB") && Catch::Contains("keys and values 100.0 MiB") &&
                          Catch::Contains("passes through 60.0 MiB") &&
                          Catch::Contains("15 slots per layer would fit: --expert-slots 15"));
  for (std::int64_t free = 0; free < memory.bytes(); free += 7 * kMiB) {
    // What is said to fit does, and one more does not.
    const std::string text = gpu_memory_refusal(memory, free);
    DecoderMemory smaller = memory;
    const auto number_behind = [&](const std::string& words) {
      const std::size_t at = text.find(words);
      return at == std::string::npos ? std::int64_t{0} : std::stoll(text.substr(at + words.size()));
    };
    const std::int64_t pool = number_behind("--expert-slots total:");
    const std::int64_t per_layer = pool > 0 ? 0 : number_behind("--expert-slots ");
    if (per_layer > 0) {
      smaller.slots = per_layer * 8 + 4;
      CHECK(gpu_memory_refusal(smaller, free).empty());
      smaller.slots += 8;
    } else {
      CHECK(pool < 8);
      smaller.slots = pool + 4;
      CHECK((pool == 0 || gpu_memory_refusal(smaller, free).empty()));
      smaller.slots += 1;
    }
    CHECK_FALSE(gpu_memory_refusal(smaller, free).empty());
  }
  DecoderMemory resident = memory;
  resident.all_resident = true;
  CHECK_THAT(gpu_memory_refusal(resident, kMiB), Catch::Contains("--expert-slots memory:"));
}

TEST_CASE("a decoder's memory is what it takes") {
  constexpr std::int64_t kCapacity = 19;
  for (const Architecture& a : {small_architecture(), deepseek_architecture(), gpt_oss_architecture()}) {
    for (const std::int64_t rows : {1, 3}) {
      CAPTURE(a.model_type, rows);
      const OffloadedModel offloaded = create_offloaded(a, torch::kFloat32, torch::kCPU, 5);
      SlotCacheOptions cache;
      cache.slots.per_layer = 2;
      const DecoderMemory memory = decoder_memory(a, offloaded.store, rows, kCapacity, cache);
      KeyValueCache tokens(kCapacity);
      TokenBatch batch;
      batch.tokens_BS = torch::ones({rows, 3}, torch::kInt64);
      batch.positions_BS = torch::arange(3).unsqueeze(0).expand_as(batch.tokens_BS);
      batch.sequence_ids_BS = torch::zeros_like(batch.tokens_BS);
      const torch::NoGradGuard no_grad;
      MoeModel model = offloaded.model;
      static_cast<void>(model->forward(batch, tokens));
      std::int64_t bytes = 0;
      for (std::int64_t layer = 0; layer < a.num_layers; ++layer) {
        const auto [keys, values] = tokens.memory(layer);
        bytes += static_cast<std::int64_t>(keys.nbytes() + values.nbytes());
      }
      CHECK(memory.key_value_bytes == bytes);
      const SlotExecutor slots(a, offloaded.store, torch::kCPU, rows, a.top_k, cache);
      CHECK(memory.slots * memory.slot_bytes == slots.slot_bytes());
      CHECK(memory.prompt_bytes == 2 * a.num_experts * memory.slot_bytes);
      const DecoderMemory resident = decoder_memory(a, offloaded.store, rows, kCapacity, std::nullopt);
      CHECK(resident.slots * resident.slot_bytes == offloaded.store.bytes());
      CHECK(resident.prompt_bytes == 0);
      // Guesses have a place each for two layers, where they serve.
      cache.slots.per_layer = a.top_k;
      const std::int64_t without = decoder_memory(a, offloaded.store, rows, kCapacity, cache).slots;
      cache.prefetch = PrefetchKind::kNextGate;
      CHECK(decoder_memory(a, offloaded.store, rows, kCapacity, cache).slots == without + (rows == 1 ? 2 : 0));
      cache.fetch = FetchPath::kTogether;
      CHECK(decoder_memory(a, offloaded.store, rows, kCapacity, cache).slots == without);
      cache.fetch = FetchPath::kCopies;
      cache.slots.per_layer = a.top_k - 1;
      const DecoderMemory few = decoder_memory(a, offloaded.store, rows, kCapacity, cache);
      cache.prefetch = PrefetchKind::kOff;
      CHECK(few.slots == decoder_memory(a, offloaded.store, rows, kCapacity, cache).slots);
    }
  }
}

}  // namespace
