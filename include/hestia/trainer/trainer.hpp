#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hestia/core/json_lines.hpp"
#include "hestia/data/packing.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/model/residency_selector.hpp"
#include "hestia/model/tuned_checkpoint.hpp"
#include "hestia/routing_losses/routing_losses.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// Peak-relative learning rate at optimiser step `step` (1..steps): linear warm-up, then linear or cosine decay to
/// `final_learning_rate` at `decay_steps` (the last step where 0) and constant from there, or constant throughout.
[[nodiscard]] double learning_rate_at(const TrainOptions& options, std::int64_t step);

/// Experts per token at optimiser step `step` (1..steps) of a model with K = `top_k`: K' from the annealing step on.
[[nodiscard]] std::int64_t top_k_at(const TrainOptions& options, std::int64_t step, std::int64_t top_k);

/// How routing in the residency loop changes from step to step.
struct ResidencySchedule {
  std::shared_ptr<ResidencySelector> selector;  ///< Of the model; null: nothing changes.
  ResidencyRule rule;                           ///< That training ends with, and that evaluations in between take.
  std::int64_t ramp_steps = 0;
  std::vector<std::int64_t> slots;
  /// The rule of step `step` (first step: 1): lambda * min(1, step / ramp_steps), and C the slots in turn.
  [[nodiscard]] ResidencyRule at(std::int64_t step) const;
};

/// Everything the loop needs, borrowed: all of it must outlive the call.
struct TrainingJob {
  MoeModel model{nullptr};  ///< With the adapters that `options.trainable` router+lora trains.
  TrainOptions options;
  std::vector<WeightedLoss> losses;
  std::vector<std::string> loss_domains;          ///< Training domains whose tokens `losses` count; empty: all.
  std::vector<std::string> nll_domains;           ///< Training domains whose labels the NLL counts; empty: all.
  double distillation_weight = 0.0;               ///< Of distillation_sum per label; 0: not computed.
  std::vector<std::string> distillation_domains;  ///< Training domains whose labels it counts; empty: all.
  /// The untouched model, for terms that need its forward. Empty: `model` with its kept reference routers and without
  /// adapters, which is the base model as long as only routers and adapters train.
  MoeModel base_model{nullptr};
  const PackedData* train_data = nullptr;
  std::vector<double> train_mix;
  ResidencySchedule residency;
  std::int64_t sequence_length = 256;
  const PackedData* held_out = nullptr;  ///< May be null: no evaluation.
  std::uint64_t seed = 1;
  std::filesystem::path run_dir;
  std::string resolved_recipe;  ///< Saved as recipe.yaml; a resumed run must match it.
  /// Name and text of other files that a fresh run starts its directory with.
  std::vector<std::pair<std::string, std::string>> run_files;
  /// Names in the run directory of what the caller makes after training; `overwrite` removes them, too.
  std::vector<std::string> outputs;
  std::string label;  ///< Shown in front of the progress bar.
  bool resume = false;
  bool overwrite = false;
  bool quiet = false;
  const std::atomic<bool>* stop = nullptr;  ///< Checked after every step: save a checkpoint and throw InterruptedError.
  /// Called with each finished optimiser step's metrics (tests).
  std::function<void(const Json&)> on_step;
};

/// Result of a finished run.
struct TrainingResult {
  std::int64_t steps = 0;
  double seconds = 0.0;     ///< Of the steps run by this process, evaluation left out.
  std::int64_t tokens = 0;  ///< Tokens trained on by this process (padding left out).
};

/// Seed of the order in which a run with `seed` draws its data.
[[nodiscard]] std::uint64_t data_order_seed(std::uint64_t seed);

/// Trains `job.model` in place, which keeps the K of the last step, and leaves a run directory: recipe.yaml,
/// metrics.jsonl, checkpoints/step_N. The steps in `job.options` must be known (resolve_steps).
/// Throws UsageError when the directory holds another run (or one to be resumed without `resume`), RunError on a
/// non-finite loss or gradient, before the update, InterruptedError after `stop`.
TrainingResult train(const TrainingJob& job);

/// Throws UsageError, with the first difference, when the run in `run_dir` began with another recipe than
/// `resolved_recipe`, as save_recipe writes it: such a run is not to be gone on with. InputError without its
/// recipe.yaml.
void check_same_recipe(const std::filesystem::path& run_dir, const std::string& resolved_recipe);

/// The newest complete checkpoint of a run directory: step number and folder; nullopt when there is none.
[[nodiscard]] std::optional<std::pair<std::int64_t, std::filesystem::path>> latest_checkpoint(
    const std::filesystem::path& run_dir);

/// What a folder of a run's checkpoints/ holds of the tuned model. Throws InputError when its state.json is damaged or
/// names a K that is not of this architecture.
[[nodiscard]] TunedParts tuned_parts(const std::filesystem::path& folder, const Architecture& base);

/// Puts those parts into the base `model`; one that has adapters loses them when the checkpoint has none. Throws
/// InputError when a file is damaged or of another model.
void load_checkpoint_weights(MoeModel& model, const std::filesystem::path& folder);

/// The same for a run of any trainable set: with "all", every parameter becomes its float32 master, rounded. The model
/// then has nothing of the base left. Throws InputError when a file is damaged or of another model.
void load_run_weights(MoeModel& model, const std::filesystem::path& folder, const std::string& trainable);

/// Sets requires_grad for a trainable set ("router", "router+lora" or "all") and returns the trainable parameters in a
/// fixed order: routers by layer, then adapters as MoeModel::adapters gives them; or all_parameters. Throws
/// std::invalid_argument for router+lora on a model without adapters, and for another name.
std::vector<torch::Tensor> select_trainable(MoeModel& model, const std::string& trainable);

}  // namespace hestia
