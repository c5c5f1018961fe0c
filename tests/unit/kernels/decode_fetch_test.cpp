#include "hestia/kernels/decode_fetch.hpp"

#include <algorithm>
#include <array>
#include <memory>

#include "decode_support.hpp"
#include "hestia/kernels/decode_router.hpp"
#include "hestia/kernels/expert_fetch.hpp"
#include "hestia/kernels/expert_formats.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr float kUntouched = -7.0F;

struct Case {
  DecodeExpertsShape shape;
  SlotCacheShape cache;
  Bytes store;
};

Case random_case(SplitMix64& random, const DecodeExpertsShape& shape, const SlotCacheShape& cache) {
  Case c{shape, cache, {}};
  const auto size = static_cast<std::size_t>(shape.hidden_size * shape.expert_hidden_size);
  const std::size_t bytes = expert_blob(shape).bytes;
  c.store.resize(static_cast<std::size_t>(cache.num_layers * cache.num_experts) * bytes);
  for (std::size_t at = 0; at < c.store.size(); at += bytes) {
    const Bits gate = random_bits(random, size, 0.2);
    const Bits up = random_bits(random, size, 0.2);
    const Bits down = random_bits(random, size, 0.2);
    quantise_expert(shape, gate.data(), up.data(), down.data(), c.store.data() + at);
  }
  return c;
}

/// An expert that was guessed for a layer, -1: none, and what a host thread brought of it.
struct Guess {
  std::int32_t expert = -1;
  std::uint32_t pieces = 0;
  bool unheard = false;  // it has not heard of the guess
};

/// A cache with its slots and what a step writes, on one side or the other.
class Side {
 public:
  Side(const Case& c, const Bytes& slots, bool gpu)
      : case_(c),
        gpu_(gpu),
        memory_(Bytes(slot_cache_bytes(c.cache)), gpu),
        state_(slot_cache_state(c.cache, memory_.data())),
        step_({SlotCacheStep()}, gpu),
        loads_(std::vector<SlotCacheLoad>(top_k()), gpu),
        slot_of_(std::vector<std::int32_t>(top_k(), -9), gpu),
        wave_of_(std::vector<std::int32_t>(top_k(), -9), gpu),
        wave_slots_(std::vector<std::int32_t>(2 * top_k(), -9), gpu),
        pool_(slots, gpu),
        store_(c.store, gpu),
        h_(Bits(top_k() * static_cast<std::size_t>(c.shape.expert_hidden_size), 0x7fc0), gpu),
        y_(std::vector<float>(top_k() * static_cast<std::size_t>(c.shape.hidden_size), kUntouched), gpu),
        out_(Bits(static_cast<std::size_t>(c.shape.hidden_size), 0x7fc0), gpu),
        workspace_(Bytes(gpu ? decode_fetch_workspace() : 1), gpu),
        prefetch_({PrefetchState()}, gpu) {
    const std::vector<std::uint64_t> seeds(static_cast<std::size_t>(c.cache.num_layers / c.cache.layers_per_group), 5);
    Guarded<std::uint64_t> seed_memory(seeds, gpu);
    if (gpu) {
      slot_cache_reset_cuda(c.cache, state_, nullptr, 0, seed_memory.data(), nullptr);
      require_cuda(cudaDeviceSynchronize());
    } else {
      slot_cache_reset_cpu(c.cache, state_, nullptr, 0, seed_memory.data());
    }
  }

  /// Up to the mix of the experts: fetching and gate and up in one, or one kernel after the other. with_down: down of
  /// the hits comes before that of the misses. from_router: on the GPU the router chooses `selected` and serves what is
  /// missing.
  void run(const std::vector<std::int32_t>& selected, std::int64_t layer, const Bits& x,
           const std::vector<float>& mixing, bool together, bool with_down, bool from_router) {
    Guarded<std::int32_t> ids(selected, gpu_);
    Guarded<float> weights(mixing, gpu_);
    Guarded<std::uint16_t> input(x, gpu_);
    const std::vector<std::int32_t> table = slot_table();
    std::vector<std::int32_t> hits;
    for (const std::int32_t expert : selected) {
      hits.push_back(table[static_cast<std::size_t>(layer * case_.cache.num_experts + expert)]);
    }
    Guarded<std::int32_t> hit_slots(hits, gpu_);
    SlotCacheAnswer answer{step_.data(), loads_.data(), slot_of_.data(), wave_of_.data(), wave_slots_.data()};
    const ExpertStoreShape from{case_.cache.num_layers, case_.cache.num_experts, expert_blob(case_.shape).bytes};
    const DecodeExpertsShape& shape = case_.shape;
    if (together) {
      answer.wave_slots = nullptr;
      float* const y = with_down ? y_.data() : nullptr;
      const DecodeFetch fetch{.cache = case_.cache,
                              .state = state_,
                              .layer = layer,
                              .selected = ids.data(),
                              .hit_slots = hit_slots.data(),
                              .store = store_.data(),
                              .answer = answer,
                              .workspace = workspace_.data(),
                              .request = host_ ? host_->request() : nullptr,
                              .blob = expert_blob(shape),
                              .prefetch = prefetch_.data(),
                              .staging = staging_ ? staging_->data() : nullptr,
                              .ahead = {{store_.data(), case_.store.size()}, {input.data(), x.size() * 2}}};
      if (gpu_) {
        if (from_router) {
          route(selected, fetch, ids.data(), hit_slots.data());
        }
        decode_fetch_gate_up_cuda(shape, fetch, input.data(), pool_.data(), h_.data(), y, nullptr);
        decode_down_combine_cuda(shape, h_.data(), slot_of_.data(), pool_.data(), weights.data(), y, nullptr,
                                 out_.data(), nullptr, hit_slots.data());
        require_cuda(cudaDeviceSynchronize());
      } else {
        decode_fetch_gate_up_cpu(shape, fetch, input.data(), pool_.data(), h_.data(), y);
        decode_down_combine_cpu(shape, h_.data(), slot_of_.data(), pool_.data(), weights.data(), nullptr, nullptr,
                                out_.data());
      }
      return;
    }
    with_down = with_down && std::any_of(hits.begin(), hits.end(), [](auto slot) { return slot < 0; });
    if (gpu_) {
      slot_cache_serve_cuda(case_.cache, state_, layer, ids.data(), 1, shape.top_k, answer, nullptr);
      expert_fetch_cuda(from, store_.data(), layer, step_.data(), loads_.data(), 1, pool_.data(), kExpertFetchBlocks,
                        nullptr);
      decode_gate_up_cuda(shape, input.data(), slot_of_.data(), pool_.data(), h_.data(), nullptr);
      if (with_down) {
        decode_down_cuda(shape, h_.data(), hit_slots.data(), pool_.data(), y_.data(), nullptr);
      }
      decode_down_combine_cuda(shape, h_.data(), slot_of_.data(), pool_.data(), weights.data(), nullptr, nullptr,
                               out_.data(), nullptr);
      require_cuda(cudaDeviceSynchronize());
    } else {
      slot_cache_serve_cpu(case_.cache, state_, layer, ids.data(), 1, shape.top_k, answer);
      expert_fetch_cpu(from, store_.data(), layer, step_.data(), loads_.data(), 1, pool_.data());
      decode_gate_up_cpu(shape, input.data(), slot_of_.data(), pool_.data(), h_.data());
      if (with_down) {
        decode_down_cpu(shape, h_.data(), hit_slots.data(), pool_.data(), y_.data());
      }
      decode_down_combine_cpu(shape, h_.data(), slot_of_.data(), pool_.data(), weights.data(), nullptr, nullptr,
                              out_.data());
    }
  }

  /// From now on a host thread copies what the kernel does not copy itself.
  void copy_by_host() {
    host_ = std::make_unique<CopyingHost>(case_.store.data(), expert_blob(case_.shape).bytes, pool_.data(),
                                          decode_fetch_flags(workspace_.data()), prefetch_.data()->landed);
  }
  [[nodiscard]] const CopyingHost& host() const { return *host_; }

  /// What a router and a host thread leave before the step of `layer`: behind what was brought, the place holds
  /// anything.
  void guessed(SplitMix64& random, std::int64_t layer, const Guess& guess) {
    PrefetchState state = prefetch_.values().front();
    state.tag = state.tag % kPrefetchTags + 1;
    state.guesses[layer % 2] = {static_cast<std::uint32_t>(guess.expert) + 1, state.tag};
    prefetch_.set({state});
    const std::size_t bytes = expert_blob(case_.shape).bytes;
    Bytes place(bytes);
    std::generate(place.begin(), place.end(), [&] { return static_cast<std::uint8_t>(random.below(256)); });
    if (guess.expert >= 0) {
      const std::size_t blob = static_cast<std::size_t>(layer * case_.cache.num_experts + guess.expert) * bytes;
      const std::size_t landed = guess.unheard ? 0 : std::min(bytes, guess.pieces * kPrefetchPiece);
      std::copy_n(case_.store.begin() + static_cast<std::ptrdiff_t>(blob), landed, place.begin());
    }
    if (gpu_) {
      staging_ = std::make_unique<Guarded<std::uint8_t>>(place, true);
      host_->brought(guess.unheard ? state.tag - 1 : state.tag, static_cast<std::size_t>(layer % 2), guess.pieces);
    }
  }
  [[nodiscard]] PrefetchState prefetched() const { return prefetch_.values().front(); }

  /// The router on the GPU, forced to `selected`; its serving ends before this returns.
  void route(const std::vector<std::int32_t>& selected, const DecodeFetch& fetch, std::int32_t* ids,
             std::int32_t* hit_slots) {
    const auto hidden = static_cast<std::size_t>(case_.shape.hidden_size);
    const auto experts = static_cast<std::size_t>(case_.cache.num_experts);
    SplitMix64 random(71);
    Guarded<std::uint16_t> row(random_bits(random, hidden, 1.0), true);
    Guarded<std::uint16_t> norm(random_bits(random, hidden, 1.0), true);
    std::vector<float> values(experts * hidden);
    std::generate(values.begin(), values.end(), [&] { return static_cast<float>(random.uniform()) - 0.5F; });
    Guarded<float> router(values, true);
    Guarded<std::int64_t> forced(std::vector<std::int64_t>(selected.begin(), selected.end()), true);
    Guarded<std::int64_t> step({0}, true);
    Guarded<std::uint16_t> normal(Bits(hidden), true);
    Guarded<float> logits(std::vector<float>(experts), true);
    Guarded<float> probabilities(std::vector<float>(experts), true);
    Guarded<float> weights(std::vector<float>(top_k()), true);
    const DecodeRouterShape shape{.num_tokens = 1,
                                  .hidden_size = case_.shape.hidden_size,
                                  .num_experts = case_.cache.num_experts,
                                  .top_k = case_.shape.top_k};
    Guarded<std::uint8_t> workspace(Bytes(decode_router_workspace(shape)), true);
    require_cuda(cudaMemset(ids, 0xff, selected.size() * sizeof(std::int32_t)));
    require_cuda(cudaMemset(hit_slots, 0x7f, selected.size() * sizeof(std::int32_t)));
    const std::int32_t* const slot_of = state_.slot_of + fetch.layer * case_.cache.num_experts;
    decode_router_cuda(shape,
                       {.hidden = row.data(),
                        .norm_weight = norm.data(),
                        .router = router.data(),
                        .slot_of = slot_of,
                        .forced = forced.data(),
                        .num_forced = 1,
                        .step = step.data(),
                        .fetch = &fetch},
                       {normal.data(), logits.data(), probabilities.data(), ids, weights.data(), hit_slots},
                       workspace.data(), nullptr);
    require_cuda(cudaDeviceSynchronize());
    served_early_ += workspace_.values() == Bytes(decode_fetch_workspace()) ? 0 : 1;
  }
  /// Steps that the router has served.
  [[nodiscard]] int served_early() const { return served_early_; }

  [[nodiscard]] std::vector<std::int32_t> slot_table() const {
    const auto all = static_cast<std::size_t>(case_.cache.num_layers * case_.cache.num_experts);
    std::vector<std::int32_t> table(all);
    if (gpu_) {
      require_cuda(cudaMemcpy(table.data(), state_.slot_of, all * sizeof(std::int32_t), cudaMemcpyDeviceToHost));
    } else {
      std::copy_n(state_.slot_of, all, table.begin());
    }
    return table;
  }

  void require_equal(const Side& other) const {
    REQUIRE(h_.values() == other.h_.values());
    REQUIRE(y_.values() == other.y_.values());
    REQUIRE(out_.values() == other.out_.values());
    REQUIRE(pool_.values() == other.pool_.values());
    REQUIRE(memory_.values() == other.memory_.values());
    REQUIRE(slot_of_.values() == other.slot_of_.values());
    REQUIRE(wave_of_.values() == other.wave_of_.values());
    REQUIRE(guards_whole());
    const Bytes left = workspace_.values();
    REQUIRE(std::all_of(left.begin(), left.end(), [](auto byte) { return byte == 0; }));
  }
  [[nodiscard]] bool guards_whole() const {
    return h_.guards_whole() && y_.guards_whole() && out_.guards_whole() && pool_.guards_whole() &&
           memory_.guards_whole() && prefetch_.guards_whole() && slot_of_.guards_whole() && step_.guards_whole() &&
           loads_.guards_whole() && wave_of_.guards_whole() && workspace_.guards_whole();
  }
  [[nodiscard]] std::int32_t loads() const { return step_.values().front().loads; }
  [[nodiscard]] std::vector<SlotCacheLoad> loaded() const {
    std::vector<SlotCacheLoad> all = loads_.values();
    all.resize(static_cast<std::size_t>(loads()));
    return all;
  }

 private:
  [[nodiscard]] std::size_t top_k() const { return static_cast<std::size_t>(case_.shape.top_k); }

  const Case& case_;
  bool gpu_;
  Guarded<std::uint8_t> memory_;
  SlotCacheState state_;
  Guarded<SlotCacheStep> step_;
  Guarded<SlotCacheLoad> loads_;
  Guarded<std::int32_t> slot_of_;
  Guarded<std::int32_t> wave_of_;
  Guarded<std::int32_t> wave_slots_;
  Guarded<std::uint8_t> pool_;
  Guarded<std::uint8_t> store_;
  Guarded<std::uint16_t> h_;
  Guarded<float> y_;
  Guarded<std::uint16_t> out_;
  Guarded<std::uint8_t> workspace_;
  Guarded<PrefetchState> prefetch_;
  std::unique_ptr<Guarded<std::uint8_t>> staging_;
  std::unique_ptr<CopyingHost> host_;
  int served_early_ = 0;
};

/// Steps whose experts may stand in them twice, with some of the step before.
void check_steps(SplitMix64& random, const DecodeExpertsShape& shape, const SlotCacheShape& cache, bool gpu,
                 int num_steps) {
  CAPTURE(shape.hidden_size, shape.expert_hidden_size, shape.top_k, expert_format_name(shape.format), cache.num_layers,
          cache.num_experts, cache.slots, cache.layers_per_group, static_cast<int>(cache.policy), cache.stress);
  const Case c = random_case(random, shape, cache);
  Bytes slots(static_cast<std::size_t>(slot_cache_num_slots(cache)) * expert_blob(shape).bytes);
  std::generate(slots.begin(), slots.end(), [&] { return static_cast<std::uint8_t>(random.below(256)); });
  Side together(c, slots, gpu);
  Side apart(c, slots, gpu);
  std::vector<std::int32_t> selected(static_cast<std::size_t>(shape.top_k), 0);
  int all_hits = 0;
  int with_misses = 0;
  int from_router = 0;  // of those with misses
  for (int step = 0; step < num_steps; ++step) {
    for (std::int32_t& expert : selected) {
      if (random.below(4) == 0) {
        expert = static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(cache.num_experts)));
      }
    }
    const auto layer = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(cache.num_layers)));
    const Bits x = random_bits(random, static_cast<std::size_t>(shape.hidden_size), 1.0);
    CAPTURE(step, layer, selected);
    std::vector<float> mixing(selected.size());
    std::generate(mixing.begin(), mixing.end(), [&] { return static_cast<float>(random.uniform()); });
    const bool with_down = random.below(4) != 0;
    const bool routed = gpu && random.below(2) != 0;
    together.run(selected, layer, x, mixing, true, with_down, routed);
    apart.run(selected, layer, x, mixing, false, with_down, false);
    together.require_equal(apart);
    from_router += routed && apart.loads() > 0 ? 1 : 0;
    (apart.loads() == 0 ? all_hits : with_misses) += 1;
  }
  CHECK(with_misses > 0);
  CHECK(together.served_early() == from_router);
  CHECK((num_steps < 12 || cache.stress || all_hits > 0));
}

/// A host thread copies, and a guess may have landed in part, in whole or not, or be wrong: the same slots and bits.
void check_guesses(SplitMix64& random, const DecodeExpertsShape& shape, const SlotCacheShape& cache, bool gpu,
                   int num_steps) {
  CAPTURE(shape.hidden_size, shape.expert_hidden_size, shape.top_k, expert_format_name(shape.format), cache.num_experts,
          cache.slots);
  const Case c = random_case(random, shape, cache);
  const std::size_t bytes = expert_blob(shape).bytes;
  Bytes slots(static_cast<std::size_t>(slot_cache_num_slots(cache)) * bytes);
  std::generate(slots.begin(), slots.end(), [&] { return static_cast<std::uint8_t>(random.below(256)); });
  Side together(c, slots, gpu);
  Side apart(c, slots, gpu);
  if (gpu) {
    together.copy_by_host();
  }
  const std::size_t own = fetch_own_bytes(expert_blob(shape));
  const auto pieces = static_cast<std::uint64_t>((bytes + kPrefetchPiece - 1) / kPrefetchPiece);
  std::int64_t rights = 0;
  std::size_t copied = 0;
  std::vector<std::int32_t> selected(static_cast<std::size_t>(shape.top_k));
  for (int step = 0; step < num_steps; ++step) {
    for (std::int32_t& expert : selected) {
      if (step == 0 || random.below(3) == 0) {
        expert = static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(cache.num_experts)));
      }
    }
    const auto layer = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(cache.num_layers)));
    const Bits x = random_bits(random, static_cast<std::size_t>(shape.hidden_size), 1.0);
    const std::vector<float> mixing(selected.size(), 0.25F);
    Guess guess{.pieces = static_cast<std::uint32_t>(random.below(pieces + 1)), .unheard = random.below(5) == 0};
    if (random.below(8) > 0) {
      guess.expert = random.below(3) > 0
                         ? selected[random.below(selected.size())]
                         : static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(cache.num_experts)));
    }
    CAPTURE(step, layer, selected, guess.expert, guess.pieces, guess.unheard);
    together.guessed(random, layer, guess);
    apart.run(selected, layer, x, mixing, false, true, false);
    together.run(selected, layer, x, mixing, true, true, gpu && random.below(2) != 0);
    together.require_equal(apart);
    const std::vector<SlotCacheLoad> loads = apart.loaded();
    const auto found = std::find_if(loads.begin(), loads.end(), [&](auto load) { return load.expert == guess.expert; });
    const bool right = found != loads.end();
    const std::size_t landed = right && !guess.unheard ? std::min(bytes, guess.pieces * kPrefetchPiece) : 0;
    rights += right ? 1 : 0;
    const PrefetchState after = together.prefetched();
    CHECK(after.counts.right == rights);
    CHECK(after.guesses[layer % 2].expert == 0);
    CHECK(after.landed[layer % 2] == 0);
    for (auto load = loads.begin(); load != loads.end(); ++load) {
      const std::size_t end = load == loads.begin() ? bytes - own : bytes;
      copied += load == found ? end - std::min(end, landed) : end;
    }
    if (gpu) {
      CHECK(together.host().copied() == copied);
      CHECK_FALSE(together.host().failed());
    }
  }
  CHECK(rights > num_steps / 10);
}

void check_all_guesses(SplitMix64& random, bool gpu) {
  DecodeExpertsShape shape{.num_tokens = 1, .top_k = 4, .hidden_size = 72, .expert_hidden_size = 40};
  const SlotCacheShape cache{.num_layers = 2, .num_experts = 12, .slots = 5};
  check_guesses(random, shape, cache, gpu, 40);
  shape.format = ExpertFormat::kInt4;
  check_guesses(random, shape, cache, gpu, 40);
  // Blobs of several pieces, and more of them than the kernel copies itself.
  check_guesses(random, {.num_tokens = 1, .top_k = 3, .hidden_size = 520, .expert_hidden_size = 264},
                {.num_layers = 2, .num_experts = 7, .slots = 4}, gpu, 40);
  check_guesses(random, {.num_tokens = 1, .top_k = 3, .hidden_size = 1000, .expert_hidden_size = 840},
                {.num_layers = 2, .num_experts = 6, .slots = 3}, gpu, 25);
}

void check_all(SplitMix64& random, bool gpu) {
  DecodeExpertsShape shape{.num_tokens = 1, .top_k = 4, .hidden_size = 72, .expert_hidden_size = 40};
  SlotCacheShape cache{.num_layers = 2, .num_experts = 12, .slots = 6};
  for (const auto policy : {CachePolicyKind::kLru, CachePolicyKind::kLfu, CachePolicyKind::kGamma,
                            CachePolicyKind::kLifo, CachePolicyKind::kFifo, CachePolicyKind::kRandom}) {
    cache.policy = policy;
    check_steps(random, shape, cache, gpu, 30);
  }
  cache.policy = CachePolicyKind::kLru;
  for (const auto format : {ExpertFormat::kInt8, ExpertFormat::kInt4, ExpertFormat::kInt4Asymmetric}) {
    shape.format = format;
    check_steps(random, shape, cache, gpu, 20);
  }
  shape.format = ExpertFormat::kBfloat16;
  SlotCacheShape other = cache;
  other.stress = true;
  check_steps(random, shape, other, gpu, 12);
  other = cache;
  other.slots = 9;
  other.layers_per_group = 2;
  check_steps(random, shape, other, gpu, 20);
  other = {.num_layers = 3, .num_experts = 100, .slots = 250, .layers_per_group = 3};
  check_steps(random, shape, other, gpu, 11);  // seldom a hit
  // As many slots as experts of a token, one expert, as many as there can be.
  check_steps(random, shape, {.num_layers = 1, .num_experts = 9, .slots = 4}, gpu, 25);
  check_steps(random, {.num_tokens = 1, .top_k = 1, .hidden_size = 8, .expert_hidden_size = 8},
              {.num_layers = 1, .num_experts = 3, .slots = 1}, gpu, 25);
  check_steps(random, {.num_tokens = 1, .top_k = 32, .hidden_size = 16, .expert_hidden_size = 24},
              {.num_layers = 1, .num_experts = 64, .slots = 40}, gpu, 8);
  // Blobs of many chunks.
  check_steps(random, {.num_tokens = 1, .top_k = 3, .hidden_size = 520, .expert_hidden_size = 264},
              {.num_layers = 1, .num_experts = 7, .slots = 4}, gpu, 25);
}

}  // namespace

TEST_CASE("decode fetch: one call equals serving, fetching and computing one after the other") {
  SplitMix64 random(61);
  check_all(random, false);
}

TEST_CASE("decode fetch: on CUDA one kernel equals serving, fetching and computing one after the other", "[gpu]") {
  if (gpu_ready()) {
    SplitMix64 random(62);
    check_all(random, true);
  }
}

TEST_CASE("decode fetch: guesses are counted where they are right") {
  SplitMix64 random(63);
  check_all_guesses(random, false);
}

TEST_CASE("decode fetch: on CUDA what landed of a guess is moved, and a host thread brings the rest", "[gpu]") {
  if (gpu_ready()) {
    SplitMix64 random(64);
    check_all_guesses(random, true);
  }
}

TEST_CASE("decode fetch: what it does not take is refused by name") {
  const DecodeExpertsShape shape{.num_tokens = 1, .top_k = 4, .hidden_size = 8, .expert_hidden_size = 8};
  const SlotCacheShape cache{.num_layers = 2, .num_experts = 12, .slots = 6};
  const auto refused = [&](auto change, const std::string& text) {
    DecodeExpertsShape sizes = shape;
    DecodeFetch fetch;
    fetch.cache = cache;
    change(sizes, fetch);
    CHECK_THROWS_WITH(decode_fetch_gate_up_cpu(sizes, fetch, nullptr, nullptr, nullptr, nullptr),
                      Catch::Contains(text));
  };
  refused([](auto& s, auto&) { s.num_tokens = 2; }, "takes one token, got 2");
  refused([](auto&, auto& f) { f.cache.slots = 3; }, "at least as many slots as a token has experts, got 3 for 4");
  refused([](auto&, auto& f) { f.cache.policy = CachePolicyKind::kStatic; }, "it takes no static cache");
  refused([](auto&, auto& f) { f.layer = 2; }, "layer must be below 2, got 2");
  CopyRequest request;
  PrefetchState state;
  refused([&](auto&, auto& f) { f.request = &request; }, "needs the blob's layout, got none");
  refused(
      [&](auto& s, auto& f) {
        f.request = &request;
        f.blob = expert_blob(s);
        f.prefetch = &state;
      },
      "comes through a staging place, got none");
}
