#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <torch/types.h>

#include "hestia/kernels/decode_fetch.hpp"
#include "hestia/kernels/decode_router.hpp"
#include "hestia/kernels/slot_cache.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/routing/simulator.hpp"
#include "hestia/runtime/expert_store.hpp"

namespace hestia {

/// How many experts the device holds.
struct ExpertSlots {
  std::int64_t per_layer = 0;  ///< C slots for each MoE layer; 0: one pool,
  std::int64_t pool = 0;       ///< of this many, that all layers share.
};

/// Reads "16" (slots per layer), "total:256" (one pool of all layers) or "memory:6GiB" (as many per layer as fit, the
/// scratch slots that a step of `num_selected` ids may need left out; one pool when that is less than one per layer).
/// GiB, MiB, GB, MB and bytes are known. Throws UsageError with what is wrong and the forms there are.
[[nodiscard]] ExpertSlots parse_expert_slots(std::string_view text, const Architecture& architecture,
                                             std::int64_t blob_bytes, std::int64_t num_selected);

/// Slots for experts that pass by the cache, where steps of `num_selected` ids need any: as many as one token may miss.
[[nodiscard]] std::int64_t scratch_slots(const Architecture& architecture, std::int64_t num_selected);

/// How the misses of a step come to the GPU.
enum class FetchPath : std::int32_t {
  kAuto,      ///< `copies` for experts of kCopiedExpertBytes and more, else `together`: the faster one as measured.
  kTogether,  ///< One kernel serves a step of one token whose experts all fit the slots, copies its misses and computes
              ///< with the hits meanwhile; other steps come as kWaves.
  kCopies,    ///< The same, but for what the copy engine moves, as a host thread tells it when a kernel asks.
  kWaves,     ///< A kernel each for serving, for copying and for every wave's products, copies on a second stream.
  kStaged,    ///< As kWaves, but the host reads the list of misses and tells the copy engine: what is not pinned passes
              ///< through staging buffers. Steps wait for the host; no other path serves a store that is not pinned.
};

/// Bytes of an expert from which the copy engine is faster.
inline constexpr std::int64_t kCopiedExpertBytes = std::int64_t{4} << 20;

/// Names of the paths on the command line and in recipes, in enum order: auto, together, copies, waves, staged.
[[nodiscard]] std::vector<std::string> fetch_path_names();
[[nodiscard]] std::string fetch_path_name(FetchPath path);
/// Inverse of fetch_path_name. Throws UsageError with the nearest name.
[[nodiscard]] FetchPath fetch_path_from_name(std::string_view name);

/// What is brought before it is asked for.
enum class PrefetchKind : std::int32_t {
  kOff,
  kNextGate,  ///< What the next layer's gate would choose for this layer's hidden state and has no slot (DecodeGuess).
};

/// Names on the command line and in recipes, in enum order: off, next-gate.
[[nodiscard]] std::vector<std::string> prefetch_names();
[[nodiscard]] std::string prefetch_name(PrefetchKind kind);
/// Inverse of prefetch_name. Throws UsageError with the nearest name.
[[nodiscard]] PrefetchKind prefetch_from_name(std::string_view name);

/// What prefetching did since the reset.
struct PrefetchTotals : PrefetchCounts {
  std::int64_t copied_bytes = 0;  ///< Of guesses, over the link.
  std::int64_t useful_bytes = 0;  ///< Of right ones, which were not copied again; the others were wasted.
};

/// Options of a slot cache.
struct SlotCacheOptions {
  ExpertSlots slots;
  CachePolicyKind policy = CachePolicyKind::kLru;
  double gamma = SimulationOptions{}.gamma;       ///< Discount of `gamma`.
  std::uint64_t seed = SimulationOptions{}.seed;  ///< Of `random`.
  bool stress = false;                            ///< See SlotCacheShape::stress.
  /// For steps in the decode kernels; all others come as kWaves. kStaged is for all steps.
  FetchPath fetch = FetchPath::kAuto;
  /// Serves where one kernel fetches and multiplies, with copies by the engine (which kAuto is then) and slots of each
  /// layer's own; elsewhere nothing is prefetched.
  PrefetchKind prefetch = PrefetchKind::kOff;
};

/// Whether a step of `num_selected` ids may have misses that find no slot to stay in, so that scratch slots are needed.
[[nodiscard]] bool may_pass_by(const Architecture& architecture, std::int64_t num_selected,
                               const SlotCacheOptions& options);

/// Runs the experts of decode steps out of slots on the device: the slot cache says which experts of a step are there
/// (hits) and which slot each of the others goes to; hits compute, misses are copied from the store, wave by wave. Or,
/// without a cache, with every expert on the device. Nothing is read back, but for kStaged: on a GPU a step can be
/// captured in a CUDA graph, and stays correct whatever its routing is. A token's result depends on its own input and
/// experts alone, bit by bit, and not on slots, policy, waves or the other tokens of the step, but for
/// whether a step in bfloat16 on a GPU has kDecodeTensorRows of them. No gradient. Not thread-safe.
///
/// Products: on a GPU, packed experts and bfloat16 ones without biases or clamp, of sizes that are multiples of 8, run
/// in the decode kernels (decode_experts.hpp); all others one row at a time through LibTorch, which on a GPU copies
/// every weight once more. Packed experts are dequantised into bfloat16 there, which the kernels do without rounding.
class SlotExecutor : public Executor {
 public:
  /// For steps of up to `rows` tokens with `top_k` experts each. `cache` nullopt: all experts are resident. The slots
  /// are allocated here. Throws UsageError as check_slot_cache does, RunError when the device has no memory for the
  /// slots or the store is not pinned and `device` is a GPU.
  SlotExecutor(const Architecture& architecture, ExpertStore store, torch::Device device, std::int64_t rows,
               std::int64_t top_k, const std::optional<SlotCacheOptions>& cache);
  ~SlotExecutor() override;

  /// One step of a layer. `experts` is looked at for what it says beside the weights (clamp) and must have no adapters.
  /// Throws std::invalid_argument for other sizes than the constructor's.
  [[nodiscard]] torch::Tensor run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                  const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                  std::int64_t moe_layer) override;

  /// Whether steps run in the decode kernels.
  [[nodiscard]] bool runs_kernels() const noexcept;
  /// Whether a decode kernel may start before the one before it ends; at first it may not. Compute capability 9.0.
  void start_early(bool allowed);
  /// int32 [E] on the device, the slot that holds each expert of a layer at that moment of the stream, negative: none.
  /// Null when all are resident.
  [[nodiscard]] const std::int32_t* slot_of(std::int64_t moe_layer) const;
  /// What the router kernel of a step of one token is given so that it serves the layer itself where something is
  /// missing (DecodeRouterInputs::fetch), before decode() with the same tensors; nullopt where serving is a kernel of
  /// its own. Its pointers are the executor's and the tensors'.
  [[nodiscard]] std::optional<DecodeFetch> router_fetch(const torch::Tensor& selected_TK,
                                                        const torch::Tensor& hit_slots_TK, std::int64_t moe_layer);
  /// What the router kernel of the layer before `moe_layer` is given so that it guesses what this one will miss;
  /// nullopt where nothing is prefetched. The caller adds norm, router, rule or trace, and places for the scratch.
  [[nodiscard]] std::optional<DecodeGuess> router_guess(std::int64_t moe_layer) const;
  /// One step of a layer in the decode kernels, with the residual in place: out_TD += the experts' mixed outputs,
  /// rounded once. x_TD, out_TD: bfloat16 [T, D]; selected_TK: int32; weights_TK: float32; hit_slots_TK: int32, slot_of
  /// the selected, not looked at when all are resident; all contiguous, on the GPU. ahead: weights that are read next,
  /// up to kFetchAhead, which a kernel that waits for misses brings into L2 meanwhile; no result depends on them.
  /// Throws std::logic_error unless runs_kernels().
  void decode(const torch::Tensor& x_TD, const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
              const torch::Tensor& hit_slots_TK, const torch::Tensor& out_TD, std::int64_t moe_layer,
              std::span<const torch::Tensor> ahead = {});

  /// Empties the cache, counts included, as before the first step of `sequence` (which seeds `random`), and loads the
  /// first slots of `preload` when it is not empty: experts per MoE layer, best first. In one pool the best of each
  /// layer come before the second of each. Synchronises with the device.
  void reset(std::int64_t sequence, const std::vector<std::vector<std::uint16_t>>& preload = {});
  /// Puts the cache into the state that serving a prompt leaves, uncounted, and loads what it then holds. selected:
  /// int64 [S, rows, K] of each MoE layer. Synchronises with the device.
  void touch(const std::vector<torch::Tensor>& selected_SRK);
  /// uint8 [E] on the device, 1 where the slots of a layer hold the expert; asynchronous. Null when all are resident.
  [[nodiscard]] torch::Tensor resident(std::int64_t moe_layer);

  /// How misses come, never kAuto, and by waves where the options' path does not serve: on a CPU and without the decode
  /// kernels; in place of kTogether also for several rows, under `static` or with fewer slots than a token has experts.
  /// kStaged where the store is not pinned in full.
  [[nodiscard]] FetchPath fetch_path() const noexcept;
  /// Whether steps of one token are fetched and multiplied by one kernel (kTogether, kCopies).
  [[nodiscard]] bool fetches_in_one() const noexcept;
  /// Lets the host thread of `copies` look for requests, and steps ask it; without effect on other paths. Not before
  /// a first step has run: what a kernel's first launch does may wait for the kernels that wait for the thread. And no
  /// more than a few hundred launches may be enqueued at once, for the same reason: unless fetches_in_one(), only steps
  /// in graphs.
  void wake_copies();
  /// The end of that, once the steps have ended. Throws RunError when a copy failed.
  void rest_copies();
  /// Requests that the host thread of `copies` has taken.
  [[nodiscard]] std::int64_t copy_requests() const noexcept;

  /// What is prefetched in steps whose routers guess; kOff where SlotCacheOptions::prefetch does not serve.
  [[nodiscard]] PrefetchKind prefetch() const noexcept;
  /// Since the reset, all zero where nothing is prefetched. Synchronises with the device; of the host thread's bytes a
  /// few may belong to what comes next.
  [[nodiscard]] PrefetchTotals prefetch_totals() const;
  /// Counts of each MoE layer since the reset; empty when all are resident. Synchronises with the device.
  [[nodiscard]] std::vector<SlotCacheCounts> counts() const;
  /// Experts that fit the slots of one layer, or all of them in one pool; every expert when all are resident.
  [[nodiscard]] std::int64_t num_slots() const noexcept;
  /// Bytes of the slots on the device, scratch slots included; 0 where the store itself serves.
  [[nodiscard]] std::int64_t slot_bytes() const noexcept;
  [[nodiscard]] bool all_resident() const noexcept;
  /// uint8 [slots, bytes of a blob]: with all resident, expert e of MoE layer l is l * E + e.
  [[nodiscard]] const torch::Tensor& memory() const noexcept;
  /// The same as an executor takes experts, [slots, ...]; of packed ones nothing is defined.
  [[nodiscard]] const ExpertWeights& slots() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hestia
