#include "hestia/architecture/architecture.hpp"

#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>
#include <string_view>

#include <fmt/format.h>

#include "family.hpp"
#include "hestia/core/error.hpp"

namespace hestia {
namespace {

const std::vector<Family>& families() {
  static const std::vector<Family> all = {olmoe_family()};
  return all;
}

const Family& family_of(const Architecture& architecture) {
  for (const Family& family : families()) {
    if (family.name == architecture.family) {
      return family;
    }
  }
  throw std::invalid_argument(
      fmt::format("architecture: family is not known to this program, got \"{}\"; fill it with parse_architecture or "
                  "one of known_families()",
                  architecture.family));
}

// Long values (a whole nested object) would bury the message.
std::string shown(const Json& value) {
  std::string text = value.dump();
  if (text.size() > 80) {
    text = text.substr(0, 77) + "...";
  }
  return text;
}

/// Reads single values, collecting what is wrong instead of stopping at the first.
class ConfigReader {
 public:
  ConfigReader(const Json& config, std::string subject, Problems& problems)
      : config_(config), subject_(std::move(subject)), problems_(problems) {}

  /// The value of `key`, or nullptr when it is absent or null.
  [[nodiscard]] const Json* find(const char* key) const { return find_in(config_, key); }
  [[nodiscard]] static const Json* find_in(const Json& object, const char* key) {
    const auto it = object.find(key);
    return it == object.end() || it->is_null() ? nullptr : &*it;
  }

  void problem(const std::string& text) { problems_.add(subject_ + ": " + text); }

  void read(const char* key, const Json& value, std::int64_t& out) {
    const bool too_large =
        value.is_number_unsigned() &&
        value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (!value.is_number_integer() || too_large) {
      problem(fmt::format("\"{}\" must be a whole number, got {}; correct it", key, shown(value)));
      return;
    }
    out = value.get<std::int64_t>();
  }
  void read(const char* key, const Json& value, double& out) {
    if (!value.is_number()) {
      problem(fmt::format("\"{}\" must be a number, got {}; correct it", key, shown(value)));
      return;
    }
    out = value.get<double>();
  }
  void read(const char* key, const Json& value, bool& out) {
    if (!value.is_boolean()) {
      problem(fmt::format("\"{}\" must be true or false, got {}; correct it", key, shown(value)));
      return;
    }
    out = value.get<bool>();
  }
  void read(const char* key, const Json& value, std::string& out) {
    if (!value.is_string()) {
      problem(fmt::format("\"{}\" must be a string, got {}; correct it", key, shown(value)));
      return;
    }
    out = value.get<std::string>();
  }
  void read(const char* key, const Json& value, std::optional<double>& out) {
    double number = 0.0;
    const std::size_t before = problems_.messages().size();
    read(key, value, number);
    if (problems_.messages().size() == before) {
      out = number;
    }
  }

 private:
  const Json& config_;
  std::string subject_;
  Problems& problems_;
};

void read_keys(const Family& family, ConfigReader& reader, Architecture& architecture) {
  for (const ConfigKey& row : family.keys) {
    const Json* value = reader.find(row.key);
    if (value == nullptr) {
      if (row.required) {
        reader.problem(fmt::format("key \"{}\" is missing; a {} config must have it", row.key, family.name));
      }
      continue;
    }
    std::visit([&](auto field) { reader.read(row.key, *value, architecture.*field); }, row.field);
  }
}

// Rope settings of the hub stand in `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters` only.
void read_rope(ConfigReader& reader, RopeSettings& rope) {
  const Json* theta = reader.find("rope_theta");
  if (theta != nullptr) {
    reader.read("rope_theta", *theta, rope.theta);
  }
  for (const char* section : {"rope_scaling", "rope_parameters"}) {
    const Json* settings = reader.find(section);
    if (settings == nullptr) {
      continue;
    }
    if (!settings->is_object()) {
      reader.problem(fmt::format("\"{}\" must be an object or null, got {}; correct it", section, shown(*settings)));
      continue;
    }
    const Json* type = ConfigReader::find_in(*settings, "rope_type");
    if (type == nullptr) {
      type = ConfigReader::find_in(*settings, "type");  // spelling of older transformers
    }
    if (type != nullptr) {
      reader.read("rope_type", *type, rope.type);
    }
    if (const Json* inner = ConfigReader::find_in(*settings, "rope_theta"); inner != nullptr) {
      const double outer = rope.theta;
      reader.read("rope_theta", *inner, rope.theta);
      if (theta != nullptr && theta->is_number() && inner->is_number() && outer != rope.theta) {
        reader.problem(
            fmt::format("\"rope_theta\" and \"{}.rope_theta\" contradict each other, got {} and {}; keep one", section,
                        outer, rope.theta));
      }
    }
    const Json* factor = ConfigReader::find_in(*settings, "factor");
    if (factor != nullptr) {
      reader.read("factor", *factor, rope.factor);
    } else if (rope.type == "linear") {
      reader.problem(fmt::format("\"{}\" of type \"linear\" has no \"factor\"; add it", section));
    }
    const Json* partial = ConfigReader::find_in(*settings, "partial_rotary_factor");
    if (partial != nullptr && !(partial->is_number() && partial->get<double>() == 1.0)) {
      reader.problem(
          fmt::format("\"{}.partial_rotary_factor\" is not supported, got {}; only 1.0 is", section, shown(*partial)));
    }
  }
  if (rope.type != "default" && rope.type != "linear") {
    reader.problem(fmt::format("rope type is not supported, got \"{}\"; this program knows \"default\" and \"linear\"",
                               rope.type));
  }
  if (!(rope.theta > 0.0) || !std::isfinite(rope.theta)) {
    reader.problem(fmt::format("\"rope_theta\" must be positive, got {}; correct it", rope.theta));
  }
  if (!(rope.factor > 0.0) || !std::isfinite(rope.factor)) {
    reader.problem(fmt::format("rope \"factor\" must be positive, got {}; correct it", rope.factor));
  }
  if (rope.type == "default") {
    rope.factor = 1.0;
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

void check_values(const Architecture& a, ConfigReader& reader) {
  // Upper limits keep a damaged file from asking for absurd amounts of memory before any tensor is looked at.
  constexpr std::int64_t kMaxWidth = std::int64_t{1} << 24;
  constexpr std::int64_t kMaxLayers = 4096;
  constexpr std::int64_t kMaxExperts = 65536;
  const auto in_range = [&](const char* key, std::int64_t value, std::int64_t high) {
    if (value < 1 || value > high) {
      reader.problem(fmt::format("\"{}\" must be between 1 and {}, got {}; correct it", key, high, value));
      return false;
    }
    return true;
  };
  in_range("vocab_size", a.vocab_size, kMaxWidth);
  bool sizes = in_range("hidden_size", a.hidden_size, kMaxWidth);
  in_range("intermediate_size", a.expert_intermediate_size, kMaxWidth);
  in_range("num_hidden_layers", a.num_layers, kMaxLayers);
  sizes = in_range("num_attention_heads", a.num_attention_heads, kMaxWidth) && sizes;
  sizes = in_range("num_key_value_heads", a.num_key_value_heads, kMaxWidth) && sizes;
  in_range("max_position_embeddings", a.max_position_embeddings, std::int64_t{1} << 40);
  if (in_range("num_experts", a.num_experts, kMaxExperts) && (a.top_k < 1 || a.top_k > a.num_experts)) {
    reader.problem(fmt::format("\"num_experts_per_tok\" must be between 1 and num_experts ({}), got {}; correct it",
                               a.num_experts, a.top_k));
  }
  if (sizes) {
    if (a.num_attention_heads % a.num_key_value_heads != 0) {
      reader.problem(
          fmt::format("\"num_attention_heads\" must be a multiple of num_key_value_heads ({}), got {}; correct one",
                      a.num_key_value_heads, a.num_attention_heads));
    }
    if (a.head_dim < 1 || a.head_dim % 2 != 0 || a.head_dim > kMaxWidth) {
      reader.problem(
          fmt::format("\"head_dim\" (hidden_size / num_attention_heads unless given) must be even and "
                      "positive, got {}; correct it",
                      a.head_dim));
    } else if (a.query_key_norm && a.head_dim * a.num_attention_heads != a.hidden_size) {
      reader.problem(
          fmt::format("\"hidden_size\" must be num_attention_heads x head_dim ({} x {}) because query and key are "
                      "normalised over their whole width, got {}; correct one",
                      a.num_attention_heads, a.head_dim, a.hidden_size));
    }
  }
  if (a.hidden_act != "silu") {
    reader.problem(
        fmt::format("\"hidden_act\" is not supported, got \"{}\"; this program knows \"silu\"", a.hidden_act));
  }
  if (!(a.rms_norm_eps > 0.0) || !std::isfinite(a.rms_norm_eps)) {
    reader.problem(fmt::format("\"rms_norm_eps\" must be positive, got {}; correct it", a.rms_norm_eps));
  }
  if (!(a.initializer_range > 0.0) || !std::isfinite(a.initializer_range)) {
    reader.problem(fmt::format("\"initializer_range\" must be positive, got {}; correct it", a.initializer_range));
  }
  if (a.clip_qkv && !(*a.clip_qkv > 0.0)) {
    reader.problem(fmt::format("\"clip_qkv\" must be positive or null, got {}; correct it", *a.clip_qkv));
  }
}

std::int64_t extent_value(const Architecture& a, Extent extent) {
  switch (extent) {
    case Extent::kVocab:
      return a.vocab_size;
    case Extent::kHidden:
      return a.hidden_size;
    case Extent::kQuery:
      return a.num_attention_heads * a.head_dim;
    case Extent::kKeyValue:
      return a.num_key_value_heads * a.head_dim;
    case Extent::kExperts:
      return a.num_experts;
    case Extent::kExpertHidden:
      return a.expert_intermediate_size;
  }
  throw std::invalid_argument("architecture: unknown extent");
}

void replace_all(std::string& text, std::string_view what, std::int64_t value) {
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what)) {
    text.replace(at, what.size(), std::to_string(value));
  }
}

bool present(const Architecture& a, const TensorPattern& row) {
  return (row.only_if == nullptr || a.*row.only_if) && (row.unless_on == nullptr || !(a.*row.unless_on));
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

std::vector<std::int64_t> Architecture::moe_layers() const {
  std::vector<std::int64_t> layers;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    layers.push_back(layer);
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
  Architecture architecture;
  const std::string known = fmt::format("{}", fmt::join(known_families(), ", "));
  const Json* model_type = reader.find("model_type");
  if (model_type == nullptr) {
    reader.problem(fmt::format("key \"model_type\" is missing; known model types: {}", known));
    problems.throw_input_if_any();
  }
  reader.read("model_type", *model_type, architecture.model_type);
  problems.throw_input_if_any();
  const Family* family = nullptr;
  for (const Family& candidate : families()) {
    if (candidate.model_type == architecture.model_type) {
      family = &candidate;
    }
  }
  if (family == nullptr) {
    reader.problem(
        fmt::format("model type is not supported, got \"{}\"; known model types: {}", architecture.model_type, known));
    problems.throw_input_if_any();
  }
  architecture.family = family->name;
  architecture.query_key_norm = family->query_key_norm;
  read_keys(*family, reader, architecture);
  read_rope(reader, architecture.rope);
  read_token_id(reader, "bos_token_id", architecture.bos_token_id);
  read_token_id(reader, "eos_token_id", architecture.eos_token_id);
  read_token_id(reader, "pad_token_id", architecture.pad_token_id);
  if (reader.find("quantization_config") != nullptr) {
    reader.problem(
        "quantised checkpoints are not supported, got a \"quantization_config\"; give the float32, bf16 or "
        "f16 checkpoint");
  }
  // What is already wrong would only repeat itself in the checks of values that depend on it.
  problems.throw_input_if_any();
  if (reader.find("num_key_value_heads") == nullptr) {
    architecture.num_key_value_heads = architecture.num_attention_heads;
  }
  if (reader.find("head_dim") == nullptr && architecture.num_attention_heads > 0) {
    if (architecture.hidden_size % architecture.num_attention_heads != 0) {
      reader.problem(fmt::format("\"hidden_size\" must be a multiple of num_attention_heads ({}), got {}; correct one",
                                 architecture.num_attention_heads, architecture.hidden_size));
      problems.throw_input_if_any();
    }
    architecture.head_dim = architecture.hidden_size / architecture.num_attention_heads;
  }
  check_values(architecture, reader);
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
  // transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters.
  const bool scaled = architecture.rope.type != "default";
  config["rope_theta"] = architecture.rope.theta;
  config["rope_scaling"] = nullptr;
  config["rope_parameters"] = {{"rope_theta", architecture.rope.theta}, {"rope_type", architecture.rope.type}};
  if (scaled) {
    config["rope_scaling"] = {{"rope_type", architecture.rope.type}, {"factor", architecture.rope.factor}};
    config["rope_parameters"]["factor"] = architecture.rope.factor;
  }
  const auto token = [](std::int64_t id) { return id < 0 ? Json(nullptr) : Json(id); };
  // Null is written too: left out, transformers would fill in ids of its own, beyond a small vocabulary.
  config["bos_token_id"] = token(architecture.bos_token_id);
  config["eos_token_id"] = token(architecture.eos_token_id);
  config["pad_token_id"] = token(architecture.pad_token_id);
  config["attention_dropout"] = 0.0;
  config["output_router_logits"] = false;
  config["router_aux_loss_coef"] = family.router_aux_loss_coef;
  config["use_cache"] = true;
  return config;
}

void set_config_top_k(Json& config, const Architecture& architecture, std::int64_t top_k) {
  for (const ConfigKey& row : family_of(architecture).keys) {
    const auto* field = std::get_if<std::int64_t Architecture::*>(&row.field);
    if (field != nullptr && *field == &Architecture::top_k) {
      config[row.key] = top_k;
      return;
    }
  }
  throw std::invalid_argument(
      fmt::format("architecture: family \"{}\" has no key for experts per token", architecture.family));
}

std::vector<TensorSpec> tensor_specs(const Architecture& architecture) {
  const Family& family = family_of(architecture);
  std::vector<TensorSpec> specs;
  const auto add = [&](const TensorPattern& row, std::int64_t layer, std::int64_t expert) {
    if (present(architecture, row)) {
      specs.push_back(make_spec(architecture, row, layer, expert));
    }
  };
  for (const TensorPattern& row : family.before_layers) {
    add(row, -1, -1);
  }
  for (std::int64_t layer = 0; layer < architecture.num_layers; ++layer) {
    for (const TensorPattern& row : family.per_layer) {
      if (row.role != TensorRole::kExpert) {
        add(row, layer, -1);
      }
    }
    for (std::int64_t expert = 0; expert < architecture.num_experts; ++expert) {
      for (const TensorPattern& row : family.per_layer) {
        if (row.role == TensorRole::kExpert) {
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

std::string router_name(const Architecture& architecture, std::int64_t layer) {
  for (const TensorPattern& row : family_of(architecture).per_layer) {
    if (row.part == TensorPart::kRouter) {
      return make_spec(architecture, row, layer, -1).name;
    }
  }
  throw std::invalid_argument(fmt::format("architecture: family \"{}\" has no router", architecture.family));
}

std::vector<std::string> known_families() {
  std::vector<std::string> names;
  for (const Family& family : families()) {
    names.push_back(family.name);
  }
  return names;
}

}  // namespace hestia
