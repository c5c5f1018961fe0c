#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "arguments.hpp"
#include "commands.hpp"
#include "hestia/core/log.hpp"
#include "hestia/evaluation/comparison.hpp"

namespace hestia {

namespace {

struct EvaluateArguments {
  RecipeArguments recipe;
  EvaluateTarget target;
  bool json = false;
  bool quiet = false;
};

}  // namespace

void add_evaluate(CLI::App& app) {
  auto arguments = std::make_shared<EvaluateArguments>();
  CLI::App* verb = app.add_subcommand("evaluate", "compare baseline, control and tuned router on held-out text");
  add_recipe_arguments(*verb, arguments->recipe, "fine-tuning recipe, or the run directory it left");
  auto* bundle = verb->add_option("--bundle", arguments->target.bundle,
                                  "router bundle to compare (default: bundle/ in the run directory)");
  verb->add_flag("--checkpoint", arguments->target.checkpoint,
                 "compare the finished run as it stands, without a bundle; the way to measure train.trainable: all")
      ->excludes(bundle);
  verb->add_option("--only", arguments->target.only, "measure one router alone: baseline (needs no run) or tuned")
      ->check(CLI::IsMember({kBaselineArm, kTunedArm}));
  verb->add_flag("--json", arguments->json, "print results.json instead of the table");
  verb->add_flag("--quiet", arguments->quiet, "no progress bar");
  verb->footer("Example: hestia evaluate recipes/quickstart.yaml evaluate.slots=[4,8]");
  verb->callback([arguments] {
    const EvaluateTarget& target = arguments->target;
    if (target.only == kBaselineArm && (target.checkpoint || !target.bundle.empty())) {
      throw UsageError(fmt::format("--only baseline measures the model itself, got {} with it; leave one out",
                                   target.checkpoint ? "--checkpoint" : "--bundle"));
    }
    const auto loaded = load_recipe_or_run(arguments->recipe);
    const Comparison comparison = run_evaluate(loaded, arguments->target, arguments->quiet);
    if (arguments->json) {
      std::cout << comparison_json(comparison).dump(2) << "\n";
    } else {
      const std::string domains = comparison_table(comparison);
      const std::string tasks = task_table(comparison);
      std::cout << domains << (tasks.empty() || domains.ends_with("\n\n") ? "" : "\n") << tasks << std::flush;
    }
    const std::string& run_dir = loaded.recipe.run_dir;
    std::vector<std::pair<std::string, std::string>> files = {{"results", run_dir + "/results.json"}};
    if (!loaded.recipe.evaluate.tasks.empty()) {
      files.emplace_back("answers", run_dir + "/answers.jsonl");
    }
    if (target.only != kBaselineArm) {
      files.emplace_back(target.checkpoint ? "checkpoint" : "router bundle", comparison.bundle);
    }
    for (const auto& [name, path] :
         {std::pair("training log", run_dir + "/metrics.jsonl"), std::pair("checkpoints", run_dir + "/checkpoints")}) {
      if (std::filesystem::exists(path)) {  // the baseline and an untuned bundle need no run
        files.emplace_back(name, path);
      }
    }
    log_block("Files", files);
  });
}

}  // namespace hestia
