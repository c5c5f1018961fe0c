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
  family.keys = {
      {"vocab_size", &A::vocab_size, true},
      {"hidden_size", &A::hidden_size, true},
      {"intermediate_size", &A::expert_intermediate_size, true},
      {"num_hidden_layers", &A::num_layers, true},
      {"num_attention_heads", &A::num_attention_heads, true},
      {"num_key_value_heads", &A::num_key_value_heads},
      {"head_dim", &A::head_dim},
      {"hidden_act", &A::hidden_act},
      {"max_position_embeddings", &A::max_position_embeddings},
      {"initializer_range", &A::initializer_range},
      {"rms_norm_eps", &A::norm_eps},
      {"tie_word_embeddings", &A::tie_word_embeddings},
      {"attention_bias", &A::attention_bias},
      {"clip_qkv", &A::clip_qkv},
      {"num_experts", &A::num_experts, true},
      {"num_experts_per_tok", &A::top_k, true},
      {"norm_topk_prob", &A::normalise_top_k},
  };
  family.before_layers = {
      {"model.embed_tokens.weight", {E::kVocab, E::kHidden}, R::kEmbedding, P::kTokenEmbedding},
  };
  family.per_layer = {
      {"model.layers.{layer}.input_layernorm.weight", {E::kHidden}, R::kNorm, P::kInputNorm},
      {"model.layers.{layer}.self_attn.q_proj.weight", {E::kQuery, E::kHidden}, R::kAttention, P::kQuery},
      {"model.layers.{layer}.self_attn.q_proj.bias", {E::kQuery}, R::kAttention, P::kQueryBias, &A::attention_bias},
      {"model.layers.{layer}.self_attn.k_proj.weight", {E::kKeyValue, E::kHidden}, R::kAttention, P::kKey},
      {"model.layers.{layer}.self_attn.k_proj.bias", {E::kKeyValue}, R::kAttention, P::kKeyBias, &A::attention_bias},
      {"model.layers.{layer}.self_attn.v_proj.weight", {E::kKeyValue, E::kHidden}, R::kAttention, P::kValue},
      {"model.layers.{layer}.self_attn.v_proj.bias", {E::kKeyValue}, R::kAttention, P::kValueBias, &A::attention_bias},
      {"model.layers.{layer}.self_attn.o_proj.weight", {E::kHidden, E::kQuery}, R::kAttention, P::kAttentionOutput},
      {"model.layers.{layer}.self_attn.o_proj.bias",
       {E::kHidden},
       R::kAttention,
       P::kAttentionOutputBias,
       &A::attention_bias},
      {"model.layers.{layer}.self_attn.q_norm.weight", {E::kQuery}, R::kNorm, P::kQueryNorm, &A::query_key_norm},
      {"model.layers.{layer}.self_attn.k_norm.weight", {E::kKeyValue}, R::kNorm, P::kKeyNorm, &A::query_key_norm},
      {"model.layers.{layer}.post_attention_layernorm.weight", {E::kHidden}, R::kNorm, P::kPostAttentionNorm},
      {"model.layers.{layer}.mlp.gate.weight", {E::kExperts, E::kHidden}, R::kRouter, P::kRouter},
      {"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
       {E::kExpertHidden, E::kHidden},
       R::kExpert,
       P::kExpertGate},
      {"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
       {E::kExpertHidden, E::kHidden},
       R::kExpert,
       P::kExpertUp},
      {"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
       {E::kHidden, E::kExpertHidden},
       R::kExpert,
       P::kExpertDown},
  };
  family.after_layers = {
      {"model.norm.weight", {E::kHidden}, R::kNorm, P::kFinalNorm},
      {"lm_head.weight", {E::kVocab, E::kHidden}, R::kHead, P::kHead, nullptr, &A::tie_word_embeddings},
  };
  return family;
}

}  // namespace hestia
