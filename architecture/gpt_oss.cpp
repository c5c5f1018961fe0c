#include "family.hpp"

namespace hestia {
namespace {

// Without `layer_types` every second layer, the first among them, is windowed.
void read_settings(ConfigReader& reader, Architecture& architecture) {
  if (reader.has("sliding_window")) {
    architecture.sliding_window = 0;  // null says none
  }
  read_sliding_window(reader, architecture);
  for (std::int64_t layer = 0; layer < architecture.num_layers && reader.find("layer_types") == nullptr; ++layer) {
    architecture.windowed_layers.push_back(layer % 2 == 0);
  }
  read_layer_types(reader, architecture);
}

void write_settings(const Architecture& architecture, Json& config) {
  write_sliding_window(architecture, config);
  write_layer_types(architecture, config);
}

}  // namespace

Family gpt_oss_family() {
  using A = Architecture;
  using E = Extent;
  using P = TensorPart;
  using R = TensorRole;
  Family family;
  family.transformers_class = "GptOssForCausalLM";
  family.defaults.family = "gpt_oss";
  family.defaults.model_type = "gpt_oss";
  family.defaults.norm = NormKind::kRmsWide;
  family.defaults.routing = RoutingKind::kSoftmaxOfChosen;
  family.defaults.attention_bias = true;
  family.defaults.router_bias = true;
  family.defaults.expert_bias = true;
  family.defaults.swiglu_limit = 7.0;
  family.defaults.sliding_window = 128;
  family.defaults.max_position_embeddings = 131072;
  family.defaults.rope.theta = 150000.0;
  family.defaults.rope.type = "yarn";
  family.defaults.rope.factor = 32.0;
  family.defaults.rope.original_positions = 4096;
  family.defaults.rope.truncate = false;
  family.rope_types = {"default", "yarn"};
  family.router_aux_loss_coef = 0.001;
  family.keys = common_keys();
  for (ConfigKey& row : family.keys) {
    row.required = row.required || row.field == decltype(row.field)(&A::head_dim);
  }
  append(family.keys, {{"num_key_value_heads", &A::num_key_value_heads, true},
                       {"intermediate_size", &A::expert_intermediate_size, true},
                       {"num_local_experts", &A::num_experts, true, "num_experts"},
                       {"attention_bias", &A::attention_bias},
                       {"swiglu_alpha", &A::swiglu_alpha},
                       {"swiglu_limit", &A::swiglu_limit}});
  family.read_more = read_settings;
  family.write_more = write_settings;
  family.before_layers = embedding_tensors();
  family.per_layer = attention_tensors();
  append(
      family.per_layer,
      {attention_output_bias(),
       {"model.layers.{layer}.self_attn.sinks", {E::kHeads}, R::kAttention, P::kSinks},
       post_attention_norm(),
       {"model.layers.{layer}.mlp.router.weight", {E::kExperts, E::kHidden}, R::kRouter, P::kRouter},
       {"model.layers.{layer}.mlp.router.bias", {E::kExperts}, R::kRouter, P::kRouterBias},
       {"model.layers.{layer}.mlp.experts.gate_up_proj",
        {E::kExperts, E::kHidden, E::kExpertGateUp},
        R::kExpert,
        P::kExpertGateUp},
       {"model.layers.{layer}.mlp.experts.gate_up_proj_bias",
        {E::kExperts, E::kExpertGateUp},
        R::kExpert,
        P::kExpertGateUpBias},
       {"model.layers.{layer}.mlp.experts.down_proj",
        {E::kExperts, E::kExpertHidden, E::kHidden},
        R::kExpert,
        P::kExpertDown},
       {"model.layers.{layer}.mlp.experts.down_proj_bias", {E::kExperts, E::kHidden}, R::kExpert, P::kExpertDownBias}});
  family.after_layers = head_tensors();
  return family;
}

}  // namespace hestia
