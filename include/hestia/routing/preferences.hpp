#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "hestia/core/atomic_file.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/hdf5.hpp"
#include "hestia/core/random.hpp"
#include "hestia/routing/layout.hpp"
#include "hestia/routing/preference_predictor.hpp"

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

/// The two routers of a preference file.
enum class PreferenceRouter { kBaseline, kTuned };

/// Statistics of N stored sequences under one router, row-major.
struct PreferenceRows {
  std::vector<std::int64_t> ids;                ///< [N]
  std::vector<std::string> tasks;               ///< [N] domain or task label.
  std::vector<std::int64_t> num_prompt_tokens;  ///< [N]
  std::vector<std::int64_t> num_tokens;         ///< [N] prompt included.
  std::vector<std::uint16_t> count;             ///< [N, L, E] completion tokens that select e; stops at 65535.
  std::vector<std::uint16_t> prompt_count;      ///< [N, L, E] prompt tokens that select e; stops at 65535.
  std::vector<float> mean_probability;          ///< [N, L, E] over completion tokens, rounded to half precision.
};

/// How a preference file is filled.
struct PreferenceWriterOptions {
  std::int64_t max_sequences = 0;  ///< Sequences stored one by one; 0: all. More make a reservoir sample.
  std::uint64_t seed = 1;          ///< Of the reservoir.
  std::int64_t buffer_bytes = std::int64_t{32}
                              << 20;  ///< Rows held in memory before they are written; at least one chunk.
  std::int64_t chunk_bytes = std::int64_t{32} << 10;  ///< Uncompressed size of one chunk; at least one row.
  int deflate_level = 1;                              ///< 1 to 9; 0: not compressed.
  bool shuffle = true;
};

/// Writes `preferences.h5` sequence by sequence: expert preferences of the baseline and the tuned router over the same
/// teacher-forced tokens (layout: docs/formats.md, format version 1). Memory is that of the aggregates, 2 * L * E * (E
/// + 2) numbers, and of the buffer, however many sequences come. The per-sequence part is a reservoir sample of at most
/// `max_sequences` (algorithm R, its own seed); the aggregate always covers every sequence. Counts of one sequence are
/// 16 bits wide: beyond 65535 they saturate, with a warning. The file is filled under a temporary name; `close` puts it
/// in place, and a writer that is destroyed before leaves nothing. Throws RunError when the disk refuses.
class PreferenceWriter {
 public:
  /// `model_layers`: the model layer of each of the L MoE layers. Throws std::invalid_argument when sizes make no
  /// sense.
  PreferenceWriter(const std::filesystem::path& path, std::int64_t num_layers, std::int64_t num_experts,
                   std::vector<std::int64_t> model_layers, const PreferenceWriterOptions& options = {});
  PreferenceWriter(const PreferenceWriter&) = delete;
  PreferenceWriter& operator=(const PreferenceWriter&) = delete;
  ~PreferenceWriter();
  /// Adds one sequence seen by both routers (probabilities recorded). Throws std::invalid_argument, with nothing added,
  /// when the two differ in id or length, lack probabilities, or do not fit the model.
  void add(const SequenceRouting& baseline, const SequenceRouting& tuned);
  /// Writes aggregates, attributes and the predictor, if any, and renames the file into place. Nothing may follow.
  /// Throws std::invalid_argument when the predictor is of another shape.
  void close(const PreferencePredictor* predictor = nullptr);

  /// Stored sequences so far, and `count` of them from `first` on, in the order they have in the file.
  [[nodiscard]] std::int64_t num_stored() const noexcept { return num_stored_; }
  [[nodiscard]] PreferenceRows rows(PreferenceRouter router, std::int64_t first, std::int64_t count);
  /// Sequences added so far.
  [[nodiscard]] std::int64_t num_sequences() const noexcept { return num_seen_; }
  [[nodiscard]] PreferenceAggregate aggregate(PreferenceRouter router) const;

 private:
  struct Totals {
    PreferenceAggregate sums;  // mean_probability holds sums until it is asked for
    std::int64_t tokens = 0;
  };
  // One sequence as stored; [L, E] each, baseline first.
  struct Row {
    std::int64_t id = 0;
    std::string task;
    std::int64_t num_prompt_tokens = 0;
    std::int64_t num_tokens = 0;
    std::array<std::vector<std::uint16_t>, 2> count;
    std::array<std::vector<std::uint16_t>, 2> mean_probability;  // half bits
    std::array<std::vector<std::uint16_t>, 2> prompt_count;
  };
  void create_datasets();
  [[nodiscard]] std::optional<std::int64_t> next_slot();
  void flush();
  void flush_chunk(std::int64_t chunk);
  std::int64_t num_layers_;
  std::int64_t num_experts_;
  std::vector<std::int64_t> model_layers_;
  PreferenceWriterOptions options_;
  std::int64_t chunk_rows_;
  std::size_t buffer_rows_;
  SplitMix64 random_;
  std::int64_t num_seen_ = 0;
  std::int64_t num_stored_ = 0;
  std::int64_t num_written_ = 0;         // of the stored ones, how many have a place in the file
  std::map<std::int64_t, Row> pending_;  // by place: new ones, and written ones that were replaced
  std::array<Totals, 2> totals_;
  std::unique_ptr<AtomicFile> target_;
  std::optional<H5File> file_;
};

/// Reads `preferences.h5` without loading its per-sequence part: rows are read when asked for, and only the chunks they
/// lie in. Not thread-safe. Throws InputError: missing file, not this format, newer version, wrong shapes.
class PreferenceReader {
 public:
  explicit PreferenceReader(const std::filesystem::path& path);
  [[nodiscard]] std::int64_t num_layers() const noexcept { return static_cast<std::int64_t>(layers_.size()); }
  [[nodiscard]] std::int64_t num_experts() const noexcept { return num_experts_; }
  /// Model layer of each of the L MoE layers.
  [[nodiscard]] const std::vector<std::int64_t>& layers() const noexcept { return layers_; }
  /// Sequences stored one by one, and those behind the aggregates.
  [[nodiscard]] std::int64_t num_stored() const noexcept { return num_stored_; }
  [[nodiscard]] std::int64_t num_sequences_total() const noexcept { return num_sequences_total_; }
  /// Of all stored sequences, in the order of the file.
  [[nodiscard]] std::vector<std::int64_t> ids() const;
  [[nodiscard]] std::vector<std::string> tasks() const;
  /// Sequences [first, first + count) of the file. Throws std::out_of_range past the end.
  [[nodiscard]] PreferenceRows rows(PreferenceRouter router, std::int64_t first, std::int64_t count) const;
  /// The sequences at these places of the file, in the order given. Throws std::out_of_range past the end.
  [[nodiscard]] PreferenceRows rows(PreferenceRouter router, std::span<const std::int64_t> places) const;
  [[nodiscard]] PreferenceAggregate aggregate(PreferenceRouter router) const;
  /// The predictor that was trained with the file; nullopt when there is none.
  [[nodiscard]] std::optional<PreferencePredictor> predictor() const;

 private:
  [[nodiscard]] InputError damaged(const std::string& what) const;
  std::filesystem::path path_;
  H5File file_;
  std::vector<std::int64_t> layers_;
  std::int64_t num_experts_ = 0;
  std::int64_t num_stored_ = 0;
  std::int64_t num_sequences_total_ = 0;
};

}  // namespace hestia
