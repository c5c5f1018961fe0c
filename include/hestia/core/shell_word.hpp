#pragma once

#include <string>

#include "hestia/core/recipe.hpp"

namespace hestia {

/// `word` as a POSIX shell has to be given it: as it is, or in single quotes.
[[nodiscard]] std::string shell_word(const std::string& word);
/// A recipe's path and the overrides that it was read with, so that a command in a message can be pasted.
[[nodiscard]] std::string recipe_words(const RecipeSource& source);

}  // namespace hestia
