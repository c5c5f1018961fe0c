#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace hestia {

/// One code point and how many bytes it has.
struct CodePoint {
  std::uint32_t value = 0;
  std::size_t size = 1;
};

/// The code point that starts at `at` of valid UTF-8.
[[nodiscard]] CodePoint code_point_at(std::string_view text, std::size_t at);
/// Where the code point that ends at `end` of valid UTF-8 begins; `end` > 0.
[[nodiscard]] std::size_t code_point_before(std::string_view text, std::size_t end);
void append_utf8(std::uint32_t code_point, std::string& text);

/// True when `text` is UTF-8: shortest forms, no surrogates, nothing above U+10FFFF.
[[nodiscard]] bool is_utf8(std::string_view text);
/// `text` with U+FFFD for every maximal ill-formed part (Unicode standard, section 3.9, "U+FFFD Substitution of Maximal
/// Subparts"): what Python's errors="replace" and Rust's from_utf8_lossy make of it.
[[nodiscard]] std::string replace_broken_utf8(std::string_view text);

/// True when `text` (valid UTF-8) holds a code point of kNewCategories, see unicode_differences.hpp.
[[nodiscard]] bool has_new_code_point(std::string_view text);

// What follows says what the tokenizers library says, whichever Unicode version utf8proc has.

/// Property White_Space.
[[nodiscard]] bool is_white_space(std::uint32_t code_point);
/// Categories Nd, Nl and No.
[[nodiscard]] bool is_number(std::uint32_t code_point);
/// ASCII punctuation and symbols, and the categories P*.
[[nodiscard]] bool is_punctuation(std::uint32_t code_point);

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };
/// `text` (valid UTF-8) in a normalisation form (UAX #15).
[[nodiscard]] std::string to_normal_form(std::string_view text, NormalForm form);
/// Lower case of every code point by itself: no final sigma.
[[nodiscard]] std::string to_lower_case(std::string_view text);

}  // namespace hestia
