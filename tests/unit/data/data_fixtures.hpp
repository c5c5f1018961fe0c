#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "hestia/core/random.hpp"
#include "hestia/data/corpus.hpp"
#include "hestia/data/tokenizer.hpp"
#include "tests/unit/core/core_fixtures.hpp"

namespace hestia::testing {

/// Text of one side of a document; a special token is written as [its name], </s> as [].
inline std::string side_of(const Document& document, bool completion) {
  std::string text;
  for (const Piece& piece : document.pieces) {
    if (piece.completion == completion) {
      text += piece.kind == PieceKind::kText ? piece.text : "[" + piece.text + "]";
    }
  }
  return text;
}
inline std::string prompt_of(const Document& document) {
  return side_of(document, false);
}
/// Without the </s> at its end.
inline std::string completion_of(const Document& document) {
  std::string text = side_of(document, true);
  if (text.size() >= 2 && text.compare(text.size() - 2, 2, "[]") == 0) {
    text.resize(text.size() - 2);
  }
  return text;
}

/// UTF-8 of one code point.
inline std::string utf8(std::uint32_t code) {
  const auto byte = [](std::uint32_t value) { return static_cast<char>(static_cast<unsigned char>(value)); };
  if (code < 0x80) {
    return {byte(code)};
  }
  if (code < 0x800) {
    return {byte(0xC0 | code >> 6), byte(0x80 | (code & 0x3F))};
  }
  if (code < 0x10000) {
    return {byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F))};
  }
  return {byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 0x3F)), byte(0x80 | (code >> 6 & 0x3F)),
          byte(0x80 | (code & 0x3F))};
}

/// Any code point but surrogates and U+2581, one to four bytes equally likely.
inline std::string random_character(SplitMix64& random) {
  constexpr std::uint32_t kEnds[] = {0x0, 0x80, 0x800, 0x10000, 0x110000};
  const std::size_t length = random.below(4);
  std::uint32_t code = 0x2581;
  while (code == 0x2581 || (code >= 0xD800 && code < 0xE000)) {
    code = kEnds[length] + static_cast<std::uint32_t>(random.below(kEnds[length + 1] - kEnds[length]));
  }
  return utf8(code);
}

/// `count` random characters.
inline std::string random_characters(SplitMix64& random, std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    text += random_character(random);
  }
  return text;
}

/// A line of words, digits and some other letters, with its line break; words repeat, so that there is something to
/// learn.
inline std::string random_line(SplitMix64& random, std::size_t num_words) {
  static const char* const kSyllables[] = {"ka", "lo", "mi", "tur", "pe", "sha", "ne", "ri", "do", "vu", "ä", "ßen"};
  std::string line;
  for (std::size_t word = 0; word < num_words; ++word) {
    line += word == 0 ? "" : (random.below(20) == 0 ? "\t" : " ");
    if (random.below(12) == 0) {
      line += std::to_string(random.below(3000));
      continue;
    }
    const std::size_t length = 1 + random.below(3);
    for (std::size_t i = 0; i < length; ++i) {
      line += kSyllables[random.below(std::size(kSyllables))];
    }
  }
  return line + "\n";
}

/// Lines of at least `num_bytes` in all.
inline std::string random_lines(SplitMix64& random, std::size_t num_bytes) {
  std::string text;
  while (text.size() < num_bytes) {
    text += random_line(random, 1 + random.below(14));
  }
  return text;
}

/// Trains on `texts` and writes `path`.
inline void train_on(const std::vector<std::string>& texts, const TokenizerTraining& options,
                     const std::filesystem::path& path) {
  std::size_t next = 0;
  train_tokenizer(
      [&](std::string& sentence) {
        if (next == texts.size()) {
          return false;
        }
        sentence = texts[next++];
        return true;
      },
      options, path);
}

/// A tokenizer of 400 tokens, trained on random lines in `folder`.
inline std::unique_ptr<Tokenizer> small_tokenizer(const std::filesystem::path& folder) {
  SplitMix64 random(77);
  train_on({random_lines(random, 30'000)}, {.vocab_size = 400}, folder / "tokenizer.model");
  return open_tokenizer(folder);
}

}  // namespace hestia::testing
