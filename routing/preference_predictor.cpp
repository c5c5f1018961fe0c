#include "hestia/routing/preference_predictor.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include <fmt/format.h>

namespace hestia {

namespace {

// weight [rows, columns] times x, plus bias; sums in double.
std::vector<double> affine(std::span<const float> weight, std::span<const float> bias, std::span<const float> x) {
  std::vector<double> result(bias.begin(), bias.end());
  for (std::size_t row = 0; row < bias.size(); ++row) {
    const float* w = weight.data() + row * x.size();
    for (std::size_t i = 0; i < x.size(); ++i) {
      result[row] += static_cast<double>(w[i]) * static_cast<double>(x[i]);
    }
  }
  return result;
}

}  // namespace

std::vector<float> PreferencePredictor::predict(std::span<const float> embedding_values) const {
  if (embedding_values.size() != static_cast<std::size_t>(embedding_size)) {
    throw std::invalid_argument(fmt::format("preference predictor: the embedding must have {} values, got {}",
                                            embedding_size, embedding_values.size()));
  }
  std::vector<float> hidden;
  for (const double value : affine(hidden_weight, hidden_bias, embedding_values)) {
    hidden.push_back(static_cast<float>(std::max(value, 0.0)));
  }
  const std::vector<double> logits = affine(output_weight, output_bias, hidden);
  std::vector<float> prediction(logits.size());
  const auto experts = static_cast<std::size_t>(num_experts);
  for (std::size_t begin = 0; begin < logits.size(); begin += experts) {
    const double* z = logits.data() + begin;
    const double largest = *std::max_element(z, z + experts);
    double sum = 0.0;
    for (std::size_t e = 0; e < experts; ++e) {
      sum += std::exp(z[e] - largest);
    }
    for (std::size_t e = 0; e < experts; ++e) {
      prediction[begin + e] = static_cast<float>(std::exp(z[e] - largest) / sum);
    }
  }
  return prediction;
}

std::vector<std::int64_t> top_experts(std::span<const float> scores, std::int64_t count) {
  if (count < 0 || count > static_cast<std::int64_t>(scores.size())) {
    throw std::invalid_argument(fmt::format("top_experts: {} of {} scores", count, scores.size()));
  }
  std::vector<std::int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](std::int64_t a, std::int64_t b) {
    const float x = scores[static_cast<std::size_t>(a)];
    const float y = scores[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  order.resize(static_cast<std::size_t>(count));
  return order;
}

}  // namespace hestia
