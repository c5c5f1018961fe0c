#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/runtime/slot_executor.hpp"

namespace hestia {
namespace {

constexpr std::string_view kForms =
    "write a number of slots per layer (16), of one pool (total:256) or of bytes (memory:6GiB)";

constexpr std::array<std::string_view, 5> kFetchPaths = {"auto", "together", "copies", "waves", "staged"};
constexpr std::array<std::string_view, 2> kPrefetchKinds = {"off", "next-gate"};

// Place of `name` among `names`; UsageError with the nearest.
std::size_t index_of_name(std::string_view name, const std::vector<std::string>& names, std::string_view what) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found != names.end()) {
    return static_cast<std::size_t>(found - names.begin());
  }
  const std::string nearest = nearest_name(name, names);
  throw UsageError(fmt::format("{}: unknown name, got \"{}\"; {}choose one of {}", what, name,
                               nearest.empty() ? "" : fmt::format("did you mean \"{}\"? ", nearest),
                               fmt::join(names, ", ")));
}

[[noreturn]] void refuse(std::string_view text, std::string_view why) {
  throw UsageError(fmt::format("--expert-slots: {}, got \"{}\"; {}", why, text, kForms));
}

template <class Number>
std::optional<Number> number_in(std::string_view digits) {
  Number number{};
  const char* last = digits.data() + digits.size();
  const auto [end, failure] = std::from_chars(digits.data(), last, number);
  return failure == std::errc() && end == last ? std::optional(number) : std::nullopt;
}

// "6GiB" and the like; nullopt: no amount of memory.
std::optional<double> bytes_in(std::string_view amount) {
  constexpr std::array<std::pair<std::string_view, double>, 6> kUnits = {{{"GiB", 1024.0 * 1024.0 * 1024.0},
                                                                          {"MiB", 1024.0 * 1024.0},
                                                                          {"KiB", 1024.0},
                                                                          {"GB", 1e9},
                                                                          {"MB", 1e6},
                                                                          {"B", 1.0}}};
  double unit = 1.0;
  for (const auto& [name, bytes] : kUnits) {
    if (amount.ends_with(name)) {
      unit = bytes;
      amount.remove_suffix(name.size());
      break;
    }
  }
  const double bytes = number_in<double>(amount).value_or(0.0) * unit;
  return std::isfinite(bytes) && bytes > 0 ? std::optional(bytes) : std::nullopt;
}

}  // namespace

ExpertSlots parse_expert_slots(std::string_view text, const Architecture& architecture, std::int64_t blob_bytes,
                               std::int64_t num_selected) {
  const auto layers = static_cast<std::int64_t>(architecture.moe_layers().size());
  const std::int64_t experts = architecture.num_experts;
  constexpr std::string_view kTotal = "total:";
  constexpr std::string_view kMemory = "memory:";
  ExpertSlots slots;
  if (text.starts_with(kMemory)) {
    const std::optional<double> bytes = bytes_in(text.substr(kMemory.size()));
    if (!bytes) {
      refuse(text, "not an amount of memory");
    }
    const auto fit = static_cast<std::int64_t>(std::min(*bytes / static_cast<double>(blob_bytes), 1e9)) -
                     scratch_slots(architecture, num_selected);
    slots.per_layer = std::clamp<std::int64_t>(fit / layers, 0, experts);
    slots.pool = slots.per_layer < 1 ? fit : 0;
    if (slots.per_layer < 1 && slots.pool < 1) {
      refuse(text,
             fmt::format("too little memory for slots of {} each", format_bytes(static_cast<double>(blob_bytes))));
    }
    return slots;
  }
  const bool pool = text.starts_with(kTotal);
  const auto given = number_in<std::int64_t>(pool ? text.substr(kTotal.size()) : text);
  if (!given) {
    refuse(text, "not a number");
  }
  const std::int64_t number = *given;
  const std::int64_t most = pool ? layers * experts : experts;
  if (number < 1 || number > most) {
    refuse(text, fmt::format("must be from 1 to {} for {} MoE layers of {} experts", most, layers, experts));
  }
  (pool ? slots.pool : slots.per_layer) = number;
  return slots;
}

std::int64_t parse_pinned_memory(std::string_view text, std::string_view option) {
  const std::optional<double> bytes = bytes_in(text);
  if (!bytes || *bytes > 1e18) {
    throw UsageError(fmt::format("{}: must be an amount of memory such as 8GiB, got \"{}\"", option, text));
  }
  return static_cast<std::int64_t>(*bytes);
}

std::int64_t scratch_slots(const Architecture& architecture, std::int64_t num_selected) {
  return std::min({architecture.top_k, architecture.num_experts, num_selected});
}

bool may_pass_by(const Architecture& architecture, std::int64_t num_selected, const SlotCacheOptions& options) {
  const std::int64_t slots = options.slots.per_layer == 0 ? options.slots.pool : options.slots.per_layer;
  return options.policy == CachePolicyKind::kStatic || std::min(num_selected, architecture.num_experts) > slots;
}

std::vector<std::string> fetch_path_names() {
  return {kFetchPaths.begin(), kFetchPaths.end()};
}

std::string fetch_path_name(FetchPath path) {
  return std::string(kFetchPaths.at(static_cast<std::size_t>(path)));
}

FetchPath fetch_path_from_name(std::string_view name) {
  return static_cast<FetchPath>(index_of_name(name, fetch_path_names(), "fetch path"));
}

std::vector<std::string> prefetch_names() {
  return {kPrefetchKinds.begin(), kPrefetchKinds.end()};
}

std::string prefetch_name(PrefetchKind kind) {
  return std::string(kPrefetchKinds.at(static_cast<std::size_t>(kind)));
}

PrefetchKind prefetch_from_name(std::string_view name) {
  return static_cast<PrefetchKind>(index_of_name(name, prefetch_names(), "prefetch"));
}

}  // namespace hestia
