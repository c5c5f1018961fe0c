#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "hestia/kernels/copy_request.hpp"
#include "hestia/runtime/expert_store.hpp"

namespace hestia {

/// A host thread that copies misses with the GPU's copy engine as kernels ask for them (CopyRequest), on streams of its
/// own. It takes a core while it is awake. Not thread-safe; the destructor ends the thread.
class CopyProxy {
 public:
  /// Copies from `store`, pinned, to `pool` (blobs one behind the other) on GPU `device`. own_bytes: at the front of
  /// the first load of a request, which the kernels copy themselves; `flags`: the words of device memory that it
  /// answers in. `pool` and `flags` must outlive this. Throws RunError when CUDA has no memory or stream, or is too old
  /// to write behind a copy.
  CopyProxy(const ExpertStore& store, std::size_t own_bytes, std::uint8_t* pool, std::uint32_t* flags, int device);
  CopyProxy(const CopyProxy&) = delete;
  CopyProxy& operator=(const CopyProxy&) = delete;
  CopyProxy(CopyProxy&&) = delete;
  CopyProxy& operator=(CopyProxy&&) = delete;
  ~CopyProxy();

  /// Where kernels put what they ask for.
  [[nodiscard]] CopyRequest* request() const noexcept;
  /// Requests taken so far.
  [[nodiscard]] std::int64_t requests() const noexcept;
  /// Starts looking for requests; before the first kernel that may ask is launched.
  void wake();
  /// Stops looking; once no kernel that may ask is left. Throws RunError with the CUDA error when a copy did not start:
  /// then kernels may still wait.
  void rest();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hestia
