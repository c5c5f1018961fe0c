#include "hestia/core/shell_word.hpp"

#include <algorithm>
#include <cctype>
#include <cstring>

namespace hestia {

std::string shell_word(const std::string& word) {
  const auto plain = [](unsigned char c) { return std::isalnum(c) != 0 || std::strchr("_-./=:,+@%", c) != nullptr; };
  if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) {
    return word;
  }
  std::string quoted(1, '\'');
  for (const char c : word) {
    if (c == '\'') {
      quoted += "'\\'";
    }
    quoted += c;
  }
  quoted += '\'';
  return quoted;
}

std::string recipe_words(const RecipeSource& source) {
  std::string text = shell_word(source.path().string());
  for (const std::string& override_text : source.overrides()) {
    text += " " + shell_word(override_text);
  }
  return text;
}

}  // namespace hestia
