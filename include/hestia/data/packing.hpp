#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hestia/data/corpus.hpp"
#include "hestia/data/tokenizer.hpp"

namespace hestia {

/// Token positions [begin, end) of a sequence.
struct TokenRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// One tokenised sequence (a document, or a part of a long one).
struct TokenSequence {
  std::vector<std::int32_t> tokens;  ///< <s> first when the vocabulary has one, </s> last when the document ended here.
  std::int64_t num_prompt_tokens =
      0;                    ///< Leading tokens that are prompt (the <s> counts as prompt only when there is a prompt).
  std::int32_t domain = 0;  ///< Index into PackedData::domains.
  std::int64_t num_bytes = 0;  ///< UTF-8 bytes of the text its labels stand for (for bits per byte).
  /// Prompt after the first completion token: later questions of a conversation, and what its template writes between
  /// the turns. In order, apart, none at the end.
  std::vector<TokenRange> later_prompts{};
  /// 1 per token: a completion token.
  [[nodiscard]] std::vector<std::uint8_t> completion_mask() const;
};

/// A packed batch of rows, B x S, row-major.
struct PackedBatch {
  std::int64_t num_rows = 0;         ///< B
  std::int64_t row_length = 0;       ///< S
  std::vector<std::int64_t> tokens;  ///< [B, S]; padding holds 0.
  std::vector<std::int64_t>
      labels;  ///< [B, S]; the next token of the same sequence where it is a completion token, else -100.
  std::vector<std::int64_t> sequence_ids;  ///< [B, S]; unique in the batch, increasing; -1: padding.
  std::vector<std::int64_t> positions;     ///< [B, S]; 0 at the start of each sequence.
  std::vector<std::uint8_t> counted;       ///< [B, S]; 1: the token itself is a completion token.
  std::vector<std::int32_t> domains;       ///< Domain of each sequence id.
  std::int64_t num_bytes = 0;              ///< Sum of num_bytes of its sequences.
  [[nodiscard]] std::int64_t num_labels() const;
};

/// What became of the examples (documents with a prompt) of one domain.
struct ExampleCounts {
  std::int64_t read = 0;
  std::int64_t truncated = 0;
  std::int64_t dropped = 0;  ///< Too long, or nothing to learn was left of them.
};

/// Tokenised sequences of one split of one or more corpora.
struct PackedData {
  std::vector<std::string> domains;
  std::vector<TokenSequence> sequences;
  std::vector<ExampleCounts> examples{};  ///< Per domain; shorter where sequences were not made from documents.
  [[nodiscard]] std::int64_t num_tokens() const;
};

/// What happens to an example that is longer than a sequence.
enum class Overlong { kTruncate, kDrop };

/// Tokenises documents into sequences of at most `sequence_length` tokens. Plain text that is longer becomes several,
/// each starting with <s>. An example stays one: what is too long is dropped, or loses first the left part of its
/// leading prompt, down to half the length, then its end. Every piece of a document is encoded by itself, so the tokens
/// of a prompt do not depend on the answer. Truncated and dropped examples are counted in `data.examples` and told in
/// one warning per domain. Stops after `max_tokens` (0: all). The result does not depend on the number of threads.
/// Throws RunError when a document needs a token that the vocabulary lacks.
void tokenize_documents(const std::vector<Document>& documents, const Tokenizer& tokenizer,
                        std::int64_t sequence_length, std::int64_t max_tokens, std::int64_t num_threads,
                        PackedData& data, Overlong overlong = Overlong::kTruncate);

/// A conversation up to where the model's answer begins.
struct ChatPrompt {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> ends;  ///< Tokens that end an answer, each on its own; empty: the vocabulary has none.
};

/// Lays out `user`, after `system` when that is not empty, as the template `format` does (docs/recipes.md), up to the
/// answer: the tokens that an example of a `chat` corpus has there. Throws UsageError, which begins with `option`, with
/// all names when there is no such template, and with the missing tokens when the vocabulary lacks some that it needs.
[[nodiscard]] ChatPrompt chat_prompt(const std::string& format, const std::string& system, const std::string& user,
                                     const Tokenizer& tokenizer, const std::string& option);

/// The tokens of an example up to where its first answer begins, as in training but never cut, and the tokens that end
/// this answer. Throws RunError when the document needs a token that the vocabulary lacks.
[[nodiscard]] ChatPrompt answer_prompt(const Document& document, const Tokenizer& tokenizer);

/// Draws rows for training: sequences in a seeded shuffle per epoch, packed first-fit into rows of `row_length`; a
/// sequence is never split over two rows. Every state change is in `position`, so resume is exact.
class PackedSampler {
 public:
  /// `mix` weighs domains by tokens drawn (empty: as they come; one weight above 0 per domain otherwise). `data` must
  /// outlive the sampler. Throws RunError when there is nothing to draw, in all or in a domain with a weight.
  PackedSampler(const PackedData& data, std::int64_t rows_per_batch, std::int64_t row_length, std::uint64_t seed,
                std::vector<double> mix = {});
  /// The next batch; starts a new epoch (new shuffle) when a domain runs out.
  [[nodiscard]] PackedBatch next();
  /// Batches drawn so far.
  [[nodiscard]] std::int64_t position() const noexcept { return position_; }
  /// Batches, from the first on, that hold at least `epochs` times the tokens of all sequences (replays the draw). With
  /// a mix, domains are then seen unequally often. Throws std::invalid_argument when `epochs` is not above 0.
  [[nodiscard]] std::int64_t batches_for(double epochs) const;
  /// Goes to the state after `position` batches (replays the draw without building tensors).
  void seek(std::int64_t position);

 private:
  struct Pool {
    std::vector<std::size_t> order;  // Sequence indices of this epoch, shuffled.
    std::size_t cursor = 0;
    std::int64_t epoch = 0;
    double drawn = 0.0;  // Tokens drawn so far.
  };
  void reset();
  void start_epoch(std::size_t number);
  std::size_t draw();
  std::vector<std::vector<std::size_t>> next_rows();
  const PackedData* data_;
  std::int64_t rows_per_batch_;
  std::int64_t row_length_;
  std::uint64_t seed_;
  std::vector<double> mix_;
  std::int64_t position_ = 0;
  std::vector<Pool> pools_;           // One per domain with a mix, else one for all.
  std::vector<std::size_t> pending_;  // Drawn, but did not fit the last batch.
};

/// All sequences of `data` once, in order, packed into batches for evaluation (`domain` -1: every domain).
[[nodiscard]] std::vector<PackedBatch> pack_for_evaluation(const PackedData& data, std::int64_t domain,
                                                           std::int64_t rows_per_batch, std::int64_t row_length);

}  // namespace hestia
