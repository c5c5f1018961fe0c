#include "hestia/routing/fold.hpp"

#include <algorithm>
#include <charconv>
#include <vector>

#include <fmt/format.h>

#include "hestia/core/error.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxExperts = 1 << 16;

bool is_valid(const RoutingShape& shape) {
  return shape.num_layers >= 1 && shape.num_layers <= kMaxLayers && shape.num_experts >= 1 &&
         shape.num_experts <= kMaxExperts;
}

UsageError refused(std::string_view option, std::string_view text) {
  return UsageError(
      fmt::format("{}: must be LxE with 1 to {} layers and 1 to {} experts, got \"{}\"; write for example 16x64",
                  option, kMaxLayers, kMaxExperts, text));
}

// Appends `entry` of `from` to `trace` as one of model layer `layer`.
void append_folded(const RoutingTrace& from, const TraceEntry& entry, std::int32_t layer, RoutingTrace& trace) {
  TraceEntry folded{entry.sequence, entry.step, layer, entry.phase, 0, trace.experts.size()};
  for (std::uint64_t at = entry.first; at < entry.first + entry.count; ++at) {
    const auto expert = static_cast<std::uint16_t>(from.experts[at] % trace.num_experts);
    const auto begin = trace.experts.begin() + static_cast<std::ptrdiff_t>(folded.first);
    if (std::find(begin, trace.experts.end(), expert) == trace.experts.end()) {
      trace.experts.push_back(expert);
      trace.weights.push_back(from.weights[at]);
      ++folded.count;
    }
  }
  trace.entries.push_back(folded);
}

}  // namespace

std::string shape_text(const RoutingShape& shape) {
  return fmt::format("{}x{}", shape.num_layers, shape.num_experts);
}

RoutingShape shape_from_text(std::string_view text, std::string_view option) {
  RoutingShape shape;
  const char* const end = text.data() + text.size();
  const auto [middle, first] = std::from_chars(text.data(), end, shape.num_layers);
  if (first != std::errc() || middle == end || *middle != 'x') {
    throw refused(option, text);
  }
  const auto [stop, second] = std::from_chars(middle + 1, end, shape.num_experts);
  if (second != std::errc() || stop != end || !is_valid(shape)) {
    throw refused(option, text);
  }
  return shape;
}

RoutingShape shape_of(const RoutingTrace& trace) {
  return {static_cast<std::int64_t>(trace.layers.size()), trace.num_experts};
}

std::string FoldedTrace::description() const {
  const auto per_entry = [&](std::int64_t requests) {
    return static_cast<double>(requests) / static_cast<double>(std::max<std::size_t>(1, trace.entries.size()));
  };
  return fmt::format("{} onto {}: layer l is l mod {}, expert e is e mod {}; {:.2f} of {:.2f} experts a step left",
                     shape_text(from), shape_text(shape_of(trace)), from.num_layers, trace.num_experts,
                     per_entry(requests_after), per_entry(requests_before));
}

FoldedTrace fold_trace(const RoutingTrace& trace, const RoutingShape& shape) {
  if (!is_valid(shape)) {
    throw refused("fold", shape_text(shape));
  }
  if (trace.layers.empty()) {
    throw UsageError("fold: the trace has no layer that routes, got 0; give another trace");
  }
  FoldedTrace folded;
  folded.from = shape_of(trace);
  RoutingTrace& to = folded.trace;
  to.model = trace.model;
  to.num_layers = shape.num_layers;
  to.num_experts = shape.num_experts;
  to.top_k = std::min(trace.top_k, shape.num_experts);
  for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
    to.layers.push_back({layer, 0, 0});
  }
  for (std::size_t begin = 0; begin < trace.entries.size();) {
    // The entries of one token stand together, by rising layer.
    const TraceEntry& head = trace.entries[begin];
    std::size_t end = begin;
    while (end < trace.entries.size() && trace.entries[end].sequence == head.sequence &&
           trace.entries[end].step == head.step) {
      ++end;
    }
    for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
      const std::int64_t source = trace.layers[static_cast<std::size_t>(layer % folded.from.num_layers)].layer;
      const auto first = trace.entries.begin() + static_cast<std::ptrdiff_t>(begin);
      const auto last = trace.entries.begin() + static_cast<std::ptrdiff_t>(end);
      const auto found = std::find_if(first, last, [&](const TraceEntry& entry) { return entry.layer == source; });
      if (found != last) {
        append_folded(trace, *found, static_cast<std::int32_t>(layer), to);
        folded.requests_before += found->count;
        folded.requests_after += to.entries.back().count;
      }
    }
    begin = end;
  }
  to.comment = trace.comment + (trace.comment.empty() ? "" : "\n") + "folded " + folded.description();
  return folded;
}

void check_trace_shape(const RoutingTrace& trace, const RoutingShape& model) {
  if (shape_of(trace) != model) {
    throw UsageError(
        fmt::format("trace: must have the {} layers that route and {} experts of the model, got {} and {}; "
                    "record one with this model, or fold this one with --fold {}",
                    model.num_layers, model.num_experts, trace.layers.size(), trace.num_experts, shape_text(model)));
  }
}

}  // namespace hestia
