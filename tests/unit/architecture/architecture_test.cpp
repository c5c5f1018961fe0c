#include <algorithm>
#include <filesystem>
#include <fstream>

#include <catch2/catch.hpp>

#include "hestia/architecture/architecture.hpp"
#include "hestia/core/error.hpp"

namespace {

using namespace hestia;
using Catch::Matchers::Contains;

// The published config of OLMoE-1B-7B-0924, as far as it matters here.
Json hub_config() {
  return Json::parse(R"({
    "architectures": ["OlmoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "clip_qkv": null,
    "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
    "num_key_value_heads": 16, "output_router_logits": false, "pad_token_id": 1, "rope_scaling": null,
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "use_cache": true, "vocab_size": 50304})");
}

std::string message_of(const Json& config) {
  try {
    static_cast<void>(parse_architecture(config, "model/config.json"));
  } catch (const InputError& error) {
    return error.what();
  }
  return "";
}

std::string message_with(const char* key, const Json& value) {
  Json config = hub_config();
  config[key] = value;
  return message_of(config);
}

void check_same(const Architecture& a, const Architecture& b) {
  CHECK(a.family == b.family);
  CHECK(a.model_type == b.model_type);
  CHECK(a.vocab_size == b.vocab_size);
  CHECK(a.hidden_size == b.hidden_size);
  CHECK(a.expert_intermediate_size == b.expert_intermediate_size);
  CHECK(a.num_layers == b.num_layers);
  CHECK(a.num_attention_heads == b.num_attention_heads);
  CHECK(a.num_key_value_heads == b.num_key_value_heads);
  CHECK(a.head_dim == b.head_dim);
  CHECK(a.num_experts == b.num_experts);
  CHECK(a.top_k == b.top_k);
  CHECK(a.normalise_top_k == b.normalise_top_k);
  CHECK(a.query_key_norm == b.query_key_norm);
  CHECK(a.clip_qkv == b.clip_qkv);
  CHECK(a.attention_bias == b.attention_bias);
  CHECK(a.norm_eps == b.norm_eps);
  CHECK(a.rope.theta == b.rope.theta);
  CHECK(a.rope.type == b.rope.type);
  CHECK(a.rope.factor == b.rope.factor);
  CHECK(a.tie_word_embeddings == b.tie_word_embeddings);
  CHECK(a.max_position_embeddings == b.max_position_embeddings);
  CHECK(a.initializer_range == b.initializer_range);
  CHECK(a.bos_token_id == b.bos_token_id);
  CHECK(a.eos_token_id == b.eos_token_id);
  CHECK(a.pad_token_id == b.pad_token_id);
}

}  // namespace

TEST_CASE("the published OLMoE config gives its published size") {
  const Architecture a = parse_architecture(hub_config(), "config.json");
  CHECK(a.family == "olmoe");
  CHECK(a.head_dim == 128);
  CHECK(a.num_experts == 64);
  CHECK(a.top_k == 8);
  CHECK_FALSE(a.normalise_top_k);
  CHECK(a.query_key_norm);
  CHECK_FALSE(a.clip_qkv.has_value());
  CHECK(a.bos_token_id == -1);
  CHECK(a.eos_token_id == 50279);
  CHECK(a.pad_token_id == 1);
  CHECK(a.rope.theta == 10000.0);
  CHECK(a.expert_parameters() == 3 * 2048 * 1024);
  CHECK(a.total_parameters() == 6'919'161'856);  // the checkpoint's own count
  CHECK(a.moe_layers().size() == 16);
  CHECK(a.moe_layers().back() == 15);
  CHECK(router_name(a, 3) == "model.layers.3.mlp.gate.weight");
}

TEST_CASE("both spellings of rope settings are read") {
  Json config = hub_config();
  config.erase("rope_theta");
  config.erase("rope_scaling");
  SECTION("transformers 5") {
    config["rope_parameters"] = {{"rope_theta", 500000.0}, {"rope_type", "default"}};
    const Architecture a = parse_architecture(config, "c");
    CHECK(a.rope.theta == 500000.0);
    CHECK(a.rope.type == "default");
  }
  SECTION("transformers 5, linear") {
    config["rope_parameters"] = {{"rope_theta", 1000.0}, {"rope_type", "linear"}, {"factor", 4.0}};
    const Architecture a = parse_architecture(config, "c");
    CHECK(a.rope.theta == 1000.0);
    CHECK(a.rope.type == "linear");
    CHECK(a.rope.factor == 4.0);
  }
  SECTION("hub, with either name of the type") {
    const char* name = GENERATE("type", "rope_type");
    config["rope_theta"] = 20000;
    config["rope_scaling"] = {{name, "linear"}, {"factor", 2.5}};
    const Architecture a = parse_architecture(config, "c");
    CHECK(a.rope.theta == 20000.0);
    CHECK(a.rope.type == "linear");
    CHECK(a.rope.factor == 2.5);
  }
  SECTION("neither: the family's default") {
    CHECK(parse_architecture(config, "c").rope.theta == 10000.0);
  }
  SECTION("both, contradicting") {
    config["rope_theta"] = 10000.0;
    config["rope_parameters"] = {{"rope_theta", 500000.0}, {"rope_type", "default"}};
    CHECK_THAT(message_of(config), Contains("contradict each other, got 10000 and 500000"));
  }
  SECTION("unsupported") {
    config["rope_parameters"] = {{"rope_theta", 500000.0}, {"rope_type", "yarn"}, {"factor", 2.0}};
    CHECK_THAT(
        message_of(config),
        Contains("rope type is not supported, got \"yarn\"; this program knows \"default\", \"linear\" for olmoe"));
    config["rope_parameters"] = {{"rope_type", "linear"}};
    CHECK_THAT(message_of(config), Contains("has no \"factor\""));
    config["rope_parameters"] = {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}};
    CHECK_THAT(message_of(config), Contains("partial_rotary_factor"));
    config["rope_parameters"] = "default";
    CHECK_THAT(message_of(config), Contains("must be an object or null"));
    config["rope_parameters"] = {{"rope_theta", -1.0}};
    CHECK_THAT(message_of(config), Contains("must be positive, got -1"));
  }
}

TEST_CASE("optional keys fall back like in transformers") {
  Json config = hub_config();
  for (const char* key : {"num_key_value_heads", "norm_topk_prob", "rms_norm_eps", "clip_qkv", "tie_word_embeddings",
                          "pad_token_id", "hidden_act", "attention_bias"}) {
    config.erase(key);
  }
  const Architecture a = parse_architecture(config, "c");
  CHECK(a.num_key_value_heads == 16);
  CHECK_FALSE(a.normalise_top_k);
  CHECK(a.norm_eps == 1e-5);
  CHECK(a.pad_token_id == -1);
  config["num_key_value_heads"] = nullptr;
  config["eos_token_id"] = Json::array({7, 9});
  CHECK(parse_architecture(config, "c").num_key_value_heads == 16);
  CHECK(parse_architecture(config, "c").eos_token_id == 7);
}

TEST_CASE("what is wrong with a config is said, all of it") {
  CHECK_THAT(message_with("model_type", "mistral"), Contains("model/config.json: model type is not supported, got "
                                                             "\"mistral\"; known model types: deepseek_v2, gpt_oss, "));
  CHECK_THAT(message_with("model_type", nullptr), Contains("\"model_type\" is missing"));
  CHECK_THAT(message_with("hidden_act", "gelu"), Contains("got \"gelu\""));
  CHECK_THAT(message_with("num_experts_per_tok", 65), Contains("between 1 and num_experts (64), got 65"));
  CHECK_THAT(message_with("num_experts_per_tok", 0), Contains("got 0"));
  CHECK_THAT(message_with("num_key_value_heads", 5), Contains("multiple of num_key_value_heads (5), got 16"));
  CHECK_THAT(message_with("num_attention_heads", 3), Contains("multiple of num_attention_heads (3), got 2048"));
  CHECK_THAT(message_with("num_attention_heads", 2048), Contains("must be even"));
  CHECK_THAT(message_with("head_dim", 64), Contains("(16 x 64)"));
  CHECK_THAT(message_with("clip_qkv", -1.0), Contains("\"clip_qkv\" must be positive or null, got -1"));
  CHECK_THAT(message_with("vocab_size", 50304.5), Contains("must be a whole number, got 50304.5"));
  CHECK_THAT(message_with("vocab_size", std::uint64_t{1} << 63), Contains("must be a whole number"));
  CHECK_THAT(message_with("norm_topk_prob", 1), Contains("must be true or false, got 1"));
  CHECK_THAT(message_with("rms_norm_eps", "small"), Contains("must be a number, got \"small\""));
  CHECK_THAT(message_with("rms_norm_eps", 0.0), Contains("must be positive"));
  CHECK_THAT(message_with("num_hidden_layers", std::int64_t{1} << 50), Contains("between 1 and 4096"));
  CHECK_THAT(message_with("eos_token_id", "x"), Contains("eos_token_id"));
  CHECK_THAT(message_with("quantization_config", Json::object({{"bits", 4}})), Contains("quantised"));
  CHECK_THAT(message_with("quantization_config", Json::object({{"quant_method", "fp8"}})), Contains("quantised"));
  CHECK_THAT(message_with("quantization_config", Json::object({{"quant_method", "fp8"}, {"weight_block_size", {128}}})),
             Contains("\"weight_block_size\" must be two numbers between 1 and 16777216, got [128]"));
  CHECK_THAT(
      message_with("quantization_config",
                   Json::object({{"quant_method", "fp8"}, {"weight_block_size", {INT64_MAX, 128}}})),
      Contains("\"weight_block_size\" must be two numbers between 1 and 16777216, got [9223372036854775807,128]"));
  CHECK_THAT(message_of(Json::array({1, 2})), Contains("must be a JSON object, got [1,2]"));

  Json config = hub_config();
  config.erase("vocab_size");
  config.erase("num_experts");
  config["clip_qkv"] = "yes";
  const std::string all = message_of(config);
  CHECK_THAT(all, Contains("\"vocab_size\" is missing"));
  CHECK_THAT(all, Contains("\"num_experts\" is missing"));
  CHECK_THAT(all, Contains("\"clip_qkv\" must be a number, got \"yes\""));
  CHECK(std::count(all.begin(), all.end(), '\n') >= 2);

  config = hub_config();
  config["hidden_act"] = "relu";
  config["num_experts_per_tok"] = 100;
  CHECK_THAT(message_of(config), Contains("relu") && Contains("got 100"));
}

TEST_CASE("a written config reads back to the same architecture") {
  Json config = hub_config();
  const bool changed = GENERATE(false, true);
  if (changed) {
    config["clip_qkv"] = 8.0;
    config["norm_topk_prob"] = true;
    config["tie_word_embeddings"] = true;
    config["num_key_value_heads"] = 4;
    config["attention_bias"] = true;
    config["rope_theta"] = 12345.0;
    config["rope_scaling"] = {{"type", "linear"}, {"factor", 3.0}};
    config["bos_token_id"] = 0;
    config["rms_norm_eps"] = 1e-6;
  }
  const Architecture a = parse_architecture(config, "c");
  const Json written = architecture_config(a);
  check_same(parse_architecture(written, "w"), a);
  CHECK(written.at("architectures").at(0) == "OlmoeForCausalLM");
  CHECK(written.at("router_aux_loss_coef") == 0.01);
  CHECK(written.at("rope_theta") == written.at("rope_parameters").at("rope_theta"));
  CHECK(written.at("bos_token_id").is_null() == !changed);
  // Either reader must be served on its own.
  Json old_reader = written;
  old_reader.erase("rope_parameters");
  check_same(parse_architecture(old_reader, "w"), a);
  Json new_reader = written;
  new_reader.erase("rope_theta");
  new_reader.erase("rope_scaling");
  check_same(parse_architecture(new_reader, "w"), a);
}

TEST_CASE("tensor specs name every tensor once, with its shape") {
  Json config = hub_config();
  config["num_hidden_layers"] = 2;
  config["num_experts"] = 3;
  config["num_experts_per_tok"] = 2;
  config["num_key_value_heads"] = 4;
  const Architecture a = parse_architecture(config, "c");
  const std::vector<TensorSpec> specs = tensor_specs(a);
  CHECK(specs.size() == 1 + 2 * (9 + 3 * 3) + 2);
  std::vector<std::string> names;
  for (const TensorSpec& spec : specs) {
    names.push_back(spec.name);
    CHECK(spec.name.find('{') == std::string::npos);
  }
  std::sort(names.begin(), names.end());
  CHECK(std::adjacent_find(names.begin(), names.end()) == names.end());
  const auto find = [&](const std::string& name) {
    const auto it = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec& s) { return s.name == name; });
    REQUIRE(it != specs.end());
    return *it;
  };
  const TensorSpec down = find("model.layers.1.mlp.experts.2.down_proj.weight");
  CHECK(down.shape == std::vector<std::int64_t>{2048, 1024});
  CHECK(down.role == TensorRole::kExpert);
  CHECK(down.part == TensorPart::kExpertDown);
  CHECK(down.layer == 1);
  CHECK(down.expert == 2);
  CHECK(find("model.layers.0.self_attn.k_proj.weight").shape == std::vector<std::int64_t>{512, 2048});
  CHECK(find("model.layers.0.self_attn.k_norm.weight").shape == std::vector<std::int64_t>{512});
  CHECK(find("model.layers.0.mlp.gate.weight").shape == std::vector<std::int64_t>{3, 2048});
  CHECK(find("lm_head.weight").role == TensorRole::kHead);

  config["tie_word_embeddings"] = true;
  config["attention_bias"] = true;
  const std::vector<TensorSpec> others = tensor_specs(parse_architecture(config, "c"));
  CHECK(others.size() == specs.size() - 1 + 2 * 4);
  CHECK(others.back().name == "model.norm.weight");
}

TEST_CASE("an unknown family is refused") {
  Architecture a;
  a.family = "dense";
  CHECK_THROWS_WITH(tensor_specs(a), Contains("got \"dense\""));
  CHECK_THROWS_WITH(family_defaults("dense"), Contains("got \"dense\""));
  const std::vector<std::string> known = known_families();
  CHECK(known.size() > 1);
  CHECK(std::is_sorted(known.begin(), known.end()));
  for (const std::string& family : known) {
    CHECK(family_defaults(family).family == family);
  }
}

TEST_CASE("a directory without a readable config is an input error that names the file") {
  const std::filesystem::path directory = std::filesystem::temp_directory_path() / "hestia_unit_architecture";
  std::filesystem::remove_all(directory);
  std::filesystem::create_directories(directory);
  CHECK_THROWS_WITH(read_architecture(directory), Contains("config.json"));
  std::ofstream(directory / "config.json") << "{ \"model_type\": ";
  CHECK_THROWS_AS(read_architecture(directory), InputError);
  std::ofstream(directory / "config.json") << hub_config().dump();
  CHECK(read_architecture(directory).hidden_size == 2048);
  std::filesystem::remove_all(directory);
}
