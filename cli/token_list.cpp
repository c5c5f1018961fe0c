#include "token_list.hpp"

#include <algorithm>
#include <charconv>

#include <fmt/format.h>

#include "hestia/core/error.hpp"

namespace hestia {

std::vector<std::int64_t> parse_token_list(const std::string& option, const std::string& text) {
  std::vector<std::int64_t> tokens;
  std::size_t begin = 0;
  while (begin <= text.size()) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    std::int64_t token = 0;
    const char* last = text.data() + comma;
    const auto [end, failure] = std::from_chars(text.data() + begin, last, token);
    if (failure != std::errc() || end != last) {
      throw UsageError(fmt::format("{}: must be whole numbers with commas between, got \"{}\"; write {} 1,2,3", option,
                                   text, option));
    }
    tokens.push_back(token);
    begin = comma + 1;
  }
  return tokens;
}

void check_token_list(const std::string& option, const std::vector<std::int64_t>& tokens, std::int64_t vocab_size,
                      const std::string& model) {
  for (const std::int64_t token : tokens) {
    if (token < 0 || token >= vocab_size) {
      throw UsageError(fmt::format("{}: a token must be between 0 and {} for {}, got {}; correct the list", option,
                                   vocab_size - 1, model, token));
    }
  }
}

}  // namespace hestia
