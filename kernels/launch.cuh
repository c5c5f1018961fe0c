#pragma once

#include <string>

#include <cuda_runtime.h>

#include "hestia/core/error.hpp"

namespace hestia {

/// Throws RunError when the launch just made did not start; clears the error.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw RunError(std::string(kernel) + ": the kernel did not start, got " + cudaGetErrorName(error) + " (" +
                   cudaGetErrorString(error) + "); check the GPU with nvidia-smi or run on the CPU");
  }
}

}  // namespace hestia
