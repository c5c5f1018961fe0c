#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hestia {

/// Token ids with commas between, the value of `option`. Parsed here and not by the command-line library, so that an
/// empty list and a stray letter get a message of their own. Throws UsageError naming `option`.
[[nodiscard]] std::vector<std::int64_t> parse_token_list(const std::string& option, const std::string& text);
/// Throws UsageError naming `option` and `model` unless every token is in [0, vocab_size).
void check_token_list(const std::string& option, const std::vector<std::int64_t>& tokens, std::int64_t vocab_size,
                      const std::string& model);

}  // namespace hestia
