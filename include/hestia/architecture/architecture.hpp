#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "hestia/core/json_lines.hpp"

namespace hestia {

/// Rotary position embedding, whichever spelling `config.json` used.
struct RopeSettings {
  double theta = 10000.0;
  std::string type = "default";  ///< default | linear | longrope; a family refuses kinds that it never has.
  double factor = 1.0;           ///< linear: positions are divided by it.
  // longrope (arXiv 2402.13753): sequences of more than original_positions tokens take the long values, others the
  // short: frequency i is divided by factor i, cosine and sine are multiplied by the scale.
  std::int64_t original_positions = 0;
  std::vector<double> short_factor;
  std::vector<double> long_factor;
  double short_scale = 1.0;
  double long_scale = 1.0;
};

/// How hidden states are normalised.
enum class NormKind {
  kRms,   ///< w * x / sqrt(mean(x^2) + eps)
  kLayer  ///< w * (x - mean(x)) / sqrt(var(x) + eps) + b
};

/// How the weights of the chosen experts follow from the router's logits z (hestia/model/routing_rule.hpp).
enum class RoutingKind {
  kSoftmax,          ///< softmax(z) over all experts, at the chosen ones.
  kSoftmaxOfChosen,  ///< softmax over the logits of the chosen ones only.
  kSparsemixer       ///< For each chosen one: softmax over those near the best that are not chosen before it.
};

/// A checkpoint, as plain data: everything `model/` needs to build the forward. The only place a family is described.
struct Architecture {
  std::string family;      ///< Hestia's name, for example "olmoe".
  std::string model_type;  ///< `model_type` of config.json.
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;

  std::int64_t num_attention_heads = 0;
  std::int64_t num_key_value_heads = 0;
  std::int64_t head_dim = 0;
  bool query_key_norm = false;        ///< RMSNorm of the projected query and key,
  bool query_key_norm_heads = false;  ///< of each head on its own instead of all heads together.
  std::optional<double> clip_qkv;     ///< Clamp projected q, k, v to [-c, c].
  bool attention_bias = false;        ///< Projections have biases (which ones: the family's tensors).
  std::int64_t sliding_window = 0;    ///< Tokens that a windowed layer sees, itself included; 0: no layer is windowed.
  std::vector<bool> windowed_layers;  ///< By model layer; empty: all of them.
  RopeSettings rope;

  std::int64_t num_experts = 0;               ///< E, routed experts per MoE layer.
  std::int64_t top_k = 0;                     ///< K
  std::int64_t expert_intermediate_size = 0;  ///< F
  RoutingKind routing = RoutingKind::kSoftmax;
  bool normalise_top_k = false;  ///< Divide the chosen weights by their sum.
  double router_jitter = 0.0;    ///< kSparsemixer: near is within 2 * this, relatively.
  double routed_scale = 1.0;     ///< Times this, after that.
  std::int64_t num_groups = 1;   ///< Experts stand in this many groups of equal size;
  std::int64_t top_groups = 1;   ///< only those of the best groups (by their best expert) are chosen among.
  std::int64_t shared_intermediate_size = 0;  ///< Width of the expert that every token runs; 0: none.
  std::int64_t dense_intermediate_size = 0;   ///< Width of the feed-forward of layers without experts.
  std::int64_t first_dense_layers = 0;        ///< This many layers from the bottom have no experts;
  std::int64_t sparse_step = 1;               ///< of the others, layers step-1, 2*step-1, ... have,
  std::vector<std::int64_t> dense_layers;     ///< but for these.

  NormKind norm = NormKind::kRms;
  double norm_eps = 1e-5;
  bool tie_word_embeddings = false;
  bool head_bias = false;
  std::string hidden_act = "silu";
  std::int64_t max_position_embeddings = 4096;
  double initializer_range = 0.02;
  std::int64_t bos_token_id = -1;  ///< -1: none
  std::int64_t eos_token_id = -1;
  std::int64_t pad_token_id = -1;

  /// Whether a model layer holds a MoE block.
  [[nodiscard]] bool is_moe_layer(std::int64_t layer) const;
  /// Model layers that hold a MoE block, in order.
  [[nodiscard]] std::vector<std::int64_t> moe_layers() const;
  /// Tokens that attention of a model layer sees, itself included; 0: all.
  [[nodiscard]] std::int64_t window_of(std::int64_t layer) const;
  /// Parameters of one routed expert.
  [[nodiscard]] std::int64_t expert_parameters() const { return 3 * hidden_size * expert_intermediate_size; }
  /// All parameters (tied embeddings once).
  [[nodiscard]] std::int64_t total_parameters() const;
};

/// What a tensor is to the program. Dense: feed-forwards that every token runs, shared experts and layers without
/// routed ones.
enum class TensorRole { kEmbedding, kNorm, kAttention, kRouter, kExpert, kDense, kHead };

/// Which matrix or vector of the model a tensor is: how `model/` finds the parameter behind a checkpoint's name.
enum class TensorPart {
  kTokenEmbedding,
  kInputNorm,
  kInputNormBias,
  kQuery,
  kQueryBias,
  kQueryNorm,
  kKey,
  kKeyBias,
  kKeyNorm,
  kValue,
  kValueBias,
  kAttentionOutput,
  kAttentionOutputBias,
  kPostAttentionNorm,
  kPostAttentionNormBias,
  kRouter,
  kExpertGate,
  kExpertUp,
  kExpertDown,
  kSharedGate,
  kSharedUp,
  kSharedDown,
  kSharedScale,  ///< [1, D]: the shared expert's output is multiplied by sigmoid of this row times x.
  kDenseGate,
  kDenseUp,
  kDenseDown,
  kFinalNorm,
  kFinalNormBias,
  kHead,
  kHeadBias
};

/// One tensor a checkpoint of this architecture must hold.
struct TensorSpec {
  std::string name;
  std::vector<std::int64_t> shape;
  TensorRole role = TensorRole::kNorm;
  TensorPart part = TensorPart::kInputNorm;
  std::int64_t layer = -1;   ///< Model layer, -1 outside the layers.
  std::int64_t expert = -1;  ///< Routed expert, -1 for everything else.
};

/// Reads `config.json` text into an Architecture; `subject` names it in messages. Both spellings of rope settings are
/// read: `rope_theta` and `rope_scaling` of the hub, `rope_parameters` of transformers 5. Throws InputError listing
/// every problem: unknown family (with the known ones), missing or wrong keys, values this program does not support.
[[nodiscard]] Architecture parse_architecture(const Json& config, const std::string& subject);
/// Reads `directory`/config.json.
[[nodiscard]] Architecture read_architecture(const std::filesystem::path& directory);
/// The `config.json` that transformers, 4 or 5, reads back to the same model.
[[nodiscard]] Json architecture_config(const Architecture& architecture);
/// Sets the experts per token in a `config.json` of the architecture's family; every other key stays.
void set_config_top_k(Json& config, const Architecture& architecture, std::int64_t top_k);
/// Every tensor a checkpoint must hold, with its Hugging Face name and shape.
[[nodiscard]] std::vector<TensorSpec> tensor_specs(const Architecture& architecture);
/// Name of the router matrix [E, D] of a model layer: `model.layers.3.mlp.gate.weight`.
[[nodiscard]] std::string router_name(const Architecture& architecture, std::int64_t layer);
/// What a config.json of the family stands for as far as it says nothing: its defaults, sizes 0. Throws
/// std::invalid_argument for a family that known_families() lacks.
[[nodiscard]] Architecture family_defaults(const std::string& family);
/// Families this program knows.
[[nodiscard]] std::vector<std::string> known_families();

}  // namespace hestia
