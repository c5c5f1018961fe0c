#include <c10/cuda/CUDAStream.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/kernels/soft_cache.hpp"
#include "loss_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

bool gpu_ready() {
  if (!at::hasCUDA() || !has_cuda_kernels()) {
    WARN("SKIPPED: needs a GPU and a build with CUDA kernels");
    return false;
  }
  return true;
}

/// Several sequences, one longer than the kernel's chunks of 64 tokens, one of a single token, padding between.
SequenceLayout long_layout() {
  return layout_of({{3, 0, true}, {333, 40}, {64, 0}, {5, 0, true}, {1, 0}, {127, 127}, {65, 1}});
}

}  // namespace

TEMPLATE_TEST_CASE("soft cache: the GPU scan and its adjoint equal the CPU's", "[gpu]", float, double) {
  if (!gpu_ready()) {
    return;
  }
  const auto dtype = torch::CppTypeToScalarType<TestType>::value;
  std::mt19937 random(61);
  const LayoutTensors cpu(long_layout(), torch::kCPU);
  const LayoutTensors gpu(long_layout(), torch::kCUDA);
  for (const std::int64_t num_experts : {3, 64, 300}) {
    for (const std::int64_t top_k : {std::int64_t{1}, std::min<std::int64_t>(num_experts, 200)}) {
      for (const auto start : {SoftCacheStart::kUniform, SoftCacheStart::kEmpty}) {
        CAPTURE(num_experts, top_k, static_cast<int>(start));
        const SoftCacheShape shape{.num_layers = 3,
                                   .num_tokens = cpu.num_tokens(),
                                   .num_experts = num_experts,
                                   .top_k = top_k,
                                   .slots = 2.0,
                                   .gamma = 0.9,
                                   .start = start};
        const torch::Tensor selected =
            std::get<1>(random_normal(random, {3, cpu.num_tokens(), num_experts}).topk(top_k, -1)).contiguous();
        const torch::Tensor upstream = random_normal(random, {3, cpu.num_tokens(), num_experts}).to(dtype);
        torch::Tensor cache = upstream.clone();
        soft_cache_cpu(shape, selected.const_data_ptr<std::int64_t>(), cpu.run_begins().const_data_ptr<std::int64_t>(),
                       cpu.run_ends().const_data_ptr<std::int64_t>(), cpu.run_begins().numel(),
                       cache.data_ptr<TestType>());
        torch::Tensor adjoint = upstream.clone();
        soft_cache_adjoint_cpu(shape, cpu.run_begins().const_data_ptr<std::int64_t>(),
                               cpu.run_ends().const_data_ptr<std::int64_t>(), cpu.run_begins().numel(),
                               adjoint.data_ptr<TestType>());
        void* const stream = c10::cuda::getCurrentCUDAStream().stream();
        const torch::Tensor gpu_selected = selected.to(torch::kCUDA);
        torch::Tensor gpu_cache = upstream.to(torch::kCUDA);
        soft_cache_cuda(shape, gpu_selected.const_data_ptr<std::int64_t>(),
                        gpu.run_begins().const_data_ptr<std::int64_t>(), gpu.run_ends().const_data_ptr<std::int64_t>(),
                        gpu.run_begins().numel(), gpu_cache.data_ptr<TestType>(), stream);
        torch::Tensor gpu_adjoint = upstream.to(torch::kCUDA);
        soft_cache_adjoint_cuda(shape, gpu.run_begins().const_data_ptr<std::int64_t>(),
                                gpu.run_ends().const_data_ptr<std::int64_t>(), gpu.run_begins().numel(),
                                gpu_adjoint.data_ptr<TestType>(), stream);
        // The recursion rounds alike; only expm1 of the two maths libraries may differ in the last place.
        const double tolerance = std::is_same_v<TestType, float> ? 1e-6 : 1e-14;
        CHECK(relative_difference(gpu_cache, cache) < tolerance);
        CHECK(relative_difference(gpu_adjoint, adjoint) < tolerance);
        CHECK_FALSE(torch::equal(cache, upstream));
      }
    }
  }
}

TEST_CASE("a launch that cannot start throws with the CUDA error", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  const LayoutTensors gpu(layout_of({{4, 0}}), torch::kCUDA);
  const SoftCacheShape too_many_layers{
      .num_layers = 70000, .num_tokens = 4, .num_experts = 2, .top_k = 1, .slots = 1.0};
  float* const nowhere = nullptr;
  CHECK_THROWS_AS(soft_cache_cuda(too_many_layers, nullptr, nullptr, nullptr, 1, nowhere, nullptr), RunError);
  CHECK_THROWS_WITH(soft_cache_adjoint_cuda(too_many_layers, nullptr, nullptr, 1, nowhere, nullptr),
                    Catch::Contains("soft_cache_adjoint_kernel") && Catch::Contains("cudaError"));
}

TEST_CASE("every objective: the GPU equals the CPU in value and gradient", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  std::mt19937 random(62);
  const Sizes sizes{.num_layers = 3, .num_experts = 32, .top_k = 4};
  for (const SequenceLayout& layout :
       {long_layout(), usual_layout(), layout_of({{1, 0}}), layout_of({{6, 6}}), layout_of({{3, 0, true}})}) {
    const LayoutTensors cpu(layout, torch::kCPU);
    const LayoutTensors gpu(layout, torch::kCUDA);
    const RoutingTensors exact = random_routing(random, sizes, cpu.num_tokens());
    for (const torch::ScalarType dtype : {torch::kFloat64, torch::kFloat32}) {
      const bool single = dtype == torch::kFloat32;
      const RoutingTensors host = converted(exact, dtype, torch::kCPU);
      const RoutingTensors device = converted(exact, dtype, torch::kCUDA);
      for (const Variant& variant : every_variant(sizes)) {
        CAPTURE(variant.label, single, cpu.num_tokens());
        CHECK(variant.loss->count(gpu) == variant.loss->count(cpu));
        const torch::Tensor expected = variant.loss->sum(host, cpu);
        const torch::Tensor sum = variant.loss->sum(device, gpu);
        REQUIRE(sum.is_cuda());
        CHECK(relative_difference(sum, expected) < (single ? 1e-5 : 1e-12));
        const torch::Tensor gradient = gradient_of(sum, device);
        REQUIRE(gradient.is_cuda());
        CHECK(relative_difference(gradient, gradient_of(expected, host)) < (single ? 1e-4 : 1e-12));
      }
    }
  }
}

TEST_CASE("combined: the GPU repeats itself bit for bit and equals the CPU", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  std::mt19937 random(64);
  const Sizes sizes{.num_layers = 2, .num_experts = 70, .top_k = 5};
  const LayoutTensors cpu(long_layout(), torch::kCPU);
  const LayoutTensors gpu(long_layout(), torch::kCUDA);
  const RoutingTensors exact = random_routing(random, sizes, cpu.num_tokens());
  const RoutingTensors device = converted(exact, torch::kFloat32, torch::kCUDA);
  std::vector<LossShare> shares;
  const std::vector<Variant> variants = every_variant(sizes);
  for (const Variant& variant : variants) {
    shares.push_back({variant.loss.get(), 0.01});
  }
  const auto gradient = [&](const RoutingTensors& routing, const LayoutTensors& layout) {
    return torch::autograd::grad({combine(shares, routing, layout).total}, {routing.logits_LTE})[0];
  };
  const torch::Tensor once = gradient(device, gpu);
  CHECK(torch::equal(once, gradient(device, gpu)));
  // In float64, where no hinge stands within rounding of its kink.
  CHECK(relative_difference(gradient(converted(exact, torch::kFloat64, torch::kCUDA), gpu), gradient(exact, cpu)) <
        1e-12);
}

TEST_CASE("tensors on another device than the layout are refused", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  const Sizes sizes;
  std::mt19937 random(63);
  const LayoutTensors layout(usual_layout(), torch::kCUDA);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  for (const Variant& variant : every_variant(sizes)) {
    CHECK_THROWS_WITH(variant.loss->sum(routing, layout), Catch::Contains("device of the layout cuda"));
  }
}
