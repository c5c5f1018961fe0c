#include "hestia/kernels/expert_fetch.hpp"

#include <algorithm>

#include "copy_ask.cuh"
#include "decode_checks.hpp"
#include "decode_dot.cuh"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kThreads = 512;
constexpr int kInFlight = 4;                       // loads of 16 bytes per thread
constexpr unsigned kChunk = kThreads * kInFlight;  // words of 16 bytes that a block copies at once

/// Blocks take the chunks of the wave's blobs in turn, so that all of them work on one blob and few pages at a time.
__global__ void __launch_bounds__(kThreads)
    expert_fetch_kernel(const uint4* layer, std::size_t blob_words, unsigned chunks_per_blob, const SlotCacheStep* step,
                        const SlotCacheLoad* loads, std::int64_t wave, uint4* slots) {
  const std::int64_t first = (wave - 1) * step->wave_size;
  const std::int64_t count = min(static_cast<std::int64_t>(step->wave_size), step->loads - first);
  for (std::int64_t chunk = blockIdx.x; chunk < count * chunks_per_blob; chunk += gridDim.x) {
    const std::int64_t number = chunk / chunks_per_blob;
    const SlotCacheLoad load = loads[first + number];
    const std::size_t begin = static_cast<std::size_t>(chunk - number * chunks_per_blob) * kChunk + threadIdx.x;
    const uint4* const from = layer + static_cast<std::size_t>(load.expert) * blob_words;
    uint4* const to = slots + static_cast<std::size_t>(load.slot) * blob_words;
    uint4 words[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (begin + i * kThreads < blob_words) {
        words[i] = load_weights(from + begin + i * kThreads);
      }
    }
    // Plain stores: the products that follow find the newest of them in L2.
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (begin + i * kThreads < blob_words) {
        to[begin + i * kThreads] = words[i];
      }
    }
  }
}

constexpr int kAskThreads = 128;

__global__ void __launch_bounds__(kAskThreads)
    expert_ask_kernel(int first_blob, unsigned blob_bytes, const SlotCacheStep* step, const SlotCacheLoad* loads,
                      std::int64_t wave, std::uint32_t* flags, CopyRequest* request) {
  const std::int64_t first = (wave - 1) * step->wave_size;
  const auto count = static_cast<int>(min(static_cast<std::int64_t>(step->wave_size), step->loads - first));
  if (count <= 0) {
    return;
  }
  const auto thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < count; i += kAskThreads) {
    flags[i] = 1;
  }
  ask_for_copies<kAskThreads>(
      loads + first, count, first_blob, [&](int) { return blob_bytes; }, [](int) { return 0U; }, request);
  for (int i = thread; i < count; i += kAskThreads) {
    while (load_acquire_system(flags + i) != 0) {
      __nanosleep(500);
    }
  }
}

}  // namespace

void expert_ask_cuda(const ExpertStoreShape& shape, std::int64_t layer, const SlotCacheStep* step,
                     const SlotCacheLoad* loads, std::int64_t wave, std::uint32_t* flags, CopyRequest* request,
                     void* stream) {
  check_expert_fetch(shape, nullptr, layer, wave, nullptr);
  expert_ask_kernel<<<1, kAskThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<int>(layer * shape.num_experts), static_cast<unsigned>(shape.blob_bytes), step, loads, wave, flags,
      request);
  check_launch("expert_ask_kernel");
}

void expert_fetch_cuda(const ExpertStoreShape& shape, const void* store, std::int64_t layer, const SlotCacheStep* step,
                       const SlotCacheLoad* loads, std::int64_t wave, void* slots, std::int64_t num_blocks,
                       void* stream) {
  check_expert_fetch(shape, store, layer, wave, slots);
  check_decode_range("expert fetch", "the number of blocks", num_blocks, 65535);
  const std::size_t words = shape.blob_bytes / sizeof(uint4);
  const uint4* const of_layer =
      static_cast<const uint4*>(store) + static_cast<std::size_t>(layer * shape.num_experts) * words;
  expert_fetch_kernel<<<static_cast<unsigned>(num_blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      of_layer, words, static_cast<unsigned>((words + kChunk - 1) / kChunk), step, loads, wave,
      static_cast<uint4*>(slots));
  check_launch("expert_fetch_kernel");
}

}  // namespace hestia
