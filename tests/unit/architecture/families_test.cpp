// The published configs of the families, as far as they matter here, and what only some families have.

#include <algorithm>
#include <cmath>

#include <catch2/catch.hpp>

#include "hestia/architecture/architecture.hpp"
#include "hestia/core/error.hpp"

namespace {

using namespace hestia;
using Catch::Matchers::Contains;

// Qwen1.5-MoE-A2.7B
Json qwen2_config() {
  return Json::parse(R"({
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": false,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936})");
}

// Qwen3-30B-A3B
Json qwen3_config() {
  return Json::parse(R"({
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936})");
}

// Mixtral-8x7B
Json mixtral_config() {
  return Json::parse(R"({
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000})");
}

// Phi-3.5-MoE, but for the values of its rope factors
Json phimoe_config() {
  Json config = Json::parse(R"({
    "architectures": ["PhiMoEForCausalLM"], "attention_bias": true, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 32000, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096, "initializer_range": 0.02,
    "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": true, "max_position_embeddings": 131072,
    "model_type": "phimoe", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 16, "original_max_position_embeddings": 4096,
    "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01, "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "use_cache": true, "vocab_size": 32064})");
  config["rope_scaling"] = {{"type", "longrope"},
                            {"short_factor", std::vector<double>(64, 1.5)},
                            {"long_factor", std::vector<double>(64, 20.25)},
                            {"short_mscale", 1.243163121016122},
                            {"long_mscale", 1.243163121016122},
                            {"original_max_position_embeddings", 4096}};
  return config;
}

// DeepSeek-V2-Lite
Json deepseek_config() {
  return Json::parse(R"({
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
    "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "use_cache": true, "v_head_dim": 128, "vocab_size": 102400})");
}

std::string message_of(const Json& config) {
  try {
    static_cast<void>(parse_architecture(config, "c"));
  } catch (const InputError& error) {
    return error.what();
  }
  return "";
}

// What a written config reads back to has the same tensors, layers and windows.
void check_written(const Architecture& a) {
  const Json written = architecture_config(a);
  const Architecture again = parse_architecture(written, "w");
  CHECK(architecture_config(again) == written);
  CHECK(again.moe_layers() == a.moe_layers());
  CHECK(again.norm_eps == a.norm_eps);
  CHECK(again.normalise_top_k == a.normalise_top_k);
  for (std::int64_t layer = 0; layer < a.num_layers; ++layer) {
    CHECK(again.window_of(layer) == a.window_of(layer));
  }
  const std::vector<TensorSpec> ours = tensor_specs(a);
  const std::vector<TensorSpec> theirs = tensor_specs(again);
  CHECK(std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                   [](const TensorSpec& x, const TensorSpec& y) { return x.name == y.name && x.shape == y.shape; }));
}

bool has(const Architecture& a, const std::string& name) {
  const std::vector<TensorSpec> specs = tensor_specs(a);
  return std::any_of(specs.begin(), specs.end(), [&](const TensorSpec& spec) { return spec.name == name; });
}

}  // namespace

TEST_CASE("published configs give their published sizes") {
  const Architecture qwen2 = parse_architecture(qwen2_config(), "c");
  CHECK(qwen2.total_parameters() == 14'315'784'192);
  CHECK(qwen2.attention_bias);
  CHECK(qwen2.window_of(0) == 0);
  CHECK(router_name(qwen2, 23) == "model.layers.23.mlp.gate.weight");
  check_written(qwen2);

  const Architecture qwen3 = parse_architecture(qwen3_config(), "c");
  CHECK(qwen3.total_parameters() == 30'532'122'624);
  CHECK(qwen3.head_dim == 128);
  CHECK(qwen3.normalise_top_k);
  check_written(qwen3);

  const Architecture mixtral = parse_architecture(mixtral_config(), "c");
  CHECK(mixtral.total_parameters() == 46'702'792'704);
  CHECK(mixtral.normalise_top_k);
  CHECK(router_name(mixtral, 3) == "model.layers.3.block_sparse_moe.gate.weight");
  check_written(mixtral);

  const Architecture phimoe = parse_architecture(phimoe_config(), "c");
  CHECK(phimoe.total_parameters() == 41'873'153'344);
  CHECK(phimoe.rope.original_positions == 4096);
  CHECK(phimoe.rope.long_factor.back() == 20.25);
  CHECK(phimoe.rope.short_scale == 1.243163121016122);
  CHECK(phimoe.router_jitter == 0.01);
  CHECK(phimoe.window_of(5) == 131072);
  CHECK(router_name(phimoe, 3) == "model.layers.3.block_sparse_moe.gate.weight");
  check_written(phimoe);
}

TEST_CASE("DeepSeek-V2: the published sizes, layers with experts, groups and yarn") {
  Json config = deepseek_config();
  const Architecture lite = parse_architecture(config, "c");
  CHECK(lite.total_parameters() == 15'706'484'224);
  CHECK(lite.head_dim == 192);
  CHECK(lite.rotary_dim() == 64);
  CHECK(lite.shared_intermediate_size == 2816);
  CHECK(lite.moe_layers().size() == 26);
  CHECK(lite.rope.rotation_scale() == 1.0);
  CHECK(lite.rope.yarn_scale(0.707) == Approx(1.0 + 0.0707 * std::log(40.0)));
  CHECK(router_name(lite, 26) == "model.layers.26.mlp.gate.weight");
  check_written(lite);
  CHECK_FALSE(has(lite, "model.layers.1.self_attn.q_a_proj.weight"));
  config["q_lora_rank"] = 1536;
  config["moe_layer_freq"] = 2;
  config["first_k_dense_replace"] = 3;
  config["num_hidden_layers"] = 8;
  config["topk_method"] = "group_limited_greedy";
  config["n_group"] = 8;
  config["topk_group"] = 3;
  config["rope_scaling"].erase("mscale");
  const Architecture a = parse_architecture(config, "c");
  CHECK(a.moe_layers() == std::vector<std::int64_t>{4, 6});
  CHECK(a.num_groups == 8);
  CHECK(a.top_groups == 3);
  CHECK(a.rope.rotation_scale() == Approx(1.0 + 0.1 * std::log(40.0)));
  CHECK(has(a, "model.layers.1.self_attn.q_a_layernorm.weight"));
  CHECK_FALSE(has(a, "model.layers.1.self_attn.q_proj.weight"));
  CHECK(has(a, "model.layers.5.mlp.up_proj.weight"));
  check_written(a);
  config["rope_parameters"] = config["rope_scaling"];
  config["rope_parameters"]["rope_theta"] = config["rope_theta"];
  config.erase("rope_scaling");
  config.erase("rope_theta");
  CHECK(architecture_config(parse_architecture(config, "c")) == architecture_config(a));
}

TEST_CASE("gpt-oss: the published sizes, windows, rope and storage") {
  // gpt-oss-20b
  Json config = Json::parse(R"({
    "architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": false, "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["model.embed_tokens"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
    "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false}, "rope_theta": 150000,
    "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": false,
    "use_cache": true, "vocab_size": 201088})");
  const Architecture a = parse_architecture(config, "c");
  CHECK(a.total_parameters() == 20'914'757'184);
  CHECK(a.quantisation == Quantisation::kMxfp4);
  CHECK(a.window_of(0) == 128);
  CHECK(a.window_of(1) == 0);
  CHECK_FALSE(a.rope.truncate);
  CHECK(a.rope.rotation_scale() == Approx(1.0 + 0.1 * std::log(32.0)));
  CHECK(a.swiglu_alpha == 1.702);
  CHECK(router_name(a, 3) == "model.layers.3.mlp.router.weight");
  CHECK(has(a, "model.layers.3.mlp.router.bias"));
  CHECK(has(a, "model.layers.3.mlp.experts.gate_up_proj_bias"));
  check_written(a);
  CHECK_FALSE(architecture_config(a).contains("quantization_config"));
  config["rope_scaling"].erase("truncate");
  CHECK(parse_architecture(config, "c").rope.truncate);
  config["rope_scaling"] = nullptr;
  CHECK(parse_architecture(config, "c").rope.type == "yarn");
  config["swiglu_limit"] = -1.0;
  CHECK_THAT(message_of(config), Contains("\"swiglu_alpha\" and \"swiglu_limit\" must be positive"));
}

TEST_CASE("DeepSeek-V2: what is wrong with its settings is said") {
  Json config = deepseek_config();
  config.erase("q_lora_rank");
  config["topk_method"] = "noaux_tc";
  config["scoring_func"] = "sigmoid";
  config["num_key_value_heads"] = 4;
  CHECK_THAT(message_of(config), Contains("\"q_lora_rank\" is missing") && Contains("got \"noaux_tc\"") &&
                                     Contains("got \"sigmoid\"") && Contains("\"num_key_value_heads\" must be"));
  config = deepseek_config();
  config["qk_rope_head_dim"] = 63;
  config["norm_topk_prob"] = true;
  config["routed_scaling_factor"] = 16.0;
  CHECK_THAT(message_of(config), Contains("\"qk_rope_head_dim\" must be even, got 63") &&
                                     Contains("\"norm_topk_prob\" goes with") && Contains("got 16 and 6"));
  config["kv_lora_rank"] = 0;
  config["n_shared_experts"] = 1000000000000;
  CHECK_THAT(message_of(config),
             Contains("\"kv_lora_rank\" must be between") && Contains("\"n_shared_experts\" must be"));
  config = deepseek_config();
  config["topk_method"] = "group_limited_greedy";
  config.erase("n_group");
  CHECK_THAT(message_of(config), Contains("\"n_group\" is missing"));
  config["n_group"] = 7;
  CHECK_THAT(message_of(config), Contains("expert groups must divide 64 experts evenly"));
  config = deepseek_config();
  config["rope_scaling"]["beta_fast"] = -1;
  CHECK_THAT(message_of(config), Contains("\"beta_fast\"") && Contains("must be positive"));
  config["rope_scaling"].erase("factor");
  CHECK_THAT(message_of(config), Contains("of type \"yarn\" has no \"factor\""));
}

TEST_CASE("Qwen2-MoE: which layers have experts and which are windowed") {
  Json config = qwen2_config();
  config["num_hidden_layers"] = 6;
  config["decoder_sparse_step"] = 2;
  config["mlp_only_layers"] = {3};
  config["use_sliding_window"] = true;
  config["max_window_layers"] = 3;
  const Architecture a = parse_architecture(config, "c");
  CHECK(a.moe_layers() == std::vector<std::int64_t>{1, 5});
  CHECK(a.window_of(0) == 32768);
  CHECK(a.window_of(1) == 0);
  CHECK(a.window_of(2) == 32768);
  CHECK(a.window_of(4) == 0);
  CHECK(has(a, "model.layers.3.mlp.up_proj.weight"));
  CHECK_FALSE(has(a, "model.layers.3.mlp.gate.weight"));
  CHECK_FALSE(has(a, "model.layers.3.mlp.shared_expert_gate.weight"));
  CHECK(has(a, "model.layers.5.mlp.shared_expert_gate.weight"));
  CHECK_FALSE(has(a, "model.layers.5.mlp.up_proj.weight"));
  check_written(a);
  config["layer_types"] = {"full_attention",    "sliding_attention", "full_attention",
                           "sliding_attention", "full_attention",    "full_attention"};
  const Architecture given = parse_architecture(config, "c");
  CHECK(given.window_of(0) == 0);
  CHECK(given.window_of(3) == 32768);
  check_written(given);
  config["layer_types"].erase(0);
  CHECK_THAT(message_of(config), Contains("\"layer_types\" must say") && Contains("each of 6 layers"));
  config["layer_types"] = Json::array({"a", "b", "c", "d", "e", "f"});
  CHECK_THAT(message_of(config), Contains("\"layer_types\" must say"));
}

TEST_CASE("what is wrong with a family's own settings is said") {
  Json config = qwen2_config();
  config["mlp_only_layers"] = {0, "x"};
  CHECK_THAT(message_of(config), Contains("\"mlp_only_layers\" must be a list of whole numbers, got [0,\"x\"]"));
  config = qwen2_config();
  config["decoder_sparse_step"] = 0;
  CHECK_THAT(message_of(config), Contains("\"decoder_sparse_step\" must be between 1 and"));
  config["decoder_sparse_step"] = 25;
  CHECK_THAT(message_of(config), Contains("no layer has experts"));
  config = qwen2_config();
  config["use_sliding_window"] = true;
  config["sliding_window"] = 0;
  CHECK_THAT(message_of(config), Contains("\"sliding_window\" must be at least 1"));
  config = qwen2_config();
  config["layer_types"] = std::vector<std::string>(24, "sliding_attention");
  CHECK_THAT(message_of(config), Contains("no sliding window is set"));
  config = qwen2_config();
  config.erase("num_key_value_heads");
  config.erase("shared_expert_intermediate_size");
  CHECK_THAT(message_of(config), Contains("\"num_key_value_heads\" is missing") &&
                                     Contains("\"shared_expert_intermediate_size\" is missing"));
  config = mixtral_config();
  config["num_local_experts"] = 1;
  CHECK_THAT(message_of(config), Contains("between 1 and num_local_experts (1), got 2"));
  config["num_local_experts"] = 0;
  CHECK_THAT(message_of(config), Contains("\"num_local_experts\" must be between 1 and"));
}

TEST_CASE("Phi-3.5-MoE: rope factors and the fixed number of experts") {
  Json config = phimoe_config();
  config["rope_scaling"]["long_factor"].erase(0);
  CHECK_THAT(message_of(config),
             Contains("\"long_factor\" of the rope settings must be 64 positive numbers") && Contains("got 63"));
  config["rope_scaling"]["long_factor"].push_back(-1.0);
  CHECK_THAT(message_of(config), Contains("got 64, not all positive"));
  config["rope_scaling"]["long_factor"].push_back("x");
  CHECK_THAT(message_of(config), Contains("\"long_factor\" must be a list of numbers"));
  config["rope_scaling"].erase("long_mscale");
  CHECK_THAT(message_of(config), Contains("of type \"longrope\" have no \"long_mscale\"; add it"));
  config = phimoe_config();
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  CHECK_THAT(message_of(config), Contains("this program knows \"default\", \"longrope\" for phimoe models"));
  config = phimoe_config();
  config["num_experts_per_tok"] = 3;
  CHECK_THAT(message_of(config), Contains("must be 2 because the routing of phimoe models has no other, got 3"));
  config = phimoe_config();
  config.erase("original_max_position_embeddings");
  config["rope_scaling"].erase("original_max_position_embeddings");
  CHECK(parse_architecture(config, "c").rope.original_positions == 131072);
  config["rope_parameters"] = config["rope_scaling"];
  config["rope_parameters"]["rope_theta"] = config["rope_theta"];
  config.erase("rope_scaling");
  config.erase("rope_theta");
  CHECK(parse_architecture(config, "c").rope.theta == 10000.0);
  CHECK(parse_architecture(config, "c").rope.long_scale == 1.243163121016122);
}

TEST_CASE("Qwen3-MoE: experts in the hub's and in transformers 5's spelling, windows only where used") {
  Json config = qwen3_config();
  config["num_local_experts"] = config["num_experts"];
  config.erase("num_experts");
  config["sliding_window"] = 100;
  CHECK(parse_architecture(config, "c").num_experts == 128);
  CHECK(parse_architecture(config, "c").window_of(7) == 0);
  config["use_sliding_window"] = true;
  const Architecture a = parse_architecture(config, "c");
  CHECK(a.window_of(7) == 100);
  check_written(a);
  config["sliding_window"] = nullptr;
  CHECK(parse_architecture(config, "c").window_of(7) == 4096);
}
