#include "hestia/kernels/decode_fetch.hpp"

#include <algorithm>
#include <iterator>

#include "decode_checks.hpp"
#include "decode_quantised.hpp"
#include "decode_rows.cuh"
#include "dependent.cuh"
#include "expert_arrival.cuh"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kDownRuns = 4;  // of kDownRows rows of down, per warp

/// Grid: the copiers, then those of expert_arrival.cuh: tiles of kWarps rows of gate and up, or of kWarps * kDownRuns *
/// kDownRows rows of down.
__global__ void __launch_bounds__(kWarps* kDecodeWarp)
    fetch_gate_up_kernel(DecodeSizes sizes, FetchStep step, const std::uint16_t* x, uint4* pool, std::uint16_t* h,
                         float* y) {
  using Work = arrival::Turn::Work;
  __shared__ int shared_slot;
  after_kernel_before();
  if (blockIdx.x < step.copiers) {
    arrival::serve_and_copy(step, pool);
    return;
  }
  const arrival::Turn turn = arrival::turn_of(step, blockIdx.x - step.copiers);
  const int warp = static_cast<int>(threadIdx.x) / kDecodeWarp;
  if (turn.work == Work::kDownOfHit) {
    arrival::wait_through(step, turn.pair);
    const std::uint16_t* const down = matrix(pool, sizes, step.hit_slots[turn.pair], sizes.blob.down);
    const int first = (static_cast<int>(turn.block) * kWarps + warp) * kDownRuns * kDownRows;
#pragma unroll 1
    for (int i = first; i < min(first + kDownRuns * kDownRows, sizes.hidden); i += kDownRows) {
      down_rows<1>(sizes, h, down, &turn.pair, 0, 1, i, y);
    }
  } else if (turn.work != Work::kNothing) {
    const bool hit = turn.work == Work::kHit;
    const int slot = hit ? step.hit_slots[turn.pair] : arrival::arrived_slot(step, turn, &shared_slot);
    const int f = static_cast<int>(turn.block) * kWarps + warp;
    if (f < sizes.expert_hidden) {
      const std::size_t row = static_cast<std::size_t>(f) * sizes.hidden;
      gate_up_rows<1, true>(sizes, x, matrix(pool, sizes, slot, sizes.blob.gate) + row,
                            matrix(pool, sizes, slot, sizes.blob.up) + row, &turn.pair, 0, 1, f, h);
    }
    if (hit && turn.is_waited_for) {
      arrival::tell_through(step, turn.pair);
    }
  }
}

}  // namespace

std::size_t decode_fetch_workspace() {
  return sizeof(FetchWorkspace);
}

std::uint32_t* decode_fetch_flags(void* workspace) {
  return static_cast<FetchWorkspace*>(workspace)->copied;
}

FetchStep fetch_step(const DecodeExpertsShape& shape, const DecodeFetch& fetch, unsigned blocks_per_pair,
                     unsigned down_blocks_per_pair) {
  const ExpertBlob blob = expert_blob(shape);
  const std::size_t words = blob.bytes / sizeof(uint4);
  FetchStep step{};
  static_cast<ServeStep&>(step) = serve_step(fetch, shape.top_k);
  step.selected = fetch.selected;
  step.hit_slots = fetch.hit_slots;
  step.store =
      static_cast<const uint4*>(fetch.store) + static_cast<std::size_t>(fetch.layer * fetch.cache.num_experts) * words;
  step.words = words;
  step.first_words = blob.down / sizeof(uint4);
  step.staging = static_cast<const uint4*>(fetch.staging);
  step.poll_ns = static_cast<unsigned>(fetch.poll_ns);
  step.blocks_per_pair = blocks_per_pair;
  step.down_blocks_per_pair = down_blocks_per_pair;
  std::copy(std::begin(fetch.ahead), std::end(fetch.ahead), std::begin(step.ahead));
  return step;
}

void decode_fetch_gate_up_cuda(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                               void* pool, std::uint16_t* h, float* y, void* stream) {
  check_decode_fetch(shape.num_tokens, shape.top_k, fetch);
  if (shape.format != ExpertFormat::kBfloat16) {
    quantised_fetch_gate_up(shape, fetch, x, pool, h, y, stream);
    return;
  }
  const DecodeSizes sizes = decode_sizes(shape);
  const unsigned downs = y != nullptr ? tiles(sizes.hidden, kWarps * kDownRuns * kDownRows) : 0;
  const FetchStep step = fetch_step(shape, fetch, tiles(sizes.expert_hidden, kWarps), downs);
  launch_kernel("fetch_gate_up_kernel", fetch_gate_up_kernel, dim3(fetch_blocks(step)), kWarps * kDecodeWarp,
                serving::bytes_of_bits(fetch.cache), stream, shape.dependent, sizes, step, x, static_cast<uint4*>(pool),
                h, y);
}

}  // namespace hestia
