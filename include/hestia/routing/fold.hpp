#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "hestia/routing/trace.hpp"

namespace hestia {

/// Layers that route and experts of each: what a trace must share with the decoder that replays it.
struct RoutingShape {
  std::int64_t num_layers = 0;   ///< L, layers that route.
  std::int64_t num_experts = 0;  ///< E
  friend bool operator==(const RoutingShape&, const RoutingShape&) = default;
};

/// "LxE", as in "16x64".
[[nodiscard]] std::string shape_text(const RoutingShape& shape);
/// Inverse of shape_text. Throws UsageError naming `option` unless 1 <= L <= 4096 and 1 <= E <= 65536.
[[nodiscard]] RoutingShape shape_from_text(std::string_view text, std::string_view option);
/// The shape of `trace`.
[[nodiscard]] RoutingShape shape_of(const RoutingTrace& trace);

/// A trace on another shape, and what became of its experts.
struct FoldedTrace {
  RoutingTrace trace;
  RoutingShape from;
  std::int64_t requests_before = 0;  ///< Experts of the entries that were taken over.
  std::int64_t requests_after = 0;   ///< Of those, left after merging.
  /// One line for people: both shapes, the rule, and how many experts an entry has left.
  [[nodiscard]] std::string description() const;
};

/// Lays `trace` onto L layers of E experts, by the rule of docs/routing.md: layer l, of 0..L-1, takes the steps of the
/// trace's routing layer l mod n of n; expert e becomes e mod E. Where two experts of a step become one, it stays once,
/// with the place and weight of the higher. Bytes and what the recorder saw belong to the old shape and are dropped; a
/// comment line of the trace says what was done. Throws UsageError for a shape that shape_from_text refuses or a trace
/// without layers.
[[nodiscard]] FoldedTrace fold_trace(const RoutingTrace& trace, const RoutingShape& shape);

/// Throws UsageError unless `trace` has the shape of the model that is to replay it; the message tells how to fold.
void check_trace_shape(const RoutingTrace& trace, const RoutingShape& model);

}  // namespace hestia
