#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/routing/preferences.hpp"

namespace hestia {

/// Name of a router on the command line and in a preference file: baseline, tuned.
[[nodiscard]] std::string_view router_name(PreferenceRouter router);
/// Inverse of router_name. Throws UsageError naming `option` and the nearest name.
[[nodiscard]] PreferenceRouter router_from_name(std::string_view name, std::string_view option);

/// Experts in the order in which a cache is filled before decoding: per layer all E, by falling `aggregate.count`, ties
/// to the lower index. Throws std::invalid_argument when the counts do not have L * E entries or E is above 65536.
[[nodiscard]] std::vector<std::vector<std::uint16_t>> preload_order(const PreferenceAggregate& aggregate);

/// The preload order of one router of `preferences.h5`, for a cache whose layers are the model layers `layers` with
/// `num_experts` experts each; `whose` names them in messages ("the trace"). Throws InputError for what is no
/// preference file or holds no completion token, UsageError when layers or experts are others.
[[nodiscard]] std::vector<std::vector<std::uint16_t>> read_preload(const std::filesystem::path& preferences,
                                                                   PreferenceRouter router,
                                                                   std::span<const std::int64_t> layers,
                                                                   std::int64_t num_experts, const std::string& whose);

}  // namespace hestia
