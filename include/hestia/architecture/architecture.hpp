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
  std::string type = "default";  ///< default | linear | (others refused until a family needs them)
  double factor = 1.0;           ///< linear: positions are divided by it.
};

/// A checkpoint, as plain data: everything `model/` needs to build the forward. The only place a family is described.
struct Architecture {
  std::string family;      ///< Hestia's name, for example "olmoe".
  std::string model_type;  ///< `model_type` of config.json.
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t expert_intermediate_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_attention_heads = 0;
  std::int64_t num_key_value_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t num_experts = 0;    ///< E, routed experts per MoE layer.
  std::int64_t top_k = 0;          ///< K
  bool normalise_top_k = false;    ///< Divide the chosen weights by their sum.
  bool query_key_norm = false;     ///< RMSNorm over the whole projected query and key (all heads together).
  std::optional<double> clip_qkv;  ///< Clamp projected q, k, v to [-c, c].
  bool attention_bias = false;
  double rms_norm_eps = 1e-5;
  RopeSettings rope;
  bool tie_word_embeddings = false;
  std::string hidden_act = "silu";
  std::int64_t max_position_embeddings = 4096;
  double initializer_range = 0.02;
  std::int64_t bos_token_id = -1;  ///< -1: none
  std::int64_t eos_token_id = -1;
  std::int64_t pad_token_id = -1;

  /// Model layers that hold a MoE block, in order (all of them for OLMoE).
  [[nodiscard]] std::vector<std::int64_t> moe_layers() const;
  /// Parameters of one routed expert.
  [[nodiscard]] std::int64_t expert_parameters() const { return 3 * hidden_size * expert_intermediate_size; }
  /// All parameters (tied embeddings once).
  [[nodiscard]] std::int64_t total_parameters() const;
};

/// What a tensor is to the program.
enum class TensorRole { kEmbedding, kNorm, kAttention, kRouter, kExpert, kHead };

/// Which matrix or vector of the model a tensor is: how `model/` finds the parameter behind a checkpoint's name.
enum class TensorPart {
  kTokenEmbedding,
  kInputNorm,
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
  kRouter,
  kExpertGate,
  kExpertUp,
  kExpertDown,
  kFinalNorm,
  kHead
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
/// The `config.json` that transformers reads back to the same model (OLMoE: architectures, rope_theta and
/// rope_parameters).
[[nodiscard]] Json architecture_config(const Architecture& architecture);
/// Sets the experts per token in a `config.json` of the architecture's family; every other key stays.
void set_config_top_k(Json& config, const Architecture& architecture, std::int64_t top_k);
/// Every tensor a checkpoint must hold, with its Hugging Face name and shape.
[[nodiscard]] std::vector<TensorSpec> tensor_specs(const Architecture& architecture);
/// Name of the router matrix [E, D] of a model layer: `model.layers.3.mlp.gate.weight`.
[[nodiscard]] std::string router_name(const Architecture& architecture, std::int64_t layer);
/// Families this program knows.
[[nodiscard]] std::vector<std::string> known_families();

}  // namespace hestia
