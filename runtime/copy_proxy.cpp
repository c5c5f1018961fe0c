#include "copy_proxy.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <string>
#include <thread>

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/kernels/expert_prefetch.hpp"

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
  std::uint8_t* pool = nullptr;
  std::uint32_t* flags = nullptr;
  int device = 0;
  WriteValue write = nullptr;
  CopyRequest* request = nullptr;         // as the host sees it
  CopyRequest* device_request = nullptr;  // as kernels do
  /// Loads take turns, so that one keeps the link busy while the copy of another begins or is told of.
  std::array<cudaStream_t, 2> streams{};

  /// A guess, as the kernel said it, and what was begun of it.
  struct Guess {
    std::int64_t blob = -1;
    std::uint32_t tag = 0;
    std::uint32_t pieces = 0;
  };
  std::optional<CopyStaging> staging;
  cudaStream_t ahead = nullptr;            // of guesses
  std::array<cudaEvent_t, 2> asked_for{};  // all that was asked for, in each stream
  std::array<cudaEvent_t, 2> pieces{};     // behind the last pieces, by turns
  std::uint32_t turn = 0;                  // of `pieces`
  std::uint64_t said = 0;                  // the last guess
  std::array<Guess, 2> guesses;            // for layers of even and odd number
  Guess* brought = nullptr;                // the one that is brought, of these; null: none
  std::atomic<std::int64_t> useful_bytes{0};
  std::atomic<std::int64_t> guessed_bytes{0};

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
    if (ahead != nullptr) {
      (void)cudaStreamSynchronize(ahead);  // nobody waits for a guess, and its place may be given away now
    }
    for (cudaStream_t stream : {streams[0], streams[1], ahead}) {
      if (stream != nullptr) {
        (void)cudaStreamDestroy(stream);
      }
    }
    for (cudaEvent_t event : {asked_for[0], asked_for[1], pieces[0], pieces[1]}) {
      if (event != nullptr) {
        (void)cudaEventDestroy(event);
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

  void write_behind(cudaStream_t stream, std::uint32_t* word, std::uint32_t value) {
    if (write(stream, reinterpret_cast<CUdeviceptr>(word), value, 0) != CUDA_SUCCESS) {
      note(cudaErrorUnknown);
    }
  }

  void serve(std::uint32_t count) {
    const std::int64_t first_blob = request->loads[0].blob;  // the next request may come once all is enqueued
    for (std::uint32_t i = 0; i < count; ++i) {
      const CopyRequest::Load load = request->loads[i];
      cudaStream_t stream = streams[i % streams.size()];
      const std::size_t begin = load.guess != 0 ? settle(load) : 0;
      if (begin < load.end) {
        note(cudaMemcpyAsync(pool + static_cast<std::size_t>(load.slot) * blob_bytes + begin,
                             store + static_cast<std::size_t>(load.blob) * blob_bytes + begin, load.end - begin,
                             cudaMemcpyHostToDevice, stream));
      }
      write_behind(stream, flags + i, 0);
    }
    if (!staging) {
      return;
    }
    hear_guess();
    if (brought != nullptr && layer_of(brought->blob) == layer_of(first_blob)) {
      brought = nullptr;  // it was wrong
    }
    for (std::size_t i = 0; i < streams.size(); ++i) {
      note(cudaEventRecord(asked_for[i], streams[i]));
      note(cudaStreamWaitEvent(ahead, asked_for[i]));
    }
  }

  [[nodiscard]] std::int64_t layer_of(std::int64_t blob) const { return blob / staging->experts_per_layer; }

  // Ends the guess that `load` was, says what there is of it, and returns its bytes.
  std::size_t settle(const CopyRequest::Load& load) {
    const auto place = static_cast<std::size_t>(layer_of(load.blob) % 2);
    Guess& guess = guesses[place];
    const std::uint32_t begun = guess.tag == load.guess ? guess.pieces : 0;  // else it came and went unheard
    if (brought == &guess) {
      brought = nullptr;
    }
    write_behind(ahead, staging->landed + place, load.guess << 8U | begun);
    const std::size_t bytes = std::min(begun * kPrefetchPiece, blob_bytes);
    useful_bytes += static_cast<std::int64_t>(bytes);
    return bytes;
  }

  void hear_guess() {
    const std::uint64_t now = std::atomic_ref<std::uint64_t>(request->guess).load(std::memory_order_acquire);
    if (now == said) {
      return;
    }
    said = now;
    brought = nullptr;
    if (const auto blob = static_cast<std::int64_t>(static_cast<std::uint32_t>(now)) - 1; blob >= 0) {
      brought = &guesses[static_cast<std::size_t>(layer_of(blob) % 2)];
      *brought = {blob, static_cast<std::uint32_t>(now >> 32U), 0};
    }
  }

  // Begins the next piece of the guess, unless enough are on their way.
  void bring_piece() {
    hear_guess();
    if (brought == nullptr) {
      return;
    }
    const std::size_t begin = brought->pieces * kPrefetchPiece;
    if (begin >= blob_bytes || brought->pieces == kPrefetchMostPieces) {
      return;
    }
    cudaEvent_t event = pieces[turn % pieces.size()];
    const cudaError_t before = cudaEventQuery(event);
    if (before == cudaErrorNotReady) {
      return;
    }
    note(before);
    const std::size_t bytes = std::min(kPrefetchPiece, blob_bytes - begin);
    const auto place = static_cast<std::size_t>(layer_of(brought->blob) % 2);
    note(cudaMemcpyAsync(staging->places + place * blob_bytes + begin,
                         store + static_cast<std::size_t>(brought->blob) * blob_bytes + begin, bytes,
                         cudaMemcpyHostToDevice, ahead));
    note(cudaEventRecord(event, ahead));
    ++brought->pieces;
    ++turn;
    guessed_bytes += static_cast<std::int64_t>(bytes);
  }

  void run() {
    note(cudaSetDevice(device));
    // A graph may be captured meanwhile: what this thread asks of events has nothing to do with that.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    note(cudaThreadExchangeStreamCaptureMode(&mode));
    std::atomic_ref<std::uint32_t> asked(request->count);
    while (true) {
      if (!awake) {
        awake.wait(false);
        if (staging) {
          hear_guess();
          brought = nullptr;  // of steps that are over
        }
      }
      if (ended) {
        return;
      }
      const std::uint32_t count = asked.load(std::memory_order_acquire);
      if (count > 0) {
        // Before the copies: the next request can only come behind them.
        asked.store(0, std::memory_order_relaxed);
        ++taken;
        serve(count);
      } else if (staging) {
        bring_piece();
      }
    }
  }
};

CopyProxy::CopyProxy(const ExpertStore& store, std::uint8_t* pool, std::uint32_t* flags,
                     const std::optional<CopyStaging>& staging, int device)
    : impl_(std::make_unique<Impl>()) {
  Impl& impl = *impl_;
  impl.store = store.blobs().const_data_ptr<std::uint8_t>();
  impl.blob_bytes = store.layout().bytes;
  impl.pool = pool;
  impl.flags = flags;
  impl.device = device;
  if (impl.blob_bytes > std::numeric_limits<std::uint32_t>::max()) {
    throw RunError(fmt::format("copy proxy: experts must be smaller than 4 GiB, got {} bytes; use --fetch together",
                               impl.blob_bytes));
  }
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
  if (staging) {
    impl.staging = staging;
    check(cudaStreamCreateWithPriority(&impl.ahead, cudaStreamNonBlocking, least), "no stream");
    for (cudaEvent_t* event : {&impl.asked_for[0], &impl.asked_for[1], &impl.pieces[0], &impl.pieces[1]}) {
      check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "no event");
    }
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

std::int64_t CopyProxy::guessed_bytes() const noexcept {
  return impl_->guessed_bytes;
}

std::int64_t CopyProxy::useful_bytes() const noexcept {
  return impl_->useful_bytes;
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
