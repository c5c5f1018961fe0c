#include "hestia/kernels/decode_sample.hpp"

#include <algorithm>
#include <cmath>

#include "dependent.cuh"
#include "launch.cuh"
#include "sample_rules.hpp"

namespace hestia {
namespace {

using Wide = unsigned long long;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kGreedyThreads = 256;
constexpr int kGreedyTokens = 16 * kGreedyThreads;  // of a block
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigitBits = 9;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kSampleKeyBits % kDigitBits == 0 && kWarps == kWarp);

/// Of a row: zero between calls.
struct Greedy {
  Wide best;
  Wide ended;
};

/// Grid: (blocks of kGreedyTokens, T). The largest of integers is the same in any order.
template <class Index>
__global__ void __launch_bounds__(kGreedyThreads)
    greedy_kernel(int size, const float* logits, Index* ids, Greedy* workspace) {
  __shared__ Wide of_warp[kGreedyThreads / kWarp];
  after_kernel_before();
  const int thread = static_cast<int>(threadIdx.x);
  const std::size_t t = blockIdx.y;
  const float* const row = logits + t * size;
  const int first = static_cast<int>(blockIdx.x) * kGreedyTokens;
  Wide best = 0;
#pragma unroll
  for (int i = 0; i < kGreedyTokens / kGreedyThreads; ++i) {
    const int id = first + i * kGreedyThreads + thread;
    if (id < size) {
      best = max(best, static_cast<Wide>(greedy_key(row[id], static_cast<std::uint32_t>(id))));
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    best = max(best, __shfl_xor_sync(kAllLanes, best, offset));
  }
  if (thread % kWarp == 0) {
    of_warp[thread / kWarp] = best;
  }
  __syncthreads();
  if (thread == 0) {
    for (const Wide other : of_warp) {
      best = max(best, other);
    }
    Greedy& own = workspace[t];
    atomicMax(&own.best, best);
    __threadfence();
    if (atomicAdd(&own.ended, Wide{1}) == gridDim.x - 1) {
      __threadfence();
      ids[t] = static_cast<Index>(greedy_id(atomicExch(&own.best, Wide{0})));
      own.ended = 0;
    }
  }
}

__device__ Wide warp_sum(Wide value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

/// Sum over the lanes up to this one.
__device__ Wide warp_prefix(Wide value) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Wide below = __shfl_up_sync(kAllLanes, value, offset);
    value += static_cast<int>(threadIdx.x) % kWarp >= offset ? below : 0;
  }
  return value;
}

/// One row's logits as the rule sees them.
struct Row {
  const float* logits;
  float largest;
  float factor;

  __device__ std::uint32_t distance(int id) const { return sample_distance(largest, logits[id], factor); }
};

__device__ float largest_logit(const float* logits, int size, float* of_warp) {
  const int thread = static_cast<int>(threadIdx.x);
  float largest = -INFINITY;
#pragma unroll 8
  for (int id = thread; id < size; id += kThreads) {
    largest = fmaxf(largest, logits[id]);  // of a number and NaN: the number
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  }
  if (thread % kWarp == 0) {
    of_warp[thread / kWarp] = largest;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    largest = fmaxf(largest, of_warp[warp]);
  }
  return largest;
}

struct Nucleus {
  Wide weights[kDigits];  // of the tokens with each next digit of their key
  Wide before;            // weight of the keys before all that begin with the digits found
  Wide digits;
  Wide target;
  bool empty;
};

/// The key of the nucleus' last token, digit by digit from the top: the first digit at which the weight of all keys so
/// far reaches the target. Sums of integers are the same in any order. False: there is no weight.
__device__ bool last_of_nucleus(const Row& row, int size, float top_p, Nucleus& found) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    found.before = 0;
    found.digits = 0;
    found.empty = false;
  }
  for (int shift = kSampleKeyBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int digit = thread; digit < kDigits; digit += kThreads) {
      found.weights[digit] = 0;
    }
    __syncthreads();
    const Wide digits = found.digits;
#pragma unroll 4
    for (int id = thread; id < size; id += kThreads) {
      const std::uint32_t distance = row.distance(id);
      const Wide key = sample_key(distance, static_cast<std::uint32_t>(id));
      if (distance < kSampleFarthest && key >> shift >> kDigitBits == digits) {
        atomicAdd(&found.weights[key >> shift & (kDigits - 1)], static_cast<Wide>(sample_weight(distance)));
      }
    }
    __syncthreads();
    if (thread < kWarp) {
      constexpr int kOfLane = kDigits / kWarp;
      Wide own = 0;
      for (int i = 0; i < kOfLane; ++i) {
        own += found.weights[thread * kOfLane + i];
      }
      const Wide up_to = warp_prefix(own);
      const Wide total = __shfl_sync(kAllLanes, up_to, kWarp - 1);
      const bool first = shift == kSampleKeyBits - kDigitBits;
      const Wide target = first ? static_cast<Wide>(nucleus_target(top_p, total)) : found.target;
      const Wide before = found.before;
      const unsigned reached = __ballot_sync(kAllLanes, before + up_to >= target);
      if (first && total == 0) {
        found.empty = true;
      } else if (thread == __ffs(static_cast<int>(reached)) - 1) {
        Wide sum = before + up_to - own;
        int digit = thread * kOfLane;
        while (sum + found.weights[digit] < target) {
          sum += found.weights[digit++];
        }
        found.before = sum;
        found.digits = digits << kDigitBits | static_cast<Wide>(digit);
        found.target = target;
      }
    }
    __syncthreads();
    if (found.empty) {
      return false;
    }
  }
  return true;
}

/// Grid: T. A row's token by one block.
template <class Index>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(DecodeSampleShape shape, DecodeSampleInputs in, float factor, Index* ids) {
  __shared__ Nucleus found;
  __shared__ float largest_of_warp[kWarps];
  __shared__ Wide of_warp[kWarps];
  after_kernel_before();
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const std::size_t t = blockIdx.x;
  const int size = static_cast<int>(shape.vocabulary);
  const float* const logits = in.logits + t * size;
  const Row row{logits, largest_logit(logits, size, largest_of_warp), factor};
  Wide last_key = ~Wide{0};
  if (shape.top_p < 1.0F) {
    if (!last_of_nucleus(row, size, shape.top_p, found)) {
      if (thread == 0) {
        ids[t] = -1;
      }
      return;
    }
    last_key = found.digits;
  }
  // 32 pieces of what is left, by id, until one token is: the piece in which the weights reach the draw.
  int first = 0;
  int count = size;
  bool drawn = false;
  Wide draw = 0;
  while (count > 1 || !drawn) {
    int piece = (count + kWarps - 1) / kWarps;
    piece = piece > kWarp ? (piece + kWarp - 1) / kWarp * kWarp : piece;
    const int begin = min(warp * piece, count);
    const int end = min(begin + piece, count);
    Wide sum = 0;
#pragma unroll 4
    for (int i = begin + lane; i < end; i += kWarp) {
      const std::uint32_t distance = row.distance(first + i);
      sum += sample_key(distance, static_cast<std::uint32_t>(first + i)) <= last_key ? sample_weight(distance) : 0;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      of_warp[warp] = sum;
    }
    __syncthreads();
    const Wide up_to = warp_prefix(of_warp[lane]);
    if (!drawn) {
      const Wide total = __shfl_sync(kAllLanes, up_to, kWarp - 1);
      if (total == 0) {
        if (thread == 0) {
          ids[t] = -1;
        }
        return;
      }
      draw = sample_draw(sample_bits(in.seed[t], in.step[shape.one_step ? 0 : t]), total);
      drawn = true;
    }
    const int chosen = __ffs(static_cast<int>(__ballot_sync(kAllLanes, up_to > draw))) - 1;
    draw -= __shfl_sync(kAllLanes, up_to - of_warp[lane], chosen);
    first += chosen * piece;
    count = min(piece, count - chosen * piece);
    __syncthreads();  // of_warp is written again
  }
  if (thread == 0) {
    ids[t] = static_cast<Index>(first);
  }
}

}  // namespace

std::size_t decode_sample_workspace(const DecodeSampleShape& shape) {
  check_decode_sample(shape);
  return static_cast<std::size_t>(shape.num_tokens) * sizeof(Greedy);
}

template <class Index>
void decode_sample_cuda(const DecodeSampleShape& shape, const DecodeSampleInputs& in, Index* ids, void* workspace,
                        void* stream) {
  check_decode_sample(shape);
  const auto rows = static_cast<unsigned>(shape.num_tokens);
  if (shape.temperature == 0.0F) {
    const dim3 grid(static_cast<unsigned>((shape.vocabulary + kGreedyTokens - 1) / kGreedyTokens), rows);
    launch_kernel("greedy_kernel", greedy_kernel<Index>, grid, kGreedyThreads, 0, stream, shape.dependent,
                  static_cast<int>(shape.vocabulary), in.logits, ids, static_cast<Greedy*>(workspace));
  } else {
    launch_kernel("sample_kernel", sample_kernel<Index>, rows, kThreads, 0, stream, shape.dependent, shape, in,
                  sample_factor(shape.temperature), ids);
  }
}

template void decode_sample_cuda<std::int32_t>(const DecodeSampleShape&, const DecodeSampleInputs&, std::int32_t*,
                                               void*, void*);
template void decode_sample_cuda<std::int64_t>(const DecodeSampleShape&, const DecodeSampleInputs&, std::int64_t*,
                                               void*, void*);

}  // namespace hestia
