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
/// What `hestia export` writes.
struct ExportTarget {
  std::string to = "bundle";     ///< One of export_formats().
  std::filesystem::path output;  ///< Empty: a folder named as the format in run_dir (for "gguf" the file's name in it).
  std::filesystem::path gguf;    ///< With "gguf": the base model's GGUF file.
  bool untuned = false;          ///< A bundle of the base's own routers under the recipe's residency rule, of no run.
};
/// `hestia export`: writes a router bundle ("bundle"), a whole Hugging Face directory ("hf", see
/// model/tuned_checkpoint.hpp) or a GGUF file ("gguf", model/tuned_gguf.hpp), and returns the path. Throws UsageError
/// for another format, a run that is not finished, and one that trained more than routers and adapters. An untuned
/// bundle needs no run and goes to run_dir/untuned; UsageError for another format than "bundle", and when the recipe's
/// residency.lambda is 0, which leaves nothing to serve.
std::filesystem::path run_export(const LoadedRecipe<FinetuneRecipe>& loaded, const ExportTarget& target, bool quiet);

}  // namespace hestia
