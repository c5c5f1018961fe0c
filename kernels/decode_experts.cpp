#include "hestia/kernels/decode_experts.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

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

float dot(const std::uint16_t* a, const std::uint16_t* b, std::int64_t size) {
  float sum = 0.0F;
  for (std::int64_t i = 0; i < size; ++i) {
    sum += bfloat16_bits_to_float(a[i]) * bfloat16_bits_to_float(b[i]);
  }
  return sum;
}

/// A matrix of the blob in `slot`, as bits.
const std::uint16_t* matrix(const void* pool, const ExpertBlob& blob, std::int32_t slot, std::size_t offset) {
  const auto* const bytes = static_cast<const unsigned char*>(pool);
  return reinterpret_cast<const std::uint16_t*>(bytes + static_cast<std::size_t>(slot) * blob.bytes + offset);
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
  const std::size_t matrix_bytes =
      static_cast<std::size_t>(shape.hidden_size) * static_cast<std::size_t>(shape.expert_hidden_size) * 2;
  return {.gate = 0, .up = matrix_bytes, .down = 2 * matrix_bytes, .bytes = 3 * matrix_bytes};
}

void decode_gate_up_cpu(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                        const void* pool, std::uint16_t* h) {
  const ExpertBlob blob = expert_blob(shape);
  for (std::int64_t pair = 0; pair < shape.num_tokens * shape.top_k; ++pair) {
    if (slots[pair] < 0) {
      continue;
    }
    const std::uint16_t* const row = x + pair / shape.top_k * shape.hidden_size;
    const std::uint16_t* const gates = matrix(pool, blob, slots[pair], blob.gate);
    const std::uint16_t* const ups = matrix(pool, blob, slots[pair], blob.up);
    for (std::int64_t f = 0; f < shape.expert_hidden_size; ++f) {
      const float gate = dot(gates + f * shape.hidden_size, row, shape.hidden_size);
      const float up = dot(ups + f * shape.hidden_size, row, shape.hidden_size);
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
    const std::uint16_t* const down = matrix(pool, blob, slots[pair], blob.down);
    for (std::int64_t i = 0; i < shape.hidden_size; ++i) {
      y[pair * shape.hidden_size + i] =
          dot(down + i * shape.expert_hidden_size, h + pair * shape.expert_hidden_size, shape.expert_hidden_size);
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
    for (std::int64_t i = 0; i < shape.hidden_size; ++i) {
      float sum = 0.0F;
      for (std::int64_t k = 0; k < shape.top_k; ++k) {
        const std::int64_t pair = t * shape.top_k + k;
        if (slots[pair] >= 0) {
          const std::uint16_t* const down = matrix(pool, blob, slots[pair], blob.down);
          sum = std::fma(
              weights[pair],
              dot(down + i * shape.expert_hidden_size, h + pair * shape.expert_hidden_size, shape.expert_hidden_size),
              sum);
        } else if (y != nullptr) {
          sum = std::fma(weights[pair], y[pair * shape.hidden_size + i], sum);
        }
      }
      out[t * shape.hidden_size + i] = with_residual(sum, residual, t * shape.hidden_size + i);
    }
  }
}

}  // namespace hestia
