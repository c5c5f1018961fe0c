#include "hestia/kernels/decode_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode_checks.hpp"
#include "hestia/core/float_bits.hpp"

namespace hestia {
namespace {

std::int64_t position_of(const DecodeAttentionShape& shape, const std::int64_t* position, std::int64_t t) {
  const std::int64_t most = std::min(shape.capacity, shape.num_rotations);
  const std::int64_t at = position[shape.one_position ? 0 : t];
  if (at < 0 || at >= most) {
    throw std::invalid_argument("decode attention: the position of row " + std::to_string(t) + " must be from 0 to " +
                                std::to_string(most - 1) + ", got " + std::to_string(at));
  }
  return at;
}

/// (a, b) -> (a cos - b sin, b cos + a sin), rounded where the model's own rotation rounds.
void rotate(std::vector<std::uint16_t>& head, const std::uint16_t* cosine, const std::uint16_t* sine) {
  const std::size_t half = head.size() / 2;
  const auto rounded = [](float value) { return bfloat16_bits_to_float(float_to_bfloat16_bits(value)); };
  for (std::size_t i = 0; i < half; ++i) {
    const float a = bfloat16_bits_to_float(head[i]);
    const float b = bfloat16_bits_to_float(head[half + i]);
    const float c = bfloat16_bits_to_float(cosine[i]);
    const float s = bfloat16_bits_to_float(sine[i]);
    head[i] = float_to_bfloat16_bits(rounded(a * c) - b * s);
    head[half + i] = float_to_bfloat16_bits(rounded(b * c) + a * s);
  }
}

/// Norm and clamp of one row's queries or keys, in place.
void norm_and_clamp(const DecodeAttentionShape& shape, const std::uint16_t* weight, std::vector<std::uint16_t>& row) {
  const auto size = static_cast<std::int64_t>(row.size());
  if (shape.norm == DecodeHeadNorm::kWidth) {
    rms_norm_row(row.data(), weight, size, shape.norm_eps, DecodeNorm::kRms, row.data());
  }
  if (shape.clip > 0.0F) {
    for (std::uint16_t& value : row) {
      value = float_to_bfloat16_bits(std::clamp(bfloat16_bits_to_float(value), -shape.clip, shape.clip));
    }
  }
  if (shape.norm == DecodeHeadNorm::kHeads) {
    for (std::int64_t first = 0; first < size; first += shape.head_dim) {
      rms_norm_row(row.data() + first, weight, shape.head_dim, shape.norm_eps, DecodeNorm::kRms, row.data() + first);
    }
  }
}

/// Writes the new tokens' keys and values into the cache, and their queries: bfloat16 [T, A d].
void append(const DecodeAttentionShape& shape, const DecodeAttentionInputs& in, const DecodeKeyValues& cache,
            std::uint16_t* queries) {
  const std::int64_t d = shape.head_dim;
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
    const std::int64_t at = position_of(shape, in.position, t);
    const std::uint16_t* source = in.projected + t * (shape.num_heads + 2 * shape.num_key_value_heads) * d;
    // `target(h)`: where head h goes.
    const auto part = [&](std::int64_t heads, const std::uint16_t* weight, bool value, const auto& target) {
      std::vector<std::uint16_t> row(source, source + heads * d);
      source += heads * d;
      if (value) {
        DecodeAttentionShape plain = shape;
        plain.norm = DecodeHeadNorm::kNone;
        norm_and_clamp(plain, nullptr, row);
      } else {
        norm_and_clamp(shape, weight, row);
      }
      for (std::int64_t h = 0; h < heads; ++h) {
        std::vector<std::uint16_t> head(row.begin() + h * d, row.begin() + (h + 1) * d);
        if (!value) {
          rotate(head, in.cosine + at * d / 2, in.sine + at * d / 2);
        }
        std::copy(head.begin(), head.end(), target(h));
      }
    };
    const auto in_cache = [&](std::uint16_t* rows) {
      return [=](std::int64_t h) { return rows + ((t * shape.num_key_value_heads + h) * shape.capacity + at) * d; };
    };
    part(shape.num_heads, in.query_norm, false,
         [&](std::int64_t h) { return queries + (t * shape.num_heads + h) * d; });
    part(shape.num_key_value_heads, in.key_norm, false, in_cache(cache.keys));
    part(shape.num_key_value_heads, nullptr, true, in_cache(cache.values));
  }
}

}  // namespace

void check_decode_attention(const DecodeAttentionShape& shape) {
  constexpr std::int64_t kMost = std::int64_t{1} << 24;
  check_decode_range("decode attention", "rows of a step", shape.num_tokens, kDecodeMaxRows);
  check_decode_range("decode attention", "key-value heads", shape.num_key_value_heads, 1024);
  check_decode_range("decode attention", "heads", shape.num_heads, 1024);
  check_decode_multiple("decode attention", "heads", shape.num_heads, shape.num_key_value_heads);
  check_decode_multiple("decode attention", "the head dimension", shape.head_dim, 8);
  check_decode_range("decode attention", "the head dimension", shape.head_dim, 256);
  check_decode_range("decode attention", "the cache's tokens", shape.capacity, kMost);
  check_decode_range("decode attention", "rotations", shape.num_rotations, std::numeric_limits<std::int32_t>::max());
  if (!(shape.clip >= 0.0F && std::isfinite(shape.clip))) {
    throw std::invalid_argument("decode attention: the clamp must be at least 0, got " + std::to_string(shape.clip));
  }
  if (!(shape.scale > 0.0F && std::isfinite(shape.scale))) {
    throw std::invalid_argument("decode attention: the scale of scores must be above 0, got " +
                                std::to_string(shape.scale));
  }
  if (shape.window < 0) {
    throw std::invalid_argument("decode attention: the window must be at least 0, got " + std::to_string(shape.window));
  }
}

void decode_attention_cpu(const DecodeAttentionShape& shape, const DecodeAttentionInputs& in,
                          const DecodeKeyValues& cache, std::uint16_t* out) {
  check_decode_attention(shape);
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
    (void)position_of(shape, in.position, t);
  }
  const std::int64_t d = shape.head_dim;
  std::vector<std::uint16_t> queries(static_cast<std::size_t>(shape.num_tokens * shape.num_heads * d));
  append(shape, in, cache, queries.data());
  for (std::int64_t row = 0; row < shape.num_tokens * shape.num_heads; ++row) {
    const std::int64_t t = row / shape.num_heads;
    const std::int64_t head = row % shape.num_heads;
    const std::int64_t last = position_of(shape, in.position, t);
    const std::int64_t first = shape.window == 0 ? 0 : std::max<std::int64_t>(0, last + 1 - shape.window);
    const std::int64_t group = shape.num_heads / shape.num_key_value_heads;
    const std::int64_t begin = (t * shape.num_key_value_heads + head / group) * shape.capacity;
    std::vector<float> shares;
    float largest =
        in.sinks == nullptr ? -std::numeric_limits<float>::infinity() : bfloat16_bits_to_float(in.sinks[head]);
    for (std::int64_t key = first; key <= last; ++key) {
      float sum = 0.0F;
      for (std::int64_t i = 0; i < d; ++i) {
        sum += bfloat16_bits_to_float(queries[static_cast<std::size_t>(row * d + i)]) *
               bfloat16_bits_to_float(cache.keys[(begin + key) * d + i]);
      }
      shares.push_back(sum * shape.scale);
      largest = std::max(largest, shares.back());
    }
    float total = in.sinks == nullptr ? 0.0F : std::exp(bfloat16_bits_to_float(in.sinks[head]) - largest);
    for (float& share : shares) {
      share = std::exp(share - largest);
      total += share;
    }
    for (std::int64_t i = 0; i < d; ++i) {
      float sum = 0.0F;
      for (std::int64_t key = first; key <= last; ++key) {
        sum +=
            shares[static_cast<std::size_t>(key - first)] * bfloat16_bits_to_float(cache.values[(begin + key) * d + i]);
      }
      out[row * d + i] = float_to_bfloat16_bits(sum / total);
    }
  }
}

}  // namespace hestia
