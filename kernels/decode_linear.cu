#include "hestia/kernels/decode_linear.hpp"

#include <stdexcept>
#include <string>

#include "decode_checks.hpp"
#include "decode_mma.cuh"
#include "decode_norm.cuh"
#include "dependent.cuh"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kWarps = 8;  // of a block; each takes a part of H, so their number is part of a result's bits
constexpr int kThreads = kWarps * kDecodeWarp;
constexpr int kTile = kMmaRows;
constexpr int kColumns = kMmaColumns;
constexpr int kStepChunks = 4;                 // chunks of 8 values of H that a warp takes in one step
constexpr int kFewTiles = 132;                 // up to one block per multiprocessor, each has more loads in flight
constexpr int kBlocks = 3;                     // per multiprocessor, of more tiles
constexpr int kLinesAhead = 2;                 // per lane; all blocks that run at once ask for half of L2
constexpr int kFewDepth = 8;                   // steps in flight of these
constexpr std::size_t kMaxShared = 40 * 1024;  // bytes of rows that a block normalises itself
constexpr int kMaxOwnRows = 2;                 // of them; more are normalised once, by a kernel before

struct Sizes {
  int num_tokens;   // T
  int chunks;       // H / 8
  int output_size;  // N
  int warp_steps;   // of a warp; even, so that warps part at lines of 128 bytes
  DecodeNorm norm;
  float norm_eps;
  bool dependent;  // DecodeLinearShape::dependent
};

template <int kGroups>
struct Shared {
  static constexpr int kStride = kTile + 4;  // spares bank conflicts
  float squares[kMaxOwnRows][kWarps];
  float parts[kWarps][kGroups * kColumns][kStride];
};

/// Grid: rows. What the blocks of linear_kernel do where they normalise themselves, with the same bits. The product
/// behind it may start at once: before it waits it reads weights alone, which no kernel writes.
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(Sizes sizes, const std::uint16_t* x, const std::uint16_t* weight, std::uint16_t* normal) {
  __shared__ float squares[kWarps];
  let_next_start();
  after_kernel_before();
  const int size = sizes.chunks * 8;
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * size;
  block_rms_norm<kThreads>(x + first, weight, size, sizes.norm_eps, sizes.norm, normal + first, squares);
}

/// Brings what the warp reads of its tile behind its first kDepth steps into L2, as far as kLinesAhead goes.
template <int kDepth>
__device__ void prefetch_steps(const Sizes& sizes, const std::uint16_t* weight, int first_row, int warp, int lane) {
  constexpr int kLineChunks = kLine / static_cast<int>(sizeof(uint4));
  const int row = first_row + lane % kTile;
  const int begin = warp * sizes.warp_steps * kStepChunks;
  const int end = min(begin + sizes.warp_steps * kStepChunks, sizes.chunks);
#pragma unroll
  for (int i = 0; i < kLinesAhead; ++i) {
    const int line = i * (kDecodeWarp / kTile) + lane / kTile;
    const int chunk = begin + kDepth * kStepChunks + line * kLineChunks;
    if (chunk < end && row < sizes.output_size) {
      prefetch_line(reinterpret_cast<const uint4*>(weight) + static_cast<std::size_t>(row) * sizes.chunks + chunk);
    }
  }
}

/// Grid: tiles of 16 rows of the weights. Up to kGroups * 8 rows of the step. Each thread keeps the weights of kDepth
/// steps in flight, the first of them from before the norm, and kHeld chunks of the rows. Lane l holds chunk l % 4 of
/// each step, of weight rows l / 4 and l / 4 + 8 and of row l / 4 of a group: the layout of multiply_add's fragments.
/// kNormed: the block normalises the rows first, into dynamic shared memory.
template <int kGroups, int kDepth, int kHeld, bool kNormed, class Out>
__global__ void __launch_bounds__(kThreads, kDepth < kFewDepth ? kBlocks : 1)
    linear_kernel(Sizes sizes, DecodeLinearInputs in, Out* out) {
  static_assert(kDepth * kGroups % kHeld == 0);
  constexpr bool kFew = kDepth == kFewDepth;
  constexpr bool kWeightsFirst = kGroups > 1 && !kFew;  // the order in which the compiler spills nothing
  __shared__ Shared<kGroups> shared;
  extern __shared__ uint4 normal[];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kDecodeWarp;
  const int lane = thread % kDecodeWarp;
  const int first_row = static_cast<int>(blockIdx.x) * kTile;
  const int first_chunk = warp * sizes.warp_steps * kStepChunks + lane % 4;
  const int chunks = min(sizes.chunks - first_chunk, sizes.warp_steps * kStepChunks);  // from the lane's first on

  const uint4* weights[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(first_row + half * 8 + lane / 4, sizes.output_size - 1);
    weights[half] =
        reinterpret_cast<const uint4*>(in.weight) + static_cast<std::size_t>(row) * sizes.chunks + first_chunk;
  }
  // left: chunks of the lane from where `weights` and `x` point.
  const auto load_step = [&](int left, int step, uint4(&w)[2]) {
    const bool there = step * kStepChunks < left;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      w[half] = there ? load_weights(weights[half] + step * kStepChunks) : make_uint4(0, 0, 0, 0);
    }
  };
  uint4 w[kDepth][2];
#pragma unroll
  for (int s = 0; s < kDepth; ++s) {
    load_step(chunks, s, w[s]);
  }
  if (sizes.dependent && blockIdx.x < kBlocks * kFewTiles) {
    prefetch_steps<kDepth>(sizes, in.weight, first_row, warp, lane);
  }
  after_kernel_before();

  const int first_t = thread / kTile;  // of the thread's first sum
  const int first_n = first_row + thread % kTile;
  float first_residual = 0.0F;
  if (kFew && in.residual != nullptr && first_t < sizes.num_tokens && first_n < sizes.output_size) {
    first_residual = bfloat16_value(in.residual[static_cast<std::size_t>(first_t) * sizes.output_size + first_n]);
  }
  if constexpr (kNormed) {
    for (int t = 0; t < sizes.num_tokens; ++t) {
      const std::size_t first = static_cast<std::size_t>(t) * sizes.chunks;
      block_rms_norm<kThreads>(in.x + first * 8, in.norm_weight, sizes.chunks * 8, sizes.norm_eps, sizes.norm,
                               reinterpret_cast<std::uint16_t*>(normal + first), shared.squares[t]);
    }
    __syncthreads();
  }
  // Rows past the last are zeros; nobody reads their products.
  const uint4* x = (kNormed ? normal : reinterpret_cast<const uint4*>(in.x)) + lane / 4 * sizes.chunks + first_chunk;
  const int stride = kColumns * sizes.chunks;
  const auto value = [&](int left, int number) {
    const int step = number / kGroups;
    const int g = number % kGroups;
    const bool there = step * kStepChunks < left && g * kColumns + lane / 4 < sizes.num_tokens;
    return there ? x[g * stride + step * kStepChunks] : make_uint4(0, 0, 0, 0);
  };
  uint4 values[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    values[i] = value(chunks, i);
  }

  float sums[2][kGroups][4] = {};  // two, so that products wait less for one another
  int left = chunks;
  int steps = sizes.warp_steps;
#pragma unroll 1
  do {
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      const uint4 a = w[s][0];
      const uint4 b = w[s][1];
      if constexpr (kWeightsFirst) {
        load_step(left, kDepth + s, w[s]);
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int number = s * kGroups + g;
        uint4& v = values[number % kHeld];
        multiply_add(sums[0][g], a.x, b.x, a.y, b.y, v.x, v.y);
        multiply_add(sums[1][g], a.z, b.z, a.w, b.w, v.z, v.w);
        v = value(left, number + kHeld);
      }
      if constexpr (!kWeightsFirst) {
        load_step(left, kDepth + s, w[s]);
      }
    }
    weights[0] += kDepth * kStepChunks;
    weights[1] += kDepth * kStepChunks;
    x += kDepth * kStepChunks;
    left -= kDepth * kStepChunks;
    steps -= kDepth;
  } while (steps > 0);

#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared.parts[warp][g * kColumns + lane % 4 * 2 + i % 2][i / 2 * 8 + lane / 4] =
          __fadd_rn(sums[0][g][i], sums[1][g][i]);
    }
  }
  __syncthreads();
  for (int i = thread; i < sizes.num_tokens * kTile; i += kThreads) {
    const int t = i / kTile;
    const int row = i % kTile;
    const int n = first_row + row;
    if (n >= sizes.output_size) {
      continue;
    }
    float sum = 0.0F;
#pragma unroll
    for (int part = 0; part < kWarps; ++part) {
      sum = __fadd_rn(sum, shared.parts[part][t][row]);
    }
    if (in.bias != nullptr) {
      sum = __fadd_rn(sum, bfloat16_value(in.bias[n]));
    }
    const std::size_t at = static_cast<std::size_t>(t) * sizes.output_size + n;
    if (in.residual != nullptr) {
      sum = __fadd_rn(kFew && i == thread ? first_residual : bfloat16_value(in.residual[at]), sum);
    }
    if constexpr (sizeof(Out) == sizeof(float)) {
      out[at] = sum;
    } else {
      out[at] = bfloat16_bits(sum);
    }
  }
}

std::size_t row_bytes(const Sizes& sizes) {
  return static_cast<std::size_t>(sizes.chunks) * sizeof(uint4);
}

template <int kGroups, int kDepth, int kHeld, class Out>
void launch(const Sizes& sizes, const DecodeLinearInputs& in, Out* out, void* stream, bool dependent) {
  const auto grid = static_cast<unsigned>((sizes.output_size + kTile - 1) / kTile);
  const auto start = [&](auto* kernel, std::size_t shared) {
    launch_kernel("linear_kernel", kernel, grid, kThreads, shared, stream, dependent, sizes, in, out);
  };
  if constexpr (kGroups == 1) {
    if (in.norm_weight != nullptr) {
      start(linear_kernel<kGroups, kDepth, kHeld / 2, true, Out>,  // shared memory is near
            row_bytes(sizes) * static_cast<std::size_t>(sizes.num_tokens));
      return;
    }
  }
  start(linear_kernel<kGroups, kDepth, kHeld, false, Out>, 0);
}

template <class Out>
void linear(const DecodeLinearShape& shape, DecodeLinearInputs in, Out* out, void* stream) {
  check_decode_linear(shape);
  const auto chunks = static_cast<int>(shape.input_size / 8);
  const int steps = (chunks + kStepChunks - 1) / kStepChunks;
  const Sizes sizes{static_cast<int>(shape.num_tokens),
                    chunks,
                    static_cast<int>(shape.output_size),
                    (steps + 2 * kWarps - 1) / (2 * kWarps) * 2,
                    shape.norm,
                    shape.norm_eps,
                    shape.dependent};
  if (in.norm_weight != nullptr &&
      (sizes.num_tokens > kMaxOwnRows || row_bytes(sizes) * static_cast<std::size_t>(sizes.num_tokens) > kMaxShared)) {
    if (in.normal == nullptr) {
      throw std::invalid_argument("decode linear: " + std::to_string(shape.num_tokens) + " rows of " +
                                  std::to_string(shape.input_size) + " values are normalised into `normal`, got null");
    }
    launch_kernel("normalise_kernel", normalise_kernel, static_cast<unsigned>(sizes.num_tokens), kThreads, 0, stream,
                  shape.dependent, sizes, in.x, in.norm_weight, in.normal);
    in.x = in.normal;
    in.norm_weight = nullptr;
  }
  const bool few = shape.output_size <= kFewTiles * kTile;
  if (shape.num_tokens <= kColumns) {
    few ? launch<1, kFewDepth, 8>(sizes, in, out, stream, shape.dependent)
        : launch<1, 4, 4>(sizes, in, out, stream, shape.dependent);
  } else if (shape.num_tokens <= 2 * kColumns) {
    few ? launch<2, kFewDepth, 16>(sizes, in, out, stream, shape.dependent)
        : launch<2, 4, 2>(sizes, in, out, stream, shape.dependent);
  } else {
    few ? launch<4, kFewDepth, 16>(sizes, in, out, stream, shape.dependent)
        : launch<4, 2, 4>(sizes, in, out, stream, shape.dependent);
  }
}

}  // namespace

void decode_linear_cuda(const DecodeLinearShape& shape, const DecodeLinearInputs& in, std::uint16_t* out,
                        void* stream) {
  linear(shape, in, out, stream);
}

void decode_linear_cuda(const DecodeLinearShape& shape, const DecodeLinearInputs& in, float* out, void* stream) {
  linear(shape, in, out, stream);
}

}  // namespace hestia
