#include "hestia/architecture/dense_checkpoint.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <set>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/log.hpp"

namespace hestia {
namespace {

constexpr std::string_view kLayout = "hestia upcycle takes models of Llama layout";

std::string shown(const Json& value) {
  const std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() > 80 ? text.substr(0, 77) + "..." : text;
}

// Special tokens that the vocabulary does not have become none, as llama.cpp takes them.
void drop_unknown_tokens(const std::string& subject, DenseArchitecture& a) {
  const auto known = [&](const Json& id) {
    return !id.is_number_integer() || (id.get<std::int64_t>() >= 0 && id.get<std::int64_t>() < a.vocab_size);
  };
  for (const auto& [name, token] :
       {std::pair("bos_token_id", &a.bos_token_id), std::pair("eos_token_id", &a.eos_token_id),
        std::pair("pad_token_id", &a.pad_token_id)}) {
    Json kept;  // of several ends of a sequence, those that are there
    if (token->is_array()) {
      std::copy_if(token->begin(), token->end(), std::back_inserter(kept), known);
    } else if (known(*token)) {
      kept = *token;
    }
    if (kept != *token && !(token->is_array() && token->empty())) {
      log_warning(fmt::format("{}: {} must be below the {} tokens, got {}; what is not is left out", subject, name,
                              a.vocab_size, shown(*token)));
      *token = kept;
    }
  }
}

// Reads keys of config.json, noting what is wrong instead of stopping at it.
class Config {
 public:
  Config(const Json& json, std::string subject, Problems& problems)
      : json_(json), subject_(std::move(subject)), problems_(problems) {}

  [[nodiscard]] Json get(const char* key) const { return json_.value(key, Json()); }
  void integer(const char* key, std::int64_t& out, bool required = true) {
    const Json value = get(key);
    if (value.is_number_integer()) {
      out = value.get<std::int64_t>();
    } else if (required || !value.is_null()) {
      wrong(key, "a whole number", value);
    }
  }
  void number(const char* key, double& out) {
    const Json value = get(key);
    if (value.is_number()) {
      out = value.get<double>();
    } else if (!value.is_null()) {
      wrong(key, "a number", value);
    }
  }
  void boolean(const char* key, bool& out) {
    const Json value = get(key);
    if (value.is_boolean()) {
      out = value.get<bool>();
    } else if (!value.is_null()) {
      wrong(key, "true or false", value);
    }
  }
  void wrong(const std::string& key, std::string_view wanted, const Json& value) {
    problems_.add(fmt::format("{}: \"{}\" must be {}, got {}; {}", subject_, key, wanted,
                              value.is_null() ? "none" : shown(value), kLayout));
  }

 private:
  const Json& json_;
  std::string subject_;
  Problems& problems_;
};

void check_sizes(const std::string& subject, const DenseArchitecture& a, Problems& problems) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 24;
  constexpr std::int64_t kMostLayers = 4096;
  const auto in_range = [&](const char* what, std::int64_t value, std::int64_t largest) {
    if (value < 1 || value > largest) {
      problems.add(fmt::format("{}: {} must be between 1 and {}, got {}; correct it", subject, what, largest, value));
    }
  };
  const auto positive = [&](const char* what, std::int64_t value) { in_range(what, value, kLargest); };
  positive("the vocabulary", a.vocab_size);
  positive("the hidden size", a.hidden_size);
  positive("the feed-forward size", a.intermediate_size);
  in_range("the number of layers", a.num_layers, kMostLayers);
  positive("the number of heads", a.num_attention_heads);
  positive("the number of key-value heads", a.num_key_value_heads);
  positive("the size of a head", a.head_dim);
  if (problems.empty() && (a.num_attention_heads % a.num_key_value_heads != 0 || a.head_dim % 2 != 0)) {
    problems.add(
        fmt::format("{}: heads must be a multiple of key-value heads and of even size, got {}, {} and {}; "
                    "correct it",
                    subject, a.num_attention_heads, a.num_key_value_heads, a.head_dim));
  }
  if (!(a.rms_norm_eps > 0.0) || !std::isfinite(a.rms_norm_eps) || !(a.rope_theta > 0.0) ||
      !std::isfinite(a.rope_theta)) {
    problems.add(fmt::format("{}: the norm's epsilon and the rotary base must be positive, got {} and {}; correct it",
                             subject, a.rms_norm_eps, a.rope_theta));
  }
}

// Of metadata that was written as float32: the short decimal number that was meant.
double as_written(double value) {
  return std::stod(fmt::format("{}", static_cast<float>(value)));
}

bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16 || dtype == DType::kF64;
}

template <class Stored, class Convert>
void convert(std::span<const std::byte> bytes, std::vector<float>& values, const Convert& to_float) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    Stored stored{};
    std::memcpy(&stored, bytes.data() + i * sizeof stored, sizeof stored);
    values[i] = to_float(stored);
  }
}

std::vector<float> float_values(const TensorView& view) {
  std::vector<float> values(static_cast<std::size_t>(view.num_elements()));
  switch (view.dtype) {
    case DType::kF32:
      convert<float>(view.bytes, values, [](float value) { return value; });
      break;
    case DType::kF64:
      convert<double>(view.bytes, values, [](double value) { return static_cast<float>(value); });
      break;
    case DType::kF16:
      convert<std::uint16_t>(view.bytes, values, half_bits_to_float);
      break;
    case DType::kBF16:
      convert<std::uint16_t>(view.bytes, values, bfloat16_bits_to_float);
      break;
    default:
      throw std::invalid_argument("dense checkpoint: not a float tensor");
  }
  return values;
}

// llama.cpp turns row h (2 halves) d/2 of a query or key matrix into h (d/2) 2, so that the two numbers that one angle
// rotates are neighbours. This is the way back.
std::vector<float> split_halves(const std::vector<float>& rows, std::int64_t num_heads, std::int64_t head_dim,
                                std::int64_t width) {
  std::vector<float> out(rows.size());
  const std::int64_t half = head_dim / 2;
  for (std::int64_t head = 0; head < num_heads; ++head) {
    for (std::int64_t part = 0; part < 2; ++part) {
      for (std::int64_t i = 0; i < half; ++i) {
        const float* from = rows.data() + (head * head_dim + 2 * i + part) * width;
        std::copy(from, from + width, out.data() + (head * head_dim + part * half + i) * width);
      }
    }
  }
  return out;
}

}  // namespace

std::vector<DenseTensor> dense_tensors(const DenseArchitecture& a) {
  const std::int64_t query = a.num_attention_heads * a.head_dim;
  const std::int64_t key = a.num_key_value_heads * a.head_dim;
  std::vector<DenseTensor> all = {{"model.embed_tokens.weight", "token_embd.weight", {a.vocab_size, a.hidden_size}}};
  for (std::int64_t layer = 0; layer < a.num_layers; ++layer) {
    const auto add = [&](const char* name, const char* gguf, std::vector<std::int64_t> shape) {
      all.push_back({fmt::format("model.layers.{}.{}.weight", layer, name),
                     fmt::format("blk.{}.{}.weight", layer, gguf), std::move(shape)});
    };
    add("input_layernorm", "attn_norm", {a.hidden_size});
    add("self_attn.q_proj", "attn_q", {query, a.hidden_size});
    add("self_attn.k_proj", "attn_k", {key, a.hidden_size});
    add("self_attn.v_proj", "attn_v", {key, a.hidden_size});
    add("self_attn.o_proj", "attn_output", {a.hidden_size, query});
    add("post_attention_layernorm", "ffn_norm", {a.hidden_size});
    add("mlp.gate_proj", "ffn_gate", {a.intermediate_size, a.hidden_size});
    add("mlp.up_proj", "ffn_up", {a.intermediate_size, a.hidden_size});
    add("mlp.down_proj", "ffn_down", {a.hidden_size, a.intermediate_size});
  }
  all.push_back({"model.norm.weight", "output_norm.weight", {a.hidden_size}});
  if (!a.tie_word_embeddings) {
    all.push_back({"lm_head.weight", "output.weight", {a.vocab_size, a.hidden_size}});
  }
  return all;
}

DenseCheckpoint::DenseCheckpoint(const std::filesystem::path& path) : path_(path) {
  if (std::filesystem::is_directory(path)) {
    read_directory();
  } else {
    read_gguf();
  }
}

void DenseCheckpoint::read_directory() {
  const std::filesystem::path config_path = path_ / "config.json";
  const Json json = read_json_file(config_path);
  const std::string subject = config_path.string();
  if (!json.is_object() || json.value("model_type", Json()) != "llama") {
    throw InputError(fmt::format("{}: \"model_type\" must be \"llama\", got {}; {}", subject,
                                 json.is_object() ? shown(json.value("model_type", Json())) : shown(json), kLayout));
  }
  Problems problems;
  Config config(json, subject, problems);
  DenseArchitecture& a = architecture_;
  config.integer("vocab_size", a.vocab_size);
  config.integer("hidden_size", a.hidden_size);
  config.integer("intermediate_size", a.intermediate_size);
  config.integer("num_hidden_layers", a.num_layers);
  config.integer("num_attention_heads", a.num_attention_heads);
  a.num_key_value_heads = a.num_attention_heads;
  config.integer("num_key_value_heads", a.num_key_value_heads, false);
  config.integer("max_position_embeddings", a.max_position_embeddings, false);
  config.number("rms_norm_eps", a.rms_norm_eps);
  config.number("initializer_range", a.initializer_range);
  config.boolean("tie_word_embeddings", a.tie_word_embeddings);
  if (const Json activation = config.get("hidden_act"); !activation.is_null() && activation != "silu") {
    config.wrong("hidden_act", "\"silu\"", activation);
  }
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    bool on = false;
    config.boolean(key, on);
    if (on) {
      config.wrong(key, "false", true);
    }
  }
  if (!config.get("quantization_config").is_null()) {
    config.wrong("quantization_config", "absent", config.get("quantization_config"));
  }
  config.number("rope_theta", a.rope_theta);
  a.rope_scaling = config.get("rope_scaling");
  if (const Json parameters = config.get("rope_parameters"); parameters.is_object()) {  // of transformers 5
    if (const Json theta = parameters.value("rope_theta", Json()); theta.is_number()) {
      a.rope_theta = theta.get<double>();
    }
    if (parameters.value("rope_type", Json("default")) != "default") {
      a.rope_scaling = parameters;
    }
  }
  a.bos_token_id = config.get("bos_token_id");
  a.eos_token_id = config.get("eos_token_id");
  a.pad_token_id = config.get("pad_token_id");
  if (a.num_attention_heads > 0) {
    a.head_dim = a.hidden_size / a.num_attention_heads;
  }
  config.integer("head_dim", a.head_dim, false);
  check_sizes(subject, a, problems);
  problems.throw_input_if_any();
  drop_unknown_tokens(subject, a);

  directory_ = std::make_unique<SafetensorsCheckpoint>(path_);
  tensors_ = dense_tensors(a);
  std::set<std::string, std::less<>> wanted;
  for (const DenseTensor& tensor : tensors_) {
    wanted.insert(tensor.name);
    if (!directory_->contains(tensor.name)) {
      problems.add(fmt::format("{}: tensor \"{}\" is missing; config.json says that the model has it", path_.string(),
                               tensor.name));
      continue;
    }
    const TensorView& view = directory_->tensor(tensor.name);
    if (view.shape != tensor.shape || !is_float(view.dtype)) {
      problems.add(
          fmt::format("{}: tensor \"{}\" must be float [{}], got {} [{}]; config and weights do not belong "
                      "together",
                      path_.string(), tensor.name, fmt::join(tensor.shape, ", "), dtype_name(view.dtype),
                      fmt::join(view.shape, ", ")));
    }
  }
  for (const std::string& name : directory_->names()) {
    // Old checkpoints hold rotary tables; tied heads are sometimes stored twice.
    const bool redundant = name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
    if (!wanted.contains(name) && !redundant) {
      problems.add(
          fmt::format("{}: tensor \"{}\" is not part of a dense Llama model; {}", path_.string(), name, kLayout));
    }
  }
  problems.throw_input_if_any();
}

void DenseCheckpoint::read_gguf() {
  gguf_ = std::make_unique<GgufFile>(path_);
  const GgufFile& file = *gguf_;
  const std::string subject = path_.string();
  if (const std::string name = file.text("general.architecture"); name != "llama") {
    throw InputError(fmt::format("{}: general.architecture must be \"llama\", got \"{}\"; {}", subject, name, kLayout));
  }
  if (file.has("llama.expert_count") && file.integer("llama.expert_count") > 0) {
    throw InputError(fmt::format("{}: the model has {} experts already; give a dense model", subject,
                                 file.integer("llama.expert_count")));
  }
  if (file.has("split.count") && file.integer("split.count") > 1) {
    throw InputError(fmt::format("{}: one of {} files of a split model; merge them with llama-gguf-split --merge",
                                 subject, file.integer("split.count")));
  }
  Problems problems;
  DenseArchitecture& a = architecture_;
  const auto integer_or = [&](const char* key, std::int64_t otherwise) {
    return file.has(key) ? file.integer(key) : otherwise;
  };
  a.hidden_size = file.integer("llama.embedding_length");
  a.intermediate_size = file.integer("llama.feed_forward_length");
  a.num_layers = file.integer("llama.block_count");
  a.num_attention_heads = file.integer("llama.attention.head_count");
  a.num_key_value_heads = integer_or("llama.attention.head_count_kv", a.num_attention_heads);
  a.max_position_embeddings = integer_or("llama.context_length", a.max_position_embeddings);
  const GgufTensor& embedding = file.tensor("token_embd.weight");
  a.vocab_size = embedding.shape.size() == 2 ? embedding.shape.front() : 0;
  a.rms_norm_eps = as_written(file.number("llama.attention.layer_norm_rms_epsilon"));
  if (file.has("llama.rope.freq_base")) {
    a.rope_theta = as_written(file.number("llama.rope.freq_base"));
  }
  a.tie_word_embeddings = !file.contains("output.weight");
  a.head_dim =
      integer_or("llama.attention.key_length", a.num_attention_heads > 0 ? a.hidden_size / a.num_attention_heads : 0);
  const auto token = [&](const char* key) { return file.has(key) ? Json(file.integer(key)) : Json(); };
  a.bos_token_id = token("tokenizer.ggml.bos_token_id");
  a.eos_token_id = token("tokenizer.ggml.eos_token_id");
  a.pad_token_id = token("tokenizer.ggml.padding_token_id");
  if (integer_or("llama.rope.dimension_count", a.head_dim) != a.head_dim ||
      integer_or("llama.attention.value_length", a.head_dim) != a.head_dim) {
    problems.add(fmt::format("{}: rotary positions and values must have the whole head ({}), got {} and {}; {}",
                             subject, a.head_dim, integer_or("llama.rope.dimension_count", a.head_dim),
                             integer_or("llama.attention.value_length", a.head_dim), kLayout));
  }
  // As llama.cpp reads it: linear where the type is missing, by the newer key or the older one; 0 is none.
  const std::string scaling = file.has("llama.rope.scaling.type") ? file.text("llama.rope.scaling.type") : "linear";
  if (scaling == "linear") {
    const std::string key =
        file.has("llama.rope.scaling.factor") ? "llama.rope.scaling.factor" : "llama.rope.scale_linear";
    const double factor = file.has(key) ? as_written(file.number(key)) : 0.0;
    if (!(factor >= 0.0) || !std::isfinite(factor)) {
      problems.add(fmt::format("{}: metadata \"{}\" must be a number of at least 0, got {:g}; convert the model again",
                               subject, key, factor));
    } else if (factor != 0.0 && factor != 1.0) {
      a.rope_scaling = {{"rope_type", "linear"}, {"factor", factor}};
    }
  } else if (scaling != "none") {
    problems.add(
        fmt::format("{}: metadata \"llama.rope.scaling.type\" must be none or linear, got \"{}\"; give the "
                    "Hugging Face directory of the model",
                    subject, scaling));
  }
  check_sizes(subject, a, problems);
  problems.throw_input_if_any();
  drop_unknown_tokens(subject, a);

  tensors_ = dense_tensors(a);
  std::set<std::string, std::less<>> wanted;
  for (const DenseTensor& tensor : tensors_) {
    wanted.insert(tensor.gguf);
    if (!file.contains(tensor.gguf)) {
      problems.add(fmt::format("{}: tensor \"{}\" is missing; {}", subject, tensor.gguf, kLayout));
      continue;
    }
    const GgufTensor& found = file.tensor(tensor.gguf);
    if (found.shape != tensor.shape) {
      problems.add(fmt::format("{}: tensor \"{}\" must be [{}], got [{}]; convert the model again", subject,
                               tensor.gguf, fmt::join(tensor.shape, ", "), fmt::join(found.shape, ", ")));
    } else if (!can_dequantise(found.type)) {
      problems.add(
          fmt::format("{}: tensor \"{}\" must be F32, F16, BF16, Q4_0, Q4_1 or Q8_0, got {}; convert the model "
                      "to one of these",
                      subject, tensor.gguf, ggml_type_name(found.type)));
    }
  }
  for (const std::string& name : file.names()) {
    if (!wanted.contains(name)) {
      problems.add(fmt::format("{}: tensor \"{}\" is not part of a dense Llama model with plain rotary positions; {}",
                               subject, name, kLayout));
    }
  }
  problems.throw_input_if_any();
}

std::vector<float> DenseCheckpoint::tensor(std::string_view name) const {
  if (directory_) {
    return float_values(directory_->tensor(name));
  }
  const auto entry =
      std::find_if(tensors_.begin(), tensors_.end(), [&](const DenseTensor& tensor) { return tensor.name == name; });
  if (entry == tensors_.end()) {
    throw std::invalid_argument(fmt::format("dense checkpoint: there is no tensor \"{}\"", name));
  }
  std::vector<float> values = gguf_->floats(entry->gguf);
  const DenseArchitecture& a = architecture_;
  if (name.ends_with("q_proj.weight")) {
    return split_halves(values, a.num_attention_heads, a.head_dim, a.hidden_size);
  }
  if (name.ends_with("k_proj.weight")) {
    return split_halves(values, a.num_key_value_heads, a.head_dim, a.hidden_size);
  }
  return values;
}

}  // namespace hestia
