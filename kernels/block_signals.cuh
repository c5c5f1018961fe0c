#pragma once

#include <cuda_runtime.h>

// How the blocks of a kernel, and the host, tell one another what has been written: a block synchronises, then one of
// its threads counts or stores; whoever sees that through one of the loads, and those that synchronise with it, see
// what the block wrote before.

namespace hestia {

__device__ inline unsigned load_acquire(const unsigned* address) {
  unsigned value = 0;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline unsigned load_acquire_system(const unsigned* address) {
  unsigned value = 0;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline void store_release(unsigned* address, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ inline void store_release_system(unsigned* address, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ inline void store_release_system(unsigned long long* address, unsigned long long value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ inline void count_down(unsigned* address) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(~0U) : "memory");
}
__device__ inline void count_up(unsigned* address) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(address) : "memory");
}

/// Adds one and returns what was there: the last to count sees what all others wrote before they did.
__device__ inline unsigned count_and_see(unsigned* address) {
  unsigned before = 0;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(address) : "memory");
  return before;
}

}  // namespace hestia
