#include "hestia/kernels/decode_fetch.hpp"

#include "decode_checks.hpp"
#include "decode_gate_up.cuh"
#include "decode_quantised.hpp"
#include "dependent.cuh"
#include "expert_arrival.cuh"
#include "launch.cuh"

namespace hestia {
namespace {

/// Grid: the copiers, then the tiles of kWarps rows of each pair.
__global__ void __launch_bounds__(kWarps* kDecodeWarp)
    fetch_gate_up_kernel(DecodeSizes sizes, FetchStep step, const std::uint16_t* x, uint4* pool, std::uint16_t* h) {
  __shared__ int shared_slot;
  after_kernel_before();
  if (blockIdx.x < step.copiers) {
    arrival::serve_and_copy(step, pool);
    return;
  }
  const unsigned number = blockIdx.x - step.copiers;
  const unsigned turn = number / step.blocks_per_pair;
  bool hit = false;
  const int pair = arrival::pair_of_turn(step, static_cast<int>(turn), hit);
  const int slot = hit ? step.hit_slots[pair] : arrival::arrived_slot(step, pair, &shared_slot);
  const int f =
      static_cast<int>(number - turn * step.blocks_per_pair) * kWarps + static_cast<int>(threadIdx.x) / kDecodeWarp;
  if (f < sizes.expert_hidden) {
    const std::size_t row = static_cast<std::size_t>(f) * sizes.hidden;
    gate_up_rows<1, true>(sizes, x, matrix(pool, sizes, slot, sizes.blob.gate) + row,
                          matrix(pool, sizes, slot, sizes.blob.up) + row, &pair, 0, 1, f, h);
  }
}

}  // namespace

std::size_t decode_fetch_workspace() {
  return sizeof(FetchWorkspace);
}

std::uint32_t* decode_fetch_flags(void* workspace) {
  return static_cast<FetchWorkspace*>(workspace)->copied;
}

FetchStep fetch_step(const DecodeExpertsShape& shape, const DecodeFetch& fetch, unsigned blocks_per_pair) {
  const ExpertBlob blob = expert_blob(shape);
  const std::size_t words = blob.bytes / sizeof(uint4);
  FetchStep step{};
  step.cache = fetch.cache;
  step.state = fetch.state;
  step.layer = static_cast<int>(fetch.layer);
  step.top_k = static_cast<int>(shape.top_k);
  step.selected = fetch.selected;
  step.hit_slots = fetch.hit_slots;
  step.store =
      static_cast<const uint4*>(fetch.store) + static_cast<std::size_t>(fetch.layer * fetch.cache.num_experts) * words;
  step.answer = fetch.answer;
  step.workspace = static_cast<FetchWorkspace*>(fetch.workspace);
  step.request = fetch.request;
  step.blob_words = words;
  step.first_words = blob.down / sizeof(uint4);
  step.own_words = fetch_own_bytes(blob) / sizeof(uint4);
  step.copiers = static_cast<unsigned>(fetch.copiers);
  step.poll_ns = static_cast<unsigned>(fetch.poll_ns);
  step.blocks_per_pair = blocks_per_pair;
  return step;
}

void decode_fetch_gate_up_cuda(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                               void* pool, std::uint16_t* h, void* stream) {
  check_decode_fetch(shape, fetch);
  if (shape.format != ExpertFormat::kBfloat16) {
    quantised_fetch_gate_up(shape, fetch, x, pool, h, stream);
    return;
  }
  const DecodeSizes sizes = decode_sizes(shape);
  const FetchStep step = fetch_step(shape, fetch, tiles(sizes.expert_hidden, kWarps));
  const dim3 grid(step.copiers + step.blocks_per_pair * static_cast<unsigned>(sizes.num_pairs));
  launch_kernel("fetch_gate_up_kernel", fetch_gate_up_kernel, grid, kWarps * kDecodeWarp,
                serving::bytes_of_bits(fetch.cache), stream, shape.dependent, sizes, step, x, static_cast<uint4*>(pool),
                h);
}

}  // namespace hestia
