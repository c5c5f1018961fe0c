// What unicode.cpp says of every code point: goldens/unicode.txt, from the tokenizers library, see
// make_tokenizer_goldens.py.

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>

#include "data/unicode.hpp"
#include "hestia/core/files.hpp"

namespace hestia::testing {
namespace {

constexpr std::uint32_t kBlock = 0x4000;
constexpr std::uint32_t kBlocks = 0x110000 / kBlock;

std::vector<std::uint32_t> block_of(std::uint32_t begin) {
  std::vector<std::uint32_t> codes;
  for (std::uint32_t code = begin; code < begin + kBlock; ++code) {
    if (code < 0xD800 || code >= 0xE000) {
      codes.push_back(code);
    }
  }
  return codes;
}

std::string flags(const std::vector<std::uint32_t>& codes, bool (*holds)(std::uint32_t)) {
  std::string result;
  for (const std::uint32_t code : codes) {
    result += holds(code) ? '1' : '0';
  }
  return result;
}

// Every code point by itself, before a mark and after a letter.
std::string text_of(const std::vector<std::uint32_t>& codes) {
  std::string text;
  for (const std::uint32_t code : codes) {
    append_utf8(code, text);
    text += '\n';
    append_utf8(code, text);
    text += "\xCC\x81\no";
    append_utf8(code, text);
    text += '\n';
  }
  return text;
}

std::string hash(const std::string& text) {
  Sha256 hash;
  hash.update(std::as_bytes(std::span(text)));
  return hash.hex().substr(0, 16);
}

TEST_CASE("Properties, normal forms and lower case of every code point are those of the tokenizers library") {
  std::ifstream lines(std::filesystem::path(HESTIA_SOURCE_DIR) / "tests/unit/data/goldens/unicode.txt");
  std::uint32_t blocks = 0;
  for (std::string line; std::getline(lines, line); ++blocks) {
    std::istringstream words(line);
    std::uint32_t begin = 0;
    words >> std::hex >> begin;
    REQUIRE(begin == blocks * kBlock);
    const std::vector<std::uint32_t> codes = block_of(begin);
    const std::string text = text_of(codes);
    const std::vector<std::pair<std::string, std::string>> results = {
        {"white space", flags(codes, is_white_space)},     {"number", flags(codes, is_number)},
        {"punctuation", flags(codes, is_punctuation)},     {"NFC", to_normal_form(text, NormalForm::kNfc)},
        {"NFD", to_normal_form(text, NormalForm::kNfd)},   {"NFKC", to_normal_form(text, NormalForm::kNfkc)},
        {"NFKD", to_normal_form(text, NormalForm::kNfkd)}, {"lower case", to_lower_case(text)},
    };
    for (const auto& [name, result] : results) {
      INFO(name << " of the code points from 0x" << std::hex << begin);
      std::string expected;
      words >> expected;
      CHECK(hash(result) == expected);
    }
  }
  CHECK(blocks == kBlocks);
}

}  // namespace
}  // namespace hestia::testing
