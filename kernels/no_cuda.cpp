// Stands in for all .cu files in a build with HESTIA_CUDA=OFF.
#include "hestia/core/error.hpp"
#include "hestia/kernels/decode_attention.hpp"
#include "hestia/kernels/decode_experts.hpp"
#include "hestia/kernels/decode_fetch.hpp"
#include "hestia/kernels/decode_linear.hpp"
#include "hestia/kernels/decode_router.hpp"
#include "hestia/kernels/decode_sample.hpp"
#include "hestia/kernels/expert_fetch.hpp"
#include "hestia/kernels/expert_formats.hpp"
#include "hestia/kernels/memory_probe.hpp"
#include "hestia/kernels/residency_scan.hpp"
#include "hestia/kernels/router_rows.hpp"
#include "hestia/kernels/slot_cache.hpp"
#include "hestia/kernels/soft_cache.hpp"
#include "row_terms.hpp"

namespace hestia {
namespace {

[[noreturn]] void refuse() {
  throw RunError(
      "kernels: tensors are on a GPU but this build has no CUDA kernels, got HESTIA_CUDA=OFF; "
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
void softmax_rows_cuda(const Real*, std::int64_t, std::int64_t, Real*, Real*, void*) {
  refuse();
}

template <class Real, class Term>
void row_term_cuda(const RowLayout&, const SoftmaxRows<Real>&, const Term&, const RowResult<Real>&, void*) {
  refuse();
}

template <class Real>
void window_sums_cuda(const RowLayout&, const SoftmaxRows<Real>&, WindowQuantity, double, const std::int64_t*,
                      const std::int64_t*, std::int64_t, Real*, void*) {
  refuse();
}

void segment_sums_cuda(const double*, std::int64_t, std::int64_t, const std::int64_t*, const std::int64_t*,
                       std::int64_t, double*, void*) {
  refuse();
}

template <class Real>
void soft_cache_upstream_cuda(const RowLayout&, const std::int64_t*, std::int64_t, bool, Real*, void*) {
  refuse();
}

std::size_t residency_scan_workspace(const ResidencyShape&) {
  return 0;
}

void residency_scan_cuda(const ResidencyShape&, const float*, const float*, const std::int64_t*, const std::int64_t*,
                         std::int64_t, std::int64_t*, void*, void*) {
  refuse();
}

void decode_gate_up_cuda(const DecodeExpertsShape&, const std::uint16_t*, const std::int32_t*, const void*,
                         std::uint16_t*, void*) {
  refuse();
}

void decode_down_cuda(const DecodeExpertsShape&, const std::uint16_t*, const std::int32_t*, const void*, float*,
                      void*) {
  refuse();
}

void decode_combine_cuda(const DecodeExpertsShape&, const float*, const float*, const std::uint16_t*, std::uint16_t*,
                         void*) {
  refuse();
}

void decode_down_combine_cuda(const DecodeExpertsShape&, const std::uint16_t*, const std::int32_t*, const void*,
                              const float*, const float*, const std::uint16_t*, std::uint16_t*, void*,
                              const std::int32_t*) {
  refuse();
}

std::size_t decode_router_workspace(const DecodeRouterShape&) {
  return 0;
}

void decode_router_cuda(const DecodeRouterShape&, const DecodeRouterInputs&, const DecodeRouterOutputs&, void*, void*) {
  refuse();
}

void decode_linear_cuda(const DecodeLinearShape&, const DecodeLinearInputs&, std::uint16_t*, void*) {
  refuse();
}

void decode_linear_cuda(const DecodeLinearShape&, const DecodeLinearInputs&, float*, void*) {
  refuse();
}

std::size_t decode_attention_workspace(const DecodeAttentionShape&) {
  return 0;
}

void decode_attention_cuda(const DecodeAttentionShape&, const DecodeAttentionInputs&, const DecodeKeyValues&,
                           std::uint16_t*, void*, void*) {
  refuse();
}

std::size_t decode_sample_workspace(const DecodeSampleShape&) {
  return 0;
}

template <class Index>
void decode_sample_cuda(const DecodeSampleShape&, const DecodeSampleInputs&, Index*, void*, void*) {
  refuse();
}

void slot_cache_reset_cuda(const SlotCacheShape&, const SlotCacheState&, const std::int32_t*, std::int64_t,
                           const std::uint64_t*, void*) {
  refuse();
}

template <class Index>
void slot_cache_serve_cuda(const SlotCacheShape&, const SlotCacheState&, std::int64_t, const Index*, std::int64_t,
                           std::int64_t, const SlotCacheAnswer&, void*) {
  refuse();
}

template <class Index>
void slot_cache_touch_cuda(const SlotCacheShape&, const SlotCacheState&, std::int64_t, const Index*, std::int64_t,
                           std::int64_t, std::int64_t, void*) {
  refuse();
}

void slot_cache_mask_cuda(const SlotCacheShape&, const SlotCacheState&, std::int64_t, std::uint8_t*, void*) {
  refuse();
}

void expert_ask_cuda(const ExpertStoreShape&, std::int64_t, const SlotCacheStep*, const SlotCacheLoad*, std::int64_t,
                     std::uint32_t*, CopyRequest*, void*) {
  refuse();
}
void expert_fetch_cuda(const ExpertStoreShape&, const void*, std::int64_t, const SlotCacheStep*, const SlotCacheLoad*,
                       std::int64_t, void*, std::int64_t, void*) {
  refuse();
}

std::size_t decode_fetch_workspace() {
  refuse();
}

std::uint32_t* decode_fetch_flags(void*) {
  refuse();
}

void decode_fetch_gate_up_cuda(const DecodeExpertsShape&, const DecodeFetch&, const std::uint16_t*, void*,
                               std::uint16_t*, float*, void*) {
  refuse();
}

void dequantise_experts_cuda(const DecodeExpertsShape&, const void*, const std::int32_t*, std::int64_t, void*, void*) {
  refuse();
}

void read_memory_cuda(const void*, std::size_t, std::uint32_t*, void*) {
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

#define HESTIA_INSTANTIATE(Index)                                                                                      \
  template void slot_cache_serve_cuda<Index>(const SlotCacheShape&, const SlotCacheState&, std::int64_t, const Index*, \
                                             std::int64_t, std::int64_t, const SlotCacheAnswer&, void*);               \
  template void slot_cache_touch_cuda<Index>(const SlotCacheShape&, const SlotCacheState&, std::int64_t, const Index*, \
                                             std::int64_t, std::int64_t, std::int64_t, void*);                         \
  template void decode_sample_cuda<Index>(const DecodeSampleShape&, const DecodeSampleInputs&, Index*, void*, void*);
HESTIA_INSTANTIATE(std::int32_t)
HESTIA_INSTANTIATE(std::int64_t)
#undef HESTIA_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace hestia
