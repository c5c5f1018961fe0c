#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "hestia/core/recipe.hpp"

namespace hestia {

/// One document: the unit of the train/held-out split; nothing leaks from one into another.
struct Document {
  std::string id;  ///< Stable: file path below what the recipe names, plus `#index` for a part of a file.
  std::string domain;
  std::string prompt;      ///< Not trained on, never counted; empty for plain text.
  std::string completion;  ///< The text.
};

/// One corpus of a recipe.
struct CorpusOptions {
  std::string domain;           ///< Label in every report.
  std::string format = "text";  ///< text | jsonl
  std::vector<std::string>
      paths;  ///< Files, folders (read recursively, links left out), or globs; `.gz` and `.dz` are inflated.
  std::vector<std::string>
      suffixes;           ///< Folders only: keep names that end in one of these (after `.gz` is removed); empty: all.
  std::string package;    ///< Debian package that provides it, for the message when it is missing.
  std::string separator;  ///< text: regular expression; a line that matches (its first 1000 bytes, without the line
                          ///< break) starts a new document. Empty: a file is a document.
  std::int64_t max_bytes = 0;  ///< Stop after this much text (0: all), taken over documents in shuffled, seeded order.
  std::int64_t min_document_bytes = 200;  ///< text: shorter files are left out, shorter pieces join the next.
  std::int64_t max_document_bytes =
      65536;  ///< Longer documents are cut into parts at a line break; all parts share one split. Answers stay whole.
  std::string text_field = "text";           ///< jsonl: the text, or the completion when prompt_field is set.
  std::string prompt_field;                  ///< jsonl: the prompt; empty: plain text.
  std::string prompt_template = "{prompt}";  ///< jsonl: `{prompt}` is replaced.
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

/// Reads every document of one corpus that falls into `split`, in a deterministic shuffled order that depends on the
/// seed and the ids only; a file that several paths match is read once. `recipe_key` (for example "data.corpora.0")
/// names the key to change in messages. Bytes that are not UTF-8 are replaced by U+FFFD. Throws InputError when nothing
/// matches `paths`: names the path, the Debian package and the recipe key that points elsewhere; also for damaged gzip
/// data and for lines, of either split, that are not JSON objects or lack the field (file:line). Throws UsageError for
/// a separator that is no regular expression and a prompt_template without `{prompt}`.
[[nodiscard]] std::vector<Document> read_corpus(const CorpusOptions& options, const SplitOptions& split_options,
                                                Split split, const std::string& recipe_key);

}  // namespace hestia
