#include "hestia/kernels/decode_linear.hpp"

#include <limits>
#include <vector>

#include "decode_checks.hpp"
#include "hestia/core/float_bits.hpp"

namespace hestia {
namespace {

void store(float value, std::uint16_t& out) {
  out = float_to_bfloat16_bits(value);
}

void store(float value, float& out) {
  out = value;
}

template <class Out>
void linear(const DecodeLinearShape& shape, const DecodeLinearInputs& in, Out* out) {
  check_decode_linear(shape);
  std::vector<std::uint16_t> row(static_cast<std::size_t>(shape.input_size));
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
    const std::uint16_t* x = in.x + t * shape.input_size;
    if (in.norm_weight != nullptr) {
      rms_norm_row(x, in.norm_weight, shape.input_size, shape.norm_eps, shape.norm, row.data());
      x = row.data();
    }
    for (std::int64_t n = 0; n < shape.output_size; ++n) {
      float sum = 0.0F;
      for (std::int64_t i = 0; i < shape.input_size; ++i) {
        sum += bfloat16_bits_to_float(in.weight[n * shape.input_size + i]) * bfloat16_bits_to_float(x[i]);
      }
      if (in.bias != nullptr) {
        sum += bfloat16_bits_to_float(in.bias[n]);
      }
      const std::int64_t at = t * shape.output_size + n;
      if (in.residual != nullptr) {
        sum = bfloat16_bits_to_float(in.residual[at]) + sum;
      }
      store(sum, out[at]);
    }
  }
}

}  // namespace

void check_decode_linear(const DecodeLinearShape& shape) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
  check_decode_range("decode linear", "rows of a step", shape.num_tokens, kDecodeMaxRows);
  check_decode_multiple("decode linear", "the input size", shape.input_size, 8);
  check_decode_range("decode linear", "the input size", shape.input_size, kMost);
  check_decode_range("decode linear", "the output size", shape.output_size, kMost);
}

void decode_linear_cpu(const DecodeLinearShape& shape, const DecodeLinearInputs& in, std::uint16_t* out) {
  linear(shape, in, out);
}

void decode_linear_cpu(const DecodeLinearShape& shape, const DecodeLinearInputs& in, float* out) {
  linear(shape, in, out);
}

}  // namespace hestia
