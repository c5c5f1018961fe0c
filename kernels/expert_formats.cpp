#include "hestia/kernels/expert_formats.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "expert_layout.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/float_bits.hpp"

namespace hestia {
namespace {

// In enum order.
constexpr std::array<std::string_view, 4> kNames = {"bf16", "int8", "int4", "int4-asymmetric"};

/// To the nearest integer, ties to even, below 2^22; vectorises where std::nearbyint is a call.
float rounded(float value) {
  constexpr float kShift = 12582912.0F;  // 1.5 * 2^23
  return value + kShift - kShift;
}

float read_bfloat16(const unsigned char* at) {
  std::uint16_t bits = 0;
  std::memcpy(&bits, at, sizeof bits);
  return bfloat16_bits_to_float(bits);
}

/// Writes `value` as bfloat16 and returns what it has become.
float write_bfloat16(unsigned char* at, float value) {
  const std::uint16_t bits = float_to_bfloat16_bits(value);
  std::memcpy(at, &bits, sizeof bits);
  return bfloat16_bits_to_float(bits);
}

/// float_to_bfloat16_bits of what is no NaN; vectorises.
std::uint16_t rounded_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16U & 1U)) >> 16U);
}

/// One group of a row on its way into its tile. All loops run over a whole group, so that they vectorise.
struct Group {
  std::array<float, kTileInputs> weights{};
  std::array<unsigned char, kTileInputs> codes{};  // as stored, one each
  double error = 0.0;                              // sum of squares, like whole
  double whole = 0.0;
};

constexpr std::size_t kLanes = 8;  // of sums and extremes

/// Reads `size` bfloat16 weights, filled up with the first of them. False when one is not finite.
bool read_group(const std::uint16_t* weights, std::size_t size, Group& group) {
  std::array<std::uint16_t, kTileInputs> bits{};
  std::memcpy(bits.data(), weights, size * sizeof bits[0]);
  std::fill(bits.begin() + static_cast<std::ptrdiff_t>(size), bits.end(), bits[0]);
  unsigned not_finite = 0;
  for (std::size_t i = 0; i < bits.size(); ++i) {
    not_finite |= (bits[i] & 0x7f80U) == 0x7f80U ? 1U : 0U;
    group.weights[i] = std::bit_cast<float>(std::uint32_t{bits[i]} << 16U);
  }
  return not_finite == 0;
}

/// Chooses scale (and minimum) of a group, writes them, and sets its codes and error.
template <ExpertFormat kFormat>
void quantise_group(std::size_t size, Group& group, unsigned char* scales) {
  std::array<float, kLanes> low{};
  std::array<float, kLanes> high{};
  low.fill(group.weights[0]);
  high.fill(group.weights[0]);
  for (std::size_t i = 0; i < group.weights.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      low[lane] = std::min(low[lane], group.weights[i + lane]);
      high[lane] = std::max(high[lane], group.weights[i + lane]);
    }
  }
  const float lowest = *std::min_element(low.begin(), low.end());
  const float highest = *std::max_element(high.begin(), high.end());
  float minimum = 0.0F;
  float scale = 0.0F;
  float least = 0.0F;
  float most = 0.0F;
  float offset = 0.0F;  // of a code
  if constexpr (kFormat == ExpertFormat::kInt8) {
    scale = write_bfloat16(scales, std::max(-lowest, highest) / 127.0F);
    least = -127.0F;
    most = 127.0F;
  } else if constexpr (kFormat == ExpertFormat::kInt4) {
    scale = write_bfloat16(scales, (highest > -lowest ? -highest : -lowest) / 8.0F);
    least = -8.0F;
    most = 7.0F;
    offset = 8.0F;
  } else {
    minimum = write_bfloat16(scales + 2, lowest);
    scale = write_bfloat16(scales, (highest - minimum) / 15.0F);
    most = 15.0F;
  }
  const float divisor = scale == 0.0F ? 1.0F : scale;  // then all weights are too small to reach 1
  std::fill(group.weights.begin() + static_cast<std::ptrdiff_t>(size), group.weights.end(), 0.0F);
  std::array<float, kTileInputs> differences{};
  for (std::size_t i = 0; i < group.weights.size(); ++i) {
    const float integer = rounded(std::min(std::max((group.weights[i] - minimum) / divisor, least), most));
    group.codes[i] = static_cast<unsigned char>(static_cast<int>(integer + offset));
    differences[i] = group.weights[i] - (minimum + integer * scale);
  }
  std::fill(group.codes.begin() + static_cast<std::ptrdiff_t>(size), group.codes.end(), static_cast<unsigned char>(0));
  std::fill(differences.begin() + static_cast<std::ptrdiff_t>(size), differences.end(), 0.0F);
  std::array<double, kLanes> errors{};
  std::array<double, kLanes> wholes{};
  for (std::size_t i = 0; i < group.weights.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const auto difference = static_cast<double>(differences[i + lane]);
      const auto weight = static_cast<double>(group.weights[i + lane]);
      errors[lane] += difference * difference;
      wholes[lane] += weight * weight;
    }
  }
  group.error = std::accumulate(errors.begin(), errors.end(), 0.0);
  group.whole = std::accumulate(wholes.begin(), wholes.end(), 0.0);
}

/// The bytes of row 0 of a tile, from tile_place: which inputs a byte holds; those of another row lie
/// tile_place(row, 0) behind.
template <ExpertFormat kFormat>
struct RowBytes {
  static constexpr bool kPairs = kFormat != ExpertFormat::kInt8;
  static constexpr std::size_t kCount = kPairs ? kTileInputs / 2 : kTileInputs;
  std::array<std::uint16_t, kCount> offset{};
  std::array<std::uint8_t, kCount> low{};
  std::array<std::uint8_t, kCount> high{};

  constexpr RowBytes() {
    std::size_t count = 0;
    for (std::size_t input = 0; input < kTileInputs; ++input) {
      const TilePlace place = tile_place(kFormat, 0, static_cast<std::int64_t>(input));
      if (place.high) {
        continue;
      }
      offset[count] = static_cast<std::uint16_t>(place.byte);
      low[count] = static_cast<std::uint8_t>(input);
      for (std::size_t other = 0; kPairs && other < kTileInputs; ++other) {
        const TilePlace above = tile_place(kFormat, 0, static_cast<std::int64_t>(other));
        if (above.high && above.byte == place.byte) {
          high[count] = static_cast<std::uint8_t>(other);
        }
      }
      ++count;
    }
  }
};

/// Writes the codes of a group; `row_in_tile`: where the row's first byte lies.
template <ExpertFormat kFormat>
void write_codes(const Group& group, unsigned char* row_in_tile) {
  static constexpr RowBytes<kFormat> kBytes;
  for (std::size_t i = 0; i < kBytes.kCount; ++i) {
    unsigned byte = group.codes[kBytes.low[i]];
    if constexpr (kBytes.kPairs) {
      byte |= static_cast<unsigned>(group.codes[kBytes.high[i]]) << 4U;
    }
    row_in_tile[kBytes.offset[i]] = static_cast<unsigned char>(byte);
  }
}

/// The inverse of write_codes.
template <ExpertFormat kFormat>
void read_codes(const unsigned char* row_in_tile, std::array<unsigned char, kTileInputs>& codes) {
  static constexpr RowBytes<kFormat> kBytes;
  for (std::size_t i = 0; i < kBytes.kCount; ++i) {
    const unsigned byte = row_in_tile[kBytes.offset[i]];
    if constexpr (kBytes.kPairs) {
      codes[kBytes.low[i]] = static_cast<unsigned char>(byte & 15U);
      codes[kBytes.high[i]] = static_cast<unsigned char>(byte >> 4U);
    } else {
      codes[kBytes.low[i]] = static_cast<unsigned char>(byte);
    }
  }
}

/// The weights of a whole group, whose first byte is at `row_in_tile`; the kernels' arithmetic.
template <ExpertFormat kFormat>
void dequantise_group(const unsigned char* row_in_tile, const unsigned char* scales,
                      std::array<float, kTileInputs>& weights) {
  std::array<unsigned char, kTileInputs> codes{};
  read_codes<kFormat>(row_in_tile, codes);
  const float scale = read_bfloat16(scales);
  float minimum = 0.0F;
  if constexpr (kFormat == ExpertFormat::kInt4Asymmetric) {
    minimum = read_bfloat16(scales + 2);
  }
  for (std::size_t i = 0; i < codes.size(); ++i) {
    if constexpr (kFormat == ExpertFormat::kInt8) {
      weights[i] = static_cast<float>(static_cast<std::int8_t>(codes[i])) * scale;
    } else if constexpr (kFormat == ExpertFormat::kInt4) {
      weights[i] = static_cast<float>(static_cast<int>(codes[i]) - 8) * scale;
    } else {
      weights[i] = minimum + static_cast<float>(codes[i]) * scale;
    }
  }
}

std::size_t tile_bytes(ExpertFormat format) {
  return static_cast<std::size_t>(tile_loads(format)) * kTileLoad;
}

/// Packs a matrix; returns its error.
template <ExpertFormat kFormat>
double quantise_matrix(const char* name, const std::uint16_t* weights, std::int64_t rows, std::int64_t inputs,
                       unsigned char* values, unsigned char* scales) {
  const TileCounts tiles = tile_counts(rows, inputs);
  const auto num_tiles = static_cast<std::size_t>(tiles.rows * tiles.groups);
  // Rows past the last keep a scale of 0; inputs past the last meet activations of 0.
  std::memset(values, 0, num_tiles * tile_bytes(kFormat));
  std::memset(scales, 0, num_tiles * kTileRows * static_cast<std::size_t>(scale_bytes(kFormat)));
  double error = 0.0;
  double whole = 0.0;
  Group group;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t row_byte = tile_place(kFormat, row % kTileRows, 0).byte;
    for (std::int64_t g = 0; g < tiles.groups; ++g) {
      const std::int64_t first = g * kTileInputs;
      const auto size = static_cast<std::size_t>(std::min<std::int64_t>(kTileInputs, inputs - first));
      const std::uint16_t* const of_group = weights + row * inputs + first;
      if (!read_group(of_group, size, group)) {
        const auto* const at =
            std::find_if(of_group, of_group + size, [](std::uint16_t bits) { return (bits & 0x7f80U) == 0x7f80U; });
        throw InputError(fmt::format(
            "expert weights: {} holds a value that is not finite in row {}, column {}, got {}; use a checkpoint "
            "without such values, or bf16 experts",
            name, row, first + (at - of_group), bfloat16_bits_to_float(*at)));
      }
      const std::int64_t tile = row / kTileRows * tiles.groups + g;
      quantise_group<kFormat>(size, group, scales + (tile * kTileRows + row % kTileRows) * scale_bytes(kFormat));
      write_codes<kFormat>(group, values + static_cast<std::size_t>(tile) * tile_bytes(kFormat) + row_byte);
      error += group.error;
      whole += group.whole;
    }
  }
  return whole > 0.0 ? error / whole : 0.0;
}

template <ExpertFormat kFormat>
ExpertError quantise_matrices(const DecodeExpertsShape& shape, const std::uint16_t* gate, const std::uint16_t* up,
                              const std::uint16_t* down, const ExpertBlob& at, unsigned char* blob) {
  const std::int64_t hidden = shape.hidden_size;
  const std::int64_t expert_hidden = shape.expert_hidden_size;
  ExpertError error;
  error.gate = quantise_matrix<kFormat>("gate", gate, expert_hidden, hidden, blob + at.gate, blob + at.gate_scales);
  error.up = quantise_matrix<kFormat>("up", up, expert_hidden, hidden, blob + at.up, blob + at.up_scales);
  error.down = quantise_matrix<kFormat>("down", down, hidden, expert_hidden, blob + at.down, blob + at.down_scales);
  return error;
}

}  // namespace

std::string_view expert_format_name(ExpertFormat format) {
  return kNames.at(static_cast<std::size_t>(format));
}

ExpertFormat expert_format_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) {
      return static_cast<ExpertFormat>(i);
    }
  }
  const std::string nearest = nearest_name(name, expert_format_names());
  throw UsageError(fmt::format("expert format: unknown name, got \"{}\"; {}choose one of {}", name,
                               nearest.empty() ? "" : fmt::format("did you mean \"{}\"? ", nearest),
                               fmt::join(kNames, ", ")));
}

std::vector<std::string> expert_format_names() {
  return {kNames.begin(), kNames.end()};
}

ExpertError quantise_expert(const DecodeExpertsShape& shape, const std::uint16_t* gate, const std::uint16_t* up,
                            const std::uint16_t* down, void* blob) {
  const ExpertBlob at = expert_blob(shape);
  auto* const bytes = static_cast<unsigned char*>(blob);
  switch (shape.format) {
    case ExpertFormat::kBfloat16:
      std::memcpy(bytes + at.gate, gate, at.up - at.gate);
      std::memcpy(bytes + at.up, up, at.down - at.up);
      std::memcpy(bytes + at.down, down, at.bytes - at.down);
      break;
    case ExpertFormat::kInt8:
      return quantise_matrices<ExpertFormat::kInt8>(shape, gate, up, down, at, bytes);
    case ExpertFormat::kInt4:
      return quantise_matrices<ExpertFormat::kInt4>(shape, gate, up, down, at, bytes);
    case ExpertFormat::kInt4Asymmetric:
      return quantise_matrices<ExpertFormat::kInt4Asymmetric>(shape, gate, up, down, at, bytes);
  }
  return {};
}

void dequantise_row(ExpertFormat format, const unsigned char* values, const unsigned char* scales, std::int64_t row,
                    std::int64_t inputs, float* weights) {
  if (format == ExpertFormat::kBfloat16) {
    for (std::int64_t i = 0; i < inputs; ++i) {
      weights[i] = read_bfloat16(values + (row * inputs + i) * 2);
    }
    return;
  }
  const std::int64_t groups = tile_counts(1, inputs).groups;
  const std::int64_t in_tile = row % kTileRows;
  const std::int64_t row_byte = tile_place(format, in_tile, 0).byte;
  std::array<float, kTileInputs> of_group{};
  for (std::int64_t group = 0; group < groups; ++group) {
    const std::int64_t first = group * kTileInputs;
    const std::int64_t tile = row / kTileRows * groups + group;
    const unsigned char* const scale = scales + (tile * kTileRows + in_tile) * scale_bytes(format);
    const unsigned char* const values_of_row = values + static_cast<std::size_t>(tile) * tile_bytes(format) + row_byte;
    if (format == ExpertFormat::kInt8) {
      dequantise_group<ExpertFormat::kInt8>(values_of_row, scale, of_group);
    } else if (format == ExpertFormat::kInt4) {
      dequantise_group<ExpertFormat::kInt4>(values_of_row, scale, of_group);
    } else {
      dequantise_group<ExpertFormat::kInt4Asymmetric>(values_of_row, scale, of_group);
    }
    std::copy_n(of_group.begin(), std::min<std::int64_t>(kTileInputs, inputs - first), weights + first);
  }
}

void dequantise_expert(const DecodeExpertsShape& shape, const void* blob, float* gate, float* up, float* down) {
  const ExpertBlob at = expert_blob(shape);
  const auto* const bytes = static_cast<const unsigned char*>(blob);
  for (std::int64_t f = 0; f < shape.expert_hidden_size; ++f) {
    dequantise_row(shape.format, bytes + at.gate, bytes + at.gate_scales, f, shape.hidden_size,
                   gate + f * shape.hidden_size);
    dequantise_row(shape.format, bytes + at.up, bytes + at.up_scales, f, shape.hidden_size, up + f * shape.hidden_size);
  }
  for (std::int64_t i = 0; i < shape.hidden_size; ++i) {
    dequantise_row(shape.format, bytes + at.down, bytes + at.down_scales, i, shape.expert_hidden_size,
                   down + i * shape.expert_hidden_size);
  }
}

void check_dequantise_count(std::int64_t count) {
  constexpr std::int64_t kMost = 65535;  // a dimension of a grid
  if (count < 0 || count > kMost) {
    throw std::invalid_argument(fmt::format("dequantise experts: count must be from 0 to {}, got {}", kMost, count));
  }
}

void dequantise_experts_cpu(const DecodeExpertsShape& shape, const void* pool, const std::int32_t* blobs,
                            std::int64_t count, void* out) {
  check_dequantise_count(count);
  const ExpertBlob from = expert_blob(shape);
  DecodeExpertsShape wide = shape;
  wide.format = ExpertFormat::kBfloat16;
  const ExpertBlob to = expert_blob(wide);
  std::vector<float> row_weights(static_cast<std::size_t>(std::max(shape.hidden_size, shape.expert_hidden_size)));
  std::vector<std::uint16_t> row_bits(row_weights.size());
  const auto matrix = [&](const unsigned char* values, const unsigned char* scales, std::int64_t rows,
                          std::int64_t inputs, unsigned char* at) {
    for (std::int64_t row = 0; row < rows; ++row) {
      dequantise_row(shape.format, values, scales, row, inputs, row_weights.data());
      for (std::size_t i = 0; i < static_cast<std::size_t>(inputs); ++i) {
        row_bits[i] = rounded_bits(row_weights[i]);
      }
      std::memcpy(at + row * inputs * 2, row_bits.data(), static_cast<std::size_t>(inputs) * sizeof row_bits[0]);
    }
  };
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t blob = blobs == nullptr ? i : blobs[i];
    if (blob < 0) {
      continue;
    }
    const unsigned char* const packed =
        static_cast<const unsigned char*>(pool) + static_cast<std::size_t>(blob) * from.bytes;
    unsigned char* const weights = static_cast<unsigned char*>(out) + static_cast<std::size_t>(i) * to.bytes;
    const std::int64_t hidden = shape.hidden_size;
    const std::int64_t expert_hidden = shape.expert_hidden_size;
    matrix(packed + from.gate, packed + from.gate_scales, expert_hidden, hidden, weights + to.gate);
    matrix(packed + from.up, packed + from.up_scales, expert_hidden, hidden, weights + to.up);
    matrix(packed + from.down, packed + from.down_scales, hidden, expert_hidden, weights + to.down);
  }
}

}  // namespace hestia
