#include "decode_grouped.hpp"

#include <algorithm>

#include "decode_dot.cuh"
#include "decode_mma.cuh"
#include "decode_pairs.cuh"
#include "dependent.cuh"
#include "launch.cuh"

// Products of many rows with experts in bfloat16, on tensor cores: 16 rows of each of two row tiles times up to 32
// activation rows at once. Few blocks take all tiles of all experts by turns, so that each sorts the pairs by their
// slots once and has the weights of its next tile on their way while it ends one. Warps take a part of the inputs
// each, one after the other, and the parts are added in order: the same for every tile and launch, so that a row's bits
// do not depend on what else is served.

namespace hestia {
namespace {

constexpr int kWarps = 8;  // of a block; each takes a part of the inputs, so their number is part of a result's bits
constexpr int kThreads = kWarps * kDecodeWarp;
constexpr int kRowTiles = 2;    // that a block works on together: gate and up, or two of down
constexpr int kStepChunks = 4;  // chunks of 8 inputs that a warp takes in one step
constexpr int kDepth = 4;       // steps whose weights a thread keeps in flight
constexpr int kMostGroups = 4;  // of kMmaColumns pairs that read weights together
constexpr int kMostColumns = kMostGroups * kMmaColumns;
constexpr unsigned kBlocks = 2 * 132;  // two for each multiprocessor of an H100

/// Two row tiles of kMmaRows rows: sizes of their matrix.
struct MatrixSizes {
  int rows;
  int chunks;      // inputs / 8
  int warp_steps;  // of a warp; even, so that warps part at lines of 128 bytes
};

MatrixSizes matrix_sizes(int rows, int inputs) {
  const int steps = (inputs / 8 + kStepChunks - 1) / kStepChunks;
  return {rows, inputs / 8, (steps + 2 * kWarps - 1) / (2 * kWarps) * 2};
}

constexpr int kPartStride = kRowTiles * kMmaRows + 4;  // spares bank conflicts
using Parts = float[kWarps][kMostColumns][kPartStride];

/// What sorting needs.
struct Sorting {
  int slots[kMaxPairs];              // -1 up to a multiple of 8
  int counts[kMaxPairs];             // of the slot of a pair, at its first pair; then where its pairs begin in `order`
  unsigned short firsts[kMaxPairs];  // first pair of the same slot
  unsigned short ranks[kMaxPairs];   // among those of the same slot
};

struct Shared {
  union {
    alignas(16) Sorting sorting;
    Parts parts;
  };
  // The pairs of slot slots[i] are order[begins[i]] to before order[begins[i + 1]].
  int slots[kMaxPairs];
  unsigned short begins[kMaxPairs + 1];
  unsigned short order[kMaxPairs];
  int num_slots;
};

/// The first pair with slot `slot`; there is one.
__device__ int first_pair(const Sorting& sorting, int slot) {
  const auto* const quads = reinterpret_cast<const int4*>(sorting.slots);
  int first = 0;
  unsigned same = 0;
  while (same == 0) {
    const int4 a = quads[first / 4];
    const int4 b = quads[first / 4 + 1];
    same = (a.x == slot ? 1U : 0U) | (a.y == slot ? 2U : 0U) | (a.z == slot ? 4U : 0U) | (a.w == slot ? 8U : 0U) |
           (b.x == slot ? 16U : 0U) | (b.y == slot ? 32U : 0U) | (b.z == slot ? 64U : 0U) | (b.w == slot ? 128U : 0U);
    first += 8;
  }
  return first - 9 + __ffs(static_cast<int>(same));
}

/// Sorts the pairs that have a slot by it; the whole block. Slots come in the order of their first pairs, the same for
/// every block; the order of a slot's pairs is any.
__device__ void sort_pairs(const std::int32_t* slots, int num_pairs, Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  Sorting& sorting = shared.sorting;
  for (int pair = thread; pair < (num_pairs + 7) / 8 * 8; pair += kThreads) {
    sorting.slots[pair] = pair < num_pairs ? slots[pair] : -1;
    sorting.counts[pair] = 0;
  }
  __syncthreads();
  for (int pair = thread; pair < num_pairs; pair += kThreads) {
    if (sorting.slots[pair] >= 0) {
      const int first = first_pair(sorting, sorting.slots[pair]);
      sorting.firsts[pair] = static_cast<unsigned short>(first);
      sorting.ranks[pair] = static_cast<unsigned short>(atomicAdd(&sorting.counts[first], 1));
    }
  }
  __syncthreads();
  if (thread < kDecodeWarp) {
    int begin = 0;
    int found = 0;
    for (int base = 0; base < num_pairs; base += kDecodeWarp) {
      const int pair = base + thread;
      const int count = pair < num_pairs ? sorting.counts[pair] : 0;
      int sum = count;
      for (int offset = 1; offset < kDecodeWarp; offset *= 2) {
        const int below = __shfl_up_sync(0xffffffffU, sum, offset);
        sum += thread >= offset ? below : 0;
      }
      const unsigned firsts = __ballot_sync(0xffffffffU, count > 0);
      if (count > 0) {
        const int number = found + __popc(firsts & ((1U << thread) - 1U));
        sorting.counts[pair] = begin + sum - count;
        shared.slots[number] = sorting.slots[pair];
        shared.begins[number] = static_cast<unsigned short>(begin + sum - count);
      }
      begin += __shfl_sync(0xffffffffU, sum, kDecodeWarp - 1);
      found += __popc(firsts);
    }
    if (thread == 0) {
      shared.begins[found] = static_cast<unsigned short>(begin);
      shared.num_slots = found;
    }
  }
  __syncthreads();
  for (int pair = thread; pair < num_pairs; pair += kThreads) {
    if (sorting.slots[pair] >= 0) {
      shared.order[sorting.counts[sorting.firsts[pair]] + sorting.ranks[pair]] = static_cast<unsigned short>(pair);
    }
  }
  __syncthreads();
}

/// Where a lane's weights of two row tiles lie: its rows l / 4 and l / 4 + 8 of each, from its first chunk on. Rows
/// past the last repeat it.
struct Weights {
  const uint4* first;
  int offsets[kRowTiles][2];  // the first is 0
  int chunks;                 // that the warp has from there on; 0: no weights
};

/// Chunks of the warp's steps from the lane's first chunk on, 0 or less: none.
__device__ int chunks_of_lane(const MatrixSizes& sizes) {
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  const int warp = static_cast<int>(threadIdx.x) / kDecodeWarp;
  const int steps = sizes.warp_steps * kStepChunks;
  return min(sizes.chunks - warp * steps - lane % 4, steps);
}

/// rows_between: from a row of the first tile to that of the second, in one matrix; 0: the second is of a matrix
/// `bytes_between` behind.
__device__ Weights weights_of(const MatrixSizes& sizes, const unsigned char* matrix, int first_row, int rows_between,
                              std::size_t bytes_between) {
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  const int warp = static_cast<int>(threadIdx.x) / kDecodeWarp;
  const auto row_of = [&](int m, int half) {
    return min(first_row + m * rows_between + half * 8 + lane / 4, sizes.rows - 1);
  };
  Weights weights{};
  weights.chunks = chunks_of_lane(sizes);
  weights.first = reinterpret_cast<const uint4*>(matrix) + static_cast<std::size_t>(row_of(0, 0)) * sizes.chunks +
                  warp * sizes.warp_steps * kStepChunks + lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weights.offsets[m][half] =
          (row_of(m, half) - row_of(0, 0)) * sizes.chunks + m * static_cast<int>(bytes_between / sizeof(uint4));
    }
  }
  return weights;
}

__device__ void load_step(const Weights& weights, int step, uint4 (&w)[kRowTiles][2]) {
  const bool there = step * kStepChunks < weights.chunks;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      w[m][half] =
          there ? load_weights(weights.first + weights.offsets[m][half] + step * kStepChunks) : make_uint4(0, 0, 0, 0);
    }
  }
}

__device__ void load_first(const Weights& weights, uint4 (&w)[kDepth][kRowTiles][2]) {
#pragma unroll
  for (int s = 0; s < kDepth; ++s) {
    load_step(weights, s, w[s]);
  }
}

/// sums = the warp's part of the products of `weights` with G groups of columns; rows: where the lane's columns
/// begin behind `in`, its first chunk. w: the first steps of the weights are in it; in the end those of next(), which
/// `weights` becomes.
template <int G, class Next>
__device__ void multiply(const MatrixSizes& sizes, Weights& weights, const Next& next, const uint4* in,
                         const int (&rows)[G], uint4 (&w)[kDepth][kRowTiles][2], float (&sums)[kRowTiles][G][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[m][g][i] = 0.0F;
      }
    }
  }
  const int chunks = chunks_of_lane(sizes);
  for (int base = 0; base < sizes.warp_steps; base += kDepth) {
    int ahead = base + kDepth;
    if (ahead >= sizes.warp_steps) {
      weights = next();
      ahead = 0;
    }
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      const bool there = (base + s) * kStepChunks < chunks;
      uint4 values[G];
#pragma unroll
      for (int g = 0; g < G; ++g) {
        values[g] = there ? in[rows[g] + (base + s) * kStepChunks] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const uint4& a = w[s][m][0];
          const uint4& b = w[s][m][1];
          multiply_add(sums[m][g], a.x, b.x, a.y, b.y, values[g].x, values[g].y);
          multiply_add(sums[m][g], a.z, b.z, a.w, b.w, values[g].z, values[g].w);
        }
      }
      load_step(weights, ahead + s, w[s]);
    }
  }
}

/// The lane's chunk in its warp's first step of the first row of activations.
__device__ const uint4* first_chunk(const MatrixSizes& sizes, const std::uint16_t* rows) {
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  const int warp = static_cast<int>(threadIdx.x) / kDecodeWarp;
  return reinterpret_cast<const uint4*>(rows) + warp * sizes.warp_steps * kStepChunks + lane % 4;
}

/// The warps' parts of one element, added in order.
__device__ float sum_of_parts(const Parts& parts, int column, int row) {
  float sum = 0.0F;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum = __fadd_rn(sum, parts[warp][column][row]);
  }
  return sum;
}

/// One of the two products.
template <bool kDown>
struct Product {
  DecodeSizes sizes;
  MatrixSizes matrix;
  const std::uint16_t* in;  // x or h
  const unsigned char* pool;
  void* out;  // h or y

  __host__ __device__ int tiles() const {
    constexpr int kRows = kDown ? kRowTiles * kMmaRows : kMmaRows;
    return (matrix.rows + kRows - 1) / kRows;
  }
  __device__ Weights weights(int slot, int tile) const {
    const unsigned char* const blob = pool + static_cast<std::size_t>(slot) * sizes.blob.bytes;
    return kDown ? weights_of(matrix, blob + sizes.blob.down, tile * kRowTiles * kMmaRows, kMmaRows, 0)
                 : weights_of(matrix, blob + sizes.blob.gate, tile * kMmaRows, 0, sizes.blob.up - sizes.blob.gate);
  }
  /// The products of `count` columns with the row tiles of tile `tile`: columns are the pairs `pairs`.
  template <int G, class Next>
  __device__ void parts(Weights& weights, const Next& next, const unsigned short* pairs, int count,
                        uint4 (&w)[kDepth][kRowTiles][2], Parts& out_parts) const {
    const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
    const int warp = static_cast<int>(threadIdx.x) / kDecodeWarp;
    int rows[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int pair = pairs[min(g * kMmaColumns + lane / 4, count - 1)];
      rows[g] = (kDown ? pair : pair / sizes.top_k) * matrix.chunks;
    }
    float sums[kRowTiles][G][4];
    multiply<G>(matrix, weights, next, first_chunk(matrix, in), rows, w, sums);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          out_parts[warp][g * kMmaColumns + lane % 4 * 2 + i % 2][m * kMmaRows + i / 2 * 8 + lane / 4] = sums[m][g][i];
        }
      }
    }
  }
  __device__ void store(const Parts& of, const unsigned short* pairs, int count, int tile) const {
    constexpr int kRows = kDown ? kRowTiles * kMmaRows : kMmaRows;
    for (int i = static_cast<int>(threadIdx.x); i < count * kRows; i += kThreads) {
      const int column = i / kRows;
      const int row = tile * kRows + i % kRows;
      if (row >= matrix.rows) {
        continue;
      }
      const std::size_t at = static_cast<std::size_t>(pairs[column]) * matrix.rows + row;
      const float first = sum_of_parts(of, column, i % kRows);
      if constexpr (kDown) {
        static_cast<float*>(out)[at] = first;
      } else {
        const float silu = __fdiv_rn(first, __fadd_rn(1.0F, expf(-first)));
        static_cast<std::uint16_t*>(out)[at] =
            bfloat16_bits(__fmul_rn(silu, sum_of_parts(of, column, kMmaRows + i % kRows)));
      }
    }
  }
};

/// Grid: as many blocks as run at once; they take tiles, and runs of kMostColumns pairs, by turns.
template <bool kDown>
__global__ void __launch_bounds__(kThreads, 2) grouped_kernel(Product<kDown> product, const std::int32_t* slots) {
  __shared__ Shared shared;
  if constexpr (!kDown) {
    after_kernel_before();
  }
  sort_pairs(slots, product.sizes.num_pairs, shared);
  const int tiles = product.tiles();
  const int items = shared.num_slots * tiles;
  const auto weights_of_item = [&](int item) {
    return item < items ? product.weights(shared.slots[item / tiles], item % tiles) : Weights{};
  };
  int item = static_cast<int>(blockIdx.x);
  Weights weights = weights_of_item(item);
  uint4 w[kDepth][kRowTiles][2];
  load_first(weights, w);
  if constexpr (kDown) {
    after_kernel_before();
  }
  int done = 0;  // pairs of the slot
  while (item < items) {
    const int number = item / tiles;
    const int tile = item % tiles;
    const unsigned short* const pairs = shared.order + shared.begins[number] + done;
    const int left = shared.begins[number + 1] - shared.begins[number] - done;
    const int count = min(left, kMostColumns);
    if (left > kMostColumns) {
      done += kMostColumns;  // the same weights again
    } else {
      done = 0;
      item += static_cast<int>(gridDim.x);
    }
    const auto next = [&] { return weights_of_item(item); };
    if (count <= kMmaColumns) {
      product.template parts<1>(weights, next, pairs, count, w, shared.parts);
    } else if (count <= 2 * kMmaColumns) {
      product.template parts<2>(weights, next, pairs, count, w, shared.parts);
    } else {
      product.template parts<kMostGroups>(weights, next, pairs, count, w, shared.parts);
    }
    __syncthreads();
    product.store(shared.parts, pairs, count, tile);
    __syncthreads();
  }
}

/// Grid: (row tiles of down, two at once, T). The products of one token's experts one after the other.
__global__ void __launch_bounds__(kThreads, 2)
    grouped_down_combine_kernel(Product<true> product, const std::int32_t* slots, const float* weights, const float* y,
                                const std::uint16_t* residual, std::uint16_t* out) {
  constexpr int kRows = kRowTiles * kMmaRows;
  __shared__ float parts[kWarps][kRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kDecodeWarp;
  const int warp = thread / kDecodeWarp;
  after_kernel_before();
  const DecodeSizes& sizes = product.sizes;
  const int tile = static_cast<int>(blockIdx.x);
  const int row = tile * kRows + thread;
  const bool mixes = thread < kRows && row < sizes.hidden;
  float mixed = 0.0F;
  for (int k = 0; k < sizes.top_k; ++k) {
    const int pair = static_cast<int>(blockIdx.y) * sizes.top_k + k;
    const int slot = slots[pair];
    if (slot >= 0) {
      Weights of = product.weights(slot, tile);
      uint4 w[kDepth][kRowTiles][2];
      load_first(of, w);
      const int rows[1] = {pair * product.matrix.chunks};
      float sums[kRowTiles][1][4];
      multiply<1>(
          product.matrix, of, [] { return Weights{}; }, first_chunk(product.matrix, product.in), rows, w, sums);
      if (lane % 4 == 0) {  // all columns are the same
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          parts[warp][m * kMmaRows + lane / 4] = sums[m][0][0];
          parts[warp][m * kMmaRows + lane / 4 + 8] = sums[m][0][2];
        }
      }
    }
    __syncthreads();
    if (mixes && (slot >= 0 || y != nullptr)) {
      float sum = 0.0F;
      if (slot >= 0) {
#pragma unroll
        for (int part = 0; part < kWarps; ++part) {
          sum = __fadd_rn(sum, parts[part][thread]);
        }
      } else {
        sum = y[static_cast<std::size_t>(pair) * sizes.hidden + row];
      }
      mixed = __fmaf_rn(weights[pair], sum, mixed);
    }
    __syncthreads();
  }
  if (mixes) {
    const std::size_t at = static_cast<std::size_t>(blockIdx.y) * sizes.hidden + row;
    out[at] = bfloat16_bits(__fadd_rn(residual_at(residual, at), mixed));
  }
}

template <bool kDown>
Product<kDown> product_of(const DecodeExpertsShape& shape, const std::uint16_t* in, const void* pool, void* out) {
  const DecodeSizes sizes = decode_sizes(shape);
  return {sizes,
          kDown ? matrix_sizes(sizes.hidden, sizes.expert_hidden) : matrix_sizes(sizes.expert_hidden, sizes.hidden), in,
          static_cast<const unsigned char*>(pool), out};
}

template <bool kDown>
void launch(const char* name, const Product<kDown>& product, const std::int32_t* slots, void* stream) {
  const auto most = static_cast<unsigned>(product.sizes.num_pairs * product.tiles());
  launch_kernel(name, grouped_kernel<kDown>, dim3(std::min(most, kBlocks)), kThreads, 0, stream,
                product.sizes.dependent, product, slots);
}

}  // namespace

void grouped_gate_up(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                     const void* pool, std::uint16_t* h, void* stream) {
  launch("grouped_kernel of gate and up", product_of<false>(shape, x, pool, h), slots, stream);
}

void grouped_down(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots, const void* pool,
                  float* y, void* stream) {
  launch("grouped_kernel of down", product_of<true>(shape, h, pool, y), slots, stream);
}

void grouped_down_combine(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                          const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                          std::uint16_t* out, void* stream) {
  const Product<true> product = product_of<true>(shape, h, pool, nullptr);
  const dim3 grid(static_cast<unsigned>(product.tiles()), static_cast<unsigned>(shape.num_tokens));
  launch_kernel("grouped_down_combine_kernel", grouped_down_combine_kernel, grid, kThreads, 0, stream, shape.dependent,
                product, slots, weights, y, residual, out);
}

}  // namespace hestia
