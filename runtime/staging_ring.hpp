#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace hestia {

/// Moves memory that a device cannot reach through a few buffers that it can: a stretch is copied into the next buffer,
/// sent from there, and the buffer is filled again only when what was sent from it has arrived. The ring knows no
/// device: it is told how to send and how to wait. Not thread-safe.
class StagingRing {
 public:
  /// Begins to send `bytes` from buffer `buffer`, which holds them, to `to`; may return before they are there.
  using Send = std::function<void(std::size_t buffer, void* to, const std::uint8_t* from, std::size_t bytes)>;
  /// Returns once what was last sent from `buffer` is there.
  using Wait = std::function<void(std::size_t buffer)>;

  /// `memory`: num_buffers * buffer_bytes, of the caller, who keeps it. Throws std::invalid_argument for no buffers or
  /// buffers of nothing.
  StagingRing(std::uint8_t* memory, std::size_t num_buffers, std::size_t buffer_bytes, Send send, Wait wait);

  /// Begins to move `bytes` from `from` to `to`, in stretches of up to a buffer, by `at::get_num_threads()` threads.
  /// All of `from` has been read when it returns. An empty stretch moves nothing.
  void copy(void* to, const std::uint8_t* from, std::size_t bytes);

 private:
  std::uint8_t* memory_;
  std::size_t buffer_bytes_;
  Send send_;
  Wait wait_;
  std::size_t next_ = 0;
  std::vector<bool> sent_;  // of each buffer: something may be on its way
};

/// How a budget of pinned memory is spent: whole experts from the first on, and staging buffers for the others.
struct PinnedPlan {
  std::int64_t blobs = 0;         ///< Experts that are pinned.
  std::int64_t num_buffers = 0;   ///< 0: every expert is pinned.
  std::int64_t buffer_bytes = 0;  ///< A multiple of the page size.
  [[nodiscard]] std::int64_t staging_bytes() const { return num_buffers * buffer_bytes; }
};

/// The plan for `num_blobs` experts of `blob_bytes`. All are pinned when they fit `budget`; else four buffers of up to
/// 8 MiB, together at most half of the budget, come first. Throws UsageError for a budget that holds no four pages.
[[nodiscard]] PinnedPlan plan_pinned(std::int64_t num_blobs, std::int64_t blob_bytes, std::int64_t budget);

}  // namespace hestia
