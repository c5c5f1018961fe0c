#include <memory>

#include "arguments.hpp"
#include "commands.hpp"
#include "hestia/trainer/tasks.hpp"

namespace hestia {

void add_pretrain(CLI::App& app) {
  auto arguments = std::make_shared<RecipeArguments>();
  auto flags = std::make_shared<RunFlags>();
  CLI::App* verb = app.add_subcommand("pretrain", "train a small MoE model from scratch, with its tokenizer");
  add_recipe_arguments(*verb, *arguments, "pretraining recipe (YAML)");
  verb->add_flag("--resume", flags->resume, "go on from the newest complete checkpoint of run_dir");
  verb->add_flag("--overwrite", flags->overwrite, "remove an earlier run in run_dir and start afresh")
      ->excludes("--resume");
  verb->add_flag("--quiet", flags->quiet, "no progress bar and no step lines");
  add_help_keys(*verb, "pretrain");
  verb->footer("Example: hestia pretrain recipes/pretrain_tiny.yaml model.device=cuda");
  verb->callback([arguments, flags] {
    check_overrides(*arguments);
    flags->stop = &interrupt_flag();
    run_pretrain(load_pretrain_recipe(arguments->recipe, arguments->overrides), *flags);
  });
}

}  // namespace hestia
