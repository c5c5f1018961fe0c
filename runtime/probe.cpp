#include "hestia/runtime/probe.hpp"

#include <algorithm>
#include <chrono>
#include <functional>
#include <numeric>
#include <vector>

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "hestia/core/median.hpp"
#include "hestia/core/random.hpp"
#include "hestia/kernels/expert_fetch.hpp"
#include "hestia/kernels/memory_probe.hpp"

namespace hestia {
namespace {

using torch::Tensor;

// Bytes per second of `pass`, which moves `bytes`; called often enough to take a tenth of a second.
double rate_of(double bytes, int repeats, c10::cuda::CUDAStream stream, const std::function<void()>& pass) {
  using Clock = std::chrono::steady_clock;
  constexpr double kLongEnough = 0.1;
  const auto seconds_of = [&](int passes) {
    stream.synchronize();
    const auto begin = Clock::now();
    for (int i = 0; i < passes; ++i) {
      pass();
    }
    stream.synchronize();
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  const int passes = std::max(1, static_cast<int>(kLongEnough / std::max(seconds_of(1), 1e-6)));
  std::vector<double> rates;
  rates.reserve(static_cast<std::size_t>(repeats));
  for (int i = 0; i < repeats; ++i) {
    rates.push_back(bytes * passes / seconds_of(passes));
  }
  return median(rates);
}

std::vector<std::int64_t> shuffled(std::int64_t count) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  SplitMix64 random(77);
  for (std::size_t i = order.size(); i-- > 1;) {
    std::swap(order[i], order[random.below(i + 1)]);
  }
  return order;
}

}  // namespace

ProbedRates probe_rates(const ExpertStore& store, torch::Device device, int repeats, std::int64_t read_bytes) {
  ProbedRates rates;
  if (!device.is_cuda()) {
    return rates;
  }
  const torch::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  const auto bytes = static_cast<std::int64_t>(store.layout().bytes);
  const auto options = torch::TensorOptions().dtype(torch::kUInt8).device(device);
  constexpr std::int64_t kMostExperts = 256;
  std::vector<std::int64_t> order = shuffled(store.pinned_blobs());
  order.resize(static_cast<std::size_t>(std::min(store.pinned_blobs(), kMostExperts)));
  const auto count = static_cast<std::int64_t>(order.size());
  constexpr std::int64_t kSlots = 8;
  if (count > 0) {
    const Tensor slots = torch::zeros({kSlots, bytes}, options);
    rates.link_copy = rate_of(static_cast<double>(count * bytes), repeats, stream, [&] {
      for (std::int64_t i = 0; i < count; ++i) {
        C10_CUDA_CHECK(cudaMemcpyAsync(slots[i % kSlots].data_ptr(),
                                       store.blobs()[order[static_cast<std::size_t>(i)]].const_data_ptr(),
                                       static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice, stream.stream()));
      }
    });
    if (store.pinned()) {
      // The same experts as lists of misses, each of one stretch of the store: a layer has no more experts.
      const std::int64_t stretch = std::min(store.num_blobs(), kSlotCacheMaxExperts);
      const std::int64_t stretches = store.num_blobs() / stretch;
      const std::int64_t lists = (count + kSlots - 1) / kSlots;
      std::vector<SlotCacheLoad> loads(static_cast<std::size_t>(lists * kSlots));
      for (std::int64_t i = 0; i < lists * kSlots; ++i) {
        loads[static_cast<std::size_t>(i)] = {
            static_cast<std::int32_t>(order[static_cast<std::size_t>(i % count)] % stretch),
            static_cast<std::int32_t>(i % kSlots), -1};
      }
      SlotCacheStep step;
      step.loads = kSlots;
      step.wave_size = kSlots;
      const Tensor load_memory =
          torch::zeros({static_cast<std::int64_t>(loads.size() * sizeof(SlotCacheLoad))}, options);
      const Tensor step_memory = torch::zeros({static_cast<std::int64_t>(sizeof step)}, options);
      const auto upload = [&](const Tensor& to, const void* from, std::size_t size) {
        C10_CUDA_CHECK(cudaMemcpyAsync(to.mutable_data_ptr(), from, size, cudaMemcpyHostToDevice, stream.stream()));
        stream.synchronize();
      };
      upload(load_memory, loads.data(), loads.size() * sizeof(SlotCacheLoad));
      upload(step_memory, &step, sizeof step);
      const ExpertStoreShape shape{stretches, stretch, store.layout().bytes};
      rates.link_gather = rate_of(static_cast<double>(lists * kSlots * bytes), repeats, stream, [&] {
        for (std::int64_t list = 0; list < lists; ++list) {
          expert_fetch_cuda(shape, store.device_data(), list % stretches,
                            static_cast<const SlotCacheStep*>(step_memory.const_data_ptr()),
                            static_cast<const SlotCacheLoad*>(load_memory.const_data_ptr()) + list * kSlots, 1,
                            slots.data_ptr(), kExpertFetchBlocks, stream.stream());
        }
      });
    }
  }
  std::size_t free = 0;
  std::size_t total = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  const std::int64_t readable = std::min(read_bytes, static_cast<std::int64_t>(free / 2)) / 4096 * 4096;
  if (readable > 0) {
    const Tensor memory = torch::randint(0, 256, {readable}, options);
    const Tensor folded = torch::zeros({4}, options);
    rates.device_read = rate_of(static_cast<double>(readable), repeats, stream, [&] {
      read_memory_cuda(memory.const_data_ptr(), static_cast<std::size_t>(readable),
                       static_cast<std::uint32_t*>(folded.data_ptr()), stream.stream());
    });
  }
  c10::cuda::CUDACachingAllocator::emptyCache();
  return rates;
}

}  // namespace hestia
