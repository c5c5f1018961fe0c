#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "loss_support.hpp"

namespace hestia {
namespace {

const std::vector<std::string>& start_names() {
  static const std::vector<std::string> names = {"uniform", "empty"};
  return names;
}

const std::vector<std::string>& reference_names() {
  static const std::vector<std::string> names = {"current_hidden", "base_forward"};
  return names;
}

void require_option(bool holds, const std::string& key, const std::string& range, const std::string& got) {
  if (!holds) {
    throw UsageError(fmt::format("losses.{}: must be {}, got {}; set another value in the recipe", key, range, got));
  }
}

void add_weight(FieldList& list, double& weight) {
  list.add("weight", weight, "weight of the term; 0 reports it without training on it", {.low = 0.0});
}

void add_ramp(FieldList& list, std::int64_t& ramp_steps) {
  list.add("ramp_steps", ramp_steps, "the weight grows linearly from 0 over this many steps", {.low = 0.0});
}

void require_size(const std::string& key, std::int64_t size) {
  require_option(size >= 1, key, "at least 1", fmt::format("{}", size));
}

CacheSimulationOptions resolved(const CacheSimulationOptions& options, std::int64_t num_experts) {
  CacheSimulationOptions result = options;
  if (result.slots == 0) {
    result.slots = std::max<std::int64_t>(1, num_experts / 4);
  }
  require_option(result.slots >= 1 && result.slots <= num_experts, "cache_simulation.slots",
                 fmt::format("between 1 and the model's {} experts, or 0 for a quarter of them", num_experts),
                 fmt::format("{}", result.slots));
  require_option(result.gamma >= 0.0 && result.gamma <= 1.0, "cache_simulation.gamma", "between 0 and 1",
                 fmt::format("{}", result.gamma));
  const std::vector<std::string>& starts = start_names();
  require_option(std::find(starts.begin(), starts.end(), result.start) != starts.end(), "cache_simulation.start",
                 "uniform or empty", fmt::format("\"{}\"", result.start));
  return result;
}

}  // namespace

FieldList CacheSimulationOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  list.add("slots", slots, "cache slots C per layer; 0: a quarter of the experts", {.low = 0.0});
  list.add("gamma", gamma, "how much of the past a token keeps", {.low = 0.0, .high = 1.0});
  list.add("start", start, "cache at the start of a sequence", start_names());
  list.add("clamp_at_one", clamp_at_one, "no gain from more than one slot's mass on an expert");
  list.add("propagate_through_cache", propagate_through_cache, "gradient through the cache recursion too (slower)");
  return list;
}

FieldList RankMatchingOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  list.add("margin", margin, "lead in probability that the base order must keep", {.low = 0.0});
  list.add("normalise_pairs", normalise_pairs, "divide each token's sum by its number of pairs");
  list.add("reference", reference, "where the base router's probabilities come from; base_forward: a second forward",
           reference_names());
  return list;
}

FieldList ReuseOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  add_ramp(list, ramp_steps);
  return list;
}

FieldList TrustOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  return list;
}

FieldList SmoothOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  add_ramp(list, ramp_steps);
  return list;
}

FieldList LagOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  add_ramp(list, ramp_steps);
  list.add("lags", lags, "distances in tokens, strictly increasing", {.low = 1.0});
  return list;
}

FieldList WorkingSetOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  add_ramp(list, ramp_steps);
  list.add("window", window, "counted tokens per window", {.low = 1.0});
  return list;
}

FieldList RouterEntropyOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  return list;
}

FieldList TemporalDotOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  return list;
}

FieldList GateConsistencyOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  return list;
}

FieldList ChunkUnionOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  list.add("chunk", chunk, "counted tokens per chunk", {.low = 1.0});
  return list;
}

FieldList LoadBalanceOptions::fields() {
  FieldList list;
  add_weight(list, weight);
  return list;
}

FieldList RoutingLossOptions::fields() {
  FieldList list;
  list.add_section("cache_simulation", cache_simulation.fields(),
                   "MELINOE: pull the router to experts in a soft cache");
  list.add_section("rank_matching", rank_matching.fields(), "MELINOE: keep the base router's order of experts");
  list.add_section("reuse", reuse.fields(), "ReMoE: probability on the experts of the token before");
  list.add_section("trust", trust.fields(), "ReMoE: stay near the base router's distribution");
  list.add_section("smooth", smooth.fields(), "ReMoE: change the distribution little from token to token");
  list.add_section("lag", lag.fields(), "ReMoE: stay near the distributions of some tokens back");
  list.add_section("working_set", working_set.fields(), "ReMoE: few experts within a window of tokens");
  list.add_section("router_entropy", router_entropy.fields(), "SEER-MoE: be sure of a token's experts");
  list.add_section("temporal_dot", temporal_dot.fields(), "overlap of neighbouring distributions");
  list.add_section("gate_consistency", gate_consistency.fields(), "StickyMoE: squared distance of neighbours");
  list.add_section("chunk_union", chunk_union.fields(), "BlockFFN: small union of experts within a chunk of tokens");
  list.add_section("load_balance", load_balance.fields(), "Switch: use all experts evenly (pre-training, controls)");
  return list;
}

namespace {

// Where each objective's weight is.
std::vector<double*> weights_of(RoutingLossOptions& options) {
  std::vector<double*> weights;
  const FieldList sections = options.fields();
  for (const Field& section : sections.fields()) {
    for (const Field& field : std::get<std::shared_ptr<FieldList>>(section.target)->fields()) {
      if (field.name == "weight") {
        weights.push_back(std::get<double*>(field.target));
      }
    }
  }
  return weights;
}

}  // namespace

void RoutingLossOptions::set_all_weights(double weight) {
  for (double* own : weights_of(*this)) {
    *own = weight;
  }
}

bool RoutingLossOptions::any_weight() {
  const std::vector<double*> weights = weights_of(*this);
  return std::any_of(weights.begin(), weights.end(), [](const double* weight) { return *weight > 0.0; });
}

double WeightedLoss::weight_at(std::int64_t step) const {
  if (ramp_steps <= 0) {
    return weight;
  }
  return weight * std::min(1.0, static_cast<double>(step) / static_cast<double>(ramp_steps));
}

std::vector<std::string> routing_loss_names() {
  return {"cache_simulation",
          "rank_matching",
          "reuse",
          "trust",
          "smooth",
          "lag",
          "working_set",
          "router_entropy",
          "temporal_dot",
          "gate_consistency",
          "chunk_union",
          "load_balance"};
}

std::vector<WeightedLoss> make_routing_losses(const RoutingLossOptions& options, std::int64_t num_experts,
                                              std::int64_t top_k) {
  if (top_k < 1 || top_k > num_experts) {
    throw std::invalid_argument(
        fmt::format("routing losses: top_k must be between 1 and num_experts ({}), got {}", num_experts, top_k));
  }
  require_option(std::isfinite(options.rank_matching.margin) && options.rank_matching.margin >= 0.0,
                 "rank_matching.margin", "a finite number of at least 0",
                 fmt::format("{}", options.rank_matching.margin));
  require_option(std::find(reference_names().begin(), reference_names().end(), options.rank_matching.reference) !=
                     reference_names().end(),
                 "rank_matching.reference", "current_hidden or base_forward",
                 fmt::format("\"{}\"", options.rank_matching.reference));
  const std::vector<std::int64_t>& lags = options.lag.lags;
  require_option(!lags.empty() && lags.front() >= 1 &&
                     std::adjacent_find(lags.begin(), lags.end(), std::greater_equal<>()) == lags.end(),
                 "lag.lags", "a strictly increasing list of numbers of at least 1",
                 fmt::format("[{}]", fmt::join(lags, ", ")));
  require_size("working_set.window", options.working_set.window);
  require_size("chunk_union.chunk", options.chunk_union.chunk);
  std::vector<WeightedLoss> losses;
  losses.push_back(
      {make_cache_simulation(resolved(options.cache_simulation, num_experts)), options.cache_simulation.weight});
  losses.push_back({make_rank_matching(options.rank_matching), options.rank_matching.weight});
  losses.push_back({make_reuse(), options.reuse.weight, options.reuse.ramp_steps});
  losses.push_back({make_trust(), options.trust.weight});
  losses.push_back({make_smooth(), options.smooth.weight, options.smooth.ramp_steps});
  losses.push_back({make_lag(options.lag), options.lag.weight, options.lag.ramp_steps});
  losses.push_back({make_working_set(options.working_set), options.working_set.weight, options.working_set.ramp_steps});
  losses.push_back({make_router_entropy(), options.router_entropy.weight});
  losses.push_back({make_temporal_dot(), options.temporal_dot.weight});
  losses.push_back({make_gate_consistency(), options.gate_consistency.weight});
  losses.push_back({make_chunk_union(options.chunk_union), options.chunk_union.weight});
  losses.push_back({make_load_balance(), options.load_balance.weight});
  for (const WeightedLoss& weighted : losses) {
    const std::string name(weighted.loss->name());
    require_option(std::isfinite(weighted.weight) && weighted.weight >= 0.0, name + ".weight",
                   "a finite number of at least 0", fmt::format("{}", weighted.weight));
    require_option(weighted.ramp_steps >= 0, name + ".ramp_steps", "at least 0",
                   fmt::format("{}", weighted.ramp_steps));
  }
  return losses;
}

}  // namespace hestia
