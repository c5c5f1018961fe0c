#include "hestia/runtime/replay.hpp"

#include <algorithm>
#include <map>
#include <span>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/routing/fold.hpp"

namespace hestia {
namespace {

using torch::Tensor;

// The steps of one phase of a sequence, int64 [steps, L, K]; a step of fewer experts names its first once more.
Tensor steps_of(const RoutingTrace& trace, std::int64_t sequence, Phase phase, std::int64_t top_k) {
  std::map<std::int64_t, std::int64_t> layer_place;
  for (const TraceLayer& layer : trace.layers) {
    layer_place.emplace(layer.layer, static_cast<std::int64_t>(layer_place.size()));
  }
  const auto num_layers = static_cast<std::int64_t>(trace.layers.size());
  std::vector<std::int64_t> experts;
  std::int64_t layers_seen = num_layers;
  std::int64_t step = -1;
  std::int64_t steps = 0;
  for (const TraceEntry& entry : trace.entries) {
    if (entry.sequence != sequence || entry.phase != phase) {
      continue;
    }
    if (steps == 0 || entry.step != step) {
      if (layers_seen != num_layers) {
        break;
      }
      step = entry.step;
      layers_seen = 0;
      ++steps;
    }
    if (layer_place.at(entry.layer) != layers_seen || entry.count == 0) {
      layers_seen = -1;
      break;
    }
    ++layers_seen;
    const std::span<const std::uint16_t> served = trace.experts_of(entry);
    experts.insert(experts.end(), served.begin(), served.end());
    experts.insert(experts.end(), static_cast<std::size_t>(top_k) - served.size(), served.front());
  }
  if (layers_seen != num_layers) {
    throw UsageError(fmt::format(
        "--replay: every step must name experts in each of the trace's {} layers, got turn {}, step {} without some",
        num_layers, sequence, step));
  }
  return torch::tensor(experts, torch::kInt64).view({steps, num_layers, top_k});
}

}  // namespace

DecodeReplay replay_of(const RoutingTrace& trace, const std::vector<std::int64_t>& sequences,
                       const Architecture& architecture) {
  check_trace_shape(trace, {static_cast<std::int64_t>(architecture.moe_layers().size()), architecture.num_experts});
  if (trace.top_k > architecture.top_k) {
    throw UsageError(fmt::format("--replay: the model serves {} experts per token, got a trace with up to {}",
                                 architecture.top_k, trace.top_k));
  }
  const std::vector<std::int64_t> turns = turns_of(trace);
  std::vector<Tensor> steps, prompts;
  for (const std::int64_t sequence : sequences) {
    if (std::find(turns.begin(), turns.end(), sequence) == turns.end()) {
      throw UsageError(
          fmt::format("--replay: no decode steps of turn {} in the trace, which has {} turns", sequence, turns.size()));
    }
    steps.push_back(steps_of(trace, sequence, Phase::kDecode, architecture.top_k));
    prompts.push_back(steps_of(trace, sequence, Phase::kPrefill, architecture.top_k));
  }
  const auto shortest = [](const std::vector<Tensor>& rows) {
    std::int64_t length = rows.front().size(0);
    for (const Tensor& row : rows) {
      length = std::min(length, row.size(0));
    }
    return length;
  };
  const auto stacked = [](const std::vector<Tensor>& rows, std::int64_t length) {
    std::vector<Tensor> same;
    same.reserve(rows.size());
    for (const Tensor& row : rows) {
      same.push_back(row.narrow(0, 0, length));
    }
    return torch::stack(same, 1).permute({2, 0, 1, 3}).contiguous();  // [S, B, L, K] -> [L, S, B, K]
  };
  DecodeReplay replay;
  replay.steps_LSBK = stacked(steps, shortest(steps));
  const std::int64_t prompt = shortest(prompts);
  const bool same_length =
      std::all_of(prompts.begin(), prompts.end(), [&](const Tensor& row) { return row.size(0) == prompt; });
  if (prompt > 0 && same_length) {
    const Tensor all = stacked(prompts, prompt);
    for (std::int64_t layer = 0; layer < all.size(0); ++layer) {
      replay.prompt_SBK.push_back(all[layer]);
    }
  }
  return replay;
}

std::vector<std::int64_t> turns_of(const RoutingTrace& trace) {
  std::vector<std::int64_t> turns;
  for (const TraceEntry& entry : trace.entries) {
    if (entry.phase == Phase::kDecode && (turns.empty() || turns.back() != entry.sequence)) {
      turns.push_back(entry.sequence);
    }
  }
  return turns;
}

}  // namespace hestia
