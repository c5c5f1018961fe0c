#include "copy_proxy.hpp"

#include <array>
#include <atomic>
#include <string>
#include <thread>

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "hestia/core/error.hpp"

namespace hestia {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    throw RunError(
        fmt::format("copy proxy: {}, got {} ({})", what, cudaGetErrorName(error), cudaGetErrorString(error)));
  }
}

using WriteValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

// The driver's write behind all that a stream holds: the runtime has none.
WriteValue write_value() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuStreamWriteValue32", &found, cudaEnableDefault, &result);
#endif
  check(error, "the driver cannot be asked for cuStreamWriteValue32");
  if (found == nullptr || result != cudaDriverEntryPointSuccess) {
    throw RunError(
        "copy proxy: the driver has no cuStreamWriteValue32; use a newer driver, or fetch with --fetch together");
  }
  return reinterpret_cast<WriteValue>(found);
}

}  // namespace

struct CopyProxy::Impl {
  const std::uint8_t* store = nullptr;
  std::size_t blob_bytes = 0;
  std::size_t own_bytes = 0;
  std::uint8_t* pool = nullptr;
  std::uint32_t* flags = nullptr;
  int device = 0;
  WriteValue write = nullptr;
  CopyRequest* request = nullptr;         // as the host sees it
  CopyRequest* device_request = nullptr;  // as kernels do
  /// Loads take turns, so that one keeps the link busy while the copy of another begins or is told of.
  std::array<cudaStream_t, 2> streams{};
  std::atomic<bool> awake{false};
  std::atomic<bool> ended{false};
  std::atomic<std::int64_t> taken{0};
  std::atomic<int> error{0};  // cudaError_t of the first that failed
  std::thread thread;

  ~Impl() {
    if (thread.joinable()) {
      ended = true;
      awake = true;
      awake.notify_one();
      thread.join();
    }
    for (cudaStream_t stream : streams) {
      if (stream != nullptr) {
        (void)cudaStreamDestroy(stream);
      }
    }
    if (request != nullptr) {
      (void)cudaFreeHost(request);
    }
  }

  void note(int status) {
    int none = 0;
    if (status != 0) {
      error.compare_exchange_strong(none, status);
    }
  }

  void serve(std::uint32_t count) {
    for (std::uint32_t i = 0; i < count; ++i) {
      const CopyRequest::Load load = request->loads[i];
      cudaStream_t stream = streams[i % streams.size()];
      const std::size_t begin = i == 0 ? own_bytes : 0;
      note(cudaMemcpyAsync(pool + static_cast<std::size_t>(load.slot) * blob_bytes + begin,
                           store + static_cast<std::size_t>(load.blob) * blob_bytes + begin, blob_bytes - begin,
                           cudaMemcpyHostToDevice, stream));
      if (write(stream, reinterpret_cast<CUdeviceptr>(flags + i), 0, 0) != CUDA_SUCCESS) {
        note(cudaErrorUnknown);
      }
    }
  }

  void run() {
    note(cudaSetDevice(device));
    std::atomic_ref<std::uint32_t> asked(request->count);
    while (true) {
      awake.wait(false);
      if (ended) {
        return;
      }
      const std::uint32_t count = asked.load(std::memory_order_acquire);
      if (count > 0) {
        // Before the copies: the next request can only come behind them.
        asked.store(0, std::memory_order_relaxed);
        ++taken;
        serve(count);
      }
    }
  }
};

CopyProxy::CopyProxy(const ExpertStore& store, std::size_t own_bytes, std::uint8_t* pool, std::uint32_t* flags,
                     int device)
    : impl_(std::make_unique<Impl>()) {
  Impl& impl = *impl_;
  impl.store = store.blobs().const_data_ptr<std::uint8_t>();
  impl.blob_bytes = store.layout().bytes;
  impl.own_bytes = own_bytes;
  impl.pool = pool;
  impl.flags = flags;
  impl.device = device;
  impl.write = write_value();
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, sizeof(CopyRequest), cudaHostAllocMapped | cudaHostAllocPortable),
        "no pinned host memory for its requests");
  impl.request = new (memory) CopyRequest();
  void* device_memory = nullptr;
  check(cudaHostGetDevicePointer(&device_memory, memory, 0), "its requests cannot be mapped");
  impl.device_request = static_cast<CopyRequest*>(device_memory);
  int least = 0;
  int greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "no stream priorities");
  for (cudaStream_t& stream : impl.streams) {
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "no stream");
  }
  // Some systems have the function and refuse it.
  if (impl.write(impl.streams[0], reinterpret_cast<CUdeviceptr>(flags), 0, 0) != CUDA_SUCCESS) {
    throw RunError("copy proxy: this GPU or driver refuses cuStreamWriteValue32; fetch with --fetch together");
  }
  check(cudaStreamSynchronize(impl.streams[0]), "its first write failed");
  impl.thread = std::thread([&impl] { impl.run(); });
}

CopyProxy::~CopyProxy() = default;

CopyRequest* CopyProxy::request() const noexcept {
  return impl_->device_request;
}

std::int64_t CopyProxy::requests() const noexcept {
  return impl_->taken;
}

void CopyProxy::wake() {
  impl_->awake = true;
  impl_->awake.notify_one();
}

void CopyProxy::rest() {
  impl_->awake = false;
  if (const int error = impl_->error; error != 0) {
    const auto status = static_cast<cudaError_t>(error);
    throw RunError(fmt::format("copy proxy: a copy did not start, got {} ({}); use --fetch together",
                               cudaGetErrorName(status), cudaGetErrorString(status)));
  }
}

}  // namespace hestia
