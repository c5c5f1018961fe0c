#include "hestia/kernels/memory_probe.hpp"

#include <cstring>

#include "decode_checks.hpp"

namespace hestia {

void check_read_memory(std::size_t bytes) {
  check_decode_multiple("memory probe", "the number of bytes", static_cast<std::int64_t>(bytes), 16);
}

void read_memory_cpu(const void* memory, std::size_t bytes, std::uint32_t* folded) {
  check_read_memory(bytes);
  for (std::size_t at = 0; at < bytes; at += sizeof(std::uint32_t)) {
    std::uint32_t word = 0;
    std::memcpy(&word, static_cast<const unsigned char*>(memory) + at, sizeof word);
    *folded ^= word;
  }
}

}  // namespace hestia
