#include <fmt/format.h>

#include "family.hpp"

namespace hestia {
namespace {

using A = Architecture;

constexpr const char* kGrouped = "group_limited_greedy";

// Only experts of the best groups are chosen among when `topk_method` says so; otherwise the group sizes are idle.
void read_groups(ConfigReader& reader, Architecture& architecture) {
  std::string method = "greedy";
  reader.read_optional("topk_method", method);
  if (method == kGrouped) {
    for (const auto& [key, field] : {std::pair("n_group", &A::num_groups), std::pair("topk_group", &A::top_groups)}) {
      if (const Json* value = reader.find(key); value != nullptr) {
        reader.read(key, *value, architecture.*field);
      } else {
        reader.problem(fmt::format("key \"{}\" is missing; \"topk_method\" \"{}\" needs it", key, kGrouped));
      }
    }
  } else if (method != "greedy") {
    reader.problem(fmt::format("\"topk_method\" is not supported, got \"{}\"; this program knows \"greedy\" and \"{}\"",
                               method, kGrouped));
  }
}

void read_settings(ConfigReader& reader, Architecture& architecture) {
  Architecture& a = architecture;
  read_groups(reader, a);
  std::string scoring = "softmax";
  reader.read_optional("scoring_func", scoring);
  if (scoring != "softmax") {
    reader.problem(
        fmt::format("\"scoring_func\" is not supported, got \"{}\"; this program knows \"softmax\"", scoring));
  }
  bool mlp_bias = false;
  reader.read_optional("mlp_bias", mlp_bias);
  if (mlp_bias) {
    reader.problem("\"mlp_bias\" is not supported, got true; only false is");
  }
  // Null says that queries have no latent; a default would be a guess.
  if (!reader.has("q_lora_rank")) {
    reader.problem("key \"q_lora_rank\" is missing; a deepseek_v2 config must have it, null for none");
  } else if (reader.find("q_lora_rank") != nullptr && a.query_rank < 1) {
    reader.problem(
        fmt::format("\"q_lora_rank\" must be at least 1, or null for none, got {}; correct it", a.query_rank));
  }
  if (reader.find("num_key_value_heads") != nullptr && a.num_key_value_heads != a.num_attention_heads) {
    reader.problem(
        fmt::format("\"num_key_value_heads\" must be num_attention_heads ({}) because latent attention has a key and a "
                    "value for each head, got {}; correct it",
                    a.num_attention_heads, a.num_key_value_heads));
  }
  // What follows multiplies and adds sizes: they must be such first.
  constexpr std::int64_t kMaxWidth = std::int64_t{1} << 24;
  bool sizes = true;
  const auto check = [&](const char* key, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high) {
      reader.problem(fmt::format("\"{}\" must be between {} and {}, got {}; correct it", key, low, high, value));
      sizes = false;
    }
  };
  std::int64_t shared = 0;
  reader.read_optional("n_shared_experts", shared);
  check("n_shared_experts", shared, 0, 4096);
  check("moe_intermediate_size", a.expert_intermediate_size, 1, kMaxWidth);
  check("kv_lora_rank", a.key_value_rank, 1, kMaxWidth);
  check("q_lora_rank", a.query_rank, 0, kMaxWidth);
  check("qk_nope_head_dim", a.plain_head_dim, 0, kMaxWidth);
  check("qk_rope_head_dim", a.rotary_head_dim, 2, kMaxWidth);
  check("v_head_dim", a.value_head_dim, 1, kMaxWidth);
  if (!sizes) {
    return;
  }
  if (a.rotary_head_dim % 2 != 0) {
    reader.problem(fmt::format("\"qk_rope_head_dim\" must be even, got {}; correct it", a.rotary_head_dim));
  }
  a.head_dim = a.plain_head_dim + a.rotary_head_dim;
  a.shared_intermediate_size = shared * a.expert_intermediate_size;
  // The family's own code scales what it does not normalise and leaves a single expert's weight alone.
  if (a.normalise_top_k && (a.routed_scale != 1.0 || a.top_k == 1)) {
    reader.problem(
        fmt::format("\"norm_topk_prob\" goes with a \"routed_scaling_factor\" of 1 and two or more experts per token "
                    "only, got {} and {}; correct one",
                    a.routed_scale, a.top_k));
  }
}

void write_settings(const Architecture& a, Json& config) {
  config["q_lora_rank"] = a.query_rank > 0 ? Json(a.query_rank) : Json(nullptr);
  config["n_shared_experts"] = a.shared_intermediate_size / a.expert_intermediate_size;
  config["topk_method"] = a.num_groups == a.top_groups ? "greedy" : kGrouped;
  config["n_group"] = a.num_groups;
  config["topk_group"] = a.top_groups;
  config["scoring_func"] = "softmax";
  config["aux_loss_alpha"] = config["router_aux_loss_coef"];
  config["seq_aux"] = true;
}

}  // namespace

Family deepseek_v2_family() {
  using E = Extent;
  using P = TensorPart;
  using R = TensorRole;
  Family family;
  family.transformers_class = "DeepseekV2ForCausalLM";
  family.defaults.family = "deepseek_v2";
  family.defaults.model_type = "deepseek_v2";
  family.defaults.norm_eps = 1e-6;
  family.defaults.max_position_embeddings = 2048;
  family.defaults.sparse_from_zero = true;
  family.rope_types = {"default", "yarn"};
  family.router_aux_loss_coef = 0.001;
  family.keys = {{"vocab_size", &A::vocab_size, true},
                 {"hidden_size", &A::hidden_size, true},
                 {"intermediate_size", &A::dense_intermediate_size, true},
                 {"moe_intermediate_size", &A::expert_intermediate_size, true},
                 {"num_hidden_layers", &A::num_layers, true},
                 {"num_attention_heads", &A::num_attention_heads, true},
                 {"num_key_value_heads", &A::num_key_value_heads},
                 {"kv_lora_rank", &A::key_value_rank, true},
                 {"q_lora_rank", &A::query_rank},
                 {"qk_nope_head_dim", &A::plain_head_dim, true},
                 {"qk_rope_head_dim", &A::rotary_head_dim, true},
                 {"v_head_dim", &A::value_head_dim, true},
                 {"n_routed_experts", &A::num_experts, true, "num_experts"},
                 {"num_experts_per_tok", &A::top_k, true},
                 {"norm_topk_prob", &A::normalise_top_k},
                 {"routed_scaling_factor", &A::routed_scale},
                 {"first_k_dense_replace", &A::first_dense_layers},
                 {"moe_layer_freq", &A::sparse_step},
                 {"attention_bias", &A::attention_bias},
                 {"hidden_act", &A::hidden_act},
                 {"max_position_embeddings", &A::max_position_embeddings},
                 {"initializer_range", &A::initializer_range},
                 {"rms_norm_eps", &A::norm_eps},
                 {"tie_word_embeddings", &A::tie_word_embeddings}};
  family.read_more = read_settings;
  family.write_more = write_settings;
  family.before_layers = embedding_tensors();
  const auto weight = [](const char* pattern, Extent rows, Extent columns, P part) {
    return TensorPattern{pattern, {rows, columns}, R::kAttention, part};
  };
  const auto norm = [](const char* pattern, Extent size, P part) {
    return TensorPattern{pattern, {size}, R::kNorm, part};
  };
  const auto bias = [](const char* pattern, Extent size, P part) {
    return TensorPattern{pattern, {size}, R::kAttention, part, &A::attention_bias};
  };
  const auto shared = [](const char* pattern, Extent rows, Extent columns, P part) {
    return TensorPattern{pattern, {rows, columns}, R::kDense, part};
  };
  family.per_layer = {
      norm("model.layers.{layer}.input_layernorm.weight", E::kHidden, P::kInputNorm),
      weight("model.layers.{layer}.self_attn.q_proj.weight", E::kQuery, E::kHidden, P::kQuery),
      weight("model.layers.{layer}.self_attn.q_a_proj.weight", E::kQueryRank, E::kHidden, P::kQueryDown),
      bias("model.layers.{layer}.self_attn.q_a_proj.bias", E::kQueryRank, P::kQueryDownBias),
      norm("model.layers.{layer}.self_attn.q_a_layernorm.weight", E::kQueryRank, P::kQueryLatentNorm),
      weight("model.layers.{layer}.self_attn.q_b_proj.weight", E::kQuery, E::kQueryRank, P::kQueryUp),
      weight("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight", E::kKeyValueDown, E::kHidden,
             P::kKeyValueDown),
      bias("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.bias", E::kKeyValueDown, P::kKeyValueDownBias),
      norm("model.layers.{layer}.self_attn.kv_a_layernorm.weight", E::kKeyValueRank, P::kKeyValueLatentNorm),
      weight("model.layers.{layer}.self_attn.kv_b_proj.weight", E::kKeyValueUp, E::kKeyValueRank, P::kKeyValueUp),
      weight("model.layers.{layer}.self_attn.o_proj.weight", E::kHidden, E::kHeadValues, P::kAttentionOutput),
      attention_output_bias(),
      post_attention_norm()};
  append(family.per_layer, dense_tensors());
  append(
      family.per_layer,
      {shared("model.layers.{layer}.mlp.shared_experts.gate_proj.weight", E::kSharedHidden, E::kHidden, P::kSharedGate),
       shared("model.layers.{layer}.mlp.shared_experts.up_proj.weight", E::kSharedHidden, E::kHidden, P::kSharedUp),
       shared("model.layers.{layer}.mlp.shared_experts.down_proj.weight", E::kHidden, E::kSharedHidden,
              P::kSharedDown)});
  append(family.per_layer, expert_tensors());
  family.after_layers = head_tensors();
  return family;
}

}  // namespace hestia
