#pragma once

#include <atomic>
#include <filesystem>
#include <string>

#include "hestia/trainer/recipes.hpp"
#include "hestia/trainer/trainer.hpp"

namespace hestia {

/// How a verb runs a recipe.
struct RunFlags {
  bool resume = false;
  bool overwrite = false;
  bool quiet = false;
  const std::atomic<bool>* stop = nullptr;
};

/// `hestia finetune`: the recipe's run, then its control (run_dir/control) when enabled.
void run_finetune(const LoadedRecipe<FinetuneRecipe>& loaded, const RunFlags& flags);
/// `hestia pretrain`: tokeniser, model from scratch, all parameters; the model directory lands in run_dir/model.
void run_pretrain(const LoadedRecipe<PretrainRecipe>& loaded, const RunFlags& flags);
/// `hestia export --to bundle`: writes `output` (run_dir/bundle when empty) and returns it. Throws UsageError when the
/// run is not finished.
std::filesystem::path run_export(const LoadedRecipe<FinetuneRecipe>& loaded, const std::filesystem::path& output,
                                 bool quiet);

}  // namespace hestia
