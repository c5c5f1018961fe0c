#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "hestia/core/json_lines.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/routing/residency.hpp"

namespace hestia {

/// The adapters that belong to a bundle's routers.
struct BundleAdapters {
  std::int64_t rank = 0;
  double alpha = 0.0;
  std::string sha256;  ///< Of adapters.safetensors.
};

/// `manifest.json` of a router bundle, format version 2. Version 1, which knew neither adapters nor a K of its own, is
/// read too.
struct BundleManifest {
  std::string model_family;
  std::string model_path;        ///< As the recipe wrote it; information only.
  Json architecture;             ///< config.json of the base.
  std::string base_router_hash;  ///< SHA-256 of the base routers; loading onto another base is refused.
  std::string router_hash;       ///< Of the tuned routers in this bundle.
  std::string recipe;            ///< The resolved recipe, YAML.
  std::int64_t top_k = 0;        ///< K that the routers are served with; `architecture` has the base's.
  std::optional<BundleAdapters> adapters;
  ResidencyRule residency;  ///< The rule a runtime serves the tuned router with.
  Json metrics;             ///< {"baseline": {...}, "tuned": {...}}
  Json predictor;           ///< How the preference predictor compares (predictor_json); null when there is none.
};

/// Writes router.safetensors, adapters.safetensors when `tuned` has adapters, and manifest.json of a bundle into
/// `directory` (preferences.h5 is written beside them by the exporter). The manifest's `top_k` and `adapters` are taken
/// from `tuned`, whatever `manifest` says.
void write_bundle(const std::filesystem::path& directory, MoeModel& tuned, const BundleManifest& manifest);
/// Reads manifest.json. Throws InputError: missing, not a bundle, newer format, missing keys (all listed).
[[nodiscard]] BundleManifest read_manifest(const std::filesystem::path& directory);
/// Puts the bundle's routers, adapters and K into `model`, whose routers must be the base the bundle was made from; the
/// adapters of a model that has some give way to the bundle's, or to none. Throws InputError naming both identities
/// otherwise, or when router.safetensors or adapters.safetensors does not match the manifest's hash or the residency
/// rule does not cover every MoE layer.
BundleManifest load_bundle(MoeModel& model, const std::filesystem::path& directory);

}  // namespace hestia
