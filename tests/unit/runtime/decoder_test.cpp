#include "hestia/runtime/decoder.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/model/key_value_cache.hpp"
#include "hestia/model/residency_selector.hpp"
#include "hestia/routing/residency.hpp"
#include "hestia/routing/simulator.hpp"
#include "tests/unit/model/model_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;
using torch::Tensor;
using Kind = CachePolicyKind;

namespace {

const std::vector<Kind> kServed = {Kind::kLru,  Kind::kLfu,    Kind::kGamma, Kind::kLifo,
                                   Kind::kFifo, Kind::kRandom, Kind::kStatic};

bool gpu_ready() {
  if (!torch::hasCUDA()) {
    WARN("SKIPPED: needs a GPU");
    return false;
  }
  return true;
}

const torch::Device kCpu(torch::kCPU);
const torch::Device kGpu(torch::kCUDA, 0);

// Norms and biases off their initial values.
OffloadedModel make_offloaded(const Architecture& a, torch::Dtype dtype, torch::Device device,
                              ExpertFormat format = ExpertFormat::kBfloat16,
                              std::optional<std::int64_t> pinned_budget = std::nullopt) {
  const torch::NoGradGuard no_grad;
  OffloadedModel offloaded = create_offloaded(a, dtype, device, 11, /*quiet=*/true, format, {}, pinned_budget);
  std::uint64_t seed = 500;
  for (auto& [name, tensor] : offloaded.model->named_tensors()) {
    ++seed;
    if (tensor.dim() == 1) {
      tensor.add_(random_normal(tensor.sizes(), seed).mul(0.3).to(tensor.options()));
    }
  }
  return offloaded;
}

// Sizes that the decode kernels take.
Architecture kernel_architecture() {
  Architecture a = small_architecture();
  a.hidden_size = 64;
  a.head_dim = 16;
  a.expert_intermediate_size = 24;
  a.num_experts = 12;
  a.top_k = 3;
  a.initializer_range = 0.15;
  return a;
}

// The other families that whole steps run in kernels for: norms of heads, windows; weights of the chosen only.
Architecture qwen3_architecture() {
  Architecture a = kernel_architecture();
  const Architecture family = family_defaults("qwen3_moe");
  a.family = family.family;
  a.model_type = family.model_type;
  a.query_key_norm = family.query_key_norm;
  a.query_key_norm_heads = family.query_key_norm_heads;
  a.norm = family.norm;
  a.clip_qkv.reset();
  a.head_dim = 24;
  a.sliding_window = 4;
  a.windowed_layers = {false, true, false};
  return a;
}

Architecture mixtral_architecture() {
  Architecture a = kernel_architecture();
  const Architecture family = family_defaults("mixtral");
  a.family = family.family;
  a.model_type = family.model_type;
  a.query_key_norm = family.query_key_norm;
  a.routing = family.routing;
  a.norm = family.norm;
  a.clip_qkv.reset();
  a.attention_bias = false;
  a.normalise_top_k = family.normalise_top_k;
  a.num_experts = 8;
  a.top_k = 2;
  return a;
}

// Of whose first miss the kernel copies a part and the host thread the rest.
Architecture large_expert_architecture() {
  Architecture a = kernel_architecture();
  a.hidden_size = 128;
  a.head_dim = 32;
  a.expert_intermediate_size = 72;
  return a;
}

// Of which a guess takes several pieces, the last a short one.
Architecture piecewise_architecture() {
  Architecture a = large_expert_architecture();
  a.hidden_size = 520;
  a.expert_intermediate_size = 360;
  return a;
}

Tensor prompt_of(const Architecture& a, std::int64_t rows = 1, std::int64_t length = 5, std::uint64_t seed = 71) {
  return random_integers(a.vocab_size, {rows, length}, seed);
}

SlotCacheOptions slots_of(std::int64_t per_layer, Kind policy = Kind::kLru) {
  SlotCacheOptions options;
  options.slots.per_layer = per_layer;
  options.policy = policy;
  return options;
}

struct Run {
  Tensor tokens, logits;
  std::vector<SlotCacheCounts> counts;
  FetchPath path = FetchPath::kAuto;
  bool in_kernels = false;
  std::int64_t copy_requests = 0;
  PrefetchKind prefetch = PrefetchKind::kOff;
  PrefetchTotals prefetched;
};

Run run(const OffloadedModel& offloaded, DecoderOptions options, const Tensor& prompt, std::int64_t steps) {
  options.rows = prompt.size(0);
  options.capacity = prompt.size(1) + steps + 1;
  Decoder decoder(offloaded, options);
  decoder.begin(prompt);
  decoder.decode(steps);
  return {decoder.tokens(),     decoder.logits().clone(),        decoder.counts(),   decoder.fetch_path(),
          decoder.in_kernels(), decoder.slots().copy_requests(), decoder.prefetch(), decoder.prefetch_totals()};
}

std::int64_t loads_of(const std::vector<SlotCacheCounts>& counts) {
  std::int64_t loads = 0;
  for (const SlotCacheCounts& layer : counts) {
    loads += layer.loads;
  }
  return loads;
}

void check_same_bits(const Architecture& a, torch::Dtype dtype, torch::Device device, bool kernels = true,
                     ExpertFormat format = ExpertFormat::kBfloat16) {
  const OffloadedModel offloaded = make_offloaded(a, dtype, device, format);
  for (const std::int64_t rows : {1, 3}) {
    const Tensor prompt = prompt_of(a, rows);
    DecoderOptions all;
    all.kernels = kernels;
    const Run resident = run(offloaded, all, prompt, 12);
    CHECK(resident.counts.empty());
    REQUIRE(resident.tokens.sizes() == at::IntArrayRef({rows, 13}));
    const bool on_gpu = device.is_cuda() && kernels;
    std::vector<std::pair<FetchPath, PrefetchKind>> paths = {{FetchPath::kTogether, PrefetchKind::kOff}};
    if (on_gpu) {
      paths = {{FetchPath::kTogether, PrefetchKind::kOff},
               {FetchPath::kCopies, PrefetchKind::kOff},
               {FetchPath::kWaves, PrefetchKind::kOff},
               {FetchPath::kStaged, PrefetchKind::kOff}};
    }
    if (resident.in_kernels) {
      paths.emplace_back(FetchPath::kAuto, PrefetchKind::kNextGate);
    }
    std::int64_t copied = 0;
    bool can_copy = false;
    std::int64_t guesses = 0;
    bool can_guess = false;
    const auto check = [&](DecoderOptions options) {
      options.kernels = kernels;
      for (const auto& [path, prefetch] : paths) {
        options.cache->fetch = path;
        options.cache->prefetch = prefetch;
        const Run found = run(offloaded, options, prompt, 12);
        CAPTURE(rows, options.cache->slots.per_layer, options.cache->slots.pool, options.graph,
                policy_name(options.cache->policy), fetch_path_name(path));
        CHECK(found.tokens.equal(resident.tokens));
        CHECK(found.logits.equal(resident.logits));
        CHECK(loads_of(found.counts) > 0);
        const bool guess = prefetch != PrefetchKind::kOff && found.in_kernels && rows == 1 &&
                           options.cache->slots.per_layer >= a.top_k && options.cache->policy != Kind::kStatic;
        CHECK((found.prefetch == PrefetchKind::kNextGate) == guess);
        CHECK(found.prefetched.guesses >= found.prefetched.right);
        CHECK(found.prefetched.copied_bytes >= found.prefetched.useful_bytes);
        CHECK((guess || found.prefetched.guesses + found.prefetched.copied_bytes == 0));
        guesses += found.prefetched.guesses;
        can_guess = can_guess || guess;
        const bool copies = guess || (path == FetchPath::kCopies && found.in_kernels && (options.graph || rows == 1));
        CHECK((found.path == FetchPath::kCopies) == copies);
        CHECK((copies || found.copy_requests == 0));
        copied += found.copy_requests;
        can_copy = can_copy || copies;
      }
    };
    for (const std::int64_t slots : {std::int64_t{1}, std::int64_t{2}, a.top_k + 1, a.num_experts}) {
      DecoderOptions options;
      options.cache = slots_of(slots);
      check(options);
    }
    for (const Kind policy : kServed) {
      DecoderOptions options;
      options.cache = slots_of(a.top_k, policy);
      check(options);
      options.cache->stress = policy != Kind::kStatic;
      options.cache->slots.per_layer = a.num_experts - 1;
      check(options);
    }
    DecoderOptions options;
    options.cache = slots_of(0);
    options.cache->slots.pool = 2 * a.top_k + 1;
    check(options);
    options.graph = false;
    check(options);
    options.start_early = false;
    check(options);
    CHECK((copied > 0) == can_copy);
    CHECK((guesses > 0) == can_guess);
  }
}

// Guesses change no count; those that a trace makes are right.
void check_guesses(const Architecture& a, ExpertFormat format) {
  const OffloadedModel offloaded = make_offloaded(a, torch::kBFloat16, kGpu, format);
  const Tensor steps_LSBK = random_normal({3, 60, 1, a.num_experts}, 74).argsort(std::int64_t{3}).narrow(3, 0, a.top_k);
  DecoderOptions options;
  options.capacity = 80;
  options.cache = slots_of(a.top_k + 2);
  Decoder plain(offloaded, options);
  options.cache->prefetch = PrefetchKind::kNextGate;
  Decoder guessing(offloaded, options);
  CHECK(guessing.fetch_path() == FetchPath::kCopies);
  for (const bool by_trace : {false, true}) {
    if (by_trace) {
      plain.replay(DecodeReplay{steps_LSBK, {}});
      guessing.replay(DecodeReplay{steps_LSBK, {}});
    }
    for (std::int64_t sequence = 0; sequence < 2; ++sequence) {
      CAPTURE(by_trace, sequence);
      const Tensor prompt = prompt_of(a, 1, 6, 75 + static_cast<std::uint64_t>(sequence));
      for (Decoder* decoder : {&plain, &guessing}) {
        decoder->begin(prompt, sequence);
        decoder->decode(2);
        decoder->decode(50);
      }
      CHECK(guessing.tokens().equal(plain.tokens()));
      CHECK(guessing.logits().equal(plain.logits()));
      const std::vector<SlotCacheCounts> found = guessing.counts();
      const std::vector<SlotCacheCounts> expected = plain.counts();
      std::int64_t missing_layers = 0;  // of steps, at most
      for (std::size_t layer = 0; layer < found.size(); ++layer) {
        CHECK(found[layer].hits == expected[layer].hits);
        CHECK(found[layer].loads == expected[layer].loads);
        CHECK(found[layer].evictions == expected[layer].evictions);
        missing_layers += layer > 0 ? std::min<std::int64_t>(found[layer].steps, found[layer].loads) : 0;
      }
      const PrefetchTotals totals = guessing.prefetch_totals();
      CHECK(totals.guesses > 10);
      CHECK(totals.guesses <= 2 * 52);
      CHECK(totals.right <= missing_layers);
      CHECK((by_trace ? totals.right == totals.guesses : totals.right < totals.guesses));
      CHECK(totals.copied_bytes > 0);
      CHECK(totals.copied_bytes >= totals.useful_bytes);
      if (by_trace) {  // what is begun of a right guess is never copied again
        CHECK(totals.useful_bytes == totals.copied_bytes);
      }
    }
  }
}

// Experts that are not pinned change where bytes come from, and nothing else.
void check_pinned_budget(ExpertFormat format, bool kernels) {
  const Architecture a = kernel_architecture();
  const OffloadedModel pinned = make_offloaded(a, torch::kBFloat16, kGpu, format);
  CHECK(pinned.store.pinned());
  CHECK(pinned.store.pinned_bytes() == pinned.store.bytes());
  CHECK(pinned.store.staging_bytes() == 0);
  for (const std::int64_t budget : {std::int64_t{16384}, pinned.store.bytes() / 2, pinned.store.bytes() - 1}) {
    const OffloadedModel offloaded = make_offloaded(a, torch::kBFloat16, kGpu, format, budget);
    CHECK_FALSE(offloaded.store.pinned());
    CHECK(offloaded.store.pinned_bytes() + offloaded.store.staging_bytes() <= budget);
    CHECK(offloaded.store.staging_bytes() > 0);
    CHECK((offloaded.store.pinned_blobs() > 0) == (budget > 16384));
    CHECK_THROWS_AS(offloaded.store.device_data(), std::logic_error);
    for (const std::int64_t rows : {1, 3}) {
      const Tensor prompt = prompt_of(a, rows, 7);
      DecoderOptions all;
      all.kernels = kernels;
      const Run resident = run(pinned, all, prompt, 14);
      const Run moved = run(offloaded, all, prompt, 14);
      CHECK(moved.tokens.equal(resident.tokens));
      CHECK(moved.logits.equal(resident.logits));
      for (const Kind policy : {Kind::kLru, Kind::kLfu, Kind::kStatic}) {
        for (const std::int64_t slots : {std::int64_t{1}, a.top_k, a.top_k + 2}) {
          CAPTURE(budget, rows, policy_name(policy), slots);
          DecoderOptions options;
          options.kernels = kernels;
          options.start = CacheStart::kPrefill;
          options.cache = slots_of(slots, policy);
          options.rows = rows;
          options.capacity = 22;
          Decoder decoder(offloaded, options);
          CHECK(decoder.fetch_path() == FetchPath::kStaged);
          CHECK_FALSE(decoder.in_graphs());
          decoder.begin(prompt);
          decoder.decode(14);
          const Run as_pinned = run(pinned, options, prompt, 14);
          CHECK(decoder.tokens().equal(resident.tokens));
          CHECK(decoder.logits().equal(resident.logits));
          const std::vector<SlotCacheCounts> counts = decoder.counts();
          CHECK(loads_of(counts) > 0);
          for (std::size_t layer = 0; layer < counts.size(); ++layer) {
            CHECK(counts[layer].requests == as_pinned.counts[layer].requests);
            CHECK(counts[layer].hits == as_pinned.counts[layer].hits);
            CHECK(counts[layer].loads == as_pinned.counts[layer].loads);
            CHECK(counts[layer].evictions == as_pinned.counts[layer].evictions);
          }
        }
      }
    }
  }
}

// What decoding by hand with the plain executor gives, under a rule with the prompt's slots at the start: the logits
// after the last of `tokens`, float64.
Tensor plain_logits(const Architecture& a, torch::Dtype dtype, const Tensor& prompt, const Tensor& tokens,
                    const std::optional<ResidencyRule>& rule = std::nullopt) {
  const torch::NoGradGuard no_grad;
  OffloadedModel offloaded = make_offloaded(a, dtype, kCpu);
  const Tensor all = torch::cat({prompt, tokens.narrow(1, 0, tokens.size(1) - 1)}, 1);
  TokenBatch batch;
  batch.tokens_BS = all;
  batch.positions_BS = torch::arange(all.size(1), torch::kInt64).unsqueeze(0).expand_as(all);
  batch.sequence_ids_BS = torch::arange(all.size(0), torch::kInt64).unsqueeze(1).expand_as(all);
  if (rule) {
    batch.counted_BS = torch::arange(all.size(1), torch::kInt64).ge(prompt.size(1)).unsqueeze(0).expand_as(all);
    offloaded.model->set_selector(std::make_shared<ResidencySelector>(*rule));
  }
  const Tensor hidden = offloaded.model->forward(batch).hidden_BSD;
  return offloaded.model->head(hidden.narrow(1, all.size(1) - 1, 1)).squeeze(1).to(torch::kFloat64);
}

RoutingTrace trace_of(const Decoder& decoder, std::int64_t sequence = 0) {
  SequenceRouting routing = decoder.recorded();
  routing.id = sequence;
  RoutingTrace trace;
  append_sequence(trace, routing);
  return trace;
}

void check_counts(const Decoder& decoder, SimulationOptions options, std::int64_t sequence = 0) {
  const std::vector<SlotCacheCounts> found = decoder.counts();
  const std::vector<SimulationCounts> expected = simulate_per_layer(trace_of(decoder, sequence), options);
  REQUIRE(found.size() == expected.size());
  for (std::size_t layer = 0; layer < found.size(); ++layer) {
    CAPTURE(layer);
    CHECK(found[layer].steps == expected[layer].steps);
    CHECK(found[layer].requests == expected[layer].requests);
    CHECK(found[layer].hits == expected[layer].hits);
    CHECK(found[layer].cold == expected[layer].cold);
    CHECK(found[layer].loads == expected[layer].loads);
    CHECK(found[layer].evictions == expected[layer].evictions);
  }
}

void check_every_policy_and_start(torch::Dtype dtype, torch::Device device) {
  const Architecture a = kernel_architecture();
  const OffloadedModel offloaded = make_offloaded(a, dtype, device);
  const Tensor prompt = prompt_of(a);
  std::vector<std::vector<std::uint16_t>> preload;
  for (std::uint16_t layer = 0; layer < 3; ++layer) {
    preload.push_back({static_cast<std::uint16_t>(7 - layer), layer, 11, 9, 4, 3, 8, 10});
  }
  for (const Kind policy : kServed) {
    for (const CacheStart start : {CacheStart::kCold, CacheStart::kPrefill, CacheStart::kPreload}) {
      for (const std::int64_t slots : {2, 4, 12}) {
        if (policy == Kind::kStatic && start == CacheStart::kCold) {
          continue;  // the simulator's static knows the sequence; a decoder cannot
        }
        CAPTURE(policy_name(policy), static_cast<int>(start), slots);
        DecoderOptions options;
        options.capacity = 40;
        options.cache = slots_of(slots, policy);
        options.cache->gamma = 0.8;
        options.cache->seed = 5;
        options.start = start;
        options.record = true;
        SimulationOptions simulation;
        simulation.policy = policy;
        simulation.slots = slots;
        simulation.gamma = 0.8;
        simulation.seed = 5;
        simulation.start = start;
        if (start == CacheStart::kPreload) {
          options.preload = preload;
          simulation.preload = preload;
        }
        Decoder decoder(offloaded, options);
        decoder.begin(prompt, /*sequence=*/3);
        decoder.decode(10);
        decoder.decode(20);
        check_counts(decoder, simulation, 3);
        // The next sequence starts afresh.
        decoder.begin(prompt_of(a, 1, 6, 72), /*sequence=*/4);
        decoder.decode(9);
        check_counts(decoder, simulation, 4);
      }
    }
  }
}

// A list that depends on the prompt's routing: the experts by falling use of it.
void check_preload_of_prompt(torch::Dtype dtype, torch::Device device) {
  const Architecture a = kernel_architecture();
  const OffloadedModel offloaded = make_offloaded(a, dtype, device);
  DecoderOptions options;
  options.capacity = 40;
  options.cache = slots_of(4);
  options.record = true;
  options.start = CacheStart::kPreload;
  std::vector<Tensor> asked;
  std::vector<std::vector<std::uint16_t>> given;
  options.preload_of_prompt = [&](const Tensor& prompt_count_LE) {
    asked.push_back(prompt_count_LE);
    given.clear();
    const Tensor order = prompt_count_LE.argsort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
    for (std::int64_t layer = 0; layer < 3; ++layer) {
      given.emplace_back();
      for (std::int64_t rank = 0; rank < 6; ++rank) {
        given.back().push_back(static_cast<std::uint16_t>(order[layer][rank].item<std::int64_t>()));
      }
    }
    return given;
  };
  Decoder decoder(offloaded, options);
  for (const std::uint64_t seed : {71, 72}) {
    const auto sequence = static_cast<std::int64_t>(seed);
    const Tensor prompt = prompt_of(a, 1, 9, seed);
    decoder.begin(prompt, sequence);
    decoder.decode(20);
    const SequenceRouting routing = decoder.recorded();
    const Tensor counts = torch::zeros({3, a.num_experts}, torch::kInt64);
    const auto top_k = static_cast<std::size_t>(a.top_k);
    for (std::size_t layer = 0; layer < 3; ++layer) {
      const std::size_t begin = layer * static_cast<std::size_t>(routing.num_tokens) * top_k;
      for (std::size_t i = begin; i < begin + 9 * top_k; ++i) {
        counts[static_cast<std::int64_t>(layer)][routing.selected[i]] += 1;
      }
    }
    CHECK(torch::equal(asked.back(), counts));
    SimulationOptions simulation;
    simulation.slots = 4;
    simulation.start = CacheStart::kPreload;
    simulation.preload = given;
    check_counts(decoder, simulation, sequence);
  }
  CHECK(asked.size() == 2);
  CHECK_FALSE(torch::equal(asked[0], asked[1]));
  options.preload_of_prompt = [](const Tensor& /*prompt_count_LE*/) {
    return std::vector<std::vector<std::uint16_t>>{{1}, {2}};
  };
  Decoder other(offloaded, options);
  CHECK_THROWS_AS(other.begin(prompt_of(a)), UsageError);  // three layers
  options.preload = {{1}, {2}, {3}};
  CHECK_THROWS_AS(Decoder(offloaded, options), UsageError);  // which one?
}

void check_replay(torch::Device device, CacheStart start, torch::Dtype dtype,
                  ExpertFormat format = ExpertFormat::kBfloat16) {
  const Architecture a = kernel_architecture();
  const OffloadedModel offloaded = make_offloaded(a, dtype, device, format);
  constexpr std::int64_t kSteps = 14;
  // Different experts in each step.
  const Tensor steps_LSBK =
      random_normal({3, kSteps, 1, a.num_experts}, 73).argsort(std::int64_t{3}).narrow(3, 0, a.top_k);
  DecodeReplay replay{steps_LSBK, {}};
  for (std::uint64_t layer = 0; layer < 3; ++layer) {
    replay.prompt_SBK.push_back(
        random_normal({6, 1, a.num_experts}, 80 + layer).argsort(std::int64_t{2}).narrow(2, 0, a.top_k));
  }
  DecoderOptions options;
  options.capacity = 40;
  options.cache = slots_of(4);
  options.record = true;
  options.start = start;
  Decoder decoder(offloaded, options);
  decoder.replay(replay);
  decoder.begin(prompt_of(a));
  decoder.decode(kSteps);
  CHECK_THROWS_AS(decoder.decode(1), std::invalid_argument);  // no more in the trace
  const SequenceRouting found = decoder.recorded();
  for (std::int64_t layer = 0; layer < 3; ++layer) {
    for (std::int64_t step = 0; step < kSteps; ++step) {
      for (std::int64_t k = 0; k < a.top_k; ++k) {
        const auto at = static_cast<std::size_t>((layer * found.num_tokens + 5 + step) * a.top_k + k);
        REQUIRE(found.selected[at] == steps_LSBK[layer][step][0][k].item<std::int64_t>());
      }
    }
  }
  // The same trace, prompt included, in the simulator.
  SequenceRouting served;
  served.num_prompt_tokens = 6;
  served.num_tokens = 6 + kSteps;
  served.num_layers = 3;
  served.num_experts = a.num_experts;
  served.top_k = a.top_k;
  for (std::size_t layer = 0; layer < 3; ++layer) {
    const Tensor all =
        torch::cat({replay.prompt_SBK[layer], steps_LSBK[static_cast<std::int64_t>(layer)]}).contiguous();
    for (std::int64_t i = 0; i < all.numel(); ++i) {
      served.selected.push_back(static_cast<std::uint16_t>(all.const_data_ptr<std::int64_t>()[i]));
    }
  }
  RoutingTrace trace;
  append_sequence(trace, served);
  SimulationOptions simulation;
  simulation.slots = 4;
  simulation.start = options.start;
  const std::vector<SimulationCounts> expected = simulate_per_layer(trace, simulation);
  const std::vector<SlotCacheCounts> counts = decoder.counts();
  for (std::size_t layer = 0; layer < 3; ++layer) {
    CHECK(counts[layer].hits == expected[layer].hits);
    CHECK(counts[layer].loads == expected[layer].loads);
  }
  decoder.replay(std::nullopt);
  decoder.begin(prompt_of(a));
  CHECK_NOTHROW(decoder.decode(kSteps + 1));
  CHECK(loads_of(decoder.counts()) != loads_of(counts));
  CHECK_THROWS_AS(decoder.replay(DecodeReplay{steps_LSBK + a.num_experts, {}}), std::invalid_argument);
  CHECK_THROWS_AS(decoder.replay(DecodeReplay{steps_LSBK.narrow(3, 0, 2), {}}), std::invalid_argument);
}

// A scope is judged by the prompt: every layer serves the rule, its share of it, or plain Top-K from there on.
void check_scope_of_prompt(torch::Device device, torch::Dtype dtype) {
  const Architecture a = kernel_architecture();
  const OffloadedModel offloaded = make_offloaded(a, dtype, device);
  const Tensor prompt = prompt_of(a);
  DecoderOptions options;
  options.capacity = 40;
  options.cache = slots_of(4);
  options.record_logits = true;
  const auto loads = [&] {
    Decoder decoder(offloaded, options);
    decoder.begin(prompt);
    decoder.decode(30);
    return std::pair(loads_of(decoder.counts()), decoder.scope_share());
  };
  const std::int64_t plain = loads().first;
  ResidencyRule rule;
  rule.lambda = 0.3;
  rule.always_keep = 1;
  rule.slots = 4;
  rule.logit_range = {2.0F, 3.0F, 4.0F};
  rule.score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kRoot);
  options.residency = rule;
  const std::int64_t under_rule = loads().first;
  CHECK(loads().second == 1.0);
  CHECK(under_rule < plain);
  rule.scope.domains = {"python"};
  rule.scope.window = 3;
  rule.scope.weights.assign(3, std::vector<float>(static_cast<std::size_t>(a.num_experts), 0.0F));
  const auto with_offsets = [&](const std::vector<float>& offsets, double elsewhere) {
    rule.scope.offsets = offsets;
    rule.scope.elsewhere = elsewhere;
    options.residency = rule;
    return loads();
  };
  CHECK(with_offsets({0, 1, 2}, 0.0) == std::pair(under_rule, 1.0));
  CHECK(with_offsets({-1, -1, -1}, 0.0) == std::pair(plain, 0.0));
  CHECK(with_offsets({-1, 1, -1}, 1.0).first == under_rule);
  const auto [some, share] = with_offsets({-1, 1, -1}, 0.0);
  CHECK(share == Approx(1.0 / 3.0));
  CHECK(some != plain);
  CHECK(some != under_rule);
  // As the half of lambda everywhere.
  const std::int64_t half = with_offsets({-1, -1, -1}, 0.5).first;
  rule.scope = {};
  rule.lambda = 0.15;
  options.residency = rule;
  CHECK(loads().first == half);
  // Told from the prompt's own logits: its last tokens', and judged anew with each prompt.
  options.residency->scope.domains = {"python"};
  options.residency->scope.window = 2;
  options.residency->scope.offsets.assign(3, 0.0F);
  for (int layer = 0; layer < 3; ++layer) {
    std::vector<float> weights(static_cast<std::size_t>(a.num_experts), 0.0F);
    weights[static_cast<std::size_t>(layer)] = 1.0F;
    options.residency->scope.weights.push_back(weights);
  }
  Decoder decoder(offloaded, options);
  for (const std::int64_t shift : {0, 1, 2, 3}) {
    const Tensor other = (prompt + shift) % a.vocab_size;
    decoder.begin(other);
    double expected = 0.0;
    const Tensor logits_LSBE = decoder.recorded_prompt_logits();
    for (std::int64_t layer = 0; layer < 3; ++layer) {
      const Tensor z = logits_LSBE[layer].select(1, 0);  // [S, E]
      const double evidence = z.select(1, layer).narrow(0, z.size(0) - 2, 2).to(torch::kFloat64).sum().item<double>();
      expected += evidence < 0.0 ? 0.0 : 1.0 / 3.0;
    }
    CHECK(decoder.scope_share() == Approx(expected));
  }
  // Rows judge by themselves, and each is served so.
  options.rows = 3;
  const Tensor rows = prompt_of(a, 3);
  Decoder together(offloaded, options);
  together.begin(rows);
  const Tensor logits_LSBE = together.recorded_prompt_logits();
  double expected = 0.0;
  for (std::int64_t layer = 0; layer < 3; ++layer) {
    const Tensor z = logits_LSBE[layer].select(2, layer).to(torch::kFloat64);  // [S, B]
    expected += z.narrow(0, z.size(0) - 2, 2).sum(0).ge(0.0).to(torch::kFloat64).sum().item<double>() / 9.0;
  }
  CHECK(together.scope_share() == Approx(expected));
  CHECK(expected > 0.0);
  CHECK(expected < 1.0);
  together.decode(8);
  options.residency->scope.weights[1].pop_back();
  CHECK_THROWS_WITH(Decoder(offloaded, options), Catch::Contains("weights for each of 3 MoE layers"));
}

void check_residency(torch::Device device, torch::Dtype dtype) {
  const Architecture a = kernel_architecture();
  const OffloadedModel offloaded = make_offloaded(a, dtype, device);
  const Tensor prompt = prompt_of(a);
  DecoderOptions options;
  options.capacity = 40;
  options.cache = slots_of(4);
  options.record = true;
  options.record_logits = true;
  Decoder plain(offloaded, options);
  plain.begin(prompt);
  plain.decode(30);
  const Tensor tokens = plain.tokens();
  const std::int64_t loads = loads_of(plain.counts());

  ResidencyRule rule;
  rule.always_keep = 1;
  rule.slots = 4;
  rule.logit_range = {2.0F, 3.0F, 4.0F};
  rule.score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot);
  rule.layer_factors = GENERATE(std::vector<double>{}, std::vector<double>{1.5, 0.0, 0.75});
  rule.lambda = 0.0;
  options.residency = rule;
  {
    Decoder off(offloaded, options);
    off.begin(prompt);
    off.decode(30);
    CHECK(off.tokens().equal(tokens));
    CHECK(off.logits().equal(plain.logits()));
    CHECK(loads_of(off.counts()) == loads);
  }
  options.residency->lambda = 0.3;
  Decoder decoder(offloaded, options);
  decoder.begin(prompt);
  decoder.decode(30);
  CHECK(loads_of(decoder.counts()) < loads);
  // The CPU selector on the logits that the decoder saw chooses the same experts.
  const Tensor logits_LSBE = decoder.recorded_logits();
  const SequenceRouting found = decoder.recorded();
  for (std::int64_t layer = 0; layer < 3; ++layer) {
    const Tensor logits = logits_LSBE[layer].select(1, 0).contiguous();
    std::vector<std::int64_t> expected(static_cast<std::size_t>(30 * a.top_k));
    const std::int64_t begin = 0;
    const std::int64_t end = 30;
    const SimulationCounts counts =
        route_with_residency({.num_tokens = 30,
                              .num_experts = a.num_experts,
                              .top_k = a.top_k,
                              .always_keep = 1,
                              .slots = 4,
                              .bonus = options.residency->bonus(layer),
                              .score = options.residency->score},
                             logits.const_data_ptr<float>(), nullptr, &begin, &end, 1, expected.data());
    CHECK(counts.loads == decoder.counts()[static_cast<std::size_t>(layer)].loads);
    for (std::int64_t step = 0; step < 30; ++step) {
      const auto* chosen = found.selected.data() + (layer * found.num_tokens + 5 + step) * a.top_k;
      std::vector<std::int64_t> served(chosen, chosen + a.top_k);
      // Served by falling logit, which the rule's own order is not.
      for (std::int64_t k = 1; k < a.top_k; ++k) {
        CHECK(logits[step][served[static_cast<std::size_t>(k - 1)]].item<float>() >=
              logits[step][served[static_cast<std::size_t>(k)]].item<float>());
      }
      std::vector<std::int64_t> wanted(expected.begin() + step * a.top_k, expected.begin() + (step + 1) * a.top_k);
      std::sort(served.begin(), served.end());
      std::sort(wanted.begin(), wanted.end());
      REQUIRE(served == wanted);
    }
  }
}

// Steps weigh what was chosen as the model does under the rule, teacher-forced, from the slots that the prompt left.
void check_preserved_mass(torch::Device device) {
  Architecture a = kernel_architecture();
  a.normalise_top_k = false;
  a.initializer_range = 0.3;
  const Tensor prompt = prompt_of(a);
  DecoderOptions options;
  options.capacity = 40;
  options.cache = slots_of(4);
  options.start = CacheStart::kPrefill;
  ResidencyRule rule;
  rule.lambda = 0.4;
  rule.always_keep = 1;
  rule.slots = 4;
  rule.logit_range = {2.0F, 3.0F, 4.0F};
  rule.score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot);
  const auto decoded = [&](torch::Dtype dtype, bool preserve_mass) {
    const OffloadedModel offloaded = make_offloaded(a, dtype, device);
    options.residency = rule;
    options.residency->preserve_mass = preserve_mass;
    Decoder decoder(offloaded, options);
    decoder.begin(prompt);
    decoder.decode(12);
    return std::pair(decoder.tokens().cpu(), decoder.logits().to(torch::kCPU, torch::kFloat64));
  };
  for (const bool preserve_mass : {false, true}) {
    const auto [tokens, logits] = decoded(torch::kFloat32, preserve_mass);
    ResidencyRule served = rule;
    served.preserve_mass = preserve_mass;
    CHECK(relative_error(logits, plain_logits(a, torch::kFloat32, prompt, tokens, served)) < 1e-4);
    served.preserve_mass = !preserve_mass;
    CHECK(relative_error(logits, plain_logits(a, torch::kFloat32, prompt, tokens, served)) > 1e-3);
  }
  // The decode kernels, where there are any, are told of it; what they make of it decode_router_test.cpp checks.
  const Tensor with = decoded(torch::kBFloat16, true).second;
  CHECK(relative_error(decoded(torch::kBFloat16, false).second, with) > 1e-3);
}

}  // namespace

TEST_CASE("decoding with few slots gives the bits of decoding with all experts resident") {
  check_same_bits(GENERATE(small_architecture(), mixed_architecture(), deepseek_architecture(), gpt_oss_architecture()),
                  GENERATE(torch::kFloat32, torch::kBFloat16), kCpu);
}

TEST_CASE("decoding packed experts with few slots gives the bits of all of them resident") {
  check_same_bits(GENERATE(small_architecture(), mixed_architecture(), deepseek_architecture()), torch::kBFloat16, kCpu,
                  true, GENERATE(ExpertFormat::kInt8, ExpertFormat::kInt4, ExpertFormat::kInt4Asymmetric));
}

TEST_CASE("on the GPU, decoding packed experts with few slots gives the bits of all of them resident", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  const ExpertFormat format = GENERATE(ExpertFormat::kInt8, ExpertFormat::kInt4, ExpertFormat::kInt4Asymmetric);
  check_same_bits(GENERATE(kernel_architecture(), qwen3_architecture(), mixtral_architecture()), torch::kBFloat16, kGpu,
                  true, format);
  check_same_bits(GENERATE(kernel_architecture(), mixed_architecture()), torch::kBFloat16, kGpu, false, format);
}

TEST_CASE("on the GPU, decoding with few slots gives the bits of all resident, in a graph and out of it", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  check_same_bits(
      GENERATE(kernel_architecture(), qwen3_architecture(), mixtral_architecture(), large_expert_architecture()),
      torch::kBFloat16, kGpu, GENERATE(true, false));
}

TEST_CASE("on the GPU, guesses at the next layer change no bit and no count, and a trace's are right", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  Architecture a = GENERATE(kernel_architecture(), large_expert_architecture(), piecewise_architecture());
  a.num_experts = 24;  // that a guess may be wrong
  check_guesses(a, GENERATE(ExpertFormat::kBfloat16, ExpertFormat::kInt4));
}

TEST_CASE("on a CPU nothing is prefetched, and a warning says so") {
  const OffloadedModel offloaded = make_offloaded(kernel_architecture(), torch::kFloat32, kCpu);
  DecoderOptions options;
  options.cache = slots_of(5);
  options.cache->prefetch = PrefetchKind::kNextGate;
  const std::size_t before = degradations().size();
  const Run found = run(offloaded, options, prompt_of(kernel_architecture()), 4);
  CHECK(found.prefetch == PrefetchKind::kOff);
  CHECK(found.prefetched.copied_bytes == 0);
  REQUIRE(degradations().size() == before + 1);
  CHECK_THAT(degradations().back(),
             Catch::Contains("--prefetch next-gate") && Catch::Contains("nothing is prefetched"));
}

TEST_CASE("on the GPU, every family decodes to the same bits with few slots", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  check_same_bits(GENERATE(small_architecture(), mixed_architecture(), deepseek_architecture(), gpt_oss_architecture()),
                  GENERATE(torch::kFloat32, torch::kBFloat16), kGpu);
}

TEST_CASE("the decoder says what the model says") {
  Architecture phi = phi_architecture();
  phi.rope.original_positions = 3;
  const Architecture a =
      GENERATE_COPY(small_architecture(), mixed_architecture(), phi, deepseek_architecture(), gpt_oss_architecture());
  CAPTURE(a.family);
  const Tensor prompt = prompt_of(a, 2);
  DecoderOptions options;
  options.cache = slots_of(2);
  const Run found = run(make_offloaded(a, torch::kFloat64, kCpu), options, prompt, 9);
  const Tensor expected = plain_logits(a, torch::kFloat64, prompt, found.tokens);
  CHECK(relative_error(found.logits, expected) < 1e-6);  // logits are kept in float32
  CHECK(found.tokens.narrow(1, 9, 1).equal(expected.argmax(1, /*keepdim=*/true)));
}

TEST_CASE("the decoder on the GPU says what the model says on the CPU", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  Architecture a = GENERATE(kernel_architecture(), qwen3_architecture(), mixtral_architecture(), small_architecture(),
                            mixed_architecture(), deepseek_architecture(), gpt_oss_architecture());
  const torch::Dtype dtype = GENERATE(torch::kFloat64, torch::kFloat32, torch::kBFloat16);
  if (dtype == torch::kBFloat16) {
    // Rounding may choose another expert, which is no error: with all of them chosen there is none.
    a.top_k = a.num_experts;
    a.top_groups = a.num_groups;
  }
  CAPTURE(a.family, dtype);
  const Tensor prompt = prompt_of(a, 2);
  DecoderOptions options;
  options.cache = slots_of(3);
  options.kernels = GENERATE(true, false);
  {
    // Whole steps run in kernels for the families that they take.
    options.capacity = 8;
    const bool sizes = a.hidden_size == 64 && dtype == torch::kBFloat16;
    CHECK(Decoder(make_offloaded(a, dtype, kGpu), options).in_kernels() == (sizes && options.kernels));
  }
  const Run found = run(make_offloaded(a, dtype, kGpu), options, prompt, 9);
  const Tensor expected = plain_logits(a, dtype, prompt, found.tokens);
  if (dtype == torch::kBFloat16) {
    CHECK(normalised_square_error(found.logits, expected) < 2e-3);
  } else {
    CHECK(relative_error(found.logits, expected) < (dtype == torch::kFloat64 ? 1e-6 : 1e-4));
  }
}

TEST_CASE("counts of the slots are the simulator's on the recorded trace, for every policy and start") {
  check_every_policy_and_start(torch::kFloat32, kCpu);
}

TEST_CASE("counts on the GPU are the simulator's on the recorded trace, for every policy and start", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  check_every_policy_and_start(torch::kBFloat16, kGpu);
}

TEST_CASE("a preload may depend on the prompt's routing") {
  check_preload_of_prompt(torch::kFloat32, kCpu);
}

TEST_CASE("a preload may depend on the prompt's routing on the GPU", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  check_preload_of_prompt(torch::kBFloat16, kGpu);
}

TEST_CASE("experts beyond a budget of pinned memory decode to the same bits and counts on the GPU", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  check_pinned_budget(ExpertFormat::kBfloat16, true);
  check_pinned_budget(ExpertFormat::kBfloat16, false);
  check_pinned_budget(ExpertFormat::kInt4, true);
}

TEST_CASE("a budget of pinned memory that holds no staging buffers is refused before weights are made") {
  const Architecture a = kernel_architecture();
  CHECK_THROWS_AS(create_offloaded(a, torch::kFloat32, kCpu, 1, true, ExpertFormat::kBfloat16, {}, 4096), UsageError);
  const OffloadedModel offloaded =
      create_offloaded(a, torch::kFloat32, kCpu, 1, true, ExpertFormat::kBfloat16, {}, 65536);
  CHECK(offloaded.store.pinned_bytes() == 0);
  CHECK_THROWS_AS(offloaded.store.copy_to_device(0, 1, nullptr, nullptr), std::logic_error);
}

TEST_CASE("replay serves the trace's experts, whatever the router says") {
  check_replay(kCpu, GENERATE(CacheStart::kCold, CacheStart::kPrefill), torch::kFloat32);
}

TEST_CASE("replay counts are the same whatever format experts are in") {
  check_replay(kCpu, CacheStart::kCold, torch::kBFloat16,
               GENERATE(ExpertFormat::kBfloat16, ExpertFormat::kInt8, ExpertFormat::kInt4Asymmetric));
}

TEST_CASE("replay on the GPU counts the same whatever format experts are in", "[gpu]") {
  if (gpu_ready()) {
    check_replay(kGpu, CacheStart::kPrefill, torch::kBFloat16, GENERATE(ExpertFormat::kInt8, ExpertFormat::kInt4));
  }
}

TEST_CASE("replay on the GPU serves the trace's experts", "[gpu]") {
  if (gpu_ready()) {
    check_replay(kGpu, GENERATE(CacheStart::kCold, CacheStart::kPrefill), GENERATE(torch::kFloat32, torch::kBFloat16));
  }
}

TEST_CASE("residency-aware routing sees the slots of the moment, off, it is plain routing") {
  check_residency(kCpu, torch::kFloat32);
}

TEST_CASE("a residency rule with a scope is for the prompts that are like it") {
  check_scope_of_prompt(kCpu, torch::kFloat32);
}

TEST_CASE("a preserved mass is what the model has under the rule") {
  check_preserved_mass(kCpu);
}

TEST_CASE("on the GPU, a preserved mass is what the model has under the rule", "[gpu]") {
  if (gpu_ready()) {
    check_preserved_mass(kGpu);
  }
}

TEST_CASE("residency-aware routing on the GPU sees the slots of the moment", "[gpu]") {
  if (gpu_ready()) {
    check_residency(kGpu, GENERATE(torch::kFloat32, torch::kBFloat16));
  }
}

TEST_CASE("a residency rule with a scope is for the prompts that are like it, on the GPU", "[gpu]") {
  if (gpu_ready()) {
    check_scope_of_prompt(kGpu, GENERATE(torch::kFloat32, torch::kBFloat16));
  }
}

TEST_CASE("sampled tokens come from the nucleus, as often as their probabilities say") {
  Architecture a = small_architecture();
  a.vocab_size = 7;
  const OffloadedModel offloaded = make_offloaded(a, torch::kFloat32, kCpu);
  const Tensor prompt = prompt_of(a);
  DecoderOptions options;
  options.capacity = 6;
  options.sampling.temperature = 0.9;
  options.sampling.top_p = GENERATE(1e-9, 0.7, 1.0);
  std::map<std::int64_t, int> found;
  constexpr int kDraws = 600;
  Tensor p;
  for (int seed = 0; seed < kDraws; ++seed) {
    options.sampling.seed = static_cast<std::uint64_t>(seed);
    Decoder decoder(offloaded, options);
    decoder.begin(prompt);
    ++found[decoder.tokens()[0][0].item<std::int64_t>()];
    p = (decoder.logits()[0].to(torch::kFloat64) / 0.9).softmax(0);
  }
  // The nucleus by hand.
  std::vector<std::int64_t> order(static_cast<std::size_t>(a.vocab_size));
  for (std::size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<std::int64_t>(i);
  }
  const auto probability = [&](std::int64_t token) { return p[token].item<double>(); };
  std::stable_sort(order.begin(), order.end(), [&](auto x, auto y) { return probability(x) > probability(y); });
  double before = 0.0;
  double nucleus = 0.0;
  std::vector<std::int64_t> inside;
  for (const std::int64_t token : order) {
    if (before < options.sampling.top_p) {
      inside.push_back(token);
      nucleus += probability(token);
    }
    before += probability(token);
  }
  int counted = 0;
  for (const std::int64_t token : inside) {
    const double share = probability(token) / nucleus;
    const double spread = std::sqrt(share * (1 - share) * kDraws);
    CHECK(std::abs(found[token] - share * kDraws) <= 4 * spread + 1e-9);
    counted += found[token];
  }
  CHECK(counted == kDraws);
}

TEST_CASE("merged adapters are the model with its adapters") {
  const torch::NoGradGuard no_grad;
  const Architecture a = small_architecture();
  OffloadedModel offloaded = make_offloaded(a, torch::kFloat64, kCpu);
  offloaded.model->add_adapters({.rank = 2, .alpha = 3.0});
  std::uint64_t seed = 90;
  for (Tensor& adapter : offloaded.model->adapters()) {
    adapter.copy_(random_normal(adapter.sizes(), seed++).mul(0.2));
  }
  const Tensor tokens = prompt_of(a);
  TokenBatch batch;
  batch.tokens_BS = tokens;
  batch.positions_BS = torch::arange(5, torch::kInt64).unsqueeze(0);
  batch.sequence_ids_BS = torch::zeros({1, 5}, torch::kInt64);
  const Tensor expected = offloaded.model->forward(batch).hidden_BSD;
  DecoderOptions options;
  options.capacity = 8;
  CHECK_THROWS_AS(Decoder(offloaded, options), std::invalid_argument);
  merge_adapters(offloaded);
  CHECK_FALSE(offloaded.model->adapter_settings());
  CHECK(relative_error(offloaded.model->forward(batch).hidden_BSD, expected) < 1e-6);
  CHECK_NOTHROW(Decoder(offloaded, options));
}

TEST_CASE("a decoder refuses what does not fit") {
  Architecture a = small_architecture();
  const OffloadedModel offloaded = make_offloaded(a, torch::kFloat32, kCpu);
  DecoderOptions options;
  options.capacity = 8;
  options.cache = slots_of(2);
  options.start = CacheStart::kPreload;
  CHECK_THROWS_AS(Decoder(offloaded, options), UsageError);  // of what?
  options.preload = {{1}, {2}};
  CHECK_THROWS_AS(Decoder(offloaded, options), UsageError);  // three layers
  options.preload = {{1}, {2}, {6}};
  CHECK_THROWS_AS(Decoder(offloaded, options), UsageError);  // six experts
  options.start = CacheStart::kCold;
  options.preload = {{1}, {2}, {3}};
  CHECK_THROWS_AS(Decoder(offloaded, options), UsageError);
  options.preload = {};
  options.cache->policy = Kind::kBelady;
  CHECK_THROWS_AS(Decoder(offloaded, options), UsageError);
  options.cache->policy = Kind::kLru;
  Decoder decoder(offloaded, options);
  CHECK_THROWS_AS(decoder.decode(1), std::invalid_argument);  // no prompt yet
  CHECK_THROWS_AS(decoder.begin(prompt_of(a, 2)), std::invalid_argument);
  CHECK_THROWS_AS(decoder.begin(prompt_of(a, 1, 8)), std::invalid_argument);
  decoder.begin(prompt_of(a, 1, 5));
  CHECK_THROWS_AS(decoder.decode(4), std::invalid_argument);
  CHECK_NOTHROW(decoder.decode(3));
  CHECK_THROWS_AS(decoder.recorded(), std::logic_error);
  CHECK_THROWS_AS(decoder.recorded_logits(), std::logic_error);

  const Architecture phi = phi_architecture();  // factors change at 4 tokens
  Decoder growing(make_offloaded(phi, torch::kFloat32, kCpu), options);
  growing.begin(prompt_of(phi, 1, 3));
  CHECK_NOTHROW(growing.decode(1));
  CHECK_THROWS_AS(growing.decode(1), RunError);
}
