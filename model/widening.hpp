#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia {

/// Stored matrices whose values do not lie in the file as in the model: quantised ones, or such with rows where the
/// model has columns. M matrices, R rows, C columns.
struct Widening {
  TensorView values;                 ///< FP8 [R, C], MXFP4 [M, R, C / 32, 16], or any float dtype [M, R, C].
  std::optional<TensorView> scales;  ///< Of the first two, see `stored_tensors`.
  torch::Tensor destination_MRC;     ///< Any device, float dtype and strides; M is 1 for FP8.
};

/// How `widen_tensors` works.
struct WideningOptions {
  std::int64_t piece_values = std::int64_t{1} << 20;  ///< Values that one thread widens at a time, in whole rows.
  /// Told the bytes of `values` of each piece once it is done, by one thread at a time.
  std::function<void(std::int64_t bytes)> advance = {};
};

/// Reads matrices as `architecture` says that they are quantised, widens them to float32 (`dequantise_e4m3`,
/// `dequantise_mxfp4`) and copies them into their destinations, rounded once; those without scales are only copied.
/// Pieces are shared among `at::get_num_threads()` threads; the values do not depend on how. Throws InputError for a
/// file that cannot be read.
void widen_tensors(const Architecture& architecture, const std::vector<Widening>& tensors,
                   const WideningOptions& options = {});

}  // namespace hestia
