#include <algorithm>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "commands.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/routing/metrics.hpp"
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

// Parses every argument before the first simulation, so that a typing mistake leaves no half a result.
std::vector<Setting> settings_of(const SimulateArguments& arguments, const RoutingTrace& trace) {
  std::vector<std::int64_t> slots = arguments.slots;
  if (slots.empty()) {
    for (const std::int64_t divisor : {8, 4, 2}) {
      slots.push_back(std::max<std::int64_t>(1, trace.num_experts / divisor));
    }
  }
  std::vector<Setting> settings;
  for (const std::string& name : arguments.policies) {
    for (const std::int64_t count : slots) {
      Setting setting;
      setting.options.policy = policy_from_name(name);
      setting.options.slots = count;
      setting.options.gamma = arguments.gamma;
      setting.options.seed = arguments.seed;
      setting.options.include_prefill = arguments.include_prefill;
      setting.options.num_threads = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
      settings.push_back(setting);
    }
  }
  return settings;
}

void print_json(const std::vector<Setting>& settings) {
  for (const Setting& setting : settings) {
    const Json line = {{"policy", policy_name(setting.options.policy)},
                       {"slots", setting.options.slots},
                       {"requests", setting.counts.requests},
                       {"hits", setting.counts.hits},
                       {"cold", setting.counts.cold},
                       {"loads", setting.counts.loads},
                       {"evictions", setting.counts.evictions},
                       {"hit_rate", setting.counts.hit_rate()}};
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

void print_table(const RoutingTrace& trace, bool include_prefill, const std::vector<Setting>& settings) {
  const std::int64_t tokens = served_tokens(trace, include_prefill);
  const bool bytes_known = std::any_of(trace.layers.begin(), trace.layers.end(),
                                       [](const TraceLayer& layer) { return layer.expert_bytes > 0; });
  std::cout << fmt::format("trace             {}\n", trace.model.empty() ? "(model not named)" : trace.model)
            << fmt::format("routing           {} MoE layers, {} experts, top {}, {} tokens{}\n", trace.layers.size(),
                           trace.num_experts, trace.top_k, tokens, include_prefill ? " with prefill" : " decoded")
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
  const RoutingTrace trace = read_trace(arguments.trace);
  std::vector<Setting> settings = settings_of(arguments, trace);
  for (Setting& setting : settings) {
    setting.counts = simulate(trace, setting.options);
  }
  if (arguments.json) {
    print_json(settings);
  } else {
    print_table(trace, arguments.include_prefill, settings);
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
  command->add_flag("--json", arguments->json, "one JSON object per line instead of the table");
  command->footer("Example: hestia simulate trace.csv --policy lru,belady --slots 8,16 --json");
  command->callback([arguments] { run_simulate(*arguments); });
}

}  // namespace hestia
