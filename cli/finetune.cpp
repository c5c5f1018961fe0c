#include <memory>

#include "arguments.hpp"
#include "commands.hpp"
#include "hestia/trainer/tasks.hpp"

namespace hestia {

void add_finetune(CLI::App& app) {
  auto arguments = std::make_shared<RecipeArguments>();
  auto flags = std::make_shared<RunFlags>();
  CLI::App* verb =
      app.add_subcommand("finetune", "tune the routers of a model so that sequences keep using few, stable experts");
  add_recipe_arguments(*verb, *arguments, "fine-tuning recipe (YAML)");
  verb->add_flag("--resume", flags->resume, "go on from the newest complete checkpoint of run_dir");
  verb->add_flag("--overwrite", flags->overwrite, "remove an earlier run in run_dir and start afresh")
      ->excludes("--resume");
  verb->add_flag("--quiet", flags->quiet, "no progress bar and no step lines");
  add_help_keys(*verb, "finetune");
  verb->footer("Example: hestia finetune recipes/quickstart.yaml train.steps=50 run_dir=runs/short");
  verb->callback([arguments, flags] {
    check_overrides(*arguments);
    flags->stop = &interrupt_flag();
    run_finetune(load_finetune_recipe(arguments->recipe, arguments->overrides), *flags);
  });
}

}  // namespace hestia
