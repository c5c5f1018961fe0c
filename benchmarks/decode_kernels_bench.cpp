// Time per launch of the decode step's kernels beside what bounds them, the read rate of GPU memory or the rate of the
// link, both probed in the same rounds. Many launches are one CUDA graph, with weights that rotate through far more
// memory than the L2 cache holds; arms are interleaved. Prints JSON lines: what it ran on, then one line per arm.

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <functional>
#include <iostream>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime_api.h>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/median.hpp"
#include "hestia/core/random.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/kernels/decode_experts.hpp"
#include "hestia/kernels/decode_fetch.hpp"
#include "hestia/kernels/decode_linear.hpp"
#include "hestia/kernels/decode_router.hpp"
#include "hestia/kernels/expert_fetch.hpp"
#include "hestia/kernels/expert_formats.hpp"
#include "hestia/kernels/memory_probe.hpp"
#include "hestia/kernels/slot_cache.hpp"
#include "hestia/kernels/soft_cache.hpp"
#include "timing.hpp"

namespace {

using namespace hestia;

struct Options {
  std::int64_t hidden = 2048;
  std::int64_t expert_hidden = 1024;
  std::int64_t experts = 64;
  std::int64_t top_k = 8;
  std::int64_t vocabulary = 50304;
  std::vector<std::string> formats = expert_format_names();
  std::vector<std::int64_t> tokens = {1, 8, 16, 32};
  std::vector<std::int64_t> misses = {0, 1, 2, 4, 8};
  std::vector<std::int64_t> fetch_blocks = {8, kExpertFetchBlocks, 32, 64};
  std::vector<std::int64_t> step_misses = {0, 1, 2, 4};
  std::vector<std::int64_t> copiers = {kFetchCopiers};
  std::vector<std::int64_t> polls = {2000};
  std::vector<std::string> kinds = {"experts", "linear", "fetch", "step"};
  std::int64_t slots = 16;
  double pool_gb = 12.9;
  double weights_gb = 1.6;
  std::int64_t launches = 64;
  std::int64_t fetches = 8;
  std::int64_t repeats = 20;
  std::int64_t threads = 0;
};

void require_cuda(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) {
    throw RunError(fmt::format("{}: failed, got {} ({})", what, cudaGetErrorName(error), cudaGetErrorString(error)));
  }
}

/// Device memory.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) {
    require_cuda(cudaMalloc(&data_, std::max<std::size_t>(bytes, 16)), fmt::format("{} bytes of GPU memory", bytes));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(data_); }
  template <class T>
  [[nodiscard]] T* as(std::size_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<unsigned char*>(data_) + offset);
  }

 private:
  void* data_ = nullptr;
};

template <class T>
std::shared_ptr<DeviceMemory> on_device(const std::vector<T>& values) {
  auto memory = std::make_shared<DeviceMemory>(values.size() * sizeof(T));
  require_cuda(cudaMemcpy(memory->template as<T>(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
               "copy");
  return memory;
}

/// Random bfloat16 of 2^-7 to 2^-3, either sign; also fit to be read in pairs as float32.
std::uint64_t random_values(SplitMix64& random) {
  return (random.next() & 0x81ff81ff81ff81ffU) | 0x3c003c003c003c00U;
}

std::vector<std::uint64_t> random_words(std::size_t bytes, std::uint64_t seed) {
  SplitMix64 random(seed);
  std::vector<std::uint64_t> words((bytes + 7) / 8);
  std::generate(words.begin(), words.end(), [&] { return random_values(random); });
  return words;
}

/// Host memory as an expert store has it: huge pages where the system gives them, filled before it is registered.
class PinnedPool {
 public:
  PinnedPool(std::size_t bytes, std::size_t threads) : bytes_(bytes) {
    void* const memory = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {  // NOLINT(cppcoreguidelines-pro-type-cstyle-cast,performance-no-int-to-ptr)
      throw RunError(fmt::format("pool: no host memory, got {} bytes; choose a smaller --pool-gb", bytes_));
    }
    data_ = static_cast<unsigned char*>(memory);
    ::madvise(data_, bytes_, MADV_HUGEPAGE);
    std::vector<std::thread> workers;
    const std::size_t part = (bytes_ / threads + 4095) / 4096 * 4096;
    for (std::size_t i = 0; i < threads; ++i) {
      workers.emplace_back([this, i, part] {
        SplitMix64 random(i + 1);
        for (std::size_t at = i * part; at < std::min(bytes_, (i + 1) * part); at += sizeof(std::uint64_t)) {
          *reinterpret_cast<std::uint64_t*>(data_ + at) = random_values(random);
        }
      });
    }
    for (std::thread& worker : workers) {
      worker.join();
    }
    require_cuda(cudaHostRegister(data_, bytes_, cudaHostRegisterMapped),
                 fmt::format("pool: page-locking {} bytes of host memory (choose a smaller --pool-gb)", bytes_));
    require_cuda(cudaHostGetDevicePointer(&device_, data_, 0), "pool: mapping");
  }
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;
  ~PinnedPool() {
    cudaHostUnregister(data_);
    ::munmap(data_, bytes_);
  }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  [[nodiscard]] const unsigned char* host() const { return data_; }
  [[nodiscard]] const void* device() const { return device_; }

 private:
  std::size_t bytes_;
  unsigned char* data_ = nullptr;
  void* device_ = nullptr;
};

/// Launches captured once.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& launches) {
    require_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    launches();
    require_cuda(cudaStreamEndCapture(stream, &graph_), "capture");
    require_cuda(cudaGraphInstantiate(&executable_, graph_, 0), "graph");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  void launch(cudaStream_t stream) const { require_cuda(cudaGraphLaunch(executable_, stream), "graph launch"); }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

enum class Bound { kNone, kMemory, kLink };

/// Something to time: `launch(i)` for i below `launches`.
struct Arm {  // NOLINT(bugprone-exception-escape): the check takes Json's move for one that throws
  Json labels;
  Bound bound = Bound::kNone;
  double bytes = 0.0;  ///< That a launch has to move, on average.
  std::int64_t launches = 1;
  std::function<void(std::int64_t)> launch;
  std::function<void()> prepare = [] {};                       ///< Before every round.
  std::function<Json()> note = [] { return Json::object(); };  ///< What the rounds did, for the result.
  std::unique_ptr<Graph> graph;
  std::vector<double> in_graph;  ///< Microseconds per launch.
  std::vector<double> alone;     ///< The same without a graph.
};

/// All arms of one expert format; the kernels that know no experts only `with_others`.
class Bench {
 public:
  Bench(const Options& options, ExpertFormat format, const PinnedPool& pool, bool with_others)
      : options_(options),
        format_(format),
        pool_(pool),
        blob_(expert_blob(shape(1))),
        layers_(static_cast<std::int64_t>(pool.bytes() / blob_.bytes) / options.experts),
        num_slots_(static_cast<std::int64_t>(options.weights_gb * 1e9 / static_cast<double>(blob_.bytes))),
        random_(7) {
    if (layers_ < 1 || num_slots_ > layers_ * options.experts || num_slots_ < options.experts) {
      throw UsageError(fmt::format(
          "pool: it must hold one layer's experts and the rotating weights, and these one layer, got {} experts of {} "
          "bytes in the pool and {} on the GPU; change --pool-gb or --weights-gb",
          layers_ * options.experts, blob_.bytes, num_slots_));
    }
    weights_ = std::make_unique<DeviceMemory>(weight_bytes());
    require_cuda(cudaMemcpy(weights_->as<void>(), pool_.host(), weight_bytes(), cudaMemcpyHostToDevice), "copy");
    require_cuda(cudaStreamCreate(&stream_), "stream");
    require_cuda(cudaEventCreate(&begin_), "event");
    require_cuda(cudaEventCreate(&end_), "event");
    slot_order_.resize(static_cast<std::size_t>(num_slots_));
    std::iota(slot_order_.begin(), slot_order_.end(), 0);
    shuffle(slot_order_, slot_order_.size());
    add_probes();
    const auto wanted = [&](const char* kind) {
      return std::find(options.kinds.begin(), options.kinds.end(), kind) != options.kinds.end();
    };
    if (wanted("step")) {
      add_steps();
    }
    for (const std::int64_t tokens : wanted("experts") ? options.tokens : std::vector<std::int64_t>()) {
      if (format_ == ExpertFormat::kBfloat16 && tokens > 1) {  // both kinds of kernels, whatever is the default
        add_experts(tokens, kDecodeMaxTokens + 1);
        add_experts(tokens, 1);
      } else {
        add_experts(tokens, kDecodeTensorRows);
      }
      if (with_others) {
        add_router(tokens);
        add_cache(tokens, false);
      }
    }
    if (with_others && wanted("experts")) {
      add_cache(1, true);
    }
    for (const std::int64_t tokens : with_others&& wanted("linear") ? options.tokens : std::vector<std::int64_t>()) {
      add_linears(tokens);
    }
    for (const std::int64_t misses : wanted("fetch") ? options.misses : std::vector<std::int64_t>()) {
      for (const std::int64_t blocks : options.fetch_blocks) {
        add_fetch(misses, blocks);
      }
    }
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;
  ~Bench() {
    arms_.clear();
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }

  /// Two rounds to warm up, then `repeats` rounds over all arms.
  void run() {
    for (Arm& arm : arms_) {
      arm.graph = std::make_unique<Graph>(stream_, [&] { launch_all(arm); });
    }
    for (std::int64_t round = -2; round < options_.repeats; ++round) {
      for (Arm& arm : arms_) {
        arm.prepare();
        const double us = microseconds([&] { arm.graph->launch(stream_); });
        if (round >= 0) {
          arm.in_graph.push_back(us / static_cast<double>(arm.launches));
        }
      }
      for (Arm& arm : arms_) {
        const double us = microseconds([&] { launch_all(arm); });
        if (round >= 0) {
          arm.alone.push_back(us / static_cast<double>(arm.launches));
        }
      }
    }
  }

  [[nodiscard]] std::vector<Json> results() const {
    std::vector<Json> lines;
    const double memory_rate = arms_[0].bytes / median(arms_[0].in_graph) / 1e3;  // GB/s
    const double link_rate = arms_[1].bytes / median(arms_[1].alone) / 1e3;       // other experts every time
    for (const Arm& arm : arms_) {
      Json line = {{"format", expert_format_name(format_)}, {"expert_bytes", blob_.bytes}};
      line.update(arm.labels);
      const double middle = median(arm.in_graph);
      line["launches"] = arm.launches;
      line["us"] = middle;
      line["us_lowest"] = *std::min_element(arm.in_graph.begin(), arm.in_graph.end());
      line["us_highest"] = *std::max_element(arm.in_graph.begin(), arm.in_graph.end());
      line["us_without_graph"] = median(arm.alone);
      if (arm.bytes > 0.0) {
        line["bytes"] = arm.bytes;
        line["gb_per_s"] = arm.bytes / middle / 1e3;
      }
      if (arm.bound != Bound::kNone && arm.bytes > 0.0) {
        const double rate = arm.bound == Bound::kMemory ? memory_rate : link_rate;
        line["bound"] = arm.bound == Bound::kMemory ? "memory" : "link";
        line["bound_gb_per_s"] = rate;
        line["share_of_bound"] = arm.bytes / middle / 1e3 / rate;
      }
      line.update(arm.note());
      lines.push_back(line);
    }
    return lines;
  }

 private:
  [[nodiscard]] DecodeExpertsShape shape(std::int64_t tokens) const {
    return {.num_tokens = tokens,
            .top_k = options_.top_k,
            .hidden_size = options_.hidden,
            .expert_hidden_size = options_.expert_hidden,
            .format = format_};
  }
  [[nodiscard]] std::size_t weight_bytes() const { return static_cast<std::size_t>(num_slots_) * blob_.bytes; }

  template <class T>
  void shuffle(std::vector<T>& values, std::size_t first) {
    for (std::size_t i = 0; i < first; ++i) {
      std::swap(values[i], values[i + random_.below(values.size() - i)]);
    }
  }

  void launch_all(const Arm& arm) {
    for (std::int64_t i = 0; i < arm.launches; ++i) {
      arm.launch(i);
    }
  }

  double microseconds(const std::function<void()>& work) {
    require_cuda(cudaStreamSynchronize(stream_), "stream");
    require_cuda(cudaEventRecord(begin_, stream_), "event");
    work();
    require_cuda(cudaEventRecord(end_, stream_), "event");
    require_cuda(cudaEventSynchronize(end_), "stream");
    float milliseconds = 0.0F;
    require_cuda(cudaEventElapsedTime(&milliseconds, begin_, end_), "event");
    return static_cast<double>(milliseconds) * 1e3;
  }

  /// top_k different experts per row, uniform.
  std::vector<std::int32_t> random_selection(std::int64_t tokens) {
    std::vector<std::int32_t> experts(static_cast<std::size_t>(options_.experts));
    std::iota(experts.begin(), experts.end(), 0);
    std::vector<std::int32_t> selected;
    for (std::int64_t t = 0; t < tokens; ++t) {
      shuffle(experts, static_cast<std::size_t>(options_.top_k));
      selected.insert(selected.end(), experts.begin(), experts.begin() + options_.top_k);
    }
    return selected;
  }

  void add_probes() {
    Arm& memory = arms_.emplace_back();
    memory.labels = {{"kernel", "read_memory (probe)"}};
    memory.bytes = static_cast<double>(weight_bytes());
    memory.launches = 2;
    auto folded = on_device(std::vector<std::uint32_t>(1));
    memory.launch = [this, folded](std::int64_t) {
      read_memory_cuda(weights_->as<void>(), weight_bytes(), folded->as<std::uint32_t>(), stream_);
    };
    Arm& link = arms_.emplace_back();
    link.labels = {{"kernel", "copy engine, random experts of the pool (probe)"}};
    link.bytes = static_cast<double>(blob_.bytes);
    link.launches = 16;
    link.launch = [this](std::int64_t i) {
      const auto expert = static_cast<std::size_t>(random_.below(pool_.bytes() / blob_.bytes));
      require_cuda(cudaMemcpyAsync(weights_->as<void>(static_cast<std::size_t>(i) * blob_.bytes),
                                   pool_.host() + expert * blob_.bytes, blob_.bytes, cudaMemcpyHostToDevice, stream_),
                   "copy");
    };
  }

  void add_experts(std::int64_t tokens, std::int64_t tensor_rows) {
    DecodeExpertsShape of = shape(tokens);
    of.tensor_rows = tensor_rows;
    const auto pairs = static_cast<std::size_t>(tokens * options_.top_k);
    // Distinct experts of every launch take the next slots, so that a slot comes back after all others.
    std::vector<std::int32_t> table;
    std::size_t taken = 0;
    for (std::int64_t launch = 0; launch < options_.launches; ++launch) {
      std::vector<std::int32_t> slot_of(static_cast<std::size_t>(options_.experts), -1);
      for (const std::int32_t expert : random_selection(tokens)) {
        std::int32_t& slot = slot_of[static_cast<std::size_t>(expert)];
        if (slot < 0) {
          slot = slot_order_[taken++ % slot_order_.size()];
        }
        table.push_back(slot);
      }
    }
    const double experts = static_cast<double>(taken) / static_cast<double>(options_.launches);
    const auto hidden = static_cast<std::size_t>(options_.hidden);
    const auto expert_hidden = static_cast<std::size_t>(options_.expert_hidden);
    const auto slots = on_device(table);
    const auto x = on_device(random_words(static_cast<std::size_t>(tokens) * hidden * 2, 1));
    const auto h = on_device(random_words(pairs * expert_hidden * 2, 2));
    const auto y = on_device(random_words(pairs * hidden * 4, 3));
    const auto mixing = on_device(random_words(pairs * 4, 4));
    const auto residual = on_device(random_words(static_cast<std::size_t>(tokens) * hidden * 2, 5));
    const auto out = std::make_shared<DeviceMemory>(static_cast<std::size_t>(tokens) * hidden * 2);
    const auto gated = std::make_shared<DeviceMemory>(pairs * expert_hidden * 2);
    const auto slots_of = [slots, pairs](std::int64_t i) {
      return slots->as<std::int32_t>(static_cast<std::size_t>(i) * pairs * sizeof(std::int32_t));
    };
    const auto add = [&](const char* kernel, std::size_t bytes, std::function<void(std::int64_t)> launch) {
      Arm& arm = arms_.emplace_back();
      arm.labels = {{"kernel", kernel}, {"tokens", tokens}, {"experts_per_launch", experts}};
      if (format_ == ExpertFormat::kBfloat16) {
        arm.labels["products"] = tokens >= of.tensor_rows ? "tensor cores" : "rows";
      }
      arm.bound = Bound::kMemory;
      arm.bytes = experts * static_cast<double>(bytes);
      arm.launches = options_.launches;
      arm.launch = std::move(launch);
    };
    const auto gate_up = [this, of, x, gated, slots_of](std::int64_t i) {
      decode_gate_up_cuda(of, x->as<std::uint16_t>(), slots_of(i), weights_->as<void>(), gated->as<std::uint16_t>(),
                          stream_);
    };
    const auto down = [this, of, h, y, slots_of](std::int64_t i) {
      decode_down_cuda(of, h->as<std::uint16_t>(), slots_of(i), weights_->as<void>(), y->as<float>(), stream_);
    };
    const auto combine = [this, of, y, mixing, residual, out](std::int64_t) {
      decode_combine_cuda(of, y->as<float>(), mixing->as<float>(), residual->as<std::uint16_t>(),
                          out->as<std::uint16_t>(), stream_);
    };
    const auto down_combine = [this, of, h, mixing, residual, out, slots_of](std::int64_t i) {
      decode_down_combine_cuda(of, h->as<std::uint16_t>(), slots_of(i), weights_->as<void>(), mixing->as<float>(),
                               nullptr, residual->as<std::uint16_t>(), out->as<std::uint16_t>(), stream_);
    };
    const std::size_t of_down = blob_.bytes - blob_.down;
    add("decode_gate_up", blob_.down, gate_up);
    add("decode_down", of_down, down);
    add("decode_combine", 0, combine);
    add("decode_down_combine", of_down, down_combine);
    add("decode_gate_up + decode_down_combine", blob_.bytes, [gate_up, down_combine](std::int64_t i) {
      gate_up(i);
      down_combine(i);
    });
    add("decode_gate_up + decode_down + decode_combine", blob_.bytes, [gate_up, down, combine](std::int64_t i) {
      gate_up(i);
      down(i);
      combine(i);
    });
  }

  /// Dense products of a step: query, key and value (with the norm), the output projection, the lm head.
  void add_linears(std::int64_t tokens) {
    const auto hidden = static_cast<std::size_t>(options_.hidden);
    const auto add = [&](const char* kernel, std::int64_t outputs, bool normed, bool head) {
      const DecodeLinearShape of{.num_tokens = tokens, .input_size = options_.hidden, .output_size = outputs};
      const auto out_values = static_cast<std::size_t>(tokens * outputs);
      const std::size_t bytes = static_cast<std::size_t>(outputs) * hidden * 2;
      const std::size_t num_weights = weight_bytes() / bytes;
      if (num_weights < 1) {
        return;
      }
      const auto in = on_device(random_words(static_cast<std::size_t>(tokens) * hidden * 2, 1));
      const auto norm = on_device(random_words(hidden * 2, 2));
      const auto normal = std::make_shared<DeviceMemory>(static_cast<std::size_t>(tokens) * hidden * 2);
      const auto out = std::make_shared<DeviceMemory>(out_values * sizeof(float));
      Arm& arm = arms_.emplace_back();
      arm.labels = {{"kernel", kernel}, {"tokens", tokens}, {"outputs", outputs}};
      arm.bound = Bound::kMemory;
      arm.bytes = static_cast<double>(bytes);
      arm.launches = options_.launches;
      arm.launch = [=, this](std::int64_t i) {
        const std::size_t which = static_cast<std::size_t>(i) % num_weights;
        const DecodeLinearInputs inputs{.x = in->as<std::uint16_t>(),
                                        .norm_weight = normed ? norm->as<std::uint16_t>() : nullptr,
                                        .weight = weights_->as<std::uint16_t>(which * bytes),
                                        .normal = normal->as<std::uint16_t>()};
        if (head) {
          decode_linear_cuda(of, inputs, out->as<float>(), stream_);
        } else {
          decode_linear_cuda(of, inputs, out->as<std::uint16_t>(), stream_);
        }
      };
    };
    add("decode_linear: query, key and value", 3 * options_.hidden, true, false);
    add("decode_linear: output", options_.hidden, false, false);
    add("decode_linear: lm head", options_.vocabulary, true, true);
  }

  void add_router(std::int64_t tokens) {
    const DecodeRouterShape of{
        .num_tokens = tokens, .hidden_size = options_.hidden, .num_experts = options_.experts, .top_k = options_.top_k};
    const auto rows = static_cast<std::size_t>(tokens);
    const auto hidden = static_cast<std::size_t>(options_.hidden);
    const auto experts = static_cast<std::size_t>(options_.experts);
    const auto top_k = static_cast<std::size_t>(options_.top_k);
    const std::size_t bytes = experts * hidden * sizeof(float);
    const auto in = on_device(random_words(rows * hidden * 2, 1));
    const auto norm = on_device(random_words(hidden * 2, 2));
    const auto normal = std::make_shared<DeviceMemory>(rows * hidden * 2);
    const auto logits = std::make_shared<DeviceMemory>(2 * rows * experts * sizeof(float));
    const auto selected = std::make_shared<DeviceMemory>(2 * rows * top_k * sizeof(float));
    const auto workspace = on_device(std::vector<unsigned char>(decode_router_workspace(of)));
    // Random weights serve as routers, each launch and each batch size of its own.
    const std::size_t num_routers = weight_bytes() / bytes;
    const std::size_t first = static_cast<std::size_t>(tokens) * static_cast<std::size_t>(options_.launches);
    Arm& arm = arms_.emplace_back();
    arm.labels = {{"kernel", "decode_router"}, {"tokens", tokens}};
    arm.bound = Bound::kMemory;
    arm.bytes = static_cast<double>(bytes);
    arm.launches = options_.launches;
    arm.launch = [=, this](std::int64_t i) {
      const std::size_t router = (first + static_cast<std::size_t>(i)) % num_routers;
      decode_router_cuda(
          of,
          {in->as<std::uint16_t>(), norm->as<std::uint16_t>(), weights_->as<float>(router * bytes), nullptr, nullptr},
          {normal->as<std::uint16_t>(), logits->as<float>(), logits->as<float>(rows * experts * sizeof(float)),
           selected->as<std::int32_t>(), selected->as<float>(rows * top_k * sizeof(float))},
          workspace->as<void>(), stream_);
    };
  }

  void add_cache(std::int64_t tokens, bool hits_only) {
    const SlotCacheShape of{.num_layers = 16, .num_experts = options_.experts, .slots = options_.slots};
    const auto pairs = static_cast<std::size_t>(tokens * options_.top_k);
    std::vector<std::int32_t> ids;
    const std::vector<std::int32_t> same = random_selection(tokens);
    for (std::int64_t i = 0; i < options_.launches; ++i) {
      const std::vector<std::int32_t> step = hits_only ? same : random_selection(tokens);
      ids.insert(ids.end(), step.begin(), step.end());
    }
    const auto selected = on_device(ids);
    const auto memory = std::make_shared<DeviceMemory>(slot_cache_bytes(of));
    const SlotCacheState state = slot_cache_state(of, memory->as<void>());
    slot_cache_reset_cuda(of, state, nullptr, 0, nullptr, stream_);
    const auto step = std::make_shared<DeviceMemory>(sizeof(SlotCacheStep));
    const auto loads =
        std::make_shared<DeviceMemory>(static_cast<std::size_t>(options_.experts) * sizeof(SlotCacheLoad));
    const auto tables = std::make_shared<DeviceMemory>(2 * pairs * sizeof(std::int32_t));
    const SlotCacheAnswer answer{step->as<SlotCacheStep>(), loads->as<SlotCacheLoad>(), tables->as<std::int32_t>(),
                                 tables->as<std::int32_t>(pairs * sizeof(std::int32_t))};
    Arm& arm = arms_.emplace_back();
    arm.labels = {{"kernel", "slot_cache_serve"},
                  {"tokens", tokens},
                  {"policy", policy_name(of.policy)},
                  {"slots", of.slots},
                  {"experts", hits_only ? "always the same" : "uniform"}};
    arm.launches = options_.launches;
    arm.launch = [=, this, kept = std::vector{memory, step, loads, tables}](std::int64_t i) {
      slot_cache_serve_cuda(of, state, i % of.num_layers,
                            selected->as<std::int32_t>(static_cast<std::size_t>(i) * pairs * sizeof(std::int32_t)),
                            tokens, options_.top_k, answer, stream_);
    };
    arm.note = [of, state, memory] {
      std::vector<SlotCacheCounts> counts(static_cast<std::size_t>(of.num_layers));
      require_cuda(
          cudaMemcpy(counts.data(), state.counts, counts.size() * sizeof(SlotCacheCounts), cudaMemcpyDeviceToHost),
          "copy");
      std::int64_t all_steps = 0;
      std::int64_t all_loads = 0;
      for (const SlotCacheCounts& count : counts) {
        all_steps += count.steps;
        all_loads += count.loads;
      }
      return Json{{"loads_per_step", static_cast<double>(all_loads) / static_cast<double>(all_steps)}};
    };
  }

  /// What the experts of one layer cost in a decode step of one token: router, products, and with a slot cache the
  /// serving and fetching in between. The experts of a layer's steps slide over all experts by `misses` each, so that
  /// as many are missing every time.
  struct StepMemory {
    std::shared_ptr<DeviceMemory> slots, cache, answer, workspace, hidden, products, scores, steps, forced,
        router_workspace;
  };

  void add_steps() {
    constexpr std::int64_t kMostLayers = 16;
    const std::int64_t layers = std::min(layers_, kMostLayers);
    const SlotCacheShape of{.num_layers = layers, .num_experts = options_.experts, .slots = options_.slots};
    StepMemory memory;
    memory.slots = std::make_shared<DeviceMemory>(static_cast<std::size_t>(slot_cache_num_slots(of)) * blob_.bytes);
    require_cuda(cudaMemcpy(memory.slots->as<void>(), pool_.host(),
                            std::min(pool_.bytes(), static_cast<std::size_t>(slot_cache_num_slots(of)) * blob_.bytes),
                            cudaMemcpyHostToDevice),
                 "copy");
    memory.cache = std::make_shared<DeviceMemory>(slot_cache_bytes(of));
    memory.answer = std::make_shared<DeviceMemory>(4096);
    memory.workspace = on_device(std::vector<unsigned char>(decode_fetch_workspace()));
    memory.hidden = on_device(
        random_words(static_cast<std::size_t>(options_.hidden + options_.top_k * options_.expert_hidden) * 2, 6));
    memory.products =
        std::make_shared<DeviceMemory>(static_cast<std::size_t>(options_.top_k * options_.hidden) * sizeof(float));
    memory.scores = std::make_shared<DeviceMemory>(65536);
    const DecodeRouterShape router{.num_tokens = 1,
                                   .hidden_size = options_.hidden,
                                   .num_experts = options_.experts,
                                   .top_k = options_.top_k,
                                   .dependent = true};
    memory.router_workspace = on_device(std::vector<unsigned char>(decode_router_workspace(router)));
    for (const std::int64_t misses : options_.step_misses) {
      const std::int64_t rounds = misses > 0 ? options_.experts / misses : 1;
      std::vector<std::int64_t> forced;
      for (std::int64_t step = 0; step < rounds; ++step) {
        for (std::int64_t k = 0; k < options_.top_k; ++k) {
          // The newest first: the order of the ranks does not follow that of the misses.
          forced.push_back((step * misses + (k * 5) % options_.top_k) % options_.experts);
        }
      }
      std::vector<std::int64_t> steps(static_cast<std::size_t>(rounds));
      std::iota(steps.begin(), steps.end(), 0);
      memory.forced = on_device(forced);
      memory.steps = on_device(steps);
      for (const bool down : {false, true}) {
        add_step(of, memory, misses, rounds, 0, 0, down);
        for (const std::int64_t copiers : options_.copiers) {
          for (const std::int64_t poll : options_.polls) {
            add_step(of, memory, misses, rounds, copiers, poll, down);
          }
        }
      }
    }
  }

  /// copiers 0: all experts are there, without a cache.
  void add_step(const SlotCacheShape& of, const StepMemory& memory, std::int64_t misses, std::int64_t rounds,
                std::int64_t copiers, std::int64_t poll, bool down) {
    if (copiers == 0 && misses > 0) {
      return;
    }
    const SlotCacheState state = slot_cache_state(of, memory.cache->as<void>());
    Arm& arm = arms_.emplace_back();
    arm.labels = {{"kernel", fmt::format("step of one layer: {}{}", copiers > 0 ? "fetch_gate_up" : "gate_up",
                                         down ? " + down_combine" : "")},
                  {"misses", misses},
                  {"copiers", copiers},
                  {"poll_ns", poll}};
    arm.bound = misses > 0 ? Bound::kLink : Bound::kMemory;
    arm.bytes = static_cast<double>(misses > 0 ? misses : options_.top_k) *
                static_cast<double>(down || misses > 0 ? blob_.bytes : blob_.down);
    arm.launches = of.num_layers * rounds;
    arm.prepare = [this, of, state, memory, misses, self = &arm] {
      slot_cache_reset_cuda(of, state, nullptr, 0, nullptr, stream_);
      if (misses == 0) {
        self->graph->launch(stream_);  // all experts come in before
      }
      require_cuda(cudaStreamSynchronize(stream_), "stream");
    };
    arm.launch = [=, this](std::int64_t i) {
      const DecodeRouterShape router{.num_tokens = 1,
                                     .hidden_size = options_.hidden,
                                     .num_experts = options_.experts,
                                     .top_k = options_.top_k,
                                     .dependent = true};
      const std::int64_t layer = i % of.num_layers;
      auto* const hidden = memory.hidden->as<std::uint16_t>();
      auto* const logits = memory.scores->as<float>();
      auto* const selected = reinterpret_cast<std::int32_t*>(logits + 2 * options_.experts);
      auto* const mixing = logits + 2 * options_.experts + 32;
      auto* const hit_slots = selected + 64;
      auto* const normal = reinterpret_cast<std::uint16_t*>(logits + 2 * options_.experts + 128);
      DecodeRouterInputs in{
          .hidden = hidden,
          .norm_weight = hidden,
          .router = weights_->as<float>(static_cast<std::size_t>(layer * options_.experts * options_.hidden) * 4)};
      in.forced = memory.forced->as<std::int64_t>();
      in.num_forced = rounds;
      in.step = memory.steps->as<std::int64_t>(static_cast<std::size_t>(i / of.num_layers) * 8);
      in.slot_of = copiers > 0 ? state.slot_of + layer * of.num_experts : nullptr;
      decode_router_cuda(
          router, in, {normal, logits, logits + options_.experts, selected, mixing, copiers > 0 ? hit_slots : nullptr},
          memory.router_workspace->as<void>(), stream_);
      DecodeExpertsShape sizes = shape(1);
      sizes.dependent = true;
      auto* const h = hidden + options_.hidden;
      auto* const pool = memory.slots->as<unsigned char>();
      if (copiers == 0) {
        // Experts 0 to K - 1 of every layer lie in its first slots.
        auto* const of_layer = pool + static_cast<std::size_t>(layer * of.slots) * blob_.bytes;
        decode_gate_up_cuda(sizes, normal, selected, of_layer, h, stream_);
        if (down) {
          decode_down_combine_cuda(sizes, h, selected, of_layer, mixing, nullptr, nullptr, normal + options_.hidden,
                                   stream_);
        }
        return;
      }
      auto* const answers = memory.answer->as<unsigned char>();
      DecodeFetch fetch;
      fetch.cache = of;
      fetch.state = state;
      fetch.layer = layer;
      fetch.selected = selected;
      fetch.hit_slots = hit_slots;
      fetch.store = pool_.device();
      fetch.answer = {reinterpret_cast<SlotCacheStep*>(answers), reinterpret_cast<SlotCacheLoad*>(answers + 64),
                      reinterpret_cast<std::int32_t*>(answers + 1024), reinterpret_cast<std::int32_t*>(answers + 2048)};
      fetch.workspace = memory.workspace->as<void>();
      fetch.copiers = copiers;
      fetch.poll_ns = poll;
      auto* const y = memory.products->as<float>();
      decode_fetch_gate_up_cuda(sizes, fetch, normal, pool, h, down ? y : nullptr, stream_);
      if (down) {
        decode_down_combine_cuda(sizes, h, fetch.answer.slots, pool, mixing, y, nullptr, normal + options_.hidden,
                                 stream_, hit_slots);
      }
    };
  }

  void add_fetch(std::int64_t misses, std::int64_t blocks) {
    const ExpertStoreShape of{layers_, options_.experts, blob_.bytes};
    SlotCacheStep what;
    what.loads = static_cast<std::int32_t>(misses);
    what.wave_size = static_cast<std::int32_t>(std::max<std::int64_t>(misses, 1));
    const auto step = on_device(std::vector<SlotCacheStep>{what});
    const auto loads = std::make_shared<DeviceMemory>(static_cast<std::size_t>(options_.fetches * what.wave_size) *
                                                      sizeof(SlotCacheLoad));
    std::vector<std::int64_t> layer(static_cast<std::size_t>(options_.fetches));
    std::generate(layer.begin(), layer.end(), [this] { return draw(layers_); });
    Arm& arm = arms_.emplace_back();
    arm.labels = {{"kernel", "expert_fetch"}, {"misses", misses}, {"blocks", blocks}};
    arm.bound = Bound::kLink;
    arm.bytes = static_cast<double>(misses) * static_cast<double>(blob_.bytes);
    arm.launches = options_.fetches;
    arm.launch = [=, this](std::int64_t i) {
      expert_fetch_cuda(of, pool_.device(), layer[static_cast<std::size_t>(i)], step->as<SlotCacheStep>(),
                        loads->as<SlotCacheLoad>(static_cast<std::size_t>(i * what.wave_size) * sizeof(SlotCacheLoad)),
                        1, weights_->as<void>(), blocks, stream_);
    };
    arm.prepare = [this, loads, misses] {
      std::vector<SlotCacheLoad> fresh;
      for (std::int64_t i = 0; i < options_.fetches * misses; ++i) {
        fresh.push_back({static_cast<std::int32_t>(draw(options_.experts)), static_cast<std::int32_t>(i % num_slots_)});
      }
      require_cuda(
          cudaMemcpy(loads->as<void>(), fresh.data(), fresh.size() * sizeof(SlotCacheLoad), cudaMemcpyHostToDevice),
          "copy");
    };
  }

  std::int64_t draw(std::int64_t below) {
    return static_cast<std::int64_t>(random_.below(static_cast<std::uint64_t>(below)));
  }

  Options options_;
  ExpertFormat format_;
  const PinnedPool& pool_;
  ExpertBlob blob_;
  std::int64_t layers_;     // of the pool
  std::int64_t num_slots_;  // blobs on the GPU
  SplitMix64 random_;
  std::unique_ptr<DeviceMemory> weights_;
  std::vector<std::int32_t> slot_order_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  std::deque<Arm> arms_;
};

void require_gpu() {
  int devices = 0;
  if (!has_cuda_kernels() || cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    throw RunError(fmt::format("GPU: this benchmark times CUDA kernels, got {}; run it on a machine with a GPU",
                               has_cuda_kernels() ? "no GPU" : "a build with HESTIA_CUDA=OFF"));
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options;
    CLI::App app("Time per launch of the decode kernels beside what bounds them; prints JSON lines.");
    app.add_option("--hidden", options.hidden, "hidden size of the model")->capture_default_str();
    app.add_option("--expert-hidden", options.expert_hidden, "hidden size of an expert")->capture_default_str();
    app.add_option("--experts", options.experts, "experts per layer")->capture_default_str();
    app.add_option("--top-k", options.top_k, "experts per token")->capture_default_str();
    app.add_option("--vocabulary", options.vocabulary, "rows of the lm head")->capture_default_str();
    app.add_option("--formats", options.formats, "of the experts")->delimiter(',')->capture_default_str();
    app.add_option("--tokens", options.tokens, "rows of a step")->delimiter(',')->capture_default_str();
    app.add_option("--misses", options.misses, "experts per fetch")->delimiter(',')->capture_default_str();
    app.add_option("--fetch-blocks", options.fetch_blocks, "blocks of a fetch")->delimiter(',')->capture_default_str();
    app.add_option("--step-misses", options.step_misses, "experts that a whole step misses")
        ->delimiter(',')
        ->capture_default_str();
    app.add_option("--copiers", options.copiers, "blocks of a whole step that copy")
        ->delimiter(',')
        ->capture_default_str();
    app.add_option("--polls", options.polls, "ns between looks of the others")->delimiter(',')->capture_default_str();
    app.add_option("--kinds", options.kinds, "of kernels: experts (with router and slot cache), linear, fetch, step")
        ->delimiter(',')
        ->capture_default_str();
    app.add_option("--slots", options.slots, "slots per layer of the slot cache")->capture_default_str();
    app.add_option("--pool-gb", options.pool_gb, "experts in page-locked host memory")->capture_default_str();
    app.add_option("--weights-gb", options.weights_gb, "weights on the GPU that launches rotate through")
        ->capture_default_str();
    app.add_option("--launches", options.launches, "launches of a graph")->capture_default_str();
    app.add_option("--fetches", options.fetches, "fetches of a graph")->capture_default_str();
    app.add_option("--repeats", options.repeats, "rounds over all arms")->capture_default_str();
    app.add_option("--threads", options.threads, "CPU threads that fill the pool; 0: all")->capture_default_str();
    CLI11_PARSE(app, argc, argv);
    require_gpu();
    std::string command;
    for (int i = 0; i < argc; ++i) {
      command += (i == 0 ? "" : " ") + std::string(argv[i]);  // NOLINT(cppcoreguidelines-pro-bounds-pointer-arithmetic)
    }
    cudaDeviceProp properties{};
    require_cuda(cudaGetDeviceProperties(&properties, 0), "GPU");
    const auto threads = options.threads > 0 ? options.threads : std::max(1U, std::thread::hardware_concurrency());
    const PinnedPool pool(static_cast<std::size_t>(options.pool_gb * 1e9) / 4096 * 4096,
                          static_cast<std::size_t>(threads));
    const Json head = {{"benchmark", "decode kernels"},
                       {"version", program_version()},
                       {"commit", program_commit()},
                       {"command", command},
                       {"machine", machine_info()},
                       {"gpu", properties.name},
                       {"multiprocessors", properties.multiProcessorCount},
                       {"l2_bytes", properties.l2CacheSize},
                       {"hidden", options.hidden},
                       {"expert_hidden", options.expert_hidden},
                       {"experts", options.experts},
                       {"top_k", options.top_k},
                       {"pool_bytes", pool.bytes()},
                       {"rotating_weight_gb", options.weights_gb},
                       {"repeats", options.repeats}};
    std::cout << head.dump() << "\n";
    for (std::size_t i = 0; i < options.formats.size(); ++i) {
      Bench bench(options, expert_format_from_name(options.formats[i]), pool, i == 0);
      bench.run();
      for (const Json& line : bench.results()) {
        std::cout << line.dump() << "\n";
      }
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_decode_kernels: %s\n", error.what());
    return 1;
  }
}
