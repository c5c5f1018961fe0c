#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "config_reader.hpp"
#include "hestia/architecture/architecture.hpp"

namespace hestia {

/// One key of `config.json` and the field it fills. A key that is absent or null leaves the family's default, unless it
/// is required. Written under `key`; `other` is another spelling that is read.
struct ConfigKey {
  const char* key;
  std::variant<std::int64_t Architecture::*, double Architecture::*, bool Architecture::*, std::string Architecture::*,
               std::optional<double> Architecture::*, std::vector<std::int64_t> Architecture::*>
      field;
  bool required = false;
  const char* other = nullptr;
};

/// A size that stands in a tensor's shape.
enum class Extent {
  kOne,
  kVocab,
  kHidden,
  kQuery,
  kKeyValue,
  kHeadDim,
  kExperts,
  kExpertHidden,
  kExpertGateUp,
  kHeads,
  kSharedHidden,
  kDenseHidden,
  kQueryRank,
  kKeyValueRank,
  kKeyValueDown,
  kKeyValueUp,
  kHeadValues
};

/// One row of a family's tensor table. `{layer}` and `{expert}` in the pattern are replaced. Tensors of routers,
/// experts and shared experts stand in MoE layers only, those of dense feed-forwards (kDenseGate, ...) in the others.
struct TensorPattern {
  const char* pattern;
  std::vector<Extent> shape;
  TensorRole role;
  TensorPart part;
  bool Architecture::*only_if = nullptr;    ///< Present only when this switch is on.
  bool Architecture::*unless_on = nullptr;  ///< Absent when this switch is on.

  /// Whether there is one such tensor for every expert.
  [[nodiscard]] bool each_expert() const {
    return std::string_view(pattern).find("{expert}") != std::string_view::npos;
  }
};

/// A family of checkpoints as data. Tables are in checkpoint order: before the layers, per layer (an `{expert}` run is
/// written expert by expert), after the layers.
struct Family {
  std::string transformers_class;  ///< What `architectures` of config.json says.
  Architecture defaults;           ///< Its name, its `model_type`, and what an absent key means.
  std::vector<ConfigKey> keys;
  std::vector<std::string> rope_types = {"default", "linear"};
  std::vector<TensorPattern> before_layers;
  std::vector<TensorPattern> per_layer;
  std::vector<TensorPattern> after_layers;
  double router_aux_loss_coef = 0.0;  ///< Written to config.json for transformers; Hestia does not read it.
  /// Settings that are more than one key each; null: there are none.
  void (*read_more)(ConfigReader& reader, Architecture& architecture) = nullptr;
  void (*write_more)(const Architecture& architecture, Json& config) = nullptr;

  /// The key that fills a field; null when the family has none.
  template <class Field>
  [[nodiscard]] const char* key_of(Field Architecture::*field) const {
    for (const ConfigKey& row : keys) {
      const auto* here = std::get_if<Field Architecture::*>(&row.field);
      if (here != nullptr && *here == field) {
        return row.key;
      }
    }
    return nullptr;
  }
};

/// Rotary settings in the hub's spelling (`rope_theta`, `rope_scaling`) and in that of transformers 5
/// (`rope_parameters`).
void read_rope(ConfigReader& reader, const Family& family, Architecture& architecture);
/// Both of them: transformers 4 reads the one, transformers 5 the other.
void write_rope(const Architecture& architecture, Json& config);

// What many families have alike.

/// Keys of sizes, norms, heads and experts per token; a family adds its own.
[[nodiscard]] std::vector<ConfigKey> common_keys();
[[nodiscard]] std::vector<TensorPattern> embedding_tensors();
/// Input norm and the four projections, biases of query, key and value under `attention_bias`.
[[nodiscard]] std::vector<TensorPattern> attention_tensors();
[[nodiscard]] TensorPattern attention_output_bias();
[[nodiscard]] TensorPattern post_attention_norm();
/// Router and experts as `mlp.gate` and `mlp.experts.N.gate_proj`, `up_proj`, `down_proj`.
[[nodiscard]] std::vector<TensorPattern> expert_tensors();
/// The same as `block_sparse_moe.gate` and `block_sparse_moe.experts.N.w1` (gate), `w2` (down), `w3` (up).
[[nodiscard]] std::vector<TensorPattern> mixtral_expert_tensors();
/// Feed-forward of layers without experts.
[[nodiscard]] std::vector<TensorPattern> dense_tensors();
/// Final norm and head.
[[nodiscard]] std::vector<TensorPattern> head_tensors();

/// `sliding_window`: null or absent for none.
void read_sliding_window(ConfigReader& reader, Architecture& architecture);
void write_sliding_window(const Architecture& architecture, Json& config);
/// `layer_types`, where it is given: which layers are windowed.
void read_layer_types(ConfigReader& reader, Architecture& architecture);
void write_layer_types(const Architecture& architecture, Json& config);

/// Adds one list of rows to another.
template <class Row>
void append(std::vector<Row>& rows, const std::vector<Row>& more) {
  rows.insert(rows.end(), more.begin(), more.end());
}

/// DeepSeek-V2 and V2-Lite (arXiv 2405.04434).
[[nodiscard]] Family deepseek_v2_family();
/// OpenAI's gpt-oss (arXiv 2508.10925).
[[nodiscard]] Family gpt_oss_family();
/// Mistral AI's Mixtral (arXiv 2401.04088).
[[nodiscard]] Family mixtral_family();
/// Allenai's OLMoE (arXiv 2409.02060).
[[nodiscard]] Family olmoe_family();
/// Microsoft's Phi-3.5-MoE (arXiv 2404.14219; routing: arXiv 2409.12136).
[[nodiscard]] Family phimoe_family();
/// Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671).
[[nodiscard]] Family qwen2_moe_family();
/// Qwen3-MoE (arXiv 2505.09388).
[[nodiscard]] Family qwen3_moe_family();

}  // namespace hestia
