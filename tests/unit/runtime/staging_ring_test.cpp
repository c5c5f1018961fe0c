#include "runtime/staging_ring.hpp"

#include <cstring>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/random.hpp"

using namespace hestia;

namespace {

struct Sent {
  std::size_t buffer;
  void* to;
  const std::uint8_t* from;
  std::size_t bytes;
};

// A device that moves nothing before somebody waits for it, in the order in which it was sent.
class LateDevice {
 public:
  void send(std::size_t buffer, void* to, const std::uint8_t* from, std::size_t bytes) {
    most_bytes_ = std::max(most_bytes_, bytes);
    waiting_.push_back({buffer, to, from, bytes});
  }
  void wait(std::size_t buffer) {
    ++waits_;
    while (!waiting_.empty()) {
      const Sent next = waiting_.front();
      waiting_.erase(waiting_.begin());
      std::memcpy(next.to, next.from, next.bytes);
      if (next.buffer == buffer) {
        return;
      }
    }
    FAIL("nothing was sent from buffer " << buffer);
  }
  void finish() {
    for (const Sent& sent : waiting_) {
      std::memcpy(sent.to, sent.from, sent.bytes);
    }
    waiting_.clear();
  }
  [[nodiscard]] std::size_t in_flight() const { return waiting_.size(); }
  [[nodiscard]] std::size_t waits() const { return waits_; }
  [[nodiscard]] std::size_t most_bytes() const { return most_bytes_; }

 private:
  std::vector<Sent> waiting_;
  std::size_t waits_ = 0;
  std::size_t most_bytes_ = 0;
};

std::vector<std::uint8_t> random_bytes(SplitMix64& random, std::size_t count) {
  std::vector<std::uint8_t> bytes(count);
  for (std::uint8_t& byte : bytes) {
    byte = static_cast<std::uint8_t>(random.below(256));
  }
  return bytes;
}

TEST_CASE("a staging ring moves everything and fills no buffer whose bytes are still on their way") {
  SplitMix64 random(611);
  for (int round = 0; round < 60; ++round) {
    const std::size_t buffers = 1 + random.below(5);
    const std::size_t bytes = 1 + random.below(70);
    CAPTURE(round, buffers, bytes);
    std::vector<std::uint8_t> memory(buffers * bytes);
    LateDevice device;
    StagingRing ring(
        memory.data(), buffers, bytes,
        [&](std::size_t buffer, void* to, const std::uint8_t* from, std::size_t count) {
          CHECK(from == memory.data() + buffer * bytes);
          device.send(buffer, to, from, count);
        },
        [&](std::size_t buffer) { device.wait(buffer); });
    // Experts shorter than a buffer, as long, and many times as long.
    std::vector<std::vector<std::uint8_t>> experts;
    std::vector<std::vector<std::uint8_t>> arrived;
    std::size_t sends = 0;
    for (int expert = 0; expert < 9; ++expert) {
      experts.push_back(random_bytes(random, random.below(3) == 0 ? bytes : random.below(6 * bytes)));
      arrived.emplace_back(experts.back().size() + 1, std::uint8_t{7});  // and a guard byte
      sends += (experts.back().size() + bytes - 1) / bytes;
    }
    for (std::size_t expert = 0; expert < experts.size(); ++expert) {
      std::vector<std::uint8_t> source = experts[expert];
      ring.copy(arrived[expert].data(), source.data(), source.size());
      std::fill(source.begin(), source.end(), std::uint8_t{0});  // it has been read
      CHECK(device.in_flight() <= buffers);
    }
    CHECK(device.waits() == (sends > buffers ? sends - buffers : 0));  // for no buffer that was free
    CHECK(device.most_bytes() <= bytes);
    device.finish();
    for (std::size_t expert = 0; expert < experts.size(); ++expert) {
      CHECK(std::equal(experts[expert].begin(), experts[expert].end(), arrived[expert].begin()));
      CHECK(arrived[expert].back() == 7);
    }
  }
}

TEST_CASE("a staging ring moves what several threads copy") {
  SplitMix64 random(612);
  constexpr std::size_t kBytes = std::size_t{3} << 20;
  std::vector<std::uint8_t> memory(2 * kBytes);
  LateDevice device;
  StagingRing ring(
      memory.data(), 2, kBytes,
      [&](std::size_t buffer, void* to, const std::uint8_t* from, std::size_t count) {
        device.send(buffer, to, from, count);
      },
      [&](std::size_t buffer) { device.wait(buffer); });
  const std::vector<std::uint8_t> expert = random_bytes(random, 4 * kBytes + 17);
  std::vector<std::uint8_t> arrived(expert.size());
  ring.copy(arrived.data(), expert.data(), expert.size());
  device.finish();
  CHECK(arrived == expert);
}

TEST_CASE("a staging ring needs buffers") {
  std::uint8_t byte = 0;
  CHECK_THROWS_AS(StagingRing(&byte, 0, 1, {}, {}), std::invalid_argument);
  CHECK_THROWS_AS(StagingRing(&byte, 1, 0, {}, {}), std::invalid_argument);
}

TEST_CASE("a budget of pinned memory is never overspent, and spent on experts first where all fit") {
  SplitMix64 random(613);
  for (int round = 0; round < 400; ++round) {
    const auto blob = static_cast<std::int64_t>(64 * (1 + random.below(400'000)));
    const auto blobs = static_cast<std::int64_t>(1 + random.below(2000));
    const auto budget = static_cast<std::int64_t>(16384 + random.below(static_cast<std::uint64_t>(2 * blob * blobs)));
    CAPTURE(blob, blobs, budget);
    const PinnedPlan plan = plan_pinned(blobs, blob, budget);
    CHECK(plan.blobs * blob + plan.staging_bytes() <= budget);
    if (blob * blobs <= budget) {
      CHECK(plan.blobs == blobs);
      CHECK(plan.num_buffers == 0);
    } else {
      CHECK(plan.blobs < blobs);
      CHECK(plan.num_buffers == 4);
      CHECK(plan.buffer_bytes >= 4096);
      CHECK(plan.buffer_bytes % 4096 == 0);
      CHECK((plan.blobs + 1) * blob + plan.staging_bytes() > budget);
      CHECK((plan.staging_bytes() <= budget / 2 || plan.buffer_bytes == 4096));
    }
  }
  CHECK_THROWS_AS(plan_pinned(4, 1 << 20, 16383), UsageError);
}

}  // namespace
