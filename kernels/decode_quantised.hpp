#pragma once

#include <cstdint>

#include "hestia/kernels/decode_experts.hpp"
#include "hestia/kernels/decode_fetch.hpp"

namespace hestia {

// decode_gate_up_cuda, decode_down_cuda and decode_down_combine_cuda for integers (decode_quantised.cu).
void quantised_gate_up(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                       const void* pool, std::uint16_t* h, void* stream);
void quantised_down(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                    const void* pool, float* y, void* stream);
void quantised_down_combine(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                            const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                            std::uint16_t* out, void* stream, const std::int32_t* hit_slots);

// decode_fetch_gate_up_cuda for integers.
void quantised_fetch_gate_up(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                             void* pool, std::uint16_t* h, float* y, void* stream);

}  // namespace hestia
