#include <iostream>
#include <memory>

#include "arguments.hpp"
#include "commands.hpp"
#include "hestia/trainer/tasks.hpp"

namespace hestia {

namespace {

struct ExportArguments {
  RecipeArguments recipe;
  ExportTarget target;
  bool quiet = false;
};

}  // namespace

void add_export(CLI::App& app) {
  auto arguments = std::make_shared<ExportArguments>();
  CLI::App* verb = app.add_subcommand(
      "export", "write the tuned routers of a finished run as a router bundle, a model directory or a GGUF file");
  add_recipe_arguments(*verb, arguments->recipe, "fine-tuning recipe, or the run directory it left");
  verb->add_option("--to", arguments->target.to,
                   "what to write: bundle, hf (a model directory for transformers, vLLM) or gguf (a GGUF file for "
                   "llama.cpp)")
      ->capture_default_str();
  verb->add_option("--gguf", arguments->target.gguf,
                   "with --to gguf: the base model's GGUF file, of which a copy gets the tuned routers");
  verb->add_option(
      "--output", arguments->target.output,
      "folder to write, or with --to gguf the file (default: in bundle/, hf/ or gguf/ of the run directory)");
  verb->add_flag(
      "--untuned", arguments->target.untuned,
      "a bundle of the model's own routers under the recipe's residency rule: needs no run (default: in untuned/)");
  verb->add_flag("--quiet", arguments->quiet, "no progress bar");
  verb->footer("Example: hestia export recipes/quickstart.yaml");
  verb->callback([arguments] {
    std::cout << run_export(load_recipe_or_run(arguments->recipe), arguments->target, arguments->quiet).string()
              << "\n";
  });
}

}  // namespace hestia
