#include "family.hpp"

namespace hestia {

Family phimoe_family() {
  using A = Architecture;
  using E = Extent;
  using P = TensorPart;
  using R = TensorRole;
  Family family;
  family.transformers_class = "PhimoeForCausalLM";
  family.defaults.family = "phimoe";
  family.defaults.model_type = "phimoe";
  family.defaults.norm = NormKind::kLayer;
  family.defaults.routing = RoutingKind::kSparsemixer;
  family.defaults.router_jitter = 0.01;
  family.defaults.rope.theta = 1e6;
  family.defaults.max_position_embeddings = 131072;
  family.rope_types = {"default", "longrope"};
  family.defaults.fixed_top_k = 2;
  family.router_aux_loss_coef = 0.001;
  family.keys = common_keys();
  append(family.keys, {{"num_key_value_heads", &A::num_key_value_heads, true},
                       {"intermediate_size", &A::expert_intermediate_size, true},
                       {"num_local_experts", &A::num_experts, true},
                       {"router_jitter_noise", &A::router_jitter},
                       {"attention_bias", &A::attention_bias},
                       {"lm_head_bias", &A::head_bias}});
  family.read_more = read_sliding_window;
  family.write_more = write_sliding_window;
  family.before_layers = embedding_tensors();
  family.per_layer = attention_tensors();
  append(family.per_layer,
         {attention_output_bias(),
          {"model.layers.{layer}.input_layernorm.bias", {E::kHidden}, R::kNorm, P::kInputNormBias},
          post_attention_norm(),
          {"model.layers.{layer}.post_attention_layernorm.bias", {E::kHidden}, R::kNorm, P::kPostAttentionNormBias}});
  append(family.per_layer, mixtral_expert_tensors());
  family.after_layers = {{"model.norm.bias", {E::kHidden}, R::kNorm, P::kFinalNormBias}};
  append(family.after_layers, head_tensors());
  append(family.after_layers, {{"lm_head.bias", {E::kVocab}, R::kHead, P::kHeadBias, &A::head_bias}});
  return family;
}

}  // namespace hestia
