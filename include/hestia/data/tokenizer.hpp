#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace hestia {

/// A text tokeniser. Thread-safe for encode and decode.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  /// Token ids of `text`, none put around it. A tokenizer.json finds its special tokens in text that spells them, a
  /// sentencepiece model does not. Where `text` is not UTF-8, a tokenizer.json reads U+FFFD for each maximal ill-formed
  /// part (Python's errors="replace"); a sentencepiece model reads U+FFFD for each byte of such a
  /// part, as its library does (an ill-formed, overlong or truncated sequence of n bytes is n of them).
  [[nodiscard]] virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;
  /// The same for text that goes on after other text, so that nothing is put in front of it: some vocabularies begin
  /// every text with a space.
  [[nodiscard]] virtual std::vector<std::int32_t> encode_continuation(std::string_view text) const {
    return encode(text);
  }
  /// Text of `ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD. Throws RunError for an id that is
  /// none.
  [[nodiscard]] virtual std::string decode(const std::vector<std::int32_t>& ids) const = 0;
  [[nodiscard]] virtual std::int64_t vocab_size() const = 0;
  /// The id of the token spelt exactly like `name`, for example `<|im_end|>`; -1 when there is none.
  [[nodiscard]] virtual std::int32_t token_id(std::string_view name) const = 0;
  /// Special ids; -1 when the vocabulary has none.
  [[nodiscard]] virtual std::int32_t bos_id() const = 0;
  [[nodiscard]] virtual std::int32_t eos_id() const = 0;
  [[nodiscard]] virtual std::int32_t pad_id() const = 0;
  /// UTF-8 bytes of text that `ids` stand for, also where they begin or end inside a character. Special ids count 0, an
  /// unknown token 1.
  [[nodiscard]] virtual std::int64_t count_bytes(const std::vector<std::int32_t>& ids) const = 0;
};

/// Opens the tokeniser of a model directory, or the file itself when `path` is one: `tokenizer.json` of the tokenizers
/// library (any name that ends in .json), otherwise `tokenizer.model`, a sentencepiece model. Where a directory has
/// both, tokenizer.json is used, as it holds tokens that were added to the vocabulary later; a log line says so. Throws
/// InputError: missing (names what was looked for), damaged, or with a component that Hestia does not read (names it).
[[nodiscard]] std::unique_ptr<Tokenizer> open_tokenizer(const std::filesystem::path& path);

/// Copies what open_tokenizer reads from `path`, a directory or a file, into the existing directory `folder` under the
/// names that a model directory has, each file whole or not at all and over one of that name: the vocabulary and, with
/// a tokenizer.json or a directory, what stands beside it of special tokens and chat template. False: no vocabulary is
/// there. Throws InputError on a file that cannot be read, RunError on one that cannot be written.
bool copy_tokenizer(const std::filesystem::path& path, const std::filesystem::path& folder);

/// Options of tokenizer training.
struct TokenizerTraining {
  std::int64_t vocab_size = 4096;
  std::int64_t max_sentence_bytes = 4096;  ///< Longer lines are cut.
  std::int64_t num_threads = 2;
  std::vector<std::string> special_tokens{};  ///< Further tokens that no text is encoded into: those of chat templates.
};

/// Trains a byte-fallback BPE sentencepiece model that keeps every byte of UTF-8 text (no normalisation, no dummy
/// prefix, whitespace and line breaks kept; only U+2581, sentencepiece's own sign for a space, becomes one) on the
/// texts that `next` yields (it returns false at the end) and writes it whole or not at all to `path`. The same texts
/// and options give the same bytes. ids: 0 unknown, 1 <s>, 2 </s>, 3 <pad>, then `special_tokens`. Throws RunError with
/// sentencepiece's reason.
void train_tokenizer(const std::function<bool(std::string& sentence)>& next, const TokenizerTraining& options,
                     const std::filesystem::path& path);

}  // namespace hestia
