#include "decode_quantised.hpp"

#include <type_traits>

#include "decode_pairs.cuh"
#include "dependent.cuh"
#include "expert_arrival.cuh"
#include "expert_layout.hpp"
#include "launch.cuh"

// Products with integers on tensor cores: 16 rows of weights times up to 8 activation rows at once. Weights become
// bfloat16 without error (8 bits suffice for -128 to 127), so a group's sum is that of exact products in float32; it is
// scaled, and groups are added, in float32. The groups of a row are shared among kSplits warps, by turns, whose sums
// are added in order: the same for every launch, so that a row's bits do not depend on what else is served.

namespace hestia {
namespace {

constexpr int kSplits = 8;   // warps that share the groups of a row
constexpr int kColumns = 8;  // activation rows of one product
constexpr int kSteps = 8;    // products of 16 inputs in a tile
constexpr int kThreads = kSplits * kDecodeWarp;
constexpr int kRowTiles = 2;     // that a block works on together: gate and up, or two of down
constexpr int kDownRuns = 2;     // of row tiles of down, that a block of the fetching kernel computes
constexpr int kFusedWarps = 32;  // of down_combine

__device__ unsigned row_tiles(int rows) {
  return static_cast<unsigned>((rows + kTileRows - 1) / kTileRows);
}

/// A matrix of integers.
struct Matrix {
  const unsigned char* values;
  const unsigned char* scales;
};

__device__ Matrix matrix(const void* pool, const DecodeSizes& sizes, int slot, std::size_t values, std::size_t scales) {
  const unsigned char* const blob =
      static_cast<const unsigned char*>(pool) + static_cast<std::size_t>(slot) * sizes.blob.bytes;
  return {blob + values, blob + scales};
}

/// What a lane holds of a tile: rows g = lane / 4 and g + 8, 32 inputs of each.
template <ExpertFormat kFormat>
struct Tile {
  uint4 words[tile_loads(kFormat)];
  unsigned scales[2];  // bfloat16 scale, the minimum in the high half
};

template <ExpertFormat kFormat, bool kArriving>
__device__ Tile<kFormat> load_tile(const Matrix& of, std::size_t tile) {
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  constexpr std::size_t kBytes = std::size_t{tile_loads(kFormat)} * kTileLoad;
  Tile<kFormat> result;
#pragma unroll
  for (int i = 0; i < tile_loads(kFormat); ++i) {
    result.words[i] = load_weights_of<kArriving>(of.values + tile * kBytes + i * kTileLoad + lane * 16);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::size_t number = tile * kTileRows + half * 8 + lane / 4;
    using Scale = std::conditional_t<kFormat == ExpertFormat::kInt4Asymmetric, unsigned, unsigned short>;
    const auto* const scale = reinterpret_cast<const Scale*>(of.scales) + number;
    result.scales[half] = kArriving ? *static_cast<const volatile Scale*>(scale) : __ldg(scale);
  }
  return result;
}

__device__ unsigned word_of(const uint4& words, int i) {
  return i == 0 ? words.x : (i == 1 ? words.y : (i == 2 ? words.z : words.w));
}

/// Two bfloat16 a - b, exact here.
__device__ unsigned difference(unsigned a, unsigned b) {
  const __nv_bfloat162 result =
      __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const unsigned*>(&result);
}

// Bits 0x4300 are the bfloat16 128, of whose mantissa the lowest bit counts 1.

/// The 4 bits at 0 and at 16.
template <ExpertFormat kFormat>
__device__ unsigned pair_of_4_bits(unsigned word) {
  constexpr unsigned kOffset = kFormat == ExpertFormat::kInt4 ? 0x43084308U : 0x43004300U;  // 128 + 8, 128
  return difference((word & 0x000f000fU) | 0x43004300U, kOffset);
}

/// The signed bytes at 0 and at 16: 128 + the lower 7 bits, less 128 or, with the sign bit set, less 256 (0x4380).
__device__ unsigned pair_of_8_bits(unsigned word) {
  return difference((word & 0x007f007fU) | 0x43004300U, (word & 0x00800080U) | 0x43004300U);
}

/// The lane's weights of step `step`: a[0], a[2] of row g and a[1], a[3] of row g + 8.
template <ExpertFormat kFormat>
__device__ void fragment(const Tile<kFormat>& tile, int step, unsigned (&a)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kFormat == ExpertFormat::kInt8) {
      const unsigned word = word_of(tile.words[half * 2 + step / 4], step % 4);
      a[half] = pair_of_8_bits(word);
      a[half + 2] = pair_of_8_bits(word >> 8);
    } else {
      const unsigned word = word_of(tile.words[half], step / 2) >> (step % 2 * 8);
      a[half] = pair_of_4_bits<kFormat>(word);
      a[half + 2] = pair_of_4_bits<kFormat>(word >> 4);
    }
  }
}

/// c += a b on tensor cores: lane l holds of a rows l / 4 and l / 4 + 8, of b column l / 4, of c those rows in columns
/// l % 4 * 2 and the next.
__device__ void multiply(const unsigned (&a)[4], const uint2& b, float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

/// The lane's inputs of group `group` of its column, 0 past `size` or without a column (null).
__device__ void load_column(const std::uint16_t* column, int size, int group, uint4 (&inputs)[4]) {
  const int first = group * kTileInputs + static_cast<int>(threadIdx.x) % 4 * 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    inputs[i] = make_uint4(0, 0, 0, 0);
    if (column != nullptr && first + i * 8 < size) {
      inputs[i] = *reinterpret_cast<const uint4*>(column + first + i * 8);
    }
  }
}

/// sums[m] += the products of M tiles with the inputs of their group.
template <ExpertFormat kFormat, int M>
__device__ void multiply_group(const Tile<kFormat> (&tiles)[M], const uint4 (&inputs)[4], float (&sums)[M][4]) {
  float products[M][4] = {};
  float input_sums[4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint4& four = inputs[step / 2];
    const uint2 b = step % 2 == 0 ? make_uint2(four.x, four.y) : make_uint2(four.z, four.w);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      unsigned a[4];
      fragment(tiles[m], step, a);
      multiply(a, b, products[m]);
    }
    if constexpr (kFormat == ExpertFormat::kInt4Asymmetric) {
      constexpr unsigned kOnes = 0x3f803f80U;
      const unsigned ones[4] = {kOnes, kOnes, kOnes, kOnes};
      multiply(ones, b, input_sums);
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned scales = tiles[m].scales[i / 2];
      if constexpr (kFormat == ExpertFormat::kInt4Asymmetric) {
        sums[m][i] = __fmaf_rn(__uint_as_float(scales & 0xffff0000U), input_sums[i], sums[m][i]);
      }
      sums[m][i] = __fmaf_rn(__uint_as_float(scales << 16), products[m][i], sums[m][i]);
    }
  }
}

/// Groups split, split + kSplits, ... of M row tiles, `first[m]` the number of the row tile's first tile, times the
/// lane's column: sums[m], as multiply leaves them. kAhead: the next group is on its way while one is multiplied.
template <ExpertFormat kFormat, int M, bool kAhead, bool kArriving = false>
__device__ void multiply_groups(const Matrix (&of)[M], const std::size_t (&first)[M], const std::uint16_t* column,
                                int size, int split, float (&sums)[M][4]) {
  const int groups = (size + kTileInputs - 1) / kTileInputs;
  Tile<kFormat> tiles[M];
  uint4 inputs[4];
  const auto load = [&](int group) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      tiles[m] = load_tile<kFormat, kArriving>(of[m], first[m] + group);
    }
    load_column(column, size, group, inputs);
  };
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[m][i] = 0.0F;
    }
  }
  if constexpr (kAhead) {
    if (split < groups) {
      load(split);
    }
    for (int group = split; group < groups; group += kSplits) {
      Tile<kFormat> now[M];
      uint4 inputs_now[4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        now[m] = tiles[m];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        inputs_now[i] = inputs[i];
      }
      if (group + kSplits < groups) {
        load(group + kSplits);
      }
      multiply_group(now, inputs_now, sums);
    }
  } else {
    for (int group = split; group < groups; group += kSplits) {
      load(group);
      multiply_group(tiles, inputs, sums);
    }
  }
}

/// One block: row tiles `tile[m]` of M matrices times the columns of a run of pairs. partial[w][m][column][row].
template <ExpertFormat kFormat, bool kArriving = false>
__device__ void block_products(const Matrix (&of)[kRowTiles], const std::size_t (&first)[kRowTiles],
                               const std::uint16_t* column, int size,
                               float (&partial)[kSplits][kRowTiles][kColumns][kTileRows]) {
  const int warp = static_cast<int>(threadIdx.x) / kDecodeWarp;
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  float sums[kRowTiles][4];
  // 8 bits have enough on their way, and no registers left for more.
  multiply_groups<kFormat, kRowTiles, kFormat != ExpertFormat::kInt8, kArriving>(of, first, column, size, warp, sums);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      partial[warp][m][lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = sums[m][i];
    }
  }
  __syncthreads();
}

/// The splits of one element, added in order; `stride` floats apart.
__device__ float sum_of_splits(const float* partial, int stride) {
  float sum = 0.0F;
#pragma unroll
  for (int split = 0; split < kSplits; ++split) {
    sum = __fadd_rn(sum, partial[split * stride]);
  }
  return sum;
}

/// One block: row tile `tile` of gate and up of the expert in `slot`, for `count` pairs. `partial` is the block's.
template <ExpertFormat kFormat, bool kArriving>
__device__ void gate_up_tile(const DecodeSizes& sizes, const std::uint16_t* x, const void* pool, int slot,
                             const int* pairs, int count, unsigned tile,
                             float (&partial)[kSplits][kRowTiles][kColumns][kTileRows], std::uint16_t* h) {
  const int thread = static_cast<int>(threadIdx.x);
  const Matrix of[kRowTiles] = {matrix(pool, sizes, slot, sizes.blob.gate, sizes.blob.gate_scales),
                                matrix(pool, sizes, slot, sizes.blob.up, sizes.blob.up_scales)};
  const std::size_t groups = (sizes.hidden + kTileInputs - 1) / kTileInputs;
  const std::size_t first_tiles[kRowTiles] = {tile * groups, tile * groups};
  for (int first = 0; first < count; first += kColumns) {
    const int column = first + thread % kDecodeWarp / 4;
    const std::uint16_t* const inputs =
        column < count ? x + static_cast<std::size_t>(pairs[column] / sizes.top_k) * sizes.hidden : nullptr;
    block_products<kFormat, kArriving>(of, first_tiles, inputs, sizes.hidden, partial);
    const int row = thread % kTileRows;
    const int at = first + thread / kTileRows;
    const int f = static_cast<int>(tile) * kTileRows + row;
    if (thread < kColumns * kTileRows && at < count && f < sizes.expert_hidden) {
      constexpr int kStride = kRowTiles * kColumns * kTileRows;
      const float gate = sum_of_splits(&partial[0][0][thread / kTileRows][row], kStride);
      const float up = sum_of_splits(&partial[0][1][thread / kTileRows][row], kStride);
      const float silu = __fdiv_rn(gate, __fadd_rn(1.0F, expf(-gate)));
      h[static_cast<std::size_t>(pairs[at]) * sizes.expert_hidden + f] = bfloat16_bits(__fmul_rn(silu, up));
    }
    __syncthreads();
  }
}

/// Grid: (row tiles of gate and up, T * K).
template <ExpertFormat kFormat, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 2)
    quantised_gate_up_kernel(DecodeSizes sizes, const std::uint16_t* x, const std::int32_t* slots, const void* pool,
                             std::uint16_t* h) {
  __shared__ int pairs[kGrouped ? kMaxPairs : 1];
  __shared__ int shared_count;
  __shared__ float partial[kSplits][kRowTiles][kColumns][kTileRows];
  after_kernel_before();
  const int slot = slots[blockIdx.y];
  const int count = pairs_of_block<kGrouped>(slots, sizes.num_pairs, slot, pairs, &shared_count);
  gate_up_tile<kFormat, false>(sizes, x, pool, slot, pairs, count, blockIdx.x, partial, h);
}

/// One block: row tiles `tile` to tile + kRowTiles of down of the expert in `slot`, for `count` pairs. `partial` is the
/// block's.
template <ExpertFormat kFormat>
__device__ void down_tiles(const DecodeSizes& sizes, const std::uint16_t* h, const void* pool, int slot,
                           const int* pairs, int count, unsigned tile,
                           float (&partial)[kSplits][kRowTiles][kColumns][kTileRows], float* y) {
  const int thread = static_cast<int>(threadIdx.x);
  const Matrix down = matrix(pool, sizes, slot, sizes.blob.down, sizes.blob.down_scales);
  const Matrix of[kRowTiles] = {down, down};
  const std::size_t groups = (sizes.expert_hidden + kTileInputs - 1) / kTileInputs;
  const unsigned last = row_tiles(sizes.hidden) - 1;
  const std::size_t first_tiles[kRowTiles] = {tile * groups, min(tile + 1, last) * groups};
  for (int first = 0; first < count; first += kColumns) {
    const int column = first + thread % kDecodeWarp / 4;
    const std::uint16_t* const inputs =
        column < count ? h + static_cast<std::size_t>(pairs[column]) * sizes.expert_hidden : nullptr;
    block_products<kFormat>(of, first_tiles, inputs, sizes.expert_hidden, partial);
    static_assert(kThreads == kRowTiles * kColumns * kTileRows);
    const int row = thread % (kRowTiles * kTileRows);
    const int at = first + thread / (kRowTiles * kTileRows);
    const int i = static_cast<int>(tile) * kTileRows + row;
    if (at < count && i < sizes.hidden) {
      y[static_cast<std::size_t>(pairs[at]) * sizes.hidden + i] =
          sum_of_splits(&partial[0][row / kTileRows][at - first][row % kTileRows], kThreads);
    }
    __syncthreads();
  }
}

/// Grid: the copiers, then those of expert_arrival.cuh: row tiles of gate and up, or kDownRuns runs of down's.
template <ExpertFormat kFormat>
__global__ void __launch_bounds__(kThreads, 2)
    quantised_fetch_gate_up_kernel(DecodeSizes sizes, FetchStep step, const std::uint16_t* x, uint4* pool,
                                   std::uint16_t* h, float* y) {
  using Work = arrival::Turn::Work;
  __shared__ int shared_slot;
  __shared__ float partial[kSplits][kRowTiles][kColumns][kTileRows];
  after_kernel_before();
  if (blockIdx.x < step.copiers) {
    arrival::serve_and_copy(step, pool);
    return;
  }
  const arrival::Turn turn = arrival::turn_of(step, blockIdx.x - step.copiers);
  if (turn.work == Work::kDownOfHit) {
    arrival::wait_through(step, turn.pair);
    const unsigned end = min((turn.block + 1) * kDownRuns * kRowTiles, row_tiles(sizes.hidden));
#pragma unroll 1
    for (unsigned tile = turn.block * kDownRuns * kRowTiles; tile < end; tile += kRowTiles) {
      down_tiles<kFormat>(sizes, h, pool, step.hit_slots[turn.pair], &turn.pair, 1, tile, partial, y);
    }
  } else if (turn.work != Work::kNothing) {
    const bool hit = turn.work == Work::kHit;
    const int slot = hit ? step.hit_slots[turn.pair] : arrival::arrived_slot(step, turn, &shared_slot);
    gate_up_tile<kFormat, true>(sizes, x, pool, slot, &turn.pair, 1, turn.block, partial, h);
    if (hit && turn.is_waited_for) {
      arrival::tell_through(step, turn.pair);
    }
  }
}

/// Grid: (runs of kRowTiles row tiles of down, T * K).
template <ExpertFormat kFormat, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 2)
    quantised_down_kernel(DecodeSizes sizes, const std::uint16_t* h, const std::int32_t* slots, const void* pool,
                          float* y) {
  __shared__ int pairs[kGrouped ? kMaxPairs : 1];
  __shared__ int shared_count;
  __shared__ float partial[kSplits][kRowTiles][kColumns][kTileRows];
  after_kernel_before();
  const int slot = slots[blockIdx.y];
  const int count = pairs_of_block<kGrouped>(slots, sizes.num_pairs, slot, pairs, &shared_count);
  down_tiles<kFormat>(sizes, h, pool, slot, pairs, count, blockIdx.x * kRowTiles, partial, y);
}

/// Grid: (row tiles of down, T). Warps take the splits of the token's experts by turns.
template <ExpertFormat kFormat>
__global__ void __launch_bounds__(kFusedWarps* kDecodeWarp)
    quantised_down_combine_kernel(DecodeSizes sizes, const std::uint16_t* h, const std::int32_t* slots,
                                  const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                                  std::uint16_t* out, const std::int32_t* hit_slots) {
  __shared__ float partial[kDecodeMaxTopK][kSplits][kTileRows];
  __shared__ float products[kDecodeMaxTopK][kTileRows];
  __shared__ float shares[kDecodeMaxTopK];
  __shared__ bool counts[kDecodeMaxTopK];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kDecodeWarp;
  const std::size_t first_pair = static_cast<std::size_t>(blockIdx.y) * sizes.top_k;
  const std::size_t groups = (sizes.expert_hidden + kTileInputs - 1) / kTileInputs;
  after_kernel_before();
  const bool has_hits = y != nullptr && hits_are_done(hit_slots, sizes.top_k);
  const auto slot_of = [&](int k) { return has_hits && hit_slots[k] >= 0 ? -1 : slots[first_pair + k]; };
  // What the products do not need is asked for before them.
  const int row = thread % kTileRows;
  const int i = static_cast<int>(blockIdx.x) * kTileRows + row;
  const std::size_t out_at = static_cast<std::size_t>(blockIdx.y) * sizes.hidden + i;
  const bool is_out = thread < kTileRows && i < sizes.hidden;
  const float before = is_out ? residual_at(residual, out_at) : 0.0F;
  if (thread < sizes.top_k) {
    shares[thread] = weights[first_pair + thread];
    counts[thread] = y != nullptr || slots[first_pair + thread] >= 0;
  }
  for (int k = thread / kTileRows; k < sizes.top_k; k += kFusedWarps * kDecodeWarp / kTileRows) {
    if (y != nullptr && i < sizes.hidden && slot_of(k) < 0) {
      products[k][row] = y[(first_pair + k) * sizes.hidden + i];
    }
  }
  for (int item = thread / kDecodeWarp; item < sizes.top_k * kSplits; item += kFusedWarps) {
    const int k = item / kSplits;
    const int slot = slot_of(k);
    if (slot >= 0) {
      const Matrix of[1] = {matrix(pool, sizes, slot, sizes.blob.down, sizes.blob.down_scales)};
      const std::size_t first_tiles[1] = {blockIdx.x * groups};
      const std::uint16_t* const column = lane < 4 ? h + (first_pair + k) * sizes.expert_hidden : nullptr;
      float sums[1][4];
      multiply_groups<kFormat, 1, false>(of, first_tiles, column, sizes.expert_hidden, item % kSplits, sums);
      if (lane % 4 == 0) {
        partial[k][item % kSplits][lane / 4] = sums[0][0];
        partial[k][item % kSplits][lane / 4 + 8] = sums[0][2];
      }
    }
  }
  __syncthreads();
  for (int k = thread / kTileRows; k < sizes.top_k; k += kFusedWarps * kDecodeWarp / kTileRows) {
    if (slot_of(k) >= 0) {
      products[k][row] = sum_of_splits(&partial[k][0][row], kTileRows);
    }
  }
  __syncthreads();
  if (is_out) {
    float sum = 0.0F;
    for (int k = 0; k < sizes.top_k; ++k) {
      if (counts[k]) {
        sum = __fmaf_rn(shares[k], products[k][thread], sum);
      }
    }
    out[out_at] = bfloat16_bits(__fadd_rn(before, sum));
  }
}

/// Calls body.operator()<format>().
template <class Body>
void for_format(ExpertFormat format, const Body& body) {
  if (format == ExpertFormat::kInt8) {
    body.template operator()<ExpertFormat::kInt8>();
  } else if (format == ExpertFormat::kInt4) {
    body.template operator()<ExpertFormat::kInt4>();
  } else {
    body.template operator()<ExpertFormat::kInt4Asymmetric>();
  }
}

}  // namespace

void quantised_gate_up(const DecodeExpertsShape& shape, const std::uint16_t* x, const std::int32_t* slots,
                       const void* pool, std::uint16_t* h, void* stream) {
  const DecodeSizes sizes = decode_sizes(shape);
  const dim3 grid(tiles(sizes.expert_hidden, kTileRows), static_cast<unsigned>(sizes.num_pairs));
  for_format(shape.format, [&]<ExpertFormat kFormat>() {
    auto* const kernel =
        shape.num_tokens == 1 ? quantised_gate_up_kernel<kFormat, false> : quantised_gate_up_kernel<kFormat, true>;
    launch_kernel("quantised_gate_up_kernel", kernel, grid, kThreads, 0, stream, shape.dependent, sizes, x, slots, pool,
                  h);
  });
}

void quantised_fetch_gate_up(const DecodeExpertsShape& shape, const DecodeFetch& fetch, const std::uint16_t* x,
                             void* pool, std::uint16_t* h, float* y, void* stream) {
  const DecodeSizes sizes = decode_sizes(shape);
  const unsigned downs = y != nullptr ? tiles(sizes.hidden, kDownRuns * kRowTiles * kTileRows) : 0;
  const FetchStep step = fetch_step(shape, fetch, tiles(sizes.expert_hidden, kTileRows), downs);
  for_format(shape.format, [&]<ExpertFormat kFormat>() {
    launch_kernel("quantised_fetch_gate_up_kernel", quantised_fetch_gate_up_kernel<kFormat>, dim3(fetch_blocks(step)),
                  kThreads, serving::bytes_of_bits(fetch.cache), stream, shape.dependent, sizes, step, x,
                  static_cast<uint4*>(pool), h, y);
  });
}

void quantised_down(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                    const void* pool, float* y, void* stream) {
  const DecodeSizes sizes = decode_sizes(shape);
  const dim3 grid(tiles(sizes.hidden, kRowTiles * kTileRows), static_cast<unsigned>(sizes.num_pairs));
  for_format(shape.format, [&]<ExpertFormat kFormat>() {
    auto* const kernel =
        shape.num_tokens == 1 ? quantised_down_kernel<kFormat, false> : quantised_down_kernel<kFormat, true>;
    launch_kernel("quantised_down_kernel", kernel, grid, kThreads, 0, stream, shape.dependent, sizes, h, slots, pool,
                  y);
  });
}

void quantised_down_combine(const DecodeExpertsShape& shape, const std::uint16_t* h, const std::int32_t* slots,
                            const void* pool, const float* weights, const float* y, const std::uint16_t* residual,
                            std::uint16_t* out, void* stream, const std::int32_t* hit_slots) {
  const DecodeSizes sizes = decode_sizes(shape);
  const dim3 grid(tiles(sizes.hidden, kTileRows), static_cast<unsigned>(shape.num_tokens));
  for_format(shape.format, [&]<ExpertFormat kFormat>() {
    launch_kernel("quantised_down_combine_kernel", quantised_down_combine_kernel<kFormat>, grid,
                  kFusedWarps * kDecodeWarp, 0, stream, shape.dependent, sizes, h, slots, pool, weights, y, residual,
                  out, hit_slots);
  });
}

}  // namespace hestia
