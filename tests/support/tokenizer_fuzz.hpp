#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/core/random.hpp"

namespace hestia::testing {

/// Strings that try tokenisers: words, code, digits, spaces and letters of many scripts, emoji, combining marks, any
/// code point, broken UTF-8. make_tokenizer_goldens.py holds the same generator, line for line: the goldens are hashes
/// of what the tokenizers library makes of its strings.
class TokenizerFuzz {
 public:
  /// The string with this number; the same bytes wherever it is made.
  explicit TokenizerFuzz(std::uint64_t number) : random_(kSeed + number) {
    const std::uint64_t count = 1 + random_.below(12);
    for (std::uint64_t i = 0; i < count; ++i) {
      atom();
    }
  }
  [[nodiscard]] const std::string& text() const { return text_; }
  /// 1 to 12 ids below `vocab_size`; the same ones after the same text.
  [[nodiscard]] std::vector<std::int32_t> ids(std::int64_t vocab_size) {
    std::vector<std::int32_t> ids(1 + random_.below(12));
    for (std::int32_t& id : ids) {
      id = static_cast<std::int32_t>(random_.below(static_cast<std::uint64_t>(vocab_size)));
    }
    return ids;
  }

 private:
  static constexpr std::uint64_t kSeed = 0x4865737469610000ULL;
  static constexpr std::array<std::string_view, 16> kSyllables = {"the", "ing", "er", "on", "ka",   "lo", "mi", "str",
                                                                  "pe",  "sha", "ne", "ri", "tion", "é",  "ß",  "ñ"};
  static constexpr std::array<std::string_view, 16> kSpaces = {
      " ",      " ",      " ",      "  ",     "\n",     "\n\n",   "\t",   "\r\n",
      "\u00a0", "\u3000", "\u2003", "\u180e", "\u0085", "\u2028", "\x0b", "\u200b"};
  static constexpr std::array<std::string_view, 12> kCode = {"for (int i = 0; i < n; ++i) {\n",
                                                             "    return x[i] += 1;\n}\n",
                                                             "def f(self, *args):\n\treturn None\n",
                                                             "#include <vector>\n",
                                                             "https://example.org/a?b=c&d=%20",
                                                             "std::vector<int>",
                                                             "if x != y && !z || w == 0x1F:",
                                                             "SELECT * FROM t WHERE a='b';",
                                                             "{\"key\": [1, 2.5e-3, null]}",
                                                             "camelCaseName snake_case_name",
                                                             "/* comment */ // more",
                                                             "$HOME/.config/\\n"};
  static constexpr std::array<std::string_view, 10> kEmoji = {"\U0001F600",
                                                              "\U0001F468\u200d\U0001F469\u200d\U0001F467",
                                                              "\U0001F44D\U0001F3FD",
                                                              "\U0001F1E9\U0001F1EA",
                                                              "\u2764\ufe0f",
                                                              "1\ufe0f\u20e3",
                                                              "\U0001F3F3\ufe0f\u200d\U0001F308",
                                                              "\u263a",
                                                              "\U0001F9D1\u200d\U0001F4BB",
                                                              "\u2122"};
  static constexpr std::array<std::string_view, 14> kMarked = {
      "<|end|>", " <|end|> ",  "<|end|>\n\n", "<s>",        "</s>",   "<unk>",    "\u2581",
      "<0x0A>",  "word<|w|>x", " <|w|> ",     "a <mask> b", "<mask>", "<|user|>", "[INST]"};
  static constexpr std::array<std::string_view, 16> kPunctuation = {"'s", "'LL",    "don't",  "'\u017f", "...", "!?",
                                                                    "\"", "\u2019", "\u2014", "-",       "--",  "(",
                                                                    "),", "\u3002", "\u00bf", "_"};
  struct Range {
    std::uint32_t begin;
    std::uint32_t end;
  };
  static constexpr std::array<Range, 24> kScripts = {
      {{0x41, 0x5B},     {0x61, 0x7B},     {0xC0, 0x250},    {0x370, 0x400},   {0x400, 0x530},   {0x531, 0x58B},
       {0x590, 0x600},   {0x600, 0x700},   {0x900, 0x980},   {0x980, 0xA00},   {0xB80, 0xC00},   {0xE00, 0xE80},
       {0xF00, 0xFDB},   {0x1000, 0x10A0}, {0x10A0, 0x1200}, {0x1E00, 0x2000}, {0x2000, 0x2200}, {0x2460, 0x2600},
       {0x3040, 0x3100}, {0x4E00, 0x9FA6}, {0xAC00, 0xD7A4}, {0xF900, 0xFB07}, {0xFF01, 0xFFE7}, {0x1D400, 0x1D800}}};
  static constexpr std::array<std::uint32_t, 8> kZeros = {0x30, 0x30, 0x30, 0x660, 0x966, 0xFF10, 0x2160, 0x2070};

  void point(std::uint32_t code) {
    const auto byte = [&](std::uint32_t value) { text_ += static_cast<char>(static_cast<unsigned char>(value)); };
    if (code < 0x80) {
      byte(code);
    } else if (code < 0x800) {
      byte(0xC0 | code >> 6);
      byte(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      byte(0xE0 | code >> 12);
      byte(0x80 | (code >> 6 & 0x3F));
      byte(0x80 | (code & 0x3F));
    } else {
      byte(0xF0 | code >> 18);
      byte(0x80 | (code >> 12 & 0x3F));
      byte(0x80 | (code >> 6 & 0x3F));
      byte(0x80 | (code & 0x3F));
    }
  }
  template <typename Texts>
  void one_of(const Texts& texts) {
    text_ += texts.at(random_.below(std::size(texts)));
  }
  std::uint32_t below(std::uint32_t bound) { return static_cast<std::uint32_t>(random_.below(bound)); }

  void atom() {
    switch (random_.below(16)) {
      case 0:
      case 1:
      case 2:
      case 3:
        word();
        break;
      case 4:
        for (std::uint64_t left = 1 + random_.below(4); left > 0; --left) {
          one_of(kSpaces);
        }
        break;
      case 5: {
        const std::uint32_t zero = kZeros.at(random_.below(kZeros.size()));
        for (std::uint64_t left = 1 + random_.below(6); left > 0; --left) {
          point(zero + below(10));
        }
        break;
      }
      case 6:
        one_of(kCode);
        break;
      case 7:
        one_of(kEmoji);
        break;
      case 8:
        point(0x41 + below(58));
        for (std::uint64_t left = 1 + random_.below(3); left > 0; --left) {
          point(0x300 + below(0x70));
        }
        break;
      case 9:
      case 10:
      case 11: {
        const Range range = kScripts.at(random_.below(kScripts.size()));
        for (std::uint64_t left = 1 + random_.below(6); left > 0; --left) {
          point(range.begin + below(range.end - range.begin));
        }
        break;
      }
      case 12: {
        const std::uint32_t code = below(0x110000);
        point(code >= 0xD800 && code < 0xE000 ? 0x41 : code);
        break;
      }
      case 13:
        for (std::uint64_t left = 1 + random_.below(4); left > 0; --left) {
          text_ += static_cast<char>(static_cast<unsigned char>(0x80 + below(0x80)));
        }
        break;
      case 14:
        one_of(kMarked);
        break;
      default:
        one_of(kPunctuation);
    }
  }

  void word() {
    if (random_.below(4) != 0) {
      text_ += " ";
    }
    for (std::uint64_t left = 1 + random_.below(3); left > 0; --left) {
      one_of(kSyllables);
    }
  }

  SplitMix64 random_;
  std::string text_;
};

}  // namespace hestia::testing
