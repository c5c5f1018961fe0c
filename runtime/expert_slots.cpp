#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
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

constexpr std::array<std::string_view, 4> kFetchPaths = {"auto", "together", "copies", "waves"};

[[noreturn]] void refuse(std::string_view text, std::string_view why) {
  throw UsageError(fmt::format("--expert-slots: {}, got \"{}\"; {}", why, text, kForms));
}

template <class Number>
Number number_of(std::string_view text, std::string_view digits) {
  Number number{};
  const char* last = digits.data() + digits.size();
  const auto [end, failure] = std::from_chars(digits.data(), last, number);
  if (failure != std::errc() || end != last) {
    refuse(text, "not a number");
  }
  return number;
}

double bytes_of(std::string_view text, std::string_view amount) {
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
  const auto bytes = number_of<double>(text, amount) * unit;
  if (!std::isfinite(bytes) || bytes <= 0) {
    refuse(text, "not an amount of memory");
  }
  return bytes;
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
    const double bytes = bytes_of(text, text.substr(kMemory.size()));
    const auto fit = static_cast<std::int64_t>(std::min(bytes / static_cast<double>(blob_bytes), 1e9)) -
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
  const auto number = number_of<std::int64_t>(text, pool ? text.substr(kTotal.size()) : text);
  const std::int64_t most = pool ? layers * experts : experts;
  if (number < 1 || number > most) {
    refuse(text, fmt::format("must be from 1 to {} for {} MoE layers of {} experts", most, layers, experts));
  }
  (pool ? slots.pool : slots.per_layer) = number;
  return slots;
}

std::int64_t scratch_slots(const Architecture& architecture, std::int64_t num_selected) {
  return std::min({architecture.top_k, architecture.num_experts, num_selected});
}

std::vector<std::string> fetch_path_names() {
  return {kFetchPaths.begin(), kFetchPaths.end()};
}

std::string fetch_path_name(FetchPath path) {
  return std::string(kFetchPaths.at(static_cast<std::size_t>(path)));
}

FetchPath fetch_path_from_name(std::string_view name) {
  const auto* const found = std::find(kFetchPaths.begin(), kFetchPaths.end(), name);
  if (found != kFetchPaths.end()) {
    return static_cast<FetchPath>(found - kFetchPaths.begin());
  }
  const std::string nearest = nearest_name(name, fetch_path_names());
  throw UsageError(fmt::format("fetch path: unknown name, got \"{}\"; {}choose one of {}", name,
                               nearest.empty() ? "" : fmt::format("did you mean \"{}\"? ", nearest),
                               fmt::join(kFetchPaths, ", ")));
}

}  // namespace hestia
