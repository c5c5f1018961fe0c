#include <algorithm>
#include <cstdint>

#include "expert_fetch_checks.hpp"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kThreads = 512;
constexpr int kInFlight = 4;  // loads of 16 bytes that each thread has under way

__global__ void __launch_bounds__(kThreads)
    expert_fetch_kernel(std::int64_t first_expert, std::size_t words, const SlotCacheStep* step,
                        const SlotCacheLoad* loads, std::int32_t wave, const uint4* store, uint4* slots) {
  const std::int32_t first = (wave - 1) * step->wave_size;
  const std::int32_t last = min(first + step->wave_size, step->loads);
  if (first >= last) {
    return;
  }
  // Of each block a piece of every expert: all experts of the wave move on together.
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * kThreads;
  const std::size_t begin = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int32_t i = first; i < last; ++i) {
    const uint4* const from = store + static_cast<std::size_t>(first_expert + loads[i].expert) * words;
    uint4* const to = slots + static_cast<std::size_t>(loads[i].slot) * words;
    for (std::size_t at = begin; at < words; at += kInFlight * stride) {
      uint4 value[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (at + j * stride < words) {
          value[j] = __ldcs(from + at + j * stride);
        }
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (at + j * stride < words) {
          to[at + j * stride] = value[j];
        }
      }
    }
  }
}

}  // namespace

void expert_fetch_cuda(const ExpertFetchShape& shape, const SlotCacheAnswer& answer, std::int64_t layer,
                       std::int32_t wave, const std::uint8_t* store, std::uint8_t* slots, void* stream,
                       std::int32_t blocks) {
  check_expert_fetch(shape, layer, wave);
  expert_fetch_kernel<<<static_cast<unsigned>(std::max(blocks, 1)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      layer * shape.num_experts, shape.blob_bytes / sizeof(uint4), answer.step, answer.loads, wave,
      reinterpret_cast<const uint4*>(store), reinterpret_cast<uint4*>(slots));
  check_launch("expert_fetch_kernel");
}

}  // namespace hestia
