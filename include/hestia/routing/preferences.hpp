#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "hestia/routing/layout.hpp"

namespace hestia {

/// Aggregate statistics of one router over all its sequences.
struct PreferenceAggregate {
  std::int64_t num_layers = 0;
  std::int64_t num_experts = 0;
  std::vector<std::int64_t> count;         ///< [L, E] completion tokens that select e.
  std::vector<double> mean_probability;    ///< [L, E] mean of p_e over completion tokens.
  std::vector<std::int64_t> coactivation;  ///< [L, E, E] steps that serve both; the diagonal is `count`.
  /// [L, E, E] transition[e,f]: completion steps that serve f after a step (the last prompt token included) that served
  /// e.
  std::vector<std::int64_t> transition;
};

/// Per-sequence expert preferences of the baseline and the tuned router over the same teacher-forced tokens, as stored
/// in `preferences.h5`. The per-sequence part is a reservoir sample of at most `max_sequences` (algorithm R, its own
/// seed); the aggregate always covers every sequence. Counts of one sequence are 16 bits wide: beyond 65535 they
/// saturate, with a warning.
class PreferenceRecorder {
 public:
  PreferenceRecorder(std::int64_t num_layers, std::int64_t num_experts, std::vector<std::int64_t> model_layers,
                     std::int64_t max_sequences, std::uint64_t seed);
  /// Adds one sequence seen by both routers (probabilities recorded). Throws std::invalid_argument when the two differ
  /// in id or length, lack probabilities, or do not fit the model.
  void add(const SequenceRouting& baseline, const SequenceRouting& tuned);
  /// Writes the file, whole or not at all; format version 1. Layout: docs/formats.md.
  void write(const std::filesystem::path& path) const;
  [[nodiscard]] PreferenceAggregate aggregate_baseline() const;
  [[nodiscard]] PreferenceAggregate aggregate_tuned() const;
  [[nodiscard]] std::int64_t num_sequences() const noexcept { return seen_; }

 private:
  struct Router {
    PreferenceAggregate total;
    std::vector<double> probability_sum;
    std::int64_t tokens = 0;
    std::vector<std::vector<std::uint16_t>> count;         // per kept sequence, [L, E]
    std::vector<std::vector<std::uint16_t>> prompt_count;  // per kept sequence, [L, E]
    std::vector<std::vector<float>> mean_probability;      // per kept sequence, [L, E]
  };
  struct Kept {
    std::int64_t id = 0;
    std::string task;
    std::int64_t num_prompt_tokens = 0;
    std::int64_t num_tokens = 0;
  };
  [[nodiscard]] static PreferenceAggregate aggregate_of(const Router& router);
  std::int64_t num_layers_;
  std::int64_t num_experts_;
  std::vector<std::int64_t> model_layers_;
  std::int64_t max_sequences_;
  std::uint64_t random_state_;
  std::int64_t seen_ = 0;
  std::vector<Kept> kept_;
  Router baseline_;
  Router tuned_;
};

/// What a runtime reads back. Throws InputError: missing file, not this format, newer version, wrong shapes.
struct Preferences {
  std::int64_t num_sequences_total = 0;
  std::vector<std::int64_t> layers;
  std::vector<std::int64_t> ids;
  std::vector<std::string> tasks;
  PreferenceAggregate baseline;
  PreferenceAggregate tuned;
};
[[nodiscard]] Preferences read_preferences(const std::filesystem::path& path);

}  // namespace hestia
