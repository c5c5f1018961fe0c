#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "hestia/routing/layout.hpp"
#include "hestia/routing/simulator.hpp"
#include "hestia/routing/trace.hpp"

namespace hestia {

/// Expert overlap ratio of a trace: mean over all decode pairs (t, t-1) of one layer and sequence of |E_t n E_{t-1}| /
/// |E_t| (|E_t| = K unless the trace varies it); pairs over all sequences and layers weigh the same. t-1 is the step
/// that the layer served before; the first decode step has none. 0 when there is no pair. ("EOR", ReMoE, arXiv
/// 2605.27081)
[[nodiscard]] double expert_overlap_ratio(const RoutingTrace& trace, bool include_prefill = false);

/// Mean number of distinct experts that a layer uses in a sequence (decode steps); a layer and sequence without any
/// such step is left out.
[[nodiscard]] double distinct_experts(const RoutingTrace& trace, bool include_prefill = false);

/// How well the best fixed set of experts per segment stands in for the router.
struct SegmentRouting {
  /// SRP(m): the F1 score of that stand-in, in [0, 1]; 0 when nothing was routed.
  double best_performance = 0.0;
  /// Experts that it keeps active over experts that the router uses, both per step (the paper's routing size ratio): a
  /// high F1 at a low ratio is a router that needs few experts for long. 0 when nothing was routed.
  double size_ratio = 0.0;
  std::int64_t segments = 0;  ///< Segments of all layers and sequences.
};

/// Segment routing best performance (arXiv 2505.16056, sections 2.2 and C.1, for all experts of a model together).
/// A segment is m = `segment_length` consecutive served steps of one layer and sequence; every start counts, so
/// segments overlap, and a sequence of T >= m steps has T - m + 1 of them. A shorter sequence is one segment of its own
/// length (the paper has none of those). With f(e, s) the steps of segment s, of length |s|, that use expert e, a
/// stand-in that keeps e active throughout s has
///   TP = sum f, FP = sum (|s| - f) over its active (e, s), FN = sum f over the others, F1 = 2 TP / (2 TP + FP + FN),
/// summed over experts, segments, layers and sequences before dividing. The best one is active where f / |s| reaches a
/// threshold, and that one threshold, the same everywhere, is what is maximised over; of equal ones the lowest.
/// SRP(1) = 1; uniform random routing of K in E experts tends to 2K / (E + K) for long segments. O(K) per step.
/// Throws UsageError for segment_length < 1, std::invalid_argument for a trace that does not fit together.
[[nodiscard]] SegmentRouting segment_routing(const RoutingTrace& trace, std::int64_t segment_length,
                                             bool include_prefill = false);

/// How evenly a model uses its experts, from the counts of one or more sequences. Layers never used are left out of the
/// means; all 0 when no layer was used.
struct UsageStatistics {
  double normalised_entropy = 0.0;        ///< mean over layers of H(u_l) / log E, u_l the share of each expert.
  double coefficient_of_variation = 0.0;  ///< mean over layers of std(u_l) / mean(u_l) (population std).
  double max_share = 0.0;                 ///< mean over layers of max_e u_l(e) * E (1: balanced).
  std::int64_t unused_experts = 0;        ///< experts of all layers never used.
};

/// Streams the routing of many sequences into every metric a comparison needs; kept are counts and the trace of
/// selections (2 bytes and a 4-byte weight each), not the probabilities. Not thread-safe.
class RoutingMetrics {
 public:
  /// L, E, K of the model, model layer of each MoE layer, bytes of one expert.
  RoutingMetrics(std::int64_t num_layers, std::int64_t num_experts, std::int64_t top_k,
                 const std::vector<std::int64_t>& model_layers, std::int64_t expert_bytes);
  /// Adds one sequence. Throws std::invalid_argument on a shape mismatch or the id of the sequence before.
  void add(const SequenceRouting& sequence);

  [[nodiscard]] const RoutingTrace& trace() const noexcept { return trace_; }
  [[nodiscard]] double expert_overlap_ratio() const;
  [[nodiscard]] double distinct_experts() const;
  /// Over counted tokens; uses counts of selections.
  [[nodiscard]] UsageStatistics usage() const;
  [[nodiscard]] SimulationCounts simulate(const SimulationOptions& options) const;
  /// Over decode steps, as everything here.
  [[nodiscard]] SegmentRouting segment_routing(std::int64_t segment_length) const;
  [[nodiscard]] SimulationCounts simulate_segment_cache(std::int64_t segment_length,
                                                        const SimulationOptions& options) const;
  [[nodiscard]] std::int64_t num_sequences() const noexcept { return num_sequences_; }
  /// Counted tokens over all sequences.
  [[nodiscard]] std::int64_t num_counted() const noexcept { return num_counted_; }

 private:
  RoutingTrace trace_;
  std::vector<std::int64_t> counts_;  // [L, E]
  std::int64_t num_sequences_ = 0;
  std::int64_t num_counted_ = 0;
};

}  // namespace hestia
