#pragma once

/// Marks an inline function that CUDA kernels call, too.
#if defined(__CUDACC__)
#define HESTIA_HOST_DEVICE __host__ __device__
#else
#define HESTIA_HOST_DEVICE
#endif
