#pragma once

#include <string>
#include <vector>

namespace hestia {

/// `word` as a POSIX shell has to be given it: as it is, or in single quotes.
[[nodiscard]] std::string shell_word(const std::string& word);
/// Several, with a blank between: what a message advises can be pasted.
[[nodiscard]] std::string shell_words(const std::vector<std::string>& words);

}  // namespace hestia
