#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace hestia {

/// PreferencePredictor::embedding of a predictor whose input is the mean of the rows of the model's embedding matrix at
/// the prompt's tokens.
inline constexpr const char* kMeanTokenEmbedding = "mean over the prompt's tokens of the model's token embeddings";

/// How well one way of guessing a sequence's expert preferences from its prompt does, over held-out sequences.
struct PredictorFigures {
  std::string method;
  double kl = 0.0;  ///< Mean over sequences and layers of KL(target || prediction), nats.
  /// Per entry of PredictorReport::slots, for the C experts of each layer with the highest prediction: the mean over
  /// sequences and layers of the router probability on them, and the share of all requests of the answers that they
  /// serve (the hit rate of C slots that are loaded once, before decoding).
  std::vector<double> probability_recall;
  std::vector<double> request_recall;
};

/// The predictor beside what costs nothing: `predictor`, `mean_popularity`, `prompt_routing`, `nearest_prompt`, and, as
/// the bound, `answer_itself`.
struct PredictorReport {
  std::int64_t num_train = 0;
  std::int64_t num_held_out = 0;
  std::int64_t num_left_out = 0;    ///< Stored sequences without a prompt or without an answer.
  std::vector<std::int64_t> slots;  ///< C, rising.
  std::int64_t decisive_slots = 0;  ///< The C of `best_by_requests`.
  std::vector<PredictorFigures> figures;
  std::string best_by_requests;  ///< Method of the highest request recall at `decisive_slots`, the bound left out.
  std::string best_by_kl;        ///< Method of the lowest KL, the bound left out.
};

/// Guesses from a prompt embedding which experts the answer will use (MELINOE, arXiv 2602.11192, "activation
/// predictor"): q = softmax per layer of W2 relu(W1 x + b1) + b2. float32, row-major.
struct PreferencePredictor {
  std::int64_t num_layers = 0;       ///< L
  std::int64_t num_experts = 0;      ///< E
  std::int64_t embedding_size = 0;   ///< D
  std::int64_t hidden_size = 0;      ///< H
  std::vector<float> hidden_weight;  ///< W1 [H, D]
  std::vector<float> hidden_bias;    ///< b1 [H]
  std::vector<float> output_weight;  ///< W2 [L, E, H]
  std::vector<float> output_bias;    ///< b2 [L, E]
  std::string embedding;             ///< What x is, in words.
  PredictorReport report;

  /// Expected router probabilities over the answer, [L, E], each layer summing to 1. Throws std::invalid_argument when
  /// `embedding_values` has not D entries.
  [[nodiscard]] std::vector<float> predict(std::span<const float> embedding_values) const;
};

/// The `count` experts of the highest scores, best first; ties to the lower index. Throws std::invalid_argument when
/// there are fewer scores.
[[nodiscard]] std::vector<std::int64_t> top_experts(std::span<const float> scores, std::int64_t count);

}  // namespace hestia
