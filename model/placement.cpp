#include "hestia/model/placement.hpp"

#include <algorithm>
#include <array>
#include <mutex>
#include <stdexcept>

#include <ATen/Parallel.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <fmt/format.h>

#include "hestia/core/files.hpp"
#include "hestia/model/tensors.hpp"

namespace hestia {
namespace {

using torch::Tensor;

/// Consecutive elements of one tensor.
struct Block {
  const TensorView* tensor;
  std::size_t offset;  ///< Bytes from the tensor's first.
  std::size_t bytes;
  torch::Dtype dtype;
  Tensor destination;  ///< [elements]
};

void request(const Block& block) {
  read_ahead(block.tensor->bytes.subspan(block.offset, block.bytes));
}

std::vector<Block> blocks_of(const std::vector<Placement>& placements, std::size_t block_bytes) {
  std::vector<Block> blocks;
  for (const auto& [source, destination] : placements) {
    if (at::IntArrayRef(source.shape) != destination.sizes() || !destination.is_contiguous() ||
        destination.device() != placements.front().destination.device()) {
      throw std::invalid_argument(fmt::format(
          "placement: \"{}\" needs a contiguous destination of its shape on the device of the others", source.name));
    }
    const torch::Dtype dtype = torch_dtype(source.dtype);
    const Tensor flat = destination.view({-1});
    const std::size_t width = dtype_size(source.dtype);
    const auto step = static_cast<std::int64_t>(std::max<std::size_t>(1, block_bytes / width));
    for (std::int64_t begin = 0; begin < flat.numel(); begin += step) {
      const std::int64_t count = std::min(step, flat.numel() - begin);
      blocks.push_back({&source, static_cast<std::size_t>(begin) * width, static_cast<std::size_t>(count) * width,
                        dtype, flat.narrow(0, begin, count)});
    }
  }
  return blocks;
}

// The first bytes of a buffer as the block's elements.
Tensor elements(const Tensor& buffer, const Block& block) {
  return buffer.narrow(0, 0, static_cast<std::int64_t>(block.bytes)).view(block.dtype);
}

void read_bytes(const Block& block, const Tensor& to) {
  block.tensor->read(block.offset, {static_cast<std::byte*>(to.data_ptr()), block.bytes});
}

/// One thread's way to the CPU.
class HostLane {
 public:
  HostLane(torch::Device /*device*/, std::int64_t block_bytes) : scratch_(torch::empty({block_bytes}, torch::kUInt8)) {}

  void place(const Block& block) {
    if (block.destination.scalar_type() == block.dtype) {
      read_bytes(block, block.destination);
      return;
    }
    const Tensor aligned = elements(scratch_, block);
    read_bytes(block, aligned);
    block.destination.copy_(aligned);
  }
  void finish() {}

 private:
  Tensor scratch_;
};

/// One thread's way to a GPU: while a block is on the link, the next one is read.
class DeviceLane {
 public:
  DeviceLane(torch::Device device, std::int64_t block_bytes)
      : stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index())), guard_(stream_) {
    for (Slot& slot : slots_) {
      slot.pinned = torch::empty({block_bytes}, torch::TensorOptions().dtype(torch::kUInt8).pinned_memory(true));
    }
    arrived_ = torch::empty({block_bytes}, torch::TensorOptions().dtype(torch::kUInt8).device(device));
  }

  void place(const Block& block) {
    Slot& slot = slots_[next_];
    next_ = (next_ + 1) % slots_.size();
    slot.sent.synchronize();
    const Tensor staged = elements(slot.pinned, block);
    read_bytes(block, staged);
    if (block.destination.scalar_type() == block.dtype) {
      block.destination.copy_(staged, /*non_blocking=*/true);
    } else {
      const Tensor arrived = elements(arrived_, block);
      arrived.copy_(staged, /*non_blocking=*/true);
      block.destination.copy_(arrived);
    }
    slot.sent.record(stream_);
  }
  void finish() { stream_.synchronize(); }

 private:
  struct Slot {
    Tensor pinned;
    at::cuda::CUDAEvent sent;
  };
  c10::cuda::CUDAStream stream_;
  c10::cuda::CUDAStreamGuard guard_;
  std::array<Slot, 2> slots_;
  Tensor arrived_;
  std::size_t next_ = 0;
};

template <class Lane>
void place_blocks(const std::vector<Block>& blocks, torch::Device device, const PlacementOptions& options) {
  constexpr std::int64_t kAhead = 2;  // blocks that the disk is asked for before they are read
  std::size_t largest = 0;
  for (const Block& block : blocks) {
    largest = std::max(largest, block.bytes);
  }
  // Room for whole elements of every dtype.
  const auto block_bytes = static_cast<std::int64_t>((largest + 7) / 8 * 8);
  std::mutex advancing;
  at::parallel_for(0, static_cast<std::int64_t>(blocks.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    const torch::NoGradGuard no_grad;
    Lane lane(device, block_bytes);
    for (std::int64_t i = begin; i < std::min(begin + kAhead, end); ++i) {
      request(blocks[static_cast<std::size_t>(i)]);
    }
    for (std::int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) {
        request(blocks[static_cast<std::size_t>(i + kAhead)]);
      }
      const Block& block = blocks[static_cast<std::size_t>(i)];
      lane.place(block);
      if (options.advance) {
        const std::lock_guard lock(advancing);
        options.advance(static_cast<std::int64_t>(block.bytes));
      }
    }
    lane.finish();
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
  if (device.is_cuda()) {
    // The memory may still be in use by work that its last owner queued.
    c10::cuda::getCurrentCUDAStream(device.index()).synchronize();
    place_blocks<DeviceLane>(blocks, device, options);
  } else {
    place_blocks<HostLane>(blocks, device, options);
  }
}

}  // namespace hestia
