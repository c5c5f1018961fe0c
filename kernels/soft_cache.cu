#include "hestia/kernels/soft_cache.hpp"

#include <algorithm>

#include "launch.cuh"

namespace hestia {
namespace {

constexpr std::int64_t kMaxThreads = 256;
constexpr std::int64_t kMaxChunkTokens = 64;
constexpr std::int64_t kMaxChunkEntries = 8192;  // 32 KiB of expert indices, below the 48 KiB every device offers

// Products rounded on their own: a fused multiply-add would count differently from the CPU.
__device__ float rounded_product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ double rounded_product(double a, double b) {
  return __dmul_rn(a, b);
}

/// Grid: (runs, layers, tiles of blockDim.x experts). Dynamic shared memory: chunk_tokens * K ints.
/// A chunk's experts and scales are fetched together, so the scan itself never waits for global memory.
template <class Real>
__global__ void soft_cache_kernel(SoftCacheShape shape, int chunk_tokens, const std::int64_t* selected,
                                  const std::int64_t* run_begin, const std::int64_t* run_end, Real* cache) {
  extern __shared__ int chosen[];
  __shared__ Real scales[kMaxChunkTokens];
  const std::int64_t layer_start = blockIdx.y * shape.num_tokens;
  const std::int64_t expert = static_cast<std::int64_t>(blockIdx.z) * blockDim.x + threadIdx.x;
  const std::int64_t begin = run_begin[blockIdx.x];
  const std::int64_t end = run_end[blockIdx.x];
  const int top_k = static_cast<int>(shape.top_k);
  const Real gamma = static_cast<Real>(shape.gamma);
  Real state = shape.start == SoftCacheStart::kUniform
                   ? static_cast<Real>(shape.slots / static_cast<double>(shape.num_experts))
                   : Real(0);
  for (std::int64_t first = begin; first < end; first += chunk_tokens) {
    const int length = static_cast<int>(end - first < chunk_tokens ? end - first : chunk_tokens);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < length * top_k; i += static_cast<int>(blockDim.x)) {
      chosen[i] = static_cast<int>(selected[(layer_start + first) * top_k + i]);
    }
    for (int i = static_cast<int>(threadIdx.x); i < length; i += static_cast<int>(blockDim.x)) {
      scales[i] = static_cast<Real>(soft_cache_scale(shape, first - begin + i));
    }
    __syncthreads();
    if (expert < shape.num_experts) {
      Real* row = cache + (layer_start + first) * shape.num_experts + expert;
      for (int i = 0; i < length; ++i, row += shape.num_experts) {
        *row = rounded_product(state, scales[i]);
        state = rounded_product(state, gamma);
        for (int k = 0; k < top_k; ++k) {
          if (chosen[i * top_k + k] == expert) {
            state += Real(1);
          }
        }
      }
    }
  }
}

/// Grid as above; the chunks of a run from the last to the first.
template <class Real>
__global__ void soft_cache_adjoint_kernel(SoftCacheShape shape, const std::int64_t* run_begin,
                                          const std::int64_t* run_end, Real* adjoint) {
  __shared__ Real scales[kMaxChunkTokens];
  const std::int64_t layer_start = blockIdx.y * shape.num_tokens;
  const std::int64_t expert = static_cast<std::int64_t>(blockIdx.z) * blockDim.x + threadIdx.x;
  const std::int64_t begin = run_begin[blockIdx.x];
  const Real gamma = static_cast<Real>(shape.gamma);
  Real state = Real(0);
  std::int64_t last = run_end[blockIdx.x];
  while (last > begin) {
    const std::int64_t first = last - begin > kMaxChunkTokens ? last - kMaxChunkTokens : begin;
    const int length = static_cast<int>(last - first);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < length; i += static_cast<int>(blockDim.x)) {
      scales[i] = static_cast<Real>(soft_cache_scale(shape, first - begin + i));
    }
    __syncthreads();
    if (expert < shape.num_experts) {
      Real* row = adjoint + (layer_start + last - 1) * shape.num_experts + expert;
      for (int i = length - 1; i >= 0; --i, row -= shape.num_experts) {
        const Real own = rounded_product(*row, scales[i]);
        *row = state;
        state = rounded_product(state, gamma) + own;
      }
    }
    last = first;
  }
}

struct Launch {
  dim3 grid;
  unsigned threads;
};

Launch launch_for(const SoftCacheShape& shape, std::int64_t num_runs) {
  const std::int64_t threads = std::min(kMaxThreads, (shape.num_experts + 31) / 32 * 32);
  const std::int64_t tiles = (shape.num_experts + threads - 1) / threads;
  return {dim3(static_cast<unsigned>(num_runs), static_cast<unsigned>(shape.num_layers), static_cast<unsigned>(tiles)),
          static_cast<unsigned>(threads)};
}

bool nothing_to_do(const SoftCacheShape& shape, std::int64_t num_runs) {
  return num_runs == 0 || shape.num_layers == 0 || shape.num_experts == 0;
}

}  // namespace

template <class Real>
void soft_cache_cuda(const SoftCacheShape& shape, const std::int64_t* selected, const std::int64_t* run_begin,
                     const std::int64_t* run_end, std::int64_t num_runs, Real* cache, void* stream) {
  if (nothing_to_do(shape, num_runs)) {
    return;
  }
  const std::int64_t top_k = std::max<std::int64_t>(shape.top_k, 1);
  const std::int64_t chunk = std::clamp<std::int64_t>(kMaxChunkEntries / top_k, 1, kMaxChunkTokens);
  const std::size_t shared_bytes = static_cast<std::size_t>(chunk * top_k) * sizeof(int);
  const Launch launch = launch_for(shape, num_runs);
  soft_cache_kernel<Real><<<launch.grid, launch.threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      shape, static_cast<int>(chunk), selected, run_begin, run_end, cache);
  check_launch("soft_cache_kernel");
}

template <class Real>
void soft_cache_adjoint_cuda(const SoftCacheShape& shape, const std::int64_t* run_begin, const std::int64_t* run_end,
                             std::int64_t num_runs, Real* adjoint, void* stream) {
  if (nothing_to_do(shape, num_runs)) {
    return;
  }
  const Launch launch = launch_for(shape, num_runs);
  soft_cache_adjoint_kernel<Real>
      <<<launch.grid, launch.threads, 0, static_cast<cudaStream_t>(stream)>>>(shape, run_begin, run_end, adjoint);
  check_launch("soft_cache_adjoint_kernel");
}

bool has_cuda_kernels() {
  return true;
}

template void soft_cache_cuda<float>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                     const std::int64_t*, std::int64_t, float*, void*);
template void soft_cache_cuda<double>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                      const std::int64_t*, std::int64_t, double*, void*);
template void soft_cache_adjoint_cuda<float>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                             std::int64_t, float*, void*);
template void soft_cache_adjoint_cuda<double>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                              std::int64_t, double*, void*);

}  // namespace hestia
