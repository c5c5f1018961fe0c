#pragma once

#include <cstdint>

#include "hestia/kernels/decode_experts.hpp"

namespace hestia {

// decode_gate_up_cuda, decode_down_cuda and decode_down_combine_cuda in bfloat16 from shape.tensor_rows rows on
// (decode_grouped.cu).
void grouped_gate_up(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                     const void* pool, std::uint16_t* h, void* stream);
void grouped_down(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots, const void* pool,
                  float* y, void* stream);
void grouped_down_combine(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                          const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                          std::uint16_t* out, void* stream);

}  // namespace hestia
