#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "json_node.hpp"

namespace hestia {

/// One step that turns the spelling of tokens back into text. Thread-safe.
class TokenDecoder {
 public:
  TokenDecoder() = default;
  TokenDecoder(const TokenDecoder&) = delete;
  TokenDecoder& operator=(const TokenDecoder&) = delete;
  virtual ~TokenDecoder() = default;
  /// The parts whose concatenation is the text.
  [[nodiscard]] virtual std::vector<std::string> apply(std::vector<std::string> tokens) const = 0;
  /// True when tokens spell bytes in the alphabet of GPT-2.
  [[nodiscard]] virtual bool byte_level() const { return false; }
};

/// The decoder of a `tokenizer.json`. Throws InputError naming a type that Hestia does not know.
[[nodiscard]] std::unique_ptr<TokenDecoder> make_token_decoder(const JsonNode& node);

/// The bytes that a token of a byte-level vocabulary (GPT-2) spells: one for each character of its alphabet; the token
/// itself when it holds another character.
[[nodiscard]] std::string bytes_of_byte_level(std::string_view token);
/// Whether all characters of `token` are of that alphabet.
[[nodiscard]] bool is_byte_level(std::string_view token);
/// The value of a token spelt <0x00> to <0xFF>, in either case; -1 for any other.
[[nodiscard]] int value_of_byte_token(std::string_view token);

}  // namespace hestia
