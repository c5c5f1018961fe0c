#pragma once

#include <cuda_runtime.h>

namespace hestia {

/// Lets the kernel behind this one start where launch_kernel made that a dependent one; it waits for the end of this
/// one.
__device__ inline void let_next_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// First in a kernel that launch_kernel may start as a dependent one, but for what needs nothing that the kernel before
/// wrote: returns once that kernel, and so all before it, has ended and its writes are seen, and lets the kernel behind
/// this one start, which waits in turn. All threads that go on call it. Costs nothing in a kernel that is not
/// dependent.
__device__ inline void after_kernel_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  let_next_start();
}

}  // namespace hestia
