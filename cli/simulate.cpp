#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "commands.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/routing/fold.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/preload.hpp"
#include "hestia/routing/simulator.hpp"
#include "hestia/routing/trace.hpp"

namespace hestia {

namespace {

struct SimulateArguments {
  std::string trace;
  std::vector<std::string> policies = {"lru", "lfu", "belady"};
  std::vector<std::int64_t> slots;
  double gamma = SimulationOptions{}.gamma;
  std::uint64_t seed = SimulationOptions{}.seed;
  bool include_prefill = false;
  std::string start = "cold";
  std::string preload;         // preferences.h5
  std::string preload_router;  // empty: tuned
  [[nodiscard]] std::string router() const { return preload_router.empty() ? "tuned" : preload_router; }
  std::string fold;  // LxE; empty: the trace as it is
  bool json = false;
};

// Tokens whose steps the simulation serves: distinct steps of a sequence.
std::int64_t served_tokens(const RoutingTrace& trace, bool include_prefill) {
  std::int64_t tokens = 0;
  const TraceEntry* last = nullptr;
  for (const TraceEntry& entry : trace.entries) {
    if (entry.phase != Phase::kDecode && !include_prefill) {
      continue;
    }
    tokens += last == nullptr || last->sequence != entry.sequence || last->step != entry.step ? 1 : 0;
    last = &entry;
  }
  return tokens;
}

struct Setting {
  SimulationOptions options;
  SimulationCounts counts;
};

// The preload lists of a start with preload, empty for another; refuses a file without the start and the reverse.
std::vector<std::vector<std::uint16_t>> preload_of(const SimulateArguments& arguments, const RoutingTrace& trace) {
  const bool wanted = start_from_name(arguments.start) == CacheStart::kPreload;
  const PreferenceRouter router = router_from_name(arguments.router(), "--preload-router");
  if (arguments.preload.empty() && !arguments.preload_router.empty()) {
    throw UsageError(
        fmt::format("--preload-router: says whose counts of --preload FILE are meant, got {} without it; add --preload "
                    "or leave it out",
                    arguments.preload_router));
  }
  if (!wanted) {
    if (!arguments.preload.empty()) {
      throw UsageError(
          fmt::format("preload: goes with --start preload only, got --start {}; change the start or leave "
                      "out --preload",
                      arguments.start));
    }
    return {};
  }
  if (arguments.preload.empty()) {
    std::vector<std::vector<std::uint16_t>> recorded;
    for (const TraceLayer& layer : trace.layers) {
      recorded.push_back(layer.preload);
    }
    if (recorded.empty() || recorded.front().empty()) {
      throw UsageError(
          "start: preload needs the experts to begin with, and the trace has none; add --preload FILE, a "
          "preferences.h5");
    }
    return recorded;
  }
  std::vector<std::int64_t> layers;
  for (const TraceLayer& layer : trace.layers) {
    layers.push_back(layer.layer);
  }
  return read_preload(arguments.preload, router, layers, trace.num_experts, "the trace");
}

// Parses every argument before the first simulation, so that a typing mistake leaves no half a result.
std::vector<Setting> settings_of(const SimulateArguments& arguments, const RoutingTrace& trace) {
  std::vector<std::int64_t> slots = arguments.slots;
  if (slots.empty()) {
    for (const std::int64_t divisor : {8, 4, 2}) {
      slots.push_back(std::max<std::int64_t>(1, trace.num_experts / divisor));
    }
  }
  const CacheStart start = start_from_name(arguments.start);
  const std::vector<std::vector<std::uint16_t>> preload = preload_of(arguments, trace);
  std::vector<Setting> settings;
  for (const std::string& name : arguments.policies) {
    for (const std::int64_t count : slots) {
      Setting setting;
      setting.options.policy = policy_from_name(name);
      setting.options.slots = count;
      setting.options.gamma = arguments.gamma;
      setting.options.seed = arguments.seed;
      setting.options.include_prefill = arguments.include_prefill;
      setting.options.start = start;
      setting.options.preload = preload;
      setting.options.num_threads = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
      settings.push_back(setting);
    }
  }
  return settings;
}

void print_json(const SimulateArguments& arguments, const std::optional<FoldedTrace>& folded,
                const std::vector<Setting>& settings) {
  for (const Setting& setting : settings) {
    Json line = {{"policy", policy_name(setting.options.policy)},
                 {"slots", setting.options.slots},
                 {"start", start_name(setting.options.start)},
                 {"requests", setting.counts.requests},
                 {"hits", setting.counts.hits},
                 {"cold", setting.counts.cold},
                 {"loads", setting.counts.loads},
                 {"evictions", setting.counts.evictions},
                 {"hit_rate", setting.counts.hit_rate()}};
    if (setting.options.start == CacheStart::kPreload) {
      line["preload"] = arguments.preload.empty() ? arguments.trace : arguments.preload;
      line["preload_router"] = arguments.preload.empty() ? Json() : Json(arguments.router());
    }
    if (folded) {
      line["fold"] = {{"from", shape_text(folded->from)}, {"onto", shape_text(shape_of(folded->trace))}};
    }
    std::cout << line.dump() << '\n';
  }
  std::cout.flush();
}

std::string label(const SimulationOptions& options) {
  if (options.policy == CachePolicyKind::kGamma) {
    return fmt::format("gamma({})", options.gamma);
  }
  return std::string(policy_name(options.policy));
}

// What every cache holds at its resets, in words.
std::string start_text(const SimulateArguments& arguments) {
  switch (start_from_name(arguments.start)) {
    case CacheStart::kPrefill:
      return "prefill (what the prompt's steps leave)";
    case CacheStart::kPreload:
      if (arguments.preload.empty()) {
        return "preload (as recorded)";
      }
      return fmt::format("preload (most used of the {} router in {})", arguments.router(), arguments.preload);
    case CacheStart::kCold:
      break;
  }
  return "cold (empty)";
}

void print_table(const RoutingTrace& trace, const SimulateArguments& arguments,
                 const std::optional<FoldedTrace>& folded, const std::vector<Setting>& settings) {
  const bool include_prefill = arguments.include_prefill;
  const std::int64_t tokens = served_tokens(trace, include_prefill);
  const bool bytes_known = std::any_of(trace.layers.begin(), trace.layers.end(),
                                       [](const TraceLayer& layer) { return layer.expert_bytes > 0; });
  std::cout << fmt::format("trace             {}\n", trace.model.empty() ? "(model not named)" : trace.model)
            << (folded ? fmt::format("folded            {}\n", folded->description()) : "")
            << fmt::format("routing           {} MoE layers, {} experts, top {}, {} tokens{}\n", trace.layers.size(),
                           trace.num_experts, trace.top_k, tokens, include_prefill ? " with prefill" : " decoded")
            << fmt::format("start             {}\n", start_text(arguments))
            << fmt::format("expert overlap    {:.6f}\n", expert_overlap_ratio(trace, include_prefill))
            << fmt::format("distinct experts  {:.2f} per sequence and layer\n\n",
                           distinct_experts(trace, include_prefill));
  std::cout << fmt::format("{:<12} {:>6} {:>10} {:>10} {:>8} {:>10} {:>10} {:>9}{}\n", "policy", "slots", "requests",
                           "hits", "cold", "loads", "evictions", "hit rate", bytes_known ? "  bytes/token" : "");
  for (const Setting& setting : settings) {
    const SimulationCounts& counts = setting.counts;
    std::cout << fmt::format("{:<12} {:>6} {:>10} {:>10} {:>8} {:>10} {:>10} {:>9.6f}", label(setting.options),
                             setting.options.slots, counts.requests, counts.hits, counts.cold, counts.loads,
                             counts.evictions, counts.hit_rate());
    if (bytes_known) {
      const double bytes = tokens == 0 ? 0.0 : static_cast<double>(counts.load_bytes) / static_cast<double>(tokens);
      std::cout << fmt::format("  {:>11}", format_bytes(bytes));
    }
    std::cout << '\n';
  }
  std::cout.flush();
}

void run_simulate(const SimulateArguments& arguments) {
  std::optional<RoutingShape> shape;
  if (!arguments.fold.empty()) {
    shape = shape_from_text(arguments.fold, "--fold");
  }
  const RoutingTrace recorded = read_trace(arguments.trace);
  const std::optional<FoldedTrace> folded = shape ? std::optional(fold_trace(recorded, *shape)) : std::nullopt;
  const RoutingTrace& trace = folded ? folded->trace : recorded;
  std::vector<Setting> settings = settings_of(arguments, trace);
  for (Setting& setting : settings) {
    setting.counts = simulate(trace, setting.options);
  }
  if (arguments.json) {
    print_json(arguments, folded, settings);
  } else {
    print_table(trace, arguments, folded, settings);
  }
}

}  // namespace

void add_simulate(CLI::App& app) {
  auto arguments = std::make_shared<SimulateArguments>();
  CLI::App* command =
      app.add_subcommand("simulate", "count what slot caches of several policies and sizes make of a routing trace");
  command
      ->add_option("trace", arguments->trace, "routing trace: route_trace CSV, llama.cpp's layer,expert CSV, or HDF5")
      ->required()
      ->option_text("TRACE");
  // One argument each (a comma list), or the positional TRACE after it would be taken for another value.
  command
      ->add_option(
          "--policy", arguments->policies,
          fmt::format("policies, comma list or repeated: {} (default lru,lfu,belady)", fmt::join(policy_names(), ", ")))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("NAME,...");
  command
      ->add_option("--slots", arguments->slots,
                   "slots per layer, comma list or repeated (default E/8, E/4, E/2 of the trace's E experts)")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("C,...");
  command
      ->add_option("--gamma", arguments->gamma,
                   fmt::format("discount of the policy gamma, in [0, 1] (default {})", arguments->gamma))
      ->option_text("G");
  command
      ->add_option("--seed", arguments->seed,
                   fmt::format("seed of the policy random, SplitMix64 (default {})", arguments->seed))
      ->option_text("N");
  command->add_flag("--include-prefill", arguments->include_prefill, "serve and count prefill steps too");
  command
      ->add_option("--start", arguments->start,
                   fmt::format("what a cache holds when decoding begins: {} (default {})",
                               fmt::join(start_names(), ", "), arguments->start))
      ->option_text("NAME");
  command
      ->add_option("--preload", arguments->preload,
                   "with --start preload: a preferences.h5, whose most used experts go first (default: as recorded)")
      ->option_text("FILE");
  command
      ->add_option("--preload-router", arguments->preload_router,
                   fmt::format("whose counts in it: baseline or tuned (default {})", arguments->router()))
      ->option_text("NAME");
  command
      ->add_option(
          "--fold", arguments->fold,
          "lay the trace onto L layers of E experts first: layer l takes those of layer l mod n, expert e is e "
          "mod E")
      ->option_text("LxE");
  command->add_flag("--json", arguments->json, "one JSON object per line instead of the table");
  command->footer("Example: hestia simulate trace.csv --policy lru,belady --slots 8,16 --json");
  command->callback([arguments] { run_simulate(*arguments); });
}

}  // namespace hestia
