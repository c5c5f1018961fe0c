#include "hestia/kernels/decode_experts.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "expert_layout.hpp"
#include "hestia/core/float_bits.hpp"

namespace hestia {
namespace {

constexpr std::int64_t kAlignment = 8;  // bfloat16 values in 16 bytes

void check_range(const char* name, std::int64_t value, std::int64_t most) {
  if (value < 1 || value > most) {
    throw std::invalid_argument("decode experts: " + std::string(name) + " must be from 1 to " + std::to_string(most) +
                                ", got " + std::to_string(value));
  }
}

void check_aligned(const char* name, std::int64_t value) {
  if (value < 1 || value % kAlignment != 0) {
    throw std::invalid_argument("decode experts: " + std::string(name) + " must be a multiple of " +
                                std::to_string(kAlignment) + ", got " + std::to_string(value));
  }
}

/// Products of the rows of one expert's matrix with a vector.
class MatrixRows {
 public:
  MatrixRows(const DecodeExpertsShape& shape, const void* pool, std::size_t blob_bytes, std::int32_t slot,
             std::size_t values, std::size_t scales, std::int64_t inputs)
      : format_(shape.format),
        values_(static_cast<const unsigned char*>(pool) + static_cast<std::size_t>(slot) * blob_bytes + values),
        scales_(static_cast<const unsigned char*>(pool) + static_cast<std::size_t>(slot) * blob_bytes + scales),
        weights_(static_cast<std::size_t>(inputs)) {}

  /// Row `row` times `vector`: one after the other, in float32.
  float dot(std::int64_t row, const std::uint16_t* vector) {
    dequantise_row(format_, values_, scales_, row, static_cast<std::int64_t>(weights_.size()), weights_.data());
    float sum = 0.0F;
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      sum += weights_[i] * bfloat16_bits_to_float(vector[i]);
    }
    return sum;
  }

 private:
  ExpertFormat format_;
  const unsigned char* values_;
  const unsigned char* scales_;
  std::vector<float> weights_;
};

MatrixRows gate_rows(const DecodeExpertsShape& shape, const void* pool, const ExpertBlob& blob, std::int32_t slot) {
  return {shape, pool, blob.bytes, slot, blob.gate, blob.gate_scales, shape.hidden_size};
}

MatrixRows up_rows(const DecodeExpertsShape& shape, const void* pool, const ExpertBlob& blob, std::int32_t slot) {
  return {shape, pool, blob.bytes, slot, blob.up, blob.up_scales, shape.hidden_size};
}

MatrixRows down_rows(const DecodeExpertsShape& shape, const void* pool, const ExpertBlob& blob, std::int32_t slot) {
  return {shape, pool, blob.bytes, slot, blob.down, blob.down_scales, shape.expert_hidden_size};
}

std::uint16_t with_residual(float sum, const std::uint16_t* residual, std::int64_t at) {
  return float_to_bfloat16_bits(residual == nullptr ? sum : bfloat16_bits_to_float(residual[at]) + sum);
}

}  // namespace

ExpertBlob expert_blob(const DecodeExpertsShape& shape) {
  check_range("rows of a step", shape.num_tokens, kDecodeMaxTokens);
  check_range("experts per token", shape.top_k, kDecodeMaxTopK);
  check_aligned("the hidden size", shape.hidden_size);
  check_aligned("the experts' hidden size", shape.expert_hidden_size);
  ExpertBlob blob;
  const auto add = [&](std::int64_t rows, std::int64_t inputs, std::size_t& values, std::size_t& scales) {
    values = blob.bytes;
    if (shape.format == ExpertFormat::kBfloat16) {
      blob.bytes += static_cast<std::size_t>(rows * inputs) * 2;
      return;
    }
    const TileCounts counts = tile_counts(rows, inputs);
    const auto tiles = static_cast<std::size_t>(counts.rows * counts.groups);
    scales = values + tiles * static_cast<std::size_t>(tile_loads(shape.format)) * kTileLoad;
    blob.bytes = scales + tiles * kTileRows * static_cast<std::size_t>(scale_bytes(shape.format));
  };
  add(shape.expert_hidden_size, shape.hidden_size, blob.gate, blob.gate_scales);
  add(shape.expert_hidden_size, shape.hidden_size, blob.up, blob.up_scales);
  add(shape.hidden_size, shape.expert_hidden_size, blob.down, blob.down_scales);
  return blob;
}

void decode_gate_up_cpu(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                        const void* pool, std::uint16_t* h) {
  const ExpertBlob blob = expert_blob(shape);
  for (std::int64_t pair = 0; pair < shape.num_tokens * shape.top_k; ++pair) {
    if (slots[pair] < 0) {
      continue;
    }
    const std::uint16_t* const row = x + pair / shape.top_k * shape.hidden_size;
    MatrixRows gates = gate_rows(shape, pool, blob, slots[pair]);
    MatrixRows ups = up_rows(shape, pool, blob, slots[pair]);
    for (std::int64_t f = 0; f < shape.expert_hidden_size; ++f) {
      const float gate = gates.dot(f, row);
      const float up = ups.dot(f, row);
      h[pair * shape.expert_hidden_size + f] = float_to_bfloat16_bits(gate / (1.0F + std::exp(-gate)) * up);
    }
  }
}

void decode_down_cpu(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                     const void* pool, float* y) {
  const ExpertBlob blob = expert_blob(shape);
  for (std::int64_t pair = 0; pair < shape.num_tokens * shape.top_k; ++pair) {
    if (slots[pair] < 0) {
      continue;
    }
    MatrixRows down = down_rows(shape, pool, blob, slots[pair]);
    for (std::int64_t i = 0; i < shape.hidden_size; ++i) {
      y[pair * shape.hidden_size + i] = down.dot(i, h + pair * shape.expert_hidden_size);
    }
  }
}

void decode_combine_cpu(const DecodeExpertsShape& shape, const float* y, const float* weights,
                        const std::uint16_t* residual, std::uint16_t* out) {
  (void)expert_blob(shape);
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
    for (std::int64_t i = 0; i < shape.hidden_size; ++i) {
      float sum = 0.0F;
      for (std::int64_t k = 0; k < shape.top_k; ++k) {
        const std::int64_t pair = t * shape.top_k + k;
        sum = std::fma(weights[pair], y[pair * shape.hidden_size + i], sum);
      }
      out[t * shape.hidden_size + i] = with_residual(sum, residual, t * shape.hidden_size + i);
    }
  }
}

void decode_down_combine_cpu(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                             const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                             std::uint16_t* out) {
  const ExpertBlob blob = expert_blob(shape);
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
    std::vector<float> sums(static_cast<std::size_t>(shape.hidden_size), 0.0F);
    for (std::int64_t pair = t * shape.top_k; pair < (t + 1) * shape.top_k; ++pair) {
      if (slots[pair] < 0 && y == nullptr) {
        continue;
      }
      MatrixRows down = down_rows(shape, pool, blob, std::max(slots[pair], 0));
      for (std::int64_t i = 0; i < shape.hidden_size; ++i) {
        float& sum = sums[static_cast<std::size_t>(i)];
        const float product =
            slots[pair] >= 0 ? down.dot(i, h + pair * shape.expert_hidden_size) : y[pair * shape.hidden_size + i];
        sum = std::fma(weights[pair], product, sum);
      }
    }
    for (std::int64_t i = 0; i < shape.hidden_size; ++i) {
      out[t * shape.hidden_size + i] =
          with_residual(sums[static_cast<std::size_t>(i)], residual, t * shape.hidden_size + i);
    }
  }
}

}  // namespace hestia
