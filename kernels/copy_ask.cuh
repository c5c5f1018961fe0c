#pragma once

#include <cstdint>

#include "block_signals.cuh"
#include "hestia/kernels/copy_request.hpp"

namespace hestia {

/// Asks the host thread for `loads` [count], of blobs from `first_blob` on, of load i up to byte end(i) and as guess(i)
/// says; a block of kThreads, all of which come. The words that the thread answers in must be 1 before.
template <int kThreads, class End, class Guess>
__device__ void ask_for_copies(const SlotCacheLoad* loads, int count, int first_blob, const End& end,
                               const Guess& guess, CopyRequest* request) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const SlotCacheLoad what = loads[i];
    volatile CopyRequest::Load& load = request->loads[i];
    load.blob = first_blob + what.expert;
    load.slot = what.slot;
    load.end = end(i);
    load.guess = guess(i);
    __threadfence_system();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    store_release_system(&request->count, static_cast<unsigned>(count));
  }
}

}  // namespace hestia
