#pragma once

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/core/random.hpp"
#include "hestia/routing/trace.hpp"

namespace hestia::testing {

/// A uniformly drawn set of `count` of `num_experts` experts, in random order.
inline std::vector<std::uint16_t> random_experts(SplitMix64& random, std::int64_t num_experts, std::int64_t count) {
  std::vector<std::uint16_t> experts(static_cast<std::size_t>(num_experts));
  std::iota(experts.begin(), experts.end(), std::uint16_t{0});
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    std::swap(experts[i], experts[i + random.below(experts.size() - i)]);
  }
  experts.resize(static_cast<std::size_t>(count));
  return experts;
}

struct TraceShape {
  std::int64_t num_sequences = 3;
  std::int64_t num_layers = 2;
  std::int64_t num_experts = 12;
  std::int64_t top_k = 3;
  std::int64_t min_steps = 5;
  std::int64_t max_steps = 40;
  double stickiness = 0.5;  ///< Chance that a step keeps an expert of the step before.
  double skip = 0.0;        ///< Chance that a step lacks a layer.
  double prefill = 0.2;     ///< Share of leading steps that are prefill.
};

/// A random trace with reuse between steps, so that policies have something to tell apart.
inline RoutingTrace random_trace(SplitMix64& random, const TraceShape& shape) {
  RoutingTrace trace;
  trace.model = "random model";
  trace.num_layers = 2 * shape.num_layers;
  trace.num_experts = shape.num_experts;
  trace.top_k = shape.top_k;
  for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
    trace.layers.push_back({2 * layer + 1, 1000 + 10 * layer, 77});
  }
  for (std::int64_t sequence = 0; sequence < shape.num_sequences; ++sequence) {
    const auto num_steps =
        shape.min_steps +
        static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(shape.max_steps - shape.min_steps + 1)));
    const auto num_prefill = static_cast<std::int64_t>(shape.prefill * static_cast<double>(num_steps));
    std::vector<std::vector<std::uint16_t>> previous(static_cast<std::size_t>(shape.num_layers));
    for (std::int64_t step = 0; step < num_steps; ++step) {
      for (std::size_t layer = 0; layer < trace.layers.size(); ++layer) {
        if (random.uniform() < shape.skip) {
          continue;
        }
        std::vector<std::uint16_t> experts = random_experts(random, shape.num_experts, shape.num_experts);
        std::stable_sort(experts.begin(), experts.end(), [&](std::uint16_t a, std::uint16_t b) {
          const auto was_used = [&](std::uint16_t expert) {
            return std::find(previous[layer].begin(), previous[layer].end(), expert) != previous[layer].end();
          };
          return was_used(a) && !was_used(b);
        });
        std::vector<std::uint16_t> chosen;
        for (std::size_t i = 0; i < experts.size() && chosen.size() < static_cast<std::size_t>(shape.top_k); ++i) {
          const std::size_t missing = static_cast<std::size_t>(shape.top_k) - chosen.size();
          const bool old = i < previous[layer].size();
          if (experts.size() - i <= missing || (old ? random.uniform() < shape.stickiness : true)) {
            chosen.push_back(experts[i]);
          }
        }
        for (std::size_t i = chosen.size(); i > 1; --i) {
          std::swap(chosen[i - 1], chosen[random.below(i)]);
        }
        previous[layer] = chosen;
        trace.entries.push_back({10 + sequence, step, static_cast<std::int32_t>(trace.layers[layer].layer),
                                 step < num_prefill ? Phase::kPrefill : Phase::kDecode,
                                 static_cast<std::uint32_t>(chosen.size()), trace.experts.size()});
        std::vector<float> weights;
        for (std::size_t i = 0; i < chosen.size(); ++i) {
          weights.push_back(static_cast<float>(random.uniform()));
        }
        std::sort(weights.rbegin(), weights.rend());
        trace.experts.insert(trace.experts.end(), chosen.begin(), chosen.end());
        trace.weights.insert(trace.weights.end(), weights.begin(), weights.end());
      }
    }
  }
  return trace;
}

/// A trace of one layer and one sequence, all decode; `steps` by falling weight.
inline RoutingTrace trace_of(std::int64_t num_experts, const std::vector<std::vector<std::uint16_t>>& steps) {
  RoutingTrace trace;
  trace.num_layers = 1;
  trace.num_experts = num_experts;
  trace.layers.push_back({0, 100, 0});
  for (std::size_t step = 0; step < steps.size(); ++step) {
    trace.top_k = std::max(trace.top_k, static_cast<std::int64_t>(steps[step].size()));
    trace.entries.push_back({0, static_cast<std::int64_t>(step), 0, Phase::kDecode,
                             static_cast<std::uint32_t>(steps[step].size()), trace.experts.size()});
    trace.experts.insert(trace.experts.end(), steps[step].begin(), steps[step].end());
  }
  trace.weights.assign(trace.experts.size(), 0.25F);
  return trace;
}

inline bool same_trace(const RoutingTrace& a, const RoutingTrace& b) {
  const auto same_entry = [](const TraceEntry& x, const TraceEntry& y) {
    return x.sequence == y.sequence && x.step == y.step && x.layer == y.layer && x.phase == y.phase &&
           x.count == y.count && x.first == y.first;
  };
  const auto same_layer = [](const TraceLayer& x, const TraceLayer& y) {
    return x.layer == y.layer && x.expert_bytes == y.expert_bytes && x.dense_bytes == y.dense_bytes &&
           x.preload == y.preload;
  };
  return a.model == b.model && a.comment == b.comment && a.num_layers == b.num_layers &&
         a.num_experts == b.num_experts && a.top_k == b.top_k && a.experts == b.experts && a.weights == b.weights &&
         a.residency == b.residency && a.moved_bytes == b.moved_bytes &&
         std::equal(a.entries.begin(), a.entries.end(), b.entries.begin(), b.entries.end(), same_entry) &&
         std::equal(a.layers.begin(), a.layers.end(), b.layers.begin(), b.layers.end(), same_layer);
}

/// The recorded trace that lies beside the repository. Where it is missing, a test says so and passes, except in CI,
/// where it must be there.
inline std::optional<std::filesystem::path> recorded_trace() {
  const std::filesystem::path path =
      std::filesystem::path(HESTIA_SOURCE_DIR) / ".." / "shared" / "data" / "traces" / "qwen.route.csv";
  if (std::filesystem::exists(path)) {
    return path;
  }
  const char* ci = std::getenv("CI");
  if (ci != nullptr && std::string(ci) == "true") {
    FAIL("missing in CI: " << path.string());
  }
  WARN("SKIPPED: no recorded trace at " << path.string() << "; the golden counts were not checked");
  return std::nullopt;
}

}  // namespace hestia::testing
