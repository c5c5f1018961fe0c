#pragma once

#include <cstddef>
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

/// Launches `kernel`. `dependent`: it may start before the kernel before it on `stream` has ended, whose end it awaits
/// itself (dependent.cuh); needs compute capability 9.0. Throws as check_launch does.
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared,
                   void* stream, bool dependent, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  (void)cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);  // check_launch sees the error
  check_launch(name);
}

}  // namespace hestia
