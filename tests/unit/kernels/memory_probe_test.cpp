#include "hestia/kernels/memory_probe.hpp"

#include "decode_support.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

// Less than a warp, odd parts of a block's 128 KiB, exactly that, several blocks.
const std::vector<std::size_t> kBytes = {16, 496, 4112, 131056, 131072, 131088, 5000016};

std::vector<std::uint32_t> random_words(SplitMix64& random, std::size_t bytes) {
  std::vector<std::uint32_t> words(bytes / 4);
  for (std::uint32_t& word : words) {
    word = static_cast<std::uint32_t>(random.next());
  }
  return words;
}

std::uint32_t folded(const std::vector<std::uint32_t>& words, std::size_t bytes, bool gpu) {
  Guarded<std::uint32_t> memory(words, gpu);  // guards and the rest hold values that a read too far would fold in
  Guarded<std::uint32_t> result({0x9e3779b9U}, gpu);
  if (gpu) {
    read_memory_cuda(memory.data(), bytes, result.data(), nullptr);
  } else {
    read_memory_cpu(memory.data(), bytes, result.data());
  }
  CHECK(result.guards_whole());
  return result.values().front();
}

void check_all(bool gpu) {
  SplitMix64 random(31);
  for (const std::size_t bytes : kBytes) {
    CAPTURE(bytes);
    const std::vector<std::uint32_t> words = random_words(random, bytes + 48);
    std::uint32_t expected = 0x9e3779b9U;
    for (std::size_t i = 0; i < bytes / 4; ++i) {
      expected ^= words[i];
    }
    CHECK(folded(words, bytes, gpu) == expected);
  }
}

}  // namespace

TEST_CASE("memory probe: all words are read once") {
  check_all(false);
  std::uint32_t result = 0;
  CHECK_THROWS_WITH(read_memory_cpu(&result, 20, &result), Catch::Contains("must be a multiple of 16, got 20"));
}

TEST_CASE("memory probe: CUDA reads all words once", "[gpu]") {
  if (gpu_ready()) {
    check_all(true);
  }
}
