#include "family.hpp"

namespace hestia {

Family olmoe_family() {
  using A = Architecture;
  using E = Extent;
  using P = TensorPart;
  using R = TensorRole;
  Family family;
  family.transformers_class = "OlmoeForCausalLM";
  family.defaults.family = "olmoe";
  family.defaults.model_type = "olmoe";
  family.defaults.query_key_norm = true;
  family.router_aux_loss_coef = 0.01;
  family.keys = common_keys();
  append(family.keys, {{"num_key_value_heads", &A::num_key_value_heads},
                       {"intermediate_size", &A::expert_intermediate_size, true},
                       {"attention_bias", &A::attention_bias},
                       {"clip_qkv", &A::clip_qkv},
                       {"num_experts", &A::num_experts, true},
                       {"norm_topk_prob", &A::normalise_top_k}});
  family.before_layers = embedding_tensors();
  family.per_layer = attention_tensors();
  append(family.per_layer, {attention_output_bias(),
                            {"model.layers.{layer}.self_attn.q_norm.weight", {E::kQuery}, R::kNorm, P::kQueryNorm},
                            {"model.layers.{layer}.self_attn.k_norm.weight", {E::kKeyValue}, R::kNorm, P::kKeyNorm},
                            post_attention_norm()});
  append(family.per_layer, expert_tensors());
  family.after_layers = head_tensors();
  return family;
}

}  // namespace hestia
