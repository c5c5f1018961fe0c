#pragma once

#include <stdexcept>
#include <string>

#include "hestia/kernels/expert_fetch.hpp"

namespace hestia {

inline void check_expert_fetch(const ExpertFetchShape& shape, std::int64_t layer, std::int32_t wave) {
  if (shape.num_experts < 1 || shape.blob_bytes < 16 || shape.blob_bytes % 16 != 0) {
    throw std::invalid_argument("expert fetch: needs experts whose blobs are a multiple of 16 bytes, got " +
                                std::to_string(shape.num_experts) + " of " + std::to_string(shape.blob_bytes));
  }
  if (layer < 0 || wave < 1) {
    throw std::invalid_argument("expert fetch: needs a layer from 0 and a wave from 1, got " + std::to_string(layer) +
                                " and " + std::to_string(wave));
  }
}

}  // namespace hestia
