#pragma once

#include <cstddef>
#include <cstdint>

#include "block_signals.cuh"
#include "copy_ask.cuh"
#include "decode_pairs.cuh"
#include "hestia/kernels/decode_fetch.hpp"
#include "slot_cache_serve.cuh"

// How the blocks of one kernel serve a step, copy its misses and compute with what is there (decode_fetch.hpp). The
// first block serves and says so, unless the router has (decode_router.hpp); the first `copiers` blocks copy, whose
// warps are counted down per miss and part; the others compute: gate and up of hits at once, then, in a step with
// misses, down of the hits whose gate and up are through, then gate and up of a miss when the counter of its first part
// is down. Blocks start in the order of their numbers, so whoever is waited for runs before those that wait.

namespace hestia {

/// Counters between the blocks; zero between steps.
struct FetchWorkspace {
  unsigned served;                              ///< 1 + loads, once the step is served
  unsigned ended;                               ///< blocks that wait for nothing any more
  unsigned through[kDecodeMaxTopK];             ///< blocks that have written gate and up of each hit
  unsigned left[kDecodeMaxTopK * kFetchParts];  ///< warps that still copy of each part of each load
  unsigned copied[kDecodeMaxTopK];              ///< 1: the host thread has not copied its share of the load yet
  unsigned staged_load;                         ///< 1 + the load that was guessed before, 0: none
  unsigned staged_tag;                          ///< of the guess
};

/// What of DecodeFetch serving a step takes.
struct ServeStep {
  SlotCacheShape cache;
  SlotCacheState state;
  int layer;
  int top_k;
  SlotCacheAnswer answer;
  FetchWorkspace* workspace;
  CopyRequest* request;
  PrefetchState* prefetch;
  unsigned blob_words;  ///< of 16 bytes; 0 where DecodeFetch::blob was left out
  unsigned own_words;   ///< that the kernel copies of the first load where a host thread copies the rest
  unsigned copiers;
};

inline ServeStep serve_step(const DecodeFetch& fetch, std::int64_t top_k) {
  return {fetch.cache,
          fetch.state,
          static_cast<int>(fetch.layer),
          static_cast<int>(top_k),
          fetch.answer,
          static_cast<FetchWorkspace*>(fetch.workspace),
          fetch.request,
          fetch.prefetch,
          static_cast<unsigned>(fetch.blob.bytes / sizeof(uint4)),
          static_cast<unsigned>(fetch_own_bytes(fetch.blob) / sizeof(uint4)),
          static_cast<unsigned>(fetch.copiers)};
}

/// DecodeFetch as the kernels take it.
struct FetchStep : ServeStep {
  const std::int32_t* selected;
  const std::int32_t* hit_slots;
  const uint4* store;  ///< of the layer
  const uint4* staging;
  std::size_t words;        ///< of a blob, of 16 bytes
  std::size_t first_words;  ///< gate and up: part 0; down is part 1
  unsigned poll_ns;
  unsigned blocks_per_pair;       ///< that compute gate and up of one expert
  unsigned down_blocks_per_pair;  ///< that compute down of a hit; 0: nobody does
  FetchAhead ahead[kFetchAhead];
};

/// `fetch` as the kernels take it (decode_fetch.cu).
FetchStep fetch_step(const DecodeExpertsShape& shape, const DecodeFetch& fetch, unsigned blocks_per_pair,
                     unsigned down_blocks_per_pair);

/// Blocks of a launch.
inline unsigned fetch_blocks(const FetchStep& step) {
  return step.copiers + static_cast<unsigned>(step.top_k) * (step.blocks_per_pair + step.down_blocks_per_pair);
}

namespace arrival {

constexpr int kThreads = serving::kThreads;
constexpr int kInFlight = 4;  // loads of 16 bytes per thread

/// Waits until the step is served; by one thread. Returns the number of loads.
__device__ inline unsigned wait_served(const FetchStep& step, unsigned poll_ns) {
  unsigned said = load_acquire(&step.workspace->served);
  while (said == 0) {
    __nanosleep(poll_ns);
    said = load_acquire(&step.workspace->served);
  }
  return said - 1;
}

/// What a block behind the copiers does.
struct Turn {
  enum class Work { kNothing, kHit, kDownOfHit, kMiss };
  Work work = Work::kNothing;
  int pair = 0;
  unsigned block = 0;          ///< of those that share the pair's work
  bool is_waited_for = false;  ///< a hit whose down this kernel computes
};

/// The turn of block `number` behind the copiers: gate and up of the hits in their order, their down, the misses.
__device__ inline Turn turn_of(const FetchStep& step, unsigned number) {
  const unsigned all = step.top_k == kDecodeWarp ? ~0U : (1U << step.top_k) - 1U;
  const unsigned hits = hits_of(step.hit_slots, step.top_k);
  const unsigned misses = all & ~hits;
  const auto num_hits = static_cast<unsigned>(__popc(hits));
  const unsigned downs = misses != 0 ? step.down_blocks_per_pair : 0;
  Turn turn;
  unsigned per_pair = step.blocks_per_pair;
  unsigned rest = hits;
  turn.work = Turn::Work::kHit;
  turn.is_waited_for = downs > 0;
  if (number >= num_hits * per_pair) {
    number -= num_hits * per_pair;
    turn.work = Turn::Work::kDownOfHit;
    per_pair = downs;
    if (number >= num_hits * downs) {
      number -= num_hits * downs;
      turn.work = Turn::Work::kMiss;
      per_pair = step.blocks_per_pair;
      rest = misses;
      if (number >= static_cast<unsigned>(__popc(misses)) * per_pair) {
        return {};
      }
    }
  }
  for (unsigned skip = number / per_pair; skip > 0; --skip) {
    rest &= rest - 1U;
  }
  turn.pair = __ffs(static_cast<int>(rest)) - 1;
  turn.block = number % per_pair;
  return turn;
}

/// The block reads no counter any more; the last such block puts them back. By one thread.
__device__ inline void leave(const FetchStep& step) {
  unsigned misses = 0;
  for (int k = 0; k < step.top_k; ++k) {
    misses += step.hit_slots[k] < 0 ? 1 : 0;
  }
  unsigned waiting = step.copiers + misses * step.blocks_per_pair;
  if (misses > 0) {
    waiting += (static_cast<unsigned>(step.top_k) - misses) * step.down_blocks_per_pair;
  }
  if (atomicAdd(&step.workspace->ended, 1U) == waiting - 1) {
    step.workspace->served = 0;
    step.workspace->ended = 0;
    if (step.workspace->staged_load > 0) {
      step.prefetch->landed[step.layer % 2] = 0;
    }
    step.workspace->staged_load = 0;
    step.workspace->staged_tag = 0;
    for (int k = 0; k < step.top_k; ++k) {
      step.workspace->through[k] = 0;
    }
  }
}

/// What the block wrote of h for `pair`, a hit, is seen by those that wait_through; the whole block.
__device__ inline void tell_through(const FetchStep& step, int pair) {
  __syncthreads();
  if (threadIdx.x == 0) {
    count_up(&step.workspace->through[pair]);
  }
}

/// Waits until h of `pair`, a hit, is whole; the whole block.
__device__ inline void wait_through(const FetchStep& step, int pair) {
  if (threadIdx.x == 0) {
    while (load_acquire(&step.workspace->through[pair]) != step.blocks_per_pair) {
      __nanosleep(100);
    }
    leave(step);
  }
  __syncthreads();
}

__device__ inline bool has_arrived(const FetchStep& step, unsigned load, unsigned part) {
  return load_acquire(&step.workspace->left[load * kFetchParts + part]) == 0 &&
         (step.request == nullptr || load_acquire_system(&step.workspace->copied[load]) == 0);
}

/// Waits until part `part` of load `load` is there; by one thread, or a warp.
__device__ inline void wait_arrived(const FetchStep& step, unsigned load, unsigned part, unsigned poll_ns) {
  while (!has_arrived(step, load, part)) {
    __nanosleep(poll_ns);
  }
}

/// Brings the share of block `block` of what is read next into L2, one warp, once the hits are through and no other
/// load can push it out again; not at all when `last`, the last load, is there before.
__device__ inline void bring_ahead(const FetchStep& step, unsigned last, unsigned block) {
  if (step.ahead[0].bytes == 0) {
    return;
  }
  const auto others = static_cast<unsigned>(__popc(hits_of(step.hit_slots, step.top_k))) * step.down_blocks_per_pair;
  const auto is_time = [&] {
    return load_acquire(&step.workspace->ended) >= others && (last == 0 || has_arrived(step, last - 1, 0));
  };
  while (!__any_sync(~0U, is_time())) {
    if (__any_sync(~0U, has_arrived(step, last, 0))) {
      return;
    }
    __nanosleep(step.poll_ns);
  }
  for (const FetchAhead& what : step.ahead) {
    const auto* const data = static_cast<const unsigned char*>(what.data);
    const std::size_t stride = std::size_t{step.blocks_per_pair} * kDecodeWarp * kLine;
    for (std::size_t at = (std::size_t{block} * kDecodeWarp + threadIdx.x % kDecodeWarp) * kLine; at < what.bytes;
         at += stride) {
      prefetch_line(data + at);
    }
  }
}

/// The slot of `turn`'s pair, a miss, once its gate and up are there; the whole block, `shared` is its.
__device__ inline int arrived_slot(const FetchStep& step, const Turn& turn, int* shared) {
  if (threadIdx.x < kDecodeWarp) {
    const unsigned loads = wait_served(step, step.poll_ns);
    const int slot = static_cast<const volatile std::int32_t*>(step.answer.slots)[turn.pair];
    unsigned load = 0;
    while (load + 1 < loads && static_cast<const volatile SlotCacheLoad*>(step.answer.loads)[load].slot != slot) {
      ++load;
    }
    __syncwarp();
    if (load + 1 == loads) {
      bring_ahead(step, load, turn.block);
    }
    wait_arrived(step, load, 0, step.poll_ns);
    __syncwarp();
    if (threadIdx.x == 0) {
      leave(step);
      *shared = slot;
    }
  }
  __syncthreads();
  return *shared;
}

/// A load that was guessed before.
struct Staged {
  unsigned load = 0;  ///< 1 + its number; 0: none
  unsigned tag = 0;
};

/// Settles the guess for this layer: the load among the `loads` of a step that has been served that it was right about,
/// and of which a host thread may have brought something; a block of kThreads.
__device__ inline Staged settle_guess(const ServeStep& step, unsigned loads) {
  __shared__ Staged staged;
  const auto thread = static_cast<unsigned>(threadIdx.x);
  PrefetchState& state = *step.prefetch;
  PrefetchState::Guess& guess = state.guesses[step.layer % 2];
  const unsigned expert = guess.expert;
  if (thread == 0) {
    staged = {};
  }
  __syncthreads();
  if (thread < loads && expert == static_cast<unsigned>(step.answer.loads[thread].expert) + 1) {
    ++state.counts.right;
    if (step.request != nullptr) {
      staged = {thread + 1, guess.tag};
    }
  }
  __syncthreads();
  if (thread == 0) {
    guess.expert = 0;
  }
  return staged;
}

/// Serves the step, says so and asks for its copies; a block of kThreads. `bits`: serving::bytes_of_bits of shared
/// memory.
__device__ inline void serve_and_ask(const ServeStep& step, const std::int32_t* selected, unsigned* bits) {
  __shared__ serving::Shared shared;
  const auto thread = static_cast<unsigned>(threadIdx.x);
  serving::serve(serving::Layer(step.cache, step.state, step.layer), selected, 1, step.top_k, true, &step.answer, bits,
                 shared);
  __syncthreads();
  const auto loads = static_cast<unsigned>(step.answer.step->loads);
  const bool asks = step.request != nullptr && loads > 0;
  const Staged staged = step.prefetch != nullptr ? settle_guess(step, loads) : Staged();
  if (thread < loads * kFetchParts) {
    const bool copies = !asks || thread == 0 || (staged.load > 0 && thread == (staged.load - 1) * kFetchParts);
    step.workspace->left[thread] = copies ? step.copiers * (kThreads / kDecodeWarp) : 0;
  }
  if (asks && thread < loads) {
    step.workspace->copied[thread] = 1;
  }
  __syncthreads();
  if (thread == 0) {
    step.workspace->staged_load = staged.load;
    step.workspace->staged_tag = staged.tag;
    store_release(&step.workspace->served, 1 + loads);
  }
  if (asks) {  // behind it: those who wait on the GPU need not wait for the way to the host
    constexpr auto kWord = static_cast<unsigned>(sizeof(uint4));
    const auto end = [&](int load) { return (step.blob_words - (load == 0 ? step.own_words : 0)) * kWord; };
    const auto guess = [&](int load) { return static_cast<unsigned>(load) + 1 == staged.load ? staged.tag : 0U; };
    ask_for_copies<kThreads>(step.answer.loads, static_cast<int>(loads),
                             step.layer * static_cast<int>(step.cache.num_experts), end, guess, step.request);
  }
}

/// Waits until the host thread has said how much of the guess is in the staging place, in words of 16 bytes; the whole
/// block.
__device__ inline std::size_t landed_words(const FetchStep& step, const Staged& staged) {
  __shared__ unsigned shared_pieces;
  if (threadIdx.x == 0) {
    const unsigned* const word = &step.prefetch->landed[step.layer % 2];
    unsigned landed = load_acquire_system(word);
    while (landed >> 8 != staged.tag) {
      __nanosleep(100);
      landed = load_acquire_system(word);
    }
    shared_pieces = landed & 0xffU;
  }
  __syncthreads();
  return min(shared_pieces * (kPrefetchPiece / sizeof(uint4)), step.words);
}

/// The work of the first `copiers` blocks; the first serves, unless the router has.
__device__ inline void serve_and_copy(const FetchStep& step, uint4* pool) {
  __shared__ unsigned shared_loads;
  const auto thread = static_cast<unsigned>(threadIdx.x);
  if (blockIdx.x == 0) {
    extern __shared__ unsigned bits[];
    __shared__ bool is_served;
    if (thread == 0) {
      is_served = load_acquire(&step.workspace->served) != 0;
    }
    __syncthreads();
    if (!is_served) {
      serve_and_ask(step, step.selected, bits);
    }
  }
  if (thread == 0) {
    shared_loads = wait_served(step, 100);
  }
  __syncthreads();
  // What others write into `staging` meanwhile lies behind `end`.
  const auto move = [&](unsigned number, bool is_staged, std::size_t begin, std::size_t end) {
    const volatile SlotCacheLoad& load = step.answer.loads[number];
    const uint4* const from =
        is_staged ? step.staging : step.store + static_cast<std::size_t>(load.expert) * step.words;
    uint4* const to = pool + static_cast<std::size_t>(load.slot) * step.words;
    const std::size_t stride = std::size_t{step.copiers} * kThreads * kInFlight;
    const unsigned warp = blockIdx.x * (kThreads / kDecodeWarp) + thread / kDecodeWarp;
    for (std::size_t at = begin + warp * kDecodeWarp * kInFlight + thread % kDecodeWarp; at < end; at += stride) {
      uint4 words[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at + i * kDecodeWarp < end) {
          const uint4* const word = from + at + i * kDecodeWarp;
          words[i] = is_staged ? load_arrived(word) : load_weights(word);
        }
      }
      // Plain stores: the products find them in L2.
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at + i * kDecodeWarp < end) {
          to[at + i * kDecodeWarp] = words[i];
        }
      }
    }
  };
  const auto tell = [&](unsigned number, unsigned part) {
    __syncwarp();
    if (thread % kDecodeWarp == 0) {
      count_down(&step.workspace->left[number * kFetchParts + part]);
    }
  };
  if (step.request == nullptr) {
    for (unsigned load = 0; load < shared_loads; ++load) {
      move(load, false, 0, step.first_words);
      tell(load, 0);
      move(load, false, step.first_words, step.words);
      tell(load, 1);
    }
  } else if (shared_loads > 0) {
    const volatile FetchWorkspace& said = *step.workspace;
    const Staged staged{said.staged_load, said.staged_tag};
    move(0, false, step.words - step.own_words, step.words);
    if (staged.load != 1) {
      tell(0, 0);
    }
    if (staged.load > 0) {
      move(staged.load - 1, true, 0, landed_words(step, staged));
      tell(staged.load - 1, 0);
    }
  }
  __syncthreads();
  if (thread == 0) {
    if (blockIdx.x == 0 && step.request != nullptr) {
      for (unsigned load = 0; load < shared_loads; ++load) {
        wait_arrived(step, load, 0, 100);
      }
    }
    leave(step);
  }
}

}  // namespace arrival
}  // namespace hestia
