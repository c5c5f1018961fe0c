#pragma once

#include <cstddef>
#include <cstdint>

namespace hestia {

/// Reads `bytes` (a multiple of 16) of memory aligned to 16 once and adds them to *folded by exclusive or, as words of
/// 32 bits: what a timing of memory reads has to run, with a result to check. CPU, synchronous, one thread. Throws
/// std::invalid_argument for other sizes.
void read_memory_cpu(const void* memory, std::size_t bytes, std::uint32_t* folded);

/// The same on the GPU: device pointers, asynchronous on `stream` (a cudaStream_t) of the current device, one kernel of
/// streaming loads. Timed over memory far larger than the L2 cache, 1 GB or more, it gives the read rate that a
/// memory-bound kernel can reach. Throws RunError with the CUDA error when the launch fails, or when Hestia was built
/// without its CUDA kernels.
void read_memory_cuda(const void* memory, std::size_t bytes, std::uint32_t* folded, void* stream);

}  // namespace hestia
