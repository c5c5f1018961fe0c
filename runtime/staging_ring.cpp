#include "staging_ring.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/progress.hpp"

namespace hestia {
namespace {

constexpr std::int64_t kPage = 4096;
constexpr std::int64_t kBuffers = 4;
constexpr std::int64_t kMostBufferBytes = std::int64_t{8} << 20;
// What a thread copies at least: less is not worth waking one.
constexpr std::int64_t kGrain = std::int64_t{256} << 10;

}  // namespace

StagingRing::StagingRing(std::uint8_t* memory, std::size_t num_buffers, std::size_t buffer_bytes, Send send, Wait wait)
    : memory_(memory),
      buffer_bytes_(buffer_bytes),
      send_(std::move(send)),
      wait_(std::move(wait)),
      sent_(num_buffers, false) {
  if (num_buffers == 0 || buffer_bytes == 0) {
    throw std::invalid_argument(
        fmt::format("staging ring: needs buffers, got {} of {} bytes", num_buffers, buffer_bytes));
  }
}

void StagingRing::copy(void* to, const std::uint8_t* from, std::size_t bytes) {
  auto* target = static_cast<std::uint8_t*>(to);
  for (std::size_t at = 0; at < bytes; at += buffer_bytes_) {
    const std::size_t length = std::min(buffer_bytes_, bytes - at);
    const std::size_t buffer = next_;
    next_ = (next_ + 1) % sent_.size();
    if (sent_[buffer]) {
      wait_(buffer);
      sent_[buffer] = false;
    }
    std::uint8_t* const filled = memory_ + buffer * buffer_bytes_;
    at::parallel_for(0, static_cast<std::int64_t>(length), kGrain, [&](std::int64_t begin, std::int64_t end) {
      std::memcpy(filled + begin, from + at + begin, static_cast<std::size_t>(end - begin));
    });
    sent_[buffer] = true;
    send_(buffer, target + at, filled, length);
  }
}

PinnedPlan plan_pinned(std::int64_t num_blobs, std::int64_t blob_bytes, std::int64_t budget) {
  PinnedPlan plan;
  if (budget / blob_bytes >= num_blobs) {
    plan.blobs = num_blobs;
    return plan;
  }
  if (budget < kBuffers * kPage) {
    throw UsageError(fmt::format("--pinned-memory: must hold at least four staging buffers of a page, {}, got {}",
                                 format_bytes(static_cast<double>(kBuffers * kPage)),
                                 format_bytes(static_cast<double>(budget))));
  }
  plan.num_buffers = kBuffers;
  plan.buffer_bytes = std::clamp(budget / 2 / kBuffers / kPage * kPage, kPage, kMostBufferBytes);
  plan.blobs = (budget - plan.staging_bytes()) / blob_bytes;
  return plan;
}

}  // namespace hestia
