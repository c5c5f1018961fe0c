#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "commands.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/evaluation/score.hpp"
#include "hestia/model/tensors.hpp"

namespace hestia {
namespace {

struct ScoreArguments {
  std::filesystem::path dump;
  std::vector<std::string> overrides;
  std::vector<std::string> policies = policy_names();
  std::int64_t slots = 0;
  std::int64_t top_k = 0;
  double gamma = ScoreOptions{}.gamma;
  std::filesystem::path gradients;
  bool json = false;
};

ScoreOptions options_of(const ScoreArguments& arguments) {
  ScoreOptions options;
  options.slots = arguments.slots;
  options.gamma = arguments.gamma;
  options.gradients = !arguments.gradients.empty();
  for (const std::string& name : arguments.policies) {
    options.policies.push_back(policy_from_name(name));
  }
  FieldList list;
  list.add_section("losses", options.losses.fields(), "routing objectives");
  Problems problems;
  // What it returns says where each value came from; here that is always the command line.
  (void)read_overrides(arguments.overrides, list, problems);
  problems.throw_usage_if_any();
  return options;
}

Json result_json(const ScoreArguments& arguments, const RoutingDump& dump, const Score& result) {
  std::int64_t counted = 0;
  std::int64_t tokens = 0;
  const std::vector<SequenceRun> runs = sequence_runs(dump.layout);
  for (const SequenceRun& run : runs) {
    tokens += run.length();
    for (std::int64_t token = run.begin; token < run.end; ++token) {
      counted += dump.layout.counted[static_cast<std::size_t>(token)];
    }
  }
  return {{"format_version", 1},
          {"kind", "hestia score"},
          {"file", arguments.dump.string()},
          {"dtype", dump.logits_LSE.scalar_type() == torch::kFloat64 ? "float64" : "float32"},
          {"layers", dump.logits_LSE.size(0)},
          {"experts", dump.logits_LSE.size(2)},
          {"top_k", dump.selected_LSK.size(2)},
          {"sequences", runs.size()},
          {"tokens", tokens},
          {"counted_tokens", counted},
          {"losses", result.losses},
          {"skipped", result.skipped},
          {"metrics", result.metrics}};
}

void print_table(const Json& json) {
  std::cout << fmt::format(
      "{:<17} {}\n{:<17} {} MoE layers, {} experts, top {}, {}\n{:<17} {} in {} sequences, {} counted\n\n",
      "router logits", json["file"].get<std::string>(), "routing", json["layers"].dump(), json["experts"].dump(),
      json["top_k"].dump(), json["dtype"].get<std::string>(), "tokens", json["tokens"].dump(), json["sequences"].dump(),
      json["counted_tokens"].dump());
  std::cout << fmt::format("{:<17} {:>14}\n", "objective", "value");
  for (const auto& [name, value] : json["losses"].items()) {
    std::cout << fmt::format(
        "{:<17} {:>14}\n", name,
        value.is_null() ? json["skipped"][name].get<std::string>() : fmt::format("{:.6g}", value.get<double>()));
  }
  std::cout << fmt::format("\n{:<17} {:>14.6f}\n{:<17} {:>14.2f}\n", "expert overlap",
                           json["metrics"]["eor"].get<double>(), "distinct experts",
                           json["metrics"]["distinct"].get<double>());
  std::cout << fmt::format("\n{:<9} {:>6} {:>10} {:>10} {:>8} {:>10} {:>10} {:>9}\n", "policy", "slots", "requests",
                           "hits", "cold", "loads", "evictions", "hit rate");
  for (const auto& [name, row] : json["metrics"].items()) {
    if (row.is_object()) {
      std::cout << fmt::format("{:<9} {:>6} {:>10} {:>10} {:>8} {:>10} {:>10} {:>9.6f}\n", name, row["slots"].dump(),
                               row["requests"].dump(), row["hits"].dump(), row["cold"].dump(), row["loads"].dump(),
                               row["evictions"].dump(), row["hit_rate"].get<double>());
    }
  }
}

void run_score(const ScoreArguments& arguments) {
  const ScoreOptions options = options_of(arguments);
  const RoutingDump dump = read_routing_dump(arguments.dump, arguments.top_k);
  const Score result = score(dump, options);
  if (options.gradients) {
    std::vector<std::pair<std::string, torch::Tensor>> tensors;
    for (const auto& [name, gradient] : result.gradients) {
      tensors.emplace_back("grad." + name, gradient);
    }
    write_tensors(arguments.gradients, tensors, {{"hestia_format", "routing_gradients 1"}});
    log_info(fmt::format("wrote {}: {} gradients", arguments.gradients.string(), tensors.size()));
  }
  const Json json = result_json(arguments, dump, result);
  if (arguments.json) {
    std::cout << json.dump() << '\n';
  } else {
    print_table(json);
  }
  std::cout.flush();
}

}  // namespace

void add_score(CLI::App& app) {
  auto arguments = std::make_shared<ScoreArguments>();
  CLI::App* verb =
      app.add_subcommand("score", "every routing objective and metric of router logits that any framework wrote");
  verb->add_option(
          "dump", arguments->dump,
          "safetensors: router_logits [L, S, E], optional base_router_logits, sequence_ids, counted, selected; "
          "metadata top_k")
      ->required()
      ->option_text("FILE");
  verb->add_option(
      "overrides", arguments->overrides,
      "key=value: options of the objectives as in a recipe, for example losses.cache_simulation.gamma=0.8");
  verb->add_option("--slots", arguments->slots,
                   "slots per layer C, of the policies and of cache_simulation (default E/4)")
      ->check(CLI::PositiveNumber)
      ->option_text("C");
  verb->add_option("--top-k", arguments->top_k, "experts per token (default: the file's metadata)")
      ->check(CLI::PositiveNumber)
      ->option_text("K");
  verb->add_option("--policy", arguments->policies,
                   fmt::format("policies, comma list or repeated (default all: {})", fmt::join(policy_names(), ", ")))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("NAME,...");
  verb->add_option("--gamma", arguments->gamma,
                   fmt::format("discount of the policy gamma, in [0, 1] (default {})", arguments->gamma))
      ->option_text("G");
  verb->add_option("--gradients", arguments->gradients,
                   "safetensors to write: grad.NAME [L, S, E], the gradient of each objective's value in the logits")
      ->option_text("FILE");
  verb->add_flag("--json", arguments->json, "one JSON object instead of the table");
  verb->footer("Example: hestia score router_logits.safetensors --slots 16 losses.rank_matching.margin=0.05 --json");
  verb->callback([arguments] { run_score(*arguments); });
}

}  // namespace hestia
