#include "hestia/kernels/expert_fetch.hpp"

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>

#include "decode_support.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes random_bytes(SplitMix64& random, std::size_t count) {
  Bytes bytes(count);
  std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::uint8_t>(random.below(256)); });
  return bytes;
}

/// Host memory that the GPU reads in place, page-locked and mapped.
class PinnedBytes {
 public:
  explicit PinnedBytes(const Bytes& bytes) {
    require_cuda(cudaHostAlloc(&host_, bytes.size(), cudaHostAllocMapped));
    std::memcpy(host_, bytes.data(), bytes.size());
    require_cuda(cudaHostGetDevicePointer(&device_, host_, 0));
  }
  PinnedBytes(const PinnedBytes&) = delete;
  PinnedBytes& operator=(const PinnedBytes&) = delete;
  ~PinnedBytes() { cudaFreeHost(host_); }
  [[nodiscard]] const void* device() const { return device_; }

 private:
  void* host_ = nullptr;
  void* device_ = nullptr;
};

/// A cache with its store, slots and answers, on one side or the other.
class Fetcher {
 public:
  Fetcher(const SlotCacheShape& cache, std::size_t blob_bytes, std::int64_t rows, std::int64_t top_k,
          const Bytes& store, const Bytes& slots, bool gpu)
      : cache_(cache),
        store_shape_{cache.num_layers, cache.num_experts, blob_bytes},
        rows_(rows),
        top_k_(top_k),
        gpu_(gpu),
        memory_(Bytes(slot_cache_bytes(cache)), gpu),
        state_(slot_cache_state(cache, memory_.data())),
        step_({SlotCacheStep()}, gpu),
        loads_(std::vector<SlotCacheLoad>(static_cast<std::size_t>(cache.num_experts)), gpu),
        slot_of_(std::vector<std::int32_t>(static_cast<std::size_t>(rows * top_k)), gpu),
        wave_of_(std::vector<std::int32_t>(static_cast<std::size_t>(rows * top_k)), gpu),
        slots_(slots, gpu),
        store_(store, false) {
    if (gpu_) {
      pinned_ = std::make_unique<PinnedBytes>(store);
      slot_cache_reset_cuda(cache_, state_, nullptr, 0, nullptr, nullptr);
      require_cuda(cudaDeviceSynchronize());
    } else {
      slot_cache_reset_cpu(cache_, state_, nullptr, 0, nullptr);
    }
  }

  /// selected: [rows, K], on the side of the cache.
  void serve(std::int64_t layer, const std::int64_t* selected, void* stream) {
    const SlotCacheAnswer answer{step_.data(), loads_.data(), slot_of_.data(), wave_of_.data()};
    if (gpu_) {
      slot_cache_serve_cuda(cache_, state_, layer, selected, rows_, top_k_, answer, stream);
    } else {
      slot_cache_serve_cpu(cache_, state_, layer, selected, rows_, top_k_, answer);
    }
  }
  void fetch(std::int64_t layer, std::int64_t wave, std::int64_t num_blocks, void* stream) {
    if (gpu_) {
      expert_fetch_cuda(store_shape_, pinned_->device(), layer, step_.data(), loads_.data(), wave, slots_.data(),
                        num_blocks, stream);
    } else {
      expert_fetch_cpu(store_shape_, store_.data(), layer, step_.data(), loads_.data(), wave, slots_.data());
    }
  }
  [[nodiscard]] std::int64_t max_waves() const { return slot_cache_max_waves(cache_, rows_ * top_k_); }
  [[nodiscard]] SlotCacheStep step() const { return step_.values().front(); }
  [[nodiscard]] std::vector<std::int32_t> slot_of() const { return slot_of_.values(); }
  [[nodiscard]] std::vector<std::int32_t> wave_of() const { return wave_of_.values(); }
  [[nodiscard]] Bytes slots() const { return slots_.values(); }
  [[nodiscard]] bool guards_whole() const {
    return slots_.guards_whole() && step_.guards_whole() && loads_.guards_whole();
  }

 private:
  SlotCacheShape cache_;
  ExpertStoreShape store_shape_;
  std::int64_t rows_;
  std::int64_t top_k_;
  bool gpu_;
  Guarded<std::uint8_t> memory_;
  SlotCacheState state_;
  Guarded<SlotCacheStep> step_;
  Guarded<SlotCacheLoad> loads_;
  Guarded<std::int32_t> slot_of_;
  Guarded<std::int32_t> wave_of_;
  Guarded<std::uint8_t> slots_;
  Guarded<std::uint8_t> store_;
  std::unique_ptr<PinnedBytes> pinned_;
};

std::vector<std::int64_t> random_selection(SplitMix64& random, std::int64_t rows, std::int64_t top_k,
                                           std::int64_t num_experts) {
  std::vector<std::int64_t> selected;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(num_experts));
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t k = 0; k < static_cast<std::size_t>(top_k); ++k) {
      std::swap(order[k], order[k + random.below(order.size() - k)]);
      selected.push_back(order[k]);
    }
  }
  return selected;
}

/// What the slots hold after a wave, from the answer's own tables, byte by byte: the experts that are served in it, and
/// what was there before elsewhere.
void expect_wave(Bytes& slots, const Bytes& store, std::size_t blob_bytes, std::int64_t first_expert,
                 const std::vector<std::int64_t>& selected, const Fetcher& fetcher, std::int64_t wave) {
  const std::vector<std::int32_t> slot_of = fetcher.slot_of();
  const std::vector<std::int32_t> wave_of = fetcher.wave_of();
  for (std::size_t i = 0; i < selected.size(); ++i) {
    if (wave_of[i] == wave) {
      for (std::size_t byte = 0; byte < blob_bytes; ++byte) {
        slots[static_cast<std::size_t>(slot_of[i]) * blob_bytes + byte] =
            store[static_cast<std::size_t>(first_expert + selected[i]) * blob_bytes + byte];
      }
    }
  }
}

struct Size {
  std::int64_t layers, experts, slots, scratch, rows, top_k;
  std::size_t blob_bytes;
};
// One wave and several; blobs of less than a block's 32 KiB, of exactly that, and of some more.
const std::vector<Size> kSizes = {{1, 1, 1, 1, 1, 1, 16},      {3, 16, 6, 1, 1, 4, 48},    {2, 40, 8, 3, 7, 5, 32768},
                                  {2, 24, 3, 2, 5, 8, 32784},  {4, 9, 4, 1, 3, 2, 131056}, {2, 12, 2, 1, 2, 6, 8208},
                                  {1, 32, 32, 1, 16, 4, 65552}};

void check_waves(SplitMix64& random, const Size& s, bool gpu, const std::vector<std::int64_t>& blocks) {
  CAPTURE(s.layers, s.experts, s.slots, s.scratch, s.rows, s.top_k, s.blob_bytes);
  const SlotCacheShape cache{
      .num_layers = s.layers, .num_experts = s.experts, .slots = s.slots, .scratch_slots = s.scratch};
  const Bytes store = random_bytes(random, static_cast<std::size_t>(s.layers * s.experts) * s.blob_bytes);
  Bytes expected = random_bytes(random, static_cast<std::size_t>(slot_cache_num_slots(cache)) * s.blob_bytes);
  Fetcher fetcher(cache, s.blob_bytes, s.rows, s.top_k, store, expected, gpu);
  std::int64_t most_waves = 0;
  for (std::size_t step = 0; step < 6; ++step) {
    const auto layer = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(s.layers)));
    const std::vector<std::int64_t> selected = random_selection(random, s.rows, s.top_k, s.experts);
    Guarded<std::int64_t> ids(selected, gpu);
    fetcher.serve(layer, ids.data(), nullptr);
    most_waves = std::max<std::int64_t>(most_waves, fetcher.step().waves);
    for (std::int64_t wave = 1; wave <= fetcher.max_waves(); ++wave) {  // one past the last at least
      fetcher.fetch(layer, wave, blocks[step % blocks.size()], nullptr);
      expect_wave(expected, store, s.blob_bytes, layer * s.experts, selected, fetcher, wave);
      REQUIRE(fetcher.slots() == expected);
    }
    REQUIRE(fetcher.guards_whole());
  }
  CHECK((std::min(s.rows * s.top_k, s.experts) <= 2 * (s.slots + s.scratch) || most_waves > 2));
}

}  // namespace

TEST_CASE("expert fetch: every wave brings its experts and nothing else") {
  SplitMix64 random(21);
  for (const Size& s : kSizes) {
    check_waves(random, s, false, {1});
  }
}

TEST_CASE("expert fetch: sizes that it does not take are refused by name") {
  const ExpertStoreShape good{.num_layers = 2, .num_experts = 4, .blob_bytes = 32};
  const SlotCacheStep step;
  const SlotCacheLoad load;
  alignas(16) std::array<unsigned char, 512> memory{};
  const auto fetch = [&](const ExpertStoreShape& shape, std::int64_t layer, std::int64_t wave, std::size_t offset) {
    expert_fetch_cpu(shape, memory.data() + offset, layer, &step, &load, wave, memory.data() + 256);
  };
  CHECK_NOTHROW(fetch(good, 1, 1, 0));
  ExpertStoreShape odd = good;
  odd.blob_bytes = 40;
  CHECK_THROWS_WITH(fetch(odd, 0, 1, 0), Catch::Contains("the bytes of an expert must be a multiple of 16, got 40"));
  CHECK_THROWS_WITH(fetch(good, 2, 1, 0), Catch::Contains("layer must be below 2, got 2"));
  CHECK_THROWS_WITH(fetch(good, -1, 1, 0), Catch::Contains("layer must be below 2, got -1"));
  CHECK_THROWS_WITH(fetch(good, 0, 0, 0), Catch::Contains("the wave must be from 1"));
  CHECK_THROWS_WITH(fetch(good, 0, 1, 8), Catch::Contains("aligned to 16 bytes"));
}

TEST_CASE("expert fetch: CUDA reads mapped host memory into the slots of the device's own step", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(22);
  for (const Size& s : kSizes) {
    check_waves(random, s, true, {kExpertFetchBlocks, 1, 7, 200});
  }
}

TEST_CASE("expert fetch: a captured step fetches what each launch of its graph misses", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  SplitMix64 random(23);
  const SlotCacheShape cache{.num_layers = 2, .num_experts = 24, .slots = 9, .scratch_slots = 2};
  constexpr std::size_t kBlob = 40016;
  constexpr std::int64_t kRows = 3;
  constexpr std::int64_t kTopK = 4;
  const Bytes store = random_bytes(random, static_cast<std::size_t>(2 * 24) * kBlob);
  const Bytes empty = random_bytes(random, static_cast<std::size_t>(slot_cache_num_slots(cache)) * kBlob);
  Fetcher on_gpu(cache, kBlob, kRows, kTopK, store, empty, true);
  Fetcher on_cpu(cache, kBlob, kRows, kTopK, store, empty, false);
  void* selected = nullptr;
  constexpr std::size_t kIds = kRows * kTopK;
  require_cuda(cudaMalloc(&selected, 2 * kIds * sizeof(std::int64_t)));
  cudaStream_t stream = nullptr;
  require_cuda(cudaStreamCreate(&stream));
  require_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    on_gpu.serve(layer, static_cast<std::int64_t*>(selected) + layer * static_cast<std::int64_t>(kIds), stream);
    for (std::int64_t wave = 1; wave < on_gpu.max_waves(); ++wave) {
      on_gpu.fetch(layer, wave, kExpertFetchBlocks, stream);
    }
  }
  cudaGraph_t graph = nullptr;
  require_cuda(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable = nullptr;
  require_cuda(cudaGraphInstantiate(&executable, graph, 0));
  for (int launch = 0; launch < 20; ++launch) {
    std::vector<std::int64_t> ids = random_selection(random, 2 * kRows, kTopK, 24);
    require_cuda(cudaMemcpy(selected, ids.data(), ids.size() * sizeof(std::int64_t), cudaMemcpyHostToDevice));
    require_cuda(cudaGraphLaunch(executable, stream));
    require_cuda(cudaStreamSynchronize(stream));
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      on_cpu.serve(layer, ids.data() + layer * static_cast<std::int64_t>(kIds), nullptr);
      for (std::int64_t wave = 1; wave < on_cpu.max_waves(); ++wave) {
        on_cpu.fetch(layer, wave, 1, nullptr);
      }
    }
    REQUIRE(on_gpu.slots() == on_cpu.slots());
    REQUIRE(on_gpu.guards_whole());
  }
  require_cuda(cudaGraphExecDestroy(executable));
  require_cuda(cudaGraphDestroy(graph));
  require_cuda(cudaStreamDestroy(stream));
  require_cuda(cudaFree(selected));
}

TEST_CASE("expert fetch: a host thread copies what a kernel asks for, wave by wave", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  constexpr std::size_t kBlob = 4112;
  constexpr std::int64_t kExperts = 400;
  constexpr std::int64_t kWaveSize = 300;  // more loads than the kernel has threads
  constexpr std::int64_t kLayer = 1;
  SplitMix64 random(24);
  const Bytes store = random_bytes(random, static_cast<std::size_t>(2 * kExperts) * kBlob);
  const Bytes empty = random_bytes(random, static_cast<std::size_t>(kExperts) * kBlob);
  const ExpertStoreShape shape{2, kExperts, kBlob};
  std::vector<SlotCacheLoad> all(static_cast<std::size_t>(kExperts));
  for (std::size_t i = 0; i < all.size(); ++i) {  // any order
    all[i] = {static_cast<std::int32_t>(i * 7 % kExperts), static_cast<std::int32_t>(i * 11 % kExperts), -1};
  }
  Guarded<SlotCacheLoad> loads(all, true);
  Guarded<SlotCacheStep> step({SlotCacheStep()}, true);
  Guarded<std::uint8_t> slots(empty, true);
  Guarded<std::uint32_t> flags(std::vector<std::uint32_t>(kExperts), true);
  CopyingHost host(store.data(), kBlob, slots.data(), flags.data());
  cudaStream_t stream = nullptr;
  require_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  Bytes expected = empty;
  for (const auto& [num_loads, waves_asked] :
       {std::pair{0, 0}, std::pair{1, 1}, std::pair{129, 1}, std::pair{400, 2}}) {
    CAPTURE(num_loads);
    const SlotCacheStep now{.requests = num_loads, .loads = num_loads, .waves = 2, .wave_size = kWaveSize};
    require_cuda(cudaMemcpy(step.data(), &now, sizeof now, cudaMemcpyHostToDevice));
    const int before = host.requests();
    for (std::int64_t wave = 1; wave <= 3; ++wave) {  // one past the last at least
      expert_ask_cuda(shape, kLayer, step.data(), loads.data(), wave, flags.data(), host.request(), stream);
    }
    require_cuda(cudaStreamSynchronize(stream));
    CHECK(host.requests() - before == waves_asked);
    for (std::size_t i = 0; i < static_cast<std::size_t>(num_loads); ++i) {
      std::copy_n(store.begin() + (kLayer * kExperts + all[i].expert) * static_cast<std::ptrdiff_t>(kBlob), kBlob,
                  expected.begin() + all[i].slot * static_cast<std::ptrdiff_t>(kBlob));
    }
    REQUIRE(slots.values() == expected);
    const std::vector<std::uint32_t> left = flags.values();
    CHECK(std::all_of(left.begin(), left.end(), [](auto word) { return word == 0; }));
  }
  CHECK_FALSE(host.failed());
  CHECK(slots.guards_whole());
  CHECK(flags.guards_whole());
  require_cuda(cudaStreamDestroy(stream));
}
