#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "hestia/kernels/copy_request.hpp"
#include "hestia/runtime/expert_store.hpp"

namespace hestia {

/// Where guesses at the next layer's misses go (PrefetchState), in device memory.
struct CopyStaging {
  std::uint8_t* places = nullptr;      ///< Two blobs: of layers of even and of odd number.
  std::uint32_t* landed = nullptr;     ///< PrefetchState::landed.
  std::int64_t experts_per_layer = 0;  ///< E: which layer a blob is of.
};

/// A host thread that copies misses with the GPU's copy engine as kernels ask for them (CopyRequest), on streams of its
/// own. It takes a core while it is awake. Not thread-safe; the destructor ends the thread.
class CopyProxy {
 public:
  /// Copies from `store`, pinned, to `pool` (blobs one behind the other) on GPU `device`. `flags`: the words of device
  /// memory that it answers in. With `staging` it also copies what is guessed, in pieces, while nothing is asked for:
  /// behind the loads before, two pieces at most on their way, and no more once the guess's layer asks or another guess
  /// comes. What was begun of a load that is asked for then is not copied again. All of that memory must outlive this.
  /// Throws RunError for blobs of 4 GiB and more, or when CUDA has no memory, stream or event, or is too old to write
  /// behind a copy.
  CopyProxy(const ExpertStore& store, std::uint8_t* pool, std::uint32_t* flags,
            const std::optional<CopyStaging>& staging, int device);
  CopyProxy(const CopyProxy&) = delete;
  CopyProxy& operator=(const CopyProxy&) = delete;
  CopyProxy(CopyProxy&&) = delete;
  CopyProxy& operator=(CopyProxy&&) = delete;
  ~CopyProxy();

  /// Where kernels put what they ask for.
  [[nodiscard]] CopyRequest* request() const noexcept;
  /// Requests taken so far.
  [[nodiscard]] std::int64_t requests() const noexcept;
  /// Bytes of guesses copied so far, and those of them that were asked for then.
  [[nodiscard]] std::int64_t guessed_bytes() const noexcept;
  [[nodiscard]] std::int64_t useful_bytes() const noexcept;
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
