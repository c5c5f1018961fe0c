#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace hestia {

/// Which token belongs to which sequence, and whether it counts. T tokens in one flat axis; the tokens of a sequence
/// are contiguous and in order; padding may stand anywhere between sequences.
struct SequenceLayout {
  /// Sequence of each token, T entries; negative: padding. Two sequences in one layout never share an id.
  std::vector<std::int64_t> sequence_ids;
  /// 1 where the token is a counted position (its own input token is a completion token), T entries.
  std::vector<std::uint8_t> counted;

  [[nodiscard]] std::int64_t num_tokens() const noexcept { return static_cast<std::int64_t>(sequence_ids.size()); }
};

/// One maximal run of tokens of the same sequence: [begin, end) in the flat token axis.
struct SequenceRun {
  std::int64_t id = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] std::int64_t length() const noexcept { return end - begin; }
};

/// The runs of `layout` in order, padding left out. Throws std::invalid_argument when the two vectors differ in length
/// or an id comes back after its run ended.
[[nodiscard]] std::vector<SequenceRun> sequence_runs(const SequenceLayout& layout);

/// The routing of one sequence through all MoE layers of a model, in plain memory.
/// L layers, T tokens, K experts per token, E experts. All arrays row-major.
struct SequenceRouting {
  std::int64_t id = 0;
  std::string task;                     ///< Domain or task label.
  std::int64_t num_prompt_tokens = 0;   ///< Leading tokens that are prompt (not counted).
  std::int64_t num_tokens = 0;          ///< T, prompt included.
  std::int64_t num_layers = 0;          ///< L
  std::int64_t num_experts = 0;         ///< E
  std::int64_t top_k = 0;               ///< K
  std::vector<std::uint16_t> selected;  ///< [L, T, K], by falling weight (rank 0 highest).
  std::vector<float> weights;           ///< [L, T, K], mixing weights in the same order.
  std::vector<float> probabilities;     ///< [L, T, E] softmax of the router logits; empty when not recorded.
  /// [T] 1 where the token counts; empty: every token after the leading prompt does. Conversations have prompt between
  /// their answers.
  std::vector<std::uint8_t> counted{};

  /// Whether token `token` counts (is a decode step).
  [[nodiscard]] bool is_counted(std::int64_t token) const {
    return token >= num_prompt_tokens && (counted.empty() || counted[static_cast<std::size_t>(token)] != 0);
  }
  /// Tokens that count.
  [[nodiscard]] std::int64_t num_counted() const;
};

}  // namespace hestia
