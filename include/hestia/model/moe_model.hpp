#pragma once

// Letters: B rows, S row length, T = B*S tokens, D model dim, F expert hidden dim, E experts, K experts per token, L
// MoE layers, R rank of adapters, V vocabulary.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/model/key_value_cache.hpp"

namespace hestia {

/// What one MoE layer did, as an output of its forward. All on the layer's device; T in row-major order of [B, S].
struct RoutingRecord {
  torch::Tensor logits_TE;         ///< float32, router logits z; carries gradient.
  torch::Tensor probabilities_TE;  ///< float32, softmax(z); carries gradient.
  torch::Tensor selected_TK;       ///< int64, the experts served, by falling logit (ties: lower index first).
  torch::Tensor weights_TK;        ///< float32, mixing weights (routing_rule.hpp), same order; carries gradient.
  /// float32, logits of the frozen base router on the same hidden state, no gradient; undefined unless
  /// `keep_reference_routers` was called.
  torch::Tensor reference_logits_TE;
};

/// One packed batch on a device; int64, [B, S].
struct TokenBatch {
  torch::Tensor tokens_BS;
  torch::Tensor positions_BS;     ///< 0 at the start of each sequence.
  torch::Tensor sequence_ids_BS;  ///< Attention stays inside a sequence; negative: padding.
  /// 0 at prompt tokens, bool or integer; undefined: every token counts. Read by selectors that tell prompt and
  /// completion apart.
  torch::Tensor counted_BS = {};
};

/// Cosine and sine of rotary position embedding by position, [capacity, 1, 1, half of what is rotated], on the model's
/// device; undefined where nothing is rotated.
struct Rotations {
  torch::Tensor cosine;
  torch::Tensor sine;
};

/// Where a decode step puts its tokens.
struct StepPlace {
  torch::Tensor position_1;  ///< int64 [1] on the device: the tokens that each row has before this step.
  Rotations rotations;       ///< Of at least `visible` positions.
  /// Keys of the cache that attention looks at, those behind the step's masked: at least the position + 1, at most the
  /// cache's capacity.
  std::int64_t visible = 0;
};

/// Result of a forward.
struct ModelOutput {
  torch::Tensor hidden_BSD;            ///< After the final norm, in the model's dtype.
  std::vector<RoutingRecord> routing;  ///< One per MoE layer.
};

/// Turns router logits into the experts to serve. Replaceable: Top-K, or residency-aware routing on top of it.
class Selector {
 public:
  virtual ~Selector() = default;
  /// `logits_TE` float32 -> selected_TK int64, best first, ties to the lower index. No gradient. Experts that the
  /// family's own rule leaves out come with a logit of minus infinity (`selection_scores`); at least K are finite.
  /// `moe_layer` counts the layers with experts.
  [[nodiscard]] virtual torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                             const TokenBatch& batch) = 0;
  /// Whether the chosen experts of a layer keep the probability mass of plain Top-K's: mixing_weights of
  /// hestia/model/routing_rule.hpp with `plain_TK`.
  [[nodiscard]] virtual bool preserves_mass(std::int64_t /*moe_layer*/, std::int64_t /*top_k*/) const { return false; }
};

/// Plain Top-K of the logits.
class TopKSelector : public Selector {
 public:
  [[nodiscard]] torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                                     const TokenBatch& batch) override;
};

/// Top-K with ties to the lower index on any device: int64 [T, K], by falling value.
[[nodiscard]] torch::Tensor top_k_lowest_index(const torch::Tensor& values_TE, std::int64_t top_k);

/// Low-rank updates (LoRA, Hu et al. 2021, arXiv 2106.09685) of the up and down projections of one MoE layer's experts,
/// stacked, in the model's dtype: up'_e = up_e + scale * up_b_e up_a_e, down'_e = down_e + scale * down_b_e down_a_e.
struct ExpertAdapters {
  torch::Tensor up_a_ERD;
  torch::Tensor up_b_EFR;
  torch::Tensor down_a_ERF;
  torch::Tensor down_b_EDR;
  double scale = 0.0;  ///< alpha / R
  /// False: the experts have none.
  [[nodiscard]] bool defined() const { return up_a_ERD.defined(); }
};

/// What a set of adapters is made with: W' = W + (alpha / rank) B A.
struct AdapterSettings {
  std::int64_t rank = 0;
  double alpha = 0.0;
};

/// The experts of one MoE layer, stacked. In the model's dtype.
struct ExpertWeights {
  torch::Tensor gate_EFD;
  torch::Tensor up_EFD;
  torch::Tensor down_EDF;
  ExpertAdapters adapters{};
  torch::Tensor gate_bias_EF = {};  ///< The biases: all or none.
  torch::Tensor up_bias_EF = {};
  torch::Tensor down_bias_ED = {};
  std::optional<double> swiglu_limit = std::nullopt;  ///< Architecture::swiglu_limit
  double swiglu_alpha = 1.0;
};

/// silu(gate) * up, or the clamped form that `experts` asks for (Architecture::swiglu_limit), which is worked out in
/// float32 or wider; gate and up [..., F] in the model's dtype, the result too.
[[nodiscard]] torch::Tensor gated_activation(const ExpertWeights& experts, const torch::Tensor& gate,
                                             const torch::Tensor& up);

/// Runs the selected experts and mixes their outputs. Replaceable: grouped products, or the slot cache of offloaded
/// decoding.
class Executor {
 public:
  virtual ~Executor() = default;
  /// x_TD (model dtype), selected_TK int64, weights_TK float32 -> out_TD (model dtype):
  /// out_t = sum_k w_tk * down_e(silu(gate_e x_t) * up_e x_t), with up' and down' where there are adapters; biases and
  /// the clamped activation (Architecture::swiglu_limit) where the experts have them, which take no adapters.
  /// Differentiable in x and weights, and in the experts and adapters when they require it.
  [[nodiscard]] virtual torch::Tensor run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                          const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                          std::int64_t moe_layer) = 0;
};

/// Tokens sorted by expert, variable group sizes, nothing dropped. bf16 on CUDA: `at::_grouped_mm`, no host
/// synchronisation; elsewhere one product per non-empty expert. Adapters run as two low-rank products each, x A^T and
/// that times B^T: no merged weight is ever made.
class GroupedExecutor : public Executor {
 public:
  [[nodiscard]] torch::Tensor run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                  const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                  std::int64_t moe_layer) override;
};

/// Every token through every expert, unselected ones weighted 0, adapters merged into the weights: the slow reference
/// of tests.
class DenseExecutor : public Executor {
 public:
  [[nodiscard]] torch::Tensor run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                  const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                  std::int64_t moe_layer) override;
};

/// A decoder-only MoE language model built from an Architecture. Routers (`gate`) are float32 always; everything else
/// has the model dtype.
class MoeModelImpl : public torch::nn::Module {
 public:
  /// Parameters are allocated uninitialised on `device`, but for the routed experts when `expert_blobs_NB` is given:
  /// these are then views of it, uint8 [MoE layers * E, bytes of a blob] (expert_blobs.hpp), in whatever memory it
  /// lies. Throws std::invalid_argument when it has another shape.
  MoeModelImpl(Architecture architecture, torch::Dtype dtype, torch::Device device,
               const torch::Tensor& expert_blobs_NB = {});
  ~MoeModelImpl() override;

  /// Forward up to the final norm, with one routing record per MoE layer.
  [[nodiscard]] ModelOutput forward(const TokenBatch& batch);
  /// The next tokens of sequences whose earlier ones are in `cache`, which then holds these too: prefill with an empty
  /// cache, decoding one token at a time, or pieces of any size give what one forward of the whole gives. Each row is
  /// one sequence without padding, its positions continue at cache.length(). A selector sees the tokens of this call
  /// only. No gradient. Throws std::invalid_argument for another batch or one that does not fit the cache, RunError
  /// when a sequence grows over the length at which LongRoPE changes its factors: its cached keys would be wrong.
  [[nodiscard]] ModelOutput forward(const TokenBatch& batch, KeyValueCache& cache);
  /// One token more for each row, at a place that stands in device memory: nothing is read back, so that the step can
  /// be captured in a CUDA graph and replayed at later places. cache.length() stays: the caller counts the token with
  /// `advance`. tokens_B1: int64 [B, 1]. The cache must have tokens; the caller sees to it that the place is the one
  /// behind them and, under LongRoPE, that the sequence does not grow over the length at which its factors change.
  /// No gradient. Throws std::invalid_argument for a batch that does not fit the cache.
  [[nodiscard]] ModelOutput step(const torch::Tensor& tokens_B1, const StepPlace& place, KeyValueCache& cache);
  /// Rotations of every position below `capacity`, for `step`.
  [[nodiscard]] Rotations rotations(std::int64_t capacity) const;
  /// The same with the kept reference routers and their K in place of the present ones, plain Top-K in place of the
  /// selector, and without adapters: the base model's forward, as long as only routers and adapters train. No gradient.
  /// Throws std::logic_error before
  /// `keep_reference_routers`.
  [[nodiscard]] ModelOutput forward_reference(const TokenBatch& batch);
  /// Language-model head: hidden [..., D] -> logits [..., V] in the model's dtype.
  [[nodiscard]] torch::Tensor head(const torch::Tensor& hidden);

  /// Its matrix [V, D] in the model's dtype: the parameter itself (the token embedding when tied).
  [[nodiscard]] const torch::Tensor& head_weight() const noexcept;
  /// Its bias [V]; undefined where the family has none.
  [[nodiscard]] const torch::Tensor& head_bias() const noexcept;

  /// What chooses the experts in `forward`; TopKSelector until it is set. Shared with the graphs of checkpointed
  /// forwards.
  void set_selector(std::shared_ptr<Selector> selector);
  [[nodiscard]] const std::shared_ptr<Selector>& selector() const noexcept;
  void set_executor(std::shared_ptr<Executor> executor);
  /// Keeps a frozen float32 copy of every router as it is now, and K; later forwards fill reference_logits_TE with it.
  void keep_reference_routers();
  /// Experts per token from the next forward on; `architecture().top_k` follows. Throws std::invalid_argument unless
  /// between 1 and E.
  void set_top_k(std::int64_t top_k);
  /// Gives every routed expert adapters of zeros, frozen, in place of any there are: the forward stays as it was. See
  /// `create_adapters` (adapters.hpp) for a start that trains. Throws std::invalid_argument for a rank below 1 or an
  /// alpha that is not finite and positive, UsageError for a family whose experts take none (gpt-oss).
  void add_adapters(const AdapterSettings& settings);
  /// Takes the adapters away; the experts were never changed.
  void remove_adapters();
  /// Whether forwards use the adapters (they do at first); they stay in place either way.
  void set_adapters_enabled(bool enabled);
  /// Whether backward gives routers the gradient of experts that were not chosen, too, as if they had been in the sum
  /// (straight-through; DenseMixer, F. Yao et al., "Improving MoE Post-Training with Precise Router Gradient", 2025;
  /// docs/training.md). Off at first. The forward is the same bits. Throws std::invalid_argument for sparsemixer
  /// routing.
  void set_router_gradient_of_all(bool enabled);
  /// Recompute each layer in backward instead of keeping its activations.
  void set_activation_checkpointing(bool enabled);

  [[nodiscard]] const Architecture& architecture() const noexcept;
  [[nodiscard]] torch::Dtype dtype() const noexcept;
  [[nodiscard]] torch::Device device() const noexcept;

  /// Router matrices [E, D] float32, one per MoE layer, in layer order: the parameters themselves, not copies.
  [[nodiscard]] std::vector<torch::Tensor> routers();
  /// Rank and alpha of the adapters; nullopt when there are none.
  [[nodiscard]] std::optional<AdapterSettings> adapter_settings() const noexcept;
  /// Adapters by MoE layer, each layer's up_a, up_b, down_a, down_b: the parameters themselves. Empty without adapters.
  [[nodiscard]] std::vector<torch::Tensor> adapters();
  /// Slices of the adapters, by layer and expert, under the name of the expert's matrix with `lora_A` or `lora_B`
  /// before `weight`, as PEFT names them: `model.layers.3.mlp.experts.5.up_proj.lora_A.weight` [R, D].
  [[nodiscard]] std::vector<std::pair<std::string, torch::Tensor>> named_adapters();
  /// Every parameter under its Hugging Face name, in the order of `tensor_specs`. Tensors are views of the parameters
  /// (an expert's matrix is a slice of the stacked one); no copies.
  [[nodiscard]] std::vector<std::pair<std::string, torch::Tensor>> named_tensors();
  /// Parameters of the checkpoint without slicing (stacked experts), for optimisers. Adapters are not among them.
  [[nodiscard]] std::vector<torch::Tensor> all_parameters();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};
TORCH_MODULE(MoeModel);

/// Loads a Hugging Face directory: config.json and safetensors (f32, bf16, f16; FP8 with block scales and MXFP4,
/// widened to float32 and rounded to `dtype` once), sharded or not, straight into parameters of `dtype` on `device`
/// (see `place_tensors`). A large one shows its progress unless `quiet`. With `expert_blobs_NB`, routed experts go
/// there (see the constructor). Memory of the model is taken by another thread while the files are opened and checked,
/// and goes again when they are refused. `begins` is told the name of each part of the work as it begins, for whoever
/// times them. Throws InputError listing every missing, extra or misshapen tensor.
[[nodiscard]] MoeModel load_model(const std::filesystem::path& directory, torch::Dtype dtype, torch::Device device,
                                  bool quiet = false, const torch::Tensor& expert_blobs_NB = {},
                                  const std::function<void(std::string_view part)>& begins = {});

/// A model with random weights: normal(0, initializer_range), norms 1. The same seed gives the same weights on every
/// device. With `expert_blobs_NB`, routed experts go there (see the constructor).
[[nodiscard]] MoeModel create_model(const Architecture& architecture, torch::Dtype dtype, torch::Device device,
                                    std::uint64_t seed, const torch::Tensor& expert_blobs_NB = {});

/// Writes config.json and the weights as `dtype` (routers too: the base layout) in shards of at most `max_shard_bytes`.
void save_model(MoeModel& model, const std::filesystem::path& directory, torch::Dtype dtype,
                std::size_t max_shard_bytes);

/// Overwrites the routers with `router.safetensors`-style tensors (Hugging Face names). Throws InputError listing
/// missing, extra and misshapen ones.
void load_routers(MoeModel& model, const std::filesystem::path& file);
/// Writes the routers, float32, Hugging Face names, whole or not at all.
void save_routers(MoeModel& model, const std::filesystem::path& file);
/// SHA-256 over the names and float32 bytes of all routers: the identity a bundle checks.
[[nodiscard]] std::string router_hash(MoeModel& model);

}  // namespace hestia
