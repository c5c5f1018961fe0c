#include "family.hpp"

namespace hestia {

Family mixtral_family() {
  using A = Architecture;
  Family family;
  family.transformers_class = "MixtralForCausalLM";
  family.defaults.family = "mixtral";
  family.defaults.model_type = "mixtral";
  family.defaults.normalise_top_k = true;
  family.defaults.rope.theta = 1e6;
  family.defaults.max_position_embeddings = 131072;
  family.router_aux_loss_coef = 0.001;
  family.keys = common_keys();
  append(family.keys, {{"num_key_value_heads", &A::num_key_value_heads, true},
                       {"intermediate_size", &A::expert_intermediate_size, true},
                       {"num_local_experts", &A::num_experts, true, "num_experts"}});
  family.read_more = read_sliding_window;
  family.write_more = write_sliding_window;
  family.before_layers = embedding_tensors();
  family.per_layer = attention_tensors();
  append(family.per_layer, {post_attention_norm()});
  append(family.per_layer, mixtral_expert_tensors());
  family.after_layers = head_tensors();
  return family;
}

}  // namespace hestia
