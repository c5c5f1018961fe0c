#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <torch/types.h>

#include "hestia/routing_losses/routing_losses.hpp"

namespace hestia::testing {

/// A stretch of a packed row: `length` tokens of one sequence, the first `prompt` of them not counted, or padding.
struct Stretch {
  std::int64_t length = 0;
  std::int64_t prompt = 0;
  bool padding = false;
};

/// Padding is marked as counted on purpose: only the sequence id may decide that it is none of our business.
inline SequenceLayout layout_of(const std::vector<Stretch>& stretches) {
  SequenceLayout layout;
  std::int64_t id = 100;
  for (const Stretch& stretch : stretches) {
    for (std::int64_t i = 0; i < stretch.length; ++i) {
      layout.sequence_ids.push_back(stretch.padding ? -1 : id);
      layout.counted.push_back(stretch.padding || i >= stretch.prompt ? 1 : 0);
    }
    ++id;
  }
  return layout;
}

/// Several packed sequences with and without prompts, one all prompt, one of a single token, padding in three places.
inline SequenceLayout usual_layout() {
  return layout_of({{2, 0, true}, {7, 3}, {4, 0}, {3, 0, true}, {3, 3}, {1, 0}, {6, 1}, {2, 0, true}});
}

inline SequenceLayout random_layout(std::mt19937& random) {
  std::vector<Stretch> stretches;
  const int num_stretches = std::uniform_int_distribution<int>(1, 6)(random);
  for (int i = 0; i < num_stretches; ++i) {
    Stretch stretch;
    stretch.length = std::uniform_int_distribution<std::int64_t>(1, 9)(random);
    stretch.prompt = std::uniform_int_distribution<std::int64_t>(0, stretch.length)(random) *
                     std::uniform_int_distribution<std::int64_t>(0, 1)(random);
    stretch.padding = std::uniform_int_distribution<int>(0, 3)(random) == 0;
    stretches.push_back(stretch);
  }
  return layout_of(stretches);
}

inline torch::Tensor random_normal(std::mt19937& random, std::vector<std::int64_t> shape, double scale = 1.0) {
  std::normal_distribution<double> normal(0.0, scale);
  torch::Tensor tensor = torch::empty(shape, torch::kFloat64);
  double* const data = tensor.data_ptr<double>();
  std::generate(data, data + tensor.numel(), [&] { return normal(random); });
  return tensor;
}

struct Sizes {
  std::int64_t num_layers = 2;
  std::int64_t num_experts = 7;
  std::int64_t top_k = 3;
};

/// float64 logits with gradient; the served set is not always the Top-K of z, as under a residency prior; two experts
/// of the reference share their logit, so that equal base probabilities occur.
inline RoutingTensors random_routing(std::mt19937& random, const Sizes& sizes, std::int64_t num_tokens) {
  RoutingTensors routing;
  const std::vector<std::int64_t> shape = {sizes.num_layers, num_tokens, sizes.num_experts};
  routing.logits_LTE = random_normal(random, shape, 1.3);
  routing.reference_logits_LTE = routing.logits_LTE + random_normal(random, shape, 0.7);
  if (sizes.num_experts > 2) {
    routing.reference_logits_LTE.select(2, 2).copy_(routing.reference_logits_LTE.select(2, 0));
  }
  const torch::Tensor scores = routing.logits_LTE + random_normal(random, shape, 0.5);
  routing.selected_LTK = std::get<1>(scores.topk(sizes.top_k, -1)).contiguous();
  routing.logits_LTE.requires_grad_(true);
  return routing;
}

inline RoutingTensors converted(const RoutingTensors& routing, torch::ScalarType dtype, torch::Device device) {
  RoutingTensors result;
  result.logits_LTE = routing.logits_LTE.detach().to(device, dtype).clone().requires_grad_(true);
  result.selected_LTK = routing.selected_LTK.to(device);
  result.reference_logits_LTE = routing.reference_logits_LTE.to(device, dtype);
  return result;
}

/// An objective with one setting of its options.
struct Variant {
  std::string label;
  std::shared_ptr<const RoutingLoss> loss;
};

inline std::shared_ptr<const RoutingLoss> find_loss(const RoutingLossOptions& options, const std::string& name,
                                                    const Sizes& sizes) {
  for (const WeightedLoss& weighted : make_routing_losses(options, sizes.num_experts, sizes.top_k)) {
    if (weighted.loss->name() == name) {
      return weighted.loss;
    }
  }
  throw std::logic_error("no loss " + name);
}

inline Variant cache_variant(const std::string& start, bool clamp, bool propagate, const Sizes& sizes,
                             double gamma = 0.8, std::int64_t slots = 0) {
  RoutingLossOptions options;
  options.cache_simulation.start = start;
  options.cache_simulation.clamp_at_one = clamp;
  options.cache_simulation.propagate_through_cache = propagate;
  options.cache_simulation.gamma = gamma;
  options.cache_simulation.slots = slots == 0 ? (sizes.num_experts + 1) / 2 : slots;
  return {"cache_simulation " + start + (clamp ? " clamp" : "") + (propagate ? " propagate" : ""),
          find_loss(options, "cache_simulation", sizes)};
}

inline Variant lag_variant(const std::vector<std::int64_t>& lags, const Sizes& sizes) {
  RoutingLossOptions options;
  options.lag.lags = lags;
  std::string label = "lag";
  for (const std::int64_t lag : lags) {
    label.append(" ").append(std::to_string(lag));
  }
  return {label, find_loss(options, "lag", sizes)};
}

inline Variant window_variant(std::int64_t window, const Sizes& sizes) {
  RoutingLossOptions options;
  options.working_set.window = window;
  return {"working_set " + std::to_string(window), find_loss(options, "working_set", sizes)};
}

inline Variant chunk_variant(std::int64_t chunk, const Sizes& sizes) {
  RoutingLossOptions options;
  options.chunk_union.chunk = chunk;
  return {"chunk_union " + std::to_string(chunk), find_loss(options, "chunk_union", sizes)};
}

/// Every objective under every option. C is never K: with C = K an expert used by every token sits at c = 1, the kink
/// of the clamp, up to rounding.
inline std::vector<Variant> every_variant(const Sizes& sizes) {
  std::vector<Variant> variants;
  std::int64_t slots = (sizes.num_experts + 1) / 2;
  if (slots == sizes.top_k) {
    slots = slots < sizes.num_experts ? slots + 1 : slots - 1;
  }
  for (const std::string start : {"uniform", "empty"}) {
    for (const bool clamp : {false, true}) {
      for (const bool propagate : {false, true}) {
        variants.push_back(cache_variant(start, clamp, propagate, sizes, 0.8, slots));
      }
    }
  }
  RoutingLossOptions options;
  variants.push_back({"rank_matching", find_loss(options, "rank_matching", sizes)});
  options.rank_matching.normalise_pairs = true;
  options.rank_matching.margin = 0.25;
  variants.push_back({"rank_matching normalised", find_loss(options, "rank_matching", sizes)});
  for (const std::string name : {"reuse", "trust", "smooth", "lag", "working_set", "router_entropy", "temporal_dot",
                                 "gate_consistency", "chunk_union", "load_balance"}) {
    variants.push_back({name, find_loss(options, name, sizes)});
  }
  for (const std::vector<std::int64_t>& lags : {std::vector<std::int64_t>{2, 3}, {1, 4, 1000}}) {
    variants.push_back(lag_variant(lags, sizes));
  }
  for (const std::int64_t size : {1, 2, 3}) {
    variants.push_back(window_variant(size, sizes));
    variants.push_back(chunk_variant(size + 1, sizes));  // chunks of one token cost the same under every router
  }
  return variants;
}

/// Terms whose gradient reaches the token before as well, and with it the last tokens of a prompt.
inline bool pulls_both_sides(const RoutingLoss& loss) {
  return loss.name() == "smooth" || loss.name() == "lag" || loss.name() == "temporal_dot" ||
         loss.name() == "gate_consistency";
}

/// Different for every layer, so that a gradient that mixes layers up shows.
inline torch::Tensor layer_weights(const torch::Tensor& sum_L) {
  return torch::arange(1, sum_L.numel() + 1, sum_L.options()) * 0.75 - 0.3;
}

/// d <layer_weights, sum_L> / d logits.
inline torch::Tensor gradient_of(const torch::Tensor& sum_L, const RoutingTensors& routing) {
  return torch::autograd::grad({(sum_L * layer_weights(sum_L.detach())).sum()}, {routing.logits_LTE})[0];
}

/// Largest |a - b| relative to the largest |b|, or to 1 when that is smaller.
inline double relative_difference(const torch::Tensor& a, const torch::Tensor& b) {
  if (a.sizes() != b.sizes()) {
    return std::numeric_limits<double>::infinity();
  }
  if (b.numel() == 0) {
    return 0.0;
  }
  const torch::Tensor left = a.detach().to(torch::kCPU, torch::kFloat64);
  const torch::Tensor right = b.detach().to(torch::kCPU, torch::kFloat64);
  const double difference = (left - right).abs().max().item<double>();
  return difference / std::max(1.0, right.abs().max().item<double>());
}

}  // namespace hestia::testing
