#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime_api.h>
#include <catch2/catch.hpp>

#include "hestia/core/float_bits.hpp"
#include "hestia/core/random.hpp"
#include "hestia/kernels/copy_request.hpp"
#include "hestia/kernels/expert_prefetch.hpp"
#include "hestia/kernels/soft_cache.hpp"

namespace hestia::testing {

using Bits = std::vector<std::uint16_t>;

/// False, with a warning that ctest takes for "skipped", without a GPU or CUDA kernels.
inline bool gpu_ready() {
  int devices = 0;
  if (!has_cuda_kernels() || cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    WARN("SKIPPED: needs a GPU and a build with CUDA kernels");
    return false;
  }
  return true;
}

inline void require_cuda(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

/// Values between two guards, on the CPU or the GPU: a write outside them is found by guards_whole().
template <class Value>
class Guarded {
 public:
  static constexpr std::size_t kGuard = 256;  // bytes, keeps the alignment that cudaMalloc gives
  static constexpr unsigned char kFill = 0xA5;

  explicit Guarded(std::vector<Value> values, bool gpu = false) : size_(values.size()), gpu_(gpu) {
    // A loop: g++ 12 takes copies of values whose number it knows for overruns.
    std::vector<unsigned char> all(2 * kGuard + size_ * sizeof(Value), kFill);
    const auto* const bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (std::size_t i = 0; i < size_ * sizeof(Value); ++i) {
      all[kGuard + i] = bytes[i];
    }
    if (gpu_) {
      require_cuda(cudaMalloc(&device_, all.size()));
      require_cuda(cudaMemcpy(device_, all.data(), all.size(), cudaMemcpyHostToDevice));
    } else {
      host_ = std::move(all);
    }
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { cudaFree(device_); }

  Value* data() {
    return reinterpret_cast<Value*>((gpu_ ? static_cast<unsigned char*>(device_) : host_.data()) + kGuard);
  }
  std::vector<Value> values() const {
    const std::vector<unsigned char> all = bytes();
    std::vector<Value> result(size_);
    if (size_ > 0) {
      std::memcpy(result.data(), all.data() + kGuard, size_ * sizeof(Value));
    }
    return result;
  }
  /// As many values as before.
  void set(const std::vector<Value>& values) {
    if (gpu_) {
      require_cuda(cudaMemcpy(data(), values.data(), size_ * sizeof(Value), cudaMemcpyHostToDevice));
    } else {
      std::copy_n(values.begin(), size_, data());
    }
  }
  bool guards_whole() const {
    const std::vector<unsigned char> all = bytes();
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (all[i] != kFill || all[all.size() - 1 - i] != kFill) {
        return false;
      }
    }
    return true;
  }

 private:
  std::vector<unsigned char> bytes() const {
    if (!gpu_) {
      return host_;
    }
    std::vector<unsigned char> all(size_ * sizeof(Value) + 2 * kGuard);
    require_cuda(cudaDeviceSynchronize());
    require_cuda(cudaMemcpy(all.data(), device_, all.size(), cudaMemcpyDeviceToHost));
    return all;
  }

  std::size_t size_;
  bool gpu_;
  std::vector<unsigned char> host_;
  void* device_ = nullptr;
};

/// The host thread of a CopyRequest, the simplest one: copies from `store`, on the host, to `pool`, on the GPU, and
/// puts `flags` back. Of a load that was guessed it says in `landed` (its place of two) what brought() told it, and
/// copies the rest. Kernels that run meanwhile must have been launched before once.
class CopyingHost {
 public:
  CopyingHost(const std::uint8_t* store, std::size_t blob_bytes, std::uint8_t* pool, std::uint32_t* flags,
              std::uint32_t* landed = nullptr) {
    require_cuda(cudaHostAlloc(&request_, sizeof(CopyRequest), cudaHostAllocMapped));
    require_cuda(cudaHostGetDevicePointer(&request_on_device_, request_, 0));
    require_cuda(cudaHostAlloc(&zero_, sizeof(std::uint32_t), cudaHostAllocDefault));
    require_cuda(cudaHostAlloc(&said_, sizeof(std::uint32_t), cudaHostAllocDefault));
    *static_cast<std::uint32_t*>(zero_) = 0;
    require_cuda(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking));
    auto* const request = new (request_) CopyRequest();
    thread_ = std::thread([=, this] {
      std::atomic_ref<std::uint32_t> count(request->count);
      while (!ended_) {
        const std::uint32_t asked = count.load(std::memory_order_acquire);
        if (asked == 0) {
          continue;
        }
        count.store(0, std::memory_order_relaxed);
        ++requests_;
        for (std::uint32_t i = 0; i < asked; ++i) {
          const CopyRequest::Load load = request->loads[i];
          std::size_t begin = 0;
          if (load.guess != 0) {
            const std::uint32_t pieces = load.guess == tag_ ? pieces_.load() : 0;
            begin = std::min(pieces * kPrefetchPiece, blob_bytes);
            *static_cast<std::uint32_t*>(said_) = load.guess << 8U | pieces;
            note(cudaMemcpyAsync(landed + place_, said_, sizeof(std::uint32_t), cudaMemcpyHostToDevice, copies_));
          }
          const std::size_t from = static_cast<std::size_t>(load.blob) * blob_bytes;
          const std::size_t to = static_cast<std::size_t>(load.slot) * blob_bytes;
          if (begin < load.end) {
            note(cudaMemcpyAsync(pool + to + begin, store + from + begin, load.end - begin, cudaMemcpyHostToDevice,
                                 copies_));
            copied_ += load.end - begin;
          }
          note(cudaMemcpyAsync(flags + i, zero_, sizeof(std::uint32_t), cudaMemcpyHostToDevice, copies_));
        }
      }
    });
  }
  CopyingHost(const CopyingHost&) = delete;
  CopyingHost& operator=(const CopyingHost&) = delete;
  ~CopyingHost() {
    ended_ = true;
    thread_.join();
    cudaStreamDestroy(copies_);
    cudaFreeHost(request_);
    cudaFreeHost(zero_);
    cudaFreeHost(said_);
  }
  /// What is there of guess `tag`, for a layer of place 0 or 1; before the kernel is launched that asks.
  void brought(std::uint32_t tag, std::size_t place, std::uint32_t pieces) {
    tag_ = tag;
    place_ = place;
    pieces_ = pieces;
  }
  CopyRequest* request() const { return static_cast<CopyRequest*>(request_on_device_); }
  int requests() const { return requests_; }
  std::size_t copied() const { return copied_; }
  bool failed() const { return failed_; }

 private:
  void note(cudaError_t error) { failed_ = failed_ || error != cudaSuccess; }

  void* request_ = nullptr;
  void* request_on_device_ = nullptr;
  void* zero_ = nullptr;
  void* said_ = nullptr;
  std::atomic<std::uint32_t> tag_{0};
  std::atomic<std::size_t> place_{0};
  std::atomic<std::uint32_t> pieces_{0};
  cudaStream_t copies_ = nullptr;
  std::atomic<bool> ended_{false};
  std::atomic<int> requests_{0};
  std::atomic<std::size_t> copied_{0};
  std::atomic<bool> failed_{false};
  std::thread thread_;
};

/// What `enqueue(stream)` does, captured as a graph.
class Captured {
 public:
  template <class Enqueue>
  explicit Captured(const Enqueue& enqueue) {
    require_cuda(cudaStreamCreate(&stream_));
    require_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    enqueue(static_cast<void*>(stream_));
    cudaGraph_t graph = nullptr;
    require_cuda(cudaStreamEndCapture(stream_, &graph));
    const cudaError_t error = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    require_cuda(error);
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;
  ~Captured() {
    cudaGraphExecDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  void replay() {
    require_cuda(cudaGraphLaunch(graph_, stream_));
    require_cuda(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
};

/// Uniform in (-size, size).
inline std::vector<float> random_floats(SplitMix64& random, std::size_t count, double size) {
  std::vector<float> values(count);
  for (float& value : values) {
    value = static_cast<float>((2.0 * random.uniform() - 1.0) * size);
  }
  return values;
}

inline Bits random_bits(SplitMix64& random, std::size_t count, double size) {
  Bits bits(count);
  for (std::uint16_t& value : bits) {
    value = float_to_bfloat16_bits(static_cast<float>((2.0 * random.uniform() - 1.0) * size));
  }
  return bits;
}

inline double wide(std::uint16_t bits) {
  return static_cast<double>(bfloat16_bits_to_float(bits));
}

}  // namespace hestia::testing
