#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include <torch/types.h>

#include "hestia/core/safetensors.hpp"

namespace hestia {

/// A stored tensor and where its values go: the same shape, contiguous, any float dtype.
struct Placement {
  TensorView source;
  torch::Tensor destination;
};

/// How `place_tensors` works.
struct PlacementOptions {
  std::size_t block_bytes = std::size_t{4} << 20;  ///< Bytes of the file that one thread moves at a time.
  std::size_t device_lanes = 16;                   ///< Threads at most that read for a GPU.
  /// Told the bytes of each block once it is read, by one thread at a time.
  std::function<void(std::int64_t bytes)> advance = {};
};

/// Copies stored tensors into their destinations, all of them on one device, converting dtypes where they differ. The
/// list is read front to back by `at::get_num_threads()` threads, or for a GPU by `device_lanes` at most, each a run of
/// blocks at a time. On the CPU a block goes straight to its place; on a GPU it passes two page-locked blocks per
/// thread (nothing else of the file is held a second time), is copied by the thread's own stream and converted there.
/// Work queued on the current stream is waited for first; the values are in place on return, or nothing writes to the
/// destinations any more when it throws.
/// Throws std::invalid_argument for a destination of another shape, device or memory layout, InputError for a
/// file that cannot be read.
void place_tensors(const std::vector<Placement>& placements, const PlacementOptions& options = {});

}  // namespace hestia
