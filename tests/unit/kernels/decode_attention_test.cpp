#include "hestia/kernels/decode_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "decode_support.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

constexpr std::uint16_t kNan = 0x7fc0;

struct Case {
  DecodeAttentionShape shape;
  Bits projected;
  Bits query_norm;
  Bits key_norm;
  Bits cosine;
  Bits sine;
  std::vector<std::int64_t> position;
  Bits keys;
  Bits values;
  Bits sinks;
  bool with_sinks = false;

  [[nodiscard]] std::size_t tokens() const { return static_cast<std::size_t>(shape.num_tokens); }
  [[nodiscard]] std::size_t heads() const { return static_cast<std::size_t>(shape.num_heads); }
  [[nodiscard]] std::size_t key_heads() const { return static_cast<std::size_t>(shape.num_key_value_heads); }
  [[nodiscard]] std::size_t dim() const { return static_cast<std::size_t>(shape.head_dim); }
  [[nodiscard]] std::size_t capacity() const { return static_cast<std::size_t>(shape.capacity); }
  [[nodiscard]] std::size_t width() const { return (heads() + 2 * key_heads()) * dim(); }
  [[nodiscard]] std::size_t at(std::size_t t) const {
    return static_cast<std::size_t>(position[shape.one_position ? 0 : t]);
  }
  /// Where key `key` of a row's head begins in the cache.
  [[nodiscard]] std::size_t in_cache(std::size_t t, std::size_t head, std::size_t key) const {
    return ((t * key_heads() + head) * capacity() + key) * dim();
  }
  [[nodiscard]] std::size_t first_seen(std::size_t t) const {
    const auto window = static_cast<std::size_t>(shape.window);
    return window == 0 || at(t) + 1 < window ? 0 : at(t) + 1 - window;
  }
};

struct Size {
  std::int64_t tokens, heads, key_heads, dim, capacity;
};
// Odd for the kernels: head dimensions that leave lanes without work, groups that are not full, caches of less than a
// stretch, not a multiple of one, and of many.
const std::vector<Size> kSizes = {{1, 1, 1, 8, 1},      {3, 4, 4, 64, 33},   {2, 6, 2, 96, 70},
                                  {5, 10, 2, 128, 300}, {32, 5, 1, 24, 45},  {1, 16, 16, 128, 400},
                                  {2, 8, 1, 256, 97},   {1, 3, 1, 40, 2500}, {4, 24, 3, 64, 129}};

Case random_case(SplitMix64& random, const Size& s) {
  Case c;
  c.shape = {.num_tokens = s.tokens,
             .num_heads = s.heads,
             .num_key_value_heads = s.key_heads,
             .head_dim = s.dim,
             .capacity = s.capacity};
  c.shape.num_rotations = s.capacity + 3;
  c.shape.scale = 1.0F / std::sqrt(static_cast<float>(s.dim));
  c.projected = random_bits(random, c.tokens() * c.width(), 3.0);
  c.query_norm = random_bits(random, c.heads() * c.dim(), 1.5);
  c.key_norm = random_bits(random, c.key_heads() * c.dim(), 1.5);
  for (std::size_t i = 0; i < (c.capacity() + 3) * c.dim() / 2; ++i) {
    const double angle = random.uniform() * 6.28;
    c.cosine.push_back(float_to_bfloat16_bits(static_cast<float>(std::cos(angle))));
    c.sine.push_back(float_to_bfloat16_bits(static_cast<float>(std::sin(angle))));
  }
  for (std::size_t t = 0; t < c.tokens(); ++t) {
    c.position.push_back(static_cast<std::int64_t>(random.below(c.capacity())));
  }
  c.position[0] = s.capacity - 1;
  c.keys = random_bits(random, c.tokens() * c.key_heads() * c.capacity() * c.dim(), 2.0);
  c.values = random_bits(random, c.keys.size(), 2.0);
  c.sinks = random_bits(random, c.heads(), 4.0);
  return c;
}

double rounded(double value) {
  return wide(float_to_bfloat16_bits(static_cast<float>(value)));
}

struct Result {
  Bits keys;
  Bits values;
  Bits out;
  bool guards_whole = true;
};

Result attention(const Case& c, bool gpu) {
  Guarded<std::uint16_t> projected(c.projected, gpu);
  Guarded<std::uint16_t> query_norm(c.query_norm, gpu);
  Guarded<std::uint16_t> key_norm(c.key_norm, gpu);
  Guarded<std::uint16_t> cosine(c.cosine, gpu);
  Guarded<std::uint16_t> sine(c.sine, gpu);
  Guarded<std::int64_t> position(c.position, gpu);
  Guarded<std::uint16_t> sinks(c.sinks, gpu);
  Guarded<std::uint16_t> keys(c.keys, gpu);
  Guarded<std::uint16_t> values(c.values, gpu);
  Guarded<std::uint16_t> out(Bits(c.tokens() * c.heads() * c.dim(), 0x1234), gpu);
  const DecodeAttentionInputs in{projected.data(),
                                 query_norm.data(),
                                 key_norm.data(),
                                 cosine.data(),
                                 sine.data(),
                                 position.data(),
                                 c.with_sinks ? sinks.data() : nullptr};
  bool counters_zero = true;
  if (gpu) {
    Guarded<std::uint8_t> workspace(std::vector<std::uint8_t>(decode_attention_workspace(c.shape), 0), true);
    for (int repeat = 0; repeat < 2; ++repeat) {
      decode_attention_cuda(c.shape, in, {keys.data(), values.data()}, out.data(), workspace.data(), nullptr);
    }
    const std::vector<std::uint8_t> after = workspace.values();
    counters_zero = workspace.guards_whole() &&
                    std::all_of(after.begin(), after.begin() + static_cast<std::ptrdiff_t>(4 * c.tokens() * c.heads()),
                                [](auto b) { return b == 0; });
  } else {
    decode_attention_cpu(c.shape, in, {keys.data(), values.data()}, out.data());
  }
  Result result{keys.values(), values.values(), out.values()};
  result.guards_whole = counters_zero && out.guards_whole() && keys.guards_whole() && values.guards_whole() &&
                        projected.guards_whole() && position.guards_whole() && projected.values() == c.projected;
  return result;
}

struct Appended {
  Bits queries;
  Bits keys;
  Bits values;
};

/// By the formula, rounded where it says so; statistics of norms in double precision.
Appended appended(const Case& c) {
  Appended result{Bits(c.tokens() * c.heads() * c.dim()), c.keys, c.values};
  const std::size_t d = c.dim();
  const auto norm = [&](std::vector<double>& x, std::size_t first, std::size_t size, const Bits& weight) {
    double squares = 0.0;
    for (std::size_t i = first; i < first + size; ++i) {
      squares += x[i] * x[i];
    }
    const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(size) + double(c.shape.norm_eps));
    for (std::size_t i = 0; i < size; ++i) {
      x[first + i] = rounded(rounded(x[first + i] * inverse) * wide(weight[i]));
    }
  };
  for (std::size_t t = 0; t < c.tokens(); ++t) {
    std::size_t source = t * c.width();
    for (const int part : {0, 1, 2}) {
      const std::size_t heads = part == 0 ? c.heads() : c.key_heads();
      const Bits& weight = part == 0 ? c.query_norm : c.key_norm;
      std::vector<double> x(heads * d);
      std::transform(c.projected.begin() + static_cast<std::ptrdiff_t>(source),
                     c.projected.begin() + static_cast<std::ptrdiff_t>(source + heads * d), x.begin(), wide);
      source += heads * d;
      if (part < 2 && c.shape.norm == DecodeHeadNorm::kWidth) {
        norm(x, 0, heads * d, weight);
      }
      if (c.shape.clip > 0.0F) {
        const double clip = rounded(static_cast<double>(c.shape.clip));
        std::for_each(x.begin(), x.end(), [&](double& v) { v = std::min(std::max(v, -clip), clip); });
      }
      for (std::size_t h = 0; h < heads; ++h) {
        if (part < 2 && c.shape.norm == DecodeHeadNorm::kHeads) {
          norm(x, h * d, d, weight);
        }
        std::uint16_t* const to = part == 0   ? result.queries.data() + (t * heads + h) * d
                                  : part == 1 ? result.keys.data() + c.in_cache(t, h, c.at(t))
                                              : result.values.data() + c.in_cache(t, h, c.at(t));
        for (std::size_t i = 0; i < d / 2; ++i) {
          const double a = x[h * d + i];
          const double b = x[h * d + d / 2 + i];
          const double cosine = part < 2 ? wide(c.cosine[c.at(t) * d / 2 + i]) : 1.0;
          const double sine = part < 2 ? wide(c.sine[c.at(t) * d / 2 + i]) : 0.0;
          to[i] = float_to_bfloat16_bits(static_cast<float>(rounded(a * cosine) - b * sine));
          to[d / 2 + i] = float_to_bfloat16_bits(static_cast<float>(rounded(b * cosine) + a * sine));
        }
      }
    }
  }
  return result;
}

/// Largest difference in units of 2^-8 (a bfloat16 rounding) of the largest value.
double worst(const Bits& actual, const std::vector<double>& expected) {
  double largest = 0.0;
  double difference = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double own = std::abs(wide(actual[i]) - expected[i]);
    largest = std::max(largest, std::abs(expected[i]));
    difference = std::isnan(own) ? std::numeric_limits<double>::infinity() : std::max(difference, own);
  }
  return difference / largest * 256.0;
}

double worst(const Bits& actual, const Bits& expected) {
  std::vector<double> values(expected.size());
  std::transform(expected.begin(), expected.end(), values.begin(), wide);
  return worst(actual, values);
}

/// What no row sees, or what is yet to be written, becomes NaN.
void hide_unseen(Case& c) {
  for (std::size_t t = 0; t < c.tokens(); ++t) {
    for (std::size_t head = 0; head < c.key_heads(); ++head) {
      for (std::size_t key = 0; key < c.capacity(); ++key) {
        if (key < c.first_seen(t) || key >= c.at(t)) {
          std::fill_n(c.keys.begin() + static_cast<std::ptrdiff_t>(c.in_cache(t, head, key)), c.dim(), kNan);
          std::fill_n(c.values.begin() + static_cast<std::ptrdiff_t>(c.in_cache(t, head, key)), c.dim(), kNan);
        }
      }
    }
  }
}

std::vector<double> mixed(const Case& c, const Appended& with) {
  std::vector<double> out;
  for (std::size_t t = 0; t < c.tokens(); ++t) {
    for (std::size_t head = 0; head < c.heads(); ++head) {
      const std::size_t key_head = head / (c.heads() / c.key_heads());
      const std::uint16_t* const query = with.queries.data() + (t * c.heads() + head) * c.dim();
      double total = c.with_sinks ? std::exp(wide(c.sinks[head])) : 0.0;
      std::vector<double> sum(c.dim(), 0.0);
      for (std::size_t key = c.first_seen(t); key <= c.at(t); ++key) {
        double score = 0.0;
        for (std::size_t i = 0; i < c.dim(); ++i) {
          score += wide(query[i]) * wide(with.keys[c.in_cache(t, key_head, key) + i]);
        }
        const double share = std::exp(score * static_cast<double>(c.shape.scale));
        total += share;
        for (std::size_t i = 0; i < c.dim(); ++i) {
          sum[i] += share * wide(with.values[c.in_cache(t, key_head, key) + i]);
        }
      }
      std::transform(sum.begin(), sum.end(), std::back_inserter(out), [&](double v) { return v / total; });
    }
  }
  return out;
}

/// Of the written ones alone: the others are NaN here and there.
double worst_written(const Case& c, const Bits& actual, const Bits& expected) {
  Bits own;
  Bits wanted;
  for (std::size_t t = 0; t < c.tokens(); ++t) {
    for (std::size_t head = 0; head < c.key_heads(); ++head) {
      const auto first = static_cast<std::ptrdiff_t>(c.in_cache(t, head, c.at(t)));
      const auto size = static_cast<std::ptrdiff_t>(c.dim());
      own.insert(own.end(), actual.begin() + first, actual.begin() + first + size);
      wanted.insert(wanted.end(), expected.begin() + first, expected.begin() + first + size);
    }
  }
  return worst(own, wanted);
}

void check_attention(SplitMix64& random, bool gpu) {
  for (const Size& s : kSizes) {
    for (int variant = 0; variant < 8; ++variant) {
      CAPTURE(s.tokens, s.heads, s.key_heads, s.dim, s.capacity, variant);
      Case c = random_case(random, s);
      c.shape.norm = static_cast<DecodeHeadNorm>(variant % 3);
      c.shape.clip = variant < 3 ? 0.0F : 0.7F;
      c.shape.window = variant % 2 == 0 ? 0 : static_cast<std::int64_t>(1 + random.below(c.capacity()));
      c.shape.one_position = variant == 4;
      c.with_sinks = variant > 4;
      hide_unseen(c);
      const Result result = attention(c, gpu);
      const Appended expected = appended(c);
      CHECK(result.guards_whole);
      CHECK(result.values == expected.values);
      // With a norm a value near the middle between two of bfloat16 may go either way.
      const bool exact = c.shape.norm == DecodeHeadNorm::kNone;
      CHECK((exact ? result.keys == expected.keys : worst_written(c, result.keys, expected.keys) < 2.5));
      CHECK(worst(result.out, mixed(c, expected)) < (exact ? 1.0 : 4.0));
      std::size_t changed = 0;
      for (std::size_t i = 0; i < c.keys.size(); ++i) {
        changed += result.keys[i] != c.keys[i] &&
                   i / c.dim() % c.capacity() != c.at(i / c.dim() / c.capacity() / c.key_heads());
      }
      CHECK(changed == 0);
    }
  }
}

/// Row t of the case as its only one.
Case row_of(const Case& c, std::size_t t) {
  Case alone = c;
  alone.shape.num_tokens = 1;
  const auto cut = [&](auto& values) {
    const std::size_t width = values.size() / c.tokens();
    values = {values.begin() + static_cast<std::ptrdiff_t>(t * width),
              values.begin() + static_cast<std::ptrdiff_t>((t + 1) * width)};
  };
  cut(alone.projected);
  cut(alone.position);
  cut(alone.keys);
  cut(alone.values);
  return alone;
}

}  // namespace

TEST_CASE("decode attention: the plain loop equals the definition in double precision") {
  SplitMix64 random(42);
  check_attention(random, false);
}

TEST_CASE("decode attention: sizes and positions that the kernels do not take are refused by name") {
  SplitMix64 random(43);
  const auto refused = [&](auto change, const std::string& text) {
    Case c = random_case(random, {2, 4, 2, 16, 10});
    change(c);
    CHECK_THROWS_WITH(attention(c, false), Catch::Contains(text));
  };
  refused([](Case& c) { c.shape.num_tokens = 33; }, "rows of a step must be from 1 to 32, got 33");
  refused([](Case& c) { c.shape.num_heads = 3; }, "heads must be a multiple of 2, got 3");
  refused([](Case& c) { c.shape.head_dim = 20; }, "the head dimension must be a multiple of 8, got 20");
  refused([](Case& c) { c.shape.head_dim = 264; }, "the head dimension must be from 1 to 256, got 264");
  refused([](Case& c) { c.shape.capacity = 0; }, "the cache's tokens must be from 1 to");
  refused([](Case& c) { c.shape.scale = 0.0F; }, "the scale of scores must be above 0");
  refused([](Case& c) { c.shape.window = -1; }, "the window must be at least 0, got -1");
  refused([](Case& c) { c.position[1] = 10; }, "the position of row 1 must be from 0 to 9, got 10");
  refused([](Case& c) { c.shape.num_rotations = 9; }, "the position of row 0 must be from 0 to 8, got 9");
  refused([](Case& c) { c.shape.clip = -1.0F; }, "the clamp must be at least 0");
}

TEST_CASE("decode attention: CUDA equals the definition", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(45);
  check_attention(random, true);
}

TEST_CASE("decode attention: other rows do not change a bit on CUDA", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(46);
  for (const Size& s : {Size{32, 16, 4, 128, 700}, Size{9, 8, 8, 64, 4100}, Size{5, 12, 1, 96, 31}}) {
    CAPTURE(s.tokens, s.heads, s.key_heads, s.dim, s.capacity);
    Case c = random_case(random, s);
    c.shape.norm = DecodeHeadNorm::kWidth;
    c.with_sinks = true;
    const Result together = attention(c, true);
    for (std::size_t t = 0; t < c.tokens(); ++t) {
      const auto same = [&](const Bits& one, const Bits& all) {
        return std::equal(one.begin(), one.end(), all.begin() + static_cast<std::ptrdiff_t>(t * one.size()));
      };
      const Result one = attention(row_of(c, t), true);
      CHECK(same(one.keys, together.keys));
      CHECK(same(one.values, together.values));
      CHECK(same(one.out, together.out));
    }
  }
}

TEST_CASE("decode attention: a position outside the cache writes nothing and mixes to NaN on CUDA", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(47);
  for (const std::int64_t outside : {std::int64_t{-1}, std::int64_t{70}, std::int64_t{60}, std::int64_t{1} << 40}) {
    Case c = random_case(random, {1, 6, 2, 96, 70});
    c.shape.num_rotations = 60;
    c.shape.norm = DecodeHeadNorm::kWidth;
    c.position[0] = outside;
    const Result result = attention(c, true);
    CHECK(result.keys == c.keys);
    CHECK(result.values == c.values);
    CHECK(result.guards_whole);
    CHECK(std::all_of(result.out.begin(), result.out.end(), [](std::uint16_t bits) { return std::isnan(wide(bits)); }));
  }
}

TEST_CASE("decode attention: one captured step serves a growing context", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(48);
  Case c = random_case(random, {3, 8, 2, 128, 150});
  c.shape.norm = DecodeHeadNorm::kHeads;
  c.shape.window = 60;
  c.shape.dependent = true;
  Guarded<std::uint16_t> projected(c.projected, true);
  Guarded<std::uint16_t> query_norm(c.query_norm, true);
  Guarded<std::uint16_t> key_norm(c.key_norm, true);
  Guarded<std::uint16_t> cosine(c.cosine, true);
  Guarded<std::uint16_t> sine(c.sine, true);
  Guarded<std::int64_t> position(c.position, true);
  Guarded<std::uint16_t> keys(c.keys, true);
  Guarded<std::uint16_t> values(c.values, true);
  Guarded<std::uint16_t> out(Bits(c.tokens() * c.heads() * c.dim(), 0), true);
  Guarded<std::uint8_t> workspace(std::vector<std::uint8_t>(decode_attention_workspace(c.shape), 0), true);
  Captured step([&](void* stream) {
    const DecodeAttentionInputs in{projected.data(), query_norm.data(), key_norm.data(), cosine.data(),
                                   sine.data(),      position.data(),   nullptr};
    decode_attention_cuda(c.shape, in, {keys.data(), values.data()}, out.data(), workspace.data(), stream);
  });
  for (std::int64_t token = 0; token < 100; ++token) {
    c.projected = random_bits(random, c.projected.size(), 3.0);
    c.position = {token, 3 * token / 2, 149 - token};
    require_cuda(cudaMemcpy(projected.data(), c.projected.data(), c.projected.size() * 2, cudaMemcpyHostToDevice));
    require_cuda(cudaMemcpy(position.data(), c.position.data(), c.position.size() * 8, cudaMemcpyHostToDevice));
    step.replay();
    // The same kernel, not captured, on the cache of before.
    const Appended appended_now = appended(c);
    const Result expected = attention(c, true);
    CAPTURE(token);
    REQUIRE(keys.values() == expected.keys);
    REQUIRE(values.values() == expected.values);
    REQUIRE(out.values() == expected.out);
    REQUIRE(worst(expected.out, mixed(c, appended_now)) < 4.0);
    c.keys = expected.keys;
    c.values = expected.values;
  }
  CHECK(out.guards_whole());
  CHECK(workspace.guards_whole());
}
