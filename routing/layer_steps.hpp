#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hestia/routing/trace.hpp"

namespace hestia {

/// The steps of one sequence in one layer: positions [begin, end) of LayerSteps::entries.
struct LayerSequence {
  std::int64_t sequence = 0;
  std::size_t begin = 0;
  std::size_t end = 0;
};

/// What one layer serves, in order.
struct LayerSteps {
  std::vector<std::size_t> entries;  ///< Indices into the trace's entries.
  std::vector<LayerSequence> sequences;
};

/// The steps of every layer, in the order of `trace.layers`; decode steps only unless `include_prefill`. Throws
/// std::invalid_argument when an entry names a layer that the trace does not list, or experts that it does not have or
/// twice: what follows indexes arrays by them.
[[nodiscard]] std::vector<LayerSteps> layer_steps(const RoutingTrace& trace, bool include_prefill);

}  // namespace hestia
