#include "hestia/routing/cache_policy.hpp"

#include <array>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"

namespace hestia {

namespace {

// In enum order.
constexpr std::array<std::string_view, 8> kNames = {"lru",  "lfu",    "gamma",  "lifo",
                                                    "fifo", "random", "static", "belady"};

}  // namespace

std::string_view policy_name(CachePolicyKind kind) {
  return kNames.at(static_cast<std::size_t>(kind));
}

CachePolicyKind policy_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) {
      return static_cast<CachePolicyKind>(i);
    }
  }
  const std::string nearest = nearest_name(name, policy_names());
  throw UsageError(fmt::format("policy: unknown name, got \"{}\"; {}choose one of {}", name,
                               nearest.empty() ? "" : fmt::format("did you mean \"{}\"? ", nearest),
                               fmt::join(kNames, ", ")));
}

std::vector<std::string> policy_names() {
  return {kNames.begin(), kNames.end()};
}

}  // namespace hestia
