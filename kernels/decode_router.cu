#include "hestia/kernels/decode_router.hpp"

#include "decode_checks.hpp"
#include "decode_norm.cuh"
#include "dependent.cuh"
#include "hestia/core/error.hpp"
#include "hestia/routing/residency.hpp"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kDecodeWarp;
constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 32;
constexpr int kAhead = 8;  // chunks of a router row that a lane has in flight, the first from before the norm

/// The choice for one token by one block, which sees all of its logits.
__device__ void choose(const DecodeRouterShape& shape, const DecodeRouterInputs& in, std::size_t token,
                       const float* logits, float* probabilities, std::int32_t* selected, float* weights) {
  __shared__ float z[kMaxExperts];
  __shared__ float p[kMaxExperts];
  __shared__ int adjusted[kMaxExperts];
  __shared__ unsigned char taken[kMaxExperts];
  __shared__ float total;
  __shared__ std::int32_t chosen[kMaxTopK];
  const int num_experts = static_cast<int>(shape.num_experts);
  const int top_k = static_cast<int>(shape.top_k);
  const int kept = static_cast<int>(min(shape.always_keep, shape.top_k));
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e < num_experts; e += kThreads) {
    z[e] = __ldcg(logits + e);  // written by other blocks
  }
  __syncthreads();
  if (thread < kDecodeWarp) {
    float largest = z[thread < num_experts ? thread : 0];
    for (int e = thread + kDecodeWarp; e < num_experts; e += kDecodeWarp) {
      largest = fmaxf(largest, z[e]);
    }
    for (int offset = kDecodeWarp / 2; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, offset));
    }
    float sum = 0.0F;
    for (int e = thread; e < num_experts; e += kDecodeWarp) {
      p[e] = expf(__fsub_rn(z[e], largest));
      sum = __fadd_rn(sum, p[e]);
    }
    sum = decode_warp_sum(sum);
    if (thread == 0) {
      total = sum;
    }
  }
  // Ranks by the logit alone: the first `kept` are in. E is small, so all pairs are compared.
  for (int e = thread; e < num_experts; e += kThreads) {
    const ResidencyCandidate own{ordered_logit(z[e]), ordered_logit(z[e]), e};
    int rank = 0;
    for (int j = 0; j < num_experts; ++j) {
      const std::int32_t other = ordered_logit(z[j]);
      rank += chosen_before({other, other, j}, own) ? 1 : 0;
    }
    taken[e] = rank < kept ? 1 : 0;
    adjusted[e] = ordered_logit(in.resident != nullptr && in.resident[e] != 0 ? __fadd_rn(z[e], shape.bonus) : z[e]);
  }
  __syncthreads();
  for (int e = thread; e < num_experts; e += kThreads) {
    if (taken[e] == 1) {
      continue;
    }
    const ResidencyCandidate own{adjusted[e], ordered_logit(z[e]), e};
    int rank = kept;
    for (int j = 0; j < num_experts; ++j) {
      rank += (taken[j] & 1) == 0 && chosen_before({adjusted[j], ordered_logit(z[j]), j}, own) ? 1 : 0;
    }
    if (rank < top_k) {
      chosen[rank] = e;
    }
  }
  __syncthreads();
  for (int k = kept + thread; k < top_k; k += kThreads) {
    taken[chosen[k]] = 1;
  }
  for (int e = thread; e < num_experts; e += kThreads) {
    p[e] = __fdiv_rn(p[e], total);
    probabilities[e] = p[e];
  }
  __syncthreads();
  for (int e = thread; e < num_experts; e += kThreads) {
    if (taken[e] == 0) {
      continue;
    }
    const ResidencyCandidate own{ordered_logit(z[e]), ordered_logit(z[e]), e};
    int rank = 0;
    for (int j = 0; j < num_experts; ++j) {
      const std::int32_t other = ordered_logit(z[j]);
      rank += taken[j] == 1 && chosen_before({other, other, j}, own) ? 1 : 0;
    }
    chosen[rank] = e;
  }
  __syncthreads();
  if (in.forced != nullptr) {
    const std::int64_t row = *in.step % in.num_forced * shape.num_tokens + static_cast<std::int64_t>(token);
    for (int k = thread; k < top_k; k += kThreads) {
      chosen[k] = static_cast<std::int32_t>(in.forced[row * top_k + k]);
    }
    __syncthreads();
  }
  for (int k = thread; k < top_k; k += kThreads) {
    float weight = p[chosen[k]];
    if (shape.normalise_top_k) {
      float sum = 0.0F;
      for (int j = 0; j < top_k; ++j) {
        sum = __fadd_rn(sum, p[chosen[j]]);
      }
      weight = __fdiv_rn(weight, sum);
    }
    selected[k] = chosen[k];
    weights[k] = __fmul_rn(weight, shape.routed_scale);
  }
}

/// Grid: (tiles of kWarps experts, T). Dynamic shared memory: the normalised row.
__global__ void __launch_bounds__(kThreads)
    router_kernel(DecodeRouterShape shape, DecodeRouterInputs in, DecodeRouterOutputs out, unsigned* ended) {
  extern __shared__ uint4 shared[];
  __shared__ float partial[kWarps];
  __shared__ bool last;
  auto* const normal = reinterpret_cast<std::uint16_t*>(shared);
  const int hidden = static_cast<int>(shape.hidden_size);
  const std::size_t token = blockIdx.y;
  const int thread = static_cast<int>(threadIdx.x);
  const int expert = static_cast<int>(blockIdx.x) * kWarps + thread / kDecodeWarp;
  const int lane = thread % kDecodeWarp;
  const int chunks = expert < shape.num_experts ? hidden / 4 : 0;
  const auto* const row = reinterpret_cast<const float4*>(in.router + static_cast<std::size_t>(expert) * hidden);
  float4 ahead[kAhead];
#pragma unroll
  for (int a = 0; a < kAhead; ++a) {
    const int chunk = lane + a * kDecodeWarp;
    if (chunk < chunks) {
      ahead[a] = __ldg(row + chunk);
    }
  }
  after_kernel_before();
  block_rms_norm<kThreads>(in.hidden + token * hidden, in.norm_weight, hidden, shape.norm_eps, shape.norm, normal,
                           partial);
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int chunk = thread; chunk < hidden / 8; chunk += kThreads) {
      reinterpret_cast<uint4*>(out.normal + token * hidden)[chunk] = shared[chunk];
    }
  }
  if (expert < shape.num_experts) {
    const auto* const x = reinterpret_cast<const uint2*>(normal);
    float sum = 0.0F;
    for (int base = lane; base < chunks; base += kAhead * kDecodeWarp) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int chunk = base + a * kDecodeWarp;
        if (chunk < chunks) {
          const float4 w = ahead[a];
          const uint2 v = x[chunk];
          sum = __fmaf_rn(w.x, __uint_as_float(v.x << 16), sum);
          sum = __fmaf_rn(w.y, __uint_as_float(v.x & 0xffff0000U), sum);
          sum = __fmaf_rn(w.z, __uint_as_float(v.y << 16), sum);
          sum = __fmaf_rn(w.w, __uint_as_float(v.y & 0xffff0000U), sum);
          if (chunk + kAhead * kDecodeWarp < chunks) {
            ahead[a] = __ldg(row + chunk + kAhead * kDecodeWarp);
          }
        }
      }
    }
    sum = decode_warp_sum(sum);
    if (lane == 0) {
      out.logits[token * shape.num_experts + expert] = in.bias == nullptr ? sum : __fadd_rn(sum, in.bias[expert]);
      __threadfence();
    }
  }
  __syncthreads();
  if (thread == 0) {
    last = atomicAdd(ended + token, 1U) == gridDim.x - 1;
    if (last) {
      ended[token] = 0;
      __threadfence();
    }
  }
  __syncthreads();
  if (last) {
    choose(shape, in, token, out.logits + token * shape.num_experts, out.probabilities + token * shape.num_experts,
           out.selected + token * shape.top_k, out.weights + token * shape.top_k);
  }
}

}  // namespace

std::size_t decode_router_workspace(const DecodeRouterShape& shape) {
  return static_cast<std::size_t>(shape.num_tokens) * sizeof(unsigned);
}

void decode_router_cuda(const DecodeRouterShape& shape, const DecodeRouterInputs& in, const DecodeRouterOutputs& out,
                        void* workspace, void* stream) {
  check_decode_router(shape);
  const std::size_t row_bytes = static_cast<std::size_t>(shape.hidden_size) * sizeof(std::uint16_t);
  check_decode_range("decode router", "the hidden size", shape.hidden_size, 16 * 1024);
  const dim3 grid(static_cast<unsigned>((shape.num_experts + kWarps - 1) / kWarps),
                  static_cast<unsigned>(shape.num_tokens));
  launch_kernel("router_kernel", router_kernel, grid, kThreads, row_bytes, stream, shape.dependent, shape, in, out,
                static_cast<unsigned*>(workspace));
}

}  // namespace hestia
