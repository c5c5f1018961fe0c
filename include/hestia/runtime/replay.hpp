#pragma once

#include <cstdint>
#include <vector>

#include "hestia/architecture/architecture.hpp"
#include "hestia/routing/trace.hpp"
#include "hestia/runtime/decoder.hpp"

namespace hestia {

/// The decode steps of one sequence of each row of a batch, as `Decoder::replay` takes them, and its prefill steps when
/// every row has as many; steps beyond the shortest row's are left out. `sequences`: turns of the trace, one per row.
/// Throws UsageError when a turn is not in the trace, or the trace is not of the model's shape: MoE layers, experts,
/// experts per token, every layer in every step.
[[nodiscard]] DecodeReplay replay_of(const RoutingTrace& trace, const std::vector<std::int64_t>& sequences,
                                     const Architecture& architecture);

/// Turns of a trace that have decode steps, in order.
[[nodiscard]] std::vector<std::int64_t> turns_of(const RoutingTrace& trace);

}  // namespace hestia
