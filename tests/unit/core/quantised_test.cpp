#include "hestia/core/quantised.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/core/random.hpp"

namespace {

using namespace hestia;

// Value of a small float as its specification words it: exponent 0 is subnormal.
double small_float(unsigned bits, int exponent_bits, int mantissa_bits, int bias) {
  const auto mantissa = static_cast<double>(bits & ((1U << mantissa_bits) - 1U));
  const int exponent = static_cast<int>((bits >> mantissa_bits) & ((1U << exponent_bits) - 1U));
  const double sign = ((bits >> (exponent_bits + mantissa_bits)) & 1U) != 0 ? -1.0 : 1.0;
  const double steps = std::pow(2.0, mantissa_bits);
  return exponent == 0 ? sign * std::pow(2.0, 1 - bias) * (mantissa / steps)
                       : sign * std::pow(2.0, exponent - bias) * (1.0 + mantissa / steps);
}

std::vector<std::uint8_t> random_bytes(SplitMix64& random, std::size_t count, std::uint64_t high = 256) {
  std::vector<std::uint8_t> bytes(count);
  for (std::uint8_t& byte : bytes) {
    byte = static_cast<std::uint8_t>(random.below(high));
  }
  return bytes;
}

bool same(float a, double b) {
  return std::isnan(b) ? std::isnan(a) : a == static_cast<float>(b) && std::signbit(a) == std::signbit(b);
}

}  // namespace

TEST_CASE("small floats have the values of their specification") {
  for (unsigned bits = 0; bits < 256; ++bits) {
    CAPTURE(bits);
    const auto byte = static_cast<std::uint8_t>(bits);
    const bool nan = (bits & 0x7fU) == 0x7fU;
    CHECK(same(e4m3_value(byte), nan ? std::numeric_limits<double>::quiet_NaN() : small_float(bits, 4, 3, 7)));
    CHECK(same(e2m1_value(byte), small_float(bits & 15U, 2, 1, 1)));
    CHECK(same(e8m0_value(byte),
               bits == 255 ? std::numeric_limits<double>::quiet_NaN() : std::pow(2.0, static_cast<int>(bits) - 127)));
  }
  CHECK(e4m3_value(0x7e) == 448.0F);
  CHECK(e4m3_value(0x01) == 0.001953125F);
  CHECK(std::signbit(e4m3_value(0x80)));
}

TEST_CASE("E4M3 with block scales: every element times the scale of its block, rounded once") {
  SplitMix64 random(41);
  for (const std::vector<std::int64_t>& sizes : std::vector<std::vector<std::int64_t>>{
           {1, 1, 128, 128}, {128, 256, 128, 128}, {129, 257, 128, 128}, {7, 5, 2, 3}, {3, 8, 4, 1}, {5, 3, 1, 64}}) {
    const std::int64_t rows = sizes[0];
    const std::int64_t columns = sizes[1];
    CAPTURE(rows, columns);
    const std::vector<std::uint8_t> bits = random_bytes(random, static_cast<std::size_t>(rows * columns));
    const std::int64_t scale_columns = (columns + sizes[3] - 1) / sizes[3];
    std::vector<float> scales(static_cast<std::size_t>((rows + sizes[2] - 1) / sizes[2] * scale_columns));
    for (float& scale : scales) {
      scale = static_cast<float>(random.uniform()) * 1e-3F + 1e-6F;
    }
    std::vector<float> out(bits.size());
    dequantise_e4m3(bits, scales, columns, sizes[2], sizes[3], out);
    std::size_t wrong = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) {
        const unsigned byte = bits[r * columns + c];
        const double value =
            (byte & 0x7fU) == 0x7fU ? std::numeric_limits<double>::quiet_NaN() : small_float(byte, 4, 3, 7);
        wrong += same(out[r * columns + c], value * scales[r / sizes[2] * scale_columns + c / sizes[3]]) ? 0 : 1;
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("MXFP4: low bits first, one scale for 32 values, at the ends of the scale too") {
  SplitMix64 random(42);
  const std::size_t groups = 600;
  const std::vector<std::uint8_t> blocks = random_bytes(random, 16 * groups);
  std::vector<std::uint8_t> scales = random_bytes(random, groups);
  scales[0] = 0;
  scales[1] = 255;
  scales[2] = 254;
  scales[3] = 127;
  std::vector<float> out(32 * groups);
  dequantise_mxfp4(blocks, scales, out);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const unsigned byte = blocks[i / 2];
    const double value = small_float(i % 2 == 0 ? byte & 15U : byte >> 4U, 2, 1, 1);
    const unsigned scale = scales[i / 32];
    const double factor =
        scale == 255 ? std::numeric_limits<double>::quiet_NaN() : std::pow(2.0, static_cast<int>(scale) - 127);
    wrong += same(out[i], value * factor) ? 0 : 1;
  }
  CHECK(wrong == 0);
}

TEST_CASE("dequantising refuses sizes that do not fit together") {
  std::vector<std::uint8_t> bytes(32);
  std::vector<float> out(32);
  std::vector<float> scales(1);
  CHECK_THROWS_AS(dequantise_e4m3(bytes, scales, 8, 2, 8, out), std::invalid_argument);
  CHECK_THROWS_AS(dequantise_e4m3(bytes, scales, 5, 128, 128, out), std::invalid_argument);
  CHECK_THROWS_AS(dequantise_e4m3(bytes, scales, 0, 128, 128, out), std::invalid_argument);
  CHECK_THROWS_AS(dequantise_mxfp4(bytes, bytes, out), std::invalid_argument);
  out.resize(31);
  CHECK_THROWS_AS(dequantise_e4m3(bytes, scales, 8, 128, 128, out), std::invalid_argument);
}
