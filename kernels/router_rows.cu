#include "hestia/kernels/router_rows.hpp"

#include <algorithm>
#include <string>

#include "launch.cuh"
#include "row_terms.hpp"

namespace hestia {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;
constexpr int kSumThreads = 256;
constexpr std::size_t kSharedBytes = 48 * 1024;  // what every device offers without asking

template <class T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

template <class T>
__device__ T warp_max(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffU, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

/// Dynamic shared memory as Reals: a template cannot declare it in two types under one name.
template <class Real>
__device__ Real* shared_rows() {
  extern __shared__ double storage[];
  return reinterpret_cast<Real*>(storage);
}

template <class Real>
__global__ void softmax_rows_kernel(const Real* logits, std::int64_t num_experts, std::int64_t num_rows, Real* max,
                                    Real* log_sum) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if (row >= num_rows) {
    return;
  }
  const Real* const z = logits + row * num_experts;
  Real largest = z[lane < num_experts ? lane : 0];
  for (std::int64_t j = lane + kWarp; j < num_experts; j += kWarp) {
    largest = z[j] > largest ? z[j] : largest;
  }
  largest = warp_max(largest);
  Real sum = Real(0);
  for (std::int64_t j = lane; j < num_experts; j += kWarp) {
    sum += exp(z[j] - largest);
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    max[row] = largest;
    log_sum[row] = log(sum);
  }
}

/// One warp per row; grid: (blocks of tokens, layers). Shared memory: p, w and, where the term stages something, that;
/// `rows_per_block` rows of each. The term stays where parameters live: a copy would cost its bytes once per thread.
template <class Real, class Term>
__global__ void row_term_kernel(RowLayout layout, SoftmaxRows<Real> rows, const __grid_constant__ Term term,
                                RowResult<Real> result, int rows_per_block) {
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * rows_per_block + warp;
  if (token >= layout.num_tokens) {
    return;
  }
  Bound<Real, Term> bound{bound_row(layout, rows, blockIdx.y, token), term};
  const std::int64_t row = bound.row;
  if (!bound.active()) {
    if (lane == 0 && result.value != nullptr) {
      result.value[row] = 0.0;
    }
    return;
  }
  const std::int64_t num_experts = layout.num_experts;
  constexpr int kArrays = Bound<Real, Term>::kStages ? 3 : 2;
  Real* const p = shared_rows<Real>() + warp * kArrays * num_experts;
  Real* const weighted = p + num_experts;
  bound.p = p;
  bound.extra = weighted + num_experts;
  for (std::int64_t j = lane; j < num_experts; j += kWarp) {
    p[j] = probability(rows, row, num_experts, j);
    if constexpr (Bound<Real, Term>::kStages) {
      bound.stage(j);
    }
  }
  __syncwarp();
  RowSums sums;
  Real total = Real(0);
  for (std::int64_t j = lane; j < num_experts; j += kWarp) {
    const Real w = bound.weighted(j, log_probability(rows, row, num_experts, j), sums);
    weighted[j] = w;  // read back by the same lane
    total += w;
  }
  if constexpr (Bound<Real, Term>::kStages) {
    sums.pairs = warp_sum(sums.pairs);
  }
  const Real factor = bound.factor(sums);
  if (result.value != nullptr) {
    for (std::int64_t k = lane; k < bound.num_choices(); k += kWarp) {
      sums.value += bound.choice(k);
    }
    sums.value = warp_sum(sums.value);
    if (lane == 0) {
      result.value[row] = sums.value * static_cast<double>(factor);
    }
  }
  if (result.gradient != nullptr) {
    total = warp_sum(total);
    const Real scale = static_cast<Real>(result.scale) * factor;
    Real* const gradient = result.gradient + row * num_experts;
    for (std::int64_t j = lane; j < num_experts; j += kWarp) {
      gradient[j] += scale * (weighted[j] - p[j] * total);
    }
  }
}

template <class Real>
__global__ void window_sums_kernel(RowLayout layout, SoftmaxRows<Real> rows, WindowQuantity quantity, Real epsilon,
                                   const std::int64_t* begins, const std::int64_t* ends, std::int64_t num_windows,
                                   Real* sums) {
  const std::int64_t window = blockIdx.x;
  const std::int64_t layer = blockIdx.y;
  const std::int64_t end = ends[window];
  for (std::int64_t j = threadIdx.x; j < layout.num_experts; j += blockDim.x) {
    Real sum = Real(0);
    for (std::int64_t token = begins[window]; token < end; ++token) {
      if (layout.counted[token] != 0) {
        const Real p = probability(rows, layer * layout.num_tokens + token, layout.num_experts, j);
        sum += quantity == WindowQuantity::kProbability ? p : log1p(epsilon - p);
      }
    }
    sums[(layer * num_windows + window) * layout.num_experts + j] = sum;
  }
}

__global__ void segment_sums_kernel(const double* values, std::int64_t length, const std::int64_t* begins,
                                    const std::int64_t* ends, std::int64_t num_segments, double* sums) {
  __shared__ double partial[kSumThreads / kWarp];
  const double* const row = values + static_cast<std::int64_t>(blockIdx.y) * length;
  double sum = 0.0;
  for (std::int64_t i = begins[blockIdx.x] + threadIdx.x; i < ends[blockIdx.x]; i += blockDim.x) {
    sum += row[i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) {
    partial[threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kSumThreads / kWarp; ++warp) {
      sum += partial[warp];
    }
    sums[blockIdx.y * num_segments + blockIdx.x] = sum;
  }
}

/// One warp per row. An entry above 1 is not selected twice, so lanes never meet.
template <class Real>
__global__ void soft_cache_upstream_kernel(RowLayout layout, const std::int64_t* selected, std::int64_t top_k,
                                           bool clamp, Real* cache) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= layout.num_layers * layout.num_tokens) {
    return;
  }
  const bool counted = layout.counted[row % layout.num_tokens] != 0;
  for (std::int64_t j = threadIdx.x % kWarp; j < layout.num_experts; j += kWarp) {
    Real& cached = cache[row * layout.num_experts + j];
    bool used = false;
    for (std::int64_t k = 0; counted && k < top_k; ++k) {
      used = used || selected[row * top_k + k] == j;
    }
    cached = used && !(clamp && cached > Real(1)) ? Real(-1) : Real(0);
  }
}

unsigned blocks_for(std::int64_t num_rows, std::int64_t rows_per_block) {
  return static_cast<unsigned>((num_rows + rows_per_block - 1) / rows_per_block);
}

}  // namespace

template <class Real>
void softmax_rows_cuda(const Real* logits, std::int64_t num_experts, std::int64_t num_rows, Real* max, Real* log_sum,
                       void* stream) {
  if (num_rows == 0) {
    return;
  }
  softmax_rows_kernel<<<blocks_for(num_rows, kRowsPerBlock), kRowsPerBlock * kWarp, 0,
                        static_cast<cudaStream_t>(stream)>>>(logits, num_experts, num_rows, max, log_sum);
  check_launch("softmax_rows_kernel");
}

template <class Real, class Term>
void row_term_cuda(const RowLayout& layout, const SoftmaxRows<Real>& rows, const Term& term,
                   const RowResult<Real>& result, void* stream) {
  if (layout.num_layers == 0 || layout.num_tokens == 0) {
    return;
  }
  const std::size_t row_bytes =
      (Bound<Real, Term>::kStages ? 3 : 2) * static_cast<std::size_t>(layout.num_experts) * sizeof(Real);
  if (row_bytes > kSharedBytes) {
    throw RunError("router rows: a row must fit 48 KiB of shared memory, got " + std::to_string(layout.num_experts) +
                   " experts; run on the CPU");
  }
  const int rows_per_block = static_cast<int>(std::min<std::size_t>(kRowsPerBlock, kSharedBytes / row_bytes));
  const dim3 grid(blocks_for(layout.num_tokens, rows_per_block), static_cast<unsigned>(layout.num_layers));
  row_term_kernel<Real, Term>
      <<<grid, static_cast<unsigned>(rows_per_block * kWarp), static_cast<std::size_t>(rows_per_block) * row_bytes,
         static_cast<cudaStream_t>(stream)>>>(layout, rows, term, result, rows_per_block);
  check_launch("row_term_kernel");
}

template <class Real>
void window_sums_cuda(const RowLayout& layout, const SoftmaxRows<Real>& rows, WindowQuantity quantity, double epsilon,
                      const std::int64_t* begins, const std::int64_t* ends, std::int64_t num_windows, Real* sums,
                      void* stream) {
  if (num_windows == 0 || layout.num_layers == 0 || layout.num_experts == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>(num_windows), static_cast<unsigned>(layout.num_layers));
  const auto threads =
      static_cast<unsigned>(std::min<std::int64_t>(256, (layout.num_experts + kWarp - 1) / kWarp * kWarp));
  window_sums_kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(
      layout, rows, quantity, static_cast<Real>(epsilon), begins, ends, num_windows, sums);
  check_launch("window_sums_kernel");
}

void segment_sums_cuda(const double* values, std::int64_t outer, std::int64_t length, const std::int64_t* begins,
                       const std::int64_t* ends, std::int64_t num_segments, double* sums, void* stream) {
  if (outer == 0 || num_segments == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>(num_segments), static_cast<unsigned>(outer));
  segment_sums_kernel<<<grid, kSumThreads, 0, static_cast<cudaStream_t>(stream)>>>(values, length, begins, ends,
                                                                                   num_segments, sums);
  check_launch("segment_sums_kernel");
}

template <class Real>
void soft_cache_upstream_cuda(const RowLayout& layout, const std::int64_t* selected, std::int64_t top_k, bool clamp,
                              Real* cache, void* stream) {
  const std::int64_t num_rows = layout.num_layers * layout.num_tokens;
  if (num_rows == 0) {
    return;
  }
  soft_cache_upstream_kernel<<<blocks_for(num_rows, kRowsPerBlock), kRowsPerBlock * kWarp, 0,
                               static_cast<cudaStream_t>(stream)>>>(layout, selected, top_k, clamp, cache);
  check_launch("soft_cache_upstream_kernel");
}

// NOLINTBEGIN(bugprone-macro-parentheses): types cannot stand in parentheses
#define HESTIA_INSTANTIATE(Real, Term)                                                             \
  template void row_term_cuda<Real, Term>(const RowLayout&, const SoftmaxRows<Real>&, const Term&, \
                                          const RowResult<Real>&, void*);
HESTIA_FOR_EACH_ROW_TERM(HESTIA_INSTANTIATE)
#undef HESTIA_INSTANTIATE

#define HESTIA_INSTANTIATE(Real)                                                                              \
  template void softmax_rows_cuda<Real>(const Real*, std::int64_t, std::int64_t, Real*, Real*, void*);        \
  template void window_sums_cuda<Real>(const RowLayout&, const SoftmaxRows<Real>&, WindowQuantity, double,    \
                                       const std::int64_t*, const std::int64_t*, std::int64_t, Real*, void*); \
  template void soft_cache_upstream_cuda<Real>(const RowLayout&, const std::int64_t*, std::int64_t, bool, Real*, void*);
HESTIA_INSTANTIATE(float)
HESTIA_INSTANTIATE(double)
#undef HESTIA_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace hestia
