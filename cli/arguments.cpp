#include "arguments.hpp"

#include <filesystem>
#include <iostream>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/evaluation/throughput.hpp"

namespace hestia {

void add_recipe_arguments(CLI::App& verb, RecipeArguments& arguments, const std::string& what) {
  verb.add_option("recipe", arguments.recipe, what)->required();
  verb.add_option("overrides", arguments.overrides,
                  "key=value: replaces one key of the recipe, for example train.steps=50");
}

void check_overrides(const RecipeArguments& arguments) {
  for (const std::string& text : arguments.overrides) {
    if (text.find('=') == std::string::npos) {
      throw UsageError(fmt::format("command line: \"{}\" is not an override; write key=value", text));
    }
  }
}

std::string recipe_keys(const std::string& task) {
  FinetuneRecipe finetune;
  PretrainRecipe pretrain;
  BenchRecipe bench;
  return describe_fields(task == "pretrain" ? pretrain.fields() : task == "bench" ? bench.fields() : finetune.fields());
}

void add_help_keys(CLI::App& verb, const std::string& task) {
  verb.add_flag_callback(
      "--help-keys",
      [task] {
        std::cout << recipe_keys(task);
        throw CLI::Success();
      },
      "print every recipe key with its kind, default and meaning, and exit");
}

LoadedRecipe<FinetuneRecipe> load_recipe_or_run(const RecipeArguments& arguments) {
  check_overrides(arguments);
  const std::filesystem::path path = arguments.recipe;
  if (!std::filesystem::is_directory(path)) {
    return load_finetune_recipe(path, arguments.overrides);
  }
  const std::filesystem::path saved = path / "recipe.yaml";
  if (!std::filesystem::exists(saved)) {
    throw InputError(fmt::format("{}: not a run directory, recipe.yaml is missing; give a recipe or the run_dir of one",
                                 path.string()));
  }
  // Double quotes: a path may look like anything to YAML.
  std::vector<std::string> overrides = {"run_dir=" + Json(path.string()).dump()};
  overrides.insert(overrides.end(), arguments.overrides.begin(), arguments.overrides.end());
  return load_finetune_recipe(saved, overrides);
}

}  // namespace hestia
