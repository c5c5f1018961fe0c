#include "hestia/core/float_bits.hpp"

#include <bit>
#include <cmath>

#include <catch2/catch.hpp>

#include "hestia/core/random.hpp"

namespace hestia {
namespace {

TEST_CASE("Half precision rounds to the nearest value, ties to even") {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = half_bits_to_float(static_cast<std::uint16_t>(bits));
    if (!std::isnan(value)) {
      REQUIRE(float_to_half_bits(value) == bits);
    }
  }
  // Between neighbours: the middle goes to the even one, the nearest floats on both sides of it do not.
  for (std::uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const float low = half_bits_to_float(static_cast<std::uint16_t>(bits));
    const float high = half_bits_to_float(static_cast<std::uint16_t>(bits + 1));
    const float middle = (low + high) / 2;
    REQUIRE(float_to_half_bits(middle) == (bits % 2 == 0 ? bits : bits + 1));
    REQUIRE(float_to_half_bits(std::nextafter(middle, 0.0F)) == bits);
    REQUIRE(float_to_half_bits(std::nextafter(middle, 1e9F)) == bits + 1);
    REQUIRE(float_to_half_bits(-middle) == (0x8000U | (bits % 2 == 0 ? bits : bits + 1)));
  }
  CHECK(half_bits_to_float(0x3C00) == 1.0F);
  CHECK(half_bits_to_float(0x0001) == 0x1p-24F);
  CHECK(half_bits_to_float(0x7BFF) == 65504.0F);
  CHECK(float_to_half_bits(65519.9F) == 0x7BFF);
  CHECK(float_to_half_bits(65520.0F) == 0x7C00);
  CHECK(float_to_half_bits(INFINITY) == 0x7C00);
  CHECK(float_to_half_bits(-INFINITY) == 0xFC00);
  CHECK((float_to_half_bits(NAN) & 0x7C00) == 0x7C00);
  CHECK(std::isnan(half_bits_to_float(float_to_half_bits(NAN))));
}

TEST_CASE("bfloat16 rounds to the nearest value, ties to even") {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = bfloat16_bits_to_float(static_cast<std::uint16_t>(bits));
    CHECK(std::bit_cast<std::uint32_t>(value) == bits << 16);
    if (!std::isnan(value)) {
      REQUIRE(float_to_bfloat16_bits(value) == bits);
    } else {
      REQUIRE(std::isnan(bfloat16_bits_to_float(float_to_bfloat16_bits(value))));
    }
  }
  SplitMix64 random(5);
  for (int i = 0; i < 20000; ++i) {
    const auto low = static_cast<std::uint16_t>(random.below(0x7F7F));
    const float below = bfloat16_bits_to_float(low);
    const float above = bfloat16_bits_to_float(static_cast<std::uint16_t>(low + 1));
    const float middle = std::bit_cast<float>((static_cast<std::uint32_t>(low) << 16) | 0x8000U);
    REQUIRE(float_to_bfloat16_bits(middle) == (low % 2 == 0 ? low : low + 1));
    REQUIRE(bfloat16_bits_to_float(float_to_bfloat16_bits(std::nextafter(middle, 0.0F))) == below);
    REQUIRE(bfloat16_bits_to_float(float_to_bfloat16_bits(std::nextafter(middle, INFINITY))) == above);
    REQUIRE(float_to_bfloat16_bits(-middle) == (0x8000U | (low % 2 == 0 ? low : low + 1)));
  }
  CHECK(float_to_bfloat16_bits(INFINITY) == 0x7F80);
  CHECK(float_to_bfloat16_bits(3.4e38F) == 0x7F80);
}

}  // namespace
}  // namespace hestia
