#include "hestia/kernels/decode_sample.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "decode_support.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

struct Case {
  DecodeSampleShape shape;
  std::vector<float> logits;
  std::vector<std::uint64_t> seed;
  std::vector<std::int64_t> step;

  [[nodiscard]] std::size_t tokens() const { return static_cast<std::size_t>(shape.num_tokens); }
  [[nodiscard]] std::size_t vocabulary() const { return static_cast<std::size_t>(shape.vocabulary); }
};

/// With ties when `grain` is above 0: logits are multiples of it.
Case random_case(SplitMix64& random, std::int64_t tokens, std::int64_t vocabulary, double grain) {
  Case c;
  c.shape = {.num_tokens = tokens, .vocabulary = vocabulary};
  c.logits = random_floats(random, c.tokens() * c.vocabulary(), 6.0);
  for (float& z : c.logits) {
    z = grain > 0.0 ? static_cast<float>(std::round(static_cast<double>(z) / grain) * grain) : z;
  }
  for (std::size_t t = 0; t < c.tokens(); ++t) {
    c.seed.push_back(random.next());
    c.step.push_back(static_cast<std::int64_t>(random.below(100000)));
  }
  return c;
}

/// A graph replayed `replays` times, the steps one further each time, or one plain call.
template <class Index>
std::vector<std::vector<Index>> run(const Case& c, bool gpu, int replays = 0) {
  Guarded<float> logits(c.logits, gpu);
  Guarded<std::uint64_t> seed(c.seed, gpu);
  Guarded<std::int64_t> step(c.step, gpu);
  Guarded<Index> ids(std::vector<Index>(c.tokens(), Index(-77)), gpu);
  const DecodeSampleInputs in{logits.data(), seed.data(), step.data()};
  std::vector<std::vector<Index>> result;
  if (gpu) {
    Guarded<std::uint8_t> workspace(std::vector<std::uint8_t>(decode_sample_workspace(c.shape), 0), true);
    if (replays == 0) {
      decode_sample_cuda(c.shape, in, ids.data(), workspace.data(), nullptr);
      result.push_back(ids.values());
    } else {
      Captured graph([&](void* stream) { decode_sample_cuda(c.shape, in, ids.data(), workspace.data(), stream); });
      std::vector<std::int64_t> steps = c.step;
      for (int i = 0; i < replays; ++i) {
        require_cuda(cudaMemcpy(step.data(), steps.data(), steps.size() * sizeof(steps[0]), cudaMemcpyHostToDevice));
        graph.replay();
        result.push_back(ids.values());
        std::for_each(steps.begin(), steps.end(), [](auto& s) { ++s; });
      }
    }
    const std::vector<std::uint8_t> after = workspace.values();
    CHECK(workspace.guards_whole());
    CHECK(std::all_of(after.begin(), after.end(), [](auto b) { return b == 0; }));
  } else {
    decode_sample_cpu(c.shape, in, ids.data());
    result.push_back(ids.values());
  }
  CHECK(ids.guards_whole());
  CHECK(logits.guards_whole());
  return result;
}

std::vector<std::int32_t> tokens_of(const Case& c, bool gpu) {
  return run<std::int32_t>(c, gpu).front();
}

/// Tokens of a row by falling logit, ties to the lower id, and their probabilities in double precision.
struct Distribution {
  std::vector<std::int32_t> order;
  std::vector<double> probability;  // by id
};

Distribution distribution(const Case& c, std::size_t t) {
  const float* const z = c.logits.data() + t * c.vocabulary();
  Distribution result;
  result.order.resize(c.vocabulary());
  std::iota(result.order.begin(), result.order.end(), 0);
  std::stable_sort(result.order.begin(), result.order.end(), [&](auto a, auto b) { return z[a] > z[b]; });
  double total = 0.0;
  for (std::size_t id = 0; id < c.vocabulary(); ++id) {
    result.probability.push_back(
        std::exp(static_cast<double>(z[id] - z[result.order[0]]) / static_cast<double>(c.shape.temperature)));
    total += result.probability.back();
  }
  std::for_each(result.probability.begin(), result.probability.end(), [&](double& p) { p /= total; });
  return result;
}

/// The token is in the nucleus, and the draw falls where it is, both but for `kSlack` of probability.
void check_draw(const Case& c, std::size_t t, std::int64_t token) {
  constexpr double kSlack = 2e-5;
  const Distribution d = distribution(c, t);
  std::set<std::int32_t> nucleus;
  double sum = 0.0;
  double before = 0.0;
  for (const std::int32_t id : d.order) {
    before = id == token ? sum : before;
    if (sum < static_cast<double>(c.shape.top_p)) {
      nucleus.insert(id);
      sum += d.probability[static_cast<std::size_t>(id)];
    }
  }
  REQUIRE(token >= 0);
  REQUIRE(token < c.shape.vocabulary);
  REQUIRE(before < static_cast<double>(c.shape.top_p) + kSlack);
  SplitMix64 stream(SplitMix64(c.seed[t]).next() + static_cast<std::uint64_t>(c.step[c.shape.one_step ? 0 : t]));
  const double draw = stream.uniform() * sum;
  double below = 0.0;
  for (const std::int32_t id : nucleus) {
    below += id < token ? d.probability[static_cast<std::size_t>(id)] : 0.0;
  }
  // A token at the nucleus' edge may be in or not: its own probability is slack, too.
  const double edge =
      d.probability[static_cast<std::size_t>(*std::max_element(nucleus.begin(), nucleus.end(), [&](auto a, auto b) {
        return d.probability[static_cast<std::size_t>(a)] > d.probability[static_cast<std::size_t>(b)];
      }))];
  const double slack = kSlack + (std::abs(sum - static_cast<double>(c.shape.top_p)) < kSlack ? edge : 0.0);
  REQUIRE(draw > below - slack);
  REQUIRE(draw < below + d.probability[static_cast<std::size_t>(token)] + slack);
}

struct Setting {
  float temperature, top_p;
};
const std::vector<Setting> kSettings = {{1.0F, 1.0F},  {0.7F, 0.9F},  {2.5F, 0.5F},
                                        {0.1F, 0.95F}, {1.0F, 0.01F}, {20.0F, 0.999F}};
const std::vector<std::int64_t> kVocabularies = {1, 2, 31, 33, 1000, 1025, 4099, 50304};

}  // namespace

TEST_CASE("decode sample: greedy choice is the highest logit, ties to the lowest id") {
  SplitMix64 random(51);
  for (const std::int64_t vocabulary : kVocabularies) {
    CAPTURE(vocabulary);
    const Case c = random_case(random, 3, vocabulary, 0.5);
    const std::vector<std::int32_t> ids = tokens_of(c, false);
    for (std::size_t t = 0; t < c.tokens(); ++t) {
      const auto row = c.logits.begin() + static_cast<std::ptrdiff_t>(t * c.vocabulary());
      CHECK(ids[t] == std::max_element(row, row + vocabulary) - row);
    }
    CHECK(run<std::int64_t>(c, false).front() == std::vector<std::int64_t>(ids.begin(), ids.end()));
  }
  Case c = random_case(random, 1, 4, 0.0);
  c.logits = {-3.0F, -0.0F, 0.0F, -1.0F};
  CHECK(tokens_of(c, false) == std::vector<std::int32_t>{1});
  c.logits = std::vector<float>(4, -std::numeric_limits<float>::infinity());
  CHECK(tokens_of(c, false) == std::vector<std::int32_t>{0});
  c.logits = {std::numeric_limits<float>::quiet_NaN(), -3e38F, -2.0F, -5.0F};
  CHECK(tokens_of(c, false) == std::vector<std::int32_t>{2});
}

TEST_CASE("decode sample: draws follow the definition in double precision") {
  SplitMix64 random(52);
  for (const std::int64_t vocabulary : {1, 2, 33, 1000, 4099}) {
    for (const Setting& setting : kSettings) {
      for (const double grain : {0.0, 0.5}) {
        CAPTURE(vocabulary, setting.temperature, setting.top_p, grain);
        Case c = random_case(random, 20, vocabulary, grain);
        c.shape.temperature = setting.temperature;
        c.shape.top_p = setting.top_p;
        c.shape.one_step = grain > 0.0;
        const std::vector<std::int32_t> ids = tokens_of(c, false);
        for (std::size_t t = 0; t < c.tokens(); ++t) {
          check_draw(c, t, ids[t]);
        }
        CHECK(run<std::int64_t>(c, false).front() == std::vector<std::int64_t>(ids.begin(), ids.end()));
      }
    }
  }
}

TEST_CASE("decode sample: tokens come as often as their probabilities say") {
  SplitMix64 random(53);
  Case c = random_case(random, 32, 9, 0.0);
  const std::vector<float> row = random_floats(random, 9, 2.0);
  for (std::size_t i = 0; i < c.logits.size(); ++i) {
    c.logits[i] = row[i % 9];
  }
  c.shape.temperature = 1.3F;
  c.shape.top_p = 0.8F;
  std::vector<double> seen(9, 0.0);
  constexpr int kRounds = 2000;
  for (int round = 0; round < kRounds; ++round) {
    c.step.assign(32, round);
    for (const std::int32_t id : tokens_of(c, false)) {
      seen[static_cast<std::size_t>(id)] += 1.0 / (32.0 * kRounds);
    }
  }
  const Distribution d = distribution(c, 0);
  double sum = 0.0;
  std::vector<double> expected(9, 0.0);
  for (const std::int32_t id : d.order) {
    if (sum < 0.8) {
      expected[static_cast<std::size_t>(id)] = d.probability[static_cast<std::size_t>(id)];
      sum += d.probability[static_cast<std::size_t>(id)];
    }
  }
  for (std::size_t id = 0; id < 9; ++id) {
    const double p = expected[id] / sum;
    CHECK(std::abs(seen[id] - p) <= 4.5 * std::sqrt(p * (1.0 - p) / (32.0 * kRounds)));
  }
}

TEST_CASE("decode sample: the nucleus ends exactly where its share is reached") {
  SplitMix64 random(54);
  Case c = random_case(random, 32, 100, 0.0);
  c.logits.assign(c.logits.size(), 1.5F);
  c.shape.temperature = 1.0F;
  c.shape.top_p = 0.25F;
  std::set<std::int32_t> seen;
  for (std::int64_t round = 0; round < 100; ++round) {
    c.step.assign(32, round);
    const std::vector<std::int32_t> ids = tokens_of(c, false);
    seen.insert(ids.begin(), ids.end());
  }
  std::set<std::int32_t> expected;
  for (std::int32_t id = 0; id < 25; ++id) {
    expected.insert(id);
  }
  CHECK(seen == expected);
  // The least nucleus is the greedy choice.
  Case narrow = random_case(random, 32, 1000, 0.5);
  const std::vector<std::int32_t> greedy = tokens_of(narrow, false);
  narrow.shape.temperature = 1.0F;
  narrow.shape.top_p = 1e-6F;
  CHECK(tokens_of(narrow, false) == greedy);
  narrow.shape.top_p = 1.0F;
  narrow.shape.temperature = 1e-42F;  // ties stay
  const std::vector<std::int32_t> cold = tokens_of(narrow, false);
  for (std::size_t t = 0; t < 32; ++t) {
    CHECK(narrow.logits[t * 1000 + static_cast<std::size_t>(cold[t])] ==
          narrow.logits[t * 1000 + static_cast<std::size_t>(greedy[t])]);
  }
}

TEST_CASE("decode sample: rows without weight and settings out of range are told") {
  SplitMix64 random(55);
  Case c = random_case(random, 2, 5, 0.0);
  c.shape.temperature = 1.0F;
  std::fill_n(c.logits.begin(), 5, -std::numeric_limits<float>::infinity());
  for (const float top_p : {1.0F, 0.5F}) {
    c.shape.top_p = top_p;
    const std::vector<std::int32_t> ids = tokens_of(c, false);
    CHECK(ids[0] == -1);
    CHECK(ids[1] >= 0);
  }
  const auto refused = [&](auto change, const std::string& text) {
    Case bad = random_case(random, 1, 4, 0.0);
    change(bad.shape);
    std::int32_t id = 0;
    CHECK_THROWS_WITH(decode_sample_cpu(bad.shape, {}, &id), Catch::Contains(text));
  };
  refused([](DecodeSampleShape& s) { s.num_tokens = 0; }, "rows of a step must be from 1 to 32, got 0");
  refused([](DecodeSampleShape& s) { s.vocabulary = (1 << 19) + 1; }, "the vocabulary must be from 1 to 524288");
  refused([](DecodeSampleShape& s) { s.temperature = -1.0F; }, "the temperature must be at least 0, got -1");
  refused([](DecodeSampleShape& s) { s.top_p = 0.0F; }, "top_p must be above 0 and at most 1, got 0");
}

TEST_CASE("decode sample: CUDA chooses the plain loop's tokens", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(56);
  std::vector<Setting> settings = kSettings;
  settings.push_back({0.0F, 1.0F});
  std::vector<std::int64_t> vocabularies = kVocabularies;
  vocabularies.push_back(151937);
  vocabularies.push_back(1 << 19);
  for (const std::int64_t vocabulary : vocabularies) {
    for (const Setting& setting : settings) {
      for (const double grain : {0.0, 0.25, 100.0}) {
        CAPTURE(vocabulary, setting.temperature, setting.top_p, grain);
        Case c = random_case(random, vocabulary > 5000 ? 2 : 32, vocabulary, grain);
        c.shape.temperature = setting.temperature;
        c.shape.top_p = setting.top_p;
        c.shape.one_step = grain > 0.0;
        c.logits[c.logits.size() / 2] = -std::numeric_limits<float>::infinity();
        if (c.tokens() > 2) {
          std::fill_n(c.logits.begin(), c.vocabulary(), -std::numeric_limits<float>::infinity());
          c.logits[c.logits.size() - 1] = std::numeric_limits<float>::quiet_NaN();
        }
        CHECK(tokens_of(c, true) == tokens_of(c, false));
        CHECK(run<std::int64_t>(c, true) == run<std::int64_t>(c, false));
      }
    }
  }
}

TEST_CASE("decode sample: a captured draw goes on with the step", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(57);
  for (const Setting& setting : {Setting{0.0F, 1.0F}, Setting{1.0F, 1.0F}, Setting{0.8F, 0.9F}}) {
    Case c = random_case(random, 5, 3001, 0.0);
    c.shape.dependent = true;
    c.shape.temperature = setting.temperature;
    c.shape.top_p = setting.top_p;
    const auto replayed = run<std::int32_t>(c, true, 20);
    for (const std::vector<std::int32_t>& ids : replayed) {
      CHECK(ids == tokens_of(c, false));
      std::for_each(c.step.begin(), c.step.end(), [](auto& s) { ++s; });
    }
  }
}
