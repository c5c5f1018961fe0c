// check_tokenizer TOKENIZER [EXPECTED]: compares Hestia's tokeniser with what make_tokenizer_goldens.py --expect
// printed (EXPECTED, or standard input) and prints the first string that differs. Exit 0: all are equal.

#include <cstdint>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/data/tokenizer.hpp"
#include "tokenizer_fuzz.hpp"

namespace {

using namespace hestia;
using Ids = std::vector<std::int32_t>;

int report(std::uint64_t number, const std::string& text, const std::string& what, const std::string& expected,
           const std::string& got) {
  std::string bytes;
  for (const char c : text) {
    bytes += fmt::format("{:02x}", static_cast<unsigned char>(c));
  }
  fmt::print("string {}: {}\nbytes: {}\n{}\n  expected {}\n  got      {}\n", number,
             Json(text).dump(-1, ' ', true, Json::error_handler_t::replace), bytes, what, expected, got);
  return 1;
}

int check(const Tokenizer& tokenizer, std::istream& expected_lines) {
  std::uint64_t count = 0;
  for (std::string line; std::getline(expected_lines, line); ++count) {
    const Json expected = Json::parse(line);
    const auto number = expected.at("string").get<std::uint64_t>();
    testing::TokenizerFuzz fuzz(number);
    const Ids ids = expected.at("ids").get<Ids>();
    const Ids got = tokenizer.encode(fuzz.text());
    if (got != ids) {
      return report(number, fuzz.text(), "ids", fmt::format("{}", ids), fmt::format("{}", got));
    }
    for (const auto& [from, to] : {std::pair("ids", "text"), std::pair("random_ids", "random_text")}) {
      const std::string decoded = tokenizer.decode(expected.at(from).get<Ids>());
      if (decoded != expected.at(to).get<std::string>()) {
        return report(number, fuzz.text(), fmt::format("text of {}", fmt::join(expected.at(from).get<Ids>(), " ")),
                      expected.at(to).dump(), Json(decoded).dump(-1, ' ', false, Json::error_handler_t::replace));
      }
    }
  }
  fmt::print("{} strings: the same ids and texts\n", count);
  return count > 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> arguments(argv, argv + argc);  // NOLINT(*-pointer-arithmetic)
    if (arguments.size() < 2 || arguments.size() > 3) {
      fmt::print(stderr, "usage: check_tokenizer TOKENIZER [EXPECTED]\n");
      return 2;
    }
    const auto tokenizer = open_tokenizer(arguments[1]);
    if (arguments.size() == 2) {
      return check(*tokenizer, std::cin);
    }
    std::ifstream file(arguments[2]);
    if (!file) {
      throw InputError(fmt::format("{}: cannot be read; check the path", arguments[2]));
    }
    return check(*tokenizer, file);
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
}
