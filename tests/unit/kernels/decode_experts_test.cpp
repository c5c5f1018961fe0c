#include "hestia/kernels/decode_experts.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "decode_support.hpp"
#include "hestia/kernels/expert_formats.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

constexpr std::uint16_t kUntouchedBits = 0x1234;
constexpr float kUntouched = -77.0F;

const std::vector<ExpertFormat> kFormats = {ExpertFormat::kBfloat16, ExpertFormat::kInt8, ExpertFormat::kInt4,
                                            ExpertFormat::kInt4Asymmetric};

struct Case {
  DecodeExpertsShape shape;
  std::int64_t num_experts = 0;
  std::vector<Bits> experts;                   // one blob each
  std::vector<std::vector<float>> weights_of;  // what the blobs stand for: gate, up, down
  std::vector<std::int32_t> chosen;            // [T, K]
  Bits x;
  std::vector<float> weights;
  Bits residual;

  [[nodiscard]] std::size_t pairs() const { return chosen.size(); }
  [[nodiscard]] std::size_t hidden() const { return static_cast<std::size_t>(shape.hidden_size); }
  [[nodiscard]] std::size_t expert_hidden() const { return static_cast<std::size_t>(shape.expert_hidden_size); }
};

Case random_case(SplitMix64& random, ExpertFormat format, std::int64_t tokens, std::int64_t top_k, std::int64_t hidden,
                 std::int64_t expert_hidden, std::int64_t num_experts) {
  Case c;
  c.shape = {.num_tokens = tokens,
             .top_k = top_k,
             .hidden_size = hidden,
             .expert_hidden_size = expert_hidden,
             .format = format};
  c.num_experts = num_experts;
  const std::size_t matrix = c.hidden() * c.expert_hidden();
  for (std::int64_t e = 0; e < num_experts; ++e) {
    // Not around 0, so that a minimum has something to do, and each row and group of another size.
    Bits weights = random_bits(random, 3 * matrix, 2.0 / std::sqrt(double(hidden)));
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const double factor = 0.5 + static_cast<double>(i / 64 % 7) / 7.0;
      weights[i] =
          float_to_bfloat16_bits(static_cast<float>((wide(weights[i]) + 0.3 / std::sqrt(double(hidden))) * factor));
    }
    Bits blob(expert_blob(c.shape).bytes / 2, kUntouchedBits);
    quantise_expert(c.shape, weights.data(), weights.data() + matrix, weights.data() + 2 * matrix, blob.data());
    std::vector<float> stored(3 * matrix);
    dequantise_expert(c.shape, blob.data(), stored.data(), stored.data() + matrix, stored.data() + 2 * matrix);
    c.experts.push_back(std::move(blob));
    c.weights_of.push_back(std::move(stored));
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(num_experts));
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t k = 0; k < top_k; ++k) {
      if (k >= num_experts) {  // as a trace of fewer experts is filled up
        c.chosen.push_back(order[random.below(static_cast<std::uint64_t>(num_experts))]);
        continue;
      }
      std::swap(order[k], order[k + random.below(static_cast<std::uint64_t>(num_experts - k))]);
      c.chosen.push_back(order[k]);
    }
  }
  c.x = random_bits(random, static_cast<std::size_t>(tokens) * c.hidden(), 2.0);
  c.weights = random_floats(random, c.pairs(), 0.5);
  c.residual = random_bits(random, c.x.size(), 1.0);
  return c;
}

/// Experts in slots: slot_of[e], and the pool that it describes; `slots` many, the others hold NaN.
struct Pool {
  std::vector<std::int32_t> slot_of;
  Bits blobs;
};

Pool pool_of(const Case& c, SplitMix64& random, std::int64_t slots) {
  Pool pool;
  std::vector<std::int32_t> order(static_cast<std::size_t>(slots));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = 0; i + 1 < order.size(); ++i) {
    std::swap(order[i], order[i + random.below(order.size() - i)]);
  }
  const std::size_t size = c.experts[0].size();
  pool.blobs.assign(size * order.size(), 0x7fc0);
  for (std::int64_t e = 0; e < c.num_experts; ++e) {
    pool.slot_of.push_back(order[e]);
    std::copy(c.experts[e].begin(), c.experts[e].end(),
              pool.blobs.begin() + static_cast<std::ptrdiff_t>(order[e] * size));
  }
  return pool;
}

struct Result {
  Bits h;
  std::vector<float> y;
  Bits out;
  Bits fused;  // of decode_down_combine
  bool guards_whole = true;
};

/// All pairs in `num_waves` waves (pair p in wave wave_of[p]); the fused form serves the last wave itself.
Result run(const Case& c, const Pool& pool, const std::vector<int>& wave_of, int num_waves, bool gpu) {
  Guarded<std::uint16_t> x(c.x, gpu);
  Guarded<std::uint16_t> blobs(pool.blobs, gpu);
  Guarded<float> weights(c.weights, gpu);
  Guarded<std::uint16_t> residual(c.residual, gpu);
  Guarded<std::uint16_t> h(Bits(c.pairs() * c.expert_hidden(), kUntouchedBits), gpu);
  Guarded<float> y(std::vector<float>(c.pairs() * c.hidden(), kUntouched), gpu);
  Guarded<std::uint16_t> out(c.residual, gpu);  // in place
  Guarded<std::uint16_t> fused(Bits(c.x.size(), kUntouchedBits), gpu);
  for (int wave = 0; wave < num_waves; ++wave) {
    std::vector<std::int32_t> table(c.pairs());
    for (std::size_t pair = 0; pair < c.pairs(); ++pair) {
      table[pair] = wave_of[pair] == wave ? pool.slot_of[static_cast<std::size_t>(c.chosen[pair])] : -1;
    }
    Guarded<std::int32_t> slots(table, gpu);
    if (gpu) {
      decode_gate_up_cuda(c.shape, x.data(), slots.data(), blobs.data(), h.data(), nullptr);
      if (wave + 1 == num_waves) {
        decode_down_combine_cuda(c.shape, h.data(), slots.data(), blobs.data(), weights.data(),
                                 num_waves > 1 ? y.data() : nullptr, residual.data(), fused.data(), nullptr);
      }
      decode_down_cuda(c.shape, h.data(), slots.data(), blobs.data(), y.data(), nullptr);
    } else {
      decode_gate_up_cpu(c.shape, x.data(), slots.data(), blobs.data(), h.data());
      if (wave + 1 == num_waves) {
        decode_down_combine_cpu(c.shape, h.data(), slots.data(), blobs.data(), weights.data(),
                                num_waves > 1 ? y.data() : nullptr, residual.data(), fused.data());
      }
      decode_down_cpu(c.shape, h.data(), slots.data(), blobs.data(), y.data());
    }
    if (gpu) {
      require_cuda(cudaDeviceSynchronize());  // before the slot table goes
    }
  }
  if (gpu) {
    decode_combine_cuda(c.shape, y.data(), weights.data(), out.data(), out.data(), nullptr);
  } else {
    decode_combine_cpu(c.shape, y.data(), weights.data(), out.data(), out.data());
  }
  Result result{h.values(), y.values(), out.values(), fused.values()};
  result.guards_whole = h.guards_whole() && y.guards_whole() && out.guards_whole() && fused.guards_whole() &&
                        x.guards_whole() && blobs.guards_whole();
  return result;
}

Result run_at_once(const Case& c, const Pool& pool, bool gpu) {
  return run(c, pool, std::vector<int>(c.pairs(), 0), 1, gpu);
}

/// In double precision from the formula, h rounded to bfloat16 nowhere.
std::vector<double> by_definition(const Case& c) {
  std::vector<double> out;
  const std::size_t matrix = c.hidden() * c.expert_hidden();
  for (std::size_t t = 0; t < static_cast<std::size_t>(c.shape.num_tokens); ++t) {
    std::vector<double> sum(c.hidden(), 0.0);
    for (std::size_t k = 0; k < static_cast<std::size_t>(c.shape.top_k); ++k) {
      const std::size_t pair = t * static_cast<std::size_t>(c.shape.top_k) + k;
      const std::vector<float>& expert = c.weights_of[static_cast<std::size_t>(c.chosen[pair])];
      for (std::size_t f = 0; f < c.expert_hidden(); ++f) {
        double gate = 0.0;
        double up = 0.0;
        for (std::size_t i = 0; i < c.hidden(); ++i) {
          gate += double(expert[f * c.hidden() + i]) * wide(c.x[t * c.hidden() + i]);
          up += double(expert[matrix + f * c.hidden() + i]) * wide(c.x[t * c.hidden() + i]);
        }
        const double h = gate / (1.0 + std::exp(-gate)) * up * static_cast<double>(c.weights[pair]);
        for (std::size_t i = 0; i < c.hidden(); ++i) {
          sum[i] += h * double(expert[2 * matrix + i * c.expert_hidden() + f]);
        }
      }
    }
    for (std::size_t i = 0; i < c.hidden(); ++i) {
      out.push_back(sum[i] + wide(c.residual[t * c.hidden() + i]));
    }
  }
  return out;
}

/// Largest difference in units of 2^-8 (a bfloat16 rounding) of the largest value.
double worst(const Bits& actual, const std::vector<double>& expected) {
  double largest = 0.0;
  double difference = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    difference = std::max(difference, std::abs(wide(actual[i]) - expected[i]));
  }
  return difference / largest * 256.0;
}

std::vector<double> widened(const Bits& bits) {
  std::vector<double> values(bits.size());
  std::transform(bits.begin(), bits.end(), values.begin(), wide);
  return values;
}

struct Size {
  std::int64_t tokens, top_k, hidden, expert_hidden, experts;
};
// Odd for the kernels: less than a warp's 256 values, not a multiple of them, more than four times them, odd tiles.
const std::vector<Size> kSizes = {{1, 1, 8, 8, 1},     {1, 8, 264, 40, 9}, {2, 3, 24, 520, 5},  {5, 2, 1160, 72, 4},
                                  {32, 4, 40, 104, 6}, {32, 1, 16, 24, 1}, {7, 32, 32, 16, 40}, {32, 5, 72, 40, 2}};

/// What the GPU is asked for: bfloat16 by either of its kernels.
struct Way {
  ExpertFormat format;
  std::int64_t tensor_rows;
};
constexpr std::int64_t kNever = kDecodeMaxTokens + 1;
const std::vector<Way> kWays = {{ExpertFormat::kBfloat16, kNever},
                                {ExpertFormat::kBfloat16, 1},
                                {ExpertFormat::kInt8, 1},
                                {ExpertFormat::kInt4, 1},
                                {ExpertFormat::kInt4Asymmetric, 1}};

std::vector<std::pair<Size, Way>> all_ways(const std::vector<Size>& sizes) {
  std::vector<std::pair<Size, Way>> cases;
  for (const Size& size : sizes) {
    for (const Way& way : kWays) {
      cases.emplace_back(size, way);
    }
  }
  return cases;
}

/// Every size in every format.
std::vector<std::pair<Size, ExpertFormat>> all_cases(const std::vector<Size>& sizes) {
  std::vector<std::pair<Size, ExpertFormat>> cases;
  for (const Size& size : sizes) {
    for (const ExpertFormat format : kFormats) {
      cases.emplace_back(size, format);
    }
  }
  return cases;
}

}  // namespace

TEST_CASE("decode experts: the plain loop equals the definition in double precision") {
  SplitMix64 random(11);
  for (const auto& [s, format] : all_cases(kSizes)) {
    CAPTURE(s.tokens, s.top_k, s.hidden, s.expert_hidden, s.experts, expert_format_name(format));
    const Case c = random_case(random, format, s.tokens, s.top_k, s.hidden, s.expert_hidden, s.experts);
    const Result result = run_at_once(c, pool_of(c, random, s.experts + 2), false);
    CHECK(worst(result.out, by_definition(c)) < 2.0);
    CHECK(result.fused == result.out);
    CHECK(result.guards_whole);
  }
}

TEST_CASE("decode experts: slots and waves leave the plain loop's bits as they are") {
  SplitMix64 random(12);
  for (const ExpertFormat format : kFormats) {
    const Case c = random_case(random, format, 4, 5, 72, 40, 8);
    const Result at_once = run_at_once(c, pool_of(c, random, 8), false);
    std::vector<int> wave_of(c.pairs());
    for (int& wave : wave_of) {
      wave = static_cast<int>(random.below(3));
    }
    const Result in_waves = run(c, pool_of(c, random, 13), wave_of, 3, false);
    CHECK(in_waves.h == at_once.h);
    CHECK(in_waves.y == at_once.y);
    CHECK(in_waves.out == at_once.out);
    CHECK(in_waves.fused == at_once.out);
  }
}

TEST_CASE("decode experts: pairs without a slot are neither written nor added") {
  SplitMix64 random(13);
  Case c = random_case(random, ExpertFormat::kInt4, 2, 3, 24, 16, 4);
  std::vector<int> wave_of(c.pairs(), 0);
  wave_of[1] = 1;  // never served
  const Result part = run(c, pool_of(c, random, 4), wave_of, 1, false);
  CHECK(std::all_of(part.h.begin() + 16, part.h.begin() + 32, [](std::uint16_t v) { return v == kUntouchedBits; }));
  CHECK(std::all_of(part.y.begin() + 24, part.y.begin() + 48, [](float v) { return v == kUntouched; }));
  CHECK(std::none_of(part.y.begin() + 48, part.y.end(), [](float v) { return v == kUntouched; }));
  c.weights[1] = 0.0F;
  CHECK(part.fused == run_at_once(c, pool_of(c, random, 4), false).out);
}

TEST_CASE("decode experts: sizes that the kernels do not take are refused by name") {
  const DecodeExpertsShape good{.num_tokens = 1, .top_k = 8, .hidden_size = 64, .expert_hidden_size = 32};
  CHECK(expert_blob(good).bytes == std::size_t{3} * 64 * 32 * 2);
  CHECK(expert_blob(good).down == std::size_t{2} * 64 * 32 * 2);
  const auto refused = [&](auto change, const std::string& text) {
    DecodeExpertsShape shape = good;
    change(shape);
    CHECK_THROWS_WITH(expert_blob(shape), Catch::Contains(text));
  };
  refused([](DecodeExpertsShape& s) { s.num_tokens = 33; }, "rows of a step must be from 1 to 32, got 33");
  refused([](DecodeExpertsShape& s) { s.top_k = 0; }, "experts per token must be from 1 to 32, got 0");
  refused([](DecodeExpertsShape& s) { s.hidden_size = 60; }, "the hidden size must be a multiple of 8, got 60");
  refused([](DecodeExpertsShape& s) { s.expert_hidden_size = 0; },
          "experts' hidden size must be a multiple of 8, got 0");
}

TEST_CASE("decode experts: CUDA equals the plain loop", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(14);
  std::vector<Size> sizes = kSizes;
  sizes.push_back({3, 8, 2048, 1024, 16});
  for (const auto& [s, way] : all_ways(sizes)) {
    CAPTURE(s.tokens, s.top_k, s.hidden, s.expert_hidden, s.experts, expert_format_name(way.format), way.tensor_rows);
    Case c = random_case(random, way.format, s.tokens, s.top_k, s.hidden, s.expert_hidden, s.experts);
    c.shape.tensor_rows = way.tensor_rows;
    const Pool pool = pool_of(c, random, s.experts + 2);
    const Result gpu = run_at_once(c, pool, true);
    CHECK(gpu.guards_whole);
    // Float32 sums in another order: now and then a rounding of h or of the result falls the other way.
    CHECK(worst(gpu.out, widened(run_at_once(c, pool, false).out)) < 1.5);
    CHECK(gpu.fused == gpu.out);
  }
}

TEST_CASE("decode experts: slots, waves and other rows do not change a bit on CUDA", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(15);
  for (const auto& [s, way] :
       all_ways({{32, 8, 264, 136, 16}, {9, 3, 2048, 1024, 5}, {32, 2, 128, 1288, 2}, {32, 3, 4104, 72, 2}})) {
    CAPTURE(s.tokens, s.top_k, s.hidden, s.expert_hidden, s.experts, expert_format_name(way.format), way.tensor_rows);
    Case c = random_case(random, way.format, s.tokens, s.top_k, s.hidden, s.expert_hidden, s.experts);
    c.shape.tensor_rows = way.tensor_rows;
    const Result at_once = run_at_once(c, pool_of(c, random, s.experts), true);
    for (int num_waves = 1; num_waves <= 4; ++num_waves) {
      std::vector<int> wave_of(c.pairs());
      for (int& wave : wave_of) {
        wave = static_cast<int>(random.below(static_cast<std::uint64_t>(num_waves)));
      }
      const Result in_waves = run(c, pool_of(c, random, s.experts + 3), wave_of, num_waves, true);
      CHECK(in_waves.guards_whole);
      CHECK(in_waves.h == at_once.h);
      CHECK(in_waves.y == at_once.y);
      CHECK(in_waves.out == at_once.out);
      CHECK(in_waves.fused == at_once.out);
    }
    const Pool pool = pool_of(c, random, s.experts);
    const auto top_k = static_cast<std::size_t>(s.top_k);
    for (std::size_t t = 0; t < static_cast<std::size_t>(s.tokens); ++t) {
      Case alone = c;
      alone.shape.num_tokens = 1;
      const auto cut = [&](auto& values, std::size_t width) {
        values = {values.begin() + static_cast<std::ptrdiff_t>(t * width),
                  values.begin() + static_cast<std::ptrdiff_t>((t + 1) * width)};
      };
      cut(alone.chosen, top_k);
      cut(alone.weights, top_k);
      cut(alone.x, c.hidden());
      cut(alone.residual, c.hidden());
      const Result one = run_at_once(alone, pool, true);
      Bits expected = at_once.out;
      cut(expected, c.hidden());
      CHECK(one.out == expected);
      CHECK(one.fused == expected);
    }
  }
}

TEST_CASE("decode experts: bfloat16 goes over tensor cores from kDecodeTensorRows rows on", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(17);
  for (const std::int64_t tokens : {kDecodeTensorRows - 1, kDecodeTensorRows}) {
    CAPTURE(tokens);
    Case c = random_case(random, ExpertFormat::kBfloat16, tokens, 2, 2048, 64, 3);
    const Pool pool = pool_of(c, random, 3);
    const Result usual = run_at_once(c, pool, true);
    c.shape.tensor_rows = 1;
    const Result tensors = run_at_once(c, pool, true);
    c.shape.tensor_rows = kNever;
    const Result rows = run_at_once(c, pool, true);
    CHECK(tensors.y != rows.y);  // another order of summation
    CHECK(usual.y == (tokens < kDecodeTensorRows ? rows.y : tensors.y));
    CHECK(usual.h == (tokens < kDecodeTensorRows ? rows.h : tensors.h));
  }
}

TEST_CASE("decode experts: dependent launches await one another", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(16);
  for (const auto& [s, way] : all_ways({{1, 8, 512, 264, 12}, {5, 3, 264, 520, 6}})) {
    CAPTURE(s.tokens, s.top_k, s.hidden, s.expert_hidden, s.experts, expert_format_name(way.format), way.tensor_rows);
    Case c = random_case(random, way.format, s.tokens, s.top_k, s.hidden, s.expert_hidden, s.experts);
    c.shape.tensor_rows = way.tensor_rows;
    std::for_each(c.weights.begin(), c.weights.end(), [](float& weight) { weight *= 0.01F; });  // layers stay finite
    const Pool pool = pool_of(c, random, s.experts);
    std::vector<std::int32_t> table;
    for (const std::int32_t expert : c.chosen) {
      table.push_back(pool.slot_of[static_cast<std::size_t>(expert)]);
    }
    const auto chain = [&](bool dependent) {
      c.shape.dependent = dependent;
      Guarded<std::uint16_t> x(c.x, true);
      Guarded<std::uint16_t> blobs(pool.blobs, true);
      Guarded<std::int32_t> slots(table, true);
      Guarded<float> weights(c.weights, true);
      Guarded<std::uint16_t> residual(c.residual, true);
      Guarded<std::uint16_t> h(Bits(c.pairs() * c.expert_hidden(), kUntouchedBits), true);
      Guarded<float> y(std::vector<float>(c.pairs() * c.hidden(), kUntouched), true);
      // Each product reads what the one before it wrote; the mix of the experts is the next input.
      Captured layers([&](void* stream) {
        for (int i = 0; i < 10; ++i) {
          decode_gate_up_cuda(c.shape, x.data(), slots.data(), blobs.data(), h.data(), stream);
          if (i % 2 == 0) {
            decode_down_combine_cuda(c.shape, h.data(), slots.data(), blobs.data(), weights.data(), nullptr,
                                     residual.data(), x.data(), stream);
          } else {
            decode_down_cuda(c.shape, h.data(), slots.data(), blobs.data(), y.data(), stream);
            decode_combine_cuda(c.shape, y.data(), weights.data(), residual.data(), x.data(), stream);
          }
        }
      });
      layers.replay();
      CHECK(h.guards_whole());
      CHECK(y.guards_whole());
      CHECK(x.guards_whole());
      return x.values();
    };
    const Bits plain = chain(false);
    CHECK(chain(true) == plain);
    CHECK(plain != c.residual);
    CHECK(std::none_of(plain.begin(), plain.end(), [](std::uint16_t bits) { return std::isnan(wide(bits)); }));
  }
}
