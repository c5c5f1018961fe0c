#include "hestia/routing/layout.hpp"

#include <stdexcept>
#include <unordered_set>

#include <fmt/format.h>

namespace hestia {

std::int64_t SequenceRouting::num_counted() const {
  std::int64_t total = 0;
  for (std::int64_t token = num_prompt_tokens; token < num_tokens; ++token) {
    total += is_counted(token) ? 1 : 0;
  }
  return total;
}

std::vector<SequenceRun> sequence_runs(const SequenceLayout& layout) {
  if (layout.counted.size() != layout.sequence_ids.size()) {
    throw std::invalid_argument(fmt::format("sequence layout: {} sequence ids but {} counted flags",
                                            layout.sequence_ids.size(), layout.counted.size()));
  }
  std::vector<SequenceRun> runs;
  std::unordered_set<std::int64_t> seen;
  const std::int64_t num_tokens = layout.num_tokens();
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    const std::int64_t id = layout.sequence_ids[static_cast<std::size_t>(token)];
    if (id < 0) {
      continue;
    }
    if (!runs.empty() && runs.back().id == id && runs.back().end == token) {
      runs.back().end = token + 1;
      continue;
    }
    if (!seen.insert(id).second) {
      throw std::invalid_argument(
          fmt::format("sequence layout: sequence {} comes back at token {} after its run ended", id, token));
    }
    runs.push_back({id, token, token + 1});
  }
  return runs;
}

}  // namespace hestia
