#pragma once

#include <cstdint>

namespace hestia {

/// IEEE half bits of `value`, round to nearest even.
[[nodiscard]] std::uint16_t float_to_half_bits(float value);
/// The value of IEEE half bits.
[[nodiscard]] float half_bits_to_float(std::uint16_t bits);
/// bfloat16 bits of `value` (the upper half of a float32), round to nearest even; NaN stays NaN.
[[nodiscard]] std::uint16_t float_to_bfloat16_bits(float value);
/// The value of bfloat16 bits.
[[nodiscard]] float bfloat16_bits_to_float(std::uint16_t bits);

}  // namespace hestia
