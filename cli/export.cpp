#include <iostream>
#include <memory>

#include "arguments.hpp"
#include "commands.hpp"
#include "hestia/trainer/tasks.hpp"

namespace hestia {

namespace {

struct ExportArguments {
  RecipeArguments recipe;
  std::string to = "bundle";
  std::string output;
  bool quiet = false;
};

}  // namespace

void add_export(CLI::App& app) {
  auto arguments = std::make_shared<ExportArguments>();
  CLI::App* verb =
      app.add_subcommand("export", "write the tuned routers of a finished run as a router bundle or a model directory");
  add_recipe_arguments(*verb, arguments->recipe, "fine-tuning recipe, or the run directory it left");
  verb->add_option("--to", arguments->to, "what to write: bundle, or hf (a model directory for transformers, vLLM)")
      ->capture_default_str();
  verb->add_option("--output", arguments->output, "folder to write (default: bundle/ or hf/ in the run directory)");
  verb->add_flag("--quiet", arguments->quiet, "no progress bar");
  verb->footer("Example: hestia export recipes/quickstart.yaml");
  verb->callback([arguments] {
    std::cout << run_export(load_recipe_or_run(arguments->recipe), arguments->to, arguments->output, arguments->quiet)
                     .string()
              << "\n";
  });
}

}  // namespace hestia
