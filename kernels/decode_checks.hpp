#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "hestia/kernels/decode_attention.hpp"
#include "hestia/kernels/decode_fetch.hpp"
#include "hestia/kernels/decode_linear.hpp"
#include "hestia/kernels/decode_router.hpp"
#include "hestia/kernels/expert_fetch.hpp"

namespace hestia {

/// Rows of a decode step at most, in kernels whose grids hold a row's number.
inline constexpr std::int64_t kDecodeMaxRows = 32;

/// Throws std::invalid_argument naming the kernel, the size and the value.
inline void check_decode_range(const char* kernel, const char* name, std::int64_t value, std::int64_t most) {
  if (value < 1 || value > most) {
    throw std::invalid_argument(std::string(kernel) + ": " + name + " must be from 1 to " + std::to_string(most) +
                                ", got " + std::to_string(value));
  }
}

inline void check_decode_multiple(const char* kernel, const char* name, std::int64_t value, std::int64_t factor) {
  if (value < 1 || value % factor != 0) {
    throw std::invalid_argument(std::string(kernel) + ": " + name + " must be a multiple of " + std::to_string(factor) +
                                ", got " + std::to_string(value));
  }
}

void check_decode_router(const DecodeRouterShape& shape);
void check_router_guess(const DecodeRouterShape& shape, const DecodeRouterInputs& in);
void check_router_slots(const DecodeRouterShape& shape, const DecodeRouterInputs& in, const DecodeRouterOutputs& out);
void check_decode_linear(const DecodeLinearShape& shape);
void check_decode_attention(const DecodeAttentionShape& shape);

void check_expert_fetch(const ExpertStoreShape& shape, const void* store, std::int64_t layer, std::int64_t wave,
                        const void* slots);

/// Throws std::invalid_argument for what decode_fetch_gate_up does not take.
void check_decode_fetch(std::int64_t num_tokens, std::int64_t top_k, const DecodeFetch& fetch);

void check_read_memory(std::size_t bytes);

/// RMSNorm of a row by the plain loop.
void rms_norm_row(const std::uint16_t* x, const std::uint16_t* weight, std::int64_t size, float eps, DecodeNorm norm,
                  std::uint16_t* out);

}  // namespace hestia
