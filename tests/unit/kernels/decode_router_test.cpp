#include "hestia/kernels/decode_router.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "decode_support.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

struct Case {
  DecodeRouterShape shape;
  Bits hidden;
  Bits norm_weight;
  std::vector<float> router;
  std::vector<float> bias;
  std::vector<std::int32_t> slot_of;
  std::vector<float> strength = {};       // of rows; empty: none
  std::vector<std::int64_t> forced = {};  // of steps, rows and ranks; empty: none
  std::int64_t step = 0;
};

Case random_case(SplitMix64& random, std::int64_t tokens, std::int64_t hidden, std::int64_t experts,
                 std::int64_t top_k) {
  Case c;
  c.shape = {.num_tokens = tokens, .hidden_size = hidden, .num_experts = experts, .top_k = top_k};
  const auto size = static_cast<std::size_t>(hidden);
  c.hidden = random_bits(random, static_cast<std::size_t>(tokens) * size, 3.0);
  c.norm_weight = random_bits(random, size, 1.5);
  c.router =
      random_floats(random, static_cast<std::size_t>(experts) * size, 3.0 / std::sqrt(static_cast<double>(hidden)));
  c.bias = random_floats(random, static_cast<std::size_t>(experts), 0.5);
  for (std::int64_t e = 0; e < experts; ++e) {
    c.slot_of.push_back(random.below(3) == 0 ? static_cast<std::int32_t>(random.below(1000)) : -1);
  }
  if (experts > 3) {
    // Experts 1 and 3 always tie.
    std::copy_n(c.router.begin() + hidden, size, c.router.begin() + 3 * hidden);
    c.bias[3] = c.bias[1];
  }
  return c;
}

struct Result {
  Bits normal;
  std::vector<float> logits;
  std::vector<float> probabilities;
  std::vector<std::int32_t> selected;
  std::vector<float> weights;
  std::vector<std::int32_t> slots;
  bool guards_whole = true;
  bool operator==(const Result&) const = default;
};

/// What the next layer's gate is asked, and what it said.
struct Asked {
  const Case& next;
  std::int64_t layer = 1;
  bool tells = true;         // a host thread
  PrefetchState state = {};  // before, then after
  std::vector<float> logits = {};
  std::uint64_t told = 0;
};

Result run(const Case& c, bool with_bias, bool with_resident, bool gpu, Asked* asked = nullptr) {
  const auto tokens = static_cast<std::size_t>(c.shape.num_tokens);
  const std::size_t scores = tokens * static_cast<std::size_t>(c.shape.num_experts);
  const std::size_t choices = tokens * static_cast<std::size_t>(c.shape.top_k);
  Guarded<std::uint16_t> hidden(c.hidden, gpu);
  Guarded<std::uint16_t> norm_weight(c.norm_weight, gpu);
  Guarded<float> router(c.router, gpu);
  Guarded<float> bias(c.bias, gpu);
  Guarded<std::int32_t> slot_of(c.slot_of, gpu);
  Guarded<float> strength(c.strength, gpu);
  Guarded<std::int64_t> forced(c.forced, gpu);
  Guarded<std::int64_t> step({c.step}, gpu);
  Guarded<std::uint16_t> normal(Bits(c.hidden.size(), 0), gpu);
  Guarded<float> logits(std::vector<float>(scores), gpu);
  Guarded<float> probabilities(std::vector<float>(scores), gpu);
  Guarded<std::int32_t> selected(std::vector<std::int32_t>(choices, -1), gpu);
  Guarded<float> weights(std::vector<float>(choices), gpu);
  Guarded<std::int32_t> slots(std::vector<std::int32_t>(choices, -7), gpu);
  DecodeRouterInputs in{hidden.data(),
                        norm_weight.data(),
                        router.data(),
                        with_bias ? bias.data() : nullptr,
                        with_resident ? slot_of.data() : nullptr,
                        c.strength.empty() ? nullptr : strength.data(),
                        c.forced.empty() ? nullptr : forced.data(),
                        static_cast<std::int64_t>(c.forced.size() / choices),
                        step.data()};
  const DecodeRouterOutputs out{normal.data(),   logits.data(),  probabilities.data(),
                                selected.data(), weights.data(), with_resident ? slots.data() : nullptr};
  bool counters_zero = true;
  // Of one token that asks.
  const Case& next = asked != nullptr ? asked->next : c;
  Guarded<std::uint16_t> next_norm(next.norm_weight, gpu);
  Guarded<float> next_router(next.router, gpu);
  Guarded<std::int32_t> next_slots(next.slot_of, gpu);
  Guarded<float> next_strength(next.strength, gpu);
  Guarded<std::int64_t> next_forced(next.forced, gpu);
  Guarded<float> next_logits(std::vector<float>(scores), gpu);
  Guarded<float> next_probabilities(std::vector<float>(scores), gpu);
  Guarded<std::int32_t> next_selected(std::vector<std::int32_t>(choices), gpu);
  Guarded<float> next_weights(std::vector<float>(choices), gpu);
  Guarded<PrefetchState> state({asked != nullptr ? asked->state : PrefetchState()}, gpu);
  void* request = nullptr;
  void* request_on_device = nullptr;
  if (gpu && asked != nullptr && asked->tells) {
    require_cuda(cudaHostAlloc(&request, sizeof(CopyRequest), cudaHostAllocMapped));
    require_cuda(cudaHostGetDevicePointer(&request_on_device, request, 0));
    new (request) CopyRequest();
  }
  const DecodeGuess guess{
      next_norm.data(),
      next_router.data(),
      next_slots.data(),
      next.forced.empty() ? nullptr : next_forced.data(),
      next.shape.bonus,
      next.strength.empty() ? nullptr : next_strength.data(),
      asked != nullptr ? asked->layer : 0,
      state.data(),
      static_cast<CopyRequest*>(request_on_device),
      {nullptr, next_logits.data(), next_probabilities.data(), next_selected.data(), next_weights.data(), nullptr}};
  if (asked != nullptr) {
    in.guess = &guess;
  }
  if (gpu) {
    Guarded<std::uint8_t> workspace(std::vector<std::uint8_t>(decode_router_workspace(c.shape), 0), true);
    for (int repeat = asked != nullptr ? 1 : 0; repeat < 2; ++repeat) {
      decode_router_cuda(c.shape, in, out, workspace.data(), nullptr);
    }
    const std::vector<std::uint8_t> after = workspace.values();
    counters_zero = workspace.guards_whole() && std::all_of(after.begin(), after.end(), [](auto b) { return b == 0; });
  } else {
    decode_router_cpu(c.shape, in, out);
  }
  Result result{normal.values(),   logits.values(),  probabilities.values(),
                selected.values(), weights.values(), slots.values()};
  result.guards_whole = counters_zero && normal.guards_whole() && logits.guards_whole() &&
                        probabilities.guards_whole() && selected.guards_whole() && weights.guards_whole() &&
                        slots.guards_whole() && next_logits.guards_whole() && next_probabilities.guards_whole() &&
                        next_selected.guards_whole() && next_weights.guards_whole() && state.guards_whole();
  if (asked != nullptr) {
    asked->state = state.values().front();
    asked->logits = next_logits.values();
  }
  if (request != nullptr) {
    asked->told = static_cast<const CopyRequest*>(request)->guess;
    require_cuda(cudaFreeHost(request));
  }
  return result;
}

/// The rule in other words, on the logits z of row `row`.
std::vector<std::int32_t> choice(const Case& c, const float* z, bool with_resident, std::size_t row) {
  const DecodeRouterShape& shape = c.shape;
  const float bonus = c.strength.empty() ? shape.bonus : shape.bonus * c.strength[row];
  std::vector<float> weights(static_cast<std::size_t>(shape.num_experts));
  if (with_resident && shape.score != ResidencyScore::kLogit && bonus > 0.0F && shape.always_keep < shape.top_k) {
    const float largest = *std::max_element(z, z + shape.num_experts);
    std::transform(z, z + shape.num_experts, weights.begin(), [&](float x) {
      const float half = shape.score == ResidencyScore::kRoot ? 0.5F : 1.0F;
      return relative_weight(half * x, half * largest);
    });
    z = weights.data();
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(c.shape.num_experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return z[a] > z[b]; });
  const std::int64_t kept = std::min(c.shape.always_keep, c.shape.top_k);
  // Stable on the order by score: ties with the bonus go to the higher score, then the lower index.
  const auto adjusted = [&](std::int32_t e) {
    return with_resident && c.slot_of[static_cast<std::size_t>(e)] >= 0 ? z[e] + bonus : z[e];
  };
  std::stable_sort(order.begin() + kept, order.end(), [&](auto a, auto b) { return adjusted(a) > adjusted(b); });
  order.resize(static_cast<std::size_t>(c.shape.top_k));
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return z[a] != z[b] ? z[a] > z[b] : a < b; });
  return order;
}

/// Norm, logits and weights in double precision; choices by `choice` on the result's own logits. Returns whether
/// preserving the mass has changed a weight.
bool check(const Case& c, const Result& result, bool with_bias, bool with_resident) {
  const auto hidden = static_cast<std::size_t>(c.shape.hidden_size);
  const auto experts = static_cast<std::size_t>(c.shape.num_experts);
  const auto top_k = static_cast<std::size_t>(c.shape.top_k);
  bool differs = false;
  double norm_error = 0.0;
  double logit_error = 0.0;
  double probability_error = 0.0;
  double weight_error = 0.0;
  for (std::size_t t = 0; t < static_cast<std::size_t>(c.shape.num_tokens); ++t) {
    double squares = 0.0;
    for (std::size_t i = 0; i < hidden; ++i) {
      squares += wide(c.hidden[t * hidden + i]) * wide(c.hidden[t * hidden + i]);
    }
    const double inverse =
        1.0 / std::sqrt(squares / static_cast<double>(hidden) + static_cast<double>(c.shape.norm_eps));
    for (std::size_t i = 0; i < hidden; ++i) {
      const double expected = wide(c.hidden[t * hidden + i]) * inverse * wide(c.norm_weight[i]);
      norm_error = std::max(
          norm_error, std::abs(wide(result.normal[t * hidden + i]) - expected) / std::max(std::abs(expected), 1e-6));
    }
    const float* const z = result.logits.data() + t * experts;
    double total = 0.0;
    for (std::size_t e = 0; e < experts; ++e) {
      double sum = with_bias ? static_cast<double>(c.bias[e]) : 0.0;
      for (std::size_t i = 0; i < hidden; ++i) {
        sum += static_cast<double>(c.router[e * hidden + i]) * wide(result.normal[t * hidden + i]);
      }
      logit_error = std::max(logit_error, std::abs(sum - static_cast<double>(z[e])));
      total += std::exp(static_cast<double>(z[e]));
    }
    const std::vector<std::int32_t> selected(result.selected.begin() + static_cast<std::ptrdiff_t>(t * top_k),
                                             result.selected.begin() + static_cast<std::ptrdiff_t>((t + 1) * top_k));
    REQUIRE(selected == choice(c, z, with_resident, t));
    for (std::size_t k = 0; k < top_k; ++k) {
      REQUIRE(result.slots[t * top_k + k] == (with_resident ? c.slot_of[static_cast<std::size_t>(selected[k])] : -7));
    }
    const auto mass = [&](const std::vector<std::int32_t>& ids) {
      return std::accumulate(ids.begin(), ids.end(), 0.0, [&](double sum, std::int32_t e) {
        return sum + std::exp(static_cast<double>(z[e])) / total;
      });
    };
    const double chosen = mass(selected);
    const bool scaled = with_resident && c.shape.bonus > 0.0F && c.shape.always_keep < c.shape.top_k &&
                        c.shape.preserve_mass && !c.shape.normalise_top_k;
    const double ratio = scaled ? mass(choice(c, z, false, t)) / chosen : 1.0;
    differs = differs || std::abs(ratio - 1.0) > 1e-3;
    for (std::size_t e = 0; e < experts; ++e) {
      probability_error =
          std::max(probability_error, std::abs(static_cast<double>(result.probabilities[t * experts + e]) -
                                               std::exp(static_cast<double>(z[e])) / total));
    }
    for (std::size_t k = 0; k < top_k; ++k) {
      const double p = ratio * std::exp(static_cast<double>(z[selected[k]])) / total;
      const double expected = (c.shape.normalise_top_k ? p / chosen : p) * static_cast<double>(c.shape.routed_scale);
      weight_error = std::max(weight_error, std::abs(static_cast<double>(result.weights[t * top_k + k]) - expected));
    }
  }
  CHECK(norm_error < 2.0 / 256.0);  // two roundings to bfloat16
  CHECK(logit_error < 5e-5);
  CHECK(probability_error < 2e-6);
  CHECK(weight_error < 1e-5);
  CHECK(result.guards_whole);
  return differs;
}

struct Size {
  std::int64_t tokens, hidden, experts, top_k;
};
const std::vector<Size> kSizes = {{1, 8, 1, 1},    {1, 2048, 64, 8}, {3, 264, 7, 7},
                                  {32, 40, 60, 4}, {2, 72, 512, 32}, {5, 1032, 129, 6}};

void check_all(SplitMix64& random, bool gpu) {
  int scaled = 0;
  for (const Size& s : kSizes) {
    for (const int variant : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11}) {
      CAPTURE(s.tokens, s.hidden, s.experts, s.top_k, variant);
      Case c = random_case(random, s.tokens, s.hidden, s.experts, s.top_k);
      c.shape.norm = variant == 1 ? DecodeNorm::kRmsWide : DecodeNorm::kRms;
      c.shape.normalise_top_k = variant >= 2 && variant < 6;
      c.shape.routed_scale = variant == 3 || variant == 7 ? 2.5F : 1.0F;
      c.shape.bonus = variant % 2 == 1 || variant == 6 || variant == 8 ? 1.5F : 0.0F;
      c.shape.always_keep = variant % 4;
      c.shape.preserve_mass = variant == 3 || variant >= 6;
      if (variant == 4 || variant == 5 || variant == 7 || variant == 9 || variant == 11) {
        c.shape.score = variant == 5 || variant == 11 ? ResidencyScore::kRoot : ResidencyScore::kWeight;
        c.shape.bonus = variant == 4 ? 0.05F : 0.4F;
      }
      for (std::int64_t row = 0; variant >= 8 && row < s.tokens; ++row) {
        c.strength.push_back(0.5F * static_cast<float>((row + variant) % 3));  // 1, .5 and 0 begin in turn
      }
      c.shape.dependent = variant == 2;
      const bool with_bias = variant >= 2;
      const bool with_resident = variant % 2 == 1 || variant == 4 || variant == 6 || variant == 8;
      scaled += check(c, run(c, with_bias, with_resident, gpu), with_bias, with_resident) ? 1 : 0;
    }
  }
  CHECK(scaled >= 4);
}

void check_prior_off(SplitMix64& random, bool gpu, ResidencyScore score) {
  Case c = random_case(random, 8, 64, 64, 8);
  c.shape.score = score;
  const Result plain = run(c, false, false, gpu);
  c.shape.always_keep = 2;
  c.shape.preserve_mass = true;
  const Result with_cache = run(c, false, true, gpu);  // no bonus
  CHECK(with_cache.selected == plain.selected);
  CHECK(with_cache.weights == plain.weights);
  c.shape.bonus = 2.0F;
  const Result moved = run(c, false, true, gpu);
  CHECK(moved.selected != plain.selected);
  CHECK(moved.logits == plain.logits);
  CHECK(moved.probabilities == plain.probabilities);
  c.strength.assign(8, 1.0F);
  CHECK(run(c, false, true, gpu) == moved);
  c.strength.assign(8, 0.0F);
  CHECK(run(c, false, true, gpu) == with_cache);
  c.strength.clear();
  c.shape.always_keep = 8;  // J = K changes nothing
  CHECK(run(c, false, true, gpu) == with_cache);
}

// Experts of a trace in place of the rule's: in the trace's order, from the first step again behind the last.
void check_forced(SplitMix64& random, bool gpu) {
  Case c = random_case(random, 3, 72, 20, 4);
  c.shape.normalise_top_k = true;
  const Result plain = run(c, false, false, gpu);
  for (int i = 0; i < 5 * 3 * 4; ++i) {
    c.forced.push_back(static_cast<std::int64_t>(random.below(20)));
  }
  for (const std::int64_t step : {0, 4, 5, 13}) {
    c.step = step;
    const Result forced = run(c, false, false, gpu);
    CHECK(forced.guards_whole);
    CHECK(forced.logits == plain.logits);
    CHECK(forced.probabilities == plain.probabilities);
    for (std::size_t t = 0; t < 3; ++t) {
      const std::int64_t* const row = c.forced.data() + (static_cast<std::size_t>(step % 5) * 3 + t) * 4;
      double sum = 0.0;
      for (std::size_t k = 0; k < 4; ++k) {
        sum += static_cast<double>(plain.probabilities[t * 20 + static_cast<std::size_t>(row[k])]);
      }
      for (std::size_t k = 0; k < 4; ++k) {
        REQUIRE(forced.selected[t * 4 + k] == row[k]);
        const double p = static_cast<double>(plain.probabilities[t * 20 + static_cast<std::size_t>(row[k])]);
        CHECK(static_cast<double>(forced.weights[t * 4 + k]) == Approx(p / sum).epsilon(1e-5));
      }
    }
    // A trace's experts weigh what the router says of them, also where a prior would preserve the mass.
    Case unscaled = c;
    unscaled.shape.normalise_top_k = false;
    unscaled.shape.preserve_mass = true;
    unscaled.shape.bonus = 1.0F;
    const Result weighed = run(unscaled, false, true, gpu);
    for (std::size_t i = 0; i < 3 * 4; ++i) {
      const auto expert = static_cast<std::size_t>(weighed.selected[i]);
      CHECK(weighed.weights[i] == weighed.probabilities[i / 4 * 20 + expert]);
    }
  }
}

// The first of what the next gate chooses that has no slot; the layer's own results are those without.
void check_guess(SplitMix64& random, bool gpu) {
  int none = 0;
  int some = 0;
  for (const Size& s : kSizes) {
    for (const int variant : {0, 1, 2, 3, 4, 5}) {
      CAPTURE(s.hidden, s.experts, s.top_k, variant);
      Case c = random_case(random, 1, s.hidden, s.experts, s.top_k);
      Case next = random_case(random, 1, s.hidden, s.experts, s.top_k);
      next.hidden = c.hidden;
      if (random.below(3) == 0) {
        std::fill(next.slot_of.begin(), next.slot_of.end(), 3);  // nothing can be missing
      }
      c.shape.norm = variant == 1 ? DecodeNorm::kRmsWide : DecodeNorm::kRms;
      c.shape.bonus = variant % 2 == 1 ? 1.5F : 0.0F;
      c.shape.always_keep = variant % 4;
      c.shape.score = variant == 5   ? ResidencyScore::kRoot
                      : variant >= 4 ? ResidencyScore::kWeight
                                     : ResidencyScore::kLogit;
      c.shape.dependent = variant == 2;
      next.shape = c.shape;
      next.shape.bonus = c.shape.bonus * 0.25F;  // a factor of the layer
      if (variant == 1 || variant == 5) {
        c.strength = {0.5F};
        next.strength = {variant == 1 ? 2.0F : 0.0F};
      }
      if (variant == 2) {
        for (int i = 0; i < 3 * s.top_k; ++i) {
          c.forced.push_back(static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(s.experts))));
          next.forced.push_back(static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(s.experts))));
        }
        c.step = 4;
      }
      Asked asked{.next = next, .layer = variant + 1, .tells = variant != 3};
      asked.state.tag = variant == 0 ? kPrefetchTags : 40;
      asked.state.counts.guesses = 7;
      const std::uint32_t tag = variant == 0 ? 1 : 41;
      const bool with_resident = variant % 2 == 1;
      const Result plain = run(c, variant >= 2, with_resident, gpu);
      CHECK(run(c, variant >= 2, with_resident, gpu, &asked) == plain);
      const Result of_next = run(next, false, true, gpu);
      CHECK(asked.logits == of_next.logits);
      std::vector<std::int32_t> chosen = choice(next, asked.logits.data(), true, 0);
      if (variant == 2) {
        chosen.assign(next.forced.begin() + s.top_k, next.forced.begin() + 2 * s.top_k);  // step 4 of 3
      }
      const auto missing = std::find_if(chosen.begin(), chosen.end(),
                                        [&](auto e) { return next.slot_of[static_cast<std::size_t>(e)] < 0; });
      const std::uint32_t expected = missing == chosen.end() ? 0 : static_cast<std::uint32_t>(*missing) + 1;
      (expected == 0 ? none : some) += 1;
      const PrefetchState::Guess& guess = asked.state.guesses[asked.layer % 2];
      CHECK(guess.expert == expected);
      CHECK(guess.tag == tag);
      CHECK(asked.state.tag == tag);
      CHECK(asked.state.met == 0);
      CHECK(asked.state.guesses[1 - asked.layer % 2].tag == 0);
      CHECK(asked.state.counts.guesses == 7 + (expected == 0 ? 0 : 1));
      if (gpu && asked.tells) {
        const auto blob = expected == 0 ? 0U : static_cast<std::uint64_t>(asked.layer * s.experts) + expected;
        CHECK(asked.told == (static_cast<std::uint64_t>(tag) << 32U | blob));
      }
    }
  }
  CHECK(none > 0);
  CHECK(some > 0);
}

}  // namespace

TEST_CASE("decode router: a guess is what the next gate chooses too early and has no slot") {
  SplitMix64 random(27);
  check_guess(random, false);
}

TEST_CASE("decode router: on CUDA a guess is what the next gate chooses too early and has no slot", "[gpu]") {
  if (gpu_ready()) {
    SplitMix64 random(28);
    check_guess(random, true);
  }
}

TEST_CASE("decode router: a trace's experts are served in place of the rule's") {
  SplitMix64 random(26);
  check_forced(random, false);
}

TEST_CASE("decode router: CUDA serves a trace's experts in place of the rule's", "[gpu]") {
  if (gpu_ready()) {
    SplitMix64 random(26);
    check_forced(random, true);
  }
}

TEST_CASE("decode router: the plain loop equals the definition in double precision") {
  SplitMix64 random(21);
  check_all(random, false);
}

TEST_CASE("decode router: a prior of nothing leaves every bit as it is") {
  SplitMix64 random(22);
  check_prior_off(random, false, ResidencyScore::kLogit);
  check_prior_off(random, false, ResidencyScore::kWeight);
  check_prior_off(random, false, ResidencyScore::kRoot);
}

TEST_CASE("decode router: sizes that the kernel does not take are refused by name") {
  SplitMix64 random(23);
  const auto refused = [&](auto change, const std::string& text) {
    Case c = random_case(random, 1, 8, 4, 2);
    change(c.shape);
    CHECK_THROWS_WITH(decode_router_cpu(c.shape, {}, {}), Catch::Contains(text));
  };
  refused([](DecodeRouterShape& s) { s.num_tokens = 0; }, "rows of a step must be from 1 to 32, got 0");
  refused([](DecodeRouterShape& s) { s.hidden_size = 9; }, "the hidden size must be a multiple of 8, got 9");
  refused([](DecodeRouterShape& s) { s.num_experts = 513; }, "experts must be from 1 to 512, got 513");
  refused([](DecodeRouterShape& s) { s.top_k = 5; }, "experts per token must be from 1 to 4, got 5");
  refused([](DecodeRouterShape& s) { s.bonus = -1.0F; }, "the prior needs always_keep and bonus of at least 0");
  const DecodeFetch fetch;
  const Case c = random_case(random, 1, 8, 4, 2);
  CHECK_THROWS_WITH(decode_router_cpu(c.shape, {.fetch = &fetch}, {}),
                    Catch::Contains("serving a step needs the slots of the selected, got none"));
  DecodeGuess guess;
  CHECK_THROWS_WITH(decode_router_cpu(c.shape, {.guess = &guess}, {}),
                    Catch::Contains("a guess needs the next layer's slots and a place to be put, got none"));
  const Case two = random_case(random, 2, 8, 4, 2);
  CHECK_THROWS_WITH(decode_router_cpu(two.shape, {.guess = &guess}, {}),
                    Catch::Contains("guesses in a step of one token, got 2"));
  PrefetchState state;
  const std::int64_t forced = 0;
  guess.slot_of = c.slot_of.data();
  guess.state = &state;
  guess.forced = &forced;
  CHECK_THROWS_WITH(decode_router_cpu(c.shape, {.guess = &guess}, {}),
                    Catch::Contains("either both layers' choices come from a trace or none"));
}

TEST_CASE("decode router: CUDA equals the definition, and chooses by the CPU's rule on its logits", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(24);
  check_all(random, true);
  check_prior_off(random, true, ResidencyScore::kLogit);
  check_prior_off(random, true, ResidencyScore::kWeight);
  check_prior_off(random, true, ResidencyScore::kRoot);
}

TEST_CASE("decode router: other rows do not change a bit on CUDA", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(25);
  const Case c = random_case(random, 32, 2048, 64, 8);
  const Result together = run(c, false, false, true);
  for (std::size_t t = 0; t < 32; ++t) {
    Case alone = c;
    alone.shape.num_tokens = 1;
    alone.hidden = {c.hidden.begin() + static_cast<std::ptrdiff_t>(t * 2048),
                    c.hidden.begin() + static_cast<std::ptrdiff_t>((t + 1) * 2048)};
    const Result one = run(alone, false, false, true);
    CHECK(std::equal(one.normal.begin(), one.normal.end(),
                     together.normal.begin() + static_cast<std::ptrdiff_t>(t * 2048)));
    CHECK(std::equal(one.logits.begin(), one.logits.end(),
                     together.logits.begin() + static_cast<std::ptrdiff_t>(t * 64)));
    CHECK(std::equal(one.weights.begin(), one.weights.end(),
                     together.weights.begin() + static_cast<std::ptrdiff_t>(t * 8)));
    CHECK(std::equal(one.selected.begin(), one.selected.end(),
                     together.selected.begin() + static_cast<std::ptrdiff_t>(t * 8)));
  }
}
