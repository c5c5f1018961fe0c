#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "hestia/core/json_lines.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia {

/// Rotary position embedding, whichever spelling `config.json` used.
struct RopeSettings {
  double theta = 10000.0;
  std::string type = "default";  ///< default | linear | longrope | yarn; a family refuses kinds that it never has.
  double factor = 1.0;           ///< linear: positions are divided by it; yarn: by how much slow rotations stretch.
  // longrope (arXiv 2402.13753): sequences of more than original_positions tokens take the long values, others the
  // short: frequency i is divided by factor i, cosine and sine are multiplied by the scale.
  std::int64_t original_positions = 0;
  std::vector<double> short_factor;
  std::vector<double> long_factor;
  double short_scale = 1.0;
  double long_scale = 1.0;
  // yarn (arXiv 2309.00071): over original_positions tokens a frequency that turns more than beta_fast times stays, one
  // that turns less than beta_slow times is divided by the factor, those between are blended.
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  bool truncate = true;  ///< Round the ends of the blend to whole frequencies.
  std::optional<double> mscale;
  std::optional<double> mscale_all_dim;
  std::optional<double> attention_factor;

  /// yarn: 0.1 * m * ln(factor) + 1 (1 for a factor of at most 1).
  [[nodiscard]] double yarn_scale(double m) const;
  /// What cosine and sine are multiplied by, longrope apart: for yarn `attention_factor`, else
  /// yarn_scale(mscale) / yarn_scale(mscale_all_dim) where both are given, else yarn_scale(1); 1 otherwise.
  [[nodiscard]] double rotation_scale() const;
};

/// How hidden states are normalised.
enum class NormKind {
  kRms,      ///< w * x / sqrt(mean(x^2) + eps), rounded to the model's dtype before w and after
  kRmsWide,  ///< the same, rounded once, after w
  kLayer     ///< w * (x - mean(x)) / sqrt(var(x) + eps) + b
};

/// How the weights of the chosen experts follow from the router's logits z (hestia/model/routing_rule.hpp).
enum class RoutingKind {
  kSoftmax,          ///< softmax(z) over all experts, at the chosen ones.
  kSoftmaxOfChosen,  ///< softmax over the logits of the chosen ones only.
  kSparsemixer       ///< For each chosen one: softmax over those near the best that are not chosen before it.
};

/// How a checkpoint stores its matrices (`quantization_config`); loading widens them, saving writes floats.
enum class Quantisation {
  kNone,
  kFp8Blocks,  ///< float8 E4M3 with a scale for each block, in `NAME_scale_inv`; any tensor may stay a float.
  kMxfp4       ///< Experts as FP4 E2M1 with a scale for each 32 values, in `NAME_blocks` and `NAME_scales`.
};

/// A checkpoint, as plain data: everything `model/` needs to build the forward. The only place a family is described.
struct Architecture {
  std::string family;      ///< Hestia's name, for example "olmoe".
  std::string model_type;  ///< `model_type` of config.json.
  Quantisation quantisation = Quantisation::kNone;
  std::int64_t scale_block_rows = 128;  ///< kFp8Blocks: size of a block.
  std::int64_t scale_block_columns = 128;
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
  // Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are projected up from one low-rank
  // latent; a key also has a rotated part that all heads share. head_dim is then plain_head_dim + rotary_head_dim.
  std::int64_t key_value_rank = 0;   ///< Width of the latent; 0: ordinary attention.
  std::int64_t query_rank = 0;       ///< Width of the query's latent; 0: queries are projected at once.
  std::int64_t plain_head_dim = 0;   ///< Of query and key, what is not rotated,
  std::int64_t rotary_head_dim = 0;  ///< and what is, as pairs of neighbours.
  std::int64_t value_head_dim = 0;

  std::int64_t num_experts = 0;               ///< E, routed experts per MoE layer.
  std::int64_t top_k = 0;                     ///< K
  std::int64_t expert_intermediate_size = 0;  ///< F
  bool router_bias = false;                   ///< Logits are router x + bias.
  bool expert_bias = false;  ///< Every expert matrix has a bias; gate and up are stored as one, row by row in turn.
  /// With a limit l: (clamp(up, -l, l) + 1) * g * sigmoid(swiglu_alpha * g), g = min(gate, l), instead of
  /// silu(gate) * up.
  std::optional<double> swiglu_limit;
  double swiglu_alpha = 1.702;
  RoutingKind routing = RoutingKind::kSoftmax;
  bool normalise_top_k = false;  ///< Divide the chosen weights by their sum.
  std::int64_t fixed_top_k = 0;  ///< The only number of experts per token that the family's routing has; 0: any.
  double router_jitter = 0.0;    ///< kSparsemixer: near is within 2 * this, relatively.
  double routed_scale = 1.0;     ///< Times this, after that.
  std::int64_t num_groups = 1;   ///< Experts stand in this many groups of equal size;
  std::int64_t top_groups = 1;   ///< only those of the best groups (by their best expert) are chosen among.
  std::int64_t shared_intermediate_size = 0;  ///< Width of the expert that every token runs; 0: none.
  std::int64_t dense_intermediate_size = 0;   ///< Width of the feed-forward of layers without experts.
  std::int64_t first_dense_layers = 0;        ///< This many layers from the bottom have no experts;
  std::int64_t sparse_step = 1;               ///< of the others, layers step-1, 2*step-1, ... have
  bool sparse_from_zero = false;              ///< (layers 0, step, 2*step, ... when this is on),
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
  /// Dimensions of a head that rope rotates.
  [[nodiscard]] std::int64_t rotary_dim() const { return key_value_rank > 0 ? rotary_head_dim : head_dim; }
  /// Parameters of one routed expert.
  [[nodiscard]] std::int64_t expert_parameters() const {
    return 3 * hidden_size * expert_intermediate_size + (expert_bias ? 2 * expert_intermediate_size + hidden_size : 0);
  }
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
  kQueryDown,  ///< Latent attention: [query_rank, D], then its norm, then up to the heads.
  kQueryDownBias,
  kQueryLatentNorm,
  kQueryUp,
  kKeyValueDown,  ///< [key_value_rank + rotary_head_dim, D]: the latent, and the rotated part of the key.
  kKeyValueDownBias,
  kKeyValueLatentNorm,
  kKeyValueUp,  ///< Head by head the plain part of the key and the value.
  kAttentionOutput,
  kAttentionOutputBias,
  kSinks,  ///< [heads]: a score that takes part in every softmax of its head and brings no value.
  kPostAttentionNorm,
  kPostAttentionNormBias,
  kRouter,
  kRouterBias,
  kExpertGateUp,  ///< Gate and up of all experts, row by row in turn.
  kExpertGateUpBias,
  kExpertDownBias,
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
  std::int64_t expert = -1;  ///< Routed expert, -1 for everything else and for tensors that hold all experts.
  bool transposed = false;   ///< Stored as [E, in, out]; the parameter is [E, out, in].
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
/// A tensor as a checkpoint stores it.
struct StoredTensor {
  std::string name;
  std::vector<std::int64_t> shape;
};
/// The tensors of `checkpoint` that hold `spec`, whether they are there or not: one of its own name, or under
/// quantisation the values and their scales, in this order.
[[nodiscard]] std::vector<StoredTensor> stored_tensors(const Architecture& architecture, const TensorSpec& spec,
                                                       const SafetensorsCheckpoint& checkpoint);
/// Name of the router matrix [E, D] of a model layer: `model.layers.3.mlp.gate.weight`.
[[nodiscard]] std::string router_name(const Architecture& architecture, std::int64_t layer);
/// What a config.json of the family stands for as far as it says nothing: its defaults, sizes 0. Throws
/// std::invalid_argument for a family that known_families() lacks.
[[nodiscard]] Architecture family_defaults(const std::string& family);
/// Families this program knows.
[[nodiscard]] std::vector<std::string> known_families();

}  // namespace hestia
