#include "hestia/core/quantised.hpp"

#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace hestia {
namespace {

constexpr std::size_t kGroup = 32;

template <std::size_t Size, class Function>
std::array<float, Size> table_of(Function value) {
  std::array<float, Size> table{};
  for (std::size_t bits = 0; bits < Size; ++bits) {
    table[bits] = value(static_cast<std::uint8_t>(bits));
  }
  return table;
}

}  // namespace

float e4m3_value(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15;
  const int mantissa = bits & 7;
  float value = 0.0F;
  if (exponent == 15 && mantissa == 7) {
    value = std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -9);
  } else {
    value = std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  }
  return (bits & 0x80) != 0 ? -value : value;
}

float e2m1_value(std::uint8_t bits) {
  constexpr std::array<float, 8> kValues = {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F};
  const float value = kValues[bits & 7U];
  return (bits & 8) != 0 ? -value : value;
}

float e8m0_value(std::uint8_t bits) {
  return bits == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0F, static_cast<int>(bits) - 127);
}

void dequantise_e4m3(std::span<const std::uint8_t> bits, std::span<const float> scales, std::int64_t columns,
                     std::int64_t block_rows, std::int64_t block_columns, std::span<float> out) {
  static const std::array<float, 256> kValues = table_of<256>(e4m3_value);
  if (columns < 1 || block_rows < 1 || block_columns < 1 || bits.size() != out.size() ||
      bits.size() % static_cast<std::size_t>(columns) != 0) {
    throw std::invalid_argument("dequantise_e4m3: rows, columns and blocks do not fit together");
  }
  const std::int64_t rows = static_cast<std::int64_t>(bits.size()) / columns;
  const std::int64_t scale_columns = (columns + block_columns - 1) / block_columns;
  if (static_cast<std::int64_t>(scales.size()) != (rows + block_rows - 1) / block_rows * scale_columns) {
    throw std::invalid_argument("dequantise_e4m3: there must be one scale for each block");
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* const scale = scales.data() + row / block_rows * scale_columns;
    for (std::int64_t column = 0; column < columns; ++column) {
      const std::int64_t at = row * columns + column;
      out[at] = kValues[bits[at]] * scale[column / block_columns];
    }
  }
}

void dequantise_mxfp4(std::span<const std::uint8_t> blocks, std::span<const std::uint8_t> scales,
                      std::span<float> out) {
  static const std::array<float, 16> kValues = table_of<16>(e2m1_value);
  if (blocks.size() != scales.size() * (kGroup / 2) || out.size() != scales.size() * kGroup) {
    throw std::invalid_argument("dequantise_mxfp4: a scale belongs to 16 bytes and 32 values");
  }
  for (std::size_t group = 0; group < scales.size(); ++group) {
    const float scale = e8m0_value(scales[group]);
    for (std::size_t i = 0; i < kGroup / 2; ++i) {
      const std::uint8_t pair = blocks[group * (kGroup / 2) + i];
      out[group * kGroup + 2 * i] = kValues[pair & 15U] * scale;
      out[group * kGroup + 2 * i + 1] = kValues[pair >> 4U] * scale;
    }
  }
}

}  // namespace hestia
