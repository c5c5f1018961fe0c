#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include <torch/types.h>

#include "hestia/core/json_lines.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/routing/preference_predictor.hpp"
#include "hestia/routing/preferences.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// N sequences with a prompt and an answer, on the CPU: what the predictor learns from. 8 + 4 bytes per (n, l, e).
struct PredictorExamples {
  std::vector<std::int64_t> ids;   ///< [N]
  torch::Tensor embeddings_ND;     ///< float32, of the prompts.
  torch::Tensor target_NLE;        ///< float32, mean router probability over the answer; each layer sums to 1.
  torch::Tensor count_NLE;         ///< int32, tokens of the answer that select e.
  torch::Tensor prompt_count_NLE;  ///< int32, tokens of the prompt that select e.
  std::int64_t num_left_out = 0;   ///< Stored sequences without a prompt or without an answer.
  std::string embedding;           ///< What embeddings_ND is, in words.
};

/// The stored sequences of `writer` that have a prompt and an answer, under the tuned router; embeddings are left open.
[[nodiscard]] PredictorExamples collect_examples(PreferenceWriter& writer);

/// The model's matrix of token embeddings, [V, D] in its dtype: the parameter itself.
[[nodiscard]] torch::Tensor token_embedding(MoeModel& model);
/// Mean of the rows of `embedding_VD` at `tokens` (at least one): float32 [D] on the CPU.
[[nodiscard]] torch::Tensor mean_embedding(const torch::Tensor& embedding_VD, std::span<const std::int64_t> tokens);
/// Rows of a safetensors file for `ids`, in that order: float32 [N, D]. The file holds `ids` int64 [M] and `embeddings`
/// [M, D] of a float type. Throws InputError: no such file, other tensors, an id that is missing or there twice, values
/// that are not finite.
[[nodiscard]] torch::Tensor read_embeddings(const std::filesystem::path& path, const std::vector<std::int64_t>& ids);

/// Which of N examples train and which are held out.
struct ExampleSplit {
  std::vector<std::int64_t> train;
  std::vector<std::int64_t> held_out;
};
/// A seeded shuffle; round(N * fraction) examples are held out, at least one on each side. Throws RunError when N < 2.
[[nodiscard]] ExampleSplit split_examples(std::int64_t num_examples, double held_out_fraction, std::uint64_t seed);

/// Trains the predictor on the training part of split_examples(N, held_out_fraction, seed) and compares it with three
/// guesses that cost nothing, on the held-out part. Loss: mean over the batch of the sum over layers of KL(target ||
/// prediction); SGD with momentum (v = m v + g, w = w - lr v). The guesses: `mean_popularity`, the mean target of the
/// training part; `prompt_routing`, the experts that the prompt itself used, with as many of mean popularity added as
/// one token uses; `nearest_prompt`, the target of the training example of the highest cosine between embeddings.
/// Predictions below 1e-8 count as 1e-8 in KL. `on_epoch` (may be empty) gets the mean training loss per layer. The
/// same seed and thread count give the same bits. Throws RunError when the loss is not finite, std::invalid_argument on
/// shapes that do not fit, UsageError for slots beyond E.
[[nodiscard]] PreferencePredictor train_preference_predictor(
    const PredictorExamples& examples, const PredictorOptions& options, std::int64_t top_k, std::int64_t decisive_slots,
    std::uint64_t seed, const std::function<void(std::int64_t epoch, double loss)>& on_epoch = {});

/// The report as it stands in manifest.json and results.json.
[[nodiscard]] Json predictor_json(const PreferencePredictor& predictor);

}  // namespace hestia
