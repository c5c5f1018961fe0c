#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "hestia/kernels/residency_scan.hpp"
#include "launch.cuh"

namespace hestia {
namespace {

// Masks are arrays of W words of 32 bits: one bit per expert by rank in the order of scores (rank 0 the
// highest), by expert index, or by place in the LRU stack (place 0 the most recent). Lane `lane` of a warp owns the
// columns lane + 32 w.

constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kWarp = 32;
constexpr int kPrepareWarps = 4;
constexpr int kExpandWarps = 8;

/// What the scan needs to know of a token, [T, 32 W]. Column c holds the rank of the expert with index c and, of the
/// expert at rank c, its index (`expert`) and who of the other kind comes before it beyond those that always do:
///   lead: when it is resident, everyone of the ranks below `lead` (at least always_keep) comes before it;
///   reach: when it is not, the residents of the ranks up to and including `reach` (at least its own) do.
/// Four fields of 8 bits, or of 16 above 256 experts.
template <class Word>
struct Facts {
  static constexpr int kBits = static_cast<int>(sizeof(Word)) * 2;
  static constexpr Word kMask = (Word(1) << kBits) - 1;
  static __device__ Word pack(int expert, int lead, int reach) {
    return static_cast<Word>(expert) | static_cast<Word>(lead) << kBits | static_cast<Word>(reach) << (2 * kBits);
  }
  static __device__ Word with_rank(Word facts, int rank) { return facts | static_cast<Word>(rank) << (3 * kBits); }
  static __device__ int expert(Word facts) { return static_cast<int>(facts & kMask); }
  static __device__ int lead(Word facts) { return static_cast<int>((facts >> kBits) & kMask); }
  static __device__ int reach(Word facts) { return static_cast<int>((facts >> (2 * kBits)) & kMask); }
  static __device__ int rank(Word facts) { return static_cast<int>(facts >> (3 * kBits)); }
};

/// The n lowest bits, n from 0 to 32, in one instruction.
__device__ unsigned lowest_bits(int n) {
  return __funnelshift_lc(kAllLanes, 0U, static_cast<unsigned>(n));
}

/// Word `word` of the mask of the bits [0, n).
__device__ unsigned below(int n, int word) {
  return lowest_bits(min(max(n - kWarp * word, 0), kWarp));
}

template <int W>
__device__ unsigned pick(const unsigned (&words)[W], int index) {
  unsigned found = words[0];
#pragma unroll
  for (int w = 1; w < W; ++w) {
    found = index == w ? words[w] : found;
  }
  return found;
}

/// One warp per token. Dynamic shared memory, per warp: E candidates' two keys, then 32 W facts.
template <int W, class Word>
__global__ void residency_prepare_kernel(ResidencyShape shape, int always_keep, const float* logits,
                                         const float* strength, Word* facts) {
  extern __shared__ __align__(8) unsigned char shared[];
  const int num_experts = static_cast<int>(shape.num_experts);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kPrepareWarps + warp;
  constexpr std::size_t kWarpBytes = kWarp * W * (sizeof(int2) + sizeof(Word));
  int2* const keys = reinterpret_cast<int2*>(shared + warp * kWarpBytes);  // score if resident, score
  Word* const staged = reinterpret_cast<Word*>(shared + warp * kWarpBytes + kWarp * W * sizeof(int2));
  if (token >= shape.num_tokens) {
    return;
  }
  const float bonus = bonus_at(shape.bonus, strength, token);
  const bool by_weight = routes_by_weight(shape.score, bonus, shape.always_keep, shape.top_k);
  float largest = -INFINITY;
  if (by_weight) {
    for (int i = lane; i < num_experts; i += kWarp) {
      largest = larger_logit(largest, logits[token * num_experts + i]);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      largest = larger_logit(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
  }
  for (int i = lane; i < num_experts; i += kWarp) {
    const float z = logits[token * num_experts + i];
    const float score = by_weight ? weight_score(shape.score, z, largest) : z;
    keys[i] = make_int2(ordered_logit(__fadd_rn(score, bonus)), ordered_logit(score));
  }
  __syncwarp();
  // Counting what comes first sorts, too: E is small, and all pairs are needed for lead and reach anyway.
  int ranks[W];
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const int i = lane + kWarp * w;
    int rank = i;
    int lead = i;
    int reach = i;
    if (i < num_experts) {
      const int2 mine = keys[i];
      const ResidencyCandidate mine_resident{mine.x, mine.y, i};
      const ResidencyCandidate mine_absent{mine.y, mine.y, i};
      rank = 0;
      lead = 0;
      reach = 0;
      for (int j = 0; j < num_experts; ++j) {
        const int2 other = keys[j];
        const ResidencyCandidate resident{other.x, other.y, j};
        const ResidencyCandidate absent{other.y, other.y, j};
        rank += chosen_before(absent, mine_absent) ? 1 : 0;
        lead += chosen_before(absent, mine_resident) ? 1 : 0;
        // Itself left out: what reaches past its own rank then counts up to that very rank.
        reach += j != i && chosen_before(resident, mine_absent) ? 1 : 0;
      }
      lead = min(max(lead, always_keep), kWarp * W - 1);
    }
    ranks[w] = rank;
    staged[rank] = Facts<Word>::pack(i < num_experts ? i : 0, lead, reach);
  }
  __syncwarp();
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const int column = lane + kWarp * w;
    facts[token * (kWarp * W) + column] = Facts<Word>::with_rank(staged[column], ranks[w]);
  }
}

/// One warp per run. `served`: [T, W], the mask of what is chosen, by rank. P words hold a mask over the C places of
/// the LRU stack. State in registers: the `place` of the lane's experts in that stack, C where not resident, which is
/// enough: LRU by whole steps holds the C experts touched last. A served expert goes to the place of its rank among the
/// served; any other moves down by the served that were not above it, K less those that were.
template <int W, int P, class Word>
__global__ void __launch_bounds__(kWarp)
    residency_scan_kernel(int top_k, int always_keep, int slots, const Word* facts, const std::int64_t* run_begin,
                          const std::int64_t* run_end, unsigned* served) {
  constexpr int kAhead =
      W <= 2 ? 8 : (W <= 4 ? 4 : (W <= 8 ? 2 : 1));  // tokens whose facts are under way: global memory is slow
  constexpr int kColumns = kWarp * W;
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t begin = run_begin[blockIdx.x];
  const std::int64_t length = run_end[blockIdx.x] - begin;
  const Word* const own_facts = facts + begin * kColumns + lane;
  unsigned* const own_served = served + begin * W + lane;
  unsigned first_ranks[W];
  unsigned resident[W];  // by expert, the same in all lanes
  int place[W];
#pragma unroll
  for (int w = 0; w < W; ++w) {
    first_ranks[w] = below(always_keep, w);
    resident[w] = 0;
    place[w] = slots;
  }

  const auto step = [&](const Word(&now)[W], std::int64_t token) {
    // In the order of scores: who is resident, and from there who is chosen.
    bool is_resident[W];
    unsigned resident_ranks[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const int expert = Facts<Word>::expert(now[w]);
      is_resident[w] = ((pick<W>(resident, expert / kWarp) >> (expert % kWarp)) & 1U) != 0;
      resident_ranks[w] = __ballot_sync(kAllLanes, is_resident[w]);
    }
    unsigned chosen[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const int rank = lane + kWarp * w;
      const int lead = Facts<Word>::lead(now[w]);
      const int reach = Facts<Word>::reach(now[w]);
      // Before a resident come the ranks below `lead`, all of them, and the residents from there to its own; before
      // another the ranks below its own, and the residents from there to `reach`.
      int before = is_resident[w] ? lead : rank;
#pragma unroll
      for (int v = 0; v < W; ++v) {
        const unsigned for_resident = below(rank, v) & ~below(lead, v);
        const unsigned for_absent = below(reach + 1, v) & ~below(rank, v);
        before += __popc(resident_ranks[v] & (is_resident[w] ? for_resident : for_absent));
      }
      chosen[w] = __ballot_sync(kAllLanes, before < top_k) | first_ranks[w];
    }
    // By expert: who was served, and the LRU stack after it.
    bool is_served[W];
    int new_place[W];
    unsigned served_places[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      served_places[p] = 0;
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const int rank = Facts<Word>::rank(now[w]);
      is_served[w] = ((pick<W>(chosen, rank / kWarp) >> (rank % kWarp)) & 1U) != 0;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const unsigned bit = below(min(place[w] + 1, slots), p) & ~below(place[w], p);
        served_places[p] |= is_served[w] ? bit : 0U;
      }
      new_place[w] = 0;
#pragma unroll
      for (int v = 0; v < W; ++v) {
        new_place[w] += __popc(chosen[v] & below(rank, v));
      }
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      served_places[p] = __reduce_or_sync(kAllLanes, served_places[p]);
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      int moved = place[w] + top_k;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        moved -= __popc(served_places[p] & below(place[w], p));
      }
      place[w] = min(is_served[w] ? new_place[w] : moved, slots);
      resident[w] = __ballot_sync(kAllLanes, place[w] < slots);
    }
    if (lane < W) {
      own_served[token * W] = pick<W>(chosen, lane);
    }
  };

  Word ahead[kAhead][W];
  const auto fetch = [&](Word(&into)[W], std::int64_t token) {
    const std::int64_t from = token < length ? token : length - 1;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      into[w] = own_facts[from * kColumns + kWarp * w];
    }
  };
  if (length <= 0) {
    return;
  }
#pragma unroll
  for (int d = 0; d < kAhead; ++d) {
    fetch(ahead[d], d);
  }
  std::int64_t token = 0;
  for (; token + kAhead <= length; token += kAhead) {
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      Word now[W];
#pragma unroll
      for (int w = 0; w < W; ++w) {
        now[w] = ahead[d][w];
      }
      fetch(ahead[d], token + d + kAhead);
      step(now, token + d);
    }
  }
#pragma unroll
  for (int d = 0; d < kAhead; ++d) {
    if (token + d < length) {
      step(ahead[d], token + d);
    }
  }
}

/// One warp per token: masks to experts. A token outside the runs has the empty mask, and is left alone.
template <int W, class Word>
__global__ void residency_expand_kernel(std::int64_t num_tokens, std::int64_t top_k, const Word* facts,
                                        const unsigned* served, std::int64_t* selected) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t token =
      static_cast<std::int64_t>(blockIdx.x) * kExpandWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (token >= num_tokens) {
    return;
  }
  std::int64_t* out = selected + token * top_k;
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const unsigned mask = served[token * W + w];
    if ((mask >> lane & 1U) != 0) {
      out[__popc(mask & lowest_bits(lane))] = Facts<Word>::expert(facts[(token * W + w) * kWarp + lane]);
    }
    out += __popc(mask);
  }
}

int words_for(std::int64_t num_experts) {
  int words = 1;
  while (kWarp * words < num_experts) {
    words *= 2;
  }
  return words;
}

std::size_t bytes_of_facts(const ResidencyShape& shape, int words) {
  const std::size_t size = words > 8 ? sizeof(unsigned long long) : sizeof(unsigned);
  return static_cast<std::size_t>(shape.num_tokens) * static_cast<std::size_t>(kWarp * words) * size;
}

template <int W>
void launch(const ResidencyShape& shape, const float* logits, const float* strength, const std::int64_t* run_begin,
            const std::int64_t* run_end, std::int64_t num_runs, std::int64_t* selected, void* workspace,
            cudaStream_t stream) {
  using Word = std::conditional_t<(W > 8), unsigned long long, unsigned>;
  auto* const facts = static_cast<Word*>(workspace);
  const std::size_t facts_bytes = bytes_of_facts(shape, W);
  auto* const served = reinterpret_cast<unsigned*>(static_cast<unsigned char*>(workspace) + facts_bytes);
  const int top_k = static_cast<int>(shape.top_k);
  const int always_keep = static_cast<int>(std::min(shape.always_keep, shape.top_k));
  const int slots = static_cast<int>(std::min(shape.slots, shape.num_experts));
  const cudaError_t cleared = cudaMemsetAsync(
      served, 0, static_cast<std::size_t>(shape.num_tokens) * static_cast<std::size_t>(W) * sizeof(unsigned), stream);
  if (cleared != cudaSuccess) {
    throw RunError(std::string("residency_scan: clearing the workspace failed, got ") + cudaGetErrorName(cleared) +
                   "; check the GPU with nvidia-smi or run on the CPU");
  }
  const auto blocks = [&](int warps) { return static_cast<unsigned>((shape.num_tokens + warps - 1) / warps); };
  constexpr std::size_t kShared = kPrepareWarps * kWarp * W * (sizeof(int2) + sizeof(Word));
  residency_prepare_kernel<W, Word>
      <<<blocks(kPrepareWarps), kPrepareWarps * kWarp, kShared, stream>>>(shape, always_keep, logits, strength, facts);
  check_launch("residency_prepare_kernel");
  const auto runs = static_cast<unsigned>(num_runs);
  if (slots <= kWarp) {
    residency_scan_kernel<W, 1, Word>
        <<<runs, kWarp, 0, stream>>>(top_k, always_keep, slots, facts, run_begin, run_end, served);
  } else {
    residency_scan_kernel<W, W, Word>
        <<<runs, kWarp, 0, stream>>>(top_k, always_keep, slots, facts, run_begin, run_end, served);
  }
  check_launch("residency_scan_kernel");
  residency_expand_kernel<W, Word><<<blocks(kExpandWarps), kExpandWarps * kWarp, 0, stream>>>(
      shape.num_tokens, shape.top_k, facts, served, selected);
  check_launch("residency_expand_kernel");
}

}  // namespace

std::size_t residency_scan_workspace(const ResidencyShape& shape) {
  const int words = words_for(shape.num_experts);
  return bytes_of_facts(shape, words) +
         static_cast<std::size_t>(shape.num_tokens) * static_cast<std::size_t>(words) * sizeof(unsigned);
}

void residency_scan_cuda(const ResidencyShape& shape, const float* logits, const float* strength,
                         const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                         std::int64_t* selected, void* workspace, void* stream) {
  if (shape.num_experts > kResidencyScanMaxExperts) {
    throw std::invalid_argument("residency_scan: at most " + std::to_string(kResidencyScanMaxExperts) +
                                " experts per layer on the GPU, got " + std::to_string(shape.num_experts));
  }
  if (shape.num_tokens == 0 || num_runs == 0) {
    return;
  }
  const auto run = [&](auto words) {
    launch<decltype(words)::value>(shape, logits, strength, run_begin, run_end, num_runs, selected, workspace,
                                   static_cast<cudaStream_t>(stream));
  };
  switch (words_for(shape.num_experts)) {
    case 1:
      return run(std::integral_constant<int, 1>());
    case 2:
      return run(std::integral_constant<int, 2>());
    case 4:
      return run(std::integral_constant<int, 4>());
    case 8:
      return run(std::integral_constant<int, 8>());
    default:
      return run(std::integral_constant<int, 16>());
  }
}

}  // namespace hestia
