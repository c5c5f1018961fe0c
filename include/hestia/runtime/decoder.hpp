#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include <torch/types.h>

#include "hestia/routing/layout.hpp"
#include "hestia/routing/residency.hpp"
#include "hestia/runtime/expert_store.hpp"
#include "hestia/runtime/slot_executor.hpp"

namespace hestia {

/// How the next token follows from the logits; the exact rule is decode_sample's (hestia/kernels/decode_sample.hpp).
struct DecodeSampling {
  double temperature = 0.0;  ///< 0: the highest logit, ties to the lower id.
  double top_p = 1.0;        ///< Above 0, to 1: the nucleus that is drawn from.
  std::uint64_t seed = 1;    ///< Of the draws: the same on every device.
};

/// Experts per MoE layer to pre-load for the prompts that have just run, best first. `prompt_count_LE`: how many tokens
/// of all rows' prompts select each expert, int64 [MoE layers, E] on the CPU.
using PreloadOfPrompt = std::function<std::vector<std::vector<std::uint16_t>>(const torch::Tensor& prompt_count_LE)>;

/// Options of a decoder.
struct DecoderOptions {
  std::int64_t rows = 1;                  ///< B, 1 to 32 sequences decoded together, of one prompt length.
  std::int64_t capacity = 0;              ///< Most tokens of a row, prompt included.
  std::optional<SlotCacheOptions> cache;  ///< nullopt: all experts are resident.
  CacheStart start = CacheStart::kCold;
  /// kPreload: experts per MoE layer, best first, or what says so when the prompt has run: one of the two. Empty
  /// otherwise.
  std::vector<std::vector<std::uint16_t>> preload;
  PreloadOfPrompt preload_of_prompt;
  std::optional<ResidencyRule> residency;  ///< Decode steps route by the slots' state too; nullopt: plain routing.
  DecodeSampling sampling;
  /// On a GPU: steps are captured in CUDA graphs, one for each range of key counts. Off: every launch by itself.
  bool graph = true;
  /// On a GPU: whole steps run in the decode kernels where these take the model (OLMoE, Qwen3-MoE, Mixtral in
  /// bfloat16); a warning says where they do not. Off: the model's own operations, with the experts in the kernels that
  /// take them.
  bool kernels = true;
  bool start_early = true;     ///< Decode kernels may start before the one before them ends, on GPUs that have it.
  bool record = false;         ///< Keep the routing of prompt and steps.
  bool record_logits = false;  ///< And the router logits.
};

/// Expert choices to serve in place of the router's.
struct DecodeReplay {
  torch::Tensor steps_LSBK;               ///< int64 [MoE layers, steps, B, K]
  std::vector<torch::Tensor> prompt_SBK;  ///< Of each MoE layer, for a start from the prompt; empty: the prompt's own.
  bool again = false;                     ///< Begin with the first step again after the last, as often as need be.
};

/// What decoding took.
struct DecodeTimes {
  double prompt_seconds = 0.0;  ///< From `begin` to the first token, starting the cache included.
  double step_seconds = 0.0;
  std::int64_t steps = 0;
};

/// Decodes token by token with the routed experts in host memory: the one model with a slot executor in place of the
/// grouped one. On a GPU a step waits for nothing of the host, but for copies (FetchPath::kCopies, kStaged). Not
/// thread-safe; one decoder per model at a time.
class Decoder {
 public:
  /// Takes the model over: its selector and executor are set here. Throws UsageError as SlotExecutor does and for a
  /// preload that does not fit, RunError for memory that is not there, std::invalid_argument for a model with adapters
  /// (see merge_adapters) or sizes below 1.
  Decoder(OffloadedModel offloaded, DecoderOptions options);
  ~Decoder();

  /// Serves these choices from the next `begin` on; nullopt: the router's again. Throws std::invalid_argument for
  /// shapes that are not the model's.
  void replay(std::optional<DecodeReplay> replay);
  /// Runs the prompts, int64 [B, S] on any device, starts the cache and chooses each row's first token. `sequence`
  /// seeds the policy `random` as a sequence of that id does in a simulation. Throws std::invalid_argument for a prompt
  /// that does not fit, UsageError for a preload of the prompt that does not.
  void begin(const torch::Tensor& prompt_BS, std::int64_t sequence = 0);
  /// `count` steps, each feeding the last token and choosing the next. Throws std::invalid_argument before `begin` or
  /// beyond capacity or replay, RunError where LongRoPE would change its factors.
  void decode(std::int64_t count);
  /// All tokens chosen since `begin`, int64 [B, steps + 1], on the CPU. Synchronises.
  [[nodiscard]] torch::Tensor tokens() const;
  /// Logits of the last position, float32 [B, V], on the model's device.
  [[nodiscard]] const torch::Tensor& logits() const noexcept;

  /// Share of MoE layers, over all rows, that took the prompt for text of the residency rule's scope and serve it with
  /// the whole bonus since; 1 without a scope.
  [[nodiscard]] double scope_share() const;

  /// Counts of each MoE layer since `begin`; empty when all are resident.
  [[nodiscard]] std::vector<SlotCacheCounts> counts() const;
  [[nodiscard]] const DecodeTimes& times() const noexcept;
  /// Routing of a row since `begin`, prompt included; weights too. Throws std::logic_error unless recording.
  [[nodiscard]] SequenceRouting recorded(std::int64_t row = 0) const;
  /// Router logits of the steps since `begin`, float32 [MoE layers, steps, B, E], on the CPU. Throws std::logic_error
  /// unless they are recorded.
  [[nodiscard]] torch::Tensor recorded_logits() const;
  /// The same of the prompts, [MoE layers, S, B, E].
  [[nodiscard]] torch::Tensor recorded_prompt_logits() const;
  [[nodiscard]] const SlotExecutor& slots() const noexcept;
  /// How misses come; by waves where SlotCacheOptions::fetch does not serve.
  [[nodiscard]] FetchPath fetch_path() const noexcept;
  /// What is prefetched; kOff where SlotCacheOptions::prefetch does not serve.
  [[nodiscard]] PrefetchKind prefetch() const noexcept;
  /// What that did since `begin`, as SlotExecutor::prefetch_totals. Synchronises.
  [[nodiscard]] PrefetchTotals prefetch_totals() const;
  /// Whether whole steps run in the decode kernels.
  [[nodiscard]] bool in_kernels() const noexcept;
  /// Whether steps are captured in CUDA graphs: DecoderOptions::graph on a GPU, unless the host copies the misses.
  [[nodiscard]] bool in_graphs() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Adds adapters into the experts in the store, W + scale * B A in float32, rounded once, and takes them off the model.
/// Nothing without adapters. Throws std::invalid_argument when the store is packed already: see BeforePacking.
void merge_adapters(OffloadedModel& offloaded);

}  // namespace hestia
