#include "hestia/kernels/decode_router.hpp"

#include <algorithm>
#include <cfloat>

#include "block_signals.cuh"
#include "decode_checks.hpp"
#include "decode_norm.cuh"
#include "dependent.cuh"
#include "expert_arrival.cuh"
#include "hestia/core/error.hpp"
#include "launch.cuh"

namespace hestia {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kDecodeWarp;
constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 32;
constexpr int kRankThreads = kThreads - kDecodeWarp;  // two per expert; the last warp computes the softmax meanwhile
constexpr int kAhead = 16;                            // 16 bytes of its row, times this, that a lane asks for early
constexpr std::size_t kMaxServingRow = 12 * 1024;     // bytes of a row that fits beside what serving takes
constexpr std::int64_t kSpread = 128;                 // blocks to spread few rows over: about one per SM

/// Calls ranked(e, the number of experts j with before(j, e)) for every expert, in one of the kRankThreads threads.
template <class Before, class Ranked>
__device__ void rank_experts(int num_experts, const Before& before, const Ranked& ranked) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int first = 0; first < num_experts; first += kRankThreads / 2) {
    const int e = first + thread / 2;
    int rank = 0;
    if (e < num_experts) {
#pragma unroll 8
      for (int j = thread % 2; j < num_experts; j += 2) {
        rank += before(j, e) ? 1 : 0;
      }
    }
    rank += __shfl_xor_sync(0xffffffffU, rank, 1);
    if (e < num_experts && thread % 2 == 0) {
      ranked(e, rank);
    }
  }
}

/// Softmax of the logits of one token, in p (shared), by one warp.
__device__ void softmax(int num_experts, float* p, float* probabilities) {
  const int lane = static_cast<int>(threadIdx.x) % kDecodeWarp;
  float largest = -INFINITY;
#pragma unroll 2
  for (int e = lane; e < num_experts; e += kDecodeWarp) {
    largest = fmaxf(largest, p[e]);
  }
  for (int offset = kDecodeWarp / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, offset));
  }
  float sum = 0.0F;
#pragma unroll 2
  for (int e = lane; e < num_experts; e += kDecodeWarp) {
    p[e] = expf(__fsub_rn(p[e], largest));
    sum = __fadd_rn(sum, p[e]);
  }
  const float total = decode_warp_sum(sum);
#pragma unroll 2
  for (int e = lane; e < num_experts; e += kDecodeWarp) {
    p[e] = __fdiv_rn(p[e], total);
    probabilities[e] = p[e];
  }
}

/// The expert that a trace has for place `thread` of the token; of the first warp, else -1. Nothing that this kernel
/// writes goes into it.
__device__ int forced_expert(const DecodeRouterShape& shape, const DecodeRouterInputs& inputs, std::size_t token) {
  const int thread = static_cast<int>(threadIdx.x);
  const int top_k = static_cast<int>(shape.top_k);
  if (inputs.forced == nullptr || thread >= kDecodeWarp) {
    return -1;
  }
  const std::int64_t row = *inputs.step % inputs.num_forced * shape.num_tokens + static_cast<std::int64_t>(token);
  return static_cast<int>(inputs.forced[row * top_k + (thread < top_k ? thread : 0)]);
}

/// DecodeGuess as the kernel takes it.
struct GuessStep {
  DecodeGuess next;
  int first_blob;  // of the next layer
};

/// Puts the guess where the next layer looks for it: the first expert whose thread says that it is missing. By the
/// first warp of the block that has chosen.
__device__ void note_guess(const GuessStep& guess, const std::int32_t* selected, bool is_missing) {
  const unsigned missing = __ballot_sync(0xffffffffU, is_missing);
  if (threadIdx.x == 0) {
    PrefetchState& state = *guess.next.state;
    const unsigned tag = state.tag % kPrefetchTags + 1;
    state.tag = tag;
    state.guesses[guess.next.layer % 2] = {
        missing == 0 ? 0U : static_cast<unsigned>(selected[__ffs(static_cast<int>(missing)) - 1]) + 1, tag};
    state.counts.guesses += missing == 0 ? 0 : 1;
  }
}

/// Tells the host thread of the guess once it has been made and the layer itself has been served: the second of the two
/// blocks does. By one thread.
__device__ void meet_and_tell(const GuessStep& guess) {
  PrefetchState& state = *guess.next.state;
  if (count_and_see(&state.met) == 1) {
    state.met = 0;
    const volatile PrefetchState::Guess& made = state.guesses[guess.next.layer % 2];
    const unsigned expert = made.expert;
    const unsigned blob = expert == 0 ? 0U : static_cast<unsigned>(guess.first_blob) + expert;
    if (guess.next.request != nullptr) {
      store_release_system(reinterpret_cast<unsigned long long*>(&guess.next.request->guess),
                           static_cast<unsigned long long>(made.tag) << 32 | blob);
    }
  }
}

/// The choice for one token by one block, which sees all of its logits. `forced`: the thread's forced_expert.
/// `selected`: the choice once more, shared, of kMaxTopK. Returns whether the thread's expert has no slot.
__device__ bool choose(const DecodeRouterShape& shape, const DecodeRouterInputs& inputs, std::size_t token, int forced,
                       const float* logits, float* probabilities, const DecodeRouterOutputs& out,
                       std::int32_t* selected) {
  __shared__ std::int32_t own[kMaxExperts];  // ordered scores, without the bonus and with it
  __shared__ std::int32_t adjusted[kMaxExperts];
  __shared__ float p[kMaxExperts];  // logits, then probabilities
  __shared__ std::int32_t slots[kMaxExperts];
  __shared__ std::int32_t place[kMaxExperts];         // by the score alone
  __shared__ std::int32_t at_place[kMaxExperts];      // the expert there
  __shared__ unsigned in[kMaxExperts / kDecodeWarp];  // a bit per place: chosen
  __shared__ std::int32_t chosen[kMaxTopK];
  const int num_experts = static_cast<int>(shape.num_experts);
  const int top_k = static_cast<int>(shape.top_k);
  const int kept = static_cast<int>(min(shape.always_keep, shape.top_k));
  const std::int32_t* const slot_of = inputs.slot_of;
  const float bonus = bonus_at(shape.bonus, inputs.strength, static_cast<std::int64_t>(token));
  const bool prior = slot_of != nullptr && bonus > 0.0F && kept < top_k;
  const bool by_weight = prior && routes_by_weight(shape.score, bonus, shape.always_keep, shape.top_k);
  const int thread = static_cast<int>(threadIdx.x);
  float largest = -INFINITY;
  if (by_weight) {  // every warp for itself: no thread waits for another warp
#pragma unroll 4
    for (int e = thread % kDecodeWarp; e < num_experts; e += kDecodeWarp) {
      largest = larger_logit(largest, __ldcg(logits + e));
    }
    for (int offset = kDecodeWarp / 2; offset > 0; offset /= 2) {
      largest = larger_logit(largest, __shfl_xor_sync(0xffffffffU, largest, offset));
    }
  }
#pragma unroll 1
  for (int e = thread; e < num_experts; e += kThreads) {
    const float z = __ldcg(logits + e);  // written by other blocks
    slots[e] = slot_of != nullptr ? slot_of[e] : -1;
    p[e] = z;
    const float score = by_weight ? weight_score(shape.score, z, largest) : z;
    own[e] = ordered_logit(score);
    if (prior) {
      adjusted[e] = slots[e] >= 0 ? ordered_logit(__fadd_rn(score, bonus)) : own[e];
      in[e / kDecodeWarp] = 0;
    }
  }
  __syncthreads();
  // E is small, so all pairs are compared.
  if (thread >= kRankThreads) {
    softmax(num_experts, p, probabilities);
  } else {
    const auto before = [&](int j, int e) { return chosen_before({own[j], own[j], j}, {own[e], own[e], e}); };
    rank_experts(num_experts, before, [&](int e, int rank) {
      place[e] = rank;
      at_place[rank] = e;
    });
  }
  __syncthreads();
  const std::int32_t* by_score = at_place;
  if (prior) {
    if (thread < kRankThreads) {
      // Equal ones stand in the order of their places: by their own score, then by their index.
      const auto before = [&](int j, int e) {
        const bool second = chosen_before({adjusted[j], 0, place[j]}, {adjusted[e], 0, place[e]});
        return second && place[j] >= kept;
      };
      rank_experts(num_experts, before, [&](int e, int rank) {
        if (place[e] < kept || rank < top_k - kept) {
          atomicOr(&in[place[e] / kDecodeWarp], 1U << (place[e] % kDecodeWarp));
        }
      });
    }
    __syncthreads();
#pragma unroll 1
    for (int at = thread; at < num_experts; at += kThreads) {
      const unsigned bit = 1U << (at % kDecodeWarp);
      if ((in[at / kDecodeWarp] & bit) != 0) {
        int k = __popc(in[at / kDecodeWarp] & (bit - 1U));
#pragma unroll 1
        for (int word = 0; word < at / kDecodeWarp; ++word) {
          k += __popc(in[word]);
        }
        chosen[k] = at_place[at];
      }
    }
    __syncthreads();
    by_score = chosen;
  }
  bool is_missing = false;
  if (thread < kDecodeWarp) {
    int e = by_score[thread < top_k ? thread : 0];
    if (inputs.forced != nullptr) {
      e = forced;
    }
    float weight = p[e];
    const auto sum_over_choice = [&](float value) {
      float sum = 0.0F;
      for (int k = 0; k < top_k; ++k) {
        sum = __fadd_rn(sum, __shfl_sync(0xffffffffU, value, k));
      }
      return sum;
    };
    if (shape.normalise_top_k) {
      weight = __fdiv_rn(weight, sum_over_choice(weight));
    } else if (scales_weights(shape, inputs)) {
      const float plain = sum_over_choice(p[at_place[thread < top_k ? thread : 0]]);
      weight = __fmul_rn(weight, __fdiv_rn(plain, fmaxf(sum_over_choice(weight), FLT_MIN)));
    }
    if (thread < top_k) {
      const std::size_t at = token * top_k + thread;
      out.selected[at] = e;
      selected[thread] = e;
      is_missing = slots[e] < 0;
      out.weights[at] = __fmul_rn(weight, shape.routed_scale);
      if (out.slots != nullptr) {
        out.slots[at] = slots[e];
      }
    }
  }
  return is_missing;
}

/// Grid: (tiles of `tile` <= kWarps experts, T), with kGuesses as many more tiles, of the next layer's router. Dynamic
/// shared memory: the normalised row, later the bits that serving takes. kServes, kGuesses: T is 1.
template <bool kServes, bool kGuesses>
__global__ void __launch_bounds__(kThreads)
    router_kernel(DecodeRouterShape shape, DecodeRouterInputs in, DecodeRouterOutputs out, unsigned* ended, int tile,
                  ServeStep serve, GuessStep guess) {
  static_assert(kThreads == arrival::kThreads && kMaxTopK <= kDecodeMaxTopK);
  extern __shared__ uint4 shared[];
  __shared__ float partial[kWarps];
  __shared__ std::int32_t selected[kMaxTopK];
  auto* const normal = reinterpret_cast<std::uint16_t*>(shared);
  const int hidden = static_cast<int>(shape.hidden_size);
  const std::size_t token = blockIdx.y;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kDecodeWarp;
  const int lane = thread % kDecodeWarp;
  int block = static_cast<int>(blockIdx.x);
  bool guesses = false;
  if constexpr (kGuesses) {
    const int tiles = static_cast<int>(gridDim.x) / 2;
    guesses = block >= tiles;
    if (guesses) {
      block -= tiles;
      ended += 1;
      shape.bonus = guess.next.bonus;
      in.strength = guess.next.strength;
      in.norm_weight = guess.next.norm_weight;
      in.router = guess.next.router;
      in.bias = nullptr;
      in.slot_of = guess.next.slot_of;
      in.forced = guess.next.forced;
      out = guess.next.scratch;
    }
  }
  const int expert = block * tile + warp;
  const bool has_expert = warp < tile && expert < shape.num_experts;
  const auto* const row =
      reinterpret_cast<const float4*>(in.router + static_cast<std::size_t>(has_expert ? expert : 0) * hidden);
  const int chunks = hidden / 4;
  const float bias = in.bias != nullptr && has_expert ? in.bias[expert] : 0.0F;
  float4 ahead[kAhead];  // on its way while the norm is computed
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int chunk = lane + i * kDecodeWarp;
    if (has_expert && chunk < chunks) {
      ahead[i] = __ldg(row + chunk);
    }
  }
  after_kernel_before();
  const int forced = forced_expert(shape, in, token);
  block_rms_norm<kThreads>(in.hidden + token * hidden, in.norm_weight, hidden, shape.norm_eps, shape.norm, normal,
                           partial);
  __syncthreads();
  bool last = false;
  if (has_expert) {
    const auto* const x = reinterpret_cast<const uint2*>(normal);
    float sum = 0.0F;
    const auto add = [&](const float4& w, int chunk) {
      const uint2 v = x[chunk];
      sum = __fmaf_rn(w.x, __uint_as_float(v.x << 16), sum);
      sum = __fmaf_rn(w.y, __uint_as_float(v.x & 0xffff0000U), sum);
      sum = __fmaf_rn(w.z, __uint_as_float(v.y << 16), sum);
      sum = __fmaf_rn(w.w, __uint_as_float(v.y & 0xffff0000U), sum);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int chunk = lane + i * kDecodeWarp;
      if (chunk < chunks) {
        add(ahead[i], chunk);
      }
    }
#pragma unroll 8
    for (int chunk = lane + kAhead * kDecodeWarp; chunk < chunks; chunk += kDecodeWarp) {
      add(__ldg(row + chunk), chunk);
    }
    sum = decode_warp_sum(sum);
    if (lane == 0) {
      out.logits[token * shape.num_experts + expert] = in.bias == nullptr ? sum : __fadd_rn(sum, bias);
      last = count_and_see(ended + token) == shape.num_experts - 1;
      if (last) {
        ended[token] = 0;
      }
    }
  }
  if (block == 0 && !guesses) {
#pragma unroll 1
    for (int chunk = thread; chunk < hidden / 8; chunk += kThreads) {
      reinterpret_cast<uint4*>(out.normal + token * hidden)[chunk] = shared[chunk];
    }
  }
  if (__syncthreads_or(last ? 1 : 0) != 0) {
    const bool is_missing = choose(shape, in, token, forced, out.logits + token * shape.num_experts,
                                   out.probabilities + token * shape.num_experts, out, selected);
    if (guesses) {
      if (thread < kDecodeWarp) {
        __syncwarp();
        note_guess(guess, selected, is_missing);
      }
    } else if constexpr (kServes) {
      if (__syncthreads_or(is_missing ? 1 : 0) != 0) {
        arrival::serve_and_ask(serve, selected, reinterpret_cast<unsigned*>(shared));
      }
    }
    if constexpr (kGuesses) {
      if (thread == 0) {
        meet_and_tell(guess);
      }
    }
  }
}

}  // namespace

std::size_t decode_router_workspace(const DecodeRouterShape& shape) {
  return (static_cast<std::size_t>(shape.num_tokens) + 1) * sizeof(unsigned);  // one of the guess
}

void decode_router_cuda(const DecodeRouterShape& shape, const DecodeRouterInputs& in, const DecodeRouterOutputs& out,
                        void* workspace, void* stream) {
  check_decode_router(shape);
  check_router_slots(shape, in, out);
  check_router_guess(shape, in);
  const std::size_t row_bytes = static_cast<std::size_t>(shape.hidden_size) * sizeof(std::uint16_t);
  check_decode_range("decode router", "the hidden size", shape.hidden_size, 16 * 1024);
  const std::int64_t tile =
      std::min<std::int64_t>((shape.num_tokens * shape.num_experts + kSpread - 1) / kSpread, kWarps);
  const auto tiles = static_cast<unsigned>((shape.num_experts + tile - 1) / tile);
  const bool serves = in.fetch != nullptr && row_bytes <= kMaxServingRow;
  const ServeStep serve = serves ? serve_step(*in.fetch, shape.top_k) : ServeStep{};
  const std::size_t shared = serves ? std::max(row_bytes, serving::bytes_of_bits(in.fetch->cache)) : row_bytes;
  GuessStep guess{};
  if (in.guess != nullptr) {
    guess = {*in.guess, static_cast<int>(in.guess->layer * shape.num_experts)};
  }
  const auto start = [&](auto* kernel) {
    const dim3 grid(in.guess != nullptr ? 2 * tiles : tiles, static_cast<unsigned>(shape.num_tokens));
    launch_kernel("router_kernel", kernel, grid, kThreads, shared, stream, shape.dependent, shape, in, out,
                  static_cast<unsigned*>(workspace), static_cast<int>(tile), serve, guess);
  };
  if (in.guess != nullptr) {
    start(serves ? router_kernel<true, true> : router_kernel<false, true>);
  } else {
    start(serves ? router_kernel<true, false> : router_kernel<false, false>);
  }
}

}  // namespace hestia
