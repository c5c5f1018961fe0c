#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hestia {

/// 64-bit keys to 64-bit values by open addressing, for lookups that miss as often as they hit. Keys and values are any
/// but 2^64 - 1.
class FlatMap {
 public:
  static constexpr std::uint64_t kNone = UINT64_MAX;

  /// Room for `count` keys.
  explicit FlatMap(std::size_t count = 0) : slots_(std::bit_ceil(2 * count + 2)) {}
  /// Replaces what `key` had. Grows when half full.
  void set(std::uint64_t key, std::uint64_t value) {
    if (2 * (size_ + 1) > slots_.size()) {
      grow();
    }
    Slot& slot = slots_[place(key)];
    size_ += slot.key == kNone ? 1 : 0;
    slot = {key, value};
  }
  /// kNone when there is no such key.
  [[nodiscard]] std::uint64_t find(std::uint64_t key) const { return slots_[place(key)].value; }

 private:
  struct Slot {
    std::uint64_t key = kNone;
    std::uint64_t value = kNone;
  };
  [[nodiscard]] std::size_t place(std::uint64_t key) const {
    std::uint64_t hash = key * 0x9E3779B97F4A7C15ULL;
    hash ^= hash >> 32U;
    std::size_t at = hash & (slots_.size() - 1);
    while (slots_[at].key != key && slots_[at].key != kNone) {
      at = (at + 1) & (slots_.size() - 1);
    }
    return at;
  }
  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.key != kNone) {
        slots_[place(slot.key)] = slot;
      }
    }
  }
  std::vector<Slot> slots_;
  std::size_t size_ = 0;
};

}  // namespace hestia
