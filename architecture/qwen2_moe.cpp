#include <fmt/format.h>

#include "family.hpp"

namespace hestia {
namespace {

void write_settings(const Architecture& architecture, Json& config) {
  config["use_sliding_window"] = architecture.sliding_window > 0;
  write_sliding_window(architecture, config);
  config["max_window_layers"] = architecture.num_layers;
  write_layer_types(architecture, config);
}

// With `use_sliding_window` every second layer from the first on is windowed, below `max_window_layers`, unless
// `layer_types` says which are.
void read_settings(ConfigReader& reader, Architecture& architecture) {
  if (architecture.shared_intermediate_size < 1) {
    reader.problem(fmt::format("\"shared_expert_intermediate_size\" must be at least 1, got {}; correct it",
                               architecture.shared_intermediate_size));
  }
  bool use = false;
  reader.read_optional("use_sliding_window", use);
  if (!use) {
    read_layer_types(reader, architecture);
    return;
  }
  std::int64_t max_window_layers = 28;
  reader.read_optional("max_window_layers", max_window_layers);
  architecture.sliding_window = 4096;
  read_sliding_window(reader, architecture);
  for (std::int64_t layer = 0; layer < architecture.num_layers && reader.find("layer_types") == nullptr; ++layer) {
    architecture.windowed_layers.push_back(layer % 2 == 0 && layer < max_window_layers);
  }
  read_layer_types(reader, architecture);
}

}  // namespace

Family qwen2_moe_family() {
  using A = Architecture;
  using E = Extent;
  using P = TensorPart;
  using R = TensorRole;
  Family family;
  family.transformers_class = "Qwen2MoeForCausalLM";
  family.defaults.family = "qwen2_moe";
  family.defaults.model_type = "qwen2_moe";
  family.defaults.attention_bias = true;
  family.defaults.norm_eps = 1e-6;
  family.defaults.max_position_embeddings = 32768;
  family.router_aux_loss_coef = 0.001;
  family.keys = common_keys();
  append(family.keys, {{"num_key_value_heads", &A::num_key_value_heads, true},
                       {"intermediate_size", &A::dense_intermediate_size, true},
                       {"moe_intermediate_size", &A::expert_intermediate_size, true},
                       {"shared_expert_intermediate_size", &A::shared_intermediate_size, true},
                       {"num_experts", &A::num_experts, true},
                       {"norm_topk_prob", &A::normalise_top_k},
                       {"decoder_sparse_step", &A::sparse_step},
                       {"mlp_only_layers", &A::dense_layers},
                       {"qkv_bias", &A::attention_bias}});
  family.read_more = read_settings;
  family.write_more = write_settings;
  family.before_layers = embedding_tensors();
  family.per_layer = attention_tensors();
  append(family.per_layer, {post_attention_norm()});
  append(family.per_layer, dense_tensors());
  append(family.per_layer,
         {{"model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
           {E::kSharedHidden, E::kHidden},
           R::kDense,
           P::kSharedGate},
          {"model.layers.{layer}.mlp.shared_expert.up_proj.weight",
           {E::kSharedHidden, E::kHidden},
           R::kDense,
           P::kSharedUp},
          {"model.layers.{layer}.mlp.shared_expert.down_proj.weight",
           {E::kHidden, E::kSharedHidden},
           R::kDense,
           P::kSharedDown},
          {"model.layers.{layer}.mlp.shared_expert_gate.weight", {E::kOne, E::kHidden}, R::kDense, P::kSharedScale}});
  append(family.per_layer, expert_tensors());
  family.after_layers = head_tensors();
  return family;
}

}  // namespace hestia
