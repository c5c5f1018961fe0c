#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "hestia/core/recipe.hpp"

namespace hestia {

/// What a piece of a document is to the tokenizer.
enum class PieceKind {
  kText,          ///< Text, encoded apart from its neighbours: no token spans two pieces.
  kToken,         ///< The one token of this name, for example `<|im_end|>`.
  kEndOfSequence  ///< The vocabulary's </s>; nothing where it has none.
};

/// A stretch of a document.
struct Piece {
  PieceKind kind = PieceKind::kText;
  std::string text;         ///< The text, or the token's name; empty for the </s>.
  bool completion = false;  ///< Trained on and counted; else prompt.
};

/// One document: the unit of the train/held-out split; nothing leaks from one into another.
struct Document {
  Document() = default;
  /// A prompt (may be empty: plain text) and its completion, which ends with </s>.
  Document(std::string id, std::string domain, std::string prompt, std::string completion);
  std::string id;  ///< Stable: file path below what the recipe names, plus `#index` for a part of a file.
  std::string domain;
  std::vector<Piece> pieces;   ///< In order. Without a prompt piece: plain text, which may become several sequences.
  bool begin_sequence = true;  ///< Starts with the vocabulary's <s>, when it has one.
  /// Appends text; to the piece before when that is text of the same side (prompt or completion).
  void append_text(std::string_view text, bool completion);
  /// Appends the token of this name, or with an empty name the vocabulary's </s>.
  void append_token(std::string_view name, bool completion);
  /// Text of all pieces, special tokens left out.
  [[nodiscard]] std::string text() const;
  [[nodiscard]] std::int64_t num_bytes() const;  ///< Of that text.
  [[nodiscard]] bool has_prompt() const;
  /// Text of the completion up to the next prompt; of a conversation, its first answer. Special tokens left out.
  [[nodiscard]] std::string first_answer() const;
};

/// One corpus of a recipe.
struct CorpusOptions {
  std::string domain;           ///< Label in every report.
  std::string format = "text";  ///< text | jsonl | question_answer | chat
  std::vector<std::string>
      paths;  ///< Files, folders (read recursively, links left out), or globs; `.gz` and `.dz` are inflated.
  std::vector<std::string>
      suffixes;           ///< Folders only: keep names that end in one of these (after `.gz` is removed); empty: all.
  std::string package;    ///< Debian package that provides it, for the message when it is missing.
  std::string origin;     ///< Where else to get it, for the same message.
  std::string separator;  ///< text: regular expression; a line that matches (its first 1000 bytes, without the line
                          ///< break) starts a new document. Empty: a file is a document.
  std::int64_t max_bytes = 0;  ///< Stop after this much text (0: all), taken over documents in shuffled, seeded order.
  std::int64_t min_document_bytes = 200;  ///< text: shorter files are left out, shorter pieces join the next.
  std::int64_t max_document_bytes =
      65536;  ///< Longer documents are cut into parts at a line break; all parts share one split. Answers stay whole.
  std::string text_field = "text";           ///< jsonl: the text, or the completion when prompt_field is set.
  std::string prompt_field;                  ///< jsonl: the prompt; empty: plain text.
  std::string prompt_template = "{prompt}";  ///< jsonl: `{prompt}` is replaced.
  std::string question_field;  ///< question_answer; empty: the first of question, instruction, prompt that is there.
  std::string context_field;   ///< question_answer, optional in a record; empty: context, input.
  std::string answer_field;    ///< question_answer; empty: answer, response, output, completion.
  std::string messages_field;  ///< chat; empty: messages, conversations.
  std::string chat_template = "plain";  ///< question_answer, chat: key `template`, one of template_names().
  std::string system_message;           ///< question_answer, chat: for records that have none; empty: none.
  std::string overlong = "truncate";    ///< Examples longer than a sequence: truncate | drop.
  FieldList fields();
};

/// Which half of the split to read.
enum class Split { kTrain, kHeldOut };

/// Options that hold for all corpora of a recipe.
struct SplitOptions {
  double held_out_fraction =
      0.05;  ///< Share of documents held out, by a hash of the document id: stable when files are added.
  std::uint64_t seed = 1;
};

/// Names of the templates that lay out the turns of `question_answer` and `chat` corpora (docs/recipes.md).
[[nodiscard]] std::vector<std::string> template_names();
/// Names of the tokens that a template needs in the vocabulary, </s> apart. Throws std::invalid_argument when there is
/// no such template.
[[nodiscard]] std::vector<std::string> template_tokens(const std::string& name);

/// Reads every document of one corpus that falls into `split`, in a deterministic shuffled order that depends on the
/// seed and the ids only; a file that several paths match is read once. `recipe_key` (for example "data.corpora.0")
/// names the key to change in messages. Bytes that are not UTF-8 are replaced by U+FFFD. JSON lines without text to
/// learn from (an empty completion) are left out. Throws InputError when nothing matches `paths`: names the path, where
/// to get it and the recipe key that points elsewhere; also for damaged gzip data and for lines, of either split, that
/// are not JSON objects or whose fields or messages are wrong (file:line, key, value). Throws UsageError for a
/// separator that is no regular expression and a prompt_template without `{prompt}`.
[[nodiscard]] std::vector<Document> read_corpus(const CorpusOptions& options, const SplitOptions& split_options,
                                                Split split, const std::string& recipe_key);

}  // namespace hestia
