#include "hestia/kernels/decode_attention.hpp"

#include <algorithm>
#include <cmath>

#include "decode_checks.hpp"
#include "decode_norm.cuh"
#include "dependent.cuh"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kDecodeWarp;
constexpr int kSpan = 32;          // keys of a stretch are a multiple of this
constexpr int kMaxStretches = 32;  // per row and head
constexpr int kBlocks = 256;       // that a row should give the GPU
constexpr int kMaxHeads = 4;       // query heads of a block
constexpr int kKeys = 4;           // that a lane has in flight
constexpr float kLog2E = 1.44269504F;
constexpr float kNothing = -INFINITY;

/// Sum over the block in a fixed order; all threads get it. `parts`: shared, used once.
__device__ float block_sum(float value, float (&parts)[kWarps]) {
  value = decode_warp_sum(value);
  if (threadIdx.x % kDecodeWarp == 0) {
    parts[threadIdx.x / kDecodeWarp] = value;
  }
  __syncthreads();
  float sum = 0.0F;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum = __fadd_rn(sum, parts[warp]);
  }
  return sum;
}

__device__ float rounded(float value) {
  return bfloat16_value(bfloat16_bits(value));
}

/// Grid: (A + 2 G, T). Thread i < d / 2 owns values i and i + d / 2 of the head.
__global__ void __launch_bounds__(kThreads)
    append_kernel(DecodeAttentionShape shape, DecodeAppendInputs in, DecodeKeyValues cache, std::uint16_t* queries) {
  __shared__ float width_parts[kWarps];
  __shared__ float head_parts[kWarps];
  after_kernel_before();
  const int thread = static_cast<int>(threadIdx.x);
  const int d = static_cast<int>(shape.head_dim);
  const int half = d / 2;
  const auto num_heads = static_cast<int>(shape.num_heads);
  const auto num_keys = static_cast<int>(shape.num_key_value_heads);
  const int head = static_cast<int>(blockIdx.x);
  const std::size_t t = blockIdx.y;
  const std::int64_t at = in.position[shape.one_position ? 0 : t];
  if (at < 0 || at >= shape.capacity || at >= shape.num_rotations) {
    return;
  }
  const bool is_query = head < num_heads;
  const bool is_value = head >= num_heads + num_keys;
  const int first_head = is_query ? 0 : is_value ? num_heads + num_keys : num_heads;  // of all queries, keys or values
  const int own = head - first_head;
  const std::uint16_t* const row = in.projected + (t * (num_heads + 2 * num_keys) + first_head) * d;
  const std::uint16_t* const weight = is_query ? in.query_norm : in.key_norm;
  const bool active = thread < half;
  float a = active ? bfloat16_value(row[own * d + thread]) : 0.0F;
  float b = active ? bfloat16_value(row[own * d + half + thread]) : 0.0F;
  const auto scale = [&](float inverse, int offset) {
    if (active) {
      a = rounded(__fmul_rn(rounded(__fmul_rn(a, inverse)), bfloat16_value(weight[offset + thread])));
      b = rounded(__fmul_rn(rounded(__fmul_rn(b, inverse)), bfloat16_value(weight[offset + half + thread])));
    }
  };
  if (!is_value && shape.norm == DecodeHeadNorm::kWidth) {
    const int width = (is_query ? num_heads : num_keys) * d;
    float squares = 0.0F;
    for (int chunk = thread; chunk < width / 8; chunk += kThreads) {
      const uint4 values = reinterpret_cast<const uint4*>(row)[chunk];
      squares = add_products(values, values, squares);
    }
    scale(inverse_rms(block_sum(squares, width_parts), width, shape.norm_eps), own * d);
  }
  if (shape.clip > 0.0F) {
    a = rounded(fminf(fmaxf(a, -shape.clip), shape.clip));
    b = rounded(fminf(fmaxf(b, -shape.clip), shape.clip));
  }
  if (!is_value && shape.norm == DecodeHeadNorm::kHeads) {
    const float squares = block_sum(__fmaf_rn(b, b, __fmul_rn(a, a)), head_parts);
    scale(inverse_rms(squares, d, shape.norm_eps), 0);
  }
  if (!active) {
    return;
  }
  if (!is_value) {
    const float c = bfloat16_value(in.cosine[at * half + thread]);
    const float s = bfloat16_value(in.sine[at * half + thread]);
    const float turned = rounded(__fsub_rn(rounded(__fmul_rn(a, c)), __fmul_rn(b, s)));
    b = rounded(__fadd_rn(rounded(__fmul_rn(b, c)), __fmul_rn(a, s)));
    a = turned;
  }
  std::uint16_t* const target = is_query
                                    ? queries + (t * num_heads + own) * d
                                    : (is_value ? cache.values : cache.keys) +
                                          ((t * num_keys + own) * static_cast<std::size_t>(shape.capacity) + at) * d;
  target[thread] = bfloat16_bits(a);
  target[half + thread] = bfloat16_bits(b);
}

/// How attention is cut into blocks; the same for every T.
struct Cut {
  int heads;      // query heads of a block
  int groups;     // of them per key-value head
  int stretches;  // of keys, at most
};

Cut cut_of(const DecodeAttentionShape& shape) {
  const auto per_key = static_cast<int>(shape.num_heads / shape.num_key_value_heads);
  Cut cut{};
  cut.heads = per_key <= 2 ? per_key : kMaxHeads;
  cut.groups = (per_key + cut.heads - 1) / cut.heads;
  const int blocks = cut.groups * static_cast<int>(shape.num_key_value_heads);
  const auto spans = static_cast<int>((shape.capacity + kSpan - 1) / kSpan);
  cut.stretches = std::clamp((kBlocks + blocks - 1) / blocks, 1, std::min(kMaxStretches, spans));
  return cut;
}

std::size_t aligned(std::size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

struct Workspace {
  unsigned* ended;  // [T, A]; of each block's heads the first counts
  float2* softmax;  // [T, A, stretches]: largest score and sum of shares
  float* mixed;     // [T, A, stretches, d], not yet divided by the sum
};

struct Sizes {
  int num_heads;  // A
  int num_keys;   // G
  int d;
  Cut cut;
  std::int64_t capacity;
  std::int64_t window;
  bool one_position;
  float scale;  // times log2(e): shares are powers of 2
};

/// 2^(score - largest); 0 for nothing at all.
__device__ float share(float score, float largest) {
  return score == kNothing ? 0.0F : exp2f(__fsub_rn(score, largest));
}

__device__ float low(unsigned pair) {
  return __uint_as_float(pair << 16);
}
__device__ float high(unsigned pair) {
  return __uint_as_float(pair & 0xffff0000U);
}

__device__ void unpack(const uint4& bits, float (&values)[8]) {
  values[0] = low(bits.x);
  values[1] = high(bits.x);
  values[2] = low(bits.y);
  values[3] = high(bits.y);
  values[4] = low(bits.z);
  values[5] = high(bits.z);
  values[6] = low(bits.w);
  values[7] = high(bits.w);
}

/// What some lanes or warps have of one head's softmax: the largest score, the sum of shares, 8 values of the mix.
struct Mix {
  float largest = kNothing;
  float total = 0.0F;
  float values[8] = {};
};

/// Grid: (stretches, G * groups, T). kLanes lanes hold a key, 8 values each; those past d hold zeros.
template <int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(Sizes sizes, const std::uint16_t* queries, DecodeKeyValues cache, const std::int64_t* position,
                     const std::uint16_t* sinks, std::uint16_t* out, Workspace workspace) {
  constexpr int kTogether = kDecodeWarp / kLanes;  // keys that a warp reads at once
  constexpr int kStride = kWarps * kTogether;      // keys that the block does
  __shared__ float mixed[kWarps][kHeads][kLanes * 8];
  __shared__ float2 softmax[kWarps][kHeads];
  __shared__ bool last;
  after_kernel_before();
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kDecodeWarp;
  const int lane = thread % kDecodeWarp;
  const int chunk = lane % kLanes;
  const bool active = chunk < sizes.d / 8;
  const std::size_t t = blockIdx.z;
  const int key_head = static_cast<int>(blockIdx.y) / sizes.cut.groups;
  const int per_key = sizes.num_heads / sizes.num_keys;
  const int head_in_key = static_cast<int>(blockIdx.y) % sizes.cut.groups * kHeads;
  const int heads = min(kHeads, per_key - head_in_key);
  const std::size_t first_head = t * sizes.num_heads + key_head * per_key + head_in_key;

  const std::int64_t at = position[sizes.one_position ? 0 : t];
  const std::int64_t end = at < 0 || at >= sizes.capacity ? 0 : at + 1;
  const std::int64_t begin = sizes.window > 0 && end > sizes.window ? end - sizes.window : 0;
  const int visible = static_cast<int>(end - begin);
  const int span = (visible + sizes.cut.stretches * kSpan - 1) / (sizes.cut.stretches * kSpan) * kSpan;
  const int stretches = visible == 0 ? 1 : (visible + span - 1) / span;
  const int stretch = static_cast<int>(blockIdx.x);
  if (stretch >= stretches) {
    return;
  }
  const int num_own = min(span, visible - stretch * span);
  const std::size_t first_key =
      (t * sizes.num_keys + key_head) * static_cast<std::size_t>(sizes.capacity) + begin + stretch * span;
  const int row_chunks = sizes.d / 8;
  const auto* const keys = reinterpret_cast<const uint4*>(cache.keys) + first_key * row_chunks;
  const auto* const values = reinterpret_cast<const uint4*>(cache.values) + first_key * row_chunks;

  float query[kHeads][8];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const std::size_t head = first_head + min(h, heads - 1);
    unpack(active ? reinterpret_cast<const uint4*>(queries)[head * row_chunks + chunk] : make_uint4(0, 0, 0, 0),
           query[h]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      query[h][i] = __fmul_rn(query[h][i], sizes.scale);
    }
  }
  Mix mix[kHeads];
  for (int base = 0; base < num_own; base += kKeys * kStride) {
    uint4 key_bits[kKeys];
    uint4 value_bits[kKeys];
    bool there[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int key = base + k * kStride + warp * kTogether + lane / kLanes;
      there[k] = key < num_own;
      const int source = min(key, num_own - 1) * row_chunks + chunk;
      key_bits[k] = active ? keys[source] : make_uint4(0, 0, 0, 0);
      value_bits[k] = active ? values[source] : make_uint4(0, 0, 0, 0);
    }
    float score[kHeads][kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      float key[8];
      unpack(key_bits[k], key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float sum = 0.0F;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sum = __fmaf_rn(query[h][i], key[i], sum);
        }
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
          sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffU, sum, offset));
        }
        score[h][k] = there[k] ? sum : kNothing;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float largest = mix[h].largest;
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        largest = fmaxf(largest, score[h][k]);
      }
      const float kept = share(mix[h].largest, largest);
      mix[h].largest = largest;
      mix[h].total = __fmul_rn(mix[h].total, kept);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        mix[h].values[i] = __fmul_rn(mix[h].values[i], kept);
      }
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        score[h][k] = share(score[h][k], largest);
        mix[h].total = __fadd_rn(mix[h].total, score[h][k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      float value[8];
      unpack(value_bits[k], value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          mix[h].values[i] = __fmaf_rn(score[h][k], value[i], mix[h].values[i]);
        }
      }
    }
  }
  // The warp's keys together.
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int offset = kLanes; offset < kDecodeWarp; offset *= 2) {
      const float other_largest = __shfl_xor_sync(0xffffffffU, mix[h].largest, offset);
      const float other_total = __shfl_xor_sync(0xffffffffU, mix[h].total, offset);
      const float largest = fmaxf(mix[h].largest, other_largest);
      const float own = share(mix[h].largest, largest);
      const float other = share(other_largest, largest);
      mix[h].largest = largest;
      mix[h].total = __fadd_rn(__fmul_rn(mix[h].total, own), __fmul_rn(other_total, other));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float theirs = __shfl_xor_sync(0xffffffffU, mix[h].values[i], offset);
        mix[h].values[i] = __fadd_rn(__fmul_rn(mix[h].values[i], own), __fmul_rn(theirs, other));
      }
    }
    if (lane < kLanes) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        mixed[warp][h][chunk * 8 + i] = mix[h].values[i];
      }
      if (lane == 0) {
        softmax[warp][h] = make_float2(mix[h].largest, mix[h].total);
      }
    }
  }
  __syncthreads();
  // The block's.
  for (int index = thread; index < heads * sizes.d; index += kThreads) {
    const int h = index / sizes.d;
    const int i = index % sizes.d;
    float largest = kNothing;
#pragma unroll
    for (int part = 0; part < kWarps; ++part) {
      largest = fmaxf(largest, softmax[part][h].x);
    }
    float total = 0.0F;
    float value = 0.0F;
#pragma unroll
    for (int part = 0; part < kWarps; ++part) {
      const float kept = share(softmax[part][h].x, largest);
      total = __fmaf_rn(softmax[part][h].y, kept, total);
      value = __fmaf_rn(mixed[part][h][i], kept, value);
    }
    const std::size_t to = (first_head + h) * sizes.cut.stretches + stretch;
    workspace.mixed[to * sizes.d + i] = value;
    if (i == 0) {
      workspace.softmax[to] = make_float2(largest, total);
    }
  }
  __threadfence();
  __syncthreads();
  unsigned* const ended = workspace.ended + first_head;
  if (thread == 0) {
    last = atomicAdd(ended, 1U) == static_cast<unsigned>(stretches) - 1;
    if (last) {
      *ended = 0;
      __threadfence();
    }
  }
  __syncthreads();
  if (!last) {
    return;
  }
  for (int index = thread; index < heads * sizes.d; index += kThreads) {
    const int h = index / sizes.d;
    const int i = index % sizes.d;
    const std::size_t from = (first_head + h) * sizes.cut.stretches;
    const float sink =
        sinks == nullptr ? kNothing : __fmul_rn(bfloat16_value(sinks[key_head * per_key + head_in_key + h]), kLog2E);
    float largest = sink;
    for (int part = 0; part < stretches; ++part) {
      largest = fmaxf(largest, __ldcg(workspace.softmax + from + part).x);
    }
    float total = share(sink, largest);
    float value = 0.0F;
    for (int part = 0; part < stretches; ++part) {
      const float2 own = __ldcg(workspace.softmax + from + part);
      const float kept = share(own.x, largest);
      total = __fmaf_rn(own.y, kept, total);
      value = __fmaf_rn(__ldcg(workspace.mixed + (from + part) * sizes.d + i), kept, value);
    }
    out[(first_head + h) * sizes.d + i] = bfloat16_bits(visible == 0 ? NAN : __fdiv_rn(value, total));
  }
}

template <int kLanes>
void launch(const DecodeAttentionShape& shape, const Sizes& sizes, const std::uint16_t* queries,
            const DecodeKeyValues& cache, const std::int64_t* position, const std::uint16_t* sinks, std::uint16_t* out,
            const Workspace& workspace, void* stream) {
  const dim3 grid(static_cast<unsigned>(sizes.cut.stretches), static_cast<unsigned>(sizes.num_keys * sizes.cut.groups),
                  static_cast<unsigned>(shape.num_tokens));
  const auto start = [&](auto* kernel) {
    launch_kernel("attention_kernel", kernel, grid, kThreads, 0, stream, shape.dependent, sizes, queries, cache,
                  position, sinks, out, workspace);
  };
  switch (sizes.cut.heads) {
    case 1:
      start(attention_kernel<kLanes, 1>);
      break;
    case 2:
      start(attention_kernel<kLanes, 2>);
      break;
    default:
      start(attention_kernel<kLanes, kMaxHeads>);
  }
}

}  // namespace

void decode_append_cuda(const DecodeAttentionShape& shape, const DecodeAppendInputs& in, const DecodeKeyValues& cache,
                        std::uint16_t* queries, void* stream) {
  check_decode_append(shape);
  const dim3 grid(static_cast<unsigned>(shape.num_heads + 2 * shape.num_key_value_heads),
                  static_cast<unsigned>(shape.num_tokens));
  launch_kernel("append_kernel", append_kernel, grid, kThreads, 0, stream, shape.dependent, shape, in, cache, queries);
}

std::size_t decode_attention_workspace(const DecodeAttentionShape& shape) {
  check_decode_attention(shape);
  const std::size_t heads = static_cast<std::size_t>(shape.num_tokens) * static_cast<std::size_t>(shape.num_heads);
  const std::size_t parts = heads * static_cast<std::size_t>(cut_of(shape).stretches);
  return aligned(heads * sizeof(unsigned)) + aligned(parts * sizeof(float2)) +
         parts * static_cast<std::size_t>(shape.head_dim) * sizeof(float);
}

void decode_attention_cuda(const DecodeAttentionShape& shape, const std::uint16_t* queries,
                           const DecodeKeyValues& cache, const std::int64_t* position, const std::uint16_t* sinks,
                           std::uint16_t* out, void* workspace, void* stream) {
  check_decode_scores(shape);
  const Sizes sizes{static_cast<int>(shape.num_heads),
                    static_cast<int>(shape.num_key_value_heads),
                    static_cast<int>(shape.head_dim),
                    cut_of(shape),
                    shape.capacity,
                    shape.window,
                    shape.one_position,
                    shape.scale * kLog2E};
  const std::size_t heads = static_cast<std::size_t>(shape.num_tokens) * static_cast<std::size_t>(shape.num_heads);
  auto* const bytes = static_cast<unsigned char*>(workspace);
  const std::size_t softmax_at = aligned(heads * sizeof(unsigned));
  const std::size_t mixed_at =
      softmax_at + aligned(heads * static_cast<std::size_t>(sizes.cut.stretches) * sizeof(float2));
  const Workspace parts{reinterpret_cast<unsigned*>(bytes), reinterpret_cast<float2*>(bytes + softmax_at),
                        reinterpret_cast<float*>(bytes + mixed_at)};
  const auto start = [&](auto* launcher) {
    launcher(shape, sizes, queries, cache, position, sinks, out, parts, stream);
  };
  if (sizes.d <= 32) {
    start(launch<4>);
  } else if (sizes.d <= 64) {
    start(launch<8>);
  } else if (sizes.d <= 128) {
    start(launch<16>);
  } else {
    start(launch<32>);
  }
}

}  // namespace hestia
