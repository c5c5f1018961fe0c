#include <algorithm>
#include <cmath>
#include <stdexcept>

#include <fmt/format.h>

#include "loss_support.hpp"

namespace hestia {
namespace {

const std::vector<std::string>& start_names() {
  static const std::vector<std::string> names = {"uniform", "empty"};
  return names;
}

void require_option(bool holds, const std::string& key, const std::string& range, const std::string& got) {
  if (!holds) {
    throw UsageError(fmt::format("losses.{}: must be {}, got {}; set another value in the recipe", key, range, got));
  }
}

void require_weight(const std::string& loss, double weight) {
  require_option(std::isfinite(weight) && weight >= 0.0, loss + ".weight", "a finite number of at least 0",
                 fmt::format("{}", weight));
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
  list.add("weight", weight, "weight of the term; 0 reports it without training on it", {.low = 0.0});
  list.add("slots", slots, "cache slots C per layer; 0: a quarter of the experts", {.low = 0.0});
  list.add("gamma", gamma, "how much of the past a token keeps", {.low = 0.0, .high = 1.0});
  list.add("start", start, "cache at the start of a sequence", start_names());
  list.add("clamp_at_one", clamp_at_one, "no gain from more than one slot's mass on an expert");
  list.add("propagate_through_cache", propagate_through_cache, "gradient through the cache recursion too (slower)");
  return list;
}

FieldList RankMatchingOptions::fields() {
  FieldList list;
  list.add("weight", weight, "weight of the term; 0 reports it without training on it", {.low = 0.0});
  list.add("margin", margin, "lead in probability that the base order must keep", {.low = 0.0});
  list.add("normalise_pairs", normalise_pairs, "divide each token's sum by its number of pairs");
  return list;
}

FieldList ReuseOptions::fields() {
  FieldList list;
  list.add("weight", weight, "weight of the term; 0 reports it without training on it", {.low = 0.0});
  list.add("ramp_steps", ramp_steps, "the weight grows linearly from 0 over this many steps", {.low = 0.0});
  return list;
}

FieldList TrustOptions::fields() {
  FieldList list;
  list.add("weight", weight, "weight of the term; 0 reports it without training on it", {.low = 0.0});
  return list;
}

FieldList LoadBalanceOptions::fields() {
  FieldList list;
  list.add("weight", weight, "weight of the term; 0 reports it without training on it", {.low = 0.0});
  return list;
}

FieldList RoutingLossOptions::fields() {
  FieldList list;
  list.add_section("cache_simulation", cache_simulation.fields(),
                   "MELINOE: pull the router to experts in a soft cache");
  list.add_section("rank_matching", rank_matching.fields(), "MELINOE: keep the base router's order of experts");
  list.add_section("reuse", reuse.fields(), "ReMoE: probability on the experts of the token before");
  list.add_section("trust", trust.fields(), "ReMoE: stay near the base router's distribution");
  list.add_section("load_balance", load_balance.fields(), "Switch: use all experts evenly (pre-training, controls)");
  return list;
}

double WeightedLoss::weight_at(std::int64_t step) const {
  if (ramp_steps <= 0) {
    return weight;
  }
  return weight * std::min(1.0, static_cast<double>(step) / static_cast<double>(ramp_steps));
}

std::vector<std::string> routing_loss_names() {
  return {"cache_simulation", "rank_matching", "reuse", "trust", "load_balance"};
}

std::vector<WeightedLoss> make_routing_losses(const RoutingLossOptions& options, std::int64_t num_experts,
                                              std::int64_t top_k) {
  if (top_k < 1 || top_k > num_experts) {
    throw std::invalid_argument(
        fmt::format("routing losses: top_k must be between 1 and num_experts ({}), got {}", num_experts, top_k));
  }
  require_weight("cache_simulation", options.cache_simulation.weight);
  require_weight("rank_matching", options.rank_matching.weight);
  require_weight("reuse", options.reuse.weight);
  require_weight("trust", options.trust.weight);
  require_weight("load_balance", options.load_balance.weight);
  require_option(std::isfinite(options.rank_matching.margin) && options.rank_matching.margin >= 0.0,
                 "rank_matching.margin", "a finite number of at least 0",
                 fmt::format("{}", options.rank_matching.margin));
  require_option(options.reuse.ramp_steps >= 0, "reuse.ramp_steps", "at least 0",
                 fmt::format("{}", options.reuse.ramp_steps));
  std::vector<WeightedLoss> losses;
  losses.push_back(
      {make_cache_simulation(resolved(options.cache_simulation, num_experts)), options.cache_simulation.weight});
  losses.push_back({make_rank_matching(options.rank_matching), options.rank_matching.weight});
  losses.push_back({make_reuse(), options.reuse.weight, options.reuse.ramp_steps});
  losses.push_back({make_trust(), options.trust.weight});
  losses.push_back({make_load_balance(), options.load_balance.weight});
  return losses;
}

}  // namespace hestia
