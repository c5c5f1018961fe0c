#include <algorithm>

#include <fmt/format.h>

#include "family.hpp"

namespace hestia {

using A = Architecture;
using E = Extent;
using P = TensorPart;
using R = TensorRole;

std::vector<ConfigKey> common_keys() {
  return {{"vocab_size", &A::vocab_size, true},
          {"hidden_size", &A::hidden_size, true},
          {"num_hidden_layers", &A::num_layers, true},
          {"num_attention_heads", &A::num_attention_heads, true},
          {"head_dim", &A::head_dim},
          {"hidden_act", &A::hidden_act},
          {"max_position_embeddings", &A::max_position_embeddings},
          {"initializer_range", &A::initializer_range},
          {"rms_norm_eps", &A::norm_eps},
          {"tie_word_embeddings", &A::tie_word_embeddings},
          {"num_experts_per_tok", &A::top_k, true}};
}

std::vector<TensorPattern> embedding_tensors() {
  return {{"model.embed_tokens.weight", {E::kVocab, E::kHidden}, R::kEmbedding, P::kTokenEmbedding}};
}

std::vector<TensorPattern> attention_tensors() {
  bool A::*const biased = &A::attention_bias;
  return {
      {"model.layers.{layer}.input_layernorm.weight", {E::kHidden}, R::kNorm, P::kInputNorm},
      {"model.layers.{layer}.self_attn.q_proj.weight", {E::kQuery, E::kHidden}, R::kAttention, P::kQuery},
      {"model.layers.{layer}.self_attn.q_proj.bias", {E::kQuery}, R::kAttention, P::kQueryBias, biased},
      {"model.layers.{layer}.self_attn.k_proj.weight", {E::kKeyValue, E::kHidden}, R::kAttention, P::kKey},
      {"model.layers.{layer}.self_attn.k_proj.bias", {E::kKeyValue}, R::kAttention, P::kKeyBias, biased},
      {"model.layers.{layer}.self_attn.v_proj.weight", {E::kKeyValue, E::kHidden}, R::kAttention, P::kValue},
      {"model.layers.{layer}.self_attn.v_proj.bias", {E::kKeyValue}, R::kAttention, P::kValueBias, biased},
      {"model.layers.{layer}.self_attn.o_proj.weight", {E::kHidden, E::kQuery}, R::kAttention, P::kAttentionOutput},
  };
}

TensorPattern attention_output_bias() {
  return {"model.layers.{layer}.self_attn.o_proj.bias",
          {E::kHidden},
          R::kAttention,
          P::kAttentionOutputBias,
          &A::attention_bias};
}

TensorPattern post_attention_norm() {
  return {"model.layers.{layer}.post_attention_layernorm.weight", {E::kHidden}, R::kNorm, P::kPostAttentionNorm};
}

std::vector<TensorPattern> expert_tensors() {
  return {{"model.layers.{layer}.mlp.gate.weight", {E::kExperts, E::kHidden}, R::kRouter, P::kRouter},
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
           P::kExpertDown}};
}

std::vector<TensorPattern> mixtral_expert_tensors() {
  return {
      {"model.layers.{layer}.block_sparse_moe.gate.weight", {E::kExperts, E::kHidden}, R::kRouter, P::kRouter},
      {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
       {E::kExpertHidden, E::kHidden},
       R::kExpert,
       P::kExpertGate},
      {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
       {E::kHidden, E::kExpertHidden},
       R::kExpert,
       P::kExpertDown},
      {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
       {E::kExpertHidden, E::kHidden},
       R::kExpert,
       P::kExpertUp},
  };
}

std::vector<TensorPattern> dense_tensors() {
  return {
      {"model.layers.{layer}.mlp.gate_proj.weight", {E::kDenseHidden, E::kHidden}, R::kDense, P::kDenseGate},
      {"model.layers.{layer}.mlp.up_proj.weight", {E::kDenseHidden, E::kHidden}, R::kDense, P::kDenseUp},
      {"model.layers.{layer}.mlp.down_proj.weight", {E::kHidden, E::kDenseHidden}, R::kDense, P::kDenseDown},
  };
}

std::vector<TensorPattern> head_tensors() {
  return {{"model.norm.weight", {E::kHidden}, R::kNorm, P::kFinalNorm},
          {"lm_head.weight", {E::kVocab, E::kHidden}, R::kHead, P::kHead, nullptr, &A::tie_word_embeddings}};
}

void read_sliding_window(ConfigReader& reader, Architecture& architecture) {
  reader.read_optional("sliding_window", architecture.sliding_window);
  if (reader.find("sliding_window") != nullptr && architecture.sliding_window < 1) {
    reader.problem(fmt::format("\"sliding_window\" must be at least 1, or null for none, got {}; correct it",
                               architecture.sliding_window));
  }
}

void write_sliding_window(const Architecture& architecture, Json& config) {
  config["sliding_window"] = architecture.sliding_window > 0 ? Json(architecture.sliding_window) : Json(nullptr);
}

void read_layer_types(ConfigReader& reader, Architecture& architecture) {
  const Json* types = reader.find("layer_types");
  if (types == nullptr) {
    return;
  }
  std::vector<bool> windowed;
  bool known = types->is_array() && types->size() == static_cast<std::size_t>(architecture.num_layers);
  for (const Json& type : known ? *types : Json::array()) {
    known = known && (type == "full_attention" || type == "sliding_attention");
    windowed.push_back(type == "sliding_attention");
  }
  if (!known) {
    reader.problem(
        fmt::format("\"layer_types\" must say \"full_attention\" or \"sliding_attention\" for each of {} layers, got "
                    "{}; correct it",
                    architecture.num_layers, shown(*types)));
    return;
  }
  const bool any = std::find(windowed.begin(), windowed.end(), true) != windowed.end();
  if (any && architecture.sliding_window == 0) {
    reader.problem("\"layer_types\" has sliding attention but no sliding window is set; correct one");
    return;
  }
  architecture.windowed_layers = windowed;
}

void write_layer_types(const Architecture& architecture, Json& config) {
  Json types = Json::array();
  for (std::int64_t layer = 0; layer < architecture.num_layers; ++layer) {
    types.push_back(architecture.window_of(layer) > 0 ? "sliding_attention" : "full_attention");
  }
  config["layer_types"] = types;
}

}  // namespace hestia
