#include "hestia/kernels/memory_probe.hpp"

#include "decode_checks.hpp"
#include "decode_dot.cuh"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;  // loads of 16 bytes per thread
constexpr int kRounds = 4;    // of loads per thread
constexpr std::size_t kWordsPerBlock = std::size_t{kThreads} * kInFlight * kRounds;

__global__ void __launch_bounds__(kThreads)
    read_memory_kernel(const uint4* memory, std::size_t words, std::uint32_t* folded) {
  const std::size_t begin = blockIdx.x * kWordsPerBlock + threadIdx.x;
  unsigned fold = 0;
  for (int round = 0; round < kRounds; ++round) {
    uint4 values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::size_t at = begin + static_cast<std::size_t>(round * kInFlight + i) * kThreads;
      values[i] = at < words ? load_weights(memory + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      fold ^= values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
    }
  }
  fold = __reduce_xor_sync(0xffffffffU, fold);
  __shared__ unsigned of_warp[kThreads / kDecodeWarp];
  if (threadIdx.x % kDecodeWarp == 0) {
    of_warp[threadIdx.x / kDecodeWarp] = fold;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    fold = 0;
    for (const unsigned part : of_warp) {
      fold ^= part;
    }
    atomicXor(folded, fold);
  }
}

}  // namespace

void read_memory_cuda(const void* memory, std::size_t bytes, std::uint32_t* folded, void* stream) {
  check_read_memory(bytes);
  const std::size_t words = bytes / sizeof(uint4);
  read_memory_kernel<<<static_cast<unsigned>((words + kWordsPerBlock - 1) / kWordsPerBlock), kThreads, 0,
                       static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(memory), words, folded);
  check_launch("read_memory_kernel");
}

}  // namespace hestia
