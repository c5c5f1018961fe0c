#pragma once

#include <cstdint>

#include <torch/types.h>

#include "hestia/runtime/expert_store.hpp"

namespace hestia {

/// Rates of a machine, measured. Bytes per second; 0: not measured.
struct ProbedRates {
  double link_copy = 0.0;    ///< Host to device by the copy engine, random experts out of the store, one by one.
  double link_gather = 0.0;  ///< The same by a kernel that reads pinned host memory.
  double device_read = 0.0;  ///< Reads of device memory.
};

/// Measures the link with experts of `store`, each copied once in random order, and device memory with a read of
/// `read_bytes` or as much as is free: medians of `repeats` passes of at least a tenth of a second. Takes memory on
/// `device` and gives it back. The store must be pinned. Throws RunError when CUDA fails. Synchronises. On the CPU all
/// rates are 0.
[[nodiscard]] ProbedRates probe_rates(const ExpertStore& store, torch::Device device, int repeats = 5,
                                      std::int64_t read_bytes = std::int64_t{4} << 30);

}  // namespace hestia
