#include "layer_steps.hpp"

#include <stdexcept>
#include <unordered_map>

#include <fmt/format.h>

namespace hestia {

std::vector<LayerSteps> layer_steps(const RoutingTrace& trace, bool include_prefill) {
  std::unordered_map<std::int64_t, std::size_t> position;
  for (std::size_t i = 0; i < trace.layers.size(); ++i) {
    position.emplace(trace.layers[i].layer, i);
  }
  std::vector<LayerSteps> layers(trace.layers.size());
  std::vector<std::size_t> last_entry_of(static_cast<std::size_t>(trace.num_experts), 0);
  for (std::size_t i = 0; i < trace.entries.size(); ++i) {
    const TraceEntry& entry = trace.entries[i];
    if (entry.phase != Phase::kDecode && !include_prefill) {
      continue;
    }
    const auto found = position.find(entry.layer);
    if (found == position.end()) {
      throw std::invalid_argument(fmt::format("routing trace: layer {} is not among its layers", entry.layer));
    }
    if (entry.first + entry.count > trace.experts.size()) {
      throw std::invalid_argument(
          fmt::format("routing trace: entry {} ends past the {} experts", i, trace.experts.size()));
    }
    for (const std::uint16_t expert : trace.experts_of(entry)) {
      if (expert >= trace.num_experts) {
        throw std::invalid_argument(
            fmt::format("routing trace: expert {} of entry {} is not below {}", expert, i, trace.num_experts));
      }
      if (last_entry_of[expert] == i + 1) {
        throw std::invalid_argument(fmt::format("routing trace: expert {} stands twice in entry {}", expert, i));
      }
      last_entry_of[expert] = i + 1;
    }
    LayerSteps& steps = layers[found->second];
    if (steps.sequences.empty() || steps.sequences.back().sequence != entry.sequence) {
      steps.sequences.push_back({entry.sequence, steps.entries.size(), steps.entries.size()});
    }
    steps.entries.push_back(i);
    ++steps.sequences.back().end;
  }
  return layers;
}

}  // namespace hestia
