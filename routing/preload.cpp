#include "hestia/routing/preload.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"

namespace hestia {

namespace {

// In enum order.
constexpr std::array<std::string_view, 2> kRouterNames = {"baseline", "tuned"};
constexpr std::array<std::string_view, 3> kChoiceNames = {"aggregate", "predictor", "nearest"};
constexpr std::int64_t kMaxExperts = 65536;
constexpr std::int64_t kRowsPerBlock = 256;

// Position of `name` among `names`.
std::size_t place_of(std::string_view name, std::span<const std::string_view> names, std::string_view option,
                     std::string_view what) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found != names.end()) {
    return static_cast<std::size_t>(found - names.begin());
  }
  const std::string nearest = nearest_name(name, {names.begin(), names.end()});
  throw UsageError(fmt::format("{}: unknown {}, got \"{}\"; {}choose one of {}", option, what, name,
                               nearest.empty() ? "" : fmt::format("did you mean \"{}\"? ", nearest),
                               fmt::join(names, ", ")));
}

// Per layer the experts in the order of `before`(entry [l, e], entry [l, f]), ties to the lower index.
template <class Before>
std::vector<std::vector<std::uint16_t>> ordered(std::size_t size, std::int64_t num_layers, std::int64_t num_experts,
                                                Before before) {
  if (num_layers < 0 || num_experts < 0 || num_experts > kMaxExperts ||
      static_cast<std::int64_t>(size) != num_layers * num_experts) {
    throw std::invalid_argument(
        fmt::format("preload: {} counts for {} layers of {} experts", size, num_layers, num_experts));
  }
  const auto experts = static_cast<std::size_t>(num_experts);
  std::vector<std::vector<std::uint16_t>> order(static_cast<std::size_t>(num_layers));
  for (std::size_t layer = 0; layer < order.size(); ++layer) {
    order[layer].resize(experts);
    std::iota(order[layer].begin(), order[layer].end(), std::uint16_t{0});
    std::stable_sort(order[layer].begin(), order[layer].end(), [&](std::uint16_t a, std::uint16_t b) {
      return before(layer * experts + a, layer * experts + b);
    });
  }
  return order;
}

PreferenceReader fitting_reader(const std::filesystem::path& preferences, std::span<const std::int64_t> layers,
                                std::int64_t num_experts, const std::string& whose) {
  PreferenceReader reader(preferences);
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
  return reader;
}

// Cosine of two counts; 0 when one of them is all zeros.
double cosine(std::span<const std::int64_t> a, std::span<const std::uint16_t> b) {
  double product = 0.0;
  double square_a = 0.0;
  double square_b = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto x = static_cast<double>(a[i]);
    const auto y = static_cast<double>(b[i]);
    product += x * y;
    square_a += x * x;
    square_b += y * y;
  }
  const double norms = std::sqrt(square_a) * std::sqrt(square_b);
  return norms > 0 ? product / norms : 0.0;
}

bool has_prompt_and_answer(const PreferenceRows& rows, std::size_t i) {
  return rows.num_prompt_tokens[i] > 0 && rows.num_tokens[i] > rows.num_prompt_tokens[i];
}

}  // namespace

std::string_view router_name(PreferenceRouter router) {
  return kRouterNames.at(static_cast<std::size_t>(router));
}

PreferenceRouter router_from_name(std::string_view name, std::string_view option) {
  return static_cast<PreferenceRouter>(place_of(name, kRouterNames, option, "router"));
}

std::vector<std::string> preload_choice_names() {
  return {kChoiceNames.begin(), kChoiceNames.end()};
}

PreloadChoice preload_choice_from_name(std::string_view name, std::string_view option) {
  return static_cast<PreloadChoice>(place_of(name, kChoiceNames, option, "choice of experts"));
}

Json preload_json(const PreloadSource& source, const NearestPreload& found) {
  const bool nearest = source.by == PreloadChoice::kNearest;
  return {{"by", kChoiceNames.at(static_cast<std::size_t>(source.by))},
          {"file", source.file.string()},
          {"router", router_name(source.router)},
          {"sequence", nearest ? Json(found.id) : Json()},
          {"similarity", nearest ? Json(found.similarity) : Json()}};
}

std::vector<std::vector<std::uint16_t>> preload_order(const PreferenceAggregate& aggregate) {
  return ordered(aggregate.count.size(), aggregate.num_layers, aggregate.num_experts,
                 [&](std::size_t a, std::size_t b) { return aggregate.count[a] > aggregate.count[b]; });
}

std::vector<std::vector<std::uint16_t>> preload_order(std::span<const float> scores_LE, std::int64_t num_layers,
                                                      std::int64_t num_experts) {
  return ordered(scores_LE.size(), num_layers, num_experts,
                 [&](std::size_t a, std::size_t b) { return scores_LE[a] > scores_LE[b]; });
}

std::vector<std::vector<std::uint16_t>> read_preload(const std::filesystem::path& preferences, PreferenceRouter router,
                                                     std::span<const std::int64_t> layers, std::int64_t num_experts,
                                                     const std::string& whose) {
  const PreferenceAggregate aggregate = fitting_reader(preferences, layers, num_experts, whose).aggregate(router);
  if (std::all_of(aggregate.count.begin(), aggregate.count.end(), [](std::int64_t count) { return count == 0; })) {
    throw InputError(
        fmt::format("{}: the {} router has no completion token, so no expert is better than another; export the bundle "
                    "on text with answers",
                    preferences.string(), router_name(router)));
  }
  return preload_order(aggregate);
}

PreferencePredictor read_preload_predictor(const std::filesystem::path& preferences,
                                           std::span<const std::int64_t> layers, std::int64_t num_experts,
                                           std::int64_t embedding_size, const std::string& whose) {
  std::optional<PreferencePredictor> predictor = fitting_reader(preferences, layers, num_experts, whose).predictor();
  const std::string advice = "or preload by aggregate or nearest";
  if (!predictor) {
    throw UsageError(
        fmt::format("preload: {} has no predictor; export the bundle with export.predictor.enabled=true, {}",
                    preferences.string(), advice));
  }
  if (predictor->embedding != kMeanTokenEmbedding || predictor->embedding_size != embedding_size) {
    throw UsageError(fmt::format(
        "preload: the predictor of {} must take the {} mean token embedding of {}, got {} values \"{}\"; export the "
        "bundle with export.predictor.embeddings left empty, {}",
        preferences.string(), embedding_size, whose, predictor->embedding_size, predictor->embedding, advice));
  }
  return *std::move(predictor);
}

NearestPrompt::NearestPrompt(const std::filesystem::path& preferences, PreferenceRouter router,
                             std::span<const std::int64_t> layers, std::int64_t num_experts, const std::string& whose)
    : reader_(fitting_reader(preferences, layers, num_experts, whose)),
      router_(router),
      aggregate_(reader_.aggregate(router)) {
  for (std::int64_t first = 0; first < reader_.num_stored(); first += kRowsPerBlock) {
    const PreferenceRows rows = reader_.rows(router, first, std::min(kRowsPerBlock, reader_.num_stored() - first));
    for (std::size_t i = 0; i < rows.ids.size(); ++i) {
      if (has_prompt_and_answer(rows, i)) {
        return;
      }
    }
  }
  throw UsageError(
      fmt::format("preload: {} stores no sequence with a prompt and an answer, got {} sequences; export the bundle on "
                  "examples with "
                  "prompts (or set export.prompt_tokens), or preload by aggregate",
                  preferences.string(), reader_.num_stored()));
}

NearestPreload NearestPrompt::find(std::span<const std::int64_t> prompt_count_LE) const {
  const std::size_t width = aggregate_.count.size();
  if (prompt_count_LE.size() != width) {
    throw std::invalid_argument(
        fmt::format("preload: counts of a prompt must be {} numbers, got {}", width, prompt_count_LE.size()));
  }
  NearestPreload nearest;
  nearest.similarity = -1.0;
  std::vector<std::uint16_t> count;
  for (std::int64_t first = 0; first < reader_.num_stored(); first += kRowsPerBlock) {
    const PreferenceRows rows = reader_.rows(router_, first, std::min(kRowsPerBlock, reader_.num_stored() - first));
    for (std::size_t i = 0; i < rows.ids.size(); ++i) {
      if (!has_prompt_and_answer(rows, i)) {
        continue;
      }
      const double similarity =
          cosine(prompt_count_LE, std::span<const std::uint16_t>(rows.prompt_count).subspan(i * width, width));
      if (similarity > nearest.similarity) {
        nearest.similarity = similarity;
        nearest.id = rows.ids[i];
        const auto begin = rows.count.begin() + static_cast<std::ptrdiff_t>(i * width);
        count.assign(begin, begin + static_cast<std::ptrdiff_t>(width));
      }
    }
  }
  nearest.order =
      ordered(count.size(), aggregate_.num_layers, aggregate_.num_experts, [&](std::size_t a, std::size_t b) {
        return count[a] != count[b] ? count[a] > count[b] : aggregate_.count[a] > aggregate_.count[b];
      });
  return nearest;
}

}  // namespace hestia
