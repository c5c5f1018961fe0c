#include "hestia/kernels/decode_linear.hpp"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "decode_support.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

struct Case {
  DecodeLinearShape shape;
  Bits x;
  Bits norm_weight;
  Bits weight;
  Bits bias;
  Bits residual;

  [[nodiscard]] std::size_t tokens() const { return static_cast<std::size_t>(shape.num_tokens); }
  [[nodiscard]] std::size_t input() const { return static_cast<std::size_t>(shape.input_size); }
  [[nodiscard]] std::size_t output() const { return static_cast<std::size_t>(shape.output_size); }
};

/// Which of the optional inputs are there.
struct With {
  bool norm = false;
  bool bias = false;
  bool residual = false;
};
constexpr With kAll{true, true, true};

Case random_case(SplitMix64& random, std::int64_t tokens, std::int64_t input, std::int64_t output) {
  Case c;
  c.shape = {.num_tokens = tokens, .input_size = input, .output_size = output};
  c.x = random_bits(random, c.tokens() * c.input(), 3.0);
  c.norm_weight = random_bits(random, c.input(), 1.5);
  c.weight = random_bits(random, c.output() * c.input(), 2.0 / std::sqrt(static_cast<double>(input)));
  c.bias = random_bits(random, c.output(), 1.0);
  c.residual = random_bits(random, c.tokens() * c.output(), 2.0);
  return c;
}

Case row_of(const Case& c, std::size_t t) {
  Case alone = c;
  alone.shape.num_tokens = 1;
  const auto cut = [&](Bits& values, std::size_t width) {
    values = {values.begin() + static_cast<std::ptrdiff_t>(t * width),
              values.begin() + static_cast<std::ptrdiff_t>((t + 1) * width)};
  };
  cut(alone.x, c.input());
  cut(alone.residual, c.output());
  return alone;
}

template <class Out>
struct Result {
  std::vector<Out> out;
  bool guards_whole = true;
};

/// In place of the residual when Out is bfloat16 and there is one.
template <class Out>
Result<Out> run(const Case& c, const With& with, bool gpu, bool graph = false) {
  Guarded<std::uint16_t> x(c.x, gpu);
  Guarded<std::uint16_t> norm_weight(c.norm_weight, gpu);
  Guarded<std::uint16_t> weight(c.weight, gpu);
  Guarded<std::uint16_t> bias(c.bias, gpu);
  Guarded<std::uint16_t> residual(c.residual, gpu);
  Guarded<Out> out(std::vector<Out>(c.residual.size(), Out(77)), gpu);
  Guarded<std::uint16_t> normal(Bits(c.x.size(), 77), gpu);
  const DecodeLinearInputs in{x.data(),
                              with.norm ? norm_weight.data() : nullptr,
                              weight.data(),
                              with.bias ? bias.data() : nullptr,
                              with.residual ? residual.data() : nullptr,
                              normal.data()};
  bool in_place = false;
  Out* target = out.data();
  if constexpr (sizeof(Out) == sizeof(std::uint16_t)) {
    in_place = with.residual;
    target = in_place ? residual.data() : target;
  }
  if (graph) {
    Captured([&](void* stream) { decode_linear_cuda(c.shape, in, target, stream); }).replay();
  } else if (gpu) {
    decode_linear_cuda(c.shape, in, target, nullptr);
  } else {
    decode_linear_cpu(c.shape, in, target);
  }
  Result<Out> result;
  result.out = out.values();
  if constexpr (sizeof(Out) == sizeof(std::uint16_t)) {
    if (in_place) {
      result.out = residual.values();
    }
  }
  result.guards_whole = out.guards_whole() && normal.guards_whole() && residual.guards_whole() && x.guards_whole() &&
                        weight.guards_whole() && (in_place || residual.values() == c.residual);
  return result;
}

/// In double precision; the norm's result is rounded to bfloat16 as float32 would have it, but for its last bit.
std::vector<double> by_definition(const Case& c, const With& with) {
  std::vector<double> out;
  for (std::size_t t = 0; t < c.tokens(); ++t) {
    std::vector<double> x(c.input());
    double squares = 0.0;
    for (std::size_t i = 0; i < c.input(); ++i) {
      x[i] = wide(c.x[t * c.input() + i]);
      squares += x[i] * x[i];
    }
    const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(c.input()) + double(c.shape.norm_eps));
    const auto rounded = [](double value) { return wide(float_to_bfloat16_bits(static_cast<float>(value))); };
    for (std::size_t i = 0; with.norm && i < c.input(); ++i) {
      const double normal = x[i] * inverse;
      x[i] = rounded((c.shape.norm == DecodeNorm::kRms ? rounded(normal) : normal) * wide(c.norm_weight[i]));
    }
    for (std::size_t n = 0; n < c.output(); ++n) {
      double sum = with.bias ? wide(c.bias[n]) : 0.0;
      for (std::size_t i = 0; i < c.input(); ++i) {
        sum += x[i] * wide(c.weight[n * c.input() + i]);
      }
      out.push_back(sum + (with.residual ? wide(c.residual[t * c.output() + n]) : 0.0));
    }
  }
  return out;
}

/// Largest difference over the largest value.
double worst(const std::vector<float>& actual, const std::vector<double>& expected) {
  double largest = 0.0;
  double difference = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    difference = std::max(difference, std::abs(static_cast<double>(actual[i]) - expected[i]));
  }
  return difference / largest;
}

struct Size {
  std::int64_t tokens, input, output;
};
// Odd for the kernel: less than one step of one warp, parts of H that some warps lack, tiles cut off, every number of
// groups of rows, with few and with many tiles.
const std::vector<Size> kSizes = {{1, 8, 1},     {1, 2048, 48},  {3, 264, 37},    {8, 1032, 16},
                                  {9, 40, 130},  {16, 2880, 17}, {17, 72, 65},    {32, 520, 33},
                                  {1, 24, 4300}, {12, 40, 4259}, {25, 136, 4257}, {2, 5128, 20}};

void check_all(SplitMix64& random, bool gpu) {
  for (const Size& s : kSizes) {
    for (int variant = 0; variant < 8; ++variant) {
      CAPTURE(s.tokens, s.input, s.output, variant);
      Case c = random_case(random, s.tokens, s.input, s.output);
      c.shape.norm = s.input % 16 == 0 ? DecodeNorm::kRms : DecodeNorm::kRmsWide;
      const With with{(variant & 1) != 0, (variant & 2) != 0, (variant & 4) != 0};
      const std::vector<double> expected = by_definition(c, with);
      const Result<float> unrounded = run<float>(c, with, gpu);
      const Result<std::uint16_t> rounded = run<std::uint16_t>(c, with, gpu);
      // Under a norm a value near the middle between two of bfloat16 may go either way.
      CHECK(worst(unrounded.out, expected) < (with.norm ? 2e-3 : 1e-5));
      CHECK(unrounded.guards_whole);
      CHECK(rounded.guards_whole);
      REQUIRE(std::equal(rounded.out.begin(), rounded.out.end(), unrounded.out.begin(),
                         [](std::uint16_t bits, float value) { return bits == float_to_bfloat16_bits(value); }));
    }
  }
}

void check_rows_alone(SplitMix64& random, bool gpu, const Size& s) {
  CAPTURE(s.tokens, s.input, s.output);
  const Case c = random_case(random, s.tokens, s.input, s.output);
  const Result<float> together = run<float>(c, kAll, gpu);
  for (std::size_t t = 0; t < c.tokens(); ++t) {
    CAPTURE(t);
    const Result<float> alone = run<float>(row_of(c, t), kAll, gpu);
    CHECK(std::equal(alone.out.begin(), alone.out.end(),
                     together.out.begin() + static_cast<std::ptrdiff_t>(t * c.output())));
  }
}

}  // namespace

TEST_CASE("decode linear: the plain loop equals the definition in double precision") {
  SplitMix64 random(31);
  check_all(random, false);
  check_rows_alone(random, false, {5, 264, 37});
}

TEST_CASE("decode linear: sizes that the kernel does not take are refused by name") {
  const auto refused = [](auto change, const std::string& text) {
    DecodeLinearShape shape{.num_tokens = 1, .input_size = 8, .output_size = 1};
    change(shape);
    std::uint16_t out = 0;
    CHECK_THROWS_WITH(decode_linear_cpu(shape, {}, &out), Catch::Contains(text));
  };
  refused([](DecodeLinearShape& s) { s.num_tokens = 33; }, "rows of a step must be from 1 to 32, got 33");
  refused([](DecodeLinearShape& s) { s.input_size = 12; }, "the input size must be a multiple of 8, got 12");
  refused([](DecodeLinearShape& s) { s.output_size = 0; }, "the output size must be from 1 to");
}

TEST_CASE("decode linear: CUDA equals the definition", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(32);
  check_all(random, true);
}

TEST_CASE("decode linear: rows that are normalised once need room on CUDA", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(36);
  for (const auto& [tokens, input, refused] : {std::tuple{1, 20480, false}, std::tuple{2, 10240, false},
                                               std::tuple{1, 20488, true}, std::tuple{3, 64, true}}) {
    CAPTURE(tokens, input);
    const Case c = random_case(random, tokens, input, 24);
    Guarded<std::uint16_t> x(c.x, true);
    Guarded<std::uint16_t> norm_weight(c.norm_weight, true);
    Guarded<std::uint16_t> weight(c.weight, true);
    Guarded<float> out(std::vector<float>(c.residual.size()), true);
    const DecodeLinearInputs in{.x = x.data(), .norm_weight = norm_weight.data(), .weight = weight.data()};
    const With normed{true, false, false};
    const Result<float> with_room = run<float>(c, normed, true);
    CHECK(worst(with_room.out, by_definition(c, normed)) < 2e-3);
    if (refused) {
      CHECK_THROWS_WITH(decode_linear_cuda(c.shape, in, out.data(), nullptr),
                        Catch::Contains("normalised into `normal`"));
    } else {
      decode_linear_cuda(c.shape, in, out.data(), nullptr);
      require_cuda(cudaDeviceSynchronize());
      CHECK(out.values() == with_room.out);
      CHECK(out.guards_whole());
    }
  }
}

TEST_CASE("decode linear: other rows do not change a bit on CUDA", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(33);
  for (const Size& s : {Size{32, 2048, 2048}, Size{20, 264, 4261}, Size{16, 1032, 4240}, Size{13, 2048, 72},
                        Size{32, 8, 5000}, Size{8, 4104, 40}, Size{2, 2048, 72}}) {
    check_rows_alone(random, true, s);
  }
}

TEST_CASE("decode linear: a captured product is the same with every launch of its graph", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(34);
  for (const std::int64_t tokens : {1, 7, 32}) {
    const Case c = random_case(random, tokens, 1032, 515);
    CHECK(run<float>(c, kAll, true, true).out == run<float>(c, kAll, true).out);
    CHECK(run<std::uint16_t>(c, kAll, true, true).out == run<std::uint16_t>(c, kAll, true).out);
  }
}

TEST_CASE("decode linear: dependent launches await one another", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(35);
  // With blocks that have all their weights on their way at once, and with others.
  for (const auto& [tokens, size] :
       {std::tuple{1, 1536}, std::tuple{2, 1536}, std::tuple{9, 1536}, std::tuple{32, 1536}, std::tuple{1, 2184},
        std::tuple{9, 2184}, std::tuple{32, 2184}}) {
    CAPTURE(tokens, size);
    Case c = random_case(random, tokens, size, size);
    const auto chain = [&](bool dependent) {
      c.shape.dependent = dependent;
      Guarded<std::uint16_t> norm_weight(c.norm_weight, true);
      Guarded<std::uint16_t> weight(c.weight, true);
      Guarded<std::uint16_t> even(c.x, true);
      Guarded<std::uint16_t> odd(c.residual, true);
      Guarded<std::uint16_t> normal(Bits(c.x.size()), true);
      // Each product reads what the one before it wrote, and writes what that one read.
      Captured products([&](void* stream) {
        for (int i = 0; i < 20; ++i) {
          const std::uint16_t* const x = i % 2 == 0 ? even.data() : odd.data();
          decode_linear_cuda(c.shape, {x, norm_weight.data(), weight.data(), nullptr, nullptr, normal.data()},
                             i % 2 == 0 ? odd.data() : even.data(), stream);
        }
      });
      for (int repeat = 0; repeat < 5; ++repeat) {
        products.replay();
      }
      CHECK(even.guards_whole());
      CHECK(odd.guards_whole());
      return even.values();
    };
    CHECK(chain(true) == chain(false));
  }
}
