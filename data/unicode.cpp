#include "unicode.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>

#include "unicode_differences.hpp"

namespace hestia {

namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

unsigned char byte_at(std::string_view text, std::size_t at) {
  return static_cast<unsigned char>(text[at]);
}

// How many leading bytes are ASCII.
std::size_t ascii_prefix(std::string_view text) {
  constexpr std::uint64_t kHighBits = 0x8080808080808080ULL;
  std::size_t at = 0;
  for (; at + sizeof(std::uint64_t) <= text.size(); at += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, text.data() + at, sizeof(word));  // NOLINT(cppcoreguidelines-pro-bounds-pointer-arithmetic)
    if ((word & kHighBits) != 0) {
      break;
    }
  }
  while (at < text.size() && byte_at(text, at) < 0x80) {
    ++at;
  }
  return at;
}

struct Sequence {
  std::size_t size = 1;  // Bytes of the code point, or of the maximal ill-formed part.
  bool valid = false;
};

// Unicode standard, table 3-7: the second byte of a code point has narrower bounds after four leading bytes.
Sequence sequence_at(std::string_view text, std::size_t at) {
  const unsigned char lead = byte_at(text, at);
  if (lead < 0x80) {
    return {1, true};
  }
  if (lead < 0xC2 || lead > 0xF4) {
    return {};
  }
  std::size_t size = 2;
  unsigned char low = 0x80;
  unsigned char high = 0xBF;
  if (lead >= 0xF0) {
    size = 4;
    low = lead == 0xF0 ? 0x90 : low;
    high = lead == 0xF4 ? 0x8F : high;
  } else if (lead >= 0xE0) {
    size = 3;
    low = lead == 0xE0 ? 0xA0 : low;
    high = lead == 0xED ? 0x9F : high;
  }
  for (std::size_t i = 1; i < size; ++i) {
    if (at + i >= text.size() || byte_at(text, at + i) < low || byte_at(text, at + i) > high) {
      return {i, false};
    }
    low = 0x80;
    high = 0xBF;
  }
  return {size, true};
}

// Whether sorted ranges hold a code point.
template <typename Ranges>
bool holds(const Ranges& ranges, std::uint32_t code_point) {
  const auto after = std::upper_bound(std::begin(ranges), std::end(ranges), code_point,
                                      [](std::uint32_t value, const auto& range) { return value < range.begin; });
  return after != std::begin(ranges) && code_point <= std::prev(after)->end;
}

}  // namespace

CodePoint code_point_at(std::string_view text, std::size_t at) {
  const unsigned char lead = byte_at(text, at);
  const auto tail = [&](std::size_t i) { return static_cast<std::uint32_t>(byte_at(text, at + i) & 0x3FU); };
  if (lead < 0x80) {
    return {lead, 1};
  }
  if (lead < 0xE0) {
    return {(lead & 0x1FU) << 6U | tail(1), 2};
  }
  if (lead < 0xF0) {
    return {(lead & 0x0FU) << 12U | tail(1) << 6U | tail(2), 3};
  }
  return {(lead & 0x07U) << 18U | tail(1) << 12U | tail(2) << 6U | tail(3), 4};
}

std::size_t code_point_before(std::string_view text, std::size_t end) {
  do {
    --end;
  } while ((byte_at(text, end) & 0xC0U) == 0x80U);
  return end;
}

void append_utf8(std::uint32_t code_point, std::string& text) {
  const auto add = [&](std::uint32_t value) { text += static_cast<char>(static_cast<unsigned char>(value)); };
  if (code_point < 0x80) {
    add(code_point);
    return;
  }
  if (code_point < 0x800) {
    add(0xC0U | code_point >> 6U);
  } else {
    if (code_point < 0x10000) {
      add(0xE0U | code_point >> 12U);
    } else {
      add(0xF0U | code_point >> 18U);
      add(0x80U | (code_point >> 12U & 0x3FU));
    }
    add(0x80U | (code_point >> 6U & 0x3FU));
  }
  add(0x80U | (code_point & 0x3FU));
}

bool is_utf8(std::string_view text) {
  std::size_t at = ascii_prefix(text);
  while (at < text.size()) {
    const Sequence sequence = sequence_at(text, at);
    if (!sequence.valid) {
      return false;
    }
    at += sequence.size;
    if (at < text.size() && byte_at(text, at) < 0x80) {
      at += ascii_prefix(text.substr(at));
    }
  }
  return true;
}

std::string replace_broken_utf8(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const Sequence sequence = sequence_at(text, at);
    result += sequence.valid ? text.substr(at, sequence.size) : kReplacement;
    at += sequence.size;
  }
  return result;
}

bool has_new_code_point(std::string_view text) {
  for (std::size_t at = ascii_prefix(text); at < text.size();) {
    const CodePoint current = code_point_at(text, at);
    at += current.size;
    // Most letters: below the first new one, Chinese, Korean.
    const bool old = current.value < std::begin(kNewCategories)->begin ||
                     (current.value >= 0x3200 && current.value < 0xA700) ||
                     (current.value >= 0xAC00 && current.value < 0x10000);
    if (!old && holds(kNewCategories, current.value)) {
      return true;
    }
    if (current.size == 1) {
      at += ascii_prefix(text.substr(at));
    }
  }
  return false;
}

bool is_white_space(std::uint32_t code_point) {
  if (code_point < 0x80) {
    return code_point == ' ' || (code_point >= '\t' && code_point <= '\r');
  }
  return code_point == 0x85 || code_point == 0xA0 || code_point == 0x1680 ||
         (code_point >= 0x2000 && code_point <= 0x200A) || code_point == 0x2028 || code_point == 0x2029 ||
         code_point == 0x202F || code_point == 0x205F || code_point == 0x3000;
}

bool is_number(std::uint32_t code_point) {
  if (code_point < 0x80) {
    return code_point >= '0' && code_point <= '9';
  }
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(code_point));
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO ||
         holds(kNewNumbers, code_point);
}

bool is_punctuation(std::uint32_t code_point) {
  if (code_point < 0x80) {
    return code_point > ' ' && code_point < 0x7F && !(code_point >= '0' && code_point <= '9') &&
           !(code_point >= 'A' && code_point <= 'Z') && !(code_point >= 'a' && code_point <= 'z');
  }
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(code_point));
  return (category >= UTF8PROC_CATEGORY_PC && category <= UTF8PROC_CATEGORY_PO &&
          !holds(kNotPunctuation, code_point)) ||
         holds(kOldPunctuation, code_point);
}

std::string to_normal_form(std::string_view text, NormalForm form) {
  // Below this every code point is a starter that stays itself and joins to nothing before it: only the runs above it,
  // with the one code point before them, have to be looked at.
  const std::uint32_t inert = form == NormalForm::kNfc ? 0x300 : 0x80;
  int options = UTF8PROC_STABLE;
  options |= form == NormalForm::kNfc || form == NormalForm::kNfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  options |= form == NormalForm::kNfkc || form == NormalForm::kNfkd ? UTF8PROC_COMPAT : 0;
  std::string result;
  std::size_t copied = 0;
  bool after_unknown = false;  // Nothing joins to a code point that is not normalised.
  for (std::size_t at = ascii_prefix(text); at < text.size();) {
    CodePoint current = code_point_at(text, at);
    if (current.value < inert) {
      after_unknown = false;
      at += current.size + ascii_prefix(text.substr(at + current.size));
      continue;
    }
    if (holds(kNotNormalised, current.value)) {
      after_unknown = true;
      at += current.size;
      continue;
    }
    const std::size_t before = at == 0 || after_unknown ? at : code_point_before(text, at);
    std::size_t end = at;
    while (current.value >= inert && !holds(kNotNormalised, current.value)) {
      end += current.size;
      if (end == text.size()) {
        break;
      }
      current = code_point_at(text, end);
    }
    result.append(text, copied, before - copied);
    utf8proc_uint8_t* normal = nullptr;
    const std::string run(text.substr(before, end - before));
    const utf8proc_ssize_t size =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(run.data()),  // NOLINT(*-reinterpret-cast)
                     static_cast<utf8proc_ssize_t>(run.size()), &normal, static_cast<utf8proc_option_t>(options));
    if (size < 0) {
      throw std::bad_alloc();  // The one failure left for valid UTF-8.
    }
    result.append(reinterpret_cast<const char*>(normal), static_cast<std::size_t>(size));  // NOLINT(*-reinterpret-cast)
    std::free(normal);  // NOLINT(cppcoreguidelines-no-malloc): what utf8proc says to do.
    copied = end;
    at = end;
    after_unknown = false;
  }
  result.append(text, copied, text.size() - copied);
  return result;
}

std::string to_lower_case(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint current = code_point_at(text, at);
    at += current.size;
    const auto* const added =
        std::find_if(std::begin(kNewLowerCase), std::end(kNewLowerCase),
                     [&](const LowerCase& pair) { return current.value >= 0x1C89 && pair.upper == current.value; });
    if (added != std::end(kNewLowerCase)) {
      append_utf8(added->lower, result);
    } else if (current.value == 0x130) {  // The one lower case of two code points.
      result += "i\xCC\x87";
    } else {
      append_utf8(static_cast<std::uint32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(current.value))), result);
    }
  }
  return result;
}

}  // namespace hestia
