// Stands in for all .cu files in a build with HESTIA_CUDA=OFF.
#include "hestia/core/error.hpp"
#include "hestia/kernels/rank_hinge.hpp"
#include "hestia/kernels/soft_cache.hpp"

namespace hestia {
namespace {

[[noreturn]] void refuse() {
  throw RunError(
      "routing losses: tensors are on a GPU but this build has no CUDA kernels, got HESTIA_CUDA=OFF; "
      "configure with HESTIA_CUDA=ON or run on the CPU");
}

}  // namespace

template <class Real>
void soft_cache_cuda(const SoftCacheShape&, const std::int64_t*, const std::int64_t*, const std::int64_t*, std::int64_t,
                     Real*, void*) {
  refuse();
}

template <class Real>
void soft_cache_adjoint_cuda(const SoftCacheShape&, const std::int64_t*, const std::int64_t*, std::int64_t, Real*,
                             void*) {
  refuse();
}

template <class Real>
void rank_hinge_cuda(const Real*, const Real*, std::int64_t, std::int64_t, double, bool, double*, Real*, void*) {
  refuse();
}

bool has_cuda_kernels() {
  return false;
}

template void soft_cache_cuda<float>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                     const std::int64_t*, std::int64_t, float*, void*);
template void soft_cache_cuda<double>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                      const std::int64_t*, std::int64_t, double*, void*);
template void soft_cache_adjoint_cuda<float>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                             std::int64_t, float*, void*);
template void soft_cache_adjoint_cuda<double>(const SoftCacheShape&, const std::int64_t*, const std::int64_t*,
                                              std::int64_t, double*, void*);
template void rank_hinge_cuda<float>(const float*, const float*, std::int64_t, std::int64_t, double, bool, double*,
                                     float*, void*);
template void rank_hinge_cuda<double>(const double*, const double*, std::int64_t, std::int64_t, double, bool, double*,
                                      double*, void*);

}  // namespace hestia
