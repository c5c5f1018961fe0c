#include "hestia/kernels/decode_linear.hpp"

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
constexpr int kStepChunks = 4;  // chunks of 8 values of H that a warp takes in one step
constexpr int kMaxRows = static_cast<int>(kDecodeMaxRows);
constexpr int kFewTiles = 2 * 132;             // below, blocks are scarce and each keeps more loads in flight
constexpr std::size_t kMaxShared = 40 * 1024;  // bytes of normalised rows that a block keeps

/// What is done to x: nothing; normalised by the block once, into shared memory; where that is too small, normalised by
/// every warp as it goes. The bits do not depend on which of the last two.
enum class Input { kPlain, kNormalised, kNormalisedEach };

struct Sizes {
  int num_tokens;   // T
  int chunks;       // H / 8
  int output_size;  // N
  int warp_steps;   // of a warp; even, so that warps part at lines of 128 bytes
  DecodeNorm norm;
  float norm_eps;
};

/// Sums of the squares of kRows rows from `first` on, by the block: each thread its chunks, then each warp, whose sum
/// goes to squares[row][warp]. Rows past the last repeat it.
template <int kRows>
__device__ void sum_squares(const Sizes& sizes, const uint4* x, int first, float (*squares)[kWarps]) {
  const int thread = static_cast<int>(threadIdx.x);
  const uint4* rows[kRows];
  float sums[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rows[r] = x + static_cast<std::size_t>(min(first + r, sizes.num_tokens - 1)) * sizes.chunks;
    sums[r] = 0.0F;
  }
  for (int chunk = thread; chunk < sizes.chunks; chunk += kThreads) {
    uint4 values[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      values[r] = rows[r][chunk];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = add_products(values[r], values[r], sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sums[r] = decode_warp_sum(sums[r]);
    if (thread % kDecodeWarp == 0 && first + r < sizes.num_tokens) {
      squares[first + r][thread / kDecodeWarp] = sums[r];
    }
  }
}

template <int kTiles, int kGroups>
struct Shared {
  static constexpr int kStride = kTiles * kTile + 4;  // spares bank conflicts
  float squares[kMaxRows][kWarps];
  float parts[kWarps][kGroups * kColumns][kStride];
};

/// 1 / rms of row `t` out of sum_squares' sums.
__device__ float inverse_of(const Sizes& sizes, const float (*squares)[kWarps], int t) {
  float sum = 0.0F;
#pragma unroll
  for (int part = 0; part < kWarps; ++part) {
    sum = __fadd_rn(sum, squares[t][part]);
  }
  return inverse_rms(sum, sizes.chunks * 8, sizes.norm_eps);
}

/// Grid: tiles of kTiles * 16 rows of the weights. Up to kGroups * 8 rows of the step. Each thread keeps the weights of
/// kDepth steps in flight, the first of them from before the norm. Lane l holds chunk l % 4 of each step, of weight
/// rows l / 4 and l / 4 + 8 of a tile and of row l / 4 of a group: the layout of multiply_add's fragments. Dynamic
/// shared memory: the normalised rows, when kNormalised.
template <int kTiles, int kGroups, int kDepth, Input kInput, class Out>
__global__ void __launch_bounds__(kThreads, kTiles* kGroups* kDepth <= 4 ? 3 : 1)
    linear_kernel(Sizes sizes, DecodeLinearInputs in, Out* out) {
  constexpr bool kEach = kInput == Input::kNormalisedEach;
  __shared__ Shared<kTiles, kGroups> shared;
  extern __shared__ uint4 normal[];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kDecodeWarp;
  const int lane = thread % kDecodeWarp;
  const int first_row = static_cast<int>(blockIdx.x) * kTiles * kTile;
  const int first_chunk = warp * sizes.warp_steps * kStepChunks + lane % 4;

  const uint4* weights[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(first_row + m * kTile + half * 8 + lane / 4, sizes.output_size - 1);
      weights[m][half] = reinterpret_cast<const uint4*>(in.weight) + static_cast<std::size_t>(row) * sizes.chunks;
    }
  }
  const auto chunk_of = [&](int step) { return first_chunk + step * kStepChunks; };
  const auto within = [&](int step) { return step < sizes.warp_steps && chunk_of(step) < sizes.chunks; };
  const auto load_step = [&](int step, uint4(&w)[kTiles][2]) {
    const bool there = within(step);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w[m][half] = there ? load_weights(weights[m][half] + chunk_of(step)) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  uint4 w[kDepth][kTiles][2];
#pragma unroll
  for (int s = 0; s < kDepth; ++s) {
    load_step(s, w[s]);
  }
  const auto* const norm_weight = reinterpret_cast<const uint4*>(in.norm_weight);
  uint4 first_scale = make_uint4(0, 0, 0, 0);
  if constexpr (kInput == Input::kNormalised) {
    first_scale = norm_weight[thread % sizes.chunks];
  }
  after_kernel_before();

  const int first_t = thread / (kTiles * kTile);  // of the thread's first sum
  const int first_n = first_row + thread % (kTiles * kTile);
  float first_residual = 0.0F;
  if (in.residual != nullptr && first_t < sizes.num_tokens && first_n < sizes.output_size) {
    first_residual = bfloat16_value(in.residual[static_cast<std::size_t>(first_t) * sizes.output_size + first_n]);
  }
  const auto* const x = reinterpret_cast<const uint4*>(in.x);
  if constexpr (kInput != Input::kPlain) {
    if (sizes.num_tokens == 1) {
      sum_squares<1>(sizes, x, 0, shared.squares);
    } else {
      for (int first = 0; first < sizes.num_tokens; first += 4) {
        sum_squares<4>(sizes, x, first, shared.squares);
      }
    }
    __syncthreads();
  }
  if constexpr (kInput == Input::kNormalised) {
    for (int i = thread; i < sizes.num_tokens * sizes.chunks; i += kThreads) {
      const uint4 scale = i == thread ? first_scale : norm_weight[i % sizes.chunks];
      normal[i] = normalised(x[i], scale, inverse_of(sizes, shared.squares, i / sizes.chunks), sizes.norm);
    }
    __syncthreads();
  }
  const uint4* rows[kGroups];
  float inverse[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int t = min(g * kColumns + lane / 4, sizes.num_tokens - 1);
    const std::size_t first = static_cast<std::size_t>(t) * sizes.chunks;
    if constexpr (kInput == Input::kNormalised) {
      rows[g] = normal + first;
    } else {
      rows[g] = x + first;
    }
    inverse[g] = kEach ? inverse_of(sizes, shared.squares, t) : 0.0F;
  }

  float sums[2][kTiles][kGroups][4] = {};  // two, so that products wait less for one another
  for (int base = 0; base < sizes.warp_steps; base += kDepth) {
    uint4 values[kDepth][kGroups];
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      const bool there = within(base + s);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        values[s][g] = there ? rows[g][chunk_of(base + s)] : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      uint4 scale = make_uint4(0, 0, 0, 0);
      if constexpr (kEach) {
        if (within(base + s)) {
          scale = norm_weight[chunk_of(base + s)];
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint4 v = kEach ? normalised(values[s][g], scale, inverse[g], sizes.norm) : values[s][g];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const uint4& a = w[s][m][0];
          const uint4& b = w[s][m][1];
          multiply_add(sums[0][m][g], a.x, b.x, a.y, b.y, v.x, v.y);
          multiply_add(sums[1][m][g], a.z, b.z, a.w, b.w, v.z, v.w);
        }
      }
      load_step(base + kDepth + s, w[s]);
    }
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared.parts[warp][g * kColumns + lane % 4 * 2 + i % 2][m * kTile + i / 2 * 8 + lane / 4] =
            __fadd_rn(sums[0][m][g][i], sums[1][m][g][i]);
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < sizes.num_tokens * kTiles * kTile; i += kThreads) {
    const int t = i / (kTiles * kTile);
    const int row = i % (kTiles * kTile);
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
      sum = __fadd_rn(i == thread ? first_residual : bfloat16_value(in.residual[at]), sum);
    }
    if constexpr (sizeof(Out) == sizeof(float)) {
      out[at] = sum;
    } else {
      out[at] = bfloat16_bits(sum);
    }
  }
}

template <int kTiles, int kGroups, int kDepth, class Out>
void launch(const Sizes& sizes, const DecodeLinearInputs& in, Out* out, void* stream, bool dependent) {
  const int rows = kTiles * kTile;
  const auto grid = static_cast<unsigned>((sizes.output_size + rows - 1) / rows);
  const auto start = [&](auto* kernel, std::size_t shared) {
    launch_kernel("linear_kernel", kernel, grid, kThreads, shared, stream, dependent, sizes, in, out);
  };
  if (in.norm_weight == nullptr) {
    start(linear_kernel<kTiles, kGroups, kDepth, Input::kPlain, Out>, 0);
    return;
  }
  if constexpr (kGroups == 1) {
    const std::size_t normalised = static_cast<std::size_t>(sizes.num_tokens) * sizes.chunks * sizeof(uint4);
    if (normalised <= kMaxShared) {
      start(linear_kernel<kTiles, kGroups, kDepth, Input::kNormalised, Out>, normalised);
      return;
    }
  }
  start(linear_kernel<kTiles, kGroups, kDepth, Input::kNormalisedEach, Out>, 0);
}

template <class Out>
void linear(const DecodeLinearShape& shape, const DecodeLinearInputs& in, Out* out, void* stream) {
  check_decode_linear(shape);
  const auto chunks = static_cast<int>(shape.input_size / 8);
  const int steps = (chunks + kStepChunks - 1) / kStepChunks;
  const Sizes sizes{static_cast<int>(shape.num_tokens),          chunks,     static_cast<int>(shape.output_size),
                    (steps + 2 * kWarps - 1) / (2 * kWarps) * 2, shape.norm, shape.norm_eps};
  const bool few = shape.output_size <= kFewTiles * kTile;
  if (shape.num_tokens <= kColumns) {
    few ? launch<1, 1, 8>(sizes, in, out, stream, shape.dependent)
        : launch<1, 1, 4>(sizes, in, out, stream, shape.dependent);
  } else if (shape.num_tokens <= 2 * kColumns) {
    few ? launch<1, 2, 8>(sizes, in, out, stream, shape.dependent)
        : launch<2, 2, 4>(sizes, in, out, stream, shape.dependent);
  } else {
    few ? launch<1, 4, 8>(sizes, in, out, stream, shape.dependent)
        : launch<2, 4, 4>(sizes, in, out, stream, shape.dependent);
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
