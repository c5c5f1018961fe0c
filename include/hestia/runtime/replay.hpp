#pragma once

#include <cstdint>
#include <vector>

#include "hestia/architecture/architecture.hpp"
#include "hestia/routing/trace.hpp"
#include "hestia/runtime/decoder.hpp"

namespace hestia {

/// The decode steps of one sequence of each row of a batch, as `Decoder::replay` takes them, and its prefill steps when
/// every row has as many; steps beyond the shortest row's are left out. A step of fewer experts than the model's K
/// (they merge when a trace is folded) names its first again, which is no further request. `sequences`: turns of the
/// trace, one per row. Throws UsageError when a turn is not in the trace, a step lacks a layer, or the trace is not of
/// the model's shape (check_trace_shape).
[[nodiscard]] DecodeReplay replay_of(const RoutingTrace& trace, const std::vector<std::int64_t>& sequences,
                                     const Architecture& architecture);

/// Turns of a trace that have decode steps, in order.
[[nodiscard]] std::vector<std::int64_t> turns_of(const RoutingTrace& trace);

}  // namespace hestia
