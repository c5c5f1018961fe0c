#include "hestia/core/error.hpp"

#include <algorithm>
#include <numeric>

namespace hestia {

namespace {

// Levenshtein distance with adjacent swaps counted once (optimal string alignment).
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> before(b.size() + 1);
  std::vector<std::size_t> previous(b.size() + 1);
  std::vector<std::size_t> current(b.size() + 1);
  std::iota(previous.begin(), previous.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    current[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t substitution = previous[j - 1] + (a[i - 1] == b[j - 1] ? 0U : 1U);
      current[j] = std::min({previous[j] + 1, current[j - 1] + 1, substitution});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        current[j] = std::min(current[j], before[j - 2] + 1);
      }
    }
    std::swap(before, previous);
    std::swap(previous, current);
  }
  return previous[b.size()];
}

}  // namespace

std::string Problems::joined() const {
  std::string text;
  for (const std::string& message : messages_) {
    text += text.empty() ? "" : "\n";
    text += message;
  }
  return text;
}

void Problems::throw_usage_if_any() const {
  if (!messages_.empty()) {
    throw UsageError(joined());
  }
}

void Problems::throw_input_if_any() const {
  if (!messages_.empty()) {
    throw InputError(joined());
  }
}

std::string nearest_name(std::string_view word, const std::vector<std::string>& candidates) {
  const std::size_t limit = std::max<std::size_t>(2, word.size() / 3);
  std::size_t best = limit + 1;
  std::string name;
  for (const std::string& candidate : candidates) {
    const std::size_t distance = edit_distance(word, candidate);
    // A word shares something with what it was meant to be: two letters are never two edits away from anything useful.
    if (distance < best && distance < std::max(word.size(), candidate.size())) {
      best = distance;
      name = candidate;
    }
  }
  return name;
}

}  // namespace hestia
