#include "hestia/model/placement.hpp"

#include <algorithm>
#include <array>
#include <mutex>
#include <span>
#include <stdexcept>

#include <ATen/Parallel.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "hestia/model/tensors.hpp"
#include "tensor_reader.hpp"

namespace hestia {
namespace {

using torch::Tensor;

/// Consecutive elements of one tensor.
struct Block {
  const Placement* placement;
  std::size_t begin;  ///< Elements before it.
  std::size_t count;

  [[nodiscard]] const Tensor& destination() const { return placement->destination; }
  [[nodiscard]] std::size_t bytes() const { return count * dtype_size(placement->source.dtype); }
  [[nodiscard]] torch::Dtype dtype() const { return torch_dtype(placement->source.dtype); }
  [[nodiscard]] bool same_dtype() const { return destination().scalar_type() == dtype(); }
  /// Where its values go.
  [[nodiscard]] void* address() const {
    return static_cast<std::byte*>(destination().data_ptr()) + begin * destination().element_size();
  }
  void read(TensorReader& reader, void* to) const {
    const TensorView& source = placement->source;
    reader.read(source, begin * dtype_size(source.dtype), {static_cast<std::byte*>(to), bytes()});
  }
  /// Converts `values`, this block's on the destination's device, into their place.
  void convert(const Tensor& values) const {
    const auto size = static_cast<std::int64_t>(count);
    destination().view({-1}).narrow(0, static_cast<std::int64_t>(begin), size).copy_(values);
  }
};

std::vector<Block> blocks_of(const std::vector<Placement>& placements, std::size_t block_bytes) {
  std::vector<Block> blocks;
  for (const Placement& placement : placements) {
    const auto& [source, destination] = placement;
    if (at::IntArrayRef(source.shape) != destination.sizes() || !destination.is_contiguous() ||
        destination.device() != placements.front().destination.device()) {
      throw std::invalid_argument(fmt::format(
          "placement: \"{}\" needs a contiguous destination of its shape on the device of the others", source.name));
    }
    const auto elements = static_cast<std::size_t>(destination.numel());
    const std::size_t step = std::max<std::size_t>(1, block_bytes / dtype_size(source.dtype));
    for (std::size_t begin = 0; begin < elements; begin += step) {
      blocks.push_back({&placement, begin, std::min(step, elements - begin)});
    }
  }
  return blocks;
}

/// Hands blocks out, front to back, to lanes that ask for more when they are done: long runs first, for the system
/// reads ahead of what looks like a sequence, short ones at the end, where no lane should wait for another.
class Blocks {
 public:
  Blocks(const std::vector<Block>& blocks, std::size_t lanes) : blocks_(blocks), lanes_(lanes) {}

  /// Empty when none are left.
  std::span<const Block> take() {
    constexpr std::size_t kShortest = 8;
    const std::lock_guard lock(mutex_);
    const std::size_t left = blocks_.size() - next_;
    const std::size_t count = std::min(left, std::max(left / (2 * lanes_), kShortest));
    next_ += count;
    return std::span(blocks_).subspan(next_ - count, count);
  }
  /// Leaves the rest alone, once a lane has failed.
  void stop() {
    const std::lock_guard lock(mutex_);
    next_ = blocks_.size();
  }

 private:
  const std::vector<Block>& blocks_;
  std::size_t lanes_;
  std::mutex mutex_;
  std::size_t next_ = 0;
};

/// One thread's way to the CPU.
class HostLane {
 public:
  HostLane(torch::Device /*device*/, std::size_t block_bytes) : block_bytes_(static_cast<std::int64_t>(block_bytes)) {}

  void place(const Block& block) {
    if (block.same_dtype()) {
      block.read(reader_, block.address());
      return;
    }
    if (!scratch_.defined()) {
      scratch_ = torch::empty({block_bytes_}, torch::kUInt8);
    }
    block.read(reader_, scratch_.data_ptr());
    block.convert(scratch_.narrow(0, 0, static_cast<std::int64_t>(block.bytes())).view(block.dtype()));
  }
  void finish() {}

 private:
  std::int64_t block_bytes_;
  TensorReader reader_;
  Tensor scratch_;
};

/// One thread's way to a GPU: while a block is on the link, the next one is read.
class DeviceLane {
 public:
  DeviceLane(torch::Device device, std::size_t block_bytes)
      : block_bytes_(static_cast<std::int64_t>(block_bytes)),
        stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index())),
        guard_(stream_) {}
  DeviceLane(const DeviceLane&) = delete;
  DeviceLane& operator=(const DeviceLane&) = delete;
  ~DeviceLane() {
    // After a failure too, no copy may outlive the memory at its ends.
    C10_CUDA_CHECK_WARN(cudaStreamSynchronize(stream_));
  }

  void place(const Block& block) {
    Slot& slot = slots_[next_];
    next_ = (next_ + 1) % slots_.size();
    if (!slot.pinned.defined()) {  // the second is made while the first is on the link
      slot.pinned = torch::empty({block_bytes_}, torch::TensorOptions().dtype(torch::kUInt8).pinned_memory(true));
    }
    slot.sent.synchronize();
    const void* const staged = slot.pinned.data_ptr();
    block.read(reader_, slot.pinned.data_ptr());
    if (block.same_dtype()) {
      send(block.address(), staged, block.bytes());
    } else {
      const Tensor arrived =
          torch::empty({static_cast<std::int64_t>(block.count)}, block.destination().options().dtype(block.dtype()));
      send(arrived.data_ptr(), staged, block.bytes());
      block.convert(arrived);
    }
    slot.sent.record(stream_);
  }
  void finish() { stream_.synchronize(); }

 private:
  struct Slot {
    Tensor pinned;
    at::cuda::CUDAEvent sent;
  };
  void send(void* to, const void* from, std::size_t bytes) {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
  }

  std::int64_t block_bytes_;
  TensorReader reader_;
  c10::cuda::CUDAStream stream_;
  c10::cuda::CUDAStreamGuard guard_;
  std::array<Slot, 2> slots_;
  std::size_t next_ = 0;
};

template <class Lane>
void place_blocks(const std::vector<Block>& blocks, torch::Device device, std::size_t num_lanes,
                  const PlacementOptions& options) {
  std::size_t block_bytes = 0;
  for (const Block& block : blocks) {
    block_bytes = std::max(block_bytes, block.bytes());
  }
  block_bytes = (block_bytes + 7) / 8 * 8;  // whole elements of every dtype
  Blocks shared(blocks, num_lanes);
  std::mutex advancing;
  at::parallel_for(0, static_cast<std::int64_t>(num_lanes), 1, [&](std::int64_t, std::int64_t) {
    const torch::NoGradGuard no_grad;
    try {
      Lane lane(device, block_bytes);
      for (std::span<const Block> run = shared.take(); !run.empty(); run = shared.take()) {
        for (const Block& block : run) {
          lane.place(block);
          if (options.advance) {
            const std::lock_guard lock(advancing);
            options.advance(static_cast<std::int64_t>(block.bytes()));
          }
        }
      }
      lane.finish();
    } catch (...) {
      shared.stop();
      throw;
    }
  });
}

}  // namespace

void place_tensors(const std::vector<Placement>& placements, const PlacementOptions& options) {
  if (placements.empty()) {
    return;
  }
  const torch::NoGradGuard no_grad;
  const torch::Device device = placements.front().destination.device();
  const std::vector<Block> blocks = blocks_of(placements, options.block_bytes);
  const auto num_threads = static_cast<std::size_t>(at::get_num_threads());
  if (device.is_cuda()) {
    // The memory may still be in use by work that its last owner queued.
    c10::cuda::getCurrentCUDAStream(device.index()).synchronize();
    place_blocks<DeviceLane>(blocks, device, std::min(num_threads, options.device_lanes), options);
  } else {
    place_blocks<HostLane>(blocks, device, num_threads, options);
  }
}

}  // namespace hestia
