#pragma once

#include <cstdint>

#include "hestia/kernels/slot_cache.hpp"

namespace hestia {

/// What a kernel asks a host thread to copy, in pinned, mapped host memory. The kernel writes `loads` and then `count`;
/// the thread takes them, puts `count` back to 0, copies in the order of the list and, behind load i, writes 0 to a
/// word i of device memory that the kernel has set to 1 before. A kernel asks again once all words are 0.
struct CopyRequest {
  struct Load {
    std::int32_t blob = 0;  ///< of the store: layer * E + expert
    std::int32_t slot = 0;
    std::uint32_t end = 0;  ///< bytes from the front of the blob on that are the thread's to copy
    /// Tag of the guess that said so before, 0: none. Then what the thread has begun to bring of it is not copied
    /// again, and it says in PrefetchState::landed how much that is.
    std::uint32_t guess = 0;
  };
  std::uint32_t count = 0;
  Load loads[kSlotCacheMaxExperts];
  /// What the link may bring while nothing is asked for (PrefetchState): tag << 32 | 1 + blob; no blob: nothing. Each
  /// replaces the one before.
  std::uint64_t guess = 0;
};

}  // namespace hestia
