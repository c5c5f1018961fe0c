#include "hestia/kernels/rank_hinge.hpp"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;

template <class T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

/// One warp per token; a lane owns experts j = lane, lane + 32, ... and visits all i for each of them.
/// The second round over j repeats the sums instead of storing E slopes: experts are few and registers fixed.
template <class Real>
__global__ void rank_hinge_kernel(const Real* p, const Real* base, std::int64_t num_tokens, std::int64_t num_experts,
                                  Real margin, bool normalise, double* value, Real* gradient) {
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if (token >= num_tokens) {
    return;
  }
  const Real* const row = p + token * num_experts;
  const Real* const base_row = base + token * num_experts;
  const auto column = [&](std::int64_t j, double& hinge, int& pairs) {
    const Real p_j = row[j];
    const Real base_j = base_row[j];
    Real sum = Real(0);
    int slope = 0;
    for (std::int64_t i = 0; i < num_experts; ++i) {
      const Real p_i = row[i];
      const Real base_i = base_row[i];
      const Real push = (margin - p_i) + p_j;
      const Real pull = (margin - p_j) + p_i;
      if (base_j < base_i) {
        ++pairs;
        if (push > Real(0)) {
          sum += push;
          ++slope;
        }
      } else if (base_j > base_i && pull > Real(0)) {
        --slope;
      }
    }
    hinge += static_cast<double>(sum);
    return static_cast<Real>(slope);
  };
  double hinge = 0.0;
  double mean_slope = 0.0;
  int pairs = 0;
  for (std::int64_t j = lane; j < num_experts; j += kWarp) {
    mean_slope += static_cast<double>(row[j] * column(j, hinge, pairs));
  }
  hinge = warp_sum(hinge);
  mean_slope = warp_sum(mean_slope);
  pairs = warp_sum(pairs);
  const double scale = normalise ? 1.0 / static_cast<double>(pairs > 1 ? pairs : 1) : 1.0;
  if (lane == 0) {
    value[token] = hinge * scale;
  }
  if (gradient != nullptr) {
    for (std::int64_t j = lane; j < num_experts; j += kWarp) {
      double unused_hinge = 0.0;
      int unused_pairs = 0;
      const Real slope = column(j, unused_hinge, unused_pairs) - static_cast<Real>(mean_slope);
      gradient[token * num_experts + j] = static_cast<Real>(scale) * row[j] * slope;
    }
  }
}

}  // namespace

template <class Real>
void rank_hinge_cuda(const Real* p, const Real* base, std::int64_t num_tokens, std::int64_t num_experts, double margin,
                     bool normalise, double* value, Real* gradient, void* stream) {
  if (num_tokens == 0) {
    return;
  }
  const std::int64_t blocks = (num_tokens + kWarpsPerBlock - 1) / kWarpsPerBlock;
  rank_hinge_kernel<Real>
      <<<static_cast<unsigned>(blocks), kWarpsPerBlock * kWarp, 0, static_cast<cudaStream_t>(stream)>>>(
          p, base, num_tokens, num_experts, static_cast<Real>(margin), normalise, value, gradient);
  check_launch("rank_hinge_kernel");
}

template void rank_hinge_cuda<float>(const float*, const float*, std::int64_t, std::int64_t, double, bool, double*,
                                     float*, void*);
template void rank_hinge_cuda<double>(const double*, const double*, std::int64_t, std::int64_t, double, bool, double*,
                                      double*, void*);

}  // namespace hestia
