#pragma once

#include <cstdint>
#include <span>

namespace hestia {

/// Value of a float8 E4M3 byte as safetensors stores it (finite variant, OCP 8-bit floating point specification 1.0):
/// sign, 4 exponent bits of bias 7, 3 mantissa bits, subnormals; 0x7f and 0xff are NaN, there is no infinity.
[[nodiscard]] float e4m3_value(std::uint8_t bits);
/// Value of the low 4 bits as FP4 E2M1 (OCP microscaling specification 1.0): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and negatives.
[[nodiscard]] float e2m1_value(std::uint8_t bits);
/// Value of a shared scale E8M0 (the same specification): 2^(bits - 127), 255 is NaN.
[[nodiscard]] float e8m0_value(std::uint8_t bits);

/// Rows of a matrix of E4M3 values with a scale for each block of block_rows x block_columns:
/// out[r][c] = e4m3(bits[r][c]) * scales[r / block_rows][c / block_columns], rounded to float32 once. `bits` [rows,
/// columns] begins at the first row of a block; `scales` [ceil(rows / block_rows), ceil(columns / block_columns)];
/// `out` [rows, columns]; all row-major. The last block of a row or column may be partly filled. Throws
/// std::invalid_argument when the sizes do not fit together.
void dequantise_e4m3(std::span<const std::uint8_t> bits, std::span<const float> scales, std::int64_t columns,
                     std::int64_t block_rows, std::int64_t block_columns, std::span<float> out);

/// MXFP4: groups of 32 E2M1 values, two to a byte, the earlier one in the low bits, with one E8M0 scale a group:
/// out[i] = e2m1(value i) * e8m0(scale of i / 32), exact in float32 but for an overflow to infinity. `blocks` 16 bytes
/// a group, `scales` one, `out` 32 values. Throws std::invalid_argument when the sizes do not fit together.
void dequantise_mxfp4(std::span<const std::uint8_t> blocks, std::span<const std::uint8_t> scales, std::span<float> out);

}  // namespace hestia
