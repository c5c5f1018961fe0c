#pragma once

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"

namespace hestia {

/// Cosine and sine of every token's rotation angles, [B, 1, S, rotary dimensions / 2].
struct RotaryTables {
  torch::Tensor cosine;
  torch::Tensor sine;
};

/// Angles position * theta^(-2i/d) of the architecture's rope settings, computed in float32. `sequence_ids_BS` tells
/// apart the sequences of a row.
[[nodiscard]] RotaryTables rotary_tables(const Architecture& architecture, const torch::Tensor& positions_BS,
                                         const torch::Tensor& sequence_ids_BS, torch::Dtype dtype);

/// Rotary position embedding in the half-split layout (Su et al. 2021, arXiv 2104.09864) of x [B, H, S, d]:
/// (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of the last dimension.
[[nodiscard]] torch::Tensor rotary(const torch::Tensor& x_BHSd, const RotaryTables& tables);

}  // namespace hestia
