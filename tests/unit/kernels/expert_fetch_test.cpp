#include "hestia/kernels/expert_fetch.hpp"

#include <algorithm>
#include <vector>

#include <cuda_runtime_api.h>
#include <catch2/catch.hpp>

#include "decode_support.hpp"
#include "hestia/core/random.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes random_bytes(SplitMix64& random, std::size_t count) {
  Bytes bytes(count);
  for (std::uint8_t& byte : bytes) {
    byte = static_cast<std::uint8_t>(random.next());
  }
  return bytes;
}

/// A step with `loads` misses of different experts into different slots.
struct FetchCase {
  ExpertFetchShape shape;
  std::int64_t layers = 2;
  std::int64_t slots = 0;
  SlotCacheStep step;
  std::vector<SlotCacheLoad> loads;
  Bytes store, before;
};

FetchCase random_case(SplitMix64& random, std::int32_t loads, std::int32_t wave_size, std::size_t blob_bytes) {
  FetchCase c;
  c.shape = {.num_experts = loads + static_cast<std::int64_t>(random.below(4)) + 1, .blob_bytes = blob_bytes};
  c.slots = loads + 2;
  c.step.loads = loads;
  c.step.wave_size = wave_size;
  std::vector<std::int32_t> experts;
  for (std::int32_t e = 0; e < c.shape.num_experts; ++e) {
    experts.push_back(e);
  }
  for (std::size_t i = experts.size(); i-- > 1;) {
    std::swap(experts[i], experts[random.below(i + 1)]);
  }
  for (std::int32_t i = 0; i < loads; ++i) {
    c.loads.push_back({experts[static_cast<std::size_t>(i)], static_cast<std::int32_t>(c.slots) - 1 - i, -1});
  }
  c.store = random_bytes(random, static_cast<std::size_t>(c.layers * c.shape.num_experts) * blob_bytes);
  c.before = random_bytes(random, static_cast<std::size_t>(c.slots) * blob_bytes);
  return c;
}

// What the slots hold once wave 1 to `waves` of layer 1 are through, byte by byte.
Bytes expected(const FetchCase& c, std::int32_t waves) {
  Bytes slots = c.before;
  for (std::int32_t i = 0; i < std::min(waves * c.step.wave_size, c.step.loads); ++i) {
    const SlotCacheLoad& load = c.loads[static_cast<std::size_t>(i)];
    for (std::size_t byte = 0; byte < c.shape.blob_bytes; ++byte) {
      slots[static_cast<std::size_t>(load.slot) * c.shape.blob_bytes + byte] =
          c.store[static_cast<std::size_t>(c.shape.num_experts + load.expert) * c.shape.blob_bytes + byte];
    }
  }
  return slots;
}

}  // namespace

TEST_CASE("experts of a wave are copied into their slots, and nothing else") {
  SplitMix64 random(31);
  for (int i = 0; i < 30; ++i) {
    const auto loads = static_cast<std::int32_t>(random.below(7));
    const auto wave_size = static_cast<std::int32_t>(random.below(4)) + 1;
    FetchCase c = random_case(random, loads, wave_size, 16 * (random.below(9) + 1));
    CAPTURE(loads, wave_size, c.shape.blob_bytes);
    Guarded<std::uint8_t> slots(c.before);
    SlotCacheAnswer answer;
    answer.step = &c.step;
    answer.loads = c.loads.data();
    const std::int32_t waves = (loads + wave_size - 1) / wave_size;
    for (std::int32_t wave = 1; wave <= waves + 1; ++wave) {
      expert_fetch_cpu(c.shape, answer, 1, wave, c.store.data(), slots.data());
      REQUIRE(slots.values() == expected(c, wave));
    }
    CHECK(slots.guards_whole());
  }
}

TEST_CASE("expert fetch refuses blobs, layers and waves that there are not") {
  SlotCacheStep step;
  SlotCacheAnswer answer;
  answer.step = &step;
  std::uint8_t byte = 0;
  const auto fetch = [&](const ExpertFetchShape& shape, std::int64_t layer, std::int32_t wave) {
    expert_fetch_cpu(shape, answer, layer, wave, &byte, &byte);
  };
  CHECK_NOTHROW(fetch({4, 16}, 0, 1));
  CHECK_THROWS_AS(fetch({0, 16}, 0, 1), std::invalid_argument);
  CHECK_THROWS_AS(fetch({4, 0}, 0, 1), std::invalid_argument);
  CHECK_THROWS_AS(fetch({4, 24}, 0, 1), std::invalid_argument);
  CHECK_THROWS_AS(fetch({4, 16}, -1, 1), std::invalid_argument);
  CHECK_THROWS_AS(fetch({4, 16}, 0, 0), std::invalid_argument);
}

TEST_CASE("the GPU copies experts out of pinned host memory, also from a captured graph", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(32);
  cudaStream_t stream = nullptr;
  require_cuda(cudaStreamCreate(&stream));
  for (int i = 0; i < 24; ++i) {
    const auto loads = static_cast<std::int32_t>(random.below(7));
    const auto wave_size = static_cast<std::int32_t>(random.below(4)) + 1;
    const std::size_t blob_bytes = i % 3 == 0 ? std::size_t{16} * 40'961 : 16 * (random.below(3000) + 1);
    FetchCase c = random_case(random, loads, wave_size, blob_bytes);
    CAPTURE(loads, wave_size, blob_bytes);
    void* store = nullptr;
    require_cuda(cudaHostAlloc(&store, c.store.size(), cudaHostAllocMapped));
    std::copy(c.store.begin(), c.store.end(), static_cast<std::uint8_t*>(store));
    void* mapped = nullptr;
    require_cuda(cudaHostGetDevicePointer(&mapped, store, 0));
    Guarded<std::uint8_t> slots(c.before, /*gpu=*/true);
    Guarded<SlotCacheStep> step({SlotCacheStep{}}, /*gpu=*/true);
    std::vector<SlotCacheLoad> list = c.loads;
    list.push_back({1'000'000, 1'000'000, -1});  // behind the list: never looked at
    Guarded<SlotCacheLoad> device_loads(list, /*gpu=*/true);
    SlotCacheAnswer answer;
    answer.step = step.data();
    answer.loads = device_loads.data();
    const std::int32_t waves = (loads + wave_size - 1) / wave_size;
    const std::int32_t blocks = i % 2 == 0 ? 32 : 3;
    require_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (std::int32_t wave = 1; wave <= waves + 1; ++wave) {
      expert_fetch_cuda(c.shape, answer, 1, wave, static_cast<const std::uint8_t*>(mapped), slots.data(), stream,
                        blocks);
    }
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    require_cuda(cudaStreamEndCapture(stream, &graph));
    require_cuda(cudaGraphInstantiate(&executable, graph, 0));
    // An empty step first: what the graph copies is what the tables say when it runs.
    require_cuda(cudaGraphLaunch(executable, stream));
    require_cuda(cudaStreamSynchronize(stream));
    CHECK(slots.values() == c.before);
    require_cuda(cudaMemcpy(step.data(), &c.step, sizeof c.step, cudaMemcpyHostToDevice));
    require_cuda(cudaGraphLaunch(executable, stream));
    require_cuda(cudaStreamSynchronize(stream));
    CHECK(slots.values() == expected(c, waves));
    CHECK(slots.guards_whole());
    require_cuda(cudaGraphExecDestroy(executable));
    require_cuda(cudaGraphDestroy(graph));
    require_cuda(cudaFreeHost(store));
  }
  require_cuda(cudaStreamDestroy(stream));
}
