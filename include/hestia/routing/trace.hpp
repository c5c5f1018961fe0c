#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "hestia/routing/layout.hpp"

namespace hestia {

/// Phase of a step: prompt processing or token-by-token decoding.
enum class Phase : std::uint8_t { kPrefill = 0, kDecode = 1 };

/// What a trace says of one model layer.
struct TraceLayer {
  std::int64_t layer = 0;         ///< Model layer index.
  std::int64_t expert_bytes = 0;  ///< Bytes of one expert; 0: unknown.
  std::int64_t dense_bytes = 0;   ///< Bytes of everything else in the layer; 0: unknown.
  /// Experts that the recorder's cache was filled with before the first decode step, best first: C slots held the first
  /// C. Empty: it was not pre-loaded.
  std::vector<std::uint16_t> preload{};
};

/// One layer of one step: `count` experts from `first` in the trace's flat arrays, by falling weight (rank order).
struct TraceEntry {
  std::int64_t sequence = 0;
  std::int64_t step = 0;
  std::int32_t layer = 0;
  Phase phase = Phase::kDecode;
  std::uint32_t count = 0;
  std::uint64_t first = 0;
};

/// A routing trace in memory: entries by sequence (in order of appearance), then step, then layer. Within one sequence
/// the steps of a layer rise; a sequence does not come back after another began.
struct RoutingTrace {
  std::string model;
  std::string comment;           ///< Free text of the header, one line per comment line, kept when written again.
  std::int64_t num_layers = 0;   ///< Layers of the model, dense ones included (`n_layer`): layer indices lie below it.
  std::int64_t num_experts = 0;  ///< E, at most 65536.
  std::int64_t top_k = 0;        ///< K: most experts of one entry.
  std::vector<TraceLayer> layers;  ///< The layers that route, by rising index.
  std::vector<TraceEntry> entries;
  std::vector<std::uint16_t> experts;  ///< Of all entries, one after the other.
  std::vector<float> weights;          ///< As long as `experts`; 0 where the source does not say.
  /// What the recorder saw, as long as `experts`, or both empty when it saw nothing worth keeping (no expert resident,
  /// each one transferred): 1 where the expert was resident, and the bytes moved for it.
  std::vector<std::uint8_t> residency;
  std::vector<std::int64_t> moved_bytes;

  [[nodiscard]] std::span<const std::uint16_t> experts_of(const TraceEntry& entry) const {
    return {experts.data() + entry.first, entry.count};
  }
  [[nodiscard]] std::span<const float> weights_of(const TraceEntry& entry) const {
    return {weights.data() + entry.first, entry.count};
  }
};

/// Reads `route_trace v1` CSV, llama.cpp's `layer,expert` CSV, or a packed HDF5 trace (told apart by content).
/// Throws InputError with file:line for: a missing header, wrong columns, numbers that do not parse, experts out of
/// range, a slot gap or a repeated slot or expert within one layer and step, steps of a layer out of order, a file
/// newer than this program, a preload of some layers only or of experts that are not there. A route_trace written layer
/// by layer (a prefill batch) is put in step order.
[[nodiscard]] RoutingTrace read_trace(const std::filesystem::path& path);

/// Writes `route_trace v1` CSV, whole or not at all. Weights are written with the digits that give the same float back:
/// reading and writing once more gives the same bytes. Throws RunError when the disk refuses.
void write_trace_csv(const std::filesystem::path& path, const RoutingTrace& trace);
/// Writes the packed HDF5 form: `/trace/{expert uint16, weight float16} [steps, L, K]`, and per step its sequence,
/// phase and number. Weights are rounded to half precision. `logits`: of the router, [n, L, E] of the first n steps in
/// the order of the entries, stored in half precision too; empty: none. Throws UsageError when steps lack layers, mix
/// phases or differ in K (such traces stay CSV), std::invalid_argument for logits of more or broken steps.
void write_trace_hdf5(const std::filesystem::path& path, const RoutingTrace& trace, std::span<const float> logits = {});
/// The router logits of a packed trace, [n, L, E] of its first n steps; empty when it has none. Throws InputError as
/// read_trace does.
[[nodiscard]] std::vector<float> read_trace_logits(const std::filesystem::path& path);

/// Appends one sequence: prompt tokens as prefill steps, the others as decode steps; step t is token t. A trace without
/// layers takes E, K and the layers 0..L-1 from the sequence. Empty `weights` are stored as zeros. Throws
/// std::invalid_argument on a shape mismatch, an expert out of range or repeated, or the id of the sequence before.
void append_sequence(RoutingTrace& trace, const SequenceRouting& sequence);

}  // namespace hestia
