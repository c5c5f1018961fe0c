#include "hestia/kernels/decode_attention.hpp"

#include <algorithm>
#include <cmath>

#include "block_signals.cuh"
#include "decode_checks.hpp"
#include "decode_norm.cuh"
#include "dependent.cuh"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kDecodeWarp;
constexpr int kSpan = 32;             // keys of a stretch are a multiple of this
constexpr int kMaxStretches = 32;     // per row and head
constexpr int kBlocks = 256;          // that a row should give the GPU, if it comes alone
constexpr int kMostBlocks = 4 * 132;  // more would wait for others to end, and each prepares the same heads again
constexpr int kMaxHeads = 4;          // query heads of a block
constexpr int kKeys = 4;              // that a lane has in flight
constexpr int kPartsHeld = 16;        // stretches' values that a thread has in flight
static_assert(kMaxHeads <= kWarps && kMaxStretches <= kDecodeWarp, "a warp per head, a lane per stretch");
constexpr float kLog2E = 1.44269504F;
constexpr float kNothing = -INFINITY;

/// Each value's sum over the block in a fixed order; all threads get them. `parts`: shared, used once.
template <int kSums>
__device__ void block_sums(float (&values)[kSums], float (*parts)[kWarps]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    values[i] = decode_warp_sum(values[i]);
    if (threadIdx.x % kDecodeWarp == 0) {
      parts[i][threadIdx.x / kDecodeWarp] = values[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    values[i] = 0.0F;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      values[i] = __fadd_rn(values[i], parts[i][warp]);
    }
  }
}

__device__ float rounded(float value) {
  return bfloat16_value(bfloat16_bits(value));
}

/// How attention is cut, whose bits depend on it; the same for every T.
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
  std::int64_t num_rotations;
  std::int64_t window;
  bool one_position;
  float scale;  // times log2(e): shares are powers of 2
  DecodeHeadNorm norm;
  float norm_eps;
  float clip;
};

/// Values i and i + d / 2 of a head, which are rotated together; of thread i < d / 2.
struct Pair {
  float a = 0.0F;
  float b = 0.0F;

  __device__ void load(const std::uint16_t* head, int half) {
    a = bfloat16_value(head[threadIdx.x]);
    b = bfloat16_value(head[half + threadIdx.x]);
  }
  /// To bfloat16 by `by`, then by the norm's weights.
  __device__ void scale(float by, const Pair& weight) {
    a = rounded(__fmul_rn(rounded(__fmul_rn(a, by)), weight.a));
    b = rounded(__fmul_rn(rounded(__fmul_rn(b, by)), weight.b));
  }
  __device__ void clamp(float limit) {
    a = rounded(fminf(fmaxf(a, -limit), limit));
    b = rounded(fminf(fmaxf(b, -limit), limit));
  }
  __device__ void turn(float cosine, float sine) {
    const float turned = rounded(__fsub_rn(rounded(__fmul_rn(a, cosine)), __fmul_rn(b, sine)));
    b = rounded(__fadd_rn(rounded(__fmul_rn(b, cosine)), __fmul_rn(a, sine)));
    a = turned;
  }
  __device__ void store(std::uint16_t* head, int half) const {
    head[threadIdx.x] = bfloat16_bits(a);
    head[half + threadIdx.x] = bfloat16_bits(b);
  }
};

/// The thread's part of the sum of the squares of a row of `width` values.
__device__ float own_squares(const std::uint16_t* row, int width) {
  float sum = 0.0F;
#pragma unroll 4
  for (int chunk = static_cast<int>(threadIdx.x); chunk < width / 8; chunk += kThreads) {
    const uint4 values = reinterpret_cast<const uint4*>(row)[chunk];
    sum = add_products(values, values, sum);
  }
  return sum;
}

/// The heads of a block that the new token brings, its queries and its key, and its value head, which is only clamped.
/// By the block; what does not come from the kernel before may be asked for before that has ended.
template <int kHeads>
struct NewHeads {
  static constexpr int kNew = kHeads + 1;
  Pair weight[kNew];
  float cosine = 0.0F;
  float sine = 0.0F;
  Pair heads[kNew];
  Pair value;

  /// Weights and rotation. `first`: the first query head; those past `count` repeat the last.
  __device__ void prepare(const Sizes& sizes, const DecodeAttentionInputs& in, std::int64_t at, int first, int count,
                          int key_head) {
    const int half = sizes.d / 2;
    if (static_cast<int>(threadIdx.x) >= half) {
      return;
    }
    cosine = bfloat16_value(in.cosine[at * half + threadIdx.x]);
    sine = bfloat16_value(in.sine[at * half + threadIdx.x]);
    if (sizes.norm == DecodeHeadNorm::kNone) {
      return;
    }
    const bool wide = sizes.norm == DecodeHeadNorm::kWidth;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      weight[h].load(in.query_norm + (wide ? (first + min(h, count - 1)) * sizes.d : 0), half);
    }
    weight[kHeads].load(in.key_norm + (wide ? key_head * sizes.d : 0), half);
  }

  /// Normed, clamped and rotated. has_key: key and value, too. `parts`: shared, kNew rows.
  __device__ void compute(const Sizes& sizes, const DecodeAttentionInputs& in, std::size_t t, int first, int count,
                          int key_head, bool has_key, float (*parts)[kWarps]) {
    const int half = sizes.d / 2;
    const bool owns = static_cast<int>(threadIdx.x) < half;
    const std::uint16_t* const queries = in.projected + t * (sizes.num_heads + 2 * sizes.num_keys) * sizes.d;
    const std::uint16_t* const keys = queries + sizes.num_heads * sizes.d;
    if (owns) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        heads[h].load(queries + (first + min(h, count - 1)) * sizes.d, half);
      }
      if (has_key) {
        heads[kHeads].load(keys + key_head * sizes.d, half);
        value.load(keys + (sizes.num_keys + key_head) * sizes.d, half);
      }
    }
    if (sizes.norm == DecodeHeadNorm::kWidth) {
      float squares[2] = {own_squares(queries, sizes.num_heads * sizes.d),
                          has_key ? own_squares(keys, sizes.num_keys * sizes.d) : 0.0F};
      block_sums(squares, parts);
      const float inverse = inverse_rms(squares[0], sizes.num_heads * sizes.d, sizes.norm_eps);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        heads[h].scale(inverse, weight[h]);
      }
      heads[kHeads].scale(inverse_rms(squares[1], sizes.num_keys * sizes.d, sizes.norm_eps), weight[kHeads]);
    }
    if (sizes.clip > 0.0F) {
#pragma unroll
      for (Pair& head : heads) {
        head.clamp(sizes.clip);
      }
      value.clamp(sizes.clip);
    }
    if (sizes.norm == DecodeHeadNorm::kHeads) {
      float squares[kNew];
#pragma unroll
      for (int h = 0; h < kNew; ++h) {
        squares[h] = __fmaf_rn(heads[h].b, heads[h].b, __fmul_rn(heads[h].a, heads[h].a));
      }
      block_sums(squares, parts);
#pragma unroll
      for (int h = 0; h < kNew; ++h) {
        heads[h].scale(inverse_rms(squares[h], sizes.d, sizes.norm_eps), weight[h]);
      }
    }
#pragma unroll
    for (Pair& head : heads) {
      head.turn(cosine, sine);
    }
  }
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

/// Grid: (blocks, G * groups, T); blocks take the stretches by turns, one after the other, or one each: kTurns tells.
/// kLanes lanes hold a key, 8 values each; those past d hold zeros. The keys of earlier tokens are on their way before
/// the kernel before has ended; the new one is that of the last stretch.
template <int kLanes, int kHeads, bool kTurns>
__global__ void __launch_bounds__(kThreads, kHeads == 1 ? 4 : 1)
    attention_kernel(Sizes sizes, DecodeAttentionInputs in, DecodeKeyValues cache, std::uint16_t* out,
                     Workspace workspace) {
  constexpr int kTogether = kDecodeWarp / kLanes;  // keys that a warp reads at once
  constexpr int kStride = kWarps * kTogether;      // keys that the block does
  __shared__ uint4 queries[kHeads][kLanes];
  __shared__ uint4 new_key[kLanes];
  __shared__ uint4 new_value[kLanes];
  __shared__ float norm_parts[NewHeads<kHeads>::kNew][kWarps];
  __shared__ float mixed[kWarps][kHeads][kLanes * 8];
  __shared__ float2 softmax[kWarps][kHeads];
  __shared__ float shares[kHeads][kMaxStretches];
  __shared__ bool last;
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

  const std::int64_t at = in.position[sizes.one_position ? 0 : t];
  const std::int64_t end = at < 0 || at >= sizes.capacity || at >= sizes.num_rotations ? 0 : at + 1;
  const std::int64_t begin = sizes.window > 0 && end > sizes.window ? end - sizes.window : 0;
  const int visible = static_cast<int>(end - begin);
  const int span = (visible + sizes.cut.stretches * kSpan - 1) / (sizes.cut.stretches * kSpan) * kSpan;
  const int stretches = visible == 0 ? 1 : (visible + span - 1) / span;
  const auto first_stretch = static_cast<int>(blockIdx.x);
  const int blocks = min(stretches, static_cast<int>(gridDim.x));  // that have something to do
  if (first_stretch >= blocks) {
    return;
  }
  const bool brings_new = visible > 0 && (stretches - 1) % blocks == first_stretch;
  const int row_chunks = sizes.d / 8;
  const std::size_t first_key = (t * sizes.num_keys + key_head) * static_cast<std::size_t>(sizes.capacity) + begin;
  // Of the stretch that is worked on:
  int num_own = 0;
  int num_old = 0;
  const uint4* keys = nullptr;
  const uint4* values = nullptr;
  const auto go_to = [&](int stretch) {
    num_own = min(span, visible - stretch * span);
    num_old = num_own - (visible > 0 && stretch == stretches - 1 ? 1 : 0);
    const std::size_t from = (first_key + stretch * span) * row_chunks;
    keys = reinterpret_cast<const uint4*>(cache.keys) + from;
    values = reinterpret_cast<const uint4*>(cache.values) + from;
  };
  uint4 key_bits[kKeys];
  uint4 value_bits[kKeys];
  const auto key_of = [&](int base, int k) { return base + k * kStride + warp * kTogether + lane / kLanes; };
  const auto load = [&](int base) {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int key = key_of(base, k);
      const bool there = active && key < num_old;
      key_bits[k] = there ? keys[key * row_chunks + chunk] : make_uint4(0, 0, 0, 0);
      value_bits[k] = there ? values[key * row_chunks + chunk] : make_uint4(0, 0, 0, 0);
    }
  };
  go_to(first_stretch);
  load(0);
  const int first_query = key_head * per_key + head_in_key;
  NewHeads<kHeads> fresh;
  if (visible > 0) {
    fresh.prepare(sizes, in, at, first_query, heads, key_head);
  }
  after_kernel_before();

  if (visible > 0) {
    const int half = sizes.d / 2;
    fresh.compute(sizes, in, t, first_query, heads, key_head, brings_new, norm_parts);
    if (thread < half) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        fresh.heads[h].store(reinterpret_cast<std::uint16_t*>(queries[h]), half);
      }
      if (brings_new) {
        fresh.heads[kHeads].store(reinterpret_cast<std::uint16_t*>(new_key), half);
        fresh.value.store(reinterpret_cast<std::uint16_t*>(new_value), half);
        if (head_in_key == 0) {
          const std::size_t to = (first_key + visible - 1) * sizes.d;
          fresh.heads[kHeads].store(cache.keys + to, half);
          fresh.value.store(cache.values + to, half);
        }
      }
    }
  }
  __syncthreads();
  float query[kHeads][8];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    unpack(active && visible > 0 ? queries[h][chunk] : make_uint4(0, 0, 0, 0), query[h]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      query[h][i] = __fmul_rn(query[h][i], sizes.scale);
    }
  }
  for (int stretch = first_stretch; stretch < stretches; stretch += blocks) {
    Mix mix[kHeads];
    for (int base = 0; base < num_own; base += kKeys * kStride) {
      if (base > 0) {
        load(base);
      }
      bool there[kKeys];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        const int key = key_of(base, k);
        there[k] = key < num_own;
        if (active && key == num_old && key < num_own) {
          key_bits[k] = new_key[chunk];
          value_bits[k] = new_value[chunk];
        }
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
    // The next stretch is on its way while this one ends.
    if (kTurns && stretch + blocks < stretches) {
      go_to(stretch + blocks);
      load(0);
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
    if constexpr (!kTurns) {
      break;
    }
    __syncthreads();  // this one's parts have been read
  }
  __syncthreads();
  unsigned* const ended = workspace.ended + first_head;
  if (thread == 0) {
    last = blocks == 1 || count_and_see(ended) == static_cast<unsigned>(blocks) - 1;
    if (last) {
      *ended = 0;
    }
  }
  __syncthreads();
  if (!last) {
    return;
  }
  // All stretches'. The first values are on their way while a warp of each head finds its stretches' shares.
  float parts[kPartsHeld];
  const auto load_parts = [&](int index, int first) {
    const std::size_t from = (first_head + index / sizes.d) * sizes.cut.stretches;
#pragma unroll
    for (int part = 0; part < kPartsHeld; ++part) {
      parts[part] =
          first + part < stretches ? __ldcg(workspace.mixed + (from + first + part) * sizes.d + index % sizes.d) : 0.0F;
    }
  };
  if (thread < heads * sizes.d) {
    load_parts(thread, 0);
  }
  if (warp < heads) {
    const float sink = in.sinks == nullptr ? kNothing : __fmul_rn(bfloat16_value(in.sinks[first_query + warp]), kLog2E);
    float2 own = make_float2(kNothing, 0.0F);
    if (lane < stretches) {
      own = __ldcg(workspace.softmax + (first_head + warp) * sizes.cut.stretches + lane);
    }
    float largest = fmaxf(own.x, sink);
    for (int offset = kDecodeWarp / 2; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, offset));
    }
    const float kept = share(own.x, largest);
    const float total = __fadd_rn(share(sink, largest), decode_warp_sum(__fmul_rn(own.y, kept)));
    shares[warp][lane] = __fdiv_rn(kept, total);
  }
  __syncthreads();
  for (int index = thread; index < heads * sizes.d; index += kThreads) {
    const int h = index / sizes.d;
    float value = 0.0F;
    for (int first = 0; first < stretches; first += kPartsHeld) {
      if (index != thread || first > 0) {
        load_parts(index, first);
      }
#pragma unroll
      for (int part = 0; part < kPartsHeld; ++part) {
        if (first + part < stretches) {
          value = __fmaf_rn(shares[h][first + part], parts[part], value);
        }
      }
    }
    out[first_head * sizes.d + index] = bfloat16_bits(visible == 0 ? NAN : value);
  }
}

template <int kLanes>
void launch(const DecodeAttentionShape& shape, const Sizes& sizes, const DecodeAttentionInputs& in,
            const DecodeKeyValues& cache, std::uint16_t* out, const Workspace& workspace, void* stream) {
  const int rows = sizes.num_keys * sizes.cut.groups * static_cast<int>(shape.num_tokens);
  const int blocks = std::clamp(kMostBlocks / rows, 1, sizes.cut.stretches);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(sizes.num_keys * sizes.cut.groups),
                  static_cast<unsigned>(shape.num_tokens));
  const auto start = [&]<int kHeads>() {
    auto* const kernel =
        blocks < sizes.cut.stretches ? attention_kernel<kLanes, kHeads, true> : attention_kernel<kLanes, kHeads, false>;
    launch_kernel("attention_kernel", kernel, grid, kThreads, 0, stream, shape.dependent, sizes, in, cache, out,
                  workspace);
  };
  switch (sizes.cut.heads) {
    case 1:
      start.template operator()<1>();
      break;
    case 2:
      start.template operator()<2>();
      break;
    default:
      start.template operator()<kMaxHeads>();
  }
}

}  // namespace

std::size_t decode_attention_workspace(const DecodeAttentionShape& shape) {
  check_decode_attention(shape);
  const std::size_t heads = static_cast<std::size_t>(shape.num_tokens) * static_cast<std::size_t>(shape.num_heads);
  const std::size_t parts = heads * static_cast<std::size_t>(cut_of(shape).stretches);
  return aligned(heads * sizeof(unsigned)) + aligned(parts * sizeof(float2)) +
         parts * static_cast<std::size_t>(shape.head_dim) * sizeof(float);
}

void decode_attention_cuda(const DecodeAttentionShape& shape, const DecodeAttentionInputs& in,
                           const DecodeKeyValues& cache, std::uint16_t* out, void* workspace, void* stream) {
  check_decode_attention(shape);
  const Sizes sizes{static_cast<int>(shape.num_heads),
                    static_cast<int>(shape.num_key_value_heads),
                    static_cast<int>(shape.head_dim),
                    cut_of(shape),
                    shape.capacity,
                    shape.num_rotations,
                    shape.window,
                    shape.one_position,
                    shape.scale * kLog2E,
                    shape.norm,
                    shape.norm_eps,
                    shape.clip};
  const std::size_t heads = static_cast<std::size_t>(shape.num_tokens) * static_cast<std::size_t>(shape.num_heads);
  auto* const bytes = static_cast<unsigned char*>(workspace);
  const std::size_t softmax_at = aligned(heads * sizeof(unsigned));
  const std::size_t mixed_at =
      softmax_at + aligned(heads * static_cast<std::size_t>(sizes.cut.stretches) * sizeof(float2));
  const Workspace parts{reinterpret_cast<unsigned*>(bytes), reinterpret_cast<float2*>(bytes + softmax_at),
                        reinterpret_cast<float*>(bytes + mixed_at)};
  const auto start = [&](auto* launcher) { launcher(shape, sizes, in, cache, out, parts, stream); };
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
