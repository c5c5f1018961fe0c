#include "hestia/architecture/architecture.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string_view>

#include <fmt/format.h>

#include "family.hpp"
#include "hestia/core/error.hpp"

namespace hestia {
namespace {

const std::vector<Family>& families() {
  static const std::vector<Family> all = {deepseek_v2_family(), gpt_oss_family(),   mixtral_family(),  olmoe_family(),
                                          phimoe_family(),      qwen2_moe_family(), qwen3_moe_family()};
  return all;
}

const Family& family_named(const std::string& name) {
  for (const Family& family : families()) {
    if (family.defaults.family == name) {
      return family;
    }
  }
  throw std::invalid_argument(
      fmt::format("architecture: family is not known to this program, got \"{}\"; fill it with parse_architecture or "
                  "one of known_families()",
                  name));
}

const Family& family_of(const Architecture& architecture) {
  return family_named(architecture.family);
}

void read_keys(const Family& family, ConfigReader& reader, Architecture& architecture) {
  for (const ConfigKey& row : family.keys) {
    const Json* value = reader.find(row.key);
    if (value == nullptr && row.other != nullptr) {
      value = reader.find(row.other);
    }
    if (value == nullptr) {
      if (row.required) {
        reader.problem(fmt::format("key \"{}\" is missing; a {} config must have it", row.key, family.defaults.family));
      }
      continue;
    }
    std::visit([&](auto field) { reader.read(row.key, *value, architecture.*field); }, row.field);
  }
}

// Token ids may be absent, null, a number, or (end of sequence) a list, of which the first counts.
void read_token_id(ConfigReader& reader, const char* key, std::int64_t& out) {
  const Json* value = reader.find(key);
  if (value != nullptr && value->is_array() && !value->empty()) {
    value = &value->front();
  }
  if (value != nullptr) {
    reader.read(key, *value, out);
  }
}

// Keeps a damaged file from asking for absurd amounts of memory before any tensor is looked at.
constexpr std::int64_t kMaxWidth = std::int64_t{1} << 24;

void read_quantisation(ConfigReader& reader, const Json& settings, Architecture& architecture) {
  const Json* method = ConfigReader::find_in(settings, "quant_method");
  const Json* format = ConfigReader::find_in(settings, "fmt");
  const Json* block = ConfigReader::find_in(settings, "weight_block_size");
  const bool fp8 =
      method != nullptr && *method == "fp8" && block != nullptr && (format == nullptr || *format == "e4m3");
  if (method != nullptr && *method == "mxfp4") {
    architecture.quantisation = Quantisation::kMxfp4;
  } else if (fp8) {
    architecture.quantisation = Quantisation::kFp8Blocks;
    std::vector<std::int64_t> sizes;
    reader.read("weight_block_size", *block, sizes);
    if (sizes.size() != 2 || std::min(sizes[0], sizes[1]) < 1 || std::max(sizes[0], sizes[1]) > kMaxWidth) {
      reader.problem(fmt::format("\"weight_block_size\" must be two numbers between 1 and {}, got {}; correct it",
                                 kMaxWidth, shown(*block)));
      return;
    }
    architecture.scale_block_rows = sizes[0];
    architecture.scale_block_columns = sizes[1];
  } else {
    reader.problem(
        fmt::format("checkpoints quantised in this way are not supported, got \"quantization_config\" {}; this program "
                    "reads \"quant_method\" \"fp8\" (\"fmt\" \"e4m3\" with a \"weight_block_size\") and \"mxfp4\", and "
                    "float32, bf16 and f16",
                    shown(settings)));
  }
}

void check_values(const Family& family, const Architecture& a, ConfigReader& reader) {
  using A = Architecture;
  constexpr std::int64_t kMaxLayers = 4096;
  constexpr std::int64_t kMaxExperts = 65536;
  const auto in_range = [&](std::int64_t A::*field, std::int64_t high, std::int64_t low = 1) {
    const char* key = family.key_of(field);
    if (a.*field >= low && a.*field <= high) {
      return true;
    }
    if (key != nullptr) {
      reader.problem(fmt::format("\"{}\" must be between {} and {}, got {}; correct it", key, low, high, a.*field));
    }
    return key == nullptr;
  };
  in_range(&A::vocab_size, kMaxWidth);
  bool sizes = in_range(&A::hidden_size, kMaxWidth);
  in_range(&A::expert_intermediate_size, kMaxWidth);
  in_range(&A::shared_intermediate_size, kMaxWidth, 0);
  in_range(&A::first_dense_layers, kMaxLayers, 0);
  const bool step = in_range(&A::sparse_step, kMaxLayers);
  if (in_range(&A::num_layers, kMaxLayers) && step) {
    const auto with_experts = static_cast<std::int64_t>(a.moe_layers().size());
    if (with_experts == 0) {
      reader.problem("no layer has experts; this program tunes routers, give the config of a mixture-of-experts model");
    }
    if (with_experts < a.num_layers) {
      in_range(&A::dense_intermediate_size, kMaxWidth);
    }
  }
  sizes = in_range(&A::num_attention_heads, kMaxWidth) && sizes;
  sizes = in_range(&A::num_key_value_heads, kMaxWidth) && sizes;
  in_range(&A::max_position_embeddings, std::int64_t{1} << 40);
  if (in_range(&A::num_experts, kMaxExperts)) {
    if (a.top_k < 1 || a.top_k > a.num_experts) {
      reader.problem(fmt::format("\"{}\" must be between 1 and {} ({}), got {}; correct it", family.key_of(&A::top_k),
                                 family.key_of(&A::num_experts), a.num_experts, a.top_k));
    } else if (a.fixed_top_k > 0 && a.top_k != a.fixed_top_k) {
      reader.problem(fmt::format("\"{}\" must be {} because the routing of {} models has no other, got {}; correct it",
                                 family.key_of(&A::top_k), a.fixed_top_k, a.family, a.top_k));
    } else if (a.num_groups < 1 || a.num_experts % a.num_groups != 0 || a.top_groups < 1 ||
               a.top_groups > a.num_groups || a.top_groups * (a.num_experts / a.num_groups) < a.top_k) {
      reader.problem(
          fmt::format("expert groups must divide {} experts evenly and leave {} to choose from, got {} of {} "
                      "groups; correct them",
                      a.num_experts, a.top_k, a.top_groups, a.num_groups));
    }
  }
  if (sizes) {
    if (a.num_attention_heads % a.num_key_value_heads != 0) {
      reader.problem(
          fmt::format("\"num_attention_heads\" must be a multiple of num_key_value_heads ({}), got {}; correct one",
                      a.num_key_value_heads, a.num_attention_heads));
    }
    if (a.key_value_rank == 0 && (a.head_dim < 1 || a.head_dim % 2 != 0 || a.head_dim > kMaxWidth)) {
      reader.problem(
          fmt::format("\"head_dim\" (hidden_size / num_attention_heads unless given) must be even and "
                      "positive, got {}; correct it",
                      a.head_dim));
    } else if (a.query_key_norm && !a.query_key_norm_heads && a.head_dim * a.num_attention_heads != a.hidden_size) {
      reader.problem(
          fmt::format("\"hidden_size\" must be num_attention_heads x head_dim ({} x {}) because query and key are "
                      "normalised over their whole width, got {}; correct one",
                      a.num_attention_heads, a.head_dim, a.hidden_size));
    }
  }
  for (const auto& [key, factors] :
       {std::pair("short_factor", &a.rope.short_factor), std::pair("long_factor", &a.rope.long_factor)}) {
    const bool positive = std::all_of(factors->begin(), factors->end(),
                                      [](double factor) { return factor > 0.0 && std::isfinite(factor); });
    if (a.rope.type == "longrope" && (!positive || static_cast<std::int64_t>(factors->size()) != a.head_dim / 2)) {
      reader.problem(
          fmt::format("\"{}\" of the rope settings must be {} positive numbers (head_dim / 2), got {}{}; "
                      "correct it",
                      key, a.head_dim / 2, factors->size(), positive ? "" : ", not all positive"));
    }
  }
  if (a.router_jitter < 0.0 || !std::isfinite(a.router_jitter)) {
    reader.problem(fmt::format("\"router_jitter_noise\" must be at least 0, got {}; correct it", a.router_jitter));
  }
  if (a.hidden_act != "silu") {
    reader.problem(
        fmt::format("\"hidden_act\" is not supported, got \"{}\"; this program knows \"silu\"", a.hidden_act));
  }
  if (!(a.norm_eps > 0.0) || !std::isfinite(a.norm_eps)) {
    reader.problem(fmt::format("\"{}\" must be positive, got {}; correct it", family.key_of(&A::norm_eps), a.norm_eps));
  }
  if (!(a.initializer_range > 0.0) || !std::isfinite(a.initializer_range)) {
    reader.problem(fmt::format("\"initializer_range\" must be positive, got {}; correct it", a.initializer_range));
  }
  if (!(a.swiglu_alpha > 0.0) || !std::isfinite(a.swiglu_alpha) || (a.swiglu_limit && !(*a.swiglu_limit > 0.0))) {
    reader.problem(fmt::format("\"swiglu_alpha\" and \"swiglu_limit\" must be positive, got {} and {}; correct them",
                               a.swiglu_alpha, a.swiglu_limit.value_or(0.0)));
  }
  if (a.clip_qkv && !(*a.clip_qkv > 0.0)) {
    reader.problem(fmt::format("\"clip_qkv\" must be positive or null, got {}; correct it", *a.clip_qkv));
  }
}

std::int64_t extent_value(const Architecture& a, Extent extent) {
  switch (extent) {
    case Extent::kOne:
      return 1;
    case Extent::kVocab:
      return a.vocab_size;
    case Extent::kHidden:
      return a.hidden_size;
    case Extent::kQuery:
      return a.num_attention_heads * a.head_dim;
    case Extent::kKeyValue:
      return a.num_key_value_heads * a.head_dim;
    case Extent::kHeadDim:
      return a.head_dim;
    case Extent::kExperts:
      return a.num_experts;
    case Extent::kExpertHidden:
      return a.expert_intermediate_size;
    case Extent::kExpertGateUp:
      return 2 * a.expert_intermediate_size;
    case Extent::kHeads:
      return a.num_attention_heads;
    case Extent::kSharedHidden:
      return a.shared_intermediate_size;
    case Extent::kDenseHidden:
      return a.dense_intermediate_size;
    case Extent::kQueryRank:
      return a.query_rank;
    case Extent::kKeyValueRank:
      return a.key_value_rank;
    case Extent::kKeyValueDown:
      return a.key_value_rank + a.rotary_head_dim;
    case Extent::kKeyValueUp:
      return a.num_attention_heads * (a.plain_head_dim + a.value_head_dim);
    case Extent::kHeadValues:
      return a.num_attention_heads * a.value_head_dim;
  }
  throw std::invalid_argument("architecture: unknown extent");
}

void replace_all(std::string& text, std::string_view what, std::int64_t value) {
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what)) {
    text.replace(at, what.size(), std::to_string(value));
  }
}

bool stands_in(const Architecture& a, TensorPart part, std::int64_t layer) {
  using P = TensorPart;
  switch (part) {
    case P::kRouter:
    case P::kRouterBias:
    case P::kExpertGateUp:
    case P::kExpertGateUpBias:
    case P::kExpertDownBias:
    case P::kExpertGate:
    case P::kExpertUp:
    case P::kExpertDown:
      return a.is_moe_layer(layer);
    case P::kSharedGate:
    case P::kSharedUp:
    case P::kSharedDown:
    case P::kSharedScale:
      return a.is_moe_layer(layer) && a.shared_intermediate_size > 0;
    case P::kDenseGate:
    case P::kDenseUp:
    case P::kDenseDown:
      return !a.is_moe_layer(layer);
    case P::kQuery:
      return a.query_rank == 0;
    case P::kQueryDown:
    case P::kQueryDownBias:
    case P::kQueryLatentNorm:
    case P::kQueryUp:
      return a.query_rank > 0;
    default:
      return true;
  }
}

bool present(const Architecture& a, const TensorPattern& row, std::int64_t layer) {
  return (row.only_if == nullptr || a.*row.only_if) && (row.unless_on == nullptr || !(a.*row.unless_on)) &&
         stands_in(a, row.part, layer);
}

TensorSpec make_spec(const Architecture& a, const TensorPattern& row, std::int64_t layer, std::int64_t expert) {
  TensorSpec spec;
  spec.name = row.pattern;
  replace_all(spec.name, "{layer}", layer);
  replace_all(spec.name, "{expert}", expert);
  for (const Extent extent : row.shape) {
    spec.shape.push_back(extent_value(a, extent));
  }
  spec.role = row.role;
  spec.part = row.part;
  spec.layer = layer;
  spec.expert = expert;
  spec.transposed = row.role == TensorRole::kExpert && !row.each_expert() && row.shape.size() == 3;
  return spec;
}

std::int64_t product(const std::vector<std::int64_t>& shape) {
  std::int64_t elements = 1;
  for (const std::int64_t size : shape) {
    elements *= size;
  }
  return elements;
}

}  // namespace

bool Architecture::is_moe_layer(std::int64_t layer) const {
  return layer >= first_dense_layers && (sparse_from_zero ? layer : layer + 1) % sparse_step == 0 &&
         std::find(dense_layers.begin(), dense_layers.end(), layer) == dense_layers.end();
}

std::int64_t Architecture::window_of(std::int64_t layer) const {
  return windowed_layers.empty() || windowed_layers.at(static_cast<std::size_t>(layer)) ? sliding_window : 0;
}

std::vector<std::int64_t> Architecture::moe_layers() const {
  std::vector<std::int64_t> layers;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    if (is_moe_layer(layer)) {
      layers.push_back(layer);
    }
  }
  return layers;
}

std::int64_t Architecture::total_parameters() const {
  std::int64_t total = 0;
  for (const TensorSpec& spec : tensor_specs(*this)) {
    total += product(spec.shape);
  }
  return total;
}

Architecture parse_architecture(const Json& config, const std::string& subject) {
  Problems problems;
  ConfigReader reader(config, subject, problems);
  if (!config.is_object()) {
    reader.problem(
        fmt::format("a model config must be a JSON object, got {}; give the config.json of a Hugging Face "
                    "model directory",
                    shown(config)));
    problems.throw_input_if_any();
  }
  std::string model_type_text;
  const std::string known = fmt::format("{}", fmt::join(known_families(), ", "));
  const Json* model_type = reader.find("model_type");
  if (model_type == nullptr) {
    reader.problem(fmt::format("key \"model_type\" is missing; known model types: {}", known));
    problems.throw_input_if_any();
  }
  reader.read("model_type", *model_type, model_type_text);
  problems.throw_input_if_any();
  const Family* family = nullptr;
  for (const Family& candidate : families()) {
    if (candidate.defaults.model_type == model_type_text) {
      family = &candidate;
    }
  }
  if (family == nullptr) {
    reader.problem(
        fmt::format("model type is not supported, got \"{}\"; known model types: {}", model_type_text, known));
    problems.throw_input_if_any();
  }
  Architecture architecture = family->defaults;
  read_keys(*family, reader, architecture);
  read_rope(reader, *family, architecture);
  if (family->read_more != nullptr) {
    family->read_more(reader, architecture);
  }
  read_token_id(reader, "bos_token_id", architecture.bos_token_id);
  read_token_id(reader, "eos_token_id", architecture.eos_token_id);
  read_token_id(reader, "pad_token_id", architecture.pad_token_id);
  if (const Json* settings = reader.find("quantization_config"); settings != nullptr) {
    read_quantisation(reader, *settings, architecture);
  }
  // What is already wrong would only repeat itself in the checks of values that depend on it.
  problems.throw_input_if_any();
  if (reader.find("num_key_value_heads") == nullptr) {
    architecture.num_key_value_heads = architecture.num_attention_heads;
  }
  if (family->key_of(&Architecture::head_dim) != nullptr && reader.find("head_dim") == nullptr &&
      architecture.num_attention_heads > 0) {
    if (architecture.hidden_size % architecture.num_attention_heads != 0) {
      reader.problem(fmt::format("\"hidden_size\" must be a multiple of num_attention_heads ({}), got {}; correct one",
                                 architecture.num_attention_heads, architecture.hidden_size));
      problems.throw_input_if_any();
    }
    architecture.head_dim = architecture.hidden_size / architecture.num_attention_heads;
  }
  check_values(*family, architecture, reader);
  problems.throw_input_if_any();
  return architecture;
}

Architecture read_architecture(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "config.json";
  return parse_architecture(read_json_file(path), path.string());
}

Json architecture_config(const Architecture& architecture) {
  const Family& family = family_of(architecture);
  Json config = Json::object();
  config["architectures"] = Json::array({family.transformers_class});
  config["model_type"] = architecture.model_type;
  for (const ConfigKey& row : family.keys) {
    std::visit(
        [&](auto field) {
          const auto& value = architecture.*field;
          if constexpr (std::is_same_v<std::decay_t<decltype(value)>, std::optional<double>>) {
            config[row.key] = value ? Json(*value) : Json(nullptr);
          } else {
            config[row.key] = value;
          }
        },
        row.field);
  }
  write_rope(architecture, config);
  const auto token = [](std::int64_t id) { return id < 0 ? Json(nullptr) : Json(id); };
  // Null is written too: left out, transformers would fill in ids of its own, beyond a small vocabulary.
  config["bos_token_id"] = token(architecture.bos_token_id);
  config["eos_token_id"] = token(architecture.eos_token_id);
  config["pad_token_id"] = token(architecture.pad_token_id);
  config["attention_dropout"] = 0.0;
  config["output_router_logits"] = false;
  config["router_aux_loss_coef"] = family.router_aux_loss_coef;
  config["use_cache"] = true;
  if (family.write_more != nullptr) {
    family.write_more(architecture, config);
  }
  return config;
}

void set_config_top_k(Json& config, const Architecture& architecture, std::int64_t top_k) {
  if (const char* key = family_of(architecture).key_of(&Architecture::top_k); key != nullptr) {
    config[key] = top_k;
    return;
  }
  throw std::invalid_argument(
      fmt::format("architecture: family \"{}\" has no key for experts per token", architecture.family));
}

std::vector<TensorSpec> tensor_specs(const Architecture& architecture) {
  const Family& family = family_of(architecture);
  std::vector<TensorSpec> specs;
  const auto add = [&](const TensorPattern& row, std::int64_t layer, std::int64_t expert) {
    if (present(architecture, row, layer)) {
      specs.push_back(make_spec(architecture, row, layer, expert));
    }
  };
  for (const TensorPattern& row : family.before_layers) {
    add(row, -1, -1);
  }
  for (std::int64_t layer = 0; layer < architecture.num_layers; ++layer) {
    for (const TensorPattern& row : family.per_layer) {
      if (!row.each_expert()) {
        add(row, layer, -1);
      }
    }
    const std::int64_t num_experts = architecture.is_moe_layer(layer) ? architecture.num_experts : 0;
    for (std::int64_t expert = 0; expert < num_experts; ++expert) {
      for (const TensorPattern& row : family.per_layer) {
        if (row.each_expert()) {
          add(row, layer, expert);
        }
      }
    }
  }
  for (const TensorPattern& row : family.after_layers) {
    add(row, -1, -1);
  }
  return specs;
}

std::vector<StoredTensor> stored_tensors(const Architecture& architecture, const TensorSpec& spec,
                                         const SafetensorsCheckpoint& checkpoint) {
  constexpr std::int64_t kGroup = 32;
  const bool there = checkpoint.contains(spec.name);
  if (architecture.quantisation == Quantisation::kMxfp4 && spec.transposed && !there && spec.shape[1] % kGroup == 0) {
    const std::int64_t groups = spec.shape[1] / kGroup;
    return {{spec.name + "_blocks", {spec.shape[0], spec.shape[2], groups, kGroup / 2}},
            {spec.name + "_scales", {spec.shape[0], spec.shape[2], groups}}};
  }
  if (architecture.quantisation == Quantisation::kFp8Blocks && there && spec.shape.size() == 2 &&
      checkpoint.tensor(spec.name).dtype == DType::kF8E4M3) {
    const auto blocks = [](std::int64_t size, std::int64_t block) { return (size + block - 1) / block; };
    return {{spec.name, spec.shape},
            {spec.name + "_scale_inv",
             {blocks(spec.shape[0], architecture.scale_block_rows),
              blocks(spec.shape[1], architecture.scale_block_columns)}}};
  }
  return {{spec.name, spec.shape}};
}

std::string router_name(const Architecture& architecture, std::int64_t layer) {
  for (const TensorPattern& row : family_of(architecture).per_layer) {
    if (row.part == TensorPart::kRouter) {
      return make_spec(architecture, row, layer, -1).name;
    }
  }
  throw std::invalid_argument(fmt::format("architecture: family \"{}\" has no router", architecture.family));
}

Architecture family_defaults(const std::string& family) {
  return family_named(family).defaults;
}

std::vector<std::string> known_families() {
  std::vector<std::string> names;
  for (const Family& family : families()) {
    names.push_back(family.defaults.family);
  }
  return names;
}

}  // namespace hestia
