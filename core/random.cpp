#include "hestia/core/random.hpp"

namespace hestia {

std::uint64_t derive_seed(std::uint64_t seed, std::string_view purpose) {
  std::uint64_t hash = 0xCBF29CE484222325ULL;
  for (const char character : purpose) {
    hash ^= static_cast<unsigned char>(character);
    hash *= 0x100000001B3ULL;
  }
  return SplitMix64(seed ^ hash).next();
}

}  // namespace hestia
