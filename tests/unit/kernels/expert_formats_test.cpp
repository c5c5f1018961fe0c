#include "hestia/kernels/expert_formats.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "decode_support.hpp"
#include "hestia/core/error.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

const std::vector<ExpertFormat> kIntegers = {ExpertFormat::kInt8, ExpertFormat::kInt4, ExpertFormat::kInt4Asymmetric};

DecodeExpertsShape shape_of(ExpertFormat format, std::int64_t hidden, std::int64_t expert_hidden) {
  return {.num_tokens = 1, .top_k = 1, .hidden_size = hidden, .expert_hidden_size = expert_hidden, .format = format};
}

/// Normal with mean `mean`, by twelve uniform ones.
Bits normal_bits(SplitMix64& random, std::size_t count, double mean) {
  Bits bits(count);
  for (std::uint16_t& value : bits) {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) {
      sum += random.uniform();
    }
    value = float_to_bfloat16_bits(static_cast<float>(0.02 * sum + mean));
  }
  return bits;
}

struct Expert {
  Bits gate, up, down;
};

Expert random_expert(SplitMix64& random, const DecodeExpertsShape& shape, double mean = 0.0) {
  const auto size = static_cast<std::size_t>(shape.hidden_size * shape.expert_hidden_size);
  return {normal_bits(random, size, mean), normal_bits(random, size, mean), normal_bits(random, size, mean)};
}

struct Stored {
  std::vector<float> gate, up, down;
  ExpertError error;
};

/// Packs between guards and unpacks again.
Stored store(const DecodeExpertsShape& shape, const Expert& expert) {
  Guarded<std::uint8_t> blob(std::vector<std::uint8_t>(expert_blob(shape).bytes, 0xEE));
  Stored stored;
  stored.error = quantise_expert(shape, expert.gate.data(), expert.up.data(), expert.down.data(), blob.data());
  CHECK(blob.guards_whole());
  // Nothing depends on what was in the blob before.
  Guarded<std::uint8_t> again(std::vector<std::uint8_t>(expert_blob(shape).bytes, 0x11));
  quantise_expert(shape, expert.gate.data(), expert.up.data(), expert.down.data(), again.data());
  CHECK(blob.values() == again.values());
  for (std::vector<float>* matrix : {&stored.gate, &stored.up, &stored.down}) {
    matrix->assign(expert.gate.size(), std::numeric_limits<float>::quiet_NaN());
  }
  dequantise_expert(shape, blob.data(), stored.gate.data(), stored.up.data(), stored.down.data());
  return stored;
}

/// One matrix by the definition, group by group: every stored weight is the nearest that its group's scale can say.
double check_matrix(ExpertFormat format, const Bits& weights, const std::vector<float>& stored, std::int64_t rows,
                    std::int64_t inputs) {
  double error = 0.0;
  double whole = 0.0;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t first = 0; first < inputs; first += kExpertGroup) {
      const std::int64_t end = std::min(first + kExpertGroup, inputs);
      double lowest = wide(weights[static_cast<std::size_t>(row * inputs + first)]);
      double highest = lowest;
      for (std::int64_t i = first; i < end; ++i) {
        lowest = std::min(lowest, wide(weights[static_cast<std::size_t>(row * inputs + i)]));
        highest = std::max(highest, wide(weights[static_cast<std::size_t>(row * inputs + i)]));
      }
      const auto bfloat16 = [](double value) { return wide(float_to_bfloat16_bits(static_cast<float>(value))); };
      double scale = 0.0;
      double minimum = 0.0;
      int least = 0;
      int most = 15;
      if (format == ExpertFormat::kInt8) {
        scale = bfloat16(std::max(-lowest, highest) / 127.0);
        least = -127;
        most = 127;
      } else if (format == ExpertFormat::kInt4) {
        scale = bfloat16((highest > -lowest ? -highest : -lowest) / 8.0);
        least = -8;
        most = 7;
      } else {
        minimum = lowest;
        scale = bfloat16((highest - lowest) / 15.0);
      }
      for (std::int64_t i = first; i < end; ++i) {
        const auto at = static_cast<std::size_t>(row * inputs + i);
        const double weight = wide(weights[at]);
        const double difference = std::abs(weight - static_cast<double>(stored[at]));
        double nearest = std::abs(weight - minimum);
        for (int q = least; q <= most; ++q) {
          nearest = std::min(nearest, std::abs(weight - minimum - q * scale));
        }
        REQUIRE(difference <= nearest + 1e-6 * std::abs(scale) + 1e-7 * std::abs(minimum));
        error += difference * difference;
        whole += weight * weight;
      }
    }
  }
  return error / whole;
}

struct Rounding {
  DecodeExpertsShape shape;
  std::vector<std::uint8_t> pool;      // kPool blobs
  std::vector<std::int32_t> blobs;     // wanted, in this order
  std::vector<std::uint8_t> expected;  // of `blobs`, untouched bytes where one is negative
};

constexpr std::int64_t kPool = 5;
constexpr std::uint8_t kBefore = 0xC3;

/// Packed experts and, by dequantise_expert, what their weights are rounded to.
Rounding random_rounding(SplitMix64& random, ExpertFormat format, std::int64_t hidden, std::int64_t expert_hidden,
                         bool listed) {
  Rounding c;
  c.shape = shape_of(format, hidden, expert_hidden);
  const std::size_t bytes = expert_blob(c.shape).bytes;
  const ExpertBlob wide_blob = expert_blob(shape_of(ExpertFormat::kBfloat16, hidden, expert_hidden));
  c.pool.resize(bytes * kPool);
  std::vector<std::vector<std::uint8_t>> rounded;
  for (std::size_t i = 0; i < kPool; ++i) {
    const Expert expert = random_expert(random, c.shape, 0.005);
    quantise_expert(c.shape, expert.gate.data(), expert.up.data(), expert.down.data(), c.pool.data() + i * bytes);
    const std::size_t size = expert.gate.size();
    std::vector<float> weights(3 * size);
    dequantise_expert(c.shape, c.pool.data() + i * bytes, weights.data(), weights.data() + size,
                      weights.data() + 2 * size);
    rounded.emplace_back(wide_blob.bytes);
    REQUIRE(wide_blob.bytes == 3 * size * sizeof(std::uint16_t));
    for (std::size_t w = 0; w < weights.size(); ++w) {
      const std::uint16_t bits = float_to_bfloat16_bits(weights[w]);
      std::memcpy(rounded.back().data() + w * sizeof bits, &bits, sizeof bits);
    }
  }
  c.blobs = listed ? std::vector<std::int32_t>{4, -1, 0, 4, 2, -7, 3} : std::vector<std::int32_t>{0, 1, 2, 3, 4};
  for (const std::int32_t blob : c.blobs) {
    const std::vector<std::uint8_t> of_blob =
        blob < 0 ? std::vector<std::uint8_t>(wide_blob.bytes, kBefore) : rounded[static_cast<std::size_t>(blob)];
    c.expected.insert(c.expected.end(), of_blob.begin(), of_blob.end());
  }
  return c;
}

void check_rounding(bool gpu) {
  SplitMix64 random(44);
  for (const auto& [hidden, expert_hidden] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{8, 8}, {128, 16}, {136, 24}, {264, 40}, {120, 392}}) {
    for (const ExpertFormat format :
         {ExpertFormat::kBfloat16, ExpertFormat::kInt8, ExpertFormat::kInt4, ExpertFormat::kInt4Asymmetric}) {
      for (const bool listed : {false, true}) {
        CAPTURE(hidden, expert_hidden, expert_format_name(format), listed);
        const Rounding c = random_rounding(random, format, hidden, expert_hidden, listed);
        Guarded<std::uint8_t> pool(c.pool, gpu);
        Guarded<std::int32_t> blobs(c.blobs, gpu);
        Guarded<std::uint8_t> out(std::vector<std::uint8_t>(c.expected.size(), kBefore), gpu);
        const auto count = static_cast<std::int64_t>(c.blobs.size());
        const std::int32_t* const list = listed ? blobs.data() : nullptr;
        if (gpu) {
          dequantise_experts_cuda(c.shape, pool.data(), list, count, out.data(), nullptr);
        } else {
          dequantise_experts_cpu(c.shape, pool.data(), list, count, out.data());
        }
        CHECK(out.values() == c.expected);
        CHECK(out.guards_whole());
        CHECK(pool.values() == c.pool);
      }
    }
  }
}

}  // namespace

TEST_CASE("expert formats: every weight is stored as the nearest that its group can say") {
  SplitMix64 random(41);
  // Less than a group and a row tile, exactly one of each, odd tails of both.
  for (const auto& [hidden, expert_hidden] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{8, 8}, {128, 16}, {136, 24}, {264, 40}, {120, 392}}) {
    for (const ExpertFormat format : kIntegers) {
      CAPTURE(hidden, expert_hidden, expert_format_name(format));
      const DecodeExpertsShape shape = shape_of(format, hidden, expert_hidden);
      const Expert expert = random_expert(random, shape, 0.01);
      const Stored stored = store(shape, expert);
      CHECK(check_matrix(format, expert.gate, stored.gate, expert_hidden, hidden) == Approx(stored.error.gate));
      CHECK(check_matrix(format, expert.up, stored.up, expert_hidden, hidden) == Approx(stored.error.up));
      CHECK(check_matrix(format, expert.down, stored.down, hidden, expert_hidden) == Approx(stored.error.down));
    }
  }
}

TEST_CASE("expert formats: the error of normal weights is that of the literature, bfloat16 has none") {
  SplitMix64 random(42);
  const auto error = [&](ExpertFormat format, double mean) {
    const DecodeExpertsShape shape = shape_of(format, 512, 256);
    return store(shape, random_expert(random, shape, mean)).error;
  };
  // A step d has the error d^2 / 12; the largest of 128 normal values is 2.7 deviations.
  CHECK(error(ExpertFormat::kInt8, 0.0).gate == Approx(3.9e-5).epsilon(0.15));
  CHECK(error(ExpertFormat::kInt4, 0.0).up == Approx(9.7e-3).epsilon(0.2));
  CHECK(error(ExpertFormat::kInt4Asymmetric, 0.0).down == Approx(1.03e-2).epsilon(0.2));
  // Weights on one side of 0: a minimum helps.
  CHECK(error(ExpertFormat::kInt4Asymmetric, 0.08).gate < 0.5 * error(ExpertFormat::kInt4, 0.08).gate);
  const DecodeExpertsShape shape = shape_of(ExpertFormat::kBfloat16, 24, 40);
  const Expert expert = random_expert(random, shape);
  const Stored stored = store(shape, expert);
  CHECK(stored.error.gate + stored.error.up + stored.error.down == 0.0);
  for (std::size_t i = 0; i < expert.gate.size(); ++i) {
    REQUIRE(float_to_bfloat16_bits(stored.gate[i]) == expert.gate[i]);
    REQUIRE(float_to_bfloat16_bits(stored.up[i]) == expert.up[i]);
    REQUIRE(float_to_bfloat16_bits(stored.down[i]) == expert.down[i]);
  }
}

TEST_CASE("expert formats: zeros, constants and extremes are stored, what is not finite is refused") {
  SplitMix64 random(43);
  for (const ExpertFormat format : kIntegers) {
    CAPTURE(expert_format_name(format));
    const DecodeExpertsShape shape = shape_of(format, 136, 8);
    const std::size_t size = std::size_t{136} * 8;
    const std::uint16_t minus = float_to_bfloat16_bits(-0.75F);
    const Stored plain = store(shape, {Bits(size, 0), Bits(size, minus), Bits(size, 0x0001)});  // smallest of all
    CHECK(std::all_of(plain.gate.begin(), plain.gate.end(), [](float v) { return v == 0.0F; }));
    CHECK(plain.error.gate == 0.0);
    for (const float value : plain.up) {
      REQUIRE(value == Approx(-0.75).epsilon(0.004));
    }
    CHECK(std::none_of(plain.down.begin(), plain.down.end(), [](float v) { return std::isnan(v); }));
    Expert expert = random_expert(random, shape);
    expert.up[3 * 136 + 130] = 0x7f80;
    std::vector<std::uint8_t> blob(expert_blob(shape).bytes);
    CHECK_THROWS_AS(quantise_expert(shape, expert.gate.data(), expert.up.data(), expert.down.data(), blob.data()),
                    InputError);
    CHECK_THROWS_WITH(quantise_expert(shape, expert.gate.data(), expert.up.data(), expert.down.data(), blob.data()),
                      Catch::Contains("up holds a value that is not finite in row 3, column 130, got inf"));
  }
}

TEST_CASE("expert formats: blobs have the size of their bits") {
  const auto bytes = [](ExpertFormat format, std::int64_t hidden, std::int64_t expert_hidden) {
    return expert_blob(shape_of(format, hidden, expert_hidden)).bytes;
  };
  constexpr std::size_t kWeights = std::size_t{3} * 2048 * 1024;
  CHECK(bytes(ExpertFormat::kBfloat16, 2048, 1024) == kWeights * 2);
  CHECK(bytes(ExpertFormat::kInt8, 2048, 1024) == kWeights + kWeights / 128 * 2);
  CHECK(bytes(ExpertFormat::kInt4, 2048, 1024) == kWeights / 2 + kWeights / 128 * 2);
  CHECK(bytes(ExpertFormat::kInt4Asymmetric, 2048, 1024) == kWeights / 2 + kWeights / 128 * 4);
  for (const ExpertFormat format : kIntegers) {
    const ExpertBlob blob = expert_blob(shape_of(format, 136, 24));
    for (const std::size_t offset :
         {blob.gate_scales, blob.up, blob.up_scales, blob.down, blob.down_scales, blob.bytes}) {
      CHECK(offset % 16 == 0);
    }
  }
}

TEST_CASE("expert formats: names go both ways, a wrong one is answered with the nearest") {
  CHECK(expert_format_names() == std::vector<std::string>{"bf16", "int8", "int4", "int4-asymmetric"});
  for (const std::string& name : expert_format_names()) {
    CHECK(expert_format_name(expert_format_from_name(name)) == name);
  }
  CHECK_THROWS_AS(expert_format_from_name("int4-asymetric"), UsageError);
  CHECK_THROWS_WITH(expert_format_from_name("int4-asymetric"), Catch::Contains("did you mean \"int4-asymmetric\"?"));
}

TEST_CASE("expert formats: whole blobs come back in bfloat16, each weight rounded once") {
  check_rounding(false);
  const DecodeExpertsShape shape = shape_of(ExpertFormat::kInt4, 8, 8);
  CHECK_THROWS_AS(dequantise_experts_cpu(shape, nullptr, nullptr, -1, nullptr), std::invalid_argument);
  CHECK_NOTHROW(dequantise_experts_cpu(shape, nullptr, nullptr, 0, nullptr));
}

TEST_CASE("expert formats: the GPU rounds whole blobs to the bits of the CPU", "[gpu]") {
  if (gpu_ready()) {
    check_rounding(true);
  }
}
