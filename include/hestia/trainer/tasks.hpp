#pragma once

#include <atomic>
#include <filesystem>
#include <string>
#include <vector>

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
/// What `hestia export --to` takes.
[[nodiscard]] std::vector<std::string> export_formats();
/// `hestia export`: writes a router bundle (`to` "bundle") or a whole Hugging Face directory ("hf", see
/// model/tuned_checkpoint.hpp) into `output`, or into the folder of that name in run_dir when it is empty, and returns
/// the folder. Throws UsageError for another `to`, a run that is not finished, and one that trained more than routers
/// and adapters.
std::filesystem::path run_export(const LoadedRecipe<FinetuneRecipe>& loaded, const std::string& to,
                                 const std::filesystem::path& output, bool quiet);

}  // namespace hestia
