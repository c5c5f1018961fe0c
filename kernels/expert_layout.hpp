#pragma once

#include <cstddef>
#include <cstdint>

#include "hestia/core/host_device.hpp"
#include "hestia/kernels/decode_experts.hpp"

// Where the integers of an expert lie. A matrix is cut into tiles of 16 rows and one group of 128 inputs, row tile by
// row tile, in it group by group. Tensor cores take 16 x 16 weights at once (mma.m16n8k16); which inputs these are is
// free, as long as the activations follow. So of the 32 lanes of a warp, lane l holds rows l / 4 and l / 4 + 8 of a
// tile, and of each the 32 inputs that begin at l % 4 * 32: 16 bytes for 4 bits, twice that for 8, which a warp loads
// 512 bytes at a time. Step s of 8 multiplies inputs 4 s to 4 s + 3 of every lane.

namespace hestia {

constexpr int kTileRows = 16;
constexpr int kTileInputs = static_cast<int>(kExpertGroup);
constexpr int kTileLoad = 512;  // bytes that a warp loads at once

/// Loads of a warp for one tile.
[[nodiscard]] HESTIA_HOST_DEVICE constexpr int tile_loads(ExpertFormat format) {
  return format == ExpertFormat::kInt8 ? 4 : 2;
}

/// Bytes of a group's scale, with its minimum behind it where there is one. That of row r of tile t is number
/// t * kTileRows + r.
[[nodiscard]] HESTIA_HOST_DEVICE constexpr int scale_bytes(ExpertFormat format) {
  return format == ExpertFormat::kInt4Asymmetric ? 4 : 2;
}

/// Sizes of a matrix in tiles.
struct TileCounts {
  std::int64_t rows = 0;
  std::int64_t groups = 0;
};

[[nodiscard]] constexpr TileCounts tile_counts(std::int64_t rows, std::int64_t inputs) {
  return {(rows + kTileRows - 1) / kTileRows, (inputs + kTileInputs - 1) / kTileInputs};
}

/// Byte in its tile of the weight in `row` and `input`, both below the tile's sizes; 4 bits: `high` tells which half.
struct TilePlace {
  std::int64_t byte = 0;
  bool high = false;
};

/// A word of 8 weights of 4 bits holds, from the lowest, inputs 0 2 4 6 1 3 5 7: input pairs come out of it with one
/// shift and one mask, 16 bits apart. A word of 4 weights of 8 bits holds inputs 0 2 1 3.
[[nodiscard]] HESTIA_HOST_DEVICE constexpr TilePlace tile_place(ExpertFormat format, std::int64_t row,
                                                                std::int64_t input) {
  const std::int64_t lane = row % 8 * 4 + input / 32;
  const std::int64_t half = row / 8;
  const std::int64_t of_lane = input % 32;
  if (format == ExpertFormat::kInt8) {
    const std::int64_t in_word = of_lane % 4 / 2 + of_lane % 2 * 2;
    return {(half * 2 + of_lane / 16) * kTileLoad + lane * 16 + of_lane % 16 / 4 * 4 + in_word, false};
  }
  const std::int64_t in_word = of_lane % 8 / 2 + of_lane % 2 * 4;
  return {half * kTileLoad + lane * 16 + of_lane / 8 * 4 + in_word / 2, in_word % 2 == 1};
}

/// One matrix of a blob as weights in float32: row `row` of `inputs` values. `values` and `scales`: where the matrix's
/// begin (expert_formats.cpp).
void dequantise_row(ExpertFormat format, const unsigned char* values, const unsigned char* scales, std::int64_t row,
                    std::int64_t inputs, float* weights);

/// Throws std::invalid_argument when dequantise_experts takes no such count.
void check_dequantise_count(std::int64_t count);

}  // namespace hestia
