#include "hestia/routing/preload.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"

namespace hestia {

namespace {

// In enum order.
constexpr std::array<std::string_view, 2> kRouterNames = {"baseline", "tuned"};
constexpr std::int64_t kMaxExperts = 65536;

}  // namespace

std::string_view router_name(PreferenceRouter router) {
  return kRouterNames.at(static_cast<std::size_t>(router));
}

PreferenceRouter router_from_name(std::string_view name, std::string_view option) {
  for (std::size_t i = 0; i < kRouterNames.size(); ++i) {
    if (kRouterNames[i] == name) {
      return static_cast<PreferenceRouter>(i);
    }
  }
  const std::string nearest = nearest_name(name, {kRouterNames.begin(), kRouterNames.end()});
  throw UsageError(fmt::format("{}: unknown router, got \"{}\"; {}choose one of {}", option, name,
                               nearest.empty() ? "" : fmt::format("did you mean \"{}\"? ", nearest),
                               fmt::join(kRouterNames, ", ")));
}

std::vector<std::vector<std::uint16_t>> preload_order(const PreferenceAggregate& aggregate) {
  if (aggregate.num_layers < 0 || aggregate.num_experts < 0 || aggregate.num_experts > kMaxExperts ||
      static_cast<std::int64_t>(aggregate.count.size()) != aggregate.num_layers * aggregate.num_experts) {
    throw std::invalid_argument(fmt::format("preload: {} counts for {} layers of {} experts", aggregate.count.size(),
                                            aggregate.num_layers, aggregate.num_experts));
  }
  const auto num_experts = static_cast<std::size_t>(aggregate.num_experts);
  std::vector<std::vector<std::uint16_t>> order(static_cast<std::size_t>(aggregate.num_layers));
  for (std::size_t layer = 0; layer < order.size(); ++layer) {
    order[layer].resize(num_experts);
    std::iota(order[layer].begin(), order[layer].end(), std::uint16_t{0});
    std::stable_sort(order[layer].begin(), order[layer].end(), [&](std::uint16_t a, std::uint16_t b) {
      return aggregate.count[layer * num_experts + a] > aggregate.count[layer * num_experts + b];
    });
  }
  return order;
}

std::vector<std::vector<std::uint16_t>> read_preload(const std::filesystem::path& preferences, PreferenceRouter router,
                                                     std::span<const std::int64_t> layers, std::int64_t num_experts,
                                                     const std::string& whose) {
  const PreferenceReader reader(preferences);
  const std::string advice = "give the preferences of the same model";
  if (reader.num_experts() != num_experts) {
    throw UsageError(fmt::format("preload: {} must have the {} experts of {}, got {}; {}", preferences.string(),
                                 num_experts, whose, reader.num_experts(), advice));
  }
  if (!std::equal(layers.begin(), layers.end(), reader.layers().begin(), reader.layers().end())) {
    throw UsageError(fmt::format("preload: {} must have the {} MoE layers of {} ({}), got {} ({}); {}",
                                 preferences.string(), layers.size(), whose, fmt::join(layers, " "),
                                 reader.num_layers(), fmt::join(reader.layers(), " "), advice));
  }
  const PreferenceAggregate aggregate = reader.aggregate(router);
  if (std::all_of(aggregate.count.begin(), aggregate.count.end(), [](std::int64_t count) { return count == 0; })) {
    throw InputError(
        fmt::format("{}: the {} router has no completion token, so no expert is better than another; export the bundle "
                    "on text with answers",
                    preferences.string(), router_name(router)));
  }
  return preload_order(aggregate);
}

}  // namespace hestia
