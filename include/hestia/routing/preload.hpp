#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/core/json_lines.hpp"
#include "hestia/routing/preferences.hpp"

namespace hestia {

/// Name of a router on the command line and in a preference file: baseline, tuned.
[[nodiscard]] std::string_view router_name(PreferenceRouter router);
/// Inverse of router_name. Throws UsageError naming `option` and the nearest name.
[[nodiscard]] PreferenceRouter router_from_name(std::string_view name, std::string_view option);

/// By what experts are ranked for a start with preload: the counts of all sequences, what the file's predictor guesses
/// from the prompt, or the counts of the stored sequence whose prompt routed most like this one.
enum class PreloadChoice { kAggregate, kPredictor, kNearest };

/// Names on the command line, in enum order: aggregate, predictor, nearest.
[[nodiscard]] std::vector<std::string> preload_choice_names();
/// Inverse of them. Throws UsageError naming `option` and the nearest name.
[[nodiscard]] PreloadChoice preload_choice_from_name(std::string_view name, std::string_view option);

/// Experts in the order in which a cache is filled before decoding: per layer all E, by falling `aggregate.count`, ties
/// to the lower index. Throws std::invalid_argument when the counts do not have L * E entries or E is above 65536.
[[nodiscard]] std::vector<std::vector<std::uint16_t>> preload_order(const PreferenceAggregate& aggregate);

/// The same by falling scores, [L, E], ties to the lower index: what a predictor says. Throws std::invalid_argument
/// when there are not L * E scores or E is above 65536.
[[nodiscard]] std::vector<std::vector<std::uint16_t>> preload_order(std::span<const float> scores_LE,
                                                                    std::int64_t num_layers, std::int64_t num_experts);

/// The preload order of one router of `preferences.h5`, for a cache whose layers are the model layers `layers` with
/// `num_experts` experts each; `whose` names them in messages ("the trace"). Throws InputError for what is no
/// preference file or holds no completion token, UsageError when layers or experts are others.
[[nodiscard]] std::vector<std::vector<std::uint16_t>> read_preload(const std::filesystem::path& preferences,
                                                                   PreferenceRouter router,
                                                                   std::span<const std::int64_t> layers,
                                                                   std::int64_t num_experts, const std::string& whose);

/// The predictor of a preference file, for inputs of `embedding_size` values that are means of the prompt's token
/// embeddings. Throws InputError for what is no preference file; UsageError when there is no predictor, it was trained
/// on other embeddings, or its layers, experts or inputs are others.
[[nodiscard]] PreferencePredictor read_preload_predictor(const std::filesystem::path& preferences,
                                                         std::span<const std::int64_t> layers, std::int64_t num_experts,
                                                         std::int64_t embedding_size, const std::string& whose);

/// What the stored sequence that is nearest to a prompt says.
struct NearestPreload {
  std::int64_t id = 0;      ///< Of the sequence.
  double similarity = 0.0;  ///< Cosine of the two prompts' counts, over all layers and experts.
  /// Per layer all E by falling `count` of that sequence, then of the aggregate, ties to the lower index.
  std::vector<std::vector<std::uint16_t>> order;
};

/// Where the experts of a start with preload come from.
struct PreloadSource {
  PreloadChoice by = PreloadChoice::kAggregate;
  std::filesystem::path file;  ///< preferences.h5
  PreferenceRouter router = PreferenceRouter::kBaseline;
};

/// The same as results have it: {"by", "file", "router", "sequence", "similarity"}; the last two say what kNearest
/// `found` and are null for the others.
[[nodiscard]] Json preload_json(const PreloadSource& source, const NearestPreload& found = {});

/// Finds the stored sequence, among those with a prompt and an answer, whose `prompt_count` under one router has the
/// highest cosine with a prompt's own; ties to the first. Needs nothing but `preferences.h5`: it holds no embeddings.
class NearestPrompt {
 public:
  /// Throws as read_preload does, and UsageError when no stored sequence has both a prompt and an answer.
  NearestPrompt(const std::filesystem::path& preferences, PreferenceRouter router, std::span<const std::int64_t> layers,
                std::int64_t num_experts, const std::string& whose);
  /// `prompt_count_LE`: tokens of the prompt that select each expert, [L, E]. Reads the file block by block. Throws
  /// std::invalid_argument for another size.
  [[nodiscard]] NearestPreload find(std::span<const std::int64_t> prompt_count_LE) const;

 private:
  PreferenceReader reader_;
  PreferenceRouter router_;
  PreferenceAggregate aggregate_;
};

}  // namespace hestia
