#include "hestia/kernels/expert_formats.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

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

struct Group {
  std::array<float, kTileInputs> weights{};
  std::array<float, kTileInputs> integers{};
  std::size_t size = 0;
};

/// Chooses scale (and minimum) of a group, writes them, and sets its integers.
void quantise_group(ExpertFormat format, Group& group, unsigned char* scales) {
  float lowest = group.weights[0];
  float highest = group.weights[0];
  for (std::size_t i = 1; i < group.size; ++i) {
    lowest = std::min(lowest, group.weights[i]);
    highest = std::max(highest, group.weights[i]);
  }
  const float largest = std::max(-lowest, highest);
  float minimum = 0.0F;
  float scale = 0.0F;
  float least = 0.0F;
  float most = 0.0F;
  if (format == ExpertFormat::kInt8) {
    scale = write_bfloat16(scales, largest / 127.0F);
    least = -127.0F;
    most = 127.0F;
  } else if (format == ExpertFormat::kInt4) {
    scale = write_bfloat16(scales, (highest > -lowest ? -highest : -lowest) / 8.0F);
    least = -8.0F;
    most = 7.0F;
  } else {
    minimum = write_bfloat16(scales + 2, lowest);
    scale = write_bfloat16(scales, (highest - minimum) / 15.0F);
    most = 15.0F;
  }
  for (std::size_t i = 0; i < group.size; ++i) {
    const float quotient = scale == 0.0F ? 0.0F : (group.weights[i] - minimum) / scale;
    group.integers[i] = rounded(std::min(std::max(quotient, least), most));
  }
}

void put(ExpertFormat format, float integer, const TilePlace& place, unsigned char* tile) {
  if (format == ExpertFormat::kInt8) {
    tile[place.byte] = static_cast<unsigned char>(static_cast<std::int8_t>(integer));
  } else {
    const auto bits = static_cast<unsigned>(integer + (format == ExpertFormat::kInt4 ? 8.0F : 0.0F));
    tile[place.byte] = static_cast<unsigned char>(tile[place.byte] | bits << (place.high ? 4U : 0U));
  }
}

float get(ExpertFormat format, const TilePlace& place, const unsigned char* tile) {
  const unsigned byte = tile[place.byte];
  if (format == ExpertFormat::kInt8) {
    return static_cast<float>(static_cast<std::int8_t>(byte));
  }
  const unsigned bits = place.high ? byte >> 4U : byte & 15U;
  return static_cast<float>(bits) - (format == ExpertFormat::kInt4 ? 8.0F : 0.0F);
}

/// w' of the integer; the kernels' arithmetic.
float dequantised(ExpertFormat format, float integer, const unsigned char* scales) {
  const float product = integer * read_bfloat16(scales);
  return format == ExpertFormat::kInt4Asymmetric ? read_bfloat16(scales + 2) + product : product;
}

std::size_t tile_bytes(ExpertFormat format) {
  return static_cast<std::size_t>(tile_loads(format)) * kTileLoad;
}

/// Packs a matrix; returns its error.
double quantise_matrix(ExpertFormat format, const char* name, const std::uint16_t* weights, std::int64_t rows,
                       std::int64_t inputs, unsigned char* values, unsigned char* scales) {
  const TileCounts tiles = tile_counts(rows, inputs);
  const auto num_tiles = static_cast<std::size_t>(tiles.rows * tiles.groups);
  // Rows past the last keep a scale of 0; inputs past the last meet activations of 0.
  std::memset(values, 0, num_tiles * tile_bytes(format));
  std::memset(scales, 0, num_tiles * kTileRows * static_cast<std::size_t>(scale_bytes(format)));
  double error = 0.0;
  double whole = 0.0;
  Group group;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t g = 0; g < tiles.groups; ++g) {
      const std::int64_t first = g * kTileInputs;
      group.size = static_cast<std::size_t>(std::min<std::int64_t>(kTileInputs, inputs - first));
      for (std::size_t i = 0; i < group.size; ++i) {
        group.weights[i] = bfloat16_bits_to_float(weights[row * inputs + first + static_cast<std::int64_t>(i)]);
        if (!std::isfinite(group.weights[i])) {
          throw InputError(fmt::format(
              "expert weights: {} holds a value that is not finite in row {}, column {}, got {}; use a checkpoint "
              "without such values, or bf16 experts",
              name, row, first + static_cast<std::int64_t>(i), group.weights[i]));
        }
      }
      const std::int64_t tile = row / kTileRows * tiles.groups + g;
      unsigned char* const scale = scales + (tile * kTileRows + row % kTileRows) * scale_bytes(format);
      unsigned char* const tile_values = values + static_cast<std::size_t>(tile) * tile_bytes(format);
      quantise_group(format, group, scale);
      for (std::size_t i = 0; i < group.size; ++i) {
        put(format, group.integers[i], tile_place(format, row % kTileRows, static_cast<std::int64_t>(i)), tile_values);
        const double weight = static_cast<double>(group.weights[i]);
        const double difference = weight - static_cast<double>(dequantised(format, group.integers[i], scale));
        error += difference * difference;
        whole += weight * weight;
      }
    }
  }
  return whole > 0.0 ? error / whole : 0.0;
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
  if (shape.format == ExpertFormat::kBfloat16) {
    std::memcpy(bytes + at.gate, gate, at.up - at.gate);
    std::memcpy(bytes + at.up, up, at.down - at.up);
    std::memcpy(bytes + at.down, down, at.bytes - at.down);
    return {};
  }
  const std::int64_t hidden = shape.hidden_size;
  const std::int64_t expert_hidden = shape.expert_hidden_size;
  ExpertError error;
  error.gate =
      quantise_matrix(shape.format, "gate", gate, expert_hidden, hidden, bytes + at.gate, bytes + at.gate_scales);
  error.up = quantise_matrix(shape.format, "up", up, expert_hidden, hidden, bytes + at.up, bytes + at.up_scales);
  error.down =
      quantise_matrix(shape.format, "down", down, hidden, expert_hidden, bytes + at.down, bytes + at.down_scales);
  return error;
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
  for (std::int64_t i = 0; i < inputs; ++i) {
    const std::int64_t tile = row / kTileRows * groups + i / kTileInputs;
    const unsigned char* const scale = scales + (tile * kTileRows + row % kTileRows) * scale_bytes(format);
    const TilePlace place = tile_place(format, row % kTileRows, i % kTileInputs);
    weights[i] =
        dequantised(format, get(format, place, values + static_cast<std::size_t>(tile) * tile_bytes(format)), scale);
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

}  // namespace hestia
