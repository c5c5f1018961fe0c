#include "hestia/trainer/bundle.hpp"

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/trainer/residency.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kBundleFormat = 2;
constexpr const char* kBundleKind = "hestia router bundle";

constexpr const char* kAdapterFile = "adapters.safetensors";

std::filesystem::path manifest_path(const std::filesystem::path& directory) {
  return directory / "manifest.json";
}

// Reads one key of the manifest, noting what is wrong instead of stopping at it.
template <class Value>
void take(const Json& object, const char* key, const std::string& subject, Value& value, Problems& problems) {
  if (!object.contains(key)) {
    problems.add(fmt::format("{}: key \"{}\" is missing; export the bundle again", subject, key));
    return;
  }
  try {
    value = object.at(key).get<Value>();
  } catch (const nlohmann::json::exception&) {
    problems.add(fmt::format("{}: key \"{}\" has the wrong type, got {}; export the bundle again", subject, key,
                             object.at(key).dump()));
  }
}

}  // namespace

void write_bundle(const std::filesystem::path& directory, MoeModel& tuned, const BundleManifest& manifest) {
  std::filesystem::create_directories(directory);
  save_routers(tuned, directory / "router.safetensors");
  Json adapters;  // null: none
  if (const std::optional<AdapterSettings> settings = tuned->adapter_settings()) {
    save_adapters(tuned, directory / kAdapterFile);
    adapters = {{"rank", settings->rank},
                {"alpha", settings->alpha},
                {"sha256", sha256_hex(MappedFile(directory / kAdapterFile).bytes())}};
  } else {
    std::filesystem::remove(directory / kAdapterFile);  // of an earlier export
  }
  Json json;
  json["kind"] = kBundleKind;
  json["format_version"] = kBundleFormat;
  json["model_family"] = manifest.model_family;
  json["model_path"] = manifest.model_path;
  json["architecture"] = manifest.architecture;
  json["base_router_hash"] = manifest.base_router_hash;
  json["router_hash"] = manifest.router_hash;
  json["top_k"] = tuned->architecture().top_k;
  json["adapters"] = adapters;
  json["residency"] = residency_json(manifest.residency);
  json["metrics"] = manifest.metrics;
  if (!manifest.predictor.is_null()) {
    json["predictor"] = manifest.predictor;
  }
  json["recipe"] = manifest.recipe;
  // Last: a bundle counts once its manifest is there.
  write_text_atomically(manifest_path(directory), json.dump(2) + "\n");
}

BundleManifest read_manifest(const std::filesystem::path& directory) {
  const std::filesystem::path path = manifest_path(directory);
  if (!std::filesystem::exists(path)) {
    throw InputError(fmt::format(
        "{}: not a router bundle, manifest.json is missing; make one with `hestia export RECIPE`", directory.string()));
  }
  const Json json = read_json_file(path);
  const std::string subject = path.string();
  if (!json.is_object() || !json.contains("kind") || json["kind"] != kBundleKind) {
    throw InputError(
        fmt::format("{}: not the manifest of a router bundle; make one with `hestia export RECIPE`", subject));
  }
  Problems problems;
  std::int64_t version = 0;
  take(json, "format_version", subject, version, problems);
  problems.throw_input_if_any();
  if (version > kBundleFormat || version < 1) {
    throw InputError(
        fmt::format("{}: format version {} is not one this program supports ({}); export it again or update "
                    "the program",
                    subject, version, kBundleFormat));
  }
  BundleManifest manifest;
  take(json, "model_family", subject, manifest.model_family, problems);
  take(json, "model_path", subject, manifest.model_path, problems);
  take(json, "architecture", subject, manifest.architecture, problems);
  take(json, "base_router_hash", subject, manifest.base_router_hash, problems);
  take(json, "router_hash", subject, manifest.router_hash, problems);
  take(json, "metrics", subject, manifest.metrics, problems);
  take(json, "recipe", subject, manifest.recipe, problems);
  manifest.predictor = json.value("predictor", Json());
  if (version >= 2) {
    take(json, "top_k", subject, manifest.top_k, problems);
    if (problems.empty() && manifest.top_k < 1) {
      problems.add(fmt::format("{}: key \"top_k\" must be at least 1, got {}; export the bundle again", subject,
                               manifest.top_k));
    }
    Json adapters;
    take(json, "adapters", subject, adapters, problems);
    if (adapters.is_object()) {
      manifest.adapters.emplace();
      take(adapters, "rank", subject + ": adapters", manifest.adapters->rank, problems);
      take(adapters, "alpha", subject + ": adapters", manifest.adapters->alpha, problems);
      take(adapters, "sha256", subject + ": adapters", manifest.adapters->sha256, problems);
    } else if (!adapters.is_null()) {
      problems.add(fmt::format("{}: key \"adapters\" must be an object or null, got {}; export the bundle again",
                               subject, adapters.dump()));
    }
  } else if (manifest.architecture.is_object()) {
    manifest.top_k = parse_architecture(manifest.architecture, subject + ": architecture").top_k;
  }
  Json residency;
  take(json, "residency", subject, residency, problems);
  if (!residency.is_null()) {
    manifest.residency = residency_from_json(residency, subject + ": key \"residency\"", problems);
  }
  problems.throw_input_if_any();
  return manifest;
}

BundleManifest load_bundle(MoeModel& model, const std::filesystem::path& directory) {
  BundleManifest manifest = read_manifest(directory);
  const std::string base = router_hash(model);
  if (base != manifest.base_router_hash) {
    throw InputError(
        fmt::format("{}: this bundle was made from another base model ({}, routers {:.12}), got a model with routers "
                    "{:.12}; load it onto the "
                    "checkpoint it was tuned from",
                    directory.string(), manifest.model_path, manifest.base_router_hash, base));
  }
  const std::size_t num_layers = model->architecture().moe_layers().size();
  if (manifest.residency.logit_range.size() != num_layers) {
    throw InputError(
        fmt::format("{}: residency.logit_range must have one number per MoE layer ({}), got {}; export the "
                    "bundle again",
                    manifest_path(directory).string(), num_layers, manifest.residency.logit_range.size()));
  }
  if (manifest.top_k > model->architecture().num_experts) {
    throw InputError(
        fmt::format("{}: key \"top_k\" must be at most the model's {} experts, got {}; export the bundle "
                    "again",
                    manifest_path(directory).string(), model->architecture().num_experts, manifest.top_k));
  }
  if (manifest.adapters) {
    const std::string found = sha256_hex(MappedFile(directory / kAdapterFile).bytes());
    if (found != manifest.adapters->sha256) {
      throw InputError(
          fmt::format("{}: adapters.safetensors does not match manifest.json (expected {:.12}), got {:.12}; export the "
                      "bundle again",
                      directory.string(), manifest.adapters->sha256, found));
    }
  }
  load_routers(model, directory / "router.safetensors");
  const std::string tuned = router_hash(model);
  if (tuned != manifest.router_hash) {
    throw InputError(
        fmt::format("{}: router.safetensors does not match manifest.json (expected {:.12}), got {:.12}; export "
                    "the bundle again",
                    directory.string(), manifest.router_hash, tuned));
  }
  if (manifest.adapters) {
    load_adapters(model, directory / kAdapterFile);
  } else {
    model->remove_adapters();
  }
  model->set_top_k(manifest.top_k);
  return manifest;
}

}  // namespace hestia
