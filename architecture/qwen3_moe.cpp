#include "family.hpp"

namespace hestia {
namespace {

void read_windows(ConfigReader& reader, Architecture& architecture) {
  bool use = false;
  reader.read_optional("use_sliding_window", use);
  if (use) {
    architecture.sliding_window = 4096;
    read_sliding_window(reader, architecture);
  }
}

void write_windows(const Architecture& architecture, Json& config) {
  config["use_sliding_window"] = architecture.sliding_window > 0;
  write_sliding_window(architecture, config);
}

}  // namespace

Family qwen3_moe_family() {
  using A = Architecture;
  using E = Extent;
  using P = TensorPart;
  using R = TensorRole;
  Family family;
  family.transformers_class = "Qwen3MoeForCausalLM";
  family.defaults.family = "qwen3_moe";
  family.defaults.model_type = "qwen3_moe";
  family.defaults.query_key_norm = true;
  family.defaults.query_key_norm_heads = true;
  family.defaults.norm_eps = 1e-6;
  family.defaults.max_position_embeddings = 32768;
  family.router_aux_loss_coef = 0.001;
  family.keys = common_keys();
  append(family.keys, {{"num_key_value_heads", &A::num_key_value_heads, true},
                       {"intermediate_size", &A::dense_intermediate_size, true},
                       {"moe_intermediate_size", &A::expert_intermediate_size, true},
                       {"num_experts", &A::num_experts, true, "num_local_experts"},
                       {"norm_topk_prob", &A::normalise_top_k},
                       {"decoder_sparse_step", &A::sparse_step},
                       {"mlp_only_layers", &A::dense_layers},
                       {"attention_bias", &A::attention_bias}});
  family.read_more = read_windows;
  family.write_more = write_windows;
  family.before_layers = embedding_tensors();
  family.per_layer = attention_tensors();
  append(family.per_layer, {attention_output_bias(),
                            {"model.layers.{layer}.self_attn.q_norm.weight", {E::kHeadDim}, R::kNorm, P::kQueryNorm},
                            {"model.layers.{layer}.self_attn.k_norm.weight", {E::kHeadDim}, R::kNorm, P::kKeyNorm},
                            post_attention_norm()});
  append(family.per_layer, dense_tensors());
  append(family.per_layer, expert_tensors());
  family.after_layers = head_tensors();
  return family;
}

}  // namespace hestia
