#include <cmath>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "arguments.hpp"
#include "commands.hpp"
#include "hestia/architecture/architecture.hpp"
#include "hestia/architecture/gguf_names.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/gguf.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/evaluation/throughput.hpp"
#include "hestia/kernels/expert_formats.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/preferences.hpp"
#include "hestia/routing/trace.hpp"
#include "hestia/runtime/expert_store.hpp"
#include "hestia/trainer/bundle.hpp"
#include "hestia/trainer/recipes.hpp"
#include "hestia/trainer/residency.hpp"
#include "hestia/trainer/trainer.hpp"

namespace hestia {

namespace {

using Rows = std::vector<std::pair<std::string, std::string>>;

void print(const std::string& title, const Rows& rows) {
  std::size_t width = 0;
  for (const auto& [key, value] : rows) {
    width = std::max(width, key.size());
  }
  std::cout << title << "\n";
  for (const auto& [key, value] : rows) {
    std::cout << fmt::format("  {:<{}}  {}\n", key, width, value);
  }
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// "6GiB", "512MiB", "8000000": bytes.
double parse_memory(const std::string& text) {
  const std::map<std::string, double> units = {
      {"", 1.0},   {"B", 1.0},  {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0},
      {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}};
  std::size_t used = 0;
  double value = -1.0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  const auto unit = units.find(text.substr(used));
  if (!(value > 0.0) || !std::isfinite(value) || unit == units.end()) {
    throw UsageError(fmt::format("--memory must be a size such as 6GiB or 512MiB, got \"{}\"", text));
  }
  return value * unit->second;
}

// How many expert slots fit beside the dense weights.
std::pair<std::string, std::string> slots_row(const std::string& memory, std::int64_t dense_bytes,
                                              std::int64_t expert_bytes, std::int64_t layers,
                                              std::int64_t num_experts) {
  const double left = parse_memory(memory) - static_cast<double>(dense_bytes);
  const auto per_slot = static_cast<double>(expert_bytes * layers);
  const auto slots = static_cast<std::int64_t>(left / per_slot);
  return {
      fmt::format("slots in {}", memory),
      left < per_slot
          ? "none: the dense part and one slot per layer do not fit"
          : fmt::format("{} of {} per layer, beside the dense weights (key-value cache and activations not counted)",
                        std::min(slots, num_experts), num_experts)};
}

std::string bytes_by_type(const std::map<std::string, std::int64_t>& types) {
  std::vector<std::string> kinds;
  kinds.reserve(types.size());
  for (const auto& [name, bytes] : types) {
    kinds.push_back(fmt::format("{} {}", name, format_bytes(static_cast<double>(bytes))));
  }
  return fmt::format("{}", fmt::join(kinds, ", "));
}

void inspect_model(const std::filesystem::path& directory, const std::string& memory) {
  const Architecture architecture = read_architecture(directory);
  const SafetensorsCheckpoint checkpoint(directory);
  std::map<std::string, std::int64_t> dtypes;
  std::int64_t stored = 0;
  std::int64_t expert_stored = 0;
  std::int64_t other_stored = 0;
  Problems problems;
  for (const TensorSpec& spec : tensor_specs(architecture)) {
    for (const StoredTensor& part : stored_tensors(architecture, spec, checkpoint)) {
      if (!checkpoint.contains(part.name)) {
        problems.add(fmt::format("{}: tensor \"{}\" is missing", directory.string(), part.name));
        continue;
      }
      const TensorView& view = checkpoint.tensor(part.name);
      const auto bytes = static_cast<std::int64_t>(view.bytes.size());
      stored += bytes;
      dtypes[std::string(dtype_name(view.dtype))] += bytes;
      (spec.role == TensorRole::kExpert ? expert_stored : other_stored) += bytes;
    }
  }
  problems.throw_input_if_any();
  const auto layers = static_cast<std::int64_t>(architecture.moe_layers().size());
  const std::int64_t expert_bytes = expert_stored / std::max<std::int64_t>(1, layers * architecture.num_experts);
  Rows rows = {
      {"family", architecture.family},
      {"layers", fmt::format("{} ({} with experts)", architecture.num_layers, layers)},
      {"experts", fmt::format("{} per layer, {} per token", architecture.num_experts, architecture.top_k)},
      {"hidden size", std::to_string(architecture.hidden_size)},
      {"expert hidden size", std::to_string(architecture.expert_intermediate_size)},
      {"vocabulary", std::to_string(architecture.vocab_size)},
      {"parameters", format_count(static_cast<double>(architecture.total_parameters()))},
      {"stored", fmt::format("{} in {} files ({})", format_bytes(static_cast<double>(stored)),
                             checkpoint.files().size(), bytes_by_type(dtypes))},
      {"bytes per expert", format_bytes(static_cast<double>(expert_bytes))},
      {"expert bytes a token uses", format_bytes(static_cast<double>(expert_bytes * architecture.top_k * layers))},
      {"dense bytes", format_bytes(static_cast<double>(other_stored))},
      {"routers", fmt::format("{} ... {} {}", router_name(architecture, architecture.moe_layers().front()),
                              router_name(architecture, architecture.moe_layers().back()),
                              shape_text({architecture.num_experts, architecture.hidden_size}))}};
  if (!memory.empty()) {
    rows.push_back(slots_row(memory, other_stored, expert_bytes, layers, architecture.num_experts));
  }
  try {
    std::vector<std::string> sizes;
    Rows slots;
    for (const std::string& name : expert_format_names()) {
      const ExpertFormat format = expert_format_from_name(name);
      if (format == ExpertFormat::kBfloat16) {
        continue;
      }
      const std::int64_t bytes = stored_expert_bytes(architecture, torch::kBFloat16, format);
      sizes.push_back(fmt::format("{} {}", name, format_bytes(static_cast<double>(bytes))));
      if (!memory.empty()) {
        slots.push_back(slots_row(memory, other_stored, bytes, layers, architecture.num_experts));
        slots.back().first += ", " + name;
      }
    }
    rows.emplace_back("packed, per expert", fmt::format("{}", fmt::join(sizes, ", ")));
    rows.insert(rows.end(), slots.begin(), slots.end());
  } catch (const UsageError& error) {
    rows.emplace_back("packed, per expert", fmt::format("none: {}", error.what()));
  }
  print(directory.string() + ": model directory", rows);
}

std::string predictor_text(const PreferencePredictor& predictor) {
  return fmt::format("{} x {} x ({} x {}), of {} sequences; {} held out: best at {} slots is {}",
                     predictor.embedding_size, predictor.hidden_size, predictor.num_layers, predictor.num_experts,
                     predictor.report.num_train, predictor.report.num_held_out, predictor.report.decisive_slots,
                     predictor.report.best_by_requests);
}

void inspect_bundle(const std::filesystem::path& directory) {
  const BundleManifest manifest = read_manifest(directory);
  const std::int64_t base_top_k =
      parse_architecture(manifest.architecture, (directory / "manifest.json").string() + ": architecture").top_k;
  Rows rows = {{"family", manifest.model_family},
               {"base model", fmt::format("{} (routers {:.12})", manifest.model_path, manifest.base_router_hash)},
               {"tuned routers", manifest.router_hash == manifest.base_router_hash
                                     ? "none: the base model's own"
                                     : fmt::format("{:.12}", manifest.router_hash)},
               {"experts per token", manifest.top_k == base_top_k
                                         ? std::to_string(base_top_k)
                                         : fmt::format("{}, the base model {}", manifest.top_k, base_top_k)},
               {"serve with",
                fmt::format("{} slots, {}, residency {}, J {}", manifest.residency.slots, manifest.residency.policy,
                            lambda_text(manifest.residency), manifest.residency.always_keep)}};
  if (!manifest.residency.layer_factors.empty()) {
    rows.emplace_back("factors of lambda", fmt::format("{:g}", fmt::join(manifest.residency.layer_factors, " ")));
  }
  if (const ResidencyScope& scope = manifest.residency.scope; !scope.everywhere()) {
    rows.emplace_back("for text like",
                      fmt::format("{}, told from the last {} tokens; elsewhere lambda counts {:g} times",
                                  fmt::join(scope.domains, ", "), scope.window, scope.elsewhere));
  }
  for (const auto& [name, figures] : manifest.metrics.items()) {
    rows.emplace_back(name, figures.dump());
  }
  const SafetensorsFile routers(directory / "router.safetensors");
  rows.emplace_back("router.safetensors", fmt::format("{} routers", routers.names().size()));
  if (manifest.adapters) {
    const SafetensorsFile adapters(directory / "adapters.safetensors");
    rows.emplace_back("adapters.safetensors",
                      fmt::format("LoRA, rank {}, alpha {:g}, {} matrices", manifest.adapters->rank,
                                  manifest.adapters->alpha, adapters.names().size()));
  }
  if (std::filesystem::exists(directory / "preferences.h5")) {
    const PreferenceReader preferences(directory / "preferences.h5");
    rows.emplace_back("preferences.h5", fmt::format("{} sequences in the aggregate, {} kept one by one",
                                                    preferences.num_sequences_total(), preferences.num_stored()));
    if (const auto predictor = preferences.predictor()) {
      rows.emplace_back("predictor", predictor_text(*predictor));
    }
  }
  print(directory.string() + ": router bundle", rows);
}

void inspect_run(const std::filesystem::path& directory) {
  const auto latest = latest_checkpoint(directory);
  Rows rows = {{"task", recipe_task(directory / "recipe.yaml")},
               {"newest checkpoint", latest ? latest->second.string() : "none"}};
  const std::filesystem::path metrics = directory / "metrics.jsonl";
  if (std::filesystem::exists(metrics)) {
    std::map<std::string, std::string> last;
    read_json_lines(metrics, [&](std::int64_t, const Json& line) {
      const auto event = line.find("event");
      last[event != line.end() && event->is_string() ? event->get<std::string>() : "line"] = line.dump();
    });
    for (const auto& [event, text] : last) {
      rows.emplace_back("last " + event, text);
    }
  }
  print(directory.string() + ": run directory", rows);
}

void inspect_safetensors(const std::filesystem::path& file) {
  const SafetensorsFile tensors(file);
  Rows rows;
  for (const auto& [key, value] : tensors.metadata()) {
    rows.emplace_back("metadata " + key, value);
  }
  for (const std::string& name : tensors.names()) {
    const TensorView& view = tensors.tensor(name);
    rows.emplace_back(name, fmt::format("{} {}", dtype_name(view.dtype), shape_text(view.shape)));
  }
  print(fmt::format("{}: {} tensors", file.string(), tensors.names().size()), rows);
}

// One line of a metadata value: long ones are cut.
std::string metadata_text(const GgufFile& file, const std::string& key) {
  constexpr std::size_t kShownElements = 8;
  constexpr std::size_t kShownBytes = 120;
  const GgufValue& value = file.value(key);
  std::string text;
  switch (value.type) {
    case GgufValueType::kString:
      text = Json(file.text(key)).dump(-1, ' ', false, Json::error_handler_t::replace);
      break;
    case GgufValueType::kBool:
      return file.boolean(key) ? "true" : "false";
    case GgufValueType::kFloat32:
      return fmt::format("{}", static_cast<float>(file.number(key)));
    case GgufValueType::kFloat64:
      return fmt::format("{}", file.number(key));
    case GgufValueType::kArray: {
      text = fmt::format("{} x {}", value.count, gguf_value_type_name(value.element_type));
      if (value.element_type == GgufValueType::kString) {
        std::vector<std::string> first = file.texts(key);
        first.resize(std::min(first.size(), kShownElements));
        text += ": " + Json(first).dump(-1, ' ', false, Json::error_handler_t::replace);
      }
      break;
    }
    default:
      return std::to_string(file.integer(key));
  }
  if (text.size() > kShownBytes) {
    std::size_t end = kShownBytes;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) {
      --end;  // not inside a letter
    }
    text = text.substr(0, end) + "...";
  }
  return text;
}

// What is said of a model directory, as far as a GGUF file tells.
Rows gguf_model_rows(const GgufFile& file, const std::string& memory) {
  const std::string architecture = file.has("general.architecture") ? file.text("general.architecture") : "";
  const auto integer = [&](const std::string& key) {
    const std::string name = architecture + key;
    return file.has(name) ? file.integer(name) : std::int64_t{0};
  };
  std::map<std::string, std::int64_t> types;
  std::int64_t parameters = 0;
  std::int64_t stored = 0;
  std::int64_t expert_stored = 0;
  std::vector<std::string> routers;
  for (const std::string& name : file.names()) {
    const GgufTensor& tensor = file.tensor(name);
    const auto bytes = static_cast<std::int64_t>(tensor.bytes.size());
    types[std::string(ggml_type_name(tensor.type))] += bytes;
    parameters += tensor.num_elements();
    stored += bytes;
    expert_stored += name.find("_exps.") != std::string::npos ? bytes : 0;
  }
  const std::int64_t num_layers = integer(".block_count");
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    if (file.contains(gguf_router_name(layer))) {
      routers.push_back(gguf_router_name(layer));
    }
  }
  const auto layers = static_cast<std::int64_t>(routers.size());
  const std::int64_t num_experts = integer(".expert_count");
  Rows rows = {{"architecture", architecture},
               {"layers", fmt::format("{} ({} with experts)", num_layers, layers)},
               {"hidden size", std::to_string(integer(".embedding_length"))},
               {"parameters", format_count(static_cast<double>(parameters))},
               {"stored", fmt::format("{} ({})", format_bytes(static_cast<double>(stored)), bytes_by_type(types))}};
  const bool has_experts = layers > 0 && num_experts > 0 && expert_stored > 0;
  if (has_experts) {
    const std::int64_t top_k = integer(".expert_used_count");
    const std::int64_t expert_bytes = expert_stored / (layers * num_experts);
    const GgufTensor& router = file.tensor(routers.front());
    rows.emplace_back("experts", fmt::format("{} per layer, {} per token", num_experts, top_k));
    rows.emplace_back("bytes per expert", format_bytes(static_cast<double>(expert_bytes)));
    rows.emplace_back("expert bytes a token uses", format_bytes(static_cast<double>(expert_bytes * top_k * layers)));
    rows.emplace_back("dense bytes", format_bytes(static_cast<double>(stored - expert_stored)));
    rows.emplace_back("routers", fmt::format("{} ... {} {} {}", routers.front(), routers.back(),
                                             ggml_type_name(router.type), shape_text(router.shape)));
    if (!memory.empty()) {
      rows.push_back(slots_row(memory, stored - expert_stored, expert_bytes, layers, num_experts));
    }
  } else if (!memory.empty()) {
    throw UsageError(fmt::format("--memory is for models with experts, got {}; leave it out", file.path().string()));
  }
  return rows;
}

void inspect_gguf(const std::filesystem::path& path, const std::string& memory) {
  const GgufFile file(path);
  print(path.string() + ": GGUF file", gguf_model_rows(file, memory));
  Rows rows;
  for (const std::string& key : file.keys()) {
    rows.emplace_back(key, metadata_text(file, key));
  }
  print(fmt::format("{} metadata keys", rows.size()), rows);
  rows.clear();
  for (const std::string& name : file.names()) {
    const GgufTensor& tensor = file.tensor(name);
    rows.emplace_back(name, fmt::format("{} {}", ggml_type_name(tensor.type), shape_text(tensor.shape)));
  }
  print(fmt::format("{} tensors", rows.size()), rows);
}

void inspect_trace(const std::filesystem::path& file) {
  const RoutingTrace trace = read_trace(file);
  print(file.string() + ": routing trace",
        {{"model", trace.model.empty() ? "unknown" : trace.model},
         {"layers", std::to_string(trace.num_layers)},
         {"experts", fmt::format("{} per layer, {} per token", trace.num_experts, trace.top_k)},
         {"entries", std::to_string(trace.entries.size())},
         {"expert overlap ratio (decode)", fmt::format("{:.6f}", expert_overlap_ratio(trace))},
         {"distinct experts (decode)", fmt::format("{:.2f}", distinct_experts(trace))}});
}

void inspect_preferences(const std::filesystem::path& file) {
  const PreferenceReader preferences(file);
  Rows rows = {{"sequences", std::to_string(preferences.num_sequences_total())},
               {"kept one by one", std::to_string(preferences.num_stored())},
               {"layers", std::to_string(preferences.num_layers())},
               {"experts", std::to_string(preferences.num_experts())}};
  if (const auto predictor = preferences.predictor()) {
    rows.emplace_back("predictor", predictor_text(*predictor));
  }
  print(file.string() + ": expert preferences", rows);
}

void inspect_recipe(const std::filesystem::path& file) {
  const std::string task = recipe_task(file);
  if (task == "bench") {
    auto loaded = load_bench_recipe(file, {});
    std::cout << save_recipe(loaded.recipe.fields());
  } else if (task == "pretrain") {
    auto loaded = load_pretrain_recipe(file, {});
    std::cout << save_recipe(loaded.recipe.fields());
  } else {
    auto loaded = load_finetune_recipe(file, {});
    std::cout << save_recipe(loaded.recipe.fields());
  }
}

void inspect(const std::filesystem::path& path, const std::string& memory) {
  if (!std::filesystem::exists(path)) {
    throw InputError(fmt::format("{}: no such file or directory; check the path", path.string()));
  }
  const bool is_bundle = std::filesystem::exists(path / "manifest.json");
  const bool is_model = !is_bundle && std::filesystem::exists(path / "config.json");
  const std::string extension = path.extension().string();
  if (!memory.empty() && !is_model && extension != ".gguf") {
    throw UsageError(
        fmt::format("--memory is for model directories and GGUF files, got {}; leave it out", path.string()));
  }
  if (std::filesystem::is_directory(path)) {
    if (is_bundle) {
      return inspect_bundle(path);
    }
    if (is_model) {
      return inspect_model(path, memory);
    }
    if (std::filesystem::exists(path / "recipe.yaml")) {
      return inspect_run(path);
    }
    throw InputError(
        fmt::format("{}: neither a model directory (config.json), a router bundle (manifest.json) nor a run directory "
                    "(recipe.yaml); give one of these",
                    path.string()));
  }
  if (extension == ".safetensors") {
    return inspect_safetensors(path);
  }
  if (extension == ".gguf") {
    return inspect_gguf(path, memory);
  }
  if (extension == ".yaml" || extension == ".yml") {
    return inspect_recipe(path);
  }
  if (extension == ".h5" && path.filename() == "preferences.h5") {
    return inspect_preferences(path);
  }
  return inspect_trace(path);
}

}  // namespace

void add_inspect(CLI::App& app) {
  struct Arguments {
    std::string path;
    std::string memory;
  };
  auto arguments = std::make_shared<Arguments>();
  CLI::App* verb = app.add_subcommand("inspect", "say what a file or directory holds");
  verb->add_option(
          "path", arguments->path,
          "model directory, router bundle, run directory, safetensors or GGUF file, trace, preferences.h5 or recipe")
      ->required();
  verb->add_option("--memory", arguments->memory,
                   "models: how many expert slots fit this much memory, for example 6GiB");
  verb->footer("Example: hestia inspect checkpoints/tiny --memory 16MiB");
  verb->callback([arguments] { inspect(arguments->path, arguments->memory); });
}

}  // namespace hestia
