#pragma once

#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// What every verb with a recipe takes: `RECIPE [key=value ...]`.
struct RecipeArguments {
  std::string recipe;
  std::vector<std::string> overrides;
};

/// Adds RECIPE and overrides to `verb`; `what` describes the positional.
void add_recipe_arguments(CLI::App& verb, RecipeArguments& arguments, const std::string& what);
/// Throws UsageError naming an argument after the recipe that is not key=value.
void check_overrides(const RecipeArguments& arguments);
/// Adds `--help-keys`, which prints every key of a recipe kind and exits: "finetune", "pretrain" or "bench".
void add_help_keys(CLI::App& verb, const std::string& task);
/// The key table of a recipe kind.
[[nodiscard]] std::string recipe_keys(const std::string& task);
/// The recipe of `arguments`. A run directory stands for the recipe saved in it, run there: it may have been moved.
/// Throws UsageError as check_overrides does, InputError for a directory without a recipe.
[[nodiscard]] LoadedRecipe<FinetuneRecipe> load_recipe_or_run(const RecipeArguments& arguments);

}  // namespace hestia
