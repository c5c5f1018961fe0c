#include <algorithm>
#include <cstdint>

#include "decode_pairs.cuh"
#include "expert_layout.hpp"
#include "hestia/kernels/expert_formats.hpp"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kRun = 8;  // inputs of a row that a thread writes at once
constexpr int kRuns = kTileInputs / kRun;
constexpr int kThreads = kTileRows * kRuns;

/// A matrix of a blob before and after: byte offsets, and its sizes.
struct Matrix {
  std::size_t values;
  std::size_t scales;
  std::size_t out;
  int rows;
  int inputs;
};

struct Matrices {
  Matrix of[3];
  std::size_t blob_bytes;
  std::size_t out_bytes;
};

/// w' of one weight: expert_formats.cpp has the same. Products of an integer and a scale are exact.
template <ExpertFormat kFormat>
__device__ float weight(const unsigned char* tile, const TilePlace& place, float scale, float minimum) {
  const unsigned byte = tile[place.byte];
  if constexpr (kFormat == ExpertFormat::kInt8) {
    return __fmul_rn(static_cast<float>(static_cast<signed char>(byte)), scale);
  } else {
    const float integer = static_cast<float>(place.high ? byte >> 4 : byte & 15U);
    if constexpr (kFormat == ExpertFormat::kInt4) {
      return __fmul_rn(integer - 8.0F, scale);
    } else {
      return __fadd_rn(minimum, __fmul_rn(integer, scale));
    }
  }
}

/// Grid: (tiles of the largest matrix, blobs, the three matrices). Thread: a run of one row of the tile.
template <ExpertFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    dequantise_kernel(Matrices matrices, const unsigned char* pool, const std::int32_t* blobs, unsigned char* out) {
  const Matrix& matrix = matrices.of[blockIdx.z];
  const int groups = (matrix.inputs + kTileInputs - 1) / kTileInputs;
  const int tile = static_cast<int>(blockIdx.x);
  const int in_tile = static_cast<int>(threadIdx.x) / kRuns;
  const int in_group = static_cast<int>(threadIdx.x) % kRuns * kRun;
  const int row = tile / groups * kTileRows + in_tile;
  const int input = tile % groups * kTileInputs + in_group;
  const int blob = blobs == nullptr ? static_cast<int>(blockIdx.y) : blobs[blockIdx.y];
  if (blob < 0 || row >= matrix.rows || input >= matrix.inputs) {
    return;
  }
  const unsigned char* const packed = pool + static_cast<std::size_t>(blob) * matrices.blob_bytes;
  const unsigned char* const values =
      packed + matrix.values + static_cast<std::size_t>(tile) * tile_loads(kFormat) * kTileLoad;
  const auto* const scales = reinterpret_cast<const std::uint16_t*>(
      packed + matrix.scales + (static_cast<std::size_t>(tile) * kTileRows + in_tile) * scale_bytes(kFormat));
  const float scale = bfloat16_value(scales[0]);
  const float minimum = kFormat == ExpertFormat::kInt4Asymmetric ? bfloat16_value(scales[1]) : 0.0F;
  std::uint16_t weights[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    weights[i] = bfloat16_bits(weight<kFormat>(values, tile_place(kFormat, in_tile, in_group + i), scale, minimum));
  }
  const auto pair = [&](int i) { return weights[i] | static_cast<unsigned>(weights[i + 1]) << 16; };
  unsigned char* const at = out + static_cast<std::size_t>(blockIdx.y) * matrices.out_bytes + matrix.out +
                            (static_cast<std::size_t>(row) * matrix.inputs + input) * sizeof(std::uint16_t);
  *reinterpret_cast<uint4*>(at) = make_uint4(pair(0), pair(2), pair(4), pair(6));
}

/// bfloat16 blobs by number.
__global__ void copy_blobs_kernel(std::size_t blob_bytes, const unsigned char* pool, const std::int32_t* blobs,
                                  unsigned char* out) {
  const int blob = blobs == nullptr ? static_cast<int>(blockIdx.y) : blobs[blockIdx.y];
  if (blob < 0) {
    return;
  }
  const auto* const from = reinterpret_cast<const uint4*>(pool + static_cast<std::size_t>(blob) * blob_bytes);
  auto* const to = reinterpret_cast<uint4*>(out + static_cast<std::size_t>(blockIdx.y) * blob_bytes);
  const std::size_t count = blob_bytes / sizeof(uint4);
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<std::size_t>(gridDim.x) * blockDim.x) {
    to[i] = from[i];
  }
}

}  // namespace

void dequantise_experts_cuda(const DecodeExpertsShape& shape, const void* pool, const std::int32_t* blobs,
                             std::int64_t count, void* out, void* stream) {
  check_dequantise_count(count);
  const ExpertBlob from = expert_blob(shape);
  DecodeExpertsShape wide = shape;
  wide.format = ExpertFormat::kBfloat16;
  const ExpertBlob to = expert_blob(wide);
  if (count == 0) {
    return;
  }
  const int hidden = static_cast<int>(shape.hidden_size);
  const int expert_hidden = static_cast<int>(shape.expert_hidden_size);
  const Matrices matrices{{{from.gate, from.gate_scales, to.gate, expert_hidden, hidden},
                           {from.up, from.up_scales, to.up, expert_hidden, hidden},
                           {from.down, from.down_scales, to.down, hidden, expert_hidden}},
                          from.bytes,
                          to.bytes};
  unsigned most = 0;
  for (const Matrix& matrix : matrices.of) {
    const TileCounts counts = tile_counts(matrix.rows, matrix.inputs);
    most = std::max(most, static_cast<unsigned>(counts.rows * counts.groups));
  }
  const dim3 grid(most, static_cast<unsigned>(count), 3);
  const auto* const packed = static_cast<const unsigned char*>(pool);
  auto* const weights = static_cast<unsigned char*>(out);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (shape.format) {
    case ExpertFormat::kBfloat16:
      copy_blobs_kernel<<<dim3(64, grid.y), kThreads, 0, on>>>(from.bytes, packed, blobs, weights);
      break;
    case ExpertFormat::kInt8:
      dequantise_kernel<ExpertFormat::kInt8><<<grid, kThreads, 0, on>>>(matrices, packed, blobs, weights);
      break;
    case ExpertFormat::kInt4:
      dequantise_kernel<ExpertFormat::kInt4><<<grid, kThreads, 0, on>>>(matrices, packed, blobs, weights);
      break;
    case ExpertFormat::kInt4Asymmetric:
      dequantise_kernel<ExpertFormat::kInt4Asymmetric><<<grid, kThreads, 0, on>>>(matrices, packed, blobs, weights);
      break;
  }
  check_launch("dequantise_kernel");
}

}  // namespace hestia
