#pragma once

#include <memory>
#include <string_view>

#include "json_node.hpp"
#include "text_pattern.hpp"

namespace hestia {

/// Part of a text that is encoded by itself.
struct TextPiece {
  std::string_view text;
  bool first = false;   ///< The text begins with it.
  bool prepend = true;  ///< A space may be put in front of it.
};

using PieceVisitor = FunctionRef<void(const TextPiece&)>;

/// One step that splits text into pieces, which are never empty. Thread-safe.
class PreTokenizer {
 public:
  PreTokenizer() = default;
  PreTokenizer(const PreTokenizer&) = delete;
  PreTokenizer& operator=(const PreTokenizer&) = delete;
  virtual ~PreTokenizer() = default;
  /// Calls `visit` with the parts of `piece` (valid UTF-8) from left to right.
  virtual void split(const TextPiece& piece, PieceVisitor visit) const = 0;
  /// True when the pieces stand for their bytes, each spelt as a printable character in the vocabulary (GPT-2).
  [[nodiscard]] virtual bool byte_level() const { return false; }
};

/// The pre-tokenizer of a `tokenizer.json`. Throws InputError naming a type that Hestia does not know.
[[nodiscard]] std::unique_ptr<PreTokenizer> make_pre_tokenizer(const JsonNode& node);

}  // namespace hestia
