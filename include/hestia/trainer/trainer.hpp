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
#include "hestia/routing_losses/routing_losses.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// Peak-relative learning rate at optimiser step `step` (1..steps): linear warm-up, then linear or cosine decay to
/// `final_learning_rate` at `decay_steps` (the last step where 0) and constant from there, or constant throughout.
[[nodiscard]] double learning_rate_at(const TrainOptions& options, std::int64_t step);

/// Everything the loop needs, borrowed: all of it must outlive the call.
struct TrainingJob {
  MoeModel model{nullptr};
  TrainOptions options;
  std::vector<WeightedLoss> losses;
  double distillation_weight = 0.0;  ///< Of distillation_sum per label; 0: not computed.
  /// The untouched model, for terms that need its forward. Empty: `model` with its kept reference routers, which is the
  /// base model as long as only routers train.
  MoeModel base_model{nullptr};
  const PackedData* train_data = nullptr;
  std::vector<double> train_mix;
  std::int64_t sequence_length = 256;
  const PackedData* held_out = nullptr;  ///< May be null: no evaluation.
  std::uint64_t seed = 1;
  std::filesystem::path run_dir;
  std::string resolved_recipe;  ///< Saved as recipe.yaml; a resumed run must match it.
  std::string label;            ///< Shown in front of the progress bar.
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
  double last_loss = 0.0;
  double seconds = 0.0;     ///< Of the steps run by this process, evaluation left out.
  std::int64_t tokens = 0;  ///< Tokens trained on by this process (padding left out).
};

/// Seed of the order in which a run with `seed` draws its data.
[[nodiscard]] std::uint64_t data_order_seed(std::uint64_t seed);

/// Trains `job.model` in place and leaves a run directory: recipe.yaml, metrics.jsonl, checkpoints/step_N. The steps in
/// `job.options` must be known (resolve_steps).
/// Throws UsageError when the directory holds another run (or one to be resumed without `resume`), RunError on a
/// non-finite loss or gradient, before the update, InterruptedError after `stop`.
TrainingResult train(const TrainingJob& job);

/// The newest complete checkpoint of a run directory: step number and folder; nullopt when there is none.
[[nodiscard]] std::optional<std::pair<std::int64_t, std::filesystem::path>> latest_checkpoint(
    const std::filesystem::path& run_dir);

/// Sets requires_grad for a trainable set ("router" or "all") and returns the trainable parameters in a fixed order.
std::vector<torch::Tensor> select_trainable(MoeModel& model, const std::string& trainable);

}  // namespace hestia
